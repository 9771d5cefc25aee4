"""Equalised channels: the same bits, and INT8 that loses less."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest

from recontrast_edge.int8 import part_of
from recontrast_edge.scoring import INPUT_NAME

pytest.importorskip("torch", reason="needs the train extra")
onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("onnxsim", reason="needs the export extra")

from onnx import numpy_helper  # noqa: E402

from recontrast_export.equalise import with_equal_channels  # noqa: E402
from recontrast_export.onnx_export import build_onnx  # noqa: E402
from recontrast_export.qdq import Int8Network  # noqa: E402
from recontrast_export.ranges import Activation, measure_activations  # noqa: E402
from recontrast_export.rewrite import with_pointwise_upsampling  # noqa: E402

MODELS = ("efficientnet_lite0", "resnet18+discriminator")


def run(model: Any, tensor: Any) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return list(session.run(None, {INPUT_NAME: tensor}))


@pytest.fixture(scope="module")
def network_of(model_of: Any, spec_of: Any, tensors: Any) -> Any:
    """A network whose channels are of very different sizes, and what its values do."""
    known: dict[str, tuple[Int8Network, dict[str, Activation]]] = {}

    def get(name: str, head: str = "map") -> tuple[Int8Network, dict[str, Activation]]:
        if name + head not in known:
            model = build_onnx(model_of(name), spec_of(name, model_of(name).channels), head=head)
            rng = np.random.default_rng(1)
            entries = {entry.name: entry for entry in model.graph.initializer}
            for node in model.graph.node:
                if node.op_type in ("Conv", "ConvTranspose") and part_of(node.name) in ("bottleneck", "decoder"):
                    out = 0 if node.op_type == "Conv" else 1
                    size = np.exp(rng.normal(size=entries[node.input[1]].dims[out])).astype(np.float32)
                    for index, axis in ((1, out), (2, 0)):
                        value = numpy_helper.to_array(entries[node.input[index]])
                        shape = [-1 if each == axis else 1 for each in range(value.ndim)]
                        changed = numpy_helper.from_array(value * size.reshape(shape), node.input[index])
                        entries[node.input[index]].CopyFrom(changed)
            network = Int8Network(with_pointwise_upsampling(model))
            known[name + head] = (
                network,
                measure_activations(network.model, network.values(network.blocks), tensors),
            )
        return known[name + head]

    return get


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("efficientnet_lite0", "map"),
        ("efficientnet_lite0", "features"),
        ("resnet18+discriminator", "map"),
        ("resnet50", "features"),
    ],
)
def test_not_one_bit_changes(name: str, head: str, network_of: Any, tensors: Any) -> None:
    network, activations = network_of(name, head)
    equalised = network.equalised(network.blocks, activations)
    onnx.checker.check_model(equalised.model, full_check=True)
    assert equalised.blocks == network.blocks
    assert equalised.macs == network.macs
    for tensor in tensors:
        for before, after in zip(run(network.model, tensor), run(equalised.model, tensor), strict=True):
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("name", MODELS)
def test_channels_are_of_like_size(name: str, network_of: Any, tensors: Any) -> None:
    network, activations = network_of(name)
    equalised = network.equalised(network.blocks, activations)
    after = measure_activations(equalised.model, equalised.values(equalised.blocks), tensors)

    def unevenness(measured: dict[str, Activation], value: str) -> float:
        largest = measured[value].channel_largest
        return float(largest.max() / np.median(largest))

    read = [node.input[0] for node in equalised.model.graph.node if node.op_type == "Conv"]
    changed = [value for value in read if part_of(value) in ("bottleneck", "decoder") and value in after]
    inner = [value for value in changed if value in activations and _sole_reader(network.model, value)]
    assert len(inner) > 5
    before_median = np.median([unevenness(activations, value) for value in inner])
    assert np.median([unevenness(after, value) for value in inner]) < 0.7 * before_median
    for value in inner:
        assert after[value].magnitudes.largest <= 1.001 * activations[value].magnitudes.largest


def _sole_reader(model: Any, value: str) -> bool:
    readers = [node for node in model.graph.node if value in node.input]
    return [node.op_type for node in readers] == ["Conv"]


@pytest.mark.parametrize("name", MODELS)
def test_only_what_was_asked_for_changes(name: str, network_of: Any) -> None:
    network, activations = network_of(name)
    equalised = network.equalised(network.blocks, activations).model
    before, after = ({node.name: node for node in model.graph.node} for model in (network.model, equalised))
    added = after.keys() - before.keys()
    # One for each level of the encoders' features that the bottleneck reads.
    assert sorted(after[node].op_type for node in added) == ["Mul"] * 3
    for node in network.model.graph.node:
        changed = list(after[node.name].input) != list(node.input)
        if part_of(node.name) in ("encoders", "heads", "discriminator"):
            assert not changed, node.name
    same = with_equal_channels(network.model, (), {})
    assert [node.name for node in same.graph.node] == [node.name for node in network.model.graph.node]
    assert {entry.name for entry in same.graph.initializer} == {
        name for node in network.model.graph.node for name in node.input
    }.intersection(entry.name for entry in network.model.graph.initializer)


def test_int8_loses_less(network_of: Any, tensors: Any) -> None:
    network, activations = network_of("resnet18+discriminator")
    blocks = [block for block in network.blocks if part_of(block) in ("bottleneck", "decoder")]
    equalised = network.equalised(blocks, activations)
    measured = measure_activations(equalised.model, equalised.values(blocks), tensors)
    (wanted, *_), (plain, *_), (better, *_) = (
        run(model, tensors[0])
        for model in (
            network.model,
            network.quantised(blocks, activations, "minmax"),
            equalised.quantised(blocks, measured, "minmax"),
        )
    )
    error, equal_error = (np.sqrt(np.mean((found - wanted) ** 2)) for found in (plain, better))
    assert equal_error < 0.85 * error


def test_idle_channels_and_values_without_any_stay_finite(network_of: Any) -> None:
    network, activations = network_of("efficientnet_lite0")
    for largest in (0.0, np.float32(1e-30)):
        silent = {}
        for value, activation in activations.items():
            size = activation.channel_largest.copy()
            size[::2] = largest
            silent[value] = size if len(silent) % 2 else np.zeros_like(size)
        model = with_equal_channels(network.model, _convolutions(network), silent)
        for entry in model.graph.initializer:
            assert np.isfinite(numpy_helper.to_array(entry)).all()


def _convolutions(network: Int8Network) -> list[str]:
    return [
        node.name
        for node in network.model.graph.node
        if node.op_type == "Conv" and part_of(node.name) in ("bottleneck", "decoder")
    ]
