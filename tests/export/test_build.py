"""``build`` with the real TensorRT for RTX, whose parser and builder need no GPU: networks have the types that were
asked for, plans fit their sidecars, and what goes wrong leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recontrast_edge import cli
from recontrast_edge.calibration import write_threshold
from recontrast_edge.datasets import combined_sha256, file_sha256
from recontrast_edge.engines import Inference
from recontrast_edge.engines.onnx import OnnxEngine
from recontrast_edge.errors import (
    EXIT_INTERRUPTED,
    CalibrationError,
    GateError,
    InputError,
    MissingError,
    ModelError,
    OutputError,
    UsageError,
)
from recontrast_edge.onnxfile import SPEC_KEY, graph_sha256, read_spec, replace_metadata
from recontrast_edge.plan import PlanInfo, read_sidecar, sidecar_path, verify_plan
from recontrast_edge.spec import Threshold
from tests.edge.fakes_cuda import FakeDriver, install
from tests.export.calibrated import with_threshold

torch = pytest.importorskip("torch", reason="needs the train extra")
onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("onnxsim", reason="needs the export extra")
pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx extra")

from recontrast_export import build as build_module  # noqa: E402
from recontrast_export.build import BUDGETS, TOLERANCES, Gpu, Result, build_engine  # noqa: E402
from recontrast_export.onnx_export import build_onnx  # noqa: E402
from recontrast_export.parity import GPU_FP32_TOLERANCE, Tolerance  # noqa: E402
from recontrast_export.precision import (  # noqa: E402
    read_calibration_images,
    to_precision,
)
from recontrast_export.qdq import convolution_macs, int8_share  # noqa: E402
from recontrast_export.trt import Built, Library, Network, Settings, load_library  # noqa: E402


@pytest.fixture(scope="module")
def library() -> Library:
    return load_library("tensorrt-rtx")


@pytest.fixture(scope="module")
def good(data_folder: Path) -> Path:
    return data_folder / "test" / "good"


@pytest.fixture(scope="module")
def models(model_of: Any, spec_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``models(backbone, head)``: path of an exported model."""
    folder = tmp_path_factory.mktemp("models")

    def get(backbone: str = "efficientnet_lite0", head: str = "features") -> Path:
        path: Path = folder / f"{backbone}-{head}.onnx"
        if not path.exists():
            model = model_of(backbone)
            onnx.save(build_onnx(model, spec_of(backbone, model.channels), head=head), path)
        return path

    return get


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests below say what happens without one, wherever they run."""
    monkeypatch.setattr(build_module, "_local_gpu", lambda library: None)


class FakeEngine:
    """What a GPU would answer: the results of ``source``, off by a share of the map's range."""

    source: Path

    def __init__(self, path: Path, off: float) -> None:
        self.info, _ = verify_plan(path)
        self.sha256 = self.info.plan_sha256
        self._engine = OnnxEngine(FakeEngine.source, threads=1)
        self._off = off

    def infer(self, images: Any) -> Inference:
        found = self._engine.infer(images)
        return Inference(found.maps + self._off * (found.maps.max() - found.maps.min()), found.scores, {})

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.close()


UseGpu = Callable[..., None]


@pytest.fixture
def use_gpu(monkeypatch: pytest.MonkeyPatch) -> UseGpu:
    """``use_gpu(name, compute_capability)``: this machine has it, and the kernels load there.

    With ``source``, engines give that model's results there, as ``kind`` and ``off`` say.
    """

    def use(
        name: str,
        compute_capability: str,
        *,
        source: Path | None = None,
        kind: type[FakeEngine] = FakeEngine,
        off: float = 0.0,
    ) -> None:
        monkeypatch.setattr(build_module, "_local_gpu", lambda library: Gpu(name, compute_capability))
        monkeypatch.setattr(build_module, "_require_kernels", lambda: None)
        if source is not None:
            FakeEngine.source = source
            monkeypatch.setattr(build_module, "open_engine", lambda path: kind(path, off))

    return use


