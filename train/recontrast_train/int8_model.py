"""The network as an INT8 engine computes it, in float and with gradients.

    model = Int8ReContrast("efficientnet_lite0")
    model.load_float(trained)
    model.find_scales(tensors)
    pairs = model(images)  # as ReContrast's

Inputs and weights of the convolutions are rounded to their INT8 steps where ``recontrast_edge.int8`` puts Q/DQ, all
else is computed as it is. Batch norms are folded with the statistics that training found, as export folds them.
Rounding has the gradient of the identity (Bengio et al. 2013). Activations' scales are learnt, with the gradient of
Esser et al., "Learned Step Size Quantization", ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from recontrast_edge.int8 import Layout, half_scale, quantise_weight
from recontrast_edge.magnitudes import LEVELS, Magnitudes, Method
from recontrast_train.discriminator import Pairs
from recontrast_train.model import ReContrast
from recontrast_train.tracing import Traced, folded_norm

SCALES = "log_scales."
"""Begins the names of the scales in the model's state, which sets it apart from a float model's."""


class Int8ReContrast(ReContrast):
    """A model whose convolutions, but for depthwise ones, compute in simulated INT8.

    The state is that of ``ReContrast`` and, for each group of values that share one, the logarithm of their scale. The
    discriminator stays float. Batch norms are always in eval mode.

    Args:
        backbone_name, discriminator: as for ``ReContrast``.
    """

    def __init__(self, backbone_name: str, *, discriminator: bool = False) -> None:
        super().__init__(backbone_name, discriminator=discriminator)
        self._traced = traced = Traced(self)
        layout = Layout(traced.operations)
        self.blocks = layout.default_blocks
        placement = layout.place(self.blocks)
        node_by_name = {name: node for node, name in traced.names.items()}
        self._convolutions = {node_by_name[name] for name in placement.convolutions}
        self._additions = {node_by_name[name]: traced.values[value] for name, value in placement.additions.items()}
        # Values between a transposed convolution and its depth-to-space exist in exported graphs only.
        self._groups = {name: group for name, group in placement.groups.items() if name in traced.values}
        self._group_by_node = {traced.values[name]: group for name, group in self._groups.items()}
        self.log_scales = nn.ParameterDict({group: torch.zeros(()) for group in sorted(set(self._groups.values()))})

    def train(self, mode: bool = True) -> Int8ReContrast:
        super().train(False)
        return self

    def forward(self, images: Tensor) -> Pairs:
        """Pairs of the images, (N, 3, H, W), normalised; H and W multiples of 32."""
        if isinstance(images, fx.Proxy):
            # Traced: the float network, to which placement and export add their own rounding.
            return super().forward(images)
        pairs: Pairs = _Rounded(self).run(images)
        return pairs

    def load_float(self, model: ReContrast) -> None:
        """Take the weights of a trained model of the same kind."""
        self.load_state_dict({**self.state_dict(), **model.state_dict()})

    def find_scales(self, batches: Iterable[Tensor], method: Method = "mse") -> None:
        """Set the scales to what the float network's values ask for.

        Args:
            batches: good images, each (N, 3, H, W), normalised.
            method: see ``magnitudes``.
        """
        magnitudes: dict[str, Magnitudes] = {group: Magnitudes() for group in self.log_scales}
        with torch.inference_mode():
            for batch in batches:
                _Observed(self, magnitudes).run(batch)
        with torch.no_grad():
            for group, found in magnitudes.items():
                limit = half_scale(np.array(found.limit(method) / LEVELS))
                self.log_scales[group].copy_(torch.from_numpy(limit).log())

    def group_scales(self) -> dict[str, Tensor]:
        """The scale of each group, a float16 number > 0 as 0-d float32, with gradients to its logarithm."""
        exact = torch.stack(list(self.log_scales.values())).exp()
        held = torch.from_numpy(half_scale(exact.detach().cpu().numpy())).to(exact.device)
        return dict(zip(self.log_scales, (exact + (held - exact).detach()).unbind(), strict=True))

    def scales(self) -> dict[str, float]:
        """The scale of each value that is rounded, by its name in an exported graph."""
        by_group = {group: scale.item() for group, scale in self.group_scales().items()}
        return {name: by_group[group] for name, group in self._groups.items()}


class _Observed(fx.Interpreter):
    """The float network; counts the values that will be rounded."""

    def __init__(self, model: Int8ReContrast, magnitudes: dict[str, Magnitudes]) -> None:
        super().__init__(model, graph=model._traced.graph)
        self._group_by_node = model._group_by_node
        self._magnitudes = magnitudes

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._group_by_node:
            self._magnitudes[self._group_by_node[n]].add(value.float().cpu().numpy())
        return value


class _Rounded(fx.Interpreter):
    """The network with rounded inputs and weights."""

    def __init__(self, model: Int8ReContrast) -> None:
        super().__init__(model, graph=model._traced.graph)
        self._model = model
        self._scales = model.group_scales()
        self._known: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        model = self._model
        source: Any = n.args[0] if n.args else None
        if n in model._convolutions:
            folded = folded_norm(n, self.submodules)
            norm = None if folded is None else folded[1]
            return _convolve(self._value(source), self.submodules[str(n.target)], norm)
        if isinstance(source, fx.Node) and source in model._convolutions and folded_norm(source, self.submodules):
            return self.env[source]  # A batch norm that was folded.
        if n in model._additions:
            first, second = (
                self._value(arg) if arg is model._additions[n] else self.env[arg] for arg in n.all_input_nodes
            )
            return first + second
        return super().run_node(n)

    def _value(self, node: fx.Node) -> Tensor:
        """A node's value, rounded."""
        if node not in self._known:
            scale = self._scales[self._model._group_by_node[node]]
            self._known[node] = _RoundToSteps.apply(self.env[node], scale)
        return self._known[node]


