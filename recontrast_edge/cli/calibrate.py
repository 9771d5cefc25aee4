"""``recontrast-edge calibrate``: derive a threshold from good images and write it into the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from recontrast_edge.cli import app
from recontrast_edge.errors import UsageError

if TYPE_CHECKING:
    from recontrast_edge.engines import Engine
    from recontrast_edge.spec import PartNames, Threshold


@app.command("calibrate")
def calibrate_command(
    engine: str = typer.Option(..., help="Model file (.onnx) to calibrate, or `demo` together with --dry-run."),
    good: Path | None = typer.Option(
        None,
        help="Good images that training has not seen: a folder, or a text file with one path a line (and after a tab "
        "the part it shows).",
    ),
    part: str | None = typer.Option(
        None,
        metavar="REGEX",
        help="Expression on the file name whose first group names the part: images of one part count as one.",
    ),
    part_gap: int | None = typer.Option(
        None, metavar="N", min=0, help="With --part: its groups are numbers, and those at most N apart are one part."
    ),
    max_false_reject_rate: float | None = typer.Option(
        None, metavar="R", help="Largest share of good parts that may be rejected; 0.01 is one percent."
    ),
    confidence: float = typer.Option(
        0.95, metavar="C", help="Probability that the promise holds, over the choice of the images."
    ),
    value: float | None = typer.Option(None, metavar="X", help="Set this threshold by hand, without any promise."),
    json_path: Path | None = typer.Option(
        None, "--json", metavar="FILE", help="With --good: also write the threshold and every image's score as JSON."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only say what would be written."),
    threads: int | None = typer.Option(None, min=1, max=1024, help="CPU threads  [default: chosen by the engine]"),
) -> None:
    """Set the threshold so that at most a share R of good parts is rejected, with confidence C."""
    from recontrast_edge.calibration import write_threshold
    from recontrast_edge.engines import DEMO, engine_path, open_engine
    from recontrast_edge.spec import PartNames

    if (value is None) == (good is None):
        raise UsageError("give either --good with --max-false-reject-rate, or --value")
    if json_path is not None and good is None:
        raise UsageError("--json writes the scores of the images of --good; with --value there are none")
    if part_gap is not None and part is None:
        raise UsageError("--part-gap needs --part, which finds the numbers")
    if part is not None and good is None:
        raise UsageError("--part groups the images of --good; with --value there are none")
    if not dry_run and engine_path(engine).resolve() == engine_path(DEMO).resolve():
        raise UsageError("the demo model is part of the installation and is not changed; add --dry-run")
    with open_engine(engine, threads=threads) as opened:
        if good is not None:
            if max_false_reject_rate is None:
                raise UsageError("--good needs --max-false-reject-rate, for example 0.01")
            names = None if part is None else PartNames(pattern=part, gap=part_gap)
            threshold = _promise(opened, good, names, max_false_reject_rate, confidence, json_path)
        else:
            threshold = _by_hand(opened, value, max_false_reject_rate)
        path, spec = opened.path, opened.spec
    if dry_run:
        typer.echo(f"Dry run: {path} was not changed.")
        return
    write_threshold(path, spec, threshold)
    before = "there was none before" if spec.threshold is None else f"it was {spec.threshold.value:.6g}"
    typer.echo(f"Written into {path} ({before}).")


def _promise(
    opened: Engine,
    good: Path,
    names: PartNames | None,
    max_false_reject_rate: float,
    confidence: float,
    json_path: Path | None,
) -> Threshold:
    from recontrast_edge.calibration import calibrate_engine, held_out, images_needed, percent, promise_in_words
    from recontrast_edge.datasets import GOOD, alike, find_dataset

    needed_for_ten_times = images_needed(max_false_reject_rate / 10, confidence)
    dataset = find_dataset(good)
    if dataset.test or (good / "train").is_dir():
        raise UsageError(
            f"{good} is a whole data set; calibrate on good images that training has not seen, "
            f"for example {good / 'test' / 'good'}"
        )
    images = held_out(dataset.train_good, opened.spec, names)
    if images.n_copies:
        typer.echo(f"{images.n_copies} image(s) are copies of others, byte for byte; each counts once.")
    if images.n_trained_on:
        others = ", or on others of their parts" if images.of == "parts" else ""
        typer.echo(
            f"warning: the model was trained on {images.n_trained_on} of these images{others}. They are left out; "
            f"{len(images.samples)} are left.",
            err=True,
        )
    if images.n_parts < len(images.samples):
        typer.echo(
            f"{len(images.samples)} images show {images.n_parts} parts. The highest score of each counts: a part is "
            "rejected with any of its images."
        )
    elif names is None and (pair := alike([sample.path.name for sample in images.samples])):
        typer.echo(
            f"warning: every image counts as another part, but by their names {pair[0]} and {pair[1]} may show the "
            "same one. If they do, say which images show one part (--part, or a list with parts): several of one part "
            "are no more evidence than one.",
            err=True,
        )
    found = calibrate_engine(
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
    calibration = found.calibration
    typer.echo(
        f"Threshold {calibration.value:.6g}: score number {calibration.rank} of {calibration.n_good}, from the lowest; "
        "a higher score is rejected."
    )
    for sentence in promise_in_words(found.threshold) or ():
        typer.echo(sentence)
    more = needed_for_ten_times - calibration.n_good
    typer.echo(
        f"A promise ten times better ({percent(max_false_reject_rate / 10)}) needs {needed_for_ten_times} {images.of}"
        + (f", {more} more than these." if more > 0 else ", no more than these.")
    )
    if found.shift is not None and found.shift.like_training:
        typer.echo(
            "warning: by their scores these images cannot be told from those the model was trained on: in "
            f"{100 * found.shift.share:.0f} % of pairs they score higher, and 50 % is what training images would. If "
            "they show parts it was trained on (other photographs of them, or copies), more good parts will be "
            "rejected than promised; if they show new parts, the model treats those as well as known ones.",
            err=True,
        )
    if json_path is not None:
        import json

        from recontrast_edge.images import atomic_write

        with atomic_write(json_path) as file:
            file.write((json.dumps(found.to_json(), indent=2) + "\n").encode())
    return found.threshold


def _by_hand(opened: Engine, value: float | None, max_false_reject_rate: float | None) -> Threshold:
    import math

    from recontrast_edge.spec import Threshold

    if max_false_reject_rate is not None:
        raise UsageError("--value promises nothing: leave out --max-false-reject-rate, or use --good instead")
    if value is None or not math.isfinite(value):
        raise UsageError(f"--value must be a finite number, got {value}")
    typer.echo(f"Threshold {value:.6g}, set by hand: no promise about the share of good parts rejected.")
    return Threshold(value=value, engine_sha256=opened.sha256, method="manual")
