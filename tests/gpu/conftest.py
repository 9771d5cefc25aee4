"""Tests of this folder need an NVIDIA GPU; where none answers, they skip and say so."""

from __future__ import annotations

import ctypes

import pytest


@pytest.fixture(autouse=True, scope="session")
def _nvidia_gpu() -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        pytest.skip("needs an NVIDIA GPU: there is no driver (libcuda.so.1)")
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        pytest.skip("needs an NVIDIA GPU: the driver finds none")
