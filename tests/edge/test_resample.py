"""The matrices against Pillow, SciPy and PyTorch, and the fast paths against the matrices."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as Pil
from scipy import ndimage

from recontrast_edge.resample import (
    Band,
    Resizer,
    align_corners_matrix,
    antialias_matrix,
    fold_matrix,
    gaussian_matrix,
)

LENGTHS = [(1, 1), (1, 7), (7, 1), (5, 5), (100, 37), (37, 100), (640, 256), (257, 256), (8, 250)]


@pytest.mark.parametrize(("source", "target"), LENGTHS)
def test_antialias_is_pillows_bilinear(source: int, target: int) -> None:
    image = np.random.default_rng(0).random((source, 3), np.float32)
    expected = np.asarray(Pil.fromarray(image, mode="F").resize((3, target), Pil.Resampling.BILINEAR))
    np.testing.assert_allclose(antialias_matrix(source, target) @ image, expected, atol=2e-6)


@pytest.mark.parametrize(("source", "target"), LENGTHS)
def test_align_corners_is_pytorchs(source: int, target: int) -> None:
    torch = pytest.importorskip("torch", reason="the reference is PyTorch's")
    values = np.random.default_rng(1).random((source, 4))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], (target, 4), mode="bilinear", align_corners=True
    )[0, 0].numpy()
    np.testing.assert_allclose(align_corners_matrix(source, target) @ values, expected, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 5, 16, 33, 256])
@pytest.mark.parametrize("sigma", [0.0, 0.7, 4.0, 6.5])
def test_gaussian_is_scipys_however_short_the_axis(length: int, sigma: float) -> None:
    values = np.random.default_rng(2).random((length, 3))
    expected = ndimage.gaussian_filter1d(values, sigma, axis=0, mode="reflect") if sigma else values
    np.testing.assert_allclose(gaussian_matrix(length, sigma) @ values, expected, atol=1e-12)


@pytest.mark.parametrize("matrix", [antialias_matrix(91, 40), align_corners_matrix(9, 40), gaussian_matrix(40, 4.0)])
def test_rows_sum_to_one_and_nobody_can_change_the_cached_numbers(matrix: np.ndarray) -> None:
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = 2.0


@pytest.mark.parametrize(
    ("source", "target", "sigma"), [(64, 256, 4.0), (16, 256, 4.0), (3, 20, 1.0), (1, 9, 2.0), (8, 8, 0.0)]
)
def test_a_band_holds_the_whole_matrix(source: int, target: int, sigma: float) -> None:
    matrix = fold_matrix(source, target, sigma)
    band = Band.of(matrix)
    taps = band.weights.shape[1]
    assert band.first.min() >= 0
    assert (band.first + taps).max() <= source
    rebuilt = np.zeros_like(matrix)
    for row, first in enumerate(band.first):
        rebuilt[row, first : first + taps] = band.weights[row]
    np.testing.assert_allclose(rebuilt, matrix, atol=1e-7)


@pytest.mark.parametrize(
    ("source_wh", "target_wh"), [((100, 60), (32, 64)), ((33, 200), (256, 40)), ((64, 64), (64, 64)), ((1, 1), (5, 3))]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_the_blocked_resizer_is_the_two_matrices(
    source_wh: tuple[int, int], target_wh: tuple[int, int], dtype: type[np.generic]
) -> None:
    plane = (np.random.default_rng(3).random(source_wh[::-1]) * 255).astype(dtype)
    exact = antialias_matrix(source_wh[1], target_wh[1]) @ plane @ antialias_matrix(source_wh[0], target_wh[0]).T
    found = Resizer(source_wh, target_wh)(plane)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, atol=2e-4)
