"""The TensorRT engine against recording fakes: results, order of calls, every failure, closing, no work twice.

python -m pytest tests/edge/test_tensorrt_engine.py
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from recontrast_edge import bench as bench_module
from recontrast_edge.cuda import CudaError
from recontrast_edge.engines import open_engine, tensorrt, tensorrt_slot
from recontrast_edge.engines.tensorrt import TensorRtEngine
from recontrast_edge.engines.tensorrt_context import CACHE_KIND
from recontrast_edge.engines.tensorrt_slot import GPU_STAGES
from recontrast_edge.errors import GpuError, GpuNotReadyError, InputError, MissingError, ModelError, StallError
from recontrast_edge.kernels import launcher
from recontrast_edge.pipeline import Line
from recontrast_edge.plan import Parity, PlanInfo, sidecar_path
from recontrast_edge.preprocess import preprocess
from recontrast_edge.scoring import MAP_NAME, PROBABILITY_NAME, SCORE_NAME
from recontrast_edge.spec import InputSpec, Level, ModelSpec, Roi, Scoring, Threshold
from recontrast_edge.user_cache import cache_folder
from tests.edge.fakes_cuda import ALLOCATIONS, CUresult, FakeDriver, install
from tests.edge.fakes_line import FakeSink, endless, run_line
from tests.edge.fakes_line import plan as camera
from tests.edge.fakes_tensorrt import (
    PLAN,
    FakeContext,
    FakeRtxEngine,
    FakeRuntimeCache,
    FakeRuntimeConfig,
    FakeTensorRt,
    FakeTensorRtForRtx,
    features_network,
    judged,
    map_network,
)
from tests.kernels.host import Host

SIZE = 32
Open = Callable[..., TensorRtEngine]


def model(roi: Roi | None = None) -> ModelSpec:
    return ModelSpec(
        class_name="fake",
        backbone="none",
        input=InputSpec(
            size_wh=(SIZE, SIZE), resize_wh=(SIZE, SIZE), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), roi=roi
        ),
        levels=(Level(stride=4, channels=3), Level(stride=8, channels=3)),
        scoring=Scoring(blur_sigma=1.0),
        threshold=Threshold(value=0.5, method="manual"),
        weights_sha256="0" * 64,
    )


def write_plan(folder: Path, spec: ModelSpec, **changes: Any) -> Path:
    path = folder / "model.plan"
    path.write_bytes(PLAN)
    values = {
        "spec": spec,
        "flavor": "tensorrt",
        "library_version": "10.3.0.26",
        "compute_capability": "8.7",
        "gpu": "Fake GPU",
        "precision": "fp16",
        "head": "features",
        "batch": (1, 1, 4),
        "plan_sha256": hashlib.sha256(PLAN).hexdigest(),
        "onnx": "model.onnx",
        "onnx_sha256": "1" * 64,
        "calibration": None,
        "parity": Parity(graph=None, engine=None, note="a fake"),
        "software": {},
    }
    sidecar_path(path).write_text(PlanInfo(**values | changes).dumps())
    return path


@pytest.fixture
def driver(host: Host, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver(host)
    install(fake, monkeypatch)
    monkeypatch.setattr(launcher, "compiled_kernels", lambda _capability: b"a cubin")
    return fake


@pytest.fixture
def library(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    fake = FakeTensorRt(driver, features_network(model()), (3, SIZE, SIZE))
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return fake


@pytest.fixture
def open_plan(library: FakeTensorRt, tmp_path: Path) -> Iterator[Open]:
    opened: list[TensorRtEngine] = []

    def open_it(path: Path | None = None, **options: Any) -> TensorRtEngine:
        options.setdefault("binding", "cuda-bindings")
        with library.driver.without_kernels():
            opened.append(TensorRtEngine(path or write_plan(tmp_path, model()), **options))
        return opened[-1]

    yield open_it
    for engine in opened:
        engine.close()
        engine.close()
    assert library.driver.live == {}, "everything was given back"
    assert library.driver.current == []
    assert library.contexts_alive == 0


def image(seed: int, *, width: int = 45, height: int = 37, mono: bool = False) -> NDArray[np.uint8]:
    shape = (height, width) if mono else (height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def expected(images: list[NDArray[np.uint8]], spec: ModelSpec) -> tuple[NDArray[Any], NDArray[Any]]:
    batch = np.stack([preprocess(item, spec.input) for item in images])
    return judged(spec, features_network(spec)(batch))


def test_the_kernels_and_the_graph_give_the_oracles_numbers(open_plan: Open, library: FakeTensorRt) -> None:
    library.batch = (1, 4)
    engine = open_plan()
    assert engine.uses_graph
    assert engine.max_batch == 4
    assert "TensorRT 10.3.0, fp16, on Fake GPU" in engine.name
    images = [image(0), image(1), image(2, mono=True), image(3, width=80, height=61)]
    found = engine.infer(images)
    maps, scores = expected(images, model())
    np.testing.assert_allclose(found.maps, maps, atol=2e-3)
    np.testing.assert_allclose(found.scores, scores, atol=2e-3)
    assert engine.uses_graph
    assert {"stage", "infer"} == set(found.stage_ms)


def test_more_images_than_the_engine_takes_go_through_the_slots_in_turn(open_plan: Open, library: FakeTensorRt) -> None:
    engine = open_plan()
    images = [image(seed) for seed in range(5)]
    found = engine.infer(images, maps_above=10.0)
    maps, scores = expected(images, model())
    np.testing.assert_allclose(found.scores, scores, atol=2e-3)
    np.testing.assert_allclose(found.maps, maps, atol=2e-3)
    # Two batches are on their way before the first is waited for.
    engine.infer(images[:4])
    library.driver.calls.clear()
    engine.infer(images[:4])
    launches = [call for call in library.driver.calls if call in ("cuGraphLaunch", "cuStreamSynchronize")]
    assert launches == ["cuGraphLaunch"] * 2 + ["cuStreamSynchronize"] * 2
    assert engine.infer([]).scores.shape == (0,)


def test_between_frames_nothing_is_allocated_and_one_wait_is_all(open_plan: Open, library: FakeTensorRt) -> None:
    engine = open_plan()
    engine.infer([image(0)], maps_above=10.0)
    library.driver.calls.clear()
    library.calls.clear()
    for seed in range(1, 6):
        found = engine.infer([image(seed)], maps_above=10.0)
        assert found.maps.shape == (0, SIZE, SIZE)
        np.testing.assert_allclose(found.scores, expected([image(seed)], model())[1], atol=2e-3)
    assert not ALLOCATIONS & set(library.driver.calls)
    per_frame = ["cuCtxPushCurrent", "cuGraphLaunch", "cuStreamSynchronize", "cuCtxPopCurrent"]
    assert library.driver.calls == per_frame * 5
    assert library.calls == []


def test_a_map_is_read_back_only_where_its_score_asks_for_it(open_plan: Open, library: FakeTensorRt) -> None:
    engine = open_plan()
    score = float(engine.infer([image(0)]).scores[0])
    for limit, wanted in ((score, 0), (np.nextafter(score, -1.0), 1), (np.nextafter(score, 9.0), 0), (None, 1)):
        found = engine.infer([image(0)], maps_above=limit)
        assert len(found.maps) == wanted, limit
    assert found.scores[0] == score
    np.testing.assert_allclose(found.maps, expected([image(0)], model())[0], atol=2e-3)
    kept = found.maps.copy()
    engine.infer([image(5)])
    np.testing.assert_array_equal(found.maps, kept)


def test_nan_comes_out_with_its_map(open_plan: Open, library: FakeTensorRt) -> None:
    engine = open_plan()
    network = library.network

    def broken(batch: NDArray[Any]) -> Any:
        tensors = network(batch)
        tensors["target1_0"][0, 1, 2, 3] = np.nan
        return tensors

    library.network = broken
    found = engine.infer([image(0)], maps_above=10.0)
    assert np.isnan(found.scores[0])
    assert np.isnan(found.maps[0]).any()
    library.network = network
    assert np.isfinite(engine.infer([image(0)]).scores[0])


PER_FRAME = ["cuCtxPushCurrent", "cuGraphLaunch", "cuStreamSynchronize", "cuCtxPopCurrent"]


def test_one_two_or_three_images_in_turn_cost_no_capture(open_plan: Open, library: FakeTensorRt) -> None:
    """As cameras send them that share an engine: the first batches already are as fast as all others."""
    library.batch = (1, 3)
    engine = open_plan()
    assert library.contexts_alive == 3 + 1, "one for each size, and the largest once more for the second slot"
    counts = library.driver.counts()
    assert counts["cuGraphLaunch"] == counts["cuGraphInstantiate"] == 4, "no frame pays for a graph's first launch"
    # Frames of the size that the model was trained for, which the engine was opened for.
    frames = [image(seed, width=SIZE, height=SIZE) for seed in range(3)]
    library.driver.calls.clear()
    library.calls.clear()
    batches = (1, 2, 3, 1, 3)
    for count in batches:
        found = engine.infer(frames[:count], maps_above=10.0)
        np.testing.assert_allclose(found.scores, expected(frames[:count], model())[1], atol=2e-3)
        assert engine.uses_graph
    assert library.driver.calls == PER_FRAME * len(batches)
    assert library.calls == []


def test_an_engine_for_many_images_gets_its_graphs_as_batches_come(
    open_plan: Open, library: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "WARMED_BATCHES", 1)
    engine = open_plan()
    frames = [image(seed, width=SIZE, height=SIZE) for seed in range(2)]
    for captures in (1, 0):
        library.driver.calls.clear()
        found = engine.infer(frames, maps_above=10.0)
        np.testing.assert_allclose(found.scores, expected(frames, model())[1], atol=2e-3)
        counts = library.driver.counts()
        assert counts["cuStreamBeginCapture"] == counts["cuGraphInstantiate"] == captures
        assert counts["cuMemAlloc"] == counts["cuMemHostAlloc"] == 0, "there is room for the largest batch"
    assert library.driver.calls == PER_FRAME


def test_frames_of_another_size_are_captured_once(open_plan: Open, library: FakeTensorRt) -> None:
    engine = open_plan()
    pictures = [image(0), image(1, width=200, height=120), image(2, mono=True), image(3, width=SIZE, height=SIZE)]
    for picture in pictures:
        library.driver.calls.clear()
        first = engine.infer([picture])
        assert library.driver.counts()["cuStreamBeginCapture"] == 1
        again = engine.infer([picture])
        np.testing.assert_array_equal(first.maps, again.maps)
        np.testing.assert_allclose(first.maps, expected([picture], model())[0], atol=2e-3)
    # The second one was larger, so that the graphs of what came before it had to go.
    library.driver.calls.clear()
    for picture in pictures[1:]:
        engine.infer([picture], maps_above=10.0)
    assert library.driver.calls == PER_FRAME * 3


def test_what_came_longest_ago_makes_room(
    open_plan: Open, library: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_slot, "KEPT_WORKS", 2)
    engine = open_plan()
    held = sorted(library.driver.live.values())
    assert held.count("executable graph") == 2 + 1
    # None is larger than those the engine was opened for.
    sizes = [(32, 32), (20, 32), (32, 16)]
    for width, height in sizes * 2:
        picture = image(0, width=width, height=height)
        np.testing.assert_allclose(engine.infer([picture]).maps, expected([picture], model())[0], atol=2e-3)
    live = sorted(library.driver.live.values())
    assert live.count("executable graph") == held.count("executable graph")
    assert live.count("device memory") == held.count("device memory") + 1, "weights for one more size of images"
    assert library.contexts_alive == 1 + 1, "that of two images went with its last graph"
    library.driver.calls.clear()
    engine.infer([image(0, width=20, height=32)], maps_above=10.0)
    engine.infer([image(0, width=32, height=16)], maps_above=10.0)
    assert library.driver.calls == PER_FRAME * 2
    engine.infer([image(0, width=32, height=32)], maps_above=10.0)
    assert library.driver.counts()["cuStreamBeginCapture"] == 1


def test_only_the_roi_is_copied(library: FakeTensorRt, open_plan: Open, tmp_path: Path) -> None:
    spec = model(Roi(x=7, y=5, width=20, height=30))
    engine = open_plan(write_plan(tmp_path, spec))
    found = engine.infer([image(0)])
    np.testing.assert_allclose(found.maps, expected([image(0)], spec)[0], atol=2e-3)
    with pytest.raises(InputError, match="ROI"):
        engine.infer([image(0, width=20)])
    # A frame that cannot be judged costs the next one nothing.
    library.driver.calls.clear()
    engine.infer([image(1)])
    assert library.driver.counts()["cuStreamBeginCapture"] == 0


def test_the_tiles_of_a_large_image_go_through_the_slots(
    library: FakeTensorRt, open_plan: Open, tmp_path: Path
) -> None:
    tiled = InputSpec(**{**model().input.model_dump(), "resize_wh": (2 * SIZE - 8, SIZE), "tile_overlap": 8})
    spec = model().model_copy(update={"input": tiled})
    engine = open_plan(write_plan(tmp_path, spec))
    assert engine.max_batch == 1
    picture = image(0, width=2 * SIZE - 8, height=SIZE)
    left, right = expected([picture[:, :SIZE], picture[:, SIZE - 8 :]], model())[0]
    library.driver.calls.clear()
    (found,) = engine.infer([picture], maps_above=10.0).maps
    np.testing.assert_allclose(found[:, : SIZE - 8], left[:, :-8], atol=2e-3)
    np.testing.assert_allclose(found[:, SIZE:], right[:, 8:], atol=2e-3)
    # Both went as one batch that was ready when the engine was opened.
    assert library.driver.counts()["cuGraphLaunch"] == 1


def test_the_map_head_needs_no_map_kernel_and_its_map_is_always_read(
    library: FakeTensorRt, open_plan: Open, tmp_path: Path
) -> None:
    library.network = map_network(model())
    library.outputs = library.network(np.zeros((1, 3, SIZE, SIZE)))
    assert set(library.outputs) == {MAP_NAME, SCORE_NAME}
    engine = open_plan(write_plan(tmp_path, model(), head="map"))
    found = engine.infer([image(0), image(1)], maps_above=10.0)
    maps, scores = judged(
        model(), features_network(model(), np.float32)(np.stack([preprocess(image(s), model().input) for s in (0, 1)]))
    )
    np.testing.assert_allclose(found.maps, maps, atol=1e-4)
    np.testing.assert_allclose(found.scores, scores, atol=1e-4)


def with_discriminator() -> ModelSpec:
    return model().model_copy(update={"scoring": Scoring(blur_sigma=1.0, discriminator_weight=3.0)})


def test_a_discriminators_probability_goes_into_the_map(library: FakeTensorRt, open_plan: Open, tmp_path: Path) -> None:
    """It stays float32 beside features of float16, and its NaN is not lost."""
    spec = with_discriminator()
    library.network = network = features_network(spec)
    library.outputs = network(np.zeros((1, 3, SIZE, SIZE)))
    engine = open_plan(write_plan(tmp_path, spec))
    images = [image(0), image(1)]
    maps, scores = expected(images, spec)
    found = engine.infer(images)
    np.testing.assert_allclose(found.maps, maps, atol=2e-4)
    np.testing.assert_allclose(found.scores, scores, atol=2e-4)
    assert np.abs(maps - expected(images, model())[0]).max() > 1
    # A map is read back only where its score asks for it.
    assert engine.infer(images[:1], maps_above=float(scores[0]) + 1).maps.size == 0

    def broken(batch: NDArray[Any]) -> dict[str, NDArray[Any]]:
        tensors = network(batch)
        tensors[PROBABILITY_NAME][:, 0, 2, 3] = np.nan
        return tensors

    library.network = broken
    assert np.isnan(engine.infer(images).scores).all()


def test_a_probability_of_another_type_is_refused(library: FakeTensorRt, open_plan: Open, tmp_path: Path) -> None:
    library.outputs = features_network(with_discriminator())(np.zeros((1, 3, SIZE, SIZE)))
    library.outputs[PROBABILITY_NAME] = library.outputs[PROBABILITY_NAME].astype(np.float16)
    with pytest.raises(ModelError, match=r"expected float32 results, .*'defect_probability': 'float16'"):
        open_plan(write_plan(tmp_path, with_discriminator()))


def test_half_precision_input(library: FakeTensorRt, open_plan: Open) -> None:
    library.input_dtype = np.float16
    found = open_plan().infer([image(0)])
    np.testing.assert_allclose(found.maps, expected([image(0)], model())[0], atol=5e-3)


def test_an_engine_for_large_batches_only_still_judges_one_image(library: FakeTensorRt, open_plan: Open) -> None:
    library.batch = (4, 4)
    engine = open_plan()
    np.testing.assert_allclose(engine.infer([image(0)]).maps, expected([image(0)], model())[0], atol=2e-3)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


def test_where_capturing_is_refused_work_is_enqueued_call_by_call(
    library: FakeTensorRt, open_plan: Open, caplog: pytest.LogCaptureFixture
) -> None:
    library.capturable = False
    engine = open_plan()
    assert not engine.uses_graph
    for seed in range(3):
        np.testing.assert_allclose(engine.infer([image(seed)]).maps, expected([image(seed)], model())[0], atol=2e-3)
    # It is not tried for every frame, and told once.
    library.driver.calls.clear()
    engine.infer([image(4)])
    assert "cuStreamBeginCapture" not in library.driver.calls
    (warning,) = warnings_of(caplog)
    assert "no CUDA graph for 2 image(s)" in warning
    assert "could not run the network (enqueue failed)" in warning


@pytest.mark.parametrize(
    "function", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphLaunch"]
)
def test_a_driver_that_refuses_one_graph(
    library: FakeTensorRt, open_plan: Open, function: str, caplog: pytest.LogCaptureFixture
) -> None:
    library.driver.failures[function] = CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
    if function == "cuStreamEndCapture":
        # The fake's stream would go on capturing, as no driver's does.
        original = library.driver.cuStreamEndCapture
        del library.driver.failures[function]

        def refuse(stream: int) -> CUresult:
            del library.driver.cuStreamEndCapture
            library.driver.cuGraphDestroy(original(stream)[1])
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED

        library.driver.cuStreamEndCapture = refuse  # type: ignore[method-assign]
    engine = open_plan()
    frames = [image(seed, width=SIZE, height=SIZE) for seed in range(2)]
    for count in (1, 2, 1):
        found = engine.infer(frames[:count])
        assert engine.uses_graph == (count == 1), "only the first that was captured at opening has none"
        np.testing.assert_allclose(found.maps, expected(frames[:count], model())[0], atol=2e-3)
    (warning,) = warnings_of(caplog)
    assert "no CUDA graph for 2 image(s)" in warning


@pytest.mark.parametrize("passes", [True, False])
def test_a_capture_that_failed_is_tried_once_more(
    library: FakeTensorRt, open_plan: Open, monkeypatch: pytest.MonkeyPatch, passes: bool
) -> None:
    monkeypatch.setattr(tensorrt_slot, "CAPTURED_AGAIN_AFTER", 3)
    library.capturable = False
    engine = open_plan()
    library.capturable = passes
    library.driver.calls.clear()
    for index in range(7):
        picture = image(index, width=SIZE, height=SIZE)
        np.testing.assert_allclose(engine.infer([picture]).maps, expected([picture], model())[0], atol=2e-3)
        assert engine.uses_graph == (passes and index >= 2)
    assert library.driver.counts()["cuStreamBeginCapture"] == 1


def test_no_frame_gets_the_error_that_a_failed_capture_left_behind(library: FakeTensorRt, open_plan: Open) -> None:
    library.capturable = False
    library.is_stale = True
    engine = open_plan()
    for width in (SIZE, 20):
        picture = image(0, width=width, height=SIZE)
        np.testing.assert_allclose(engine.infer([picture]).maps, expected([picture], model())[0], atol=2e-3)
        np.testing.assert_allclose(engine.infer([picture]).maps, expected([picture], model())[0], atol=2e-3)


class WatchedLock:
    """Tells when somebody has to wait for it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.is_waited_for = threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.is_waited_for.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.mark.parametrize("work", ["opening", "preparing", "closing"])
