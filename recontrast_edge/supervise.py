"""A camera that is kept running: opened, watched, opened again, and a FAULT whenever it delivers nothing to rely on.

    camera = Camera(CameraPlan("usb:0", lambda: open_source("usb:0"), product), lane, ...); camera.start()

What a camera does is its ``SourceState``. ``docs/pipeline.md`` draws the states and says which times hold. Only live
sources are watched and opened again: a file that breaks off stays broken.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from recontrast_edge.bounded import as_exception, join, leave, wait_until
from recontrast_edge.camera_plan import CameraPlan, Mode
from recontrast_edge.errors import SourceError
from recontrast_edge.frame import EndOfStream, Frame, Judgement, Source, SourceState, StateChange
from recontrast_edge.health import HealthCheck, Watch
from recontrast_edge.mailbox import Lane, Overflow
from recontrast_edge.statistics import Statistics
from recontrast_edge.task import Assignment, Task
from recontrast_edge.verdict import Fault

_log = logging.getLogger(__name__)

READ_AHEAD_FRAMES = 4
"""Of a source that can wait, in mode ``every``: enough to hide one slow frame, few enough that the wait stays short."""

READ_TIMEOUT_S = 0.1
"""How soon a waiting reader notices that it should stop."""

FIRST_FRAME_S = 5.0
"""A camera that was opened may take so long until its first frame."""

REOPEN_AFTER_S = 1.0
"""A camera that has been STALE for so long is opened again."""

OPEN_LIMIT_S = 30.0
CLOSE_LIMIT_S = 3.0
"""A thread that hangs in a driver's open, or in its read after a close, is left behind, and another one begins."""

MAX_HANGING = 3
"""Threads of one camera that may hang at a time; with one more its driver is beyond help."""

MAX_JUMP = 10_000
"""Frames that mode ``every`` makes FAULTs of at once; a larger jump of the ids is a broken source."""


