"""ReContrast beside its peers on one data set: same backbone weights, same split, same metrics, several seeds.

    python benchmarks/accuracy.py magnetic_tile --out build/accuracy --recipe edge --seeds 111 112 113

Peers, written here as compactly as they allow:

- PatchCore (Roth et al., CVPR 2022): features at strides 8 and 16, averaged over 3x3, joined at stride 8; a memory bank
  of the good images' features thinned by greedy k-centre search; distance to the nearest entry.
- Reverse distillation (Deng and Li, CVPR 2022): a frozen encoder, bottleneck and decoder; cosine distances of the three
  levels, added. Same bottleneck and decoder as ReContrast's, the paper's optimiser.

All images of ``train/good`` are trained on, the last iteration counts, and nothing is chosen by the test images. Times
are of this machine, whatever else it was doing: compare them within one run only. A method and seed that has finished
is not run again. ``--out`` gets one JSON file a method and seed, and a table of means and standard deviations.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from study import exit_code, percent_and_spread, publish
from torch import Tensor, nn
from torch.nn import functional

from recontrast_edge.datasets import Dataset, find_dataset
from recontrast_edge.doctor import published_facts
from recontrast_edge.engines import Inference
from recontrast_edge.errors import UsageError
from recontrast_edge.evaluation import Evaluation, Scorer, evaluate
from recontrast_edge.images import atomic_write, read_image
from recontrast_edge.preprocess import Image, preprocess
from recontrast_edge.scoring import cosine_distance, fold_maps, image_scores
from recontrast_edge.spec import Level, ModelSpec
from recontrast_edge.tiling import infer_tiles
from recontrast_train.augmentation import Augmentation
from recontrast_train.backbones import backbone, load_weights
from recontrast_train.data import GoodImages, batches, make_loader
from recontrast_train.model import STRIDES, Decoder, FusionBottleneck
from recontrast_train.recipe import Recipe, load_recipe, parse_settings
from recontrast_train.run import load_run
from recontrast_train.score import TILES_AT_ONCE, TorchScorer
from recontrast_train.training import TrainOptions, input_spec, train

BANK_POOL = 60_000
"""Patches that the memory bank is chosen from: of all of them the search would take hours on a CPU."""
BANK_PATCHES = 6_000
PROJECTION = 64
"""Dimensions of the random projection in which the search measures distances, as in the authors' code 128."""
METRICS = ("i_auroc", "i_ap", "f1_max", "p_auroc", "p_ap", "aupro", "aupro_5")


@dataclasses.dataclass(frozen=True)
class Result:
    """One trained method: how it judges, and how long its training took, in seconds."""

    scorer: Scorer
    spec: ModelSpec
    train_s: float


Method = Callable[[Dataset, Recipe, Path], Result]


def timed_scorer(score: Callable[[Tensor], NDArray[np.float32]], spec: ModelSpec) -> Scorer:
    """A scorer from preprocessed images (N, 3, H, W) to maps (N, H, W)."""

    def scorer(images: Sequence[Image]) -> Inference:
        tensor = torch.from_numpy(np.stack([preprocess(image, spec.input.of_tile) for image in images]))
        with torch.inference_mode():
            maps = score(tensor)
        return Inference(maps, image_scores(maps, spec.scoring), {})

    if spec.input.is_tiled:
        return lambda images: infer_tiles(scorer, images, spec, batch=TILES_AT_ONCE)
    return scorer


def base_spec(dataset: Dataset, recipe: Recipe) -> ModelSpec:
    """The paper's scoring, for the peers: sum of the levels, sigma 4, maximum."""
    channels = backbone(recipe.backbone).channels
    levels = tuple(Level(stride=stride, channels=count) for stride, count in zip(STRIDES, channels, strict=True))
    return ModelSpec(
        class_name=dataset.name,
        backbone=recipe.backbone,
        input=input_spec(recipe),
        levels=levels,
        weights_sha256="0" * 64,
    )


def frozen_encoder(recipe: Recipe) -> nn.Module:
    encoder = backbone(recipe.backbone).build()
    load_weights(encoder, recipe.backbone, "imagenet")
    return encoder.eval().requires_grad_(False)


