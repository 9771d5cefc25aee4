"""A run folder becomes ``model.onnx``, which appears under its name only after it has passed the parity gate.

export_onnx(Path("runs/tiles"), Path("tiles.onnx"), images=[Path("tiles/test")])
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import onnx
import onnxsim

from recontrast_edge import __version__
from recontrast_edge.engines.onnx import OnnxEngine
from recontrast_edge.errors import InputError, OutputError, UsageError
from recontrast_edge.images import atomic_write
from recontrast_edge.onnxfile import SPEC_KEY
from recontrast_edge.scoring import INPUT_NAME
from recontrast_edge.spec import ModelSpec
from recontrast_export.graph import OPSETS, Graph, Storage, store_weights_as_float16
from recontrast_export.heads import Discriminate, add_feature_head, add_map_head
from recontrast_export.parity import (
    FP32_TOLERANCE,
    ParityReport,
    ParitySet,
    Tolerance,
    compare,
    read_images,
    synthetic_images,
)
from recontrast_export.qdq import Int8Network
from recontrast_export.rewrite import with_pointwise_upsampling
from recontrast_export.torch_to_onnx import add_discriminator, add_network
from recontrast_train.int8_model import Int8ReContrast
from recontrast_train.model import ReContrast
from recontrast_train.run import HOLDOUT_FILE, load_run
from recontrast_train.score import TorchScorer

Head = Literal["map", "features"]

TOLERANCES: dict[Storage, Tolerance] = {
    "fp32": FP32_TOLERANCE,
    # Rounding the weights to 11 bits moves the map itself; scores may then swap within the error of both.
    "fp16": Tolerance(map_error=5e-3, tie=1e-2),
}

INT8_TOLERANCE = Tolerance(map_error=5e-2, tie=5e-2)
"""For a model that was fine-tuned for INT8: where two ways of adding up the same numbers end on either side of the
middle between two steps, a value differs by a whole step. Maps were seen to differ by 1 to 3 % of their range."""


def export_onnx(
    run: Path,
    out: Path,
    *,
    head: Head = "map",
    images: Sequence[Path] = (),
    storage: Storage = "fp32",
    opset: int = OPSETS[0],
    on_parity: Callable[[ParityReport, Tolerance], None] | None = None,
) -> ParityReport:
    """Export a run and enforce parity with PyTorch.

    Args:
        run: folder that ``recontrast-edge train`` wrote.
        out: ``.onnx`` file to write; replaced if it exists, unless the gate refuses.
        head: ``map`` ends at anomaly map and score, ``features`` at the pairs of feature maps and
            what a discriminator finds.
        images: what to compare on, see ``parity.read_images``; none for the run's own held-out images or, where it
            has none, synthetic ones.
        storage: how weights are stored in the file; the computation is float32 with both.
        opset: one of ``OPSETS``.
        on_parity: told the result before it is enforced.

    Raises:
        UsageError: suffix or opset.
        ModelError: the run is missing, damaged or unfinished.
        InputError: images that cannot be used.
        GateError: the file does not reproduce the model; nothing was written.
        OutputError: the file cannot be written.
    """
    if out.suffix != ".onnx":
        raise UsageError(f"{out}: expected a file name that ends in .onnx")
    if opset not in OPSETS:
        raise UsageError(f"opset {opset}: expected one of {', '.join(map(str, OPSETS))}")
    if out.is_dir():
        raise OutputError(f"{out}: a folder is in the way")
    model, spec = load_run(run)
    is_int8 = isinstance(model, Int8ReContrast)
    if is_int8 and storage == "fp16":
        raise UsageError(f"{run}: is fine-tuned for INT8, whose weights are stored in 8 bits; leave out --storage fp16")
    tolerance = INT8_TOLERANCE if is_int8 else TOLERANCES[storage]
    chosen = read_images(images) if images else _default_images(run, spec)
    exported = build_onnx(model, spec, head=head, storage=storage, opset=opset)
    content = exported.SerializeToString(deterministic=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            # What is compared are the bytes that get the name, loaded as the line computer loads them.
            candidate = Path(folder) / out.name
            candidate.write_bytes(content)
            with OnnxEngine(candidate) as engine:
                report = compare(TorchScorer(model, spec), engine.infer, chosen)
    except OSError as error:
        raise OutputError(f"{out}: cannot write ({error.strerror or error})") from None
    if on_parity is not None:
        on_parity(report, tolerance)
    report.enforce(tolerance)
    with atomic_write(out) as file:
        file.write(content)
    return report


def build_onnx(
    model: ReContrast, spec: ModelSpec, *, head: Head = "map", storage: Storage = "fp32", opset: int = OPSETS[0]
) -> onnx.ModelProto:
    """The model as ONNX, checked and simplified, with its spec; the same bytes for the same model.

    One that was fine-tuned for INT8 has Q/DQ with the scales that it learnt, and operator set 19 or later.

    A threshold is left behind: it belongs to the engine that it was calibrated with.

    Args:
        model: in eval mode, on the CPU.
        spec: of this model.
        head, storage, opset: see ``export_onnx``.
    """
    width, height = spec.input.size_wh
    graph = Graph("recontrast", opset=opset)
    pairs = add_network(graph, model, graph.input(INPUT_NAME, ["N", 3, height, width]))
    discriminate: Discriminate | None = None
    if (discriminator := model.discriminator) is not None:
        discriminate = partial(add_discriminator, graph, discriminator)
    add_head = add_map_head if head == "map" else add_feature_head
    add_head(graph, pairs, spec, discriminate)
    exported, _ = onnxsim.simplify(graph.model(producer_version=__version__))
    if isinstance(model, Int8ReContrast):
        exported = Int8Network(with_pointwise_upsampling(exported)).with_scales(model.blocks, model.scales())
    elif storage == "fp16":
        store_weights_as_float16(exported)
    onnx.helper.set_model_props(exported, {SPEC_KEY: spec.with_threshold(None).dumps()})
    onnx.checker.check_model(exported, full_check=True)
    return exported


def _default_images(run: Path, spec: ModelSpec) -> ParitySet:
    holdout = run / HOLDOUT_FILE
    if holdout.is_file():
        try:
            return read_images([holdout])
        except InputError:
            pass  # Moved away since, or too few.
    return synthetic_images(spec.input)
