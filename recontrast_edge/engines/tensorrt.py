"""TensorRT, and TensorRT for RTX, on an NVIDIA GPU: plans that ``recontrast-edge build`` wrote.

    with TensorRtEngine(Path("model.plan")) as engine:
        scores = engine.infer([image]).scores

A frame's whole way through the GPU (copy in, preprocessing, network, anomaly map, score back) is one CUDA graph,
launched with one call and waited for once; see ``tensorrt_slot``. Maps stay on the GPU until somebody wants them.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from traceback import clear_frames
from types import TracebackType
from typing import Any

import numpy as np

from recontrast_edge.cuda import BindingName, CudaError, Device, open_device
from recontrast_edge.engines import Inference
from recontrast_edge.engines.tensorrt_context import ExecutionContexts
from recontrast_edge.engines.tensorrt_slot import PREPARING, Slot, Tensors
from recontrast_edge.errors import GpuError, MissingError, ModelError, StallError
from recontrast_edge.kernels.launcher import load_kernels
from recontrast_edge.plan import FLAVOR_MODULES, Flavor, PlanInfo, verify_plan
from recontrast_edge.preprocess import Geometry, Image, check_image
from recontrast_edge.scoring import INPUT_NAME, MAP_NAME, PROBABILITY_NAME, SCORE_NAME, feature_shapes
from recontrast_edge.tiling import infer_tiles

_log = logging.getLogger(__name__)

SLOTS = 2
"""Batches on their way at a time: one is copied while the other is computed."""

WARMED_BATCHES = 8
"""An engine whose largest batch is not above this has a graph for each number of images when it is opened; others get
theirs, but the first, when such a batch comes."""

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
        profile: measure each of ``tensorrt_slot.GPU_STAGES``; costs some microseconds a batch.

    Raises:
        MissingError: the library, a CUDA binding, a driver or a GPU is missing.
        ModelError: plan or sidecar damaged, built by another library version or for another GPU, or not fitting its
            own spec; a GpuError where the GPU failed, which may be better later.
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
        self._slots: list[Slot] = []
        self._contexts: ExecutionContexts | None = None
        self._engine: Any = None
        self._runtime: Any = None
        self._told_of_no_graph = False
        try:
            self.name = (
                f"{'TensorRT' if self._info.flavor == 'tensorrt' else 'TensorRT for RTX'} {library.__version__}, "
                f"{self._info.precision}, on {self._device.name} ({self._device.binding})"
            )
            _check_gpu(path, self._info, self._device)
            with PREPARING, self._device.current(), _nothing_held_by_errors():
                self._open(library, plan, stream, profile=profile)
        except BaseException:
            self.close()
            raise

    def _open(self, library: Any, plan: bytes, stream: Any, *, profile: bool) -> None:
        messages = library_logger(library)
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
            reason = messages.reason()
            if re.search("out ?of ?memory", reason, re.IGNORECASE):
                raise GpuError(f"{self.path}: the GPU's memory is too full for the engine{reason}; see `nvidia-smi`")
            raise ModelError(
                f"{self.path}: {self._info.flavor} refused the engine{reason}; build it on this machine: "
                f"{self._info.build_command(self.path)}"
            )
        self._tensors = tensors = _TensorCheck(library, self._engine, self.path, self._info).tensors()
        kernels = load_kernels(self._device)
        gpu = "{} {}.{}".format(self._device.name, *self._device.compute_capability)
        key = (self.sha256, gpu, library.__version__)
        self._contexts = contexts = ExecutionContexts(library, self._engine, messages.reason, key=key)
        for _ in range(SLOTS if stream is None else 1):
            slot = Slot(
                self._device,
                kernels,
                tensors,
                contexts,
                self._device.stream(stream),
                messages.reason,
                self._info,
                profile=profile,
                on_no_graph=self._tell_of_no_graph,
            )
            self._slots.append(slot)
        self._warm_up()
        contexts.keep_kernels()

    def _warm_up(self) -> None:
        """Frames of the model's size, the most likely one, will find everything ready."""
        spec = self.spec.input.of_tile
        width, height = spec.resize_wh if spec.roi is None else (spec.roi.width, spec.roi.height)
        largest = self._tensors.max_batch
        for count in range(largest, 0, -1) if largest <= WARMED_BATCHES else (1,):
            self._slots[0].prepare(((height, width, 3),) * count)
        for slot in self._slots[1:]:
            # Only more images, or tiles, than one batch takes come here.
            slot.prepare(((height, width, 3),) * largest)

    def _tell_of_no_graph(self, count: int, reason: str) -> None:
        # Other numbers of images mostly fail for the same reason.
        _log.log(
            logging.DEBUG if self._told_of_no_graph else logging.WARNING,
            "no CUDA graph for %d image(s), the work is enqueued call by call instead: %s",
            count,
            reason,
        )
        self._told_of_no_graph = True

    @property
    def uses_graph(self) -> bool:
        """Whether batches like the last one are launched as a CUDA graph."""
        return bool(self._slots) and self._slots[0].uses_graph

    @property
    def max_batch(self) -> int:
        """Images that the GPU takes at once; more are judged in turns, as are the tiles of one image."""
        return 1 if self.spec.input.is_tiled else self._tensors.max_batch

    def infer(self, images: Sequence[Image], *, maps_above: float | None = None) -> Inference:
        """See ``Engine.infer``. Equal images in batches of another size can differ by the engine's rounding.

        Raises:
            StallError: the GPU's context is lost, and with it everything that any engine of the process has there.
        """
        for image in images:
            check_image(image)
            Geometry.of(self.spec.input, image)
        with self._lock:
            if not self._is_open:
                raise ModelError(f"{self.path}: the engine is closed")
            with self._abandoned_on_error(), self._device.current(), _nothing_held_by_errors():
                if self.spec.input.is_tiled:
                    return infer_tiles(self._infer, images, self.spec)
                return self._infer(images, maps_above)

    def _infer(self, images: Sequence[Image], maps_above: float | None = None) -> Inference:
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
            try:
                with self._device.current():
                    for slot in self._slots:
                        slot.abandon()
            except CudaError as lost:
                # What one batch did wrong is over when its stream is waited for. Errors that stay are the context's,
                # after an illegal address for one, and every later call would give them.
                raise StallError(
                    f"{self.path}: {lost}; the GPU's context is lost, and every later frame would fail: start the "
                    "process again (systemd does), and report it with the output of benchmarks/gpu_check.sh"
                ) from error
            if isinstance(error, CudaError):
                raise GpuError(f"{self.path}: {error}") from error
            raise

    def close(self) -> None:
        """See ``Engine.close``."""
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            with PREPARING:
                try:
                    with self._device.current():
                        # Before the memory they point to, contexts before the engine, the engine before its runtime.
                        for slot in self._slots:
                            slot.close()
                        self._slots = []
                        if self._contexts is not None:
                            self._contexts.keep_kernels()
                            self._contexts.close()
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


