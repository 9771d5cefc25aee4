"""``recontrast-edge info``: what an artifact is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from recontrast_edge.cli import app

if TYPE_CHECKING:
    from recontrast_edge.artifact import Artifact
    from recontrast_edge.spec import ModelSpec


@app.command("info")
def info_command(
    artifact: str = typer.Argument(
        ..., metavar="FILE", help="An .onnx or .plan file, model.json, model.safetensors, a run folder, or `demo`."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show what a model file or run folder is: input, scoring, threshold and its promise, training."""
    from recontrast_edge.artifact import describe

    described = describe(artifact)
    if as_json:
        import json

        typer.echo(json.dumps(described.to_json(), indent=2))
        return
    _show(described)


def _show(described: Artifact) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=box.SIMPLE_HEAD)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    kinds = {
        "onnx": "ONNX model",
        "plan": "TensorRT engine",
        "spec": "model spec",
        "weights": "trained weights",
        "run": "run folder",
    }
    # Text, not markup: names come from files.
    table.add_row("what", Text(f"{kinds[described.kind]} {described.path}"))
    for name, value in _details(described):
        table.add_row(name, Text(value))
    table.add_section()
    for name, value in _spec(described.spec):
        table.add_row(name, Text(value))
    Console(highlight=False, markup=False).print(table)


def _details(described: Artifact) -> Iterator[tuple[str, str]]:
    details = described.details
    if "bytes" in details:
        yield "size", f"{details['bytes'] / 1e6:.1f} MB"
    if "head" in details:
        texts = {
            "map": "map (anomaly map and score in the graph)",
            "features": "features (map and score outside of it)",
        }
        yield "head", texts[details["head"]]
    if "engine_sha256" in details:
        yield "engine sha256", details["engine_sha256"]
    if described.kind == "plan":
        yield from _plan(details)
    elif "proof" in details:
        yield "precision", f"{details['precision']}, made from {details['source']}"
        yield from _conversion(details)
        yield "verdicts", _verdicts(details["proof"])
    if "tensors" in details:
        yield "weights", f"{details['tensors']} tensors, {details['values'] / 1e6:.1f} million values"
    if "files" in details:
        yield "files", ", ".join(details["files"])
    if "metrics" in details:
        shown = (f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in details["metrics"].items())
        yield "metrics", ", ".join(shown)
    if details.get("threshold_is_for_this_engine") is False:
        yield "warning", "the threshold was set for another export of this model; calibrate again"


def _plan(details: dict[str, Any]) -> Iterator[tuple[str, str]]:
    capability, gpu = details["compute_capability"], details["gpu"]
    runs_on = "every GPU that the library supports" if capability is None else f"compute capability {capability}"
    yield "built by", f"{details['flavor']} {details['library_version']}, on {gpu or 'a machine without a GPU'}"
    yield "runs on", f"{runs_on}, with exactly this version of the library"
    yield "precision", details["precision"]
    smallest, optimal, largest = details["batch"]
    yield "batch", f"smallest {smallest}, optimal {optimal}, largest {largest}"
    yield "source", f"{details['onnx']}, sha256 {details['onnx_sha256']}"
    yield from _conversion(details)
    parity = details["parity"]
    for what in ("graph", "engine"):
        if (found := parity[what]) is not None:
            allowed = f"allowed: {found['allowed_map_error']:g}"
            yield (
                f"{what} parity",
                f"worst map error {found['map_error']:.1e} of its range ({allowed}), {found['images']}",
            )
    for what in ("graph", "engine"):
        if (proof := parity[f"{what}_proof"]) is not None:
            yield f"{what} verdicts", _verdicts(proof)
    yield "parity", parity["note"]
    yield "built with", ", ".join(f"{name} {version}" for name, version in details["software"].items())


def _conversion(details: dict[str, Any]) -> Iterator[tuple[str, str]]:
    conversion, scales = details["conversion"], details["calibration"]
    if conversion["int8_macs"]:
        yield "in INT8", f"{100 * conversion['int8_macs']:.1f} % of the multiply-accumulates"
    if scales is not None:
        ranges = f", ranges by {conversion['method']}" if conversion["method"] else ""
        yield "INT8 scales", f"from {scales['n_images']} good images of {scales['data']}{ranges}"
    if conversion["fp32_nodes"]:
        yield "kept in FP32", ", ".join(conversion["fp32_nodes"])


def _verdicts(proof: dict[str, Any]) -> str:
    flips = proof["verdict_flips"]
    interval = f"95 % interval {100 * flips['low']:.2f} to {100 * flips['high']:.2f} %"
    return f"{flips['count']} of {flips['of']} changed ({interval}) on {proof['images']}; budget {proof['budget']}"


def _spec(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    from recontrast_edge.calibration import evidence_in_words

    source, scoring, threshold, training = spec.input, spec.scoring, spec.threshold, spec.training
    yield "product", spec.class_name
    yield "backbone", spec.backbone
    if source.is_tiled:
        crop = f", {source.n_tiles} tiles of {_wh(source.resize_wh)} that overlap by {source.tile_overlap} or more"
    else:
        crop = "" if source.resize_wh == source.size_wh else f", cut from the centre of {_wh(source.resize_wh)}"
    yield "input", f"{_wh(source.size_wh)} pixels {source.colour.upper()}{crop}, {source.resize_rule} resize"
    yield "normalisation", f"mean {_numbers(source.mean)}, standard deviation {_numbers(source.std)}"
    roi = source.roi
    yield "ROI", "whole image" if roi is None else f"{roi.width}x{roi.height} at ({roi.x}, {roi.y}) source pixels"
    yield "levels", ", ".join(f"stride {level.stride}: {level.channels} channels" for level in spec.levels)
    rule = "maximum" if scoring.rule == "max" else f"mean of the top {100 * scoring.top_fraction:g} %"
    yield "score", f"{rule} of the map, blurred with sigma {scoring.blur_sigma:g} pixels"
    if threshold is None:
        yield "threshold", "none yet; set one with `recontrast-edge calibrate`"
    elif threshold.max_false_reject_rate is None or threshold.confidence is None:
        yield "threshold", f"{threshold.value:.6g}, set by hand: no promise about good parts rejected"
    else:
        yield "threshold", f"{threshold.value:.6g}"
        promised = f"{100 * threshold.max_false_reject_rate:g} % of good parts rejected"
        origin = evidence_in_words(threshold)
        yield "promise", f"at most {promised}, with {100 * threshold.confidence:g} % confidence, from {origin}"
    if training.iterations:
        yield "training", f"{training.iterations} iterations on {training.n_images} images of {training.data}"
    if training.recipe:
        yield "recipe", ", ".join(f"{name}={value}" for name, value in training.recipe.items())
    if training.software:
        yield "software", ", ".join(f"{name} {version}" for name, version in training.software.items())
    yield "weights sha256", spec.weights_sha256


def _wh(size_wh: tuple[int, int]) -> str:
    return f"{size_wh[0]}x{size_wh[1]}"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
