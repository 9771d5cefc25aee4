"""Anomaly-detection metrics, exact to the last tie: AUROC, average precision, F1-max and AUPRO.

    aupro(maps, masks, max_fpr=0.3)  # (N, H, W) float32 and bool -> 0..1

Nothing is binned or sampled. The area under a ROC-like curve is a sum over the positives alone: a positive of weight
w raises the curve by w, linearly between the share of negatives above its score and the share at or above it (the
diagonal that a tie draws). So pixel metrics sort the negatives once and hold nothing else of their size, and AUROC,
pixel AUROC and AUPRO are the same few lines with other weights and limits.

Fawcett, "An introduction to ROC analysis", Pattern Recognition Letters 27 (2006). Bergmann et al., "The MVTec Anomaly
Detection Dataset", IJCV 129 (2021), section 5.2 (per-region overlap, integrated to 30 % false-positive rate).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

AUPRO_MAX_FPR = 0.3
"""Integration limit of the published AUPRO numbers."""


class UndefinedMetricError(ValueError):
    """The metric has no value for this data, for example an AUROC without a good sample; the message is the reason."""


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve; a tie between a good and a defect sample counts one half.

    Args:
        scores: (N,) finite real numbers, higher is more anomalous.
        labels: (N,) bool, True is defect.

    Returns:
        0..1; 0.5 is chance.

    Raises:
        UndefinedMetricError: one of the two classes is missing.
        ValueError: shapes differ or a score is not finite.
    """
    values, positive = _checked(scores, labels)
    positives, negatives = values[positive], values[~positive]
    return _area(np.sort(negatives), positives, np.ones(positives.size), max_fpr=1.0)


def roc_curve(
    scores: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The ROC curve, one point a distinct score.

    Args and errors as ``auroc``.

    Returns:
        (false-positive rates, true-positive rates, thresholds), rates rising from 0 to 1; a sample counts as
        positive where ``score >= threshold``, and the first threshold is infinite.
    """
    values, positive = _checked(scores, labels)
    thresholds, true_positives, false_positives = _counts(values, positive)
    tpr = np.append(0.0, true_positives / true_positives[-1])
    fpr = np.append(0.0, false_positives / false_positives[-1])
    return fpr, tpr, np.append(np.inf, thresholds)


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Average precision: the sum over the distinct scores of precision times gain in recall, without interpolation.

    Args and errors as ``auroc``.
    """
    values, positive = _checked(scores, labels)
    _, true_positives, false_positives = _counts(values, positive)
    precision = true_positives / (true_positives + false_positives)
    gain = np.diff(true_positives, prepend=0) / true_positives[-1]
    return float(np.sum(precision * gain))


def f1_max(scores: ArrayLike, labels: ArrayLike) -> tuple[float, float]:
    """The largest F1 over all thresholds, chosen with knowledge of the answers: an upper bound, no working point.

    Args and errors as ``auroc``.

    Returns:
        (F1, the highest threshold that reaches it, where ``score >= threshold`` is positive).
    """
    values, positive = _checked(scores, labels)
    thresholds, true_positives, false_positives = _counts(values, positive)
    f1 = 2 * true_positives / (true_positives + false_positives + true_positives[-1])
    best = int(np.argmax(f1))
    return float(f1[best]), float(thresholds[best])


def pixel_auroc(maps: NDArray[np.float32], masks: NDArray[np.bool_]) -> float:
    """AUROC over all pixels of all images.

    Args:
        maps: (N, H, W) finite float32 anomaly maps.
        masks: (N, H, W) bool, True is defect.

    Raises:
        UndefinedMetricError: no defect pixel, or no other.
        ValueError: shapes differ or a value is not finite.
    """
    return auroc(maps.reshape(-1), masks.reshape(-1))


def aupro(maps: NDArray[np.float32], masks: NDArray[np.bool_], max_fpr: float = AUPRO_MAX_FPR) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate, divided by that rate.

    Overlap is the mean, over the 8-connected regions of the ground truth, of the share of the region's pixels at
    or above a threshold; the false-positive rate is over the defect-free pixels of all images. Every distinct value is
    a threshold, points are joined by straight lines, and the line that crosses ``max_fpr`` is cut exactly there.

    Args:
        maps: (N, H, W) finite float32 anomaly maps.
        masks: (N, H, W) bool, True is defect.
        max_fpr: (0, 1].

    Returns:
        0..1; a random map gets about ``max_fpr / 2``.

    Raises:
        UndefinedMetricError: no defect region, or no defect-free pixel.
        ValueError: shapes differ, a value is not finite, or ``max_fpr`` is out of range.
    """
    if not 0.0 < max_fpr <= 1.0:
        raise ValueError(f"max_fpr must lie in (0, 1], got {max_fpr}")
    if maps.ndim != 3:
        raise ValueError(f"expected (N, H, W) maps, got shape {maps.shape}")
    values, defect = _checked(maps, masks)
    return _area(np.sort(values[~defect]), values[defect], _region_weights(masks), max_fpr)


def _region_weights(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Weight of each defect pixel, in the order of ``maps[masks]``: 1 / its region's size."""
    import cv2

    weights: list[NDArray[np.float64]] = []
    for mask in masks:
        if not mask.any():
            continue
        _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        weights.append(1.0 / stats[labels[mask], cv2.CC_STAT_AREA])
    return np.concatenate(weights)


def _area(
    sorted_negatives: NDArray[np.floating],
    positives: NDArray[np.floating],
    weights: NDArray[np.float64],
    max_fpr: float,
) -> float:
    """Normalised area, up to ``max_fpr``, under the curve that each positive raises by its share of the weights."""
    order = np.argsort(positives)
    positives, weights = positives[order], weights[order]
    total = sorted_negatives.size
    # Shares of the negatives above, and at or above, each positive's score: where its ramp begins and ends.
    above = (total - np.searchsorted(sorted_negatives, positives, side="right")) / total
    at_or_above = (total - np.searchsorted(sorted_negatives, positives, side="left")) / total
    inside = np.clip(max_fpr - above, 0.0, None)
    ramp = at_or_above - above
    # A ramp that is cut by the limit spans at least one negative; the bound only keeps the others from dividing by 0.
    cut = inside**2 / (2 * np.maximum(ramp, 1 / total))
    area = np.where(at_or_above <= max_fpr, inside - ramp / 2, cut)
    # Both sums round alike, so that a perfect score is 1.0 to the last digit.
    return float(np.sum(weights * (area / max_fpr)) / np.sum(weights))


def _counts(
    values: NDArray[np.floating], positive: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Distinct scores, falling, and the true and false positives at or above each."""
    order = np.argsort(values)[::-1]
    values, positive = values[order], positive[order]
    last = np.append(np.flatnonzero(np.diff(values)), values.size - 1)
    true_positives = np.cumsum(positive, dtype=np.int64)[last]
    return values[last].astype(np.float64), true_positives, last + 1 - true_positives


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    values = np.asarray(scores)
    positive = np.asarray(labels)
    if values.shape != positive.shape:
        raise ValueError(f"scores and labels must have one shape, got {values.shape} and {positive.shape}")
    if not np.issubdtype(values.dtype, np.floating):
        values = values.astype(np.float64)
    values = values.reshape(-1)
    positive = positive.reshape(-1).astype(np.bool_, copy=False)
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite, got NaN or infinity")
    positives = int(np.count_nonzero(positive))
    if positives == 0:
        raise UndefinedMetricError("there is no defect in the ground truth")
    if positives == positive.size:
        raise UndefinedMetricError("there is nothing good in the ground truth to compare with")
    return values, positive
