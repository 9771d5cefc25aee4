"""Float16 as builders compute it, for ONNX Runtime on a CPU, which does not.

    with opened(with_float16_rounding(converted), folder) as engine: ...

ONNX Runtime has no float16 kernels for CPUs: it computes in float32 and drops the conversions in between, whatever the
level of optimisation (measured: 100 * 1000 * 0.001 in float16 gives 100, where a GPU gives infinity). What is to be
judged is therefore written out: sums in float32, and each result rounded to float16 by a pair of casts, which it keeps.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Whose results are rounded. All others only choose or move values, or read integers: INT8 kernels do not round those.
_ROUNDED = ("Conv", "ConvTranspose", "Add", "Cast")


def with_float16_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 graph that gives what the given one means; a graph without float16 comes back as it is.

    Args:
        model: in any precision.
    """
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    half = {
        value.name
        for value in [*inferred.value_info, *inferred.output]
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16
    }
    emulated = onnx.ModelProto()
    emulated.CopyFrom(model)
    graph = emulated.graph
    for entry in graph.initializer:
        if entry.data_type == TensorProto.FLOAT16:
            entry.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(entry).astype(np.float32), entry.name))
    for output in graph.output:
        if output.name in half:
            output.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        (*_, name) = node.output
        if node.op_type not in _ROUNDED or name not in half:
            continue
        exact, rounded = f"{name}/exact", f"{name}/rounded"
        node.output[0] = exact
        for attribute in node.attribute:
            if attribute.name == "to":
                attribute.i = TensorProto.FLOAT
        nodes.append(helper.make_node("Cast", [exact], [rounded], name=rounded, to=TensorProto.FLOAT16))
        nodes.append(helper.make_node("Cast", [rounded], [name], name=f"{name}/widened", to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return emulated
