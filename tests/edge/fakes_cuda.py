"""A CUDA driver in host memory that records every call and runs the kernels' own source; for tests without a GPU.

    driver = FakeDriver(host); monkeypatch.setattr(cuda_bindings, "_import_driver", lambda: driver)

Work is only queued until somebody waits, as on a GPU: whoever reads a result too early reads NaN. Fresh memory is full
of NaN, and every copy must lie within living allocations. ``FakeDriver`` has the functions of ``cuda.bindings.driver``
that the project calls; ``FakePyCuda`` is ``pycuda.driver`` on top of one.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

from recontrast_edge.kernels import AnomalyMapParams, Launch, PreprocessParams
from tests.kernels.host import Host

Work = Callable[[], None]

NAME = b"Fake GPU"
MULTIPROCESSORS = 16


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class _Flag(IntEnum):
    CU_STREAM_NON_BLOCKING = 1
    CU_EVENT_DEFAULT = 2
    CU_EVENT_RECORD_DEFAULT = 3
    CU_EVENT_RECORD_EXTERNAL = 4
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 5
    CU_STREAM_CAPTURE_STATUS_ACTIVE = 6
    CU_STREAM_CAPTURE_STATUS_NONE = 7
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 8
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 9
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 10


ALLOCATIONS = frozenset(
    {"cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuEventCreate", "cuModuleLoadData", "cuGraphInstantiate"}
)


class FakeDriver:
    """See the module.

    Attributes:
        calls: names of the functions called, in order.
        failures: function -> code that its next call gives instead of doing anything.
        live: what was made and not given back: handle -> kind.
        compute_capability: of the GPU.
    """

    CUresult = CUresult
    CUdevice_attribute = CUevent_flags = CUevent_record_flags = CUstream_flags = _Flag
    CUstreamCaptureMode = CUstreamCaptureStatus = _Flag
    CUcontext = CUstream = int

    def __init__(self, host: Host | None = None, *, compute_capability: tuple[int, int] = (8, 7)) -> None:
        self.calls: list[str] = []
        self.failures: dict[str, CUresult] = {}
        self.live: dict[int, str] = {}
        self.compute_capability = compute_capability
        self.images: list[bytes] = []
        self.current: list[int] = []
        self._host = host
        self._runs_kernels = True
        self._handles = itertools.count(1000)
        self._memory: dict[int, np.ndarray] = {}
        self._queues: dict[int, list[Work]] = {}
        self._captures: dict[int, list[Work]] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._functions: dict[int, str] = {}
        self._ticks = itertools.count()
        self._event_ticks: dict[int, int] = {}

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not re.match("cu[A-Z]", name):
            return found

        def called(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name not in ("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuCtxPushCurrent", "cuGetErrorString"):
                primary = ("cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease")
                assert self.current or name in primary, f"{name} without a current context"
            code = self.failures.pop(name, CUresult.CUDA_SUCCESS)
            if code != CUresult.CUDA_SUCCESS:
                return code, *([None] * _RESULTS.get(name, 0))
            result = found(*arguments)
            if isinstance(result, CUresult):
                return result, *([None] * _RESULTS.get(name, 0))
            return (
                CUresult.CUDA_SUCCESS,
                *(() if result is None else result if isinstance(result, tuple) else (result,)),
            )

        return called

    # What tests ask.

    def counts(self) -> Counter[str]:
        return Counter(self.calls)

    def enqueue(self, stream: int, work: Work) -> None:
        """As another library would, TensorRT for one."""
        assert stream in self._queues, f"work for a stream that is not there: {stream}"
        capture = self._captures.get(stream)
        (self._queues[stream] if capture is None else capture).append(work)

    @contextmanager
    def without_kernels(self) -> Iterator[None]:
        """Where nobody reads results: kernels are slow on threads of the host."""
        self._runs_kernels = False
        try:
            yield
        finally:
            self._runs_kernels = True

    def fill(self, pointer: int, size: int) -> None:
        """Write NaN, as another library may into memory that it was lent."""
        self._view(pointer, size).fill(0xFF)

    def is_capturing(self, stream: int) -> bool:
        return stream in self._captures

    def _make(self, kind: str) -> int:
        handle = next(self._handles)
        self.live[handle] = kind
        return handle

    def _drop(self, handle: int, kind: str) -> None:
        assert self.live.pop(handle, None) == kind, f"{kind} {handle} given back twice, or never made"

    def _view(self, pointer: int, size: int) -> np.ndarray:
        for start, memory in self._memory.items():
            if start <= pointer and pointer + size <= start + memory.size:
                return memory[pointer - start : pointer - start + size]
        raise AssertionError(f"{size} bytes at {pointer:#x} are not within any living allocation")

    # The driver's functions.

    def cuInit(self, flags: int) -> None:  # noqa: N802
        assert flags == 0

    def cuDeviceGetCount(self) -> int:  # noqa: N802
        return 1

    def cuDeviceGet(self, ordinal: int) -> int:  # noqa: N802
        return ordinal

    def cuDevicePrimaryCtxRetain(self, device: int) -> int:  # noqa: N802
        return self._make("context")

    def cuDevicePrimaryCtxRelease(self, device: int) -> None:  # noqa: N802
        self._drop(next(handle for handle, kind in self.live.items() if kind == "context"), "context")

    def cuCtxPushCurrent(self, context: int) -> None:  # noqa: N802
        self.current.append(context)

    def cuCtxPopCurrent(self) -> int:  # noqa: N802
        return self.current.pop()

    def cuCtxGetDevice(self) -> int:  # noqa: N802
        return 0

    def cuDeviceGetName(self, size: int, device: int) -> bytes:  # noqa: N802
        return NAME.ljust(size, b"\0")

    def cuDeviceGetAttribute(self, attribute: _Flag, device: int) -> int:  # noqa: N802
        major, minor = self.compute_capability
        return {8: major, 9: minor, 10: MULTIPROCESSORS}[attribute]

    def cuMemGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return 1 << 30, 2 << 30

    def cuGetErrorString(self, code: CUresult) -> bytes:  # noqa: N802
        return code.name.removeprefix("CUDA_ERROR_").replace("_", " ").lower().encode()

    def _allocate(self, size: int, kind: str) -> int:
        memory = np.full(size + 256, 0xFF, np.uint8)
        start = -memory.ctypes.data % 256
        view = memory[start : start + size]
        pointer = view.ctypes.data
        self._memory[pointer] = view
        self.live[pointer] = kind
        return pointer

    def cuMemAlloc(self, size: int) -> int:  # noqa: N802
        return self._allocate(size, "device memory")

    def cuMemFree(self, pointer: int) -> None:  # noqa: N802
        self._drop(pointer, "device memory")
        del self._memory[pointer]

    def cuMemHostAlloc(self, size: int, flags: int) -> int:  # noqa: N802
        return self._allocate(size, "pinned memory")

    def cuMemFreeHost(self, pointer: int) -> None:  # noqa: N802
        self._drop(pointer, "pinned memory")
        del self._memory[pointer]

    def cuStreamCreate(self, flags: int) -> int:  # noqa: N802
        stream = self._make("stream")
        self._queues[stream] = []
        return stream

    def adopt(self, stream: int) -> None:
        """A stream that an application has made."""
        self._queues[stream] = []

    def cuStreamDestroy(self, stream: int) -> None:  # noqa: N802
        self._drop(stream, "stream")
        del self._queues[stream]

    def cuStreamSynchronize(self, stream: int) -> None:  # noqa: N802
        assert stream not in self._captures, "waiting is not allowed while capturing"
        queue, self._queues[stream] = self._queues[stream], []
        for work in queue:
            work()

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> None:  # noqa: N802
        self._copy(target, source, size, stream)

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> None:  # noqa: N802
        self._copy(target, source, size, stream)

    def _copy(self, target: int, source: int, size: int, stream: int) -> None:
        to, of = self._view(target, size), self._view(source, size)
        self.enqueue(stream, lambda: np.copyto(to, of))

    def cuMemsetD8Async(self, target: int, value: int, size: int, stream: int) -> None:  # noqa: N802
        view = self._view(target, size)
        self.enqueue(stream, lambda: view.fill(value))

    def cuEventCreate(self, flags: int) -> int:  # noqa: N802
        return self._make("event")

    def cuEventDestroy(self, event: int) -> None:  # noqa: N802
        self._drop(event, "event")

    def cuStreamIsCapturing(self, stream: int) -> _Flag:  # noqa: N802
        state = "ACTIVE" if stream in self._captures else "NONE"
        return _Flag[f"CU_STREAM_CAPTURE_STATUS_{state}"]

    def cuEventRecordWithFlags(self, event: int, stream: int, flags: int) -> None:  # noqa: N802
        # Within a capture only an external record becomes part of the graph.
        assert (flags == _Flag.CU_EVENT_RECORD_EXTERNAL) == (stream in self._captures)
        self.enqueue(stream, lambda: self._event_ticks.__setitem__(event, next(self._ticks)))

    def cuEventElapsedTime(self, start: int, end: int) -> float:  # noqa: N802
        return 0.5 * (self._event_ticks[end] - self._event_ticks[start])

    def cuModuleLoadData(self, image: bytes) -> int:  # noqa: N802
        self.images.append(image)
        return self._make("module")

    def cuModuleUnload(self, module: int) -> None:  # noqa: N802
        self._drop(module, "module")

    def cuModuleGetFunction(self, module: int, name: bytes) -> int:  # noqa: N802
        function = next(self._handles)
        self._functions[function] = name.decode()
        return function

    def cuLaunchKernel(  # noqa: N802
        self, function: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int, stream: int, *rest: int
    ) -> None:
        arguments, extra = rest
        assert extra == 0
        address = ctypes.c_void_p.from_address(arguments).value
        assert address is not None
        self.launch_kernel(self._functions[function], (gx, gy, gz), (bx, by, bz), shared, stream, address)

    def launch_kernel(
        self, name: str, grid: tuple[int, ...], block: tuple[int, ...], shared: int, stream: int, address: int
    ) -> None:
        """Queue a kernel; its argument is copied now, as CUDA does."""
        struct = PreprocessParams if name.startswith("preprocess") else AnomalyMapParams
        params = struct.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(struct)))
        launch = Launch(name, (grid[0], grid[1], grid[2]), (block[0], block[1], block[2]), shared)
        host = self._host
        assert host is not None

        def run() -> None:
            if self._runs_kernels:
                host.launch(launch, params)

        self.enqueue(stream, run)

    def cuStreamBeginCapture(self, stream: int, mode: int) -> None:  # noqa: N802
        assert stream not in self._captures
        self._captures[stream] = []

    def cuStreamEndCapture(self, stream: int) -> int:  # noqa: N802
        graph = self._make("graph")
        self._graphs[graph] = self._captures.pop(stream)
        return graph

    def cuGraphInstantiate(self, graph: int, flags: int) -> int:  # noqa: N802
        executable = self._make("executable graph")
        self._graphs[executable] = self._graphs[graph]
        return executable

    def cuGraphLaunch(self, executable: int, stream: int) -> None:  # noqa: N802
        for work in self._graphs[executable]:
            self.enqueue(stream, work)

    def cuGraphDestroy(self, graph: int) -> None:  # noqa: N802
        self._drop(graph, "graph")
        del self._graphs[graph]

    def cuGraphExecDestroy(self, executable: int) -> None:  # noqa: N802
        self._drop(executable, "executable graph")
        del self._graphs[executable]


_RESULTS = {
    **dict.fromkeys(("cuDeviceGetCount", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuMemAlloc", "cuMemHostAlloc"), 1),
    **dict.fromkeys(("cuStreamCreate", "cuEventCreate", "cuModuleLoadData", "cuModuleGetFunction"), 1),
    **dict.fromkeys(("cuStreamEndCapture", "cuGraphInstantiate", "cuEventElapsedTime"), 1),
    **dict.fromkeys(("cuCtxPopCurrent", "cuCtxGetDevice", "cuStreamIsCapturing", "cuGetErrorString"), 1),
    "cuMemGetInfo": 2,
}
"""Values that a function gives besides its code; None for each when it fails."""


class FakePyCuda:
    """``pycuda.driver`` on top of a ``FakeDriver``; its objects free themselves only where PyCUDA's do."""

    class Error(Exception):
        pass

    device_attribute = SimpleNamespace(MULTIPROCESSOR_COUNT=_Flag.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)

    def __init__(self, fake: FakeDriver) -> None:
        self.fake = fake
        outer = self

        class Context:
            def __init__(self) -> None:
                self.handle = outer.call("cuDevicePrimaryCtxRetain", 0)

            def push(self) -> None:
                outer.call("cuCtxPushCurrent", self.handle)

            def detach(self) -> None:
                outer.call("cuDevicePrimaryCtxRelease", 0)

            @staticmethod
            def pop() -> None:
                outer.call("cuCtxPopCurrent")

            @staticmethod
            def get_device() -> Device:
                return Device(0)

        class Device:
            def __init__(self, ordinal: int) -> None:
                self.ordinal = ordinal

            @staticmethod
            def count() -> int:
                return outer.call("cuDeviceGetCount")

            def retain_primary_context(self) -> Context:
                return Context()

            def get_attribute(self, attribute: _Flag) -> int:
                return outer.call("cuDeviceGetAttribute", attribute, self.ordinal)

            def name(self) -> str:
                return outer.call("cuDeviceGetName", 32, self.ordinal).rstrip(b"\0").decode()

            def compute_capability(self) -> tuple[int, int]:
                return fake.compute_capability

        class Stream:
            def __init__(self, flags: int = 0) -> None:
                assert flags == 1
                self.handle = outer.call("cuStreamCreate", flags)

            def synchronize(self) -> None:
                outer.call("cuStreamSynchronize", self.handle)

        self.Context, self.Device, self.Stream = Context, Device, Stream

    def call(self, function: str, *arguments: Any) -> Any:
        code, *results = getattr(self.fake, function)(*arguments)
        if code != CUresult.CUDA_SUCCESS:
            raise self.Error(f"{function} failed: {self.fake.cuGetErrorString(code)[1].decode()}")
        return results[0] if len(results) == 1 else results

    def init(self) -> None:
        self.call("cuInit", 0)

    def mem_get_info(self) -> tuple[int, int]:
        free, total = self.call("cuMemGetInfo")
        return free, total

    def mem_alloc(self, size: int) -> Any:
        pointer = self.call("cuMemAlloc", size)

        class Allocation(int):
            def free(_) -> None:  # noqa: N805
                self.call("cuMemFree", pointer)

        return Allocation(pointer)

    def pagelocked_empty(self, size: int, dtype: Any) -> np.ndarray:
        pointer = self.call("cuMemHostAlloc", size, 0)

        class Allocation:
            # NumPy makes whoever has this the base of its array.
            __array_interface__ = {  # noqa: RUF012
                "shape": (size,),
                "typestr": np.dtype(dtype).str,
                "data": (pointer, False),
                "version": 3,
            }

            def free(_) -> None:  # noqa: N805
                self.call("cuMemFreeHost", pointer)

        return np.asarray(Allocation())

    def memcpy_htod_async(self, target: int, source: np.ndarray, stream: Any) -> None:
        self.call("cuMemcpyHtoDAsync", target, source.ctypes.data, source.nbytes, stream.handle)

    def memcpy_dtoh_async(self, target: np.ndarray, source: int, stream: Any) -> None:
        self.call("cuMemcpyDtoHAsync", target.ctypes.data, source, target.nbytes, stream.handle)

    def memset_d8_async(self, target: int, value: int, count: int, stream: Any) -> None:
        self.call("cuMemsetD8Async", target, value, count, stream.handle)

    def module_from_buffer(self, image: bytes) -> Any:
        module = self.call("cuModuleLoadData", image)

        def get_function(name: str) -> Any:
            def launch(params: np.ndarray, *, grid: Any, block: Any, shared: int, stream: Any) -> None:
                assert params.dtype == np.uint8
                self.fake.launch_kernel(name, grid, block, shared, stream.handle, params.ctypes.data)

            self.call("cuModuleGetFunction", module, name.encode())
            return launch

        return SimpleNamespace(get_function=get_function)

    def Event(self) -> Any:  # noqa: N802
        event = self.call("cuEventCreate", 0)
        return SimpleNamespace(
            handle=event,
            record=lambda stream: self.call(
                "cuEventRecordWithFlags", event, stream.handle, _Flag.CU_EVENT_RECORD_DEFAULT
            ),
            time_since=lambda start: self.call("cuEventElapsedTime", start.handle, event),
        )
