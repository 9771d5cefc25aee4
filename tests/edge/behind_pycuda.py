"""The real PyCUDA above the fake driver: its objects, its own stack of contexts, its destructors.

    python -m pytest -p tests.edge.libcuda tests/edge/behind_pycuda.py

Without that plugin nothing here can run, so pytest does not collect this file by itself: ``test_cuda.py`` runs it.
"""

from __future__ import annotations

import atexit
import gc
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycuda.driver
import pytest

from recontrast_edge.cuda import CudaError, open_device
from recontrast_edge.errors import GpuNotReadyError, MissingError, ModelError
from tests.edge.fakes_cuda import CUresult, CUstream_flags, FakeDriver
from tests.edge.fakes_tensorrt import FakeTensorRt
from tests.edge.test_tensorrt_engine import (  # noqa: F401 - some are fixtures
    Open,
    driver,
    expected,
    image,
    library,
    model,
    open_plan,
    write_plan,
)

IMAGES = [image(0), image(1, mono=True)]


def in_another_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def assert_right(maps: np.ndarray, images: list[np.ndarray]) -> None:
    np.testing.assert_allclose(maps, expected(images, model())[0], atol=2e-3)


def test_an_engine_without_graphs(library: FakeTensorRt, open_plan: Open) -> None:  # noqa: F811
    engine = open_plan(binding="pycuda", profile=True)
    assert not engine.uses_graph
    assert f"pycuda {pycuda.VERSION_TEXT}" in engine.name
    found = engine.infer(IMAGES)
    assert_right(found.maps, IMAGES)
    assert found.stage_ms["network"] == 0.5
    # As cameras' threads do.
    assert_right(in_another_thread(lambda: engine.infer(IMAGES)).maps, IMAGES)
    # Two frames of one size in turn, and one that needs larger buffers.
    assert_right(engine.infer([image(2, width=90)]).maps, [image(2, width=90)])
    library.driver.failures["cuMemcpyHtoDAsync"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(ModelError, match=r"cuMemcpyHtoDAsync: out of memory"):
        engine.infer(IMAGES)
    assert_right(engine.infer(IMAGES).maps, IMAGES)


def test_an_engine_that_another_thread_closes(library: FakeTensorRt, open_plan: Open) -> None:  # noqa: F811
    engine = open_plan(binding="pycuda")
    in_another_thread(engine.close)
    gc.collect()
    assert set(library.driver.live.values()) <= {"context"}, "PyCUDA gives contexts back where it got them"
    library.driver.end()


@pytest.mark.parametrize("binding", ["cuda-bindings", "pycuda"])
def test_an_applications_context_and_stream(library: FakeTensorRt, open_plan: Open, binding: str) -> None:  # noqa: F811
    pycuda.driver.init()
    context = pycuda.driver.Device(0).make_context()
    stream = pycuda.driver.Stream()
    engine = open_plan(binding=binding, context=context, stream=stream)
    assert_right(engine.infer(IMAGES).maps, IMAGES)
    assert_right(in_another_thread(lambda: engine.infer(IMAGES)).maps, IMAGES)
    engine.close()
    # Still the application's, and current.
    stream.synchronize()
    assert sorted(library.driver.live.values()) == ["context", "stream"]
    assert library.driver.current == [context.handle]
    del stream
    context.pop()
    context.detach()


def test_the_program_of_the_documentation(library: FakeTensorRt, tmp_path: Path) -> None:  # noqa: F811
    text = (Path(__file__).parents[2] / "docs" / "desktop-gpu.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    write_plan(tmp_path, model())
    names: dict[str, Any] = {"image": image(0)}
    exec(program.replace("parts.plan", str(tmp_path / "model.plan")), names)
    assert_right(names["result"].maps, [image(0)])
    assert library.driver.stream_flags == [CUstream_flags.CU_STREAM_NON_BLOCKING]
    # At the end of the process it lets go of the context, which this test's driver would not know.
    primary = sys.modules["pycuda.autoprimaryctx"]
    atexit.unregister(primary._finish_up)
    del names["stream"]
    primary._finish_up()
    assert library.driver.current == []
    library.driver.end()


def test_what_the_driver_refuses_is_named(driver: FakeDriver) -> None:  # noqa: F811
    with open_device(binding="pycuda") as device, device.current():
        driver.failures["cuMemHostAlloc"] = CUresult.CUDA_ERROR_INVALID_VALUE
        with pytest.raises(CudaError, match=r"the GPU failed in cuMemHostAlloc: invalid value"):
            device.allocate_pinned(10)
        driver.failures["cuModuleLoadData"] = CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU
        with pytest.raises(CudaError, match=r"cuModuleLoadDataEx: no binary for gpu"):
            device.load(b"an image")


def test_no_gpu(driver: FakeDriver) -> None:  # noqa: F811
    driver.failures["cuInit"] = CUresult.CUDA_ERROR_NO_DEVICE
    with pytest.raises(GpuNotReadyError, match=r"no NVIDIA GPU can be used here .*cuInit failed: no device"):
        open_device(binding="pycuda")
    with pytest.raises(MissingError, match="expected GPU 3, this machine has 1"):
        open_device(3, binding="pycuda")
