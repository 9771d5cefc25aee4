"""``recontrast-edge build``; the work is done by ``recontrast_export``, which needs a TensorRT extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from recontrast_edge.cli import app
from recontrast_edge.errors import MissingError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from recontrast_export.parity import ParityReport, Tolerance


@app.command("build")
def build_command(
    model: str = typer.Argument(metavar="MODEL", help="ONNX file that `recontrast-edge export` wrote, or `demo`."),
    out: Path = typer.Option(
        ..., "--out", help="Engine to write, NAME.plan; NAME.plan.json beside it says what it is."
    ),
    precision: str = typer.Option(
        "fp16",
        "--precision",
        help="fp32, fp16 or int8. What needs it stays in higher precision: distances, map and score always in fp32.",
    ),
    flavor: str = typer.Option(
        "auto",
        "--flavor",
        help="tensorrt (Jetson, servers), tensorrt-rtx (desktop RTX GPUs), or auto: what is installed.",
    ),
    calibration: Path | None = typer.Option(
        None,
        "--calibration",
        metavar="PATH",
        help="For int8: folder, list or data set of good images to find scales with, at least 8; up to 64 are used.",
    ),
    batch: str = typer.Option(
        "1,1,1", "--batch", metavar="MIN,OPT,MAX", help="Smallest, optimal and largest number of images at once."
    ),
    images: list[Path] = typer.Option(
        [],
        "--images",
        metavar="PATH",
        help="Compare maps with the ONNX model on these: data set, folder, list or image, at least 8 images in all; "
        "repeatable. Default: those of --validation or --calibration, else synthetic ones.",
    ),
    validation: Path | None = typer.Option(
        None,
        "--validation",
        metavar="PATH",
        help="Compare verdicts on all of these: a data set with defects, or good images, which get synthetic ones.",
    ),
    budget: str | None = typer.Option(
        None,
        "--budget",
        help="What may change on --validation, as for `quantize`.  [default: fp32 no verdict; fp16 "
        "map_correlation>=0.9999,clear_flips<=0; int8 verdict_flips<=0.5%,delta_i_auroc<=0.003,delta_aupro<=0.01]",
    ),
    good: Path | None = typer.Option(
        None,
        "--good",
        metavar="PATH",
        help="The images that the model's threshold was calibrated on: the engine gets its own threshold from them, "
        "where it can be run.",
    ),
    sm: int | None = typer.Option(
        None,
        "--sm",
        min=10,
        max=999,
        help="GPU architecture to build for, such as 86 for compute capability 8.6; tensorrt-rtx only. Default: the "
        "GPU of this machine with tensorrt; a portable engine with tensorrt-rtx.",
    ),
    workspace_mib: int | None = typer.Option(
        None, "--workspace-mib", min=1, metavar="N", help="Most scratch memory, in MiB.  [default: all the GPU has]"
    ),
    timing_cache: Path | None = typer.Option(
        None,
        "--timing-cache",
        metavar="FILE",
        help="Keeps kernel times, so that the next build is faster; tensorrt only.  [default: NAME.plan.timing]",
    ),
    layers: Path | None = typer.Option(
        None,
        "--layers",
        metavar="FILE.json",
        help="Write the network's layers and, where a GPU is, the engine's; implies --verbose.",
    ),
    verbose: bool = typer.Option(
        False, "--verbose", help="Keep names and details of the layers in the engine, for profilers."
    ),
) -> None:
    """Build a TensorRT engine from an ONNX model; it is written only if it gives the model's maps and scores."""
    if precision not in ("fp32", "fp16", "int8"):
        raise UsageError(f"--precision {precision!r}: expected fp32, fp16 or int8")
    if flavor not in ("auto", "tensorrt", "tensorrt-rtx"):
        raise UsageError(f"--flavor {flavor!r}: expected auto, tensorrt or tensorrt-rtx")
    from recontrast_edge.engines import engine_path

    try:
        from recontrast_export.budget import Budget
        from recontrast_export.build import build_engine
    except ModuleNotFoundError as error:
        raise MissingError(
            f"building needs {error.name}, which is not installed: pip install 'recontrast-edge[tensorrt]' or, for RTX "
            "desktop GPUs, 'recontrast-edge[tensorrt-rtx]'; on a Jetson, whose system has TensorRT, pip install onnx"
        ) from None
    from recontrast_edge.cli.quantize import show_proof

    if budget is not None and validation is None:
        raise UsageError("--budget has no use without --validation; leave it out, or give images to judge")
    with bars() as shown:
        result = build_engine(
            engine_path(model),
            out,
            precision=precision,  # type: ignore[arg-type]
            flavor=flavor,  # type: ignore[arg-type]
            sm=sm,
            batch=_batch(batch),
            workspace_mib=workspace_mib,
            timing_cache=timing_cache,
            calibration=calibration,
            images=images,
            validation=validation,
            budget=None if budget is None else Budget.parse(budget),
            good=good,
            layers=layers,
            detailed=verbose,
            progress=BuildProgress(shown),
            on_parity=_show_parity,
            on_proof=lambda proof, _: show_proof(proof),
        )
    for note in result.notes:
        typer.echo(f"Note: {note}")
    info = result.info
    capability = info.compute_capability
    gpus = "all GPUs that it supports" if capability is None else f"compute capability {capability}"
    built_for = f"{info.flavor} {info.library_version} and {gpus}"
    threshold = info.spec.threshold
    limit = "It has no threshold yet: recontrast-edge calibrate"
    if threshold is not None:
        limit = f"Threshold {threshold.value:.6g}, by the model's promise and images, from its own scores"
    typer.echo(f"Written: {out} ({out.stat().st_size / 1e6:.1f} MB), {info.precision}, for {built_for}. {limit}")


def _batch(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise UsageError(f"--batch {text!r}: expected MIN,OPT,MAX, three whole numbers such as 1,1,4")
    smallest, optimal, largest = (int(part) for part in parts)
    return smallest, optimal, largest


def _show_parity(what: str, report: ParityReport, tolerance: Tolerance) -> None:
    swapped = len(report.swapped(tolerance))
    typer.echo(
        f"{what} against the source model on {report.on.source}: worst map error "
        f"{report.relative_map_errors.max():.1e} of its map's range (allowed: {tolerance.map_error:g}), "
        f"{swapped} pair(s) of scores in another order (allowed: 0)"
    )


def bars() -> Bars:
    """Progress bars on stderr; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class BuildProgress:
    """One bar for each phase that is going on; inner phases are indented and go when they are done."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, tuple[TaskID, int]] = {}

    def start(self, phase: str, parent: str | None, n_steps: int) -> None:
        depth = self._tasks[parent][1] + 1 if parent in self._tasks else 0
        self._tasks[phase] = self._bars.add_task("  " * depth + phase, total=n_steps), depth

    def step(self, phase: str, step: int) -> None:
        if phase in self._tasks:
            self._bars.update(self._tasks[phase][0], completed=step + 1)

    def finish(self, phase: str) -> None:
        task = self._tasks.pop(phase, None)
        if task is not None:
            self._bars.remove_task(task[0])
