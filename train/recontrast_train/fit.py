"""The optimisation loop, with checkpoints it can go on from, bit for bit, after a kill at any moment.

losses = fit(model, images, recipe, checkpoint=Path("runs/tiles/checkpoint.safetensors"), fingerprint="").losses
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import safetensors
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from recontrast_edge.errors import (
    EXIT_INTERRUPTED,
    EXIT_UNFINISHED,
    InputError,
    MissingError,
    ModelError,
    RecontrastError,
    UsageError,
)
from recontrast_edge.images import atomic_write
from recontrast_train.augmentation import Augmentation, Batch
from recontrast_train.data import GoodImages, balanced_batches, batches, make_loader
from recontrast_train.discriminator import discriminator_loss
from recontrast_train.distributed import (
    all_or_none,
    any_rank,
    is_main,
    mean_over_ranks,
    same_on_all_ranks,
    synchronise_batch_norm,
    world_size,
)
from recontrast_train.ema import WeightAverage
from recontrast_train.loss import mining_alpha, recontrast_loss
from recontrast_train.model import ReContrast
from recontrast_train.recipe import Recipe


class TrainingStoppedError(Exception):
    """Training was asked to stop; the checkpoint holds everything so far."""

    exit_code: ClassVar[int] = EXIT_INTERRUPTED


class OutOfTimeError(TrainingStoppedError):
    """The time that training was given is over; the checkpoint holds everything so far."""

    exit_code: ClassVar[int] = EXIT_UNFINISHED


@dataclass(frozen=True)
class Fitted:
    """What an optimisation did.

    Attributes:
        losses: of every iteration, those before a resumption included.
        images: seen since this start, by all processes together.
        duration_s: of the iterations since this start, seconds.
        data_wait_s: part of it that this process waited for images, seconds.
    """

    losses: list[float]
    images: int
    duration_s: float
    data_wait_s: float


@dataclass
class _State:
    """What a checkpoint holds besides the model."""

    optimizers: list[torch.optim.AdamW]
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    losses: list[float] = field(default_factory=list)


def make_optimizers(model: ReContrast, recipe: Recipe) -> list[torch.optim.AdamW]:
    """One AdamW for bottleneck, decoder and heads, one for the trained encoder, one for a discriminator."""
    fresh = [*model.bottleneck.parameters(), *model.decoder.parameters(), *model.heads.parameters()]
    groups = [(fresh, recipe.lr_decoder), (list(model.encoder.parameters()), recipe.lr_encoder)]
    if model.discriminator is not None:
        groups.append((list(model.discriminator.parameters()), recipe.lr_discriminator))
    return [
        torch.optim.AdamW(
            parameters,
            lr=rate,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            eps=recipe.eps,
            amsgrad=recipe.amsgrad,
        )
        for parameters, rate in groups
    ]


def check_options(recipe: Recipe, device: torch.device) -> None:
    """Refuse what the device cannot do, and a batch that the processes cannot share.

    Raises:
        MissingError: fp16 without a GPU.
        UsageError: a batch that is not divisible by the number of processes.
    """
    if recipe.precision == "fp16" and device.type != "cuda":
        raise MissingError("precision fp16 needs a CUDA GPU; use bf16 or fp32 on the CPU")
    if recipe.batch % world_size():
        raise UsageError(
            f"a batch of {recipe.batch} images cannot be shared evenly by {world_size()} processes; choose a "
            f"multiple of {world_size()} for --batch, or another number of processes"
        )


def fit(
    model: ReContrast,
    images: GoodImages,
    recipe: Recipe,
    *,
    checkpoint: Path,
    fingerprint: str,
    resume: bool = False,
    device: torch.device | None = None,
    workers: int = 0,
    checkpoint_every_s: float = 120.0,
    on_iteration: Callable[[int, float | None], None] = lambda iteration, loss: None,
    should_stop: Callable[[], bool] = lambda: False,
    deadline_s: float | None = None,
) -> Fitted:
    """Train until the recipe's last iteration; with ``ema``, the model's weights are the averaged ones then.

    Of several processes, each gives the same arguments, and all stop or fail together.

    Args:
        model: with its encoders' weights loaded.
        images: the good images.
        recipe: all options.
        checkpoint: file to write now and then, and to resume from; process 0 writes it.
        fingerprint: identity of recipe, data and initial weights; a checkpoint of another one is refused.
        resume: go on from ``checkpoint`` if it is there.
        device: where to train; None for the CPU.
        workers: processes that prepare images, for each training process.
        checkpoint_every_s: seconds between checkpoints.
        on_iteration: called after each iteration with the number done and the latest loss known.
        should_stop: asked after each iteration.
        deadline_s: moment of ``time.monotonic`` to be done by, the checkpoint included; None for none.

    Raises:
        TrainingStoppedError: ``should_stop`` said so; the checkpoint is written.
        OutOfTimeError: another iteration would not fit before the deadline; the checkpoint is written.
        ModelError: the loss is no longer finite, or the checkpoint is damaged or of another training.
        InputError: an image cannot be read.
    """
    device = device or torch.device("cpu")
    check_options(recipe, device)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model.to(device=device)
    # The stubs of Module.to do not know the argument.
    model.to(memory_format=layout)  # type: ignore[call-overload]
    synchronise_batch_norm(model, device)
    model.encoder_bn = recipe.encoder_bn
    model.train()
    state = _State(
        make_optimizers(model, recipe),
        torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16"),
        WeightAverage(model, recipe.ema) if recipe.ema else None,
    )
    with all_or_none():
        if resume and checkpoint.is_file():
            _load_checkpoint(checkpoint, model, state, fingerprint)
    start = len(state.losses)
    if not same_on_all_ranks(start):
        raise UsageError(f"{checkpoint}: not the same for all processes; expected a folder that all machines share")
    step: nn.Module = _Step(model)
    if world_size() > 1:
        step = DistributedDataParallel(step, device_ids=[device.index] if device.type == "cuda" else None)
    loader = iter(_batches(images, recipe, device, start=start, workers=workers))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in make_optimizers(model, recipe)]
    cast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.precision)
    # Reading a loss waits for the GPU, so losses are read some at a time.
    unread: list[Tensor] = []
    recent_s: deque[float] = deque(maxlen=50)
    saving_s: float | None = None
    data_wait_s = 0.0
    started_s = saved_s = ended_s = time.monotonic()
    for iteration in range(start, recipe.iterations):
        with all_or_none():
            asked_s = time.monotonic()
            batch = _to_device(_next(loader), device, layout)
            data_wait_s += time.monotonic() - asked_s
        dropped = recipe.lr_drop_at is not None and iteration >= recipe.lr_drop_at * recipe.iterations
        for optimizer, rate in zip(state.optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * (recipe.lr_drop_factor if dropped else 1.0)
            optimizer.zero_grad(set_to_none=True)
        alpha = mining_alpha(
            iteration, recipe.iterations, start=recipe.alpha_start, end=recipe.alpha_end, ramp=recipe.alpha_ramp
        )
        loss = step(batch, alpha, torch.autocast(device.type, dtype=cast, enabled=cast is not None))
        state.scaler.scale(loss).backward()
        for optimizer in state.optimizers:
            state.scaler.step(optimizer)
        state.scaler.update()
        done = iteration + 1
        if state.average is not None:
            state.average.update(done)
        unread.append(loss.detach())

        now_s = time.monotonic()
        recent_s.append(now_s - ended_s)
        ended_s = now_s
        # The first checkpoint comes at once where time is short: it shows how long the last one will take.
        due = now_s - saved_s > checkpoint_every_s or (deadline_s is not None and saving_s is None)
        late = deadline_s is not None and now_s + 2 * max(recent_s) + 2 * (saving_s or 0.0) > deadline_s
        stop, late, due = any_rank(should_stop(), late, due)
        last = done == recipe.iterations
        save = (stop or late or due) and not last
        if save or last or device.type == "cpu" or len(unread) >= 20:
            _read_losses(unread, state.losses)
        if save:
            with all_or_none():
                if is_main():
                    save_checkpoint(checkpoint, model, state, fingerprint)
            saved_s = ended_s = time.monotonic()
            saving_s = saved_s - now_s
        on_iteration(done, state.losses[-1] if state.losses else None)
        if save and stop:
            raise TrainingStoppedError(f"stopped after {done} of {recipe.iterations} iterations")
        if save and late:
            raise OutOfTimeError(f"time is up after {done} of {recipe.iterations} iterations")
    if state.average is not None:
        state.average.copy_to_model()
    images_seen = (recipe.iterations - start) * recipe.batch
    return Fitted(state.losses, images_seen, time.monotonic() - started_s, data_wait_s)


def _batches(
    images: GoodImages, recipe: Recipe, device: torch.device, *, start: int, workers: int
) -> DataLoader[Batch]:
    span = {"seed": recipe.seed, "start": start, "stop": recipe.iterations}
    if recipe.class_balanced:
        order = balanced_batches(images.categories, recipe.batch, **span)
    else:
        order = batches(len(images), recipe.batch, **span)
    if workers:
        with all_or_none():
            images.load(workers)
    return make_loader(Augmentation(images, recipe), order, start=start, workers=workers, pin=device.type == "cuda")


class _Step(nn.Module):
    """From a batch to its loss: what is done in parallel."""

    def __init__(self, model: ReContrast) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, alpha: float, autocast: torch.autocast) -> Tensor:
        if batch.altered is None or batch.masks is None:
            with autocast:
                pairs = self.model(batch.clean)
            return recontrast_loss(pairs, alpha)
        with autocast:
            denoised = self.model.denoise(batch.clean, batch.altered)
            logits = None if self.model.discriminator is None else self.model.discriminate(denoised.seen)
        loss = recontrast_loss(denoised.pairs, alpha)
        return loss if logits is None else loss + discriminator_loss(logits, batch.masks)


def _next(loader: Iterator[Batch]) -> Batch:
    try:
        return next(loader)
    except InputError as error:
        # From a worker it comes with the worker's traceback, whose last line is the message.
        *_, last = str(error).strip().splitlines()
        raise InputError(last.rpartition(f"{InputError.__name__}: ")[2]) from None


def _to_device(batch: Batch, device: torch.device, layout: torch.memory_format) -> Batch:
    clean = batch.clean.to(device=device, memory_format=layout, non_blocking=True)
    if batch.altered is None or batch.masks is None:
        return Batch(clean, None, None)
    altered = batch.altered.to(device=device, memory_format=layout, non_blocking=True)
    return Batch(clean, altered, batch.masks.to(device, non_blocking=True))


def _read_losses(unread: list[Tensor], losses: list[float]) -> None:
    values = mean_over_ranks(torch.stack(unread)).tolist()
    unread.clear()
    for value in values:
        if not math.isfinite(value):
            raise ModelError(
                f"training diverged: the loss is {value} at iteration {len(losses) + 1}; lower lr_decoder and "
                "lr_encoder, set encoder_bn to eval, or use precision fp32"
            )
        losses.append(value)


def save_checkpoint(path: Path, model: ReContrast, state: _State, fingerprint: str) -> None:
    """Write everything that training needs to go on, as one safetensors file, atomically."""
    tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
    for index, optimizer in enumerate(state.optimizers):
        for parameter, values in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer{index}/{parameter}/{key}": value for key, value in values.items()})
    if state.average is not None:
        tensors.update({f"average/{key}": value for key, value in state.average.state_dict().items()})
    header = {
        "fingerprint": fingerprint,
        "losses": json.dumps(state.losses),
        "scaler": json.dumps(state.scaler.state_dict()),
    }
    with atomic_write(path) as file:
        file.write(save_tensors({key: value.contiguous().cpu() for key, value in tensors.items()}, metadata=header))


def _load_checkpoint(path: Path, model: ReContrast, state: _State, fingerprint: str) -> None:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged checkpoint ({error}); delete it and train from the start") from None
    if header.get("fingerprint") != fingerprint:
        raise UsageError(
            f"{path}: this checkpoint belongs to another recipe, data set or initial weights; resume with the same "
            "options, or train into another folder"
        )
    try:
        model.load_state_dict(_under("model/", tensors))
        if state.average is not None:
            state.average.load_state_dict(_under("average/", tensors))
        for index, optimizer in enumerate(state.optimizers):
            own = optimizer.state_dict()
            own["state"] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer{index}/"):
                    _, parameter, name = key.split("/")
                    own["state"].setdefault(int(parameter), {})[name] = value
            optimizer.load_state_dict(own)
        state.scaler.load_state_dict(json.loads(header["scaler"]))
        state.losses = [float(value) for value in json.loads(header["losses"])]
    except RecontrastError:
        raise
    except (RuntimeError, KeyError, ValueError) as error:
        raise ModelError(f"{path}: damaged checkpoint ({error}); delete it and train from the start") from None


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
