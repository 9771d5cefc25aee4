"""What nobody may see, what nobody may write, and who may connect: through the whole command line."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np
import pytest

from recontrast_edge import cli, secrets
from recontrast_edge.config import load_config
from recontrast_edge.errors import OutputError, UsageError
from recontrast_edge.frame import Frame, Judgement, SourceState, StateChange
from recontrast_edge.line_setup import check_places, output_openers
from recontrast_edge.sinks import open_sink
from recontrast_edge.sinks.message import message
from recontrast_edge.spec import InputSpec

SPEC = InputSpec(size_wh=(32, 32), resize_wh=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

PASSWORD = "k4nari en/vogel@ü"
ENCODED = quote(PASSWORD, safe="")
PIECES = (PASSWORD, ENCODED, ENCODED.lower(), quote(PASSWORD), "k4nari", "vogel")
"""No part of it may be shown either."""

OUTPUTS = {
    "mqtt://line1:{secret}@127.0.0.1:9/#": 2,
    "mqtt://line1:{secret}@127.0.0.1:9/t?wich=all": 2,
    "mqtt://line1:{secret}@127.0.0.1:9/t?credentials=env:LOGIN": 2,
    "mqtts://line1:{secret}@127.0.0.1:9/t?ca=nowhere.pem": 3,
    "mqtt://127.0.0.1:9/t?credentials=line1:{secret}": 2,
    "mqtt://127.0.0.1:9/t?credentials=file:open-to-all": 3,
    "webhook:ftp://line1:{secret}@127.0.0.1:9/": 2,
    "webhook:https://line1:{secret}@127.0.0.1:9/?timeout_ms=0": 2,
    "opcua://line1:{secret}@0.0.0.0": 2,
    "opcua://line1:{secret}@127.0.0.1?cert=c": 2,
    "modbus://line1:{secret}@127.0.0.1:9/1": 2,
    "modbus-server://line1:{secret}@127.0.0.1:99999": 2,
    "ftp://line1:{secret}@127.0.0.1/": 2,
    "jsonl:r.jsonl?password={secret}": 2,
    "jsonl:///line1:{secret}@127.0.0.1:9/r.jsonl?keep=0": 2,
}
"""Outputs that are refused, each with the exit code. Nobody listens at the port `discard`, 9."""

SOURCES = {
    "rtsp://line1:{secret}@127.0.0.1:9/s": 5,
    "rtsps://line1:{secret}@127.0.0.1:9/s": 5,
    "http://line1:{secret}@127.0.0.1:9/s": 5,
    "rtsp://127.0.0.1:9/s?credentials=env:LOGIN": 5,
    "rtsp://127.0.0.1:9/s?credentials=file:private": 5,
    "rtsp://127.0.0.1:9/s?credentials=file:open-to-all": 3,
    "rtsp://127.0.0.1:9/s?credentials=line1:{secret}": 2,
    "rtsp://line1:{secret}@127.0.0.1:9/s?transprot=tcp": 2,
    "rtsp://line1:{secret}@127.0.0.1:9/s?lines=0": 2,
    "gopher://line1:{secret}@127.0.0.1/s": 2,
    "gst:rtspsrc location=rtsp://line1:{secret}@127.0.0.1:9/s ! nonsense": None,
    "nowhere/rtsp://line1:{secret}@127.0.0.1/s.mp4": 3,
}
"""Sources that cannot be opened. None: it depends on what is installed."""


@pytest.fixture(autouse=True)
def _forgets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What an earlier test has registered must not hide anything in this one."""
    monkeypatch.setattr(secrets, "_secrets", set())
    monkeypatch.setattr(secrets, "_pattern", None)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    before = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with passwords in two files and the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGIN", f"line1:{PASSWORD}")
    for name, mode in (("private", 0o600), ("open-to-all", 0o644)):
        (tmp_path / name).write_text(f"line1:{PASSWORD}")
        (tmp_path / name).chmod(mode)
    return tmp_path


