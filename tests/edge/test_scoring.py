"""The scoring oracle against the published way to the map: PyTorch's cosine and upsampling, SciPy's blur."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from recontrast_edge.scoring import cosine_distance, fold_maps, image_scores, level_distances, top_count
from recontrast_edge.spec import Scoring


def random_pairs(rng: np.random.Generator, batch: int = 2) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    shapes = ((batch, 6, 16, 24), (batch, 10, 8, 12), (batch, 14, 4, 6))
    return [[(rng.standard_normal(shape), rng.standard_normal(shape)) for shape in shapes] for _ in range(2)]


@pytest.mark.parametrize("sigma", [0.0, 4.0])
def test_the_folded_map_is_the_published_one(sigma: float) -> None:
    torch = pytest.importorskip("torch", reason="the reference is PyTorch's")
    pairs = random_pairs(np.random.default_rng(0))
    expected = np.zeros((2, 64, 96))
    for view in pairs:
        for target, reconstruction in view:
            cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(target), torch.from_numpy(reconstruction))
            large = torch.nn.functional.interpolate(
                (1 - cosine).unsqueeze(1), (64, 96), mode="bilinear", align_corners=True
            )
            expected += large[:, 0].numpy()
    if sigma:
        expected = np.stack([ndimage.gaussian_filter(one, sigma) for one in expected])
    np.testing.assert_allclose(fold_maps(level_distances(pairs), (96, 64), sigma), expected, atol=1e-10)


def test_distance_of_equal_opposite_orthogonal_and_zero_vectors() -> None:
    target = np.zeros((1, 2, 1, 5))
    reconstruction = np.zeros((1, 2, 1, 5))
    target[0, :, 0, :4] = np.array([[1, 1, 1, 1], [2, 2, 2, 2]])
    reconstruction[0, :, 0, :3] = np.array([[3, -1, -2], [6, -2, 1]])
    np.testing.assert_allclose(cosine_distance(target, reconstruction)[0, 0], [0, 2, 1, 1, 1], atol=1e-12)


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="equal"):
        cosine_distance(np.zeros((1, 2, 3, 3)), np.zeros((1, 3, 3, 3)))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.9])
def test_scores_against_a_sort(fraction: float) -> None:
    maps = np.random.default_rng(1).standard_normal((3, 20, 30))
    assert image_scores(maps, Scoring()).tolist() == maps.max(axis=(1, 2)).tolist()
    top = Scoring(rule="top", top_fraction=fraction)
    count = int(600 * fraction)
    expected = [np.sort(one.ravel())[-count:].mean() for one in maps]
    np.testing.assert_allclose(image_scores(maps, top), expected, atol=1e-12)


def test_the_top_is_at_least_one_pixel() -> None:
    assert top_count(30, Scoring(rule="top", top_fraction=0.01)) == 1
    maps = np.arange(30.0).reshape(1, 5, 6)
    assert image_scores(maps, Scoring(rule="top", top_fraction=0.01)).tolist() == [29.0]


@pytest.mark.parametrize("rule", ["max", "top"])
def test_nan_reaches_the_score(rule: str) -> None:
    maps = np.zeros((1, 8, 8), np.float32)
    maps[0, 3, 3] = np.nan
    assert np.isnan(image_scores(maps, Scoring(rule=rule))).all()  # type: ignore[arg-type]
