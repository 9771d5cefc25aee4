"""The kernels under the address and thread sanitizers, and proof that the latter would notice a missing barrier."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.host import COMPILER, kernel_folder

ROOT = Path(__file__).parent.parent.parent
CASES = ("max", "top", "packed", "nv12")
CASE_OF_FUNCTION = {
    "distance": "max",
    "fold_map": "max",
    "find_bin": "top",
    "top_score": "top",
    "preprocess_packed": "packed",
    "preprocess_nv12": "nv12",
}
ATTEMPTS = 4
"""Whether a missing barrier shows depends on which thread comes first."""


def synchronisations() -> list[tuple[str, int, str]]:
    """File, line and enclosing function of every barrier, and of every fence that orders plain reads and writes."""
    found = []
    for path in sorted(kernel_folder().glob("*.cu")):
        function = ""
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if not line.startswith((" ", "//")) and "void" in line:
                function = re.findall(r"(\w+)\(", line)[-1]
            # fold_map's fences stand between atomics alone, to whose order the sanitizer is blind.
            if "__syncthreads();" in line or ("__threadfence();" in line and function != "fold_map"):
                found.append((path.name, number, function))
    return found


def run_sanitized(library: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    assert COMPILER is not None
    kind = "tsan" if "thread" in library.name else "asan"
    runtime = subprocess.run(
        [COMPILER, f"-print-file-name=lib{kind}.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "train", "export")),
        "PYTHONMALLOC": "malloc",
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
        "ASAN_OPTIONS": "detect_leaks=0",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels.sanitized", str(library), *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_every_barrier_is_found() -> None:
    sources = "".join(path.read_text() for path in kernel_folder().glob("*.cu"))
    fences_of_fold_map = 2
    assert (
        len(synchronisations()) == len(re.findall(r"__syncthreads\(\)|__threadfence\(\)", sources)) - fences_of_fold_map
    )
    assert {function for _, _, function in synchronisations()} == set(CASE_OF_FUNCTION)


@pytest.mark.parametrize("sanitized_library", ["address", "thread"], indirect=True)
def test_clean(sanitized_library: Path) -> None:
    done = run_sanitized(sanitized_library, "none", 0, *CASES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "done\n"


@pytest.mark.parametrize("sanitized_library", ["thread"], indirect=True)
@pytest.mark.parametrize(("file", "line", "function"), synchronisations())
def test_a_missing_barrier_or_fence_is_noticed(sanitized_library: Path, file: str, line: int, function: str) -> None:
    for _ in range(ATTEMPTS):
        done = run_sanitized(sanitized_library, file, line, CASE_OF_FUNCTION[function])
        # A race, or the NaN that unwritten shared memory holds.
        if done.returncode != 0:
            assert "data race" in done.stderr or "AssertionError" in done.stderr, done.stderr
            return
    pytest.fail(f"{file}:{line} can be removed unnoticed")