@pytest.fixture
def run(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> Callable[..., tuple[int, str]]:
    """The command line in this process; returns the exit code and all that was shown."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["recontrast-edge", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capfd.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return call


def assert_hidden(*texts: str) -> None:
    for text in texts:
        assert not [piece for piece in PIECES if piece in text], text


def spelled(uri: str) -> set[str]:
    """Percent-encoded, as it should be, and as it is, as people do."""
    return {uri.format(secret=ENCODED), uri.format(secret=PASSWORD)}


def config(folder: Path, model: Path, source: str, output: str, mode: int = 0o600) -> Path:
    path = folder / "line.toml"
    path.write_text(
        f"outputs = [{json.dumps(output, ensure_ascii=False)}]\nquiet = true\nmax_frames = 3\n"
        f'[products.p]\nengine = "{model}"\n[cameras.c]\nsource = {json.dumps(source, ensure_ascii=False)}\n'
    )
    path.chmod(mode)
    return path


@pytest.mark.parametrize("uri", OUTPUTS)
def test_outputs_that_are_refused(uri: str, run, folder: Path, tiny_model: Path) -> None:
    for output in spelled(uri):
        wanted = OUTPUTS[uri] if output == uri.format(secret=ENCODED) else None
        source = "synthetic://mixed?fps=0&size=32x32"
        code, shown = run("run", "--engine", str(tiny_model), "--source", source, "--output", output, "--quiet")
        assert code in ((2, 3) if wanted is None else (wanted,)), shown
        path = config(folder, tiny_model, source, output)
        for more in ([], ["--check-config"], ["--print-config"]):
            code_again, shown_again = run("run", "--config", str(path), *more)
            assert code_again == code or more == ["--print-config"], shown_again
            assert_hidden(shown, shown_again)


@pytest.mark.parametrize("uri", SOURCES)
def test_sources_that_cannot_be_opened(uri: str, run, folder: Path, tiny_model: Path) -> None:
    for source in spelled(uri):
        wanted = SOURCES[uri] if source == uri.format(secret=ENCODED) else None
        path = config(folder, tiny_model, source, f"jsonl:{folder}/r.jsonl")
        code, shown = run("run", "--config", str(path), "--summary", str(folder / "s.json"))
        assert wanted in (None, code), shown
        assert code, shown
        assert_hidden(shown, run("run", "--config", str(path), "--print-config")[1])
    if wanted == 5:
        # Not even while it is tried again and again: in records, states, the summary and the live view.
        code, shown = run("run", "--config", str(path), "--no-quiet", "--wait-for-source", "--fault-period-s", "0.01")
        assert code == 10, shown
        assert "source_failed" in shown
        assert_hidden(shown, (folder / "r.jsonl").read_text())


@pytest.mark.parametrize(
    "text",
    [
        'outputs = "mqtt://line1:SECRET@h/t"\n',
        'outputs = ["mqtt://line1:SECRET@h/t", 3]\n',
        'outputs = ["mqtt://line1:SECRET@h/t]\n',
        'outputs = ["mqtt://line1:SECRET@h/t", "mqtt://line1:SECRET@h/t"]\n',
        'password = "SECRET"\n',
        'threads = "rtsp://line1:SECRET@h"\n',
        '[cameras.c]\nsource = ["rtsp://line1:SECRET@h"]\n',
        '[cameras."rtsp://line1:SECRET@h"]\nsource = "usb:0"\n',
        '[cameras.c]\nsource = "rtsp://line1:***@h"\n',
    ],
)
def test_files_with_mistakes(text: str, run, folder: Path) -> None:
    for spelling in (PASSWORD, ENCODED):
        path = folder / "line.toml"
        path.write_text(text.replace("SECRET", spelling))
        path.chmod(0o600)
        code, shown = run("run", "--config", str(path), "--engine", "demo")
        assert code in (2, 3), shown
        assert_hidden(shown)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "{uri}"],
        ["{uri}"],
        ["run", "--mode", "{uri}"],
        ["run", "--max-frames", "{uri}"],
        ["run", "--{uri}"],
        ["run", "--config", "{uri}"],
        ["run", "--engine", "{uri}", "--source", "usb:0"],
        ["info", "{uri}"],
        ["eval", "--engine", "demo", "--data", "{uri}"],
    ],
)
def test_words_in_a_wrong_place(arguments: list[str], run, folder: Path) -> None:
    for spelling in (ENCODED, quote(PASSWORD)):
        uri = f"rtsp://line1:{spelling}@127.0.0.1:9/s"
        code, shown = run(*(word.format(uri=uri) for word in arguments))
        assert code, shown
        assert_hidden(shown)


def test_a_printed_configuration_is_of_no_use_to_who_wants_the_password(run, folder: Path, tiny_model: Path) -> None:
    source = f"rtsp://line1:{ENCODED}@127.0.0.1:9/s"
    code, shown = run("run", "--engine", str(tiny_model), "--source", source, "--print-config")
    assert (code, shown.count("***")) == (0, 1)
    assert_hidden(shown)
    (folder / "line.toml").write_text(shown)
    code, shown = run("run", "--config", "line.toml")
    assert code == 2
    assert "stands for a password that was masked" in shown


def test_a_file_that_shows_a_password_to_all_users(run, folder: Path, tiny_model: Path) -> None:
    source = f"rtsp://line1:{ENCODED}@127.0.0.1:9/s"
    code, shown = run("run", "--config", str(config(folder, tiny_model, source, "jsonl:r.jsonl", mode=0o644)))
    assert code == 3
    assert "chmod o=" in shown
    assert_hidden(shown)
    assert not (folder / "r.jsonl").exists()


def test_a_thread_that_fails(run, folder: Path, capfd) -> None:
    run("info", "nowhere")
    secrets.register(PASSWORD)

    def fail() -> None:
        raise ValueError(f"cannot log in as line1:{PASSWORD} or rtsp://line1:{ENCODED}@h")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    shown = capfd.readouterr().err
    assert "Traceback" in shown
    assert "cannot log in" in shown
    assert_hidden(shown.replace(Path(__file__).read_text(), ""))


def test_texts_of_frames_and_judgements_are_fit_for_every_output() -> None:
    """Outputs send and show them as they are."""
    secrets.register(PASSWORD)
    name = os.fsdecode(b"no-text-\xff.png")
    sentence = f"{name} of rtsp://line1:{ENCODED}@h, or line1:{PASSWORD}"
    frame = Frame(0, name, None, 0.0, part_id=name, fault="unreadable_image", detail=sentence)
    judgement = Judgement(frame, "FAULT", None, 1.0, fault="unreadable_image", detail=sentence)
    change = StateChange(None, name, SourceState.RUNNING, SourceState.STALE, 0.0, "source_stale", sentence)
    assert (frame.source, frame.part_id, change.source) == ("no-text-?.png",) * 3
    for detail in (frame.detail, judgement.detail, change.detail):
        assert detail == "no-text-?.png of rtsp://line1:***@h, or line1:***"
    for record in (judgement.record(), change.record()):
        assert json.loads(message(record)) == json.loads(json.dumps(record))


class TestRoots:
    """Nothing outside of the configured folders is written, moved or deleted."""

    @pytest.fixture
    def inside(self, folder: Path) -> Path:
        path = folder / "inside"
        path.mkdir()
        (folder / "outside").mkdir()
        (path / "link").symlink_to(folder / "outside")
        image = np.full((32, 32, 3), 50, np.uint8)
        for place in (path, folder / "outside"):
            cv2.imwrite(str(place / "part.png"), image)
        return path

    @pytest.mark.parametrize(
        "output", ["jsonl:../r.jsonl", "jsonl:link/r.jsonl", "images:link", "video:/tmp/never.mp4"]
    )
    def test_outputs(self, output: str, run, inside: Path, tiny_model: Path) -> None:
        path = config(inside, tiny_model, "part.png", output)
        code, shown = run("run", "--config", str(path))
        assert code == 2, shown
        assert "lies outside of" in shown
        assert [entry.name for entry in (inside.parent / "outside").iterdir()] == ["part.png"]
        assert not (inside.parent / "r.jsonl").exists()

    def test_summary_and_the_option(self, run, inside: Path, tiny_model: Path) -> None:
        engine = ["--engine", str(tiny_model), "--source", str(inside / "part.png"), "--quiet"]
        code, shown = run("run", *engine, "--root", str(inside), "--summary", "s.json")
        assert (code, "summary: s.json" in shown) == (2, True)
        code, _ = run("run", *engine, "--root", str(inside), "--root", ".", "--summary", "s.json")
        assert code == 0
        assert (inside.parent / "s.json").exists()

    @pytest.mark.parametrize("after", ["delete", "move:done"])
    def test_sources_that_change_files(self, after: str, run, inside: Path, tiny_model: Path) -> None:
        path = config(inside, tiny_model, f"watch:link?existing=first&after={after}", "jsonl:r.jsonl")
        code, shown = run("run", "--config", str(path))
        assert (code, "lies outside of" in shown) == (2, True)
        assert [entry.name for entry in (inside.parent / "outside").iterdir()] == ["part.png"]
        path = config(inside, tiny_model, f"watch:.?existing=first&after={after}", "jsonl:r.jsonl")
        code, shown = run("run", "--config", str(path), "--max-frames", "1")
        assert code == 0, shown
        assert not (inside / "part.png").exists()

    def test_a_link_that_is_changed_after_the_check(self, inside: Path, tiny_model: Path) -> None:
        line = load_config(config(inside, tiny_model, "part.png", "jsonl:sub/r.jsonl"), {})
        check_places(line)
        (opener,) = output_openers(line)
        (inside / "sub").symlink_to(inside.parent / "outside")
        with pytest.raises(UsageError, match=r"leads to .*outside/r.jsonl"):
            opener(SPEC)


def listening() -> set[tuple[str, int]]:
    """Addresses and ports on which this process listens (TCP, IPv4 and IPv6), from the kernel's tables."""
    inodes = {entry.stat().st_ino for entry in Path("/proc/self/fd").iterdir() if entry.exists()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[9]) in inodes:
                address, _, port = fields[1].partition(":")
                raw = b"".join(bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8))
                family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
                found.add((socket.inet_ntop(family, raw), int(port, 16)))
    return found


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs Linux' /proc")
def test_nothing_listens_but_on_loopback() -> None:
    """All servers there are, without a host in their URIs."""
    before = listening()
    try:
        with closing(open_sink("modbus-server://", input_spec=SPEC)), closing(open_sink("opcua://", input_spec=SPEC)):
            found = listening() - before
    except OutputError as error:
        pytest.skip(f"another process has the port: {error}")
    assert found == {("127.0.0.1", 5020), ("127.0.0.1", 4840)}
