"""Fine-tuning with quantisation: ``recontrast-edge train --resume RUN --qat INT8``.

    fine_tune(QatOptions(run=Path("runs/tiles"), data=Path("tiles"), out=Path("runs/tiles-int8")))

The finished float model is the teacher. A copy of it that computes in simulated INT8 learns, on the same good images
and on pseudo-defects pasted into them, to give the teacher's features and distances again. Nothing else is learnt: what
the model takes for good, and with which weights its levels count, stays the teacher's.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from recontrast_edge import __version__
from recontrast_edge.artifact import SPEC_FILE, WEIGHTS_FILE
from recontrast_edge.datasets import Dataset, file_sha256, find_dataset
from recontrast_edge.errors import InputError, ModelError, UsageError
from recontrast_edge.images import read_image
from recontrast_edge.spec import IMAGE_DIGEST_DIGITS, ModelSpec
from recontrast_train.augmentation import Augmentation, Batch
from recontrast_train.data import GoodImages, batches, make_loader
from recontrast_train.discriminator import Pairs
from recontrast_train.distributed import choose_device, launched
from recontrast_train.int8_model import SCALES, Int8ReContrast
from recontrast_train.model import ReContrast
from recontrast_train.recipe import Recipe
from recontrast_train.report import write_losses
from recontrast_train.run import copy_holdout, load_run, save_run, weights_bytes
from recontrast_train.score import TorchScorer, with_training_images

ITERATIONS = 300

SCALE_IMAGES = 64
"""Good images that activations' first scales are found on, as many as post-training quantisation takes."""

PROBE_IMAGES = 8
"""Images that the distance from the teacher is measured on, before and after."""

PSEUDO_DEFECTS = 0.5
"""Share of a batch with pseudo-defects: student and teacher shall agree on what is not good, too."""

Item = TypeVar("Item")

LR_WEIGHTS = 1e-5
LR_SCALES = 1e-3
"""Of the scales' logarithms: a step of Adam changes a scale by at most 0.1 %."""


@dataclass(frozen=True)
class QatOptions:
    """What the command line gives.

    Attributes:
        run: folder of the finished training; the teacher.
        data: the data set that it was trained on, as ``find_dataset`` takes it.
        out: run folder to write.
        iterations: steps.
        batch, seed, precision: as in a recipe; None for the run's.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        workers: processes that prepare images; None chooses.
    """

    run: Path
    data: Path
    out: Path
    iterations: int = ITERATIONS
    batch: int | None = None
    seed: int | None = None
    precision: str | None = None
    device: str = "auto"
    workers: int | None = None


@dataclass(frozen=True)
class FineTuned:
    """A written run.

    Attributes:
        spec: of the INT8 model.
        error_before, error_after: root mean square error of the maps on at most ``PROBE_IMAGES`` images, in standard
            deviations of the teacher's maps.
        losses: of every iteration.
    """

    spec: ModelSpec
    error_before: float
    error_after: float
    losses: list[float]


def fine_tune(options: QatOptions, console: Console | None = None) -> FineTuned:
    """Fine-tune, and write the run folder at the end; a training that is stopped leaves nothing behind.

    Args:
        options: what the command line gives.
        console: where progress goes; standard error by default.

    Raises:
        RecontrastError: a damaged run, data that it was not trained on, options out of range, a diverged loss.
    """
    console = console or Console(stderr=True)
    _check(options)
    device = choose_device(options.device)
    teacher, spec = load_run(options.run)
    if isinstance(teacher, Int8ReContrast):
        raise UsageError(f"{options.run}: is fine-tuned for INT8 already; give the run that it was made from")
    recipe = _recipe(spec, options)
    dataset = find_dataset(options.data)
    paths = _training_paths(dataset, spec)
    images = GoodImages(paths, spec.input)
    probe = [read_image(path) for path in _spread(_unseen(dataset, paths) or paths, PROBE_IMAGES)]

    student = Int8ReContrast(spec.backbone, discriminator=teacher.discriminator is not None)
    student.load_float(teacher)
    student.to(device)
    teacher.to(device)
    reference = TorchScorer(teacher, spec)(probe).maps
    student.find_scales(batch.to(device) for batch in _scale_batches(images, recipe))

    def error() -> float:
        difference = TorchScorer(student, spec)(probe).maps - reference
        return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))) / max(float(reference.std()), 1e-12))

    before = error()
    console.print(f"INT8 as trained, {len(probe)} images: map error {before:.1%} of its standard deviation")
    losses = _fit(student, teacher, spec, images, recipe, device, options.workers, console)
    after = error()
    console.print(f"INT8 fine-tuned: map error {after:.1%}")
    return FineTuned(_save(student.cpu(), spec, recipe, paths, losses, options, device), before, after, losses)