@pytest.fixture(autouse=True)
def _any_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network with random weights knows no structure, so it cannot tell good parts from noise: it is not asked."""
    monkeypatch.setattr(build_module, "require_good_images", lambda engine, paths: None)


# --- the networks that the parser makes ------------------------------------------------------------------------------

CONVOLUTIONS = ("CONVOLUTION", "DECONVOLUTION")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("head", ["features", "map"])
@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "resnet18", "wide_resnet50_2"])
def test_every_network_is_built_in_every_precision(
    backbone: str, head: str, precision: Any, models: Any, good: Path, library: Library
) -> None:
    check_built(models(backbone, head), head, precision, good, library)


@pytest.mark.parametrize("head", ["features", "map"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_network_with_a_discriminator_is_built(
    precision: Any, head: str, models: Any, good: Path, library: Library
) -> None:
    check_built(models("efficientnet_lite0+discriminator", head), head, precision, good, library)


def test_less_precision_takes_less_room(models: Any, good: Path, library: Library) -> None:
    path = models("resnet18", "features")
    int8, fp16 = (check_built(path, "features", precision, good, library) for precision in ("int8", "fp16"))
    assert len(int8) < 0.8 * len(fp16)


def check_built(path: Path, head: str, precision: Any, good: Path, library: Library) -> bytes:
    """Convert, parse, look at the types, build; returns the plan."""
    source, spec = onnx.load(path), read_spec(path)
    images = read_calibration_images(good, spec.input)
    model = to_precision(source, precision, calibration=images if precision == "int8" else None).model
    network = library.parse(model.SerializeToString())
    share = int8_share(model)
    assert (share > 0.8) if precision == "int8" else (share == 0)
    check_network(network, model, precision, head, share)
    built = library.build(network, Settings(batch=(1, 2, 4), image_chw=(3, *spec.input.size_wh[::-1])))
    ends = [network.definition.get_input(0)]
    ends += [network.definition.get_output(index) for index in range(network.definition.num_outputs)]
    assert {tensor.allowed_formats for tensor in ends} == {1 << int(library.trt.TensorFormat.LINEAR)}
    assert len(built.plan) > 1_000_000
    return built.plan


def check_network(network: Network, model: Any, precision: str, head: str, int8_macs: float) -> None:
    """The types are those of the precision, and the share of the work in INT8 is that of the ONNX graph."""
    layers = network.layers()
    check_types(layers, precision, head)
    assert int8_share_of(layers, convolution_macs(model)) == pytest.approx(int8_macs)


def int8_share_of(layers: list[dict[str, Any]], macs: dict[str, int]) -> float:
    """Share of the multiply-accumulates in convolutions that read INT8, by the network that the parser made."""
    producers = {tensor["name"]: layer for layer in layers for tensor in layer["outputs"]}
    share = 0.0
    for layer in layers:
        fed = [producers.get(tensor["name"]) for tensor in layer["inputs"][:2]]
        if layer["type"] != "CONVOLUTION" or [each and each["type"] for each in fed] != ["DEQUANTIZE"] * 2:
            continue
        assert [each["inputs"][0]["dtype"] for each in fed if each] == ["INT8"] * 2, layer["name"]
        share += macs[layer["name"]] / sum(macs.values())
    return share


def check_types(layers: list[dict[str, Any]], precision: str, head: str) -> None:
    types = {tensor["name"]: tensor["dtype"] for layer in layers for tensor in layer["outputs"]}
    by_layer: dict[str, Counter[str]] = {}
    for layer in layers:
        # Computed in float32, from logits of the network's type.
        if layer["name"] != "defect_probability":
            by_layer.setdefault(layer["type"], Counter()).update(tensor["dtype"] for tensor in layer["outputs"])
    network_type = "FLOAT" if precision == "fp32" else "HALF"
    for kind in (*CONVOLUTIONS, "ACTIVATION", "POOLING"):
        assert set(by_layer.get(kind, {})) <= {network_type}, (kind, by_layer[kind])
    # Shapes are INT64; scales of Q/DQ may be constants of any type.
    computed = {tensor["dtype"] for layer in layers if layer["type"] != "CONSTANT" for tensor in layer["outputs"]}
    expected = {"INT64", network_type} | ({"INT8"} if precision == "int8" else set())
    has_discriminator = "defect_probability" in types
    assert computed == expected | ({"FLOAT"} if head == "map" or has_discriminator else set())
    if has_discriminator:
        assert types["defect_probability"] == "FLOAT"
    features = {name: dtype for name, dtype in types.items() if name.startswith(("target", "reconstruction"))}
    names = {name for name in features if name.count("_") == 1 and "/" not in name}
    assert len(names) == 12
    assert {features[name] for name in names} == {network_type}
    if head == "map":
        assert {types["anomaly_map"], types["anomaly_score"]} == {"FLOAT"}
        for kind in ("MATRIX_MULTIPLY", "REDUCE", "UNARY"):
            assert set(by_layer[kind]) == {"FLOAT"}
    if precision != "int8":
        assert not {"QUANTIZE", "DEQUANTIZE"} & set(by_layer)


def test_the_real_library_knows_the_gpus_that_portable_engines_are_for(library: Library) -> None:
    assert all(map(library.runs_portable, ("8.0", "8.6", "8.9", "12.0", "12.1")))
    assert not any(map(library.runs_portable, ("7.5", "8.7", "9.0", "10.0")))


# --- build_engine ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("head", "precision"), [("features", "fp16"), ("map", "int8")])
def test_a_plan_and_its_sidecar(
    head: Any, precision: Any, models: Any, good: Path, data_folder: Path, tmp_path: Path
) -> None:
    model, out = models(head=head), tmp_path / "new" / "line.plan"
    calibration = good if precision == "int8" else None
    seen = []
    result = build_engine(
        model,
        out,
        precision=precision,
        batch=(1, 2, 8),
        calibration=calibration,
        images=[] if calibration else [data_folder],
        on_parity=lambda *report: seen.append(report),
    )
    info, plan = verify_plan(out)
    assert info == result.info
    assert len(plan) > 1_000_000
    assert info.spec == read_spec(model)
    assert (info.flavor, info.precision, info.head, info.batch) == ("tensorrt-rtx", precision, head, (1, 2, 8))
    assert (info.compute_capability, info.gpu) == (None, None)
    assert (info.onnx, info.onnx_sha256) == (model.name, graph_sha256(model))
    if calibration:
        digest = combined_sha256(file_sha256(path) for path in sorted(good.iterdir()))
        assert info.calibration is not None
        assert info.calibration.model_dump() == {"data": "good", "n_images": 12, "data_sha256": digest}
    else:
        assert info.calibration is None
    ((what, report, tolerance),) = seen
    assert what == f"{precision} graph on ONNX Runtime"
    assert tolerance == TOLERANCES[precision]
    assert info.parity.graph is not None
    assert info.parity.graph.map_error == report.relative_map_errors.max() > 0
    assert info.parity.graph.n_images == (12 if calibration else 16)
    assert info.parity.engine is None
    assert "The engine itself was not run: this machine has no GPU" in info.parity.note
    assert info.parity.note in result.notes
    assert sorted(entry.name for entry in out.parent.iterdir()) == ["line.plan", "line.plan.json"]


@pytest.mark.usefixtures("no_gpu")
def test_fp32_converts_nothing_and_says_so(models: Any, tmp_path: Path) -> None:
    info = build_engine(models(), tmp_path / "a.plan", precision="fp32", sm=86).info
    assert info.parity.graph is None
    assert info.parity.note.startswith("Nothing was converted")
    assert info.compute_capability == "8.6"


@pytest.mark.usefixtures("no_gpu")
def test_the_threshold_of_the_source_stays_behind(models: Any, tmp_path: Path) -> None:
    """It was calibrated with other scores."""
    model, out = tmp_path / "model.onnx", tmp_path / "a.plan"
    model.write_bytes(models().read_bytes())
    threshold = Threshold(value=0.5, method="manual", engine_sha256=graph_sha256(model))
    replace_metadata(model, {SPEC_KEY: read_spec(model).with_threshold(threshold).dumps()})
    build_engine(model, out, precision="fp32")
    spec = read_sidecar(out).spec
    assert spec.threshold is None
    write_threshold(out, spec, threshold)
    assert verify_plan(out)[0].spec.threshold == threshold


@pytest.mark.usefixtures("no_gpu")
def test_layers_are_reported(models: Any, tmp_path: Path) -> None:
    layers = tmp_path / "layers.json"
    info = build_engine(models(), tmp_path / "a.plan", precision="fp32", layers=layers).info
    report = json.loads(layers.read_text())
    assert report.pop("engine") is None
    network = report.pop("network")
    assert report["plan_sha256"] == info.plan_sha256
    assert report["format"] == "recontrast-edge.layers"
    convolutions = [layer for layer in network if layer["type"] == "CONVOLUTION"]
    assert len(convolutions) == 89
    assert convolutions[0]["inputs"][0] == {"name": "image", "dtype": "FLOAT", "shape": [-1, 3, 64, 96]}


@pytest.mark.parametrize(
    ("told", "engine", "note"),
    [
        ({"Layers": []}, {"Layers": []}, ""),
        ("{a broken report", "{a broken report", ""),
        (ModelError("the inspector gives no reason"), None, "has no layers of the engine: the inspector gives no"),
    ],
)
def test_a_report_of_layers_costs_no_engine(
    told: Any,
    engine: Any,
    note: str,
    models: Any,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    use_gpu: UseGpu,
) -> None:
    out, layers = tmp_path / "a.plan", tmp_path / "layers.json"

    def inspect(library: Library, plan: bytes) -> Any:
        assert verify_plan(out)[1] == plan, "the engine is written first"
        if isinstance(told, ModelError):
            raise told
        return told

    use_gpu("a test", "8.6", source=models())
    monkeypatch.setattr(Library, "inspect", inspect)
    result = build_engine(models(), out, precision="fp32", layers=layers, images=[data_folder])
    assert json.loads(layers.read_text())["engine"] == engine
    assert any(note in said for said in result.notes)
    assert len(result.notes) == (2 if note else 1)


@pytest.mark.parametrize(("off", "passes"), [(1e-4, True), (0.03, False)])
def test_where_a_gpu_is_the_engine_itself_must_pass(
    off: float,
    passes: bool,
    models: Any,
    data_folder: Path,
    tmp_path: Path,
    use_gpu: UseGpu,
) -> None:
    use_gpu("a test", "8.6", source=models(), off=off)
    out = tmp_path / "a.plan"

    def build() -> PlanInfo:
        return build_engine(models(), out, precision="fp16", images=[data_folder]).info

    if not passes:
        with pytest.raises(GateError, match="nothing was written"):
            build()
        assert list(tmp_path.iterdir()) == []
        return
    info = build()
    assert info.gpu == "a test"
    assert info.parity.engine is not None
    assert info.parity.engine.map_error == pytest.approx(off, rel=0.01)
    assert "was run on this machine's GPU" in info.parity.note


def test_an_fp32_engine_is_held_to_what_a_gpu_can_keep(
    models: Any, data_folder: Path, tmp_path: Path, use_gpu: UseGpu
) -> None:
    use_gpu("a test", "8.6", source=models())
    seen = []
    build_engine(
        models(),
        tmp_path / "a.plan",
        precision="fp32",
        images=[data_folder],
        on_parity=lambda *report: seen.append(report),
    )
    ((what, _, tolerance),) = seen
    assert what == "fp32 engine on a test"
    assert tolerance == GPU_FP32_TOLERANCE


class LosingEngine(FakeEngine):
    """An engine that the closeness of maps on a few images would pass, but that loses every fourth verdict."""

    def infer(self, images: Any) -> Inference:
        found = super().infer(images)
        scores = found.scores.copy()
        for index, image in enumerate(images):
            if int(image.sum()) % 4 == 0:
                scores[index] += 1.0
        return Inference(found.maps, scores, {})


@pytest.fixture
def calibrated(models: Any, good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a threshold from the good images."""
    path: Path = tmp_path_factory.mktemp("calibrated") / "model.onnx"
    path.write_bytes(models(head="map").read_bytes())
    with_threshold(path, good)
    return path


