"""A frame's whole way through a GPU, with a network that only copies: for GPUs that no TensorRT at hand supports.

python -m pytest tests/gpu/test_way.py

Everything but the network is real: driver, kernels, streams, captures, graphs, events. What the network would have
written lies on the GPU already, so that the oracle knows every map. ``tests/edge/test_way.py`` runs the same tests on
the fake driver.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from recontrast_edge.cuda import Device, cuda_bindings
from recontrast_edge.engines.tensorrt import TensorRtEngine
from recontrast_edge.engines.tensorrt_slot import GPU_STAGES
from recontrast_edge.scoring import INPUT_NAME
from tests.edge.fakes_tensorrt import FakeContext, FakeEngine, FakeTensorRt, features_network, judged
from tests.edge.test_tensorrt_engine import SIZE, image, model, write_plan
from tests.gpu.gpu import memory_stayed

BATCH = 2
Open = Callable[..., TensorRtEngine]


class Copies(FakeTensorRt):
    """A TensorRT whose contexts copy ``features`` to the outputs.

    Attributes:
        spoils: what to do instead while work is captured; it has failed then.
    """

    def __init__(self, device: Device, features: dict[str, NDArray[Any]]) -> None:
        super().__init__(self, features_network(model()), (3, SIZE, SIZE), batch=(1, BATCH))  # type: ignore[arg-type]
        self.engine_class = CopyingEngine
        self.cuda = cuda_bindings._import_driver()
        self.spoils: Callable[[], None] | None = None
        # What the fakes ask of a fake driver.
        self.current = True
        stream = device.stream()
        self.sources = {name: device.upload(array, stream) for name, array in features.items()}

    def copy(self, context: FakeContext, stream: int) -> bool:
        _, status = self.cuda.cuStreamIsCapturing(self.cuda.CUstream(stream))
        if self.spoils and status == self.cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE:
            self.spoils()
            return False
        assert context.batch is not None
        assert set(context.addresses) == {INPUT_NAME, *self.sources}
        for name, source in self.sources.items():
            size = source.size_bytes // BATCH * context.batch
            (code,) = self.cuda.cuMemcpyDtoDAsync(
                context.addresses[name], source.pointer, size, self.cuda.CUstream(stream)
            )
            assert code == self.cuda.CUresult.CUDA_SUCCESS
        return True


class CopyingEngine(FakeEngine):
    library: Copies

    def new_context(self) -> FakeContext:
        return CopyingContext(self)


class CopyingContext(FakeContext):
    library: Copies

    def execute_async_v3(self, stream: int) -> bool:
        return self.library.copy(self, stream)


@pytest.fixture
def features() -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    return features_network(model())(rng.standard_normal((BATCH, 3, SIZE, SIZE)))


@pytest.fixture
def library(device: Device, features: dict[str, NDArray[Any]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Copies]:
    with device.current():
        copies = Copies(device, features)
    monkeypatch.setitem(sys.modules, "tensorrt", copies)
    yield copies
    for source in copies.sources.values():
        source.close()


@pytest.fixture
def open_plan(device: Device, library: Copies, tmp_path: Path) -> Iterator[Open]:
    capability = "{}.{}".format(*device.compute_capability)
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            TensorRtEngine(
                write_plan(tmp_path, model(), compute_capability=capability, gpu=device.name),
                binding="cuda-bindings",
                **options,
            )
        )
    assert library.contexts_alive == 0


def assert_right(engine: TensorRtEngine, features: dict[str, NDArray[Any]], count: int) -> None:
    maps, scores = judged(model(), features)
    found = engine.infer([image(seed) for seed in range(count)])
    rows = np.arange(count) % BATCH
    np.testing.assert_allclose(found.maps, maps[rows], atol=2e-3)
    np.testing.assert_allclose(found.scores, scores[rows], atol=2e-3)


def test_maps_and_scores_are_the_oracles(open_plan: Open, features: dict[str, NDArray[Any]]) -> None:
    engine = open_plan()
    for count in (1, 2, 5, 1):
        assert_right(engine, features, count)
        assert engine.uses_graph


def test_frames_take_no_memory_and_closing_gives_it_back(open_plan: Open, device: Device) -> None:
    with device.current():
        # What the driver keeps for itself it takes once.
        open_plan().close()
        before = device.memory_info()[0]
        engine = open_plan()
        engine.infer([image(0)], maps_above=1e9)
        opened = device.memory_info()[0]
        for seed in range(20):
            engine.infer([image(seed % 3)], maps_above=1e9)
        assert memory_stayed(device, opened)
        engine.close()
        assert memory_stayed(device, before)


def test_every_stage_is_measured(open_plan: Open, features: dict[str, NDArray[Any]]) -> None:
    engine = open_plan(profile=True)
    assert engine.uses_graph
    assert_right(engine, features, 2)
    for _ in range(3):
        stage_ms = engine.infer([image(0)]).stage_ms
        assert sum(stage_ms[stage] for stage in GPU_STAGES) > 0
        # Of stages that take no time that an event can tell, too.
        assert all(stage_ms[stage] >= 0 for stage in GPU_STAGES), stage_ms
    print("\n" + ", ".join(f"{stage} {ms * 1e3:.1f} us" for stage, ms in stage_ms.items()))


@pytest.mark.parametrize("how", ["refused", "spoilt"])
def test_a_capture_that_fails_leaves_a_usable_stream(
    open_plan: Open, library: Copies, features: dict[str, NDArray[Any]], how: str
) -> None:
    # Allocating is not allowed while capturing.
    library.spoils = (lambda: None) if how == "refused" else lambda: library.cuda.cuMemAlloc(1 << 20)
    engine = open_plan()
    assert not engine.uses_graph
    assert_right(engine, features, 3)
    library.spoils = None
    # Of another size, which is captured anew.
    engine.infer([image(0, width=20, height=16)])
    assert engine.uses_graph


def test_an_applications_context_and_stream_do_the_work(
    open_plan: Open, library: Copies, features: dict[str, NDArray[Any]], device: Device
) -> None:
    with device.current():
        stream = device.stream()
        engine = open_plan(context=int(device._binding._context), stream=stream.number)  # type: ignore[attr-defined]
        assert_right(engine, features, 5)
        engine.close()
        stream.synchronize()
        stream.close()
