"""A frame's whole way, by the tests of ``tests/gpu/test_way.py``, on the fake driver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from recontrast_edge.cuda import Device, open_device
from recontrast_edge.kernels import launcher
from tests.edge.fakes_cuda import FakeDriver, install
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
from tests.kernels.host import COMPILER, Host, build


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    if COMPILER is None:
        pytest.skip("g++ builds the kernels for the host")
    return Host(build(tmp_path_factory.mktemp("host")))


@pytest.fixture
def device(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    driver = FakeDriver(host)
    install(driver, monkeypatch)
    monkeypatch.setattr(launcher, "compiled_kernels", lambda _capability: b"a cubin")
    with open_device(binding="cuda-bindings") as opened:
        yield opened
    assert driver.live == {}
