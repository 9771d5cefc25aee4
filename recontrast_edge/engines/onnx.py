"""ONNX Runtime on the CPU: the engine every machine has.

with OnnxEngine(Path("model.onnx")) as engine:
    scores = engine.infer([image]).scores
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from recontrast_edge.engines import Inference
from recontrast_edge.errors import ModelError
from recontrast_edge.onnxfile import graph_sha256, read_spec
from recontrast_edge.preprocess import Image, preprocess
from recontrast_edge.scoring import (
    INPUT_NAME,
    MAP_NAME,
    SCORE_NAME,
    VIEWS,
    feature_shapes,
    fold_maps,
    image_scores,
    level_distances,
    weighted,
)
from recontrast_edge.tiling import infer_tiles


class OnnxEngine:
    """A ``map`` or ``features`` graph of ours under ONNX Runtime.

    Args:
        path: the ``.onnx`` file, with the spec in its metadata.
        threads: CPU threads of one inference; None lets ONNX Runtime choose.
        optimise: let ONNX Runtime rewrite the graph, which is faster. Without, it computes what is written, to the last
            rounding: a reference for other engines.

    Raises:
        ModelError: missing, damaged, not a model of ours, or inputs and outputs that do not fit its spec.
    """

    def __init__(self, path: Path, *, threads: int | None = None, optimise: bool = True) -> None:
        self.path = path
        self.spec = read_spec(path)
        self.sha256 = graph_sha256(path)
        self._session = self._open(path, threads, optimise)
        self._outputs = self._check_outputs()

    @property
    def name(self) -> str:
        import onnxruntime

        return f"ONNX Runtime {onnxruntime.__version__} (CPU)"

    @staticmethod
    def _open(path: Path, threads: int | None, optimise: bool) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # Quantised graphs as they are written: fusing Q/DQ around half precision gives maps that are wrong altogether.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if threads is not None:
            options.intra_op_num_threads = threads
        options.log_severity_level = 4
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # ONNX Runtime raises a family of its own types and RuntimeError, with no common public base.
        except Exception as error:
            raise ModelError(f"{path}: ONNX Runtime cannot load it ({_first_line(error)}); export it again") from None

    def _check_outputs(self) -> list[str]:
        width, height = self.spec.input.size_wh
        inputs = {node.name: node.shape for node in self._session.get_inputs()}
        outputs = {node.name: node.shape for node in self._session.get_outputs()}
        if list(inputs) != [INPUT_NAME] or list(inputs[INPUT_NAME][1:]) != [3, height, width]:
            wanted = f"one input {INPUT_NAME!r} of (N, 3, {height}, {width})"
            raise ModelError(f"{self.path}: expected {wanted}, got {inputs}; export it again")
        if set(outputs) == {MAP_NAME, SCORE_NAME}:
            return [MAP_NAME, SCORE_NAME]
        expected = feature_shapes(self.spec)
        for tensor, shape in expected.items():
            if list(outputs.get(tensor, [None])[1:]) != list(shape):
                raise ModelError(
                    f"{self.path}: expected output {tensor!r} of (N, {', '.join(map(str, shape))}), got "
                    f"{outputs.get(tensor, 'none')}; graph and spec do not belong together, export it again"
                )
        return list(expected)

    def infer(self, images: Sequence[Image], *, maps_above: float | None = None) -> Inference:
        """See ``Engine.infer``. The maps are there anyway, so ``maps_above`` saves nothing and they always come."""
        return infer_tiles(self._infer, images, self.spec) if self.spec.input.is_tiled else self._infer(images)

    def _infer(self, images: Sequence[Image]) -> Inference:
        if self._session is None:
            raise ModelError(f"{self.path}: the engine is closed")
        input_spec = self.spec.input.of_tile
        width, height = input_spec.size_wh
        maps = np.empty((len(images), height, width), np.float32)
        scores = np.empty(len(images), np.float32)
        stage_s = {"preprocess": 0.0, "infer": 0.0}
        # One at a time: a batch is no faster on a CPU, and this way the numbers cannot depend on it.
        for index, image in enumerate(images):
            start = time.perf_counter()
            tensor = preprocess(image, input_spec)[None]
            prepared = time.perf_counter()
            try:
                results = self._session.run(self._outputs, {INPUT_NAME: tensor})
            except Exception as error:
                raise ModelError(f"{self.path}: inference failed ({_first_line(error)})") from None
            if self._outputs[0] == MAP_NAME:
                maps[index] = results[0][0, 0]
                scores[index] = results[1][0]
            else:
                maps[index], scores[index] = self._score(results)
            stage_s["preprocess"] += prepared - start
            stage_s["infer"] += time.perf_counter() - prepared
        return Inference(maps, scores, {stage: seconds * 1e3 for stage, seconds in stage_s.items()})

    def _score(self, features: list[Any]) -> tuple[Any, Any]:
        levels, scoring = len(self.spec.levels), self.spec.scoring
        # Half-precision graphs give float16, whose squares overflow.
        features = [feature.astype(np.float32, copy=False) for feature in features]
        probability = features.pop()[:, 0] if scoring.discriminator_weight is not None else None
        flat = list(zip(features[0::2], features[1::2], strict=True))
        pairs = [flat[view * levels : (view + 1) * levels] for view in range(VIEWS)]
        parts = weighted(level_distances(pairs), scoring, probability)
        anomaly = fold_maps(parts, self.spec.input.size_wh, scoring.blur_sigma)
        return anomaly[0], image_scores(anomaly, scoring)[0]

    def close(self) -> None:
        """See ``Engine.close``."""
        self._session = None

    def __enter__(self) -> OnnxEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
