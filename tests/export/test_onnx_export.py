"""PyTorch -> ONNX: the graph is lean, named, deterministic and gives the model's numbers, or the gate refuses it."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from recontrast_edge import cli
from recontrast_edge.engines.onnx import OnnxEngine
from recontrast_edge.errors import GateError, InputError, ModelError, OutputError, UsageError
from recontrast_edge.onnxfile import SPEC_KEY, read_spec
from recontrast_edge.scoring import INPUT_NAME
from recontrast_edge.spec import Scoring, Threshold

torch = pytest.importorskip("torch", reason="needs the train extra")
onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("onnxsim", reason="needs the export extra")

from recontrast_export import onnx_export  # noqa: E402
from recontrast_export.graph import Graph  # noqa: E402
from recontrast_export.onnx_export import build_onnx, export_onnx  # noqa: E402
from recontrast_export.parity import FP32_TOLERANCE, ParitySet, compare, read_images  # noqa: E402
from recontrast_export.torch_to_onnx import add_network  # noqa: E402
from recontrast_train.score import TorchScorer  # noqa: E402


@pytest.fixture(scope="module")
def parity_set(data_folder: Path) -> ParitySet:
    return read_images([data_folder])


@pytest.fixture(scope="module")
def lite0_map(model_of, spec_of):
    model = model_of("efficientnet_lite0")
    return build_onnx(model, spec_of(model.backbone_name, model.channels))


def initializers(model) -> dict[str, np.ndarray]:
    return {entry.name: onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer}


@pytest.mark.parametrize(
    ("backbone", "head", "rule"),
    [
        ("efficientnet_lite0", "map", "max"),
        ("efficientnet_lite0", "map", "top"),
        ("efficientnet_lite0", "features", "top"),
        ("resnet18", "map", "max"),
    ],
)
def test_reproduces_the_model(backbone, head, rule, model_of, spec_of, parity_set, tmp_path) -> None:
    model = model_of(backbone)
    spec = spec_of(backbone, model.channels, scoring=Scoring(blur_sigma=2.0, rule=rule))
    path = tmp_path / "model.onnx"
    onnx.save(build_onnx(model, spec, head=head), path)
    with OnnxEngine(path, threads=1) as engine:
        report = compare(TorchScorer(model, spec), engine.infer, parity_set)
    report.enforce(FP32_TOLERANCE)
    # Far inside of the tolerance: nothing but rounding.
    assert report.relative_map_errors.max() < 3e-5


def test_an_untrained_model_whose_encoders_are_equal_exports(spec_of, parity_set, tmp_path) -> None:
    from recontrast_train.model import ReContrast

    torch.manual_seed(0)
    model = ReContrast("efficientnet_lite0").eval()
    spec = spec_of(model.backbone_name, model.channels)
    path = tmp_path / "model.onnx"
    onnx.save(build_onnx(model, spec, head="features"), path)
    with OnnxEngine(path, threads=1) as engine:
        compare(TorchScorer(model, spec), engine.infer, parity_set).enforce(FP32_TOLERANCE)


def test_the_batch_is_dynamic_and_its_images_independent(lite0_map) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(lite0_map.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).normal(size=(3, 3, 64, 96)).astype(np.float32)
    maps, scores = session.run(None, {INPUT_NAME: images})
    assert maps.shape == (3, 1, 64, 96)
    assert scores.shape == (3,)
    for index in range(3):
        single_map, single_score = session.run(None, {INPUT_NAME: images[index : index + 1]})
        np.testing.assert_allclose(maps[index], single_map[0], atol=1e-5)
        np.testing.assert_allclose(scores[index], single_score[0], atol=1e-5)


def test_the_graph_holds_the_network_and_nothing_else(lite0_map) -> None:
    counts = Counter(node.op_type for node in lite0_map.graph.node)
    # No batch norm, no padding, no resize, no shape arithmetic.
    assert set(counts) == {
        *("Conv", "ConvTranspose", "Relu", "Clip", "Add", "Concat", "Split"),
        *("Mul", "ReduceSum", "Sqrt", "Max", "Div", "Sub", "MatMul", "ReduceMax"),
    }
    heads = [node for node in lite0_map.graph.node if node.name.startswith("heads/")]
    assert [node.op_type for node in heads] == ["Conv"] * 6
    # Two transposed convolutions a stage: the path and its shortcut.
    assert counts["ConvTranspose"] == 6


def test_padding_is_an_attribute_where_it_is_asymmetric(lite0_map) -> None:
    stem = next(node for node in lite0_map.graph.node if node.name == "encoder/_conv_stem")
    pads = next(attribute.ints for attribute in stem.attribute if attribute.name == "pads")
    assert list(pads) == [0, 0, 1, 1]


def test_names_come_from_the_modules(lite0_map) -> None:
    names = [node.name for node in lite0_map.graph.node]
    assert len(names) == len(set(names))
    assert {"frozen/_blocks/5/_depthwise_conv", "bottleneck/fine/0/0", "decoder/stages/2/0/conv1"} <= set(names)
    assert "heads/1/2/weight" in initializers(lite0_map)


def test_says_who_made_it_and_carries_the_spec_without_threshold(model_of, spec_of, tmp_path) -> None:
    from recontrast_edge import __version__

    model = model_of("efficientnet_lite0")
    spec = spec_of(model.backbone_name, model.channels)
    exported = build_onnx(model, spec.with_threshold(Threshold(value=1.0, method="manual")))
    assert (exported.producer_name, exported.producer_version) == ("recontrast-edge", __version__)
    assert (exported.opset_import[0].version, exported.ir_version) == (18, 8)
    assert [entry.key for entry in exported.metadata_props] == [SPEC_KEY]
    path = tmp_path / "model.onnx"
    onnx.save(exported, path)
    assert read_spec(path) == spec


def test_the_same_run_gives_the_same_bytes(run_folder, data_folder, tmp_path) -> None:
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path in paths:
        export_onnx(run_folder, path, images=[data_folder], head="features", opset=20)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert onnx.load(paths[0]).opset_import[0].version == 20


def test_float16_storage_halves_the_file_within_its_tolerance(run_folder, data_folder, tmp_path) -> None:
    full, half = tmp_path / "full.onnx", tmp_path / "half.onnx"
    exact = export_onnx(run_folder, full, images=[data_folder])
    rounded = export_onnx(run_folder, half, images=[data_folder], storage="fp16")
    assert half.stat().st_size < 0.53 * full.stat().st_size
    assert exact.relative_map_errors.max() < rounded.relative_map_errors.max() <= 5e-3
    weights = initializers(onnx.load(half))
    assert weights["bottleneck/stage/0/conv1/weight/fp16"].dtype == np.float16
    # The few that matter most stay as they are.
    assert weights["encoder/_conv_stem/weight"].dtype == np.float32


def test_weights_too_large_for_float16_are_refused(model_of, spec_of) -> None:
    model = copy.deepcopy(model_of("efficientnet_lite0"))
    with torch.no_grad():
        model.heads[0][2].weight[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"heads/0/2/weight: holds 1e\+05"):
        build_onnx(model, spec_of(model.backbone_name, model.channels), storage="fp16")


def break_one_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on one number of the exported file is wrong."""

    def build(*args, **kwargs):
        model = build_onnx(*args, **kwargs)
        entry = next(entry for entry in model.graph.initializer if entry.name == "heads/0/2/weight")
        value = onnx.numpy_helper.to_array(entry).copy()
        value.flat[7] += 10 * np.abs(value).max()
        entry.CopyFrom(onnx.numpy_helper.from_array(value, entry.name))
        return model

    monkeypatch.setattr(onnx_export, "build_onnx", build)