def test_an_engine_that_runs_gets_its_own_proof_and_threshold(
    calibrated: Path, good: Path, data_folder: Path, tmp_path: Path, use_gpu: UseGpu
) -> None:
    use_gpu("a test", "8.6", source=calibrated, off=1e-4)
    out = tmp_path / "a.plan"
    build_engine(calibrated, out, precision="fp16", validation=data_folder, good=good)
    info, _ = verify_plan(out)
    for proof, candidate in ((info.parity.graph_proof, "graph on ONNX Runtime"), (info.parity.engine_proof, "a test")):
        assert proof is not None
        assert candidate in proof.candidate
        assert (proof.n_good, proof.n_defect, proof.verdict_flips.of) == (12, 6, 18)
        assert proof.map_correlation > 0.9999
        assert proof.budget == str(BUDGETS["fp16"])
    before, after = read_spec(calibrated).threshold, info.spec.threshold
    assert before is not None
    assert after is not None
    assert (after.value, after.data_sha256) == (before.value, before.data_sha256)
    assert (after.max_false_reject_rate, after.confidence) == (0.3, 0.8)
    assert after.engine_sha256 == info.plan_sha256 != before.engine_sha256


def test_an_engine_that_loses_verdicts_is_refused(
    calibrated: Path, good: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_gpu: UseGpu
) -> None:
    use_gpu("a test", "8.6", source=calibrated, kind=LosingEngine)
    monkeypatch.setitem(TOLERANCES, "fp32", Tolerance(map_error=1.0, tie=1.0))
    seen = []
    with pytest.raises(GateError, match=r"fp32 engine on a test is over its budget .*verdicts that changed: \w+/"):
        build_engine(
            calibrated,
            tmp_path / "a.plan",
            precision="fp32",
            validation=data_folder,
            on_proof=lambda *proof: seen.append(proof),
        )
    ((proof, budget),) = seen
    assert budget == BUDGETS["fp32"]
    assert len(proof.flipped) == proof.verdict_flips.count > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_no_threshold_is_derived(calibrated: Path, good: Path, tmp_path: Path) -> None:
    result = build_engine(calibrated, tmp_path / "a.plan", precision="fp32", good=good)
    assert result.info.spec.threshold is None
    assert any("threshold was not derived" in note for note in result.notes)
    with pytest.raises(CalibrationError, match="not the 12 good images of good"):
        build_engine(calibrated, tmp_path / "b.plan", precision="fp32", good=good.parent / "scratch")


