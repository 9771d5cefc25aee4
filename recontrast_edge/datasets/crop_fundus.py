"""Crop the photographs of APTOS 2019 to the fundus, as Guo et al. did before they trained on them.

    python -m recontrast_edge.datasets.crop_fundus aptos2019-blindness-detection aptos-cropped

Photographs differ in how much black surrounds the fundus, which says something about the camera, but nothing about the
eye.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np

from recontrast_edge.datasets.aptos import TREE, find
from recontrast_edge.datasets.base import layout_error
from recontrast_edge.errors import InputError, RecontrastError, UsageError
from recontrast_edge.images import atomic_write, read_image, write_image
from recontrast_edge.preprocess import Image

BACKGROUND = 30
"""A pixel belongs to the fundus where its channels add up to more."""

MARGIN = 5
SIDE = 512
"""Pixels around the fundus, before the crop is scaled, and the cropped image's side."""


def crop_fundus(image: Image) -> Image:
    """The square around a photograph's fundus, black where it leaves the photograph.

    Centred on the centroid of the largest bright region, as wide as that region's longer side and a margin.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        (512, 512, 3) uint8.

    Raises:
        InputError: nothing but background, or a mono image.
    """
    if image.ndim != 3:
        raise InputError("expected a colour photograph, got a mono image")
    bright = (image.sum(axis=2, dtype=np.uint16) > BACKGROUND).astype(np.uint8)
    count, _, stats, centroids = cv2.connectedComponentsWithStats(bright, connectivity=8)
    if count == 1:
        raise InputError("no fundus in the photograph: it is black")
    largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    half = max(stats[largest, cv2.CC_STAT_WIDTH], stats[largest, cv2.CC_STAT_HEIGHT]) / 2
    centre_x, centre_y = centroids[largest]
    left, right = int(centre_x - half) - MARGIN, int(centre_x + half) + MARGIN
    top, bottom = int(centre_y - half) - MARGIN, int(centre_y + half) + MARGIN
    height, width = bright.shape
    inside = image[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
    padding = (max(-top, 0), max(bottom - height, 0), max(-left, 0), max(right - width, 0))
    square = cv2.copyMakeBorder(inside, *padding, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    return np.asarray(cv2.resize(square, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR), np.uint8)


def write_cropped(root: Path, out: Path) -> int:
    """Write the archive again, with every photograph cropped to its fundus; ``train.csv`` comes last.

    Returns:
        How many photographs there are.

    Raises:
        InputError: as ``find`` and ``crop_fundus``.
        OutputError: it cannot be written.
    """
    dataset = find(root) if root.is_dir() else None
    if dataset is None:
        raise layout_error(f"{root}: no train_images in it", TREE, root)
    samples = (*dataset.train_good, *dataset.test)
    for sample in samples:
        try:
            cropped = crop_fundus(read_image(sample.path))
        except InputError as error:
            raise error if str(sample.path) in str(error) else InputError(f"{sample.path}: {error}") from None
        write_image(out / "train_images" / sample.path.name, cropped)
    with atomic_write(out / "train.csv") as file:
        file.write((root / "train.csv").read_bytes())
    return len(samples)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m recontrast_edge.datasets.crop_fundus ARCHIVE OUT", file=sys.stderr)
        return UsageError.exit_code
    try:
        print(f"{write_cropped(Path(arguments[0]), Path(arguments[1]))} photographs cropped into {arguments[1]}")
    except RecontrastError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
