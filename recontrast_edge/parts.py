"""Several cameras look at one part: their verdicts become one.

    merger = PartMerger(["top", "side"], window_s=0.5); Line(cameras, merger=merger).run(sinks)

Frames belong together when they carry the same part id and were captured within the window of the first one. A part
has the worst verdict of its views: FAULT before REJECT before PASS. A view that has no verdict when the window ends, or
when the part is about to reach the gate, makes the part a FAULT: what nobody has seen is not good.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import OrderedDict
from collections.abc import Sequence

from recontrast_edge.errors import UsageError
from recontrast_edge.frame import Judgement, VerdictName
from recontrast_edge.verdict import Fault, fault

BADNESS: dict[VerdictName, int] = {"PASS": 0, "REJECT": 1, "FAULT": 2}

REMEMBERED_PARTS = 1024
"""Parts that are decided; a view of one of them that comes late changes nothing any more."""


class PartMerger:
    """See ``Merger``. A part's judgement is that of its worst view (image, regions, score) under an id of its own.

    Judgements of other cameras go through as they are. One of these cameras without part id is a FAULT of its own,
    because nobody knows which part it shows; so are those that stand for a silent camera.

    Args:
        views: names of the cameras that look at each part.
        window_s: from the first capture of a part to the verdict on its last view, in seconds.
        gate_reserve_s: how long before the gate a part must be decided, in seconds.

    Raises:
        UsageError: fewer than two views, one twice, or a window that is none.
    """

    def __init__(self, views: Sequence[str], *, window_s: float, gate_reserve_s: float = 0.0) -> None:
        if len(views) < 2 or len(set(views)) < len(views):
            raise UsageError(f"expected the names of two or more cameras that look at a part, got {list(views)}")
        if not 0 < window_s < math.inf:
            raise UsageError(f"the window of a part must be longer than 0 s, got {window_s}")
        if not 0 <= gate_reserve_s < math.inf:
            raise UsageError(f"the reserve before the gate must be at least 0 s, got {gate_reserve_s}")
        self._views = frozenset(views)
        self._window_s = window_s
        self._gate_reserve_s = gate_reserve_s
        self._open: OrderedDict[str, list[Judgement]] = OrderedDict()
        self._decided: OrderedDict[str, float] = OrderedDict()
        """Part id -> when its window was over."""
        self._next_id = 0

    def add(self, judgement: Judgement) -> Sequence[Judgement]:
        """See ``Merger.add``."""
        frame = judgement.frame
        if frame.camera not in self._views:
            return [judgement]
        if frame.part_id is None:
            detail = judgement.detail or "the frame has no part id, so nobody knows which part it shows"
            code = judgement.fault or Fault.VIEW_MISSING
            lost = fault(frame, code, detail, judgement.threshold)
            return [self._numbered(dataclasses.replace(lost, latency_ms=judgement.latency_ms), judgement.decided_s)]
        done: list[Judgement] = []
        views = self._open.get(frame.part_id)
        if views is not None and frame.captured_s - _first_s(views) > self._window_s:
            # The counter has come round: another part.
            done.append(self._decide(frame.part_id, time.monotonic()))
            views = None
        if views is None:
            if frame.captured_s <= self._decided.get(frame.part_id, -math.inf):
                return done
            views = self._open[frame.part_id] = []
        views.append(judgement)
        if self._missing(views):
            return done
        return [*done, self._decide(frame.part_id, time.monotonic())]

    def expire(self, now_s: float) -> Sequence[Judgement]:
        """See ``Merger.expire``."""
        over = [part_id for part_id, views in self._open.items() if now_s >= self._until_s(views)]
        return [self._decide(part_id, now_s) for part_id in over]

    def flush(self) -> Sequence[Judgement]:
        """See ``Merger.flush``."""
        return [self._decide(part_id, time.monotonic()) for part_id in list(self._open)]

    def _until_s(self, views: Sequence[Judgement]) -> float:
        gate_s = _gate_s(views)
        gate_s = math.inf if gate_s is None else gate_s - self._gate_reserve_s
        return min(_first_s(views) + self._window_s, gate_s)

    def _missing(self, views: Sequence[Judgement]) -> list[str]:
        return sorted(self._views - {view.frame.camera for view in views if view.frame.camera is not None})

    def _decide(self, part_id: str, now_s: float) -> Judgement:
        views = self._open.pop(part_id)
        self._decided[part_id] = _first_s(views) + self._window_s
        self._decided.move_to_end(part_id)
        if len(self._decided) > REMEMBERED_PARTS:
            self._decided.popitem(last=False)
        worst = max(views, key=_badness)
        frame = dataclasses.replace(worst.frame, gate_s=_gate_s(views))
        latency_ms = {**worst.latency_ms, "total": (now_s - _first_s(views)) * 1e3}
        missing = self._missing(views)
        late_s = -math.inf if frame.gate_s is None else now_s - (frame.gate_s - self._gate_reserve_s)
        if worst.fault is None and missing:
            detail = f"no verdict of {', '.join(missing)} in time; the others: {worst.verdict}"
            merged = fault(frame, Fault.VIEW_MISSING, detail, worst.threshold)
        elif worst.fault is None and late_s > 0:
            detail = f"{worst.verdict} of the last view came {late_s * 1e3:.1f} ms too late"
            merged = fault(frame, Fault.GATE_MISSED, detail, worst.threshold)
        else:
            merged = dataclasses.replace(worst, frame=frame)
        return self._numbered(dataclasses.replace(merged, latency_ms=latency_ms), now_s)

    def _numbered(self, judgement: Judgement, decided_s: float | None) -> Judgement:
        frame = dataclasses.replace(judgement.frame, frame_id=self._next_id)
        self._next_id += 1
        return dataclasses.replace(judgement, frame=frame, decided_s=decided_s)


def _first_s(views: Sequence[Judgement]) -> float:
    return min(view.frame.captured_s for view in views)


def _gate_s(views: Sequence[Judgement]) -> float | None:
    return min((view.frame.gate_s for view in views if view.frame.gate_s is not None), default=None)


def _badness(judgement: Judgement) -> tuple[int, float]:
    margin = -math.inf if judgement.score is None else judgement.score - judgement.threshold
    return BADNESS[judgement.verdict], margin
