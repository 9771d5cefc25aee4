"""The launchers, by the very helper that tests them on a GPU, with a CUDA driver that is a fake."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from recontrast_edge.kernels import PreprocessPlan
from recontrast_edge.preprocess import nv12_to_bgr, preprocess
from recontrast_edge.spec import Roi, Scoring
from tests.edge.fakes_cuda import fake_device
from tests.gpu.gpu import Gpu
from tests.kernels.host import Host
from tests.kernels.test_anomaly_map import LEVELS, make_features, make_plan
from tests.kernels.test_preprocess import BOUND, make_spec, with_pitch


@pytest.fixture
def gpu(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    with fake_device(host, monkeypatch) as device:
        yield Gpu(device)


def test_nv12s_two_planes_are_passed_on(gpu: Gpu) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (90, 100), dtype=np.uint8)
    spec = make_spec(roi=Roi(x=7, y=5, width=71, height=49))
    plan = PreprocessPlan(spec, (100, 60), "nv12", dtype=np.float16)
    out = gpu.preprocess(with_pitch(frame[:60], 128), plan, chroma=with_pitch(frame[60:], 101))
    assert np.abs(out - preprocess(nv12_to_bgr(frame), spec)).max() <= BOUND[np.float16]


@pytest.mark.parametrize("pitch", [301, 304])
def test_a_packed_frame(gpu: Gpu, pitch: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    plan = PreprocessPlan(make_spec(), (100, 60), "bgr8", dtype=np.float32)
    out = gpu.preprocess(with_pitch(image, pitch), plan)
    assert np.abs(out - preprocess(image, make_spec())).max() <= BOUND[np.float32]


def test_maps_are_the_hosts_also_after_another_frame_and_as_a_graph(gpu: Gpu, host: Host) -> None:
    features, before = (make_features(LEVELS, 2, np.float16, seed=seed) for seed in (0, 1))
    plan = make_plan(features, scoring=Scoring(rule="top"))
    wanted = host.anomaly_map(features, plan)
    for graph in (False, True):
        found = gpu.anomaly_map(features, plan, before=[before], graph=graph)
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])
