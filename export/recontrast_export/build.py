"""An exported model becomes a TensorRT engine, and appears under its name only if it still finds what it should.

    build_engine(Path("model.onnx"), Path("model.plan"), precision="fp16")

Nothing here needs PyTorch, so that it runs on the device.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from recontrast_edge import __version__
from recontrast_edge.datasets import Sample, find_dataset
from recontrast_edge.engines import Engine, Inference, open_engine
from recontrast_edge.engines.onnx import OnnxEngine
from recontrast_edge.errors import MissingError, ModelError, OutputError, UsageError
from recontrast_edge.images import atomic_write
from recontrast_edge.plan import (
    MAX_BATCH,
    Comparison,
    Flavor,
    Parity,
    PlanInfo,
    Precision,
    sidecar_path,
)
from recontrast_edge.preprocess import Image, preprocess
from recontrast_edge.proof import Proof, read_quantisation
from recontrast_edge.recalibration import recalibrate, require_calibrated_on
from recontrast_edge.scoring import MAP_NAME
from recontrast_edge.spec import InputSpec, ModelSpec, Threshold
from recontrast_edge.tiling import canvas, tiles
from recontrast_export.budget import Budget
from recontrast_export.emulation import with_float16_rounding
from recontrast_export.parity import (
    GPU_FP32_TOLERANCE,
    ParityReport,
    ParitySet,
    Tolerance,
    compare,
    read_images,
    synthetic_images,
)
from recontrast_export.plausible import require_good_images
from recontrast_export.precision import read_calibration_images, to_precision
from recontrast_export.proving import Prover, ValidationImages, enforce, read_validation
from recontrast_export.trt import Built, Library, Network, Progress, Settings, compute_capability, load_library

TOLERANCES: dict[Precision, Tolerance] = {
    # Nothing is converted, so that only engines are held to it.
    "fp32": GPU_FP32_TOLERANCE,
    # Features rounded to 11 bits move a trained model's map by up to 1 % of its range.
    "fp16": Tolerance(map_error=2e-2, tie=2e-2),
    # 8 bits move it by about 10 %. Beyond twice that, what the network finds is no longer what it was trained to find.
    "int8": Tolerance(map_error=0.2, tie=0.1),
}
"""How far an engine may be from the FP32 model."""

LAYERS_FORMAT = "recontrast-edge.layers"
LAYERS_VERSION = 1

BUDGETS: dict[Precision, Budget] = {
    "fp32": Budget.parse("verdict_flips<=0"),
    "fp16": Budget.parse("map_correlation>=0.9999,clear_flips<=0"),
    "int8": Budget.parse("verdict_flips<=0.5%,delta_i_auroc<=0.003,delta_aupro<=0.01"),
}
"""What an engine's verdicts may cost on validation images, where the user says nothing else."""

OnProof = Callable[[Proof, Budget], None]
"""Told what was found; before it is enforced."""

OnParity = Callable[[str, ParityReport, Tolerance], None]
"""Told what was compared with what, the result, and what is allowed; before it is enforced."""


@dataclass(frozen=True)
class Gpu:
    """This machine's GPU: its name, and its compute capability such as ``8.7``."""

    name: str
    compute_capability: str


@dataclass(frozen=True)
class Result:
    """A written engine.

    Attributes:
        info: its sidecar.
        notes: what the user should know, one sentence each.
    """

    info: PlanInfo
    notes: tuple[str, ...]


