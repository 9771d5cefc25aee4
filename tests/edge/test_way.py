"""A frame's whole way, by the tests of ``tests/gpu/test_way.py``, on the fake driver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from recontrast_edge.cuda import Device, open_device
from tests.edge.fakes_cuda import FakeDriver, fake_device, install
from tests.gpu.gpu import memory_stayed
from tests.gpu.test_way import (  # noqa: F401 - collected here as this module's tests
    features,
    library,
    open_plan,
    test_a_capture_that_fails_leaves_a_usable_stream,
    test_an_applications_context_and_stream_do_the_work,
    test_every_stage_is_measured,
    test_frames_take_no_memory_and_closing_gives_it_back,
    test_maps_and_scores_are_the_oracles,
)
from tests.kernels.host import Host


@pytest.fixture
def device(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with fake_device(host, monkeypatch) as opened:
        yield opened


@pytest.mark.parametrize("is_integrated", [False, True])
def test_free_memory_tells_nothing_where_it_is_the_systems(
    monkeypatch: pytest.MonkeyPatch, is_integrated: bool
) -> None:
    driver = FakeDriver()
    driver.is_integrated = is_integrated
    install(driver, monkeypatch)
    with open_device(binding="cuda-bindings") as device, device.current():
        free = device.memory_info()[0]
        assert memory_stayed(device, free)
        assert memory_stayed(device, free - (5 << 20)) == is_integrated
