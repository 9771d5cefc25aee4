"""Builder and parser of TensorRT 10.3 to 11 and of TensorRT for RTX: all differences between them live here.

    library = load_library("auto")
    network = library.parse(onnx_bytes)
    plan = library.build(network, Settings(batch=(1, 1, 4), image_chw=(3, 256, 256)))

What differs:

* Networks are always strongly typed. TensorRT 10 and RTX need a flag for it; 11 knows nothing else and only keeps the
  flag's name for now.
* TensorRT builds for the GPU of this machine, by timing kernels on it, and a timing cache keeps the times. RTX builds
  without a GPU, portable or for one architecture; a timing cache has no use there, and using one asks for a GPU.
* RTX engines allocate memory while they run unless they are told not to, and then cannot be captured as a CUDA graph.
* TensorRT 10.3 cannot be told to leave NaN and infinity as they are.

Python API: NVIDIA's references of TensorRT 10.3, 11 ("Removed Python APIs and Replacements") and RTX 1.7.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal, Protocol

from recontrast_edge.engines.tensorrt import library_logger
from recontrast_edge.errors import MissingError, ModelError, UsageError
from recontrast_edge.plan import FLAVOR_MODULES, Flavor
from recontrast_edge.scoring import INPUT_NAME

OLDEST: dict[Flavor, tuple[int, int]] = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 4)}
"""The oldest version that is used."""


_INTERRUPT_POLL_S = 0.1

# "Insufficient" alone is also said of drivers. Some versions spell it with one f.
_SHORT_OF_MEMORY = re.compile(r"Tactic Device request|insuff?icient memory", re.IGNORECASE)


class Progress(Protocol):
    """Told how a build proceeds, from threads of the library. Phases nest; names are the library's."""

    def start(self, phase: str, parent: str | None, n_steps: int) -> None: ...

    def step(self, phase: str, step: int) -> None: ...

    def finish(self, phase: str) -> None: ...


@dataclass(frozen=True)
class Settings:
    """How to build.

    Attributes:
        batch: smallest, optimal and largest batch.
        image_chw: channels, height and width of the input.
        sm: architecture to build for, such as ``86``; None for the default of the flavor. RTX only.
        workspace_mib: most scratch memory of any layer, in MiB; None for all that the GPU has.
        detailed: keep names and details of layers in the engine, for profilers and inspectors.
        timing_cache: content of a cache of earlier builds, may be empty; None for no cache. Not with RTX.
    """

    batch: tuple[int, int, int]
    image_chw: tuple[int, int, int]
    sm: int | None = None
    workspace_mib: int | None = None
    detailed: bool = False
    timing_cache: bytes | None = None


@dataclass(frozen=True)
class Built:
    """A finished build.

    Attributes:
        plan: the serialised engine.
        timing_cache: content of the cache afterwards; None if there was to be none.
        cache_ignored: the cache that was given is damaged, or of another version or GPU, and was not used.
        memory_warnings: how often the library said that it skips an implementation of a layer for lack of memory.
    """

    plan: bytes
    timing_cache: bytes | None = None
    cache_ignored: bool = False
    memory_warnings: int = 0


@dataclass(frozen=True, eq=False)
class Network:
    """A parsed model.

    Attributes:
        definition: the library's ``INetworkDefinition``.
        builder: which must outlive it.
    """

    definition: Any
    builder: Any

    def layers(self) -> list[dict[str, Any]]:
        """Name, type, inputs and outputs of each layer; JSON-able. Types are the library's names, such as HALF."""
        definition = self.definition
        report = []
        for index in range(definition.num_layers):
            layer = definition.get_layer(index)
            inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
            report.append(
                {
                    "name": layer.name,
                    "type": layer.type.name,
                    # An optional input that is left out is None.
                    "inputs": [_tensor(tensor) for tensor in inputs if tensor is not None],
                    "outputs": [_tensor(layer.get_output(i)) for i in range(layer.num_outputs)],
                }
            )
        return report


