"""A threshold with a promise: at most a share R of good parts is rejected, with confidence C.

    calibration = calibrate(scores_of_held_out_good_images, max_false_reject_rate=0.01, confidence=0.95)

The threshold is an order statistic of the scores of n good images that training has not seen. With the k-th smallest,
x_(k), the share of future good parts above it is at most R with probability ``P[Binomial(n, 1 - R) <= k - 1]``,
exactly for continuous scores and at least that with ties, whatever the distribution (Wilks, "Determination of sample
sizes for setting tolerance limits", Annals of Mathematical Statistics 12, 1941). The smallest k that reaches C is
taken, so that no more defects pass than the promise costs. The images must be drawn as future parts will be: several
photographs of one part count as one, and a change of light or camera voids the promise.

Where a part has several photographs, the highest of their scores stands for it: a line that takes them all rejects the
part with any of them. The promise is then about parts that are photographed as often as these, or less often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recontrast_edge.binomial import cumulative
from recontrast_edge.datasets import Sample, combined_sha256, file_sha256, parts_of
from recontrast_edge.errors import CalibrationError, ModelError, UsageError
from recontrast_edge.evaluation import Scorer, score_samples
from recontrast_edge.metrics import auroc
from recontrast_edge.onnxfile import SPEC_KEY, replace_metadata
from recontrast_edge.plan import write_spec
from recontrast_edge.spec import IMAGE_DIGEST_DIGITS, ModelSpec, PartNames, Threshold

SHIFT_SIGNIFICANCE = 0.05
"""Calibration images whose scores are not shifted from the training images' at this level look like those."""

