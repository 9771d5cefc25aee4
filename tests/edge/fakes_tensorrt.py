"""A TensorRT that records its calls and runs a network given as a NumPy function; for tests without a GPU.

    library = FakeTensorRt(driver, features_network(spec)); monkeypatch.setitem(sys.modules, "tensorrt", library)

It queues its work on the streams of a ``FakeDriver``, within captures too, and insists on what TensorRT demands:
shapes, addresses and scratch memory set before the first enqueue, and a context left as it was while a graph that was
captured from it is launched; scratch memory used by one stream alone; contexts gone before their engine; a current CUDA
context for whatever is made, run or destroyed.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.scoring import (
    INPUT_NAME,
    MAP_NAME,
    PROBABILITY_NAME,
    SCORE_NAME,
    VIEWS,
    fold_maps,
    image_scores,
    level_distances,
    reconstruction_name,
    target_name,
    weighted,
)
from recontrast_edge.spec import ModelSpec
from tests.edge.fakes_cuda import FakeDriver

Tensors = dict[str, NDArray[Any]]
Network = Callable[[NDArray[Any]], Tensors]
"""(N, 3, H, W) -> outputs by name."""

PLAN = b"a plan of the fake"


def pooled(image: NDArray[Any], stride: int) -> NDArray[Any]:
    n, channels, height, width = image.shape
    blocks = image.reshape(n, channels, height // stride, stride, width // stride, stride)
    return blocks.astype(np.float64).mean(axis=(3, 5))


def features_network(spec: ModelSpec, dtype: type = np.float16) -> Network:
    """Feature pairs that differ where the image is bright; every level has 3 channels."""

    def network(image: NDArray[Any]) -> Tensors:
        tensors: Tensors = {}
        for index, level in enumerate(spec.levels):
            target = pooled(image, level.stride)
            for view in range(VIEWS):
                bent = target[:, ::-1] * (1 + view) + np.roll(target, 1, axis=3)
                tensors[target_name(view, index)] = target.astype(dtype)
                tensors[reconstruction_name(view, index)] = bent.astype(dtype)
        if spec.scoring.discriminator_weight is not None:
            shown = pooled(image, spec.levels[0].stride)[:, :1]
            tensors[PROBABILITY_NAME] = (1 / (1 + np.exp(-shown))).astype(np.float32)
        return tensors

    return network


def judged(spec: ModelSpec, tensors: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Maps (N, H, W) and scores (N,) of feature pairs by the oracle, in float64."""

    def tensor(name: str) -> NDArray[np.float64]:
        return tensors[name].astype(np.float64)

    pairs = [
        [(tensor(target_name(v, i)), tensor(reconstruction_name(v, i))) for i in range(len(spec.levels))]
        for v in range(VIEWS)
    ]
    probability = tensor(PROBABILITY_NAME)[:, 0] if PROBABILITY_NAME in tensors else None
    parts = weighted(level_distances(pairs), spec.scoring, probability)
    maps = fold_maps(parts, spec.input.size_wh, spec.scoring.blur_sigma)
    return maps.astype(np.float32), image_scores(maps, spec.scoring).astype(np.float32)


def map_network(spec: ModelSpec) -> Network:
    """The same with map and score in the graph."""
    features = features_network(spec, np.float32)

    def network(image: NDArray[Any]) -> Tensors:
        maps, scores = judged(spec, features(image))
        return {MAP_NAME: maps[:, None], SCORE_NAME: scores}

    return network


