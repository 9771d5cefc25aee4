"""From a folder of good images to a run folder: the whole of ``recontrast-edge train``.

train(TrainOptions(data=Path("tiles"), out=Path("runs/tiles")))
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from recontrast_edge import __version__
from recontrast_edge.artifact import METRICS_FILE, SPEC_FILE, WEIGHTS_FILE
from recontrast_edge.cli.evaluate import show_evaluation
from recontrast_edge.datasets import Dataset, Sample, alike, data_sha256, find_dataset, parts_of
from recontrast_edge.errors import InputError, UsageError
from recontrast_edge.evaluation import evaluate, score_samples
from recontrast_edge.images import atomic_write
from recontrast_edge.spec import ClassName, InputSpec, Level, ModelSpec, PartNames, Scoring, Training
from recontrast_train.backbones import Weights, backbone, load_weights
from recontrast_train.data import GoodImages, split_holdout
from recontrast_train.distributed import all_or_none, choose_device, is_main, world_size
from recontrast_train.fit import Fitted, OutOfTimeError, check_options, fit
from recontrast_train.model import STRIDES, ReContrast
from recontrast_train.recipe import Recipe, load_recipe
from recontrast_train.report import write_losses, write_report
from recontrast_train.run import HOLDOUT_FILE, load_run, save_run, weights_bytes
from recontrast_train.score import TorchScorer, level_spreads, with_training_images
from recontrast_train.suspects import Suspect, rank_suspects, sheet_path, with_model, write_suspects

CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class TrainOptions:
    """What the command line gives.

    Attributes:
        data: data set as ``find_dataset`` takes it.
        out: run folder.
        recipe: packaged recipe or path.
        overrides: recipe values that win.
        weights: ``imagenet``, ``random`` or a file.
        class_name: name of the product; None for the data's name.
        holdout: share of the good images to set aside for calibration.
        part_names: how the images' names tell which part they show; None: as the data set says, and else each image
            shows another.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        workers: processes that prepare images; None chooses.
        resume: go on from the run folder's checkpoint.
        checkpoint_every_s: seconds between checkpoints.
        deadline_s: moment of ``time.monotonic`` by which training stops, with a checkpoint; None for none.
        suspects: CSV file for the ranking of the training images; None for none.
    """

    data: Path
    out: Path
    recipe: str = "default"
    overrides: dict[str, Any] = field(default_factory=dict)
    weights: Weights = "imagenet"
    class_name: str | None = None
    holdout: float = 0.0
    part_names: PartNames | None = None
    device: str = "auto"
    workers: int | None = None
    resume: bool = False
    checkpoint_every_s: float = 120.0
    deadline_s: float | None = None
    suspects: Path | None = None


@dataclass(frozen=True)
class _Training:
    """What is trained on: image files, the category of each, and the good images kept out.

    Attributes:
        parts: which part each image shows, where that is known.
        alike: two of the names that may show one part, where nothing says which do.
    """

    paths: list[Path]
    categories: list[str]
    parts: list[str] | None
    held_out: list[Sample]
    sha256: str
    alike: tuple[str, str] | None


@dataclass(frozen=True)
class _Job:
    """What the steps of one training share."""

    options: TrainOptions
    dataset: Dataset
    recipe: Recipe
    device: torch.device
    training: _Training


def train(options: TrainOptions, dataset: Dataset | None = None, console: Console | None = None) -> ModelSpec:
    """Train one model, save it, evaluate it on the test set if there is one, and draw the report.

    A training that had finished, of the same recipe and data, is not repeated, nor is its evaluation.

    Of several processes (``distributed.process_group``), process 0 writes, evaluates and prints.

    Args:
        options: what the command line gives.
        dataset: what ``options.data`` is, where that is known already. Of one with several categories, all are
            trained on together, and each is evaluated by itself, in a folder of its name.
        console: where progress goes; standard error by default.

    Returns:
        The spec of the saved model.

    Raises:
        RecontrastError: bad data, recipe or weights, a run folder that is in the way, a diverged loss.
        TrainingStoppedError: stopped by Ctrl-C, SIGTERM or the deadline; ``resume`` goes on.
    """
    # Names come from folders: no markup.
    console = console or Console(stderr=True, quiet=not is_main(), markup=False)
    dataset = dataset or find_dataset(options.data)
    for name in (dataset.name, options.class_name or dataset.name):
        _check_name(name)
    recipe = load_recipe(options.recipe, options.overrides).for_class(options.class_name or dataset.name)
    device = choose_device(options.device)
    check_options(recipe, device)
    training = _choose(dataset, options, recipe)
    job = _Job(options, dataset, recipe, device, training)
    finished = check_out(options)
    suspects: list[Suspect] = []
    if options.suspects is not None:
        with all_or_none():
            if is_main():
                suspects = _rank_suspects(job, options.suspects, console)
    if finished:
        spec = _check_finished(job)
        console.print(f"{options.out}: training had finished")
    else:
        spec = _fit(job, console)
    if is_main():
        _evaluate(job, spec)
        if options.suspects is not None:
            _rank_by_model(job, spec, suspects, options.suspects, console)
    console.print(f"Run folder: {options.out}")
    if training.held_out:
        count = len(training.held_out)
        console.print(f"Held out for calibration: {count} images, listed in {options.out / HOLDOUT_FILE}")
    if training.alike:
        console.print(
            f"warning: every image was taken for another part, but by their names {training.alike[0]} and "
            f"{training.alike[1]} may show the same one. If they do, hold out by part: --holdout-group",
            markup=False,
        )
    return spec


def _check_name(name: str) -> None:
    """Refuse what the spec would refuse, before the training and not after it."""
    try:
        TypeAdapter(ClassName).validate_python(name)
    except ValidationError as error:
        raise InputError(
            f"{name!r} cannot be a product's name ({error.errors()[0]['msg']}); rename the folder, or the product by "
            "--class-name"
        ) from None


def _choose(dataset: Dataset, options: TrainOptions, recipe: Recipe) -> _Training:
    """Share the good images of each category between training and calibration."""
    dataset.training_samples()
    paths: list[Path] = []
    categories: list[str] = []
    trained_parts: list[str] = []
    held_out: list[Sample] = []
    pair: tuple[str, str] | None = None
    for category in dataset.categories or (dataset,):
        good = category.train_good
        parts = parts_of(good, options.part_names)
        if len(set(parts)) < len(parts):
            good = tuple(replace(sample, part=part) for sample, part in zip(good, parts, strict=True))
        elif options.holdout and options.part_names is None:
            pair = pair or alike([sample.path.name for sample in good])
        chosen, held = split_holdout(good, options.holdout, seed=recipe.seed, parts=parts)
        paths += [sample.path for sample in chosen]
        categories += [category.name] * len(chosen)
        part_by_path = {sample.path: part for sample, part in zip(good, parts, strict=True)}
        trained_parts += [f"{category.name}/{part_by_path[sample.path]}" for sample in chosen]
        held_out += [*held, *category.validation_good]
    if len(paths) < 2:
        raise InputError(
            f"{options.data}: {len(paths)} good image to train on, expected at least 2 (dozens, better hundreds)"
        )
    known_parts = trained_parts if len(set(trained_parts)) < len(trained_parts) else None
    return _Training(paths, categories, known_parts, held_out, data_sha256([Sample(path) for path in paths]), pair)


def input_spec(recipe: Recipe) -> InputSpec:
    entry = backbone(recipe.backbone)
    return InputSpec(
        size_wh=recipe.size_wh,
        resize_wh=recipe.resize_wh or recipe.size_wh,
        mean=entry.mean,
        std=entry.std,
        roi=recipe.roi,
        tile_overlap=recipe.tile_overlap,
    )


def _rank_suspects(job: _Job, path: Path, console: Console) -> list[Suspect]:
    """Before training, by the pretrained features."""
    if job.options.weights == "random":
        raise UsageError("--suspects compares pretrained features; expected other --weights than random")
    encoder = backbone(job.recipe.backbone).build()
    load_weights(encoder, job.recipe.backbone, job.options.weights)
    images = GoodImages(job.training.paths, input_spec(job.recipe))
    parts = job.training.parts
    if parts is not None:
        parts = [part for part in parts for _ in range(images.spec.n_tiles)]
    suspects = rank_suspects(encoder.to(job.device).eval(), images, parts=parts, seed=job.recipe.seed)
    write_suspects(path, suspects, images)
    console.print(f"Training images least like the others, to look at: {path} and {sheet_path(path)}", markup=False)
    return suspects


def _rank_by_model(job: _Job, spec: ModelSpec, suspects: Sequence[Suspect], path: Path, console: Console) -> None:
    """After training, by what the model says of its own images as well."""
    if job.options.deadline_s is not None and time.monotonic() > job.options.deadline_s:
        raise OutOfTimeError("time is up before the training images are ranked by the model")
    scorer = TorchScorer(load_run(job.options.out)[0].to(job.device), spec)
    scored = score_samples(scorer, [Sample(suspect.path) for suspect in suspects], spec, progress=True)
    ranked = with_model(suspects, [float(each.score) for each in scored])
    write_suspects(path, ranked, GoodImages(job.training.paths, input_spec(job.recipe)))
    console.print(f"Ranked again with what the model says of them: {path}", markup=False)


def check_out(options: TrainOptions) -> bool:
    """Whether the folder holds a finished run to evaluate again; refuses to overwrite one."""
    finished = (options.out / SPEC_FILE).exists() and (options.out / WEIGHTS_FILE).exists()
    started = (options.out / CHECKPOINT_FILE).exists()
    if options.out.exists() and not options.out.is_dir():
        raise UsageError(f"{options.out}: is a file, expected a folder for the run")
    if (finished or started) and not options.resume:
        what = "a finished run" if finished else "a checkpoint"
        raise UsageError(f"{options.out}: already holds {what}; go on with --resume, or train into another folder")
    return finished


def _check_finished(job: _Job) -> ModelSpec:
    """The spec of a finished run, if it is the one that would be trained now."""
    options = job.options
    spec = _read_spec(options.out)
    wanted, found = _resolved(job), spec.training.recipe
    differing = [key for key in wanted if wanted[key] != found.get(key)]
    if (options.weights == "random") != (found.get("initial_weights") == "random"):
        differing.append("initial weights")
    if job.training.sha256 != spec.training.data_sha256:
        differing.append("images")
    if differing:
        raise UsageError(
            f"{options.out}: holds a finished training with other {', '.join(differing)}; give the same options, or "
            "train into another folder"
        )
    return spec


def _read_spec(out: Path) -> ModelSpec:
    path = out / SPEC_FILE
    return ModelSpec.loads(path.read_bytes(), where=str(path))


def _resolved(job: _Job) -> dict[str, Any]:
    return {**job.recipe.model_dump(mode="json"), "recipe": job.options.recipe}


def _fit(job: _Job, console: Console) -> ModelSpec:
    options, recipe, device, training = job.options, job.recipe, job.device, job.training
    torch.manual_seed(recipe.seed)
    model = ReContrast(recipe.backbone, encoder_bn=recipe.encoder_bn, discriminator=recipe.discriminator)
    weights_digest = model.load_encoder_weights(options.weights)
    resolved = {**_resolved(job), "initial_weights": weights_digest}
    fingerprint = hashlib.sha256(json.dumps([resolved, training.sha256], sort_keys=True).encode()).hexdigest()

    console.print(_recipe_table(resolved, job))
    if training.held_out and is_main():
        _write_holdout(options.out, training.held_out)
    workers = options.workers
    if workers is None:
        # On the CPU the network needs the cores, and the cache makes reading rare.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = min(8, max(1, (os.cpu_count() or 1) // processes)) if device.type == "cuda" else 0
    images = GoodImages(training.paths, input_spec(recipe), categories=training.categories)
    checkpoint = options.out / CHECKPOINT_FILE
    with _progress(console) as progress, _stop_signals() as stopped:
        task = progress.add_task("training", total=recipe.iterations, loss="-")

        def report(done: int, loss: float | None) -> None:
            known = "-" if loss is None else f"{loss:.4f}"
            progress.update(task, completed=done, loss=known)
            # A bar cannot be drawn into a log file; twenty lines can.
            if not console.is_terminal and done % max(1, recipe.iterations // 20) == 0:
                console.print(f"iteration {done} of {recipe.iterations}, loss {known}")

        fitted = fit(
            model,
            images,
            recipe,
            checkpoint=checkpoint,
            fingerprint=fingerprint,
            resume=options.resume,
            device=device,
            workers=workers,
            checkpoint_every_s=options.checkpoint_every_s,
            on_iteration=report,
            should_stop=lambda: bool(stopped),
            deadline_s=options.deadline_s,
        )
    console.print(_speed(fitted, device))
    with all_or_none():
        if is_main():
            _save(job, resolved, model, images, fitted.losses)
            checkpoint.unlink(missing_ok=True)
    return _read_spec(options.out)


def _speed(fitted: Fitted, device: torch.device) -> str:
    """What tells a user whether the reading of images or the network is the slow part."""
    share = fitted.data_wait_s / fitted.duration_s if fitted.duration_s else 0.0
    line = (
        f"Trained for {fitted.duration_s:.1f} s, {fitted.images / max(fitted.duration_s, 1e-9):.1f} images/s, "
        f"{fitted.data_wait_s:.1f} s of it ({share:.0%}) waiting for images"
    )
    if device.type == "cuda":
        line += f", at most {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory"
    return line


def _save(job: _Job, resolved: dict[str, Any], model: ReContrast, images: GoodImages, losses: list[float]) -> None:
    """Write the run folder: weights and spec, losses and their curve."""
    options, dataset, recipe, device, training = job.options, job.dataset, job.recipe, job.device, job.training
    entry = backbone(recipe.backbone)
    weights = weights_bytes(model)
    spec = ModelSpec(
        class_name=options.class_name or dataset.name,
        backbone=recipe.backbone,
        input=images.spec,
        levels=tuple(Level(stride=s, channels=c) for s, c in zip(STRIDES, entry.channels, strict=True)),
        scoring=Scoring(
            blur_sigma=recipe.blur_sigma,
            rule=recipe.score_rule,
            top_fraction=recipe.top_fraction,
            level_weights=_level_weights(model, images, recipe),
            discriminator_weight=recipe.discriminator_weight if recipe.discriminator else None,
        ),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        training=Training(
            recipe=resolved,
            data=dataset.name,
            n_images=len(training.paths),
            data_sha256=training.sha256,
            iterations=recipe.iterations,
            software={
                "recontrast-edge": __version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            },
        ),
    )
    spec = with_training_images(spec, model, training.paths)
    write_losses(options.out, losses)
    save_run(options.out, weights, spec)


def _level_weights(model: ReContrast, images: GoodImages, recipe: Recipe) -> tuple[float, ...] | None:
    if not recipe.standardise_levels:
        return None if set(recipe.level_weights) == {1.0} else recipe.level_weights
    spreads = level_spreads(model, images)
    return tuple(float(weight / spread) for weight, spread in zip(recipe.level_weights, spreads, strict=True))


def _write_holdout(out: Path, held_out: list[Sample]) -> None:
    lines = []
    for sample in held_out:
        # Relative to the list, so that a project folder can move as a whole.
        path = os.path.relpath(sample.path.resolve(), out.resolve())
        line = path if sample.part is None else f"{path}\t{sample.part}"
        try:
            lines.append(line.encode())
        except UnicodeEncodeError:
            raise InputError(
                f"{path!r}: a name that is no text cannot be listed in {HOLDOUT_FILE}; rename it"
            ) from None
    with atomic_write(out / HOLDOUT_FILE) as file:
        file.write(b"# good images kept out of training, for `recontrast-edge calibrate`\n")
        file.writelines(line + b"\n" for line in lines)


def _evaluate(job: _Job, spec: ModelSpec) -> None:
    """Evaluate each category that has a test set, unless its folder holds just that evaluation already."""
    options, dataset, out = job.options, job.dataset, job.options.out
    scorer: TorchScorer | None = None
    for category in dataset.categories or (dataset,):
        if not category.test:
            continue
        folder = out / category.name if dataset.categories else out
        identity = {
            "weights_sha256": spec.weights_sha256,
            "data": {"name": category.name, "sha256": data_sha256(category.test)},
        }
        known = read_metrics(folder) or {}
        if all(known.get(key) == value for key, value in identity.items()):
            continue
        if options.deadline_s is not None and time.monotonic() > options.deadline_s:
            raise OutOfTimeError(f"time is up before the evaluation of {category.name}")
        if scorer is None:
            scorer = TorchScorer(load_run(out)[0].to(job.device), spec)
        result = evaluate(scorer, category.test, spec, progress=True)
        write_report(folder, result, category.name)
        with atomic_write(folder / METRICS_FILE) as file:
            file.write((json.dumps({**result.to_json(), **identity}, indent=2) + "\n").encode())
        show_evaluation(result, category.name, foreign=False)


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """What a run folder's ``metrics.json`` holds; None where there is none that can be read."""
    try:
        content = json.loads((folder / METRICS_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _recipe_table(resolved: dict[str, Any], job: _Job) -> Table:
    counts = f"{len(job.training.paths)} good images, {len(job.training.held_out)} held out"
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    table = Table(title=f"{job.dataset.name}: {counts}, on {job.device}{processes}", show_header=False)
    for key, value in resolved.items():
        table.add_row(key, str(value))
    return table


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put into; the second one ends the process the default way."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