def test_while_one_engine_captures_no_other_waits_for_the_whole_context(
    library: FakeTensorRt, open_plan: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    """Which the driver refuses then, and which spoils the capture."""
    lock = WatchedLock()
    for module in (tensorrt, tensorrt_slot):
        monkeypatch.setattr(module, "PREPARING", lock)
    first, second = open_plan(), open_plan()
    functions: dict[str, Callable[[], object]] = {
        "opening": lambda: open_plan(tmp_path / "model.plan"),
        "preparing": lambda: second.infer([image(1, width=20)]),
        "closing": second.close,
    }
    thread = threading.Thread(target=functions[work])
    original = library.driver.cuStreamEndCapture
    seen: list[bool] = []

    def end(stream: int) -> int:
        del library.driver.cuStreamEndCapture
        before = len(library.driver.calls), len(library.calls)
        thread.start()
        seen.append(lock.is_waited_for.wait(5))
        # What comes before, such as taking the context, waits for nothing.
        assert not set(library.calls[before[1] :]) & {"deserialize_cuda_engine", "execute_async_v3"}
        assert not set(library.driver.calls[before[0] :]) & {"cuStreamSynchronize", "cuMemFree", "cuModuleUnload"}
        return int(original(stream)[1])

    library.driver.cuStreamEndCapture = end  # type: ignore[method-assign]
    with library.driver.without_kernels():
        first.infer([image(0, width=24)])
        thread.join()
    assert seen == [True]


def test_profiling_splits_the_time_on_the_gpu(open_plan: Open) -> None:
    engine = open_plan(profile=True)
    assert engine.uses_graph
    stage_ms = engine.infer([image(0)]).stage_ms
    assert [stage for stage in stage_ms if stage in GPU_STAGES] == list(GPU_STAGES)
    # The fake's clock ticks once an event.
    assert {stage_ms[stage] for stage in GPU_STAGES} == {0.5}
    assert {"stage", "launch"} < set(stage_ms)


def test_an_application_lends_its_context_and_stream(library: FakeTensorRt, open_plan: Open) -> None:
    library.driver.adopt(77)

    class Handle:
        handle = 77

    engine = open_plan(context=Handle(), stream=Handle())
    found = engine.infer([image(seed) for seed in range(6)])
    np.testing.assert_allclose(found.maps, expected([image(s) for s in range(6)], model())[0], atol=2e-3)
    engine.close()
    calls = library.driver.counts()
    for function in ("cuStreamCreate", "cuStreamDestroy", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease"):
        assert calls[function] == 0, function


def test_bench_measures_a_plan_with_its_stages_on_the_gpu(
    library: FakeTensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recontrast_edge.cuda.find_spec", lambda _name: True)
    monkeypatch.setattr(bench_module, "THROUGHPUT_S", 0.0)
    path = write_plan(tmp_path, model())
    line = "synthetic://brushed-metal?fps=0&size=32x32"
    settings = bench_module.Settings(frames=4, warmup=1, batches=(2,))
    report, _ = bench_module.bench([str(path)], line, settings)
    (entry,) = report["engines"]
    assert "reference" not in entry["correctness"], "there is no model beside it"
    assert set(GPU_STAGES) <= set(entry["gpu_stages_ms"])
    assert {"wait", "stage", "infer", "decide", "total"} <= set(entry["latency_ms"])
    assert not set(GPU_STAGES) & set(entry["latency_ms"]), "the timed engine records no events"
    assert library.driver.live == {}


def test_bench_keeps_what_it_measured_where_profiling_fails(
    library: FakeTensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recontrast_edge.cuda.find_spec", lambda _name: True)
    monkeypatch.setattr(library.driver, "cuEventElapsedTime", lambda *_: CUresult.CUDA_ERROR_INVALID_HANDLE)
    settings = bench_module.Settings(frames=2, warmup=1, batches=())
    path = write_plan(tmp_path, model())
    report, _ = bench_module.bench([str(path)], "synthetic://brushed-metal?fps=0&size=32x32", settings)
    (entry,) = report["engines"]
    assert "cuEventElapsedTime: invalid handle" in entry["gpu_stages_error"]
    assert "total" in entry["latency_ms"]
    assert library.driver.live == {}


# Failures.


OPENING = [
    ("cuInit", GpuNotReadyError),
    ("cuDeviceGetCount", GpuNotReadyError),
    ("cuDevicePrimaryCtxRetain", CudaError),
    ("cuDeviceGetAttribute", CudaError),
    ("cuMemAlloc", CudaError),
    ("cuMemHostAlloc", CudaError),
    ("cuStreamCreate", CudaError),
    ("cuMemcpyHtoDAsync", CudaError),
    ("cuMemsetD8Async", CudaError),
    ("cuModuleGetFunction", CudaError),
    ("cuLaunchKernel", CudaError),
    ("cuStreamSynchronize", CudaError),
]


@pytest.mark.parametrize(("function", "kind"), OPENING)
def test_whatever_fails_while_opening_is_named_and_all_is_given_back(
    library: FakeTensorRt, open_plan: Open, function: str, kind: type[Exception]
) -> None:
    library.driver.failures[function] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(kind, match=rf"{function}.*out of memory") as caught:
        open_plan()
    assert getattr(caught.value, "exit_code", None) == GpuError.exit_code, "systemd tries again"
    assert library.driver.live == {}
    assert library.contexts_alive == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("Runtime", "does not start"),
        ("deserialize_cuda_engine", r"refused the engine \(the version tag does not match\).*recontrast-edge build"),
        ("create_execution_context", "no execution context"),
        ("set_tensor_address", "refused the buffer"),
        ("set_input_shape", "refused a batch of 2"),
        ("execute_async_v3", r"could not run the network \(enqueue failed\)"),
    ],
)
def test_whatever_tensorrt_refuses_while_opening(
    library: FakeTensorRt, open_plan: Open, call: str, message: str
) -> None:
    library.fail.add(call)
    with pytest.raises(ModelError, match=message) as caught:
        open_plan()
    # What has run once on this machine may run again.
    assert isinstance(caught.value, GpuError) == (call in ("create_execution_context", "execute_async_v3"))
    assert library.driver.live == {}
    assert library.contexts_alive == 0
    if call not in ("Runtime", "deserialize_cuda_engine"):
        assert_torn_down_in_order(library.driver.calls)


def test_an_engine_for_which_there_is_no_memory_now_is_not_a_wrong_one(library: FakeTensorRt, open_plan: Open) -> None:
    library.fail.add("deserialize_cuda_engine")
    library.refusal = "[engine.cpp::readEngine::1] Error Code 2: OutOfMemory (no further information)"
    with pytest.raises(GpuError, match=r"memory is too full for the engine .*OutOfMemory.*nvidia-smi"):
        open_plan()


@pytest.mark.parametrize("function", ["cuGraphLaunch", "cuStreamSynchronize", "cuMemcpyDtoHAsync"])
def test_a_failed_inference_is_an_error_and_the_next_one_begins_anew(
    library: FakeTensorRt, open_plan: Open, function: str
) -> None:
    engine = open_plan()
    engine.infer([image(0)])
    library.driver.failures[function] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(GpuError, match=rf"model.plan: the GPU failed in {function}: out of memory"):
        engine.infer([image(1)])
    library.driver.calls.clear()
    np.testing.assert_allclose(engine.infer([image(2)]).maps, expected([image(2)], model())[0], atol=2e-3)
    # The counters that the kernels keep in their workspace start from zero again.
    assert library.driver.counts()["cuMemsetD8Async"] == 1


def test_an_error_that_is_kept_keeps_no_execution_context(
    library: FakeTensorRt, open_plan: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "WARMED_BATCHES", 1)
    library.batch = (1, 3)
    engine = open_plan()
    before = library.contexts_alive
    library.fail.add("set_tensor_address")
    with pytest.raises(ModelError, match="refused the buffer") as caught:
        engine.infer([image(0), image(1)])
    assert library.contexts_alive == before, caught
    library.fail.clear()
    assert np.isfinite(engine.infer([image(0), image(1)]).scores).all()


@pytest.mark.parametrize("function", ["cuMemAlloc", "cuMemHostAlloc"])
def test_a_frame_too_large_for_the_memory_costs_only_itself(
    library: FakeTensorRt, open_plan: Open, function: str
) -> None:
    engine = open_plan()
    small = image(0)
    before = engine.infer([small])
    library.driver.failures[function] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(ModelError, match=rf"{function}: out of memory"):
        engine.infer([image(1, width=200, height=150)])
    np.testing.assert_array_equal(engine.infer([small]).maps, before.maps)


def test_a_network_that_fails_between_frames(library: FakeTensorRt, open_plan: Open) -> None:
    library.capturable = False
    engine = open_plan()
    engine.infer([image(0)])
    library.fail.add("execute_async_v3")
    with pytest.raises(ModelError, match="could not run the network"):
        engine.infer([image(1)] * 9)
    library.fail.clear()
    np.testing.assert_allclose(engine.infer([image(2)]).maps, expected([image(2)], model())[0], atol=2e-3)


def assert_torn_down_in_order(calls: list[str]) -> None:
    """Execution contexts, then the engine, then the modules, then the CUDA context."""
    assert "engine torn away" not in calls
    assert calls.index("engine destroyed") < calls.index("cuModuleUnload") < calls.index("cuDevicePrimaryCtxRelease")


def test_closed_is_closed_and_can_be_opened_again(library: FakeTensorRt, open_plan: Open) -> None:
    with open_plan() as engine:
        engine.infer([image(0)])
    with pytest.raises(ModelError, match="the engine is closed"):
        engine.infer([image(0)])
    engine.close()
    assert library.driver.live == {}
    assert_torn_down_in_order(library.driver.calls)
    again = open_plan()
    np.testing.assert_allclose(again.infer([image(0)]).maps, expected([image(0)], model())[0], atol=2e-3)


def test_closing_goes_on_where_the_driver_refuses(library: FakeTensorRt, open_plan: Open) -> None:
    engine = open_plan()
    for function in ("cuGraphExecDestroy", "cuMemFree", "cuStreamSynchronize"):
        library.driver.failures[function] = CUresult.CUDA_ERROR_INVALID_VALUE
    engine.close()
    left = library.driver.live
    assert sorted(left.values()) == ["device memory", "executable graph"], "only what the driver refused to take back"
    library.driver.end()


@pytest.mark.parametrize("function", ["cuStreamSynchronize", "cuGraphLaunch"])
def test_a_lost_context_asks_for_another_process_and_can_be_closed(
    library: FakeTensorRt, open_plan: Open, function: str
) -> None:
    engine = open_plan()
    engine.infer([image(0)])
    library.driver.failures[function] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    for _ in range(3):
        with pytest.raises(StallError, match=r"illegal address.*the GPU's context is lost.*start the process again"):
            engine.infer([image(0)])
    engine.close()
    assert "context" not in library.driver.live.values(), "what was in it went with it"
    library.driver.end()


def test_a_context_that_cannot_even_be_made_current_is_lost(
    library: FakeTensorRt, open_plan: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_plan()
    with monkeypatch.context() as patch:
        patch.setattr(library.driver, "cuCtxPushCurrent", lambda _context: CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
        with pytest.raises(StallError, match="cuCtxPushCurrent: illegal address"):
            engine.infer([image(0)])


def test_a_lost_context_ends_the_run_when_its_frame_is_a_fault(library: FakeTensorRt, open_plan: Open) -> None:
    engine, sink = open_plan(), FakeSink()
    library.driver.failures["cuStreamSynchronize"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    line = run_line(Line([camera(engine, endless(0.01))], max_frames=3), sink)
    assert sink.faults == ["inference_failed"]
    assert "the GPU's context is lost" in sink.taken[0].detail
    assert line.stopped_by == "engine_stalled"
    assert [(type(error), error.exit_code) for error in line.errors] == [(StallError, 11)]  # type: ignore[attr-defined]
    engine.close()
    library.driver.end()


# What must be refused before anything is deserialised.


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def without_sidecar(path: Path) -> None:
    sidecar_path(path).unlink()


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (damaged, {}, "SHA-256 differs"),
        (truncated, {}, "SHA-256 differs"),
        (without_sidecar, {}, r"model\.plan\.json: no such file"),
        (None, {"library_version": "10.7.0.23"}, r"built by tensorrt 10\.7\.0\.23, this machine has 10\.3\.0"),
        (None, {"compute_capability": "8.6", "gpu": "RTX 3080"}, r"compute capability 8\.6 \(RTX 3080\)"),
    ],
)
def test_a_plan_that_does_not_belong_here_is_refused_before_it_is_deserialised(
    library: FakeTensorRt, open_plan: Open, tmp_path: Path, spoil: Any, changes: dict[str, Any], message: str
) -> None:
    path = write_plan(tmp_path, model(), **changes)
    if spoil is not None:
        spoil(path)
    with pytest.raises(ModelError, match=message) as caught:
        open_plan(path)
    if spoil is not without_sidecar:
        command = f"recontrast-edge build {tmp_path / 'model.onnx'} --out {path} --precision fp16 --flavor tensorrt"
        assert command in str(caught.value)
    assert library.calls == []
    assert library.driver.live == {}


@pytest.mark.parametrize(("gpu", "warned"), [("another GPU", True), ("Fake GPU", False), (None, False)])
def test_a_plan_of_another_model_of_the_same_architecture_runs_with_a_warning(
    open_plan: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, gpu: str | None, warned: bool
) -> None:
    open_plan(write_plan(tmp_path, model(), gpu=gpu))
    warnings = warnings_of(caplog)
    assert len(warnings) == warned
    for warning in warnings:
        assert re.search(
            r"built on the GPU another GPU, this one is Fake GPU.*: recontrast-edge build .*model\.onnx", warning
        )


def test_a_library_that_is_not_installed_is_named(
    library: FakeTensorRt, open_plan: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    path = write_plan(tmp_path, model(), flavor="tensorrt-rtx", library_version="1.7.1.116")
    with pytest.raises(MissingError, match=r"recontrast-edge\[tensorrt-rtx\].*--flavor tensorrt"):
        open_plan(path)


def another_model() -> ModelSpec:
    return model().model_copy(update={"levels": (Level(stride=4, channels=5), Level(stride=8, channels=3))})


@pytest.mark.parametrize(
    ("change", "spec", "head", "message"),
    [
        ({}, another_model(), "features", r"expected '\w+_0' of \(N, 5, 8, 8\)"),
        ({}, model(), "map", r"expected tensors \['anomaly_map', 'anomaly_score', 'image'\]"),
        ({"tensor_format": "HWC8"}, model(), "features", "plain NCHW"),
        ({"input_dtype": np.float64}, model(), "features", "'image' of float32 or float16"),
        ({"image_chw": (3, 64, 64)}, model(), "features", r"expected 'image' of \(N, 3, 32, 32\)"),
        ({}, with_discriminator(), "features", r"expected tensors \['defect_probability', "),
    ],
)
def test_an_engine_that_does_not_fit_its_spec_is_refused(
    library: FakeTensorRt,
    open_plan: Open,
    tmp_path: Path,
    change: dict[str, Any],
    spec: ModelSpec,
    head: str,
    message: str,
) -> None:
    vars(library).update(change)
    with pytest.raises(ModelError, match=message) as caught:
        open_plan(write_plan(tmp_path, spec, head=head))
    assert "recontrast-edge build" in str(caught.value)
    assert library.driver.live == {}


# TensorRT for RTX compiles kernels when an engine is opened.


@pytest.fixture
def rtx(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTensorRtForRtx:
    fake = FakeTensorRtForRtx(driver, features_network(model()), (3, SIZE, SIZE))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake


def open_rtx(rtx: FakeTensorRtForRtx, folder: Path) -> TensorRtEngine:
    changes = {"flavor": "tensorrt-rtx", "library_version": "1.7.1.116", "compute_capability": None}
    plan = write_plan(folder, model(), **changes)
    with rtx.driver.without_kernels():
        return TensorRtEngine(plan, binding="cuda-bindings")


def kept_kernels() -> list[Path]:
    return sorted(cache_folder(CACHE_KIND).iterdir())


def test_kernels_of_an_rtx_engine_are_compiled_once(
    rtx: FakeTensorRtForRtx, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [image(seed) for seed in range(2)]
    for compiled in ([2, 1], []):
        rtx.compiled.clear()
        with open_rtx(rtx, tmp_path) as engine:
            assert rtx.compiled == compiled
            assert len(kept_kernels()) == 1, "already, should the power fail"
            np.testing.assert_allclose(engine.infer(frames).maps, expected(frames, model())[0], atol=2e-3)
        assert rtx.driver.live == {}
        assert rtx.contexts_alive == 0
    assert_torn_down_in_order(rtx.driver.calls)
    assert "cache torn away" not in rtx.driver.calls, "the configuration refers to it"
    assert warnings_of(caplog) == []
    # Another version compiles for itself.
    rtx.__version__ = "1.7.1"
    with open_rtx(rtx, tmp_path):
        assert rtx.compiled == [2, 1]
    assert len(kept_kernels()) == 2


def test_kernels_that_were_compiled_while_frames_ran_are_kept_at_the_end(
    rtx: FakeTensorRtForRtx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "WARMED_BATCHES", 1)
    rtx.batch = (1, 3)
    with open_rtx(rtx, tmp_path) as engine:
        assert rtx.compiled == [1, 3]
        (before,) = [path.read_bytes() for path in kept_kernels()]
        engine.infer([image(0), image(1)])
        assert [path.read_bytes() for path in kept_kernels()] == [before], "not while frames run"
    rtx.compiled.clear()
    with open_rtx(rtx, tmp_path) as engine:
        engine.infer([image(0), image(1)])
    assert rtx.compiled == []


@pytest.mark.parametrize("how", ["damaged", "of another driver"])
def test_kernels_that_cannot_be_used_are_compiled_again(
    rtx: FakeTensorRtForRtx, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    open_rtx(rtx, tmp_path).close()
    (path,) = kept_kernels()
    if how == "damaged":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        rtx.gpu_driver = b"driver 470"
    rtx.compiled.clear()
    with open_rtx(rtx, tmp_path):
        assert rtx.compiled == [2, 1]
    (warning,) = warnings_of(caplog)
    assert f"tensorrt-rtx cache: {path.name} is" in warning
    rtx.compiled.clear()
    open_rtx(rtx, tmp_path).close()
    assert rtx.compiled == [], "what was kept instead is good"


def test_an_rtx_library_that_takes_no_cache(
    rtx: FakeTensorRtForRtx, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rtx.takes_cache = False
    open_rtx(rtx, tmp_path).close()
    (warning,) = warnings_of(caplog)
    assert "compiled whenever the engine is opened" in warning
    assert not cache_folder(CACHE_KIND).exists()


def test_every_name_exists_in_the_real_library() -> None:
    """The fakes must not make up methods; needs no driver."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX tells which names there are")
    for fake, real in (
        (FakeRtxEngine, rtx.ICudaEngine),
        (FakeContext, rtx.IExecutionContext),
        (FakeRuntimeConfig, rtx.IRuntimeConfig),
        (FakeRuntimeCache, rtx.IRuntimeCache),
    ):
        ours = {"new_context", "state", "settle", "strategy", "compile", "library"}
        names = {name for name in dir(fake) if not name.startswith("_")} - ours
        assert names <= set(dir(real)), fake
    assert hasattr(rtx.ICudaEngine, "device_memory_size_v2")
    assert rtx.ExecutionContextAllocationStrategy.USER_MANAGED
    assert rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    assert rtx.TensorIOMode.INPUT
    assert rtx.TensorFormat.LINEAR


def test_open_engine_takes_plans(tmp_path: Path) -> None:
    path = tmp_path / "missing.plan"
    with pytest.raises(ModelError, match="no such model file"):
        open_engine(path)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match=r"missing\.plan\.json: no such file"):
        open_engine(path)
