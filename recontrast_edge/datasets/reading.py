"""What the files of a data set hold: digests, images, and masks at any size.

image, mask = read_sample(dataset.test[0])
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.datasets.base import Sample
from recontrast_edge.errors import InputError
from recontrast_edge.images import read_image, read_mask
from recontrast_edge.preprocess import Geometry, Image
from recontrast_edge.spec import InputSpec


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()


def combined_sha256(digests: Iterable[str]) -> str:
    """One digest over several, in their order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def data_sha256(samples: Sequence[Sample]) -> str:
    """Identity of a set of images: the digest over their files' digests, in the samples' (natural) order.

    Raises:
        InputError: a file cannot be read.
    """
    return combined_sha256(file_sha256(sample.path) for sample in samples)


def read_sample(sample: Sample) -> tuple[Image, NDArray[np.bool_] | None]:
    """Load an image and, where it has any, its masks as one.

    A mask of another size is brought to the image's by the nearest pixel, if it has the image's proportions.

    Returns:
        image as ``images.read_image`` gives it, and the (H, W) bool mask, True where any of the masks is; None for
        defects without mask. Good images have a mask that is False everywhere.

    Raises:
        InputError: a file is missing or damaged, or a mask has other proportions than the image.
    """
    image = read_image(sample.path)
    height, width = image.shape[:2]
    if not sample.is_good and not sample.mask_paths:
        return image, None
    union = np.zeros((height, width), np.bool_)
    for path in sample.mask_paths:
        mask = read_mask(path)
        mask_height, mask_width = mask.shape
        # Whole pixels allow a side to be off by less than one from exact proportions.
        if abs(mask_width * height - mask_height * width) >= max(mask_width, mask_height, width, height):
            raise InputError(
                f"{path}: the mask is {mask_width}x{mask_height} but its image {sample.path.name} is "
                f"{width}x{height}; a mask must have its image's size or proportions"
            )
        union |= mask[np.ix_(_nearest(mask_height, height), _nearest(mask_width, width))]
    return image, union


def _nearest(size: int, new_size: int) -> NDArray[np.intp]:
    """For each of ``new_size`` pixels, the one of ``size`` that its centre falls into."""
    return ((2 * np.arange(new_size) + 1) * size // (2 * new_size)).astype(np.intp)


def mask_to_map(mask: NDArray[np.bool_], spec: InputSpec) -> NDArray[np.bool_]:
    """A mask at the anomaly map's size, through the image's own geometry: ROI, resize (nearest pixel centre), crop.

    Args:
        mask: (H, W) bool at the source's size.

    Returns:
        (height, width) bool, the size of ``spec.map_wh``.

    Raises:
        InputError: the ROI does not lie inside the mask.
    """
    geometry = Geometry.of(spec, mask.view(np.uint8))
    scale_x, scale_y = geometry.scale_xy
    width, height = spec.map_wh
    columns = geometry.x + ((np.arange(width) + geometry.crop_x + 0.5) * scale_x).astype(np.intp)
    rows = geometry.y + ((np.arange(height) + geometry.crop_y + 0.5) * scale_y).astype(np.intp)
    resized: NDArray[np.bool_] = mask[np.ix_(rows, columns)]
    return resized
