"""TensorRT, and TensorRT for RTX, on an NVIDIA GPU: plans that ``recontrast-edge build`` wrote.

    with TensorRtEngine(Path("model.plan")) as engine:
        scores = engine.infer([image]).scores

A frame's whole way through the GPU (copy in, preprocessing, network, anomaly map, score back) is one CUDA graph,
launched with one call and waited for once. Frames of another size make it be captured again; where capturing is
refused, the same work is enqueued call by call. Maps stay on the GPU until somebody wants them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from traceback import clear_frames
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.cuda import BindingName, CudaError, Device, DeviceMemory, Event, Graph, Module, open_device
from recontrast_edge.engines import Inference
from recontrast_edge.errors import MissingError, ModelError
from recontrast_edge.kernels import AnomalyMapPlan, PixelFormat, PreprocessPlan
from recontrast_edge.kernels.launcher import AnomalyMapLauncher, PreprocessLauncher, load_kernels
from recontrast_edge.plan import FLAVOR_MODULES, Flavor, PlanInfo, verify_plan
from recontrast_edge.preprocess import Geometry, Image, check_image
from recontrast_edge.scoring import INPUT_NAME, MAP_NAME, SCORE_NAME, VIEWS, reconstruction_name, target_name

_log = logging.getLogger(__name__)

SLOTS = 2
"""Batches on their way at a time: one is copied while the other is computed."""

GPU_STAGES = ("copy_in", "preprocess", "network", "map", "copy_out")
"""What a profiling engine measures on the GPU, in order."""

_INSTALL: dict[Flavor, str] = {
    "tensorrt": "pip install 'recontrast-edge[tensorrt]'; on Jetson it comes with JetPack: sudo apt-get install "
    "python3-libnvinfer, and a virtual environment made with --system-site-packages",
    "tensorrt-rtx": "pip install 'recontrast-edge[tensorrt-rtx]'",
}


class TensorRtEngine:
    """A plan and its sidecar on a GPU. ``infer`` is called from one thread at a time, from any.

    Args:
        path: the ``.plan`` file, with ``.plan.json`` beside it.
        binding: Python package for CUDA.
        context: the application's CUDA context; see ``cuda.open_device``.
        stream: the application's stream, which then does all the work; None makes streams, so that batches overlap.
        profile: measure each of ``GPU_STAGES``; costs some microseconds a batch.

    Raises:
        MissingError: the library, a CUDA binding, a driver or a GPU is missing.
        ModelError: plan or sidecar damaged, built by another library version or for another GPU, or not fitting its
            own spec; or the GPU failed.
    """

    def __init__(
        self,
        path: Path,
        *,
        binding: BindingName = "auto",
        context: Any = None,
        stream: Any = None,
        profile: bool = False,
    ) -> None:
        self.path = path
        self._info, plan = verify_plan(path)
        self.spec = self._info.spec
        self.sha256 = self._info.plan_sha256
        self._lock = threading.Lock()
        self._is_open = True
        library = _library(path, self._info)
        self._device = open_device(binding=binding, context=context)
        self._slots: list[_Slot] = []
        self._engine: Any = None
        self._runtime: Any = None
        try:
            self.name = (
                f"{'TensorRT' if self._info.flavor == 'tensorrt' else 'TensorRT for RTX'} {library.__version__}, "
                f"{self._info.precision}, on {self._device.name} ({self._device.binding})"
            )
            _check_gpu(path, self._info, self._device)
            with self._device.current():
                self._open(library, plan, stream, profile=profile)
        except BaseException as error:
            # Else the failed calls' variables would keep TensorRT's objects alive, longer than their CUDA context.
            clear_frames(error.__traceback__)
            self.close()
            raise

    def _open(self, library: Any, plan: bytes, stream: Any, *, profile: bool) -> None:
        messages = _logger(library)
        try:
            self._runtime = library.Runtime(messages)
        except TypeError:
            # What the library's Python layer makes of a runtime that it could not create.
            raise ModelError(
                f"{self._info.flavor} {library.__version__} does not start{messages.reason()}; most likely the NVIDIA "
                "driver is too old for it, see `recontrast-edge doctor`"
            ) from None
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ModelError(
                f"{self.path}: {self._info.flavor} refused the engine{messages.reason()}; build it on this machine: "
                f"{self._info.build_command(self.path)}"
            )
        self._tensors = tensors = _TensorCheck(library, self._engine, self.path, self._info).tensors()
        kernels = load_kernels(self._device)
        streams = [self._device.stream(stream) for _ in range(SLOTS if stream is None else 1)]
        for slot_stream in streams:
            context = _execution_context(library, self._engine)
            if context is None:
                raise ModelError(
                    f"{self.path}: no execution context{messages.reason()}; most likely the GPU's memory is full"
                )
            slot = _Slot(self._device, kernels, tensors, context, slot_stream, messages, self._info, profile=profile)
            self._slots.append(slot)
        width, height = self.spec.input.resize_wh
        if self.spec.input.roi is not None:
            width, height = self.spec.input.roi.width, self.spec.input.roi.height
        for slot in self._slots:
            # Frames of this size, the most likely one, will find everything ready.
            slot.prepare(((height, width, 3),))

    @property
    def uses_graph(self) -> bool:
        """Whether batches like the last one are launched as a CUDA graph."""
        return bool(self._slots) and self._slots[0].graph is not None

    @property
    def max_batch(self) -> int:
        """Images that the GPU takes at once; more are judged in turns."""
        return self._tensors.max_batch

    def infer(self, images: Sequence[Image], *, maps_above: float | None = None) -> Inference:
        """See ``Engine.infer``. Equal images in batches of another size can differ by the engine's rounding."""
        for image in images:
            check_image(image)
            Geometry.of(self.spec.input, image)
        with self._lock:
            if not self._is_open:
                raise ModelError(f"{self.path}: the engine is closed")
            with self._device.current(), self._abandoned_on_error():
                return self._infer(images, maps_above)

    def _infer(self, images: Sequence[Image], maps_above: float | None) -> Inference:
        size = self._tensors.max_batch
        chunks = [images[start : start + size] for start in range(0, len(images), size)]
        # A map graph's own maximum may lose a NaN, so its map is always looked at. The kernel's does not.
        limit = maps_above if len(chunks) <= 1 and self._info.head == "features" else None
        width, height = self.spec.input.size_wh
        scores = np.empty(len(images), np.float32)
        maps = np.empty((len(images) if limit is None else 0, height, width), np.float32)
        stage_ms: dict[str, float] = {}

        def collect(index: int) -> None:
            slot, start = self._slots[index % len(self._slots)], index * size
            found = slot.wait(stage_ms)
            scores[start : start + len(found)] = found
            if limit is None:
                maps[start : start + len(found)] = slot.read_maps(len(found))

        for index, chunk in enumerate(chunks):
            if index >= len(self._slots):
                collect(index - len(self._slots))
            self._slots[index % len(self._slots)].submit(chunk, with_maps=limit is None, stage_ms=stage_ms)
        for index in range(max(0, len(chunks) - len(self._slots)), len(chunks)):
            collect(index)
        # In float64, as verdicts compare them; NaN is not <= anything.
        if limit is not None and not bool((scores.astype(np.float64) <= limit).all()):
            maps = self._slots[0].fetch_maps(len(images), stage_ms)
        return Inference(maps, scores, stage_ms)

    @contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            for slot in self._slots:
                slot.abandon()
            if isinstance(error, CudaError):
                raise ModelError(f"{self.path}: {error}") from error
            raise

    def close(self) -> None:
        """See ``Engine.close``."""
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            try:
                with self._device.current():
                    # Before the memory they point to, contexts before the engine, the engine before its runtime.
                    for slot in self._slots:
                        slot.close()
                    self._slots = []
                    self._engine = None
                    self._runtime = None
            except CudaError as error:
                _log.warning("closing %s: %s", self.path, error)
            self._device.close()

    def __enter__(self) -> TensorRtEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _library(path: Path, info: PlanInfo) -> Any:
    """The library that built the plan, in the version that built it."""
    try:
        library = import_module(FLAVOR_MODULES[info.flavor])
    except (ImportError, OSError) as error:
        other: Flavor = "tensorrt" if info.flavor == "tensorrt-rtx" else "tensorrt-rtx"
        raise MissingError(
            f"{path}: needs {info.flavor} {info.library_version}, which cannot be imported ({error}). Install it: "
            f"{_INSTALL[info.flavor]}; or build for the other library: "
            f"{info.build_command(path, changes={'flavor': other})}"
        ) from None
    # A side may name fewer parts (10.3.0 and 10.3.0.26).
    pairs = zip(library.__version__.split("."), info.library_version.split("."), strict=False)
    if any(here != built for here, built in pairs):
        raise ModelError(
            f"{path}: built by {info.flavor} {info.library_version}, this machine has {library.__version__}; plans "
            f"run on the version that built them. Build it again: {info.build_command(path)}"
        )
    return library


