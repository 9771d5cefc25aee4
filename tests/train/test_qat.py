"""Fine-tuning with quantisation: the rounding and its gradients, and a run fine-tuned from end to end."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from recontrast_edge import cli  # noqa: E402
from recontrast_edge.datasets import file_sha256, find_dataset  # noqa: E402
from recontrast_edge.errors import InputError, ModelError, UsageError  # noqa: E402
from recontrast_edge.images import read_image, write_image  # noqa: E402
from recontrast_edge.synthetic import SyntheticLine  # noqa: E402
from recontrast_train.int8_model import Int8ReContrast, _RoundToSteps  # noqa: E402
from recontrast_train.model import ReContrast  # noqa: E402
from recontrast_train.qat import FineTuned, QatOptions, distillation_loss, fine_tune  # noqa: E402
from recontrast_train.run import load_run, save_run  # noqa: E402
from recontrast_train.score import TorchScorer  # noqa: E402
from recontrast_train.training import TrainOptions, train  # noqa: E402

N_GOOD = 8


def test_values_are_rounded_to_steps_and_clipped() -> None:
    x = torch.tensor([0.0, 0.24, 0.26, -0.75, -1.25, 62.0, 63.6, 1e9, -64.2, -1e9])
    rounded = _RoundToSteps.apply(x, torch.tensor(0.5))
    # Halves go to the even step, as QuantizeLinear has it; there are 127 steps above 0 and 128 below.
    assert rounded.tolist() == [0.0, 0.0, 0.5, -1.0, -1.0, 62.0, 63.5, 63.5, -64.0, -64.0]


def test_gradients_go_straight_through_and_scales_learn() -> None:
    x = torch.tensor([0.3, 0.8, 200.0, -200.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    _RoundToSteps.apply(x, scale).backward(torch.tensor([1.0, 2.0, 3.0, 5.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 0.0, 0.0]
    # Within the range what rounding moved, in steps; clipped, the outermost step.
    assert scale.grad is not None
    expected = 1 * (1 - 0.6) + 2 * (2 - 1.6) + 3 * 127 + 5 * -128
    assert scale.grad.item() == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def int8_model() -> Int8ReContrast:
    torch.manual_seed(0)
    model = Int8ReContrast("efficientnet_lite0")
    model.find_scales([torch.randn(2, 3, 64, 64)])
    return model


def test_int8_is_near_the_float_network_and_not_the_same(int8_model: Int8ReContrast) -> None:
    float_model = ReContrast("efficientnet_lite0").eval()
    state = int8_model.state_dict()
    float_model.load_state_dict({key: state[key] for key in float_model.state_dict()})
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 64)
        found, wanted = int8_model(images), float_model(images)
        other = float_model(torch.randn(2, 3, 64, 64))
    error = float(distillation_loss(found, wanted))
    assert 1e-4 < error < 0.2 * float(distillation_loss(other, wanted))


def test_every_weight_and_scale_learns(int8_model: Int8ReContrast) -> None:
    int8_model.requires_grad_(True)
    pairs = int8_model(torch.randn(2, 3, 64, 64))
    distillation_loss(pairs, [[(a.detach().flip(0), b.detach().flip(0)) for a, b in view] for view in pairs]).backward()
    without = [name for name, value in int8_model.named_parameters() if value.grad is None]
    assert not without
    int8_model.zero_grad()


def test_scales_are_numbers_of_float16_and_shared_in_groups(int8_model: Int8ReContrast) -> None:
    scales = int8_model.scales()
    assert all(scale == float(np.float16(scale)) > 0 for scale in scales.values())
    # All levels of both encoders end up in one bottleneck.
    assert scales["target0_2"] == scales["target1_2"]
    assert len(set(scales.values())) > 20
    assert not any(name.startswith("heads") or "reconstruction" in name for name in scales)


def test_train_mode_leaves_the_batch_norms_as_they_are(int8_model: Int8ReContrast) -> None:
    int8_model.train()
    assert not any(module.training for module in int8_model.modules())


# --- a whole fine-tuning ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("qat") / "metal"
    line = SyntheticLine("brushed-metal", seed=0, size_wh=(64, 64), defect_rate=0.0)
    for folder, start, count in (("train/good", 0, N_GOOD), ("test/good", 50, 3)):
        (root / folder).mkdir(parents=True)
        for index in range(count):
            write_image(root / folder / f"{index}.png", line.part(start + index).image)
    return root


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "discriminator"])
def teacher(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    overrides = {"backbone": "efficientnet_lite0", "size_wh": (64, 64), "iterations": 2, "batch": 4}
    if request.param:
        overrides |= {"discriminator": True, "pseudo_defects": 0.5}
    train(TrainOptions(data=data, out=run, overrides=overrides, holdout=0.25, device="cpu"))
    return run


@pytest.fixture(scope="module")
def tuned(teacher: Path, data: Path) -> tuple[Path, FineTuned]:
    out = teacher.parent / "int8"
    return out, fine_tune(QatOptions(run=teacher, data=data, out=out, iterations=16, batch=4, device="cpu"))


def test_fine_tuning_brings_int8_nearer_to_float(tuned: tuple[Path, FineTuned]) -> None:
    losses = tuned[1].losses
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    # So few steps need not show on images that were not learnt from; a rate too high would.
    assert 0 < tuned[1].error_after < 1.05 * tuned[1].error_before


def test_the_run_is_the_teachers_in_int8(tuned: tuple[Path, FineTuned], teacher: Path, data: Path) -> None:
    model, spec = load_run(tuned[0])
    float_model, float_spec = load_run(teacher)
    assert isinstance(model, Int8ReContrast)
    assert not isinstance(float_model, Int8ReContrast)
    assert (spec.scoring, spec.input, spec.levels) == (float_spec.scoring, float_spec.input, float_spec.levels)
    assert spec.training.image_digests == float_spec.training.image_digests
    assert len(spec.training.image_digests) == N_GOOD - 2
    assert spec.training.recipe["qat"]["teacher_sha256"] == float_spec.weights_sha256
    assert spec.weights_sha256 == file_sha256(tuned[0] / "model.safetensors")
    images = [read_image(sample.path) for sample in find_dataset(data).test]
    found, wanted = TorchScorer(model, spec)(images).maps, TorchScorer(float_model, float_spec)(images).maps
    error = np.sqrt(np.mean((found - wanted) ** 2)) / wanted.std()
    assert error == pytest.approx(tuned[1].error_after, rel=0.6)
    assert (tuned[0] / "loss.png").is_file()
    assert len((tuned[0] / "loss.csv").read_text().splitlines()) == 1 + 16
    held_out = [
        {sample.path.resolve() for sample in find_dataset(folder / "holdout.txt").training_samples()}
        for folder in (teacher, tuned[0])
    ]
    assert held_out[0] == held_out[1]
    assert len(held_out[1]) == 2


def test_without_its_scales_a_run_is_refused(tuned: tuple[Path, FineTuned], tmp_path: Path) -> None:
    import hashlib

    from safetensors.torch import load, save

    tensors = load((tuned[0] / "model.safetensors").read_bytes())
    del tensors[next(name for name in tensors if name.startswith("log_scales."))]
    weights = save(tensors)
    _, spec = load_run(tuned[0])
    save_run(tmp_path, weights, spec.model_copy(update={"weights_sha256": hashlib.sha256(weights).hexdigest()}))
    with pytest.raises(ModelError, match="not the weights of a efficientnet_lite0 model"):
        load_run(tmp_path)


def test_what_cannot_be_fine_tuned_is_refused(tuned: tuple[Path, FineTuned], teacher: Path, tmp_path: Path) -> None:
    line = SyntheticLine("woven-fabric", seed=0, size_wh=(64, 64), defect_rate=0.0)
    (tmp_path / "other").mkdir()
    for index in range(3):
        write_image(tmp_path / "other" / f"{index}.png", line.part(index).image)
    options = QatOptions(run=teacher, data=tmp_path / "other", out=tmp_path / "out", iterations=1, device="cpu")
    with pytest.raises(InputError, match="trained on 0 of its 3 good images"):
        fine_tune(options)
    with pytest.raises(UsageError, match="fine-tuned for INT8 already"):
        fine_tune(replace(options, run=tuned[0]))
    with pytest.raises(UsageError, match="already holds a run"):
        fine_tune(replace(options, out=tuned[0]))
    with pytest.raises(UsageError, match="is the run to go on from"):
        fine_tune(replace(options, out=teacher))
    with pytest.raises(UsageError, match="expected fp32 or bf16"):
        fine_tune(replace(options, precision="fp16"))
    with pytest.raises(UsageError, match="iterations"):
        fine_tune(replace(options, iterations=0))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--qat", "INT8", "--data", "DATA"], "expected --resume RUN"),
        (["--resume", "RUN", "--qat", "INT8"], "expected --resume RUN"),
        (["--resume", "RUN", "--qat", "INT4", "--data", "DATA"], "expected --resume RUN"),
        (["--resume", "RUN", "--qat", "INT8", "--data", "DATA", "--backbone", "resnet18"], "leave out --backbone"),
    ],
)
def test_options_that_make_no_sense(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["recontrast-edge", "train", *arguments, "--out", "out"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == UsageError.exit_code
    assert message in capsys.readouterr().err


def test_command_line(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--resume", teacher, "--qat", "INT8", "--iterations", 1, "--batch", 2, "--data", data]
    out = tmp_path / "int8"
    monkeypatch.setattr(sys, "argv", ["recontrast-edge", "train", *map(str, arguments), "--out", str(out)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert not exit_info.value.code
    assert "standard deviation" in capsys.readouterr().out
    assert isinstance(load_run(out)[0], Int8ReContrast)
