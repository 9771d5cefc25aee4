"""The search behind ``recontrast-edge quantize``: as much INT8 as the verdicts allow, and the proof of it in the file.

    result = quantize(Path("parts.onnx"), Path("parts.int8.onnx"), calibration=good, validation=parts, budget=budget)

Ranges come from good images and copies with pasted defects. On some of these, the error of the maps' peaks decides how
ranges are chosen and says what harm each block does on its own; validation images only say whether a graph is good
enough. The harms give a ladder of graphs from all INT8 to ever less of it. From the top, each is converted to what
builders get (INT8 and float16) and judged on the validation images until it is certain to go beyond the budget; the
first that keeps it on all of them is found. What had left INT8 before is put back as far as the budget allows: few
blocks change a verdict. A part of the images would not do: one verdict of a hundred is twice the usual budget already.
Nor would bisection: with some less INT8, verdicts change that more of it had left. If no rung holds, the graph is
float16 throughout, and must hold as well.

A graph that was fine-tuned for INT8 leaves nothing to search: it is proved against the model that it was made from.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from recontrast_edge.calibration import write_threshold
from recontrast_edge.datasets import find_dataset
from recontrast_edge.engines.onnx import OnnxEngine
from recontrast_edge.errors import GateError, OutputError, UsageError
from recontrast_edge.images import atomic_write
from recontrast_edge.int8 import PARTS, part_of
from recontrast_edge.magnitudes import Method
from recontrast_edge.onnxfile import SPEC_KEY, graph_sha256, read_spec
from recontrast_edge.proof import QUANTISATION_KEY, Proof, Quantisation, read_quantisation
from recontrast_edge.recalibration import recalibrate, require_calibrated_on
from recontrast_edge.spec import ModelSpec, Threshold
from recontrast_export.budget import Budget
from recontrast_export.build import temporary_folder
from recontrast_export.curve import Point, draw_png
from recontrast_export.emulation import with_float16_rounding
from recontrast_export.parity import spread
from recontrast_export.plausible import require_good_images
from recontrast_export.precision import (
    DEFAULT_METHOD,
    MAX_CALIBRATION_IMAGES,
    MAX_RANGE_IMAGES,
    CalibrationImages,
    Converted,
    calibrated,
    in_float16,
    in_int8,
    network_values,
    precision_of,
    read_calibration_images,
    to_precision,
    with_float32_weights,
)
from recontrast_export.proving import GivenUp, Prover, ValidationImages, enforce, read_validation
from recontrast_export.qdq import Int8Network
from recontrast_export.ranges import Activation, largest_magnitudes
from recontrast_export.rewrite import with_pointwise_upsampling
from recontrast_export.sensitivity import Probe, Rung, block_harms, ladder, method_errors, opened, rung_of
from recontrast_export.trt import Progress

PROBE_PAIRS = 6
"""Good images, each with its copy with a defect, that a block's harm is measured on: a map has tens of thousands of
pixels."""

MAX_PUT_BACK = 10
"""Graphs that are tried with more of the work in INT8 than the first one that keeps the budget."""

METHOD_MACS = 0.9
"""How ranges are chosen is decided with at most this share of the first rung's work in INT8: with the most harmful
blocks in it, their rounding errors hide what clipping costs."""

Say = Callable[[str], None]
"""Told what was found, a sentence at a time."""


@dataclass(frozen=True)
class Trial:
    """A rung of the ladder, measured.

    Attributes:
        rung: what was predicted.
        map_error: as ``sensitivity.Probe.error``.
        outcome: how the graph, as it would be written, was judged; None where the search ended before.
    """

    rung: Rung
    map_error: float
    outcome: Proof | GivenUp | None = None


@dataclass(frozen=True)
class Result:
    """A written graph.

    Attributes:
        record: what the file says about itself.
        trials: all graphs that were considered, most INT8 first; empty where nothing was searched.
        method_errors: of each way to choose ranges, with the blocks of a typical rung in INT8; empty likewise.
        threshold: re-derived for this graph; None where no images were given for it.
    """

    record: Quantisation
    trials: tuple[Trial, ...]
    method_errors: dict[Method, float]
    threshold: Threshold | None


def quantize(
    model: Path,
    out: Path,
    *,
    calibration: Path,
    validation: Path,
    budget: Budget,
    parts: Collection[str] = PARTS,
    fine_tuned_from: Path | None = None,
    good: Path | None = None,
    say: Say = lambda sentence: None,
    progress: Progress | None = None,
    bars: bool = False,
) -> Result:
    """Search, prove, write ``out`` and, beside it, the picture of the trade-off (``out`` with suffix ``.png``).

    Args:
        model: FP32 ``.onnx`` file of ``recontrast-edge export``, or INT8 one of a run that was fine-tuned for INT8.
        out: ``.onnx`` file to write; replaced if it exists, unless no graph keeps the budget.
        calibration: good images for INT8 ranges, see ``precision.read_calibration_images``; with ``fine_tuned_from``
            they only say whether float16 holds what stays out of INT8.
        validation: images to judge, see ``proving.read_validation``.
        budget: what must hold.
        parts: of ``int8.PARTS``: what may become INT8.
        fine_tuned_from: FP32 ``.onnx`` file of the run that the model was fine-tuned from, to prove it against; there
            is no search then, and no picture. None for an FP32 model.
        good: the images that the model's threshold was calibrated on, to derive the new graph's from; None for none.
        say: told what was found.
        progress: told how calibration and sensitivity proceed.
        bars: show bars on stderr while images are judged.

    Raises:
        UsageError: file names, parts, a model that is quantised already or has no threshold to derive again, or that
            was not fine-tuned from the other one.
        ModelError: a damaged model, or one that cannot be converted.
        InputError: images that cannot be used.
        CalibrationError: ``good`` are not the images of the model's threshold.
        GateError: not even FP16 keeps the budget, or the fine-tuned model does not; nothing was written.
        OutputError: a file cannot be written.
    """
    _check(model, out, parts)
    with OnnxEngine(fine_tuned_from or model) as reference, temporary_folder(out) as name:
        folder = Path(name)
        source = onnx.load(reference.path)
        if (found := precision_of(source)) != "fp32":
            raise UsageError(
                f"{reference.path}: is {found} already; quantize takes the FP32 model that it was made from, and one "
                "that was fine-tuned for INT8 with --fine-tuned-from FP32.onnx"
            )
        spec, tuned = reference.spec, None
        if fine_tuned_from is not None:
            spec, tuned = read_spec(model), onnx.load(model)
            _require_fine_tuned(model, tuned, spec, reference, parts)
        promised = None if good is None else find_dataset(good).training_samples()
        if promised is not None:
            require_calibrated_on(promised, reference.spec)
        scales = read_calibration_images(calibration, reference.spec.input)
        images = read_validation(validation, folder)
        trials: list[Trial] = []
        errors: dict[Method, float] = {}
        if tuned is None:
            require_good_images(reference, scales.paths)
            said = f"{scales.record.n_images} good images of {scales.record.data} and copies with pasted defects"
            say(f"Ranges from {said}.")
            search = _Search(reference, source, scales, images, parts, budget, folder, say, progress, bars)
            converted, proof, trials = search.run()
            errors = search.method_errors
        else:
            converted = to_precision(tuned, "int8", images=list(itertools.islice(scales.tensors(), MAX_RANGE_IMAGES)))
            what = f"{model.name} with {100 * converted.record.int8_macs:.1f} % INT8"
            proof = _prove(Prover(reference, images, progress=bars), converted, what, budget, folder)
        record = Quantisation(
            precision="int8" if converted.record.int8_macs else "fp16",
            graph_sha256=_graph_sha256(converted.model, folder),
            source=reference.path.name,
            source_sha256=reference.sha256,
            calibration=scales.record if converted.record.int8_macs and tuned is None else None,
            conversion=converted.record,
            proof=proof,
        )
        spec = spec.with_threshold(None)
        shipped = folder / out.name
        _save(shipped, converted.model, spec, record)
        threshold = None
        if promised is not None:
            with OnnxEngine(shipped) as engine:
                threshold = recalibrate(engine.infer, promised, reference.spec, engine_sha256=engine.sha256)
            write_threshold(shipped, spec, threshold)
        if trials:
            with atomic_write(out.with_suffix(".png")) as picture:
                picture.write(draw_png(_points(trials, proof, budget), title=f"{model.name}, {images.source}"))
        with atomic_write(out) as file:
            file.write(shipped.read_bytes())
    return Result(record, tuple(trials), errors, threshold)


class _Search:
    """The steps of ``quantize``, in order."""

    def __init__(
        self,
        reference: OnnxEngine,
        source: onnx.ModelProto,
        scales: CalibrationImages,
        images: ValidationImages,
        parts: Collection[str],
        budget: Budget,
        folder: Path,
        say: Say,
        progress: Progress | None,
        bars: bool,
    ) -> None:
        self._reference = reference
        self._source = with_float32_weights(source)
        self._network = Int8Network(with_pointwise_upsampling(self._source))
        self._blocks = [block for block in self._network.blocks if part_of(block) in parts]
        if not self._blocks:
            raise UsageError(f"--parts {','.join(parts)}: the model has no {' or '.join(parts)}")
        self._scales = scales
        self._images = images
        self._budget = budget
        self._folder = folder
        self._say = say
        self._progress = progress
        self._bars = bars
        self._activations: dict[str, Activation] = {}
        self._largest: dict[str, float] = {}
        self._n_range_images = 0
        self._method: Method = DEFAULT_METHOD
        self._probe = self._open_probe()
        self._harms: dict[str, float] = {}
        self.method_errors: dict[Method, float] = {}

    def run(self) -> tuple[Converted, Proof, list[Trial]]:
        """The graph to write, its proof, and all that were considered.

        Raises:
            GateError: nothing keeps the budget.
        """
        self._measure_activations()
        trials = self._ladder()
        prover = Prover(self._reference, self._images, progress=self._bars)
        for index, trial in enumerate(trials):
            trials[index], found = self._attempt(prover, trial)
            if found is not None:
                tried, found = self._put_back(prover, [trial.rung for trial in trials[: index + 1]], found)
                trials += tried
                return *found, sorted(trials, key=lambda trial: trial.rung.int8_macs, reverse=True)
        self._say("No INT8 graph keeps the budget; falling back to FP16.")
        converted = in_float16(self._source, self._largest, n_images=self._n_range_images)
        return converted, _prove(prover, converted, "FP16 graph", self._budget, self._folder), trials

    def _put_back(
        self, prover: Prover, rungs: Sequence[Rung], found: tuple[Converted, Proof]
    ) -> tuple[list[Trial], tuple[Converted, Proof]]:
        """Add what had left INT8 before the last of these rungs kept the budget: all at once, else by halves.

        Blocks leave by their error, but few of them change a verdict; the others can stay. The last to leave are the
        likeliest to have changed one, and come back last.
        """
        kept = set(rungs[-1].blocks)
        steps = [
            [block for block in above.blocks if block not in below.blocks] for above, below in itertools.pairwise(rungs)
        ]
        tried: list[Trial] = []
        failed: list[set[str]] = []
        pending = [[block for step in reversed(steps[:-1]) for block in step], *steps[-1:]]
        while pending and len(tried) < MAX_PUT_BACK:
            group = pending.pop(0)
            if not group:
                continue
            chosen = kept.union(group)
            # The second half of a group is the whole again where the first half could come back.
            if chosen not in failed:
                rung = rung_of(self._network, self._harms, chosen)
                trial, better = self._attempt(prover, Trial(rung, self._map_error(rung)))
                tried.append(trial)
                if better is not None:
                    kept, found = chosen, better
                    continue
                failed.append(chosen)
            if len(group) > 1:
                middle = len(group) // 2
                pending[:0] = [group[:middle], group[middle:]]
        return tried, found

    def _measure_activations(self) -> None:
        self._network, self._activations = calibrated(self._network, self._blocks, self._scales, self._progress)
        some = list(itertools.islice(self._scales.tensors(), MAX_RANGE_IMAGES))
        self._n_range_images = len(some)
        self._largest = largest_magnitudes(self._source, network_values(self._source), some)
        # The graph that is quantised has other values: channels of other sizes, upsampling taken apart.
        rewritten = self._network.model
        for name, reached in largest_magnitudes(rewritten, network_values(rewritten), some).items():
            self._largest[name] = max(reached, self._largest.get(name, 0.0))

    def _ladder(self) -> list[Trial]:
        """Choose the method, measure the blocks and then the rungs; nothing is judged yet."""
        probe = self._probe
        self._harms = harms = block_harms(
            self._network, self._blocks, self._activations, DEFAULT_METHOD, probe, progress=self._progress
        )
        worst = sorted(harms, key=lambda block: harms[block], reverse=True)[:3]
        self._say(f"Most harmful blocks: {', '.join(f'{block} {100 * harms[block] ** 0.5:.2g} %' for block in worst)}.")
        rungs = ladder(self._network, harms)
        most = METHOD_MACS * rungs[0].int8_macs
        typical = next((rung for rung in rungs if rung.int8_macs <= most), rungs[-1])
        self.method_errors = method_errors(self._network, typical.blocks, self._activations, probe)
        self._method = min(self.method_errors, key=lambda method: self.method_errors[method])
        listed = ", ".join(f"{method} {100 * error:.3g} %" for method, error in self.method_errors.items())
        self._say(f"Error of the maps' peaks, {100 * typical.int8_macs:.0f} % INT8: {listed}; {self._method} is used.")
        return [Trial(rung, self._map_error(rung)) for rung in rungs]

    def _open_probe(self) -> Probe:
        chosen = spread(range(len(self._scales.paths)), PROBE_PAIRS)
        # Defects of many kinds and strengths, and none that the ranges were taken from.
        defects = range(MAX_CALIBRATION_IMAGES, sys.maxsize, 11)
        shown = [image for pair in map(self._scales.pair, chosen, defects) for image in pair]
        return Probe(self._reference, shown, self._folder)

    def _map_error(self, rung: Rung) -> float:
        return self._probe.error(self._network.quantised(rung.blocks, self._activations, self._method))

    def _attempt(self, prover: Prover, trial: Trial) -> tuple[Trial, tuple[Converted, Proof] | None]:
        """Judge the graph as it would be written; it and its proof come back if it keeps the budget."""
        converted = in_int8(
            self._network,
            trial.rung.blocks,
            self._activations,
            self._method,
            self._largest,
            n_images=self._n_range_images,
        )
        what = f"Graph with {100 * trial.rung.int8_macs:.1f} % INT8"
        with opened(with_float16_rounding(converted.model), self._folder) as engine:
            outcome = prover.attempt(engine.infer, f"{what}, ONNX Runtime", self._budget)
        found = None
        if isinstance(outcome, GivenUp):
            told = f"{outcome.n_flips} verdicts changed on {outcome.n_judged} of {len(self._images.samples)} images"
        elif violations := self._budget.violations(outcome):
            told = "; ".join(violations)
        else:
            told, found = "keeps the budget", (converted, outcome)
        self._say(f"{what}: {told}.")
        return replace(trial, outcome=outcome), found


def _prove(prover: Prover, converted: Converted, what: str, budget: Budget, folder: Path) -> Proof:
    """Judge the graph as it would be written, and refuse it if it is over the budget."""
    with opened(with_float16_rounding(converted.model), folder) as engine:
        proof = prover.prove(engine.infer, f"{what}, ONNX Runtime", budget)
    enforce(proof, budget)
    return proof


def _check(model: Path, out: Path, parts: Collection[str]) -> None:
    for path in (model, out):
        if path.suffix != ".onnx":
            raise UsageError(f"{path}: expected a file name that ends in .onnx")
    if out.resolve() == model.resolve():
        raise UsageError(f"{out}: is the model itself; name another file for --out")
    if out.is_dir():
        raise OutputError(f"{out}: a folder is in the way")
    if unknown := set(parts) - set(PARTS) or not parts:
        raise UsageError(f"--parts: expected some of {', '.join(PARTS)}, got {unknown if parts else 'none'}")


def _require_fine_tuned(
    path: Path, model: onnx.ModelProto, spec: ModelSpec, reference: OnnxEngine, parts: Collection[str]
) -> None:
    if set(parts) != set(PARTS):
        raise UsageError("--parts has no use with --fine-tuned-from: its blocks were chosen when it was trained")
    if precision_of(model) != "int8" or read_quantisation(path) is not None:
        raise UsageError(
            f"{path}: expected what `recontrast-edge export` makes of a run that was fine-tuned with --qat INT8"
        )
    tuning = spec.training.recipe.get("qat")
    if not isinstance(tuning, dict) or tuning.get("teacher_sha256") != reference.spec.weights_sha256:
        raise UsageError(f"{reference.path}: is not the model that {path} was fine-tuned from")


def _graph_sha256(model: onnx.ModelProto, folder: Path) -> str:
    path = folder / "proved.onnx"
    with atomic_write(path) as file:
        file.write(model.SerializeToString(deterministic=True))
    return graph_sha256(path)


def _save(path: Path, model: onnx.ModelProto, spec: ModelSpec, record: Quantisation) -> None:
    shipped = onnx.ModelProto()
    shipped.CopyFrom(model)
    onnx.helper.set_model_props(shipped, {SPEC_KEY: spec.dumps(), QUANTISATION_KEY: record.dumps()})
    with atomic_write(path) as file:
        file.write(shipped.SerializeToString(deterministic=True))
    # Metadata is no part of the digest: this is the very graph that was proved, or nothing is written.
    if graph_sha256(path) != record.graph_sha256:
        raise GateError(f"{path.name}: is not the graph that was proved (SHA-256 differs); nothing was written")


def _points(trials: Sequence[Trial], proof: Proof, budget: Budget) -> list[Point]:
    points = []
    for trial in trials:
        outcome = trial.outcome
        kept = None if outcome is None else isinstance(outcome, Proof) and not budget.violations(outcome)
        points.append(Point(trial.rung.int8_macs, max(trial.map_error, 1e-6), kept, outcome is proof))
    return points
