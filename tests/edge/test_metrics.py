"""Metrics against scikit-learn, pyaupro, and a brute force that follows the definitions word for word."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recontrast_edge.errors import OutputError
from recontrast_edge.metrics import (
    PixelMetrics,
    PixelResult,
    UndefinedMetricError,
    auroc,
    auroc_interval,
    average_precision,
    f1_max,
    roc_curve,
)


def pixel_metrics(maps: np.ndarray, masks: np.ndarray, *limits: float) -> PixelResult:
    with PixelMetrics() as pixels:
        for anomaly_map, mask in zip(maps, masks, strict=True):
            pixels.add(anomaly_map, mask)
        return pixels.over_all(limits or (0.3, 0.05))


def assert_same(result: PixelResult, expected: PixelResult) -> None:
    """The counts are the same; the order of the sums need not be."""
    assert (result.p_auroc, result.p_ap) == pytest.approx((expected.p_auroc, expected.p_ap), abs=1e-12)
    assert result.aupro == pytest.approx(expected.aupro, abs=1e-12)


def aupro(maps: np.ndarray, masks: np.ndarray, max_fpr: float = 0.3) -> float:
    return pixel_metrics(maps, masks, max_fpr).aupro[max_fpr]


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


@given(seed=st.integers(0, 10**6), levels=st.integers(2, 200))
@settings(max_examples=30, deadline=None)
def test_pixel_metrics_equal_scikit_learn_with_ties(seed: int, levels: int) -> None:
    from sklearn import metrics as reference

    rng = np.random.default_rng(seed)
    masks = rng.random((4, 13, 11)) < 0.2
    masks[0, 0, :2] = True, False
    maps = (rng.integers(0, levels, masks.shape) / levels + 0.3 * masks).astype(np.float32)
    maps[1] *= -1
    result = pixel_metrics(maps, masks)
    labels, scores = masks.ravel(), maps.ravel()
    assert result.p_auroc == pytest.approx(reference.roc_auc_score(labels, scores), abs=1e-12)
    assert result.p_ap == pytest.approx(reference.average_precision_score(labels, scores), abs=1e-12)


def slow_aupro_of_image(anomaly_map: np.ndarray, mask: np.ndarray) -> float:
    """Threshold by threshold, region by region, as the published definition has it."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    low, high = float(anomaly_map.min()), float(anomaly_map.max())
    points = []
    for step in range(200):
        found = anomaly_map.astype(np.float64) > low + step * (high - low) / 200
        overlap = np.mean([found[labels == label].mean() for label in range(1, count)])
        points.append((float(found[~mask].mean()), float(overlap)))
    points = [point for point in points if point[0] < 0.3][::-1]
    limit = points[-1][0]
    return sum((x1 - x0) / limit * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(points))


def test_aupro_per_image_follows_its_definition() -> None:
    rng = np.random.default_rng(5)
    masks = np.zeros((3, 40, 30), bool)
    masks[0, 3:9, 4:20] = masks[0, 20:22, 1:3] = masks[1, 30:, 25:] = True
    maps = (rng.random(masks.shape) + 0.6 * masks * rng.random(masks.shape)).astype(np.float32)
    with PixelMetrics() as pixels:
        for anomaly_map, mask in zip(maps, masks, strict=True):
            pixels.add(anomaly_map, mask, "scratch" if mask.any() else "good")
        pixels.add(np.ones((4, 4), np.float32), np.ones((4, 4), bool), "all defect")
        expected = np.mean([slow_aupro_of_image(maps[index], masks[index]) for index in (0, 1)])
        assert 0.3 < expected < 0.9
        assert pixels.aupro_per_image(["good", "scratch", "all defect"]) == pytest.approx(expected, abs=1e-9)
        with pytest.raises(UndefinedMetricError, match="no image with both"):
            pixels.aupro_per_image(["good", "all defect"])


def test_aupro_per_image_where_the_definition_has_no_area() -> None:
    mask = np.zeros((6, 6), bool)
    mask[2:4, 2:4] = True
    for anomaly_map, expected in ((mask, 1.0), (~mask, 0.0), (np.zeros_like(mask), 0.0)):
        with PixelMetrics() as pixels:
            pixels.add(anomaly_map.astype(np.float32), mask)
            assert pixels.aupro_per_image([""]) == expected


def test_groups_are_measured_alone_and_together() -> None:
    rng = np.random.default_rng(1)
    masks = rng.random((6, 20, 20)) < 0.1
    masks[:2] = False
    maps = (rng.integers(0, 9, masks.shape) + masks).astype(np.float32)
    kinds = ["good", "good", "dent", "dent", "stain", "stain"]
    with PixelMetrics() as pixels:
        for index in range(6):
            pixels.add(maps[index], masks[index], kinds[index])
            # Asking in between changes nothing.
            if masks[: index + 1].any():
                pixels.over(["good", "dent", "stain"])
        assert_same(pixels.over(["good", "dent", "unheard of"]), pixel_metrics(maps[:4], masks[:4]))
        assert_same(pixels.over(["good", "stain"]), pixel_metrics(maps[[0, 1, 4, 5]], masks[[0, 1, 4, 5]]))
        assert_same(pixels.over_all(), pixel_metrics(maps, masks))


def large_set(images: int) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """Maps of 400x400, one in three with a defect, half of the pixels tied at zero."""
    noise = np.maximum(np.random.default_rng(2).random((400, 400), dtype=np.float32) - 0.5, 0)
    mask = np.zeros(noise.shape, bool)
    mask[100:160, 200:300] = True
    for index in range(images):
        defect = index % 3 == 2
        # Other values in every image, but for the zeros.
        anomaly_map = np.roll(noise, 7 * index) * np.float32(1 + index / 1000)
        anomaly_map[mask] += np.float32(0.1 * defect)
        yield anomaly_map, mask if defect else np.zeros_like(mask), "dent" if defect else "good"


