"""From a source to the outputs: every frame read, judged and written, with its latency known.

    statistics = Pipeline(engine, source, [sink], threshold=0.8).run(); print(statistics.summary())

Threads: one reads the source, the caller's judges, and each sink has its own.

    source -> Mailbox -> engine -> verdict -> queue -> sink
                                           -> queue -> sink

Mode ``live``: the newest frame wins, older ones are dropped and counted; a slow sink loses records, never delays a
verdict. Mode ``every``: nothing is skipped; whoever is slow makes the others wait, and a frame that the source itself
went past becomes a FAULT. After ``run``: captured = judged + dropped, exactly.
"""

from __future__ import annotations

import dataclasses
import json
import math
import queue
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

import numpy as np

from recontrast_edge.engines import Engine
from recontrast_edge.errors import InputError, ModelError, OutputError, SourceError
from recontrast_edge.frame import EndOfStream, Frame, Judgement, Sink, Source, Truth, VerdictName
from recontrast_edge.images import atomic_write
from recontrast_edge.latency import PERCENTILES, StageLatencies
from recontrast_edge.verdict import Fault, fault, judge

Mode = Literal["live", "every"]

MAILBOX_FRAMES = 4
"""Frames read ahead in mode ``every``; enough to hide one slow frame, few enough that the wait stays short."""

SINK_JUDGEMENTS = 16
"""Judgements a sink may lag behind; each holds its image."""

READ_TIMEOUT_S = 0.1
"""How soon a waiting reader notices that it should stop."""

STOP_POLL_S = 1.0
"""How soon a waiting judge notices that the reader should have stopped, but has not."""

STOP_TIMEOUT_S = 5.0
"""A source that does not return from ``read`` for so long after a stop is given up."""


