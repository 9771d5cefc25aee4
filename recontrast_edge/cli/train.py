"""``recontrast-edge train``; the work is done by ``recontrast_train``, which needs the ``train`` extra."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import typer

from recontrast_edge.cli import app
from recontrast_edge.errors import MissingError, UsageError


@app.command("train")
def train_command(
    data: Path | None = typer.Argument(
        None, help="Data set, folder of good images, or text file that lists them; a data set may have categories."
    ),
    data_option: Path | None = typer.Option(None, "--data", metavar="DATA", help="The same, as an option."),
    out: Path | None = typer.Option(
        None,
        "--out",
        metavar="RUN",
        help="Run folder to write; of several categories, each has a folder in it; default: runs/NAME, after DATA.",
    ),
    recipe: str = typer.Option(
        "default",
        "--recipe",
        help="default, mvtec, visa, mvtec-stable, visa-stable, mvtec-multiclass, visa-multiclass, aptos, oct2017, "
        "isic2018, edge, demo, or path to a .toml file.",
    ),
    backbone: str | None = typer.Option(
        None,
        "--backbone",
        help="wide_resnet50_2, resnet50, resnet34, resnet18 or efficientnet_lite0; default: the recipe's.",
    ),
    weights: str = typer.Option(
        "imagenet", "--weights", help="Initial encoder weights: imagenet, random, or a .pth/.safetensors file."
    ),
    iterations: int | None = typer.Option(None, "--iterations", help="Training steps; default: the recipe's."),
    batch: int | None = typer.Option(None, "--batch", help="Images a step; default: the recipe's."),
    size: str | None = typer.Option(
        None, "--size", metavar="WxH", help="Network input in pixels, multiples of 32; default: the recipe's."
    ),
    seed: int | None = typer.Option(None, "--seed", help="Seed of initialisation and order; default: the recipe's."),
    precision: str | None = typer.Option(None, "--precision", help="fp32, bf16 or fp16 (GPU); default: the recipe's."),
    settings: list[str] = typer.Option(
        [],
        "--set",
        metavar="KEY=VALUE",
        help="Any other recipe value, in TOML, e.g. --set lr_encoder=1e-4; repeatable.",
    ),
    class_name: str | None = typer.Option(None, "--class-name", help="Name of the product; default: the data's name."),
    holdout: float = typer.Option(
        0.0, "--holdout", min=0.0, max=0.9, help="Share of the good images kept out for calibration (0 to 0.9)."
    ),
    holdout_group: str | None = typer.Option(
        None,
        "--holdout-group",
        metavar="REGEX",
        help="Expression on the file name whose first group names the part; pictures of one part stay together.",
    ),
    holdout_gap: int | None = typer.Option(
        None,
        "--holdout-gap",
        metavar="N",
        min=0,
        help="With --holdout-group: its groups are numbers, and those at most N apart are one part.",
    ),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
    workers: int | None = typer.Option(
        None, "--workers", min=0, help="Processes that prepare images; default: by device."
    ),
    resume: bool = typer.Option(
        False,
        "--resume",
        help="Go on: from the checkpoint in --out; with --qat, as --resume RUN, from the finished run in RUN.",
    ),
    qat: str | None = typer.Option(
        None,
        "--qat",
        metavar="INT8",
        help="Fine-tune the finished run RUN for INT8, as --resume RUN --qat INT8 --data DATA --out OUT; takes "
        "--iterations (default 300), --batch, --seed, --precision, --device and --workers.",
    ),
    checkpoint_seconds: float = typer.Option(
        120.0, "--checkpoint-seconds", min=1.0, help="Seconds between checkpoints."
    ),
    suspects: Path | None = typer.Option(
        None,
        "--suspects",
        metavar="FILE.csv",
        help="Rank the training images by how unlike the others they are, for a person to look at: before training, "
        "and again after it with what the model says. A sheet of the first ones goes beside it, FILE.png. Of several "
        "categories, each has files of its own.",
    ),
    max_minutes: float | None = typer.Option(
        None,
        "--max-minutes",
        min=0.0001,
        help="Stop before so many minutes are over, with a checkpoint for --resume; exit code 13 if work is left.",
    ),
) -> None:
    """Train a model on images of good parts; evaluate it if there is a test set.

    Of a data set with several categories, each gets a model of its own, unless the recipe has unified = true. `torchrun
    --nproc-per-node N -m recontrast_edge train ...` trains in N processes, one a GPU.
    """
    from recontrast_edge.uri import size_option

    started_s = time.monotonic()
    given = [path for path in (data, data_option) if path is not None]
    if qat is not None:
        foreign = {
            "--recipe": recipe != "default",
            "--backbone": backbone,
            "--weights": weights != "imagenet",
            "--size": size,
            "--set": settings,
            "--class-name": class_name,
            "--holdout": holdout,
            "--holdout-group": holdout_group,
            "--holdout-gap": holdout_gap is not None,
            "--suspects": suspects,
            "--max-minutes": max_minutes,
        }
        if not resume or data is None or data_option is None or out is None or qat.upper() != "INT8":
            raise UsageError("--qat: expected --resume RUN --qat INT8 --data DATA --out OUT, RUN a finished training")
        if refused := [option for option, value in foreign.items() if value]:
            raise UsageError(f"--qat goes on with the run's own options; leave out {', '.join(refused)}")
        _fine_tune(data, data_option, out, iterations, batch, seed, precision, device, workers)
        return
    if len(given) != 1:
        raise UsageError("train: expected the data set once, as argument or as --data")
    if out is None:
        out = Path("runs", given[0].resolve().name)
    if suspects is not None and suspects.suffix != ".csv":
        raise UsageError(f"--suspects {suspects}: expected a file that ends in .csv")
    if holdout_gap is not None and holdout_group is None:
        raise UsageError("--holdout-gap needs --holdout-group, which finds the numbers")
    try:
        import torch  # noqa: F401

        from recontrast_train.campaign import train_all
        from recontrast_train.distributed import is_main
        from recontrast_train.fit import TrainingStoppedError
        from recontrast_train.recipe import parse_settings
        from recontrast_train.training import TrainOptions
    except ModuleNotFoundError as error:
        raise MissingError(
            f"training needs {error.name}, which is not installed: pip install 'recontrast-edge[train]'"
        ) from None
    from recontrast_edge.spec import PartNames

    overrides = parse_settings(settings)
    for key, value in (
        ("backbone", backbone),
        ("iterations", iterations),
        ("batch", batch),
        ("seed", seed),
        ("precision", precision),
        ("size_wh", None if size is None else size_option("train", "--size", size)),
    ):
        if value is not None:
            overrides[key] = value
    options = TrainOptions(
        data=given[0],
        out=out,
        recipe=recipe,
        overrides=overrides,
        weights=weights if weights in ("imagenet", "random") else Path(weights),  # type: ignore[arg-type]
        class_name=class_name,
        holdout=holdout,
        part_names=None if holdout_group is None else PartNames(pattern=holdout_group, gap=holdout_gap),
        device=device,
        workers=workers,
        resume=resume,
        checkpoint_every_s=checkpoint_seconds,
        suspects=suspects,
        deadline_s=None if max_minutes is None else started_s + 60 * max_minutes,
    )
    try:
        train_all(options)
    except TrainingStoppedError as stopped:
        if is_main():
            typer.echo(f"{stopped}; go on with the same command and --resume", err=True)
        sys.exit(stopped.exit_code)


def _fine_tune(
    run: Path,
    data: Path,
    out: Path,
    iterations: int | None,
    batch: int | None,
    seed: int | None,
    precision: str | None,
    device: str,
    workers: int | None,
) -> None:
    try:
        from recontrast_train.qat import ITERATIONS, QatOptions, fine_tune
    except ModuleNotFoundError as error:
        raise MissingError(
            f"training needs {error.name}, which is not installed: pip install 'recontrast-edge[train]'"
        ) from None
    result = fine_tune(
        QatOptions(
            run=run,
            data=data,
            out=out,
            iterations=ITERATIONS if iterations is None else iterations,
            batch=batch,
            seed=seed,
            precision=precision,
            device=device,
            workers=workers,
        )
    )
    typer.echo(
        f"Written: {out}. Its maps in INT8 are off by {result.error_after:.1%} of the float maps' standard deviation, "
        f"before by {result.error_before:.1%}. Next: recontrast-edge export {out} --out NAME.onnx"
    )
