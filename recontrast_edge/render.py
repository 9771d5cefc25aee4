"""Pictures of judgements: the part beside its heat map, under a strip that says what was decided.

    picture = annotate(judgement, engine.spec.input, panel_wh=(480, 480))

The colour scale is anchored at the threshold, not at the map's own maximum: below half of it nothing is tinted, so that
a good part looks calm; at the threshold the colour turns to yellow, and at twice the threshold it is full red.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from recontrast_edge.errors import InputError
from recontrast_edge.frame import Frame, Judgement, VerdictName
from recontrast_edge.preprocess import Geometry, Image, check_image
from recontrast_edge.spec import InputSpec

Colour = tuple[int, int, int]
"""Blue, green, red; 0..255."""

VERDICT_COLOURS: dict[VerdictName, Colour] = {"PASS": (92, 153, 56), "REJECT": (52, 52, 210), "FAULT": (20, 150, 235)}
WHITE: Colour = (255, 255, 255)
BACKGROUND: Colour = (30, 28, 26)

STRIP_HEIGHT = 44
GAP = 4
"""Pixels between the two panels."""

PANEL_SIDE_RANGE = (256, 960)
"""Longer side of a panel, in pixels: small images are enlarged so that the strip stays readable, large ones shrunk."""

# Ratio to the threshold -> colour and opacity over the darkened part.
_HEAT_STOPS = np.array([0.0, 0.5, 0.75, 1.0, 1.0001, 1.4, 2.0])
_HEAT_BGR = np.array(
    [[90, 40, 10], [90, 40, 10], [150, 90, 20], [160, 140, 30], [60, 220, 255], [20, 120, 255], [30, 20, 225]],
    np.float64,
)
_HEAT_OPACITY = np.array([0.0, 0.0, 0.30, 0.45, 0.65, 0.75, 0.85])
_HEAT_STEPS = 512

_FONT = cv2.FONT_HERSHEY_SIMPLEX


def _heat_table() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    ratios = np.linspace(0.0, _HEAT_STOPS[-1], _HEAT_STEPS)
    colours = np.stack([np.interp(ratios, _HEAT_STOPS, _HEAT_BGR[:, channel]) for channel in range(3)], axis=1)
    opacity = np.interp(ratios, _HEAT_STOPS, _HEAT_OPACITY)[:, None]
    return (colours * opacity).astype(np.float32), (1 - opacity).astype(np.float32)


_PREMULTIPLIED, _TRANSPARENCY = _heat_table()


def _drawable(image: Image) -> bool:
    """A FAULT may be just that: an image of a form that nobody can draw."""
    try:
        check_image(image)
    except InputError:
        return False
    return True


def panel_size(image: Image | None) -> tuple[int, int]:
    """A panel's (width, height) for a source image; both even, as video encoders want it."""
    if image is None or not _drawable(image):
        return 480, 360
    height, width = image.shape[:2]
    smallest, largest = PANEL_SIDE_RANGE
    longest = max(width, height)
    scale = min(max(longest, smallest), largest) / longest
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def annotate(judgement: Judgement, input_spec: InputSpec, panel_wh: tuple[int, int]) -> Image:
    """The whole picture: strip, the part with its regions outlined, and the part under its heat map.

    Args:
        judgement: any, also a FAULT without image or map.
        input_spec: where the map lies in the image, if the judgement does not say.
        panel_wh: (width, height) of one panel; an image of another shape is letterboxed.

    Returns:
        (STRIP_HEIGHT + height, 2 * width + GAP, 3) BGR, uint8.
    """
    width, height = panel_wh
    picture = np.full((STRIP_HEIGHT + height, 2 * width + GAP, 3), BACKGROUND, np.uint8)
    _draw_strip(picture[:STRIP_HEIGHT], judgement)
    left, right = picture[STRIP_HEIGHT:, :width], picture[STRIP_HEIGHT:, width + GAP :]
    image = judgement.frame.image
    if image is None or not _drawable(image):
        draw_text(left, "no image", (12, height // 2), 0.6, WHITE)
        return picture
    scale = min(width / image.shape[1], height / image.shape[0])
    part = _resized(image, scale)
    x, y = (width - part.shape[1]) // 2, (height - part.shape[0]) // 2
    inside = (slice(y, y + part.shape[0]), slice(x, x + part.shape[1]))
    left[inside] = part
    right[inside] = part
    if judgement.map is not None:
        draw_map(left[inside], right[inside], judgement, judgement.input_spec or input_spec)
    return picture


def _resized(image: Image, scale: float) -> Image:
    size_wh = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    resized = cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    if resized.ndim == 2:
        resized = cv2.cvtColor(resized, cv2.COLOR_GRAY2BGR)
    return np.asarray(resized, np.uint8)


def draw_map(part: Image, heat: Image, judgement: Judgement, input_spec: InputSpec) -> None:
    """Outline what is above the threshold in ``part``, and tint ``heat`` by the map; both (H, W, 3) BGR, in place."""
    assert judgement.frame.image is not None
    assert judgement.map is not None
    geometry = Geometry.of(input_spec, judgement.frame.image)
    scale_x, scale_y = part.shape[1] / judgement.frame.image.shape[1], part.shape[0] / judgement.frame.image.shape[0]
    x, y, width, height = geometry.to_source(0, 0, judgement.map.shape[1], judgement.map.shape[0])
    left, right = round(x * scale_x), max(round((x + width) * scale_x), round(x * scale_x) + 1)
    top, bottom = round(y * scale_y), max(round((y + height) * scale_y), round(y * scale_y) + 1)
    judged = (slice(top, bottom), slice(left, right))
    resized = cv2.resize(judgement.map, (right - left, bottom - top), interpolation=cv2.INTER_LINEAR)

    unit = judgement.threshold if judgement.threshold > 0 else 1.0
    steps = np.clip(resized * ((_HEAT_STEPS - 1) / (unit * _HEAT_STOPS[-1])), 0, _HEAT_STEPS - 1).astype(np.int32)
    grey = cv2.cvtColor(heat, cv2.COLOR_BGR2GRAY) // 2
    heat[:] = grey[:, :, None]
    heat[judged] = (_PREMULTIPLIED[steps] + heat[judged] * _TRANSPARENCY[steps]).astype(np.uint8)

    above = (resized > judgement.threshold).astype(np.uint8)
    outlines, _ = cv2.findContours(above, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if judgement.verdict == "REJECT":
        cv2.drawContours(part, outlines, -1, VERDICT_COLOURS["REJECT"], 2, cv2.LINE_AA, offset=(left, top))
        cv2.drawContours(heat, outlines, -1, WHITE, 1, cv2.LINE_AA, offset=(left, top))


def frame_name(frame: Frame) -> str:
    """``#12``, or ``left #12`` where a line has several cameras."""
    return f"#{frame.frame_id}" if frame.camera is None else f"{frame.camera} #{frame.frame_id}"


def describe(judgement: Judgement) -> str:
    """The numbers behind a verdict in one line: ``#12  1.204 > 0.950  truth defect``."""
    parts = [frame_name(judgement.frame)]
    if judgement.score is not None:
        sign = ">" if judgement.score > judgement.threshold else "<="
        parts.append(f"{judgement.score:.3f} {sign} {judgement.threshold:.3f}")
    if judgement.fault is not None:
        parts.append(judgement.fault)
    if judgement.frame.truth is not None:
        parts.append(f"truth {judgement.frame.truth}")
    return "  ".join(parts)


def _draw_strip(strip: Image, judgement: Judgement) -> None:
    height = strip.shape[0]
    colour = VERDICT_COLOURS[judgement.verdict]
    label_width = 122
    strip[:, : min(label_width, strip.shape[1])] = colour
    draw_text(strip, judgement.verdict, (14, height // 2 + 8), 0.75, WHITE, thickness=2)
    draw_text(strip, describe(judgement), (label_width + 14, height // 2 + 6), 0.5, WHITE)
    strip[-3:] = colour


def draw_text(
    image: Image, text: str, origin: tuple[int, int], scale: float, colour: Colour, *, thickness: int = 1
) -> None:
    """Text in place, its base line starting at ``origin`` (x, y)."""
    cv2.putText(image, text, origin, _FONT, scale, colour, thickness, cv2.LINE_AA)
