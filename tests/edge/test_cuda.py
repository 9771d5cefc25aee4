"""The CUDA layer: every return code, closing, graphs, the compiler and its cache; and the names of the real bindings.

python -m pytest tests/edge/test_cuda.py
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import recontrast_edge
from recontrast_edge.cuda import CudaError, Device, Graph, compiler, open_device
from recontrast_edge.errors import GpuNotReadyError, MissingError, ModelError
from recontrast_edge.kernels import launcher
from recontrast_edge.user_cache import cache_folder
from tests.edge.fakes_cuda import ENUMS, CUresult, CUstream_flags, FakeDriver, install
from tests.kernels.host import COMPILER

PACKAGE = Path(recontrast_edge.__file__).parent
ROOT = Path(__file__).parents[2]
PACKAGES = Path(sys.prefix) / "gpu-packages"
OLDEST = "12.9.1"
"""The oldest cuda-bindings that may be installed."""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    install(fake, monkeypatch)
    return fake


@pytest.fixture
def device(driver: FakeDriver) -> Iterator[Device]:
    with open_device(binding="cuda-bindings") as opened:
        yield opened
    assert driver.live == {}


def test_the_gpu_introduces_itself(device: Device) -> None:
    assert (device.name, device.compute_capability, device.multiprocessors) == ("Fake GPU", (8, 7), 16)
    with device.current():
        assert device.memory_info() == (1 << 30, 2 << 30)


def test_streams_do_not_wait_for_what_others_do_on_the_default_one(device: Device, driver: FakeDriver) -> None:
    with device.current():
        device.stream()
    assert driver.stream_flags == [CUstream_flags.CU_STREAM_NON_BLOCKING]


def test_an_error_names_call_and_reason(device: Device, driver: FakeDriver) -> None:
    driver.failures["cuMemAlloc"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with device.current(), pytest.raises(CudaError) as caught:
        device.allocate(10)
    assert (caught.value.call, caught.value.code) == ("cuMemAlloc", "CUDA_ERROR_OUT_OF_MEMORY")
    assert str(caught.value) == "the GPU failed in cuMemAlloc: out of memory (CUDA_ERROR_OUT_OF_MEMORY)"
    assert isinstance(caught.value, ModelError), "so that a frame it happens to becomes a FAULT"


def test_an_error_without_a_text_is_still_one(device: Device, driver: FakeDriver) -> None:
    driver.failures.update(
        cuMemAlloc=CUresult.CUDA_ERROR_OUT_OF_MEMORY, cuGetErrorString=CUresult.CUDA_ERROR_INVALID_VALUE
    )
    with device.current(), pytest.raises(CudaError, match="unknown error"):
        device.allocate(10)


@pytest.mark.parametrize("function", ["cuInit", "cuMemAlloc"])
def test_an_error_that_the_binding_does_not_know_is_still_one(driver: FakeDriver, function: str) -> None:
    driver.failures[function] = 98765
    with pytest.raises((CudaError, GpuNotReadyError), match=rf"failed in {function}: an error that .*\(98765"):  # noqa: SIM117
        with open_device(binding="cuda-bindings") as device, device.current():
            device.allocate(10)
    assert driver.live == {}


def test_graphs_of_one_stream_live_side_by_side(device: Device, driver: FakeDriver) -> None:
    with device.current():
        stream, memory = device.stream(), device.allocate(8)
        host = device.allocate_pinned(8).array

        def captured(offset: int) -> Graph:
            with stream.capture() as capture:
                stream.zero(memory.pointer + offset, 1)
                stream.copy_to_host(host, memory.pointer)
            return capture.graph()

        first, second = captured(0), captured(2)
        first.launch(stream)
        stream.synchronize()
        np.testing.assert_array_equal(host, [0, *[255] * 7])
        first.close()
        second.launch(stream)
        stream.synchronize()
        np.testing.assert_array_equal(host, [0, 255, 0, *[255] * 5])
    assert list(driver.live.values()).count("graph") == 0


def test_a_broken_capture_leaves_the_stream_usable(device: Device, driver: FakeDriver) -> None:
    with device.current():
        stream, memory = device.stream(), device.allocate(8)
        driver.failures["cuMemsetD8Async"] = CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        with pytest.raises(CudaError, match="capture unsupported"), stream.capture():
            stream.zero(memory.pointer, 8)
        stream.synchronize()
        assert list(driver.live.values()).count("graph") == 0


@pytest.mark.parametrize("function", ["cuInit", "cuDeviceGetCount"])
def test_no_gpu(driver: FakeDriver, function: str) -> None:
    driver.failures[function] = CUresult.CUDA_ERROR_NO_DEVICE
    with pytest.raises(GpuNotReadyError, match=rf"no NVIDIA GPU can be used here .*{function}: no device"):
        open_device(binding="cuda-bindings")


def test_a_gpu_that_is_not_there(driver: FakeDriver) -> None:
    with pytest.raises(MissingError, match="expected GPU 3, this machine has 1"):
        open_device(3, binding="cuda-bindings")


def test_no_driver(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_flags: int) -> None:
        raise RuntimeError("libcuda.so.1 not found\nlong story")

    monkeypatch.setattr(driver, "cuInit", missing)
    with pytest.raises(MissingError, match=r"driver is missing \(libcuda.so.1 not found\)") as caught:
        open_device(binding="cuda-bindings")
    assert not isinstance(caught.value, GpuNotReadyError), "it will not be there the next time either"


def test_a_driver_that_is_older_than_the_binding(
    device: Device, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_start: int, _end: int) -> None:
        raise RuntimeError("function cuEventElapsedTime_v2 is not found")

    monkeypatch.setattr(driver, "cuEventElapsedTime", missing)
    with device.current(), pytest.raises(CudaError, match=r"cuEventElapsedTime_v2 is not found; the driver is older"):
        device.event().ms_since(device.event())


def passed_behind_a_real_package(*arguments: str, folder: Path | None = None) -> int:
    """How many tests pass with ``tests.edge.libcuda`` in between, and the package in ``folder``; none fails."""
    if COMPILER is None:
        pytest.skip("g++ builds the library that the package finds")
    path = os.pathsep.join(filter(None, [folder and str(folder), os.environ.get("PYTHONPATH")]))

    def output(*command: str) -> str:
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    if folder:
        assert str(folder) in output("-c", "import cuda.bindings.driver as driver; print(driver.__file__)")
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.edge.libcuda"]
    return int(re.findall(r"(\d+) passed", output(*options, *arguments))[-1])


@pytest.mark.parametrize("version", [OLDEST, "installed"])
def test_the_real_cuda_bindings_pass_everything_on(version: str) -> None:
    """These tests and the engine's once more, with the real package between the project and the fake."""
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is what is tested")
    folder = None if version == "installed" else PACKAGES / f"cuda-bindings=={version}"
    if folder and not folder.is_dir():
        pytest.skip(f"tests/install_gpu_packages.sh puts cuda-bindings {version} into {folder}")
    engine = "profiling_splits or applications_context or spoilt or allocated_and_one_wait or driver_refuses"
    files = ["tests/edge/test_cuda.py", "tests/edge/test_tensorrt_engine.py", "tests/edge/test_way.py"]
    chosen = f"test_cuda and not test_the_real and not older and not no_driver and not compile or {engine}"
    assert passed_behind_a_real_package("-k", chosen, *files, folder=folder) >= 15


