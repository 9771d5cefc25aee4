"""Engines: open a model file, judge images, close.

    with open_engine("demo") as engine:
        result = engine.infer([image])

``open_engine`` chooses by what the file is; nothing heavy is imported before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.errors import ModelError
from recontrast_edge.preprocess import Image
from recontrast_edge.spec import ModelSpec

DEMO = "demo"
"""Name of the model that ships with the package, accepted wherever an engine file is."""


@dataclass(frozen=True, eq=False)
class Inference:
    """What an engine found in a batch.

    Attributes:
        maps: (N, height, width) float32 anomaly maps of ``InputSpec.map_wh``; (0, height, width) where the engine was
            told that nobody wants them.
        scores: (N,) float32 image scores.
        stage_ms: milliseconds a stage for the whole batch, e.g. ``preprocess`` and ``infer``.
    """

    maps: NDArray[np.float32]
    scores: NDArray[np.float32]
    stage_ms: dict[str, float]


class Engine(Protocol):
    """An opened model."""

    spec: ModelSpec
    path: Path
    sha256: str
    """Identity of graph and weights; a threshold is bound to it."""

    @property
    def name(self) -> str:
        """Library, version and device, for people."""
        ...

    def infer(self, images: Sequence[Image], *, maps_above: float | None = None) -> Inference:
        """Judge a batch of images (uint8, (H, W) mono or (H, W, 3) BGR; sizes may differ).

        The same image gives the same numbers whatever the batch it is in.

        Args:
            maps_above: the maps are wanted only if a score is above this, or not a number; the engine may then leave
                them out. None: they are wanted.

        Raises:
            InputError: an image of the wrong form, or an ROI outside of it.
            ModelError: the engine failed or is closed.
            StallError: it can judge nothing any more, whatever is tried; only a new process can.
        """
        ...

    def close(self) -> None:
        """Release everything; may be called again."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def engine_path(engine: str | Path) -> Path:
    """The file behind a name: ``demo`` is the packaged model.

    Raises:
        ModelError: there is no such file.
    """
    if str(engine) == DEMO:
        resource = files("recontrast_edge") / "models" / "demo.onnx"
        # The package is always installed unpacked, so the file outlives the context.
        with as_file(resource) as path:
            return path
    path = Path(engine)
    if not path.exists():
        raise ModelError(
            f"{path}: no such model file; expected an .onnx file or a .plan file, or `{DEMO}` for the packaged model"
        )
    return path


def open_engine(engine: str | Path, *, threads: int | None = None, profile: bool = False) -> Engine:
    """Open a model with the engine that its file asks for.

    Args:
        engine: path of an ``.onnx`` file (ONNX Runtime on the CPU) or a ``.plan`` file (TensorRT), or ``demo``.
        threads: CPU threads of ONNX Runtime; None for the number of physical cores.
        profile: make ``Inference.stage_ms`` tell the stages on the GPU apart; TensorRT only.

    Raises:
        ModelError: missing, damaged, not a model of ours, or built for another machine.
        GpuError: the GPU failed.
        MissingError: a library, a driver or a GPU is missing.
    """
    path = engine_path(engine)
    if path.suffix == ".onnx":
        from recontrast_edge.engines.onnx import OnnxEngine

        return OnnxEngine(path, threads=threads)
    if path.suffix == ".plan":
        from recontrast_edge.engines.tensorrt import TensorRtEngine

        return TensorRtEngine(path, profile=profile)
    raise ModelError(f"{path}: expected an .onnx file or a .plan file, got {path.suffix or 'a file without suffix'!r}")
