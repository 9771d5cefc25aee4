"""``recontrast-edge calibrate``: derive a threshold from good images and write it into the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from recontrast_edge.cli import app
from recontrast_edge.errors import UsageError

if TYPE_CHECKING:
    from recontrast_edge.engines import Engine
    from recontrast_edge.spec import Threshold


@app.command("calibrate")
def calibrate_command(
    engine: str = typer.Option(..., help="Model file (.onnx) to calibrate, or `demo` together with --dry-run."),
    good: Path | None = typer.Option(
        None, help="Good images that training has not seen: a folder, or a text file with one path a line."
    ),
    max_false_reject_rate: float | None = typer.Option(
        None, metavar="R", help="Largest share of good parts that may be rejected; 0.01 is one percent."
    ),
    confidence: float = typer.Option(
        0.95, metavar="C", help="Probability that the promise holds, over the choice of the images."
    ),
    value: float | None = typer.Option(None, metavar="X", help="Set this threshold by hand, without any promise."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only say what would be written."),
    threads: int | None = typer.Option(None, min=1, max=1024, help="CPU threads  [default: chosen by the engine]"),
) -> None:
    """Set the threshold so that at most a share R of good parts is rejected, with confidence C."""
    from recontrast_edge.calibration import write_threshold
    from recontrast_edge.engines import DEMO, engine_path, open_engine

    if (value is None) == (good is None):
        raise UsageError("give either --good with --max-false-reject-rate, or --value")
    if not dry_run and engine_path(engine).resolve() == engine_path(DEMO).resolve():
        raise UsageError("the demo model is part of the installation and is not changed; add --dry-run")
    with open_engine(engine, threads=threads) as opened:
        if good is not None:
            if max_false_reject_rate is None:
                raise UsageError("--good needs --max-false-reject-rate, for example 0.01")
            threshold = _promise(opened, good, max_false_reject_rate, confidence)
        else:
            threshold = _by_hand(opened, value, max_false_reject_rate)
        path, spec = opened.path, opened.spec
    if dry_run:
        typer.echo(f"Dry run: {path} was not changed.")
        return
    write_threshold(path, spec, threshold)
    before = "there was none before" if spec.threshold is None else f"it was {spec.threshold.value:.6g}"
    typer.echo(f"Written into {path} ({before}).")


def _promise(opened: Engine, good: Path, max_false_reject_rate: float, confidence: float) -> Threshold:
    from recontrast_edge.calibration import calibrate_engine, held_out, images_needed, percent
    from recontrast_edge.datasets import GOOD, find_dataset

    needed_for_ten_times = images_needed(max_false_reject_rate / 10, confidence)
    dataset = find_dataset(good)
    if dataset.test or (good / "train").is_dir():
        raise UsageError(
            f"{good} is a whole data set; calibrate on good images that training has not seen, "
            f"for example {good / 'test' / 'good'}"
        )
    images = held_out(dataset.train_good, opened.spec)
    if images.n_copies:
        typer.echo(f"{images.n_copies} image(s) are copies of others, byte for byte; each counts once.")
    calibration, threshold = calibrate_engine(
        opened.infer,
        images,
        opened.spec,
        engine_sha256=opened.sha256,
        # A folder called `good` says nothing without the ones it lies in.
        data_name="/".join(good.resolve().parts[-3:]) if dataset.name == GOOD else dataset.name,
        max_false_reject_rate=max_false_reject_rate,
        confidence=confidence,
        progress=True,
    )
    typer.echo(
        f"Threshold {calibration.value:.6g}: score number {calibration.rank} of {calibration.n_good}, from the lowest; "
        f"a higher score is rejected.\n"
        f"Promise: of future good parts at most {percent(max_false_reject_rate)} will be rejected. Drawing "
        f"{calibration.n_good} images like this and calibrating gives a threshold that keeps it in at least "
        f"{percent(confidence)} of all cases.\n"
        "It holds for parts, light and camera like those in these images, if the images show different parts and none "
        "was used for training.\n"
        f"A promise ten times better ({percent(max_false_reject_rate / 10)}) needs {needed_for_ten_times} images."
    )
    return threshold


def _by_hand(opened: Engine, value: float | None, max_false_reject_rate: float | None) -> Threshold:
    import math

    from recontrast_edge.spec import Threshold

    if max_false_reject_rate is not None:
        raise UsageError("--value promises nothing: leave out --max-false-reject-rate, or use --good instead")
    if value is None or not math.isfinite(value):
        raise UsageError(f"--value must be a finite number, got {value}")
    typer.echo(f"Threshold {value:.6g}, set by hand: no promise about the share of good parts rejected.")
    return Threshold(value=value, engine_sha256=opened.sha256, method="manual")
