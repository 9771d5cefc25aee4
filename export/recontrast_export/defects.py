"""Defects pasted into good images, where none are known: for INT8 ranges, and to see whether verdicts change.

    image, mask = paste_defect(read_image(path), index=3)

They range from hardly visible to plain, so that scores fall on both sides of any threshold. Inside of a network they
excite about what real defects do, which good images do not. They say nothing about how well the real ones are found.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from recontrast_edge.preprocess import Image
from recontrast_edge.spec import Roi

_STRENGTHS = np.geomspace(0.06, 0.8, 8)
"""Contrast, as a share of full scale."""


def paste_defect(image: Image, *, index: int, roi: Roi | None = None) -> tuple[Image, NDArray[np.bool_]]:
    """One defect: a stain, a scratch or a displaced piece of the image itself, in turn.

    Args:
        image: uint8, (H, W) or (H, W, 3).
        index: the same index gives the same defect; kinds and strengths take turns with it.
        roi: inside of the image; the defect is pasted there. None for anywhere.

    Returns:
        A copy with the defect, and its mask, (H, W) bool, never empty.
    """
    if roi is not None:
        inside = slice(roi.y, roi.y + roi.height), slice(roi.x, roi.x + roi.width)
        whole, mask = image.copy(), np.zeros(image.shape[:2], np.bool_)
        whole[inside], mask[inside] = paste_defect(image[inside], index=index)
        return whole, mask
    rng = np.random.default_rng(index)
    height, width = image.shape[:2]
    shape = (_stain, _scratch, _stain)[index % 3](rng, height, width)
    if index % 3 == 2:
        changed = np.roll(image, (height // 3, width // 3), axis=(0, 1)).astype(np.float32)
    else:
        # Towards the far end of the scale, so that the change is never clipped away.
        sign = 1.0 if image.mean() < 128 else -1.0
        changed = image + np.float32(sign * 255.0 * _STRENGTHS[index // 3 % len(_STRENGTHS)])
    weight = shape if image.ndim == 2 else shape[:, :, None]
    pasted = image + weight * (changed - image)
    return np.rint(np.clip(pasted, 0, 255)).astype(np.uint8), shape > 0.5


def _stain(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """A tilted ellipse of 3 to 10 % of the shorter side: (H, W), 0..1."""
    side = min(height, width)
    axes = tuple(int(axis) for axis in np.maximum(2, side * rng.uniform(0.03, 0.1, 2)))
    shape = np.zeros((height, width), np.float32)
    cv2.ellipse(shape, _place(rng, height, width), axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1, cv2.LINE_AA)
    return shape


def _scratch(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """A line of 10 to 40 % of the shorter side, about 1 % thick: (H, W), 0..1."""
    side = min(height, width)
    x, y = _place(rng, height, width)
    angle, length = rng.uniform(0, 2 * np.pi), side * rng.uniform(0.1, 0.4)
    end = (round(x + length * np.cos(angle)), round(y + length * np.sin(angle)))
    shape = np.zeros((height, width), np.float32)
    cv2.line(shape, (x, y), end, 1.0, max(2, round(side / 100)), cv2.LINE_AA)
    return shape


def _place(rng: np.random.Generator, height: int, width: int) -> tuple[int, int]:
    return int(rng.uniform(0.15, 0.85) * width), int(rng.uniform(0.15, 0.85) * height)
