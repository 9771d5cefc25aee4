"""INT8 in a graph: explicit QuantizeLinear and DequantizeLinear, where ``recontrast_edge.int8`` says.

network = Int8Network(with_pointwise_upsampling(model))
quantised = network.quantised(["decoder/stages/0/0"], activations, "mse")
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from recontrast_edge.int8 import TRANSPARENT, Layout, Operation, half_scale, part_of, quantise_weight
from recontrast_edge.magnitudes import LEVELS, Magnitudes, Method
from recontrast_export.equalise import with_equal_channels
from recontrast_export.ranges import Activation

# The first operator set whose QuantizeLinear and DequantizeLinear take float16.
_OPSET = 19

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def dequantised_name(value: str) -> str:
    """What a quantised value is called after its Q/DQ pair."""
    return f"{value}/dequantised"


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
        self._initializers = {entry.name: entry for entry in model.graph.initializer}
        self._layout = Layout(self._operation(node) for node in model.graph.node)
        self.blocks = self._layout.blocks
        self.default_blocks = self._layout.default_blocks
        self._macs = convolution_macs(model)
        self.macs = sum(self._macs.values())

    def _operation(self, node: onnx.NodeProto) -> Operation:
        shape = tuple(self._initializers[node.input[1]].dims) if node.op_type == "Conv" else ()
        values = tuple(name for name in node.input if name not in self._initializers)
        return Operation(node.name, node.op_type, values, tuple(node.output), shape)

    def macs_of(self, blocks: Collection[str]) -> int:
        """Multiply-accumulates of the convolutions of these blocks, for one image."""
        return sum(self._macs[name] for name, block in self._layout.block_by_convolution.items() if block in blocks)

    def values(self, blocks: Collection[str]) -> list[str]:
        """Names of the values that are quantised if these blocks are; weights are not among them."""
        return list(self._layout.place(blocks).groups)

    def equalised(self, blocks: Collection[str], activations: Mapping[str, Activation]) -> Int8Network:
        """The same network with channels of like size between the convolutions of bottleneck and decoder.

        The encoders' channels are of like size already: measured, theirs gain nothing.

        Args:
            blocks: which are to be quantised; other convolutions do not count.
            activations: of at least ``values(blocks)``; what they are in the new network must be measured anew.
        """
        convolutions = {
            name for name in self._layout.place(blocks).convolutions if part_of(name) in ("bottleneck", "decoder")
        }
        largest = {name: activations[name].channel_largest for name in self.values(blocks)}
        return Int8Network(with_equal_channels(self.model, convolutions, largest))

    def limits(
        self, blocks: Collection[str], activations: Mapping[str, Activation], method: Method
    ) -> dict[str, float]:
        """The range of each value to quantise, ``[-limit, limit]``; the same for those that share a scale.

        Args:
            blocks: which are to be quantised.
            activations: of at least ``values(blocks)``.
            method: see ``ranges``.
        """
        groups = self._layout.place(blocks).groups
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
        scales = {name: limit / LEVELS for name, limit in self.limits(blocks, activations, method).items()}
        means = {name: activation.channel_mean for name, activation in activations.items()}
        return self._with_pairs(blocks, scales, means)

    def with_scales(self, blocks: Collection[str], scales: Mapping[str, float]) -> onnx.ModelProto:
        """The same with scales that are known already, as fine-tuning with quantisation finds them; biases stay.

        Args:
            blocks: some of ``self.blocks``.
            scales: of at least one value of each group that shares one.

        Raises:
            ValueError: a group without a scale, or with several.
        """
        groups = self._layout.place(blocks).groups
        given: dict[str, set[float]] = {group: set() for group in groups.values()}
        for name, group in groups.items():
            if name in scales:
                given[group].add(scales[name])
        unclear = [group for group, found in given.items() if len(found) != 1]
        if unclear:
            raise ValueError(f"expected one scale for {unclear[0]}, got {sorted(given[unclear[0]])}")
        return self._with_pairs(blocks, {name: next(iter(given[group])) for name, group in groups.items()}, None)

    def _with_pairs(
        self,
        blocks: Collection[str],
        scales: Mapping[str, float],
        channel_means: Mapping[str, NDArray[np.float64]] | None,
    ) -> onnx.ModelProto:
        """A copy with Q/DQ; with ``channel_means``, biases make up for the mean error of rounded weights."""
        placement = self._layout.place(blocks)
        convolutions, additions = placement.convolutions, placement.additions
        nodes: list[onnx.NodeProto] = []
        constants: dict[str, NDArray[Any]] = {}

        def add_pair(name: str) -> None:
            scale, zero = f"{name}/scale", "int8/zero"
            constants[scale] = half_scale(np.array(scales[name]))
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
                mean = None if channel_means is None else channel_means[node.input[0]]
                self._quantise_convolution(node, nodes, constants, mean)
            elif node.name in additions:
                operand = additions[node.name]
                for index, name in enumerate(node.input):
                    node.input[index] = dequantised_name(name) if name == operand else name
            elif node.op_type in TRANSPARENT and node.output[0] in scales:
                for index, name in enumerate(node.input):
                    node.input[index] = dequantised_name(name)
            nodes.append(node)
            for name in node.output:
                if name in scales:
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
        input_mean: NDArray[np.float64] | None,
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
        if input_mean is not None:
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