def test_one_broken_weight_is_refused_and_leaves_no_trace(run_folder, data_folder, tmp_path, monkeypatch) -> None:
    break_one_weight(monkeypatch)
    out = tmp_path / "model.onnx"
    out.write_bytes(b"the model of yesterday")
    seen = []
    with pytest.raises(GateError, match="nothing was written"):
        export_onnx(run_folder, out, images=[data_folder], on_parity=lambda *report: seen.append(report))
    assert len(seen) == 1
    assert out.read_bytes() == b"the model of yesterday"
    assert list(tmp_path.iterdir()) == [out]


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["recontrast-edge", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_command_line(run_folder, data_folder, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "new" / "model.onnx"
    assert run_cli(monkeypatch, run_folder, "--out", out, "--images", data_folder) == 0
    printed = capsys.readouterr().out
    assert "ONNX Runtime against PyTorch on 16 of 18 images" in printed
    assert "0 pair(s) differ" in printed
    assert [entry.name for entry in out.parent.iterdir()] == ["model.onnx"]
    with OnnxEngine(out) as engine:
        assert engine.spec.threshold is None


def test_command_line_shows_the_table_and_ends_with_6_when_refused(
    run_folder, data_folder, tmp_path, monkeypatch, capsys
) -> None:
    break_one_weight(monkeypatch)
    out = tmp_path / "model.onnx"
    assert run_cli(monkeypatch, run_folder, "--out", out, "--images", data_folder) == GateError.exit_code
    printed = capsys.readouterr()
    assert "worst map error" in printed.out
    assert "does not reproduce its reference" in printed.err
    assert not out.exists()


def test_without_images_it_takes_the_held_out_ones_else_says_that_they_are_synthetic(
    run_folder, data_folder, tmp_path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for file in run_folder.iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    report = export_onnx(run, tmp_path / "model.onnx")
    assert "SYNTHETIC" in report.on.source
    holdout = run / "holdout.txt"
    holdout.write_text("\n".join(str(path) for path in sorted((data_folder / "test" / "good").iterdir())))
    report = export_onnx(run, tmp_path / "model.onnx")
    assert report.on.source == f"12 of 12 images in {holdout}"
    # Moved away since.
    holdout.write_text("gone.png\n")
    report = export_onnx(run, tmp_path / "model.onnx")
    assert "SYNTHETIC" in report.on.source


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"out": "model.pt"}, UsageError),
        ({"opset": 17}, UsageError),
        ({"run": "nothing"}, ModelError),
        ({"images": ["nothing"]}, InputError),
        ({"out": "folder.onnx"}, OutputError),
    ],
)
def test_bad_arguments_are_refused_before_any_work(change, error, run_folder, data_folder, tmp_path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    options = {"run": run_folder, "out": "model.onnx", "images": [data_folder], **change}
    images = [tmp_path / path for path in options["images"]]
    run = tmp_path / options["run"]
    with pytest.raises(error):
        export_onnx(run, tmp_path / options["out"], images=images, opset=options.get("opset", 18))
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.onnx"]


def test_a_layer_without_translation_is_named(model_of) -> None:
    model = copy.deepcopy(model_of("efficientnet_lite0"))
    model.decoder.stages[0][0].relu = torch.nn.Hardswish()
    graph = Graph("test", opset=18)
    with pytest.raises(ModelError, match=r"Hardswish.* has no translation"):
        add_network(graph, model, graph.input(INPUT_NAME, ["N", 3, 64, 96]))
