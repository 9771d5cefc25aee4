"""An output on a thread of its own, behind a bounded queue: however slow or dead it is, no verdict waits for it.

output = SinkThread(sink, wait=False, failed=stop.set); output.put(judgement); output.end()
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from recontrast_edge.bounded import as_exception, join
from recontrast_edge.errors import OutputError
from recontrast_edge.frame import Judgement, Sink, StateChange
from recontrast_edge.secrets import mask

SINK_JUDGEMENTS = 256
"""Judgements a sink may lag behind."""

SINK_BYTES = 64 << 20
"""What their images and maps may hold together; one judgement always fits."""


class SinkThread:
    """Runs one sink.

    Args:
        sink: closed by this thread when it ends.
        wait: when the queue is full, ``put`` waits; otherwise the record is dropped and counted.
        failed: called when the sink fails; from then on it drops what comes.
    """

    def __init__(self, sink: Sink, *, wait: bool, failed: Callable[[], None]) -> None:
        self.uri = sink.uri
        self.written = 0
        self.dropped = 0
        self.error: Exception | None = None
        self._sink = sink
        self._wait = wait
        self._failed = failed
        self._takes_states = hasattr(sink, "write_state")
        self._changed = threading.Condition()
        self._queue: deque[Judgement | StateChange] = deque()
        self._bytes = 0
        self._busy = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=f"sink {sink.uri}", daemon=True)
        self._thread.start()

    def takes(self, judgement: Judgement) -> bool:
        """Whether ``put`` would neither wait nor, where it should have waited, drop it."""
        with self._changed:
            return not self._wait or self._fits(_bytes(judgement))

    def put(self, judgement: Judgement, *, may_wait: bool = True) -> None:
        """Hand over a judgement, in order; not ``may_wait``: drop it rather than wait."""
        size = _bytes(judgement)
        with self._changed:
            if self._wait and may_wait:
                self._changed.wait_for(lambda: self._fits(size) or self._ended or not self._wait)
            if self._ended or not self._fits(size):
                self.dropped += 1
                return
            self._queue.append(judgement)
            self._bytes += size
            self._changed.notify_all()

    def put_state(self, change: StateChange) -> None:
        """Hand over a camera's change of state, to sinks that want to know."""
        with self._changed:
            if self._takes_states and not self._ended and len(self._queue) < SINK_JUDGEMENTS:
                self._queue.append(change)
                self._changed.notify_all()

    def release(self) -> None:
        """From now on nobody waits for this sink."""
        with self._changed:
            self._wait = False
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing more comes: the sink writes what is queued, completes its files and ends."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def alive(self) -> bool:
        """Whether it still works on its queue or its files."""
        return self._thread.is_alive()

    def join(self, until_s: float) -> None:
        """After ``end``: wait until then at most; what a sink that hangs has not written by then is dropped."""
        if join(self._thread, until_s):
            return
        with self._changed:
            lost = len([item for item in self._queue if isinstance(item, Judgement)]) + self._busy
            self.dropped += lost
            self._queue.clear()
            self._busy = False
            if self.error is None:
                self.error = OutputError(f"{self.uri}: the output does not answer; {lost} records were given up")

    def _fits(self, size: int) -> bool:
        return not self._queue or (len(self._queue) < SINK_JUDGEMENTS and self._bytes + size <= SINK_BYTES)

    def _next(self) -> Judgement | StateChange | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._ended)
            if not self._queue:
                return None
            item = self._queue.popleft()
            if isinstance(item, Judgement):
                self._bytes -= _bytes(item)
                self._busy = True
            self._changed.notify_all()
            return item

    def _run(self) -> None:
        while (item := self._next()) is not None:
            written = False
            # A failed sink goes on emptying its queue, so that nobody waits for it for ever.
            if self.error is None:
                try:
                    if isinstance(item, StateChange):
                        self._sink.write_state(item)  # type: ignore[attr-defined] # optional, see Sink
                    else:
                        self._sink.write(item)
                    written = True
                except BaseException as error:
                    self._fail(as_exception(error))
            with self._changed:
                # Not busy any more: it was given up meanwhile, and counted.
                if self._busy and isinstance(item, Judgement):
                    self.written += written
                    self.dropped += not written
                    self._busy = False
        try:
            self._sink.close()
        except BaseException as error:
            self._fail(as_exception(error))

    def _fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
            self._failed()

    def summary(self) -> dict[str, Any]:
        """What became of the records, as one JSON-able object."""
        return {
            "uri": self.uri,
            "written": self.written,
            "dropped": self.dropped,
            "error": None if self.error is None else mask(str(self.error)),
            "counters": dict(getattr(self._sink, "counters", {})),
        }


def _bytes(judgement: Judgement) -> int:
    image, anomaly_map = judgement.frame.image, judgement.map
    return (0 if image is None else image.nbytes) + (0 if anomaly_map is None else anomaly_map.nbytes)
