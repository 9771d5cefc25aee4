"""Change the precision of an exported graph: what a strongly typed builder is given is what it builds.

    converted = to_precision(onnx.load("model.onnx"), "fp16")  # converted.model, converted.record

``fp32``: weights that the file stores as float16 become float32 again; nothing else changes.

``fp16``: the network, up to the feature pairs, and the discriminator's convolutions compute in float16. The image stays
float32. In a ``features`` graph the pairs are float16 outputs, so that the map kernel reads half the bytes; in a
``map`` graph distances, map and score stay float32: squares of features overflow float16, and its rounding there costs
more than in the network. Where real images bring a value near float16's limit, the nodes that make and read it stay
float32, by name.

``int8``: convolutions read their input and weights through QuantizeLinear and DequantizeLinear, placed as ``qdq`` says,
with ranges, as ``ranges`` says, from good images and copies with pasted defects. All else is as with ``fp16``. Which
blocks are INT8 is chosen here without a measurement: all but depthwise convolutions. ``quantize`` measures what that
costs, and chooses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from recontrast_edge.datasets import combined_sha256, file_sha256, find_dataset, mask_to_map
from recontrast_edge.errors import InputError, ModelError, UsageError
from recontrast_edge.images import read_image
from recontrast_edge.int8 import LOGITS
from recontrast_edge.magnitudes import Method
from recontrast_edge.plan import Precision
from recontrast_edge.preprocess import Geometry, Image, preprocess
from recontrast_edge.proof import Calibration, Conversion
from recontrast_edge.scoring import INPUT_NAME
from recontrast_edge.spec import InputSpec
from recontrast_edge.tiling import canvas, tiles
from recontrast_export.defects import paste_defect
from recontrast_export.graph import feature_names
from recontrast_export.parity import spread
from recontrast_export.qdq import QUANTIZERS, Int8Network, dequantised_name, int8_share
from recontrast_export.ranges import Activation, largest_magnitudes, measure_activations
from recontrast_export.rewrite import with_pointwise_upsampling
from recontrast_export.trt import Progress

MIN_CALIBRATION_IMAGES = 8
"""Fewer say too little about how large activations get."""

MAX_CALIBRATION_IMAGES = 64
"""Of more images a sample is taken; ranges change little beyond it."""

MAX_RANGE_IMAGES = 16
"""Images that float16's limit is checked on."""

DEFAULT_METHOD: Method = "mse"
"""Where nothing is measured: clips where that costs less than it gains, and one odd image does not coarsen all."""

FLOAT16_MARGIN = 4.0
"""Values must stay this factor below float16's limit on the images at hand, for those that are not."""

_CALIBRATION_PHASE = "Finding INT8 scales"


@dataclass(frozen=True, eq=False)
class CalibrationImages:
    """Good images, and copies of them with pasted defects: what ranges are taken from.

    A defect goes beyond what good parts excite in the network; clipped there, it is what INT8 loses first.

    Attributes:
        record: for the plan's sidecar.
        paths: the good images used.
        spec: how they are prepared.
    """

    record: Calibration
    paths: tuple[Path, ...]
    spec: InputSpec

    def pair(self, index: int, defect: int) -> tuple[Image, Image]:
        """One of the images, uint8, and its copy with a defect.

        Args:
            index: of the image.
            defect: which one, see ``defects.paste_defect``.

        Raises:
            InputError: a damaged image, or one without the model's ROI.
        """
        image, pasted, _ = self._pair(index, defect)
        return image, pasted

    def _pair(self, index: int, defect: int) -> tuple[Image, Image, NDArray[np.bool_]]:
        image = read_image(self.paths[index])
        Geometry.of(self.spec, image)
        return image, *paste_defect(image, index=defect, roi=self.spec.roi)

    def tensors(self, progress: Progress | None = None) -> Iterator[NDArray[np.float32]]:
        """Each image and each copy, in turn, as (1, 3, H, W) float32, normalised; of tiles, the one with the defect.

        Args:
            progress: told after each pair.

        Raises:
            InputError: as ``pair``.
        """
        if progress is not None:
            progress.start(_CALIBRATION_PHASE, None, len(self.paths))
        for index in range(len(self.paths)):
            *images, mask = self._pair(index, index)
            for image in images:
                yield preprocess(_tile_with(mask, image, self.spec), self.spec.of_tile)[None]
            if progress is not None:
                progress.step(_CALIBRATION_PHASE, index)
        if progress is not None:
            progress.finish(_CALIBRATION_PHASE)


def _tile_with(mask: NDArray[np.bool_], image: Image, spec: InputSpec) -> Image:
    """The tile that shows most of the mask; without tiles, the image."""
    if not spec.is_tiled:
        return image
    shown = [np.count_nonzero(tile) for tile in tiles(mask_to_map(mask, spec).view(np.uint8), spec)]
    return tiles(canvas(image, spec), spec)[int(np.argmax(shown))]


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
    if any(node.op_type in QUANTIZERS for node in graph.node):
        return "int8"
    return "fp16" if _has_float16(model) else "fp32"


