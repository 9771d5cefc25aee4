"""The optimisation loop, with checkpoints it can go on from, bit for bit, after a kill at any moment.

losses = fit(model, images, recipe, checkpoint=Path("runs/tiles/checkpoint.safetensors"))
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from recontrast_edge.errors import MissingError, ModelError, RecontrastError, UsageError
from recontrast_edge.images import atomic_write
from recontrast_train.augmentation import Augmentation, Batch
from recontrast_train.data import GoodImages, balanced_batches, batches, make_loader
from recontrast_train.discriminator import discriminator_loss
from recontrast_train.loss import mining_alpha, recontrast_loss
from recontrast_train.model import ReContrast
from recontrast_train.recipe import Recipe


class TrainingStoppedError(Exception):
    """Training was asked to stop; the checkpoint holds everything so far."""


@dataclass
class _State:
    """What a checkpoint holds besides the model."""

    optimizers: list[torch.optim.AdamW]
    scaler: torch.amp.GradScaler
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


def check_precision(recipe: Recipe, device: torch.device) -> None:
    """Refuse what the device cannot do.

    Raises:
        MissingError: fp16 without a GPU.
    """
    if recipe.precision == "fp16" and device.type != "cuda":
        raise MissingError("precision fp16 needs a CUDA GPU; use bf16 or fp32 on the CPU")


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
) -> list[float]:
    """Train until the recipe's last iteration.

    Args:
        model: with its encoders' weights loaded.
        images: the good images.
        recipe: all options.
        checkpoint: file to write now and then, and to resume from.
        fingerprint: identity of recipe, data and initial weights; a checkpoint of another one is refused.
        resume: go on from ``checkpoint`` if it is there.
        device: where to train; None for the CPU.
        workers: reader processes.
        checkpoint_every_s: seconds between checkpoints.
        on_iteration: called after each iteration with the number done and the latest loss known.
        should_stop: asked after each iteration.

    Returns:
        The loss of every iteration.

    Raises:
        TrainingStoppedError: ``should_stop`` said so; the checkpoint is written.
        ModelError: the loss is no longer finite, or the checkpoint is damaged or of another training.
    """
    device = device or torch.device("cpu")
    check_precision(recipe, device)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model.to(device=device)
    # The stubs of Module.to do not know the argument.
    model.to(memory_format=layout)  # type: ignore[call-overload]
    model.encoder_bn = recipe.encoder_bn
    model.train()
    state = _State(
        make_optimizers(model, recipe), torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
    )
    if resume and checkpoint.is_file():
        _load_checkpoint(checkpoint, model, state, fingerprint)
    start = len(state.losses)
    span = {"seed": recipe.seed, "start": start, "stop": recipe.iterations}
    if recipe.class_balanced:
        order = balanced_batches(images.categories, recipe.batch, **span)
    else:
        order = batches(len(images), recipe.batch, **span)
    loader = make_loader(Augmentation(images, recipe), order, start=start, workers=workers, pin=device.type == "cuda")
    rates = [optimizer.param_groups[0]["lr"] for optimizer in make_optimizers(model, recipe)]
    cast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.precision)
    # Reading a loss waits for the GPU, so losses are read some at a time.
    unread: list[Tensor] = []
    saved_s = time.monotonic()
    for iteration, batch in enumerate(loader, start):
        dropped = recipe.lr_drop_at is not None and iteration >= recipe.lr_drop_at * recipe.iterations
        for optimizer, rate in zip(state.optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * (recipe.lr_drop_factor if dropped else 1.0)
            optimizer.zero_grad(set_to_none=True)
        batch = _to_device(batch, device, layout)
        alpha = mining_alpha(
            iteration, recipe.iterations, start=recipe.alpha_start, end=recipe.alpha_end, ramp=recipe.alpha_ramp
        )
        loss = _loss(model, batch, alpha, torch.autocast(device.type, dtype=cast, enabled=cast is not None))
        state.scaler.scale(loss).backward()
        for optimizer in state.optimizers:
            state.scaler.step(optimizer)
        state.scaler.update()
        unread.append(loss.detach())

        done = iteration + 1
        stop = should_stop() and done < recipe.iterations
        due = time.monotonic() - saved_s > checkpoint_every_s and done < recipe.iterations
        if stop or due or device.type == "cpu" or len(unread) >= 20 or done == recipe.iterations:
            _read_losses(unread, state.losses)
        if stop or due:
            save_checkpoint(checkpoint, model, state, fingerprint)
            saved_s = time.monotonic()
        on_iteration(done, state.losses[-1] if state.losses else None)
        if stop:
            raise TrainingStoppedError(f"stopped after {done} of {recipe.iterations} iterations")
    return state.losses


def _to_device(batch: Batch, device: torch.device, layout: torch.memory_format) -> Batch:
    clean = batch.clean.to(device=device, memory_format=layout, non_blocking=True)
    if batch.altered is None or batch.masks is None:
        return Batch(clean, None, None)
    altered = batch.altered.to(device=device, memory_format=layout, non_blocking=True)
    return Batch(clean, altered, batch.masks.to(device, non_blocking=True))


def _loss(model: ReContrast, batch: Batch, alpha: float, autocast: torch.autocast) -> Tensor:
    if batch.altered is None or batch.masks is None:
        with autocast:
            pairs = model(batch.clean)
        return recontrast_loss(pairs, alpha)
    with autocast:
        denoised = model.denoise(batch.clean, batch.altered)
        logits = None if model.discriminator is None else model.discriminate(denoised.seen)
    loss = recontrast_loss(denoised.pairs, alpha)
    return loss if logits is None else loss + discriminator_loss(logits, batch.masks)


def _read_losses(unread: list[Tensor], losses: list[float]) -> None:
    values = torch.stack(unread).tolist()
    unread.clear()
    for value in values:
        if not math.isfinite(value):
            raise ModelError(
                f"training diverged: the loss is {value} at iteration {len(losses) + 1}; lower lr_decoder and "
                "lr_encoder, raise eps (the stable recipes have 1e-10 with amsgrad), or use precision fp32"
            )
        losses.append(value)


def save_checkpoint(path: Path, model: ReContrast, state: _State, fingerprint: str) -> None:
    """Write everything that training needs to go on, as one safetensors file, atomically."""
    tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
    for index, optimizer in enumerate(state.optimizers):
        for parameter, values in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer{index}/{parameter}/{key}": value for key, value in values.items()})
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
        model.load_state_dict(
            {key.removeprefix("model/"): value for key, value in tensors.items() if key.startswith("model/")}
        )
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
