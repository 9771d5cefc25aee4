from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from recontrast_edge.engines import Inference, open_engine
from recontrast_edge.errors import ModelError, UsageError
from recontrast_edge.frame import Frame, Judgement
from recontrast_edge.spec import InputSpec, Roi, Threshold
from recontrast_edge.verdict import MAX_REGIONS, Fault, judge, resolve_threshold

PLAIN = InputSpec(size_wh=(64, 32), resize_wh=(64, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def frame_of(width: int = 64, height: int = 32) -> Frame:
    return Frame(0, "test", np.zeros((height, width), np.uint8), 0.0)


def judged(anomaly_map, *, threshold=0.5, score=None, spec=PLAIN, frame=None) -> Judgement:
    anomaly_map = np.asarray(anomaly_map, np.float32)
    scores = np.array([anomaly_map.max() if score is None else score], np.float32)
    return judge(frame or frame_of(), Inference(anomaly_map[None], scores, {}), threshold, spec)


def flat(value: float = 0.1) -> np.ndarray:
    return np.full((32, 64), value, np.float32)


def test_pass_up_to_and_including_the_threshold() -> None:
    judgement = judged(flat(0.5), threshold=0.5)
    assert (judgement.verdict, judgement.score, judgement.regions, judgement.fault) == ("PASS", 0.5, (), None)


def test_reject_by_the_smallest_step_has_a_region() -> None:
    above = np.nextafter(np.float32(0.7), np.float32(1))
    anomaly_map = flat()
    anomaly_map[3, 5] = above
    # Rounded to float32, this threshold would equal the peak.
    judgement = judged(anomaly_map, threshold=float(above) - 1e-9)
    assert judgement.verdict == "REJECT"
    assert [(region.x, region.y, region.area) for region in judgement.regions] == [(5, 3, 1)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["map", "score"])
def test_not_finite_is_a_fault(bad: float, where: str) -> None:
    anomaly_map = flat()
    if where == "map":
        anomaly_map[0, 0] = bad
        judgement = judged(anomaly_map, score=0.1)
    else:
        judgement = judged(anomaly_map, score=bad)
    assert (judgement.verdict, judgement.fault) == ("FAULT", "non_finite_score")
    assert judgement.score is None
    assert judgement.record()["fault"] == "non_finite_score"


def test_regions_are_8_connected_and_sorted_by_peak() -> None:
    anomaly_map = flat()
    anomaly_map[2, 2] = anomaly_map[3, 3] = 0.6
    anomaly_map[20:24, 40:50] = 0.8
    anomaly_map[21, 44] = 0.9
    first, second = judged(anomaly_map).regions
    assert (first.x, first.y, first.width, first.height, first.area) == (40, 20, 10, 4, 40)
    assert first.peak == pytest.approx(0.9)
    assert (second.x, second.y, second.width, second.height, second.area) == (2, 2, 2, 2, 2)


def test_regions_are_in_source_pixels_of_the_roi() -> None:
    spec = PLAIN.model_copy(update={"roi": Roi(x=100, y=50, width=128, height=96)})
    anomaly_map = flat()
    anomaly_map[10:12, 20:24] = 0.9
    (region,) = judged(anomaly_map, spec=spec, frame=frame_of(640, 480)).regions
    assert (region.x, region.y, region.width, region.height) == (100 + 40, 50 + 30, 8, 6)
    assert region.area == 48


def test_regions_beyond_the_cap_are_the_weakest() -> None:
    anomaly_map = flat()
    peaks = np.linspace(0.6, 1.0, 2 * MAX_REGIONS)
    anomaly_map[::4, ::4].flat[: peaks.size] = peaks
    found = judged(anomaly_map).regions
    assert [region.peak for region in found] == pytest.approx(sorted(peaks, reverse=True)[:MAX_REGIONS])


def test_every_fault_code_says_what_it_means() -> None:
    assert all(member.meaning and member.value == member.value.lower() for member in Fault)


class TestThreshold:
    def test_from_the_spec(self, tiny_model: Path) -> None:
        with open_engine(tiny_model) as engine:
            assert resolve_threshold(engine) == 0.5
            assert resolve_threshold(engine, -1.5) == -1.5

    def test_missing_names_the_way_out(self, tiny_model: Path) -> None:
        with open_engine(tiny_model) as engine:
            engine.spec = engine.spec.with_threshold(None)
            with pytest.raises(ModelError, match="recontrast-edge calibrate"):
                resolve_threshold(engine)
            assert resolve_threshold(engine, 2.0) == 2.0

    def test_of_another_engine_is_refused(self, tiny_model: Path) -> None:
        with open_engine(tiny_model) as engine:
            engine.spec = engine.spec.with_threshold(Threshold(value=0.5, engine_sha256="1" * 64))
            with pytest.raises(ModelError, match="another engine"):
                resolve_threshold(engine)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_must_be_finite(self, tiny_model: Path, value: float) -> None:
        with open_engine(tiny_model) as engine, pytest.raises(UsageError, match="finite"):
            resolve_threshold(engine, value)


def test_a_judgement_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        judged(flat()).verdict = "PASS"  # type: ignore[misc]


@pytest.mark.parametrize(("score", "verdict"), [(0.5, "PASS"), (math.nan, "FAULT"), (0.6, "FAULT")])
def test_without_a_map_only_a_pass_can_come_of_it(score: float, verdict: str) -> None:
    """An engine leaves the map out only up to the threshold; regions of a reject need it."""
    inference = Inference(np.empty((0, 32, 64), np.float32), np.array([score], np.float32), {})
    judgement = judge(frame_of(), inference, 0.5, PLAIN)
    assert judgement.verdict == verdict
    assert judgement.map is None
