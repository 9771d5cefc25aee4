"""The benchmark: what it counts, what it refuses to time, what its report and picture hold.

python -m pytest tests/edge/test_bench.py
"""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from recontrast_edge import bench as bench_module
from recontrast_edge.bench import (
    Latencies,
    Settings,
    Supply,
    bench,
    check,
    map_error,
    measure,
    parse_batches,
    percentiles,
    ratio,
    verdict_latency,
)
from recontrast_edge.bench_plot import SIZE_WH, _step, draw
from recontrast_edge.cli import app
from recontrast_edge.cli import commands as _commands  # noqa: F401 - registers on import
from recontrast_edge.engines import Engine, Inference
from recontrast_edge.errors import GateError, InputError, SourceError, UsageError
from recontrast_edge.frame import EndOfStream, Frame
from recontrast_edge.sensors import Sensors, summarise
from recontrast_edge.sources import open_source

LINE = "synthetic://brushed-metal?fps=0&size=32x32"


class Slow:
    """An engine that takes its time, and the notes of who was asked when."""

    def __init__(self, engine: Engine, delays_s: list[float], order: list[str], name: str) -> None:
        self.spec, self.path, self.sha256, self.name = engine.spec, engine.path, engine.sha256, name
        self._engine, self._delays_s, self._order = engine, iter(delays_s), order

    def infer(self, images, *, maps_above=None) -> Inference:
        self._order.append(self.name)
        time.sleep(next(self._delays_s, 0.0))
        return self._engine.infer(images)


def supply() -> Supply:
    with closing(open_source(LINE)) as source:
        return Supply(source)


def test_percentiles_are_values_that_occurred_and_only_as_many_as_the_frames_allow() -> None:
    values = [float(value) for value in range(1, 1001)]
    assert percentiles(values) == {"p50": 501, "p90": 901, "p99": 991, "p99.9": 1000, "max": 1000, "mean": 500.5}
    found = percentiles(values[:99])
    assert (found["p90"], found["p99"], found["p99.9"], found["max"]) == (90.0, None, None, 99.0)


def test_stages_that_only_some_frames_have_keep_their_places() -> None:
    found = Latencies()
    found.add({"infer": 1.0, "total": 2.0}, 0.0, "PASS")
    found.add({"infer": 1.0, "read_map": 3.0, "decide": 1.0, "total": 5.0}, 0.1, "REJECT")
    assert found.stages_ms["read_map"] == [0.0, 3.0]
    assert list(found.summary()) == ["infer", "read_map", "decide", "total"]
    assert found.verdicts == {"PASS": 1, "REJECT": 1}


def test_a_frame_that_waits_for_a_slow_one_counts_its_waiting(engine: Engine) -> None:
    """Else a stall of 200 ms would show as one late frame, and not as the several that it makes late."""
    slow = Slow(engine, [0.0] * 6 + [0.2], [], "slow")
    (found,) = measure([slow], [0.5], supply(), Settings(frames=10, warmup=5, line_rate_hz=50.0))  # type: ignore[list-item]
    total_ms = found.stages_ms["total"]
    assert total_ms[1] >= 200.0
    assert total_ms[2] >= 175.0
    assert total_ms[5] >= 115.0
    np.testing.assert_allclose(np.diff(found.at_s), 0.02, atol=1e-6)


def test_stages_add_up_to_the_total(engine: Engine) -> None:
    frame = next(supply().frames(None))
    latency_ms, verdict = verdict_latency(engine, frame, 0.5)
    total_ms = latency_ms.pop("total")
    assert list(latency_ms) == ["wait", "preprocess", "infer", "decide"]
    assert sum(latency_ms.values()) == pytest.approx(total_ms, abs=2.0)
    assert verdict == "REJECT"


