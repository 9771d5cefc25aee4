"""The script for a machine with a GPU, run where there is none: it has one try there.

python -m pytest tests/test_gpu_check.py

``nvidia-smi``, ``nvcc``, ``compute-sanitizer`` and the interpreter are fakes that do as they are told; the script's own
pieces of Python run for real.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
BASH = shutil.which("bash")
SHELLCHECK = shutil.which("shellcheck")

pytestmark = pytest.mark.skipif(BASH is None or shutil.which("timeout") is None, reason="needs bash and timeout")

PYTHON = f"""#!/usr/bin/env bash
# Scripts on standard input, zip files and pip are the real interpreter's.
case "$*" in "- "* | - | "-m zipfile "* | "-m pip "*) exec {sys.executable} "$@" ;; esac
echo "$*" >>"$ASKED"
case "$*" in
    *"$FAILS"*) exit 3 ;;
    *"$HANGS"*) sleep 300 ;;
    *"-m pytest"*) printf '%s\\0' "$@" "" >>"$ASKED.pytest" && echo "7 passed in 1.0s" ;;
    *" train "*) all=$* && out=${{all#*--out }} && out=${{out%% *}} && mkdir -p "$out" && touch "$out/model.json"
        echo "Trained for 9.0 s, 99.9 images/s" ;;
    *" synth "*) mkdir -p "$SCRATCH/line.part" ;;
    *" build "*) all=$* && out=${{all#*--out }} && out=${{out%% *}} && touch "$out" && echo "$BUILT" >"$out.json" ;;
esac
"""
NVIDIA_SMI = """#!/usr/bin/env bash
case "$*" in
    *name,driver*) echo "Fake GPU, 580.1, 9.0, 143771 MiB" ;;
    *compute_cap*) echo 9.0 ;;
