"""Change the precision of an exported graph: what a strongly typed builder is given is what it builds.

    model = to_precision(onnx.load("model.onnx"), "fp16")

``fp32``: weights that the file stores as float16 become float32 again; nothing else changes.

``fp16``: the network, up to the feature pairs, computes in float16. The image stays float32. In a ``features`` graph
the pairs are float16 outputs, so that the map kernel reads half the bytes; in a ``map`` graph distances, map and score
stay float32: squares of features overflow float16, and its rounding there costs more than in the network.

``int8``: convolutions read their input and weights through QuantizeLinear and DequantizeLinear, symmetric. Weights have
a scale for each output channel; inputs have one scale, from the largest magnitude in each of the good images, averaged,
so that one odd image does not coarsen all others. All else is as with ``fp16``: additions, transposed convolutions,
which have few INT8 kernels, and the convolutions that cost accuracy and little time (those of the image, depthwise
ones, and those that make the features). Scales are not trained: a model that this costs too much stays at ``fp16``.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from recontrast_edge.datasets import combined_sha256, file_sha256, find_dataset
from recontrast_edge.errors import InputError, ModelError, OutputError, UsageError
from recontrast_edge.images import read_image
from recontrast_edge.plan import Calibration, Precision
from recontrast_edge.preprocess import preprocess
from recontrast_edge.scoring import INPUT_NAME, VIEWS, reconstruction_name, target_name
from recontrast_edge.spec import InputSpec
from recontrast_export.parity import spread
from recontrast_export.trt import Progress

MIN_CALIBRATION_IMAGES = 8
"""Fewer say too little about how large activations get."""

MAX_CALIBRATION_IMAGES = 64
"""Of more images a sample is taken; the mean of their largest magnitudes changes little beyond it."""

# The first operator set whose QuantizeLinear and DequantizeLinear take float16.
_QUANTIZE_FLOAT16_OPSET = 19

_CALIBRATION_PHASE = "Finding INT8 scales"

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True, eq=False)
class CalibrationImages:
    """Good images, prepared as network inputs one at a time.

    Attributes:
        record: for the plan's sidecar.
        paths: the images used.
        spec: how they are prepared.
    """

    record: Calibration
    paths: tuple[Path, ...]
    spec: InputSpec

    def tensors(self) -> Iterator[NDArray[np.float32]]:
        """Each image as (1, 3, H, W) float32, normalised.

        Raises:
            InputError: a damaged image, or one without the model's ROI.
        """
        for path in self.paths:
            yield preprocess(read_image(path), self.spec)[None]


def read_calibration_images(path: Path, spec: InputSpec) -> CalibrationImages:
    """At most ``MAX_CALIBRATION_IMAGES`` good images, spread evenly.

    Args:
        path: folder of good images, text file that lists them, or MVTec-layout data set (its training images).
        spec: of the model.

    Raises:
        InputError: nothing there, or fewer than ``MIN_CALIBRATION_IMAGES``.
    """
    dataset = find_dataset(path)
    samples = dataset.training_samples()
    if len(samples) < MIN_CALIBRATION_IMAGES:
        raise InputError(
            f"{path}: INT8 calibration needs at least {MIN_CALIBRATION_IMAGES} good images, got {len(samples)}"
        )
    paths = tuple(sample.path for sample in spread(samples, MAX_CALIBRATION_IMAGES))
    digest = combined_sha256(file_sha256(image) for image in paths)
    return CalibrationImages(Calibration(data=dataset.name, n_images=len(paths), data_sha256=digest), paths, spec)


def precision_of(model: onnx.ModelProto) -> Precision:
    """What a graph computes in: ``int8`` with Q/DQ, ``fp16`` with any float16 but stored weights, else ``fp32``."""
    graph = model.graph
    if any(node.op_type in _QUANTIZERS for node in graph.node):
        return "int8"
    stored = {node.input[0] for node in _weight_casts(model)}
    computes_half = any(
        entry.data_type == TensorProto.FLOAT16 and entry.name not in stored for entry in graph.initializer
    )
    return "fp16" if computes_half else "fp32"


def to_precision(
    model: onnx.ModelProto,
    precision: Precision,
    *,
    calibration: CalibrationImages | None = None,
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """A copy of the model in the precision.

    Args:
        model: as ``recontrast-edge export`` wrote it; a graph that already is ``fp16`` or ``int8`` is taken as it is
            where that is the precision asked for.
        precision: see the module.
        calibration: good images, for ``int8`` of a graph that is not quantised yet; None otherwise.
        progress: told how calibration proceeds.

    Raises:
        UsageError: the graph has another precision already, or calibration images are missing or have no use.
        ModelError: a weight that float16 cannot hold, or a graph that ONNX Runtime cannot quantise.
        InputError: a damaged calibration image.
        OutputError: the folder of temporary files is full.
    """
    found = precision_of(model)
    if found not in ("fp32", precision):
        raise UsageError(
            f"the model is {found} already and cannot become {precision}: build it with --precision {found}"
        )
    quantise = precision == "int8" and found == "fp32"
    if quantise and calibration is None:
        raise UsageError(
            f"--precision int8 needs --calibration: a folder or list of at least {MIN_CALIBRATION_IMAGES} good images"
        )
    if calibration is not None and not quantise:
        why = "the model is quantised already" if found == "int8" else f"--precision {precision} has no scales to find"
        raise UsageError(f"--calibration has no use here: {why}; leave it out")
    converted = onnx.ModelProto()
    converted.CopyFrom(model)
    if found != "fp32":
        return converted
    _restore_weights(converted)
    if calibration is not None:
        converted = _quantise_convolutions(converted, calibration, progress)
    if precision != "fp32":
        _compute_in_float16(converted)
    onnx.checker.check_model(converted, full_check=True)
    return converted


def _weight_casts(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that make float32 of weights stored as float16."""
    stored = {entry.name for entry in model.graph.initializer if entry.data_type == TensorProto.FLOAT16}
    return [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in stored]