def distillation_loss(student: Pairs, teacher: Pairs) -> Tensor:
    """How far one model's pairs are from another's, summed over views and levels.

    The squared error of the distances, in variances of the teacher's, is what the map is made of. The cosine distances
    of features and reconstructions hold on to what good images do not show: a distance can be right by chance.

    Args:
        student, teacher: ``pairs[view][level]``, see ``ReContrast``; computed in float32 whatever their dtype.

    Returns:
        Scalar.
    """
    total = student[0][0][0].new_zeros((), dtype=torch.float32)
    for levels, wanted_levels in zip(student, teacher, strict=True):
        for (target, rebuilt), (wanted_target, wanted_rebuilt) in zip(levels, wanted_levels, strict=True):
            distance = _distance(target, rebuilt)
            wanted = _distance(wanted_target, wanted_rebuilt)
            total = total + functional.mse_loss(distance, wanted) / wanted.var().clamp_min(1e-8)
            total = total + _distance(target, wanted_target).mean() + _distance(rebuilt, wanted_rebuilt).mean()
    return total


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return 1 - functional.cosine_similarity(a.float(), b.float(), dim=1)


def _fit(
    student: Int8ReContrast,
    teacher: ReContrast,
    spec: ModelSpec,
    images: GoodImages,
    recipe: Recipe,
    device: torch.device,
    workers: int | None,
    console: Console,
) -> list[float]:
    student.requires_grad_(True)
    teacher.requires_grad_(False)
    if student.discriminator is not None:
        # It learnt from masks, which the student does not see.
        student.discriminator.requires_grad_(False)
    scales = list(student.log_scales.values())
    weights = [
        value for name, value in student.named_parameters() if value.requires_grad and not name.startswith(SCALES)
    ]
    optimizer = torch.optim.Adam([{"params": weights, "lr": LR_WEIGHTS}, {"params": scales, "lr": LR_SCALES}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.iterations)
    order = batches(len(images), recipe.batch, seed=recipe.seed, start=0, stop=recipe.iterations)
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
    loader = make_loader(Augmentation(images, recipe), order, start=0, workers=workers, pin=device.type == "cuda")
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16")
    losses: list[float] = []
    for iteration, batch in enumerate(loader, 1):
        seen = _seen(batch).to(device)
        with torch.no_grad(), autocast:
            wanted = teacher(seen)
        with autocast:
            pairs = student(seen)
        loss = distillation_loss(pairs, wanted)
        if spec.scoring.discriminator_weight:
            with torch.no_grad():
                probability = torch.sigmoid(teacher.discriminate(wanted))
            error = functional.mse_loss(torch.sigmoid(student.discriminate(pairs)), probability)
            loss = loss + spec.scoring.discriminator_weight**2 * error
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ModelError(
                f"fine-tuning diverged: the loss is {losses[-1]} at iteration {iteration}; use --precision fp32"
            )
        if iteration % max(1, recipe.iterations // 20) == 0:
            console.print(f"iteration {iteration} of {recipe.iterations}, loss {losses[-1]:.4f}")
    return losses


def _scale_batches(images: GoodImages, recipe: Recipe) -> Iterator[Tensor]:
    """Good images and their copies with pseudo-defects, which go beyond what good parts excite in the network."""
    count = math.ceil(SCALE_IMAGES / recipe.batch)
    order = batches(len(images), recipe.batch, seed=recipe.seed, start=0, stop=count)
    for batch in make_loader(Augmentation(images, recipe), order, start=0, workers=0, pin=False):
        yield batch.clean if batch.altered is None else torch.cat([batch.clean, batch.altered])


def _seen(batch: Batch) -> Tensor:
    """The images of a batch, those with pseudo-defects in place of their originals."""
    if batch.altered is None:
        return batch.clean
    return torch.cat([batch.altered, batch.clean[len(batch.altered) :]])


def _check(options: QatOptions) -> None:
    if launched():
        raise UsageError("--qat runs in one process; start it without torchrun")
    if options.out.resolve() == options.run.resolve():
        raise UsageError(f"{options.out}: is the run to go on from; name another folder for --out")
    if options.out.exists() and not options.out.is_dir():
        raise UsageError(f"{options.out}: is a file, expected a folder for the run")
    if (options.out / SPEC_FILE).exists() or (options.out / WEIGHTS_FILE).exists():
        raise UsageError(f"{options.out}: already holds a run; name another folder for --out")


def _recipe(spec: ModelSpec, options: QatOptions) -> Recipe:
    """The run's own recipe, with the options of the fine-tuning."""
    known = {key: value for key, value in spec.training.recipe.items() if key in Recipe.model_fields}
    # Half precision would want its gradients scaled, for which there is no need here.
    precision = options.precision or ("bf16" if known.get("precision") == "fp16" else known.get("precision", "fp32"))
    if precision not in ("fp32", "bf16"):
        raise UsageError(f"--precision {precision} with --qat: expected fp32 or bf16")
    given = {"iterations": options.iterations, "precision": precision, "pseudo_defects": PSEUDO_DEFECTS}
    given |= {key: value for key in ("batch", "seed") if (value := getattr(options, key)) is not None}
    try:
        return Recipe.model_validate({**known, **given})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise UsageError(f"--qat: {field}: {first['msg']}") from None


def _training_paths(dataset: Dataset, spec: ModelSpec) -> list[Path]:
    """The images that the teacher was trained on: others must stay unseen, for calibration rests on them."""
    trained_on = set(spec.training.image_digests)
    paths = [sample.path for sample in dataset.training_samples()]
    known = [path for path in paths if file_sha256(path)[:IMAGE_DIGEST_DIGITS] in trained_on]
    if len(known) < 2:
        raise InputError(
            f"{dataset.name}: the run was trained on {len(known)} of its {len(paths)} good images; give the data set "
            "of that training"
        )
    return known


def _unseen(dataset: Dataset, paths: Sequence[Path]) -> list[Path]:
    """Images of the data set that are not trained on, defective ones included."""
    samples = [*dataset.training_samples(), *dataset.test]
    trained_on = set(paths)
    return [sample.path for sample in samples if sample.path not in trained_on]


def _spread(values: Sequence[Item], count: int) -> list[Item]:
    count = min(count, len(values))
    return [values[index] for index in np.linspace(0, len(values) - 1, count).round().astype(int)]


def _save(
    student: Int8ReContrast,
    spec: ModelSpec,
    recipe: Recipe,
    paths: Sequence[Path],
    losses: list[float],
    options: QatOptions,
    device: torch.device,
) -> ModelSpec:
    weights = weights_bytes(student)
    fine_tuning = {
        "precision": "int8",
        "teacher_sha256": spec.weights_sha256,
        **{key: getattr(recipe, key) for key in ("iterations", "batch", "seed")},
        "autocast": recipe.precision,
    }
    software = {
        **spec.training.software,
        "recontrast-edge": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    training = spec.training.model_copy(
        update={"recipe": {**spec.training.recipe, "qat": fine_tuning}, "software": software}
    )
    spec = spec.model_copy(
        update={"weights_sha256": hashlib.sha256(weights).hexdigest(), "training": training, "threshold": None}
    )
    seen = training.image_digests
    spec = with_training_images(spec, student, paths)
    # The teacher's, also those that the data set has lost since.
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"image_digests": seen})})
    write_losses(options.out, losses)
    copy_holdout(options.run, options.out)
    save_run(options.out, weights, spec)
    return spec