def _check_gpu(path: Path, info: PlanInfo, device: Device) -> None:
    here = "{}.{}".format(*device.compute_capability)
    if info.compute_capability not in (None, here):
        raise ModelError(
            f"{path}: built for GPUs of compute capability {info.compute_capability} ({info.gpu or 'no GPU at hand'}), "
            f"this one is a {device.name} of {here}. Build it again, here: {info.build_command(path)}"
        )


@cache
def _logger(library: Any) -> Any:
    """TensorRT's messages into ours. One for the process: the library keeps to the first it gets."""

    class Logger(library.ILogger):  # type: ignore[misc] # the base is known at run time only
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self._last_error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR):
                self._last_error = message
                _log.error("%s", message)
            elif severity == library.ILogger.WARNING:
                _log.info("%s", message)
            else:
                _log.debug("%s", message)

        def reason(self) -> str:
            """The last error in brackets, once, or nothing."""
            message, self._last_error = self._last_error, ""
            return f" ({message.splitlines()[0][:300]})" if message.strip() else ""

    return Logger()


def _execution_context(library: Any, engine: Any) -> Any:
    strategies = getattr(library, "DynamicShapesKernelSpecializationStrategy", None)
    if strategies is None:
        return engine.create_execution_context()
    # TensorRT for RTX by default swaps in better kernels while it runs: then a frame's score could change from one
    # minute to the next, and a captured graph would keep the slow ones for ever.
    config = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return engine.create_execution_context(config)


