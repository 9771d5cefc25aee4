"""A CUDA driver in host memory that records every call and runs the kernels' own source; for tests without a GPU.

    driver = FakeDriver(host); install(driver, monkeypatch)

Work is only queued until somebody waits, as on a GPU: whoever reads a result too early reads NaN. Fresh memory is full
of NaN. What is copied, cleared or handed to a kernel must be memory of the right kind that still lives when the work is
done, contexts are current for a thread, and a capture is spoilt by whatever could make a real driver wait or allocate.
``FakeDriver`` has the functions of ``cuda.bindings.driver`` that the project and PyCUDA call; ``tests.edge.libcuda``
puts one below the real packages.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import numpy as np
import pytest

from recontrast_edge.cuda import Device, cuda_bindings, open_device
from recontrast_edge.kernels import AnomalyMapParams, Launch, PreprocessParams, launcher
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
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class UnknownCodeError(ValueError):
    """What ``cuda-bindings`` raises where the driver gives a code that it has no name for."""

    def __init__(self, code: int) -> None:
        super().__init__(f"{code} is not a valid CUresult")
        self.code = code


class CUdevice_attribute(IntEnum):  # noqa: N801
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
    CU_DEVICE_ATTRIBUTE_INTEGRATED = 18
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class CUstream_flags(IntEnum):  # noqa: N801
    CU_STREAM_DEFAULT = 0
    CU_STREAM_NON_BLOCKING = 1


class CUevent_flags(IntEnum):  # noqa: N801
    CU_EVENT_DEFAULT = 0


class CUevent_record_flags(IntEnum):  # noqa: N801
    CU_EVENT_RECORD_DEFAULT = 0
    CU_EVENT_RECORD_EXTERNAL = 1


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


class CUstreamCaptureStatus(IntEnum):
    CU_STREAM_CAPTURE_STATUS_NONE = 0
    CU_STREAM_CAPTURE_STATUS_ACTIVE = 1


ENUMS = (
    CUresult,
    CUdevice_attribute,
    CUstream_flags,
    CUevent_flags,
    CUevent_record_flags,
    CUstreamCaptureMode,
    CUstreamCaptureStatus,
)
"""With the driver's own numbers."""

ALLOCATIONS = frozenset(
    {"cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuEventCreate", "cuModuleLoadData", "cuGraphInstantiate"}
)

SPOIL_CAPTURES = frozenset(
    {"cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuMemFreeHost", "cuModuleLoadData", "cuModuleUnload"}
    # By default the driver loads a kernel when it is asked for, or launched for the first time.
    | {"cuModuleGetFunction"}
)
"""May wait or allocate, and so are refused to a thread that captures; as is a kernel's first launch."""


