"""Engines against the NumPy oracle in float64, on every frame of a stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recontrast_edge.engines import open_engine
from recontrast_edge.frame import EndOfStream
from recontrast_edge.preprocess import preprocess
from recontrast_edge.scoring import fold_maps, image_scores, level_distances
from recontrast_edge.sources import open_source

torch = pytest.importorskip("torch", reason="needs the train extra")

from recontrast_export.onnx_export import export_onnx  # noqa: E402
from recontrast_train.run import load_run  # noqa: E402


@pytest.mark.parametrize("head", ["map", "features"])
def test_engine_and_oracle_agree_on_every_frame(run_folder: Path, data_folder: Path, tmp_path: Path, head: str) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(run_folder, path, head=head, images=[data_folder])  # type: ignore[arg-type]
    model, spec = load_run(run_folder)
    model = model.double()
    source = open_source("synthetic://mixed?fps=0&frames=12&seed=4&defect_rate=0.5&size=120x90")
    count = 0
    with open_engine(path) as engine:
        while True:
            try:
                frame = source.read(1.0)
            except EndOfStream:
                break
            assert frame is not None
            assert frame.image is not None
            found = engine.infer([frame.image])
            tensor = torch.from_numpy(preprocess(frame.image, spec.input))[None].double()
            with torch.inference_mode():
                pairs = [[(a.numpy(), b.numpy()) for a, b in view] for view in model(tensor)]
            expected = fold_maps(level_distances(pairs), spec.input.size_wh, spec.scoring.blur_sigma)
            np.testing.assert_allclose(found.maps, expected, atol=1e-4)
            np.testing.assert_allclose(found.scores, image_scores(expected, spec.scoring), atol=1e-4)
            count += 1
    assert count == 12
