from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from recontrast_edge import cli, demo
from recontrast_edge.onnxfile import SPEC_KEY, read_metadata, replace_metadata
from recontrast_edge.spec import ModelSpec, Threshold

GOOD, DEFECT = 50, 200
"""Brightness of images that the tiny model passes and rejects."""


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Six images, of which the second and the fifth are bright."""
    folder = tmp_path / "parts"
    folder.mkdir()
    for index in range(6):
        image = np.full((48, 64, 3), GOOD, np.uint8)
        if index % 3 == 1:
            image[12:24, 16:32] = DEFECT
        cv2.imwrite(str(folder / f"{index}.png"), image)
    return folder


@pytest.fixture
def run(tiny_model: Path, monkeypatch, capfd):
    """Call the command line in this process; returns exit code, standard output, standard error."""

    def call(command: str, *arguments: object, engine: Path | None = tiny_model) -> tuple[int, str, str]:
        engine_option = [] if engine is None else ["--engine", str(engine), "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["recontrast-edge", command, *engine_option, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def with_spec(model: Path, path: Path, **changes) -> Path:
    shutil.copy(model, path)
    spec = ModelSpec.loads(read_metadata(path)[SPEC_KEY], where="test")
    replace_metadata(path, {SPEC_KEY: spec.model_copy(update=changes).dumps()})
    return path


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def video_length(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_folder_to_every_output(run, parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = run(
        "run",
        *("--source", parts),
        *("--output", f"jsonl:{out}/records.jsonl"),
        *("--output", f"video:{out}/annotated.mp4?fps=10"),
        *("--output", f"images:{out}/rejects"),
        *("--summary", out / "summary.json"),
    )
    assert (code, stderr) == (0, "")
    judged = records(out / "records.jsonl")
    assert [record["verdict"] for record in judged] == ["PASS", "REJECT", "PASS"] * 2
    (region,) = judged[1]["regions"]
    assert abs(region["x"] - 16) <= 2
    assert abs(region["width"] - 16) <= 4
    assert video_length(out / "annotated.mp4") == 6
    assert len(list((out / "rejects").glob("*.json"))) == 2
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["captured"], summary["judged"], summary["dropped"]) == (6, 6, 0)
    assert summary["verdicts"] == {"PASS": 4, "REJECT": 2, "FAULT": 0}
    assert summary["stopped_by"] == "end_of_stream"
    (camera,) = summary["cameras"]
    assert (camera["source"], camera["mode"], camera["state"]) == (str(parts), "every", "ENDED")
    assert (camera["captured"], camera["judged"], camera["dropped"]) == (6, 6, 0)
    assert [product["threshold"] for product in camera["products"]] == [0.5]
    assert set(summary["latency_ms"]) == {"wait", "preprocess", "infer", "decide", "total"}
    assert set(summary["latency_ms"]["total"]) == {"p50", "p90", "p99", "max", "mean", "count"}
    assert [output["written"] for output in summary["outputs"]][:3] == [6, 6, 6]
    last = stdout.splitlines()[-1]
    assert last.startswith("6 judged (4 PASS, 2 REJECT, 0 FAULT), 0 dropped of 6")
    assert "total" in last


def test_records_on_standard_output_are_all_there_is(run, parts: Path) -> None:
    code, stdout, stderr = run("run", "--source", parts, "--output", "jsonl:-")
    assert code == 0
    assert [json.loads(line)["frame_id"] for line in stdout.splitlines()] == list(range(6))
    assert "6 judged" in stderr.splitlines()[-1]


def test_a_broken_image_is_a_fault(run, parts: Path, tmp_path: Path) -> None:
    whole = (parts / "2.png").read_bytes()
    (parts / "2.png").write_bytes(whole[: len(whole) // 2])
    code, stdout, _ = run("run", "--source", parts, "--output", f"jsonl:{tmp_path}/r.jsonl", "--quiet")
    assert code == 10
    broken = records(tmp_path / "r.jsonl")[2]
    assert (broken["verdict"], broken["fault"], broken["score"]) == ("FAULT", "unreadable_image", None)
    assert broken["detail"]
    assert len(stdout.splitlines()) == 1


def test_max_frames_and_threshold(run, parts: Path, tmp_path: Path) -> None:
    code, *_ = run(
        "run", "--source", parts, "--max-frames", 3, "--threshold", 0.9, "--output", f"jsonl:{tmp_path}/r.jsonl"
    )
    assert code == 0
    assert [(record["verdict"], record["threshold"]) for record in records(tmp_path / "r.jsonl")] == [("PASS", 0.9)] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": None}, "recontrast-edge calibrate"),
        ({"threshold": Threshold(value=0.5, engine_sha256="1" * 64)}, "another engine"),
    ],
)
def test_without_a_threshold_of_its_own_the_model_is_refused(
    run, parts: Path, tmp_path: Path, tiny_model: Path, changes: dict, message: str
) -> None:
    model = with_spec(tiny_model, tmp_path / "model.onnx", **changes)
    records_file = tmp_path / "r.jsonl"
    records_file.write_text("of an earlier run\n")
    code, _, stderr = run("run", "--source", parts, "--output", f"jsonl:{records_file}", engine=model)
    assert code == 4
    assert message in stderr
    assert records_file.read_text() == "of an earlier run\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--source", "{parts}", "--output", "ftp:there"], 2),
        (["--source", "{parts}", "--output", "video:x.mp4?speed=3"], 2),
        (["--source", "{parts}", "--output", "jsonl:same", "--output", "jsonl:same"], 2),
        (["--source", "{parts}", "--mode", "sometimes"], 2),
        (["--source", "{parts}", "--max-frames", "0"], 2),
        (["--source", "{parts}", "--threshold", "nan"], 2),
        (["--source", "gopher://there"], 2),
        (["--source", "synthetic://mixed?defects=3"], 2),
        (["--source", "{parts}", "--output", "jsonl:{parts}/0.png/x.jsonl"], 7),
        (["--source", "{parts}", "--summary", "{parts}/0.png/x.json"], 7),
    ],
)
def test_bad_arguments(run, parts: Path, tmp_path: Path, monkeypatch, arguments: list[str], code: int) -> None:
    monkeypatch.chdir(tmp_path)
    ended, _, stderr = run("run", *(argument.format(parts=parts) for argument in arguments))
    assert ended == code
    assert stderr
    assert [path.name for path in tmp_path.iterdir()] == ["parts"], "nothing was made"


def test_a_source_that_is_not_there_leaves_outputs_alone(run, tmp_path: Path) -> None:
    records_file = tmp_path / "r.jsonl"
    records_file.write_text("of an earlier run\n")
    code, _, stderr = run("run", "--source", tmp_path / "nowhere", "--output", f"jsonl:{records_file}")
    assert code in (3, 5)
    assert "nowhere" in stderr
    assert records_file.read_text() == "of an earlier run\n"


def test_a_full_disk_ends_the_run_with_the_others_complete(run, parts: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    code, _, stderr = run(
        "run",
        *("--source", parts),
        *("--output", "jsonl:/dev/full"),
        *("--output", f"jsonl:{tmp_path}/r.jsonl"),
        *("--summary", tmp_path / "summary.json"),
    )
    assert code == 7
    assert "No space left" in stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stopped_by"] in ("output_failed", "end_of_stream")
    assert "No space left" in summary["errors"][0]
    assert len(records(tmp_path / "r.jsonl")) == summary["judged"]


def test_a_live_source_accounts_for_every_frame(run, tmp_path: Path) -> None:
    code, *_ = run(
        "run",
        *("--source", "synthetic://brushed-metal?fps=100&size=64x64&frames=50"),
        *("--summary", tmp_path / "summary.json"),
        *("--threshold", 1.0),
    )
    assert code == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["cameras"][0]["mode"] == "live"
    assert summary["captured"] == summary["judged"] + summary["dropped"] <= 50
    assert sum(sum(row.values()) for row in summary["confusion"].values()) == summary["judged"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_cleanly_with_complete_files(tiny_model: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "recontrast_edge", "run", "--engine", str(tiny_model), "--threads", "1"]
    command += ["--source", "synthetic://mixed?fps=30&size=64x64", "--summary", str(tmp_path / "summary.json")]
    command += ["--output", f"jsonl:{tmp_path}/r.jsonl", "--output", f"video:{tmp_path}/v.mp4", "--mode", "every"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline_s = time.monotonic() + 30
        while not ((tmp_path / "r.jsonl").exists() and (tmp_path / "r.jsonl").stat().st_size):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert "Traceback" not in stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stopped_by"] == "signal"
    # Mode every on a slow machine makes faults of what the live source went past.
    assert process.returncode == (10 if summary["verdicts"]["FAULT"] else 0)
    assert summary["dropped"] == 0
    assert len(records(tmp_path / "r.jsonl")) == summary["judged"] == video_length(tmp_path / "v.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.jsonl", "summary.json", "v.mp4"]


HANGING_ENGINE = """
import ctypes, sys
from recontrast_edge import cli, line_setup
def hang(*_, **__):
    print("hanging", flush=True)
    ctypes.CDLL(None).sleep(1000)
