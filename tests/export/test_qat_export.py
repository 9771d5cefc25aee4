"""A model that was fine-tuned for INT8, as a graph: the same places, scales and numbers, and INT8 engines of it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from recontrast_edge import cli
from recontrast_edge.errors import GateError, UsageError
from recontrast_edge.int8 import TRANSPARENT, Layout, quantise_weight
from recontrast_edge.onnxfile import SPEC_KEY, graph_sha256, read_spec, replace_metadata
from recontrast_edge.plan import read_sidecar
from recontrast_edge.proof import read_quantisation
from recontrast_edge.scoring import INPUT_NAME
from recontrast_edge.spec import ModelSpec, Scoring, Training
from tests.export.calibrated import with_threshold

torch = pytest.importorskip("torch", reason="needs the train extra")
onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("onnxsim", reason="needs the export extra")

from recontrast_export.budget import Budget  # noqa: E402
from recontrast_export.build import build_engine  # noqa: E402
from recontrast_export.onnx_export import INT8_TOLERANCE, build_onnx, export_onnx  # noqa: E402
from recontrast_export.precision import precision_of  # noqa: E402
from recontrast_export.qdq import Int8Network, int8_share  # noqa: E402
from recontrast_export.quantize import quantize  # noqa: E402
from recontrast_export.rewrite import with_pointwise_upsampling  # noqa: E402
from recontrast_train.int8_model import Int8ReContrast, _Rounded, _RoundToSteps  # noqa: E402
from recontrast_train.model import ReContrast  # noqa: E402
from recontrast_train.run import save_run, weights_bytes  # noqa: E402
from recontrast_train.tracing import Traced  # noqa: E402

Models = Callable[[str], ReContrast]


def int8_of(model: ReContrast, images: Any, *, discriminator: bool = False) -> Int8ReContrast:
    int8_model = Int8ReContrast(model.backbone_name, discriminator=discriminator)
    int8_model.load_float(model)
    int8_model.find_scales([images])
    return int8_model


@pytest.fixture(scope="module")
def images(spec_of: Callable[..., ModelSpec]) -> Any:
    width, height = spec_of("resnet18", (1,)).input.size_wh
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def int8_model(model_of: Models, images: Any) -> Int8ReContrast:
    return int8_of(model_of("efficientnet_lite0"), images)


@pytest.fixture(scope="module")
def graph(int8_model: Int8ReContrast, spec_of: Callable[..., ModelSpec]) -> Any:
    return build_onnx(int8_model, spec_of(int8_model.backbone_name, int8_model.channels))


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "resnet18"])
def test_training_and_graphs_agree_where_int8_goes(
    backbone: str, model_of: Models, spec_of: Callable[..., ModelSpec]
) -> None:
    model = model_of(backbone)
    network = Int8Network(with_pointwise_upsampling(build_onnx(model, spec_of(backbone, model.channels))))
    layout = Layout(Traced(model).operations)
    assert (network.blocks, network.default_blocks) == (layout.blocks, layout.default_blocks)
    trained, exported = layout.place(layout.blocks), network._layout.place(network.blocks)
    assert trained.convolutions == exported.convolutions
    assert trained.additions == exported.additions

    def groups(of: dict[str, str]) -> set[frozenset[str]]:
        # Values between a transposed convolution and its depth-to-space have other names where a Relu moved.
        names = [name for name in of if not name.endswith("/taps")]
        return {frozenset(name for name in names if of[name] == group) for group in of.values()}

    assert groups(trained.groups) == groups(exported.groups)


def test_scales_are_those_of_training(int8_model: Int8ReContrast, graph: Any) -> None:
    constants = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.graph.initializer}
    pairs = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    scales = int8_model.scales()
    found = {node.input[0]: float(constants[node.input[1]]) for node in pairs if not node.input[0].endswith("/taps")}
    assert found == scales
    conv, norm = int8_model.decoder.stages[0][1].conv2, int8_model.decoder.stages[0][1].bn2
    factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).view(-1, 1, 1, 1)
    codes, scale = quantise_weight((conv.weight * factor).detach().numpy())
    np.testing.assert_array_equal(constants["decoder/stages/0/1/conv2/weight/scale"], scale)
    assert np.mean(constants["decoder/stages/0/1/conv2/weight/int8"] != codes) < 1e-3


def test_onnx_runtime_computes_what_training_saw(int8_model: Int8ReContrast, graph: Any, images: Any) -> None:
    """Every value of the network, each computed from the exported graph's, so that none hides behind an earlier one."""
    probed = onnx.ModelProto()
    probed.CopyFrom(graph)
    made = {name for node in graph.graph.node for name in node.output}
    names = [name for name in int8_model._traced.values if name in made]
    assert len(names) > 150
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(probed.SerializeToString(), options, ["CPUExecutionProvider"])
    exported = dict(zip(names, session.run(names, {INPUT_NAME: images.numpy()}), strict=True))

    kinds = {name: node.op_type for node in graph.graph.node for name in node.output}
    scales = int8_model.scales()
    name_by_node = {int8_model._traced.values[name]: name for name in names}

    class Replayed(_Rounded):
        def run_node(self, n: Any) -> Any:
            value = super().run_node(n)
            if n not in name_by_node:
                return value
            name = name_by_node[n]
            wanted = exported[name]
            if kinds[name] in TRANSPARENT and name in scales:
                # In the graph its inputs were rounded before.
                value = _RoundToSteps.apply(value, torch.tensor(scales[name]))
            tolerance = 1e-5 * float(np.abs(wanted).max())
            np.testing.assert_allclose(value.numpy(), wanted, rtol=0, atol=tolerance, err_msg=name)
            # A copy, because Relus work in place.
            return torch.tensor(wanted)

    with torch.inference_mode():
        Replayed(int8_model).run(images)


