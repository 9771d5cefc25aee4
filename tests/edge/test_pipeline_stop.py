"""However a line ends: in time, with everything accounted for, and with the exit code of what ended it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from recontrast_edge import bounded
from recontrast_edge.errors import StallError
from recontrast_edge.frame import Frame, Judgement
from recontrast_edge.pipeline import Line
from recontrast_edge.sink_thread import SINK_JUDGEMENTS
from tests.edge.fakes_line import FakeSink, FakeSource, Wrapped, check_accounts, endless, frame, frames, plan, run

ROOT = Path(__file__).parents[2]
DOWN_WITHIN_S = 5.0
"""What is promised of a machine that is not busy with something else; see ``allowed_s``."""


EXPECTED = {
    "nothing": (0, ""),
    "read": (5, "the source does not answer"),
    "close": (5, "the source does not answer"),
    "engine": (11, "the engine does not answer"),
    "engine of a file": (11, "the engine does not answer"),
    "sink": (7, "the output does not answer"),
    "sink of a file": (7, "the output does not answer"),
}
"""What hangs -> exit code and message."""


@dataclass(frozen=True)
class Ended:
    """How a line ended that was asked to by SIGTERM while a part of it hung."""

    code: int
    stderr: str
    took_s: float
    allowed_s: float
    summary: Path


def allowed_s() -> float:
    """What is promised, times how many others wanted each core in the last minute."""
    return DOWN_WITHIN_S * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    """All at the same time, because what they do is wait."""
    folder = tmp_path_factory.mktemp("summaries")
    lines: dict[str, subprocess.Popen[str]] = {}
    results: dict[str, Ended] = {}
    limit_s = allowed_s()
    try:
        for part in (*EXPECTED, "open", "sink, two signals"):
            command = [sys.executable, "-m", "tests.edge.hanging_line", part.split(",")[0], str(folder / part)]
            lines[part] = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in lines.values():
            assert line.stdout is not None
            assert line.stdout.readline() == "hanging\n"
        time.sleep(0.5)
        asked_s = time.monotonic()
        for line in lines.values():
            line.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        lines["sink, two signals"].send_signal(signal.SIGTERM)
        while len(results) < len(lines) and time.monotonic() < asked_s + max(30.0, limit_s):
            for part, line in lines.items():
                if part not in results and line.poll() is not None:
                    took_s = time.monotonic() - asked_s
                    assert line.stderr is not None
                    results[part] = Ended(line.returncode, line.stderr.read(), took_s, limit_s, folder / part)
            time.sleep(0.02)
        yield results
    finally:
        for line in lines.values():
            line.kill()
            line.communicate()


@pytest.mark.parametrize("part", EXPECTED)
def test_sigterm_ends_it_in_time_whatever_hangs(ended: dict[str, Ended], part: str) -> None:
    line = ended[part]
    code, message = EXPECTED[part]
    assert line.took_s < line.allowed_s
    assert line.code == code, line.stderr
    assert message in line.stderr
    assert "Traceback" not in line.stderr
    summary = json.loads(line.summary.read_text())
    assert summary["stopped_by"] == "signal"
    assert summary["captured"] == summary["judged"] + summary["dropped"]
    for output in summary["outputs"]:
        assert output["written"] + output["dropped"] == summary["judged"]


def test_sigterm_ends_it_while_a_source_hangs_in_its_opening(ended: dict[str, Ended]) -> None:
    assert ended["open"].took_s < ended["open"].allowed_s
    assert ended["open"].code == 5


def test_the_second_signal_ends_it_at_once(ended: dict[str, Ended]) -> None:
    assert ended["sink, two signals"].took_s < ended["sink, two signals"].allowed_s - 3.5, "the other one takes 3.8 s"
    assert ended["sink, two signals"].code == -signal.SIGTERM


def test_frames_that_a_slow_engine_keeps_waiting_are_faults_and_it_may_come_back(engine) -> None:
    """The third inference takes a second, with a limit of a quarter."""
    inferences = iter([0.0, 0.0, 1.0])
    slow = Wrapped(engine, lambda: time.sleep(next(inferences, 0.0)))
    sink = FakeSink()
    source = FakeSource((frame(index) for index in range(150)), live=True, interval_s=0.01)
    line = run(slow, source, sink, mode="every", queue_frames=1000, engine_timeout_s=0.4)
    assert (line.stopped_by, line.errors) == ("end_of_stream", [])
    assert sink.ids == list(range(150)), "nothing is lost, and in order"
    assert sink.faults[:2] == [None, None]
    assert sink.faults[2] == "engine_stalled"
    assert sink.faults[-1] is None
    assert sink.faults.count("engine_stalled") == line.statistics.faults["engine_stalled"] > 3
    stalled = [judgement for judgement in sink.taken if judgement.fault]
    assert stalled[0].latency_ms["total"] < 900, "they are told while it hangs, not after"


def test_an_engine_that_never_comes_back_ends_the_run(engine) -> None:
    released, sink = threading.Event(), FakeSink()
    source = endless(0.01)
    line = Line([plan(Wrapped(engine, lambda: released.wait() and None), source)], engine_timeout_s=0.1)
    started_s = time.monotonic()
    line.run([sink])
    assert time.monotonic() - started_s < allowed_s()
    assert line.stopped_by == "engine_stalled"
    assert [type(error) for error in line.errors] == [StallError]
    assert set(sink.faults) == {"engine_stalled"}
    check_accounts(line)
    assert source.closed.is_set()
    assert sink.closed
    released.set()
    assert bounded.wait_until(lambda: not bounded.left_behind(), time.monotonic() + 5)
    assert len(sink.taken) == line.statistics.judged, "what it says after all does not count"


def test_a_defect_in_a_source_surfaces(engine) -> None:
    def items() -> Iterator[Frame]:
        yield frame(0)
        raise ZeroDivisionError("a defect")

    line = run(engine, FakeSource(items(), live=True), FakeSink())
    assert line.stopped_by == "source_failed"
    assert isinstance(line.errors[0], ZeroDivisionError)


def test_a_defect_in_a_merger_surfaces_with_the_rest_accounted_for(engine) -> None:
    class Broken:
        def add(self, judgement: Judgement) -> list[Judgement]:
            if judgement.frame.frame_id == 3:
                raise KeyError("a defect")
            return [judgement]

        def expire(self, now_s: float) -> list[Judgement]:
            return []

        def flush(self) -> list[Judgement]:
            return []

    line = run(engine, FakeSource(frames(30)), FakeSink(), merger=Broken())
    assert line.stopped_by == "internal_error"
    assert isinstance(line.errors[0], KeyError)


class KeepsAll:
    """A merger that gives everything back at the end."""

    def __init__(self) -> None:
        self._kept: list[Judgement] = []

    def add(self, judgement: Judgement) -> list[Judgement]:
        self._kept.append(judgement)
        return []

    def expire(self, now_s: float) -> list[Judgement]:
        return []

    def flush(self) -> list[Judgement]:
        return self._kept


def test_what_mergers_kept_reaches_a_slow_output(engine) -> None:
    count, sink = 2 * SINK_JUDGEMENTS, FakeSink(delay_s=0.001)
    run(engine, FakeSource(frame(index) for index in range(count)), sink, merger=KeepsAll())
    assert sink.ids == list(range(count))


def test_what_mergers_give_out_late_waits_for_no_output_that_hangs(engine) -> None:
    """The main thread hands these over, and it must see a stop."""
    released, stop = threading.Event(), threading.Event()

    class Hanging(FakeSink):
        def write(self, judgement: Judgement) -> None:
            released.wait()

    class Expires(KeepsAll):
        def expire(self, now_s: float) -> list[Judgement]:
            return [self._kept[0]] * 100 if self._kept else []

    def items() -> Iterator[Frame | None]:
        yield frame(0)
        while True:
            yield None

    threading.Timer(0.8, stop.set).start()
    line = Line([plan(engine, FakeSource(items(), interval_s=0.01), merger=Expires())], stop=stop)
    started_s = time.monotonic()
    line.run([Hanging()])
    assert time.monotonic() - started_s < 0.8 + allowed_s()
    assert line.stopped_by == "signal"
    (output,) = line.outputs
    assert output["written"] == 0
    assert output["dropped"] > SINK_JUDGEMENTS
    released.set()
    assert bounded.wait_until(lambda: not bounded.left_behind(), time.monotonic() + 5)


def test_a_stop_does_not_wait_for_a_long_queue(engine) -> None:
    """Three hundred frames wait, at 50 ms each: what cannot be judged in time is dropped, and counted."""
    stop, sink = threading.Event(), FakeSink()
    slow = Wrapped(engine, lambda: time.sleep(0.05))
    source = FakeSource((frame(index) for index in range(300)), live=True)
    threading.Timer(0.5, stop.set).start()
    started_s = time.monotonic()
    line = run(slow, source, sink, mode="every", queue_frames=300, stop=stop)
    assert time.monotonic() - started_s < 0.5 + allowed_s()
    assert line.statistics.dropped > 0
    assert sink.ids == list(range(len(sink.ids)))


WALL_CLOCK_SHIM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long *offset_s;

__attribute__((constructor)) static void map_offset(void) {
    int file = open(getenv("WALL_CLOCK_OFFSET"), O_RDONLY);
    if (file >= 0) offset_s = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    long result = syscall(SYS_clock_gettime, clock, now);
    if (!result && offset_s && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *offset_s;
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    (void)zone;
    int result = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return result;
}

time_t time(time_t *where) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (where) *where = precise.tv_sec;
    return precise.tv_sec;
}
"""
"""Moves the wall clock of one process, and no other clock, by the number in a file."""