def build_engine(
    model: Path,
    out: Path,
    *,
    precision: Precision = "fp16",
    flavor: Flavor | Literal["auto"] = "auto",
    sm: int | None = None,
    batch: tuple[int, int, int] = (1, 1, 1),
    workspace_mib: int | None = None,
    timing_cache: Path | None = None,
    calibration: Path | None = None,
    images: Sequence[Path] = (),
    validation: Path | None = None,
    budget: Budget | None = None,
    good: Path | None = None,
    layers: Path | None = None,
    detailed: bool = False,
    progress: Progress | None = None,
    on_parity: OnParity | None = None,
    on_proof: OnProof | None = None,
) -> Result:
    """Convert, check, build, check again where a GPU is, write the plan and its sidecar.

    Args:
        model: ``.onnx`` file of ``recontrast-edge export``.
        out: ``.plan`` file to write; replaced if it exists, unless a gate refuses.
        precision: see ``recontrast_export.precision``.
        flavor: see ``trt.load_library``.
        sm: architecture to build for, such as 86; None for this machine's GPU or, with RTX, for all that it knows.
        batch: smallest, optimal and largest batch.
        workspace_mib: most scratch memory, in MiB; None for all there is.
        timing_cache: file that keeps kernel times for the next build; None for one beside the plan. Not with RTX.
        calibration: good images for INT8 scales, see ``precision.read_calibration_images``.
        images: what to compare maps on, see ``parity.read_images``; none for the validation or calibration images or,
            where there are none, synthetic ones.
        validation: images to compare verdicts on, see ``proving.read_validation``; None for no such proof.
        budget: what must hold on them; None for that of the precision, ``BUDGETS``.
        good: the images that the model's threshold was calibrated on, to derive the engine's from; None for none.
        layers: JSON file to write a report of the layers to.
        detailed: keep names and details of layers in the engine, for profilers.
        progress: told how calibration and build proceed.
        on_parity: told each comparison before it is enforced.
        on_proof: told each proof before it is enforced.

    Raises:
        UsageError: options that do not fit each other, the model or the machine.
        MissingError: TensorRT, or the GPU that it needs; or a compiler for the kernels that run the engine there.
        ModelError: a damaged model, one that TensorRT does not take, or an engine that fails on the GPU it is for.
        InputError: images that cannot be used.
        CalibrationError: ``good`` are not the images of the model's threshold.
        GateError: the engine would not reproduce the model; nothing was written.
        OutputError: a file cannot be written.
        KeyboardInterrupt: Ctrl-C; nothing was written.
    """
    _check_outputs(model, out, layers)
    _check_batch(batch)
    if workspace_mib is not None and workspace_mib < 1:
        raise UsageError(f"workspace {workspace_mib} MiB: expected at least 1")
    library = load_library(flavor)
    if timing_cache is not None and not library.has_timing_cache:
        raise UsageError(f"--timing-cache has no use with {library.flavor}, which times no kernels; leave it out")
    with OnnxEngine(model) as reference, temporary_folder(out) as folder:
        gpu = _local_gpu(library)
        library.check_sm(sm, None if gpu is None else gpu.compute_capability)
        bound_to = _bound_capability(library, sm, gpu)
        unrun = _why_not_run(bound_to, gpu)
        must_run = unrun is None and _must_run(library, bound_to, gpu)
        if must_run:
            _require_kernels()
        spec = reference.spec.with_threshold(None)
        source = onnx.load(model)
        made = read_quantisation(model)
        scales = None if calibration is None else read_calibration_images(calibration, spec.input)
        if scales is not None:
            require_good_images(reference, scales.paths)
        promised = _promised_images(good, reference.spec)
        compared = _parity_images(images, validation or calibration, spec)
        judged = None if validation is None else read_validation(validation, Path(folder))
        limits = budget or BUDGETS[precision]
        gate = _Gate(reference, compared, judged, precision, limits, Path(folder), on_parity, on_proof)
        tensors = _network_inputs([entry.image for entry in compared.images], spec.input)
        converted = to_precision(source, precision, calibration=scales, images=tensors, progress=progress)
        is_source = precision == "fp32" or converted.model is source
        content = converted.model.SerializeToString(deterministic=True)
        network = library.parse(content)
        if unrun is None or not is_source:
            gate.run_reference()
        graph_parity, graph_proof = (None, None) if is_source else gate.check_graph(content)
        has_map = any(output.name == MAP_NAME for output in converted.model.graph.output)
        conversion = converted.record if made is None else made.conversion
        # TensorRT leaves out what it has no memory for, and on a Jetson the GPU's memory is this process's.
        reference.close()
        del source, converted, content, tensors
        cache_file = (timing_cache or out.with_name(f"{out.name}.timing")) if library.has_timing_cache else None
        settings = Settings(
            batch=batch,
            image_chw=(3, *spec.input.size_wh[::-1]),
            sm=sm,
            workspace_mib=workspace_mib,
            # The inspector tells nothing about layers without it.
            detailed=detailed or layers is not None,
            timing_cache=None if cache_file is None else _read_cache(cache_file),
        )
        built = library.build(network, settings, progress)
        notes = [] if cache_file is None else _keep_cache(cache_file, built)
        if built.memory_warnings:
            notes.append(_short_of_memory(built.memory_warnings, library, workspace_mib, cache_file))
        info = PlanInfo(
            spec=spec,
            flavor=library.flavor,
            library_version=library.version,
            compute_capability=bound_to,
            gpu=None if gpu is None else gpu.name,
            precision=precision,
            head="map" if has_map else "features",
            batch=batch,
            plan_sha256=hashlib.sha256(built.plan).hexdigest(),
            onnx=model.name,
            onnx_sha256=reference.sha256,
            calibration=scales.record if scales is not None else None if made is None else made.calibration,
            conversion=conversion,
            parity=Parity(graph=graph_parity, engine=None, note="not run yet"),
            software={
                "recontrast-edge": __version__,
                "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__,
                library.flavor: library.version,
            },
        )
        if unrun is None and gpu is not None:
            engine_parity, engine_proof, threshold, unrun = gate.check_plan(
                info, built.plan, gpu, promised, must_run=must_run
            )
        else:
            engine_parity = engine_proof = threshold = None
        note = _note(unrun, was_converted=graph_parity is not None)
        notes.append(note)
        if good is not None and threshold is None:
            notes.append("Its threshold was not derived, because that takes the engine's own scores.")
        info = info.model_copy(
            update={
                "parity": Parity(
                    graph=graph_parity,
                    engine=engine_parity,
                    graph_proof=graph_proof if made is None else made.proof,
                    engine_proof=engine_proof,
                    note=note,
                ),
                "spec": spec.with_threshold(threshold),
            }
        )
        _write_plan(out, info, built.plan)
        # Only now, so that a report that fails costs nothing but itself.
        if layers is not None:
            notes += _write_layers(layers, info, network, library, built.plan if unrun is None else None)
    return Result(info, tuple(notes))