def _tensor(tensor: Any) -> dict[str, Any]:
    try:
        shape = list(tensor.shape)
    except ValueError:
        # The rank of some shape tensors is not known before the build.
        shape = []
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": shape}


class Library:
    """One of the two libraries, with one logger: a second one is ignored as long as a builder has the first.

    Args:
        flavor: which.
        trt: its module.
    """

    def __init__(self, flavor: Flavor, trt: Any) -> None:
        self.flavor = flavor
        self.trt = trt
        self.version = str(trt.__version__)
        self.logger = _logger(trt)

    @property
    def has_timing_cache(self) -> bool:
        return self.flavor == "tensorrt"

    @property
    def is_portable(self) -> bool:
        """Whether an engine can be built for no GPU in particular, and without one."""
        return self.flavor == "tensorrt-rtx"

    def check_sm(self, sm: int | None, local_capability: str | None) -> None:
        """Refuse an architecture that cannot be built for here.

        Args:
            sm: as the user gave it, such as 87 for compute capability 8.7; None for the default.
            local_capability: compute capability of this machine's GPU, such as ``8.7``; None without one.

        Raises:
            UsageError: it cannot be built for.
        """
        if sm is None:
            return
        if self.flavor == "tensorrt-rtx":
            known = self._architectures()
            if sm not in known:
                listed = ", ".join(map(str, known))
                raise UsageError(
                    f"--sm {sm}: TensorRT for RTX {self.version} builds for {listed}, or without --sm for all of them; "
                    "for a Jetson build on the Jetson itself, with its TensorRT"
                )
        elif compute_capability(sm) != local_capability:
            raise UsageError(
                f"--sm {sm}: TensorRT builds by timing kernels on the GPU of this machine, whose compute capability is "
                f"{local_capability or 'unknown'}; run the build on the device itself, without --sm"
            )

    def runs_portable(self, local_capability: str) -> bool:
        """Whether NVIDIA means portable engines to run on a GPU of this compute capability, such as ``8.9``.

        That is 8.0, 8.6, 8.9, as far as this version knows them, 12.0 and later ("CPU-Only AOT and TensorRT-RTX
        Engines" in NVIDIA's documentation of TensorRT for RTX); 7.5 needs an engine of its own.
        """
        major, minor = map(int, local_capability.split("."))
        return major >= 12 or (major >= 8 and 10 * major + minor in self._architectures())

    def _architectures(self) -> list[int]:
        names = (re.fullmatch(r"SM(\d+)", name) for name in dir(self.trt.ComputeCapability))
        return sorted(int(match[1]) for match in names if match)

    def parse(self, model: bytes) -> Network:
        """Read an ONNX model as a strongly typed network.

        Args:
            model: the serialised model, with all weights inside.

        Raises:
            ModelError: the library does not start, or the parser does not take the model; names node and operator.
        """
        with self.logger.collecting():
            return self._parse(model)

    def _parse(self, model: bytes) -> Network:
        trt = self.trt
        try:
            builder = trt.Builder(self.logger)
        except TypeError:
            # What the library's Python layer makes of a builder that it could not create.
            reason = f" ({'; '.join(self.logger.errors[-3:])})" if self.logger.errors else ""
            raise ModelError(
                f"{self.flavor} {self.version} does not start{reason}; most likely the NVIDIA driver is missing or too "
                "old for it, see `recontrast-edge doctor`"
            ) from None
        strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        definition = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
        parser = trt.OnnxParser(definition, self.logger)
        if not parser.parse(model):
            errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
            raise ModelError(
                f"{self.flavor} {self.version} does not take the model: {'; '.join(errors) or 'it gives no reason'}"
            )
        return Network(definition, builder)

    def build(self, network: Network, settings: Settings, progress: Progress | None = None) -> Built:
        """Build; takes seconds to minutes. Ctrl-C ends it at the next step.

        Args:
            network: from ``parse``.
            settings: how.
            progress: told how it proceeds.

        Raises:
            ModelError: the library gives no engine; with its last errors.
            KeyboardInterrupt: once the library has stopped.
        """
        with self.logger.collecting():
            return self._build(network, settings, progress)

    def _build(self, network: Network, settings: Settings, progress: Progress | None) -> Built:
        trt = self.trt
        config = network.builder.create_builder_config()
        self._configure(config, network, settings)
        cache, cache_ignored = self._load_timing_cache(config, settings.timing_cache)
        cancelled = threading.Event()
        # Referenced until the build is over: the library keeps no reference of its own.
        monitor = _monitor(trt, progress, cancelled)
        config.progress_monitor = monitor
        # In a thread of its own, because signals interrupt only Python code of the main thread, and an exception that
        # they raised in a callback would end the process.
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(network.builder.build_serialized_network(network.definition, config))
            except Exception as error:
                future.set_exception(error)

        # Not an executor's: Ctrl-C while it starts one makes it forget the thread, which then outlives the build.
        thread = threading.Thread(target=run, name="TensorRT build")
        try:
            thread.start()
            # The kernel may deliver a signal to the library's threads, which does not wake this one up.
            while wait([future], timeout=_INTERRUPT_POLL_S).not_done:
                pass
        except KeyboardInterrupt:
            cancelled.set()
            raise
        finally:
            if thread.is_alive():
                thread.join()
        if monitor.error is not None:
            raise monitor.error
        serialized = future.result()
        if serialized is None:
            reason = "; ".join(self.logger.errors[-3:]) or "it gives no reason"
            raise ModelError(f"{self.flavor} {self.version} cannot build an engine: {reason}")
        kept = None if cache is None else bytes(config.get_timing_cache().serialize())
        return Built(bytes(serialized), kept, cache_ignored, self.logger.memory_warnings)

    def _configure(self, config: Any, network: Network, settings: Settings) -> None:
        trt = self.trt
        profile = network.builder.create_optimization_profile()
        profile.set_shape(INPUT_NAME, *((batch, *settings.image_chw) for batch in settings.batch))
        if config.add_optimization_profile(profile) < 0:
            raise ModelError(f"{self.flavor} {self.version} does not take batches of {settings.batch}; export it again")
        # By default the builder may choose any layout, channels last or padded too, and engines take plain NCHW only.
        definition = network.definition
        ends = [definition.get_input(index) for index in range(definition.num_inputs)]
        ends += [definition.get_output(index) for index in range(definition.num_outputs)]
        for tensor in ends:
            tensor.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)
        if settings.workspace_mib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
        if settings.detailed:
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        # Else float32 products would be rounded to 10 bits, as many as float16 has: fp32 is what to compare with.
        config.clear_flag(trt.BuilderFlag.TF32)
        # Else x - x may become 0 where x is NaN, and a network that broke would score like a good part.
        strict_nans = getattr(trt.BuilderFlag, "STRICT_NANS", None)
        if strict_nans is not None:
            config.set_flag(strict_nans)
        user_allocation = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
        if user_allocation is not None:
            config.set_flag(user_allocation)
        if settings.sm is not None and self.flavor == "tensorrt-rtx":
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{settings.sm}"), 0)

    def _load_timing_cache(self, config: Any, content: bytes | None) -> tuple[Any, bool]:
        """The cache that the build will use, None for none, and whether the content had to be ignored."""
        if content is None:
            return None, False
        cache = config.create_timing_cache(content)
        # Its header holds version and GPU; another one's times would mislead.
        if cache is not None and config.set_timing_cache(cache, False):
            return cache, False
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
        return cache, True

    def inspect(self, plan: bytes) -> Any:
        """The engine's layers as its inspector tells them: its JSON, which differs by version, or text that is none.

        Raises:
            ModelError: the engine cannot be loaded here, or its inspector tells nothing.
        """
        trt = self.trt
        with self.logger.collecting():
            try:
                engine = trt.Runtime(self.logger).deserialize_cuda_engine(plan)
                inspector = None if engine is None else engine.create_engine_inspector()
                text = inspector and inspector.get_engine_information(trt.LayerInformationFormat.JSON)
            # What the library's Python layer makes of an object that it could not create, and of a call that failed.
            except (TypeError, RuntimeError) as error:
                raise ModelError(f"{self.flavor} {self.version} does not tell the engine's layers: {error}") from None
            if not text:
                reason = "; ".join(self.logger.errors[-3:]) or "it gives no reason"
                raise ModelError(f"{self.flavor} {self.version} does not tell the engine's layers: {reason}")
        try:
            return json.loads(text)
        except ValueError:
            return str(text)


