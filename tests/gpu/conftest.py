"""Tests of this folder need an NVIDIA GPU; where none answers, they skip and say so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from recontrast_edge.cuda import Device, open_device
from recontrast_edge.errors import MissingError
from tests.gpu.gpu import Gpu


@pytest.fixture(autouse=True, scope="session")
def device() -> Iterator[Device]:
    try:
        opened = open_device()
    except MissingError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")
    with opened:
        yield opened


@pytest.fixture(scope="session")
def gpu(device: Device) -> Gpu:
    return Gpu(device)
