"""How well a model does on a test set: image, pixel and region metrics, per kind of defect, and at its threshold.

    with open_engine("model.onnx") as engine:
        evaluation = evaluate(engine.infer, find_dataset(Path("DATA")).test_samples(), engine.spec)

``evaluate`` takes any function from images to ``Inference``, so that training judges a torch model by the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.binomial import clopper_pearson
from recontrast_edge.datasets import GOOD, Sample, mask_to_map, read_sample
from recontrast_edge.engines import Inference
from recontrast_edge.errors import InputError, ModelError
from recontrast_edge.metrics import UndefinedMetricError, aupro, auroc, average_precision, f1_max, pixel_auroc
from recontrast_edge.preprocess import Geometry, Image, check_image
from recontrast_edge.spec import ModelSpec

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
    """One kind of defect, or all of them, against all good images.

    Attributes:
        n_defect: images of the kind.
        i_auroc: AUROC of the image scores.
        p_auroc: AUROC over all pixels.
        aupro: area under the per-region-overlap curve up to 30 % false-positive rate, normalised.
    """

    n_defect: int
    i_auroc: Metric
    p_auroc: Metric
    aupro: Metric


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


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of ``evaluate``.

    Attributes:
        samples: the test images, in the order of the arrays.
        scores: (N,) float32 image scores.
        maps: (N, h, w) float32 anomaly maps.
        masks: (N, h, w) bool at the maps' size; False for images without a mask.
        overall: all defects against all good images.
        i_ap: average precision of the image scores, defects being the positives.
        f1_max: largest F1 over all thresholds.
        f1_max_threshold: the lowest score that counts as defect there; None where F1 is undefined.
        kinds: per kind of defect, in the samples' order.
        at_threshold: None if the spec has no threshold.
        notes: what a reader of the numbers must know, one sentence each.
    """

    spec: ModelSpec
    samples: tuple[Sample, ...]
    scores: NDArray[np.float32]
    maps: NDArray[np.float32]
    masks: NDArray[np.bool_]
    overall: KindMetrics
    i_ap: Metric
    f1_max: Metric
    f1_max_threshold: float | None
    kinds: dict[str, KindMetrics]
    at_threshold: AtThreshold | None
    notes: tuple[str, ...] = field(default=())

    @property
    def n_good(self) -> int:
        return sum(sample.is_good for sample in self.samples)

    def to_json(self) -> dict[str, Any]:
        """Everything but the maps, as one JSON-able object (``docs/artifacts.md``); paths are ``KIND/NAME``."""
        overall = {"i_ap": self.i_ap, "f1_max": self.f1_max}
        at = self.at_threshold
        return {
            "format": "recontrast-edge.evaluation",
            "version": 1,
            "class_name": self.spec.class_name,
            "backbone": self.spec.backbone,
            "n_good": self.n_good,
            **_metrics_json(self.overall, overall),
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


def _metrics_json(metrics: KindMetrics, more: dict[str, Metric] | None = None) -> dict[str, Any]:
    named = {"i_auroc": metrics.i_auroc, "p_auroc": metrics.p_auroc, "aupro": metrics.aupro, **(more or {})}
    return {
        "n_defect": metrics.n_defect,
        "metrics": {name: metric.value for name, metric in named.items()},
        "undefined": {name: metric.reason for name, metric in named.items() if metric.value is None},
    }


@dataclass(frozen=True, eq=False)
class Scored:
    """One image with what the model made of it; ``map`` is (h, w) float32, ``mask`` as ``read_sample`` gives it."""

    sample: Sample
    mask: NDArray[np.bool_] | None
    map: NDArray[np.float32]
    score: np.float32


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
    width, height = spec.input.size_wh
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
    score: Scorer, samples: Sequence[Sample], spec: ModelSpec, *, batch_size: int = 8, progress: bool = False
) -> Evaluation:
    """Judge a test set and compute all metrics.

    Masks are brought to the map's size by the nearest pixel, through the image's own ROI, resize and crop. Maps of all
    images are kept, 4 bytes a pixel: 157 MB for 600 images of 256x256; the metrics take two to three times that while
    they run.

    Args:
        score: judges a batch; ``Engine.infer``, or a torch model wrapped to return ``Inference``.
        samples: as ``Dataset.test_samples`` gives them.
        spec: the model's spec: input geometry, threshold, names.
        batch_size: images a call of ``score``.
        progress: show a bar on stderr.

    Raises:
        InputError, ModelError: as ``score_samples``; InputError also where there are no samples.
    """
    if not samples:
        raise InputError("nothing to evaluate: the test set has no images")
    width, height = spec.input.size_wh
    maps = np.empty((len(samples), height, width), np.float32)
    masks = np.zeros((len(samples), height, width), np.bool_)
    scores = np.empty(len(samples), np.float32)
    unmasked = empty = lost = 0
    for index, scored in enumerate(score_samples(score, samples, spec, batch_size=batch_size, progress=progress)):
        maps[index], scores[index] = scored.map, scored.score
        if scored.mask is None:
            unmasked += 1
            continue
        masks[index] = mask_to_map(scored.mask, spec.input)
        if not scored.sample.is_good and not masks[index].any():
            empty += not scored.mask.any()
            lost += bool(scored.mask.any())

    notes = []
    if empty:
        notes.append(f"{empty} defect image(s) have an empty mask: they count as defects by image, but not by pixel")
    if lost:
        notes.append(
            f"{lost} defect image(s) lie outside of the judged area, or are too small for the {width}x{height} map"
        )
    kinds = np.array([sample.kind for sample in samples])
    defect = kinds != GOOD
    pixels_known = unmasked == 0

    def against_good(chosen: NDArray[np.bool_]) -> KindMetrics:
        rows = np.flatnonzero(chosen | ~defect)
        i_auroc = Metric.of(lambda: auroc(scores[rows], defect[rows]))
        if not pixels_known:
            unknown = Metric(None, "the data set has no ground-truth masks")
            return KindMetrics(int(chosen.sum()), i_auroc, unknown, unknown)
        kind_maps, kind_masks = (maps, masks) if rows.size == len(samples) else (maps[rows], masks[rows])
        return KindMetrics(
            int(chosen.sum()),
            i_auroc,
            Metric.of(lambda: pixel_auroc(kind_maps, kind_masks)),
            Metric.of(lambda: aupro(kind_maps, kind_masks)),
        )

    best_f1 = Metric.of(lambda: f1_max(scores, defect)[0])
    return Evaluation(
        spec=spec,
        samples=tuple(samples),
        scores=scores,
        maps=maps,
        masks=masks,
        overall=against_good(defect),
        i_ap=Metric.of(lambda: average_precision(scores, defect)),
        f1_max=best_f1,
        f1_max_threshold=None if best_f1.value is None else f1_max(scores, defect)[1],
        kinds={kind: against_good(kinds == kind) for kind in dict.fromkeys(kinds[defect].tolist())},
        at_threshold=_at_threshold(spec, scores, defect),
        notes=tuple(notes),
    )


def _at_threshold(spec: ModelSpec, scores: NDArray[np.float32], defect: NDArray[np.bool_]) -> AtThreshold | None:
    if spec.threshold is None:
        return None
    # In double, as a verdict compares: the threshold itself may lie between two float32 numbers.
    rejected = scores.astype(np.float64) > spec.threshold.value
    return AtThreshold(spec.threshold.value, Rate.counted(rejected[~defect]), Rate.counted(~rejected[defect]))
