"""``recontrast-edge quantize``; the work is done by ``recontrast_export``, which needs the ``export`` extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from recontrast_edge.cli import app
from recontrast_edge.errors import EXIT_FELL_BACK, MissingError

if TYPE_CHECKING:
    from recontrast_edge.proof import Proof
    from recontrast_export.proving import GivenUp
    from recontrast_export.quantize import Result


@app.command("quantize")
def quantize_command(
    model: str = typer.Argument(
        metavar="MODEL",
        help="FP32 ONNX file of `recontrast-edge export`, or `demo`; with --fine-tuned-from, INT8 one of a run that "
        "`train --qat INT8` made.",
    ),
    out: Path = typer.Option(
        ..., "--out", help="ONNX file to write, NAME.onnx; NAME.png beside it shows what INT8 costs."
    ),
    calibration: Path = typer.Option(
        ..., "--calibration", metavar="PATH", help="Good images to find INT8 ranges with: folder, list or data set."
    ),
    validation: Path = typer.Option(
        ...,
        "--validation",
        metavar="PATH",
        help="Images to judge verdicts on: a data set with defects, or good images, which get synthetic ones.",
    ),
    budget: str = typer.Option(
        "verdict_flips<=0.5%,delta_i_auroc<=0.003,delta_aupro<=0.01",
        "--budget",
        help="What INT8 may cost, as NAME<=NUMBER or NAME>=NUMBER: verdict_flips, clear_flips (shares of the images), "
        "delta_i_auroc, delta_aupro (losses), map_correlation, map_error, map_error_p999 (shares of the map's range), "
        "score_shift (in deviations of the good scores), rank_correlation.",
    ),
    parts: str = typer.Option(
        "encoders,bottleneck,decoder,discriminator", "--parts", help="Parts of the network that may become INT8."
    ),
    fine_tuned_from: Path | None = typer.Option(
        None,
        "--fine-tuned-from",
        metavar="FP32.onnx",
        help="The model that MODEL was fine-tuned from: nothing is searched, MODEL is proved against it, and refused "
        "(exit code 6) if it goes beyond the budget.",
    ),
    good: Path | None = typer.Option(
        None,
        "--good",
        metavar="PATH",
        help="The images that the model's threshold was calibrated on: the new file gets its own threshold from them.",
    ),
) -> None:
    """Find the most INT8 that keeps the verdicts, prove it, and write it; else FP16, and exit code 12."""
    from recontrast_edge.engines import engine_path

    try:
        from recontrast_export.budget import Budget
        from recontrast_export.quantize import quantize
    except ModuleNotFoundError as error:
        raise MissingError(
            f"quantizing needs {error.name}, which is not installed: pip install 'recontrast-edge[export]'"
        ) from None
    from recontrast_edge.cli.build import BuildProgress, bars

    with bars() as shown:
        result = quantize(
            engine_path(model),
            out,
            calibration=calibration,
            validation=validation,
            budget=Budget.parse(budget),
            parts=[part.strip() for part in parts.split(",") if part.strip()],
            fine_tuned_from=None if fine_tuned_from is None else engine_path(str(fine_tuned_from)),
            good=good,
            say=typer.echo,
            progress=BuildProgress(shown),
        )
    _show(result)
    record, threshold = result.record, result.threshold
    limit = "It has no threshold yet: recontrast-edge calibrate"
    if threshold is not None:
        limit = f"Threshold {threshold.value:.6g}, by the model's promise and images, from its own scores"
    share = f"{100 * record.conversion.int8_macs:.1f} % of the multiply-accumulates in INT8"
    typer.echo(f"Written: {out} ({out.stat().st_size / 1e6:.1f} MB), {record.precision}, {share}. {limit}")
    if record.precision == "fp16":
        raise typer.Exit(EXIT_FELL_BACK)


def _show(result: Result) -> None:
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    # The width of a pipe is no reason to cut columns.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table(title="The trade-off", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("INT8", "blocks", "map error", "judged on", "flips", "I-AUROC loss", "AUPRO loss", ""):
        table.add_column(heading, justify="right")
    for trial in result.trials:
        mark = "written" if trial.outcome is result.record.proof else ""
        cells = (f"{100 * trial.rung.int8_macs:.1f} %", str(len(trial.rung.blocks)), f"{100 * trial.map_error:.2f} %")
        table.add_row(*cells, *_judged(trial.outcome), mark)
    if result.trials:
        console.print(table)
    show_proof(result.record.proof)


def _judged(outcome: Proof | GivenUp | None) -> tuple[str, ...]:
    from recontrast_edge.proof import Proof

    if outcome is None:
        return ("-",) * 4
    if not isinstance(outcome, Proof):
        return (f"{outcome.n_judged} images", str(outcome.n_flips), "-", "-")
    losses = (outcome.delta_i_auroc, outcome.delta_aupro)
    flips = outcome.verdict_flips
    return (f"{flips.of} images", str(flips.count), *("-" if loss is None else f"{loss:+.4f}" for loss in losses))


def show_proof(proof: Proof) -> None:
    """Print what a proof found."""
    flips = proof.verdict_flips
    typer.echo(
        f"{proof.candidate} against the FP32 model on {proof.images}:\n"
        f"  verdicts: {flips.count} of {flips.of} changed (95 % interval of the rate: {100 * flips.low:.2f} to "
        f"{100 * flips.high:.2f} %), {proof.clear_flips} of them clear ones\n"
        f"  maps: correlation {proof.map_correlation:.6f} (worst image {proof.map_correlation_lowest:.6f}), largest "
        f"error {proof.map_error:.2e} of the range, 99.9 % within {proof.map_error_p999:.2e}\n"
        f"  scores: shift {proof.score_shift:+.4f} deviations, rank correlation {proof.rank_correlation:.6f}, loss of "
        f"I-AUROC {_loss(proof.delta_i_auroc)}, of AUPRO {_loss(proof.delta_aupro)}"
    )
    for flip in proof.flipped:
        scores = f"{flip.reference_score:.5g} -> {flip.candidate_score:.5g}"
        limits = f"{proof.reference_threshold:.5g} -> {proof.candidate_threshold:.5g}"
        typer.echo(f"  changed: {flip.image}, score {scores}, threshold {limits}")


def _loss(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.4f}"
