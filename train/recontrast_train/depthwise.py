"""Depthwise convolution in bfloat16 on the CPU, with a backward pass that is not slower than everything else together.

    y = depthwise_conv2d(x, weight, stride=(2, 2), padding=(0, 0))

PyTorch hands the backward pass of depthwise convolutions to oneDNN, which in bfloat16 has no fast kernel for the
input's gradient where the stride is 2, nor for the weights' gradient of 5x5 windows: measured, those two were three
quarters of a training step of EfficientNet-Lite0. Computed in other ways here, they make the step twice as fast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Pair = tuple[int, int]


def depthwise_conv2d(x: Tensor, weight: Tensor, *, stride: Pair, padding: Pair) -> Tensor:
    """``functional.conv2d`` with one filter a channel and no bias.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, kH, kW).
        stride: 1 or 2 along each axis, the same for both.
        padding: zeros on both sides of each axis.
    """
    if x.device.type == "cpu":
        # Autocast has no rule for functions of our own; this is its rule for convolutions.
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        if x.dtype == torch.bfloat16 and torch.is_grad_enabled():
            out: Tensor = _DepthwiseConv2d.apply(x, weight, stride, padding)
            return out
    return functional.conv2d(x, weight, None, stride, padding, 1, x.shape[1])


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return functional.conv2d(x, weight, None, stride, padding, 1, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            if ctx.stride == (2, 2):
                grad_x = input_gradient_stride2(grad, weight, (x.shape[2], x.shape[3]), ctx.padding)
            else:
                grad_x, _ = _native(grad, x, weight, ctx.stride, ctx.padding, (True, False))
        if ctx.needs_input_grad[1]:
            wide = weight.shape[2] * weight.shape[3] > 9
            grad, x, w = (t.float() for t in (grad, x, weight)) if wide else (grad, x, weight)
            _, grad_weight = _native(grad, x, w, ctx.stride, ctx.padding, (False, True))
            grad_weight = grad_weight.to(weight.dtype)
        return grad_x, grad_weight, None, None


def _native(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, (1, 1), False, (0, 0), x.shape[1], (*wanted, False)
    )
    return grad_x, grad_weight


def input_gradient_stride2(grad: Tensor, weight: Tensor, size_hw: Pair, padding: Pair) -> Tensor:
    """Gradient with respect to the input of a depthwise convolution of stride 2.

    Even and odd rows and columns of the input each meet every other row and column of the filter only, so the four
    phases are four small convolutions of stride 1.

    Args:
        grad: (N, C, h, w), of the output.
        weight: (C, 1, kH, kW).
        size_hw: height and width of the input.
        padding: of the convolution.

    Returns:
        (N, C, *size_hw) of the dtype of ``grad``.
    """
    channels = grad.shape[1]
    height, width = (size + 2 * pad for size, pad in zip(size_hw, padding, strict=True))
    layout = torch.channels_last
    out = torch.empty((grad.shape[0], channels, height, width), dtype=grad.dtype, device=grad.device).to(
        memory_format=layout
    )
    for row in (0, 1):
        for column in (0, 1):
            taps = weight[:, :, row::2, column::2].flip(2, 3).contiguous()
            reach = (taps.shape[2] - 1, taps.shape[3] - 1)
            phase = functional.conv2d(grad, taps, None, 1, reach, 1, channels)
            rows, columns = len(range(row, height, 2)), len(range(column, width, 2))
            # Input that no window reaches has no gradient.
            short = (0, max(0, columns - phase.shape[3]), 0, max(0, rows - phase.shape[2]))
            out[:, :, row::2, column::2] = functional.pad(phase, short)[:, :, :rows, :columns]
    return out[:, :, padding[0] : height - padding[0], padding[1] : width - padding[1]]