def recontrast(dataset: Dataset, recipe: Recipe, out: Path) -> Result:
    """As ``recontrast-edge train`` does it, but for the evaluation."""
    started = time.perf_counter()
    overrides = recipe.model_dump(exclude_defaults=True)
    untested = dataclasses.replace(dataset, test=())
    spec = train(TrainOptions(dataset.root, out, overrides=overrides, resume=True), untested)
    seconds = time.perf_counter() - started
    model, _ = load_run(out)
    return Result(TorchScorer(model, spec), spec, seconds)


def patchcore(dataset: Dataset, recipe: Recipe, out: Path) -> Result:
    spec = base_spec(dataset, recipe)
    encoder = frozen_encoder(recipe)
    rng = np.random.default_rng(recipe.seed)
    started = time.perf_counter()

    def patches(images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, h, w, C) at stride 8."""
        _, middle, coarse = (functional.avg_pool2d(level.float(), 3, 1, 1) for level in encoder(images))
        coarse = functional.interpolate(coarse, middle.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([middle, coarse], dim=1).permute(0, 2, 3, 1)

    images = GoodImages([sample.path for sample in dataset.train_good], spec.input)
    pool = []
    for index in range(len(images)):
        with torch.inference_mode():
            flat = patches(images[index][None]).flatten(0, 2)
        share = min(len(flat), -(-BANK_POOL // len(images)))
        pool.append(flat[torch.from_numpy(rng.choice(len(flat), share, replace=False))])
    candidates = torch.cat(pool)
    bank = candidates[k_centres(candidates, min(BANK_PATCHES, len(candidates)), rng)]
    squares = bank.square().sum(1)
    seconds = time.perf_counter() - started

    def score(images: Tensor) -> NDArray[np.float32]:
        query = patches(images)
        flat = query.flatten(0, 2)
        distances = flat.square().sum(1, keepdim=True) + squares - 2 * flat @ bank.T
        nearest = distances.min(dim=1).values.clamp_min(0).sqrt().reshape(query.shape[:3])
        return fold_maps([nearest.numpy()], spec.input.size_wh, spec.scoring.blur_sigma)

    return Result(timed_scorer(score, spec), spec, seconds)


def k_centres(points: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Indices of a subset that is near to every point: each pick is the point farthest from all picks so far."""
    projection = torch.from_numpy(rng.standard_normal((points.shape[1], PROJECTION)).astype(np.float32))
    small = points @ (projection / PROJECTION**0.5)
    picks = [int(rng.integers(len(small)))]
    farthest = (small - small[picks[0]]).square().sum(1)
    for _ in range(count - 1):
        picks.append(int(farthest.argmax()))
        torch.minimum(farthest, (small - small[picks[-1]]).square().sum(1), out=farthest)
    return torch.tensor(picks)


