"""Where INT8 goes in a network, and what its scales are: one definition for training and for exported graphs.

    placement = Layout(operations).place(["decoder/stages/0/0"])
    codes, scale = quantise_weight(weight)

The rules, so that builders fuse what lies between the quantised values:

* A convolution of a quantised block reads input and weights through Q/DQ: quantisation and its inverse. Weights have a
  scale for each output channel, inputs have one; all scales are symmetric. The bias is not quantised.
* Where an addition closes a residual block, one operand comes straight from the convolution that is fused with it, the
  costlier one if there are two; the other one is quantised.
* One value has one Q/DQ pair, whoever reads it; readers that are not quantised read the value itself.
* Where the value was concatenated, pooled or reordered, the inputs of that are quantised with the very same scale. That
  changes no number, and the data stays INT8 from one convolution to the next.
* Never quantised: the convolutions of the image, the heads that make the reconstructions, and what follows them but for
  the discriminator's convolutions, of which the last one, which makes its logits, is left out as well.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.magnitudes import LEVELS
from recontrast_edge.scoring import INPUT_NAME

# Rounding to a grid commutes with these, so that input and output can share one scale.
TRANSPARENT = ("Concat", "DepthToSpace", "MaxPool")
"""Operators whose inputs share the scale of their output."""

PARTS = ("encoders", "bottleneck", "decoder", "discriminator")
"""The parts of the network that can be quantised."""

LOGITS = "discriminator/last"
"""The convolution that ends the discriminator, and what it makes."""


def block_of(name: str) -> str:
    """The residual block, or other unit, of the network that a convolution belongs to, by the convolution's name.

    ``encoder/layer2/0/downsample/0`` -> ``encoder/layer2/0``; ``bottleneck/fine/1/0`` -> ``bottleneck/fine``.
    """
    # Up to the last number that a name follows: the block's own index. Without one, up to the trailing numbers.
    indexed = re.match(r"(.*/\d+)/[^/\d]", name)
    return indexed[1] if indexed else re.sub(r"(/\d+)+$", "", name)


def part_of(block: str) -> str:
    """One of ``PARTS``, or ``heads``."""
    first = block.split("/", 1)[0]
    return "encoders" if first in ("encoder", "frozen") else first


@dataclass(frozen=True)
class Operation:
    """One step of a network.

    Attributes:
        name: unique; of a convolution, the path of its module.
        kind: ONNX operator.
        inputs: names of the values it reads, without constants.
        outputs: names of the values it makes.
        weight_shape: of a convolution (``Conv``), (out, in / group, h, w); else empty.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight_shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Placement:
    """What is quantised.

    Attributes:
        convolutions: names of those that compute in INT8.
        additions: name of each addition that is fused with one of them -> the operand to quantise.
        groups: each value to quantise -> the first of those that share its scale.
    """

    convolutions: frozenset[str]
    additions: dict[str, str]
    groups: dict[str, str]


class Layout:
    """A network, seen as what could be quantised.

    Args:
        operations: in the order of computation.

    Attributes:
        block_by_convolution: of each convolution that can be quantised. A depthwise one is a block of its own: it is
            few multiply-accumulates, and the most harmful to round.
        blocks: names of the blocks, in the order of computation.
        default_blocks: those that are quantised where nothing was measured: all but depthwise convolutions.
    """

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._operations = tuple(operations)
        self._producers = {name: operation for operation in self._operations for name in operation.outputs}
        self._n_readers = Counter(name for operation in self._operations for name in operation.inputs)
        self.block_by_convolution: dict[str, str] = {}
        depthwise = set()
        for operation in self._operations:
            if operation.kind != "Conv" or operation.name == LOGITS:
                continue
            if INPUT_NAME in operation.inputs or part_of(operation.name) not in PARTS:
                continue
            is_depthwise = operation.weight_shape[1] == 1 and operation.weight_shape[0] > 1
            block = operation.name if is_depthwise else block_of(operation.name)
            self.block_by_convolution[operation.name] = block
            if is_depthwise:
                depthwise.add(block)
        self.blocks = tuple(dict.fromkeys(self.block_by_convolution.values()))
        self.default_blocks = tuple(block for block in self.blocks if block not in depthwise)

    def place(self, blocks: Collection[str]) -> Placement:
        """Where Q/DQ goes if these blocks are quantised.

        Raises:
            ValueError: a block that does not exist.
        """
        unknown = set(blocks) - set(self.blocks)
        if unknown:
            raise ValueError(f"no such blocks: {', '.join(sorted(unknown))}")
        convolutions = frozenset(name for name, block in self.block_by_convolution.items() if block in blocks)
        additions = self._additions(convolutions)
        return Placement(convolutions, additions, self._groups(convolutions, additions))

    def _additions(self, convolutions: Collection[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for operation in self._operations:
            if operation.kind != "Add" or len(set(operation.inputs)) != 2:
                continue
            fusable = {
                name: math.prod(self._producers[name].weight_shape)
                for name in operation.inputs
                if name in self._producers and self._producers[name].name in convolutions and self._n_readers[name] == 1
            }
            if fusable:
                # Their outputs are of one shape, so the weights' sizes tell their costs apart.
                fused = max(fusable, key=lambda name: fusable[name])
                (found[operation.name],) = (name for name in operation.inputs if name != fused)
        return found

    def _groups(self, convolutions: Collection[str], additions: dict[str, str]) -> dict[str, str]:
        pending = list(additions.values())
        pending += [operation.inputs[0] for operation in self._operations if operation.name in convolutions]
        parent: dict[str, str] = {}

        def root(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        while pending:
            name = pending.pop()
            parent.setdefault(name, name)
            producer = self._producers.get(name)
            if producer is None or producer.kind not in TRANSPARENT:
                continue
            for source in producer.inputs:
                if source not in parent:
                    parent[source] = source
                    pending.append(source)
                parent[root(source)] = root(name)
        first: dict[str, str] = {}
        groups = {}
        for operation in self._operations:
            for name in operation.outputs:
                if name in parent:
                    groups[name] = first.setdefault(root(name), name)
        return groups


def quantise_weight(weight: NDArray[np.floating]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric INT8 with a scale for each output channel.

    Args:
        weight: (out, in / group, h, w).

    Returns:
        int8 of the same shape, -127..127, and (out,) float32 scales, each a float16 number > 0.
    """
    scale = half_scale(np.abs(weight).reshape(len(weight), -1).max(axis=1) / LEVELS)
    steps = np.rint(weight / scale.reshape(-1, 1, 1, 1))
    return np.clip(steps, -LEVELS, LEVELS).astype(np.int8), scale


def half_scale(scale: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rounded up to what float16 holds, so that the numbers are the same in either precision; never 0."""
    limits = np.finfo(np.float16)
    half: NDArray[np.float16] = np.clip(scale, limits.smallest_subnormal, limits.max).astype(np.float16)
    # Rounded down, it would clip what it is the scale of.
    return np.where(half < scale, np.nextafter(half, limits.max), half).astype(np.float32)