esac
"""
SANITIZER = """#!/usr/bin/env bash
# Of the binding's asking for functions that the driver has not.
case " $* " in *" memcheck "*" --report-api-errors no "*) ;; *" memcheck "*) exit 99 ;; esac
while [ $# -gt 0 ] && [ "$1" != "$PYTHON" ]; do shift; done
"$@"
"""
CP = """#!/usr/bin/env bash
# As in coreutils 9.2 to 9.4: with -n, what is there already is an error.
there=$(ls "${!#}")
/bin/cp "$@" && { [ "$1" != -n ] || [ -z "$there" ]; }
"""
NVCC = """#!/usr/bin/env bash
exit 1
"""


@pytest.fixture
def check(tmp_path: Path) -> Any:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tmp_path / "asked").touch()

    def tool(name: str, content: str) -> Path:
        path = tools / name
        path.write_text(content)
        path.chmod(0o755)
        return path

    python = tool("python", PYTHON)

    def run(
        *groups: str, gpu: bool = True, fails: str = "no such words", hangs: str = "no such words", **environment: str
    ) -> Any:
        if gpu:
            tool("nvidia-smi", NVIDIA_SMI)
            # One that compiles would leave its work in the package.
            tool("nvcc", NVCC)
            tool("compute-sanitizer", SANITIZER)
        tool("cp", CP)
        variables = {
            "PATH": f"{tools}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "PYTHON": str(python),
            "SCRATCH": str(tmp_path / "scratch"),
            "ASKED": str(tmp_path / "asked"),
            "FAILS": fails,
            "HANGS": hangs,
            "BUILT": '{"parity": {"engine": {}, "engine_proof": null}}',
            "COMMIT": "0123abc",
            "TMPDIR": str(tmp_path),
        }
        assert BASH is not None
        done = subprocess.run(
            [BASH, str(SCRIPT), str(tmp_path / "out"), *groups],
            env=variables | environment,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        return done, {step["step"]: step["status"] for step in summary["steps"]}, summary["machine"]

    return run


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing() -> None:
    assert SHELLCHECK is not None
    scripts = [SCRIPT, ROOT / "tests/install_gpu_packages.sh", ROOT / ".ci/run"]
    done = subprocess.run([SHELLCHECK, *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_all_of_it(check: Any, tmp_path: Path) -> None:
    done, statuses, machine = check()
    assert done.returncode == 1, "the fake nvcc fails"
    assert {name for name, status in statuses.items() if status != "passed"} == {"wheels", "build"}
    assert (statuses["wheels"], statuses["build"]) == ("skipped", "failed")
    assert len(statuses) > 15
    assert machine["commit"] == "0123abc"
    assert machine["gpu, driver, compute capability, memory"] == "Fake GPU, 580.1, 9.0, 143771 MiB"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "results.tar.gz", "summary.json"]
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"machine.json", "training.txt", "demo.int8.plan.json", "resnet18.int8.plan.json"} <= names
    asked = (tmp_path / "asked").read_text()
    assert asked.count(" train ") == 2 + 4, "engines train what is not there, training measures all"
    assert "--calibration" in asked


def test_pytest_understands_what_it_is_asked_for(check: Any, tmp_path: Path) -> None:
    check("kernels")
    calls = {call for call in (tmp_path / "asked.pytest").read_text().split("\0\0") if "\0-k\0" in call}
    assert len(calls) == 1, "memcheck and racecheck choose the same tests"
    arguments = calls.pop().split("\0")
    command = [sys.executable, *arguments[arguments.index("-m") :], "--collect-only"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent.parent)
    assert done.returncode == 0, done.stdout
    # A word of the expression that chooses nothing is a test that was renamed.
    for word in arguments[arguments.index("-k") + 1].split(" or "):
        assert word in done.stdout, word


def test_what_fails_or_hangs_stops_nothing_else(check: Any, tmp_path: Path) -> None:
    done, statuses, _ = check("kernels", fails="test_kernels.py -k", hangs="--batches 32", LIMIT_S="20")
    assert done.returncode == 1
    assert (statuses["kernel-tests"], statuses["kernel-wide"]) == ("passed", "passed")
    assert (statuses["memcheck"], statuses["racecheck"]) == ("failed", "failed")
    assert statuses["kernel-large"] == "timeout"
    assert statuses["kernel-resnet18"] == "not reached"
    assert "-- memcheck: failed" in (tmp_path / "out" / "log.txt").read_text()


def test_a_library_that_refuses_the_gpu_costs_no_more_time(check: Any, tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "asked").write_text("")
        _, statuses, _ = check("engines", BUILT='{"parity": {"engine": null, "note": "not run: no Hopper"}}')
        assert statuses["demo-fp16"] == "failed", "it is tried again each time"
        assert {status for name, status in statuses.items() if name.startswith(("small", "resnet", "wide"))} == {
            "skipped"
        }
        asked = (tmp_path / "asked").read_text()
        assert not {"train", "bench"} & set(asked.split())
    assert "no Hopper" in (tmp_path / "out" / "log.txt").read_text()


def test_without_a_gpu_all_is_skipped(check: Any) -> None:
    _, statuses, machine = check("kernels", "engines", "training", gpu=False)
    skipped = {name for name, status in statuses.items() if status == "skipped"}
    # The fake interpreter knows no GPU: these are its tests and benchmarks, which it is asked for all the same.
    assert {"machine", "build", "memcheck", "demo-fp16", "wide-int8", "engine-tests", "train-wide-bf16"} <= skipped
    assert machine["gpu, driver, compute capability, memory"] is None


def test_wheels_may_come_in_parts(check: Any, tmp_path: Path) -> None:
    wheels, wheel = tmp_path / "wheels", tmp_path / "carried-1.0-py3-none-any.whl"
    wheels.mkdir()
    info = "carried-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("carried.py", "answer = 42\n" + "# padding\n" * 500)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"carried.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    content = wheel.read_bytes()
    site = tmp_path / "scratch" / "site"
    for index, part in enumerate((content[:3000], content[3000:])):
        for old in wheels.iterdir():
            old.unlink()
        (wheels / f"{wheel.name}.{index:02d}").write_bytes(part)
        _, statuses, _ = check("training", WHEELS=str(wheels), LIMIT_S="90")
        assert (site / "carried.py").exists() == (index == 1)
    assert statuses["wheels"] == "passed"


def test_an_unknown_group_is_refused(tmp_path: Path) -> None:
    assert BASH is not None
    done = subprocess.run([BASH, str(SCRIPT), str(tmp_path / "out"), "kernel"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "kernels|engines|training" in done.stderr
    assert not (tmp_path / "out").exists()


def test_no_folder_is_refused() -> None:
    assert BASH is not None
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    done = subprocess.run([BASH, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "usage:" in done.stderr