def install(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it what ``cuda-bindings`` finds."""
    monkeypatch.setattr(cuda_bindings, "_import_driver", lambda: driver)


@contextmanager
def fake_device(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A device of a fake driver, with our kernels; all that it gave must have been given back at the end."""
    driver = FakeDriver(host)
    install(driver, monkeypatch)
    monkeypatch.setattr(launcher, "compiled_kernels", lambda _capability: b"a cubin")
    with open_device(binding="cuda-bindings") as device:
        yield device
    assert driver.live == {}


class FakeDriver:
    """See the module.

    Attributes:
        calls: names of the functions called, in order.
        failures: function -> code that its next call gives instead of doing anything; an illegal address costs the
            context, so that every later call gives it too. A number that no ``CUresult`` has is an error newer than
            the binding.
        live: what was made and not given back: handle -> kind.
        compute_capability, is_integrated: of the GPU.
        is_alone: no other library allocates, so that every pointer that a kernel gets must be known.
    """

    CUresult = CUresult
    CUdevice_attribute = CUdevice_attribute
    CUstream_flags = CUstream_flags
    CUevent_flags = CUevent_flags
    CUevent_record_flags = CUevent_record_flags
    CUstreamCaptureMode = CUstreamCaptureMode
    CUstreamCaptureStatus = CUstreamCaptureStatus
    CUcontext = CUstream = int

    def __init__(self, host: Host | None = None, *, compute_capability: tuple[int, int] = (8, 7)) -> None:
        self.calls: list[str] = []
        self.failures: dict[str, CUresult | int] = {}
        self.live: dict[int, str] = {}
        self.compute_capability = compute_capability
        self.is_integrated = False
        self.is_alone = True
        self.images: list[bytes] = []
        self.stream_flags: list[CUstream_flags] = []
        self._contexts = threading.local()
        self._lost = CUresult.CUDA_SUCCESS
        self._host = host
        self._runs_kernels = True
        self._handles = itertools.count(1000)
        self._memory: dict[int, np.ndarray] = {}
        self._queues: dict[int, list[Work]] = {}
        self._captures: dict[int, _Capture] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._functions: dict[int, tuple[int, str]] = {}
        self._launched: set[int] = set()
        self._ticks = itertools.count()
        self._event_ticks: dict[int, int | None] = {}

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not re.match("cu[A-Z]", name):
            return found

        def called(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            assert self.current or name in _WITHOUT_CONTEXT, f"{name} without a current context"
            code = self.failures.pop(name, self._lost if name not in _WITHOUT_CONTEXT else CUresult.CUDA_SUCCESS)
            if not isinstance(code, CUresult):
                raise UnknownCodeError(code)
            if code == CUresult.CUDA_ERROR_ILLEGAL_ADDRESS:
                self._lost = code
            if code != CUresult.CUDA_SUCCESS:
                return code, *([None] * _RESULTS.get(name, 0))
            result = self._spoilt(name) or found(*arguments)
            if isinstance(result, CUresult):
                return result, *([None] * _RESULTS.get(name, 0))
            return (
                CUresult.CUDA_SUCCESS,
                *(() if result is None else result if isinstance(result, tuple) else (result,)),
            )

        return called

    # What tests ask.

    @property
    def current(self) -> list[int]:
        """The calling thread's contexts."""
        contexts: list[int] = self._contexts.__dict__.setdefault("stack", [])
        return contexts

    def counts(self) -> Counter[str]:
        return Counter(self.calls)

    def enqueue(self, stream: int, work: Work) -> None:
        """As another library would, TensorRT for one."""
        assert stream in self._queues, f"work for a stream that is not there: {stream}"
        capture = self._captures.get(stream)
        (self._queues[stream] if capture is None else capture.work).append(work)

    def end(self) -> None:
        """What a process leaves behind goes with it."""
        self.current.append(0)
        for left in (self.live, self._graphs, self._queues):
            left.clear()
        self.current.pop()

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

    def _view(self, pointer: int, size: int, kind: str = "device memory") -> np.ndarray:
        for start, memory in self._memory.items():
            if start <= pointer and pointer + size <= start + memory.size and self.live[start] == kind:
                return memory[pointer - start : pointer - start + size]
        raise AssertionError(f"{size} bytes at {pointer:#x} are not within any living {kind}")

    def _spoilt(self, name: str) -> CUresult | None:
        if name not in SPOIL_CAPTURES:
            return None
        own = [capture for capture in self._captures.values() if capture.thread == threading.get_ident()]
        if not own:
            return None
        for capture in own:
            capture.spoilt = True
        return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED

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

    def cuCtxCreate(self, parameters: int, flags: int, device: int) -> int:  # noqa: N802
        assert parameters == 0
        context = self._make("context")
        self.current.append(context)
        return context

    def cuCtxDetach(self, context: int) -> None:  # noqa: N802
        assert self.current.pop() == context
        self._drop(context, "context")

    def cuCtxPushCurrent(self, context: int) -> None:  # noqa: N802
        self.current.append(context)

    def cuCtxPopCurrent(self) -> int:  # noqa: N802
        return self.current.pop()

    def cuCtxGetDevice(self) -> int:  # noqa: N802
        return 0

    def cuDeviceGetName(self, size: int, device: int) -> bytes:  # noqa: N802
        return NAME.ljust(size, b"\0")

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> int:  # noqa: N802
        major, minor = self.compute_capability
        return {
            CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: major,
            CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: minor,
            CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: MULTIPROCESSORS,
            CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED: int(self.is_integrated),
        }[CUdevice_attribute(attribute)]

    def cuMemGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return 1 << 30, 2 << 30

    def cuGetErrorString(self, code: int) -> bytes:  # noqa: N802
        return CUresult(code).name.removeprefix("CUDA_ERROR_").replace("_", " ").lower().encode()

    def _allocate(self, size: int, kind: str) -> int:
        if size == 0:
            return CUresult.CUDA_ERROR_INVALID_VALUE
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
        self.stream_flags.append(CUstream_flags(flags))
        stream = self._make("stream")
        self._queues[stream] = []
        return stream

    def adopt(self, stream: int) -> None:
        """A stream that an application has made."""
        self._queues[stream] = []

    def cuStreamDestroy(self, stream: int) -> None:  # noqa: N802
        self._drop(stream, "stream")
        del self._queues[stream]

    def cuStreamSynchronize(self, stream: int) -> CUresult | None:  # noqa: N802
        capture = self._captures.get(stream)
        if capture is not None:
            capture.spoilt = True
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        queue, self._queues[stream] = self._queues[stream], []
        for work in queue:
            work()
        return None

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> None:  # noqa: N802
        self._copy((target, size, "device memory"), (source, size, "pinned memory"), stream)

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> None:  # noqa: N802
        self._copy((target, size, "pinned memory"), (source, size, "device memory"), stream)

    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> None:  # noqa: N802
        self._copy((target, size, "device memory"), (source, size, "device memory"), stream)

    def _copy(self, target: tuple[int, int, str], source: tuple[int, int, str], stream: int) -> None:
        self._view(*target), self._view(*source)
        self.enqueue(stream, lambda: np.copyto(self._view(*target), self._view(*source)))

    def cuMemsetD8Async(self, target: int, value: int, size: int, stream: int) -> None:  # noqa: N802
        self._view(target, size)
        self.enqueue(stream, lambda: self._view(target, size).fill(value))

    def cuEventCreate(self, flags: int) -> int:  # noqa: N802
        CUevent_flags(flags)
        return self._make("event")

    def cuEventDestroy(self, event: int) -> None:  # noqa: N802
        self._drop(event, "event")
        self._event_ticks.pop(event, None)

    def cuStreamIsCapturing(self, stream: int) -> CUstreamCaptureStatus:  # noqa: N802
        state = "ACTIVE" if stream in self._captures else "NONE"
        return CUstreamCaptureStatus[f"CU_STREAM_CAPTURE_STATUS_{state}"]

    def cuEventRecordWithFlags(self, event: int, stream: int, flags: int) -> None:  # noqa: N802
        # Within a capture only an external record becomes part of the graph.
        assert (flags == CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL) == (stream in self._captures)
        if stream not in self._captures:
            self._event_ticks[event] = None
        self.enqueue(stream, lambda: self._event_ticks.__setitem__(event, next(self._ticks)))

    def cuEventElapsedTime(self, start: int, end: int) -> float | CUresult:  # noqa: N802
        if not {start, end} <= self._event_ticks.keys():
            return CUresult.CUDA_ERROR_INVALID_HANDLE
        began, ended = self._event_ticks[start], self._event_ticks[end]
        return CUresult.CUDA_ERROR_NOT_READY if began is None or ended is None else 0.5 * (ended - began)

    def cuModuleLoadData(self, image: bytes) -> int:  # noqa: N802
        self.images.append(image)
        return self._make("module")

    def cuModuleUnload(self, module: int) -> None:  # noqa: N802
        self._drop(module, "module")

    def cuModuleGetFunction(self, module: int, name: bytes) -> int:  # noqa: N802
        function = next(self._handles)
        self._functions[function] = module, name.decode()
        return function

    def cuLaunchKernel(  # noqa: N802
        self, function: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int, stream: int, *rest: int
    ) -> CUresult | None:
        address = _argument(*rest)
        module, name = self._functions[function]
        assert self.live.get(module) == "module", f"{name} of a module that was unloaded"
        capture = self._captures.get(stream)
        if capture is not None and function not in self._launched:
            capture.spoilt = True
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        self._launched.add(function)
        self.launch_kernel(name, (gx, gy, gz), (bx, by, bz), shared, stream, address)
        return None

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
            for pointer in _pointers(params) if self.is_alone else ():
                self._view(pointer, 1)
            if self._runs_kernels:
                host.launch(launch, params)

        self.enqueue(stream, run)

    def cuStreamBeginCapture(self, stream: int, mode: int) -> None:  # noqa: N802
        CUstreamCaptureMode(mode)
        assert stream not in self._captures
        self._captures[stream] = _Capture(threading.get_ident())

    def cuStreamEndCapture(self, stream: int) -> int | CUresult:  # noqa: N802
        capture = self._captures.pop(stream)
        assert capture.thread == threading.get_ident(), "ended by another thread than began it"
        if capture.spoilt:
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
        graph = self._make("graph")
        self._graphs[graph] = capture.work
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


class _Capture:
    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.work: list[Work] = []
        self.spoilt = False


def _argument(arguments: int, extra: int) -> int:
    """Where a kernel's only argument lies: the first of ``arguments``, or, as PyCUDA does, the whole of a buffer."""
    if arguments:
        assert extra == 0
        address = ctypes.c_void_p.from_address(arguments).value
    else:
        pointer, address, size, _, end = (ctypes.c_void_p * 5).from_address(extra)
        assert (pointer, size, end) == (1, 2, None), "CU_LAUNCH_PARAM_BUFFER_POINTER, _BUFFER_SIZE, _END"
    assert address is not None
    return address


def _pointers(params: ctypes.Structure | ctypes.Array[Any]) -> Iterator[int]:
    """All pointers of a kernel's argument, but those that are null."""
    if isinstance(params, ctypes.Structure):
        for name, kind in params._fields_:
            value = getattr(params, name)
            if kind is ctypes.c_void_p and value:
                yield value
            elif isinstance(value, (ctypes.Structure, ctypes.Array)):
                yield from _pointers(value)
    else:
        for item in params:
            if isinstance(item, ctypes.Structure):
                yield from _pointers(item)
            elif params._type_ is ctypes.c_void_p and item:
                yield item


_WITHOUT_CONTEXT = frozenset(
    {"cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease"}
    | {"cuCtxCreate", "cuCtxPushCurrent", "cuCtxPopCurrent", "cuGetErrorString"}
)

_RESULTS = {
    **dict.fromkeys(("cuDeviceGetCount", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuMemAlloc", "cuMemHostAlloc"), 1),
    **dict.fromkeys(("cuStreamCreate", "cuEventCreate", "cuModuleLoadData", "cuModuleGetFunction"), 1),
    **dict.fromkeys(("cuStreamEndCapture", "cuGraphInstantiate", "cuEventElapsedTime"), 1),
    **dict.fromkeys(("cuCtxPopCurrent", "cuCtxGetDevice", "cuStreamIsCapturing", "cuGetErrorString"), 1),
    "cuMemGetInfo": 2,
}
"""Values that a function gives besides its code; None for each when it fails."""