def _restore_weights(model: onnx.ModelProto) -> None:
    """Undo ``graph.store_weights_as_float16``, in place: builders and quantisers want weights, not casts of them."""
    graph = model.graph
    casts = {node.input[0]: node for node in _weight_casts(model)}
    for entry in graph.initializer:
        if entry.name in casts:
            value = numpy_helper.to_array(entry).astype(np.float32)
            entry.CopyFrom(numpy_helper.from_array(value, casts[entry.name].output[0]))
    for cast in casts.values():
        graph.node.remove(cast)


def _quantise_convolutions(
    model: onnx.ModelProto, calibration: CalibrationImages, progress: Progress | None
) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._tensors = enumerate(calibration.tensors())

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            index, tensor = next(self._tensors, (len(calibration.paths), None))
            if progress is not None and index:
                progress.step(_CALIBRATION_PHASE, index - 1)
            return None if tensor is None else {INPUT_NAME: tensor}

    kept = _kept_convolutions(model.graph)
    if progress is not None:
        progress.start(_CALIBRATION_PHASE, None, len(calibration.paths))
    if model.opset_import[0].version < _QUANTIZE_FLOAT16_OPSET:
        model = onnx.version_converter.convert_version(model, _QUANTIZE_FLOAT16_OPSET)
    with tempfile.TemporaryDirectory(prefix="recontrast-edge-") as folder, _quiet_root_logger():
        source, path = Path(folder) / "source.onnx", Path(folder) / "quantised.onnx"
        try:
            # A file, because older versions change a model in memory beyond use.
            onnx.save(model, source)
            quantize_static(
                source,
                path,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                nodes_to_exclude=kept,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                extra_options={
                    "ActivationSymmetric": True,
                    # The mean over the images, not the maximum.
                    "CalibMovingAverage": True,
                    "WeightSymmetric": True,
                    # Builders fuse a bias in the convolution's output precision.
                    "QuantizeBias": False,
                    # The next convolution quantises what it reads; an addition reads all bits.
                    "OpTypesToExcludeOutputQuantization": ["Conv"],
                },
            )
            quantised = onnx.load(path)
        except InputError:
            raise
        except OSError as error:
            raise OutputError(f"{folder}: cannot write temporary files ({error.strerror or error})") from None
        # ONNX Runtime raises many types here, with no common base.
        except Exception as error:
            raise ModelError(f"ONNX Runtime cannot quantise the model ({_line(error)}); export it again") from None
    if progress is not None:
        progress.finish(_CALIBRATION_PHASE)
    del quantised.metadata_props[:]
    quantised.metadata_props.extend(model.metadata_props)
    return quantised


