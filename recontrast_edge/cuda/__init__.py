"""CUDA for the rest of the project: memory, streams, events, modules and graphs, whatever Python binding is installed.

    with open_device() as device: stream = device.stream(); memory = device.allocate(1 << 20)

No other module imports a CUDA binding. `cuda-bindings` is the default; `pycuda` works the same way, but has no graphs.
A context and streams that a PyCUDA application made are accepted by both. Resources belong to the device that made
them: closing one twice does no harm, and closing the device closes what is left, newest first.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.errors import GpuError, MissingError
from recontrast_edge.kernels import Launch

_log = logging.getLogger(__name__)

Handle = Any
"""What a binding calls a resource; opaque here."""


class CudaError(GpuError):
    """A CUDA call failed.

    Attributes:
        call: the function, e.g. ``cuMemAlloc``.
        code: the error's name, e.g. ``CUDA_ERROR_OUT_OF_MEMORY``; empty where the binding does not tell.
    """

    def __init__(self, call: str, code: str, text: str) -> None:
        super().__init__(f"the GPU failed in {call}: {text}{f' ({code})' if code else ''}")
        self.call = call
        self.code = code


class Binding(Protocol):
    """The CUDA driver as one Python package offers it. Every method raises CudaError when its call fails."""

    name: str
    """Package and version, for people."""

    @property
    def graphs(self) -> GraphBinding | None:
        """None where the package has no graphs."""
        ...

    def push(self) -> None:
        """Make the context the calling thread's current one."""
        ...

    def pop(self) -> None: ...

    def release(self) -> None:
        """Give the context back, unless it is the application's."""
        ...

    def facts(self) -> tuple[str, tuple[int, int], int]:
        """Name, compute capability and multiprocessors of the GPU."""
        ...

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes."""
        ...

    def allocate(self, size_bytes: int) -> tuple[Handle, int]:
        """Device memory: handle and pointer."""
        ...

    def free(self, handle: Handle) -> None: ...

    def allocate_pinned(self, size_bytes: int) -> tuple[Handle, NDArray[np.uint8]]: ...

    def free_pinned(self, handle: Handle) -> None: ...

    def create_stream(self) -> Handle: ...

    def adopt_stream(self, stream: Any) -> Handle:
        """A stream of the application: its number, or a PyCUDA stream."""
        ...

    def stream_number(self, stream: Handle) -> int: ...

    def destroy_stream(self, stream: Handle) -> None: ...

    def synchronize(self, stream: Handle) -> None: ...

    def copy_to_device(self, target: int, source: NDArray[np.uint8], stream: Handle) -> None: ...

    def copy_to_host(self, target: NDArray[np.uint8], source: int, stream: Handle) -> None: ...

    def zero(self, target: int, size_bytes: int, stream: Handle) -> None: ...

    def create_event(self) -> Handle: ...

    def record(self, event: Handle, stream: Handle) -> None:
        """Also while capturing: then each launch of the graph records it."""
        ...

    def elapsed_ms(self, start: Handle, end: Handle) -> float: ...

    def destroy_event(self, event: Handle) -> None: ...

    def load_module(self, image: bytes) -> Handle: ...

    def function(self, module: Handle, name: str) -> Handle: ...

    def unload_module(self, module: Handle) -> None: ...

    def launch(self, function: Handle, launch: Launch, params: ctypes.Structure, stream: Handle) -> None: ...


class GraphBinding(Protocol):
    """CUDA graphs as a Python package offers them."""

    def begin_capture(self, stream: Handle) -> None: ...

    def end_capture(self, stream: Handle) -> Handle:
        """The captured graph."""
        ...

    def instantiate(self, graph: Handle) -> Handle: ...

    def launch_graph(self, executable: Handle, stream: Handle) -> None: ...

    def destroy_graph(self, graph: Handle) -> None: ...

    def destroy_executable(self, executable: Handle) -> None: ...


class _Resource:
    """Something of the GPU that must be given back.

    Closing it also drops the binding's object: some give their resource back only then, and need the context for it.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._open = True
        device._resources[id(self)] = self

    def _free(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Give it back; may be called again. A failure is logged: there is nothing to be done about it."""
        if not self._open:
            return
        self._open = False
        del self._device._resources[id(self)]
        try:
            with self._device.current():
                self._free()
        except CudaError as error:
            _log.warning("closing %s: %s", type(self).__name__, error)


class DeviceMemory(_Resource):
    """Memory on the GPU, aligned to 256 bytes.

    Attributes:
        pointer, size_bytes: 0 once it is closed.
    """

    def __init__(self, device: Device, size_bytes: int) -> None:
        self._handle, self.pointer = device._binding.allocate(size_bytes)
        self.size_bytes = size_bytes
        super().__init__(device)

    def _free(self) -> None:
        self.pointer = self.size_bytes = 0
        self._device._binding.free(self._handle)


class PinnedMemory(_Resource):
    """Page-locked memory of the host, which the GPU copies from and to by itself.

    Attributes:
        array: (size_bytes,) uint8; must not be used after ``close``.
        size_bytes: 0 once it is closed.
    """

    def __init__(self, device: Device, size_bytes: int) -> None:
        self._handle, self.array = device._binding.allocate_pinned(size_bytes)
        self.size_bytes = size_bytes
        super().__init__(device)

    def _free(self) -> None:
        self.size_bytes = 0
        self._device._binding.free_pinned(self._handle)


class Event(_Resource):
    """A point in a stream's work, with its time."""

    def __init__(self, device: Device) -> None:
        self._handle = device._binding.create_event()
        super().__init__(device)

    def ms_since(self, start: Event) -> float:
        """Milliseconds between two recorded events that the GPU has passed."""
        return self._device._binding.elapsed_ms(start._handle, self._handle)

    def _free(self) -> None:
        self._device._binding.destroy_event(self._handle)
        self._handle = None


class Module(_Resource):
    """Loaded kernels."""

    def __init__(self, device: Device, image: bytes) -> None:
        self._handle = device._binding.load_module(image)
        self._functions: dict[str, Handle] = {}
        super().__init__(device)

    def function(self, name: str) -> Handle:
        """The kernel of this name, for ``Stream.launch``."""
        if name not in self._functions:
            self._functions[name] = self._device._binding.function(self._handle, name)
        return self._functions[name]

    def _free(self) -> None:
        self._functions.clear()
        self._device._binding.unload_module(self._handle)
        self._handle = None


class Graph(_Resource):
    """Captured work that is launched with one call."""

    def __init__(self, device: Device, binding: GraphBinding, captured: Handle) -> None:
        self._binding = binding
        self._executable = binding.instantiate(captured)
        super().__init__(device)

    def launch(self, stream: Stream) -> None:
        """Enqueue all of it."""
        self._binding.launch_graph(self._executable, stream._handle)

    def _free(self) -> None:
        self._binding.destroy_executable(self._executable)


class Stream(_Resource):
    """A queue of work for the GPU. Nothing but ``synchronize`` waits.

    Args:
        adopted: the application's stream, which is used and not destroyed; None makes a stream.
    """

    def __init__(self, device: Device, adopted: Any = None) -> None:
        self._owned = adopted is None
        self._handle = device._binding.create_stream() if self._owned else device._binding.adopt_stream(adopted)
        super().__init__(device)

    @property
    def number(self) -> int:
        """The stream as other libraries take it."""
        return self._device._binding.stream_number(self._handle)

    def copy_to_device(self, target: int, source: NDArray[np.uint8]) -> None:
        """Enqueue a copy; ``source`` is pinned memory and must stay as it is until the stream is done."""
        self._device._binding.copy_to_device(target, source, self._handle)

    def copy_to_host(self, target: NDArray[np.uint8], source: int) -> None:
        """Enqueue a copy of ``target.nbytes``; ``target`` is pinned memory."""
        self._device._binding.copy_to_host(target, source, self._handle)

    def zero(self, target: int, size_bytes: int) -> None:
        """Enqueue setting memory to zero."""
        self._device._binding.zero(target, size_bytes, self._handle)

    def launch(self, module: Module, launch: Launch, params: ctypes.Structure) -> None:
        """Enqueue a kernel with the struct, by value, as its only argument."""
        self._device._binding.launch(module.function(launch.kernel), launch, params, self._handle)

    def record(self, event: Event) -> None:
        """Enqueue an event; within a capture, each launch of the graph records it."""
        self._device._binding.record(event._handle, self._handle)

    def synchronize(self) -> None:
        """Wait until all of its work is done; errors of that work come up here."""
        self._device._binding.synchronize(self._handle)

    @contextmanager
    def capture(self) -> Iterator[Capture]:
        """Record what is enqueued in the block instead of running it; ``Capture.graph`` then makes it executable.

        Raises:
            CudaError: the stream or something enqueued cannot be captured; the stream is usable again.
        """
        binding = self._device._binding.graphs
        if binding is None:
            raise CudaError("cuStreamBeginCapture", "", f"{self._device.binding} has no CUDA graphs")
        binding.begin_capture(self._handle)
        capture = Capture(self._device, binding)
        try:
            yield capture
        except BaseException:
            try:
                binding.destroy_graph(binding.end_capture(self._handle))
            except CudaError as error:
                # What broke the capture is on its way up already; that the capture is broken is no news.
                _log.debug("ending a broken capture: %s", error)
            raise
        capture._captured = binding.end_capture(self._handle)

    def _free(self) -> None:
        if self._owned:
            self._device._binding.destroy_stream(self._handle)
        self._handle = None


class Capture:
    """What a stream's ``capture`` recorded."""

    def __init__(self, device: Device, binding: GraphBinding) -> None:
        self._device = device
        self._binding = binding
        self._captured: Handle = None

    def graph(self) -> Graph:
        """The executable graph; may be called once."""
        captured, self._captured = self._captured, None
        try:
            return Graph(self._device, self._binding, captured)
        finally:
            self._binding.destroy_graph(captured)


class Device:
    """One GPU, with its context. See ``open_device``."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._resources: dict[int, _Resource] = {}
        self._open = True
        try:
            with self.current():
                self.name, self.compute_capability, self.multiprocessors = binding.facts()
        except CudaError:
            self.close()
            raise

    @property
    def binding(self) -> str:
        """The Python package behind it, for people."""
        return self._binding.name

    @property
    def has_graphs(self) -> bool:
        """Whether streams can capture."""
        return self._binding.graphs is not None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Everything that touches the GPU, other libraries' calls too, happens within this block, on any thread."""
        self._binding.push()
        try:
            yield
        finally:
            self._binding.pop()

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the GPU."""
        return self._binding.memory_info()

    def allocate(self, size_bytes: int) -> DeviceMemory:
        """Memory on the GPU; at least one byte."""
        return DeviceMemory(self, max(size_bytes, 1))

    def allocate_pinned(self, size_bytes: int) -> PinnedMemory:
        """Page-locked host memory; at least one byte."""
        return PinnedMemory(self, max(size_bytes, 1))

    def stream(self, adopted: Any = None) -> Stream:
        """A new stream, or the application's: its number (an int) or a PyCUDA stream."""
        return Stream(self, adopted)

    def event(self) -> Event:
        return Event(self)

    def load(self, image: bytes) -> Module:
        """Load a fatbin, cubin or PTX.

        Raises:
            CudaError: damaged, or without code for this GPU.
        """
        return Module(self, image)

    def upload(self, array: NDArray[Any], stream: Stream) -> DeviceMemory:
        """A copy of an array on the GPU. Waits until it is there."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        memory = self.allocate(data.size)
        staging = self.allocate_pinned(data.size)
        try:
            staging.array[: data.size] = data
            stream.copy_to_device(memory.pointer, staging.array[: data.size])
            stream.synchronize()
        finally:
            staging.close()
        return memory

    def close(self) -> None:
        """Close everything that was made here, newest first, and give the context back; may be called again."""
        if not self._open:
            return
        self._open = False
        for resource in reversed(list(self._resources.values())):
            resource.close()
        try:
            self._binding.release()
        except CudaError as error:
            _log.warning("closing %s: %s", self.name, error)

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


BindingName = Literal["auto", "cuda-bindings", "pycuda"]


def open_device(ordinal: int = 0, *, binding: BindingName = "auto", context: Any = None) -> Device:
    """Open a GPU.

    Args:
        ordinal: number of the GPU; not used with ``context``.
        binding: ``auto`` takes ``cuda-bindings`` where it is installed, else ``pycuda``.
        context: the application's context, which is used and not destroyed: its number (an int) or a
            ``pycuda.driver.Context``; None is the GPU's primary context, which other libraries use too.

    Raises:
        MissingError: no binding is installed, or no driver is there; a GpuNotReadyError, where the driver gives no GPU.
        CudaError: the driver refused.
    """
    if binding == "cuda-bindings" or (binding == "auto" and find_spec("cuda") and find_spec("cuda.bindings")):
        from recontrast_edge.cuda.cuda_bindings import CudaBindings

        return Device(CudaBindings(ordinal, context))
    if binding == "pycuda" or find_spec("pycuda"):
        from recontrast_edge.cuda.pycuda_driver import PyCuda

        return Device(PyCuda(ordinal, context))
    raise MissingError(
        "expected a Python binding of CUDA, found none; install one: pip install 'recontrast-edge[gpu]' "
        "(or [pycuda], which is compiled on this machine)"
    )