def test_unclear_scales_are_refused(graph: Any, model_of: Models, spec_of: Callable[..., ModelSpec]) -> None:
    model = model_of("efficientnet_lite0")
    network = Int8Network(with_pointwise_upsampling(build_onnx(model, spec_of(model.backbone_name, model.channels))))
    with pytest.raises(ValueError, match="expected one scale for"):
        network.with_scales(network.default_blocks, {})
    shared = {"target0_2": 0.5, "target1_2": 0.25}
    with pytest.raises(ValueError, match="expected one scale for"):
        network.with_scales([block for block in network.blocks if block.startswith("bottleneck")], shared)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "discriminator"])
def run(
    request: pytest.FixtureRequest,
    images: Any,
    model_of: Models,
    spec_of: Callable[..., ModelSpec],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished run in INT8."""
    model = model_of("efficientnet_lite0")
    if request.param:
        torch.manual_seed(0)
        with_discriminator = ReContrast(model.backbone_name, discriminator=True).eval()
        with_discriminator.load_state_dict({**with_discriminator.state_dict(), **model.state_dict()})
        model = with_discriminator
    weights = weights_bytes(int8_of(model, images, discriminator=request.param))
    spec = spec_of(
        model.backbone_name,
        model.channels,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        scoring=Scoring(discriminator_weight=2.0 if request.param else None),
    )
    folder: Path = tmp_path_factory.mktemp("int8") / "run"
    save_run(folder, weights, spec)
    return folder


def test_the_engine_is_int8(run: Path, data_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx, which builds without a GPU")
    path, plan, layers = tmp_path / "model.onnx", tmp_path / "model.plan", tmp_path / "layers.json"
    export_onnx(run, path, images=[data_folder])
    exported = onnx.load(path)
    # A discriminator stays float, and is a fifth of the work beside so small a network.
    assert int8_share(exported) > 0.7
    build_engine(path, plan, precision="int8", flavor="tensorrt-rtx", images=[data_folder], layers=layers)
    info = read_sidecar(plan)
    assert info.precision == "int8"
    assert info.conversion.int8_macs == pytest.approx(int8_share(exported))
    assert info.parity.graph is not None
    parsed = json.loads(layers.read_text())["network"]
    quantised = [layer for layer in parsed if layer["type"] == "QUANTIZE"]
    assert quantised
    assert {tensor["dtype"] for layer in quantised for tensor in layer["outputs"]} == {"INT8"}


def test_storing_weights_as_float16_has_no_use(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave out --storage fp16"):
        export_onnx(run, tmp_path / "model.onnx", storage="fp16")


def test_another_scale_is_noticed(
    run: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = Int8ReContrast.scales
    monkeypatch.setattr(
        Int8ReContrast, "scales", lambda self: {name: 2 * scale for name, scale in scales(self).items()}
    )
    with pytest.raises(GateError):
        export_onnx(run, tmp_path / "model.onnx", images=[data_folder])
    assert INT8_TOLERANCE.map_error <= 0.05


# --- the proof against the float model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(
    int8_model: Int8ReContrast,
    model_of: Models,
    spec_of: Callable[..., ModelSpec],
    data_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A float model with a threshold, and what was fine-tuned from it."""
    folder = tmp_path_factory.mktemp("pair")
    teacher, tuned = folder / "float.onnx", folder / "tuned.onnx"
    model = model_of("efficientnet_lite0")
    onnx.save(build_onnx(model, spec_of(model.backbone_name, model.channels)), teacher)
    with_threshold(teacher, data_folder / "test" / "good")
    training = Training(recipe={"qat": {"teacher_sha256": "0" * 64}})
    onnx.save(build_onnx(int8_model, spec_of(model.backbone_name, model.channels, training=training)), tuned)
    return teacher, tuned


def test_a_fine_tuned_model_is_proved_against_the_float_model(
    pair: tuple[Path, Path], data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    teacher, tuned = pair
    good, out = data_folder / "test" / "good", tmp_path / "proved.onnx"
    arguments = ["quantize", tuned, "--fine-tuned-from", teacher, "--calibration", good, "--validation", data_folder]
    arguments += ["--good", good, "--budget", "map_correlation>=0.5", "--out", out]
    monkeypatch.setattr(sys, "argv", ["recontrast-edge", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    printed = capsys.readouterr().out
    assert "tuned.onnx with" in printed
    assert "trade-off" not in printed
    record = read_quantisation(out)
    assert record is not None
    assert (record.precision, record.source, record.source_sha256) == ("int8", "float.onnx", graph_sha256(teacher))
    assert record.calibration is None
    assert record.conversion.int8_macs == pytest.approx(int8_share(onnx.load(tuned)))
    assert record.conversion.method is None
    assert record.proof.map_correlation > 0.9
    assert precision_of(onnx.load(out)) == "int8"
    assert not (tmp_path / "proved.png").exists()
    threshold = read_spec(out).threshold
    assert threshold is not None
    assert threshold.engine_sha256 == graph_sha256(out)


def test_a_fine_tuned_model_over_the_budget_is_refused(
    pair: tuple[Path, Path], data_folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"calibration": data_folder / "test" / "good", "validation": data_folder}
    options |= {"budget": Budget.parse("map_correlation>=0.99999"), "fine_tuned_from": pair[0]}
    with pytest.raises(GateError, match=r"tuned.onnx with .* is over its budget .*map_correlation is"):
        quantize(pair[1], tmp_path / "a.onnx", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "source", "options", "message"),
    [
        ("tuned", "tuned", {}, "is int8 already"),
        ("tuned", None, {}, "--fine-tuned-from FP32.onnx"),
        ("float", "float", {}, "expected what `recontrast-edge export` makes of a run that was fine-tuned"),
        ("tuned", "other", {}, "other.onnx: is not the model that .*tuned.onnx was fine-tuned from"),
        ("tuned", "float", {"parts": ["decoder"]}, "--parts has no use with --fine-tuned-from"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(
    model: str,
    source: str | None,
    options: dict[str, Any],
    message: str,
    pair: tuple[Path, Path],
    data_folder: Path,
    tmp_path: Path,
) -> None:
    paths = {"float": pair[0], "tuned": pair[1], "other": tmp_path / "other.onnx"}
    paths["other"].write_bytes(pair[0].read_bytes())
    spec = read_spec(pair[0]).with_threshold(None)
    replace_metadata(paths["other"], {SPEC_KEY: spec.model_copy(update={"weights_sha256": "1" * 64}).dumps()})
    images = {"calibration": data_folder / "test" / "good", "validation": data_folder}
    fine_tuned_from = None if source is None else paths[source]
    with pytest.raises(UsageError, match=message):
        quantize(
            paths[model],
            tmp_path / "a.onnx",
            **images,
            budget=Budget.parse("map_correlation>=0.5"),
            fine_tuned_from=fine_tuned_from,
            **options,
        )
