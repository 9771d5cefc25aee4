"""The latencies of a benchmark as a picture: each frame over time, their distribution, and the stages.

Path("bench.png").write_bytes(draw_png({"demo": latencies}, title="demo on this machine"))
"""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

from recontrast_edge.bench import Latencies, percentiles
from recontrast_edge.preprocess import Image
from recontrast_edge.render import WHITE, Colour, draw_text

SIZE_WH = (1600, 900)

INK: Colour = (60, 50, 45)
FAINT: Colour = (225, 222, 220)
RED: Colour = (52, 52, 210)
ENGINE_COLOURS: tuple[Colour, ...] = ((180, 110, 30), (40, 130, 235))
STAGE_COLOURS: tuple[Colour, ...] = (
    (170, 170, 170),
    (200, 150, 60),
    (180, 110, 30),
    (110, 160, 60),
    (60, 180, 200),
    (40, 130, 235),
    (150, 90, 160),
    (110, 100, 90),
)

_TIME = (100, 130, 1130, 560)
_SHARE = (1170, 130, 1540, 560)
_STAGES = (100, 676, 1540, 880)
"""Left, top, right and bottom of each part of the picture."""

_BINS = 72
_BAR = 52
"""Height of an engine's bar of stages."""
_LINE = cv2.LINE_AA


def draw_png(runs: Mapping[str, Latencies], *, title: str, deadline_ms: float | None = None) -> bytes:
    """``draw``, as the content of a PNG file."""
    ok, data = cv2.imencode(".png", draw(runs, title=title, deadline_ms=deadline_ms))
    assert ok
    return data.tobytes()