def test_a_test_set_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    images = 60
    whole_bytes = images * 400 * 400 * 4
    tracemalloc.start()
    try:
        with PixelMetrics(memory_mib=3) as pixels:
            for anomaly_map, mask, kind in large_set(images):
                pixels.add(anomaly_map, mask, kind)
            result, dents = pixels.over_all(), pixels.over(["good", "dent"])
            peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3.5 * 3 * 2**20 < 0.3 * whole_bytes
    assert list(tmp_path.iterdir()) == []
    with PixelMetrics(memory_mib=256) as pixels:
        for anomaly_map, mask, kind in large_set(images):
            pixels.add(anomaly_map, mask, kind)
        expected = pixels.over_all()
    assert_same(result, expected)
    assert_same(dents, expected)


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115, PTH123
    with PixelMetrics(memory_mib=1) as pixels, pytest.raises(OutputError, match="TMPDIR"):
        pixels.add(np.zeros((1000, 1000), np.float32), np.zeros((1000, 1000), bool))


def test_what_is_added_is_checked() -> None:
    good, mask = np.zeros((4, 5), np.float32), np.zeros((4, 5), bool)
    with PixelMetrics() as pixels:
        with pytest.raises(ValueError, match="float32 map, got float64"):
            pixels.add(good.astype(np.float64), mask)
        with pytest.raises(ValueError, match="float32 map"):
            pixels.add(good[None], mask[None])
        with pytest.raises(ValueError, match=r"bool mask of shape \(4, 5\)"):
            pixels.add(good, mask.T)
        with pytest.raises(ValueError, match="finite"):
            pixels.add(good + np.float32(np.nan), mask)
    with pytest.raises(ValueError, match="memory_mib"):
        PixelMetrics(memory_mib=0)


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
    result = pixel_metrics(maps, masks.astype(bool))
    assert result.p_auroc == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-9)
    expected = float(auc_compute(*metric.compute(), limit=0.05, check=False))
    assert result.aupro[0.05] == pytest.approx(expected, abs=5e-3)


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
    assert pixel_metrics(perfect, masks) == PixelResult(1.0, 1.0, {0.3: 1.0, 0.05: 1.0})
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
    with pytest.raises(ValueError, match="limit must lie"):
        aupro(np.zeros((1, 4, 4), np.float32), np.eye(4, dtype=bool)[None], 0.0)


def test_a_whole_test_set_is_fast_enough() -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((60, 256, 256), dtype=np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[:30, 100:140, 90:130] = True
    start = time.perf_counter()
    assert aupro(maps, masks) == pytest.approx(0.15, abs=0.01)
    assert time.perf_counter() - start < 5.0


def bootstrapped(scores: np.ndarray, labels: np.ndarray, groups: list[str], draws: int) -> tuple[float, float]:
    """``auroc_interval`` word for word: samples are put together and measured anew for each draw."""
    classes = []
    for label in (False, True):
        chosen = np.flatnonzero(labels == label)
        names = sorted({groups[index] for index in chosen})
        classes.append([[index for index in chosen if groups[index] == name] for name in names])
    rng, areas = np.random.default_rng(0), []
    for _ in range(draws):
        drawn = [members[pick] for members in classes for pick in rng.integers(len(members), size=len(members))]
        indices = [index for members in drawn for index in members]
        areas.append(auroc(scores[indices], labels[indices]))
    low, high = np.quantile(areas, [0.025, 0.975])
    return float(low), float(high)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([3, 1000]))
def test_the_interval_is_that_of_samples_put_together_anew(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.repeat([False, True], 20)
    scores = (rng.integers(levels, size=40) / levels + 0.3 * labels).astype(np.float32)
    groups = [f"part {part}" for part in rng.integers(6, size=40)]
    assert auroc_interval(scores, labels, groups, draws=50) == pytest.approx(bootstrapped(scores, labels, groups, 50))


def test_views_of_a_part_are_no_further_evidence() -> None:
    rng = np.random.default_rng(3)
    labels = np.repeat([False, True], 12)
    scores = rng.normal(size=24) + labels
    parts = [f"part {index}" for index in range(24)]
    by_part = auroc_interval(np.repeat(scores, 10), np.repeat(labels, 10), np.repeat(parts, 10).tolist())
    by_image = auroc_interval(np.repeat(scores, 10), np.repeat(labels, 10), [str(index) for index in range(240)])
    assert by_part == pytest.approx(auroc_interval(scores, labels, parts), abs=0.01)
    assert by_part is not None
    assert by_image is not None
    assert by_part[1] - by_part[0] > 2 * (by_image[1] - by_image[0])


def test_the_interval_holds_the_true_area_about_as_often_as_it_says() -> None:
    """Scores N(0, 1) and N(1, 1): the true area is Phi(1 / sqrt 2) = 0.7602."""
    rng = np.random.default_rng(0)
    labels = np.repeat([False, True], 60)
    groups = [str(index) for index in range(120)]
    intervals = [auroc_interval(rng.normal(size=120) + labels, labels, groups, draws=300) for _ in range(100)]
    held = sum(interval is not None and interval[0] <= 0.7602 <= interval[1] for interval in intervals)
    assert 88 <= held <= 100


def test_one_part_has_no_interval() -> None:
    assert auroc_interval([0.1, 0.2, 0.9, 0.8], [False, False, True, True], ["a", "b", "c", "c"]) is None
    assert auroc_interval([0.1, 0.2], [False, False], ["a", "b"]) is None
    with pytest.raises(ValueError, match="a group for each"):
        auroc_interval([0.1, 0.9], [False, True], ["a"])