def test_two_engines_take_turns_and_change_who_begins(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "TURN_FRAMES", 3)
    order: list[str] = []
    pair = [Slow(engine, [], order, name) for name in "AB"]
    found = measure(pair, [0.5, 0.5], supply(), Settings(frames=7, warmup=1))  # type: ignore[arg-type]
    assert "".join(order) == "AB" + "AAABBB" + "BBBAAA" + "AB"
    assert [len(latencies.at_s) for latencies in found] == [7, 7]
    assert [len(latencies.turns_ms) for latencies in found] == [3, 3]


def test_the_ratio_is_of_neighbouring_turns() -> None:
    found = ratio([[1.0, 2.0, 4.0], [2.0, 4.0, 8.0]])
    assert (found["median"], found["min"], found["max"], found["turns"]) == (2.0, 2.0, 2.0, 3)


class Camera:
    """A live source of a few frames; ``None`` stands for a timeout."""

    uri = "camera"
    live = True

    def __init__(self, count: int) -> None:
        self._left: list[Frame | None] = [
            Frame(index, self.uri, np.full((32, 32), index, np.uint8), time.monotonic()) for index in range(count)
        ]

    def read(self, timeout_s: float) -> Frame | None:
        if not self._left:
            raise EndOfStream
        return self._left.pop(0)

    def close(self) -> None:
        pass


def test_a_cameras_frames_are_used_as_they_come(engine: Engine) -> None:
    with pytest.raises(SourceError, match=r"camera: ended after 5 of 8 frames"):
        measure([engine], [0.5], Supply(Camera(4 + 1 + 5)), Settings(frames=8, warmup=1))
    (found,) = measure([engine], [0.5], Supply(Camera(4 + 1 + 8)), Settings(frames=8, warmup=1))
    assert len(found.at_s) == 8


def test_a_camera_that_stops_delivering_ends_it() -> None:
    camera = Camera(2)
    camera._left.append(None)
    with pytest.raises(SourceError, match="no frame came within"):
        Supply(camera)
    with pytest.raises(InputError, match="expected frames to measure with"):
        Supply(Camera(0))


# Correctness comes first.


class Wrong:
    """An engine whose results are bent."""

    def __init__(self, engine: Engine, bend) -> None:
        self.spec, self.path, self.sha256, self.name = engine.spec, engine.path, engine.sha256, "wrong"
        self._engine, self._bend = engine, bend

    def infer(self, images, *, maps_above=None) -> Inference:
        found = self._engine.infer(images)
        self._bend(found.maps, found.scores)
        return found


def not_finite(maps: np.ndarray, scores: np.ndarray) -> None:
    maps[0, 3, 3] = math.nan


def stuck(maps: np.ndarray, scores: np.ndarray) -> None:
    maps[:], scores[:] = 0.25, 0.25


def by_batch(maps: np.ndarray, scores: np.ndarray) -> None:
    maps[1:] *= 1.2


def shifted(maps: np.ndarray, scores: np.ndarray) -> None:
    maps += 0.2


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (not_finite, "NaN or infinity"),
        (stuck, "the same map for every image"),
        (by_batch, "alone and together"),
        (shifted, "against reference"),
    ],
)
def test_a_wrong_engine_is_not_measured(engine: Engine, bend, message: str) -> None:
    assert check(engine, supply().images)["against_reference"] < 1e-6
    with pytest.raises(GateError, match=message):
        check(Wrong(engine, bend), supply().images)  # type: ignore[arg-type]


def test_map_error_is_a_share_of_the_range() -> None:
    wanted = np.stack([np.linspace(0, 2, 16), np.linspace(0, 10, 16)]).reshape(2, 4, 4).astype(np.float32)
    found = wanted.copy()
    found[0, 1, 1] += 0.5
    found[1, 2, 2] -= 1.0
    assert map_error(found, wanted) == pytest.approx(0.25)


# Report, command and picture.