def compute_capability(sm: int) -> str:
    """87 -> ``8.7``."""
    return f"{sm // 10}.{sm % 10}"


@cache
def load_library(flavor: Flavor | Literal["auto"]) -> Library:
    """Import a TensorRT library; ``auto``: TensorRT where it is installed, else TensorRT for RTX.

    Raises:
        MissingError: it is not installed, broken or too old.
    """
    wanted: list[Flavor] = ["tensorrt", "tensorrt-rtx"] if flavor == "auto" else [flavor]
    for candidate in wanted:
        module = FLAVOR_MODULES[candidate]
        try:
            trt = import_module(module)
        except ModuleNotFoundError as error:
            if error.name == module:
                continue
            raise MissingError(f"{candidate} is installed but lacks {error.name}; install it again") from None
        # Its native libraries are missing or do not fit.
        except (ImportError, OSError) as error:
            raise MissingError(f"{candidate} is installed but cannot be loaded ({error}); install it again") from None
        numbers = [int(number) for number in re.findall(r"\d+", str(trt.__version__))[:2]]
        oldest = OLDEST[candidate]
        if tuple(numbers) < oldest:
            raise MissingError(
                f"{candidate} {trt.__version__} is too old: expected {'.'.join(map(str, oldest))} or newer"
            )
        return Library(candidate, trt)
    extras = " or ".join(f"pip install 'recontrast-edge[{name}]'" for name in wanted)
    raise MissingError(
        f"building needs {' or '.join(wanted)}, which is not installed: on a Jetson JetPack brings it, else {extras}"
    )


