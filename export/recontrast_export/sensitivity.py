"""What INT8 costs, block by block, and the graphs worth trying.

    probe = Probe(reference, images, folder)
    harms = block_harms(network, activations, "mse", probe)
    for rung in ladder(network, harms): print(rung.int8_macs, rung.blocks)

Rounding errors of different blocks hardly know of each other, so that their squares add up: one measurement a block
predicts all combinations well enough to choose the few that are measured. Multiply-accumulates stand for time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from recontrast_edge.engines import Engine
from recontrast_edge.engines.onnx import OnnxEngine
from recontrast_edge.images import atomic_write
from recontrast_edge.magnitudes import METHODS, Method
from recontrast_edge.preprocess import Image
from recontrast_export.qdq import Int8Network
from recontrast_export.ranges import Activation
from recontrast_export.trt import Progress

_PHASE = "Measuring blocks"

_PEAK_SHARE = 0.01
"""Share of a map's pixels that are its peaks."""

_MAX_RUNGS = 20
_STEP = 0.8
"""Each rung has at most this share of the squared error of the one before."""


class Probe:
    """A few images to measure the map's error on.

    Args:
        reference: the FP32 model.
        images: uint8, as ``Engine.infer`` takes them.
        folder: for temporary files.
    """

    def __init__(self, reference: Engine, images: Sequence[Image], folder: Path) -> None:
        self._images = images
        self._folder = folder
        self._maps = reference.infer(images).maps
        variances = self._maps.var(axis=(1, 2), dtype=np.float64)
        self._variances = np.maximum(variances, np.finfo(np.float32).tiny)

    def error(self, model: onnx.ModelProto) -> float:
        """Root mean square of the maps' errors at their peaks, in standard deviations of each image's own reference.

        Verdicts hang on the peaks, where clipping does its harm; over whole maps that of rounding would hide it. Every
        image counts alike; else those with large values everywhere would decide alone.
        """
        with opened(model, self._folder) as engine:
            maps = engine.infer(self._images).maps
        count = max(1, round(_PEAK_SHARE * self._maps[0].size))
        highest = np.maximum(maps, self._maps).reshape(len(maps), -1)
        peaks = np.argpartition(highest, -count, axis=1)[:, -count:]
        errors = np.take_along_axis((maps - self._maps).reshape(len(maps), -1), peaks, axis=1)
        squares = np.mean(np.square(errors, dtype=np.float64), axis=1)
        return float(np.sqrt(np.mean(squares / self._variances)))


@contextmanager
def opened(model: onnx.ModelProto, folder: Path) -> Iterator[OnnxEngine]:
    """Run a graph that is no file yet."""
    path = folder / "candidate.onnx"
    with atomic_write(path) as file:
        file.write(model.SerializeToString(deterministic=True))
    with OnnxEngine(path) as engine:
        yield engine


@dataclass(frozen=True)
class Rung:
    """A choice of blocks for INT8; predicted, not measured.

    Attributes:
        blocks: in INT8.
        int8_macs: their share of all multiply-accumulates.
        predicted_error: as ``Probe.error``.
    """

    blocks: tuple[str, ...]
    int8_macs: float
    predicted_error: float


def method_errors(
    network: Int8Network, blocks: Sequence[str], activations: Mapping[str, Activation], probe: Probe
) -> dict[Method, float]:
    """``Probe.error`` with these blocks in INT8, for each way to choose ranges."""
    return {method: probe.error(network.quantised(blocks, activations, method)) for method in METHODS}


def block_harms(
    network: Int8Network,
    blocks: Sequence[str],
    activations: Mapping[str, Activation],
    method: Method,
    probe: Probe,
    *,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Squared ``Probe.error`` with only this one block in INT8, for each of the blocks.

    Args:
        progress: told after each block.
    """
    harms = {}
    if progress is not None:
        progress.start(_PHASE, None, len(blocks))
    for index, block in enumerate(blocks):
        harms[block] = probe.error(network.quantised([block], activations, method)) ** 2
        if progress is not None:
            progress.step(_PHASE, index)
    if progress is not None:
        progress.finish(_PHASE)
    return harms


def ladder(network: Int8Network, harms: Mapping[str, float]) -> list[Rung]:
    """From all blocks in INT8 to fewer, the greatest harm for a multiply-accumulate leaving first.

    Each rung has at most ``_STEP`` times the squared error, as predicted, of the one before.
    """
    leaving = sorted(harms, key=lambda block: harms[block] / network.macs_of([block]), reverse=True)
    rungs: list[Rung] = []
    for index in range(len(leaving)):
        rung = rung_of(network, harms, leaving[index:])
        if rungs and rung.predicted_error**2 > _STEP * rungs[-1].predicted_error ** 2:
            continue
        rungs.append(rung)
        if len(rungs) == _MAX_RUNGS:
            break
    return rungs


def rung_of(network: Int8Network, harms: Mapping[str, float], kept: Collection[str]) -> Rung:
    """The choice of these blocks.

    Args:
        harms: of all blocks, in the order of the network.
    """
    blocks = tuple(block for block in harms if block in kept)
    squared = sum(harms[block] for block in blocks)
    return Rung(blocks, network.macs_of(blocks) / network.macs, float(np.sqrt(squared)))
