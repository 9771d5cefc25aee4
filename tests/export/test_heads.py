"""The map in ONNX operators against the NumPy oracle, on features alone."""

from __future__ import annotations

import numpy as np
import pytest

from recontrast_edge.scoring import VIEWS, fold_maps, image_scores, level_distances
from recontrast_edge.spec import Scoring

onnx = pytest.importorskip("onnx", reason="needs the export extra")
onnxruntime = pytest.importorskip("onnxruntime")

from recontrast_export.graph import OPSETS, Graph  # noqa: E402
from recontrast_export.heads import add_map_head  # noqa: E402

CHANNELS = (5, 7, 3)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(blur_sigma=4.0),
        Scoring(blur_sigma=0.0, rule="top", top_fraction=0.01),
        Scoring(blur_sigma=1.5, rule="top", top_fraction=1e-9),
    ],
    ids=["max", "top", "top-one-pixel"],
)
def test_agrees_with_the_oracle(opset: int, scoring: Scoring, spec_of) -> None:
    spec = spec_of("none", CHANNELS, scoring=scoring)
    graph = Graph("head", opset=opset)
    rng = np.random.default_rng(0)
    batch = 3
    feed, pairs, arrays = {}, [], []
    for view in range(VIEWS):
        pairs.append([])
        arrays.append([])
        for level, channels in enumerate(CHANNELS):
            width, height = spec.level_wh(level)
            names = (f"a{view}{level}", f"b{view}{level}")
            target = rng.normal(size=(batch, channels, height, width)).astype(np.float32)
            reconstruction = (target + rng.normal(size=target.shape)).astype(np.float32)
            # Zero vectors have distance 1; tiny ones are real vectors above and bounded below EPS.
            target[0, :, 0, 0] = 0
            reconstruction[1, :, 0, 1] = 0
            target[2, :, 1, 0] *= 1e-4
            target[2, :, 1, 1] = 1e-12
            target[:, :, 1, 2] = reconstruction[:, :, 1, 2]
            for name, array in zip(names, (target, reconstruction), strict=True):
                feed[graph.input(name, ["N", *array.shape[1:]])] = array
            pairs[view].append(names)
            arrays[view].append((target.astype(np.float64), reconstruction.astype(np.float64)))
    add_map_head(graph, pairs, spec)
    model = graph.model(producer_version="0")
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    maps, scores = session.run(["anomaly_map", "anomaly_score"], feed)

    expected = fold_maps(level_distances(arrays), spec.input.size_wh, scoring.blur_sigma)
    assert maps.shape == (batch, 1, *expected.shape[1:])
    np.testing.assert_allclose(maps[:, 0], expected, atol=5e-6)
    np.testing.assert_allclose(scores, image_scores(expected, scoring), atol=5e-6)
