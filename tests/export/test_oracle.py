"""Engines against the NumPy oracle in float64, on every frame of a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recontrast_edge.engines import open_engine
from recontrast_edge.frame import EndOfStream
from recontrast_edge.images import read_image
from recontrast_edge.preprocess import preprocess
from recontrast_edge.scoring import fold_maps, image_scores, level_distances
from recontrast_edge.sources import open_source
from recontrast_edge.spec import ModelSpec, Scoring

torch = pytest.importorskip("torch", reason="needs the train extra")

from torch.nn import functional  # noqa: E402

from recontrast_export.onnx_export import export_onnx  # noqa: E402
from recontrast_train.model import ReContrast  # noqa: E402
from recontrast_train.run import load_run, save_run, weights_bytes  # noqa: E402
from recontrast_train.score import TorchScorer  # noqa: E402


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


@pytest.mark.parametrize("weights", [None, (0.0, 3.0, 0.5)])
def test_weights_and_discriminator(
    spec_of: Callable[..., ModelSpec], data_folder: Path, tmp_path: Path, weights: tuple[float, ...] | None
) -> None:
    torch.manual_seed(1)
    model = ReContrast("resnet18", discriminator=True).eval()
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.running_mean, std=0.1)
        torch.nn.init.uniform_(norm.running_var, 0.5, 1.5)
    torch.nn.init.zeros_(model.discriminator.last.bias)
    torch.nn.init.normal_(model.discriminator.last.weight, std=3.0)
    state = weights_bytes(model)
    spec = spec_of(
        "resnet18",
        model.channels,
        weights_sha256=hashlib.sha256(state).hexdigest(),
        scoring=Scoring(level_weights=weights, discriminator_weight=5.0),
    )
    save_run(tmp_path / "run", state, spec)
    path = tmp_path / "model.onnx"
    export_onnx(tmp_path / "run", path, images=[data_folder])
    image = read_image(next(data_folder.glob("test/scratch/*")))
    tensor = torch.from_numpy(preprocess(image, spec.input))[None].double()
    exact = model.double()
    with torch.inference_mode():
        pairs = exact(tensor)
        summands = [
            torch.cat([functional.normalize(t, dim=1) * functional.normalize(r, dim=1) for t, r in level], dim=1)
            for level in zip(*pairs, strict=True)
        ]
        logits = exact.discriminator([part * (part.shape[1] / 2) ** 0.5 for part in summands])
    arrays = [[(a.numpy(), b.numpy()) for a, b in view] for view in pairs]
    factors = weights or (1.0, 1.0, 1.0)
    parts = [factor * level for factor, level in zip(factors, level_distances(arrays), strict=True)]
    parts.append(5.0 * torch.sigmoid(logits)[:, 0].numpy())
    expected = fold_maps(parts, spec.input.size_wh, spec.scoring.blur_sigma)
    with open_engine(path) as engine:
        found = engine.infer([image])
    np.testing.assert_allclose(found.maps, expected, atol=5e-4)
    np.testing.assert_allclose(TorchScorer(*load_run(tmp_path / "run"))([image]).maps, expected, atol=5e-4)
    assert np.ptp(parts[-1]) > 0.1
    # The same where the engine, and not the graph, folds the map.
    export_onnx(tmp_path / "run", tmp_path / "features.onnx", head="features", images=[data_folder])
    with open_engine(tmp_path / "features.onnx") as engine:
        found = engine.infer([image])
    np.testing.assert_allclose(found.maps, expected, atol=5e-4)
    np.testing.assert_allclose(found.scores, image_scores(expected, spec.scoring), atol=5e-4)
