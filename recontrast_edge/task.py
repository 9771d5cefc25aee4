"""A frame with everything that judging it takes, chosen when it was captured.

task = Task(frame, product, assignment); judgement = task.fault(Fault.INVALID_IMAGE, "no image")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from recontrast_edge.engines import Engine
from recontrast_edge.frame import Frame, Judgement
from recontrast_edge.verdict import Fault, fault


@dataclass(frozen=True)
class Product:
    """What a part is judged by.

    Attributes:
        engine: opened; stays open.
        threshold: REJECT above it.
    """

    engine: Engine
    threshold: float


@dataclass(frozen=True)
class Assignment:
    """What all frames of a camera have in common.

    Attributes:
        deliver: takes each judgement, in order.
        threshold: for the record of a frame without product.
        gate_reserve_s: how long before the gate a verdict must be there, in seconds.
    """

    deliver: Callable[[Judgement], None]
    threshold: float
    gate_reserve_s: float = 0.0


@dataclass(frozen=True)
class Task:
    """A frame, what it is judged by (None where nobody knows), and where its verdict goes."""

    frame: Frame
    product: Product | None
    assignment: Assignment

    @property
    def engine(self) -> Engine | None:
        """What must look at it; None where it is a FAULT already."""
        if self.product is None or self.frame.fault is not None or self.frame.image is None:
            return None
        return self.product.engine

    def fault(self, code: Fault | str, detail: str | None) -> Judgement:
        """The FAULT that it ends as."""
        threshold = self.assignment.threshold if self.product is None else self.product.threshold
        return fault(self.frame, code, detail, threshold)

    def lateness(self, now_s: float) -> tuple[Fault, float] | None:
        """Which limit has passed, the deadline or the gate, and for how many milliseconds."""
        frame = self.frame
        if frame.deadline_s is not None and now_s > frame.deadline_s:
            return Fault.DEADLINE_MISSED, (now_s - frame.deadline_s) * 1e3
        if frame.gate_s is not None and now_s > frame.gate_s - self.assignment.gate_reserve_s:
            return Fault.GATE_MISSED, (now_s - frame.gate_s + self.assignment.gate_reserve_s) * 1e3
        return None
