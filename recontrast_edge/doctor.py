"""What this machine has and what it lacks: the facts behind ``recontrast-edge doctor``.

    report = examine()  # report.machine, report.libraries, report.capabilities

A broken driver or library can crash or hang the process that touches it, so each one is probed in a child process of
its own (``python -m recontrast_edge.doctor NAME``) with a time limit. Nothing is searched for on the network.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from recontrast_edge.apart import NoAnswerError, answer_of

PROBE_TIMEOUT_S = 60.0
"""A cold import of PyTorch from a slow disk takes half of that."""

Facts = dict[str, Any]
Status = Literal["ready", "missing", "broken"]


@dataclass(frozen=True)
class Library:
    """One library, driver or set of devices.

    Attributes:
        status: ``broken`` where it is installed but cannot be used.
        version: None where it is missing or has none.
        details: what it can do; JSON-able.
        error: why it is broken.
    """

    status: Status
    version: str | None
    details: Facts
    error: str | None = None

    @property
    def ready(self) -> bool:
        return self.status == "ready"


@dataclass(frozen=True)
class Capability:
    """Something that a user wants to do here, and what is in the way: ``to_do`` is empty where it is ready."""

    name: str
    to_do: tuple[str, ...]

    @property
    def ready(self) -> bool:
        return not self.to_do


@dataclass(frozen=True)
class Report:
    """All that was found."""

    machine: Facts
    libraries: dict[str, Library]
    capabilities: tuple[Capability, ...]

    def to_json(self) -> Facts:
        return {
            "machine": self.machine,
            "libraries": {name: asdict(library) for name, library in self.libraries.items()},
            "capabilities": [
                {"name": item.name, "ready": item.ready, "to_do": list(item.to_do)} for item in self.capabilities
            ],
        }


_PUBLISHED = ("os", "cpu", "cores", "memory_gib", "jetson")


def examine() -> Report:
    """Probe everything; takes a few seconds, and never raises for what is wrong with a part of the machine."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        libraries = dict(zip(_PROBES, pool.map(_probe_apart, _PROBES), strict=True))
    machine = machine_facts()
    return Report(machine, libraries, _capabilities(libraries, is_jetson=machine["jetson"] is not None))


def machine_facts() -> Facts:
    """What is known of the machine without touching a library; never raises."""
    return {name: _guarded(fact) for name, fact in _MACHINE.items()}


def published_facts() -> Facts:
    """Those of ``machine_facts`` that may stand beside a measurement: no paths, and nothing that is plugged in."""
    return {name: fact for name, fact in machine_facts().items() if name in _PUBLISHED}


def _guarded(fact: Callable[[], Any]) -> Any:
    try:
        return fact()
    # One unreadable file of the system must not hide all other facts.
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"


# --- the machine -------------------------------------------------------------------------------------------------


def _operating_system() -> str:
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    return f"{release.get('PRETTY_NAME', platform.system())}, kernel {platform.release()}, {platform.machine()}"


def _python() -> str:
    environment = "virtual environment" if sys.prefix != sys.base_prefix else "system installation"
    return f"{platform.python_version()} ({environment} {sys.prefix})"


def _cpu() -> str:
    text = _text("/proc/cpuinfo")
    named = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def _cores() -> Facts:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"usable": usable, "total": os.cpu_count()}


def _memory_gib() -> Facts:
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE))
    return {
        "total": round(int(fields.get("MemTotal", 0)) / 2**20, 1),
        "available": round(int(fields.get("MemAvailable", 0)) / 2**20, 1),
    }


def _jetson() -> Facts | None:
    """Board, L4T release and JetPack of a Jetson; None elsewhere."""
    release = re.search(r"# R(\d+).*REVISION: ([\d.]+)", _text("/etc/nv_tegra_release"))
    model = _text("/proc/device-tree/model").rstrip("\0\n")
    if release is None and "Jetson" not in model:
        return None
    jetpack = None
    if shutil.which("dpkg-query"):
        jetpack = _output(["dpkg-query", "-W", "-f", "${Version}", "nvidia-jetpack"]).strip() or None
    return {"board": model or None, "l4t": f"{release[1]}.{release[2]}" if release else None, "jetpack": jetpack}


