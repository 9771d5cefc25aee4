"""FP16 and INT8 graphs: what is converted, what is kept, what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from recontrast_edge.datasets import combined_sha256, file_sha256
from recontrast_edge.engines.onnx import OnnxEngine
from recontrast_edge.errors import InputError, ModelError, UsageError
from recontrast_edge.images import write_image
from recontrast_edge.onnxfile import read_spec

torch = pytest.importorskip("torch", reason="needs the train extra")
onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("onnxsim", reason="needs the export extra")

from recontrast_export.build import TOLERANCES  # noqa: E402
from recontrast_export.emulation import with_float16_rounding  # noqa: E402
from recontrast_export.onnx_export import build_onnx  # noqa: E402
from recontrast_export.parity import ParitySet, compare, read_images  # noqa: E402
from recontrast_export.precision import (  # noqa: E402
    MAX_CALIBRATION_IMAGES,
    MAX_RANGE_IMAGES,
    CalibrationImages,
    precision_of,
    read_calibration_images,
    to_precision,
)
from recontrast_export.ranges import largest_magnitudes  # noqa: E402

FLOAT, FLOAT16, INT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8


@pytest.fixture(scope="module")
def parity_set(data_folder: Path) -> ParitySet:
    return read_images([data_folder])


@pytest.fixture(scope="module")
def graph_of(model_of: Any, spec_of: Any) -> Any:
    """``graph_of(backbone, head)``: an exported model."""
    graphs: dict[tuple[str, str], Any] = {}

    def get(backbone: str, head: str, **options: Any) -> Any:
        key = backbone, head, *sorted(options.items())
        if key not in graphs:
            model = model_of(backbone)
            graphs[key] = build_onnx(model, spec_of(backbone, model.channels), head=head, **options)
        return graphs[key]

    return get


@pytest.fixture(scope="module")
def calibration(data_folder: Path, spec_of: Any) -> CalibrationImages:
    return read_calibration_images(data_folder / "test" / "good", spec_of("resnet18", (1,)).input)


@pytest.fixture(scope="module")
def converted(graph_of: Any, calibration: CalibrationImages) -> Any:
    """``converted(backbone, head, precision)``"""
    done: dict[tuple[str, str, str], Any] = {}

    def get(backbone: str, head: str, precision: str) -> Any:
        key = backbone, head, precision
        if key not in done:
            images = calibration if precision == "int8" else None
            done[key] = to_precision(graph_of(backbone, head), precision, calibration=images).model
        return done[key]

    return get


def value_types(model: Any) -> dict[str, int]:
    """Element type of every value, inferred."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {entry.name: entry.data_type for entry in graph.initializer}


def node_types(model: Any, *operators: str) -> Counter[int]:
    """How many nodes of these operators give which type."""
    types = value_types(model)
    return Counter(types[node.output[0]] for node in model.graph.node if node.op_type in operators)


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        ("efficientnet_lite0", "map"),
        ("efficientnet_lite0", "features"),
        ("resnet18", "map"),
        ("efficientnet_lite0+discriminator", "map"),
        ("efficientnet_lite0+discriminator", "features"),
    ],
)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_converted_graph_finds_what_the_model_finds(
    backbone: str, head: str, precision: Any, graph_of: Any, converted: Any, parity_set: ParitySet, tmp_path: Path
) -> None:
    paths = tmp_path / "source.onnx", tmp_path / "converted.onnx"
    onnx.save(graph_of(backbone, head), paths[0])
    onnx.save(with_float16_rounding(converted(backbone, head, precision)), paths[1])
    assert read_spec(paths[1]) == read_spec(paths[0])
    with OnnxEngine(paths[0], threads=1) as source, OnnxEngine(paths[1], threads=1) as candidate:
        report = compare(source.infer, candidate.infer, parity_set)
    # Random networks put all images close together, so the order of their scores says nothing with 8 bits.
    assert report.relative_map_errors.max() <= TOLERANCES[precision].map_error
    assert report.relative_map_errors.max() > 0


