"""How large the values inside of a network get, over images.

activations = measure_activations(model, ["encoder/relu"], tensors)
limit = activations["encoder/relu"].magnitudes.limit("mse")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from recontrast_edge.errors import ModelError
from recontrast_edge.magnitudes import Magnitudes
from recontrast_edge.scoring import INPUT_NAME


@dataclass
class Activation:
    """What a value inside of the network does over the images.

    Attributes:
        magnitudes: of all its elements.
        channel_mean: (C,) float64, mean of each channel (axis 1).
        channel_largest: (C,) float32, largest magnitude of each channel.
    """

    magnitudes: Magnitudes = field(default_factory=Magnitudes)
    channel_mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    channel_largest: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    _n: int = 0

    def add(self, values: NDArray[np.float32]) -> None:
        """Add the value's (N, C, h, w) elements of one image or batch."""
        self.magnitudes.add(values)
        mean = values.mean(axis=(0, 2, 3), dtype=np.float64)
        largest = np.abs(values).max(axis=(0, 2, 3))
        self._n += 1
        self.channel_largest = largest if self._n == 1 else np.maximum(self.channel_largest, largest)
        self.channel_mean = mean if self._n == 1 else self.channel_mean + (mean - self.channel_mean) / self._n


def measure_activations(
    model: onnx.ModelProto, names: Sequence[str], tensors: Iterable[NDArray[np.float32]]
) -> dict[str, Activation]:
    """Run a float32 graph on ONNX Runtime and collect what the named values do.

    Args:
        model: the graph.
        names: of (N, C, h, w) values inside of it.
        tensors: network inputs, (N, 3, H, W) float32.

    Raises:
        ModelError: ONNX Runtime cannot run it, or a value is not finite.
    """
    activations = {name: Activation() for name in names}
    run = _runner(model, names)
    for tensor in tensors:
        for name, value in zip(names, run(tensor), strict=True):
            _require_finite(name, float(np.abs(value).max(initial=0.0)))
            activations[name].add(value)
    return activations


def largest_magnitudes(
    model: onnx.ModelProto, names: Sequence[str], tensors: Iterable[NDArray[np.float32]]
) -> dict[str, float]:
    """Largest magnitude of each named value of a float32 graph, over the inputs; empty without inputs.

    Raises:
        ModelError: ONNX Runtime cannot run it, or a value is not finite.
    """
    largest: dict[str, float] = {}
    run = _runner(model, names)
    for tensor in tensors:
        for name, value in zip(names, run(tensor), strict=True):
            reached = float(np.abs(value).max(initial=0.0))
            _require_finite(name, reached)
            largest[name] = max(largest.get(name, 0.0), reached)
    return largest


def _require_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ModelError(f"{name}: the network's value is not finite; train or export the model again")


def _runner(
    model: onnx.ModelProto, names: Sequence[str]
) -> Callable[[NDArray[np.float32]], Sequence[NDArray[np.float32]]]:
    import onnxruntime

    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    del probed.graph.output[:]
    probed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(probed.SerializeToString(), options, ["CPUExecutionProvider"])
    # ONNX Runtime raises a family of its own types, with no common public base.
    except Exception as error:
        raise ModelError(f"ONNX Runtime cannot run the model ({error}); export it again") from None
    return lambda tensor: session.run(list(names), {INPUT_NAME: tensor})