class ReverseDistillation(nn.Module):
    """Frozen features from a bottleneck of themselves."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        entry = backbone(recipe.backbone)
        self.encoder = frozen_encoder(recipe)
        width = entry.bottleneck_channels
        self.bottleneck = FusionBottleneck(entry.channels, width, entry.block, entry.blocks[0], entry.base_width)
        blocks = (entry.blocks[1], entry.blocks[2], entry.blocks[3])
        self.decoder = Decoder(width, entry.channels, entry.block, blocks, entry.base_width)

    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        with torch.no_grad():
            targets = self.encoder(images)
        return list(zip(targets, self.decoder(self.bottleneck(targets)), strict=True))


def reverse_distillation(dataset: Dataset, recipe: Recipe, out: Path) -> Result:
    spec = base_spec(dataset, recipe)
    torch.manual_seed(recipe.seed)
    model = ReverseDistillation(recipe)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = GoodImages([sample.path for sample in dataset.train_good], spec.input)
    parameters = [*model.bottleneck.parameters(), *model.decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=5e-3, betas=(0.5, 0.999))
    order = batches(len(images), recipe.batch, seed=recipe.seed, start=0, stop=recipe.iterations)
    plain = Recipe(backbone=recipe.backbone, size_wh=recipe.size_wh)
    started = time.perf_counter()
    model.train()
    model.encoder.eval()
    for batch in make_loader(Augmentation(images, plain), order, start=0, workers=0, pin=False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
            pairs = model(batch.clean.contiguous(memory_format=torch.channels_last))
        cosines = [functional.cosine_similarity(t.float().flatten(1), r.float().flatten(1)) for t, r in pairs]
        loss = torch.stack([(1 - cosine).mean() for cosine in cosines]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    model.eval()

    def score(tensor: Tensor) -> NDArray[np.float32]:
        distances = [cosine_distance(t.numpy(), r.numpy()) for t, r in model(tensor)]
        return fold_maps(distances, spec.input.size_wh, spec.scoring.blur_sigma)

    return Result(timed_scorer(score, spec), spec, seconds)


METHODS: dict[str, Method] = {
    "recontrast": recontrast,
    "patchcore": patchcore,
    "reverse-distillation": reverse_distillation,
}


def run(name: str, dataset: Dataset, recipe: Recipe, out: Path) -> dict[str, Any]:
    """Train and evaluate one method with one seed, or read what an earlier run found."""
    path = out / f"{name}-{recipe.seed}.json"
    identity = {"method": name, "data": dataset.name, "recipe": recipe.model_dump(mode="json")}
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text())
        if all(known.get(key) == value for key, value in identity.items()):
            return known
        raise UsageError(f"{path}: holds a result of other options; give another --out")
    result = METHODS[name](dataset, recipe, out / f"{name}-{recipe.seed}")
    evaluation = evaluate(result.scorer, dataset.test_samples(), result.spec, progress=True)
    record = {
        **identity,
        "train_s": round(result.train_s, 1),
        "infer_ms": infer_ms(result.scorer, dataset),
        **measured(evaluation),
        "machine": published_facts(),
    }
    with atomic_write(path) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())
    return record


def measured(evaluation: Evaluation) -> dict[str, Any]:
    overall = {key: metric.value for key, metric in evaluation.overall.named().items() if key in METRICS}
    kinds = {
        kind: {key: metric.value for key, metric in metrics.named().items() if key in METRICS}
        for kind, metrics in evaluation.kinds.items()
    }
    return {"metrics": overall, "kinds": kinds}


def infer_ms(scorer: Scorer, dataset: Dataset) -> dict[str, float]:
    """Milliseconds of one image at a time in PyTorch, preprocessing included: median and quartiles of 20."""
    images = [read_image(sample.path) for sample in dataset.test_samples()[:20]]
    scorer(images[:1])
    times = []
    for image in images:
        started = time.perf_counter()
        scorer([image])
        times.append((time.perf_counter() - started) * 1e3)
    low, median, high = np.percentile(times, (25, 50, 75))
    return {"p25": round(low, 2), "p50": round(median, 2), "p75": round(high, 2)}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Means with standard deviations over the seeds, as Markdown."""
    lines = [
        "| method | seeds | I-AUROC % | P-AUROC % | AUPRO % | AUPRO 5 % | train s | ms an image |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    for name in dict.fromkeys(record["method"] for record in records):
        rows = [record for record in records if record["method"] == name]
        cells = [
            percent_and_spread([row["metrics"][key] for row in rows])
            for key in ("i_auroc", "p_auroc", "aupro", "aupro_5")
        ]
        seconds = f"{np.median([row['train_s'] for row in rows]):.0f}"
        milliseconds = f"{np.median([row['infer_ms']['p50'] for row in rows]):.0f}"
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} | {seconds} | {milliseconds} |")
    kinds = list(dict.fromkeys(kind for record in records for kind in record["kinds"]))
    lines += ["", f"| I-AUROC % | {' | '.join(kinds)} |", f"| --- |{' ---: |' * len(kinds)}"]
    for name in dict.fromkeys(record["method"] for record in records):
        rows = [record for record in records if record["method"] == name]
        cells = [percent_and_spread([row["kinds"][kind]["i_auroc"] for row in rows]) for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def all_rows(options: argparse.Namespace) -> None:
    """Measure what is missing, and write the table."""
    dataset = find_dataset(options.data)
    records = []
    for seed in options.seeds:
        recipe = load_recipe(options.recipe, {**parse_settings(options.set), "seed": seed}).for_class(dataset.name)
        options.out.mkdir(parents=True, exist_ok=True)
        for name in options.methods:
            record = run(name, dataset, recipe, options.out)
            records.append(record)
            print(f"{name}, seed {seed}: I-AUROC {100 * record['metrics']['i_auroc']:.2f} %", flush=True)
    publish(table(records), options.out / "table.md")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data set with a test set")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--recipe", default="edge", help="ReContrast's; the peers take size, batch and iterations")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="recipe option")
    parser.add_argument("--seeds", nargs="+", type=int, default=[111, 112, 113])
    options = parser.parse_args()
    return exit_code(lambda: all_rows(options))


if __name__ == "__main__":
    sys.exit(main())
