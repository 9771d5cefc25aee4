"""A batch's way through the GPU: copy in, preprocessing, network, anomaly map and scores back, on one stream.

    slot = Slot(device, kernels, tensors, contexts, stream, reason, info, profile=False, on_no_graph=warn)
    slot.submit([image], with_maps=False, stage_ms=times)
    scores = slot.wait(times)

All of it is one CUDA graph for batches of images of certain sizes, captured when such a batch comes first and kept, so
that cameras which send one, two or three images in turn cost no capture a frame. Where capturing is refused, the same
work is enqueued call by call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.cuda import CudaError, Device, DeviceMemory, Event, Graph, Module, Stream
from recontrast_edge.engines.tensorrt_context import ExecutionContexts
from recontrast_edge.errors import GpuError, ModelError
from recontrast_edge.kernels import AnomalyMapPlan, PixelFormat, PreprocessPlan
from recontrast_edge.kernels.launcher import AnomalyMapLauncher, PreprocessLauncher
from recontrast_edge.plan import PlanInfo
from recontrast_edge.preprocess import Geometry, Image
from recontrast_edge.scoring import INPUT_NAME, MAP_NAME, SCORE_NAME, target_name

_log = logging.getLogger(__name__)

GPU_STAGES = ("copy_in", "preprocess", "network", "map", "copy_out")
"""What a profiling slot measures on the GPU, in order."""

KEPT_WORKS = 32
"""Graphs that are kept: those of the sizes and numbers of images that came last."""

CAPTURED_AGAIN_AFTER = 100
"""Batches, enqueued call by call, until a capture that failed is tried once more: its cause may have passed."""

PREPARING = threading.RLock()
"""Of the process. Opening, preparing and closing wait for the whole context, in TensorRT too, which the driver refuses
while any stream is captured, and which spoils that capture: no engine does the one while another does the other."""

Shapes = tuple[tuple[int, ...], ...]
"""Of a batch's images or tiles, after the ROI."""


@dataclass(frozen=True)
class Tensors:
    """Inputs and outputs of an engine that fits its spec.

    Attributes:
        outputs: shape of each output, without the batch.
        output_dtypes: of each output.
        min_batch, max_batch: smallest and largest batch.
    """

    outputs: dict[str, tuple[int, ...]]
    output_dtypes: dict[str, np.dtype[Any]]
    input_dtype: np.dtype[Any]
    min_batch: int
    max_batch: int


@dataclass(eq=False)
class _Work:
    """What is enqueued for a batch of images of certain shapes.

    Attributes:
        batch: images that the network is given.
        frames_bytes: how much is copied to the GPU.
        context: TensorRT's execution context for this batch.
        staging: page-locked memory for each image, in its shape.
        graph: all of it; None: it is enqueued call by call.
        plain_runs: batches that were.
    """

    batch: int
    frames_bytes: int
    context: Any
    staging: list[NDArray[np.uint8]]
    preprocess: list[PreprocessLauncher]
    graph: Graph | None = None
    plain_runs: int = 0