class Camera:
    """Runs one camera, on a thread of its own, into a lane.

    Args:
        plan: what to open and how.
        lane: takes the frames.
        deliver: takes their judgements.
        changed: told of each change of state, from any thread; must not wait.
        statistics: of the whole line; the camera's own are in ``statistics``.
        max_frames: in mode ``every``, capture no more than this.
    """

    def __init__(
        self,
        plan: CameraPlan,
        lane: Lane,
        *,
        deliver: Callable[[Camera, Judgement], None],
        changed: Callable[[StateChange], None],
        statistics: Statistics,
        max_frames: int | None,
    ) -> None:
        self.plan = plan
        self.lane = lane
        self.statistics = Statistics()
        self.state = SourceState.CONNECTING
        self.connected = False
        """It was opened at least once."""
        self.ready = False
        """It was RUNNING at least once."""
        self.done = False
        """Nothing more comes."""
        self.error: Exception | None = None
        """What ended it."""
        self.reconnects = 0
        self._total = statistics
        self._max_frames = max_frames
        self._changed = changed
        threshold = next(iter(plan.products.values())).threshold
        self._assignment = Assignment(lambda judgement: deliver(self, judgement), threshold, plan.gate_reserve_s)

        # Held while a frame is taken in, and by whoever changes the state. Never while calling a driver.
        self._lock = threading.Lock()
        self._uri = plan.uri
        self._mode: Mode | None = plan.mode
        self._live = False
        self._reopens = False
        self._source: Source | None = None
        self._counters: dict[str, int] = {}
        self._closer: threading.Thread | None = None
        self._health = HealthCheck(plan.watch or Watch())
        self._fault: str | None = None
        self._detail: str | None = None
        self._heard_s = math.inf
        self._opening_s = math.inf
        self._closing_s = math.inf
        self._stale_s = math.inf
        self._next_fault_s = math.inf
        self._failures = 0
        self._expected_id = 0
        self._next_id = 0

        self._begun = threading.Event()
        self._stopping = False
        self._hanging: list[threading.Thread] = []
        self._generation = 0
        self._thread = self._new_thread()

    # For the thread that runs the line.

    @property
    def uri(self) -> str:
        """The source's own, once it was open."""
        return self._uri

    @property
    def mode(self) -> Mode | None:
        """None until it was opened and is known."""
        return self._mode

    @property
    def tried(self) -> bool:
        """Whether it was opened, or could not be."""
        return self.connected or self.done or (self.plan.retry.wait_for_source and self._failures > 0)

    @property
    def live(self) -> bool:
        """Whether its frames come by themselves; False until it is known."""
        return self._live

    def start(self) -> None:
        """Open the source; nothing is read before ``begin``."""
        self._thread.start()

    def begin(self) -> None:
        """Start reading."""
        self._begun.set()

    def change(self) -> StateChange:
        """The present state, as a change."""
        with self._lock:
            return self._state_change(self.state)

    def check(self, now_s: float) -> None:
        """Notice silence and hanging drivers; called often, and never waits."""
        # A reader that waits for room in its lane holds the lock: then there is nothing to notice.
        if not self._begun.is_set() or not self._lock.acquire(blocking=False):
            return
        try:
            can_wait = self._source is not None and not self._live
            if self.done or self._stopping or can_wait:
                return
            self._check_silence(now_s)
            if self.state is SourceState.STALE and now_s - self._stale_s >= REOPEN_AFTER_S:
                self._stale_s = math.inf
                self._close_source(now_s)
            if now_s - self._closing_s >= CLOSE_LIMIT_S or now_s - self._opening_s >= OPEN_LIMIT_S:
                self._replace_thread()
        finally:
            self._lock.release()

    def stop(self) -> None:
        """Stop reading; returns at once."""
        self._stopping = True
        self._begun.set()
        self.lane.release()

    def close_source(self) -> None:
        """Close the source under a reader that has not come back after ``stop``; returns at once."""
        if self._thread.is_alive():
            # Without the lock, which a reader that waits for room in its lane holds.
            self._close_source(time.monotonic())

    def join(self, until_s: float) -> None:
        """Wait for the reader to come back, and leave it behind if it does not."""
        if not join(self._thread, until_s) and self.error is None:
            self.error = SourceError(f"{self.uri}: the source does not answer; it was left behind")
        self.lane.end()

    @property
    def alive(self) -> bool:
        """Whether the reader is still at work."""
        return self._thread.is_alive()

    def count(self, *, captured: int = 0, dropped: int = 0) -> None:
        """Count frames for this camera and for the line."""
        self.statistics.count(captured=captured, dropped=dropped)
        self._total.count(captured=captured, dropped=dropped)

    def summary(self) -> dict[str, Any]:
        """The camera's part of the run as one JSON-able object."""
        source = self._source
        return {
            "camera": self.plan.name,
            "source": self.uri,
            "mode": self.mode,
            "state": self.state.value,
            "reconnects": self.reconnects,
            "counters": self._all_counters(source),
            "products": [
                {
                    "product": name,
                    "engine": {
                        "path": str(product.engine.path),
                        "name": product.engine.name,
                        "sha256": product.engine.sha256,
                    },
                    "threshold": product.threshold,
                }
                for name, product in self.plan.products.items()
            ],
            **self.statistics.summary(),
        }

    def _all_counters(self, source: Source | None) -> dict[str, int]:
        """Of all sources that were open one after the other."""
        total = dict(self._counters)
        for name, count in dict(getattr(source, "counters", {})).items():
            total[name] = total.get(name, 0) + count
        return total

    # The reader's thread.

    def _new_thread(self) -> threading.Thread:
        generation = self._generation
        return threading.Thread(target=self._run, args=(generation,), name=f"source {self._uri}", daemon=True)

    def _is_current(self, generation: int) -> bool:
        """False for a thread that was left behind: whatever it brings does not count any more."""
        return generation == self._generation and not self._stopping

    @property
    def _is_closing(self) -> bool:
        """The source is being closed under its reader."""
        return not math.isinf(self._closing_s)

    def _run(self, generation: int) -> None:
        try:
            while self._is_current(generation):
                try:
                    self._open_and_read(generation)
                except SourceError as error:
                    self._lost(error, generation)
                    pause_s = self.plan.retry.pause_s(max(self._failures, 1))
                    wait_until(lambda: not self._is_current(generation), time.monotonic() + pause_s)
        except EndOfStream:
            self._end(None, generation)
        except BaseException as error:
            self._end(as_exception(error), generation)
        else:
            self._end(None, generation)

    def _open_and_read(self, generation: int) -> None:
        self._opening_s = time.monotonic()
        try:
            source = self.plan.open_source()
        finally:
            if generation == self._generation:
                self._opening_s = math.inf
        try:
            if not self._opened(source, generation):
                return
            self._begun.wait()
            # What arrived before somebody was there to judge it is old by now, and cannot be blamed on the camera.
            self._heard_s = time.monotonic()
            while self._is_current(generation):
                if self._has_enough():
                    raise EndOfStream
                frame = source.read(READ_TIMEOUT_S)
                if self._is_closing:
                    raise EndOfStream
                if frame is not None:
                    self._accept(frame, generation)
        except EndOfStream:
            if not self._is_closing:
                raise
            # A source that was closed because it was STALE says that it is at its end.
            raise SourceError(self._detail or "the source was closed") from None
        finally:
            _close(source)
            self._let_go(source, generation)

    def _opened(self, source: Source, generation: int) -> bool:
        with self._lock:
            if not self._is_current(generation):
                return False
            self._source, self._uri, self._live = source, source.uri, source.live
            self._reopens = getattr(source, "reopens", source.live)
            if self._mode is None:
                self._mode = getattr(source, "default_mode", "live" if source.live else "every")
            if self._mode == "live":
                self.lane.open(1, Overflow.REPLACE)
            elif source.live:
                self.lane.open(self.plan.queue_frames, Overflow.REFUSE)
            else:
                self.lane.open(READ_AHEAD_FRAMES, Overflow.WAIT)
            self.reconnects += self.connected
            self.connected = True
            self._expected_id = 0
            self._health = HealthCheck(self.plan.watch or Watch(), triggered=getattr(source, "triggered", False))
            self._heard_s = time.monotonic()
            return True

    def _let_go(self, source: Source, generation: int) -> None:
        with self._lock:
            if generation == self._generation:
                self._counters = self._all_counters(source)
                self._source = None
                self._closing_s = math.inf

    def _accept(self, frame: Frame, generation: int) -> None:
        with self._lock:
            if not self._is_current(generation):
                return
            missed = frame.frame_id - self._expected_id
            if missed < 0:
                raise SourceError(
                    f"{self._uri}: expected frame id {self._expected_id} or later, got {frame.frame_id}; ids must rise"
                )
            wrong = self._health.frame(frame) if self._live and self.plan.watch is not None else None
            self._expected_id = frame.frame_id + 1
            self._heard_s = time.monotonic()
            self._account_for(missed, frame)
            if self._has_enough():
                return
            if wrong is not None:
                self._set_state(SourceState.FAULT, *wrong)
            elif frame.fault is None:
                self._failures = 0
                self._set_state(SourceState.RUNNING)
            elif self.state in (SourceState.CONNECTING, SourceState.STALE):
                self._set_state(SourceState.FAULT, frame.fault, frame.detail)
            if wrong is not None and frame.fault is None:
                code, detail = wrong
                frame = dataclasses.replace(frame, fault=code.value, detail=detail)
            self._capture(frame)

    def _account_for(self, missed: int, frame: Frame) -> None:
        """Frames that were lost before they could be read."""
        if self._mode == "live":
            self._next_id += missed
            self.count(captured=missed, dropped=missed)
            return
        if missed > MAX_JUMP:
            raise SourceError(
                f"{self._uri}: expected frame id {self._expected_id - missed - 1} or one of the next {MAX_JUMP}, got "
                f"{frame.frame_id}"
            )
        for _ in range(missed):
            if self._has_enough():
                return
            detail = f"the source was at frame {frame.frame_id} when it could be read again"
            self._capture(self._placeholder(Fault.FRAME_MISSED.value, detail, captured_s=frame.captured_s))

    def _has_enough(self) -> bool:
        """In mode ``every`` nothing is captured that would not be judged."""
        return self._mode == "every" and self._max_frames is not None and self._next_id >= self._max_frames

    def _placeholder(self, code: str, detail: str | None, *, captured_s: float | None = None) -> Frame:
        captured_s = time.monotonic() if captured_s is None else captured_s
        return Frame(self._next_id, self._uri, None, captured_s, fault=code, detail=detail)

    def _capture(self, frame: Frame) -> None:
        gate_s, delay_s = frame.gate_s, self.plan.gate_delay_s
        if gate_s is None and delay_s is not None:
            gate_s = frame.captured_s + delay_s
        if (frame.frame_id, frame.camera, frame.gate_s) != (self._next_id, self.plan.name, gate_s):
            frame = dataclasses.replace(frame, frame_id=self._next_id, camera=self.plan.name, gate_s=gate_s)
        self._next_id += 1
        self.count(captured=1)
        self.count(dropped=self.lane.put(Task(frame, self.plan.choose(frame), self._assignment)))

    # The state. With the lock held.

    def _lost(self, error: SourceError, generation: int) -> None:
        """The source broke, or could not be opened: decide whether to try again.

        Raises:
            SourceError: no.
        """
        with self._lock:
            if not self._is_current(generation):
                return
            self._failures += 1
            if not (self._reopens if self.connected else self.plan.retry.wait_for_source):
                raise error
            limit = self.plan.retry.max_reconnects
            if limit is not None and self._failures > limit:
                raise error
            self._set_state(SourceState.CONNECTING, Fault.SOURCE_FAILED, str(error))

    def _end(self, error: Exception | None, generation: int) -> None:
        with self._lock:
            if generation != self._generation:
                return
            self.error = error
            if error is not None and self._begun.is_set() and not self._has_enough():
                self._capture(self._placeholder(Fault.SOURCE_FAILED.value, str(error)))
            if error is None:
                self._set_state(SourceState.ENDED)
            else:
                self._set_state(SourceState.ENDED, Fault.SOURCE_FAILED, str(error))
            self.done = True
        self.lane.end()

    def _set_state(self, state: SourceState, code: Fault | str | None = None, detail: str | None = None) -> None:
        before = (self.state, self._fault)
        self.state, self._fault, self._detail = state, code.value if isinstance(code, Fault) else code, detail
        if (self.state, self._fault) == before:
            return
        self.ready = self.ready or state is SourceState.RUNNING
        now_s = time.monotonic()
        self._stale_s = now_s if state is SourceState.STALE else math.inf
        self._next_fault_s = math.inf
        self._changed(self._state_change(before[0]))
        if state in (SourceState.CONNECTING, SourceState.STALE) and code is not None:
            self._next_fault_s = now_s
            self._fault_period(now_s)

    def _state_change(self, before: SourceState) -> StateChange:
        return StateChange(self.plan.name, self._uri, before, self.state, time.monotonic(), self._fault, self._detail)

    def _fault_period(self, now_s: float) -> None:
        """The FAULT that stands for what should have come."""
        if self._fault is None or now_s < self._next_fault_s or not self._begun.is_set() or self._has_enough():
            return
        self._next_fault_s = now_s + self.plan.fault_period_s
        self._capture(self._placeholder(self._fault, self._detail))

    def _check_silence(self, now_s: float) -> None:
        silent_s = now_s - max(self._heard_s, getattr(self._source, "heard_s", None) or -math.inf)
        limit_s = math.inf
        if self._source is not None and self.plan.watch is not None:
            limit_s = self._health.stale_after_s()
            if self.state is SourceState.CONNECTING and not math.isinf(limit_s):
                limit_s = FIRST_FRAME_S
            elif self.state is SourceState.STALE:
                limit_s = math.inf
        if silent_s > limit_s:
            self._set_state(SourceState.STALE, Fault.SOURCE_STALE, f"no frame for {silent_s:.2f} s")
        else:
            self._fault_period(now_s)

    def _close_source(self, now_s: float) -> None:
        """Close the source from yet another thread, because nobody knows how long its driver takes."""
        source = self._source
        if source is None or self._is_closing:
            return
        self._closing_s = now_s
        self._closer = threading.Thread(target=_close, args=(source,), name=f"close {self._uri}", daemon=True)
        self._closer.start()

    def _replace_thread(self) -> None:
        """Leave a thread behind that hangs in the driver, and begin another."""
        self._generation += 1
        self._hanging = [thread for thread in (*self._hanging, self._thread) if thread.is_alive()]
        leave(self._thread)
        if self._closer is not None and self._closer.is_alive():
            leave(self._closer)
        self._counters = self._all_counters(self._source)
        self._source, self._opening_s, self._closing_s = None, math.inf, math.inf
        if len(self._hanging) > MAX_HANGING:
            self.error = SourceError(
                f"{self._uri}: its driver hangs on {len(self._hanging)} threads; reconnect the camera and start again"
            )
            self._capture(self._placeholder(Fault.SOURCE_FAILED.value, str(self.error)))
            self._set_state(SourceState.ENDED, Fault.SOURCE_FAILED, str(self.error))
            self.done = True
            self.lane.end()
            return
        self._set_state(SourceState.CONNECTING, Fault.SOURCE_FAILED, f"{self._uri}: the driver does not answer")
        self._thread = self._new_thread()
        self._thread.start()


def _close(source: Source) -> None:
    try:
        source.close()
    except Exception as error:
        # It is given up anyway, and what matters is what comes next.
        _log.warning("closing %s: %s", source.uri, error)
