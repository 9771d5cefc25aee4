"""Exact rewrites, ranges and the placement of Q/DQ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recontrast_edge.int8 import PARTS, block_of, part_of, quantise_weight
from recontrast_edge.magnitudes import METHODS, Magnitudes
from recontrast_edge.scoring import INPUT_NAME

torch = pytest.importorskip("torch", reason="needs the train extra")
onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("onnxsim", reason="needs the export extra")

from recontrast_export.onnx_export import build_onnx  # noqa: E402
from recontrast_export.qdq import Int8Network, int8_share  # noqa: E402
from recontrast_export.ranges import Activation, measure_activations  # noqa: E402
from recontrast_export.rewrite import with_pointwise_upsampling  # noqa: E402

BACKBONES = ("efficientnet_lite0", "resnet18")


def run(model: Any, names: list[str], tensor: Any) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return list(session.run(names, {INPUT_NAME: tensor}))


@pytest.fixture(scope="module")
def graphs(model_of: Any, spec_of: Any) -> dict[str, Any]:
    """Exported models, by backbone."""
    return {name: build_onnx(model_of(name), spec_of(name, model_of(name).channels), head="map") for name in BACKBONES}


@pytest.fixture(scope="module")
def networks(graphs: dict[str, Any]) -> dict[str, Int8Network]:
    return {name: Int8Network(with_pointwise_upsampling(graph)) for name, graph in graphs.items()}


@pytest.fixture(scope="module")
def activations(networks: dict[str, Int8Network], tensors: Any) -> dict[str, dict[str, Activation]]:
    return {
        name: measure_activations(network.model, network.values(network.blocks), tensors)
        for name, network in networks.items()
    }


# --- rewrites --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_rewritten_graphs_give_the_maps_of_pytorch(
    backbone: str, graphs: dict[str, Any], model_of: Any, spec_of: Any, tensors: Any
) -> None:
    from recontrast_edge.scoring import fold_maps, level_distances

    rewritten = with_pointwise_upsampling(graphs[backbone])
    onnx.checker.check_model(rewritten, full_check=True)
    operators = [node.op_type for node in rewritten.graph.node]
    assert "ConvTranspose" not in operators
    assert "BatchNormalization" not in operators
    assert operators.count("DepthToSpace") == 6
    assert sum(node.op_type == "ConvTranspose" for node in graphs[backbone].graph.node) == 6
    with torch.no_grad():
        pairs = model_of(backbone)(torch.from_numpy(tensors[0]))
    spec = spec_of(backbone, (1,) * 3)
    numbers = [[tuple(value.numpy() for value in pair) for pair in levels] for levels in pairs]
    expected = fold_maps(level_distances(numbers), spec.input.size_wh, spec.scoring.blur_sigma)
    (found,) = run(rewritten, ["anomaly_map"], tensors[0])
    assert np.abs(found[:, 0] - expected).max() < 1e-5 * np.ptp(expected)
    (before,) = run(graphs[backbone], ["anomaly_map"], tensors[0])
    assert np.abs(found - before).max() < 1e-5 * np.ptp(expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_one_upsampling_equals_pytorch(bias: bool, relu: bool) -> None:
    """All taps and channels land where they belong, also where two nodes share one weight."""
    torch.manual_seed(0)
    module = torch.nn.ConvTranspose2d(3, 5, 2, 2, bias=bias)
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    constants = [numpy_helper.from_array(module.weight.detach().numpy(), "weight")]
    constants += [numpy_helper.from_array(module.bias.detach().numpy(), "bias")] if bias else []
    names = [entry.name for entry in constants]
    convolutions = [
        helper.make_node("ConvTranspose", ["x", *names], [y], name=y, kernel_shape=[2, 2], strides=[2, 2])
        for y in ("y", "z")
    ]
    rest = [helper.make_node("Relu", ["y"], ["r"], name="relu")] if relu else []
    outputs = [helper.make_tensor_value_info(name, 1, None) for name in ("r" if relu else "y", "z")]
    inputs = [helper.make_tensor_value_info("x", 1, [2, 3, 4, 6])]
    graph = helper.make_graph([*convolutions, *rest], "up", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    rewritten = with_pointwise_upsampling(model)
    operators = [node.op_type for node in rewritten.graph.node]
    assert operators == ["Conv", *["Relu"] * relu, "DepthToSpace", "Conv", "DepthToSpace"]
    session = onnxruntime.InferenceSession(rewritten.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    first, second = session.run(None, {"x": x})
    assert np.abs(second - expected).max() < 1e-6
    assert np.abs(first - (np.maximum(expected, 0) if relu else expected)).max() < 1e-6


@pytest.mark.parametrize("change", [{"strides": [1, 1]}, {"pads": [1, 1, 1, 1]}, {"output_padding": [1, 1]}])
def test_other_transposed_convolutions_stay(change: dict[str, list[int]]) -> None:
    helper = onnx.helper
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2], **change}
    node = helper.make_node("ConvTranspose", ["x", "weight"], ["y"], name="up", **attributes)
    weight = onnx.numpy_helper.from_array(np.ones((3, 5, 2, 2), np.float32), "weight")
    values = (
        [helper.make_tensor_value_info("x", 1, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", 1, None)],
    )
    model = helper.make_model(helper.make_graph([node], "up", *values, [weight]))
    assert with_pointwise_upsampling(model) == model


# --- ranges ----------------------------------------------------------------------------------------------------------


def squared_error(values: Any, limit: float) -> float:
    step = limit / 127
    return float(np.mean((values - np.clip(np.rint(values / step), -127, 127) * step) ** 2))


def histogram_of(*parts: Any) -> Magnitudes:
    magnitudes = Magnitudes()
    for part in parts:
        magnitudes.add(np.asarray(part, np.float32))
    return magnitudes


def test_mse_finds_the_least_squared_error() -> None:
    values = np.random.default_rng(0).standard_t(4, size=50_000).astype(np.float32)
    values = np.append(values, np.float32(60))
    found = histogram_of(values).limit("mse")
    limits = np.linspace(0.05, 1, 400) * np.abs(values).max()
    best = min(squared_error(values, limit) for limit in limits)
    assert squared_error(values, found) <= 1.02 * best
    assert squared_error(values, float(np.abs(values).max())) > 1.2 * best


def test_percentile_leaves_out_one_in_ten_thousand() -> None:
    values = np.random.default_rng(0).exponential(size=200_000).astype(np.float32)
    found = histogram_of(values).limit("percentile")
    assert found == pytest.approx(np.quantile(values, 0.9999), rel=0.01)


def test_entropy_clips_a_long_thin_tail_and_keeps_a_short_one() -> None:
    rng = np.random.default_rng(0)
    body = np.abs(rng.normal(size=200_000)).astype(np.float32)
    tail = np.array([60.0, 80.0, 100.0], np.float32)
    assert histogram_of(body, tail).limit("entropy") < 10
    uniform = rng.uniform(0, 1, 200_000).astype(np.float32)
    assert histogram_of(uniform).limit("entropy") > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_limits_of_special_cases(method: Any) -> None:
    assert Magnitudes().limit(method) == 0
    assert histogram_of(np.zeros(100)).limit(method) == 0
    assert histogram_of(np.full(100, -3.0)).limit(method) == pytest.approx(3, rel=0.01)
    relu = np.maximum(np.random.default_rng(0).normal(size=10_000), 0)
    assert 1 < histogram_of(relu).limit(method) <= relu.max() + 1e-6


@given(
    st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20), min_size=1, max_size=5),
)
@settings(max_examples=50, deadline=None)
def test_histograms_add_up(parts: list[list[float]]) -> None:
    together, separate = histogram_of(*parts), Magnitudes.merged([histogram_of(part) for part in parts])
    assert together.largest == separate.largest == max(np.abs(np.array(part, np.float32)).max() for part in parts)
    assert together.counts.sum() == separate.counts.sum() == sum(map(len, parts))
    assert together.end == separate.end
    # A magnitude at a bin's edge may be counted on either side of it before and after the bins widen.
    assert np.abs(np.cumsum(together.counts) - np.cumsum(separate.counts)).max() <= sum(map(len, parts))


def test_activations_are_those_of_the_graph(networks: dict[str, Int8Network], tensors: Any) -> None:
    network = networks["resnet18"]
    name = network.values(["bottleneck/fine"])[0]
    measured = measure_activations(network.model, [name], tensors)[name]
    probed = onnx.ModelProto()
    probed.CopyFrom(network.model)
    probed.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    values = np.stack([run(probed, [name], tensor)[0] for tensor in tensors])
    assert measured.magnitudes.largest == np.abs(values).max()
    assert measured.magnitudes.counts.sum() == values.size
    assert np.allclose(measured.channel_mean, values.mean(axis=(0, 1, 3, 4)), atol=1e-5)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_have_a_scale_for_each_output_channel() -> None:
    weight = np.random.default_rng(0).normal(size=(6, 4, 3, 3)) * np.geomspace(1e-6, 10, 6).reshape(-1, 1, 1, 1)
    weight[2] = 0
    quantised, scale = quantise_weight(weight.astype(np.float32))
    assert quantised.dtype == np.int8
    assert scale.shape == (6,)
    assert (scale > 0).all()
    assert np.array_equal(scale, scale.astype(np.float16))
    assert not quantised[2].any()
    rows = [1, 3, 4, 5]
    off = np.abs(quantised * scale.reshape(-1, 1, 1, 1) - weight)[rows].max(axis=(1, 2, 3))
    assert (off <= 0.501 * scale[rows]).all()


# --- placement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("encoder/layer2/0/downsample/0", "encoder/layer2/0"),
        ("frozen/layer1/1/conv2", "frozen/layer1/1"),
        ("encoder/_blocks/10/_project_conv", "encoder/_blocks/10"),
        ("bottleneck/fine/1/0", "bottleneck/fine"),
        ("bottleneck/middle/0", "bottleneck/middle"),
        ("bottleneck/stage/1/conv1", "bottleneck/stage/1"),
        ("decoder/stages/0/0/upsample/0", "decoder/stages/0/0"),
    ],
)
def test_blocks_are_named_after_their_modules(name: str, block: str) -> None:
    assert block_of(name) == block


def pairs_of(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    producers = {name: node for node in model.graph.node for name in node.output}
    return producers, {entry.name: onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer}


def source_of(name: str, producers: Mapping[str, Any]) -> str | None:
    """The value behind a Q/DQ pair; None where there is none."""
    dequantise = producers.get(name)
    if dequantise is None or dequantise.op_type != "DequantizeLinear":
        return None
    quantise = producers.get(dequantise.input[0])
    assert quantise is not None
    assert quantise.op_type == "QuantizeLinear"
    assert list(quantise.input[1:]) == list(dequantise.input[1:])
    return str(quantise.input[0])


@pytest.mark.parametrize(("backbone", "kept"), [("resnet18", 2 + 6), ("efficientnet_lite0", 2 + 6)])
def test_all_blocks_in_int8(
    backbone: str, kept: int, networks: dict[str, Int8Network], activations: dict[str, Any]
) -> None:
    """Every convolution but those of the image and the heads, each addition on one side, each concatenation on all."""
    network = networks[backbone]
    model = network.quantised(network.blocks, activations[backbone], "mse")
    onnx.checker.check_model(model, full_check=True)
    producers, constants = pairs_of(model)
    quantised = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            if node.name.startswith("heads/") or INPUT_NAME in node.input:
                assert source_of(node.input[0], producers) is None
                assert producers.get(node.input[1]) is None
                continue
            quantised += 1
            assert source_of(node.input[0], producers) is not None
            dequantise = producers[node.input[1]]
            values, scale, zero = (constants[name] for name in dequantise.input)
            assert values.dtype == np.int8
            assert scale.shape == zero.shape == values.shape[:1]
            assert not zero.any()
            assert (scale > 0).all()
        elif node.op_type == "Add" and node.name.split("/")[0] not in ("distance0", "distance1", "distance2"):
            sources = [source_of(name, producers) for name in node.input]
            assert sum(source is not None for source in sources) == 1, node.name
            (straight,) = (name for name in node.input if source_of(name, producers) is None)
            assert producers[straight].op_type == "Conv"
        elif (
            node.op_type in ("Concat", "DepthToSpace", "MaxPool")
            and "distance" not in node.name
            and "map" not in node.name
        ):
            scales = {float(constants[producers[name].input[1]]) for name in node.input}
            reader = next(
                other
                for other in model.graph.node
                if other.op_type == "QuantizeLinear" and node.output[0] in other.input
            )
            assert scales == {float(constants[reader.input[1]])}, "the same scale on all sides"
    assert quantised == sum(node.op_type == "Conv" for node in model.graph.node) - kept
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not constants[node.input[2]].any()
    one_pair_a_value = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(one_pair_a_value) == len(set(one_pair_a_value))


def test_shared_scales_change_no_number(
    networks: dict[str, Int8Network], activations: dict[str, Any], tensors: Any
) -> None:
    """Rounding to the same grid before a concatenation and after it is rounding once."""
    network = networks["resnet18"]
    model = network.quantised(["bottleneck/stage/0"], activations["resnet18"], "mse")
    producers, _ = pairs_of(model)
    (concat,) = (node for node in model.graph.node if node.name == "bottleneck/cat")
    assert all(source_of(name, producers) is not None for name in concat.input)
    once = onnx.ModelProto()
    once.CopyFrom(model)
    for node in once.graph.node:
        if node.name == "bottleneck/cat":
            for index, name in enumerate(node.input):
                node.input[index] = source_of(name, producers) or name
    (twice_map,), (once_map,) = (run(graph, ["anomaly_map"], tensors[0]) for graph in (model, once))
    # All but exactly: sums in another order may fall on the other side of a rounding.
    assert np.abs(twice_map - once_map).max() < 1e-3 * np.ptp(once_map)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_can_be_switched(part: str, networks: dict[str, Int8Network], activations: dict[str, Any]) -> None:
    network = networks["resnet18"]
    blocks = [block for block in network.blocks if part_of(block) == part]
    model = network.quantised(blocks, activations["resnet18"], "minmax")
    producers, _ = pairs_of(model)
    for node in model.graph.node:
        if node.op_type == "Conv":
            in_part = part_of(block_of(node.name)) == part and INPUT_NAME not in node.input
            assert (source_of(node.input[0], producers) is not None) == in_part, node.name
    assert int8_share(model) == pytest.approx(network.macs_of(blocks) / network.macs)


def test_multiply_accumulates_are_those_that_were_counted_by_hand(networks: dict[str, Int8Network]) -> None:
    """256x256 takes 8.75e9 with resnet18; cost grows with the area."""
    assert networks["resnet18"].macs == pytest.approx(8.75e9 * 96 * 64 / 256**2, rel=0.01)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_int8_finds_what_fp32_finds(
    backbone: str, networks: dict[str, Int8Network], activations: dict[str, Any], tensors: Any
) -> None:
    network = networks[backbone]
    model = network.quantised(network.default_blocks, activations[backbone], "mse")
    (expected,), (found,) = (run(graph, ["anomaly_map"], tensors[0]) for graph in (network.model, model))
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.98
    assert (found != expected).any()


def test_the_bias_takes_back_the_shift_of_the_weights(
    networks: dict[str, Int8Network], activations: dict[str, Any], tensors: Any
) -> None:
    network = networks["resnet18"]
    block, output = "bottleneck/stage/1", "bottleneck/stage/1/conv1"
    model = network.quantised([block], activations["resnet18"], "mse")
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    bias = {node.name: node.input[2] for node in network.model.graph.node if node.op_type == "Conv"}
    biases = {entry.name: entry for entry in network.model.graph.initializer}
    node = next(node for node in plain.graph.node if node.name == output)
    plain.graph.initializer.append(biases[bias[output]])
    node.input[2] = bias[output]

    def shift(graph: Any) -> float:
        differences = [run(graph, [output], tensor)[0] - run(network.model, [output], tensor)[0] for tensor in tensors]
        return float(np.abs(np.mean(differences, axis=(0, 1, 3, 4))).mean())

    for graph in (plain, model, network.model):
        if all(value.name != output for value in graph.graph.output):
            graph.graph.output.append(onnx.helper.make_tensor_value_info(output, 1, None))
    assert shift(model) < shift(plain)


def test_unknown_blocks_are_refused(networks: dict[str, Int8Network], activations: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no such blocks: decoder/stages/9"):
        networks["resnet18"].quantised(["decoder/stages/9"], activations["resnet18"], "mse")
