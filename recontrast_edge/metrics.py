"""Anomaly-detection metrics, exact to the last tie: AUROC, average precision, F1-max and AUPRO.

    with PixelMetrics() as pixels:
        pixels.add(anomaly_map, mask)  # (H, W) float32 and bool, one image after the other
        pixels.over_all().aupro[0.3]

Nothing is binned or sampled, apart from ``aupro_per_image``, whose definition has 200 thresholds. Every other metric is
a mean over the positives of a function of three counts: the negatives above the positive's score, the negatives at or
above it, and the positives at or above it. A ROC-like curve is raised by each positive by its share of the weight,
linearly between the first two counts (the diagonal that a tie draws). Counts add up over sorted pieces, so the pixels
of a test set that is larger than the memory are sorted piece by piece into a temporary file and counted from there.

``docs/metrics.md`` has the definitions and their sources.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recontrast_edge.errors import OutputError

AUPRO_LIMITS = (0.3, 0.05)
"""Largest false-positive rates of the published AUPRO numbers; 0.3 is meant where nothing is said."""

PER_IMAGE_THRESHOLDS = 200
"""Thresholds of ``aupro_per_image``."""

Sorted = Callable[[], NDArray[Any]]
"""Gives back a sorted array, from memory or from the temporary file."""

_DEFECT_PIXEL = np.dtype([("score", np.float32), ("region_size", np.uint32)])


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
    negatives = np.sort(values[~positive])
    above, at_or_above = _counts_above([lambda: negatives], values[positive])
    return float(np.mean(_areas(above, at_or_above, negatives.size, max_fpr=1.0)))


def auroc_interval(
    scores: ArrayLike, labels: ArrayLike, groups: Sequence[str], *, confidence: float = 0.95, draws: int = 2000
) -> tuple[float, float] | None:
    """How far ``auroc`` may be from that of other parts: percentile bootstrap over groups (Efron and Tibshirani 1993).

    Each draw takes as many groups as there are, with repetition, good and defective ones apart, and all their samples.
    Photographs of one part are alike, so an interval over images would be too narrow.

    Args:
        scores, labels: as ``auroc``.
        groups: the part that each sample shows; good and defective samples of one name are two parts.
        confidence: of the interval.
        draws: always the same ones.

    Returns:
        (low, high); None where either class has fewer than two groups.

    Raises:
        ValueError: shapes differ or a score is not finite.
    """
    try:
        values, positive = _checked(scores, labels)
    except UndefinedMetricError:
        return None
    if len(groups) != values.size:
        raise ValueError(f"expected a group for each of {values.size} samples, got {len(groups)}")
    rank = np.unique(values, return_inverse=True)[1].reshape(-1)
    members = []
    for chosen in (~positive, positive):
        group = np.unique(np.array(groups)[chosen], return_inverse=True)[1].reshape(-1)
        if group.size == 0 or group.max() == 0:
            return None
        members.append((rank[chosen], group))
    rng = np.random.default_rng(0)
    areas = np.empty(draws)
    for draw in range(draws):
        weights = []
        for ranks, group in members:
            count = int(group.max()) + 1
            times = np.bincount(rng.integers(count, size=count), minlength=count)
            weights.append(np.bincount(ranks, times[group], rank.max() + 1))
        good, defect = weights
        below = np.cumsum(good) - good
        areas[draw] = defect @ (below + good / 2) / (good.sum() * defect.sum())
    low, high = np.quantile(areas, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


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


@dataclass(frozen=True)
class PixelResult:
    """Metrics over the pixels of some images; all in 0..1.

    Attributes:
        p_auroc: AUROC over all pixels.
        p_ap: average precision over all pixels.
        aupro: by false-positive rate limit: the area under the per-region-overlap curve up to it, divided by it.
            Overlap is the mean, over the 8-connected regions of the ground truth, of the share of the region's pixels
            at or above a threshold; the false-positive rate is over the defect-free pixels of all images. A random map
            gets about half the limit.
    """

    p_auroc: float
    p_ap: float
    aupro: dict[float, float]


class _Pile:
    """Pixels in sorted runs: those that were parked, and one of those still in memory.

    Attributes:
        size: pixels in all.
    """

    def __init__(self) -> None:
        self.size = 0
        self._new: list[NDArray[Any]] = []
        self._sorted: list[NDArray[Any]] = []
        self._parked: list[Sorted] = []

    def add(self, pixels: NDArray[Any]) -> None:
        self.size += pixels.size
        self._new.append(pixels)

    def runs(self) -> list[Sorted]:
        self._sort()
        return [*self._parked, *(lambda run=run: run for run in self._sorted)]

    def park(self, write: Callable[[NDArray[Any]], Sorted]) -> None:
        self._sort()
        self._parked += [write(run) for run in self._sorted if run.size]
        self._sorted.clear()

    def _sort(self) -> None:
        if self._new:
            pixels = np.concatenate([*self._sorted, *self._new])
            self._new.clear()
            if pixels.dtype.names is None:
                pixels.sort()
            else:
                # By the score alone: comparing whole records is slow.
                pixels = pixels[np.argsort(pixels["score"])]
            self._sorted = [pixels]


@dataclass
class _Group:
    """The images that were added under one name."""

    good: _Pile = field(default_factory=_Pile)
    defect: _Pile = field(default_factory=_Pile)
    aupro_of_images: list[float] = field(default_factory=list)


class PixelMetrics:
    """Collects maps and masks, and computes their pixel and region metrics; a context manager.

    Takes 4 bytes a defect-free pixel and 8 a defect pixel: in memory up to ``memory_mib``, beyond it in an unnamed
    temporary file (``TMPDIR`` says where). The most memory used is about three times ``memory_mib``.

    Args:
        memory_mib: mebibytes, >= 1.
    """

    def __init__(self, memory_mib: int = 256) -> None:
        if memory_mib < 1:
            raise ValueError(f"memory_mib must be at least 1, got {memory_mib}")
        self._memory_bytes = memory_mib << 20
        self._held_bytes = 0
        self._groups: dict[str, _Group] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> PixelMetrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything and give the disk space back; may be called again."""
        self._groups.clear()
        self._held_bytes = 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_], group: str = "") -> None:
        """Take the pixels of one image.

        Args:
            anomaly_map: (H, W) finite float32; sizes may differ between images.
            mask: (H, W) bool, True is defect.
            group: name under which ``over`` finds it.

        Raises:
            ValueError: shapes differ, another dtype, or a value is not finite.
            OutputError: the temporary folder is full.
        """
        if anomaly_map.ndim != 2 or anomaly_map.dtype != np.float32:
            raise ValueError(f"expected an (H, W) float32 map, got {anomaly_map.dtype} of shape {anomaly_map.shape}")
        if mask.shape != anomaly_map.shape or mask.dtype != np.bool_:
            raise ValueError(f"expected a bool mask of shape {anomaly_map.shape}, got {mask.dtype} of {mask.shape}")
        if not np.isfinite(anomaly_map).all():
            raise ValueError("the map must be finite, got NaN or infinity")
        of = self._groups.setdefault(group, _Group())
        good = anomaly_map[~mask]
        defect = np.empty(mask.size - good.size, _DEFECT_PIXEL)
        if defect.size:
            defect["score"] = anomaly_map[mask]
            defect["region_size"] = _region_sizes(mask)
            if good.size:
                of.aupro_of_images.append(_aupro_of_image(good, defect))
        of.good.add(good)
        of.defect.add(defect)
        self._held_bytes += good.nbytes + defect.nbytes
        if self._held_bytes > self._memory_bytes:
            for held in self._groups.values():
                held.good.park(self._written)
                held.defect.park(self._written)
            self._held_bytes = 0

    def over_all(self, aupro_limits: Collection[float] = AUPRO_LIMITS) -> PixelResult:
        """``over`` all groups."""
        return self.over(list(self._groups), aupro_limits)

    def over(self, groups: Collection[str], aupro_limits: Collection[float] = AUPRO_LIMITS) -> PixelResult:
        """The metrics over the images of some groups; those of a name that was never added are none.

        Args:
            groups: different names.
            aupro_limits: false-positive rates, each (0, 1].

        Raises:
            UndefinedMetricError: no defect pixel, or no other.
            ValueError: a limit is out of range.
        """
        for limit in aupro_limits:
            if not 0.0 < limit <= 1.0:
                raise ValueError(f"a false-positive rate limit must lie in (0, 1], got {limit}")
        chosen = self._chosen(groups)
        n_good, n_defect = sum(group.good.size for group in chosen), sum(group.defect.size for group in chosen)
        _require_both(n_defect, n_good)
        good_runs = [run for group in chosen for run in group.good.runs()]
        defect_runs = [run for group in chosen for run in group.defect.runs()]

        curve_area = precision_sum = weight_sum = 0.0
        region_area = dict.fromkeys(aupro_limits, 0.0)
        for pixels in self._pieces(defect_runs):
            scores = np.ascontiguousarray(pixels["score"])
            weights = 1.0 / pixels["region_size"]
            above, at_or_above = _counts_above(good_runs, scores)
            _, found = _counts_above(defect_runs, scores)
            curve_area += float(np.sum(_areas(above, at_or_above, n_good, max_fpr=1.0)))
            precision_sum += float(np.sum(found / (found + at_or_above)))
            # Both sums round alike, so that a perfect score is 1.0 to the last digit.
            weight_sum += float(np.sum(weights))
            for limit in region_area:
                region_area[limit] += float(np.sum(weights * _areas(above, at_or_above, n_good, limit)))
        aupro = {limit: area / weight_sum for limit, area in region_area.items()}
        return PixelResult(curve_area / n_defect, precision_sum / n_defect, aupro)

    def aupro_per_image(self, groups: Collection[str]) -> float:
        """AUPRO of every image with a defect by itself, averaged, the way the paper's numbers are made.

        Of one image: 200 equally spaced thresholds from its map's minimum up to, without, its maximum; pixels above the
        threshold count as found; of the points whose false-positive rate, over this image alone, is below 0.3, the
        trapezoidal area of overlap against rate, rates being divided by the largest of them. Where that is 0 the
        largest overlap is taken instead, and 0 where no point is left. Images that are defective all over do not count.

        Raises:
            UndefinedMetricError: there is no image to count.
        """
        values = [value for group in self._chosen(groups) for value in group.aupro_of_images]
        if not values:
            raise UndefinedMetricError("there is no image with both a defect and a defect-free pixel")
        return float(np.mean(values))

    def _chosen(self, groups: Collection[str]) -> list[_Group]:
        return [self._groups[name] for name in groups if name in self._groups]

    def _pieces(self, runs: list[Sorted]) -> Iterator[NDArray[Any]]:
        """Parts of the runs, so small that the counts and areas of one fit into the memory as well."""
        size = max(1, self._memory_bytes // 128)
        for run in runs:
            pixels = run()
            for start in range(0, pixels.size, size):
                yield pixels[start : start + size]

    def _written(self, array: NDArray[Any]) -> Sorted:
        """Put an array at the end of the temporary file."""
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="recontrast-edge-")  # noqa: SIM115 - closed by close()
            offset = self._file.seek(0, 2)
            self._file.write(array.view(np.uint8).data)
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"{tempfile.gettempdir()}: cannot hold the test set's anomaly maps ({error.strerror or error}); set "
                "TMPDIR to a folder with more space (4 to 8 bytes a pixel)"
            ) from None
        file, dtype, size = self._file, array.dtype, array.size

        def read() -> NDArray[Any]:
            file.seek(offset)
            return np.fromfile(file, dtype, size)

        return read


