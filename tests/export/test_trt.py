"""The one module that knows how the TensorRT libraries differ, against recording fakes of both generations.

The fakes have the names that NVIDIA's Python references list for 10.3 and for 11, and nothing else: a call that one of
them lacks fails here. The real TensorRT for RTX is called in ``test_build.py``.
"""

from __future__ import annotations

import _thread
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from recontrast_edge.engines.tensorrt import library_logger
from recontrast_edge.errors import MissingError, ModelError, UsageError
from recontrast_export.trt import Library, Network, Settings, load_library

MODEL = b"an ONNX model"
CACHE_HEADER = b"cache of this GPU;"


class Named(int):
    """A value of an enumeration."""

    def __new__(cls, name: str, value: int) -> Named:
        made = super().__new__(cls, value)
        made.name = name
        return made


def enum(*names: str) -> Any:
    return SimpleNamespace(**{name: Named(name, index) for index, name in enumerate(names)})


class Config:
    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self._calls = calls
        self._cache: Any = None
        self.progress_monitor: Any = None
        self.profiling_verbosity: Any = None

    def add_optimization_profile(self, profile: Any) -> int:
        self._calls.append(("add_optimization_profile", profile.shapes))
        return 0

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._calls.append(("set_memory_pool_limit", pool.name, pool_size))

    def set_flag(self, flag: Any) -> None:
        self._calls.append(("set_flag", flag.name))

    def clear_flag(self, flag: Any) -> None:
        self._calls.append(("clear_flag", flag.name))

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        if serialized_timing_cache and not serialized_timing_cache.startswith(b"cache"):
            return None
        return SimpleNamespace(content=serialized_timing_cache, serialize=lambda: memoryview(self._cache.content))

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.content and not cache.content.startswith(CACHE_HEADER):
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


class RtxConfig(Config):
    num_compute_capabilities = 0

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        self._calls.append(("set_compute_capability", self.num_compute_capabilities, compute_capability.name, index))
        return True


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, ...]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = (min, opt, max)


class Definition:
    """An image in, two tensors out."""

    num_inputs, num_outputs = 1, 2

    def __init__(self) -> None:
        self._ends = [SimpleNamespace(allowed_formats=0x1FFF) for _ in range(3)]

    def get_input(self, index: int) -> Any:
        assert index == 0
        return self._ends[0]

    def get_output(self, index: int) -> Any:
        return self._ends[1:][index]

    @property
    def allowed_formats(self) -> list[int]:
        return [tensor.allowed_formats for tensor in self._ends]


