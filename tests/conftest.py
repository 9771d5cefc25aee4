"""Fixtures that several test folders share."""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from recontrast_edge.engines import Engine, open_engine
from recontrast_edge.onnxfile import SPEC_KEY, graph_sha256, replace_metadata
from recontrast_edge.scoring import INPUT_NAME, MAP_NAME, SCORE_NAME
from recontrast_edge.spec import InputSpec, Level, ModelSpec, Threshold
from tests.kernels.host import COMPILER, Host, build

TINY_SIZE = 32


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The tests' networks are small: one thread is faster than several that spin while they wait for each other."""
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_reaches_us() -> None:
    """Shells start background jobs with SIGINT ignored, and what they start inherits that; some tests press Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def gi(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Makes Debian's ``gi`` importable, and nothing else of Debian's Python; skips where it cannot be."""
    with suppress(ImportError):
        import gi  # noqa: F401

        return
    package = Path("/usr/lib/python3/dist-packages/gi")
    if not list(package.glob(f"_gi{sysconfig.get_config_var('EXT_SUFFIX')}")):
        version = ".".join(map(str, sys.version_info[:2]))
        pytest.skip(f"needs Debian's python3-gi, made for this Python {version}")
    folder = tmp_path_factory.mktemp("gi")
    (folder / "gi").symlink_to(package)
    sys.path.append(str(folder))


@pytest.fixture(scope="session")
def magnetic_tile() -> Path:
    """The magnetic-tile images in MVTec layout, too large and not ours to ship; skips where they are not."""
    shared = os.environ.get("RECONTRAST_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data"
    folder = Path(shared) / "magnetic_tile"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; RECONTRAST_SHARED_DATA names the folder that holds magnetic_tile")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file whose map is the brightest channel on the 0..1 scale and whose score is the map's maximum.

    Input 32x32, threshold 0.5: a 32x32 image with a pixel over 127 is rejected.
    """
    onnx = pytest.importorskip("onnx", reason="the onnx package builds this fixture")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMax", [INPUT_NAME], [MAP_NAME], axes=[1], keepdims=1),
            helper.make_node("ReduceMax", [MAP_NAME], [SCORE_NAME], axes=[1, 2, 3], keepdims=0),
        ],
        "tiny",
        [helper.make_tensor_value_info(INPUT_NAME, float32, ["N", 3, TINY_SIZE, TINY_SIZE])],
        [
            helper.make_tensor_value_info(MAP_NAME, float32, ["N", 1, TINY_SIZE, TINY_SIZE]),
            helper.make_tensor_value_info(SCORE_NAME, float32, ["N"]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    onnx.save(model, path)
    spec = ModelSpec(
        class_name="tiny",
        backbone="none",
        input=InputSpec(
            size_wh=(TINY_SIZE, TINY_SIZE),
            resize_wh=(TINY_SIZE, TINY_SIZE),
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        ),
        levels=(Level(stride=4, channels=3),),
        threshold=Threshold(value=0.5, method="manual", engine_sha256=graph_sha256(path)),
        weights_sha256="0" * 64,
    )
    replace_metadata(path, {SPEC_KEY: spec.dumps()})
    return path


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[Engine]:
    """``tiny_model``, opened on one thread."""
    with open_engine(tiny_model, threads=1) as opened:
        yield opened


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The kernels' own source, built for the CPU."""
    if COMPILER is None:
        pytest.skip("g++ builds the kernels for the host")
    return Host(build(tmp_path_factory.mktemp("host")))
