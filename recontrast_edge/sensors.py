"""Clocks, temperature and watts of the machine, where they can be read.

    with Sensors() as sensors: print(sensors.read())  # {"gpu_sm_clock_mhz": 1980, "gpu_temperature_c": 41, ...}

NVIDIA GPUs tell through NVML (``pip install nvidia-ml-py``), Jetsons through jetson-stats and its service. What is not
there is left out; nothing here raises.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

Reading = dict[str, float | str]

_JETSON_PREFIXES = ("CPU", "GPU", "EMC", "RAM", "Temp", "Power", "nvp model", "jetson_clocks")
"""Of the names that jetson-stats gives, power in mW; the others are of no use here (uptime, fan, disks)."""


class Sensors:
    """The sensors of CUDA's first GPU, which engines run on, and a Jetson's."""

    def __init__(self) -> None:
        self._nvml = _open_nvml()
        self._jetson = _open_jetson()

    def read(self) -> Reading:
        """All values now; the unit is the end of each name of NVML's, jetson-stats has its own."""
        return {
            **(_read_nvml(*self._nvml) if self._nvml else {}),
            **(_read_jetson(self._jetson) if self._jetson else {}),
        }

    @contextmanager
    def sampled(self, interval_s: float = 1.0) -> Iterator[list[Reading]]:
        """Readings taken every ``interval_s`` in a thread of their own; complete after the block."""
        readings: list[Reading] = []
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(interval_s):
                readings.append(self.read())

        thread = threading.Thread(target=sample, name="sensors", daemon=True)
        if self._nvml or self._jetson:
            thread.start()
        try:
            yield readings
        finally:
            ended.set()
            if thread.ident is not None:
                thread.join()

    def close(self) -> None:
        """Release the libraries; may be called again."""
        if self._nvml:
            library, _ = self._nvml
            self._nvml = None
            _tried(library.nvmlShutdown)
        if self._jetson:
            jetson, self._jetson = self._jetson, None
            _tried(jetson.close)

    def __enter__(self) -> Sensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def summarise(readings: list[Reading]) -> dict[str, Any]:
    """Lowest, mean and highest of each number, over all readings; the last of each text."""
    names = dict.fromkeys(name for reading in readings for name in reading)
    summary: dict[str, Any] = {}
    for name in names:
        values = [reading[name] for reading in readings if name in reading]
        numbers = [value for value in values if not isinstance(value, str)]
        if numbers:
            summary[name] = {"min": min(numbers), "mean": round(sum(numbers) / len(numbers), 1), "max": max(numbers)}
        else:
            summary[name] = values[-1]
    return summary


def _tried(read: Callable[[], Any]) -> Any:
    try:
        return read()
    # Two libraries with errors of their own; a sensor that does not answer is a sensor that is not there.
    except Exception:
        return None


def _open_nvml() -> tuple[Any, Any] | None:
    def open_it() -> tuple[Any, Any]:
        import pynvml

        pynvml.nvmlInit()
        # CUDA numbers the fastest first, and only those that it was left; NVML numbers all by bus.
        bus_id = _tried(_first_bus_id)
        gpu = bus_id and _tried(lambda: pynvml.nvmlDeviceGetHandleByPciBusId(bus_id))
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0) if gpu is None else gpu

    opened: tuple[Any, Any] | None = _tried(open_it)
    return opened


def _first_bus_id() -> bytes | None:
    """Where on the bus CUDA's first GPU is, e.g. ``0000:65:00.0``; asked without a context, which would take memory."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, bus_id = ctypes.c_int(), ctypes.create_string_buffer(32)
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetPCIBusId(bus_id, len(bus_id), device)
    )
    return None if failed else bus_id.value


def _read_nvml(nvml: Any, gpu: Any) -> Reading:
    reads: dict[str, Callable[[], float]] = {
        "gpu_sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "gpu_memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
        "gpu_temperature_c": lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        "gpu_power_w": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
        "gpu_power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
        "gpu_memory_used_mib": lambda: round(nvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**20, 1),
        "gpu_throttle_reasons_bits": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu),
    }
    values = {name: _tried(read) for name, read in reads.items()}
    return {name: value for name, value in values.items() if value is not None}


def _open_jetson() -> Any:
    def open_it() -> Any:
        from jtop import jtop

        jetson = jtop()
        jetson.start()
        return jetson

    return _tried(open_it)


def _read_jetson(jetson: Any) -> Reading:
    stats = _tried(lambda: dict(jetson.stats)) or {}
    reading: Reading = {
        f"jetson {name}": value if isinstance(value, (int, float)) else str(value)
        for name, value in stats.items()
        if str(name).startswith(_JETSON_PREFIXES)
    }
    # In kHz, and not among the others.
    clocks = {
        "GPU": lambda: next(iter(jetson.gpu.values()))["freq"]["cur"],
        "EMC": lambda: jetson.memory["EMC"]["cur"],
    }
    for name, read in clocks.items():
        clock_khz = _tried(read)
        if clock_khz:
            reading[f"jetson {name} clock_mhz"] = clock_khz / 1e3
    return reading