class Fake(ModuleType):
    """A library: what it was called with, and what it will answer. It stays with the first logger, as TensorRT says."""

    def __init__(self, version: str, *, rtx: bool = False, strongly_typed_flag: bool = True) -> None:
        super().__init__("tensorrt_rtx" if rtx else "tensorrt")
        self.__version__ = version
        self.calls: list[tuple[Any, ...]] = []
        self.parser_errors: list[Any] = []
        self.plan: bytes | None = b"a plan"
        self.steps = 3
        self.on_step = lambda step: None
        self._config = RtxConfig if rtx else Config
        flags = ("EXPLICIT_BATCH",) if version.startswith("10.") else ()
        self.NetworkDefinitionCreationFlag = enum(*flags, *(("STRONGLY_TYPED",) if strongly_typed_flag else ()))
        newer = () if version.startswith("10.3.") else ("STRICT_NANS",)
        self.BuilderFlag = enum("TF32", "REFIT", *newer, *(("REQUIRE_USER_ALLOCATION",) if rtx else ()))
        self.TensorFormat = enum("LINEAR", "CHW2", "HWC8")
        self.definition = Definition()
        self.warnings: list[str] = []
        self.inspected = '{"Layers": ["conv"]}'
        self.logger: Any = None
        self.MemoryPoolType = enum("WORKSPACE")
        self.ProfilingVerbosity = enum("LAYER_NAMES_ONLY", "NONE", "DETAILED")
        self.LayerInformationFormat = enum("ONELINE", "JSON")
        if rtx:
            self.ComputeCapability = enum("NONE", "CURRENT", "SM75", "SM86", "SM120")

        class ILogger:
            Severity = enum("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
            INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING

        class IProgressMonitor:
            pass

        self.ILogger = ILogger
        self.IProgressMonitor = IProgressMonitor

    def Builder(self, logger: Any) -> Any:  # noqa: N802
        logger = self.logger = self.logger or logger

        def build_serialized_network(network: Any, config: Any) -> Any:
            self.calls.append(("build_serialized_network", network, config.profiling_verbosity))
            monitor = config.progress_monitor
            monitor.phase_start("Building", None, self.steps)
            for step in range(self.steps):
                self.on_step(step)
                if not monitor.step_complete("Building", step):
                    self.calls.append(("cancelled", step))
                    return None
            monitor.phase_finish("Building")
            for warning in self.warnings:
                logger.log(logger.Severity.WARNING, warning)
            if self.plan is None:
                logger.log(logger.Severity.WARNING, "a remark")
                logger.log(logger.Severity.ERROR, " out of memory ")
            else:
                config._cache and setattr(config._cache, "content", CACHE_HEADER + b"times")
            return None if self.plan is None else memoryview(self.plan)

        def create_network(flags: int = 0) -> Any:
            self.calls.append(("create_network", flags))
            return self.definition

        return SimpleNamespace(
            create_network=create_network,
            create_builder_config=lambda: self._config(self.calls),
            create_optimization_profile=Profile,
            build_serialized_network=build_serialized_network,
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:  # noqa: N802
        return SimpleNamespace(
            parse=lambda model: not self.parser_errors,
            num_errors=len(self.parser_errors),
            get_error=lambda index: self.parser_errors[index],
        )

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        logger = self.logger = self.logger or logger

        def get_engine_information(format: Any) -> str:
            assert format.name == "JSON"
            return self.inspected

        def deserialize_cuda_engine(plan: bytes) -> Any:
            if plan == self.plan:
                return engine
            logger.log(logger.Severity.ERROR, "not a plan of mine")
            return None

        inspector = SimpleNamespace(get_engine_information=get_engine_information)
        engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine)

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


VERSIONS = ["10.3.0.26", "10.13.3.9", "11.4.1.3"]
SETTINGS = Settings(batch=(1, 2, 4), image_chw=(3, 64, 96))


def tensorrt(version: str) -> tuple[Library, Fake]:
    fake = Fake(version)
    return Library("tensorrt", fake), fake


def rtx() -> tuple[Library, Fake]:
    fake = Fake("1.7.1.116", rtx=True)
    return Library("tensorrt-rtx", fake), fake


@pytest.mark.parametrize("version", VERSIONS)
def test_the_same_calls_build_with_every_version(version: str) -> None:
    library, fake = tensorrt(version)
    built = library.build(library.parse(MODEL), SETTINGS)
    assert (built.plan, built.timing_cache) == (b"a plan", None)
    shapes = tuple((batch, 3, 64, 96) for batch in (1, 2, 4))
    assert fake.called("add_optimization_profile") == [({"image": shapes},)]
    assert fake.called("clear_flag") == [("TF32",)]
    # NaN must reach the score; 10.3 cannot be told.
    assert fake.called("set_flag") == ([] if version == "10.3.0.26" else [("STRICT_NANS",)])
    assert fake.called("set_memory_pool_limit") == []
    assert fake.called("build_serialized_network") == [(fake.definition, None)]


@pytest.mark.parametrize("make", [lambda: tensorrt("10.3.0.26"), lambda: tensorrt("11.4.1.3"), rtx])
def test_images_go_in_and_results_come_out_in_plain_nchw_order(make: Any) -> None:
    library, fake = make()
    library.build(library.parse(MODEL), SETTINGS)
    assert fake.definition.allowed_formats == [1, 1, 1]


@pytest.mark.parametrize(
    ("version", "has_flag", "flags"), [("10.3.0.26", True, 2), ("11.4.1.3", True, 1), ("11.9.0.1", False, 0)]
)
def test_networks_are_strongly_typed_with_the_flag_where_there_is_one(version: str, has_flag: bool, flags: int) -> None:
    """11 ignores the flag and may drop it."""
    fake = Fake(version, strongly_typed_flag=has_flag)
    Library("tensorrt", fake).parse(MODEL)
    assert fake.called("create_network") == [(flags,)]


def test_rtx_networks_are_strongly_typed_and_engines_can_be_captured() -> None:
    library, fake = rtx()
    library.build(library.parse(MODEL), SETTINGS)
    assert fake.called("create_network") == [(1,)]
    assert fake.called("set_flag") == [("STRICT_NANS",), ("REQUIRE_USER_ALLOCATION",)]


@pytest.mark.parametrize("make", [lambda: tensorrt("10.3.0.26"), rtx])
def test_workspace_and_verbosity(make: Any) -> None:
    library, fake = make()
    settings = Settings(batch=(1, 1, 1), image_chw=(3, 8, 8), workspace_mib=3, detailed=True)
    library.build(library.parse(MODEL), settings)
    assert fake.called("set_memory_pool_limit") == [("WORKSPACE", 3 * 2**20)]
    assert fake.called("build_serialized_network") == [(fake.definition, fake.ProfilingVerbosity.DETAILED)]


def test_rtx_builds_for_one_architecture_or_for_none() -> None:
    library, fake = rtx()
    library.build(library.parse(MODEL), SETTINGS)
    assert fake.called("set_compute_capability") == []
    library.check_sm(86, None)
    library.build(library.parse(MODEL), Settings(batch=(1, 1, 1), image_chw=(3, 8, 8), sm=86))
    assert fake.called("set_compute_capability") == [(1, "SM86", 0)]
    with pytest.raises(UsageError, match=r"--sm 87: .* builds for 75, 86, 120, .* on the Jetson itself"):
        library.check_sm(87, "8.6")


def test_portable_engines_are_for_the_architectures_that_nvidia_lists() -> None:
    library, _ = rtx()
    assert [library.runs_portable(capability) for capability in ("8.6", "12.0", "12.1", "13.0")] == [True] * 4
    # 7.5 needs an engine of its own; this version does not know 8.0.
    assert not any(map(library.runs_portable, ("7.5", "8.0", "8.7", "9.0", "10.0", "11.0")))


def test_tensorrt_builds_for_the_local_gpu_only() -> None:
    library, _ = tensorrt("10.3.0.26")
    library.check_sm(None, "8.7")
    library.check_sm(87, "8.7")
    library.check_sm(120, "12.0")
    with pytest.raises(UsageError, match=r"--sm 86: .* is 8\.7; run the build on the device itself"):
        library.check_sm(86, "8.7")


def test_the_timing_cache_is_used_and_kept() -> None:
    library, _ = tensorrt("10.3.0.26")
    network = library.parse(MODEL)
    first = library.build(network, Settings((1, 1, 1), (3, 8, 8), timing_cache=b""))
    assert first.timing_cache == CACHE_HEADER + b"times"
    assert not first.cache_ignored
    second = library.build(network, Settings((1, 1, 1), (3, 8, 8), timing_cache=first.timing_cache))
    assert second.timing_cache is not None
    assert not second.cache_ignored


@pytest.mark.parametrize("content", [b"\0\0\0", b"cache of another GPU"])
def test_a_timing_cache_that_is_damaged_or_of_another_gpu_is_begun_again(content: bytes) -> None:
    library, _ = tensorrt("11.4.1.3")
    built = library.build(library.parse(MODEL), Settings((1, 1, 1), (3, 8, 8), timing_cache=content))
    assert built.cache_ignored
    assert built.timing_cache == CACHE_HEADER + b"times"


def test_only_tensorrt_has_a_timing_cache_and_only_rtx_needs_no_gpu() -> None:
    old, new = tensorrt("10.3.0.26")[0], rtx()[0]
    assert (old.has_timing_cache, old.is_portable) == (True, False)
    assert (new.has_timing_cache, new.is_portable) == (False, True)


def test_parser_errors_name_node_and_operator() -> None:
    library, fake = tensorrt("10.3.0.26")
    for name, operator in (("head/0", "Einsum"), ("", "")):
        error = {"node_name": name, "node_operator": operator, "desc": f"cannot take it {name}\n"}
        fake.parser_errors.append(SimpleNamespace(**{key: lambda value=value: value for key, value in error.items()}))
    with pytest.raises(ModelError, match=r"10\.3\.0\.26 .*: node 'head/0' \(Einsum\): cannot take it head/0; cannot"):
        library.parse(MODEL)


def test_a_build_without_engine_tells_the_librarys_errors_but_not_its_remarks() -> None:
    library, fake = tensorrt("10.3.0.26")
    network = library.parse(MODEL)
    fake.plan = None
    with pytest.raises(ModelError, match=r"cannot build an engine: out of memory$"):
        library.build(network, SETTINGS)


def test_warnings_of_too_little_memory_are_counted_and_others_are_not() -> None:
    library, fake = tensorrt("10.3.0.26")
    network = library.parse(MODEL)
    fake.warnings = [
        "Tactic Device request: 1000MB Available: 302MB. Device memory is insufficient to use tactic.",
        "UNSUPPORTED_STATE: Skipping tactic 44 due to insufficient memory on requested size of 1048576000 detected.",
        "Skipping tactic 3 due to insuficient memory on requested size of 449 detected for tactic 4.",
        "Skipping tactic 5 due to insuficient memory on requested size of 448 detected for tactic 4.",
        "CUDA lazy loading is not enabled.",
        "CUDA driver version is insufficient for CUDA runtime version",
    ]
    assert library.build(network, SETTINGS).memory_warnings == 4
    fake.warnings = []
    assert library.build(network, SETTINGS).memory_warnings == 0


def test_an_engine_that_is_opened_after_a_build_learns_why_it_is_refused() -> None:
    library, fake = tensorrt("10.3.0.26")
    network = library.parse(MODEL)
    fake.plan = None
    with pytest.raises(ModelError):
        library.build(network, SETTINGS)
    messages = library_logger(fake)
    # What went wrong in the build is not the engine's.
    assert messages.reason() == ""
    assert fake.Runtime(messages).deserialize_cuda_engine(b"another plan") is None
    assert messages.reason() == " (not a plan of mine)"


class Recorder:
    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def start(self, phase: str, parent: str | None, n_steps: int) -> None:
        self.events.append(("start", phase, parent, n_steps))

    def step(self, phase: str, step: int) -> None:
        self.events.append(("step", phase, step))

    def finish(self, phase: str) -> None:
        self.events.append(("finish", phase))


def test_progress_is_passed_on() -> None:
    library, _ = tensorrt("10.3.0.26")
    progress = Recorder()
    library.build(library.parse(MODEL), SETTINGS, progress)
    steps = [("step", "Building", step) for step in range(3)]
    assert progress.events == [("start", "Building", None, 3), *steps, ("finish", "Building")]


def test_an_error_in_the_progress_stops_the_build_and_comes_out() -> None:
    """The library itself could not pass it on."""
    library, fake = tensorrt("10.3.0.26")
    progress = Recorder()

    def broken(phase: str, step: int) -> None:
        raise BrokenPipeError("the terminal is gone")

    progress.step = broken  # type: ignore[method-assign]
    with pytest.raises(BrokenPipeError):
        library.build(library.parse(MODEL), SETTINGS, progress)
    assert fake.called("cancelled") == [(0,)]


def test_ctrl_c_ends_the_build_at_its_next_step() -> None:
    library, fake = tensorrt("10.3.0.26")
    network = library.parse(MODEL)
    fake.steps = 10_000

    def on_step(step: int) -> None:
        if step == 1:
            _thread.interrupt_main()
        time.sleep(0.001)

    fake.on_step = on_step
    with pytest.raises(KeyboardInterrupt):
        library.build(network, SETTINGS)
    ((step,),) = fake.called("cancelled")
    assert step < 9_999


def test_the_network_report_survives_left_out_inputs_and_unknown_ranks() -> None:
    class Unknown:
        name, dtype = "shape", SimpleNamespace(name="INT64")

        @property
        def shape(self) -> Any:
            raise ValueError("__len__() should return >= 0")

    tensor = SimpleNamespace(name="x", dtype=SimpleNamespace(name="HALF"), shape=(-1, 3))
    layer = SimpleNamespace(
        name="conv",
        type=SimpleNamespace(name="CONVOLUTION"),
        num_inputs=3,
        num_outputs=1,
        get_input=[tensor, None, Unknown()].__getitem__,
        get_output=[tensor].__getitem__,
    )
    report = Network(SimpleNamespace(num_layers=1, get_layer=lambda index: layer), None).layers()
    x = {"name": "x", "dtype": "HALF", "shape": [-1, 3]}
    unknown = {"name": "shape", "dtype": "INT64", "shape": []}
    assert report == [{"name": "conv", "type": "CONVOLUTION", "inputs": [x, unknown], "outputs": [x]}]


def test_the_engine_is_inspected_where_it_can_be_loaded() -> None:
    library, fake = tensorrt("10.3.0.26")
    assert library.inspect(b"a plan") == {"Layers": ["conv"]}
    # Not every version escapes the names of layers.
    fake.inspected = '{"Layers": ["a\\conv"]}'
    assert library.inspect(b"a plan") == fake.inspected
    with pytest.raises(ModelError, match="does not tell the engine's layers: not a plan of mine"):
        library.inspect(b"another plan")


def test_an_inspector_that_fails_is_an_error_of_ours() -> None:
    library, fake = tensorrt("10.3.0.26")
    fake.inspected = ""
    with pytest.raises(ModelError, match="does not tell the engine's layers: it gives no reason"):
        library.inspect(b"a plan")

    def broken(logger: Any) -> Any:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    fake.Runtime = broken
    with pytest.raises(ModelError, match="layers: pybind11"):
        library.inspect(b"a plan")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``import`` finds by these names; None for nothing."""

    class Modules(dict[str, Any]):
        def __setitem__(self, name: str, module: Any) -> None:
            monkeypatch.setitem(sys.modules, name, module)

    found = Modules()
    load_library.cache_clear()
    found["tensorrt"] = found["tensorrt_rtx"] = None
    yield found
    load_library.cache_clear()


def test_auto_prefers_tensorrt(modules: dict[str, Any]) -> None:
    modules["tensorrt_rtx"] = Fake("1.7.1.116", rtx=True)
    assert load_library("auto").flavor == "tensorrt-rtx"
    load_library.cache_clear()
    modules["tensorrt"] = Fake("10.3.0.26")
    assert load_library("auto").version == "10.3.0.26"
    assert load_library("tensorrt-rtx").version == "1.7.1.116"


@pytest.mark.parametrize(
    ("flavor", "message"),
    [
        ("auto", r"tensorrt or tensorrt-rtx, .*recontrast-edge\[tensorrt\]' or .*\[tensorrt-rtx\]'"),
        ("tensorrt", r"recontrast-edge\[tensorrt\]"),
        ("tensorrt-rtx", r"recontrast-edge\[tensorrt-rtx\]"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(modules: dict[str, Any], flavor: Any, message: str) -> None:
    with pytest.raises(MissingError, match=message):
        load_library(flavor)


def test_a_library_that_is_too_old_is_refused(modules: dict[str, Any]) -> None:
    modules["tensorrt"] = Fake("8.6.1")
    with pytest.raises(MissingError, match=r"tensorrt 8\.6\.1 is too old: expected 10\.3 or newer"):
        load_library("auto")


def test_a_library_that_does_not_load_is_told(modules: dict[str, Any], tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.syspath_prepend(tmp_path)
    broken = tmp_path / "tensorrt.py"
    broken.write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    with pytest.raises(MissingError, match=r"cannot be loaded \(libnvinfer"):
        load_library("tensorrt")