class Slot:
    """A stream with every buffer that a batch needs on its way.

    Args:
        reason: TensorRT's last error, for messages.
        profile: measure each of ``GPU_STAGES``.
        on_no_graph: told the number of images and the reason, where work cannot be captured.
    """

    def __init__(
        self,
        device: Device,
        kernels: Module,
        tensors: Tensors,
        contexts: ExecutionContexts,
        stream: Stream,
        reason: Callable[[], str],
        info: PlanInfo,
        *,
        profile: bool,
        on_no_graph: Callable[[int, str], None],
    ) -> None:
        self._device, self._kernels, self._tensors = device, kernels, tensors
        self._new_context, self._stream, self._reason = contexts.make, stream, reason
        self._on_no_graph = on_no_graph
        self._input_spec = info.spec.input.of_tile
        # Only the judged part of a frame is copied to the GPU, so for the kernel there is no ROI.
        self._part_spec = self._input_spec.model_copy(update={"roi": None})
        self._works: dict[Shapes, _Work] = {}
        self._contexts: dict[int, Any] = {}
        self._last: _Work | None = None
        self._count = 0
        self._launched_s: float | None = None
        self._unfinished = False
        width, height = self._input_spec.size_wh
        self._map_shape = (height, width)
        max_batch = tensors.max_batch

        self._scratch = device.allocate(contexts.scratch_bytes)
        self._input = device.allocate(max_batch * 3 * height * width * tensors.input_dtype.itemsize)
        stream.zero(self._input.pointer, self._input.size_bytes)
        outputs = {
            name: device.allocate(max_batch * int(np.prod(shape)) * tensors.output_dtypes[name].itemsize)
            for name, shape in tensors.outputs.items()
        }
        self._bound = {INPUT_NAME: self._input, **outputs}
        self._map_launcher: AnomalyMapLauncher | None = None
        if info.head == "map":
            self._map, self._score = outputs[MAP_NAME], outputs[SCORE_NAME]
        else:
            self._map, self._score = device.allocate(4 * max_batch * height * width), device.allocate(4 * max_batch)
            plan = AnomalyMapPlan.of_spec(
                info.spec,
                dtype=tensors.output_dtypes[target_name(0, 0)],
                max_batch=max_batch,
                multiprocessors=device.multiprocessors,
            )
            self._map_launcher = AnomalyMapLauncher(
                device,
                kernels,
                plan,
                {name: memory.pointer for name, memory in outputs.items()},
                map_pointer=self._map.pointer,
                score_pointer=self._score.pointer,
                stream=stream,
            )
        self._read_scores = device.allocate_pinned(4 * max_batch)
        self._read_maps = device.allocate_pinned(4 * max_batch * height * width)
        self._frames_host = device.allocate_pinned(0)
        self._frames = device.allocate(0)
        self._constants: dict[tuple[int, ...], DeviceMemory] = {}
        self._events: list[Event] = [device.event() for _ in range(len(GPU_STAGES) + 1)] if profile else []
        stream.synchronize()

    @property
    def uses_graph(self) -> bool:
        """Whether batches like the last one are launched as a graph."""
        return self._last is not None and self._last.graph is not None

    def _part(self, image: Image) -> Image:
        geometry = Geometry.of(self._input_spec, image)
        return image[geometry.y : geometry.y + geometry.height, geometry.x : geometry.x + geometry.width]

    def submit(self, images: Sequence[Image], *, with_maps: bool, stage_ms: dict[str, float]) -> None:
        """Start a batch. Returns when its images are copied to pinned memory and everything is enqueued.

        Raises:
            InputError: a frame that the model's ROI or the kernel cannot take; nothing was enqueued.
            ModelError: TensorRT refused the batch; a GpuError where it, or the GPU, failed.
        """
        started_s = time.perf_counter()
        parts = [self._part(image) for image in images]
        shapes = tuple(part.shape for part in parts)
        work = self._works.pop(shapes, None)
        if work is None:
            work = self.prepare(shapes)
        else:
            # Put back as the latest.
            self._works[shapes] = work
            if work.graph is None:
                work.plain_runs += 1
                if work.plain_runs == CAPTURED_AGAIN_AFTER:
                    self._capture(work)
        self._last, self._count = work, len(parts)
        self._reset_if_unfinished()
        for part, staging in zip(parts, work.staging, strict=True):
            np.copyto(staging, part)
        self._launched_s = time.perf_counter()
        if work.graph is not None:
            work.graph.launch(self._stream)
        else:
            self._enqueue(work)
        if with_maps:
            self._enqueue_maps(len(images))
        _add(stage_ms, "stage", self._launched_s - started_s)

    def prepare(self, shapes: Shapes) -> _Work:
        """Make everything ready for batches of images of these shapes: buffers, plans, a first run, the graph."""
        with PREPARING:
            return self._prepare(shapes)

    def _prepare(self, shapes: Shapes) -> _Work:
        formats: dict[tuple[int, ...], PixelFormat] = {
            shape: "bgr8" if len(shape) == 3 else "mono8" for shape in shapes
        }
        plans = {
            shape: PreprocessPlan(self._part_spec, (shape[1], shape[0]), pixel_format, dtype=self._tensors.input_dtype)
            for shape, pixel_format in formats.items()
        }
        # The kernel reads whole words where rows begin at multiples of 4.
        pitches = [_round_up(int(np.prod(shape[1:])), 4) for shape in shapes]
        sizes = [_round_up(shape[0] * pitch, 256) for shape, pitch in zip(shapes, pitches, strict=True)]
        ends = [int(end) for end in np.cumsum(sizes)]
        self._make_room(max(sizes))
        for shape in plans.keys() - self._constants.keys():
            self._constants[shape] = self._device.upload(plans[shape].constants, self._stream)

        # An engine for larger batches only gets one of those; what its other images hold does not matter.
        batch = max(len(shapes), self._tensors.min_batch)
        work = _Work(batch, ends[-1], self._context(batch), [], [])
        image_bytes = self._input.size_bytes // self._tensors.max_batch
        for index, (shape, pitch, offset) in enumerate(zip(shapes, pitches, [0, *ends[:-1]], strict=True)):
            rows = self._frames_host.array[offset : offset + shape[0] * pitch].reshape(shape[0], pitch)
            work.staging.append(rows[:, : int(np.prod(shape[1:]))].reshape(shape))
            launcher = PreprocessLauncher(
                self._kernels,
                plans[shape],
                source_pointer=self._frames.pointer + offset,
                source_pitch=pitch,
                out_pointer=self._input.pointer + index * image_bytes,
                constants_pointer=self._constants[shape].pointer,
            )
            work.preprocess.append(launcher)

        self._reset_if_unfinished()
        # TensorRT prepares itself at the first enqueue after a change of shapes, which must not be captured.
        self._enqueue(work)
        self._stream.synchronize()
        self._capture(work)
        self._works[shapes] = self._last = work
        while len(self._works) > KEPT_WORKS:
            self._forget(next(iter(self._works)))
        self._drop_unused()
        return work

    def _context(self, batch: int) -> Any:
        if batch not in self._contexts:
            context = self._new_context(self._scratch)
            for name, memory in self._bound.items():
                if not context.set_tensor_address(name, memory.pointer):
                    raise ModelError(f"TensorRT refused the buffer of {name!r}{self._reason()}")
            height, width = self._map_shape
            if not context.set_input_shape(INPUT_NAME, (batch, 3, height, width)):
                raise ModelError(f"TensorRT refused a batch of {batch}{self._reason()}")
            self._contexts[batch] = context
        return self._contexts[batch]

    def _make_room(self, image_bytes: int) -> None:
        """Buffers for the largest batch of such images. Growing them ends every graph: their addresses change."""
        size_bytes = self._tensors.max_batch * image_bytes
        # Either may be closed, if there was no memory for a larger one.
        if size_bytes <= min(self._frames.size_bytes, self._frames_host.size_bytes):
            return
        for shapes in list(self._works):
            self._forget(shapes)
        self._frames.close()
        self._frames_host.close()
        self._frames = self._device.allocate(size_bytes)
        self._frames_host = self._device.allocate_pinned(size_bytes)

    def _forget(self, shapes: Shapes) -> None:
        graph = self._works.pop(shapes).graph
        if graph is not None:
            graph.close()

    def _drop_unused(self) -> None:
        shapes = {shape for shapes in self._works for shape in shapes}
        for shape in self._constants.keys() - shapes:
            self._constants.pop(shape).close()
        for batch in self._contexts.keys() - {work.batch for work in self._works.values()}:
            del self._contexts[batch]

    def _capture(self, work: _Work) -> None:
        """Give the work a graph that has run once; where that fails, leave it to be enqueued call by call."""
        if not self._device.has_graphs:
            return
        with PREPARING:
            try:
                with self._stream.capture() as capture:
                    self._enqueue(work)
                graph = capture.graph()
                try:
                    # Its first launch takes it to the GPU, and shows whether it can be launched at all.
                    graph.launch(self._stream)
                    self._stream.synchronize()
                except ModelError:
                    graph.close()
                    raise
                work.graph = graph
            except ModelError as error:
                # As text: the error itself would keep the context alive, wherever it is logged.
                self._on_no_graph(len(work.staging), str(error))
            if work.graph is None:
                self._recover(work)

    def _recover(self, work: _Work) -> None:
        """After a failed capture: a library may tell of it at its next call, which must not be that of a frame."""
        self.abandon()
        self._reset_if_unfinished()
        try:
            self._enqueue(work)
            self._stream.synchronize()
        except ModelError as error:
            _log.debug("after a failed capture: %s", error)
            self.abandon()

    def _enqueue(self, work: _Work) -> None:
        stream = self._stream
        self._mark(0)
        stream.copy_to_device(self._frames.pointer, self._frames_host.array[: work.frames_bytes])
        self._mark(1)
        for launcher in work.preprocess:
            launcher.launch(stream)
        self._mark(2)
        if not work.context.execute_async_v3(stream.number):
            raise GpuError(f"TensorRT could not run the network{self._reason()}")
        self._mark(3)
        if self._map_launcher is not None:
            self._map_launcher.launch(work.batch, stream)
        self._mark(4)
        stream.copy_to_host(self._read_scores.array[: 4 * work.batch], self._score.pointer)
        self._mark(5)

    def _mark(self, index: int) -> None:
        if self._events:
            self._stream.record(self._events[index])

    def _reset_if_unfinished(self) -> None:
        """A run that failed half-way may have left counts behind in the map kernels' workspace."""
        if self._unfinished and self._map_launcher is not None:
            self._map_launcher.reset(self._stream)
        self._unfinished = False

    def _map_bytes(self, count: int) -> int:
        return 4 * count * self._map_shape[0] * self._map_shape[1]

    def _enqueue_maps(self, count: int) -> None:
        self._stream.copy_to_host(self._read_maps.array[: self._map_bytes(count)], self._map.pointer)

    def wait(self, stage_ms: dict[str, float]) -> NDArray[np.float32]:
        """Wait for the submitted batch; its scores, valid until the next one is submitted."""
        assert self._launched_s is not None
        self._stream.synchronize()
        infer_s = time.perf_counter() - self._launched_s
        self._launched_s = None
        for stage, start, end in zip(GPU_STAGES, self._events, self._events[1:], strict=False):
            stage_s = end.ms_since(start) / 1e3
            _add(stage_ms, stage, stage_s)
            infer_s -= stage_s
        # With profiling: what the GPU did not spend, such as launching and waking up.
        _add(stage_ms, "launch" if self._events else "infer", max(infer_s, 0.0))
        scores: NDArray[np.float32] = self._read_scores.array.view(np.float32)[: self._count]
        return scores

    def read_maps(self, count: int) -> NDArray[np.float32]:
        """The maps that were submitted for, after ``wait``; valid until the next batch is submitted."""
        flat = self._read_maps.array[: self._map_bytes(count)].view(np.float32)
        maps: NDArray[np.float32] = flat.reshape(count, *self._map_shape)
        return maps

    def fetch_maps(self, count: int, stage_ms: dict[str, float]) -> NDArray[np.float32]:
        """A copy of the maps of the last batch, which are still on the GPU."""
        started_s = time.perf_counter()
        self._enqueue_maps(count)
        self._stream.synchronize()
        maps: NDArray[np.float32] = self.read_maps(count).copy()
        _add(stage_ms, "read_map", time.perf_counter() - started_s)
        return maps

    def abandon(self) -> None:
        """After a failure somewhere: let nothing run on, and leave nothing behind for the next batch.

        Raises:
            CudaError: the stream cannot be used any more.
        """
        self._unfinished = True
        self._launched_s = None
        self._stream.synchronize()

    def close(self) -> None:
        """Give up graphs and execution contexts; the buffers are the device's to close."""
        try:
            self.abandon()
        except CudaError as error:
            _log.debug("closing a stream's buffers: %s", error)
        for shapes in list(self._works):
            self._forget(shapes)
        self._last = None
        self._contexts.clear()


def _add(stage_ms: dict[str, float], stage: str, duration_s: float) -> None:
    stage_ms[stage] = stage_ms.get(stage, 0.0) + duration_s * 1e3


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
