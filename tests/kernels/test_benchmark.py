"""The kernel benchmark from end to end on the kernels' own source, with a CUDA driver that is a fake.

python -m pytest tests/kernels/test_benchmark.py

Its times mean nothing here; that every way is right, what is reported, and that a failure costs only itself does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from recontrast_edge.kernels import launcher
from tests.edge.fakes_cuda import CUresult, FakeDriver, install
from tests.kernels.host import Host
from tests.programs import load_program

torch = pytest.importorskip("torch")


@pytest.fixture
def driver(host: Host, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver(host)
    # The features are PyTorch's.
    fake.is_alone = False
    monkeypatch.setattr("recontrast_edge.cuda.find_spec", lambda _name: True)
    install(fake, monkeypatch)
    monkeypatch.setattr(launcher, "compiled_kernels", lambda _capability: b"a cubin")
    for name in ("init", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda run, dynamic: run)
    return fake


@pytest.fixture
def benchmark(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Any:
    program = load_program("kernel")
    small = {
        "DEVICE": "cpu",
        "SIZE_WH": (32, 32),
        "LEVELS_CHW": {"small": [(8, 8, 8), (16, 4, 4), (24, 2, 2)]},
        "FRAMES_WH": ((45, 37),),
        "REPEATS": 1,
        "GRAPH_LAUNCHES": 1,
        "HOST_REPEATS": 1,
        "WARM_UP_S": 0.0,
        "l2_bytes": lambda _torch: 0,
        "copy_bandwidth": lambda _torch: 1e9,
        "time_torch": lambda *_: {"median_us": 30.0, "min_us": 20.0},
    }
    for name, value in small.items():
        monkeypatch.setattr(program, name, value)
    return program


def run(program: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    path = folder / "kernel.json"
    monkeypatch.setattr(sys, "argv", ["kernel.py", "--json", str(path), "--batches", "1", "--dtypes", "float16"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    return ended.value.code, json.loads(path.read_text())


def test_every_way_is_measured(
    benchmark: Any, driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, report = run(benchmark, tmp_path, monkeypatch)
    assert (code, report["failed"]) == (0, [])
    (entry,) = report["results"]
    assert (entry["model"], entry["batch"], entry["dtype"]) == ("small", 1, "float16")
    ours = entry["ways"]["kernels, max"]
    assert ours["map_error"] <= 2e-3
    assert ours["share_of_copy_bandwidth"] > 0
    assert entry["ways"]["kernels, top of a flat map"]["map_error"] <= 1e-6
    for way in ("PyTorch eager, folded", "torch.compile, folded", "paper: PyTorch + SciPy"):
        found = entry["ways"][way]
        assert found["map_error"] <= 1e-2, way
        assert found["kernels_are_faster_by"] == pytest.approx(30 / ours["cold"]["median_us"], abs=0.01)
    (frame,) = report["frame"]
    assert frame["frame_wh"] == [45, 37]
    (preprocess,) = report["preprocess"]
    assert preprocess["error"] <= 2e-3
    assert driver.live == {}


def test_what_fails_costs_only_itself(
    benchmark: Any, driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "BOUNDS", {"float16": -1.0})
    driver.failures["cuGraphInstantiate"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    code, report = run(benchmark, tmp_path, monkeypatch)
    assert code == 1
    assert [failure["what"] for failure in report["failed"]] == [
        "small, batch 1, float16",
        "a frame of (45, 37), small",
    ]
    assert "map error" in report["failed"][0]["why"]
    assert "out of memory" in report["failed"][1]["why"]
    assert len(report["preprocess"]) == 1


def test_without_a_gpu_it_is_skipped(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernel.py"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 77
