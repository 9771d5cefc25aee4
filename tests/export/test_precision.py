"""FP16 and INT8 graphs: what is converted, what is kept, what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
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
from recontrast_export.onnx_export import build_onnx  # noqa: E402
from recontrast_export.parity import ParitySet, compare, read_images  # noqa: E402
from recontrast_export.precision import (  # noqa: E402
    MAX_CALIBRATION_IMAGES,
    CalibrationImages,
    precision_of,
    read_calibration_images,
    to_precision,
)

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
            done[key] = to_precision(graph_of(backbone, head), precision, calibration=images)
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


@pytest.mark.parametrize("head", ["map", "features"])
@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "resnet18"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_converted_graph_finds_what_the_model_finds(
    backbone: str, head: str, precision: Any, graph_of: Any, converted: Any, parity_set: ParitySet, tmp_path: Path
) -> None:
    paths = tmp_path / "source.onnx", tmp_path / "converted.onnx"
    onnx.save(graph_of(backbone, head), paths[0])
    onnx.save(converted(backbone, head, precision), paths[1])
    assert read_spec(paths[1]) == read_spec(paths[0])
    with OnnxEngine(paths[0], threads=1) as source, OnnxEngine(paths[1], threads=1, optimise=False) as candidate:
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


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_features_come_out_in_float16(precision: str, converted: Any) -> None:
    model = converted("efficientnet_lite0", "features", precision)
    assert [value.type.tensor_type.elem_type for value in model.graph.input] == [FLOAT]
    assert [value.type.tensor_type.elem_type for value in model.graph.output] == [FLOAT16] * 12


@pytest.mark.parametrize(("backbone", "kept"), [("resnet18", 2 + 6), ("efficientnet_lite0", 2 + 6 + 22)])
def test_int8_convolutions_read_input_and_weights_through_symmetric_scales(
    backbone: str, kept: int, converted: Any
) -> None:
    """All but those of the image (2), of the features (6) and depthwise ones."""
    model = converted(backbone, "features", "int8")
    producers = {name: node for node in model.graph.node for name in node.output}
    initializers = {entry.name: onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    quantised = 0
    for node in convolutions:
        readers = [producers.get(name) for name in node.input[:2]]
        if not all(reader is not None and reader.op_type == "DequantizeLinear" for reader in readers):
            assert not any(reader is not None and reader.op_type == "DequantizeLinear" for reader in readers)
            continue
        quantised += 1
        data, weight = readers
        assert producers[data.input[0]].op_type == "QuantizeLinear"
        assert initializers[weight.input[0]].dtype == np.int8
        # One scale a channel, one an input; no zero points but 0.
        assert initializers[weight.input[1]].shape == (initializers[weight.input[0]].shape[0],)
        assert initializers[data.input[1]].shape == ()
        for reader in (data, weight):
            assert initializers[reader.input[1]].dtype == np.float16
            assert (initializers[reader.input[1]] > 0).all()
            assert not initializers[reader.input[2]].any()
    assert quantised == len(convolutions) - kept
    assert node_types(model, "Conv", "ConvTranspose", "Add", "Relu")[FLOAT] == 0


def test_fp32_only_restores_weights_that_were_stored_as_float16(graph_of: Any) -> None:
    stored = graph_of("efficientnet_lite0", "features", storage="fp16")
    assert precision_of(stored) == "fp32"
    restored = to_precision(stored, "fp32")
    assert Counter(node.op_type for node in restored.graph.node)["Cast"] == 0
    assert {entry.data_type for entry in restored.graph.initializer} == {FLOAT}
    source = to_precision(graph_of("efficientnet_lite0", "features"), "fp32")
    assert source == graph_of("efficientnet_lite0", "features")


def test_the_model_that_is_given_stays_as_it_is(graph_of: Any, calibration: CalibrationImages) -> None:
    model = graph_of("efficientnet_lite0", "map")
    before = model.SerializeToString(deterministic=True)
    to_precision(model, "int8", calibration=calibration)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_graph_in_that_precision_is_taken_as_it_is(precision: str, converted: Any) -> None:
    model = converted("efficientnet_lite0", "map", precision)
    assert precision_of(model) == precision
    assert to_precision(model, precision) == model


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
