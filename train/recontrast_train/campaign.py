"""Training on whatever the data are: one product, each category of a data set, or all of them together.

train_all(TrainOptions(data=Path("mvtec_anomaly_detection"), out=Path("runs/mvtec"), recipe="mvtec"))

Each category has a folder in the run folder; ``categories.json`` and ``categories.md`` hold the table of all of them.
"""

from __future__ import annotations

import json
from dataclasses import replace

from rich.console import Console

from recontrast_edge.categories import CategoryRow, CategoryTable, show_categories
from recontrast_edge.datasets import Dataset, find_dataset
from recontrast_edge.errors import InputError, ModelError, UsageError
from recontrast_edge.images import atomic_write
from recontrast_edge.report import METRIC_NAMES
from recontrast_train.distributed import all_or_none, choose_device, is_main, process_group
from recontrast_train.recipe import Published, RecipeFile, load_recipe
from recontrast_train.training import TrainOptions, check_out, read_metrics, train

CATEGORIES_FILE = "categories.json"
CATEGORIES_PAGE = "categories.md"


def train_all(options: TrainOptions, console: Console | None = None) -> None:
    """Train one model, one for each category, or one for all of them, as the data and the recipe say.

    A category whose images or whose training are at fault is left out of the table, and the others go on; what would
    hit all of them alike ends at once. With ``resume``, categories that had finished are not trained again.

    Raises:
        RecontrastError: as ``train``; of the first category that failed, once the others are done.
        TrainingStoppedError: stopped by Ctrl-C, SIGTERM or the deadline; ``resume`` goes on.
    """
    with process_group(choose_device(options.device)):
        # Names come from folders: no markup.
        _train_all(options, console or Console(stderr=True, quiet=not is_main(), markup=False))


def _train_all(options: TrainOptions, console: Console) -> None:
    dataset = find_dataset(options.data)
    recipe_file = load_recipe(options.recipe, options.overrides)
    if not dataset.categories:
        train(options, dataset, console)
        if dataset.test and recipe_file.published is not None:
            console.print(_published(recipe_file.published))
        return
    failures: dict[str, InputError | ModelError] = {}
    if recipe_file.common.unified:
        train(options, dataset, console)
    else:
        strangers = recipe_file.exceptions.keys() - {category.name for category in dataset.categories}
        if strangers:
            # A name that was mistyped would go unnoticed.
            console.print(
                f"note: the recipe has exceptions for classes that {dataset.name} has not: "
                f"{', '.join(sorted(strangers))}"
            )
        failures = _train_each(options, dataset, console)
    # The others wait: where one ends with an error, ``torchrun`` ends process 0 while that evaluates.
    with all_or_none():
        if is_main():
            _tabulate(options, dataset, recipe_file, failures)
    if failures:
        name, first = next(iter(failures.items()))
        raise type(first)(
            f"{len(failures)} of {len(dataset.categories)} categories failed, first {name}: {first}; "
            f"{'the others are trained, ' * (len(failures) < len(dataset.categories))}--resume tries these again"
        )


def _published(published: Published) -> str:
    metrics = published.metrics()
    figures = ", ".join(
        f"{label} {100 * metrics[name]:.2f} %" for name, label in METRIC_NAMES.items() if name in metrics
    )
    return f"Published: {figures} ({published.source})"


def _train_each(options: TrainOptions, dataset: Dataset, console: Console) -> dict[str, InputError | ModelError]:
    """Train the categories one after the other; returns what went wrong, by category."""
    if options.class_name is not None:
        raise UsageError(
            f"--class-name names one product, but {dataset.name} has {len(dataset.categories)} categories with names "
            "of their own"
        )
    each = [_for_category(options, category) for category in dataset.categories]
    # What is in the way of the last one shall not come out after a day.
    for category_options in each:
        check_out(category_options)
    failures: dict[str, InputError | ModelError] = {}
    for number, (category, category_options) in enumerate(zip(dataset.categories, each, strict=True), start=1):
        console.print(f"Category {number} of {len(each)}: {category.name}")
        try:
            train(category_options, category, console)
        except (InputError, ModelError) as error:
            failures[category.name] = error
            console.print(f"{category.name} failed: {error}")
    return failures


def _for_category(options: TrainOptions, category: Dataset) -> TrainOptions:
    suspects = options.suspects
    if suspects is not None:
        suspects = suspects.with_name(f"{suspects.stem}-{category.name}{suspects.suffix}")
    return replace(options, data=category.root, out=options.out / category.name, suspects=suspects)


def _tabulate(
    options: TrainOptions, dataset: Dataset, recipe_file: RecipeFile, failures: dict[str, InputError | ModelError]
) -> None:
    rows = []
    for category in dataset.categories:
        if category.name in failures:
            rows.append(CategoryRow(category.name, error=str(failures[category.name])))
        elif category.test and (metrics := read_metrics(options.out / category.name)):
            rows.append(CategoryRow.of(category.name, metrics))
    if not rows:
        return
    published = recipe_file.published
    table = CategoryTable(
        dataset.name,
        tuple(rows),
        published.metrics() if published else {},
        published.source if published else "",
    )
    document = {"recipe": options.recipe, "unified": recipe_file.common.unified, **table.to_json()}
    with atomic_write(options.out / CATEGORIES_FILE) as file:
        file.write((json.dumps(document, indent=2) + "\n").encode())
    with atomic_write(options.out / CATEGORIES_PAGE) as file:
        file.write(table.to_markdown().encode(errors="replace"))
    show_categories(table)
