"""A line: from its cameras to its outputs, every frame judged and accounted for, whatever breaks on the way.

    Line([CameraPlan(uri, lambda: open_source(uri), Product(engine, threshold))]).run([open_sink("jsonl:-", ...)])

Threads: one for each camera reads its source, one judges for all cameras that share an engine, one for each output
writes. The caller's thread watches over them and never waits for any: that is what stops a line whose driver, engine
or output hangs. ``docs/pipeline.md`` tells what happens when.

    source -> Lane -> Mailbox -> engine -> verdict -> merger -> SinkThread
    source -> Lane ---^                                      -> SinkThread

Mode ``live``: the newest frame wins, older ones are dropped and counted. Mode ``every``: nothing is skipped; a source
that can wait is made to, and a frame that cannot be taken becomes a FAULT. After ``run``, of each camera:
captured = judged + dropped, exactly.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import numpy as np

from recontrast_edge.bounded import POLL_S, LeftBehindError, call_apart, leave, wait_until
from recontrast_edge.camera_plan import CameraPlan
from recontrast_edge.engines import Engine
from recontrast_edge.errors import OutputError, StallError, UsageError
from recontrast_edge.frame import Judgement, Merger, Sink, SourceState, StateChange
from recontrast_edge.images import atomic_write
from recontrast_edge.judging import JudgeThread
from recontrast_edge.mailbox import Mailbox
from recontrast_edge.secrets import mask
from recontrast_edge.sink_thread import SinkThread
from recontrast_edge.statistics import Statistics
from recontrast_edge.supervise import Camera
from recontrast_edge.systemd import Notifier

_log = logging.getLogger(__name__)

TICK_S = 0.05
"""How often the line looks after its threads."""

SINKS_OPENED_S = 0.5
READERS_RETURN_S = 0.8
READERS_LEFT_S = 1.5
JUDGES_DRAIN_S = 2.0
JUDGES_LEFT_S = 2.5
SINKS_LEFT_S = 3.8
"""Counted from a stop: when outputs that do not open are left behind; when sources that have not come back are closed,
and left behind; when frames that wait are dropped, and engines left behind; when outputs are left behind. A line must
be down within 5 s."""

SAME_REQUEST_S = 0.2
"""Signals that come together are one."""

STATUS_INTERVAL_S = 5.0
"""How often systemd is told the counts."""

StoppedBy = Literal[
    "end_of_stream", "max_frames", "signal", "source_failed", "output_failed", "engine_stalled", "internal_error"
]


class Line:
    """One run of one or more cameras.

    Args:
        cameras: with names, where there are several.
        merger: makes one verdict of several cameras', such as of the views of a part; the outputs get what it makes.
        max_frames: stop after so many verdicts.
        batch_wait_s: how long an engine that takes several images at once waits for those of other cameras, in seconds.
        engine_timeout_s: an inference that takes longer is a FAULT for all who wait, in seconds.
        stop: set it, from anywhere, to stop cleanly: what has been captured is still judged and written.
        statistics: the counts to write to, for those who show them while it runs.

    After ``run``, ``stopped_by`` says why it ended, ``errors`` holds what went wrong (the cause first), and ``outputs``
    what became of each sink's records.

    Raises:
        UsageError: cameras without names that tell them apart.
    """

    def __init__(
        self,
        cameras: Sequence[CameraPlan],
        *,
        merger: Merger | None = None,
        max_frames: int | None = None,
        batch_wait_s: float = 0.002,
        engine_timeout_s: float = 5.0,
        stop: threading.Event | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        names = Counter(plan.name for plan in cameras)
        if not cameras or (len(cameras) > 1 and (None in names or max(names.values()) > 1)):
            raise UsageError(f"expected one camera, or several with a name each, got the names {list(names)}")
        if not 0 < engine_timeout_s < math.inf:
            raise UsageError(f"engine_timeout_s: expected seconds above 0, got {engine_timeout_s}")
        self.statistics = statistics or Statistics()
        self.stopped_by: StoppedBy = "signal"
        self.errors: list[Exception] = []
        self.outputs: list[dict[str, Any]] = []
        self._merger = merger
        self._merged: Counter[str] = Counter()
        self._max_frames = max_frames
        self._engine_timeout_s = engine_timeout_s
        self._stop = stop or threading.Event()
        self._stop_s: float | None = None
        self._failing = threading.Event()
        self._full = threading.Event()
        # Held while a judgement goes through mergers and into queues.
        self._delivery = threading.RLock()
        self._sinks: list[SinkThread] = []
        self._judges: list[JudgeThread] = []
        self._mailboxes: list[Mailbox] = []
        self.cameras: list[Camera] = []
        for plans in _sharing_engines(cameras):
            mailbox = Mailbox(batch_wait_s)
            self._mailboxes.append(mailbox)
            self.cameras += [
                Camera(
                    plan,
                    mailbox.lane(),
                    deliver=self._deliver,
                    changed=self._changed,
                    statistics=self.statistics,
                    max_frames=max_frames,
                )
                for plan in plans
            ]
        self._watcher = 0
        self._connecting = False
        self._closed = False

    # Results.

    def summary(self) -> dict[str, Any]:
        """The run as one JSON-able object, as ``--summary`` writes it (``docs/artifacts.md``)."""
        return {
            "stopped_by": self.stopped_by,
            "errors": [mask(str(error)) for error in self.errors],
            **self.statistics.summary(),
            "merged": dict(self._merged) or None,
            "cameras": [camera.summary() for camera in self.cameras],
            "outputs": self.outputs,
        }

    def write_summary(self, path: Path, **more: Any) -> None:
        """Write ``summary`` and ``more`` as JSON; a failure joins ``errors``, so that it hides no earlier one."""
        try:
            with atomic_write(path) as file:
                file.write(json.dumps({**self.summary(), **more}, indent=2, allow_nan=False).encode() + b"\n")
        except OutputError as error:
            self.errors.append(error)

    @property
    def faults(self) -> int:
        """Verdicts that are FAULT: of frames, or else of what was made of them."""
        return max(self.statistics.verdicts["FAULT"], self._merged["FAULT"])

    # A run.

    def connect(self) -> None:
        """Open the cameras, or try to where one is to be waited for; nothing is read yet.

        ``run`` does it where nobody did. Call it before the outputs are opened, so that a camera that is not there
        leaves the files of an earlier run alone.

        Raises:
            UsageError, InputError, SourceError, MissingError: a camera cannot be opened.
        """
        self._connecting = True
        for camera in self.cameras:
            camera.start()
        while not self._stop.is_set() and not all(camera.tried for camera in self.cameras):
            time.sleep(POLL_S)
        errors = [camera.error for camera in self.cameras if camera.error is not None]
        if errors:
            self.close()
            raise errors[0]

    def open_sink(self, uri: str, open_sink: Callable[[], Sink]) -> Sink:
        """Open an output, and wait for one that hangs no longer than a stop may take.

        Args:
            uri: for messages, credentials masked.

        Raises:
            OutputError: it cannot be opened, or was not until the line had to stop.
        """
        try:
            return call_apart(
                open_sink, name=f"open {uri}", wanted=lambda: time.monotonic() < self._until_s(SINKS_OPENED_S)
            )
        except LeftBehindError:
            raise OutputError(f"{uri}: the output could not be opened until the stop; it was left behind") from None

    def run(self, sinks: Sequence[Sink] = ()) -> Statistics:
        """Stream until the end, ``max_frames``, a stop, or an error. May be called once.

        Args:
            sinks: each gets every judgement, or as many as it can take, and is closed at the end.
        """
        if not self._connecting:
            self.connect()
        self._watcher = threading.get_ident()
        self.statistics.started_s = time.monotonic()
        # A live source cannot wait for an output, but a file can.
        wait = all(camera.connected and not camera.live and camera.mode == "every" for camera in self.cameras)
        self._sinks = [SinkThread(sink, wait=wait, failed=self._failing.set) for sink in sinks]
        # A map costs a copy from the GPU. The verdict itself needs it for the regions of rejects.
        maps_wanted = any(getattr(sink, "needs_maps", True) for sink in sinks)
        self._judges = [
            JudgeThread(
                mailbox, maps_wanted=maps_wanted, engine_timeout_s=self._engine_timeout_s, delivery=self._delivery
            )
            for mailbox in self._mailboxes
        ]
        notifier = Notifier()
        try:
            for camera in self.cameras:
                camera.statistics.started_s = self.statistics.started_s
                self._changed(camera.change())
                camera.begin()
            for judge in self._judges:
                judge.thread.start()
            self._watch_over(notifier)
        except StallError as error:
            self.stopped_by = "engine_stalled"
            self.errors.append(error)
        except BaseException:
            self.stopped_by = "internal_error"
            self._stop.set()
            raise
        finally:
            notifier.stopping()
            self._shut_down()
            notifier.close()
        return self.statistics

    def close(self) -> None:
        """Let go of the cameras of a line that was connected, but does not run; may be called again."""
        if not self._closed:
            self._closed = True
            self._join_cameras()

    def __enter__(self) -> Line:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Called by the threads of cameras and judges.

    def _deliver(self, camera: Camera, judgement: Judgement) -> None:
        with self._delivery:
            if self._full.is_set():
                camera.count(dropped=1)
                return
            self.statistics.add(judgement)
            camera.statistics.add(judgement)
            if self.statistics.judged == self._max_frames:
                self._full.set()
            merger = camera.plan.merger
            self._write([judgement] if merger is None else merger.add(judgement), merged=merger is not None)

    def _write(self, judgements: Iterable[Judgement], *, merged: bool) -> None:
        """What a camera, or its merger, makes of its frames, to the outputs. With ``_delivery`` held."""
        for judgement in judgements:
            verdicts = [judgement] if self._merger is None else self._merger.add(judgement)
            self._put(verdicts, merged=merged or self._merger is not None)

    def _put(self, judgements: Iterable[Judgement], *, merged: bool) -> None:
        # The thread that watches over the others must not wait for an output, which may hang.
        may_wait = threading.get_ident() != self._watcher
        for judgement in judgements:
            if merged:
                self._merged[judgement.verdict] += 1
            for sink in self._sinks:
                sink.put(judgement, may_wait=may_wait)

    def _changed(self, change: StateChange) -> None:
        self.statistics.states[change.camera] = change
        _log.info("%s: %s, %s", change.source, change.state.value, change.detail or "well")
        for sink in self._sinks:
            sink.put_state(change)

    # The thread that called ``run``.

    def _watch_over(self, notifier: Notifier) -> None:
        """Look after everything until there is a reason to end."""
        ready, status_s = False, -math.inf
        while not self._is_over():
            now_s = time.monotonic()
            for mailbox in self._mailboxes:
                mailbox.wake()
            for camera in self.cameras:
                camera.check(now_s)
            for judge in self._judges:
                judge.rescue(now_s)
            self._merge_late(now_s)
            if not ready and all(camera.ready for camera in self.cameras):
                ready = True
                notifier.ready()
            if now_s - status_s >= STATUS_INTERVAL_S:
                status_s = now_s
                notifier.status(self._status())
            if all(judge.turns(now_s, notifier.patience_s) for judge in self._judges):
                notifier.alive()
            time.sleep(TICK_S)

    def _is_over(self) -> bool:
        """Whether there is a reason to end, which is then in ``stopped_by``."""
        errors = [judge.error for judge in self._judges if judge.error is not None]
        if errors:
            self.stopped_by = "engine_stalled" if isinstance(errors[0], StallError) else "internal_error"
        elif self._full.is_set():
            self.stopped_by = "max_frames"
        elif any(camera.error is not None for camera in self.cameras):
            self.stopped_by = "source_failed"
        elif self._stop.is_set():
            self.stopped_by = "signal"
        elif self._failing.is_set():
            self.stopped_by = "output_failed"
        elif not any(judge.thread.is_alive() for judge in self._judges):
            self.stopped_by = "end_of_stream"
        else:
            return False
        return True

    def _merge_late(self, now_s: float) -> None:
        """Let mergers decide without what did not come in time."""
        mergers = [camera.plan.merger for camera in self.cameras if camera.plan.merger is not None]
        # Whoever waits for a slow output holds it; then the next turn will do.
        if not (mergers or self._merger) or not self._delivery.acquire(blocking=False):
            return
        try:
            for merger in mergers:
                self._write(merger.expire(now_s), merged=True)
            if self._merger is not None:
                self._put(self._merger.expire(now_s), merged=True)
        finally:
            self._delivery.release()

    def _status(self) -> str:
        ill = [
            f"{change.camera or change.source} is {change.state.value}"
            for change in list(self.statistics.states.values())
            if change.state is not SourceState.RUNNING
        ]
        return "; ".join([self.statistics.counts_line(), *ill])

    # The end.

    def _until_s(self, after_stop_s: float) -> float:
        """When to wait no longer: never, unless somebody asked for a stop."""
        if self._stop_s is None and self._stop.is_set():
            self._stop_s = time.monotonic()
        return math.inf if self._stop_s is None else self._stop_s + after_stop_s

    def _shut_down(self) -> None:
        """Judge and write what has been captured; what hangs, or takes too long after a stop, is left behind."""
        self._closed = True
        self._join_cameras()
        for camera in self.cameras:
            if self.stopped_by in ("internal_error", "max_frames", "engine_stalled"):
                camera.count(dropped=camera.lane.close())
            if camera.error is not None:
                self.errors.append(camera.error)
        self._join_judges()
        self._flush_mergers()
        for sink in self._sinks:
            sink.end()
        self._wait(lambda: not any(sink.alive for sink in self._sinks), SINKS_LEFT_S)
        for sink in self._sinks:
            sink.join(time.monotonic())
            if sink.error is not None:
                self.errors.append(sink.error)
        self.outputs = [sink.summary() for sink in self._sinks]
        self.statistics.ended_s = time.monotonic()
        for camera in self.cameras:
            camera.statistics.ended_s = self.statistics.ended_s

    def _join_cameras(self) -> None:
        now_s = time.monotonic()
        for camera in self.cameras:
            camera.stop()
        wait_until(lambda: not any(camera.alive for camera in self.cameras), now_s + READERS_RETURN_S)
        for camera in self.cameras:
            camera.close_source()
        for camera in self.cameras:
            camera.join(now_s + READERS_LEFT_S)

    def _join_judges(self) -> None:
        self._wait(lambda: not any(judge.thread.is_alive() for judge in self._judges), JUDGES_DRAIN_S)
        for camera in self.cameras:
            camera.count(dropped=camera.lane.close())
        self._wait(lambda: not any(judge.thread.is_alive() for judge in self._judges), JUDGES_LEFT_S)
        for judge in self._judges:
            if judge.error is not None:
                self.errors.insert(0, judge.error)
            if judge.thread.is_alive():
                judge.fault_all("the engine did not answer until the end of the run")
                leave(judge.thread)
                if not any(isinstance(error, StallError) for error in self.errors):
                    self.errors.append(StallError("the engine does not answer, and was left behind"))
        self._judges = []

    def _wait(self, condition: Callable[[], bool], after_stop_s: float) -> None:
        """Until the condition holds, so many seconds after a stop, or until an engine is given up."""
        while not condition() and time.monotonic() < self._until_s(after_stop_s):
            if self._stop_s is not None:
                self._release_outputs()
            try:
                for judge in self._judges:
                    judge.mailbox.wake()
                    judge.rescue(time.monotonic())
            except StallError as error:
                if not any(isinstance(known, StallError) for known in self.errors):
                    self.errors.append(error)
                return
            time.sleep(POLL_S)

    def _release_outputs(self) -> None:
        """Nobody waits for a slow output any more."""
        for sink in self._sinks:
            sink.release()

    def _flush_mergers(self) -> None:
        for camera in self.cameras:
            if camera.plan.merger is not None:
                for judgement in camera.plan.merger.flush():
                    self._write_last(judgement, self._write)
        if self._merger is not None:
            for judgement in self._merger.flush():
                self._write_last(judgement, self._put)

    def _write_last(self, judgement: Judgement, write: Callable[..., None]) -> None:
        """As soon as the outputs that may be waited for have room."""
        self._wait(lambda: all(sink.takes(judgement) for sink in self._sinks), JUDGES_LEFT_S)
        with self._delivery:
            write([judgement], merged=True)


def _sharing_engines(cameras: Sequence[CameraPlan]) -> list[list[CameraPlan]]:
    """Cameras that have an engine in common, directly or through others, belong together."""
    groups: list[tuple[set[int], list[CameraPlan]]] = []
    for plan in cameras:
        engines = {id(product.engine) for product in plan.products.values()}
        together = [group for group in groups if group[0] & engines]
        groups = [group for group in groups if group not in together]
        merged = [member for _, members in together for member in members]
        groups.append((engines.union(*(group[0] for group in together)), [*merged, plan]))
    return [plans for _, plans in groups]


@contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """While it lasts, Ctrl-C and SIGTERM set ``stop``; a second one ends the process at once, as if never caught.

    Only for the main thread, which is the only one that Python gives signals to.
    """
    asked_s: list[float] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        asked_s.append(time.monotonic())
        stop.set()
        # Tools such as `timeout` send theirs to the process and to its group: that is one request.
        if asked_s[-1] - asked_s[0] > SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def warm_up(engine: Engine) -> None:
    """Judge one black image, so that the first frame is as fast as the rest and a model that cannot run is found now.

    Raises:
        ModelError: the engine failed.
    """
    roi = engine.spec.input.roi
    width, height = engine.spec.input.resize_wh if roi is None else (roi.x + roi.width, roi.y + roi.height)
    engine.infer([np.zeros((height, width, 3), np.uint8)])
