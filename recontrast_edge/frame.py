"""What travels through the pipeline: frames in, judgements out.

frame = Frame(frame_id=0, source="part.png", image=image, captured_s=time.monotonic())
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.preprocess import Image

Truth = Literal["good", "defect"]
VerdictName = Literal["PASS", "REJECT", "FAULT"]


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture from a source, or the place of one that could not be had.

    Attributes:
        frame_id: counts from 0 within a source, without gaps: also frames that are dropped or broken have one.
        source: where it came from: file path, or the source's URI with credentials masked.
        image: (H, W) mono or (H, W, 3) BGR uint8; None only where ``fault`` says why.
        captured_s: when it was there, on ``time.monotonic()``'s clock, in seconds.
        part_id: trigger or part number, where the source has one.
        deadline_s: when its verdict must be there, same clock.
        fault: code of what is wrong with the frame itself (``docs/artifacts.md`` lists them), else None.
        detail: a sentence for people about ``fault``.
        truth: known answer, from sources that know it.
        truth_mask: (H, W) bool, defect pixels, from sources that know it.
    """

    frame_id: int
    source: str
    image: Image | None
    captured_s: float
    part_id: str | None = None
    deadline_s: float | None = None
    fault: str | None = None
    detail: str | None = None
    truth: Truth | None = None
    truth_mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Region:
    """A connected part of the map above the threshold: bounding box and area in source pixels, peak map value."""

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float


@dataclass(frozen=True, eq=False)
class Judgement:
    """The verdict on one frame.

    Attributes:
        score: anomaly score; None where there is none (FAULT before inference).
        map: (h, w) float32 anomaly map at the network's size; None where there is none.
        latency_ms: milliseconds a stage, and ``total`` from capture to verdict.
        fault: code, for FAULT only.
        detail: a sentence for people, for FAULT only.
    """

    frame: Frame
    verdict: VerdictName
    score: float | None
    threshold: float
    regions: tuple[Region, ...] = ()
    map: NDArray[np.float32] | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    fault: str | None = None
    detail: str | None = None

    def record(self) -> dict[str, Any]:
        """The judgement as one JSON-able object, as ``jsonl:`` writes it (``docs/artifacts.md``)."""
        return {
            "frame_id": self.frame.frame_id,
            "source": self.frame.source,
            "verdict": self.verdict,
            "score": self.score,
            "threshold": self.threshold,
            "regions": [vars(region) for region in self.regions],
            "latency_ms": {stage: round(ms, 4) for stage, ms in self.latency_ms.items()},
            "fault": self.fault,
            "detail": self.detail,
            "truth": self.frame.truth,
            "part_id": self.frame.part_id,
        }


class EndOfStream(Exception):  # noqa: N818 - an outcome, not an error
    """A source has delivered its last frame."""


class Source(Protocol):
    """A frame source. Its three outcomes besides a frame differ: timeout, end, error.

    ``read`` is called from one thread; ``close`` may be called from another and makes a waiting ``read`` return soon.
    """

    uri: str
    """As given, credentials masked."""
    live: bool
    """True where frames come by themselves and cannot wait (a camera); False where reading is what makes them."""

    def read(self, timeout_s: float) -> Frame | None:
        """The next frame, or None if none came within ``timeout_s``.

        Raises:
            EndOfStream: there will be no more frames.
            SourceError: the source broke.
        """
        ...

    def close(self) -> None:
        """Release everything; may be called again."""
        ...


class Sink(Protocol):
    """Takes judgements, in order, from one thread.

    A sink with ``needs_maps = False`` gets the maps of rejects, and other maps only where they cost nothing.
    """

    uri: str

    def write(self, judgement: Judgement) -> None:
        """Take one judgement.

        Raises:
            OutputError: it cannot be written.
        """
        ...

    def close(self) -> None:
        """Complete the files; may be called again."""
        ...