class _Gate:
    """Compares candidates with the source model, and refuses those that are too far from it."""

    def __init__(
        self,
        reference: Engine,
        on: ParitySet,
        judged: ValidationImages | None,
        precision: Precision,
        budget: Budget,
        folder: Path,
        on_parity: OnParity | None,
        on_proof: OnProof | None,
    ) -> None:
        self._reference = reference
        self._on = on
        self._precision = precision
        self._budget = budget
        self._folder = folder
        self._on_parity = on_parity
        self._on_proof = on_proof
        self._prover = None if judged is None else Prover(reference, judged)
        self._expected: list[Inference] = []

    def run_reference(self) -> None:
        """Judge the images with the source model, which may be closed afterwards; before any ``check``."""
        self._expected = [self._reference.infer([entry.image]) for entry in self._on.images]

    def check_graph(self, content: bytes) -> tuple[Comparison, Proof | None]:
        """Compare the very graph that the parser was given, on ONNX Runtime, with float16's roundings written out."""
        path = self._folder / "converted.onnx"
        _write(path, with_float16_rounding(onnx.load_from_string(content)).SerializeToString(deterministic=True))
        what = f"{self._precision} graph on ONNX Runtime"
        with OnnxEngine(path) as engine:
            return self._compare(what, engine), self._prove(what, engine)

    def check_plan(
        self, info: PlanInfo, plan: bytes, gpu: Gpu, promised: Sequence[Sample] | None, *, must_run: bool
    ) -> tuple[Comparison | None, Proof | None, Threshold | None, str | None]:
        """Compare the engine itself, and derive its threshold from the promised images; else why it was not run.

        Args:
            must_run: an engine that cannot be opened is an error; else it need not fit this GPU.
        """
        path = self._folder / "engine.plan"
        _write_plan(path, info, plan)
        try:
            engine = open_engine(path)
        except (ModelError, MissingError) as error:
            if must_run:
                raise
            listed = f"{info.flavor} does not promise to run portable engines on {gpu.compute_capability}"
            return None, None, None, f"{listed}, and here it does not ({str(error)[:500]})"
        what = f"{self._precision} engine on {gpu.name}"
        with engine:
            compared, proof = self._compare(what, engine), self._prove(what, engine)
            if promised is None:
                return compared, proof, None, None
            threshold = recalibrate(engine.infer, promised, self._reference.spec, engine_sha256=engine.sha256)
            return compared, proof, threshold, None

    def _compare(self, what: str, candidate: Engine) -> Comparison:
        tolerance = TOLERANCES[self._precision]
        expected = iter(self._expected)
        report = compare(lambda _: next(expected), candidate.infer, self._on)
        if self._on_parity is not None:
            self._on_parity(what, report, tolerance)
        report.enforce(tolerance)
        return Comparison(
            images=self._on.source,
            n_images=len(self._on.images),
            map_error=float(report.relative_map_errors.max()),
            score_error=float(report.score_errors.max()),
            allowed_map_error=tolerance.map_error,
        )

    def _prove(self, what: str, candidate: Engine) -> Proof | None:
        if self._prover is None:
            return None
        proof = self._prover.prove(candidate.infer, what, self._budget)
        if self._on_proof is not None:
            self._on_proof(proof, self._budget)
        enforce(proof, self._budget)
        return proof


