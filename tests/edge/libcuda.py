"""A FakeDriver below the real ``cuda-bindings`` and ``pycuda``: a libcuda.so.1 whose functions end in the fake's.

    python -m pytest -p tests.edge.libcuda tests/edge/test_cuda.py

So the packages themselves see every argument that the project passes, and the project every result that they make of
the driver's. For a process of its own: whoever looks for a driver there finds this one.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.edge import fakes_cuda
from tests.edge.fakes_cuda import FakeDriver, UnknownCodeError
from tests.kernels.host import COMPILER

SOURCE = """
#include <string.h>
typedef void *(*Find)(const char *name, int version);
static Find find;
extern "C" void set_find(Find function) { find = function; }
extern "C" int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long, int *status)
{
    *found = strcmp(name, "cuGetProcAddress") ? find(name, version) : reinterpret_cast<void *>(cuGetProcAddress_v2);
    if (status) { *status = *found ? 0 : 1; }
    return *found ? 0 : 500;
}
extern "C" int cuGetProcAddress(const char *name, void **found, int version, unsigned long long flags)
{
    return cuGetProcAddress_v2(name, found, version, flags, 0);
}
"""

# Every argument of the driver's functions is a whole number or a pointer, so one way of passing twelve fits all.
EXPORT = """
extern "C" long {name}(long a, long b, long c, long d, long e, long f, long g, long h, long i, long j, long k, long l)
{{
    typedef long (*Function)(long, long, long, long, long, long, long, long, long, long, long, long);
    Function function = reinterpret_cast<Function>(find("{name}", 0));
    return function ? function(a, b, c, d, e, f, g, h, i, j, k, l) : 801;
}}
"""
"""For packages that are linked against the library; 801 is CUDA_ERROR_NOT_SUPPORTED."""

_INT, _UINT, _SIZE, _HANDLE = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p
_POINTER, _BYTE, _WIDE = ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_ulonglong
_TEXT, _FLOAT = ctypes.c_char_p, ctypes.c_float

SIGNATURES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "cuInit": ((), (_UINT,)),
    "cuDeviceGetCount": ((_INT,), ()),
    "cuDeviceGet": ((_INT,), (_INT,)),
    "cuDeviceGetAttribute": ((_INT,), (_INT, _INT)),
    "cuDevicePrimaryCtxRetain": ((_HANDLE,), (_INT,)),
    "cuDevicePrimaryCtxRelease": ((), (_INT,)),
    "cuCtxCreate": ((_HANDLE,), (_HANDLE, _UINT, _INT)),
    "cuCtxDetach": ((), (_HANDLE,)),
    "cuCtxPushCurrent": ((), (_HANDLE,)),
    "cuCtxPopCurrent": ((_HANDLE,), ()),
    "cuCtxGetDevice": ((_INT,), ()),
    "cuMemGetInfo": ((_SIZE, _SIZE), ()),
    "cuMemAlloc": ((_POINTER,), (_SIZE,)),
    "cuMemFree": ((), (_POINTER,)),
    "cuMemHostAlloc": ((_HANDLE,), (_SIZE, _UINT)),
    "cuMemFreeHost": ((), (_HANDLE,)),
    "cuMemcpyHtoDAsync": ((), (_POINTER, _HANDLE, _SIZE, _HANDLE)),
    "cuMemcpyDtoHAsync": ((), (_HANDLE, _POINTER, _SIZE, _HANDLE)),
    "cuMemcpyDtoDAsync": ((), (_POINTER, _POINTER, _SIZE, _HANDLE)),
    "cuMemsetD8Async": ((), (_POINTER, _BYTE, _SIZE, _HANDLE)),
    "cuStreamCreate": ((_HANDLE,), (_UINT,)),
    "cuStreamDestroy": ((), (_HANDLE,)),
    "cuStreamSynchronize": ((), (_HANDLE,)),
    "cuStreamIsCapturing": ((_INT,), (_HANDLE,)),
    "cuStreamBeginCapture": ((), (_HANDLE, _INT)),
    "cuStreamEndCapture": ((_HANDLE,), (_HANDLE,)),
    "cuEventCreate": ((_HANDLE,), (_UINT,)),
    "cuEventDestroy": ((), (_HANDLE,)),
    "cuEventRecordWithFlags": ((), (_HANDLE, _HANDLE, _UINT)),
    "cuEventElapsedTime": ((_FLOAT,), (_HANDLE, _HANDLE)),
    "cuModuleLoadData": ((_HANDLE,), (_TEXT,)),
    "cuModuleUnload": ((), (_HANDLE,)),
    "cuModuleGetFunction": ((_HANDLE,), (_HANDLE, _TEXT)),
    "cuLaunchKernel": ((), (_HANDLE, *[_UINT] * 7, *[_HANDLE] * 3)),
    "cuGraphInstantiate": ((_HANDLE,), (_HANDLE, _WIDE)),
    "cuGraphLaunch": ((), (_HANDLE, _HANDLE)),
    "cuGraphDestroy": ((), (_HANDLE,)),
    "cuGraphExecDestroy": ((), (_HANDLE,)),
}
"""Of each function of the driver, as cuda.h declares it: what it gives, by pointers that come first, and takes. Two
functions have another order: see ``_outputs_last``."""

_OUTPUTS_LAST = {"cuStreamIsCapturing", "cuStreamEndCapture"}
_NAMES = {"cuGraphInstantiateWithFlags": "cuGraphInstantiate"}
"""The driver's own name, where cuda.h gives a function another one."""
_UNKNOWN_ERROR = 999