class TimingLibrary:
    """TensorRT as ``build_engine`` sees it: its builder wants a GPU and times kernels on it."""

    flavor, version, has_timing_cache, is_portable = "tensorrt", "10.3.0.26", True, False

    def __init__(self) -> None:
        self.caches: list[bytes | None] = []

    def check_sm(self, sm: int | None, local_capability: str | None) -> None:
        assert local_capability == "8.7"

    def parse(self, model: bytes) -> Network:
        return Network("a network", "its builder")

    def build(self, network: Network, settings: Settings, progress: Any) -> Built:
        self.caches.append(settings.timing_cache)
        known = settings.timing_cache in (b"", b"times")
        return Built(b"a plan", b"times", cache_ignored=not known)


def test_the_timing_cache_is_kept_beside_the_plan_and_used_again(
    models: Any, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_gpu: UseGpu
) -> None:
    library, out = TimingLibrary(), tmp_path / "a.plan"
    monkeypatch.setattr(build_module, "load_library", lambda flavor: library)
    use_gpu("Orin", "8.7", source=models())

    def build(**options: Any) -> Result:
        return build_engine(models(), out, precision="fp32", images=[data_folder], **options)

    info = build().info
    assert (info.flavor, info.compute_capability, info.gpu) == ("tensorrt", "8.7", "Orin")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.plan", "a.plan.json", "a.plan.timing"]
    cache = tmp_path / "a.plan.timing"
    assert cache.read_bytes() == b"times"
    assert len(build().notes) == 1
    cache.write_bytes(b"damaged")
    assert any("was damaged, or of another version or GPU" in note for note in build().notes)
    assert cache.read_bytes() == b"times"
    build(timing_cache=tmp_path / "line.timing")
    assert (tmp_path / "line.timing").read_bytes() == b"times"
    assert library.caches == [b"", b"times", b"damaged", b""]


