"""The kernels compile for every GPU architecture of the package, within their registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from recontrast_edge.kernels import _UNROLL, FATBIN, FOLD_TAPS, SOURCE
from tests.kernels.host import kernel_folder

ROOT = Path(__file__).parent.parent.parent
NVCC = shutil.which("nvcc")
JOBS = 2

# What a thread may hold, so that a multiprocessor of 65,536 registers keeps the blocks that docs/kernels.md counts on.
MAX_REGISTERS = {
    "distance_fp16": 80,  # 3 blocks of 256
    "distance_fp32": 80,
    "fold_map": 64,  # 8 blocks of 128
    "top_score": 64,  # 2 blocks of 512
    "preprocess_packed_fp16": 64,
    "preprocess_packed_fp32": 64,
    "preprocess_nv12_fp16": 64,
    "preprocess_nv12_fp32": 64,
}

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc compiles the kernels")


def default_architectures() -> list[int]:
    """Compute capabilities of the package's fatbin, times ten, as CMakeLists.txt has them."""
    match = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES ([^)]+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert match
    return [int(entry.split("-")[0]) for entry in match[1].split()]


def known_architectures() -> set[int]:
    assert NVCC is not None
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return {int(number) for number in re.findall(r"compute_(\d+)", listed)}


def resource_usage(architecture: int, folder: Path) -> str:
    """What ptxas says of every kernel."""
    assert NVCC is not None
    options = ["-std=c++17", "-cubin", f"-arch=sm_{architecture}", "--resource-usage", "-Werror=all-warnings"]
    output = folder / f"sm_{architecture}.cubin"
    done = subprocess.run(
        [NVCC, *options, "-o", str(output), str(kernel_folder() / SOURCE)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@needs_nvcc
def test_registers_and_memory_on_every_architecture(tmp_path: Path) -> None:
    architectures = sorted(set(default_architectures()) & known_architectures())
    assert len(architectures) >= 6
    with ThreadPoolExecutor(JOBS) as pool:
        reports = list(pool.map(partial(resource_usage, folder=tmp_path), architectures))
    for architecture, report in zip(architectures, reports, strict=True):
        registers = {}
        for entry in report.split("Compiling entry function ")[1:]:
            kernel = entry.split("'")[1]
            where = f"{kernel} on sm_{architecture}: {entry}"
            assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in entry, where
            # All shared memory is the launch plan's.
            assert " bytes smem" not in entry, where
            registers[kernel] = int(re.findall(r"Used (\d+) registers", entry)[0])
            assert registers[kernel] <= MAX_REGISTERS[kernel], where
        assert registers.keys() == MAX_REGISTERS.keys()


def nvdisasm() -> str | None:
    """From its wheel, or a CUDA toolkit."""
    package = find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        for program in Path(folder).glob("*/bin/nvdisasm"):
            return str(program)
    return shutil.which("nvdisasm")


def in_flight(body: str, load: str, uses: str) -> list[int]:
    """Lengths of the runs of loads in a kernel's machine code that no use of what was loaded interrupts."""
    names = re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", body)
    marks = ("L" if re.match(load, name) else "u" if re.match(uses, name) else "" for name in names)
    return sorted(map(len, re.findall("L+", "".join(marks))))


@needs_nvcc
@pytest.mark.skipif(nvdisasm() is None, reason="nvdisasm (nvidia-cuda-nvdisasm) shows the machine code")
@pytest.mark.parametrize("architecture", [75, 87, 90, 120])
def test_loads_are_on_their_way_together(architecture: int, tmp_path: Path) -> None:
    """In the machine code: the compiler may have them wait for each other, and a wait costs hundreds of clocks."""
    resource_usage(architecture, tmp_path)
    program = nvdisasm()
    assert program is not None
    code = subprocess.run(
        [program, "-c", str(tmp_path / f"sm_{architecture}.cubin")], capture_output=True, text=True, check=True
    ).stdout
    bodies = {kernel: code.split(f".text.{kernel}:")[1].split(".section")[0] for kernel in MAX_REGISTERS}
    for kernel in ("distance_fp16", "distance_fp32"):
        features = in_flight(bodies[kernel], r"LDG.*\.128", "FFMA|HADD2")
        # A round of the unrolled loop, and a single one for what remains.
        assert sum(features) >= 2 * (_UNROLL + 1), (kernel, features)
        assert features[-1] >= 2 * _UNROLL - 1, (kernel, features)
        # Three sums of each of a tile's parts, eight parts a round.
        assert in_flight(bodies[kernel], "LDG", "FADD|FFMA|HADD2")[-1] >= 3 * 8 - 3, kernel
    # Distances and their weights.
    assert in_flight(bodies["fold_map"], "LDG", "FFMA")[-1] >= 2 * FOLD_TAPS
    assert in_flight(bodies["top_score"], "LDG", "ISETP")[-1] >= 8


def configure(build: Path, *options: str, path: str | None = None) -> str:
    environment = os.environ | ({"PATH": path} if path is not None else {})
    done = subprocess.run(
        [shutil.which("cmake") or "cmake", "-S", str(ROOT), "-B", str(build), *options],
        capture_output=True,
        text=True,
        env=environment,
    )
    return done.stdout + done.stderr


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake builds the fatbin")


@needs_nvcc
@needs_cmake
def test_cmake_builds_and_installs_one_fatbin(tmp_path: Path) -> None:
    """A user's architectures are kept; one that this nvcc does not know is left out with a message."""
    output = configure(tmp_path / "build", "-DCMAKE_CUDA_ARCHITECTURES=90-real;20-real;89-virtual")
    assert re.search(r"does not know.* 20-real", output), output
    for command in (["--build", str(tmp_path / "build")], ["--install", str(tmp_path / "build"), "--prefix", "out"]):
        subprocess.run(["cmake", *command], cwd=tmp_path, check=True, capture_output=True)
    fatbin = (tmp_path / "out" / "recontrast_edge" / "kernels" / FATBIN).read_bytes()
    assert fatbin[:4] == bytes.fromhex("50ed55ba")


@needs_cmake
def test_without_nvcc_the_build_goes_on_without_kernels(tmp_path: Path) -> None:
    output = configure(tmp_path / "build", "-DRECONTRAST_CUDA=OFF")
    assert "Build files have been written" in output
    subprocess.run(["cmake", "--build", str(tmp_path / "build")], check=True, capture_output=True)
    subprocess.run(
        ["cmake", "--install", str(tmp_path / "build"), "--prefix", str(tmp_path / "out")],
        check=True,
        capture_output=True,
    )
    assert not list((tmp_path / "out").rglob(FATBIN))
    output = configure(
        tmp_path / "missing", "-DRECONTRAST_CUDA=ON", "-DCMAKE_CUDA_COMPILER=/nowhere/nvcc", path="/usr/bin:/bin"
    )
    assert "/nowhere/nvcc" in output
    assert "Build files have been written" not in output
