"""A frame's whole way, by the tests of ``tests/gpu/test_way.py``, on the fake driver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from recontrast_edge.cuda import Device
from tests.edge.fakes_cuda import fake_device
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