def _kept_convolutions(graph: onnx.GraphProto) -> list[str]:
    """Names of the convolutions that are not quantised: of the image, depthwise, and those that make features."""
    features = set(_feature_names(graph))
    return [
        node.name
        for node in graph.node
        if node.op_type == "Conv"
        and (
            INPUT_NAME in node.input
            or features.intersection(node.output)
            or any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
        )
    ]


def _compute_in_float16(model: onnx.ModelProto) -> None:
    """Let everything that feature pairs depend on compute in float16, in place; what follows them stays float32."""
    graph = model.graph
    features = _feature_names(graph)
    network = _ancestors(graph, features)
    in_network = {id(node) for node in network}
    scales = {node.input[1] for node in network if node.op_type in _QUANTIZERS}
    read_elsewhere = {name for node in graph.node if id(node) not in in_network for name in node.input}
    renamed: dict[str, str] = {}
    for entry in list(graph.initializer):
        read = any(entry.name in node.input for node in network)
        if entry.data_type != TensorProto.FLOAT or not read:
            continue
        half = _float16(numpy_helper.to_array(entry), entry.name, is_scale=entry.name in scales)
        if entry.name in read_elsewhere:
            renamed[entry.name] = f"{entry.name}/fp16"
            graph.initializer.append(numpy_helper.from_array(half, renamed[entry.name]))
        else:
            entry.CopyFrom(numpy_helper.from_array(half, entry.name))
    renamed[INPUT_NAME] = f"{INPUT_NAME}/fp16"
    for node in network:
        _rename_inputs(node, renamed)
    # Simplified graphs share values: distances may read what the network made of a feature for itself.
    widened = {name: f"{name}/fp32" for node in network for name in node.output if name in read_elsewhere}
    for node in graph.node:
        if id(node) not in in_network:
            _rename_inputs(node, widened)
    for output in graph.output:
        if output.name in features:
            output.type.tensor_type.elem_type = TensorProto.FLOAT16
    nodes = [_cast(INPUT_NAME, renamed[INPUT_NAME], TensorProto.FLOAT16), *network]
    nodes += [_cast(name, wide, TensorProto.FLOAT) for name, wide in widened.items()]
    nodes += [node for node in graph.node if id(node) not in in_network]
    del graph.node[:]
    graph.node.extend(nodes)
    # Types of values inside of the graph, which are others now; they can be inferred.
    del graph.value_info[:]


def _feature_names(graph: onnx.GraphProto) -> list[str]:
    """Names of the feature pairs, in both kinds of graph."""
    produced = {name for node in graph.node for name in node.output}
    levels = 0
    while target_name(0, levels) in produced:
        levels += 1
    names = [
        name(view, level)
        for view in range(VIEWS)
        for level in range(levels)
        for name in (target_name, reconstruction_name)
    ]
    missing = [name for name in names or [target_name(0, 0)] if name not in produced]
    if missing:
        raise ModelError(f"the graph has no value {missing[0]!r}; export the model again with `recontrast-edge export`")
    return names


def _ancestors(graph: onnx.GraphProto, names: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that the named values depend on, in the order of the graph."""
    needed = set(names)
    found = []
    # ONNX graphs are sorted: a node comes after those it reads from.
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            found.append(node)
    return found[::-1]


def _float16(value: NDArray[Any], name: str, *, is_scale: bool) -> NDArray[np.float16]:
    limits = np.finfo(np.float16)
    largest = np.abs(value).max(initial=0.0)
    if not largest <= limits.max:
        raise ModelError(f"{name}: holds {largest:.3g}, which float16 cannot; build with --precision fp32")
    half: NDArray[np.float16] = value.astype(np.float16)
    # The scale of a channel without weights must not become 0.
    return np.maximum(half, limits.smallest_subnormal) if is_scale else half


def _rename_inputs(node: onnx.NodeProto, names: dict[str, str]) -> None:
    for index, name in enumerate(node.input):
        node.input[index] = names.get(name, name)


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """ONNX Runtime advises to simplify the model first, which `export` has done."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _cast(source: str, result: str, dtype: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], name=f"{result}/cast", to=dtype)
