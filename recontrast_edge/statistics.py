"""What a run counts: frames, verdicts, faults, latencies, and what the cameras are doing.

statistics = Statistics(); statistics.count(captured=1); statistics.add(judgement); print(statistics.counts_line())
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any, get_args

from recontrast_edge.frame import Judgement, StateChange, Truth, VerdictName
from recontrast_edge.latency import PERCENTILES, StageLatencies


class Statistics:
    """Counts and latencies so far, of a camera or of a whole line. Written by the line's threads, read by any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.captured = 0
        self.dropped = 0
        self.verdicts: dict[VerdictName, int] = dict.fromkeys(get_args(VerdictName), 0)
        self.faults: Counter[str] = Counter()
        self.confusion: dict[Truth, dict[VerdictName, int]] = {}
        """Known truth -> verdict -> frames."""
        self.latency = StageLatencies()
        self.states: dict[str | None, StateChange] = {}
        """The last change of state of each camera, by its name."""
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
        """Everything but the states as one JSON-able object."""
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