@dataclass(frozen=True)
class _Tensors:
    """Inputs and outputs of an engine that fits its spec.

    Attributes:
        outputs: shape of each output, without the batch.
        min_batch, max_batch: smallest and largest batch.
    """

    outputs: dict[str, tuple[int, ...]]
    input_dtype: np.dtype[Any]
    output_dtype: np.dtype[Any]
    min_batch: int
    max_batch: int


class _TensorCheck:
    """Reads an engine's tensors and compares them with its spec; short-lived, because it holds the engine."""

    def __init__(self, library: Any, engine: Any, path: Path, info: PlanInfo) -> None:
        self._library, self._engine, self._path, self._info = library, engine, path, info

    def tensors(self) -> _Tensors:
        """Raises ModelError where they do not fit."""
        info, engine = self._info, self._engine
        width, height = info.spec.input.size_wh
        outputs: dict[str, tuple[int, ...]] = {}
        if info.head == "map":
            outputs |= {MAP_NAME: (1, height, width), SCORE_NAME: ()}
        else:
            for index, level in enumerate(info.spec.levels):
                level_width, level_height = info.spec.level_wh(index)
                for view in range(VIEWS):
                    for name in (target_name(view, index), reconstruction_name(view, index)):
                        outputs[name] = (level.channels, level_height, level_width)
        expected = {INPUT_NAME: (3, height, width), **outputs}
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        if set(names) != set(expected):
            raise self._mismatch(f"tensors {sorted(expected)}", f"{sorted(names)}")
        for name, shape in expected.items():
            self._check(name, shape)
        dtypes = {self._dtype(name) for name in outputs}
        if len(dtypes) > 1 or (info.head == "map" and dtypes != {np.dtype(np.float32)}):
            wanted = "float32 results" if info.head == "map" else "features of one type"
            raise self._mismatch(wanted, str(sorted(map(str, dtypes))))
        smallest, _, largest = engine.get_tensor_profile_shape(INPUT_NAME, 0)
        return _Tensors(outputs, self._dtype(INPUT_NAME), dtypes.pop(), int(smallest[0]), int(largest[0]))

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        library, engine = self._library, self._engine
        is_input = engine.get_tensor_mode(name) == library.TensorIOMode.INPUT
        if is_input != (name == INPUT_NAME):
            raise self._mismatch(
                f"{INPUT_NAME!r} as the only input", f"{name!r} as an {'input' if is_input else 'output'}"
            )
        found = tuple(engine.get_tensor_shape(name))
        if found[1:] != shape:
            raise self._mismatch(f"{name!r} of (N, {', '.join(map(str, shape))})", str(found))
        if engine.get_tensor_format(name) != library.TensorFormat.LINEAR:
            raise self._mismatch(f"{name!r} in plain NCHW order", str(engine.get_tensor_format(name)))

    def _dtype(self, name: str) -> np.dtype[Any]:
        types = self._library.DataType
        found = self._engine.get_tensor_dtype(name)
        known: dict[Any, np.dtype[Any]] = {types.FLOAT: np.dtype(np.float32), types.HALF: np.dtype(np.float16)}
        if found not in known:
            raise self._mismatch(f"{name!r} of float32 or float16", str(found))
        return known[found]

    def _mismatch(self, expected: str, found: str) -> ModelError:
        return ModelError(
            f"{self._path}: expected {expected}, the engine has {found}; engine and spec do not belong together. "
            f"Build it again: {self._info.build_command(self._path)}"
        )


