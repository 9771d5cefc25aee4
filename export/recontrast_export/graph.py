"""Write an ONNX graph node by node, with names that a person can follow in a viewer.

graph = Graph("recontrast", opset=18)
doubled = graph.node("Add", [x, x], "doubled")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from recontrast_edge.errors import ModelError
from recontrast_edge.scoring import VIEWS, reconstruction_name, target_name

Pairs = list[list[tuple[str, str]]]
"""``pairs[view][level]`` names the values (target, reconstruction), each (N, C_l, h_l, w_l)."""

Storage = Literal["fp32", "fp16"]
"""How weights are stored in the file; the computation is float32 with both."""

# The IR version that came with an opset, so that runtimes which take the opset take the file.
_IR_VERSIONS = {18: 8, 19: 9, 20: 9}

OPSETS = tuple(_IR_VERSIONS)
"""From 18 (reductions take their axes as an input) to 20, the last that TensorRT 10.3 and ONNX Runtime 1.18 read."""


class Graph:
    """An ONNX graph under construction; values are known by their names.

    Args:
        name: the graph's name.
        opset: one of ``OPSETS``.
    """

    def __init__(self, name: str, *, opset: int) -> None:
        self._name = name
        self._opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[int | str]) -> str:
        """Declare a float32 input; a string in ``shape`` names a dynamic size."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        """Declare the float32 value ``name`` an output of the graph."""
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a constant, kept in its own dtype."""
        self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def node(self, op: str, inputs: Sequence[str], name: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output.

        Args:
            op: ONNX operator.
            inputs: names of values.
            name: the node's name.
            output: the value's name; None for the node's.
            attributes: the operator's attributes.

        Returns:
            The value's name.
        """
        return self.nodes(op, inputs, name, [output or name], **attributes)[0]

    def nodes(self, op: str, inputs: Sequence[str], name: str, outputs: Sequence[str], **attributes: Any) -> list[str]:
        """Add a node with several outputs, named here."""
        self._nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return list(outputs)

    def model(self, *, producer_version: str) -> onnx.ModelProto:
        """The graph as a model, with no metadata yet."""
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, list(self._initializers.values())
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self._opset)],
            ir_version=_IR_VERSIONS[self._opset],
            producer_name="recontrast-edge",
            producer_version=producer_version,
        )


_MIN_FLOAT16_ELEMENTS = 4096
# Stem and depthwise convolutions: 2 % of EfficientNet-Lite0's weights, and five sixths of the map's error if rounded.


def store_weights_as_float16(model: onnx.ModelProto) -> None:
    """Store the convolutions' large weights as float16, in place, each with a ``Cast`` back to float32.

    The file halves, and the computation stays as it was but for the rounding of the weights. Runtimes fold the casts
    away when they load the file.

    Raises:
        ModelError: a weight that float16 cannot hold.
    """
    graph = model.graph
    weights = {node.input[1] for node in graph.node if node.op_type in ("Conv", "ConvTranspose")}
    casts = []
    for initializer in graph.initializer:
        name = initializer.name
        value = numpy_helper.to_array(initializer)
        if name not in weights or value.size < _MIN_FLOAT16_ELEMENTS:
            continue
        if np.abs(value).max() > np.finfo(np.float16).max:
            raise ModelError(
                f"{name}: holds {np.abs(value).max():.3g}, too large for float16; export with --storage fp32"
            )
        stored = f"{name}/fp16"
        initializer.CopyFrom(numpy_helper.from_array(value.astype(np.float16), stored))
        casts.append(helper.make_node("Cast", [stored], [name], name=f"{name}/cast", to=TensorProto.FLOAT))
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend(casts + rest)


def feature_names(graph: onnx.GraphProto) -> list[str]:
    """Names of the feature pairs, in both kinds of graph: by view, level, then target and reconstruction.

    Raises:
        ModelError: the graph has none, or not all of them.
    """
    produced = {name for node in graph.node for name in node.output}
    levels = 0
    while target_name(0, levels) in produced:
        levels += 1
    names = [
        name(view, level)
        for view in range(VIEWS)
        for level in range(levels)
        for name in (target_name, reconstruction_name)
    ]
    missing = [name for name in names or [target_name(0, 0)] if name not in produced]
    if missing:
        raise ModelError(f"the graph has no value {missing[0]!r}; export the model again with `recontrast-edge export`")
    return names
