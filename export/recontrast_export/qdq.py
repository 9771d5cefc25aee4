"""Where INT8 goes: explicit QuantizeLinear and DequantizeLinear, placed so that builders fuse what lies between them.

    network = Int8Network(with_pointwise_upsampling(model))
    quantised = network.quantised(["decoder/stages/0/0"], activations, "mse")

The rules, which fine-tuning with quantisation follows too:

* A convolution of a quantised block reads input and weights through Q/DQ. Weights have a scale for each output channel,
  inputs have one; all scales are symmetric. The bias is not quantised, and makes up for the mean error of the weights.
* Where an addition closes a residual block, one operand comes straight from the convolution that is fused with it, the
  costlier one if there are two; the other one is quantised.
* One value has one Q/DQ pair, whoever reads it; readers that are not quantised read the value itself.
* Where the value was concatenated, pooled or reordered, the inputs of that are quantised with the very same scale. That
  changes no number, and the data stays INT8 from one convolution to the next.
* Never quantised: the convolutions of the image, the heads that make the reconstructions, and all that follows them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from recontrast_edge.scoring import INPUT_NAME
from recontrast_export.graph import feature_names
from recontrast_export.ranges import LEVELS, Activation, Magnitudes, Method

# The first operator set whose QuantizeLinear and DequantizeLinear take float16.
_OPSET = 19

# Rounding to a grid commutes with these, so that input and output can share one scale.
_TRANSPARENT = ("Concat", "DepthToSpace", "MaxPool")

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")

PARTS = ("encoders", "bottleneck", "decoder")
"""What ``part_of`` gives."""


def block_of(name: str) -> str:
    """The residual block, or other unit, of the network that a convolution belongs to, by the convolution's name.

    ``encoder/layer2/0/downsample/0`` -> ``encoder/layer2/0``; ``bottleneck/fine/1/0`` -> ``bottleneck/fine``.
    """
    # Up to the last number that a name follows: the block's own index. Without one, up to the trailing numbers.
    indexed = re.match(r"(.*/\d+)/[^/\d]", name)
    return indexed[1] if indexed else re.sub(r"(/\d+)+$", "", name)


def part_of(block: str) -> str:
    """``encoders``, ``bottleneck`` or ``decoder``."""
    first = block.split("/", 1)[0]
    return "encoders" if first in ("encoder", "frozen") else first


def dequantised_name(value: str) -> str:
    """What a quantised value is called after its Q/DQ pair."""
    return f"{value}/dequantised"


@dataclass(frozen=True, eq=False)
class _Convolution:
    node: onnx.NodeProto
    block: str
    macs: int
    is_candidate: bool
    is_depthwise: bool


class Int8Network:
    """A float32 graph of ours that parts of can be quantised.

    Args:
        model: rewritten by ``rewrite.with_pointwise_upsampling``, with weights as float32 initializers.

    Attributes:
        model: with operator set 19 or later.
        blocks: names of the blocks that can be quantised, in the graph's order. A depthwise convolution is its own.
        default_blocks: those that are quantised where nothing was measured: all but depthwise convolutions.
        macs: multiply-accumulates of all convolutions, for one image.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        if model.opset_import[0].version < _OPSET:
            metadata = list(model.metadata_props)
            model = onnx.version_converter.convert_version(model, _OPSET)
            del model.metadata_props[:]
            model.metadata_props.extend(metadata)
        self.model = model
        graph = model.graph
        self._producers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._initializers = {entry.name: entry for entry in graph.initializer}
        features = set(feature_names(graph))
        shapes = _shapes(model)
        self._convolutions = {
            node.name: self._convolution(node, features, shapes) for node in graph.node if node.op_type == "Conv"
        }
        candidates = [conv for conv in self._convolutions.values() if conv.is_candidate]
        self.blocks = tuple(dict.fromkeys(conv.block for conv in candidates))
        self.default_blocks = tuple(dict.fromkeys(conv.block for conv in candidates if not conv.is_depthwise))
        self.macs = sum(conv.macs for conv in self._convolutions.values())

    def _convolution(
        self, node: onnx.NodeProto, features: set[str], shapes: Mapping[str, tuple[int, ...]]
    ) -> _Convolution:
        weight = self._initializers[node.input[1]].dims
        macs = _macs(node, shapes)
        is_head = bool(features.intersection(node.output)) and node.name.startswith("heads/")
        # Depthwise ones on their own: they are few multiply-accumulates, and the most harmful ones to round.
        is_depthwise = weight[1] == 1 and weight[0] > 1
        block = node.name if is_depthwise else block_of(node.name)
        return _Convolution(node, block, macs, not (INPUT_NAME in node.input or is_head), is_depthwise)

    def macs_of(self, blocks: Collection[str]) -> int:
        """Multiply-accumulates of the candidates in these blocks, for one image."""
        return sum(conv.macs for conv in self._convolutions.values() if conv.is_candidate and conv.block in blocks)

    def values(self, blocks: Collection[str]) -> list[str]:
        """Names of the values that are quantised if these blocks are; weights are not among them."""
        return list(self._scale_groups(blocks))

    def _chosen(self, blocks: Collection[str]) -> list[_Convolution]:
        return [conv for conv in self._convolutions.values() if conv.is_candidate and conv.block in blocks]

    def _additions(self, chosen: Iterable[_Convolution]) -> dict[str, str]:
        """Name of each addition that is fused with a chosen convolution -> the operand to quantise."""
        by_output = {conv.node.output[0]: conv for conv in chosen}
        found: dict[str, str] = {}
        for node in self.model.graph.node:
            if node.op_type != "Add" or len(set(node.input)) != 2:
                continue
            fusable = [by_output[name] for name in node.input if name in by_output and len(self._readers[name]) == 1]
            if fusable:
                fused = max(fusable, key=lambda conv: conv.macs).node.output[0]
                (found[node.name],) = (name for name in node.input if name != fused)
        return found

    def _scale_groups(self, blocks: Collection[str]) -> dict[str, str]:
        """Each value to quantise -> one of its group, which stands for the scale that the group shares."""
        chosen = self._chosen(blocks)
        pending = [conv.node.input[0] for conv in chosen] + list(self._additions(chosen).values())
        parent: dict[str, str] = {}

        def root(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        while pending:
            name = pending.pop()
            parent.setdefault(name, name)
            producer = self._producers.get(name)
            if producer is None or producer.op_type not in _TRANSPARENT:
                continue
            for source in producer.input:
                if source not in parent:
                    parent[source] = source
                    pending.append(source)
                parent[root(source)] = root(name)
        return {name: root(name) for name in parent}

    def limits(
        self, blocks: Collection[str], activations: Mapping[str, Activation], method: Method
    ) -> dict[str, float]:
        """The range of each value to quantise, ``[-limit, limit]``; the same for those that share a scale.

        Args:
            blocks: which are to be quantised.
            activations: of at least ``values(blocks)``.
            method: see ``ranges``.
        """
        groups = self._scale_groups(blocks)
        members: dict[str, list[Magnitudes]] = {}
        for name, group in groups.items():
            members.setdefault(group, []).append(activations[name].magnitudes)
        limits = {group: Magnitudes.merged(parts).limit(method) for group, parts in members.items()}
        return {name: limits[group] for name, group in groups.items()}

    def quantised(
        self, blocks: Collection[str], activations: Mapping[str, Activation], method: Method
    ) -> onnx.ModelProto:
        """A copy of the model with these blocks quantised; all that is not stays float32.

        Rounding weights shifts the mean of what a convolution makes; its bias takes the shift back.

        Args:
            blocks: some of ``self.blocks``.
            activations: of at least ``values(blocks)``.
            method: how ranges are chosen, see ``ranges``.
        """
        unknown = set(blocks) - set(self.blocks)
        if unknown:
            raise ValueError(f"no such blocks: {', '.join(sorted(unknown))}")
        chosen = self._chosen(blocks)
        additions = self._additions(chosen)
        values = self.limits(blocks, activations, method)
        convolutions = {conv.node.name for conv in chosen}
        nodes: list[onnx.NodeProto] = []
        constants: dict[str, NDArray[Any]] = {}

        def add_pair(name: str) -> None:
            scale, zero = f"{name}/scale", "int8/zero"
            constants[scale] = _half_scale(np.array(values[name] / LEVELS))
            constants[zero] = np.array(0, np.int8)
            nodes.append(helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}/int8"], f"{name}/quantise"))
            nodes.append(
                helper.make_node(
                    "DequantizeLinear", [f"{name}/int8", scale, zero], [dequantised_name(name)], f"{name}/dequantise"
                )
            )

        for source in self.model.graph.node:
            node = onnx.NodeProto()
            node.CopyFrom(source)
            if node.name in convolutions:
                self._quantise_convolution(node, nodes, constants, activations[node.input[0]].channel_mean)
            elif node.name in additions:
                operand = additions[node.name]
                for index, name in enumerate(node.input):
                    node.input[index] = dequantised_name(name) if name == operand else name
            elif node.op_type in _TRANSPARENT and node.output[0] in values:
                for index, name in enumerate(node.input):
                    node.input[index] = dequantised_name(name)
            nodes.append(node)
            for name in node.output:
                if name in values:
                    add_pair(name)
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        del model.graph.value_info[:]
        read = {name for node in nodes for name in node.input}
        kept = [entry for entry in self.model.graph.initializer if entry.name in read and entry.name not in constants]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
        return model

    def _quantise_convolution(
        self,
        node: onnx.NodeProto,
        nodes: list[onnx.NodeProto],
        constants: dict[str, NDArray[Any]],
        input_mean: NDArray[np.float64],
    ) -> None:
        name = node.input[1]
        weight = numpy_helper.to_array(self._initializers[name])
        quantised, scale = quantise_weight(weight)
        constants[f"{name}/int8"], constants[f"{name}/scale"] = quantised, scale
        constants[f"{name}/zero"] = np.zeros(scale.shape, np.int8)
        inputs = [f"{name}/int8", f"{name}/scale", f"{name}/zero"]
        nodes.append(
            helper.make_node("DequantizeLinear", inputs, [f"{name}/dequantised"], f"{name}/dequantise", axis=0)
        )
        rounded = quantised * scale.astype(np.float64).reshape(-1, 1, 1, 1)
        shift = _mean_output(rounded - weight, input_mean)
        bias = numpy_helper.to_array(self._initializers[node.input[2]]) if len(node.input) == 3 else 0.0
        corrected = f"{node.name}/corrected_bias"
        constants[corrected] = (bias - shift).astype(np.float32)
        del node.input[2:]
        node.input.append(corrected)
        node.input[0] = dequantised_name(node.input[0])
        node.input[1] = dequantised_name(name)


def int8_share(model: onnx.ModelProto) -> float:
    """Share of the convolutions' multiply-accumulates whose input and weights both come from DequantizeLinear."""
    macs = convolution_macs(model)
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    quantised = [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and all(producers.get(name) == "DequantizeLinear" for name in node.input[:2])
    ]
    return sum(macs[name] for name in quantised) / sum(macs.values())


def convolution_macs(model: onnx.ModelProto) -> dict[str, int]:
    """Multiply-accumulates of each convolution, for one image, by the node's name."""
    shapes = _shapes(model)
    return {node.name: _macs(node, shapes) for node in model.graph.node if node.op_type == "Conv"}


def _macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Multiply-accumulates of a convolution, for one image."""
    # Bottleneck, decoder and heads see both views as one batch.
    return int(np.prod(shapes[node.output[0]])) * int(np.prod(shapes[node.input[1]][1:]))


def quantise_weight(weight: NDArray[np.floating]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric INT8 with a scale for each output channel.

    Args:
        weight: (out, in / group, h, w).

    Returns:
        int8 of the same shape, -127..127, and (out,) float32 scales, each a float16 number > 0.
    """
    scale = _half_scale(np.abs(weight).reshape(len(weight), -1).max(axis=1) / LEVELS)
    steps = np.rint(weight / scale.reshape(-1, 1, 1, 1))
    return np.clip(steps, -LEVELS, LEVELS).astype(np.int8), scale


def _half_scale(scale: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rounded up to what float16 holds, so that the numbers are the same in either precision; never 0."""
    limits = np.finfo(np.float16)
    half: NDArray[np.float16] = np.clip(scale, limits.smallest_subnormal, limits.max).astype(np.float16)
    # Rounded down, it would clip what it is the scale of.
    return np.where(half < scale, np.nextafter(half, limits.max), half).astype(np.float32)


def _mean_output(weight: NDArray[np.float64], channel_mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of a convolution's output channels, but for the border: (out,)."""
    taps = weight.sum(axis=(2, 3))
    groups = len(channel_mean) // taps.shape[1]
    by_group = taps.reshape(groups, -1, taps.shape[1])
    mean: NDArray[np.float64] = np.einsum("goc,gc->go", by_group, channel_mean.reshape(groups, -1)).reshape(-1)
    return mean


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of all values for a batch of one image."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in fixed.graph.output:
        value.type.tensor_type.shape.dim[0].Clear()
    del fixed.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True).graph
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in [*graph.value_info, *graph.output]
    }
    return shapes | {entry.name: tuple(entry.dims) for entry in graph.initializer}
