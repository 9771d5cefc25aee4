"""The kernels on a GPU behind the interface of ``tests.kernels.host.Host``, so that the same tests run on both.

gpu = Gpu(device); maps, scores = gpu.anomaly_map(features, plan)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.cuda import Device, DeviceMemory
from recontrast_edge.cuda.cuda_bindings import CudaBindings
from recontrast_edge.kernels import AnomalyMapPlan, PreprocessPlan
from recontrast_edge.kernels.launcher import AnomalyMapLauncher, PreprocessLauncher, load_kernels

ALIGNMENT = 256


def memory_stayed(device: Device, free_bytes: int) -> bool:
    """Whether as much is free as it was, but for what the driver rounds; with the context current.

    Of an integrated GPU always: its memory is the system's, where other programs take and give.
    """
    return _is_integrated(device) or abs(device.memory_info()[0] - free_bytes) <= 4 << 20


def _is_integrated(device: Device) -> bool:
    binding: Any = device._binding
    driver = binding._driver
    if isinstance(binding, CudaBindings):
        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED
        return bool(binding._call("cuDeviceGetAttribute", attribute, binding._device))
    return bool(driver.Context.get_device().get_attribute(driver.device_attribute.INTEGRATED))


class Gpu:
    """Loaded kernels and a stream. ``teams`` and ``seed``, which order the host's blocks, mean nothing here."""

    teams = 1
    seed = 0

    def __init__(self, device: Device) -> None:
        self.device = device
        with device.current():
            self.kernels = load_kernels(device)
            self.stream = device.stream()

    def upload(self, array: NDArray[Any], stack: ExitStack) -> int:
        """A copy that is as badly aligned as the original; gives its pointer."""
        shift = array.ctypes.data % ALIGNMENT
        padded = np.zeros(shift + array.nbytes, np.uint8)
        padded[shift:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return stack.enter_context(closing(self.device.upload(padded, self.stream))).pointer + shift

    def download(self, memory: DeviceMemory, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Wait for the stream and copy back."""
        out = np.empty(shape, dtype)
        with closing(self.device.allocate_pinned(out.nbytes)) as pinned:
            self.stream.copy_to_host(pinned.array[: out.nbytes], memory.pointer)
            self.stream.synchronize()
            out.reshape(-1).view(np.uint8)[:] = pinned.array[: out.nbytes]
        return out

    def filled(self, size_bytes: int, stack: ExitStack) -> DeviceMemory:
        """Memory full of NaN."""
        return stack.enter_context(closing(self.device.upload(np.full(size_bytes, 0xFF, np.uint8), self.stream)))

    def anomaly_map(
        self,
        features: Mapping[str, NDArray[Any]],
        plan: AnomalyMapPlan,
        *,
        before: Sequence[Mapping[str, NDArray[Any]]] = (),
        graph: bool = False,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As ``Host.anomaly_map``; ``graph`` launches as a CUDA graph, three times."""
        batch = next(iter(features.values())).shape[0]
        width, height = plan.size_wh
        with ExitStack() as stack:
            stack.enter_context(self.device.current())
            maps = self.filled(4 * batch * height * width, stack)
            scores = self.filled(4 * batch, stack)
            pointers = {name: self.upload(tensor, stack) for name, tensor in features.items()}
            launcher = stack.enter_context(
                closing(
                    AnomalyMapLauncher(
                        self.device,
                        self.kernels,
                        plan,
                        pointers,
                        map_pointer=maps.pointer,
                        score_pointer=scores.pointer,
                        stream=self.stream,
                    )
                )
            )
            for frame in (*before, features):
                for name, tensor in frame.items():
                    staging = stack.enter_context(closing(self.device.allocate_pinned(tensor.nbytes)))
                    staging.array[:] = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
                    self.stream.copy_to_device(pointers[name], staging.array)
                if graph:
                    with self.stream.capture() as capture:
                        launcher.launch(batch, self.stream)
                    captured = stack.enter_context(closing(capture.graph()))
                    for _ in range(3):
                        captured.launch(self.stream)
                else:
                    launcher.launch(batch, self.stream)
            return (
                self.download(maps, (batch, height, width), np.float32),
                self.download(scores, (batch,), np.float32),
            )

    def rows(self, source: NDArray[np.uint8], stack: ExitStack) -> int:
        """A copy of rows with their pitch, and up to the last row's end; gives its pointer, aligned as the original."""
        rows, pitch = source.shape[0], source.strides[0]
        whole = np.full((rows, pitch), 255, np.uint8)
        whole[:, : source[0].size] = source.reshape(rows, -1)
        shift = source.ctypes.data % 4
        padded = np.concatenate([np.zeros(shift, np.uint8), whole.reshape(-1)])
        return stack.enter_context(closing(self.device.upload(padded, self.stream))).pointer + shift

    def preprocess(
        self, source: NDArray[np.uint8], plan: PreprocessPlan, *, chroma: NDArray[np.uint8] | None = None
    ) -> NDArray[Any]:
        """As ``Host.preprocess``."""
        width, height = plan.spec.size_wh
        with ExitStack() as stack:
            stack.enter_context(self.device.current())
            constants = stack.enter_context(closing(self.device.upload(plan.constants, self.stream)))
            out = self.filled(3 * height * width * plan.dtype.itemsize, stack)
            PreprocessLauncher(
                self.kernels,
                plan,
                source_pointer=self.rows(source, stack),
                source_pitch=source.strides[0],
                out_pointer=out.pointer,
                constants_pointer=constants.pointer,
                chroma_pointer=0 if chroma is None else self.rows(chroma, stack),
                chroma_pitch=0 if chroma is None else chroma.strides[0],
            ).launch(self.stream)
            return self.download(out, (3, height, width), plan.dtype)
