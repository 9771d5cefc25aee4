"""Sources, sinks and an engine's wrapper that do exactly what a test of the line wants."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from recontrast_edge.camera_plan import CameraPlan
from recontrast_edge.engines import Engine, Inference
from recontrast_edge.errors import OutputError
from recontrast_edge.frame import EndOfStream, Frame, Judgement, Source, StateChange
from recontrast_edge.pipeline import Line
from recontrast_edge.preprocess import Image
from recontrast_edge.task import Product

THRESHOLD = 0.5
GOOD, DEFECT = 50, 200
"""Brightness of pictures that the tiny model passes and rejects."""


def picture(brightness: int, frame_id: int = 0) -> np.ndarray:
    """No two of 40 in a row are the same, as of a sensor with noise."""
    image = np.full((32, 32), brightness, np.uint8)
    image[0, 0] = frame_id % 40
    return image


def frame(frame_id: int, brightness: int = GOOD, **more: Any) -> Frame:
    return Frame(frame_id, "fake", picture(brightness, frame_id), time.monotonic(), **more)


def frames(count: int, **more: Any) -> list[Frame]:
    """Every third is a defect."""
    return [
        frame(index, DEFECT, truth="defect", **more) if index % 3 == 0 else frame(index, truth="good", **more)
        for index in range(count)
    ]


class FakeSource:
    """Delivers what it is given, one item an interval, and then ends or breaks. None is a timeout."""

    def __init__(
        self,
        items: Iterable[Frame | None],
        *,
        live: bool = False,
        interval_s: float = 0.0,
        end: Exception | None = None,
        uri: str = "fake://",
    ) -> None:
        self.uri = uri
        self.live = live
        self.closed = threading.Event()
        self._items = iter(items)
        self._interval_s = interval_s
        self._end = end

    def read(self, timeout_s: float) -> Frame | None:
        time.sleep(self._interval_s)
        for item in self._items:
            return item
        raise self._end or EndOfStream

    def close(self) -> None:
        self.closed.set()


def endless(interval_s: float = 0.002, *, brightness: int = GOOD, uri: str = "fake://") -> FakeSource:
    """A camera that always has a picture, stamped when it is read."""
    items = (frame(index, brightness) for index in itertools.count())
    return FakeSource(items, live=True, interval_s=interval_s, uri=uri)


class FakeSink:
    def __init__(self, *, delay_s: float = 0.0, fail_at: int | None = None) -> None:
        self.uri = "fake-sink"
        self.taken: list[Judgement] = []
        self.states: list[StateChange] = []
        self.closed = 0
        self._delay_s = delay_s
        self._fail_at = fail_at

    def write(self, judgement: Judgement) -> None:
        time.sleep(self._delay_s)
        if len(self.taken) == self._fail_at:
            raise OutputError("the disk is full")
        self.taken.append(judgement)

    def write_state(self, change: StateChange) -> None:
        self.states.append(change)

    def close(self) -> None:
        self.closed += 1

    @property
    def ids(self) -> list[int]:
        return [judgement.frame.frame_id for judgement in self.taken]

    @property
    def faults(self) -> list[str | None]:
        return [judgement.fault for judgement in self.taken]

    @property
    def state_names(self) -> list[str]:
        return [change.state.value for change in self.states]


class Wrapped:
    """The tiny engine with something done before each inference; with ``max_batch`` it takes several images at once."""

    def __init__(self, engine: Engine, before: Callable[[], None] = lambda: None, *, max_batch: int = 1) -> None:
        self._engine = engine
        self._before = before
        self.max_batch = max_batch
        self.batches: list[int] = []
        self.maps_above: float | None = None
        self.spec, self.path, self.name, self.sha256 = engine.spec, engine.path, engine.name, engine.sha256

    def infer(self, images: Sequence[Image], *, maps_above: float | None = None) -> Inference:
        assert len(images) <= self.max_batch
        self.batches.append(len(images))
        self.maps_above = maps_above
        self._before()
        return self._engine.infer(images)

    def close(self) -> None:
        pass

    def __enter__(self) -> Wrapped:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan(engine: Engine, source: Source | Callable[[], Source], **more: Any) -> CameraPlan:
    """A camera; nothing watches it unless the test says so."""
    opener = source if callable(source) else lambda: source
    return CameraPlan("fake://", opener, **{"product": Product(engine, THRESHOLD), "watch": None, **more})


def run(engine: Engine, source: Source | Callable[[], Source], *sinks: FakeSink, **more: Any) -> Line:
    """A line of one camera, run to its end, with its accounts checked and nothing left behind."""
    of_line = {name: more.pop(name) for name in ("max_frames", "stop", "engine_timeout_s") if name in more}
    return run_line(Line([plan(engine, source, **more)], **of_line), *sinks)


def run_line(line: Line, *sinks: FakeSink) -> Line:
    with line:
        line.run(sinks)
    check_accounts(line)
    assert all(sink.closed for sink in sinks)
    assert not threads_of_a_line()
    return line


def threads_of_a_line() -> list[str]:
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.name == "judge" or thread.name.startswith(("sink ", "source ", "close "))
    ]


def check_accounts(line: Line) -> None:
    """Of every camera and of all together: captured = judged + dropped."""
    cameras = [camera.statistics for camera in line.cameras]
    for statistics in (line.statistics, *cameras):
        assert statistics.captured == statistics.judged + statistics.dropped
    for count in ("captured", "judged", "dropped"):
        assert getattr(line.statistics, count) == sum(getattr(statistics, count) for statistics in cameras)