class Statistics:
    """Counts and latencies of a run so far. Written by the pipeline's threads, read by any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.captured = 0
        self.dropped = 0
        self.verdicts: dict[VerdictName, int] = dict.fromkeys(get_args(VerdictName), 0)
        self.faults: Counter[str] = Counter()
        self.confusion: dict[Truth, dict[VerdictName, int]] = {}
        """Known truth -> verdict -> frames."""
        self.latency = StageLatencies()
        self.started_s = time.monotonic()
        self.ended_s: float | None = None

    def count(self, *, captured: int = 0, dropped: int = 0) -> None:
        """Add to the frames the source made, and to those that nobody judged."""
        with self._lock:
            self.captured += captured
            self.dropped += dropped

    def add(self, judgement: Judgement) -> None:
        """Count a verdict and its latency."""
        with self._lock:
            self.verdicts[judgement.verdict] += 1
            if judgement.fault is not None:
                self.faults[judgement.fault] += 1
            truth = judgement.frame.truth
            if truth is not None:
                self.confusion.setdefault(truth, dict.fromkeys(self.verdicts, 0))[judgement.verdict] += 1
        self.latency.add(judgement.latency_ms)

    @property
    def judged(self) -> int:
        """Frames with a verdict."""
        return sum(self.verdicts.values())

    @property
    def duration_s(self) -> float:
        """Seconds since the start, up to the end."""
        return (time.monotonic() if self.ended_s is None else self.ended_s) - self.started_s

    @property
    def rate_hz(self) -> float:
        """Verdicts a second, over the whole run."""
        return self.judged / self.duration_s if self.duration_s > 0 else 0.0

    def counts_line(self) -> str:
        """The counts for people: ``300 judged (268 PASS, 32 REJECT, 0 FAULT), 0 dropped of 300, 30.0/s``."""
        verdicts = ", ".join(f"{count} {name}" for name, count in self.verdicts.items())
        return f"{self.judged} judged ({verdicts}), {self.dropped} dropped of {self.captured}, {self.rate_hz:.1f}/s"

    def latency_line(self) -> str:
        """The percentiles for people: ``ms p50/p90/p99/max: wait 0.1/0.1/0.2/0.9, ..., total 9.1/9.9/11.2/14.0``."""
        stages = (
            f"{stage} " + "/".join(f"{row[name]:.1f}" for name in (*PERCENTILES, "max"))
            for stage, row in self.latency.summary().items()
        )
        return f"ms {'/'.join(PERCENTILES)}/max: {', '.join(stages)}"

    def summary(self) -> dict[str, Any]:
        """Everything as one JSON-able object."""
        with self._lock:
            return {
                "captured": self.captured,
                "judged": self.judged,
                "dropped": self.dropped,
                "verdicts": dict(self.verdicts),
                "faults": dict(self.faults),
                "confusion": {truth: dict(row) for truth, row in self.confusion.items()} or None,
                "duration_s": round(self.duration_s, 3),
                "rate_hz": round(self.rate_hz, 2),
                "latency_ms": self.latency.summary(),
            }


class Mailbox:
    """Frames on their way from the reader to the judge.

    Args:
        capacity: frames it holds.
        replace: when full, the oldest makes room (and is dropped); otherwise ``put`` waits.
    """

    def __init__(self, capacity: int, *, replace: bool) -> None:
        self._capacity = capacity
        self._replace = replace
        self._frames: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False

    def put(self, frame: Frame) -> int:
        """Add a frame; returns how many were dropped for it: an older one, or itself when nobody takes any more."""
        with self._changed:
            dropped = 0
            if self._replace and len(self._frames) == self._capacity:
                self._frames.popleft()
                dropped = 1
            self._changed.wait_for(lambda: self._closed or len(self._frames) < self._capacity)
            if self._closed:
                return dropped + 1
            self._frames.append(frame)
            self._changed.notify_all()
            return dropped

    def get(self, timeout_s: float) -> Frame | None:
        """The oldest frame, or None if there is none within the time; ``ended`` tells whether one can still come."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or bool(self._frames), timeout_s)
            if not self._frames:
                return None
            frame = self._frames.popleft()
            self._changed.notify_all()
            return frame

    @property
    def ended(self) -> bool:
        """Empty, and the reader puts no more."""
        with self._changed:
            return self._ended and not self._frames

    def end(self) -> None:
        """The reader puts no more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> int:
        """The judge takes no more; returns how many frames were left and are dropped."""
        with self._changed:
            self._closed = True
            left = len(self._frames)
            self._frames.clear()
            self._changed.notify_all()
            return left


class SinkThread:
    """Runs one sink on its own thread, behind a bounded queue.

    Args:
        sink: closed by this thread when it ends.
        wait: when the queue is full, ``put`` waits; otherwise the record is dropped and counted.
        stop: set when the sink fails; from then on it drops what comes.
    """

    def __init__(self, sink: Sink, *, wait: bool, stop: threading.Event) -> None:
        self.uri = sink.uri
        self.written = 0
        self.dropped = 0
        self.error: Exception | None = None
        self._sink = sink
        self._wait = wait
        self._stop = stop
        self._queue: queue.Queue[Judgement | None] = queue.Queue(SINK_JUDGEMENTS)
        self._thread = threading.Thread(target=self._run, name=f"sink {sink.uri}", daemon=True)
        self._thread.start()

    def put(self, judgement: Judgement) -> None:
        """Hand over a judgement, in order."""
        try:
            self._queue.put(judgement, block=self._wait)
        except queue.Full:
            self.dropped += 1

    def finish(self) -> None:
        """Write what is queued, complete the sink's files, end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (judgement := self._queue.get()) is not None:
            # A failed sink goes on emptying its queue, so that nobody waits for it for ever.
            if self.error is not None:
                self.dropped += 1
                continue
            try:
                self._sink.write(judgement)
                self.written += 1
            except Exception as error:
                self.dropped += 1
                self._fail(error)
        try:
            self._sink.close()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
            self._stop.set()

    def summary(self) -> dict[str, Any]:
        """What became of the records, as one JSON-able object."""
        return {
            "uri": self.uri,
            "written": self.written,
            "dropped": self.dropped,
            "error": None if self.error is None else str(self.error),
        }


StoppedBy = Literal["end_of_stream", "max_frames", "signal", "source_failed", "output_failed", "internal_error"]


