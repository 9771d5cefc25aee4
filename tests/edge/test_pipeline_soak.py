"""What a line must hold for hours: the newest frame, exact accounts, and no more memory, files and threads than before.

The short versions run always; `make soak` runs the long ones. ``RECONTRAST_SOAK_S`` is the length of the longest
(1800 s): what a shorter one shows of the memory's slope is less exact, and its limit says so.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from recontrast_edge.camera_plan import CameraPlan, Retry
from recontrast_edge.engines import Engine
from recontrast_edge.errors import SourceError
from recontrast_edge.frame import Frame, Source
from recontrast_edge.pipeline import Line
from recontrast_edge.sinks import open_sink
from recontrast_edge.task import Product
from tests.edge.fakes_line import (
    GOOD,
    THRESHOLD,
    FakeSink,
    FakeSource,
    Wrapped,
    check_accounts,
    endless,
    frame,
    picture,
    run,
    threads_of_a_line,
)

PERIOD_S = 0.05
SOAK_S = float(os.environ.get("RECONTRAST_SOAK_S", "1800"))
DEATHS = 20
LEAST_SLOPE_BYTES = 512 << 10
"""What the resident memory may differ by between two looks without meaning anything."""


def three_times_too_slow(engine: Engine) -> Wrapped:
    return Wrapped(engine, lambda: time.sleep(3 * PERIOD_S))


@pytest.mark.parametrize("duration_s", [5.0, pytest.param(60.0, marks=pytest.mark.soak)])
def test_live_keeps_up_with_a_camera_that_is_three_times_too_fast(engine, duration_s: float) -> None:
    stop, sink, captured_s = threading.Event(), FakeSink(), []

    def items() -> Iterator[Frame]:
        for index in itertools.count():
            yield frame(index)
            captured_s.append(time.monotonic())

    threading.Timer(duration_s, stop.set).start()
    line = run(three_times_too_slow(engine), FakeSource(items(), live=True, interval_s=PERIOD_S), sink, stop=stop)
    statistics = line.statistics
    assert statistics.captured >= 0.5 * duration_s / PERIOD_S
    assert statistics.judged == pytest.approx(statistics.captured / 3, rel=0.25)
    # Of the frames that really came: on a busy machine they are late as well.
    period_s = float(np.percentile(np.diff(captured_s), 99))
    ages_s = [judgement.latency_ms["wait"] / 1e3 for judgement in sink.taken]
    report = {"frames": statistics.captured, "judged": statistics.judged, "dropped": statistics.dropped}
    print(json.dumps({**report, "p99_age_s": float(np.percentile(ages_s, 99)), "p99_period_s": period_s}))
    # One in a hundred may be late; of the short run's 33, one.
    assert sum(age_s > 2 * period_s for age_s in ages_s) <= max(1, len(ages_s) // 100)
    # In the last third as in the first: nothing piles up.
    third = len(ages_s) // 3
    assert np.median(ages_s[-third:]) <= np.median(ages_s[:third]) + period_s


@pytest.mark.parametrize("duration_s", [3.0, pytest.param(60.0, marks=pytest.mark.soak)])
def test_every_skips_nothing_and_makes_faults_beyond_the_bound(engine, duration_s: float) -> None:
    stop, sink = threading.Event(), FakeSink()
    threading.Timer(duration_s, stop.set).start()
    source = endless(PERIOD_S / 5)
    line = run(Wrapped(engine, lambda: time.sleep(PERIOD_S)), source, sink, stop=stop, mode="every", queue_frames=16)
    assert sink.ids == list(range(len(sink.ids)))
    assert line.statistics.faults["queue_full"] > 0.3 * line.statistics.captured
    assert set(line.statistics.faults) == {"queue_full"}
    waits_s = [judgement.latency_ms["wait"] / 1e3 for judgement in sink.taken if judgement.fault is None]
    counts = {"frames": line.statistics.captured, "faults": dict(line.statistics.faults)}
    print(json.dumps({**counts, "longest_wait_s": max(waits_s)}))
    assert max(waits_s) < 3 * 17 * PERIOD_S, "who waits does so behind 16 frames, not behind all that ever came"


class Mortal(FakeSource):
    """A camera at 50 frames a second that dies after a time: it breaks, or falls silent."""

    def __init__(self, lifetime_s: float, *, silent: bool) -> None:
        self._dies_s = time.monotonic() + lifetime_s
        self._silent = silent
        super().__init__((self._frame(index) for index in itertools.count()), live=True, interval_s=0.02)
        self._descriptor = os.open(os.devnull, os.O_RDONLY)

    def _frame(self, index: int) -> Frame | None:
        if time.monotonic() < self._dies_s:
            return Frame(index, "mortal", np.dstack([picture(GOOD, index)] * 3), time.monotonic())
        if not self._silent:
            raise SourceError("the cable was pulled")
        self.closed.wait(0.1)
        return None

    def close(self) -> None:
        if not self.closed.is_set():
            os.close(self._descriptor)
        super().close()


def soak(engine: Engine, folder: Path, duration_s: float, sample: Callable[[], None]) -> Line:
    """Run a line whose camera dies so many times, with outputs, and look at the process from time to time."""
    # Less what it takes to notice a silence and to open the camera again.
    lifetime_s = max(duration_s / (DEATHS + 2) - 3.0, 0.5)
    stop, started_s = threading.Event(), time.monotonic()
    deaths = itertools.count()

    def open_mortal() -> Source:
        return Mortal(lifetime_s, silent=next(deaths) % 2 == 0)

    plan = CameraPlan("mortal", open_mortal, Product(engine, THRESHOLD), gate_delay_s=1.0, retry=Retry())
    sinks = [open_sink(f"jsonl:{folder / 'records.jsonl'}", input_spec=engine.spec.input)]

    def look() -> None:
        while not stop.wait(duration_s / 200):
            sample()
            if time.monotonic() - started_s >= duration_s:
                stop.set()

    line = Line([plan], stop=stop)
    watcher = threading.Thread(target=look, name="soak")
    watcher.start()
    line.run(sinks)
    watcher.join()
    return line


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("duration_s", [pytest.param(SOAK_S, marks=pytest.mark.soak)])
def test_memory_files_and_threads_stay_as_they_are(engine, tmp_path: Path, duration_s: float) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system has no /proc: nothing tells the memory of the process")
    samples: list[tuple[float, int, int, int]] = []

    def sample() -> None:
        gc.collect()
        open_files = len(list(Path("/proc/self/fd").iterdir()))
        samples.append((time.monotonic(), resident_bytes(), open_files, threading.active_count()))

    line = soak(engine, tmp_path, duration_s, sample)
    check_accounts(line)
    assert not threads_of_a_line()
    camera = line.summary()["cameras"][0]
    assert camera["reconnects"] >= DEATHS
    assert line.errors == []
    assert line.statistics.verdicts["PASS"] > 5 * duration_s
    warm = np.array(samples[len(samples) // 5 :], dtype=np.float64)
    seconds, resident = warm[:, 0] - warm[0, 0], warm[:, 1]
    slope = float(np.polyfit(seconds, resident, 1)[0]) * 3600
    report = {
        "duration_s": duration_s,
        "frames": line.statistics.captured,
        "reconnects": camera["reconnects"],
        "rss_slope_bytes_per_hour": round(slope),
        "rss_range_bytes": int(np.ptp(resident)),
        "open_files": [int(warm[:, 2].min()), int(warm[:, 2].max())],
        "threads": [int(warm[:, 3].min()), int(warm[:, 3].max())],
    }
    print(json.dumps(report))
    assert slope * min(1.0, duration_s / 3600) < max(LEAST_SLOPE_BYTES, (1 << 20) * duration_s / 3600), report
    # One more while a camera is being closed, or is closed.
    assert np.ptp(warm[:, 2]) <= 1, report
    assert np.ptp(warm[:, 3]) <= 1, report
