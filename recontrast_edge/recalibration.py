"""A threshold for an engine in another precision: the same good images and the same promise, from its own scores.

threshold = recalibrate(engine.infer, samples, model_spec, engine_sha256=engine.sha256)
"""

from __future__ import annotations

from collections.abc import Sequence

from recontrast_edge.calibration import CalibrationImages, calibrate_engine, evidence_in_words, held_out
from recontrast_edge.datasets import Sample
from recontrast_edge.errors import CalibrationError, UsageError
from recontrast_edge.evaluation import Scorer
from recontrast_edge.spec import ModelSpec, Threshold


def recalibrate(score: Scorer, samples: Sequence[Sample], spec: ModelSpec, *, engine_sha256: str) -> Threshold:
    """Score the images with the new engine, and take its threshold from them.

    Args:
        score: judges a batch; ``Engine.infer`` of the new engine.
        samples: the images that the threshold of ``spec`` was calibrated on.
        spec: of the model that the engine was made from, with its threshold.
        engine_sha256: ``Engine.sha256`` of the new engine.

    Raises:
        UsageError, CalibrationError: as ``require_calibrated_on``.
        InputError, ModelError: as ``evaluation.score_samples``.
    """
    images, before = require_calibrated_on(samples, spec)
    assert before.max_false_reject_rate is not None
    assert before.confidence is not None
    return calibrate_engine(
        score,
        images,
        spec,
        engine_sha256=engine_sha256,
        data_name=before.data,
        max_false_reject_rate=before.max_false_reject_rate,
        confidence=before.confidence,
    ).threshold


def require_calibrated_on(samples: Sequence[Sample], spec: ModelSpec) -> tuple[CalibrationImages, Threshold]:
    """The images, each content once, and the threshold of ``spec``, which must be calibrated on just these.

    Raises:
        UsageError: the model has no threshold, or one without a promise.
        CalibrationError: these are other images.
        InputError: a file cannot be read.
    """
    before = spec.threshold
    if before is None or before.max_false_reject_rate is None or before.confidence is None:
        raise UsageError(
            "the model has no calibrated threshold whose promise could be kept; run `recontrast-edge calibrate` with "
            "it first, or with the new engine later"
        )
    images = held_out(samples, spec, before.parts)
    if images.sha256 != before.data_sha256:
        raise CalibrationError(
            f"these are not the {evidence_in_words(before)} that the model's threshold was calibrated on; give those, "
            "or calibrate the new engine afterwards with `recontrast-edge calibrate`"
        )
    if images.n_parts != before.n_good:
        raise CalibrationError(
            f"the model's threshold rests on {evidence_in_words(before)}, but here are {images.n_parts} parts; give "
            "the data set or list that tells the parts, or calibrate the new engine afterwards"
        )
    return images, before
