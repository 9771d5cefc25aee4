"""One definition of every linear resampling: input resize, map upsampling and Gaussian blur, as banded matrices.

    resized = antialias_matrix(1024, 256) @ image  # (256, 1024) @ (1024, W)

All of them are linear and separable, so each is one matrix per axis. The ONNX graph, the NumPy oracle and the CUDA
kernels take their numbers from here and nowhere else. Matrices are float64; callers round once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def _read_only(matrix: Matrix) -> Matrix:
    matrix.setflags(write=False)
    return matrix


@lru_cache(maxsize=256)
def antialias_matrix(source: int, target: int) -> Matrix:
    """Antialiased bilinear resize of one axis.

    Triangle filter over half-pixel centres whose support grows with the downscale factor and whose weights are
    normalised after clipping at the border: the rule of Pillow's ``BILINEAR`` and of
    ``torch.nn.functional.interpolate(mode="bilinear", antialias=True)``. Upscaling is plain bilinear.

    Args:
        source, target: lengths in pixels, >= 1.

    Returns:
        (target, source), read-only; each row sums to 1.
    """
    scale = source / target
    support = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    distance = np.abs((np.arange(source) + 0.5)[None, :] - centres[:, None]) / support
    weights = np.clip(1.0 - distance, 0.0, None)
    return _read_only(weights / weights.sum(axis=1, keepdims=True))


@lru_cache(maxsize=256)
def align_corners_matrix(source: int, target: int) -> Matrix:
    """Bilinear upsampling of one axis with ``align_corners=True``; (target, source), read-only."""
    matrix = np.zeros((target, source))
    if source == 1 or target == 1:
        matrix[:, 0] = 1.0
        return _read_only(matrix)
    position = np.arange(target) * ((source - 1) / (target - 1))
    left = np.minimum(np.floor(position).astype(np.int64), source - 2)
    fraction = position - left
    rows = np.arange(target)
    matrix[rows, left] = 1.0 - fraction
    matrix[rows, left + 1] = fraction
    return _read_only(matrix)


@lru_cache(maxsize=64)
def gaussian_matrix(length: int, sigma: float) -> Matrix:
    """Gaussian blur of one axis, radius ``int(4 * sigma + 0.5)``, borders mirrored about the edge (d c b a | a b c d).

    The same numbers as ``scipy.ndimage.gaussian_filter1d(mode="reflect")``, whatever the length.

    Returns:
        (length, length), read-only; the identity for ``sigma == 0``.
    """
    radius = int(4.0 * sigma + 0.5)
    if radius == 0:
        return _read_only(np.eye(length))
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    # Mirrored index with period 2 * length, so that a radius larger than the axis reflects several times.
    columns = (np.arange(length)[:, None] + offsets[None, :]) % (2 * length)
    columns = np.where(columns >= length, 2 * length - 1 - columns, columns)
    matrix = np.zeros((length, length))
    np.add.at(matrix, (np.arange(length)[:, None], columns), np.broadcast_to(weights, columns.shape))
    return _read_only(matrix)


@lru_cache(maxsize=256)
def fold_matrix(source: int, target: int, sigma: float) -> Matrix:
    """Upsampling and blur of one axis in one: ``gaussian_matrix(target) @ align_corners_matrix(source, target)``.

    Returns:
        (target, source), read-only; banded: see ``Band``.
    """
    return _read_only(gaussian_matrix(target, sigma) @ align_corners_matrix(source, target))


@dataclass(frozen=True)
class Band:
    """A banded matrix as the kernels read it: per row the first column and the same number of taps.

    Attributes:
        first: (rows,) int32, first column of each row's window; ``first + taps <= columns``.
        weights: (rows, taps) float32; entries outside the row's support are 0.
    """

    first: NDArray[np.int32]
    weights: NDArray[np.float32]

    @classmethod
    def of(cls, matrix: Matrix) -> Band:
        """The narrowest common window over all rows."""
        columns = matrix.shape[1]
        used = matrix != 0.0
        first = used.argmax(axis=1)
        last = columns - 1 - used[:, ::-1].argmax(axis=1)
        taps = int((last - first).max()) + 1
        start = np.minimum(first, columns - taps)
        weights = np.take_along_axis(matrix, start[:, None] + np.arange(taps)[None, :], axis=1)
        return cls(start.astype(np.int32), weights.astype(np.float32))


@dataclass(frozen=True, eq=False)
class GroupedBand:
    """A banded matrix whose neighbouring rows share a window, so that one reading of it serves all of them.

    Attributes:
        first: (groups,) int32, first column of each group's window, which may reach past the last column.
        weights: (groups, taps, rows of a group) float32; 0 outside of a row's support, past the last row and column.
    """

    first: NDArray[np.int32]
    weights: NDArray[np.float32]

    @classmethod
    def of(cls, matrix: Matrix, *, rows: int, taps_multiple: int) -> GroupedBand:
        """The narrowest common window over all groups of ``rows`` rows, of a multiple of ``taps_multiple`` taps."""
        height, columns = matrix.shape
        groups = np.zeros((-(-height // rows), rows, columns))
        groups.reshape(-1, columns)[:height] = matrix
        used = (groups != 0.0).any(axis=1)
        first = used.argmax(axis=1)
        last = np.where(used.any(axis=1), columns - 1 - used[:, ::-1].argmax(axis=1), first)
        taps = -(-(int((last - first).max()) + 1) // taps_multiple) * taps_multiple
        window = first[:, None] + np.arange(taps)[None, :]
        inside = np.minimum(window, columns - 1)
        weights = np.take_along_axis(groups.transpose(0, 2, 1), inside[:, :, None], axis=1)
        weights[window >= columns] = 0.0
        return cls(first.astype(np.int32), weights.astype(np.float32))


class Resizer:
    """Antialiased bilinear resize of whole images, in blocks of output rows that skip the matrices' zeros.

        Resizer(source_wh=(1024, 768), target_wh=(256, 256))(plane)  # (768, 1024) -> (256, 256) float32

    Equal to ``A_v @ image @ A_h.T`` with ``antialias_matrix``, up to float32 rounding.
    """

    _BLOCK = 32

    def __init__(self, source_wh: tuple[int, int], target_wh: tuple[int, int]) -> None:
        self._identity = source_wh == target_wh
        self._target_wh = target_wh
        self._vertical = self._blocks(antialias_matrix(source_wh[1], target_wh[1]))
        self._horizontal = self._blocks(antialias_matrix(source_wh[0], target_wh[0]))

    @classmethod
    def _blocks(cls, matrix: Matrix) -> Sequence[tuple[slice, slice, NDArray[np.float32]]]:
        blocks = []
        for start in range(0, matrix.shape[0], cls._BLOCK):
            rows = slice(start, min(start + cls._BLOCK, matrix.shape[0]))
            used = np.flatnonzero(matrix[rows].any(axis=0))
            columns = slice(int(used[0]), int(used[-1]) + 1)
            blocks.append((rows, columns, np.ascontiguousarray(matrix[rows, columns], dtype=np.float32)))
        return blocks

    def __call__(self, plane: NDArray[Any]) -> NDArray[np.float32]:
        """Resize one plane, (source height, source width) of any real dtype -> (height, width) float32."""
        plane = np.asarray(plane, dtype=np.float32)
        if self._identity:
            return plane
        width, height = self._target_wh
        tall = np.empty((height, plane.shape[1]), np.float32)
        for rows, columns, weights in self._vertical:
            np.matmul(weights, plane[columns], out=tall[rows])
        out = np.empty((height, width), np.float32)
        for rows, columns, weights in self._horizontal:
            out[:, rows] = tall[:, columns] @ weights.T
        return out


@lru_cache(maxsize=32)
def resizer(source_wh: tuple[int, int], target_wh: tuple[int, int]) -> Resizer:
    """A cached ``Resizer``: a stream's frames share one size."""
    return Resizer(source_wh, target_wh)