class FakeTensorRt(ModuleType):
    """See the module.

    Attributes:
        calls: names of the calls that matter, in order.
        fail: names of calls that report failure the way TensorRT does: False or None.
        capturable: whether work may be captured; if not, the enqueue reports failure as TensorRT does.
        is_stale: whether such a failure is reported again by the next enqueue, whatever that is.
        refusal: the message with which an engine is refused.
        contexts_alive: execution contexts that were not destroyed yet.
        scratch_bytes: what a context computes in.
    """

    __version__ = "10.3.0"

    TensorIOMode = SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT")
    DataType = SimpleNamespace(FLOAT="FLOAT", HALF="HALF", BF16="BF16")
    TensorFormat = SimpleNamespace(LINEAR="LINEAR", HWC8="HWC8")
    ExecutionContextAllocationStrategy = SimpleNamespace(STATIC="STATIC", USER_MANAGED="USER_MANAGED")

    class ILogger:
        ERROR, INTERNAL_ERROR, WARNING, INFO = "ERROR", "INTERNAL_ERROR", "WARNING", "INFO"

    def __init__(
        self, driver: FakeDriver, network: Network, image_chw: tuple[int, int, int], *, batch: tuple[int, int] = (1, 2)
    ) -> None:
        super().__init__("tensorrt")
        self.driver = driver
        self.network = network
        self.batch = batch
        self.image_chw = image_chw
        self.calls: list[str] = []
        self.fail: set[str] = set()
        self.capturable = True
        self.is_stale = self.stale = False
        self.refusal = "the version tag does not match"
        self.contexts_alive = 0
        self.scratch_bytes = 1000
        self.engine_class: type[FakeEngine] = FakeEngine
        self.input_dtype: Any = np.float32
        self.tensor_format = "LINEAR"
        self.outputs = self.network(np.zeros((1, *image_chw)))

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        if "Runtime" in self.fail:
            raise TypeError("pybind11::init(): factory function returned nullptr")

        def deserialize(plan: bytes) -> Any:
            self.calls.append("deserialize_cuda_engine")
            assert plan == PLAN
            assert self.driver.current, "needs a current context"
            if "deserialize_cuda_engine" in self.fail:
                logger.log(self.ILogger.ERROR, self.refusal)
                return None
            return self.engine_class(self, logger)

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class FakeEngine:
    def __init__(self, library: FakeTensorRt, logger: Any) -> None:
        self.library = library
        self.logger = logger
        self.names = [INPUT_NAME, *library.outputs]
        self.num_io_tensors = len(self.names)
        self.device_memory_size_v2 = library.scratch_bytes
        self.scratch_streams: dict[int, int] = {}

    def __del__(self) -> None:
        # In the driver's own list, to be compared with what the driver was asked to do.
        in_order = self.library.contexts_alive == 0 and self.library.driver.current
        self.library.driver.calls.append("engine destroyed" if in_order else "engine torn away")

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name == INPUT_NAME else "OUTPUT"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        tail = self.library.image_chw if name == INPUT_NAME else self.library.outputs[name].shape[1:]
        return (-1, *tail)

    def get_tensor_format(self, name: str) -> str:
        return self.library.tensor_format

    def get_tensor_dtype(self, name: str) -> str:
        dtype = np.dtype(self.library.input_dtype if name == INPUT_NAME else self.library.outputs[name].dtype)
        return {"float32": "FLOAT", "float16": "HALF"}.get(dtype.name, "BF16")

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert (name, profile) == (INPUT_NAME, 0)
        low, high = self.library.batch
        return [(batch, *self.library.image_chw) for batch in (low, low, high)]

    def create_execution_context(self, strategy: str) -> Any:
        assert strategy == "USER_MANAGED"
        return self.new_context()

    def new_context(self) -> FakeContext | None:
        self.library.calls.append("create_execution_context")
        assert self.library.driver.current, "needs a current context"
        if "create_execution_context" in self.library.fail:
            return None
        return FakeContext(self)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.library = engine.library
        self.library.contexts_alive += 1
        self.addresses: dict[str, int] = {}
        self.batch: int | None = None
        self.scratch = (0, 0)
        self.enqueued_shapes: set[int] = set()

    def __del__(self) -> None:
        # Else it stays, as far as anybody can tell.
        if self.library.driver.current:
            self.library.contexts_alive -= 1

    def state(self) -> tuple[Any, ...]:
        """What a captured graph keeps."""
        return self.batch, self.scratch, tuple(self.addresses.items())

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        assert memory % 256 == 0
        self.scratch = (memory, size)

    def settle(self, batch: int) -> None:
        """What the library does at the first enqueue of a shape."""

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return "set_tensor_address" not in self.library.fail

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self.library.batch
        assert name == INPUT_NAME
        assert tuple(shape[1:]) == self.library.image_chw
        assert low <= shape[0] <= high, f"batch {shape[0]} is outside of the profile"
        self.library.calls.append("set_input_shape")
        self.batch = shape[0]
        return "set_input_shape" not in self.library.fail

    def execute_async_v3(self, stream: int) -> bool:
        library = self.library
        library.calls.append("execute_async_v3")
        assert library.driver.current, "needs a current context"
        assert self.batch is not None
        assert set(self.addresses) == set(self.engine.names)
        capturing = library.driver.is_capturing(stream)
        if capturing:
            assert self.batch in self.enqueued_shapes, "captured before the first enqueue of this shape"
        stale, library.stale = library.stale, False
        if "execute_async_v3" in library.fail or stale or (capturing and not library.capturable):
            library.stale = capturing and library.is_stale
            self.engine.logger.log(library.ILogger.ERROR, "enqueue failed\nwith details")
            return False
        if self.batch not in self.enqueued_shapes:
            self.enqueued_shapes.add(self.batch)
            self.settle(self.batch)
        batch, state = self.batch, self.state()
        memory, size = self.scratch
        assert self.engine.scratch_streams.setdefault(memory, stream) == stream, "two streams at once in one scratch"

        def run() -> None:
            assert self.state() == state, "the context was changed after the capture"
            library.driver.fill(memory, size)
            image = _array(self.addresses[INPUT_NAME], (batch, *library.image_chw), library.input_dtype)
            for name, found in library.network(image).items():
                assert found.shape[0] == batch
                np.copyto(_array(self.addresses[name], found.shape, found.dtype), found)

        library.driver.enqueue(stream, run)
        return True


