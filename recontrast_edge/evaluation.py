"""How well a model does on a test set: image, pixel and region metrics, per kind of defect, and at its threshold.

    with open_engine("model.onnx") as engine:
        evaluation = evaluate(engine.infer, find_dataset(Path("DATA")).test_samples(), engine.spec)

``evaluate`` takes any function from images to ``Inference``, so that training judges a torch model by the same lines.
Maps are measured as they come and not kept, apart from those of the worst mistakes, so a test set may be of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from heapq import heappush, heappushpop
from itertools import islice
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from recontrast_edge.binomial import clopper_pearson
from recontrast_edge.datasets import GOOD, Sample, mask_to_map, parts_of, read_sample
from recontrast_edge.engines import Inference
from recontrast_edge.errors import InputError, ModelError, UsageError
from recontrast_edge.metrics import (
    AUPRO_LIMITS,
    PixelMetrics,
    UndefinedMetricError,
    auroc,
    auroc_interval,
    average_precision,
    f1_max,
)
from recontrast_edge.preprocess import Geometry, Image, check_image
from recontrast_edge.spec import ModelSpec, PartNames, Threshold

Resolution = Literal["map", "source"]
"""Where maps and masks are compared: at the map's size, or at the mask's own, to which the map is enlarged."""

Scorer = Callable[[Sequence[Image]], Inference]
"""Judges a batch of images; ``Engine.infer`` is one."""

INTERVAL_CONFIDENCE = 0.95
"""Confidence of the intervals around false rejects and misses."""

T = TypeVar("T")


@dataclass(frozen=True)
class Metric:
    """A number in 0..1, or None and the reason why there is none."""

    value: float | None
    reason: str | None = None

    @classmethod
    def of(cls, compute: Callable[[], float]) -> Metric:
        try:
            return cls(compute())
        except UndefinedMetricError as error:
            return cls(None, str(error))


@dataclass(frozen=True)
class KindMetrics:
    """One kind of defect, or all of them, against all good images; ``docs/metrics.md`` defines the metrics.

    Attributes:
        n_defect: images of the kind.
        i_auroc: AUROC of the image scores.
        i_ap: average precision of the image scores, defects being the positives.
        f1_max: largest F1 of the image scores over all thresholds.
        p_auroc: AUROC over all pixels.
        p_ap: average precision over all pixels.
        aupro: area under the per-region-overlap curve up to 30 % false-positive rate, normalised.
        aupro_5: the same up to 5 %.
        aupro_per_image: the paper's: each image by itself, 200 thresholds, averaged.
    """

    n_defect: int
    i_auroc: Metric
    i_ap: Metric
    f1_max: Metric
    p_auroc: Metric
    p_ap: Metric
    aupro: Metric
    aupro_5: Metric
    aupro_per_image: Metric

    def named(self) -> dict[str, Metric]:
        """The metrics by their names in files."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "n_defect"}


@dataclass(frozen=True)
class Rate:
    """A counted share with its exact (Clopper-Pearson) 95 % confidence interval."""

    count: int
    of: int
    low: float
    high: float

    @classmethod
    def counted(cls, events: NDArray[np.bool_]) -> Rate | None:
        """None where nothing could be counted."""
        if events.size == 0:
            return None
        count = int(np.count_nonzero(events))
        return cls(count, events.size, *clopper_pearson(count, events.size, INTERVAL_CONFIDENCE))

    def to_json(self) -> dict[str, Any]:
        interval = [self.low, self.high]
        return {"count": self.count, "of": self.of, "rate": self.count / self.of, "interval_95": interval}


@dataclass(frozen=True)
class AtThreshold:
    """What the spec's threshold does to this test set (REJECT is ``score > value``).

    Attributes:
        false_rejects: good images rejected; None without good images.
        misses: defect images passed; None without defect images.
    """

    value: float
    false_rejects: Rate | None
    misses: Rate | None


@dataclass(frozen=True)
class PartInterval:
    """Where the I-AUROC of other parts of the kind may lie, with 95 % confidence (``metrics.auroc_interval``).

    Attributes:
        low, high: of the interval, 0..1.
        n_good, n_defect: parts that the good and the defect images show.
    """

    low: float
    high: float
    n_good: int
    n_defect: int