def test_fp16_networks_compute_in_float16_and_their_maps_in_float32(converted: Any) -> None:
    model = converted("resnet18", "map", "fp16")
    assert node_types(model, "Conv", "ConvTranspose", "Relu", "MaxPool") == {FLOAT16: 53 + 6 + 45 + 2}
    assert node_types(model, "MatMul", "ReduceSum", "ReduceMax", "Sqrt", "Div", "Sub") == {FLOAT: 26}
    types = value_types(model)
    assert {types[name] for name in ("image", "anomaly_map", "anomaly_score")} == {FLOAT}
    assert node_types(model, "Cast")[FLOAT16] == 1


@pytest.mark.parametrize("head", ["map", "features"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_discriminators_convolve_in_float16_or_int8_what_was_computed_in_float32(
    precision: str, head: str, converted: Any
) -> None:
    model = converted("efficientnet_lite0+discriminator", head, precision)
    types = value_types(model)
    convolutions = [
        node for node in model.graph.node if node.name.startswith("discriminator/") and "Conv" in node.op_type
    ]
    assert len(convolutions) == 9
    assert {types[node.output[0]] for node in convolutions} == {FLOAT16}
    assert {types[f"distance{level}/summands"] for level in range(3)} == {FLOAT}
    assert types["defect_probability"] == FLOAT
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    rounded = [node.name for node in convolutions if producers[node.input[0]] == "DequantizeLinear"]
    assert len(rounded) == (8 if precision == "int8" else 0)
    # It makes the logits, and is next to no work.
    assert "discriminator/last" not in rounded


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_features_come_out_in_float16(precision: str, converted: Any) -> None:
    model = converted("efficientnet_lite0", "features", precision)
    assert [value.type.tensor_type.elem_type for value in model.graph.input] == [FLOAT]
    assert [value.type.tensor_type.elem_type for value in model.graph.output] == [FLOAT16] * 12


def test_fp32_only_restores_weights_that_were_stored_as_float16(graph_of: Any) -> None:
    stored = graph_of("efficientnet_lite0", "features", storage="fp16")
    assert precision_of(stored) == "fp32"
    restored = to_precision(stored, "fp32").model
    assert Counter(node.op_type for node in restored.graph.node)["Cast"] == 0
    assert {entry.data_type for entry in restored.graph.initializer} == {FLOAT}
    source = to_precision(graph_of("efficientnet_lite0", "features"), "fp32").model
    assert source == graph_of("efficientnet_lite0", "features")
    assert list(with_float16_rounding(source).graph.node) == list(source.graph.node)


def test_the_model_that_is_given_stays_as_it_is(graph_of: Any, calibration: CalibrationImages) -> None:
    model = graph_of("efficientnet_lite0", "map")
    before = model.SerializeToString(deterministic=True)
    to_precision(model, "int8", calibration=calibration)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_graph_in_that_precision_is_taken_as_it_is(precision: str, converted: Any) -> None:
    model = converted("efficientnet_lite0", "map", precision)
    assert precision_of(model) == precision
    assert to_precision(model, precision).model == model


@pytest.mark.parametrize(("found", "wanted"), [("fp16", "fp32"), ("fp16", "int8"), ("int8", "fp16"), ("int8", "fp32")])
def test_a_graph_in_another_precision_is_refused(found: str, wanted: Any, converted: Any) -> None:
    with pytest.raises(UsageError, match=f"is {found} already .* --precision {found}"):
        to_precision(converted("efficientnet_lite0", "map", found), wanted)


def test_calibration_images_are_wanted_for_int8_only(
    graph_of: Any, converted: Any, calibration: CalibrationImages
) -> None:
    model = graph_of("efficientnet_lite0", "map")
    with pytest.raises(UsageError, match="int8 needs --calibration"):
        to_precision(model, "int8")
    with pytest.raises(UsageError, match="fp16 has no scales"):
        to_precision(model, "fp16", calibration=calibration)
    with pytest.raises(UsageError, match="quantised already"):
        to_precision(converted("efficientnet_lite0", "map", "int8"), "int8", calibration=calibration)


def test_what_float16_cannot_hold_is_refused(graph_of: Any) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(graph_of("efficientnet_lite0", "features"))
    entry = next(entry for entry in model.graph.initializer if entry.name == "heads/0/2/weight")
    value = onnx.numpy_helper.to_array(entry).copy()
    value.flat[3] = 7e4
    entry.CopyFrom(onnx.numpy_helper.from_array(value, entry.name))
    with pytest.raises(ModelError, match=r"heads/0/2/weight: holds 7e\+04, which float16 cannot"):
        to_precision(model, "fp16")


def test_a_graph_without_feature_pairs_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="has no value 'target0_0'"):
        to_precision(onnx.load(tiny_model), "fp16")


def test_calibration_images_say_where_they_are_from(data_folder: Path, spec_of: Any, tmp_path: Path) -> None:
    spec = spec_of("resnet18", (1,)).input
    folder = data_folder / "test" / "good"
    images = read_calibration_images(folder, spec)
    assert (images.record.data, images.record.n_images) == ("good", 12)
    assert images.record.data_sha256 == combined_sha256(file_sha256(path) for path in sorted(folder.iterdir()))
    tensors = list(images.tensors())
    assert {(tensor.shape, tensor.dtype.name) for tensor in tensors} == {((1, 3, 64, 96), "float32")}
    assert len(tensors) == 2 * 12
    # Each with a copy that differs in places only: the pasted defect.
    assert all(0 < np.mean(good != pasted) < 0.3 for good, pasted in zip(tensors[::2], tensors[1::2], strict=True))
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(str(path) for path in sorted(folder.iterdir())[:7]))
    with pytest.raises(InputError, match="at least 8 good images, got 7"):
        read_calibration_images(listed, spec)
    with pytest.raises(InputError, match="no such data set"):
        read_calibration_images(tmp_path / "nothing", spec)