class FakeTensorRtForRtx(FakeTensorRt):
    """With a runtime configuration, and kernels that are compiled for each batch size unless the cache has them.

    Attributes:
        compiled: batch sizes, as they were compiled.
        gpu_driver: whose cache no other one takes.
        takes_cache: whether a configuration accepts a cache.
    """

    __version__ = "1.7.1.116"

    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="LAZY", EAGER="EAGER")

    def __init__(self, driver: FakeDriver, network: Network, image_chw: tuple[int, int, int]) -> None:
        super().__init__(driver, network, image_chw)
        self.engine_class = FakeRtxEngine
        self.compiled: list[int] = []
        self.gpu_driver = b"driver 580"
        self.takes_cache = True


class FakeRtxEngine(FakeEngine):
    library: FakeTensorRtForRtx

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig(self.library)

    def create_execution_context(self, config: Any) -> Any:
        assert isinstance(config, FakeRuntimeConfig)
        assert config.strategy == "USER_MANAGED"
        assert config.dynamic_shapes_kernel_specialization_strategy == "EAGER", "else scores change while frames run"
        context = self.new_context()
        if context is not None:
            context.settle = config.compile  # type: ignore[method-assign]
        return context


class FakeRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = "LAZY"
    strategy = "STATIC"

    def __init__(self, library: FakeTensorRtForRtx) -> None:
        self._library = library
        self._batches: set[int] = set()
        # It refers to its cache, and does not keep it.
        self._cache: weakref.ref[FakeRuntimeCache] | None = None

    def __del__(self) -> None:
        if self._cache is not None and self._cache() is None:
            self._library.driver.calls.append("cache torn away")

    def compile(self, batch: int) -> None:
        cache = self._cache and self._cache()
        batches = self._batches if cache is None else cache.batches
        if batch not in batches:
            batches.add(batch)
            self._library.compiled.append(batch)

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache(self._library)

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        if self._library.takes_cache:
            self._cache = weakref.ref(cache)
        return self._library.takes_cache


class FakeRuntimeCache:
    def __init__(self, library: FakeTensorRtForRtx) -> None:
        self._library = library
        self.batches: set[int] = set()

    def serialize(self) -> memoryview:
        assert self._library.driver.current, "needs a current context"
        return memoryview(self._library.gpu_driver + bytes(sorted(self.batches)))

    def deserialize(self, blob: bytes) -> bool:
        assert self._library.driver.current, "needs a current context"
        if not blob.startswith(self._library.gpu_driver):
            return False
        self.batches = set(blob.removeprefix(self._library.gpu_driver))
        return True


def _array(pointer: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(pointer)).view(dtype).reshape(shape)