def _convolve(x: Tensor, module: nn.Module, norm: nn.BatchNorm2d | None) -> Tensor:
    """A convolution, or 2x2 stride-2 transposed one, with its batch norm folded and its weights rounded."""
    assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    # Folded in float64 and rounded once, as export does.
    weight, bias = module.weight.double(), None if module.bias is None else module.bias.double()
    transposed = isinstance(module, nn.ConvTranspose2d)
    if norm is not None:
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        scale = norm.weight.double() / torch.sqrt(variance.double() + norm.eps)
        offset = norm.bias.double() - mean.double() * scale
        weight = weight * scale.view((1, -1, 1, 1) if transposed else (-1, 1, 1, 1))
        bias = offset if bias is None else bias * scale + offset
    bias = None if bias is None else bias.float()
    if not transposed:
        rounded = _rounded_weight(weight.float())
        return functional.conv2d(x, rounded, bias, module.stride, module.padding, module.dilation, module.groups)
    # (in, out, a, b) -> (out and tap, in, 1, 1): each tap has a scale of its own in the exported graph, too.
    channels_in, channels_out, *taps = weight.shape
    pointwise = weight.float().permute(1, 2, 3, 0).reshape(-1, channels_in, 1, 1)
    bias = None if bias is None else bias.repeat_interleave(len(pointwise) // channels_out)
    return functional.pixel_shuffle(functional.conv2d(x, _rounded_weight(pointwise), bias), taps[0])


def _rounded_weight(weight: Tensor) -> Tensor:
    """(out, in / group, h, w) float32, at the INT8 steps of its output channel; the gradient is the weight's own."""
    codes, scale = quantise_weight(weight.detach().cpu().numpy())
    rounded = torch.from_numpy(codes * scale.reshape(-1, 1, 1, 1)).to(weight.device)
    return weight + (rounded - weight).detach()


class _RoundToSteps(torch.autograd.Function):
    """``clip(round(x / scale), -128, 127) * scale``, as QuantizeLinear and DequantizeLinear compute it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        # In float32 whatever the autocast: bfloat16 does not hold the steps between 64 and 127.
        return ((x.float() / scale).round_().clamp_(-LEVELS - 1, LEVELS) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        steps = x.float() / scale
        codes = steps.round().clamp_(-LEVELS - 1, LEVELS)
        inside = (steps >= -LEVELS - 1) & (steps <= LEVELS)
        of_scale = (torch.where(inside, codes - steps, codes) * gradient.float()).sum()
        return gradient.masked_fill(~inside, 0.0), of_scale
