"""``recontrast-edge eval``: metrics of a model on a test set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from recontrast_edge.cli import app
from recontrast_edge.errors import UsageError

if TYPE_CHECKING:
    from recontrast_edge.evaluation import Evaluation, Metric, Rate


@app.command("eval")
def evaluate_command(
    engine: str = typer.Option(..., help="Model file (.onnx or .plan), or `demo` for the packaged model."),
    data: Path = typer.Option(..., help="Data set with test images; of several categories, each is judged by itself."),
    json_path: Path | None = typer.Option(None, "--json", metavar="FILE", help="Also write everything as JSON."),
    report: Path | None = typer.Option(
        None, "--report", metavar="FILE.html", help="Also write a report to read and print: one HTML file."
    ),
    full_resolution: bool = typer.Option(
        False,
        "--full-resolution",
        help="Enlarge the maps to the masks' own size, instead of bringing the masks to the maps' size.",
    ),
    part: str | None = typer.Option(
        None,
        metavar="REGEX",
        help="Expression on the file name whose first group names the part: the I-AUROC's interval is over parts.",
    ),
    part_gap: int | None = typer.Option(
        None, min=0, metavar="N", help="--part finds numbers; those that follow each other within N are one part."
    ),
    threads: int | None = typer.Option(None, min=1, max=1024, help="CPU threads  [default: chosen by the engine]"),
) -> None:
    """Measure a model on a test set: image, pixel and region metrics, per kind of defect, and at its threshold."""
    from recontrast_edge.categories import CategoryTable, evaluate_categories, show_categories
    from recontrast_edge.datasets import data_sha256, find_dataset
    from recontrast_edge.engines import open_engine
    from recontrast_edge.evaluation import Resolution, evaluate
    from recontrast_edge.report import Provenance, write_report
    from recontrast_edge.spec import PartNames

    if part_gap is not None and part is None:
        raise UsageError("--part-gap needs --part, which finds the numbers")
    if report is not None and report.suffix not in (".html", ".htm"):
        raise UsageError(f"--report writes an HTML file; expected a name that ends in .html, got {str(report)!r}")
    dataset = find_dataset(data)
    samples = dataset.test_samples()
    if report is not None and dataset.categories:
        raise UsageError(
            f"--report is about one product, but {data} has {len(dataset.categories)} categories; name one's folder"
        )
    if part is not None and dataset.categories:
        raise UsageError(f"--part is about one product, but {data} has categories; name one's folder")
    with open_engine(engine, threads=threads) as opened:
        resolution: Resolution = "source" if full_resolution else "map"
        if dataset.categories:
            evaluations = evaluate_categories(opened.infer, dataset, opened.spec, resolution=resolution, progress=True)
        else:
            names = None if part is None else PartNames(pattern=part, gap=part_gap)
            evaluation = evaluate(
                opened.infer, samples, opened.spec, resolution=resolution, part_names=names, progress=True
            )
        threshold = opened.spec.threshold
        provenance = Provenance(
            engine_file=opened.path.name,
            engine_name=opened.name,
            engine_sha256=opened.sha256,
            data_name=dataset.name,
            data_sha256=data_sha256(samples),
            foreign_threshold=threshold is not None and threshold.engine_sha256 != opened.sha256,
        )
    if dataset.categories:
        table = CategoryTable.of(dataset.name, evaluations)
        show_categories(table)
        if json_path is not None:
            _write_json(json_path, {**table.to_json(), **provenance.to_json()})
        return
    show_evaluation(evaluation, dataset.name, provenance.foreign_threshold)
    if json_path is not None:
        _write_json(json_path, {**evaluation.to_json(), **provenance.to_json()})
    if report is not None:
        write_report(report, evaluation, provenance)


def show_evaluation(evaluation: Evaluation, data_name: str, foreign: bool) -> None:
    """Print the metrics of a test set as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    n_defect = evaluation.overall.n_defect
    table = Table(
        title=f"{evaluation.spec.class_name} on {data_name}: {evaluation.n_good} good, {n_defect} with defects",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("kind")
    for heading in ("images", "I-AUROC %", "P-AUROC %", "AUPRO %"):
        table.add_column(heading, justify="right")
    rows = [*evaluation.kinds.items(), ("all", evaluation.overall)]
    for kind, metrics in rows:
        if kind == "all":
            table.add_section()
        cells = (_percent(metrics.i_auroc), _percent(metrics.p_auroc), _percent(metrics.aupro))
        table.add_row(kind, str(metrics.n_defect), *cells)
    # Names come from folders: no markup. The width of a pipe is no reason to cut them.
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    interval = evaluation.i_auroc_interval
    if interval is not None:
        console.print(
            f"I-AUROC of other parts: 95 % interval {100 * interval.low:.2f} ... {100 * interval.high:.2f} % "
            f"({interval.n_good} good parts, {interval.n_defect} with defects)"
        )
    overall = evaluation.overall
    best = "-" if evaluation.f1_max_threshold is None else f"{evaluation.f1_max_threshold:.4f}"
    console.print(f"I-AP {_percent(overall.i_ap)} %, F1-max {_percent(overall.f1_max)} % (at score >= {best})")
    console.print(
        f"P-AP {_percent(overall.p_ap)} %, AUPRO up to 5 % {_percent(overall.aupro_5)} %, "
        f"per image {_percent(overall.aupro_per_image)} %"
    )
    at = evaluation.at_threshold
    if at is None:
        console.print("No threshold yet: set one with `recontrast-edge calibrate`.")
    else:
        console.print(f"At the model's threshold (REJECT where score > {at.value:.6g}):")
        console.print(f"  good parts rejected: {_rate(at.false_rejects)}")
        console.print(f"  defects passed:      {_rate(at.misses)}")
    if foreign:
        console.print("note: the threshold was set for another export of this model; calibrate again")
    undefined = {metric.reason for _, row in rows for metric in row.named().values() if metric.reason}
    for reason in sorted(undefined):
        console.print(f"note: a dash means that {reason}")
    for note in evaluation.notes:
        console.print(f"note: {note}")


def _percent(metric: Metric) -> str:
    return "-" if metric.value is None else f"{100 * metric.value:.2f}"


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return "none to count"
    share = f"{rate.count} of {rate.of} ({100 * rate.count / rate.of:.2f} %)"
    return f"{share}, 95 % interval {100 * rate.low:.2f} ... {100 * rate.high:.2f} %"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    import json

    from recontrast_edge.images import atomic_write

    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
