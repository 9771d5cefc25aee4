"""The `cuda-bindings` package behind ``recontrast_edge.cuda``: NVIDIA's own binding, with graphs.

open_device(binding="cuda-bindings")
"""

from __future__ import annotations

import ctypes
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.cuda import CudaError, Handle
from recontrast_edge.errors import GpuNotReadyError, MissingError
from recontrast_edge.kernels import Launch


class CudaBindings:
    """See ``cuda.Binding`` and ``cuda.open_device``.

    Raises:
        MissingError: the package, the driver or the GPU is missing.
        CudaError: the driver refused.
    """

    def __init__(self, ordinal: int, context: Any) -> None:
        self._driver = _import_driver()
        try:
            self.name = f"cuda-bindings {version('cuda-bindings')}"
        except PackageNotFoundError:
            self.name = "cuda-bindings"
        self._initialize(ordinal, asked_for=context is None)
        self._owned = context is None
        if self._owned:
            self._device = self._call("cuDeviceGet", ordinal)
            self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        else:
            self._context = self._driver.CUcontext(_number(context))
            self.push()
            try:
                self._device = self._call("cuCtxGetDevice")
            finally:
                self.pop()

    def _initialize(self, ordinal: int, *, asked_for: bool) -> None:
        try:
            self._result("cuInit", self._returned("cuInit", 0))
            count = self._call("cuDeviceGetCount")
        except CudaError as error:
            raise GpuNotReadyError(f"no NVIDIA GPU can be used here ({error}); see `recontrast-edge doctor`") from None
        except RuntimeError as error:
            # The binding looks for libcuda.so.1 at the first call.
            reason = str(error).strip().splitlines()[0]
            raise MissingError(f"the NVIDIA driver is missing ({reason}); see `recontrast-edge doctor`") from None
        if asked_for and not 0 <= ordinal < count:
            raise MissingError(f"expected GPU {ordinal}, this machine has {count} (numbered from 0)")

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call the driver; its result without the code, a single value as such."""
        try:
            returned = self._returned(function, *arguments)
        except RuntimeError as error:
            # The binding looks a function up when it is called first.
            reason = str(error).strip().splitlines()[0]
            raise CudaError(function, "", f"{reason}; the driver is older than {self.name}") from None
        return self._result(function, returned)

    def _returned(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        """What the binding makes of the driver's answer: a code, and results."""
        try:
            returned: tuple[Any, ...] = getattr(self._driver, function)(*arguments)
        except (KeyError, ValueError) as error:
            # It fails itself, the one way or the other, where it does not know the driver's code.
            raise CudaError(function, "", f"an error that {self.name} does not know ({error})") from None
        return returned

    def _result(self, function: str, returned: tuple[Any, ...]) -> Any:
        code, *results = returned
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise CudaError(function, code.name, self._text(code))
        return results[0] if len(results) == 1 else tuple(results)

    def _text(self, code: Any) -> str:
        known, text = self._driver.cuGetErrorString(code)
        if known != self._driver.CUresult.CUDA_SUCCESS or not text:
            return "unknown error"
        return str(text.decode())

    @property
    def graphs(self) -> CudaBindings:
        return self

    def push(self) -> None:
        self._call("cuCtxPushCurrent", self._context)

    def pop(self) -> None:
        self._call("cuCtxPopCurrent")

    def release(self) -> None:
        if self._owned:
            self._call("cuDevicePrimaryCtxRelease", self._device)

    def facts(self) -> tuple[str, tuple[int, int], int]:
        attributes = self._driver.CUdevice_attribute
        major, minor, multiprocessors = (
            int(self._call("cuDeviceGetAttribute", getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}"), self._device))
            for name in ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MULTIPROCESSOR_COUNT")
        )
        name = self._call("cuDeviceGetName", 256, self._device)
        return name.split(b"\0")[0].decode(errors="replace"), (major, minor), multiprocessors

    def memory_info(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, size_bytes: int) -> tuple[Handle, int]:
        handle = self._call("cuMemAlloc", size_bytes)
        return handle, int(handle)

    def free(self, handle: Handle) -> None:
        self._call("cuMemFree", handle)

    def allocate_pinned(self, size_bytes: int) -> tuple[Handle, NDArray[np.uint8]]:
        address = int(self._call("cuMemHostAlloc", size_bytes, 0))
        return address, np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))

    def free_pinned(self, handle: Handle) -> None:
        self._call("cuMemFreeHost", handle)

    def create_stream(self) -> Handle:
        # Not ordered with the default stream, where other libraries may be at work.
        return self._call("cuStreamCreate", self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)

    def adopt_stream(self, stream: Any) -> Handle:
        return self._driver.CUstream(_number(stream))

    def stream_number(self, stream: Handle) -> int:
        return int(stream)

    def destroy_stream(self, stream: Handle) -> None:
        self._call("cuStreamDestroy", stream)

    def synchronize(self, stream: Handle) -> None:
        self._call("cuStreamSynchronize", stream)

    def copy_to_device(self, target: int, source: NDArray[np.uint8], stream: Handle) -> None:
        self._call("cuMemcpyHtoDAsync", target, source.ctypes.data, source.nbytes, stream)

    def copy_to_host(self, target: NDArray[np.uint8], source: int, stream: Handle) -> None:
        self._call("cuMemcpyDtoHAsync", target.ctypes.data, source, target.nbytes, stream)

    def zero(self, target: int, size_bytes: int, stream: Handle) -> None:
        self._call("cuMemsetD8Async", target, 0, size_bytes, stream)

    def create_event(self) -> Handle:
        return self._call("cuEventCreate", self._driver.CUevent_flags.CU_EVENT_DEFAULT.value)

    def record(self, event: Handle, stream: Handle) -> None:
        flags = self._driver.CUevent_record_flags
        # Within a capture, a plain record would only order the graph's nodes; an external one is a node of its own.
        status = self._driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
        capturing = self._call("cuStreamIsCapturing", stream) == status
        flag = flags.CU_EVENT_RECORD_EXTERNAL if capturing else flags.CU_EVENT_RECORD_DEFAULT
        self._call("cuEventRecordWithFlags", event, stream, flag.value)

    def elapsed_ms(self, start: Handle, end: Handle) -> float:
        return float(self._call("cuEventElapsedTime", start, end))

    def destroy_event(self, event: Handle) -> None:
        self._call("cuEventDestroy", event)

    def load_module(self, image: bytes) -> Handle:
        return self._call("cuModuleLoadData", image)

    def function(self, module: Handle, name: str) -> Handle:
        return self._call("cuModuleGetFunction", module, name.encode())

    def unload_module(self, module: Handle) -> None:
        self._call("cuModuleUnload", module)

    def launch(self, function: Handle, launch: Launch, params: ctypes.Structure, stream: Handle) -> None:
        # The driver copies the struct before the call returns, also when it captures.
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        self._call(
            "cuLaunchKernel",
            function,
            *launch.grid,
            *launch.block,
            launch.shared_bytes,
            stream,
            ctypes.addressof(arguments),
            0,
        )

    def begin_capture(self, stream: Handle) -> None:
        # Other threads may go on allocating; what this one must not do while capturing is still an error.
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Handle) -> Handle:
        return self._call("cuStreamEndCapture", stream)

    def instantiate(self, graph: Handle) -> Handle:
        return self._call("cuGraphInstantiate", graph, 0)

    def launch_graph(self, executable: Handle, stream: Handle) -> None:
        self._call("cuGraphLaunch", executable, stream)

    def destroy_graph(self, graph: Handle) -> None:
        self._call("cuGraphDestroy", graph)

    def destroy_executable(self, executable: Handle) -> None:
        self._call("cuGraphExecDestroy", executable)


def _import_driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingError(
            f"cuda-bindings cannot be imported ({error}); install it: pip install 'recontrast-edge[gpu]'"
        ) from None
    return driver


def _number(resource: Any) -> int:
    """The number of an application's context or stream: an int already, or in PyCUDA's ``handle``."""
    return int(getattr(resource, "handle", resource))
