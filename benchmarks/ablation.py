"""What each option of a recipe is worth: one row an option, several seeds a row.

    python benchmarks/ablation.py magnetic_tile --out build/ablation --set iterations=150 --held-out held-out.txt

Some good training images are kept from training (``--held-out``: a list of them, one path a line; choose whole parts).
They and copies of them with pasted defects, drawn by other code than training's pseudo-defects, are the validation that
options are chosen by. The test set stands beside it for the record.

Rows that change training are trained anew with every seed. Rows that change only how an image is judged use the models
of the first row. A row and seed that has finished is not run again, so several processes may share the work by
``--rows``. ``--out`` gets one JSON file a row and seed, and ``ablation.md`` of all rows that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from study import exit_code, percent_and_spread, publish

from recontrast_edge.datasets import GOOD, Dataset, Sample, find_dataset, read_sample
from recontrast_edge.doctor import published_facts
from recontrast_edge.engines import Inference
from recontrast_edge.errors import UsageError
from recontrast_edge.evaluation import Scorer, evaluate
from recontrast_edge.images import atomic_write, read_image
from recontrast_edge.preprocess import Image, preprocess
from recontrast_edge.scoring import fold_maps, image_scores, level_distances, weighted
from recontrast_edge.spec import ModelSpec, Scoring
from recontrast_export.defects import paste_defect
from recontrast_train.model import ReContrast
from recontrast_train.recipe import Recipe, load_recipe, parse_settings
from recontrast_train.run import load_run
from recontrast_train.score import TorchScorer
from recontrast_train.training import TrainOptions, train

Floats = NDArray[np.float32]

MIRRORINGS: tuple[tuple[int, ...], ...] = ((), (2,), (1,), (1, 2))
"""Axes of (N, h, w) that an image is mirrored along."""

POSITION_IMAGES = 200
"""Good training images that each position's mean and deviation are taken from."""


@dataclass(frozen=True)
class Parts:
    """What a network says of one image before any scoring rule, for each of ``MIRRORINGS``, mirrored back.

    Attributes:
        distances: (mirrorings, h_l, w_l) a level, views added.
        probability: (mirrorings, h_0, w_0) of a defect.
    """

    distances: tuple[Floats, ...]
    probability: Floats


@dataclass(frozen=True)
class Judge:
    """A rule of scoring: the recipe's, with what is changed.

    Attributes:
        scoring: fields of ``Scoring`` to replace.
        mirrorings: how many of ``MIRRORINGS`` a map is the mean of.
        alike: levels as they are, not standardised, and all three of them.
        by_position: distances as deviations from good images' mean at the same position.
    """

    scoring: dict[str, Any] = field(default_factory=dict)
    mirrorings: int = 1
    alike: bool = False
    by_position: bool = False