def test_of_many_calibration_images_a_sample_is_taken(spec_of: Any, tmp_path: Path) -> None:
    for index in range(MAX_CALIBRATION_IMAGES + 10):
        write_image(tmp_path / f"{index:03}.png", np.full((8, 8), index, np.uint8))
    images = read_calibration_images(tmp_path, spec_of("resnet18", (1,)).input)
    assert images.record.n_images == len(images.paths) == MAX_CALIBRATION_IMAGES
    assert (images.paths[0].name, images.paths[-1].name) == ("000.png", f"{MAX_CALIBRATION_IMAGES + 9:03}.png")


def test_a_damaged_calibration_image_is_named(graph_of: Any, data_folder: Path, spec_of: Any, tmp_path: Path) -> None:
    for path in (data_folder / "test" / "good").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "05.png").write_bytes(b"\x89PNG")
    images = read_calibration_images(tmp_path, spec_of("resnet18", (1,)).input)
    with pytest.raises(InputError, match=r"05\.png"):
        to_precision(graph_of("efficientnet_lite0", "map"), "int8", calibration=images)


def with_scaled_weight(model: Any, name: str, factor: float) -> Any:
    scaled = onnx.ModelProto()
    scaled.CopyFrom(model)
    entry = next(entry for entry in scaled.graph.initializer if entry.name == name)
    value = onnx.numpy_helper.to_array(entry) * np.float32(factor)
    entry.CopyFrom(onnx.numpy_helper.from_array(value, entry.name))
    return scaled


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_values_that_float16_cannot_hold_stay_float32_by_name(
    precision: Any, graph_of: Any, calibration: CalibrationImages, parity_set: ParitySet, tmp_path: Path
) -> None:
    """The first block makes values of up to 1.5e5, and the convolution that reads them brings them back."""
    model, images = graph_of("efficientnet_lite0", "map"), list(calibration.tensors())[:MAX_RANGE_IMAGES]
    # Behind the Relu: what overflows below 0 is 0 there, and harms nothing.
    (reached,) = largest_magnitudes(model, ["bottleneck/fine/0/2"], images).values()
    for name, factor in (
        ("0/0/weight", 1.5e5 / reached),
        ("0/0/bias", 1.5e5 / reached),
        ("1/0/weight", reached / 1.5e5),
    ):
        model = with_scaled_weight(model, f"bottleneck/fine/{name}", factor)
    scales = calibration if precision == "int8" else None
    done = to_precision(model, precision, calibration=scales, images=images)
    assert done.record.largest_activation > 65504
    assert done.record.largest_activation_of.startswith("bottleneck/fine/0")
    assert done.record.n_images == len(images)
    assert {"bottleneck/fine/0/0", "bottleneck/fine/0/2", "bottleneck/fine/1/0"} <= set(done.record.fp32_nodes)
    assert all(name.startswith("bottleneck/fine") for name in done.record.fp32_nodes)
    types = value_types(done.model)
    assert types["bottleneck/fine/0/0"] == FLOAT
    assert types["bottleneck/middle/0"] == FLOAT16
    paths = tmp_path / "source.onnx", tmp_path / "converted.onnx"
    onnx.save(model, paths[0])
    onnx.save(with_float16_rounding(done.model), paths[1])
    with OnnxEngine(paths[0], threads=1) as source, OnnxEngine(paths[1], threads=1) as candidate:
        report = compare(source.infer, candidate.infer, parity_set)
    assert report.relative_map_errors.max() <= TOLERANCES[precision].map_error
    onnx.save(with_float16_rounding(to_precision(model, "fp16").model), paths[1])
    with OnnxEngine(paths[0], threads=1) as source, OnnxEngine(paths[1], threads=1) as candidate:
        broken = compare(source.infer, candidate.infer, parity_set)
    # Unchecked, infinity arrives at the map.
    assert not broken.relative_map_errors.max() <= TOLERANCES[precision].map_error


