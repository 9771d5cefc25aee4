"""The ReContrast network in PyTorch, as nodes of an ONNX graph: the one module here that needs PyTorch.

    pairs = add_network(graph, model, image=graph.input("image", ["N", 3, 256, 256]))

The model is traced by ``torch.fx`` and each of its few kinds of layers is written as one ONNX node. That leaves a graph
with nothing in it but the network: batch norms are folded into their convolutions, asymmetric padding is an attribute,
and nodes and weights are named after the modules they come from. Whether the graph is right is not taken on trust: the
parity gate compares it with the PyTorch model on every export.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional

from recontrast_edge.errors import ModelError
from recontrast_edge.scoring import PROBABILITY_NAME
from recontrast_export.graph import Graph, Pairs
from recontrast_train.backbones import SameConv2d
from recontrast_train.discriminator import Discriminator
from recontrast_train.model import STRIDES, ReContrast
from recontrast_train.tracing import Tracer, folded_norm, node_names, pair_names


def add_network(graph: Graph, model: ReContrast, image: str) -> Pairs:
    """Add the whole network, with the head halves that inference uses.

    Args:
        graph: to add to.
        model: in eval mode.
        image: name of the input, (N, 3, H, W) float32, normalised; H and W multiples of 32.

    Returns:
        Names of the feature pairs, as ``scoring.target_name`` and ``scoring.reconstruction_name`` give them.

    Raises:
        ModelError: a layer of a kind that has no translation.
    """
    if model.training:
        raise ValueError("expected a model in eval mode")
    traced = Tracer().trace(model)
    names = pair_names(traced)
    _Translation(graph, model, names).run(traced, image)
    views: Any = next(node for node in traced.nodes if node.op == "output").args[0]
    return [[(names[target], names[reconstruction]) for target, reconstruction in levels] for levels in views]


def add_discriminator(graph: Graph, discriminator: Discriminator, levels: Sequence[str]) -> str:
    """Add the discriminator and a sigmoid.

    Args:
        graph: to add to.
        discriminator: in eval mode.
        levels: names of the levels' agreements, as ``discriminator.agreements`` computes them.

    Returns:
        Name of the probability of a defect, (N, 1, h_0, w_0).
    """
    if discriminator.training:
        raise ValueError("expected a discriminator in eval mode")
    traced = Tracer().trace(discriminator)
    logits: Any = next(node for node in traced.nodes if node.op == "output").args[0]
    values = _Translation(graph, discriminator, {}, prefix="discriminator/").run(traced, list(levels))
    return graph.node("Sigmoid", [values[logits]], PROBABILITY_NAME)


class _Translation:
    """Turns traced nodes into ONNX nodes, in order.

    Attributes:
        values: name in the ONNX graph of each translated node's result; a list of names where there are several.
    """

    def __init__(self, graph: Graph, model: nn.Module, names: dict[fx.Node, str], *, prefix: str = "") -> None:
        self._graph = graph
        self._prefix = prefix
        self._modules = dict(model.named_modules())
        self._value_names = names
        self._names: dict[fx.Node, str] = {}
        self.values: dict[fx.Node, Any] = {}

    def run(self, traced: fx.Graph, argument: Any) -> dict[fx.Node, Any]:
        """Translate all nodes.

        Args:
            traced: of a module whose ``forward`` takes one argument.
            argument: name of the value that is passed, or a list of names.

        Returns:
            ``values``.
        """
        self._names = node_names(traced, self._prefix)
        for node in traced.nodes:
            if node.op == "placeholder":
                self.values[node] = argument
            elif node.op != "output":
                self.translate(node)
        return self.values

    def translate(self, node: fx.Node) -> None:
        if node in self.values:
            return  # A batch norm that went into its convolution.
        args: Any = node.args
        if node.op == "call_module":
            self._module(node, self._modules[str(node.target)], self.values[args[0]])
        elif node.target is operator.add:
            self._emit(node, "Add", [self.values[arg] for arg in args])
        elif node.target is torch.cat:
            self._emit(node, "Concat", [self.values[arg] for arg in args[0]], axis=node.kwargs["dim"])
        elif node.target is functional.relu6:
            lower, upper = (self._graph.constant(f"relu6/{bound}", np.float32(bound)) for bound in (0, 6))
            self._emit(node, "Clip", [self.values[args[0]], lower, upper])
        elif node.target == "chunk":
            # Chunk and Split differ where the size is no multiple; the batch here is always two views.
            path = self._names[node]
            halves = [f"{path}/{index}" for index in range(args[1])]
            attributes = {"axis": node.kwargs["dim"], "num_outputs": len(halves)}
            self.values[node] = self._graph.nodes("Split", [self.values[args[0]]], path, halves, **attributes)
        elif node.target is operator.getitem:
            self.values[node] = self.values[args[0]][args[1]]
        else:
            raise _untranslatable(node, f"function {node.target}")

    def _module(self, node: fx.Node, module: nn.Module, x: str) -> None:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            self._convolution(node, module, x)
        elif isinstance(module, nn.ReLU):
            self._emit(node, "Relu", [x])
        elif isinstance(module, nn.MaxPool2d) and not module.ceil_mode and module.dilation == 1:
            kernel, stride, padding = (_pair(size) for size in (module.kernel_size, module.stride, module.padding))
            self._emit(node, "MaxPool", [x], kernel_shape=kernel, strides=stride, pads=padding + padding)
        else:
            raise _untranslatable(node, str(module))

    def _convolution(self, node: fx.Node, module: nn.Conv2d | nn.ConvTranspose2d, x: str) -> None:
        transposed = isinstance(module, nn.ConvTranspose2d)
        plain = (
            module.padding_mode == "zeros" and not isinstance(module.padding, str) and not any(module.output_padding)
        )
        if not plain or (transposed and module.groups != 1):
            raise _untranslatable(node, str(module))
        weight, bias = _array(module.weight), None if module.bias is None else _array(module.bias)
        result = node
        # A batch norm that is the only reader of this convolution is a scale and an offset of its output channels.
        folded = folded_norm(node, self._modules)
        if folded is not None:
            result, norm = folded
            scale, offset = _affine(norm)
            # Output channels are the first axis of (out, in, h, w), the second of a transposed (in, out, h, w).
            weight = weight * scale.reshape((1, -1, 1, 1) if transposed else (-1, 1, 1, 1))
            bias = offset if bias is None else bias * scale + offset
        path = self._names[node]
        inputs = [x, self._graph.constant(f"{path}/weight", weight.astype(np.float32))]
        if bias is not None:
            inputs.append(self._graph.constant(f"{path}/bias", bias.astype(np.float32)))
        self.values[result] = self._graph.node(
            "ConvTranspose" if transposed else "Conv",
            inputs,
            path,
            self._value_names.get(result),
            kernel_shape=list(module.kernel_size),
            strides=list(module.stride),
            pads=_pads(module),
            dilations=list(module.dilation),
            group=module.groups,
        )

    def _emit(self, node: fx.Node, op: str, inputs: Sequence[str], **attributes: Any) -> None:
        value_name = self._value_names.get(node)
        self.values[node] = self._graph.node(op, inputs, self._names[node], value_name, **attributes)


def _affine(norm: nn.BatchNorm2d) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale and offset per channel of a batch norm in eval mode."""
    mean, variance = _array(norm.running_mean), _array(norm.running_var)
    scale = _array(norm.weight) / np.sqrt(variance + norm.eps)
    return scale, _array(norm.bias) - mean * scale


def _pads(module: nn.Conv2d | nn.ConvTranspose2d) -> list[int]:
    """ONNX order: rows before, columns before, rows after, columns after."""
    if isinstance(module, SameConv2d):
        # The same for every size that is a multiple of the stride, and all sizes here are.
        (top, bottom), (left, right) = (module.pads(STRIDES[-1] * module.stride[axis], axis) for axis in (0, 1))
        return [top, left, bottom, right]
    return [int(pad) for pad in module.padding] * 2


def _pair(size: int | Sequence[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


def _array(tensor: Tensor | None) -> NDArray[np.float64]:
    # Folded in float64 and rounded once, at the end.
    assert tensor is not None
    return tensor.detach().double().numpy()


def _untranslatable(node: fx.Node, what: str) -> ModelError:
    return ModelError(
        f"{node.name}: {what} has no translation to ONNX here; add one to recontrast_export/torch_to_onnx.py"
    )