def test_the_oldest_cuda_bindings_that_may_be_installed_is_the_one_that_is_tested() -> None:
    allowed = re.findall(r'"cuda-bindings>=([^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert set(allowed) == {OLDEST}
    assert f" cuda-bindings=={OLDEST} " in (ROOT / "tests" / "install_gpu_packages.sh").read_text()


def test_the_real_pycuda_passes_everything_on() -> None:
    if find_spec("pycuda") is None:
        pytest.skip("pycuda is what is tested; tests/install_gpu_packages.sh builds it where nvcc is")
    assert passed_behind_a_real_package("tests/edge/behind_pycuda.py") >= 7


@pytest.mark.parametrize("name", ["cuda-bindings", "pycuda"])
def test_a_binding_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cuda", "cuda.bindings", "pycuda"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingError, match=r"cannot be imported.*recontrast-edge\["):
        open_device(binding=name)  # type: ignore[arg-type]


def test_no_binding_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recontrast_edge.cuda.find_spec", lambda _name: None)
    with pytest.raises(MissingError, match=r"found none; install one: pip install 'recontrast-edge\[gpu\]'"):
        open_device()


def test_only_this_package_imports_a_cuda_binding() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {name.split(".")[0] for name in names} & {"cuda", "pycuda", "cupy"} and path.parent != PACKAGE / "cuda":
                wrong.append(f"{path}:{node.lineno}")
    assert not wrong


def test_every_name_exists_in_the_real_binding() -> None:
    """The fake must not make up functions; needs no driver."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings tells which names there are")
    source = (PACKAGE / "cuda" / "cuda_bindings.py").read_text()
    functions = set(re.findall(r'"(cu[A-Z]\w+)"', source)) | set(re.findall(r"_driver\.(cu[A-Z]\w+)", source))
    assert len(functions) > 30
    assert not [name for name in functions if not hasattr(driver, name)]
    assert functions <= {name for name in dir(FakeDriver) if name.startswith("cu")}
    for kind, member in re.findall(r"_driver\.(CU\w+)\.(CU\w+)", source):
        assert hasattr(getattr(driver, kind), member), (kind, member)
    for enum in ENUMS:
        for member in enum:
            assert getattr(getattr(driver, enum.__name__), member.name) == member.value, member
    assert int(driver.CUstream(77)) == 77


# The kernels' images.


def test_a_fatbin_that_does_not_fit_is_compiled_anew(
    device: Device, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launcher, "compiled_kernels", lambda capability: b"compiled for %d.%d" % capability)
    (tmp_path / launcher.FATBIN).write_bytes(b"packaged")
    monkeypatch.setattr(launcher, "files", lambda _package: tmp_path)
    with device.current():
        launcher.load_kernels(device)
        assert driver.images == [b"packaged"]
        driver.failures["cuModuleLoadData"] = CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU
        launcher.load_kernels(device)
        # A driver that loads only what is asked for may tell no sooner.
        driver.failures["cuModuleGetFunction"] = CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU
        launcher.load_kernels(device)
        assert driver.images[1:] == [b"compiled for 8.7", b"packaged", b"compiled for 8.7"]
        (tmp_path / launcher.FATBIN).unlink()
        launcher.load_kernels(device)
    assert driver.images[4:] == [b"compiled for 8.7"]


def test_compiled_kernels_that_the_driver_refuses_tell_what_to_do(
    device: Device, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launcher, "compiled_kernels", lambda _capability: b"compiled by a newer NVRTC")
    monkeypatch.setattr(launcher, "files", lambda _package: tmp_path)
    driver.failures["cuModuleLoadData"] = CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU
    with device.current(), pytest.raises(ModelError, match=r"cannot be loaded: .*newer CUDA version than the driver"):
        launcher.load_kernels(device)
    driver.failures["cuModuleLoadData"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with device.current(), pytest.raises(CudaError, match="out of memory"):
        launcher.load_kernels(device)


def test_what_could_wait_or_allocate_breaks_a_capture(device: Device) -> None:
    with device.current():
        stream = device.stream()
        with pytest.raises(CudaError, match="capture unsupported"), stream.capture():
            device.allocate(8)
        with pytest.raises(CudaError, match="capture unsupported"), stream.capture():
            stream.synchronize()
        stream.synchronize()


class CountingCompiler:
    name = "a compiler 1.0"

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def compile(self, source: Path, architecture: str) -> bytes:
        assert (source.parent / "device.cuh").is_file()
        self.compiled.append(architecture)
        return b"\x7fELF" + architecture.encode()


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CountingCompiler:
    counting = CountingCompiler()
    monkeypatch.setattr(compiler, "find_compiler", lambda: counting)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return counting


def test_kernels_are_compiled_once_for_each_gpu_and_compiler(counting: CountingCompiler) -> None:
    for _ in range(2):
        assert compiler.compiled_kernels((8, 7)) == b"\x7fELFsm_87"
    assert compiler.compiled_kernels((11, 0)) == b"\x7fELFsm_110"
    counting.name = "a compiler 1.1"
    compiler.compiled_kernels((8, 7))
    assert counting.compiled == ["sm_87", "sm_110", "sm_87"]
    assert len(list(cache_folder(compiler.CACHE_KIND).iterdir())) == 3


def test_without_a_compiler_kernels_of_the_same_sources_are_taken_from_the_cache(
    counting: CountingCompiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = compiler.compiled_kernels((8, 7))

    def missing() -> None:
        raise MissingError("there is no compiler")

    monkeypatch.setattr(compiler, "find_compiler", missing)
    assert compiler.compiled_kernels((8, 7)) == image
    with pytest.raises(MissingError, match="there is no compiler"):
        compiler.compiled_kernels((8, 6))
    other = tmp_path / "package"
    other.mkdir()
    for name, content in ((compiler.SOURCE, "// changed"), ("device.cuh", "")):
        (other / name).write_text(content)
    monkeypatch.setattr(compiler, "files", lambda _package: other)
    with pytest.raises(MissingError, match="there is no compiler"):
        compiler.compiled_kernels((8, 7))


def test_damaged_kernels_are_compiled_again(counting: CountingCompiler, caplog: pytest.LogCaptureFixture) -> None:
    compiler.compiled_kernels((8, 7))
    (cached,) = cache_folder(compiler.CACHE_KIND).iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(whole[:-1])
    assert compiler.compiled_kernels((8, 7)) == b"\x7fELFsm_87"
    assert "is damaged and not used" in caplog.text
    assert cached.read_bytes() == whole


@pytest.mark.parametrize("kind", [compiler.Nvrtc, compiler.Nvcc])
def test_the_compilers_compile(kind: type[compiler.Nvrtc | compiler.Nvcc]) -> None:
    """NVRTC has no header but ours."""
    try:
        found = kind()
    except MissingError as error:
        pytest.skip(str(error))
    source = PACKAGE / "kernels" / "kernels.cu"
    for architecture in ("sm_87", "sm_90", "sm_120"):
        image = found.compile(source, architecture)
        assert image.startswith(b"\x7fELF")
        for kernel in launcher.KERNELS:
            assert f".text.{kernel}".encode() in image
    with pytest.raises(ModelError, match=r"cannot compile the CUDA kernels for sm_300: .*newer CUDA toolkit"):
        found.compile(source, "sm_300")


def test_nvrtc_of_jetpack_6_compiles() -> None:
    folders = [PACKAGES / name for name in (f"cuda-bindings=={OLDEST}", "nvidia-cuda-nvrtc-cu12==12.6.85")]
    for folder in folders:
        if not folder.is_dir():
            pytest.skip(f"tests/install_gpu_packages.sh makes {folder}")
    # Once it is loaded, the package looks for no other.
    program = (
        "import ctypes, sys; from pathlib import Path; from recontrast_edge.cuda.compiler import Nvrtc; "
        "ctypes.CDLL(sys.argv[2]); nvrtc = Nvrtc(); "
        "print(nvrtc.name, *(nvrtc.compile(Path(sys.argv[1]), sm)[:4] for sm in ('sm_72', 'sm_87')))"
    )
    (library,) = folders[1].glob("nvidia/cuda_nvrtc/lib/libnvrtc.so.*")
    path = os.pathsep.join([*map(str, folders), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", program, str(PACKAGE / "kernels" / "kernels.cu"), str(library)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.stdout.strip() == r"NVRTC 12.6 b'\x7fELF' b'\x7fELF'", done.stderr


@pytest.mark.parametrize(
    ("binding", "advice"),
    [
        ("12.9.4", "pip install nvidia-cuda-nvrtc-cu12 "),
        ("13.5.0", r"pip install 'nvidia-cuda-nvrtc==13\.\*' "),
        (None, r"pip install cuda-bindings and nvidia-cuda-nvrtc, for CUDA 12 .* nvidia-cuda-nvrtc-cu12 "),
    ],
)
def test_without_a_compiler_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, binding: str | None, advice: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def installed(_name: str) -> str:
        if binding is None:
            raise PackageNotFoundError
        return binding

    monkeypatch.setattr(compiler, "version", installed)

    def missing() -> None:
        raise MissingError("it is missing")

    monkeypatch.setattr(compiler, "Nvrtc", missing)
    monkeypatch.setattr(compiler, "Nvcc", missing)
    with pytest.raises(MissingError, match=advice):
        compiler.compiled_kernels((8, 7))