def test_the_report_says_what_was_measured_on_what(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "THROUGHPUT_S", 0.05)
    report, (latencies,) = bench(
        [str(tiny_model)], LINE, Settings(frames=20, warmup=2, batches=(1, 2), line_rate_hz=500)
    )
    json.dumps(report, allow_nan=False)
    assert {"os", "cpu", "cores"} <= report["machine"].keys()
    assert "exposure" in report["excluded"]
    assert report["settings"]["warmup"] == 2
    (entry,) = report["engines"]
    assert entry["correctness"]["against_reference"] < 1e-6
    assert entry["deadline"]["of"] == len(latencies.at_s) == 20
    assert [row["batch"] for row in entry["throughput"]] == [1, 2]
    assert all(row["images_per_s"] > 0 for row in entry["throughput"])
    # The kernel counts both per CPU and adds them up now and then.
    assert report["memory"]["peak_mib"] + 16 >= report["memory"]["resident_mib"] > 10


def test_the_command_writes_report_and_picture(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["bench", "--compare", str(tiny_model), str(tiny_model), "--source", LINE, "--batch", ""]
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    result = CliRunner().invoke(app, [*arguments, "--frames", "40", "--warmup", "1", *files])
    assert result.exit_code == 0, result.output
    assert "second / first, median latency of 2 turns" in result.output
    assert "maps differ by 0 of their range" in result.output
    assert "not included: exposure" in result.output
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["format"] == "recontrast-edge.bench"
    assert report["comparison"]["map_error"] == 0.0
    picture = cv2.imread(str(tmp_path / "b.png"))
    assert picture.shape == (SIZE_WH[1], SIZE_WH[0], 3)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["--engine", "demo", "--compare", "a.onnx", "b.onnx"], 2),
        (["--engine", "TINY", "--batch", "0"], 2),
        (["--engine", "TINY", "--batch", "1,x"], 2),
        (["--engine", "TINY", "--plot", "picture.jpg"], 2),
        (["--engine", "missing.onnx"], 4),
        (["--engine", "TINY", "--source", "/nowhere"], 3),
        (["--engine", "TINY", "--json", "/proc/nowhere/b.json"], 7),
    ],
)
def test_bad_input_ends_with_its_code(arguments: list[str], code: int, tiny_model: Path) -> None:
    filled = [str(tiny_model) if argument == "TINY" else argument for argument in arguments]
    result = CliRunner().invoke(app, ["bench", *filled])
    found = getattr(result.exception, "exit_code", result.exit_code)
    assert found == code, result.output