class Pipeline:
    """One run of a stream through an engine.

    Args:
        engine: opened; stays open.
        source: opened; stays open.
        sinks: each gets every judgement (in mode ``live``: as many as it can take) and is closed at the end.
        threshold: REJECT above it.
        mode: None is ``live`` for a live source and ``every`` for any other.
        max_frames: stop after so many verdicts.
        stop: set it, from anywhere, to stop cleanly: what has been captured is still judged and written.
        statistics: the counts to write to, for those who show them while it runs.

    After ``run``, ``stopped_by`` says why it ended, ``errors`` holds what went wrong (the cause first), and ``outputs``
    what became of each sink's records.
    """

    def __init__(
        self,
        engine: Engine,
        source: Source,
        sinks: Sequence[Sink],
        *,
        threshold: float,
        mode: Mode | None = None,
        max_frames: int | None = None,
        stop: threading.Event | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        self.engine = engine
        self.source = source
        self.threshold = threshold
        self.mode: Mode = mode or ("live" if source.live else "every")
        self.statistics = statistics or Statistics()
        self.stopped_by: StoppedBy = "signal"
        self.errors: list[Exception] = []
        self.outputs: list[dict[str, Any]] = []
        self._sinks = sinks
        # A map costs a copy from the GPU. The verdict itself needs it for the regions of rejects.
        self._maps_above = None if any(getattr(sink, "needs_maps", True) for sink in sinks) else threshold
        self._max_frames = max_frames
        self._stop = stop or threading.Event()
        every = self.mode == "every"
        self._mailbox = Mailbox(MAILBOX_FRAMES if every else 1, replace=not every)
        self._next_id = 0

    def summary(self) -> dict[str, Any]:
        """The run as one JSON-able object, as ``--summary`` writes it (``docs/artifacts.md``)."""
        return {
            "engine": {"path": str(self.engine.path), "name": self.engine.name, "sha256": self.engine.sha256},
            "source": self.source.uri,
            "mode": self.mode,
            "threshold": self.threshold,
            "stopped_by": self.stopped_by,
            "errors": [str(error) for error in self.errors],
            **self.statistics.summary(),
            "outputs": self.outputs,
        }

    def write_summary(self, path: Path, **more: Any) -> None:
        """Write ``summary`` and ``more`` as JSON; a failure joins ``errors``, so that it hides no earlier one."""
        try:
            with atomic_write(path) as file:
                file.write(json.dumps({**self.summary(), **more}, indent=2, allow_nan=False).encode() + b"\n")
        except OutputError as error:
            self.errors.append(error)

    def run(self) -> Statistics:
        """Stream until the end, ``max_frames``, a stop, or an error. May be called once."""
        self.statistics.started_s = time.monotonic()
        outputs = [SinkThread(sink, wait=self.mode == "every", stop=self._stop) for sink in self._sinks]
        reader = threading.Thread(target=self._read, name=f"source {self.source.uri}", daemon=True)
        reader.start()
        try:
            self._judge_all(outputs)
        finally:
            self._stop.set()
            self.statistics.count(dropped=self._mailbox.close())
            self._join(reader)
            for output in outputs:
                output.finish()
            self.statistics.ended_s = time.monotonic()
        self.outputs = [output.summary() for output in outputs]
        failed = [output.error for output in outputs if output.error is not None]
        if failed and self.stopped_by == "signal":
            self.stopped_by = "output_failed"
        self.errors.extend(failed)
        return self.statistics

    def _join(self, reader: threading.Thread) -> None:
        reader.join(STOP_TIMEOUT_S)
        if reader.is_alive():
            self.source.close()
            reader.join(STOP_TIMEOUT_S)
        if reader.is_alive():
            self.errors.append(
                SourceError(
                    f"{self.source.uri}: the source does not answer; it was left after {2 * STOP_TIMEOUT_S:g} s"
                )
            )

    # The reader's thread.

    def _read(self) -> None:
        try:
            while not self._stop.is_set():
                if self._captured_enough():
                    self.stopped_by = "max_frames"
                    break
                frame = self.source.read(READ_TIMEOUT_S)
                if frame is not None:
                    self._accept(frame)
        except EndOfStream:
            self.stopped_by = "end_of_stream"
        except Exception as error:
            self.stopped_by = "source_failed"
            self.errors.append(error)
            self._capture(self._placeholder(time.monotonic(), Fault.SOURCE_FAILED, str(error)))
        finally:
            self._mailbox.end()

    def _captured_enough(self) -> bool:
        """In mode ``every`` nothing is read that would not be judged."""
        return self.mode == "every" and self._max_frames is not None and self._next_id >= self._max_frames

    def _accept(self, frame: Frame) -> None:
        missed = frame.frame_id - self._next_id
        if missed < 0:
            raise SourceError(
                f"{self.source.uri}: expected frame id {self._next_id} or later, got {frame.frame_id}; ids must rise"
            )
        if self.mode == "live":
            self.statistics.count(captured=missed, dropped=missed)
            self._next_id = frame.frame_id
        while self._next_id < frame.frame_id and not self._captured_enough():
            detail = f"the source was at frame {frame.frame_id} when it could be read again"
            self._capture(self._placeholder(frame.captured_s, Fault.FRAME_MISSED, detail))
        if not self._captured_enough():
            self._capture(frame)

    def _placeholder(self, captured_s: float, code: Fault, detail: str) -> Frame:
        return Frame(self._next_id, self.source.uri, None, captured_s, fault=code.value, detail=detail)

    def _capture(self, frame: Frame) -> None:
        self._next_id = frame.frame_id + 1
        self.statistics.count(captured=1)
        self.statistics.count(dropped=self._mailbox.put(frame))

    # The caller's thread.

    def _judge_all(self, outputs: Sequence[SinkThread]) -> None:
        give_up_s = math.inf
        while not self._mailbox.ended and time.monotonic() < give_up_s:
            frame = self._mailbox.get(STOP_POLL_S)
            if frame is None:
                # A reader that hangs in its driver must not keep the outputs from being completed.
                if self._stop.is_set():
                    give_up_s = min(give_up_s, time.monotonic() + STOP_TIMEOUT_S)
                continue
            try:
                judgement = self._judge(frame)
            except Exception as error:
                self.stopped_by = "internal_error"
                self.errors.append(error)
                judgement = fault(frame, Fault.INTERNAL_ERROR, f"{type(error).__name__}: {error}", self.threshold)
            self.statistics.add(judgement)
            for output in outputs:
                output.put(judgement)
            if self.stopped_by == "internal_error":
                return
            if self.mode == "live" and self.statistics.judged == self._max_frames:
                self.stopped_by = "max_frames"
                return

    def _judge(self, frame: Frame) -> Judgement:
        """One frame's verdict, with the milliseconds of each stage; total is from capture to verdict."""
        started_s = time.monotonic()
        latency_ms = {"wait": (started_s - frame.captured_s) * 1e3}
        inferred_s = started_s
        if frame.fault is not None:
            judgement = fault(frame, frame.fault, frame.detail, self.threshold)
        elif frame.image is None:
            judgement = fault(frame, Fault.INVALID_IMAGE, "the source delivered no image", self.threshold)
        elif frame.deadline_s is not None and started_s > frame.deadline_s:
            judgement = fault(frame, Fault.DEADLINE_MISSED, "it was over before the frame's turn came", self.threshold)
        else:
            try:
                inference = self.engine.infer([frame.image], maps_above=self._maps_above)
            except InputError as error:
                judgement = fault(frame, Fault.INVALID_IMAGE, str(error), self.threshold)
            except ModelError as error:
                judgement = fault(frame, Fault.INFERENCE_FAILED, str(error), self.threshold)
            else:
                latency_ms.update(inference.stage_ms)
                inferred_s = time.monotonic()
                judgement = judge(frame, inference, self.threshold, self.engine.spec.input)
        decided_s = time.monotonic()
        if judgement.fault is None and frame.deadline_s is not None and decided_s > frame.deadline_s:
            late_ms = (decided_s - frame.deadline_s) * 1e3
            detail = f"{judgement.verdict} came {late_ms:.1f} ms after the deadline"
            judgement = fault(frame, Fault.DEADLINE_MISSED, detail, self.threshold)
        latency_ms["decide"] = (decided_s - inferred_s) * 1e3
        latency_ms["total"] = (decided_s - frame.captured_s) * 1e3
        return dataclasses.replace(judgement, latency_ms=latency_ms)


@contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """While it lasts, Ctrl-C and SIGTERM set ``stop``; a second one ends the process at once, as if never caught.

    Only for the main thread, which is the only one that Python gives signals to.
    """

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        for number in before:
            signal.signal(number, signal.SIG_DFL)

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
