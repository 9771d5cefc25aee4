"""``recontrast-edge cameras``: every library is asked, and none can spoil the answer of another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recontrast_edge import cameras
from recontrast_edge.errors import SourceError
from recontrast_edge.sources import open_source


def ask(kind: str) -> dict[str, Any]:
    """One search, in this process."""
    return cameras._search(kind).to_json()


def test_pylon_cameras_come_with_the_uri_that_opens_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pypylon", reason="the extra `cameras` has it")
    monkeypatch.setenv("PYLON_CAMEMU", "3")
    found = ask("pylon")
    assert found["note"] is None
    assert [camera["uri"] for camera in found["cameras"]] == [f"pylon:0815-000{number}" for number in range(3)]
    open_source(f"{found['cameras'][0]['uri']}?pixel_format=Mono8").close()


def test_the_command_lists_a_producers_cameras_beside_a_broken_one(tmp_path: Path) -> None:
    genicam = pytest.importorskip("genicam", reason="the extra `cameras` has it")
    producer = Path(genicam.__path__[0], "viky.cti")
    if not producer.is_file():
        pytest.skip("genicam's wheel for this machine has no simulated devices")
    broken = tmp_path / "a broken.cti"
    broken.write_bytes(b"\x7fELF")
    command = [sys.executable, "-m", "recontrast_edge", "cameras", "--cti", str(producer), "--cti", str(broken)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = {search["where"]: search for search in json.loads(done.stdout)}
    uris = [camera["uri"] for camera in found[f"GenTL {producer}"]["cameras"]]
    assert uris == [f"genicam:{producer.resolve()}#VikyTL_DEV_{colour}" for colour in ("red", "green", "blue")]
    open_source(uris[2]).close()
    assert "not a GenTL producer" in found[f"GenTL {broken}"]["note"]
    assert {"V4L2", "pylon", "Aravis"} <= set(found)


def test_names_with_special_characters_survive_the_uri() -> None:
    from recontrast_edge.sources.genicam import parse_camera_uri

    uri = cameras._uri("aravis", "Maker?Cam #2%")
    assert parse_camera_uri(f"{uri}?fps=5", "aravis")[0] == "Maker?Cam #2%"


def test_a_library_that_is_missing_or_crashes_is_a_line_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(_module: str, kind: str, *_file: str, timeout_s: float) -> Any:
        assert timeout_s > 0
        if kind == "pylon":
            raise cameras.NoAnswerError("the probe ended with status -11 and no answer")
        return {"where": kind, "cameras": [{"uri": f"{kind}:1", "name": "one", "formats": []}], "note": None}

    monkeypatch.delenv("GENICAM_GENTL64_PATH", raising=False)
    monkeypatch.setattr(cameras, "answer_of", answer)
    v4l2, pylon, gentl, aravis = cameras.find_cameras()
    assert [camera.uri for camera in (*v4l2.cameras, *aravis.cameras)] == ["v4l2:1", "aravis:1"]
    assert (pylon.where, pylon.cameras, pylon.note) == (
        "pylon",
        (),
        "failed: the probe ended with status -11 and no answer",
    )
    assert "GENICAM_GENTL64_PATH" in (gentl.note or "")

    monkeypatch.setitem(sys.modules, "pypylon", None)
    assert "pip install" in ask("pylon")["note"]


def test_v4l2_devices_come_with_what_they_offer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from recontrast_edge.sources import v4l2

    def offered(device: Path) -> tuple[v4l2.PixelFormat, ...]:
        if device.name == "video2":
            raise SourceError(f"{device}: no permission")
        return (v4l2.PixelFormat("MJPG", ("1920x1080 (30 fps)",)),)

    devices = [tmp_path / "video10", tmp_path / "video2"]
    for device in devices:
        device.touch()
    devices[1].chmod(0)
    monkeypatch.setattr(v4l2, "offered_formats", offered)
    monkeypatch.setattr(cameras, "DEVICES", tmp_path)
    monkeypatch.setattr("os.access", lambda path, _mode: not str(path).endswith("video2"))
    found = ask("v4l2")["cameras"]
    assert [camera["uri"] for camera in found] == [str(devices[1]), str(devices[0])]
    assert found[0]["formats"] == (f"{devices[1]}: no permission",)
    assert found[1]["formats"] == ("MJPG 1920x1080 (30 fps)",)
