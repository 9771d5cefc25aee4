"""Channels of like size before INT8: an exact rewrite, because one scale has to serve all channels of a value.

    equalised = with_equal_channels(model, convolutions, channel_largest)

A channel that stays small beside another one of the same value gets few of INT8's steps. Dividing it by a factor and
multiplying the weights that read it by the same one changes nothing, but gives it more. As in Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction" (ICCV 2019), the factor is ``sqrt(r / w)`` of the
channel's range r and its weights' range w, so that neither gains what the other one loses; the range is the one that
was measured, as in Xiao et al., "SmoothQuant" (ICML 2023). Factors are powers of 2: not one bit of the float results
changes.

The division goes into the weights of the convolutions that make the value, through a Relu, a depth-to-space or a
concatenation between, and costs nothing. Where the encoders' features, which are compared as they are, enter the
bottleneck, it is a multiplication of its own. Values that a residual addition reads, too, stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

_MOST = 32.0
"""A channel counts as no smaller than the largest one by more than this, so that one that is idle on the images at hand
is not blown up."""

_TAPS = 4
"""Channels that a depth-to-space makes one of; see ``rewrite``."""


@dataclass(frozen=True, eq=False)
class _Place:
    """Where channels of a value can be divided.

    Attributes:
        maker: the convolution whose output channels are divided; None to multiply ``value`` for ``readers``.
        channels: (n,) which of the original value's channels each channel here is.
    """

    maker: onnx.NodeProto | None
    value: str
    readers: tuple[onnx.NodeProto, ...]
    channels: NDArray[np.intp]


def with_equal_channels(
    model: onnx.ModelProto,
    convolutions: Collection[str],
    channel_largest: Mapping[str, NDArray[np.float32]],
) -> onnx.ModelProto:
    """A copy in which channels of a value that these convolutions read differ less.

    Args:
        model: rewritten by ``rewrite.with_pointwise_upsampling``, with weights as float32 initializers.
        convolutions: names of those that may compute in INT8; depthwise ones are left out.
        channel_largest: (C,) largest magnitude of each channel, of each value that would be quantised for them.
    """
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(model)
    _Rewriter(rewritten, convolutions).rewrite(channel_largest)
    return rewritten


class _Rewriter:
    def __init__(self, model: onnx.ModelProto, convolutions: Collection[str]) -> None:
        self._graph = model.graph
        self._initializers = {entry.name: entry for entry in model.graph.initializer}
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._outputs = {value.name for value in model.graph.output}
        self._weights = {
            node.name: numpy_helper.to_array(self._initializers[node.input[1]])
            for node in model.graph.node
            if node.op_type == "Conv"
        }
        self._quantised = {name for name in convolutions if self._weights[name].shape[1] > 1}

    def rewrite(self, channel_largest: Mapping[str, NDArray[np.float32]]) -> None:
        new = dict(self._weights)
        biases: dict[str, NDArray[np.float32]] = {}
        multiplied: list[tuple[_Place, NDArray[np.float32]]] = []
        sizes = {name: len(each) for name, each in channel_largest.items()}
        for value, largest in channel_largest.items():
            quantised = [node for node in self._readers[value] if node.name in self._quantised]
            places = self._places(value, tuple(quantised), np.arange(len(largest)), sizes) if quantised else None
            if places is None:
                continue
            factors = _factors(largest, [self._weights[node.name] for node in quantised])
            for node in quantised:
                new[node.name] = new[node.name] / factors.reshape(1, -1, 1, 1)
            for place in places:
                own = factors[place.channels]
                if place.maker is None:
                    multiplied.append((place, own))
                    continue
                new[place.maker.name] = new[place.maker.name] * own.reshape(-1, 1, 1, 1)
                if len(place.maker.input) == 3:
                    name = place.maker.name
                    bias = biases.get(name, numpy_helper.to_array(self._initializers[place.maker.input[2]]))
                    biases[name] = bias * own
        self._write(new, biases)
        self._multiply(multiplied)
        read = {name for node in self._graph.node for name in node.input}
        kept = [entry for entry in self._graph.initializer if entry.name in read]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)
        # Shapes of values inside of the graph, of which there are more now; they can be inferred.
        del self._graph.value_info[:]

    def _places(
        self, value: str, readers: tuple[onnx.NodeProto, ...], channels: NDArray[np.intp], sizes: Mapping[str, int]
    ) -> list[_Place] | None:
        """Where to divide the channels of a value for these readers; None where it is not worth its cost."""
        maker = self._makers.get(value)
        if maker is None:
            return None
        along = next((entry.i for entry in maker.attribute if entry.name == "axis"), 0)
        if maker.op_type == "Concat" and along == 0:
            return [_Place(None, value, readers, channels)]
        if len(self._readers[value]) != len(readers) or value in self._outputs:
            return None
        if maker.op_type == "Conv":
            return [_Place(maker, value, readers, channels)] if self._weights[maker.name].shape[1] > 1 else None
        if maker.op_type in ("Relu", "DepthToSpace"):
            taps = _TAPS if maker.op_type == "DepthToSpace" else 1
            return self._places(maker.input[0], (maker,), np.tile(channels, taps), sizes)
        if maker.op_type != "Concat" or not all(name in sizes for name in maker.input):
            return None
        ends = np.cumsum([sizes[name] for name in maker.input])
        parts = [
            self._places(name, (maker,), own, sizes)
            for name, own in zip(maker.input, np.split(channels, ends[:-1]), strict=True)
        ]
        return None if any(part is None for part in parts) else [place for part in parts for place in part or []]

    def _write(self, weights: Mapping[str, NDArray[np.float32]], biases: Mapping[str, NDArray[np.float32]]) -> None:
        for node in self._graph.node:
            for index, changed in ((1, weights), (2, biases)):
                if node.op_type != "Conv" or node.name not in changed or changed[node.name] is self._weights[node.name]:
                    continue
                # Of its own name, for others may read the old one.
                name = f"{node.name}/{'weight' if index == 1 else 'bias'}/equalised"
                self._graph.initializer.append(numpy_helper.from_array(changed[node.name], name))
                node.input[index] = name

    def _multiply(self, places: Sequence[tuple[_Place, NDArray[np.float32]]]) -> None:
        behind: dict[str, list[onnx.NodeProto]] = {}
        for place, factors in places:
            known = behind.setdefault(place.value, [])
            suffix = f"/{len(known)}" if known else ""
            made, constant = f"{place.value}/equalised{suffix}", f"{place.value}/factors{suffix}"
            self._graph.initializer.append(numpy_helper.from_array(factors.reshape(1, -1, 1, 1), constant))
            known.append(helper.make_node("Mul", [place.value, constant], [made], name=f"{made}/product"))
            for reader in place.readers:
                for index, name in enumerate(reader.input):
                    reader.input[index] = made if name == place.value else name
        nodes: list[onnx.NodeProto] = []
        for node in self._graph.node:
            nodes.append(node)
            nodes += [added for name in node.output for added in behind.get(name, [])]
        # Before the nodes that these are copies of go.
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self._graph.node[:]
        self._graph.node.extend(copies)


def _factors(largest: NDArray[np.float32], weights: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """What each channel of a value is multiplied by, (C,), powers of 2.

    Args:
        largest: (C,) magnitudes.
        weights: (out, C, h, w) each, that read it.
    """
    read = np.max([np.abs(weight).max(axis=(0, 2, 3)) for weight in weights], axis=0)
    if not largest.max() or not read.max():
        return np.ones_like(largest)
    reach = np.maximum(largest, largest.max() / _MOST)
    read = np.maximum(read, read.max() / _MOST)
    factors = np.exp2(np.rint(np.log2(np.sqrt(read / reach))))
    # The value as a whole gets no larger: float16 holds it as before.
    whole = np.exp2(np.floor(np.log2(largest.max() / (largest * factors).max())))
    return np.asarray(factors * whole, np.float32)