def _cuda_toolkit() -> str | None:
    """Version and place of ``nvcc``; None without it."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return None
    release = re.search(r"release ([\d.]+)", _output([nvcc, "--version"]))
    return f"{release[1] if release else 'unknown version'} ({nvcc})"


def _v4l2_devices() -> Facts:
    """Video devices of the kernel, by name; the reason in place of the name where one may not be opened."""
    devices = {}
    for device in sorted(Path("/dev").glob("video*")):
        name = _text(f"/sys/class/video4linux/{device.name}/name").strip() or "unnamed"
        allowed = os.access(device, os.R_OK | os.W_OK)
        devices[str(device)] = name if allowed else f"{name} (no permission: add the user to the group `video`)"
    return devices


def _gentl_producers() -> list[str]:
    """GenTL producers (.cti) that the environment names."""
    folders = os.environ.get("GENICAM_GENTL64_PATH", "").split(os.pathsep)
    return sorted(str(file) for folder in folders if folder for file in Path(folder).glob("*.cti"))


_MACHINE: dict[str, Callable[[], Any]] = {
    "os": _operating_system,
    "python": _python,
    "cpu": _cpu,
    "cores": _cores,
    "memory_gib": _memory_gib,
    "jetson": _jetson,
    "cuda_toolkit": _cuda_toolkit,
    "v4l2_devices": _v4l2_devices,
    "gentl_producers": _gentl_producers,
}


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False).stdout


# --- libraries, each in a child process --------------------------------------------------------------------------


def _onnxruntime(onnxruntime: Any) -> Facts:
    return {"providers": onnxruntime.get_available_providers()}


def _opencv(cv2: Any) -> Facts:
    information = cv2.getBuildInformation()
    found = {
        name: re.search(rf"^\s+{pattern}:\s+(\S+)", information, re.MULTILINE | re.IGNORECASE)
        for name, pattern in (("ffmpeg", "FFMPEG"), ("v4l2", "v4l/v4l2"), ("gstreamer", "GStreamer"))
    }
    return {name: match is not None and match[1] == "YES" for name, match in found.items()}


def _pyav(av: Any) -> Facts:
    def there(names: tuple[str, ...], mode: str) -> list[str]:
        usable = []
        for name in names:
            try:
                av.Codec(name, mode)
            except ValueError:  # UnknownCodecError
                continue
            usable.append(name)
        return usable

    encoders = ("libx264", "libopenh264", "h264_nvenc", "h264_v4l2m2m", "libx265", "hevc_nvenc", "mpeg4", "mjpeg")
    return {"decoders": there(("h264", "hevc", "mjpeg", "mpeg4"), "r"), "encoders": there(encoders, "w")}


def _torch(torch: Any) -> Facts:
    cuda = torch.cuda.is_available()
    return {
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() * cuda)],
    }


def _openvino(openvino: Any) -> Facts:
    return {"devices": openvino.Core().available_devices}


def _aravis(gi: Any) -> Facts:
    gi.require_version("Aravis", "0.8")
    aravis = import_module("gi.repository.Aravis")
    return {"version": f"{aravis.get_major_version()}.{aravis.get_minor_version()}.{aravis.get_micro_version()}"}


def _nvidia_driver(_: None) -> Facts:
    """The CUDA driver, asked through its C library, which is the same on desktops and Jetsons."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise ModuleNotFoundError("libcuda.so.1") from None
    if status := driver.cuInit(0):
        raise RuntimeError(f"cuInit returned {status}: no usable GPU, or the kernel module does not fit the driver")
    number = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
    driver.cuDeviceGetCount(ctypes.byref(number))
    gpus = []
    for index in range(number.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name, size = ctypes.create_string_buffer(100), ctypes.c_size_t()
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        gpus.append(
            {
                "name": name.value.decode(errors="replace"),
                "compute_capability": f"{major.value}.{minor.value}",
                "memory_gib": round(size.value / 2**30, 1),
            }
        )
    release = None
    if shutil.which("nvidia-smi"):
        listed = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split()
        release = listed[0] if listed else None
    return {"version": release, "cuda": cuda, "gpus": gpus}


@dataclass(frozen=True)
class _Probe:
    """How a library is found: the module to import, its distributions (for the version), and what to ask the module."""

    module: str | None
    distributions: tuple[str, ...] = ()
    ask: Callable[[Any], Facts] | None = None


_PROBES: dict[str, _Probe] = {
    "nvidia_driver": _Probe(None, ask=_nvidia_driver),
    "torch": _Probe("torch", ("torch",), _torch),
    "tensorrt": _Probe("tensorrt", ("tensorrt",)),
    "tensorrt_rtx": _Probe("tensorrt_rtx", ("tensorrt-rtx", "tensorrt_rtx")),
    "cuda_bindings": _Probe("cuda.bindings.driver", ("cuda-bindings",)),
    "pycuda": _Probe("pycuda.driver", ("pycuda",)),
    "onnxruntime": _Probe("onnxruntime", ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"), _onnxruntime),
    "openvino": _Probe("openvino", ("openvino",), _openvino),
    "opencv": _Probe("cv2", ("opencv-python-headless", "opencv-python", "opencv-contrib-python"), _opencv),
    "pyav": _Probe("av", ("av",), _pyav),
    "onnx": _Probe("onnx", ("onnx",)),
    "onnxsim": _Probe("onnxsim", ("onnxsim",)),
    "safetensors": _Probe("safetensors", ("safetensors",)),
    "matplotlib": _Probe("matplotlib", ("matplotlib",)),
    "pypylon": _Probe("pypylon.pylon", ("pypylon",)),
    "harvesters": _Probe("harvesters.core", ("harvesters",)),
    "aravis": _Probe("gi", (), _aravis),
}


def _probe(name: str) -> Library:
    """Import a library and ask it; in the child process."""
    probe = _PROBES[name]
    module, version = None, None
    details: Facts = {}
    try:
        if probe.module is not None:
            module = import_module(probe.module)
            version = _version(probe.distributions) or getattr(module, "__version__", None)
        if probe.ask is not None:
            details = probe.ask(module)
            version = details.pop("version", version)
        return Library("ready", version, details)
    except ModuleNotFoundError as error:
        # Anything but the library itself or its package is a dependency that it lacks.
        expected = probe.module is None or f"{probe.module}.".startswith(f"{error.name}.")
        return Library("missing" if expected else "broken", None, {}, None if expected else _line(error))
    # Whatever a broken library raises is the answer.
    except BaseException as error:
        # gi raises ValueError where the namespace is not installed.
        if name == "aravis" and isinstance(error, ValueError):
            return Library("missing", None, {})
        return Library("broken", _version(probe.distributions), {}, _line(error))


def _version(distributions: tuple[str, ...]) -> str | None:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def _probe_apart(name: str, timeout_s: float = PROBE_TIMEOUT_S) -> Library:
    """Probe in a child process that sees the same modules as this one."""
    probe = _PROBES[name]
    if probe.module is not None and find_spec(probe.module.split(".")[0]) is None:
        return Library("missing", None, {})
    try:
        return Library(**answer_of(__name__, name, timeout_s=timeout_s))
    except (NoAnswerError, TypeError) as error:
        return Library("broken", _version(probe.distributions), {}, str(error))


# --- what can be done here ---------------------------------------------------------------------------------------


def _extra(name: str) -> str:
    return f'pip install "recontrast-edge[{name}]"'


def _capabilities(libraries: dict[str, Library], *, is_jetson: bool) -> tuple[Capability, ...]:
    def needs(*wanted: tuple[str, str]) -> tuple[str, ...]:
        """What to do for each library that is not ready, once each; a broken one is named with its error."""
        lines = []
        for name, advice in wanted:
            library = libraries[name]
            if library.status == "broken":
                lines.append(f"{name} is installed but broken ({library.error}): reinstall it, {advice}")
            elif library.status == "missing":
                lines.append(advice)
        return tuple(dict.fromkeys(lines))

    runtime = "pip install --force-reinstall recontrast-edge"
    driver = libraries["nvidia_driver"]
    no_gpu: tuple[str, ...] = ()
    if not (driver.ready and driver.details.get("gpus")):
        why = f" ({driver.error})" if driver.error else ""
        no_gpu = (f"an NVIDIA GPU with its driver{why}; in a container, start it with --gpus all",)
    flavours = ("tensorrt", "tensorrt_rtx")
    no_tensorrt: tuple[str, ...] = ()
    if not any(libraries[name].ready for name in flavours):
        broken = "".join(f"{name} is broken: {libraries[name].error}; " for name in flavours if libraries[name].error)
        if is_jetson:
            advice = "sudo apt install nvidia-jetpack, and make the virtual environment with --system-site-packages"
        else:
            advice = f"{_extra('tensorrt')}, or for RTX desktop GPUs {_extra('tensorrt-rtx')}"
        no_tensorrt = (broken + advice,)
    no_binding: tuple[str, ...] = ()
    if not libraries["cuda_bindings"].ready and not libraries["pycuda"].ready:
        no_binding = (f"{_extra('gpu')}, or for PyCUDA {_extra('pycuda')}",)
    no_h264: tuple[str, ...] = ()
    pyav = libraries["pyav"]
    if pyav.ready and not {"libx264", "libopenh264"} & set(pyav.details["encoders"]):
        no_h264 = (
            "pip install --force-reinstall av, whose wheels bring an H.264 encoder; MPEG-4 is written until then",
        )
    no_cuda_torch: tuple[str, ...] = ()
    if libraries["torch"].ready and not libraries["torch"].details["gpus"]:
        no_cuda_torch = ("a build of torch with CUDA, from https://pytorch.org/get-started",)

    train = needs(("torch", _extra("train")), ("safetensors", _extra("train")), ("matplotlib", _extra("train")))
    export = needs(
        ("torch", _extra("export")),
        ("safetensors", _extra("export")),
        ("onnx", _extra("export")),
        ("onnxsim", _extra("export")),
    )
    aravis = "sudo apt install gir1.2-aravis-0.8 python3-gi, and a virtual environment with --system-site-packages"
    cameras = _extra("cameras")
    return (
        Capability("run on the CPU", needs(("onnxruntime", runtime), ("opencv", runtime))),
        Capability("read and write video files", needs(("pyav", runtime)) + no_h264),
        Capability("train", train),
        Capability("train on the GPU", train + no_gpu + (no_cuda_torch if not no_gpu else ())),
        Capability("export to ONNX", export),
        # TensorRT-RTX builds without a GPU, so that advice alone is enough where no flavour is there.
        Capability("build TensorRT engines", () if libraries["tensorrt_rtx"].ready else no_tensorrt or no_gpu),
        Capability("run TensorRT engines", no_tensorrt + no_binding + no_gpu),
        Capability("network streams (RTSP)", needs(("pyav", runtime))),
        Capability("USB cameras (V4L2)", needs(("opencv", runtime)) + _no_v4l2()),
        Capability("Basler cameras (pylon)", needs(("pypylon", cameras))),
        Capability("GenICam cameras (GenTL producer)", needs(("harvesters", cameras)) + _no_producer()),
        Capability("GenICam cameras (Aravis)", needs(("aravis", aravis))),
    )


def _no_v4l2() -> tuple[str, ...]:
    return () if _v4l2_devices() else ("connect a camera: there is no /dev/video* (a container needs --device)",)


def _no_producer() -> tuple[str, ...]:
    advice = "install the camera maker's GenTL producer and set GENICAM_GENTL64_PATH to its folder"
    return () if _gentl_producers() else (advice,)


if __name__ == "__main__":
    print("\n" + json.dumps(asdict(_probe(sys.argv[1]))))
