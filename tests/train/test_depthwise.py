"""The depthwise convolution's own backward pass against PyTorch's."""

import pytest
import torch
from torch.nn import functional

from recontrast_train.depthwise import depthwise_conv2d, input_gradient_stride2

SHAPES = [
    # channels, height, width, kernel, stride, padding
    (5, 9, 12, 3, 1, 1),
    (5, 9, 12, 5, 1, 2),
    (4, 17, 13, 3, 2, 0),
    (4, 16, 18, 3, 2, 1),
    (3, 19, 11, 5, 2, 0),
    (3, 16, 10, 5, 2, 2),
    (2, 6, 7, 3, 2, 0),
]


def tensors(channels, height, width, kernel):
    generator = torch.Generator().manual_seed(channels * height + width)
    x = torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)
    return x, torch.randn(channels, 1, kernel, kernel, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("channels", "height", "width", "kernel", "stride", "padding"), SHAPES)
def test_gradients_are_those_of_pytorch(channels, height, width, kernel, stride, padding):
    x, weight = tensors(channels, height, width, kernel)
    exact = [t.bfloat16().double().requires_grad_() for t in (x, weight)]
    own = [t.bfloat16().requires_grad_() for t in (x, weight)]
    wanted = functional.conv2d(exact[0], exact[1], None, stride, padding, 1, channels)
    got = depthwise_conv2d(own[0], own[1], stride=(stride, stride), padding=(padding, padding))
    assert got.dtype == torch.bfloat16
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted.backward(grad.double())
    got.backward(grad)
    for ours, reference in zip(own, exact, strict=True):
        scale = reference.grad.abs().max()
        # A bfloat16 has 8 bits.
        assert (ours.grad.double() - reference.grad).abs().max() < 0.02 * scale


@pytest.mark.parametrize(
    ("channels", "height", "width", "kernel", "stride", "padding"), [shape for shape in SHAPES if shape[4] == 2]
)
def test_phases_are_exact(channels, height, width, kernel, stride, padding):
    x, weight = tensors(channels, height, width, kernel)
    x.requires_grad_()
    out = functional.conv2d(x, weight, None, stride, padding, 1, channels)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (wanted,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(input_gradient_stride2(grad, weight, (height, width), (padding, padding)), wanted)


def test_autocast_is_followed():
    x, weight = (t.float().requires_grad_() for t in tensors(4, 9, 9, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = depthwise_conv2d(x, weight, stride=(1, 1), padding=(1, 1))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