@dataclass(frozen=True, eq=False)
class Scored:
    """One image with what the model made of it; ``map`` is (h, w) float32, ``mask`` as ``read_sample`` gives it."""

    sample: Sample
    mask: NDArray[np.bool_] | None
    map: NDArray[np.float32]
    score: np.float32


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of ``evaluate``.

    Attributes:
        samples: the test images, in the order of the scores.
        scores: (N,) float32 image scores.
        resolution: where maps and masks were compared.
        overall: all defects against all good images.
        i_auroc_interval: of ``overall``; None with fewer than two parts of either.
        f1_max_threshold: the lowest score that counts as a defect at ``overall.f1_max``; None where that is undefined.
        kinds: per kind of defect, in the samples' order.
        at_threshold: None if the spec has no threshold.
        worst_good: the highest-scoring good images, highest first.
        worst_defects: the lowest-scoring defect images, lowest first.
        notes: what a reader of the numbers must know, one sentence each.
    """

    spec: ModelSpec
    samples: tuple[Sample, ...]
    scores: NDArray[np.float32]
    resolution: Resolution
    overall: KindMetrics
    i_auroc_interval: PartInterval | None
    f1_max_threshold: float | None
    kinds: dict[str, KindMetrics]
    at_threshold: AtThreshold | None
    worst_good: tuple[Scored, ...]
    worst_defects: tuple[Scored, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def n_good(self) -> int:
        return sum(sample.is_good for sample in self.samples)

    @property
    def is_defect(self) -> NDArray[np.bool_]:
        """(N,) bool."""
        return np.array([not sample.is_good for sample in self.samples])

    def to_json(self) -> dict[str, Any]:
        """Everything but the maps, as one JSON-able object (``docs/artifacts.md``); paths are ``KIND/NAME``."""
        at = self.at_threshold
        return {
            "format": "recontrast-edge.evaluation",
            "version": 1,
            "class_name": self.spec.class_name,
            "backbone": self.spec.backbone,
            "resolution": self.resolution,
            "n_good": self.n_good,
            **_metrics_json(self.overall),
            "i_auroc_interval_95": None if self.i_auroc_interval is None else asdict(self.i_auroc_interval),
            "f1_max_threshold": self.f1_max_threshold,
            "kinds": {kind: _metrics_json(metrics) for kind, metrics in self.kinds.items()},
            "at_threshold": None
            if at is None
            else {
                "value": at.value,
                "false_rejects": at.false_rejects and at.false_rejects.to_json(),
                "misses": at.misses and at.misses.to_json(),
            },
            "images": [
                {"image": f"{sample.kind}/{sample.path.name}", "kind": sample.kind, "score": float(score)}
                for sample, score in zip(self.samples, self.scores, strict=True)
            ],
            "notes": list(self.notes),
        }


def _metrics_json(metrics: KindMetrics) -> dict[str, Any]:
    named = metrics.named()
    return {
        "n_defect": metrics.n_defect,
        "metrics": {name: metric.value for name, metric in named.items()},
        "undefined": {name: metric.reason for name, metric in named.items() if metric.value is None},
    }


def score_samples(
    score: Scorer, samples: Sequence[Sample], spec: ModelSpec, *, batch_size: int = 8, progress: bool = False
) -> Iterator[Scored]:
    """Read and judge the samples, in order.

    Args:
        score: judges a batch.
        batch_size: images a call of ``score``.
        progress: show a bar on stderr.

    Raises:
        InputError: an image or mask that cannot be used, by name.
        ModelError: a score or map that is not finite, or maps of a size other than the spec's.
    """
    width, height = spec.input.map_wh
    for batch in _batches(_tracked(samples, progress), batch_size):
        loaded = [_load(sample, spec) for sample in batch]
        result = score([image for image, _ in loaded])
        if result.maps.shape != (len(batch), height, width) or result.scores.shape != (len(batch),):
            raise ModelError(
                f"expected {len(batch)} maps of {width}x{height} and as many scores from the model, got shapes "
                f"{result.maps.shape} and {result.scores.shape}; engine and spec do not belong together"
            )
        for index, (sample, (_, mask)) in enumerate(zip(batch, loaded, strict=True)):
            if not (np.isfinite(result.scores[index]) and np.isfinite(result.maps[index]).all()):
                raise ModelError(
                    f"{sample.path}: the model's score or map is not finite; train or export the model again"
                )
            yield Scored(sample, mask, result.maps[index], result.scores[index])


def _load(sample: Sample, spec: ModelSpec) -> tuple[Image, NDArray[np.bool_] | None]:
    image, mask = read_sample(sample)
    try:
        check_image(image)
        Geometry.of(spec.input, image)
    except InputError as error:
        raise InputError(f"{sample.path}: {error}") from None
    return image, mask


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _tracked(samples: Sequence[Sample], progress: bool) -> Iterable[Sample]:
    if not progress:
        return samples
    from rich.console import Console
    from rich.progress import track

    return track(samples, description="Judging", console=Console(stderr=True), transient=True)


def evaluate(
    score: Scorer,
    samples: Sequence[Sample],
    spec: ModelSpec,
    *,
    resolution: Resolution = "map",
    n_worst: int = 6,
    batch_size: int = 8,
    part_names: PartNames | None = None,
    progress: bool = False,
) -> Evaluation:
    """Judge a test set and compute all metrics.

    Masks are brought to the map's size by the nearest pixel, through the image's own ROI, resize and crop. At
    ``resolution="source"`` the map is enlarged bilinearly to the judged rectangle of the image instead, and compared
    with that part of the mask.

    Args:
        score: judges a batch; ``Engine.infer``, or a torch model wrapped to return ``Inference``.
        samples: as ``Dataset.test_samples`` gives them.
        spec: the model's spec: input geometry, threshold, names.
        resolution: where maps and masks are compared.
        n_worst: how many images to keep for ``worst_good`` and ``worst_defects``, >= 1.
        batch_size: images a call of ``score``.
        part_names: how file names tell which part they show; None: as for the spec's threshold, where that fits the
            names, else as the data set says, else each image shows a part of its own.
        progress: show a bar on stderr.

    Raises:
        UsageError: ``part_names`` do not fit the names.
        InputError, ModelError: as ``score_samples``; InputError also where there are no samples.
        OutputError: the temporary folder has no room for the maps.
    """
    if not samples:
        raise InputError("nothing to evaluate: the test set has no images")
    parts = parts_of(samples, part_names) if part_names is not None else _parts(samples, spec.threshold)
    scores = np.empty(len(samples), np.float32)
    kinds = np.array([sample.kind for sample in samples])
    defect = kinds != GOOD
    unmasked = empty = lost = 0
    worst_good, worst_defects = _Worst(n_worst), _Worst(n_worst)
    with PixelMetrics() as pixels:
        for index, scored in enumerate(score_samples(score, samples, spec, batch_size=batch_size, progress=progress)):
            scores[index] = scored.score
            if scored.sample.is_good:
                worst_good.offer(float(scored.score), index, scored)
            else:
                worst_defects.offer(-float(scored.score), index, scored)
            if scored.mask is None:
                unmasked += 1
                continue
            anomaly_map, mask = _aligned(scored.map, scored.mask, spec, resolution)
            pixels.add(anomaly_map, mask, scored.sample.kind)
            if defect[index] and not mask.any():
                empty += not scored.mask.any()
                lost += bool(scored.mask.any())

        def against_good(*chosen: str) -> KindMetrics:
            return _against_good(pixels if unmasked == 0 else None, scores, kinds, chosen)

        kind_names = list(dict.fromkeys(kinds[defect].tolist()))
        overall = against_good(*kind_names)
        by_kind = {kind: against_good(kind) for kind in kind_names}

    at_threshold = _at_threshold(spec, scores, defect)
    notes = []
    if empty:
        notes.append(f"{empty} defect image(s) have an empty mask: they count as defects by image, but not by pixel")
    if lost:
        width, height = spec.input.map_wh
        small = f", or are too small for the {width}x{height} map" if resolution == "map" else ""
        notes.append(f"{lost} defect image(s) lie outside of the judged area{small}")
    if note := _broken_promise(spec.threshold, parts, scores, defect):
        notes.append(note)
    return Evaluation(
        spec=spec,
        samples=tuple(samples),
        scores=scores,
        resolution=resolution,
        overall=overall,
        i_auroc_interval=_interval(scores, defect, parts),
        f1_max_threshold=None if overall.f1_max.value is None else f1_max(scores, defect)[1],
        kinds=by_kind,
        at_threshold=at_threshold,
        worst_good=worst_good.images(),
        worst_defects=worst_defects.images(),
        notes=tuple(notes),
    )


class _Worst:
    """The images with the largest keys of those offered; the first one wins a tie."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[float, int, Scored]] = []

    def offer(self, key: float, index: int, scored: Scored) -> None:
        if len(self._heap) == self._size and (key, -index) < self._heap[0][:2]:
            return
        # A copy, so that the rest of the batch is not kept with it.
        entry = (key, -index, replace(scored, map=scored.map.copy()))
        if len(self._heap) < self._size:
            heappush(self._heap, entry)
        else:
            heappushpop(self._heap, entry)

    def images(self) -> tuple[Scored, ...]:
        return tuple(scored for _, _, scored in sorted(self._heap, key=lambda entry: entry[:2], reverse=True))


