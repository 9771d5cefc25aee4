"""The TensorRT engine on a GPU against ONNX Runtime, from frames to scores.

python -m pytest tests/gpu/test_engine.py

``RECONTRAST_PLAN`` names plans that were built elsewhere, separated by ``:``; without it they are built here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recontrast_edge.engines import open_engine
from recontrast_edge.engines.onnx import OnnxEngine
from recontrast_edge.engines.tensorrt import TensorRtEngine
from recontrast_edge.engines.tensorrt_context import CACHE_KIND
from recontrast_edge.engines.tensorrt_slot import GPU_STAGES
from recontrast_edge.errors import RecontrastError
from recontrast_edge.onnxfile import SPEC_KEY, replace_metadata
from recontrast_edge.plan import read_sidecar
from recontrast_edge.scoring import INPUT_NAME, PROBABILITY_NAME, VIEWS, reconstruction_name, target_name
from recontrast_edge.spec import InputSpec, Level, ModelSpec, Scoring
from recontrast_edge.user_cache import cache_folder
from tests.gpu.gpu import memory_stayed

SIZE = 64
STRIDES = (4, 8, 16)


def small_features_model(path: Path, *, discriminator: bool = False) -> Path:
    """A ``features`` graph of poolings: next to no work, so that only the runtime is tested."""
    onnx = pytest.importorskip("onnx", reason="the onnx package builds this model")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    nodes: list[Any] = []
    outputs: list[Any] = []
    constants = [
        onnx.numpy_helper.from_array(np.array([2.0, -1.0, 0.5], np.float32).reshape(1, 3, 1, 1), "scale"),
        onnx.numpy_helper.from_array(np.array([0.1, 0.3, -0.2], np.float32).reshape(1, 3, 1, 1), "shift"),
    ]
    for index, stride in enumerate(STRIDES):
        for view in range(VIEWS):
            target, reconstruction = target_name(view, index), reconstruction_name(view, index)
            pool = "AveragePool" if view == 0 else "MaxPool"
            window = {"kernel_shape": [stride, stride], "strides": [stride, stride]}
            nodes.append(helper.make_node(pool, [INPUT_NAME], [target], **window))
            nodes.append(helper.make_node("Mul", [target, "scale"], [f"scaled{view}_{index}"]))
            nodes.append(helper.make_node("Add", [f"scaled{view}_{index}", "shift"], [reconstruction]))
            shape = ["N", 3, SIZE // stride, SIZE // stride]
            outputs += [helper.make_tensor_value_info(name, float32, shape) for name in (target, reconstruction)]
    if discriminator:
        # Of the features' mean; computed in float32 in every precision, as what a discriminator gives is.
        nodes.append(helper.make_node("ReduceMean", [target_name(0, 0)], ["brightness"], axes=[1], keepdims=1))
        nodes.append(helper.make_node("Sigmoid", ["brightness"], [PROBABILITY_NAME]))
        shape = ["N", 1, SIZE // STRIDES[0], SIZE // STRIDES[0]]
        outputs.append(helper.make_tensor_value_info(PROBABILITY_NAME, float32, shape))
    image = helper.make_tensor_value_info(INPUT_NAME, float32, ["N", 3, SIZE, SIZE])
    graph = helper.make_graph(nodes, "small", [image], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    spec = ModelSpec(
        class_name="small",
        backbone="none",
        input=InputSpec(size_wh=(SIZE, SIZE), resize_wh=(SIZE, SIZE), mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2)),
        levels=tuple(Level(stride=stride, channels=3) for stride in STRIDES),
        scoring=Scoring(discriminator_weight=4.0 if discriminator else None),
        weights_sha256="0" * 64,
    )
    replace_metadata(path, {SPEC_KEY: spec.dumps()})
    return path


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    given = os.environ.get("RECONTRAST_PLAN", "")
    if given:
        return [Path(name) for name in given.split(":")]
    build = pytest.importorskip("recontrast_export.build", reason="the export package builds plans")
    folder = tmp_path_factory.mktemp("plan")
    built = []
    try:
        for discriminator in (False, True):
            model = small_features_model(folder / f"small{discriminator:d}.onnx", discriminator=discriminator)
            for precision in ("fp32", "fp16"):
                built.append(model.with_suffix(f".{precision}.plan"))
                build.build_engine(model, built[-1], precision=precision, batch=(1, 1, 4))
    except RecontrastError as error:
        pytest.skip(f"no plan can be built here: {error}")
    return built


@pytest.fixture(scope="module", params=[0, 1, 2, 3])
def plan(plans: list[Path], request: pytest.FixtureRequest) -> Path:
    if request.param >= len(plans):
        pytest.skip("there are no more plans")
    return plans[request.param]


@pytest.fixture(scope="module")
def engine(plan: Path) -> Iterator[TensorRtEngine]:
    with open_engine(plan) as opened:
        assert isinstance(opened, TensorRtEngine)
        yield opened


def pictures(count: int, *, width: int = 300, height: int = 200) -> list[np.ndarray]:
    """Smooth and noisy ones."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 5, 7, 3)).astype(np.uint8)
    large = coarse.repeat(-(-height // 5), axis=1).repeat(-(-width // 7), axis=2)[:, :height, :width]
    noise = rng.integers(0, 40, large.shape)
    return list(np.minimum(large.astype(int) + noise, 255).astype(np.uint8))


def test_it_runs_as_one_graph(engine: TensorRtEngine) -> None:
    engine.infer(pictures(1))
    assert engine.uses_graph


def test_maps_and_scores_are_those_of_onnx_runtime(engine: TensorRtEngine) -> None:
    info = read_sidecar(engine.path)
    model = engine.path.with_name(info.onnx)
    if not model.is_file():
        pytest.skip(f"{model} is not there to compare with")
    images = [*pictures(5), *pictures(1, width=64, height=64), pictures(1)[0][:, :, 0].copy()]
    with OnnxEngine(model, optimise=False) as reference:
        wanted = reference.infer(images)
    found = engine.infer(images)
    spans = np.ptp(wanted.maps.reshape(len(images), -1), axis=1)
    errors = np.abs(found.maps - wanted.maps).reshape(len(images), -1).max(axis=1)
    allowed = {"fp32": 1e-3, "fp16": 0.02, "int8": 0.1}[info.precision]
    assert (errors <= allowed * spans).all(), errors / spans
    print(f"\n{engine.name}: map error {(errors / spans).max():.2g} of its range")


def test_the_same_frame_gives_the_same_bits(engine: TensorRtEngine) -> None:
    (image,) = pictures(1)
    first = engine.infer([image])
    for _ in range(50):
        again = engine.infer([image])
        np.testing.assert_array_equal(again.maps, first.maps)
        np.testing.assert_array_equal(again.scores, first.scores)


def test_a_thousand_frames_take_no_memory(engine: TensorRtEngine) -> None:
    images = pictures(4)
    engine.infer(images[:1], maps_above=1e9)
    with engine._device.current():
        before, _ = engine._device.memory_info()
        for index in range(1000):
            engine.infer([images[index % 4]], maps_above=1e9)
        assert memory_stayed(engine._device, before)


def test_every_number_of_images_has_a_graph_and_alternating_costs_nothing(plan: Path) -> None:
    """As cameras send them that share an engine."""
    with open_engine(plan) as engine:
        assert isinstance(engine, TensorRtEngine)
        images = pictures(min(engine.max_batch, 3), width=256, height=256)
        with engine._device.current():
            free = [engine._device.memory_info()[0]]
            for count in range(1, len(images) + 1):
                engine.infer(images[:count], maps_above=1e9)
                free.append(engine._device.memory_info()[0])

            def median_us(counts: Sequence[int]) -> float:
                times_s = []
                for count in counts:
                    started_s = time.perf_counter()
                    engine.infer(images[:count], maps_above=1e9)
                    times_s.append(time.perf_counter() - started_s)
                    assert engine.uses_graph
                return 1e6 * float(np.median(times_s))

            alone = [median_us([count] * 100) for count in range(1, len(images) + 1)]
            turns = median_us([*range(1, len(images) + 1)] * 100)
            assert memory_stayed(engine._device, free[-1])
        print(
            f"\n{engine.name}: 1 to {len(images)} images {[round(us) for us in alone]} us, in turns {turns:.0f} us; "
            f"memory that graphs took: {[(before - after) >> 20 for before, after in pairwise(free)]} MiB"
        )
        assert turns <= 1.5 * max(alone)


def test_an_engine_opens_faster_with_the_kernels_of_the_last_time(
    plan: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if read_sidecar(plan).flavor != "tensorrt-rtx":
        pytest.skip("only TensorRT for RTX compiles kernels when an engine is opened")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    times_s, scores = [], []
    for _ in range(2):
        started_s = time.perf_counter()
        with open_engine(plan) as engine:
            times_s.append(time.perf_counter() - started_s)
            scores.append(engine.infer(pictures(1)).scores)
    (kept,) = cache_folder(CACHE_KIND).iterdir()
    print(
        f"\n{plan.name}: opened in {times_s[0]:.2f} s, then in {times_s[1]:.2f} s with {kept.stat().st_size} bytes kept"
    )
    assert times_s[1] < times_s[0]
    np.testing.assert_array_equal(*scores)


def test_the_stages_on_the_gpu_are_measured(plan: Path) -> None:
    with open_engine(plan, profile=True) as engine:
        for _ in range(10):
            stage_ms = engine.infer(pictures(1)).stage_ms
        assert set(GPU_STAGES) <= set(stage_ms)
        assert stage_ms["network"] > 0
        print(f"\n{engine.name}: " + ", ".join(f"{stage} {ms * 1e3:.1f} us" for stage, ms in stage_ms.items()))


def test_pycudas_context_and_stream_are_accepted(plan: Path) -> None:
    driver = pytest.importorskip("pycuda.driver", reason="pycuda lends its context")
    driver.init()
    context = driver.Device(0).make_context()
    try:
        stream = driver.Stream(1)
        for binding in ("pycuda", "cuda-bindings"):
            with TensorRtEngine(plan, binding=binding, context=context, stream=stream) as engine:
                assert np.isfinite(engine.infer(pictures(3)).scores).all()
    finally:
        context.pop()
        context.detach()
