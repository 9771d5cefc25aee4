"""The `pycuda` package behind ``recontrast_edge.cuda``: what much code on Jetson uses. It has no graphs.

open_device(context=pycuda.autoprimaryctx.context, binding="pycuda")
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.cuda import CudaError, Handle
from recontrast_edge.errors import GpuNotReadyError, MissingError
from recontrast_edge.kernels import Launch


class PyCuda:
    """See ``cuda.Binding`` and ``cuda.open_device``.

    PyCUDA checks every return code itself and raises; those errors become CudaError here. Its objects free themselves
    when the last reference goes, some only so: then a context that is not current or gone costs a warning and a leak.
    The GPU's primary context it gives back only in the thread that opened the device; in another one it stays.

    Raises:
        MissingError: the package, the driver or the GPU is missing.
        CudaError: the driver refused.
    """

    graphs = None

    def __init__(self, ordinal: int, context: Any) -> None:
        try:
            import pycuda
            import pycuda.driver as driver
        except ImportError as error:
            raise MissingError(
                f"pycuda cannot be imported ({error}); install it on a machine with a CUDA toolkit: "
                "pip install 'recontrast-edge[pycuda]'"
            ) from None
        self._driver = driver
        self.name = f"pycuda {pycuda.VERSION_TEXT}"
        try:
            driver.init()
            count = driver.Device.count()
        except driver.Error as error:
            raise GpuNotReadyError(f"no NVIDIA GPU can be used here ({error}); see `recontrast-edge doctor`") from None
        self._owned = context is None
        if self._owned:
            if not 0 <= ordinal < count:
                raise MissingError(f"expected GPU {ordinal}, this machine has {count} (numbered from 0)")
            self._thread = threading.get_ident()
            with self._checked("cuDevicePrimaryCtxRetain"):
                self._context = driver.Device(ordinal).retain_primary_context()
        elif hasattr(context, "push"):
            self._context = context
        else:
            raise TypeError(f"expected a pycuda.driver.Context, got {context!r}; cuda-bindings takes numbers too")

    @contextmanager
    def _checked(self, call: str) -> Iterator[None]:
        try:
            yield
        except self._driver.Error as error:
            # "cuMemAlloc failed: out of memory"
            function, separator, text = str(error).partition(" failed: ")
            raise CudaError(function if separator else call, "", text or str(error)) from None

    def push(self) -> None:
        with self._checked("cuCtxPushCurrent"):
            self._context.push()

    def pop(self) -> None:
        with self._checked("cuCtxPopCurrent"):
            self._driver.Context.pop()

    def release(self) -> None:
        if not self._owned:
            return
        with self._checked("cuDevicePrimaryCtxRelease"):
            self._context.detach()
        if threading.get_ident() == self._thread:
            # PyCUDA makes a context current to give it back. Others are popped by that, but primary ones are not: the
            # thread would be left with a context that is gone.
            ctypes.CDLL("libcuda.so.1").cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def facts(self) -> tuple[str, tuple[int, int], int]:
        with self._checked("cuDeviceGetAttribute"):
            device = self._driver.Context.get_device()
            multiprocessors = device.get_attribute(self._driver.device_attribute.MULTIPROCESSOR_COUNT)
            return str(device.name()), device.compute_capability(), int(multiprocessors)

    def memory_info(self) -> tuple[int, int]:
        with self._checked("cuMemGetInfo"):
            free, total = self._driver.mem_get_info()
        return int(free), int(total)

    def allocate(self, size_bytes: int) -> tuple[Handle, int]:
        with self._checked("cuMemAlloc"):
            allocation = self._driver.mem_alloc(size_bytes)
        return allocation, int(allocation)

    def free(self, handle: Handle) -> None:
        with self._checked("cuMemFree"):
            handle.free()

    def allocate_pinned(self, size_bytes: int) -> tuple[Handle, NDArray[np.uint8]]:
        with self._checked("cuMemHostAlloc"):
            array = self._driver.pagelocked_empty(size_bytes, np.uint8)
        return array.base, array

    def free_pinned(self, handle: Handle) -> None:
        with self._checked("cuMemFreeHost"):
            handle.free()

    def create_stream(self) -> Handle:
        with self._checked("cuStreamCreate"):
            return self._driver.Stream(_NON_BLOCKING)

    def adopt_stream(self, stream: Any) -> Handle:
        if not hasattr(stream, "handle"):
            raise TypeError(f"expected a pycuda.driver.Stream, got {stream!r}; cuda-bindings takes numbers too")
        return stream

    def stream_number(self, stream: Handle) -> int:
        return int(stream.handle)

    def destroy_stream(self, stream: Handle) -> None:
        """Left to PyCUDA, which destroys a stream with its last reference."""

    def synchronize(self, stream: Handle) -> None:
        with self._checked("cuStreamSynchronize"):
            stream.synchronize()

    def copy_to_device(self, target: int, source: NDArray[np.uint8], stream: Handle) -> None:
        with self._checked("cuMemcpyHtoDAsync"):
            self._driver.memcpy_htod_async(target, source, stream)

    def copy_to_host(self, target: NDArray[np.uint8], source: int, stream: Handle) -> None:
        with self._checked("cuMemcpyDtoHAsync"):
            self._driver.memcpy_dtoh_async(target, source, stream)

    def zero(self, target: int, size_bytes: int, stream: Handle) -> None:
        with self._checked("cuMemsetD8Async"):
            self._driver.memset_d8_async(target, 0, size_bytes, stream)

    def create_event(self) -> Handle:
        with self._checked("cuEventCreate"):
            return self._driver.Event()

    def record(self, event: Handle, stream: Handle) -> None:
        with self._checked("cuEventRecord"):
            event.record(stream)

    def elapsed_ms(self, start: Handle, end: Handle) -> float:
        with self._checked("cuEventElapsedTime"):
            return float(end.time_since(start))

    def destroy_event(self, event: Handle) -> None:
        """Left to PyCUDA, which destroys an event with its last reference."""

    def load_module(self, image: bytes) -> Handle:
        with self._checked("cuModuleLoadDataEx"):
            return self._driver.module_from_buffer(image)

    def function(self, module: Handle, name: str) -> Handle:
        with self._checked("cuModuleGetFunction"):
            return module.get_function(name)

    def unload_module(self, module: Handle) -> None:
        """Left to PyCUDA, which unloads a module with its last reference."""

    def launch(self, function: Handle, launch: Launch, params: ctypes.Structure, stream: Handle) -> None:
        with self._checked("cuLaunchKernel"):
            function(
                np.frombuffer(memoryview(params), np.uint8),
                grid=launch.grid,
                block=launch.block,
                shared=launch.shared_bytes,
                stream=stream,
            )


_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING."""
