"""The network as a graph of named operations: what export and training with quantisation both work on.

    traced = Traced(model)
    for operation in traced.operations: print(operation.name, operation.kind)

Names are those of the modules, and are the same in an exported graph.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx, nn

from recontrast_edge.int8 import Operation
from recontrast_edge.scoring import INPUT_NAME, reconstruction_name, target_name
from recontrast_train.backbones import SameConv2d
from recontrast_train.model import ReContrast

# All that placement asks for; other operations are named after themselves.
_KINDS: dict[Any, str] = {operator.add: "Add", torch.cat: "Concat", nn.MaxPool2d: "MaxPool"}


class Tracer(fx.Tracer):
    """Follows a module into all but PyTorch's own layers and ours that compute with sizes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Its forward computes with sizes, which tracing cannot follow.
        return isinstance(m, SameConv2d) or super().is_leaf_module(m, module_qualified_name)


def node_names(graph: fx.Graph, prefix: str = "") -> dict[fx.Node, str]:
    """A unique name for each node: the path of the module, or of the module that called the function.

    Args:
        graph: of ``Tracer``.
        prefix: begins each name.
    """
    names: dict[fx.Node, str] = {}
    used: set[str] = set()
    for node in graph.nodes:
        if node.op == "call_module":
            path = str(node.target)
        elif node.op in ("call_function", "call_method"):
            enclosing = [key for key in node.meta.get("nn_module_stack", {}) if key]
            function = node.target if isinstance(node.target, str) else node.target.__name__
            path = ".".join([*enclosing[-1:], function])
        else:
            continue
        path = prefix + path.replace(".", "/")
        unique, count = path, 1
        while unique in used:
            count += 1
            unique = f"{path}_{count}"
        used.add(unique)
        names[node] = unique
    return names


def folded_norm(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, nn.BatchNorm2d] | None:
    """The batch norm, and its node, that is the only reader of a convolution's node: it folds into the convolution."""
    reader = next(iter(node.users)) if len(node.users) == 1 else node
    norm = modules.get(str(reader.target))
    is_convolution = isinstance(modules.get(str(node.target)), nn.Conv2d | nn.ConvTranspose2d)
    return (reader, norm) if is_convolution and isinstance(norm, nn.BatchNorm2d) else None


class Traced:
    """A model's network in full precision.

    Args:
        model: its ``forward`` is followed.

    Attributes:
        graph: nodes in the order of computation; the input is (N, 3, H, W), the output are the pairs.
        modules: by the nodes' targets.
        names: of the nodes, as ``node_names`` gives them.
        values: by name, the node that makes it. A convolution's value is made by the batch norm that folds into it, and
            those of a pair are named as ``scoring`` names them.
        operations: with batch norms folded, and transposed convolutions as 1x1 ones and a ``DepthToSpace``.
    """

    def __init__(self, model: ReContrast) -> None:
        self.graph = Tracer().trace(model)
        self.modules = dict(model.named_modules())
        self.names = node_names(self.graph)
        self.values: dict[str, fx.Node] = {}
        self.operations: list[Operation] = []
        pairs = pair_names(self.graph)
        value_names: dict[fx.Node, str] = {}
        for node in self.graph.nodes:
            if node in value_names or node.op == "output":
                continue
            made_by = node
            if node.op == "placeholder":
                name = INPUT_NAME
            elif node.target is operator.getitem:
                name = f"{self.names[node.args[0]]}/{node.args[1]}"
            else:
                folded = folded_norm(node, self.modules)
                made_by = node if folded is None else folded[0]
                name = pairs.get(made_by, self.names[node])
                inputs = tuple(value_names[source] for source in node.all_input_nodes)
                self.operations += _operations(node, self.modules.get(str(node.target)), self.names[node], inputs, name)
            value_names[made_by] = name
            self.values[name] = made_by


def _operations(
    node: fx.Node, module: nn.Module | None, name: str, inputs: tuple[str, ...], output: str
) -> list[Operation]:
    if isinstance(module, nn.ConvTranspose2d):
        channels_in, channels_out, *taps = module.weight.shape
        shape = (channels_out * math.prod(taps), channels_in, 1, 1)
        return [
            Operation(name, "Conv", inputs, (f"{name}/taps",), shape),
            Operation(f"{name}/spread", "DepthToSpace", (f"{name}/taps",), (output,)),
        ]
    if isinstance(module, nn.Conv2d):
        return [Operation(name, "Conv", inputs, (output,), tuple(module.weight.shape))]
    if node.target == "chunk":
        outputs = tuple(f"{name}/{index}" for index in range(int(str(node.args[1]))))
        return [Operation(name, "Split", inputs, outputs)]
    kind = _KINDS.get(type(module) if module is not None else node.target, "")
    return [Operation(name, kind or str(node.target), inputs, (output,))]


def pair_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """The nodes of the feature pairs, and what an exported graph calls their values."""
    views: Any = next(node for node in graph.nodes if node.op == "output").args[0]
    names: dict[fx.Node, str] = {}
    for view, levels in enumerate(views):
        for level, (target, reconstruction) in enumerate(levels):
            names[target] = target_name(view, level)
            names[reconstruction] = reconstruction_name(view, level)
    return names