_Shapes = tuple[tuple[int, ...], ...]
"""Of a batch's images, after the ROI."""


class _Slot:
    """One batch's way through the GPU: an execution context, a stream, and every buffer it needs."""

    def __init__(
        self,
        device: Device,
        kernels: Module,
        tensors: _Tensors,
        context: Any,
        stream: Any,
        messages: Any,
        info: PlanInfo,
        *,
        profile: bool,
    ) -> None:
        self._device, self._kernels, self._tensors = device, kernels, tensors
        self._context, self._stream, self._messages = context, stream, messages
        self._input_spec = info.spec.input
        # Only the judged part of a frame is copied to the GPU, so for the kernel there is no ROI.
        self._part_spec = info.spec.input.model_copy(update={"roi": None})
        self.graph: Graph | None = None
        self._capture_refused = not device.has_graphs
        self._shapes: _Shapes | None = None
        self._batch = 0
        self._launched_s: float | None = None
        width, height = self._input_spec.size_wh
        self._map_shape = (height, width)
        max_batch = tensors.max_batch

        self._input = device.allocate(max_batch * 3 * height * width * tensors.input_dtype.itemsize)
        stream.zero(self._input.pointer, self._input.size_bytes)
        outputs = {
            name: device.allocate(max_batch * int(np.prod(shape)) * tensors.output_dtype.itemsize)
            for name, shape in tensors.outputs.items()
        }
        self._map_launcher: AnomalyMapLauncher | None = None
        if info.head == "map":
            self._map, self._score = outputs[MAP_NAME], outputs[SCORE_NAME]
        else:
            self._map, self._score = device.allocate(4 * max_batch * height * width), device.allocate(4 * max_batch)
            plan = AnomalyMapPlan.of_spec(
                info.spec, dtype=tensors.output_dtype, max_batch=max_batch, multiprocessors=device.multiprocessors
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
        for name, memory in ((INPUT_NAME, self._input), *outputs.items()):
            if not context.set_tensor_address(name, memory.pointer):
                raise ModelError(f"TensorRT refused the buffer of {name!r}{messages.reason()}")
        self._read_scores = device.allocate_pinned(4 * max_batch)
        self._read_maps = device.allocate_pinned(4 * max_batch * height * width)
        self._frames_host = device.allocate_pinned(0)
        self._frames = device.allocate(0)
        self._frames_bytes = 0
        self._constants: dict[tuple[int, ...], DeviceMemory] = {}
        self._preprocess: list[PreprocessLauncher] = []
        self._staging: list[NDArray[np.uint8]] = []
        self._events: list[Event] = [device.event() for _ in range(len(GPU_STAGES) + 1)] if profile else []
        stream.synchronize()

    def _part(self, image: Image) -> Image:
        geometry = Geometry.of(self._input_spec, image)
        return image[geometry.y : geometry.y + geometry.height, geometry.x : geometry.x + geometry.width]

    def submit(self, images: Sequence[Image], *, with_maps: bool, stage_ms: dict[str, float]) -> None:
        """Start a batch. Returns when its images are copied to pinned memory and everything is enqueued.

        Raises:
            InputError: a frame that the model's ROI or the kernel cannot take; nothing was enqueued.
            ModelError: TensorRT or the GPU failed.
        """
        started_s = time.perf_counter()
        parts = [self._part(image) for image in images]
        shapes = tuple(part.shape for part in parts)
        if shapes != self._shapes:
            self.prepare(shapes)
        for part, staging in zip(parts, self._staging, strict=True):
            np.copyto(staging, part)
        self._launched_s = time.perf_counter()
        if self.graph is not None:
            self.graph.launch(self._stream)
        else:
            self._enqueue()
        if with_maps:
            self._enqueue_maps(len(images))
        _add(stage_ms, "stage", self._launched_s - started_s)

    def prepare(self, shapes: _Shapes) -> None:
        """Make everything ready for batches of images of these shapes: buffers, plans, a first run, the graph."""
        self._shapes = None
        formats: dict[tuple[int, ...], PixelFormat] = {
            shape: "bgr8" if len(shape) == 3 else "mono8" for shape in shapes
        }
        plans = {
            shape: PreprocessPlan(self._part_spec, (shape[1], shape[0]), pixel_format, dtype=self._tensors.input_dtype)
            for shape, pixel_format in formats.items()
        }
        # The kernel reads whole words where rows begin at multiples of 4.
        pitches = [_round_up(int(np.prod(shape[1:])), 4) for shape in shapes]
        ends = np.cumsum([_round_up(shape[0] * pitch, 256) for shape, pitch in zip(shapes, pitches, strict=True)])
        offsets = [0, *map(int, ends[:-1])]
        self._frames_bytes = int(ends[-1])
        # Either may be closed, if there was no memory for a larger one.
        if self._frames_bytes > min(self._frames.size_bytes, self._frames_host.size_bytes):
            self._frames.close()
            self._frames_host.close()
            self._frames = self._device.allocate(self._frames_bytes)
            self._frames_host = self._device.allocate_pinned(self._frames_bytes)
        for shape in self._constants.keys() - plans.keys():
            self._constants.pop(shape).close()
        for shape in plans.keys() - self._constants.keys():
            self._constants[shape] = self._device.upload(plans[shape].constants, self._stream)

        image_bytes = self._input.size_bytes // self._tensors.max_batch
        self._preprocess, self._staging = [], []
        for index, (shape, pitch, offset) in enumerate(zip(shapes, pitches, offsets, strict=True)):
            rows = self._frames_host.array[offset : offset + shape[0] * pitch].reshape(shape[0], pitch)
            self._staging.append(rows[:, : int(np.prod(shape[1:]))].reshape(shape))
            launcher = PreprocessLauncher(
                self._kernels,
                plans[shape],
                source_pointer=self._frames.pointer + offset,
                source_pitch=pitch,
                out_pointer=self._input.pointer + index * image_bytes,
                constants_pointer=self._constants[shape].pointer,
            )
            self._preprocess.append(launcher)

        # An engine for larger batches only gets one of those; what its other images hold does not matter.
        self._batch = max(len(shapes), self._tensors.min_batch)
        height, width = self._map_shape
        if not self._context.set_input_shape(INPUT_NAME, (self._batch, 3, height, width)):
            raise ModelError(f"TensorRT refused a batch of {self._batch}{self._messages.reason()}")
        if self._map_launcher is not None:
            # A run that failed half-way may have left counts behind.
            self._map_launcher.reset(self._stream)
        # TensorRT prepares itself at the first enqueue after a change of shapes, which must not be captured.
        self._enqueue()
        self._stream.synchronize()
        self._capture()
        self._shapes = shapes

    def _capture(self) -> None:
        if self._capture_refused:
            return
        previous, self.graph = self.graph, None
        try:
            with self._stream.capture() as capture:
                self._enqueue()
            self.graph = capture.graph(previous)
        except ModelError as error:
            self._capture_refused = True
            if previous is not None:
                previous.close()
            _log.warning("no CUDA graph, the work is enqueued call by call instead: %s", str(error))

    def _enqueue(self) -> None:
        stream = self._stream
        self._mark(0)
        stream.copy_to_device(self._frames.pointer, self._frames_host.array[: self._frames_bytes])
        self._mark(1)
        for launcher in self._preprocess:
            launcher.launch(stream)
        self._mark(2)
        if not self._context.execute_async_v3(stream.number):
            raise ModelError(f"TensorRT could not run the network{self._messages.reason()}")
        self._mark(3)
        if self._map_launcher is not None:
            self._map_launcher.launch(self._batch, stream)
        self._mark(4)
        stream.copy_to_host(self._read_scores.array[: 4 * self._batch], self._score.pointer)
        self._mark(5)

    def _mark(self, index: int) -> None:
        if self._events:
            self._stream.record(self._events[index])

    def _map_bytes(self, count: int) -> int:
        return 4 * count * self._map_shape[0] * self._map_shape[1]

    def _enqueue_maps(self, count: int) -> None:
        self._stream.copy_to_host(self._read_maps.array[: self._map_bytes(count)], self._map.pointer)

    def wait(self, stage_ms: dict[str, float]) -> NDArray[np.float32]:
        """Wait for the submitted batch; its scores, valid until the next one is submitted."""
        assert self._launched_s is not None
        assert self._shapes is not None
        self._stream.synchronize()
        infer_s = time.perf_counter() - self._launched_s
        self._launched_s = None
        for stage, start, end in zip(GPU_STAGES, self._events, self._events[1:], strict=False):
            stage_s = end.ms_since(start) / 1e3
            _add(stage_ms, stage, stage_s)
            infer_s -= stage_s
        # With profiling: what the GPU did not spend, such as launching and waking up.
        _add(stage_ms, "launch" if self._events else "infer", max(infer_s, 0.0))
        scores: NDArray[np.float32] = self._read_scores.array.view(np.float32)[: len(self._shapes)]
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
        """After a failure somewhere: let nothing run on, and begin anew with the next batch."""
        self._shapes = None
        self._launched_s = None
        try:
            self._stream.synchronize()
        except CudaError as error:
            _log.debug("after a failure: %s", error)

    def close(self) -> None:
        """Give up graph and execution context; the buffers are the device's to close."""
        self.abandon()
        if self.graph is not None:
            self.graph.close()
            self.graph = None
        self._context = None


def _add(stage_ms: dict[str, float], stage: str, duration_s: float) -> None:
    stage_ms[stage] = stage_ms.get(stage, 0.0) + duration_s * 1e3


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