class TightLibrary(TimingLibrary):
    """It runs short of memory, and looks at what else is in it."""

    def parse(self, model: bytes) -> Network:
        self.parsed = [model]
        return super().parse(model)

    def build(self, network: Network, settings: Settings, progress: Any) -> Built:
        # The list's reference, and that of the call itself.
        self.references = sys.getrefcount(self.parsed[0]) - 2
        self.on_build()
        return replace(super().build(network, settings, progress), memory_warnings=12)

    def on_build(self) -> None:
        pass


@pytest.fixture
def tight(models: Any, monkeypatch: pytest.MonkeyPatch, use_gpu: UseGpu) -> TightLibrary:
    library = TightLibrary()
    monkeypatch.setattr(build_module, "load_library", lambda flavor: library)
    use_gpu("Orin", "8.7", source=models())
    return library


def test_while_it_builds_the_memory_is_tensorrts(
    tight: TightLibrary, models: Any, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Any] = []
    references: list[OnnxEngine] = []
    load, convert = onnx.load, to_precision

    def loaded(path: Path) -> Any:
        graphs.append(load(path))
        return graphs[-1]

    def converted(*arguments: Any, **options: Any) -> Any:
        made = convert(*arguments, **options)
        graphs.append(made.model)
        return made

    def opened(path: Path) -> OnnxEngine:
        references.append(OnnxEngine(path))
        return references[-1]

    def look() -> None:
        assert len(graphs) == 2
        assert [sys.getrefcount(graphs[index]) - 2 for index in range(2)] == [0, 0]
        with pytest.raises(ModelError, match="the engine is closed"):
            references[0].infer([np.zeros((96, 64, 3), np.uint8)])

    monkeypatch.setattr(onnx, "load", loaded)
    monkeypatch.setattr(build_module, "to_precision", converted)
    monkeypatch.setattr(build_module, "OnnxEngine", opened)
    tight.on_build = look  # type: ignore[method-assign]
    info = build_engine(models(), tmp_path / "a.plan", precision="fp16", images=[data_folder]).info
    assert tight.references == 0
    assert info.parity.graph is not None
    assert info.parity.engine is not None
    assert info.parity.engine.map_error == 0.0