def _network_inputs(images: Sequence[Image], spec: InputSpec) -> list[NDArray[np.float32]]:
    """(1, 3, H, W) float32 of each image; where it is cut into tiles, of one, another one each time."""
    if not spec.is_tiled:
        return [preprocess(image, spec)[None] for image in images]
    chosen = [index * spec.n_tiles // len(images) for index in range(len(images))]
    return [
        preprocess(tiles(canvas(image, spec), spec)[tile], spec.of_tile)[None]
        for image, tile in zip(images, chosen, strict=True)
    ]


def _why_not_run(bound_to: str | None, gpu: Gpu | None) -> str | None:
    """Why this machine cannot run an engine bound to this compute capability, None for portable; None where it may."""
    if gpu is None:
        return "this machine has no GPU that is usable from Python"
    if bound_to not in (None, gpu.compute_capability):
        return f"this machine's GPU has compute capability {gpu.compute_capability}"
    return None


def _must_run(library: Library, bound_to: str | None, gpu: Gpu | None) -> bool:
    """Whether the GPU is one that the engine is for; a portable one is only tried on all others."""
    return gpu is not None and (bound_to is not None or library.runs_portable(gpu.compute_capability))


def _require_kernels() -> None:
    """What every engine runs with, whatever its head. Without it the engine's check would fail, after the build.

    Raises:
        MissingError, ModelError: see ``load_kernels``.
    """
    from recontrast_edge.cuda import open_device
    from recontrast_edge.kernels.launcher import load_kernels

    with open_device() as device, device.current():
        load_kernels(device).close()


def _short_of_memory(warnings: int, library: Library, workspace_mib: int | None, cache: Path | None) -> str:
    more = "close other programs or give a smaller --batch"
    if workspace_mib is not None:
        more += f" or a larger --workspace-mib than {workspace_mib}"
    # Layers that it knows are not timed again, with what was left out of them.
    if cache is not None:
        more += f", delete {cache}"
    return (
        f"{library.flavor} warned {warnings} times that memory was too short to try an implementation of a layer, so "
        f"the engine may be slower than it could be: {more} and build again."
    )


def _note(unrun: str | None, *, was_converted: bool) -> str:
    compared = "The graph that was built" if was_converted else "Nothing was converted, so no graph"
    ran = f"The engine itself was not run: {unrun}." if unrun else "The engine was run on this machine's GPU."
    return f"{compared} was compared with the source model on ONNX Runtime. {ran}"


def _promised_images(good: Path | None, spec: ModelSpec) -> Sequence[Sample] | None:
    """The images of the source's threshold, checked before anything takes time."""
    if good is None:
        return None
    samples = find_dataset(good).training_samples()
    require_calibrated_on(samples, spec)
    return samples


def _check_outputs(model: Path, out: Path, layers: Path | None) -> None:
    if out.suffix != ".plan":
        raise UsageError(f"{out}: expected a file name that ends in .plan")
    if model.suffix != ".onnx":
        raise UsageError(f"{model}: expected an .onnx file of `recontrast-edge export`")
    if layers is not None and layers.suffix != ".json":
        raise UsageError(f"{layers}: expected a file name that ends in .json")
    if layers is not None and layers.resolve() == sidecar_path(out).resolve():
        raise UsageError(f"{layers}: is where the plan's own description goes; name another file for --layers")
    for path in (out, sidecar_path(out), layers):
        if path is not None and path.is_dir():
            raise OutputError(f"{path}: a folder is in the way")


def _check_batch(batch: tuple[int, int, int]) -> None:
    if list(batch) != sorted(batch) or not 1 <= batch[0] <= batch[2] <= MAX_BATCH:
        text = ",".join(map(str, batch))
        raise UsageError(f"batch {text}: expected 1 <= smallest <= optimal <= largest <= {MAX_BATCH}, such as 1,1,4")


def _local_gpu(library: Library) -> Gpu | None:
    """This machine's GPU; None where there is none and none is needed."""
    from recontrast_edge.cuda import open_device

    try:
        with open_device() as device:
            return Gpu(device.name, ".".join(map(str, device.compute_capability)))
    except MissingError as error:
        if library.is_portable:
            return None
        # A GPU that is not ready stays one that may be later.
        raise type(error)(
            f"{library.flavor} builds for the GPU of this machine, by timing kernels on it: {error}"
        ) from None


def _bound_capability(library: Library, sm: int | None, gpu: Gpu | None) -> str | None:
    """The compute capability that the plan will be bound to; None for a portable one."""
    if library.is_portable:
        return None if sm is None else compute_capability(sm)
    return None if gpu is None else gpu.compute_capability


def _parity_images(images: Sequence[Path], other: Path | None, spec: ModelSpec) -> ParitySet:
    chosen = list(images) or ([other] if other is not None else [])
    if not chosen:
        return synthetic_images(spec.input)
    found = read_images(chosen)
    # The sidecar travels with the engine, and folders of this machine say nothing there.
    names = ", ".join(path.resolve().name for path in chosen)
    return replace(found, source=f"{len(found.images)} images of {names}")


def temporary_folder(out: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder beside the file to write, for what must not be left behind.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        raise OutputError(f"{out}: cannot write here ({error.strerror or error})") from None


def _read_cache(path: Path) -> bytes:
    """Content of a timing cache; empty where there is none yet or it cannot be read, which a build mends."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _keep_cache(path: Path, built: Built) -> list[str]:
    if built.timing_cache is None:
        return []
    _write(path, built.timing_cache)
    if not built.cache_ignored:
        return []
    return [f"{path} was damaged, or of another version or GPU; it was not used, and begun again."]


def _write_layers(path: Path, info: PlanInfo, network: Network, library: Library, plan: bytes | None) -> list[str]:
    """Write the report; ``plan`` is None where it cannot be run. Returns what the user should know."""
    engine, notes = None, []
    if plan is not None:
        try:
            engine = library.inspect(plan)
        except ModelError as error:
            notes.append(f"{path} has no layers of the engine: {error}.")
    report = {
        "format": LAYERS_FORMAT,
        "version": LAYERS_VERSION,
        **info.model_dump(include={"onnx", "onnx_sha256", "plan_sha256", "precision", "flavor", "library_version"}),
        "network": network.layers(),
        "engine": engine,
    }
    _write(path, (json.dumps(report, indent=1) + "\n").encode())
    return notes


def _write_plan(path: Path, info: PlanInfo, plan: bytes) -> None:
    """Both files or neither: the plan gets its name, and only then its sidecar, which was written before."""
    with atomic_write(sidecar_path(path)) as sidecar, atomic_write(path) as file:
        sidecar.write(info.dumps().encode())
        sidecar.flush()
        file.write(plan)


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)
