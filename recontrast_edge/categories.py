"""Results of a data set with several categories: each one judged by itself, and the mean over them.

    evaluations = evaluate_categories(engine.infer, find_dataset(Path("mvtec")), engine.spec)
    show_categories(CategoryTable.of("mvtec", evaluations))

A category's good images are compared with its own defects only, as in the published tables, whether one model was
trained for all of them or one for each.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recontrast_edge.datasets import Dataset
from recontrast_edge.evaluation import Evaluation, Resolution, Scorer, evaluate
from recontrast_edge.report import METRIC_NAMES
from recontrast_edge.spec import ModelSpec

CATEGORIES_FORMAT = "recontrast-edge.categories"


def evaluate_categories(
    score: Scorer, dataset: Dataset, spec: ModelSpec, *, resolution: Resolution = "map", progress: bool = False
) -> dict[str, Evaluation]:
    """Judge each category's test set; arguments and errors as ``evaluation.evaluate``.

    Returns:
        The evaluations by the category's name.
    """
    return {
        category.name: evaluate(score, category.test_samples(), spec, resolution=resolution, progress=progress)
        for category in dataset.categories
    }


@dataclass(frozen=True)
class CategoryRow:
    """One category's result.

    Attributes:
        name: of the category.
        n_good, n_defect: test images.
        metrics: values 0 to 1 by name; None where undefined, for example without masks.
        error: why there is no result; None where there is one.
    """

    name: str
    n_good: int = 0
    n_defect: int = 0
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    error: str | None = None

    @classmethod
    def of(cls, name: str, evaluation: Mapping[str, Any]) -> CategoryRow:
        """From what ``Evaluation.to_json`` gives."""
        return cls(name, evaluation["n_good"], evaluation["n_defect"], dict(evaluation["metrics"]))


@dataclass(frozen=True)
class CategoryTable:
    """All categories' results.

    Attributes:
        data: name of the data set.
        rows: one a category.
        published: the mean over the categories that was reported elsewhere, by metric.
        source: where it was reported.
    """

    data: str
    rows: tuple[CategoryRow, ...]
    published: Mapping[str, float] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def of(cls, data: str, evaluations: Mapping[str, Evaluation]) -> CategoryTable:
        """From what ``evaluate_categories`` gives."""
        return cls(data, tuple(CategoryRow.of(name, found.to_json()) for name, found in evaluations.items()))

    @property
    def done(self) -> tuple[CategoryRow, ...]:
        """The rows that have a result."""
        return tuple(row for row in self.rows if row.error is None)

    def mean(self) -> dict[str, float | None]:
        """Of each metric over the categories that have a result; None where one of them lacks it."""
        means: dict[str, float | None] = {}
        for name in METRIC_NAMES:
            values = [row.metrics[name] for row in self.done if name in row.metrics]
            known = [value for value in values if value is not None]
            if values:
                means[name] = sum(known) / len(known) if len(known) == len(self.done) else None
        return means

    def to_json(self) -> dict[str, Any]:
        """As a JSON-able object (``docs/artifacts.md``)."""
        return {
            "format": CATEGORIES_FORMAT,
            "version": 1,
            "data": self.data,
            "categories": [
                {
                    "name": row.name,
                    "n_good": row.n_good,
                    "n_defect": row.n_defect,
                    "metrics": dict(row.metrics),
                    "error": row.error,
                }
                for row in self.rows
            ],
            "n_done": len(self.done),
            "mean": self.mean(),
            "published": {"source": self.source, **self.published} if self.published else None,
        }

    def lines(self) -> list[list[str]]:
        """The table's cells, heading first: categories, mean and, where there is one, the published row; in percent."""
        mean = self.mean()
        names = [name for name in METRIC_NAMES if name in mean or name in self.published]
        lines = [["category", "good", "defect", *(METRIC_NAMES[name] for name in names)]]
        for row in self.rows:
            cells = (
                [row.name, str(row.n_good), str(row.n_defect)]
                if row.error is None
                else [f"{row.name} (failed)", "", ""]
            )
            lines.append([*cells, *(_percent(row.metrics.get(name)) for name in names)])
        of = "" if len(self.done) == len(self.rows) else f" of {len(self.done)} of {len(self.rows)}"
        lines.append([f"mean{of}", "", "", *(_percent(mean.get(name)) for name in names)])
        if self.published:
            lines.append(["published", "", "", *(_percent(self.published.get(name)) for name in names)])
        return lines

    def notes(self) -> list[str]:
        """What a reader must know beside the numbers."""
        notes = [f"{row.name}: {row.error}" for row in self.rows if row.error is not None]
        if self.published:
            notes.append(f"published: {self.source}")
        return notes

    def to_markdown(self) -> str:
        """The table and its notes as a page."""
        heading, *body = self.lines()
        rows = [heading, ["---", *("---:" for _ in heading[1:])], *body]
        table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
        # A message of several lines stays one item.
        notes = "".join(f"- {' '.join(note.split())}\n" for note in self.notes())
        return f"# {self.data}, metrics in percent\n\n{table}\n" + (f"\n{notes}" if notes else "")


def show_categories(table: CategoryTable) -> None:
    """Print the table and its notes on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Names come from folders: no markup. A pipe has no width, a terminal of 80 columns has no room for the counts.
    console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    heading, *body = ([line[0], *line[3:]] for line in table.lines())
    printed = Table(title=f"{table.data}, metrics in percent", title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(heading):
        printed.add_column(name, justify="left" if index == 0 else "right")
    for index, line in enumerate(body):
        if index == len(table.rows):
            printed.add_section()
        printed.add_row(*line)
    console.print(printed)
    for note in table.notes():
        console.print(f"note: {note}")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
