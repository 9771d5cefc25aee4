"""Several processes that train one model together, as ``torchrun`` starts them.

    torchrun --nproc-per-node 2 -m recontrast_edge train tiles --out runs/tiles

Each process takes its share of every batch. Gradients are averaged by ``DistributedDataParallel``; what a loss or a
BatchNorm takes from the whole batch is computed over the whole batch here, so that several processes do what one would.
Process 0 alone writes and prints. Without ``torchrun`` there is one process, and nothing here changes what it does.
"""

from __future__ import annotations

import gc
import importlib
import os
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from recontrast_edge.errors import MissingError, ModelError, RecontrastError, UsageError

TIMEOUT = timedelta(days=1)
"""How long processes wait for each other: long, because all wait while process 0 evaluates. When one dies, ``torchrun``
ends the others at once."""


def launched() -> bool:
    """Whether ``torchrun`` started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Number of this process, 0 for the one that writes and prints."""
    # From the environment, so that it holds before the processes are connected and after.
    return int(os.environ["RANK"]) if launched() else 0


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if _together() else 1


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def choose_device(name: str) -> torch.device:
    """The device to train on; of several processes on one machine each takes the GPU of its number.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UsageError: another name, or one GPU for several processes.
        MissingError: no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported; expected auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise MissingError("no CUDA GPU that PyTorch can use; train with --device cpu, or see `recontrast-edge doctor`")
    if launched():
        if device.index is not None:
            raise UsageError(f"--device {name} names one GPU for all processes of torchrun; expected auto or cuda")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise MissingError(f"GPU {device.index} is wanted, but there are {count}; with torchrun, one process a GPU")
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connect the processes that ``torchrun`` started; does nothing in a single one.

    Raises:
        MissingError: this PyTorch lacks NCCL, or distributed training altogether.
    """
    if not launched():
        yield
        return
    if not distributed.is_available():
        raise MissingError("this build of PyTorch cannot train in several processes; start one, without torchrun")
    backend = "gloo"
    if device.type == "cuda":
        if not distributed.is_nccl_available():
            raise MissingError(
                "several GPUs need NCCL, which this build of PyTorch lacks; install one for CUDA on Linux"
            )
        torch.cuda.set_device(device)
        # Decisions go over gloo, because exchanging them over NCCL would wait for the GPU in every iteration.
        backend = "cpu:gloo,cuda:nccl"
    # Gloo's threads live as long as anything holds the group. One that frees a tensor of Python's while the interpreter
    # ends aborts the process, after a training that went well; so they must end before. This module would hold the
    # group for ever, in the defaults of its functions, were it imported first after the next line, as
    # DistributedDataParallel does.
    importlib.import_module("torch.distributed.nn")
    distributed.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    except BaseException as error:
        _clear_frames(error)
        raise
    finally:
        distributed.destroy_process_group()
        # A DistributedDataParallel is part of reference cycles.
        gc.collect()
        _recent_works.clear()


def _clear_frames(error: BaseException) -> None:
    """Let go of what the functions that ``error`` has left still hold in their local variables."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__


_recent_works: deque[Any] = deque(maxlen=256)
"""Of the last collectives, so that gloo's threads are never the last to let go of one: they would free its tensors, for
which they wait for Python, while Python waits for them to end."""


def _all_reduce(values: Tensor, operation: Any = None) -> None:
    """Reduce over the processes, in place; the sum unless said otherwise."""
    work = distributed.all_reduce(values, operation or distributed.ReduceOp.SUM, async_op=True)
    _recent_works.append(work)
    work.wait()


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is set in any process. All processes must call this together."""
    if not _together():
        return list(flags)
    values = torch.tensor(flags, dtype=torch.uint8)
    _all_reduce(values, distributed.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def same_on_all_ranks(value: int) -> bool:
    """Whether all processes have the same value."""
    if not _together():
        return True
    limits = torch.tensor([value, -value])
    _all_reduce(limits, distributed.ReduceOp.MAX)
    return bool(limits.sum() == 0)


@contextmanager
def all_or_none() -> Iterator[None]:
    """All processes get through the block, or all raise: none is left waiting for one that failed.

    Raises:
        RecontrastError: what the block raised; in the other processes a ModelError.
    """
    try:
        yield
    except RecontrastError:
        any_rank(True)
        raise
    if any_rank(False)[0]:
        raise ModelError("another process of this training failed; its message says why")


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over the processes; on the CPU there where there are several."""
    if not _together():
        return values
    values = values.cpu()
    _all_reduce(values)
    return values / world_size()


def mean_and_std(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (unbiased) standard deviation over the values of all processes, which have equally many each."""
    if not _together():
        return values.mean(), values.std()
    wide = values.double()
    moments = torch.stack([wide.mean(), wide.square().mean()])
    _all_reduce(moments)
    mean, square = moments / world_size()
    count = values.numel() * world_size()
    variance = (square - mean.square()).clamp_min(0) * (count / (count - 1))
    return mean.to(values.dtype), variance.sqrt().to(values.dtype)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Make every BatchNorm in train mode take its statistics over the batches of all processes.

    Parameters, buffers and their names stay what they are.
    """
    if not _together():
        return
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Of the class alone, so that optimisers and averages go on holding the module's own tensors.
            module.__class__ = _CpuSyncBatchNorm2d


class _Sum(torch.autograd.Function):
    """Sum over the processes, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        _all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        _all_reduce(total)
        return total


class _CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.SyncBatchNorm`` for the CPU, which PyTorch's own refuses."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.running_mean is None or self.running_var is None or self.momentum is None:
            return super().forward(input)
        x = input.float()
        channels = x.shape[1]
        count = x.new_full((1,), x.numel() // channels)
        sums = _Sum.apply(torch.cat([x.sum((0, 2, 3)), count]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean[:, None, None]
        # In two passes: a difference of large sums would lose what float32 holds.
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)