def test_float16_is_judged_as_gpus_compute_it(tmp_path: Path) -> None:
    """ONNX Runtime alone keeps float32 between float16 nodes on a CPU."""
    helper = onnx.helper
    weights = [
        onnx.numpy_helper.from_array(np.full((1, 1, 1, 1), value, np.float16), name)
        for name, value in (("up", 1000), ("down", 0.001))
    ]
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], name="half", to=FLOAT16),
        helper.make_node("Conv", ["half", "up"], ["large"], name="large"),
        helper.make_node("Relu", ["large"], ["positive"], name="positive"),
        helper.make_node("Conv", ["positive", "down"], ["small"], name="small"),
        helper.make_node("Cast", ["small"], ["y"], name="y", to=FLOAT),
    ]
    values = (
        [helper.make_tensor_value_info("x", FLOAT, [1, 1, 1, 2])],
        [helper.make_tensor_value_info("y", FLOAT, [1, 1, 1, 2])],
    )
    graph = helper.make_graph(nodes, "half", *values, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    x = np.array([[[[100, 1 / 3]]]], np.float32)

    def run(candidate: Any) -> Any:
        session = onnxruntime.InferenceSession(candidate.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {"x": x})[0].ravel()

    half = np.float16
    third = half(half(np.float32(half(1 / 3)) * 1000) * np.float32(half(0.001)))
    emulated = with_float16_rounding(model)
    assert run(emulated).tolist() == [np.inf, third]
    assert np.isfinite(run(model)).all()


def test_a_feature_output_that_float16_cannot_hold_is_refused(graph_of: Any, calibration: CalibrationImages) -> None:
    model = with_scaled_weight(graph_of("efficientnet_lite0", "features"), "heads/0/1/weight", 1e7)
    with pytest.raises(ModelError, match=r"reconstruction0_1: reaches .* --precision fp32, or export with --head map"):
        to_precision(model, "fp16", images=list(calibration.tensors())[:2])


def test_what_is_on_record(graph_of: Any, calibration: CalibrationImages) -> None:
    images = list(calibration.tensors())[:2]
    record = to_precision(graph_of("efficientnet_lite0", "map"), "int8", calibration=calibration, images=images).record
    assert record.method == "mse"
    assert 0.8 < record.int8_macs < 1
    assert len(record.fp16_blocks) == 22
    assert all("depthwise" in block for block in record.fp16_blocks)
    assert (record.fp32_nodes, record.n_images) == ((), 2)
    assert 0 < record.largest_activation < 65504 / 4
    assert to_precision(graph_of("efficientnet_lite0", "map"), "fp16").record.largest_activation is None


def test_onnx_runtime_runs_int8_graphs_as_they_are_written(
    converted: Any, parity_set: ParitySet, tmp_path: Path
) -> None:
    """Its own fusions around half precision give other maps altogether."""
    path = tmp_path / "int8.onnx"
    onnx.save(converted("efficientnet_lite0", "map", "int8"), path)
    with OnnxEngine(path, threads=1, optimise=False) as exact, OnnxEngine(path, threads=1) as fast:
        report = compare(exact.infer, fast.infer, parity_set)
    # Another order of sums puts values on the other side of a rounding.
    assert report.relative_map_errors.max() < 0.1