def linked_names() -> list[str]:
    """The functions that ``pycuda``, where it is installed, is linked against."""
    package = find_spec("pycuda")
    if package is None or shutil.which("nm") is None:
        return []
    (module,) = Path((package.submodule_search_locations or [""])[0]).glob("_driver.*.so")
    listed = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", str(module)], capture_output=True, text=True, check=True
    ).stdout
    return re.findall(r" U (cu[A-Z]\w+)", listed)


class Library:
    """The library; its functions are those of ``driver``, once there is one."""

    def __init__(self, folder: Path) -> None:
        assert COMPILER is not None
        path = folder / "libcuda.so.1"
        subprocess.run(
            [COMPILER, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c++", "-", "-o", str(path)],
            input="".join([SOURCE, *(EXPORT.format(name=name) for name in linked_names())]).encode(),
            check=True,
        )
        # Under this name the loader gives it to whoever asks for it next.
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.driver = FakeDriver()
        self.errors: list[BaseException] = []
        """That the fake raised: exceptions cannot pass the real package."""
        self._texts: list[Any] = []
        self._functions = {name: self._function(name) for name in SIGNATURES}
        self._functions["cuDeviceGetName"] = ctypes.CFUNCTYPE(_INT, _HANDLE, _INT, _INT)(self._device_name)
        self._functions["cuGetErrorString"] = ctypes.CFUNCTYPE(_INT, _INT, _HANDLE)(self._error_string)
        self._functions["cuEventRecord"] = ctypes.CFUNCTYPE(_INT, _HANDLE, _HANDLE)(self._event_record)
        # That the launch tells again.
        self._functions["cuFuncSetBlockShape"] = ctypes.CFUNCTYPE(_INT, _HANDLE, _INT, _INT, _INT)(lambda *_: 0)
        self._functions["cuModuleLoadDataEx"] = ctypes.CFUNCTYPE(_INT, _HANDLE, _TEXT, _UINT, _HANDLE, _HANDLE)(
            self._module_load
        )
        self._functions["cuDeviceComputeCapability"] = ctypes.CFUNCTYPE(_INT, _HANDLE, _HANDLE, _INT)(self._capability)
        find = ctypes.CFUNCTYPE(_HANDLE, _TEXT, _INT)
        self._find = find(lambda name, _version: self._address(name.decode()))
        self._library.set_find(self._find)

    def _address(self, name: str) -> int | None:
        name = re.sub(r"_v\d$", "", name)
        function = self._functions.get(_NAMES.get(name, name))
        return None if function is None else ctypes.cast(function, _HANDLE).value

    def _asked(self, name: str, *arguments: Any) -> tuple[int, Any]:
        try:
            code, *results = getattr(self.driver, name)(*arguments)
            return int(code), results
        except UnknownCodeError as error:
            return error.code, []
        except BaseException as error:
            self.errors.append(error)
            return _UNKNOWN_ERROR, []

    def _function(self, name: str) -> Any:
        gives, takes = SIGNATURES[name]
        pointers = [_HANDLE] * len(gives)
        last = name in _OUTPUTS_LAST

        def call(*arguments: Any) -> int:
            # Null is None to ctypes.
            values = [0 if value is None else value for value in arguments]
            inputs = values[: len(takes)] if last else values[len(gives) :]
            outputs = values[len(takes) :] if last else values[: len(gives)]
            code, results = self._asked(name, *inputs)
            if code == 0:
                for kind, address, result in zip(gives, outputs, results, strict=True):
                    kind.from_address(address).value = result
            return code

        return ctypes.CFUNCTYPE(_INT, *([*takes, *pointers] if last else [*pointers, *takes]))(call)

    def _device_name(self, out: int, size: int, device: int) -> int:
        code, (name,) = self._asked("cuDeviceGetName", size, device)
        ctypes.memmove(out, name, size)
        return code

    def _event_record(self, event: int, stream: int | None) -> int:
        return self._asked("cuEventRecordWithFlags", event, stream or 0, 0)[0]

    def _module_load(self, out: int, image: bytes, count: int, options: int, values: int) -> int:
        # Of two logs, each a buffer and its size: nothing was written to them.
        log = (_HANDLE * count).from_address(values)
        log[1] = log[3] = None
        code, results = self._asked("cuModuleLoadData", image)
        if code == 0:
            _HANDLE.from_address(out).value = results[0]
        return code

    def _capability(self, major: int, minor: int, device: int) -> int:
        for address, number in zip((major, minor), self.driver.compute_capability, strict=True):
            _INT.from_address(address).value = number
        return 0

    def _error_string(self, error: int, out: int) -> int:
        code, results = self._asked("cuGetErrorString", error)
        text = results[0] if results else b"an error that the fake does not know"
        self._texts.append(ctypes.create_string_buffer(text or b""))
        _HANDLE.from_address(out).value = ctypes.addressof(self._texts[-1])
        return code


def pytest_configure() -> None:
    """As a plugin: every FakeDriver that a test installs is what the real package finds."""
    with tempfile.TemporaryDirectory() as folder:
        library = Library(Path(folder))

    def install(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library, "driver", driver)

    fakes_cuda.install = install
    pytest_configure.library = library  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _nothing_was_swallowed() -> Iterator[None]:
    errors: list[BaseException] = pytest_configure.library.errors  # type: ignore[attr-defined]
    errors.clear()
    yield
    if errors:
        raise errors[0]