def _aligned(
    anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_], spec: ModelSpec, resolution: Resolution
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Map and mask of one image at one size."""
    if resolution == "map":
        return anomaly_map, mask_to_map(mask, spec.input)
    height, width = anomaly_map.shape
    left, top, across, down = Geometry.of(spec.input, mask.view(np.uint8)).to_source(0, 0, width, height)
    enlarged = cv2.resize(anomaly_map, (across, down), interpolation=cv2.INTER_LINEAR)
    return np.asarray(enlarged, np.float32), mask[top : top + down, left : left + across]


def _against_good(
    pixels: PixelMetrics | None, scores: NDArray[np.float32], kinds: NDArray[np.str_], chosen: Sequence[str]
) -> KindMetrics:
    """Metrics of the chosen kinds; without pixels, of the image scores alone."""
    is_chosen = np.isin(kinds, chosen)
    rows = np.flatnonzero(is_chosen | (kinds == GOOD))
    row_scores, row_labels = scores[rows], is_chosen[rows]
    if pixels is None:
        unknown = Metric(None, "the data set has no ground-truth masks")
        p_auroc = p_ap = aupro = aupro_5 = per_image = unknown
    else:
        groups = [GOOD, *chosen]
        try:
            result = pixels.over(groups)
        except UndefinedMetricError as error:
            p_auroc = p_ap = aupro = aupro_5 = Metric(None, str(error))
        else:
            p_auroc, p_ap = Metric(result.p_auroc), Metric(result.p_ap)
            aupro, aupro_5 = (Metric(result.aupro[limit]) for limit in AUPRO_LIMITS)
        per_image = Metric.of(lambda: pixels.aupro_per_image(groups))
    return KindMetrics(
        n_defect=int(is_chosen.sum()),
        i_auroc=Metric.of(lambda: auroc(row_scores, row_labels)),
        i_ap=Metric.of(lambda: average_precision(row_scores, row_labels)),
        f1_max=Metric.of(lambda: f1_max(row_scores, row_labels)[0]),
        p_auroc=p_auroc,
        p_ap=p_ap,
        aupro=aupro,
        aupro_5=aupro_5,
        aupro_per_image=per_image,
    )


def _at_threshold(spec: ModelSpec, scores: NDArray[np.float32], defect: NDArray[np.bool_]) -> AtThreshold | None:
    if spec.threshold is None:
        return None
    # In double, as a verdict compares: the threshold itself may lie between two float32 numbers.
    rejected = scores.astype(np.float64) > spec.threshold.value
    return AtThreshold(spec.threshold.value, Rate.counted(rejected[~defect]), Rate.counted(~rejected[defect]))


def _parts(samples: Sequence[Sample], threshold: Threshold | None) -> list[str]:
    """The part that each image shows, told as for the threshold where that fits the names."""
    try:
        return parts_of(samples, None if threshold is None else threshold.parts)
    except UsageError:
        return parts_of(samples, None)


def _interval(scores: NDArray[np.float32], defect: NDArray[np.bool_], parts: Sequence[str]) -> PartInterval | None:
    interval = auroc_interval(scores, defect, parts, confidence=INTERVAL_CONFIDENCE)
    if interval is None:
        return None
    counts = (len({part for part, of in zip(parts, defect, strict=True) if of == kind}) for kind in (False, True))
    return PartInterval(*interval, *counts)


def _broken_promise(
    threshold: Threshold | None, parts: Sequence[str], scores: NDArray[np.float32], defect: NDArray[np.bool_]
) -> str | None:
    """A sentence where more good parts were rejected than the threshold's promise leaves to chance."""
    if threshold is None or threshold.max_false_reject_rate is None or defect.all():
        return None
    good = [(part, float(score)) for part, score, of in zip(parts, scores, defect, strict=True) if not of]
    # A part is rejected with any of its images, as in the promise.
    rejected: dict[str, bool] = {}
    for part, score in good:
        rejected[part] = rejected.get(part, False) or score > threshold.value
    seen, promised = Rate.counted(np.array(list(rejected.values()))), threshold.max_false_reject_rate
    if seen is None or seen.low <= promised:
        return None
    return (
        f"the threshold promises that at most {100 * promised:.3g} % of good parts are rejected, but here "
        f"{seen.count} of {seen.of} were, more than chance explains: these parts, or light and camera, differ from "
        f"those it was calibrated on ({threshold.data}), or those were images of parts the model was trained on"
    )
