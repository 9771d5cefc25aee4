"""What travels through the pipeline: frames in, judgements out.

frame = Frame(frame_id=0, source="part.png", image=image, captured_s=time.monotonic())
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.preprocess import Image
from recontrast_edge.secrets import mask
from recontrast_edge.spec import InputSpec

Truth = Literal["good", "defect"]
VerdictName = Literal["PASS", "REJECT", "FAULT"]


def time_of_day(moment_s: float) -> str:
    """The time of day, in UTC, of a moment on ``time.monotonic()``'s clock: ``2026-03-01T08:00:00.123Z``.

    By the system's clock as it is set now. For people and other machines; nothing here is timed with it.
    """
    moment = datetime.now(timezone.utc) - timedelta(seconds=time.monotonic() - moment_s)
    return moment.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def _make_fit(item: Frame | Judgement | StateChange, *names: str) -> None:
    """Make these texts of an item, which outputs show and send as they are, fit for that.

    The name of a file may hold bytes that are no text in any encoding, and a sentence about an error the password of
    what it is about.
    """
    for name in names:
        text = getattr(item, name)
        if text is not None:
            text = mask(text) if name == "detail" else text
            object.__setattr__(item, name, text if text.isascii() else text.encode(errors="replace").decode())


@dataclass(frozen=True)
class WebSpan:
    """The stretch of a continuous web that an image shows; one image row is one line.

    Attributes:
        first_line: the image's top row, counted from 0 at the start of the web, lost lines included.
        lines: as many as the image has rows.
        line_pitch_mm: millimetres of web from one line to the next; None where it is not known.
        first_column: the image's left edge, counted from 0 at the web's left edge, in pixels.
        pixel_pitch_mm: millimetres of web from one column to the next; None where it is not known.
    """

    first_line: int
    lines: int
    line_pitch_mm: float | None = None
    first_column: int = 0
    pixel_pitch_mm: float | None = None

    def position_mm(self, line: int) -> float | None:
        """Where a line of the web is, in millimetres from its start; None without a pitch."""
        return None if self.line_pitch_mm is None else round(line * self.line_pitch_mm, 4)

    def across_mm(self, column: int) -> float | None:
        """Where a column of the web is, in millimetres from its left edge; None without a pitch."""
        return None if self.pixel_pitch_mm is None else round(column * self.pixel_pitch_mm, 4)

    def record(self) -> dict[str, Any]:
        """As one JSON-able object, with the position of the first line and of the last."""
        last_line = self.first_line + self.lines - 1
        return {
            "first_line": self.first_line,
            "lines": self.lines,
            "first_mm": self.position_mm(self.first_line),
            "last_mm": self.position_mm(last_line),
            "first_column": self.first_column,
        }


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture from a source, or the place of one that could not be had.

    Attributes:
        frame_id: counts from 0 within a source, without gaps: also frames that are dropped or broken have one. A jump
            says how many were lost on the way, in the camera or its driver.
        source: where it came from: file path, or the source's URI with credentials masked.
        image: (H, W) mono or (H, W, 3) BGR uint8; None only where ``fault`` says why.
        captured_s: when it was there, on ``time.monotonic()``'s clock, in seconds.
        part_id: trigger or part number, where the source has one.
        deadline_s: when its verdict must be there, same clock.
        fault: code of what is wrong with the frame itself (``docs/artifacts.md`` lists them), else None.
        detail: a sentence for people about ``fault``; credentials get masked.
        truth: known answer, from sources that know it.
        truth_mask: (H, W) bool, defect pixels, from sources that know it.
        camera: name of the stream where a line has several.
        camera_frame_id: the device's own id, unwrapped to a number that only rises.
        camera_time_ns: the device's own timestamp, in nanoseconds on its own clock.
        gate_s: when the part is at the reject gate, same clock as ``captured_s``.
        web: of a continuous web: the stretch that the image shows.
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
    camera: str | None = None
    camera_frame_id: int | None = None
    camera_time_ns: int | None = None
    gate_s: float | None = None
    web: WebSpan | None = None

    def __post_init__(self) -> None:
        _make_fit(self, "source", "part_id", "detail")


@dataclass(frozen=True)
class Region:
    """A connected part of the map above the threshold: bounding box and area in source pixels, peak map value."""

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float

    def record(self, web: WebSpan | None) -> dict[str, Any]:
        """As one JSON-able object; of a web also where on it its upper left corner is, along and across."""
        if web is None:
            return dict(vars(self))
        line, column = web.first_line + self.y, web.first_column + self.x
        return {
            **vars(self),
            "line": line,
            "line_mm": web.position_mm(line),
            "column": column,
            "column_mm": web.across_mm(column),
        }


@dataclass(frozen=True, eq=False)
class Judgement:
    """The verdict on one frame.

    Attributes:
        score: anomaly score; None where there is none (FAULT before inference).
        map: (h, w) float32 anomaly map at the network's size; None where there is none.
        latency_ms: milliseconds a stage, and ``total`` from capture to verdict.
        fault: code, for FAULT only.
        detail: a sentence for people, for FAULT only; credentials get masked.
        decided_s: when the verdict was made, on ``time.monotonic()``'s clock.
        input_spec: where the map lies in the image, where the judgement knows: engines of one line may differ.
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
    decided_s: float | None = None
    input_spec: InputSpec | None = None

    def __post_init__(self) -> None:
        _make_fit(self, "detail")

    @property
    def gate_in_ms(self) -> float | None:
        """Milliseconds that were left until the gate when the verdict was made; negative: too late. None: no gate."""
        if self.frame.gate_s is None or self.decided_s is None:
            return None
        return (self.frame.gate_s - self.decided_s) * 1e3

    def record(self) -> dict[str, Any]:
        """The judgement as one JSON-able object, as ``jsonl:`` writes it (``docs/artifacts.md``)."""
        frame, gate_in_ms = self.frame, self.gate_in_ms
        return {
            "frame_id": frame.frame_id,
            "time": time_of_day(frame.captured_s),
            "camera": frame.camera,
            "source": frame.source,
            "verdict": self.verdict,
            "score": self.score,
            "threshold": self.threshold,
            "regions": [region.record(frame.web) for region in self.regions],
            "latency_ms": {stage: round(ms, 4) for stage, ms in self.latency_ms.items()},
            "fault": self.fault,
            "detail": self.detail,
            "truth": frame.truth,
            "part_id": frame.part_id,
            "gate_in_ms": None if gate_in_ms is None else round(gate_in_ms, 3),
            "camera_frame_id": frame.camera_frame_id,
            "camera_time_ns": frame.camera_time_ns,
            "web": None if frame.web is None else frame.web.record(),
        }