@pytest.mark.parametrize(
    ("workspace_mib", "advice"), [(None, r"a smaller --batch, delete"), (64, r"a larger --workspace-mib than 64, del")]
)
def test_an_engine_built_with_too_little_memory_may_be_slower(
    workspace_mib: int | None, advice: str, tight: TightLibrary, models: Any, data_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.plan"
    result = build_engine(models(), out, precision="fp32", images=[data_folder], workspace_mib=workspace_mib)
    (note,) = (note for note in result.notes if "memory" in note)
    assert "warned 12 times" in note
    assert "may be slower" in note
    assert re.search(rf"{advice}.* {out}\.timing and build again", note)


@pytest.mark.parametrize("head", ["features", "map"])
@pytest.mark.parametrize("compiles", [False, True])
def test_without_kernels_for_the_gpu_nothing_is_built(
    compiles: bool, head: str, models: Any, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import recontrast_edge.cuda
    from recontrast_edge.kernels import launcher

    def compiled(capability: tuple[int, int]) -> bytes:
        if not compiles:
            raise MissingError("there is no compiler")
        return b"a cubin"

    library, driver = TimingLibrary(), FakeDriver()
    install(driver, monkeypatch)
    real = recontrast_edge.cuda.open_device
    monkeypatch.setattr(recontrast_edge.cuda, "open_device", lambda: real(binding="cuda-bindings"))
    # Without a packaged fatbin.
    monkeypatch.setattr(launcher, "files", lambda package: tmp_path)
    monkeypatch.setattr(launcher, "compiled_kernels", compiled)
    monkeypatch.setattr(build_module, "load_library", lambda flavor: library)
    monkeypatch.setattr(build_module, "open_engine", lambda path: FakeEngine(path, 0.0))
    FakeEngine.source = models(head=head)

    def build() -> None:
        build_engine(models(head=head), tmp_path / "a.plan", precision="fp32", images=[data_folder])

    if compiles:
        build()
    else:
        with pytest.raises(MissingError, match="there is no compiler"):
            build()
    assert len(library.caches) == compiles, "how often it built"
    assert driver.live == {}


def test_an_engine_for_another_gpu_is_not_run_here(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_gpu: UseGpu
) -> None:
    use_gpu("a test", "8.6")
    monkeypatch.setattr(build_module, "_require_kernels", lambda: pytest.fail("it is not run"))
    info = build_engine(models(), tmp_path / "a.plan", precision="fp32", sm=89).info
    assert info.parity.engine is None
    assert "GPU has compute capability 8.6" in info.parity.note


@pytest.mark.parametrize("error", [ModelError("the GPU failed"), MissingError("no compiler")])
@pytest.mark.parametrize("capability", ["8.6", "12.1"])
def test_a_portable_engine_that_fails_on_a_gpu_it_is_for_is_refused(
    capability: str,
    error: Exception,
    models: Any,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    use_gpu: UseGpu,
) -> None:
    def refuse(path: Path) -> None:
        raise error

    use_gpu("a test", capability)
    monkeypatch.setattr(build_module, "open_engine", refuse)
    with pytest.raises(type(error), match=str(error)):
        build_engine(models(), tmp_path / "a.plan", precision="fp32", images=[data_folder])
    assert list(tmp_path.iterdir()) == []


def test_a_portable_engine_that_this_gpu_does_not_run_is_written_with_the_reason(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_gpu: UseGpu
) -> None:
    def refuse(path: Path) -> None:
        raise ModelError("not for this architecture")

    use_gpu("a test", "9.0")
    monkeypatch.setattr(build_module, "open_engine", refuse)
    monkeypatch.setattr(build_module, "_require_kernels", lambda: pytest.fail("it is only tried"))
    info = build_engine(models(), tmp_path / "a.plan", precision="fp32").info
    listed = "tensorrt-rtx does not promise to run portable engines on 9.0"
    expected = f"The engine itself was not run: {listed}, and here it does not (not for this architecture)."
    assert expected in info.parity.note


@pytest.mark.usefixtures("no_gpu")
def test_a_graph_beyond_the_tolerance_leaves_no_trace(
    models: Any, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        converted = to_precision(*args, **kwargs)
        model = converted.model
        entry = next(entry for entry in model.graph.initializer if entry.name == "heads/0/2/weight")
        value = onnx.numpy_helper.to_array(entry).copy()
        value[3] *= -20
        entry.CopyFrom(onnx.numpy_helper.from_array(value, entry.name))
        return converted

    monkeypatch.setattr(build_module, "to_precision", broken)
    out = tmp_path / "a.plan"
    out.write_bytes(b"the engine of yesterday")
    seen = []
    with pytest.raises(GateError, match="nothing was written"):
        build_engine(
            models(), out, precision="fp16", images=[data_folder], on_parity=lambda *report: seen.append(report)
        )
    assert len(seen) == 1
    assert out.read_bytes() == b"the engine of yesterday"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.usefixtures("no_gpu")
def test_an_operator_that_the_parser_does_not_take_is_named(models: Any, tmp_path: Path) -> None:
    model = onnx.load(models())
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    # ONNX Runtime's own.
    relu.op_type, relu.domain = "QuickGelu", "com.microsoft"
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(ModelError, match=rf"node '{relu.name}' \(QuickGelu\): "):
        build_engine(path, tmp_path / "a.plan", precision="fp32")


def test_tensorrt_needs_the_local_gpu(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import recontrast_edge.cuda

    def none_here() -> Any:
        raise MissingError("no GPU here")

    monkeypatch.setattr(recontrast_edge.cuda, "open_device", none_here)
    rtx = load_library("tensorrt-rtx")
    monkeypatch.setattr(build_module, "load_library", lambda flavor: Library("tensorrt", rtx.trt))
    with pytest.raises(MissingError, match=r"builds for the GPU of this machine, .*: no GPU here"):
        build_engine(models(), tmp_path / "a.plan")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": "model.engine"}, UsageError, "ends in .plan"),
        ({"model": "model.pt"}, UsageError, "expected an .onnx file"),
        ({"model": "nothing.onnx"}, ModelError, "no such"),
        ({"model": "damaged.onnx"}, ModelError, "damaged"),
        ({"out": "folder.plan"}, OutputError, "a folder is in the way"),
        ({"batch": (2, 1, 4)}, UsageError, "smallest <= optimal"),
        ({"batch": (0, 1, 1)}, UsageError, "1 <= smallest"),
        ({"batch": (1, 1, 5000)}, UsageError, "largest <= 1024"),
        ({"workspace_mib": 0}, UsageError, "at least 1"),
        ({"layers": "layers.txt"}, UsageError, "ends in .json"),
        ({"layers": "a.plan.json"}, UsageError, "own description"),
        ({"timing_cache": "cache"}, UsageError, "no use with tensorrt-rtx"),
        ({"sm": 87}, UsageError, "on the Jetson itself"),
        ({"precision": "int8"}, UsageError, "needs --calibration"),
        ({"calibration": "images"}, UsageError, "leave it out"),
        ({"precision": "int8", "calibration": "nothing"}, InputError, "no such data set"),
        ({"images": ["nothing"]}, InputError, "no such"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_built(
    change: dict[str, Any], error: type[Exception], message: str, models: Any, good: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder.plan").mkdir()
    (tmp_path / "damaged.onnx").write_bytes(models().read_bytes()[:100_000])
    (tmp_path / "images").symlink_to(good)
    before = sorted(tmp_path.iterdir())
    options: dict[str, Any] = {"model": models(), "out": "a.plan", **change}
    for name in ("model", "out", "layers", "timing_cache", "calibration"):
        if name in options:
            options[name] = tmp_path / options[name]
    options["images"] = [tmp_path / path for path in options.get("images", [])]
    with pytest.raises(error, match=message):
        build_engine(options.pop("model"), options.pop("out"), **options)
    assert sorted(tmp_path.iterdir()) == before


def test_building_needs_no_torch() -> None:
    """A Jetson need not have it."""
    code = (
        "import sys; import recontrast_export.build; "
        "sys.exit(bool({'torch', 'recontrast_train', 'onnxsim', 'safetensors'} & set(sys.modules)))"
    )
    env = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


# --- the command -----------------------------------------------------------------------------------------------------


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["recontrast-edge", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.usefixtures("no_gpu")
def test_command_line(
    models: Any, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "line.plan"
    arguments = ["build", models(), "--out", out, "--images", data_folder, "--batch", "1,1,4", "--workspace-mib", 256]
    assert run_cli(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert "fp16 graph on ONNX Runtime against the source model on 16 images of parts" in printed
    assert "The engine itself was not run" in printed
    assert "fp16, for tensorrt-rtx" in printed
    assert run_cli(monkeypatch, "info", out) == 0
    printed = capsys.readouterr().out
    assert "TensorRT engine" in printed
    assert "smallest 1, optimal 1, largest 4" in printed
    assert run_cli(monkeypatch, "info", out, "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert described["kind"] == "plan"
    assert described["details"]["plan_sha256"] == read_sidecar(out).plan_sha256
    content = bytearray(out.read_bytes())
    content[len(content) // 2] ^= 1
    out.write_bytes(content)
    assert run_cli(monkeypatch, "info", out) == ModelError.exit_code
    assert "SHA-256 differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--precision", "fp8"), ("--flavor", "tflite"), ("--batch", "4"), ("--batch", "1,2,x"), ("--batch", "1,-2,3")],
)
def test_wrong_options_are_named(
    option: str, value: str, models: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = run_cli(monkeypatch, "build", models(), "--out", tmp_path / "a.plan", option, value)
    assert code == UsageError.exit_code
    assert f"{option} '{value}'" in capsys.readouterr().err


def test_without_tensorrt_the_extra_is_named(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_library.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    code = run_cli(monkeypatch, "build", models(), "--out", tmp_path / "a.plan", "--flavor", "tensorrt")
    load_library.cache_clear()
    assert code == MissingError.exit_code
    assert "pip install 'recontrast-edge[tensorrt]'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_cleanly(number: signal.Signals, models: Any, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "recontrast_edge", "build", models("resnet18"), "--out", folder / "a.plan"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [*map(str, command), "--images", str(good)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    # It is being compared, and will be built, once this file is there.
    deadline_s = time.monotonic() + 240
    while not list(folder.glob("*/converted.onnx")):
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=240)
    # A shell calls both 130: Python ends by the signal where it interrupted a library's own Python code.
    assert process.returncode in (EXIT_INTERRUPTED, -signal.SIGINT), errors
    assert "Traceback" not in errors
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("no_gpu")
def test_a_full_disk_leaves_nothing(
    models: Any, data_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = os.fsync
    out = tmp_path / "a.plan"

    def full(handle: int) -> None:
        name = Path(f"/proc/self/fd/{handle}").readlink().name
        if name.startswith(".a.plan."):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        build_engine(models(), out, precision="fp32")
    assert list(tmp_path.iterdir()) == []
    assert not sidecar_path(out).exists()