def _has_float16(model: onnx.ModelProto) -> bool:
    """Whether there is any float16 but stored weights."""
    stored = {node.input[0] for node in _weight_casts(model)}
    return any(entry.data_type == TensorProto.FLOAT16 and entry.name not in stored for entry in model.graph.initializer)


@dataclass(frozen=True, eq=False)
class Converted:
    """A graph, and what is on record about its precision."""

    model: onnx.ModelProto
    record: Conversion


def to_precision(
    model: onnx.ModelProto,
    precision: Precision,
    *,
    calibration: CalibrationImages | None = None,
    images: Sequence[NDArray[np.float32]] = (),
    progress: Progress | None = None,
) -> Converted:
    """A copy of the model in the precision.

    Args:
        model: as ``recontrast-edge export`` wrote it; a graph that already is ``fp16`` or ``int8`` is taken as it is
            where that is the precision asked for, but for what an ``int8`` one still computes in float32.
        precision: see the module.
        calibration: good images, for ``int8`` of a graph that is not quantised yet; None otherwise.
        images: network inputs, (N, 3, H, W) float32, to check float16's limit on; of ``MAX_RANGE_IMAGES``.
        progress: told how calibration proceeds.

    Raises:
        UsageError: the graph has another precision already, or calibration images are missing or have no use.
        ModelError: a weight or feature that float16 cannot hold, or a graph that ONNX Runtime cannot run.
        InputError: a damaged calibration image.
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
    if found == "int8" and not _has_float16(model):
        # As export writes a model that was fine-tuned for INT8.
        some = images[:MAX_RANGE_IMAGES]
        converted = in_float16(model, largest_magnitudes(model, network_values(model), some), n_images=len(some))
        return Converted(
            converted.model, converted.record.model_copy(update={"int8_macs": int8_share(converted.model)})
        )
    if found != "fp32":
        return Converted(model, Conversion())
    source = with_float32_weights(model)
    if precision == "fp32":
        return Converted(source, Conversion())
    some = images[:MAX_RANGE_IMAGES]
    if calibration is None:
        return in_float16(source, largest_magnitudes(source, network_values(source), some), n_images=len(some))
    network = Int8Network(with_pointwise_upsampling(source))
    blocks = network.default_blocks
    network, activations = calibrated(network, blocks, calibration, progress)
    largest = largest_magnitudes(network.model, network_values(network.model), some)
    return in_int8(network, blocks, activations, DEFAULT_METHOD, largest, n_images=len(some))


def calibrated(
    network: Int8Network, blocks: Collection[str], calibration: CalibrationImages, progress: Progress | None
) -> tuple[Int8Network, dict[str, Activation]]:
    """The network with channels of like size, and what the values do that these blocks would quantise.

    Args:
        network: the FP32 graph.
        blocks: some of ``network.blocks``.
        calibration: good images.
        progress: told how it proceeds.

    Raises:
        ModelError: ONNX Runtime cannot run the graph, or a value is not finite.
        InputError: a damaged image.
    """
    activations = measure_activations(network.model, network.values(blocks), calibration.tensors(progress))
    network = network.equalised(blocks, activations)
    return network, measure_activations(network.model, network.values(blocks), calibration.tensors(progress))


def in_int8(
    network: Int8Network,
    blocks: Collection[str],
    activations: Mapping[str, Activation],
    method: Method,
    largest: Mapping[str, float],
    *,
    n_images: int,
) -> Converted:
    """These blocks in INT8, the rest of the network in float16.

    Args:
        network: the FP32 graph.
        blocks: some of ``network.blocks``.
        activations: of at least ``network.values(blocks)``.
        method: see ``ranges``.
        largest, n_images: as for ``in_float16``.

    Raises:
        ModelError: see ``to_precision``.
    """
    converted = in_float16(network.quantised(blocks, activations, method), largest, n_images=n_images)
    left = tuple(block for block in network.blocks if block not in blocks)
    update = {"int8_macs": int8_share(converted.model), "method": method, "fp16_blocks": left}
    return Converted(converted.model, converted.record.model_copy(update=update))


def in_float16(model: onnx.ModelProto, largest: Mapping[str, float], *, n_images: int) -> Converted:
    """The network in float16.

    Args:
        model: with float32 weights; may have Q/DQ.
        largest: largest magnitude of values inside of the network, in float32; empty where it was not measured.
        n_images: that it was measured on.

    Raises:
        ModelError: see ``to_precision``.
    """
    limit = float(np.finfo(np.float16).max) / FLOAT16_MARGIN
    too_large = {name for name, value in largest.items() if value > limit}
    features = too_large.intersection(feature_names(model.graph), (output.name for output in model.graph.output))
    if features:
        name = min(features)
        raise ModelError(
            f"{name}: reaches {largest[name]:.3g} on these images, too near to what float16 holds ({limit * 4:.0f}); "
            "build with --precision fp32, or export with --head map"
        )
    converted = onnx.ModelProto()
    converted.CopyFrom(model)
    too_large |= {dequantised_name(name) for name in too_large}
    kept = [node.name for node in network_nodes(model.graph) if too_large.intersection([*node.input, *node.output])]
    _compute_in_float16(converted, kept)
    onnx.checker.check_model(converted, full_check=True)
    worst = max(largest, key=lambda name: largest[name], default=None)
    activations = {"largest_activation": None if worst is None else largest[worst], "largest_activation_of": worst}
    update = {"fp32_nodes": tuple(kept), "n_images": n_images, **activations}
    return Converted(converted, Conversion().model_copy(update=update))


def network_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that make the feature pairs, and the discriminator's logits from them, in the order of the graph."""
    network = _ancestors(graph, feature_names(graph))
    # Split tells apart the views of what the discriminator reads, which is computed in float32.
    discriminator = _ancestors(graph, [LOGITS], behind="Split")
    return [*network, *discriminator]


