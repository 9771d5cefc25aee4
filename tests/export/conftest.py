"""Models and runs to export: random weights, but nothing left at a value that hides a mistake."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from recontrast_edge.images import write_image
from recontrast_edge.spec import InputSpec, Level, ModelSpec, Scoring
from recontrast_edge.synthetic import SyntheticLine

SIZE_WH = (96, 64)
"""Not square, so that mixed-up axes show."""


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], Any]:
    """``model_of(backbone)``: a model in eval mode whose encoders differ and whose batch norms do something.

    ``model_of("BACKBONE+discriminator")`` has a discriminator as well.
    """
    torch = pytest.importorskip("torch", reason="needs the train extra")
    from recontrast_train.model import ReContrast

    models: dict[str, ReContrast] = {}

    def get(backbone: str) -> ReContrast:
        if backbone in models:
            return models[backbone]
        torch.manual_seed(0)
        name, _, discriminator = backbone.partition("+")
        model = ReContrast(name, discriminator=bool(discriminator))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.running_mean, std=0.1)
                torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias, std=0.1)
        for head in [head for heads in model.heads for head in heads]:
            torch.nn.init.normal_(head.bias, std=0.1)
        if model.discriminator is not None:
            torch.nn.init.normal_(model.discriminator.last.weight, std=3.0)
            torch.nn.init.zeros_(model.discriminator.last.bias)
        models[backbone] = model.eval()
        return models[backbone]

    return get


@pytest.fixture(scope="session")
def spec_of() -> Callable[..., ModelSpec]:
    """``spec_of(backbone, channels, **changes)``: a spec with an input of ``SIZE_WH``."""

    def get(backbone: str, channels: tuple[int, ...], **changes: Any) -> ModelSpec:
        name, _, discriminator = backbone.partition("+")
        spec = ModelSpec(
            class_name="test",
            backbone=name,
            scoring=Scoring(discriminator_weight=5.0 if discriminator else None),
            input=InputSpec(size_wh=SIZE_WH, resize_wh=SIZE_WH, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)),
            levels=tuple(Level(stride=4 << level, channels=count) for level, count in enumerate(channels)),
            weights_sha256="0" * 64,
        )
        return spec.model_copy(update=changes)

    return get


@pytest.fixture(scope="session")
def tensors() -> NDArray[np.float32]:
    """(3, 1, 3, H, W): three network inputs of noise."""
    width, height = SIZE_WH
    return np.random.default_rng(0).normal(size=(3, 1, 3, height, width)).astype(np.float32)


@pytest.fixture(scope="session")
def run_folder(
    tmp_path_factory: pytest.TempPathFactory, model_of: Callable[[str], Any], spec_of: Callable[..., ModelSpec]
) -> Path:
    """A finished run of efficientnet_lite0."""
    model = model_of("efficientnet_lite0")
    from recontrast_train.run import save_run, weights_bytes

    folder = tmp_path_factory.mktemp("runs") / "lite0"
    weights = weights_bytes(model)
    digest = hashlib.sha256(weights).hexdigest()
    save_run(folder, weights, spec_of(model.backbone_name, model.channels, weights_sha256=digest))
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve good and six scratched images in MVTec layout, without masks."""
    root = tmp_path_factory.mktemp("data") / "parts"
    line = SyntheticLine("brushed-metal", seed=0, size_wh=(100, 70), defect_rate=0.0)
    for kind, count in (("good", 12), ("scratch", 6)):
        folder = root / "test" / kind
        folder.mkdir(parents=True)
        for index in range(count):
            image = line.part(index + 100 * (kind != "good")).image.copy()
            if kind != "good":
                image[10 + index : 50, 20 : 24 + index] = 250
            write_image(folder / f"{index:02}.png", image)
    return root
