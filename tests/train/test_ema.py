"""Averaged weights against a slow float64 sum over every iteration's weights."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from recontrast_edge.errors import UsageError  # noqa: E402
from recontrast_edge.spec import InputSpec  # noqa: E402
from recontrast_train.data import GoodImages  # noqa: E402
from recontrast_train.ema import WeightAverage  # noqa: E402
from recontrast_train.fit import fit  # noqa: E402
from recontrast_train.model import ReContrast  # noqa: E402
from recontrast_train.recipe import Recipe, load_recipe  # noqa: E402

SIZE = 64
INPUT = InputSpec(size_wh=(SIZE, SIZE), resize_wh=(SIZE, SIZE), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
RECIPE = Recipe(
    backbone="efficientnet_lite0",
    size_wh=(SIZE, SIZE),
    iterations=4,
    batch=2,
    lr_encoder=1e-3,
    pseudo_defects=0.5,
    discriminator=True,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> GoodImages:
    folder = tmp_path_factory.mktemp("good")
    rng = np.random.default_rng(0)
    for index in range(3):
        cv2.imwrite(str(folder / f"{index}.png"), rng.normal(120, 8, (SIZE, SIZE)).clip(0, 255).astype(np.uint8))
    return GoodImages(sorted(folder.iterdir()), INPUT)


def trained(images: GoodImages, folder: Path, ema: float):  # type: ignore[no-untyped-def]
    """The trained model's state, and the state after each iteration."""
    torch.manual_seed(0)
    model = ReContrast(RECIPE.backbone, discriminator=True)
    states = []

    def keep(iteration: int, loss: float | None) -> None:
        states.append({key: value.clone() for key, value in model.state_dict().items()})

    recipe = RECIPE.model_copy(update={"ema": ema})
    fit(model, images, recipe, checkpoint=folder / "c", fingerprint="", on_iteration=keep)
    return model, states


def test_the_average_is_the_weighted_sum_of_all_iterations(images: GoodImages, tmp_path: Path) -> None:
    decay = 0.7
    model, states = trained(images, tmp_path, decay)
    weights = np.array([(1 - decay) * decay ** (RECIPE.iterations - i) for i in range(1, RECIPE.iterations + 1)])
    weights /= weights.sum()
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name.split(".")[0] for name in trainable} == {"encoder", "bottleneck", "decoder", "heads", "discriminator"}
    for name, value in model.state_dict().items():
        if name not in trainable:
            assert torch.equal(value, states[-1][name]), name
            continue
        expected = sum(weight * state[name].double() for weight, state in zip(weights, states, strict=True))
        assert torch.allclose(value.double(), expected, rtol=1e-5, atol=1e-7), name
        assert not torch.equal(value, states[-1][name]), name


def test_averaging_leaves_the_training_itself_alone(images: GoodImages, tmp_path: Path) -> None:
    plain, plain_states = trained(images, tmp_path, 0.0)
    _, averaged_states = trained(images, tmp_path, 0.9)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, plain_states[-1][name]), name
        assert torch.equal(value, averaged_states[-1][name]), name


def test_after_one_iteration_the_average_is_its_weights() -> None:
    layer = torch.nn.Linear(3, 2)
    average = WeightAverage(layer, 0.999)
    with torch.no_grad():
        layer.weight.add_(1)
    average.update(1)
    assert torch.equal(average.state_dict()["weight"], layer.weight)
    with pytest.raises(KeyError, match="bias"):
        average.load_state_dict({"weight": torch.zeros(2, 3)})


def test_a_decay_of_one_is_refused() -> None:
    with pytest.raises(UsageError, match="ema"):
        load_recipe("default", {"ema": 1.0})
