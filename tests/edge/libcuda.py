"""A FakeDriver below the real ``cuda-bindings``: a libcuda.so.1 whose functions end in the fake's.

    python -m pytest -p tests.edge.libcuda tests/edge/test_cuda.py

So the package itself sees every argument that the project passes, and the project every result that the package makes
of the driver's. For a process of its own: whoever looks for a driver there finds this one.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.edge import fakes_cuda
from tests.edge.fakes_cuda import FakeDriver
from tests.kernels.host import COMPILER

SOURCE = """
typedef void *(*Find)(const char *name, int version);
static Find find;
extern "C" void set_find(Find function) { find = function; }
extern "C" int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long, int *status)
{
    *found = find(name, version);
    if (status) { *status = *found ? 0 : 1; }
    return *found ? 0 : 500;
}
extern "C" int cuGetProcAddress(const char *name, void **found, int version, unsigned long long flags)
{
    return cuGetProcAddress_v2(name, found, version, flags, 0);
}
"""

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


class Library:
    """The library; its functions are those of ``driver``, once there is one."""

    def __init__(self, folder: Path) -> None:
        assert COMPILER is not None
        path = folder / "libcuda.so.1"
        subprocess.run(
            [COMPILER, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c++", "-", "-o", str(path)],
            input=SOURCE.encode(),
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
        find = ctypes.CFUNCTYPE(_HANDLE, _TEXT, _INT)
        self._find = find(lambda name, _version: self._address(name.decode()))
        self._library.set_find(self._find)

    def _address(self, name: str) -> int | None:
        function = self._functions.get(_NAMES.get(name, name))
        return None if function is None else ctypes.cast(function, _HANDLE).value

    def _asked(self, name: str, *arguments: Any) -> tuple[int, Any]:
        try:
            code, *results = getattr(self.driver, name)(*arguments)
            return int(code), results
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

    def _error_string(self, error: int, out: int) -> int:
        code, (text,) = self._asked("cuGetErrorString", error)
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
