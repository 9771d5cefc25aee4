"""The kernels, built for the host with a sanitizer, once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.host import COMPILER, build


@pytest.fixture(scope="session")
def sanitized_library(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The host build under ``request.param``, ``thread`` or ``address``."""
    if COMPILER is None:
        pytest.skip("g++ builds the kernels for the host")
    return build(tmp_path_factory.mktemp("sanitized"), sanitizer=request.param)