if sys.argv.pop(1) == "engine":
    line_setup.open_engine = hang
cli.main()
"""
"""The command line, with an engine whose opening hangs in C, where no signal reaches it."""


@pytest.mark.parametrize(("part", "code", "message"), [("engine", 130, ""), ("output", 7, "jsonl:pipe: the output co")])
def test_a_signal_ends_it_while_something_hangs_in_its_opening(
    tiny_model: Path, tmp_path: Path, part: str, code: int, message: str
) -> None:
    # Opening a named pipe waits for who opens its other end.
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-c", HANGING_ENGINE, part, "run", "--engine", str(tiny_model), "--quiet"]
    command += ["--source", "synthetic://mixed?size=64x64", "--output", "jsonl:first.jsonl", "--output", "jsonl:pipe"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        if part == "engine":
            assert process.stdout is not None
            assert process.stdout.readline() == "hanging\n"
        while part == "output" and not (tmp_path / "first.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == code, stderr
    assert message in stderr
    assert "Traceback" not in stderr


def test_a_reader_that_goes_away_is_no_error(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "recontrast_edge", "run", "--engine", str(tiny_model), "--threads", "1"]
    command += ["--source", "synthetic://mixed?fps=0&size=64x64", "--output", "jsonl:-", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["frame_id"] == 0
        process.stdout.close()
        stderr = process.stderr.read()
        assert process.wait(20) == 0
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--example-config"],
        # The live view, which goes on a thread of its own; more rejects than it may lag behind.
        ["run", "--engine", "{model}", "--source", "synthetic://mixed?fps=0&size=32x32&frames=300", "--threshold", "0"],
    ],
)
def test_what_nobody_reads_keeps_no_command_from_its_work(arguments: list[str], tiny_model: Path) -> None:
    command = [sys.executable, "-m", "recontrast_edge", *(word.format(model=tiny_model) for word in arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        try:
            assert (process.wait(30), process.stderr.read() if process.stderr else None) == (0, "")
        finally:
            process.kill()


class TestDemo:
    @pytest.fixture(autouse=True)
    def _engine(self, tiny_model: Path, monkeypatch) -> None:
        monkeypatch.setattr(demo, "DEMO", tiny_model)

    def test_writes_all_it_promises(self, run, tmp_path: Path) -> None:
        out = tmp_path / "out"
        code, stdout, stderr = run("demo", "--frames", 8, "--fps", 0, "--out", out, engine=None)
        assert (code, stderr) == (0, "")
        assert sorted(path.name for path in out.iterdir()) == ["demo.mp4", "rejects.png", "report.json"]
        assert all(str(path) in stdout for path in out.iterdir())
        assert video_length(out / "demo.mp4") == 8
        report = json.loads((out / "report.json").read_text())
        assert report["judged"] == 8
        assert sum(sum(row.values()) for row in report["confusion"].values()) == 8
        assert report["machine"]["cores"] >= 1
        assert "p99" in report["latency_ms"]["total"]
        assert report["auroc"] is None or 0 <= report["auroc"] <= 1

    def test_an_output_folder_that_cannot_be(self, run, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        code, _, stderr = run("demo", "--frames", 2, "--out", tmp_path / "file", engine=None)
        assert code == 7
        assert "cannot" in stderr