def _parser_error(error: Any) -> str:
    name, operator = error.node_name(), error.node_operator()
    where = f"node {name!r} ({operator}): " if name or operator else ""
    return f"{where}{str(error.desc()).strip()}"


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps what the library says is wrong while it builds; what it only remarks is for developers of the library.

        By what the library says, it ignores an engine's logger while a builder has this one; RTX 1.7 does so only in
        part. What comes here then is handed on to the engine's.
        """

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.memory_warnings = 0
            self._is_collecting = False

        @contextmanager
        def collecting(self) -> Iterator[None]:
            """Forget what was kept, and keep what comes in this block."""
            self.errors.clear()
            self.memory_warnings = 0
            self._is_collecting = True
            try:
                yield
            finally:
                self._is_collecting = False

        def log(self, severity: Any, message: str) -> None:
            if not self._is_collecting:
                library_logger(trt).log(severity, message)
            elif severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(str(message).strip())
            elif severity == trt.ILogger.Severity.WARNING and _SHORT_OF_MEMORY.search(message):
                self.memory_warnings += 1

    return Logger()


def _monitor(trt: Any, progress: Progress | None, cancelled: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes on what the library reports and, at each step, whether it may go on."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: Exception | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tell("start", phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell("step", phase_name, step)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._tell("finish", phase_name)

        def _tell(self, event: str, *arguments: Any) -> None:
            if progress is None or self.error is not None:
                return
            try:
                getattr(progress, event)(*arguments)
            # The library's frames cannot pass an exception on: it would end the process.
            except Exception as error:
                self.error = error
                cancelled.set()

    return Monitor()