def draw(runs: Mapping[str, Latencies], *, title: str, deadline_ms: float | None = None) -> Image:
    """The picture.

    Args:
        runs: latencies by the engine's name, one or two.
        title: what was measured, and on what.
        deadline_ms: drawn as a line, and part of the scale.

    Returns:
        (900, 1600, 3) BGR.
    """
    width, height = SIZE_WH
    picture = np.full((height, width, 3), WHITE[0], np.uint8)
    draw_text(picture, "Latency from capture to verdict", (_TIME[0], 48), 0.9, INK, thickness=2)
    draw_text(picture, title[:150], (_TIME[0], 82), 0.55, INK)
    totals = {name: np.array(run.stages_ms["total"]) for name, run in runs.items()}
    top_ms = 1.08 * max([float(values.max()) for values in totals.values()] + ([deadline_ms] if deadline_ms else []))
    step_ms = _step(top_ms)
    _draw_scale(picture, top_ms, step_ms)
    seconds = max(run.at_s[-1] for run in runs.values()) or 1.0
    for (name, run), colour in zip(runs.items(), ENGINE_COLOURS, strict=False):
        _draw_time(picture, np.array(run.at_s) / seconds, totals[name] / top_ms, colour, joined=len(runs) == 1)
    _draw_distribution(picture, totals, top_ms)
    if deadline_ms is not None:
        y = _at(deadline_ms / top_ms)
        cv2.line(picture, (_TIME[0], y), (_SHARE[2], y), RED, 2, _LINE)
        draw_text(picture, f"deadline {deadline_ms:.4g} ms", (_SHARE[2] - 170, y - 8), 0.5, RED)
    tick_s = _step(seconds)
    for number in range(int(seconds / tick_s) + 1):
        x = round(_TIME[0] + number * tick_s / seconds * (_TIME[2] - _TIME[0]))
        draw_text(picture, f"{number * tick_s:.4g}", (x - 6, _TIME[3] + 24), 0.45, INK)
    draw_text(picture, "seconds", ((_TIME[0] + _TIME[2]) // 2 - 30, _TIME[3] + 48), 0.5, INK)
    draw_text(picture, "share of frames", ((_SHARE[0] + _SHARE[2]) // 2 - 65, _SHARE[3] + 48), 0.5, INK)
    _draw_stages(picture, runs)
    return picture


def _at(share: float) -> int:
    """Row of a latency, as a share of the scale."""
    return round(_TIME[3] - share * (_TIME[3] - _TIME[1]))


def _step(top: float) -> float:
    """1, 2 or 5 times a power of ten, so that four to ten lines fit."""
    step = 10.0 ** np.floor(np.log10(top))
    while top / step < 4:
        step /= 2.0 if round(step / 10.0 ** np.floor(np.log10(step))) != 5 else 2.5
    return float(step)


def _draw_scale(picture: Image, top_ms: float, step_ms: float) -> None:
    value_ms = 0.0
    while value_ms <= top_ms:
        y = _at(value_ms / top_ms)
        for left, _, right, _ in (_TIME, _SHARE):
            cv2.line(picture, (left, y), (right, y), FAINT, 1)
        draw_text(picture, f"{value_ms:.4g}", (_TIME[0] - 55, y + 5), 0.45, INK)
        value_ms += step_ms
    draw_text(picture, "ms", (_TIME[0] - 55, _TIME[1] - 14), 0.5, INK)


def _draw_time(
    picture: Image, across: NDArray[np.float64], up: NDArray[np.float64], colour: Colour, *, joined: bool
) -> None:
    x = _TIME[0] + across * (_TIME[2] - _TIME[0])
    y = _TIME[3] - up * (_TIME[3] - _TIME[1])
    points = np.stack([x, y], axis=1).round().astype(np.int32)
    if joined:
        # Not where two engines take turns: a line would run across the other's turn.
        light = tuple(int(channel + 0.65 * (255 - channel)) for channel in colour)
        cv2.polylines(picture, [points], False, light, 1, _LINE)
    for point_x, point_y in points.tolist():
        cv2.circle(picture, (point_x, point_y), 2, colour, -1, _LINE)


def _draw_distribution(picture: Image, totals: Mapping[str, NDArray[np.float64]], top_ms: float) -> None:
    left, top, right, bottom = _SHARE
    shares = {name: np.histogram(values, _BINS, (0.0, top_ms))[0] / len(values) for name, values in totals.items()}
    highest = max(float(counts.max()) for counts in shares.values())
    bar = (bottom - top) / _BINS
    for row, ((name, counts), colour) in enumerate(zip(shares.items(), ENGINE_COLOURS, strict=False)):
        overlay = picture.copy()
        for index, share in enumerate(counts.tolist()):
            if share > 0:
                y = bottom - (index + 1) * bar
                end = round(left + share / highest * 0.92 * (right - left))
                cv2.rectangle(overlay, (left, round(y)), (max(end, left + 1), round(y + bar) - 1), colour, -1)
        picture[:] = cv2.addWeighted(overlay, 0.6, picture, 0.4, 0)
        found = percentiles(totals[name].tolist())
        listed = "  ".join(f"{key} {value:.4g}" for key, value in found.items() if value is not None and key != "mean")
        y = _TIME[1] - 14
        x = _TIME[0] + row * 720
        cv2.rectangle(picture, (x, y - 11), (x + 14, y + 2), colour, -1)
        draw_text(picture, f"{name[:28]}: {listed} ms", (x + 22, y), 0.5, INK)


def _draw_stages(picture: Image, runs: Mapping[str, Latencies]) -> None:
    left, top, right, _ = _STAGES
    draw_text(picture, "Where the mean goes", (left, top - 26), 0.6, INK)
    means = {
        name: {s: float(np.mean(v)) for s, v in run.stages_ms.items() if s != "total"} for name, run in runs.items()
    }
    longest = max(sum(stages.values()) for stages in means.values()) or 1.0
    names = list(dict.fromkeys(stage for stages in means.values() for stage in stages))
    y = top
    for engine, stages in means.items():
        draw_text(picture, engine[:60], (left, y - 4), 0.42, INK)
        x = float(left)
        for stage, mean_ms in stages.items():
            end = x + mean_ms / longest * (right - left)
            right_edge = max(round(end) - 1, round(x))
            cv2.rectangle(picture, (round(x), y), (right_edge, y + _BAR), _colour(names, stage), -1)
            if end - x > 150:
                draw_text(picture, f"{stage} {mean_ms:.3g} ms", (round(x) + 8, y + _BAR // 2 + 5), 0.5, WHITE)
            x = end
        y += _BAR + 24
    x_text = left
    for stage in names:
        cv2.rectangle(picture, (x_text, y), (x_text + 14, y + 13), _colour(names, stage), -1)
        draw_text(picture, stage, (x_text + 20, y + 12), 0.48, INK)
        x_text += 40 + 10 * len(stage)


def _colour(names: list[str], stage: str) -> Colour:
    return STAGE_COLOURS[names.index(stage) % len(STAGE_COLOURS)]