RUN_WITH_THE_TIME = """
import sys, time
from recontrast_edge import cli
print(time.time(), file=sys.stderr, flush=True)
try:
    cli.main()
finally:
    print(time.time(), file=sys.stderr, flush=True)
"""


def test_the_wall_clock_may_be_set_under_a_running_line(tiny_model: Path, tmp_path: Path) -> None:
    """By an hour forward, and then by two back."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler, to move the wall clock of a process")
    (tmp_path / "shim.c").write_text(WALL_CLOCK_SHIM)
    shim = tmp_path / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, tmp_path / "shim.c"], check=True)
    offset, records = tmp_path / "offset", tmp_path / "records.jsonl"
    offset.write_bytes(bytes(8))
    environment = {**os.environ, "LD_PRELOAD": str(shim), "WALL_CLOCK_OFFSET": str(offset)}
    command = [sys.executable, "-c", RUN_WITH_THE_TIME, "run", "--engine", str(tiny_model), "--quiet"]
    command += ["--source", "synthetic://mixed?fps=5&size=64x64&frames=20", "--summary", f"{tmp_path}/summary.json"]
    command += ["--threshold", "1.0", "--output", f"jsonl:{records}"]
    line = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        until_s = time.monotonic() + 60
        while not (records.exists() and records.stat().st_size) and time.monotonic() < until_s:
            time.sleep(0.02)
        for offset_s in (3600, -3600):
            time.sleep(1.0)
            with offset.open("r+b") as file:
                file.write(struct.pack("l", offset_s))
        _, stderr = line.communicate(timeout=60)
    finally:
        line.kill()
        line.wait()
    assert line.returncode == 0, stderr
    began, ended = (float(text) for text in stderr.split())
    assert ended < began - 3000, "the clock was not set: the test proves nothing"
    summary = json.loads((tmp_path / "summary.json").read_text())
    (camera,) = summary["cameras"]
    assert (camera["reconnects"], summary["faults"]) == (0, {})
    assert 2 < summary["duration_s"] < 60
    for stage in summary["latency_ms"].values():
        assert 0 <= stage["p50"] <= stage["max"] < 5000
    judged = [record for record in map(json.loads, records.read_text().splitlines()) if "verdict" in record]
    assert len(judged) == summary["judged"] > 10
    assert min(min(record["latency_ms"].values()) for record in judged) >= 0
