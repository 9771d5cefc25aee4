"""How good a model is that was trained on few good images, or on images that are not all good.

    python benchmarks/fewshot.py magnetic_tile --out build/fewshot --recipe edge --part 'num_(\\d+)' --part-gap 100

For each seed, the training images are shuffled once; a row with n images has the first n of them, so each row adds to
the one before. With ``--part``, images of one part stay together, so that 10 images are not one part photographed ten
times: the first n are taken after the parts were shuffled, one image of each part in turn.

Dirty rows have all training images, of which a share is replaced by defective test images. As many as the dirtiest row
needs are drawn, one part after the other with all of its images, and those parts are taken out of the test set of every
row, so that all rows are tested on the same images and never on a part that was trained on. Dirty rows also say how
``train --suspects`` ranks what was slipped in, before training and after it, as average precision: 1 where all of it
comes first.

The last iteration counts, nothing is chosen by the test images. A row that has finished is not run again, one that was
stopped goes on. ``--out`` gets one JSON file a row and seed, ``fewshot.json``, ``fewshot.md`` and ``fewshot.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from study import exit_code, percent_and_spread, publish

from recontrast_edge.datasets import Dataset, Sample, find_dataset, parts_of
from recontrast_edge.doctor import published_facts
from recontrast_edge.errors import InputError, UsageError
from recontrast_edge.evaluation import Scorer, evaluate, score_samples
from recontrast_edge.images import atomic_write
from recontrast_edge.metrics import average_precision
from recontrast_edge.spec import ModelSpec, PartNames
from recontrast_train.backbones import backbone, load_weights
from recontrast_train.data import GoodImages
from recontrast_train.recipe import Recipe, load_recipe, parse_settings
from recontrast_train.run import load_run
from recontrast_train.score import TorchScorer
from recontrast_train.suspects import rank_suspects, with_model
from recontrast_train.training import TrainOptions, input_spec, train

METRICS = ("i_auroc", "p_auroc", "aupro")


@dataclass(frozen=True)
class Row:
    """One training set: how many images, and the share of them that is defective."""

    count: int
    dirty: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.count}-dirty{100 * self.dirty:g}" if self.dirty else f"{self.count}"

    @property
    def defects(self) -> int:
        return round(self.dirty * self.count)


def shuffled(samples: Sequence[Sample], names: PartNames | None, rng: np.random.Generator) -> list[Sample]:
    """In random order, the parts' first images before their second ones."""
    parts = by_part(samples, names)
    for images in parts.values():
        rng.shuffle(images)  # type: ignore[arg-type]
    order = [list(parts.values())[index] for index in rng.permutation(len(parts))]
    return [images[turn] for turn in range(max(map(len, order))) for images in order if turn < len(images)]


def by_part(samples: Sequence[Sample], names: PartNames | None) -> dict[str, list[Sample]]:
    parts: dict[str, list[Sample]] = defaultdict(list)
    for part, sample in zip(parts_of(samples, names), samples, strict=True):
        parts[part].append(sample)
    return parts


def slipped_in(
    test: Sequence[Sample], count: int, names: PartNames | None, rng: np.random.Generator
) -> tuple[list[Sample], tuple[Sample, ...]]:
    """Defective images to train on by mistake, and the test set without any image of their parts.

    Raises:
        InputError: the test set would be left without defects.
    """
    if not count:
        return [], tuple(test)
    defects = [sample for sample in test if not sample.is_good]
    parts = list(by_part(defects, names).values())
    drawn = [sample for index in rng.permutation(len(parts)) for sample in parts[index]][:count]
    chosen = {sample.path for sample in drawn}
    # Of all test images together: where parts are runs of numbers, they depend on what else is there.
    groups = by_part(test, names).values()
    taken = {sample.path for images in groups if any(each.path in chosen for each in images) for sample in images}
    left = tuple(sample for sample in test if sample.path not in taken)
    if len(drawn) < count or all(sample.is_good for sample in left) or not any(sample.is_good for sample in left):
        raise InputError(
            f"{count} defective images are to be slipped in, but the test set has {len(defects)} and must keep some; "
            "give smaller shares for --dirty"
        )
    return drawn, left


