"""What the real Python packages of TensorRT have, as JSON: classes, members, their signatures and enumerations.

    python -m tests.tensorrt_api FOLDER PACKAGE

FOLDER holds the Python part of one version, as ``tests/install_gpu_packages.sh`` puts it there. The libraries below it
need not be there: empty ones stand in for them, which refuse to start, as the real ones do without a driver.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.kernels.host import COMPILER


def stand_in(extension: Path) -> None:
    """Load an empty library under each name that an extension module of TensorRT needs; their functions give null."""
    assert COMPILER is not None

    def listed(*command: str) -> str:
        return subprocess.run([*command, str(extension)], capture_output=True, text=True, check=True).stdout

    names = re.findall(r"\[(lib(?:nvinfer|nvonnx|tensorrt)\S*)\]", listed("readelf", "--dynamic"))
    functions = re.findall(r" U ((?:create|get|init)\w+)$", listed("nm", "--dynamic", "--undefined-only"), re.MULTILINE)
    assert names
    assert "createInferRuntime_INTERNAL" in functions
    source = "".join(f"void *{function}(void) {{ return 0; }}\n" for function in functions)
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(names):
            path = Path(folder) / name
            subprocess.run(
                [COMPILER, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-", "-o", str(path)],
                input=(source if index == 0 else "").encode(),
                check=True,
            )
            # Under this name the loader finds it again, whoever asks.
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def described(member: Any) -> list[str]:
    """The signatures of a method, or the one of a property's getter."""
    documentation = (member.fget if isinstance(member, property) else member).__doc__ or ""
    return [line.strip() for line in documentation.splitlines() if " -> " in line]


def api(package: ModuleType) -> dict[str, Any]:
    """Names of each class and their signatures; of each enumeration its members."""
    found: dict[str, Any] = {}
    for name, kind in vars(package).items():
        if not isinstance(kind, type):
            continue
        if hasattr(kind, "__members__"):
            found[name] = {"members": list(kind.__members__)}
        else:
            members = {key: getattr(kind, key) for key in dir(kind) if not key.startswith("__") or key == "__init__"}
            found[name] = {"signatures": {key: described(member) for key, member in members.items()}}
    return found


def refusals(package: ModuleType) -> dict[str, str]:
    """What the project says where the library does not start."""
    from recontrast_edge.engines.tensorrt import library_logger
    from recontrast_edge.errors import RecontrastError
    from recontrast_export.trt import Library

    said = {}
    try:
        Library("tensorrt", package).parse(b"")
    except RecontrastError as error:
        said["build"] = str(error)
    try:
        package.Runtime(library_logger(package))
    except TypeError as error:
        said["runtime"] = str(error)
    return said


if __name__ == "__main__":
    folder, package_name = Path(sys.argv[1]), sys.argv[2]
    sys.path.insert(0, str(folder))
    stand_in(next((folder / package_name).glob("*.so")))
    package = import_module(package_name)
    json.dump({"version": package.__version__, "api": api(package), "refusals": refusals(package)}, sys.stdout)