class SourceState(str, Enum):
    """What a camera is doing; the value is the name in records."""

    CONNECTING = "CONNECTING"
    """Being opened, or waited for before the next try; no verdicts."""
    RUNNING = "RUNNING"
    """Frames come, and nothing is wrong with them."""
    STALE = "STALE"
    """Open, but no frame in time."""
    FAULT = "FAULT"
    """Frames come, but they cannot be right: frozen, dark, saturated, at a wrong rate."""
    ENDED = "ENDED"
    """Closed for good."""


@dataclass(frozen=True)
class StateChange:
    """A camera went from one state to another.

    Attributes:
        camera: name of the stream; None where there is only one.
        source: the source's URI, credentials masked.
        fault: code of why, where the new state is not a good one; else None.
        detail: a sentence for people about ``fault``; credentials get masked.
        time_s: when, on ``time.monotonic()``'s clock.
    """

    camera: str | None
    source: str
    before: SourceState
    state: SourceState
    time_s: float
    fault: str | None = None
    detail: str | None = None

    def __post_init__(self) -> None:
        _make_fit(self, "source", "detail")

    def record(self) -> dict[str, Any]:
        """The change as one JSON-able object; ``type`` tells it from the record of a frame."""
        return {
            "type": "state",
            "time": time_of_day(self.time_s),
            "camera": self.camera,
            "source": self.source,
            "before": self.before.value,
            "state": self.state.value,
            "fault": self.fault,
            "detail": self.detail,
        }


class EndOfStream(Exception):  # noqa: N818 - an outcome, not an error
    """A source has delivered its last frame."""


class Source(Protocol):
    """A frame source. Its three outcomes besides a frame differ: timeout, end, error.

    ``read`` is called from one thread; ``close`` may be called from another and makes a waiting ``read`` return soon.
    A source does not open itself again: ``recontrast_edge.supervise`` does. Opening one is therefore bounded by a
    timeout, and raises SourceError only where trying again can help.

    Optional attributes: ``counters: dict[str, int]`` (such as ``{"incomplete": 5, "lost": 2}``) ends up in the run's
    summary; ``triggered = True`` says that a part or an encoder makes the frames come, so that none for a while is no
    fault; ``heard_s: float | None`` is when the camera last gave a sign of life, where frames come later than that;
    ``default_mode`` is the pipeline's mode where nobody names one; ``reopens: bool`` says whether it is opened again
    after an error, where that differs from ``live``.
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


class Merger(Protocol):
    """Makes one verdict of several: of a web's tiles, or of the views of a part. Called from one thread at a time.

    Between ``add`` and its verdict a judgement may be kept; what comes out may stand for several that went in.
    """

    def add(self, judgement: Judgement) -> Sequence[Judgement]:
        """Take one judgement; returns the verdicts that are complete now, in order."""
        ...

    def expire(self, now_s: float) -> Sequence[Judgement]:
        """What has waited long enough at ``now_s`` (``time.monotonic()``'s clock) and is decided without the rest."""
        ...

    def flush(self) -> Sequence[Judgement]:
        """No more judgements come; returns the verdicts on everything that still waits."""
        ...


class Sink(Protocol):
    """Takes judgements, in order, from one thread.

    A sink with ``needs_maps = False`` gets the maps of rejects, and other maps only where they cost nothing. One with a
    method ``write_state(change: StateChange)`` also gets the cameras' changes of state, in their place among the
    judgements. An optional ``counters: dict[str, int]`` ends up in the run's summary.
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