@dataclass(frozen=True)
class Row:
    """One option: what differs from the first row.

    Attributes:
        overrides: options of the recipe.
        letterbox: images keep their proportions; the rest is filled by reflection.
        tiled: images are enlarged to 7/4 and cut into four tiles of the recipe's size that share a quarter of it.
        judge: None for the first row's rule, with a training of its own.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    letterbox: bool = False
    tiled: bool = False
    judge: Judge | None = None


BASE = "recipe"
ROWS = {
    BASE: Row(),
    "average of the weights (ema 0.98)": Row({"ema": 0.98}),
    "lower rate for the last 40 %": Row({"lr_drop_at": 0.6}),
    "320x320": Row({"size_wh": (320, 320)}),
    "letterboxed": Row(letterbox=True),
    "no variations": Row({"mirror_x": False, "mirror_y": False, "shift": 0.0, "stretch": 0.0, "exposure_stops": 0.0}),
    "no discriminator": Row({"discriminator": False}),
    "no pseudo-defects": Row({"discriminator": False, "pseudo_defects": 0.0}),
    "the paper's encoder rate (1e-5)": Row({"lr_encoder": 1e-5}),
    "the paper's mining (alpha to 1)": Row({"alpha_end": 1.0}),
    "judged: distances alone": Row(judge=Judge({"discriminator_weight": 0.0})),
    "judged: discriminator alone": Row(judge=Judge({"level_weights": (0.0, 0.0, 0.0)})),
    "judged: all levels as they are": Row(judge=Judge(alike=True)),
    "judged: mean of the largest 1 %": Row(judge=Judge({"rule": "top", "top_fraction": 0.01})),
    "judged: mean of the largest 0.2 %": Row(judge=Judge({"rule": "top", "top_fraction": 0.002})),
    "judged: mean over four mirrorings": Row(judge=Judge(mirrorings=4)),
    "judged: against each position's good values": Row(judge=Judge(by_position=True)),
    "four overlapping tiles": Row(tiled=True),
}


class Network:
    """A trained model whose outputs are kept, because several rules judge them.

    Args:
        model: in eval mode.
        spec: of the model.
    """

    def __init__(self, model: ReContrast, spec: ModelSpec) -> None:
        self.model = model
        self.spec = spec
        self._known: dict[bytes, Parts] = {}

    def parts(self, image: Image, mirrorings: int) -> Parts:
        """Of one uint8 image."""
        key = image.tobytes()
        known = self._known.get(key)
        if known is None or len(known.probability) < mirrorings:
            known = self._known[key] = self._computed(image, mirrorings)
        return known

    def _computed(self, image: Image, mirrorings: int) -> Parts:
        tensor = torch.from_numpy(preprocess(image, self.spec.input))
        axes = MIRRORINGS[:mirrorings]
        with torch.inference_mode():
            pairs = self.model(torch.stack([tensor.flip(axis) for axis in axes]))
            probability = torch.zeros(len(axes), *pairs[0][0][0].shape[2:])
            if self.model.discriminator is not None:
                probability = torch.sigmoid(self.model.discriminate(pairs))[:, 0]
        arrays = [[(a.numpy(), b.numpy()) for a, b in view] for view in pairs]
        return Parts(
            tuple(_mirrored_back(level, axes) for level in level_distances(arrays)),
            _mirrored_back(probability.numpy(), axes),
        )


def _mirrored_back(maps: Floats, axes: Sequence[tuple[int, ...]]) -> Floats:
    """Each of (N, h, w) by its own axes; those count from 1, as for (N, h, w)."""
    return np.stack([np.flip(each, [axis - 1 for axis in own]) for each, own in zip(maps, axes, strict=True)])


def scorer(network: Network, judge: Judge, positions: Sequence[tuple[Floats, Floats]] | None) -> Scorer:
    """Judges images by a rule.

    Args:
        positions: mean and deviation of each level's distances, each (h_l, w_l), for a rule ``by_position``.
    """
    spec = network.spec
    scoring = spec.scoring.model_copy(update=judge.scoring)
    if judge.alike:
        scoring = scoring.model_copy(update={"level_weights": None, "discriminator_weight": 0.0})
    if network.model.discriminator is None:
        scoring = scoring.model_copy(update={"discriminator_weight": None})

    def map_of(image: Image) -> Floats:
        parts = network.parts(image, judge.mirrorings)
        distances = [level[: judge.mirrorings] for level in parts.distances]
        used = scoring
        if judge.by_position:
            assert positions is not None
            distances = [
                (level - mean) / deviation for level, (mean, deviation) in zip(distances, positions, strict=True)
            ]
            used = scoring.model_copy(update={"level_weights": _ones(scoring)})
        probability = parts.probability[: judge.mirrorings] if used.discriminator_weight is not None else None
        maps = fold_maps(weighted(distances, used, probability), spec.input.size_wh, used.blur_sigma)
        mean: Floats = maps.mean(axis=0)
        return mean

    def judged(images: Sequence[Image]) -> Inference:
        maps = np.stack([map_of(image) for image in images])
        return Inference(maps, image_scores(maps, scoring), {})

    return judged


def _ones(scoring: Scoring) -> tuple[float, ...] | None:
    """1 for each level that counts: a deviation by position is standardised already."""
    weights = scoring.level_weights
    return None if weights is None else tuple(float(weight > 0) for weight in weights)


def position_statistics(network: Network, samples: Sequence[Sample]) -> list[tuple[Floats, Floats]]:
    """Mean and standard deviation of each level's distances over good images, for each position."""
    chosen = np.linspace(0, len(samples) - 1, min(len(samples), POSITION_IMAGES)).round().astype(int)
    parts = [network.parts(read_image(samples[index].path), 1).distances for index in chosen]
    levels = [np.concatenate(level) for level in zip(*parts, strict=True)]
    return [(level.mean(axis=0), np.maximum(level.std(axis=0), 1e-6)) for level in levels]