@contextmanager
def _nothing_held_by_errors() -> Iterator[None]:
    """Else the failed calls' variables keep TensorRT's objects alive, longer than their CUDA context is current."""
    try:
        yield
    except BaseException as error:
        clear_frames(error.__traceback__)
        raise


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
    if info.compute_capability is not None and info.gpu not in (None, device.name):
        _log.warning(
            "%s: built on the GPU %s, this one is %s; its kernels were chosen for the other one, and may be slow here "
            "or want more memory than there is. Build it again, here: %s",
            path,
            info.gpu,
            device.name,
            info.build_command(path),
        )


@cache
def library_logger(library: Any) -> Any:
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


class _TensorCheck:
    """Reads an engine's tensors and compares them with its spec; short-lived, because it holds the engine."""

    def __init__(self, library: Any, engine: Any, path: Path, info: PlanInfo) -> None:
        self._library, self._engine, self._path, self._info = library, engine, path, info

    def tensors(self) -> Tensors:
        """Raises ModelError where they do not fit."""
        info, engine = self._info, self._engine
        width, height = info.spec.input.size_wh
        outputs: dict[str, tuple[int, ...]]
        if info.head == "map":
            outputs = {MAP_NAME: (1, height, width), SCORE_NAME: ()}
        else:
            outputs = {**feature_shapes(info.spec)}
        expected = {INPUT_NAME: (3, height, width), **outputs}
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        if set(names) != set(expected):
            raise self._mismatch(f"tensors {sorted(expected)}", f"{sorted(names)}")
        for name, shape in expected.items():
            self._check(name, shape)
        dtypes = {name: self._dtype(name) for name in outputs}
        results = {name for name in outputs if name in (MAP_NAME, SCORE_NAME, PROBABILITY_NAME)}
        if any(dtypes[name] != np.float32 for name in results):
            raise self._mismatch("float32 results", str({name: str(dtypes[name]) for name in sorted(results)}))
        features = {dtypes[name] for name in outputs if name not in results}
        if len(features) > 1:
            raise self._mismatch("features of one type", str(sorted(map(str, features))))
        smallest, _, largest = engine.get_tensor_profile_shape(INPUT_NAME, 0)
        return Tensors(outputs, dtypes, self._dtype(INPUT_NAME), int(smallest[0]), int(largest[0]))

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
