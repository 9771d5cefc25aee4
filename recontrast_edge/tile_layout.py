"""Where overlapping tiles lie along an axis, and how much each one counts where several show the same.

starts = tile_starts(length=2048, size=256, overlap=32)
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

MAX_TILES = 4096
"""Of one image."""


def check_tiles(image_wh: tuple[int, int], tile_wh: tuple[int, int], overlap: int) -> None:
    """Refuse tiles that cost more than they can give.

    Args:
        image_wh: what is cut, in pixels, at least as large as a tile.
        tile_wh: a tile, in pixels.
        overlap: that neighbours share at least, in pixels.

    Raises:
        ValueError: an overlap of more than half of a tile, or more than ``MAX_TILES``.
    """
    if 2 * overlap > min(tile_wh):
        raise ValueError(f"tile_overlap {overlap} is more than half of a tile of {tile_wh[0]}x{tile_wh[1]}")
    columns, rows = (len(tile_starts(*lengths, overlap)) for lengths in zip(image_wh, tile_wh, strict=True))
    if columns * rows > MAX_TILES:
        raise ValueError(f"{columns} x {rows} tiles an image are more than {MAX_TILES}; make resize_wh smaller")


def spread_starts(length: int, size: int, count: int) -> tuple[int, ...]:
    """First pixels of ``count`` tiles, from one end of the axis to the other, as evenly as whole pixels allow.

    Args:
        length: of the axis, in pixels.
        size: of a tile, in pixels, at most ``length``.
        count: of tiles; one lies at the beginning.
    """
    return tuple(index * (length - size) // max(count - 1, 1) for index in range(count))


@lru_cache(maxsize=64)
def tile_starts(length: int, size: int, overlap: int) -> tuple[int, ...]:
    """First pixels of the fewest tiles that cover the axis and share at least ``overlap`` pixels with their neighbours.

    Args:
        length: of the axis, in pixels.
        size: of a tile, in pixels, at most ``length``.
        overlap: in pixels, less than ``size``.
    """
    count = max(1, -(-(length - overlap) // (size - overlap)))
    return spread_starts(length, size, count)


@lru_cache(maxsize=64)
def blend_weights(length: int, size: int, overlap: int) -> tuple[NDArray[np.float32], ...]:
    """What each tile of ``tile_starts`` counts at each of its pixels; at every pixel of the axis they add up to 1.

    A tile counts in proportion to the distance to its nearer end that has a neighbour: fully where it alone shows the
    axis, and ever less towards an end, where it sees half of a defect and the network's padding.

    Returns:
        (size,) float32 a tile, read-only; exactly 1 where no other tile is.
    """
    starts = tile_starts(length, size, overlap)
    centres = np.arange(size) + 0.5
    total = np.zeros(length)
    distances = []
    for index, start in enumerate(starts):
        distance = np.full(size, float(size))
        if index > 0:
            distance = np.minimum(distance, centres)
        if index < len(starts) - 1:
            distance = np.minimum(distance, size - centres)
        distances.append(distance)
        total[start : start + size] += distance
    weights = []
    for start, distance in zip(starts, distances, strict=True):
        weight = (distance / total[start : start + size]).astype(np.float32)
        weight.setflags(write=False)
        weights.append(weight)
    return tuple(weights)