def run(row: Row, seed: int, dataset: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one row with one seed, or read what an earlier run found."""
    recipe = load_recipe(options.recipe, {**parse_settings(options.set), "seed": seed}).for_class(dataset.name)
    names = None if options.part is None else PartNames(pattern=options.part, gap=options.part_gap)
    path = options.out / f"{row.name}-seed{seed}.json"
    identity = {
        "data": dataset.name,
        "part": None if names is None else names.model_dump(),
        "slipped_in_at_most": max_defects(dataset, options),
        "recipe": recipe.model_dump(mode="json"),
    }
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text())
        if all(known.get(key) == value for key, value in identity.items()):
            return known
        raise UsageError(f"{path}: holds a result of other options; give another --out")
    rng = np.random.default_rng([seed, 5])
    good = shuffled(dataset.training_samples(), names, rng)
    defects, test = slipped_in(dataset.test_samples(), max_defects(dataset, options), names, rng)
    chosen = [*good[: row.count - row.defects], *defects[: row.defects]]
    # Training takes every image for good.
    subset = dataclasses.replace(dataset, train_good=tuple(Sample(sample.path) for sample in chosen), test=())
    folder = options.out / f"{row.name}-seed{seed}"
    spec = train(
        TrainOptions(
            dataset.root, folder, overrides=recipe.model_dump(exclude_defaults=True), resume=True, device=options.device
        ),
        subset,
    )
    model, _ = load_run(folder)
    device = torch.device("cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu")
    scorer = TorchScorer(model.to(device), spec)
    evaluation = evaluate(scorer, test, spec, progress=True)
    before, after = (
        suspects_precision(recipe, chosen, row.defects, names, scorer, spec) if row.defects else (None, None)
    )
    record = {
        **identity,
        "row": dataclasses.asdict(row),
        "seed": seed,
        "n_test_good": sum(sample.is_good for sample in test),
        "n_test_defect": sum(not sample.is_good for sample in test),
        "metrics": {key: evaluation.overall.named()[key].value for key in METRICS},
        "suspects_ap": before,
        "suspects_ap_with_model": after,
        "machine": published_facts(),
    }
    with atomic_write(path) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())
    return record


def suspects_precision(
    recipe: Recipe, chosen: Sequence[Sample], defects: int, names: PartNames | None, scorer: Scorer, spec: ModelSpec
) -> tuple[float, float]:
    """Average precision of the ranking before and after training, where the last ``defects`` images were slipped in."""
    entry = backbone(recipe.backbone)
    encoder = entry.build()
    load_weights(encoder, recipe.backbone, "imagenet")
    images = GoodImages([sample.path for sample in chosen], input_spec(recipe))
    parts = parts_of(chosen, names)
    known = parts if len(set(parts)) < len(parts) else None
    ranked = rank_suspects(encoder.eval(), images, parts=known, seed=recipe.seed)
    scored = score_samples(scorer, [Sample(suspect.path) for suspect in ranked], spec, progress=True)
    again = with_model(ranked, [float(each.score) for each in scored])
    slipped_in = {sample.path for sample in chosen[len(chosen) - defects :]}
    before, after = (
        average_precision(
            -np.arange(len(order), dtype=np.float64), np.array([suspect.path in slipped_in for suspect in order])
        )
        for order in (ranked, again)
    )
    return before, after


def max_defects(dataset: Dataset, options: argparse.Namespace) -> int:
    return max((Row(len(dataset.train_good), share).defects for share in options.dirty), default=0)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Means with standard deviations over the seeds, as Markdown."""
    lines = [
        "| training images | defective among them | seeds | I-AUROC % | P-AUROC % | AUPRO % "
        "| suspects AP % | after training |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row, rows in grouped(records).items():
        values = [[record["metrics"][key] for record in rows] for key in METRICS]
        values += [[record[key] for record in rows] for key in ("suspects_ap", "suspects_ap_with_model")]
        cells = " | ".join(percent_and_spread(each) for each in values)
        dirty = f"{row.defects} ({100 * row.dirty:g} %)" if row.dirty else "0"
        lines.append(f"| {row.count} | {dirty} | {len(rows)} | {cells} |")
    return "\n".join(lines) + "\n"


def grouped(records: Sequence[dict[str, Any]]) -> dict[Row, list[dict[str, Any]]]:
    rows: dict[Row, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        rows[Row(**record["row"])].append(record)
    return rows


def draw(records: Sequence[dict[str, Any]], data: str, path: Path) -> None:
    """I-AUROC against the number of good images, and against the share of defective ones."""
    rows = grouped(records)
    figure = Figure(figsize=(9, 4), layout="constrained")
    few, dirty = figure.subplots(1, 2, sharey=True)
    most = max(row.count for row in rows)
    clean = {row.count: values for row, values in rows.items() if not row.dirty}
    shares = {100 * row.dirty: values for row, values in rows.items() if row.count == most}
    for axes, points, label in ((few, clean, "good training images"), (dirty, shares, "defective among all, %")):
        x = sorted(points)
        scores = [[100 * record["metrics"]["i_auroc"] for record in points[each]] for each in x]
        deviations = [np.std(each, ddof=1) if len(each) > 1 else 0.0 for each in scores]
        axes.errorbar(x, [np.mean(each) for each in scores], deviations, marker="o", capsize=3, color="#2b7a78")
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    few.set(ylabel="I-AUROC, %", xscale="log")
    few.set_xticks(sorted(clean), [str(count) for count in sorted(clean)], minor=False)
    few.minorticks_off()
    figure.suptitle(f"{data}: mean and standard deviation over the seeds")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def all_rows(options: argparse.Namespace) -> None:
    """Measure what is missing, and write the table."""
    dataset = find_dataset(options.data)
    total = len(dataset.training_samples())
    if any(not 0 < share < 1 for share in options.dirty) or any(count < 2 for count in options.counts):
        raise UsageError("expected shares between 0 and 1 for --dirty, and 2 or more for --counts")
    rows = [Row(count) for count in sorted(set(options.counts)) if count < total] + [Row(total)]
    rows += [row for share in options.dirty if (row := Row(total, share)).defects]
    options.out.mkdir(parents=True, exist_ok=True)
    records = []
    for seed in options.seeds:
        for row in rows:
            records.append(run(row, seed, dataset, options))
            value = records[-1]["metrics"]["i_auroc"]
            print(f"{row.name} images, seed {seed}: I-AUROC {100 * value:.2f} %", flush=True)
    document = {"format": "recontrast-edge.fewshot", "version": 1, "rows": records}
    with atomic_write(options.out / "fewshot.json") as file:
        file.write((json.dumps(document, indent=2) + "\n").encode())
    draw(records, dataset.name, options.out / "fewshot.png")
    publish(table(records), options.out / "fewshot.md")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data set with a test set")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--recipe", default="edge")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="recipe option")
    parser.add_argument("--counts", nargs="*", type=int, default=[10, 25, 50, 100, 200], help="besides all images")
    parser.add_argument("--dirty", nargs="*", type=float, default=[0.01, 0.05, 0.1], help="shares of defective images")
    parser.add_argument("--part", metavar="REGEX", help="expression on the file name whose first group names the part")
    parser.add_argument("--part-gap", type=int, metavar="N", help="--part finds numbers; within N they are one part")
    parser.add_argument("--seeds", nargs="+", type=int, default=[111, 112, 113])
    parser.add_argument("--device", default="auto", help="auto or cpu")
    options = parser.parse_args()
    return exit_code(lambda: all_rows(options))


if __name__ == "__main__":
    sys.exit(main())
