"""``recontrast-edge export``; the work is done by ``recontrast_export``, which needs the ``export`` extra."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from recontrast_edge.cli import app
from recontrast_edge.errors import MissingError, UsageError

if TYPE_CHECKING:
    from recontrast_export.parity import ParityReport, Tolerance


@app.command("export")
def export_command(
    run: Path = typer.Argument(help="Run folder that `recontrast-edge train` wrote."),
    out: Path = typer.Option(..., "--out", help="ONNX file to write; replaced if it exists."),
    head: str = typer.Option(
        "map",
        "--head",
        help="map: the graph ends at anomaly map and score, for every engine. features: it ends at the 12 feature "
        "maps and what a discriminator finds, for engines with a map kernel of their own.",
    ),
    images: list[Path] = typer.Option(
        [],
        "--images",
        metavar="PATH",
        help="Compare with PyTorch on these: data set, folder, list or image, at least 8 images in all; repeatable. "
        "Default: the run's held-out images, else synthetic ones.",
    ),
    storage: str = typer.Option(
        "fp32",
        "--storage",
        help="fp32, or fp16: weights rounded to half precision in the file, which halves it; the computation stays "
        "float32 and the tolerance of the comparison is wider.",
    ),
    opset: int = typer.Option(18, "--opset", help="ONNX operator set, 18 to 20."),
) -> None:
    """Export a run to ONNX; the file is written only if it gives the maps and scores of PyTorch."""
    if head not in ("map", "features"):
        raise UsageError(f"--head {head!r}: expected map or features")
    if storage not in ("fp32", "fp16"):
        raise UsageError(f"--storage {storage!r}: expected fp32 or fp16")
    try:
        from recontrast_export.onnx_export import export_onnx
    except ModuleNotFoundError as error:
        raise MissingError(
            f"exporting needs {error.name}, which is not installed: pip install 'recontrast-edge[export]'"
        ) from None
    export_onnx(run, out, head=head, images=images, storage=storage, opset=opset, on_parity=show_parity)  # type: ignore[arg-type]
    typer.echo(
        f"Written: {out} ({out.stat().st_size / 1e6:.2f} MB). It has no threshold yet: recontrast-edge calibrate"
    )


def show_parity(report: ParityReport, tolerance: Tolerance) -> None:
    """Print a comparison as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"ONNX Runtime against PyTorch on {report.on.source}", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("image")
    table.add_column("kind")
    for heading in ("map range", "error/range", "score", "error"):
        table.add_column(heading, justify="right")
    rows = zip(
        report.on.images,
        report.map_ranges,
        report.relative_map_errors,
        report.reference_scores,
        report.score_errors,
        strict=True,
    )
    for image, map_range, map_error, score, score_error in rows:
        cells = (f"{map_range:.4f}", f"{map_error:.1e}", f"{score:.6f}", f"{score_error:.1e}")
        table.add_row(image.name, image.kind or "-", *cells)
    # The width of a pipe is no reason to cut names.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    worst, tie = report.relative_map_errors.max(), tolerance.tie * report.map_ranges.max()
    swapped = len(report.swapped(tolerance))
    console.print(f"worst map error: {worst:.1e} of its image's map range (allowed: {tolerance.map_error:.0e})")
    console.print(f"order of scores: {swapped} pair(s) differ (allowed: 0; scores within {tie:.1e} are ties)")
