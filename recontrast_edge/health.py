"""Whether what a camera delivers can be right: not frozen, not black, not overexposed, at the right rate, and in time.

check = HealthCheck(Watch(rate_hz=30.0)); wrong = check.frame(frame)  # (Fault.SOURCE_FROZEN, "...") or None
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from recontrast_edge.errors import UsageError
from recontrast_edge.frame import Frame
from recontrast_edge.preprocess import Image
from recontrast_edge.verdict import Fault

SAMPLE_SIDE = 128
"""Black, overexposed and changed pixels are looked for on a grid of about this many rows and columns."""

STALE_PERIODS = 5
STALE_RANGE_S = (0.5, 1.0)
"""No frame for so many periods is too long, but never sooner or later than this, unless somebody says so."""

PERIOD_FRAMES = 32
"""Frames over which the period is averaged."""

RATE_WINDOW_S = 2.0
RATE_WINDOW_FRAMES = 10
"""The rate is judged over at least this."""


@dataclass(frozen=True)
class Watch:
    """What makes a camera one that cannot be trusted. 0 turns a check off.

    Attributes:
        stale_after_s: seconds without a frame; None is five frame periods, from 0.5 s to 1 s.
        rate_hz: frames a second that the camera should deliver; None: whatever it delivers is right.
        rate_tolerance: how far the rate may be off, as a share of it.
        frozen_after: equal pictures in a row. A sensor's noise makes every picture another one; a source without noise
            needs this off.
        dark_level, dark_share: black is this share of pixels (0..1) with no channel above this value (0..255).
        saturated_level, saturated_share: overexposed is this share of pixels with no channel below this value.

    Raises:
        UsageError: a value out of range.
    """

    stale_after_s: float | None = None
    rate_hz: float | None = None
    rate_tolerance: float = 0.2
    frozen_after: int = 5
    dark_level: int = 4
    dark_share: float = 0.99
    saturated_level: int = 251
    saturated_share: float = 0.99

    def __post_init__(self) -> None:
        if self.stale_after_s is not None:
            _within("stale_after_s", self.stale_after_s, 0.0, 86400.0)
        if self.rate_hz is not None:
            _within("rate_hz", self.rate_hz, 1e-3, 1e5)
        _within("rate_tolerance", self.rate_tolerance, 1e-3, 1.0)
        _within("frozen_after", self.frozen_after, 0, 10**6)
        if self.frozen_after == 1:
            raise UsageError("frozen_after: expected 0 (off) or at least 2 equal pictures in a row, got 1")
        for side in ("dark", "saturated"):
            _within(f"{side}_level", getattr(self, f"{side}_level"), 0, 255)
            _within(f"{side}_share", getattr(self, f"{side}_share"), 0.0, 1.0)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name}: expected a number from {low:g} to {high:g}, got {value}")


class HealthCheck:
    """Looks at the frames of one camera, in order; begin a new one when the camera was opened again."""

    def __init__(self, watch: Watch, *, triggered: bool = False) -> None:
        self._watch = watch
        self._triggered = triggered
        self._previous: Image | None = None
        self._equal = 1
        self._arrivals: deque[tuple[float, int]] = deque()

    def stale_after_s(self) -> float:
        """How long the camera may be silent, in seconds; infinite where silence means nothing."""
        if self._watch.stale_after_s is not None:
            return self._watch.stale_after_s or math.inf
        if self._triggered:
            return math.inf
        shortest_s, longest_s = STALE_RANGE_S
        return min(max(STALE_PERIODS * self._period_s(longest_s), shortest_s), longest_s)

    def _period_s(self, unknown_s: float) -> float:
        if self._watch.rate_hz is not None:
            return 1 / self._watch.rate_hz
        arrivals = self._arrivals
        if len(arrivals) < 2:
            return unknown_s
        return (arrivals[-1][0] - arrivals[0][0]) / (arrivals[-1][1] - arrivals[0][1])

    def frame(self, frame: Frame) -> tuple[Fault, str] | None:
        """What is wrong with the camera as this frame shows it: a code, and a sentence for people."""
        wrong_rate = self._rate(frame)
        if frame.image is None or not frame.image.size:
            return wrong_rate
        return self._picture(frame.image) or wrong_rate

    def _picture(self, image: Image) -> tuple[Fault, str] | None:
        watch = self._watch
        step = max(1, round(math.sqrt(image.shape[0] * image.shape[1]) / SAMPLE_SIDE))
        sample = image[::step, ::step]
        previous, self._previous = self._previous, image
        same = (
            previous is not None
            and previous.shape == image.shape
            # Looked at first, because it nearly always decides, and at a fraction of the cost.
            and np.array_equal(previous[::step, ::step], sample)
            and np.array_equal(previous, image)
        )
        self._equal = self._equal + 1 if same else 1
        if watch.frozen_after and self._equal >= watch.frozen_after:
            return Fault.SOURCE_FROZEN, f"the same picture {self._equal} times in a row"
        channels = tuple(range(2, sample.ndim))
        dark = float((sample.max(axis=channels) <= watch.dark_level).mean())
        if watch.dark_share and dark >= watch.dark_share:
            return Fault.SOURCE_DARK, f"{dark:.1%} of the picture is at or below grey level {watch.dark_level}"
        saturated = float((sample.min(axis=channels) >= watch.saturated_level).mean())
        if watch.saturated_share and saturated >= watch.saturated_share:
            level = watch.saturated_level
            return Fault.SOURCE_SATURATED, f"{saturated:.1%} of the picture is at or above grey level {level}"
        return None

    def _rate(self, frame: Frame) -> tuple[Fault, str] | None:
        # By the ids, so that frames lost on the way do not make a camera look slow.
        arrivals, rate_hz = self._arrivals, self._watch.rate_hz
        arrivals.append((frame.captured_s, frame.frame_id))
        if rate_hz is None:
            if len(arrivals) > PERIOD_FRAMES:
                arrivals.popleft()
            return None
        window_s = max(RATE_WINDOW_S, RATE_WINDOW_FRAMES / rate_hz)
        while len(arrivals) > 2 and frame.captured_s - arrivals[1][0] >= window_s:
            arrivals.popleft()
        span_s = frame.captured_s - arrivals[0][0]
        if self._triggered or span_s < window_s:
            return None
        measured_hz = (frame.frame_id - arrivals[0][1]) / span_s
        if abs(measured_hz - rate_hz) <= self._watch.rate_tolerance * rate_hz:
            return None
        return Fault.WRONG_RATE, f"{measured_hz:.1f} frames a second, expected {rate_hz:g}"