def validation_set(held_out: Sequence[Sample], folder: Path) -> list[Sample]:
    """Held-out good images, and a copy of each with a pasted defect, written to ``folder``."""
    samples = [Sample(sample.path) for sample in held_out]
    for index, sample in enumerate(held_out):
        image, mask = paste_defect(read_image(sample.path), index=index)
        paths = folder / f"{index:04d}.png", folder / f"{index:04d}_mask.png"
        for path, pixels in zip(paths, (image, mask.astype(np.uint8) * 255), strict=True):
            with atomic_write(path) as file:
                file.write(cv2.imencode(".png", pixels)[1].tobytes())
        samples.append(Sample(paths[0], "pasted", (paths[1],)))
    return samples


def letterboxed(samples: Sequence[Sample], folder: Path, side: int) -> tuple[Sample, ...]:
    """Square copies that keep the images' proportions, in ``folder``."""
    out = []
    for index, sample in enumerate(samples):
        image, mask = read_sample(sample)
        scale = side / max(image.shape[:2])
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        border = (0, side - size[1], 0, side - size[0], cv2.BORDER_REFLECT_101)
        path = folder / f"{index:04d}.png"
        square = cv2.copyMakeBorder(cv2.resize(image, size, interpolation=cv2.INTER_AREA), *border)
        with atomic_write(path) as file:
            file.write(cv2.imencode(".png", square)[1].tobytes())
        masks: tuple[Path, ...] = ()
        if mask is not None and sample.kind != GOOD:
            small = cv2.resize(mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_NEAREST)
            padded = cv2.copyMakeBorder(small, 0, side - size[1], 0, side - size[0], cv2.BORDER_CONSTANT, value=0)
            masks = (path.with_stem(f"{path.stem}_mask"),)
            with atomic_write(masks[0]) as file:
                file.write(cv2.imencode(".png", padded)[1].tobytes())
        out.append(Sample(path, sample.kind, masks))
    return tuple(out)


@dataclass(frozen=True)
class Material:
    """The images of all rows: what is trained on, the validation and the test set."""

    training: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]

    @classmethod
    def of(cls, dataset: Dataset, held_out: Path, folder: Path) -> Material:
        """Split the training images, and paste defects.

        Raises:
            UsageError: the list names something that is no training image, or all of them.
        """
        listed = {sample.path.resolve() for sample in find_dataset(held_out).training_samples()}
        held = [sample for sample in dataset.training_samples() if sample.path.resolve() in listed]
        training = tuple(sample for sample in dataset.training_samples() if sample.path.resolve() not in listed)
        if len(held) != len(listed) or not training:
            raise UsageError(f"{held_out}: names {len(listed)} images, {len(held)} of them training images")
        return cls(training, tuple(validation_set(held, folder / "validation")), dataset.test_samples())

    def letterboxed(self, folder: Path, side: int) -> Material:
        """The same, in square copies."""
        return Material(
            letterboxed(self.training, folder / "training", side),
            letterboxed(self.validation, folder / "validation", side),
            letterboxed(self.test, folder / "test", side),
        )


def trained(row: Row, recipe: Recipe, dataset: Dataset, material: Material, folder: Path) -> Network:
    """A row's model; trained if it is not there yet."""
    subset = dataclasses.replace(dataset, train_good=material.training, test=())
    spec = train(TrainOptions(dataset.root, folder, overrides=options_of(row, recipe), resume=True), subset)
    model, _ = load_run(folder)
    return Network(model, spec)


