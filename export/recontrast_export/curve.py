"""The trade-off of a search as a picture: how much of the work is INT8 against how far the map is off.

Path("curve.png").write_bytes(draw_png(points, title="parts.onnx"))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from recontrast_edge.bench_plot import FAINT, INK, RED
from recontrast_edge.preprocess import Image
from recontrast_edge.render import WHITE, Colour, draw_text

SIZE_WH = (1200, 720)

GREEN: Colour = (80, 150, 50)

_LEFT, _TOP, _RIGHT, _BOTTOM = 110, 110, 1150, 620


@dataclass(frozen=True)
class Point:
    """One graph that was measured.

    Attributes:
        int8_macs: share of the multiply-accumulates in INT8, 0..1.
        error: of the map's peaks, > 0.
        kept_budget: None where the budget was not judged.
        is_chosen: this is the graph that was written.
    """

    int8_macs: float
    error: float
    kept_budget: bool | None
    is_chosen: bool


def draw_png(points: Sequence[Point], *, title: str) -> bytes:
    """``draw``, as the content of a PNG file."""
    ok, data = cv2.imencode(".png", draw(points, title=title))
    assert ok
    return data.tobytes()


def draw(points: Sequence[Point], *, title: str) -> Image:
    """The picture.

    Args:
        points: at least one.
        title: what was measured.

    Returns:
        (720, 1200, 3) BGR.
    """
    width, height = SIZE_WH
    picture = np.full((height, width, 3), WHITE[0], np.uint8)
    draw_text(picture, "Error at the peaks of the map against work done in INT8", (_LEFT, 42), 0.85, INK, thickness=2)
    draw_text(picture, title[:120], (_LEFT, 74), 0.55, INK)
    errors = [point.error for point in points]
    low = np.floor(np.log10(min(errors)))
    high = max(np.ceil(np.log10(max(errors))), low + 1)
    leftmost = np.floor(min(point.int8_macs for point in points) * 10) / 10

    def place(int8_macs: float, error: float) -> tuple[int, int]:
        x = _LEFT + (int8_macs - leftmost) / (1.0 - leftmost + 1e-9) * (_RIGHT - _LEFT)
        y = _BOTTOM - (np.log10(error) - low) / (high - low) * (_BOTTOM - _TOP)
        return round(float(x)), round(float(y))

    for exponent in range(int(low), int(high) + 1):
        for digit in (1, 2, 5):
            error = digit * 10.0**exponent
            if error > 10.0**high:
                continue
            _, y = place(leftmost, error)
            cv2.line(picture, (_LEFT, y), (_RIGHT, y), FAINT, 1)
            draw_text(picture, f"{100 * error:.4g} %", (18, y + 5), 0.48, INK)
    for tenth in range(round(leftmost * 10), 11):
        x, _ = place(tenth / 10, 10.0**low)
        cv2.line(picture, (x, _TOP), (x, _BOTTOM), FAINT, 1)
        draw_text(picture, f"{10 * tenth} %", (x - 18, _BOTTOM + 24), 0.48, INK)
    draw_text(picture, "multiply-accumulates in INT8", ((_LEFT + _RIGHT) // 2 - 120, _BOTTOM + 50), 0.55, INK)
    draw_text(picture, "rms error at the map's peaks, share of its deviation", (_LEFT, _TOP - 10), 0.5, INK)
    ordered = sorted(points, key=lambda point: point.int8_macs)
    line = np.array([place(point.int8_macs, point.error) for point in ordered], np.int32)
    cv2.polylines(picture, [line], False, (200, 195, 190), 2, cv2.LINE_AA)
    for point in ordered:
        at = place(point.int8_macs, point.error)
        cv2.circle(picture, at, 7, _colour(point), -1, cv2.LINE_AA)
        if point.is_chosen:
            cv2.circle(picture, at, 13, INK, 2, cv2.LINE_AA)
    _draw_legend(picture)
    return picture


def _colour(point: Point) -> Colour:
    return (170, 165, 160) if point.kept_budget is None else GREEN if point.kept_budget else RED


def _draw_legend(picture: Image) -> None:
    y = SIZE_WH[1] - 22
    entries = (("keeps the budget", GREEN), ("is over it", RED), ("only the map was measured", (170, 165, 160)))
    x = _LEFT
    for text, colour in entries:
        cv2.circle(picture, (x, y - 5), 7, colour, -1, cv2.LINE_AA)
        draw_text(picture, text, (x + 16, y), 0.5, INK)
        x += 60 + 9 * len(text)
    cv2.circle(picture, (x, y - 5), 9, INK, 2, cv2.LINE_AA)
    draw_text(picture, "written", (x + 16, y), 0.5, INK)