SHIFT_MIN_IMAGES = 20
"""With fewer scores on either side nothing is said about a shift."""


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it promises.

    Attributes:
        value: REJECT is ``score > value``.
        max_false_reject_rate: R, the promised bound of the share of good parts rejected.
        confidence: C, the probability, over the draw of the images, that the promise holds.
        n_good: parts it rests on; images, where each shows another part.
        rank: k of the order statistic, 1 ... n_good.
    """

    value: float
    max_false_reject_rate: float
    confidence: float
    n_good: int
    rank: int


def images_needed(max_false_reject_rate: float, confidence: float) -> int:
    """The fewest good images that can support a promise: those for which the largest score suffices.

    Raises:
        UsageError: a rate or confidence outside of (0, 1).
    """
    _check_promise(max_false_reject_rate, confidence)
    return max(1, math.ceil(math.log1p(-confidence) / math.log1p(-max_false_reject_rate) * (1 - 1e-12)))


def best_rate(n_good: int, confidence: float) -> float:
    """The smallest false-reject rate that ``n_good`` images (>= 1) can promise."""
    return -math.expm1(math.log1p(-confidence) / n_good)


def calibrate(scores: ArrayLike, max_false_reject_rate: float, confidence: float, *, of: str = "images") -> Calibration:
    """The smallest order statistic that keeps the promise.

    Args:
        scores: (n,) finite scores of independent, held-out good images or parts.
        max_false_reject_rate: R, (0, 1).
        confidence: C, (0, 1).
        of: what has the scores, for messages.

    Raises:
        UsageError: R or C out of range.
        CalibrationError: too few images for the promise, or a score that is not finite.
    """
    values = np.sort(np.asarray(scores, dtype=np.float64).reshape(-1))
    if not np.isfinite(values).all():
        raise CalibrationError("expected finite scores, got NaN or infinity; train or export the model again")
    n = values.size
    require_images(n, max_false_reject_rate, confidence, of=of)
    # P[Binomial <= k - 1] for k = 1 ... n; the largest one suffices, as n >= needed.
    reached = cumulative(n, 1.0 - max_false_reject_rate)[:-1] >= confidence
    rank = int(np.argmax(reached)) + 1 if reached.any() else n
    return Calibration(float(values[rank - 1]), max_false_reject_rate, confidence, n, rank)


def _check_promise(max_false_reject_rate: float, confidence: float) -> None:
    for name, value in (("maximum false-reject rate", max_false_reject_rate), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise UsageError(f"the {name} must lie between 0 and 1 (0.01 is one percent), got {value:g}")


def require_images(n: int, max_false_reject_rate: float, confidence: float, *, of: str = "images") -> None:
    """Refuse a promise that ``n`` good images, or parts, cannot support.

    Raises:
        UsageError: a rate or confidence outside of (0, 1).
        CalibrationError: too few images; the message says how many are needed and what these can promise.
    """
    needed = images_needed(max_false_reject_rate, confidence)
    if n >= needed:
        return
    wish = f"a false-reject rate of at most {percent(max_false_reject_rate)} with {percent(confidence)} confidence"
    if n == 0:
        raise CalibrationError(f"{wish} needs {needed} good {of}, got none")
    best = best_rate(n, confidence)
    # Rounded up to what a user would type, so that the suggestion is accepted.
    unit = 10.0 ** (math.floor(math.log10(best)) - 2)
    suggestion = math.ceil(best / unit) * unit
    advice = f", or ask for --max-false-reject-rate {suggestion:.6g}" if suggestion < 1.0 else ""
    raise CalibrationError(
        f"{wish} needs {needed} good {of}, got {n}. {n} {of} can promise {percent(best)} at best. "
        f"Collect {needed - n} more{advice}"
    )


def percent(share: float) -> str:
    """A share in percent, with three significant digits and without rounding 99.95 to 100."""
    return f"{100 * share:.3g} %" if share < 0.99 else f"{100 * share:.10g} %"


def promise_in_words(threshold: Threshold) -> tuple[str, str] | None:
    """What a calibrated threshold promises, and under which conditions, a sentence each; None for one set by hand."""
    if threshold.max_false_reject_rate is None or threshold.confidence is None:
        return None
    drawn = f"{threshold.n_good} images" if threshold.n_images is None else f"{threshold.n_good} parts"
    parts = "the images show different parts" if threshold.n_images is None else "no part is photographed more often"
    return (
        f"Promise: of future good parts at most {percent(threshold.max_false_reject_rate)} will be rejected. Drawing "
        f"{drawn} like this and calibrating gives a threshold that keeps it in at least "
        f"{percent(threshold.confidence)} of all cases.",
        f"It holds for parts, light and camera like those in these images, if {parts} and none was used for training.",
    )


def evidence_in_words(threshold: Threshold) -> str:
    """What a calibrated threshold rests on: ``37 good parts (185 images) of tiles``."""
    what = "good images" if threshold.n_images is None else f"good parts ({threshold.n_images} images)"
    return f"{threshold.n_good} {what} of {threshold.data}"


@dataclass(frozen=True)
class CalibrationImages:
    """Held-out good images, each content once.

    Attributes:
        samples: in the order given.
        parts: the part that each of them shows.
        names: what told the parts apart; None: the data did, or nothing.
        n_copies: files left out because another one has the same bytes.
        n_trained_on: files left out because the model was trained on them, or on others of the same part.
        sha256: digest over the files' digests, ``Threshold.data_sha256``.
    """

    samples: tuple[Sample, ...]
    parts: tuple[str, ...]
    names: PartNames | None
    n_copies: int
    n_trained_on: int
    sha256: str

    @property
    def n_parts(self) -> int:
        return len(set(self.parts))

    @property
    def of(self) -> str:
        """What is counted, for messages."""
        return "parts" if self.n_parts < len(self.samples) else "images"


def held_out(samples: Sequence[Sample], spec: ModelSpec, names: PartNames | None = None) -> CalibrationImages:
    """Leave out copies and parts that the model was trained on, neither of which are evidence.

    Args:
        samples: good images.
        spec: of the model.
        names: how the images' names tell their part; None: as the data set says, and else each image shows another.

    Raises:
        CalibrationError: nothing is left: these are the training images.
        InputError: a file cannot be read.
        UsageError: ``names`` do not fit the images.
    """
    parts = parts_of(samples, names)
    digests = [file_sha256(sample.path) for sample in samples]
    trained_on = set(spec.training.image_digests)
    known = {part for part, digest in zip(parts, digests, strict=True) if digest[:IMAGE_DIGEST_DIGITS] in trained_on}
    new: dict[str, tuple[Sample, str]] = {}
    copies = 0
    for digest, sample, part in zip(digests, samples, parts, strict=True):
        if part not in known:
            copies += digest in new
            new.setdefault(digest, (sample, part))
    # Specs of before ``image_digests`` know only all of them together.
    if combined_sha256(digests) == spec.training.data_sha256 or not new:
        raise CalibrationError(
            "these are the images the model was trained on, whose scores are lower than those of new parts; "
            "calibrate on good images that were held out"
        )
    left, parts_left = zip(*new.values(), strict=True)
    return CalibrationImages(left, parts_left, names, copies, len(samples) - len(new) - copies, combined_sha256(new))


@dataclass(frozen=True)
class ScoreShift:
    """How the calibration images' scores lie to those of training images (Mann-Whitney test).

    Attributes:
        share: pairs of a calibration and a training image in which the former scores higher, ties counting half;
            0.5 where the scores are alike.
        p_value: probability of such a share, or a larger one, if the images were training images; normal
            approximation.
    """

    share: float
    p_value: float

    @property
    def like_training(self) -> bool:
        """Whether nothing tells these images from training images."""
        return self.p_value > SHIFT_SIGNIFICANCE


def score_shift(scores: ArrayLike, training_scores: ArrayLike) -> ScoreShift | None:
    """Compare scores with those of training images; None where either are too few to tell.

    Args:
        scores: (n,) finite scores of the calibration images.
        training_scores: (m,) finite, ``Training.good_scores``.
    """
    new, known = np.asarray(scores, np.float64), np.asarray(training_scores, np.float64)
    n, m = new.size, known.size
    if min(n, m) < SHIFT_MIN_IMAGES:
        return None
    share = auroc(np.concatenate([known, new]), np.arange(n + m) >= m)
    deviation = math.sqrt((n + m + 1) / (12 * n * m))
    return ScoreShift(share, 0.5 * math.erfc((share - 0.5) / deviation / math.sqrt(2)))


@dataclass(frozen=True, eq=False)
class CalibratedEngine:
    """What ``calibrate_engine`` found.

    Attributes:
        calibration: the order statistic.
        threshold: for the spec.
        shift: None where the spec has no scores of training images.
        images: that the threshold rests on.
        scores: (n,) float64, in their order.
    """

    calibration: Calibration
    threshold: Threshold
    shift: ScoreShift | None
    images: CalibrationImages
    scores: NDArray[np.float64]

    def to_json(self) -> dict[str, Any]:
        """As one JSON-able object (``docs/artifacts.md``)."""
        return {
            "format": "recontrast-edge.calibration",
            "version": 1,
            "threshold": self.threshold.model_dump(mode="json"),
            "rank": self.calibration.rank,
            "score_shift": None if self.shift is None else {"share": self.shift.share, "p_value": self.shift.p_value},
            "images": [
                {
                    "image": f"{sample.kind}/{sample.path.name}",
                    "kind": sample.kind,
                    "part": part if self.threshold.n_images is not None else None,
                    "score": float(score),
                }
                for sample, part, score in zip(self.images.samples, self.images.parts, self.scores, strict=True)
            ],
        }


def calibrate_engine(
    score: Scorer,
    images: CalibrationImages,
    spec: ModelSpec,
    *,
    engine_sha256: str,
    data_name: str,
    max_false_reject_rate: float,
    confidence: float,
    progress: bool = False,
) -> CalibratedEngine:
    """Score the images and derive the threshold.

    Args:
        score: judges a batch; ``Engine.infer``.
        images: from ``held_out``.
        engine_sha256: ``Engine.sha256``; the threshold is bound to it.
        data_name: for the spec.

    Raises:
        CalibrationError: too few images; told before any is judged.
        InputError, ModelError: as ``evaluation.score_samples``.
    """
    require_images(images.n_parts, max_false_reject_rate, confidence, of=images.of)
    scored = score_samples(score, images.samples, spec, progress=progress)
    scores = np.array([each.score for each in scored], np.float64)
    highest: dict[str, float] = {}
    for part, score_of_image in zip(images.parts, scores.tolist(), strict=True):
        highest[part] = max(highest.get(part, -math.inf), score_of_image)
    calibration = calibrate(list(highest.values()), max_false_reject_rate, confidence, of=images.of)
    threshold = Threshold(
        value=calibration.value,
        max_false_reject_rate=max_false_reject_rate,
        confidence=confidence,
        n_good=calibration.n_good,
        n_images=len(scores) if calibration.n_good < len(scores) else None,
        parts=images.names,
        data=data_name,
        data_sha256=images.sha256,
        engine_sha256=engine_sha256,
        method="order-statistic",
    )
    shift = score_shift(scores, spec.training.good_scores)
    return CalibratedEngine(calibration, threshold, shift, images, scores)


def write_threshold(path: Path, spec: ModelSpec, threshold: Threshold) -> None:
    """Put a threshold into a model file, atomically; graph and weights stay the same bytes.

    This is the one place that knows where each kind of model file keeps it.

    Args:
        path: the model file.
        spec: the spec it holds now.

    Raises:
        ModelError: a kind of file that holds no threshold, or a damaged one.
        OutputError: the file cannot be written.
    """
    changed = spec.with_threshold(threshold)
    if path.suffix == ".onnx":
        replace_metadata(path, {SPEC_KEY: changed.dumps()})
    elif path.suffix == ".plan":
        write_spec(path, changed)
    else:
        raise ModelError(
            f"{path}: expected an .onnx or .plan file to write the threshold into, got {path.suffix or path.name!r}"
        )
