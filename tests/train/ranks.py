"""Trainings whose result must not depend on how many processes share them; run by ``test_distributed.py``.

torchrun --standalone --nproc-per-node 2 tests/train/ranks.py JOB DATA OUT
"""

from __future__ import annotations

import json
import sys
import time
import weakref
from pathlib import Path

import torch
from safetensors.torch import save_file

from recontrast_edge.errors import RecontrastError
from recontrast_edge.spec import InputSpec
from recontrast_train.campaign import CATEGORIES_FILE, train_all
from recontrast_train.data import GoodImages
from recontrast_train.distributed import mean_over_ranks, process_group, rank
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


def recipes(good: Path, out: Path) -> None:
    paths = sorted(good.iterdir())
    with process_group(torch.device("cpu")):
        for name, recipe in RECIPES.items():
            model, losses = train(recipe, paths, out / "checkpoint")
            if rank() == 0:
                weights = {key: value.contiguous() for key, value in model.state_dict().items()}
                save_file(weights, out / f"{name}.safetensors", metadata={"losses": json.dumps(losses)})
        try:
            train(Recipe(**{**COMMON, "batch": 3}), paths, out / "checkpoint")
        except RecontrastError as error:
            (out / f"indivisible-{rank()}").write_text(f"{type(error).__name__}: {error}")
        (out / f"threads-during-{rank()}").write_text(str(gloo_threads()))
        values = torch.ones(3)
        held = weakref.ref(values)
        mean_over_ranks(values)
        del values
        # Gloo's thread has let go of it by then.
        time.sleep(0.5)
        (out / f"held-{rank()}").write_text(str(held() is not None))


def damaged(good: Path, out: Path) -> None:
    # Only one of the two processes meets it.
    paths = [next(good.iterdir()), good.parent / "none.png"]
    try:
        with process_group(torch.device("cpu")):
            train(Recipe(**{**COMMON, "batch": 2, "iterations": 1}), paths, out / "checkpoint")
    except RecontrastError as error:
        (out / f"damaged-{rank()}").write_text(f"{type(error).__name__}: {error}")


def categories(mvtec: Path, out: Path) -> None:
    options = {"backbone": "efficientnet_lite0", "size_wh": [SIZE, SIZE], "iterations": 1, "batch": 2}
    try:
        train_all(TrainOptions(mvtec, out / "runs", overrides=options, weights="random", device="cpu"))
    except RecontrastError:
        (out / f"categories-{rank()}").write_text((out / "runs" / CATEGORIES_FILE).read_text())


def gloo_threads() -> int:
    return [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")].count("pt_gloo_runloop")


# One process group a process: a second one would read the addresses of the first from torchrun's store.
JOBS = {"recipes": recipes, "damaged": damaged, "categories": categories}

if __name__ == "__main__":
    job, folder, results = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    JOBS[job](folder, results)
    (results / f"threads-{job}-{rank()}").write_text(str(gloo_threads()))