def network_values(model: onnx.ModelProto) -> list[str]:
    """Names of the float32 values that the network makes."""
    return [name for node in network_nodes(model.graph) if node.op_type != "QuantizeLinear" for name in node.output]


def with_float32_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without ``graph.store_weights_as_float16``: builders and quantisers want weights, not casts of them."""
    restored = onnx.ModelProto()
    restored.CopyFrom(model)
    graph = restored.graph
    casts = {node.input[0]: node for node in _weight_casts(restored)}
    for entry in graph.initializer:
        if entry.name in casts:
            value = numpy_helper.to_array(entry).astype(np.float32)
            entry.CopyFrom(numpy_helper.from_array(value, casts[entry.name].output[0]))
    for cast in casts.values():
        graph.node.remove(cast)
    return restored


def _weight_casts(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that make float32 of weights stored as float16."""
    stored = {entry.name for entry in model.graph.initializer if entry.data_type == TensorProto.FLOAT16}
    return [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in stored]


def _compute_in_float16(model: onnx.ModelProto, kept: Collection[str]) -> None:
    """Let all of the network but the ``kept`` nodes compute in float16, in place; what follows it stays float32."""
    graph = model.graph
    network = [node for node in network_nodes(graph) if node.name not in kept]
    in_half = {id(node) for node in network}
    scales = {node.input[1] for node in network if node.op_type in QUANTIZERS}
    read_by_half = {name for node in network for name in node.input}
    read_by_full = {name for node in graph.node if id(node) not in in_half for name in node.input}
    narrowed: dict[str, str] = {}
    for entry in list(graph.initializer):
        if entry.data_type != TensorProto.FLOAT or entry.name not in read_by_half:
            continue
        half = _float16(numpy_helper.to_array(entry), entry.name, is_scale=entry.name in scales)
        if entry.name in read_by_full:
            narrowed[entry.name] = f"{entry.name}/fp16"
            graph.initializer.append(numpy_helper.from_array(half, narrowed[entry.name]))
        else:
            entry.CopyFrom(numpy_helper.from_array(half, entry.name))
    # Values that cross from one precision to the other.
    made_by_half = {name for node in network for name in node.output}
    made_by_full = {INPUT_NAME} | {name for node in graph.node if id(node) not in in_half for name in node.output}
    narrowed.update({name: f"{name}/fp16" for name in made_by_full & read_by_half})
    widened = {name: f"{name}/fp32" for name in made_by_half & read_by_full}
    nodes = [_cast(INPUT_NAME, narrowed[INPUT_NAME], TensorProto.FLOAT16)] if INPUT_NAME in narrowed else []
    for node in graph.node:
        _rename_inputs(node, narrowed if id(node) in in_half else widened)
        nodes.append(node)
        for name in node.output:
            if id(node) in in_half and name in widened:
                nodes.append(_cast(name, widened[name], TensorProto.FLOAT))
            elif id(node) not in in_half and name in narrowed:
                nodes.append(_cast(name, narrowed[name], TensorProto.FLOAT16))
    for output in graph.output:
        if output.name in made_by_half:
            output.type.tensor_type.elem_type = TensorProto.FLOAT16
    del graph.node[:]
    graph.node.extend(nodes)
    # Types of values inside of the graph, which are others now; they can be inferred.
    del graph.value_info[:]


def _ancestors(graph: onnx.GraphProto, names: Iterable[str], *, behind: str | None = None) -> list[onnx.NodeProto]:
    """The nodes that the named values depend on, in the order of the graph; only those behind nodes of one operator."""
    needed = set(names)
    found = []
    # ONNX graphs are sorted: a node comes after those it reads from.
    for node in reversed(graph.node):
        if needed.intersection(node.output) and node.op_type != behind:
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


def _rename_inputs(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    for index, name in enumerate(node.input):
        node.input[index] = names.get(name, name)


def _cast(source: str, result: str, dtype: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], name=f"{result}/cast", to=dtype)
