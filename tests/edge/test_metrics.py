"""Metrics against scikit-learn, pyaupro, and a brute force that follows the definitions word for word."""

from __future__ import annotations

import time
from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recontrast_edge.metrics import (
    UndefinedMetricError,
    aupro,
    auroc,
    average_precision,
    f1_max,
    pixel_auroc,
    roc_curve,
)


def brute_force_aupro(maps: np.ndarray, masks: np.ndarray, max_fpr: float) -> float:
    """Every distinct value as a threshold, every region counted, straight lines, cut at the limit."""
    regions = []
    for index, mask in enumerate(masks):
        count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        regions += [(index, labels == label) for label in range(1, count)]
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        hit = maps >= threshold
        overlap = np.mean([hit[index][region].mean() for index, region in regions])
        points.append((float(hit[~masks].mean()), float(overlap)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= max_fpr:
            break
        if x1 > max_fpr:
            y1 = y0 + (y1 - y0) * (max_fpr - x0) / (x1 - x0)
            x1 = max_fpr
        area += (x1 - x0) * (y0 + y1) / 2
    return area / max_fpr


@st.composite
def scored_labels(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    pairs = draw(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40))
    scores = np.array([score for score, _ in pairs], np.float32) / 3
    labels = np.array([label for _, label in pairs])
    labels[0], labels[1] = True, False
    return scores, labels


@given(scored_labels())
@settings(max_examples=60, deadline=None)
def test_image_metrics_equal_scikit_learn_with_ties(data: tuple[np.ndarray, np.ndarray]) -> None:
    from sklearn import metrics as reference

    scores, labels = data
    assert auroc(scores, labels) == pytest.approx(reference.roc_auc_score(labels, scores), abs=1e-12)
    assert average_precision(scores, labels) == pytest.approx(
        reference.average_precision_score(labels, scores), abs=1e-12
    )
    expected = reference.roc_curve(labels, scores, drop_intermediate=False)
    for ours, theirs in zip(roc_curve(scores, labels), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    best, threshold = f1_max(scores, labels)
    thresholds = sorted(set(scores.tolist()))
    assert best == pytest.approx(max(reference.f1_score(labels, scores >= t) for t in thresholds), abs=1e-12)
    assert reference.f1_score(labels, scores >= threshold) == pytest.approx(best, abs=1e-12)


@given(seed=st.integers(0, 10**6), levels=st.integers(2, 30), max_fpr=st.sampled_from([0.01, 0.05, 0.3, 0.77, 1.0]))
@settings(max_examples=60, deadline=None)
def test_aupro_equals_brute_force_with_ties(seed: int, levels: int, max_fpr: float) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 9, 7)) < 0.15
    masks[0, 4, 4], masks[1, 0, 0] = True, False
    maps = (rng.integers(0, levels, masks.shape) + 2 * masks).astype(np.float32)
    assert aupro(maps, masks, max_fpr) == pytest.approx(brute_force_aupro(maps, masks, max_fpr), abs=1e-12)


def test_aupro_and_pixel_auroc_agree_with_the_published_implementations() -> None:
    torch = pytest.importorskip("torch")
    pyaupro = pytest.importorskip("pyaupro")
    from pyaupro import auc_compute
    from sklearn.metrics import roc_auc_score

    maps, masks = pyaupro.generate_random_data(
        batch_size=6, height=64, width=64, num_objects=4, seed=3, return_numpy=True
    )
    # generate_random_data clips to 0..1, and pyaupro's own exact curve does not join ties; untie them.
    maps = (maps + np.random.default_rng(0).random(maps.shape) * 1e-3).astype(np.float32)
    metric = pyaupro.PerRegionOverlap(thresholds=None, reference_implementation=True)
    metric.update(torch.from_numpy(maps), torch.from_numpy(masks))
    # auc_compute stops at the last point before the limit instead of cutting the line there, hence the tolerance.
    expected = float(auc_compute(*metric.compute(), limit=0.3, check=False))
    ours = aupro(maps, masks.astype(bool))
    assert ours == pytest.approx(expected, abs=5e-4)
    assert 0.3 < ours < 1.0
    assert pixel_auroc(maps, masks.astype(bool)) == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-9)


def test_every_region_weighs_the_same_and_diagonal_neighbours_are_one() -> None:
    masks = np.zeros((1, 8, 8), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True  # one region of two pixels
    masks[0, 4:8, 4:8] = True  # one region of sixteen
    maps = np.zeros((1, 8, 8), np.float32)
    maps[0, 0, 0] = maps[0, 1, 1] = 1.0
    # Small region found at once, large one tied with the whole background: y = 0.5 + 0.5 x.
    assert aupro(maps, masks, 1.0) == pytest.approx(0.75)
    assert aupro(maps, masks, 0.2) == pytest.approx(0.55)


def test_extremes() -> None:
    masks = np.zeros((2, 16, 16), bool)
    masks[0, 3:6, 3:6] = True
    perfect = masks.astype(np.float32)
    assert aupro(perfect, masks) == 1.0
    assert aupro(1 - perfect, masks) == 0.0
    assert pixel_auroc(perfect, masks) == 1.0
    assert auroc([1.0, 1.0], [True, False]) == 0.5


def test_what_is_undefined_says_why_and_what_is_wrong_is_refused() -> None:
    with pytest.raises(UndefinedMetricError, match="no defect"):
        auroc([0.1, 0.2], [False, False])
    with pytest.raises(UndefinedMetricError, match="nothing good"):
        average_precision([0.1, 0.2], [True, True])
    with pytest.raises(UndefinedMetricError, match="no defect"):
        aupro(np.zeros((1, 4, 4), np.float32), np.zeros((1, 4, 4), bool))
    with pytest.raises(UndefinedMetricError, match="no defect"):
        auroc([], [])
    with pytest.raises(ValueError, match="finite"):
        auroc([0.1, float("nan")], [True, False])
    with pytest.raises(ValueError, match="one shape"):
        auroc([0.1, 0.2, 0.3], [True, False])
    with pytest.raises(ValueError, match="max_fpr"):
        aupro(np.zeros((1, 4, 4), np.float32), np.eye(4, dtype=bool)[None], 0.0)


def test_a_whole_test_set_is_fast_enough() -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((60, 256, 256), dtype=np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[:30, 100:140, 90:130] = True
    start = time.perf_counter()
    assert aupro(maps, masks) == pytest.approx(0.15, abs=0.01)
    assert time.perf_counter() - start < 5.0