def test_a_failed_measurement_leaves_no_files(tiny_model: Path, tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    result = CliRunner().invoke(app, ["bench", "--engine", str(tiny_model), "--source", "/nowhere", *files])
    assert isinstance(result.exception, InputError)
    assert list(tmp_path.iterdir()) == []


def test_batches() -> None:
    assert parse_batches("1, 2,2,16") == (1, 2, 16)
    assert parse_batches("") == ()
    for text in ("0", "-1", "1.5", "257", "a"):
        with pytest.raises(UsageError, match="--batch"):
            parse_batches(text)


def test_the_picture_shows_each_frame_and_the_deadline() -> None:
    found = Latencies()
    for index in range(50):
        found.add({"infer": 5.0, "total": 40.0 if index == 25 else 6.0}, index / 30, "PASS")
    plain = draw({"one": found}, title="a title")
    assert (draw({"one": found}, title="a title", deadline_ms=20.0) != plain).any()
    dots = (plain[130:560, 100:1130] == (180, 110, 30)).all(axis=2)
    rows = np.flatnonzero(dots.any(axis=1))
    assert rows.min() < 60, "the slow frame is near the top"
    assert rows.max() > 330


@pytest.mark.parametrize(("top", "step"), [(50.0, 10.0), (540.0, 100.0), (1.0, 0.2), (3.0, 0.5), (0.021, 0.005)])
def test_scales_have_round_steps(top: float, step: float) -> None:
    assert _step(top) == pytest.approx(step)


# Sensors.


def test_sensors_read_what_answers_and_leave_out_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = ModuleType("pynvml")

    def refuse(*_arguments: object) -> None:
        raise RuntimeError("not supported")

    closed: list[str] = []
    vars(nvml).update(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: closed.append("nvml"),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetClockInfo=lambda _gpu, kind: 1000 * kind,
        nvmlDeviceGetTemperature=lambda _gpu, _kind: 41,
        nvmlDeviceGetPowerUsage=lambda _gpu: 65_432,
        nvmlDeviceGetEnforcedPowerLimit=refuse,
        nvmlDeviceGetMemoryInfo=lambda _gpu: SimpleNamespace(used=3 << 20),
        nvmlDeviceGetCurrentClocksThrottleReasons=refuse,
    )
    jtop = ModuleType("jtop")
    jtop.jtop = lambda: SimpleNamespace(  # type: ignore[attr-defined]
        start=lambda: None,
        close=lambda: closed.append("jtop"),
        stats={"GPU": 33, "Temp gpu": 45.5, "nvp model": "MAXN", "uptime": 12},
        gpu={"gpu": {"freq": {"cur": 1_300_500, "max": 1_300_500}}},
        memory={"RAM": {"used": 1}},
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setitem(sys.modules, "jtop", jtop)
    with Sensors() as sensors:
        assert sensors.read() == {
            "gpu_sm_clock_mhz": 1000,
            "gpu_memory_clock_mhz": 2000,
            "gpu_temperature_c": 41,
            "gpu_power_w": 65.432,
            "gpu_memory_used_mib": 3.0,
            "jetson GPU": 33,
            "jetson Temp gpu": 45.5,
            "jetson nvp model": "MAXN",
            "jetson GPU clock_mhz": 1300.5,
        }
        with sensors.sampled(interval_s=0.01) as readings:
            time.sleep(0.1)
        assert len(readings) >= 2
    sensors.close()
    assert closed == ["nvml", "jtop"]


@pytest.mark.parametrize(("failing", "temperature_c"), [(None, 70), ("cuInit", 40), ("nvml", 40)])
def test_the_sensors_are_those_of_the_gpu_that_engines_run_on(
    monkeypatch: pytest.MonkeyPatch, failing: str | None, temperature_c: int
) -> None:
    """CUDA may number GPUs in another order than NVML."""

    def place(bus_id: Any, size: int, device: Any) -> int:
        assert device.value == 7
        bus_id.value = b"0000:65:00.0"
        assert size > len(bus_id.value)
        return 0

    def first(device: Any, ordinal: int) -> int:
        assert ordinal == 0
        device._obj.value = 7
        return 0

    driver = SimpleNamespace(
        cuInit=lambda _flags: 100 if failing == "cuInit" else 0, cuDeviceGet=first, cuDeviceGetPCIBusId=place
    )
    nvml = ModuleType("pynvml")
    handles: dict[Any, int] = {0: 40} if failing == "nvml" else {0: 40, b"0000:65:00.0": 70}
    vars(nvml).update(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByPciBusId=lambda bus_id: handles[bus_id] and bus_id,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetTemperature=lambda gpu, _kind: handles[gpu],
    )
    monkeypatch.setattr("recontrast_edge.sensors.ctypes.CDLL", {"libcuda.so.1": driver}.__getitem__)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setitem(sys.modules, "jtop", None)
    with Sensors() as sensors:
        assert sensors.read() == {"gpu_temperature_c": temperature_c}


def test_without_sensors_there_is_nothing_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "jtop", None)
    with Sensors() as sensors, sensors.sampled(interval_s=0.001) as readings:
        time.sleep(0.01)
    assert readings == []


def test_readings_are_summarised() -> None:
    found = summarise([{"w": 10.0, "mode": "MAXN"}, {"w": 20.0, "mode": "15W"}])
    assert found == {"w": {"min": 10.0, "mean": 15.0, "max": 20.0}, "mode": "15W"}