def options_of(row: Row, recipe: Recipe) -> dict[str, Any]:
    """All that differs from the defaults, in a row."""
    options = {**recipe.model_dump(exclude_defaults=True), **row.overrides}
    if row.tiled:
        options |= {"resize_wh": [7 * side // 4 for side in recipe.size_wh], "tile_overlap": min(recipe.size_wh) // 4}
    return options


def run(
    name: str,
    seed: int,
    dataset: Dataset,
    material: Material,
    options: argparse.Namespace,
    networks: dict[Path, Network],
) -> dict[str, Any]:
    """Train and judge a row with one seed, or read what an earlier run found.

    Args:
        networks: by run folder, those that several rows judge.
    """
    row = ROWS[name]
    settings = {**parse_settings(options.set), "seed": seed}
    recipe = load_recipe(options.recipe, settings).for_class(dataset.name)
    path = options.out / f"row{list(ROWS).index(name):02d}-{seed}.json"
    identity = {
        "row": name,
        "seed": seed,
        "data": dataset.name,
        "recipe": Recipe.model_validate(options_of(row, recipe)).model_dump(mode="json"),
        "held_out": [sample.path.name for sample in material.validation if sample.is_good],
    }
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text())
        if all(known.get(key) == value for key, value in identity.items()):
            return known
        raise UsageError(f"{path}: holds a result of other options; give another --out")
    used = material
    if row.letterbox:
        used = material.letterboxed(options.out / "letterboxed", max(recipe.size_wh))
    source = ROWS[BASE] if row.judge is not None else row
    folder = options.out / (f"run00-{seed}" if source is ROWS[BASE] else path.stem.replace("row", "run"))
    network = networks.get(folder) or trained(source, recipe, dataset, used, folder)
    if source is ROWS[BASE]:
        networks[folder] = network
    judge = row.judge or Judge()
    positions = position_statistics(network, used.training) if judge.by_position else None
    tiled = network.spec.input.is_tiled
    judged = TorchScorer(network.model, network.spec) if tiled else scorer(network, judge, positions)
    record = identity
    for part, samples in (("validation", used.validation), ("test", used.test)):
        overall = evaluate(judged, samples, network.spec, progress=True).overall
        record[part] = {key: overall.named()[key].value for key in ("i_auroc", "aupro")}
    record["machine"] = published_facts()
    with atomic_write(path) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())
    return record


def table(records: Sequence[dict[str, Any]]) -> str:
    """Means with standard deviations over the seeds, as Markdown, in the order of ``ROWS``."""
    lines = [
        "| option | seeds | validation I-AUROC % | AUPRO % | test I-AUROC % | AUPRO % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in ROWS:
        rows = [record for record in records if record["row"] == name]
        cells = [
            percent_and_spread([row[part][key] for row in rows])
            for part in ("validation", "test")
            for key in ("i_auroc", "aupro")
        ]
        if rows:
            lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def all_rows(options: argparse.Namespace) -> None:
    """Measure what is missing, and write the table."""
    if not set(options.rows) <= set(range(len(ROWS))):
        raise UsageError(f"--rows: expected numbers from 0 to {len(ROWS) - 1}")
    dataset = find_dataset(options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    material = Material.of(dataset, options.held_out, options.out)
    for seed in options.seeds:
        networks: dict[Path, Network] = {}
        for index in options.rows:
            record = run(list(ROWS)[index], seed, dataset, material, options, networks)
            figures = f"{100 * record['validation']['i_auroc']:.2f} %, test {100 * record['test']['i_auroc']:.2f} %"
            print(f"{record['row']}, seed {seed}: I-AUROC {figures}", flush=True)
    publish(
        table([json.loads(path.read_text()) for path in sorted(options.out.glob("row*-*.json"))]),
        options.out / "ablation.md",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data set with a test set")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--held-out", type=Path, required=True, help="list of good training images to validate with")
    parser.add_argument("--recipe", default="edge")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="recipe option of all rows")
    parser.add_argument("--rows", nargs="+", type=int, default=list(range(len(ROWS))), help="numbers of rows, from 0")
    parser.add_argument("--seeds", nargs="+", type=int, default=[111, 112, 113])
    options = parser.parse_args()
    return exit_code(lambda: all_rows(options))


if __name__ == "__main__":
    sys.exit(main())