def _aupro_of_image(good: NDArray[np.float32], defect: NDArray[Any]) -> float:
    """``PixelMetrics.aupro_per_image`` of one image, from its defect-free and defect pixels."""
    scores = defect["score"]
    low, high = min(good.min(), scores.min()), max(good.max(), scores.max())
    thresholds = np.linspace(low, high, PER_IMAGE_THRESHOLDS, endpoint=False)
    order = np.argsort(scores)
    missed_weight = np.append(0.0, np.cumsum(1.0 / defect["region_size"][order]))
    overlap = 1.0 - missed_weight[np.searchsorted(scores[order], thresholds, side="right")] / missed_weight[-1]
    fpr = 1.0 - np.searchsorted(np.sort(good), thresholds, side="right") / good.size
    # Rising: the thresholds rise, so both fall.
    kept = np.flatnonzero(fpr < AUPRO_LIMITS[0])[::-1]
    fpr, overlap = fpr[kept], overlap[kept]
    if kept.size == 0:
        return 0.0
    if fpr[-1] == 0.0:
        return float(overlap[-1])
    return float(np.sum(np.diff(fpr) * (overlap[1:] + overlap[:-1]) / 2) / fpr[-1])


def _region_sizes(mask: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Pixels of the 8-connected region that each defect pixel belongs to, in the order of ``map[mask]``."""
    import cv2

    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    sizes: NDArray[np.uint32] = stats[labels[mask], cv2.CC_STAT_AREA].astype(np.uint32)
    return sizes


def _counts_above(runs: list[Sorted], scores: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many of the runs' pixels lie above, and at or above, each score."""
    above, at_or_above = np.zeros(scores.size, np.int64), np.zeros(scores.size, np.int64)
    for run in runs:
        values = run()
        if values.dtype.names is not None:
            values = np.ascontiguousarray(values["score"])
        above += values.size - np.searchsorted(values, scores, side="right")
        at_or_above += values.size - np.searchsorted(values, scores, side="left")
    return above, at_or_above


def _areas(above: NDArray[np.int64], at_or_above: NDArray[np.int64], total: int, max_fpr: float) -> NDArray[np.float64]:
    """The area, up to ``max_fpr`` and divided by it, that each positive adds to the curve per unit of its weight.

    Args:
        above, at_or_above: negatives above, and at or above, each positive's score: where its ramp begins and ends.
        total: all negatives.
    """
    begin, end = above / total, at_or_above / total
    inside = np.clip(max_fpr - begin, 0.0, None)
    ramp = end - begin
    # A ramp that is cut by the limit spans at least one negative; the bound only keeps the others from dividing by 0.
    cut = inside**2 / (2 * np.maximum(ramp, 1 / total))
    areas: NDArray[np.float64] = np.where(end <= max_fpr, inside - ramp / 2, cut) / max_fpr
    return areas


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
    _require_both(positives, positive.size - positives)
    return values, positive


def _require_both(positives: int, negatives: int) -> None:
    if positives == 0:
        raise UndefinedMetricError("there is no defect in the ground truth")
    if negatives == 0:
        raise UndefinedMetricError("there is nothing good in the ground truth to compare with")
