"""From what an engine found to a verdict: PASS, REJECT or FAULT, and never PASS by default.

    judgement = judge(frame, engine.infer([frame.image]), threshold, engine.spec.input)

A frame is rejected when its score is greater than the threshold. Whatever keeps the answer from being known to be right
makes it a FAULT with one of the codes of ``Fault``; ``python -m recontrast_edge.verdict`` prints their table.
"""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from recontrast_edge.engines import Engine, Inference
from recontrast_edge.errors import ModelError, UsageError
from recontrast_edge.frame import Frame, Judgement, Region
from recontrast_edge.preprocess import Geometry
from recontrast_edge.spec import InputSpec, ModelSpec

MAX_REGIONS = 32
"""Regions a judgement carries at most: those with the highest peaks. A part with more is rejected all the same."""


class Fault(str, Enum):
    """Why a frame has no verdict; the value is the code in records."""

    meaning: str

    def __new__(cls, code: str, meaning: str) -> Fault:
        member = str.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    UNREADABLE_IMAGE = "unreadable_image", "the source delivered an image that cannot be decoded"
    INVALID_IMAGE = "invalid_image", "the image has a wrong shape or type, or the model's ROI lies outside of it"
    INFERENCE_FAILED = "inference_failed", "the engine reported an error"
    NON_FINITE_SCORE = "non_finite_score", "score or anomaly map hold NaN or infinity"
    DEADLINE_MISSED = "deadline_missed", "the verdict came, or would have come, after the frame's deadline"
    UNKNOWN_PRODUCT = "unknown_product", "no engine was named for this product"
    VIEW_MISSING = "view_missing", "a camera that looks at the part gave no verdict in time"
    GATE_MISSED = "gate_missed", "the verdict came, or would have come, too late for the reject gate"
    FRAME_MISSED = "frame_missed", "mode `every`: the source went on before this frame could be taken"
    QUEUE_FULL = "queue_full", "mode `every`: the frame came while as many as allowed were waiting"
    INCOMPLETE_FRAME = "incomplete_frame", "the camera delivered only a part of the frame"
    LINES_MISSED = "lines_missed", "lines of this stretch of the web were lost"
    SOURCE_STALE = "source_stale", "the camera delivered no frame in time"
    SOURCE_FROZEN = "source_frozen", "the camera delivers the same picture again and again"
    SOURCE_DARK = "source_dark", "the picture is black"
    SOURCE_SATURATED = "source_saturated", "the picture is overexposed"
    WRONG_RATE = "wrong_rate", "frames come faster or slower than they should"
    ENGINE_STALLED = "engine_stalled", "the engine did not answer in time"
    SOURCE_FAILED = "source_failed", "the source broke off, or cannot be opened again"
    INTERNAL_ERROR = "internal_error", "a defect in recontrast-edge; this is the last record"


def resolve_threshold(engine: Engine, override: float | None = None) -> float:
    """The threshold that holds for an engine.

    Args:
        engine: its spec's threshold counts, if it was derived from this very engine.
        override: the operator's own, instead.

    Raises:
        UsageError: ``override`` is not a finite number.
        ModelError: there is none, or it belongs to another engine.
    """
    return check_threshold(engine.path, engine.spec, engine.sha256, override)


def check_threshold(path: Path, spec: ModelSpec, sha256: str, override: float | None = None) -> float:
    """As ``resolve_threshold``, of a model file that is not opened.

    Args:
        sha256: identity of graph and weights, as ``Engine.sha256``.
    """
    if override is not None:
        if not math.isfinite(override):
            raise UsageError(f"--threshold: expected a finite number, got {override}")
        return override
    threshold = spec.threshold
    if threshold is None:
        raise ModelError(
            f"{path}: this model has no threshold yet; derive one from good images with "
            f"`recontrast-edge calibrate --engine {path} --good DIR`, or give one with --threshold"
        )
    if threshold.engine_sha256 != sha256:
        origin = threshold.engine_sha256 and f"sha256 {threshold.engine_sha256[:12]}..."
        raise ModelError(
            f"{path}: its threshold {threshold.value:g} was derived from another engine ({origin or 'unknown'}, "
            f"this one is {sha256[:12]}...), whose scores may differ; run `recontrast-edge calibrate` with this one"
        )
    return threshold.value


def judge(frame: Frame, inference: Inference, threshold: float, input_spec: InputSpec) -> Judgement:
    """The verdict on a frame from the first (and only) item of an inference.

    Args:
        frame: the frame that was inferred, with its image.
        inference: maps (1, height, width) and scores (1,); without maps where they were not wanted above ``threshold``.
        threshold: REJECT above it.
        input_spec: where the map lies in the image.
    """
    anomaly_map = inference.maps[0] if len(inference.maps) else None
    score = float(inference.scores[0])
    if not (math.isfinite(score) and (anomaly_map is None or bool(np.isfinite(anomaly_map).all()))):
        return fault(frame, Fault.NON_FINITE_SCORE, "score or anomaly map are not finite", threshold)
    if score > threshold:
        if anomaly_map is None:
            return fault(frame, Fault.INFERENCE_FAILED, "the engine left out the map of a reject", threshold)
        found = regions(frame, anomaly_map, threshold, input_spec)
        return Judgement(frame, "REJECT", score, threshold, regions=found, map=anomaly_map, input_spec=input_spec)
    return Judgement(frame, "PASS", score, threshold, map=anomaly_map, input_spec=input_spec)


def fault(frame: Frame, code: str, detail: str | None, threshold: float) -> Judgement:
    """A FAULT: no score, no map, nothing that could be mistaken for an answer."""
    plain_code = code.value if isinstance(code, Fault) else code
    return Judgement(frame, "FAULT", None, threshold, fault=plain_code, detail=detail)


def regions(
    frame: Frame, anomaly_map: NDArray[np.float32], threshold: float, input_spec: InputSpec
) -> tuple[Region, ...]:
    """Connected parts (8 neighbours) of the map above the threshold, highest peak first, at most ``MAX_REGIONS``.

    Args:
        frame: its image gives the source's size.
        anomaly_map: (height, width) float32.

    Returns:
        Boxes and areas in source pixels.
    """
    assert frame.image is not None
    geometry = Geometry.of(input_spec, frame.image)
    # In float64, as the score was compared: a threshold between two float32 values must not lose the peak's own pixel.
    above = anomaly_map.astype(np.float64) > threshold
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above.astype(np.uint8), connectivity=8)
    label_map: NDArray[np.int32] = labels.astype(np.int32, copy=False)
    peaks = np.full(count, -np.inf, np.float32)
    np.maximum.at(peaks, label_map[above], anomaly_map[above])
    highest = sorted(range(1, count), key=lambda label: -peaks[label])[:MAX_REGIONS]
    scale_x, scale_y = geometry.scale_xy
    found: list[Region] = []
    for label in highest:
        left, top, width, height, area = (int(value) for value in stats[label])
        x, y, source_width, source_height = geometry.to_source(left, top, width, height)
        source_area = max(1, round(area * scale_x * scale_y))
        found.append(Region(x, y, source_width, source_height, source_area, float(peaks[label])))
    return tuple(found)


if __name__ == "__main__":
    print("| code | meaning |\n| --- | --- |")
    for member in Fault:
        print(f"| `{member.value}` | {member.meaning} |")
