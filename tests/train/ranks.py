"""Trainings whose result must not depend on how many processes share them; run by ``test_distributed.py``.

torchrun --standalone --nproc-per-node 2 tests/train/ranks.py GOOD CATEGORIES OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from recontrast_edge.errors import RecontrastError
from recontrast_edge.spec import InputSpec
from recontrast_train.campaign import CATEGORIES_FILE, train_all
from recontrast_train.data import GoodImages
from recontrast_train.distributed import process_group, rank
from recontrast_train.fit import fit
from recontrast_train.model import ReContrast
from recontrast_train.recipe import Recipe
from recontrast_train.training import TrainOptions

SIZE = 64
INPUT = InputSpec(size_wh=(SIZE, SIZE), resize_wh=(SIZE, SIZE), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
# With eps 1 a step of Adam is nearly the gradient; with the usual one it is nearly its sign, which makes a whole step
# of the last bit of a gradient near 0. Steps are small, so that rounding is not multiplied from step to step.
COMMON = {
    "backbone": "efficientnet_lite0",
    "size_wh": (SIZE, SIZE),
    "iterations": 3,
    "batch": 4,
    "eps": 1.0,
    "lr_encoder": 0.01,
    "lr_decoder": 0.01,
    "lr_discriminator": 0.01,
}
# Batch statistics of so few values multiply rounding, and later steps would differ by more than a wrong gradient does.
ONE_STEP = {**COMMON, "iterations": 1}
RECIPES = {
    "plain": Recipe(**COMMON, encoder_bn="eval"),
    "encoder-bn-train": Recipe(**ONE_STEP, encoder_bn="train"),
    # One altered image: the second process has none.
    "pseudo-defects": Recipe(**COMMON, encoder_bn="eval", pseudo_defects=0.25, mirror_x=True, ema=0.9),
    "discriminator": Recipe(**ONE_STEP, encoder_bn="eval", pseudo_defects=0.75, discriminator=True),
}


def train(recipe: Recipe, paths: list[Path], checkpoint: Path) -> tuple[ReContrast, list[float]]:
    torch.manual_seed(0)
    model = ReContrast(recipe.backbone, encoder_bn=recipe.encoder_bn, discriminator=recipe.discriminator)
    # Random weights blow features up, and rounding errors with them.
    model.load_encoder_weights("imagenet")
    fitted = fit(model, GoodImages(paths, INPUT), recipe, checkpoint=checkpoint, fingerprint="")
    return model, fitted.losses


def main(good: Path, categories: Path, out: Path) -> None:
    torch.set_num_threads(1)
    paths = sorted(good.iterdir())
    with process_group(torch.device("cpu")):
        for name, recipe in RECIPES.items():
            model, losses = train(recipe, paths, out / "checkpoint")
            if rank() == 0:
                weights = {key: value.contiguous() for key, value in model.state_dict().items()}
                save_file(weights, out / f"{name}.safetensors", metadata={"losses": json.dumps(losses)})
        for name, failing, images in (
            ("indivisible", Recipe(**{**COMMON, "batch": 3}), paths),
            # Only one of the two processes meets it.
            ("damaged", Recipe(**{**COMMON, "batch": 2, "iterations": 1}), [paths[0], good.parent / "none.png"]),
        ):
            try:
                train(failing, images, out / "checkpoint")
            except RecontrastError as error:
                (out / f"{name}-{rank()}").write_text(f"{type(error).__name__}: {error}")
    options = {"backbone": "efficientnet_lite0", "size_wh": [SIZE, SIZE], "iterations": 1, "batch": 2}
    try:
        train_all(TrainOptions(categories, out / "runs", overrides=options, weights="random", device="cpu"))
    except RecontrastError:
        (out / f"categories-{rank()}").write_text((out / "runs" / CATEGORIES_FILE).read_text())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
