"""Exact rewrites of an exported graph, made before it is quantised: other nodes, the same numbers.

    model = with_pointwise_upsampling(onnx.load("model.onnx"))

Batch norms need no rewrite: ``torch_to_onnx`` folds them into their convolutions, plain and transposed, in float64.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

_BLOCK = 2


def with_pointwise_upsampling(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which each 2x2 stride-2 transposed convolution is a 1x1 convolution and a depth-to-space.

    Without overlap every output pixel depends on one input pixel: ``y[o, 2i+a, 2j+b] = sum_c w[c,o,a,b] x[c,i,j]``.
    So the four taps are four times as many output channels, put side by side. Builders have fast INT8 kernels for
    that, and few for transposed convolutions. A Relu that follows moves before the depth-to-space, where it fuses with
    the convolution. All other transposed convolutions stay as they are.

    Args:
        model: with weights as float32 initializers.
    """
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(model)
    graph = rewritten.graph
    initializers = {entry.name: entry for entry in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    relus = {node.input[0]: node for node in graph.node if node.op_type == "Relu"}
    outputs = {value.name for value in graph.output}
    moved: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.name in moved:
            continue
        if not _is_pointwise_upsampling(node, initializers):
            nodes.append(node)
            continue
        result, relu = node.output[0], None
        if readers[result] == 1 and result in relus and result not in outputs:
            relu = relus[result]
            moved.add(relu.name)
        weight = numpy_helper.to_array(initializers[node.input[1]])
        inputs = [node.input[0], _replace(graph, initializers[node.input[1]], _pointwise(weight))]
        if len(node.input) == 3:
            bias = numpy_helper.to_array(initializers[node.input[2]])
            inputs.append(_replace(graph, initializers[node.input[2]], np.tile(bias, _BLOCK**2)))
        taps = f"{node.name}/taps"
        nodes.append(helper.make_node("Conv", inputs, [taps], name=node.name, kernel_shape=[1, 1]))
        if relu is not None:
            nodes.append(helper.make_node("Relu", [taps], [f"{relu.name}/taps"], name=relu.name))
            taps, result = f"{relu.name}/taps", relu.output[0]
        spread = helper.make_node("DepthToSpace", [taps], [result], name=f"{node.name}/spread", blocksize=_BLOCK)
        nodes.append(spread)
    del graph.node[:]
    graph.node.extend(nodes)
    # Shapes of values inside of the graph, which are others now; they can be inferred.
    del graph.value_info[:]
    return rewritten


def _is_pointwise_upsampling(node: onnx.NodeProto, initializers: dict[str, onnx.TensorProto]) -> bool:
    if node.op_type != "ConvTranspose" or not all(name in initializers for name in node.input[1:]):
        return False
    attributes: dict[str, Any] = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    return (
        tuple(initializers[node.input[1]].dims[2:]) == (_BLOCK, _BLOCK)
        and list(attributes.get("strides", [1, 1])) == [_BLOCK, _BLOCK]
        and not any(attributes.get("pads", [0]))
        and not any(attributes.get("output_padding", [0]))
        and "output_shape" not in attributes
        and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
        and attributes.get("group", 1) == 1
    )


def _pointwise(weight: NDArray[Any]) -> NDArray[Any]:
    """(in, out, 2, 2) of a transposed convolution -> (4 out, in, 1, 1); channels in depth-to-space order (tap, out)."""
    channels_in, channels_out = weight.shape[:2]
    return weight.transpose(2, 3, 1, 0).reshape(_BLOCK**2 * channels_out, channels_in, 1, 1)


def _replace(graph: onnx.GraphProto, entry: onnx.TensorProto, value: NDArray[Any]) -> str:
    """Give an initializer a new value; as a new one where others may read it."""
    readers = sum(list(node.input).count(entry.name) for node in graph.node)
    if readers == 1:
        entry.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), entry.name))
        return entry.name
    name = f"{entry.name}/pointwise"
    if all(other.name != name for other in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return name
