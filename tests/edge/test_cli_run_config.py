"""Lines from configuration files, run as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from recontrast_edge import cli
from recontrast_edge.frame import Frame
from recontrast_edge.judging import Inference
from recontrast_edge.onnxfile import SPEC_KEY, read_spec, replace_metadata
from recontrast_edge.render import annotate
from recontrast_edge.spec import Roi
from recontrast_edge.verdict import judge

GOOD, DEFECT = 50, 200
"""Brightness of images that the tiny model passes and rejects."""


@pytest.fixture
def run(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """Call the command line in this process; returns exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["recontrast-edge", "run", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def write_part(folder: Path, name: str, brightness: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image = np.full((32, 32, 3), GOOD, np.uint8)
    image[8:16, 8:16] = brightness
    cv2.imwrite(str(folder / f"{name}.png"), image)


@pytest.fixture
def line(tmp_path: Path, tiny_model: Path, monkeypatch) -> Path:
    """A folder with two cameras' images and two models; the working directory is another one."""
    for camera in ("left", "right"):
        for index in range(4):
            write_part(tmp_path / "line" / camera, f"A-{index}", DEFECT if index == 1 else GOOD)
    for model in ("a.onnx", "b.onnx"):
        shutil.copy(tiny_model, tmp_path / "line" / model)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "line"


def configure(line: Path, text: str) -> Path:
    path = line / "line.toml"
    path.write_text(f"quiet = true\nthreads = 1\n{text}")
    return path


TWO = """
outputs = ["jsonl:out/r.jsonl", "images:out/rejects", "modbus-server://127.0.0.1:{port}"]
summary = "out/s.json"
[products.a]
engine = "a.onnx"
[products.b]
engine = "b.onnx"
threshold = 0.9
[cameras.left]
source = "left"
products = ["a"]
[cameras.right]
source = "right"
products = ["b"]
"""


def records(line: Path) -> list[dict]:
    return [json.loads(text) for text in (line / "out" / "r.jsonl").read_text().splitlines()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_cameras_two_engines_three_outputs(run, line: Path) -> None:
    path = configure(line, TWO.format(port=free_port()))
    code, stdout, stderr = run("--config", path)
    assert (code, stderr) == (0, "")
    assert stdout.startswith("8 judged (7 PASS, 1 REJECT, 0 FAULT), 0 dropped of 8")
    found = Counter((record["camera"], record["threshold"], record["verdict"]) for record in records(line))
    assert found == {("left", 0.5, "PASS"): 3, ("left", 0.5, "REJECT"): 1, ("right", 0.9, "PASS"): 4}
    (picture,) = (line / "out" / "rejects").glob("*-left-00000001.json")
    assert json.loads(picture.read_text())["source"] == str(line / "left" / "A-1.png")
    summary = json.loads((line / "out" / "s.json").read_text())
    assert [(camera["camera"], camera["judged"]) for camera in summary["cameras"]] == [("left", 4), ("right", 4)]
    assert [output["written"] for output in summary["outputs"]] == [8, 8, 8]
    assert not list(Path.cwd().glob("out")), "relative paths begin at the file's folder"


def test_options_win(run, line: Path) -> None:
    path = configure(line, TWO.format(port=free_port()))
    code, stdout, _ = run("--config", path, "--output", f"jsonl:{line}/other.jsonl", "--no-quiet")
    assert code == 0
    assert "REJECT  left #1" in stdout
    # Of two cameras nobody knows whose frames come first.
    assert "3 judged" in run("--config", path, "--output", f"jsonl:{line}/other.jsonl", "--max-frames", 3)[1]
    assert (line / "other.jsonl").exists()
    assert not (line / "out" / "r.jsonl").exists()


def test_a_single_camera_has_no_name_in_its_records(run, line: Path) -> None:
    text = 'outputs = ["jsonl:out/r.jsonl"]\n[products.a]\nengine = "a.onnx"\n[cameras.left]\nsource = "left"\n'
    assert run("--config", configure(line, text))[0] == 0
    assert [record["camera"] for record in records(line)] == [None] * 4


def test_printed_checked_and_run_again(run, line: Path) -> None:
    arguments = [
        "--engine",
        "line/a.onnx",
        "--source",
        "line/left",
        "--output",
        "jsonl:line/out/r.jsonl",
        "--threads",
        1,
    ]
    code, printed, _ = run(*arguments, "--gate-delay-s", 1.5, "--mode", "every", "--quiet", "--print-config")
    assert code == 0
    elsewhere = line.parent / "elsewhere" / "line.toml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(printed)
    assert run("--config", elsewhere, "--print-config")[1] == printed
    code, stdout, _ = run("--config", elsewhere, "--check-config")
    assert (code, stdout) == (0, "well: cameras 1, products 1, outputs 1\n")
    assert not (line / "out").exists(), "nothing is opened"
    assert run("--config", elsewhere)[0] == 0
    assert all(0 < record["gate_in_ms"] < 1500 for record in records(line))


def test_the_product_is_that_of_the_part_id(run, line: Path) -> None:
    write_part(line / "left", "B-7", DEFECT)
    write_part(line / "left", "C-9", DEFECT)
    text = """
outputs = ["jsonl:out/r.jsonl"]
max_frames = 6
[products.a]
engine = "a.onnx"
part_ids = "A-.*"
[products.b]
engine = "a.onnx"
threshold = 0.9
part_ids = "B-.*"
[cameras.left]
source = 'watch:left?existing=first&settle_s=0&part_id=(.*)\\.png'
"""
    code, _, stderr = run("--config", configure(line, text))
    assert code == 10, stderr
    found = {record["part_id"]: (record["verdict"], record["threshold"], record["fault"]) for record in records(line)}
    assert found["A-1"] == ("REJECT", 0.5, None)
    assert found["B-7"] == ("PASS", 0.9, None)
    assert (found["C-9"][0], found["C-9"][2]) == ("FAULT", "unknown_product")


def test_views_of_a_part_become_one_verdict(run, line: Path) -> None:
    write_part(line / "right", "A-3", DEFECT)
    write_part(line / "right", "A-1", GOOD)
    cameras = "".join(
        f"[cameras.{name}]\nsource = 'watch:{name}?existing=first&settle_s=0&part_id=(.*)\\.png'\n"
        for name in ("left", "right")
    )
    text = f"""
outputs = ["jsonl:out/r.jsonl"]
max_frames = 8
[products.a]
engine = "a.onnx"
{cameras}
[parts]
cameras = ["left", "right"]
window_s = 60
"""
    code, _, stderr = run("--config", configure(line, text))
    assert code == 0, stderr
    found = {record["part_id"]: (record["verdict"], record["camera"]) for record in records(line)}
    assert {part: verdict for part, (verdict, _) in found.items()} == {
        "A-0": "PASS",
        "A-1": "REJECT",
        "A-2": "PASS",
        "A-3": "REJECT",
    }
    assert (found["A-1"][1], found["A-3"][1]) == ("left", "right")


def test_a_web_is_merged_over_lengths(run, line: Path) -> None:
    uri = "synthetic-web://brushed-metal?total=256&width=32&lines=32&overlap=0&merge=length&merge_lines=128"
    text = f"""
outputs = ["jsonl:out/r.jsonl"]
summary = "out/s.json"
[products.a]
engine = "a.onnx"
threshold = 1.0
[cameras.web]
source = "{uri}"
"""
    assert run("--config", configure(line, text))[0] == 0
    assert [record["web"]["lines"] for record in records(line)] == [128, 128]
    assert json.loads((line / "out" / "s.json").read_text())["merged"]["PASS"] == 2


class TestACameraThatIsNotThere:
    TEXT = """
outputs = ["jsonl:out/r.jsonl"]
[products.a]
engine = "a.onnx"
[cameras.left]
source = "left"
[cameras.right]
source = "usb:97"
"""

    def test_ends_the_run(self, run, line: Path) -> None:
        code, _, stderr = run("--config", configure(line, self.TEXT))
        assert code == 5
        assert "/dev/video97: no such camera" in stderr
        assert not (line / "out").exists(), "the outputs of an earlier run are left alone"

    def test_is_waited_for_while_the_others_run(self, run, line: Path) -> None:
        text = self.TEXT + "wait_for_source = true\nfault_period_s = 0.01\n"
        code, _, _ = run("--config", configure(line, text), "--max-frames", 8)
        assert code == 10
        found = Counter((record["camera"], record["fault"]) for record in records(line))
        assert found[("left", None)] == 4
        assert found[("right", "source_failed")] == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_as_a_service(line: Path, number: signal.Signals) -> None:
    """Ready once the cameras run, stopped by a signal, with complete files."""
    text = TWO.format(port=free_port())
    for side, seed in (("left", 1), ("right", 2)):
        text = text.replace(f'source = "{side}"', f'source = "synthetic://mixed?fps=5&size=32x32&seed={seed}"')
    path = configure(line, text)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(line / "notify"))
        manager.settimeout(60.0)
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(line / "notify"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [
            sys.executable,
            "-m",
            "recontrast_edge",
            "run",
            "--config",
            str(path),
            "--wait-for-source",
            "--quiet",
        ]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as run:
            try:
                while b"READY=1" not in manager.recv(4096):
                    assert run.poll() is None
                run.send_signal(number)
                _, stderr = run.communicate(timeout=20.0)
            finally:
                run.kill()
    assert run.returncode in (0, 10), stderr
    summary = json.loads((line / "out" / "s.json").read_text())
    assert summary["stopped_by"] == "signal"
    assert len(records(line)) == summary["judged"] > 0


def test_a_map_is_drawn_where_its_own_engine_looks(tiny_model: Path) -> None:
    """Outputs serve all engines of a line, and these may look at different parts of the image."""
    spec = read_spec(tiny_model).input
    elsewhere = spec.model_copy(update={"roi": Roi(x=16, y=16, width=16, height=16)})
    image = np.full((32, 32, 3), GOOD, np.uint8)
    heat = np.full((1, 32, 32), 0.9, np.float32)
    judgement = judge(Frame(0, "usb:0", image, 0.0), Inference(heat, np.array([0.9], np.float32), {}), 0.5, elsewhere)
    drawn = annotate(judgement, spec, (256, 256))
    assert (drawn == annotate(judgement, elsewhere, (256, 256))).all()
    right = drawn[44:, 260:]
    assert (right[:100, :100] == right[0, 0]).all(), "outside of the ROI"
    assert (right[200:, 200:] != right[0, 0]).any()


def test_a_model_is_checked_without_being_opened(run, line: Path) -> None:
    spec = read_spec(line / "b.onnx").model_copy(update={"threshold": None})
    replace_metadata(line / "b.onnx", {SPEC_KEY: spec.dumps()})
    text = TWO.format(port=free_port()).replace("threshold = 0.9\n", "")
    code, _, stderr = run("--config", configure(line, text), "--check-config")
    assert code == 4
    assert "b.onnx: this model has no threshold yet" in stderr
