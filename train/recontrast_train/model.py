"""The ReContrast network: two encoders, one bottleneck, one decoder with a set of heads for each view.

    model = ReContrast("resnet18")
    pairs = model(images)  # pairs[view][level] = (target, reconstruction)

Guo et al., "ReContrast: Domain-Specific Anomaly Detection via Contrastive Reconstruction", NeurIPS 2023, section 3.
Bottleneck and decoder follow reverse distillation (Deng and Li, CVPR 2022): multi-scale fusion, then a reversed ResNet.
"""

from __future__ import annotations

import copy
from typing import Literal, cast

import torch
from torch import Tensor, nn

from recontrast_train.backbones import BACKBONES, BasicBlock, Block, backbone, make_stage

STRIDES = (4, 8, 16)

Pairs = list[list[tuple[Tensor, Tensor]]]
"""``pairs[view][level]`` is (target, reconstruction), each (N, C_l, h_l, w_l). View 0: frozen features as targets."""


class _UpBasicBlock(nn.Module):
    """Mirror of a stride-2 ``BasicBlock``: a 2x2 transposed convolution doubles the resolution."""

    def __init__(self, in_channels: int, channels: int, base_width: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(in_channels, channels, 2, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.upsample = _up_shortcut(in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.upsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(x + identity)


class _UpBottleneck(nn.Module):
    """Mirror of a stride-2 ``Bottleneck``."""

    def __init__(self, in_channels: int, channels: int, base_width: int) -> None:
        super().__init__()
        width = channels * base_width // 64
        out_channels = channels * 4
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.ConvTranspose2d(width, width, 2, 2, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.upsample = _up_shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.upsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.relu(x + identity)


def _up_shortcut(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(in_channels, out_channels, 2, 2, bias=False), nn.BatchNorm2d(out_channels))


def _fuse(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
    )


class FusionBottleneck(nn.Module):
    """Brings the three levels to the deepest one's resolution and width, then halves the resolution once more."""

    def __init__(
        self, channels: tuple[int, int, int], out_channels: int, block: Block, blocks: int, base_width: int
    ) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.fine = nn.Sequential(_fuse(fine, middle), _fuse(middle, coarse))
        self.middle = _fuse(middle, coarse)
        self.stage = make_stage(block, 3 * coarse, out_channels // block.expansion, blocks, 2, base_width)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Features at strides 4, 8, 16 -> (N, out_channels, H / 32, W / 32)."""
        fused = torch.cat([self.fine(levels[0]), self.middle(levels[1]), levels[2]], dim=1)
        out: Tensor = self.stage(fused)
        return out


class Decoder(nn.Module):
    """A reversed ResNet; each stage doubles the resolution. Returns the trunk's levels, finest first, without heads."""

    def __init__(
        self,
        in_channels: int,
        channels: tuple[int, int, int],
        block: Block,
        blocks: tuple[int, int, int],
        base_width: int,
    ) -> None:
        super().__init__()
        up = _UpBasicBlock if block is BasicBlock else _UpBottleneck
        stages = []
        for out_channels, count in zip(reversed(channels), blocks, strict=True):
            planes = out_channels // block.expansion
            rest = [block(out_channels, planes, 1, base_width) for _ in range(1, count)]
            stages.append(nn.Sequential(up(in_channels, planes, base_width), *rest))
            in_channels = out_channels
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        levels: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            levels.insert(0, x)
        return levels


class ReContrast(nn.Module):
    """The whole network.

    Args:
        backbone_name: a key of ``BACKBONES``. Both encoders start from the same initialisation; load weights with
            ``load_encoder_weights``.

    ``train()`` leaves the frozen encoder in eval mode, and the trained one too where ``encoder_bn`` is ``eval``.
    """

    def __init__(self, backbone_name: str, *, encoder_bn: Literal["train", "eval"] = "train") -> None:
        super().__init__()
        entry = backbone(backbone_name)
        self.backbone_name = backbone_name
        self.encoder_bn = encoder_bn
        self.encoder = entry.build()
        self.bottleneck = FusionBottleneck(
            entry.channels, entry.bottleneck_channels, entry.block, entry.blocks[0], entry.base_width
        )
        self.decoder = Decoder(
            entry.bottleneck_channels,
            entry.channels,
            entry.block,
            (entry.blocks[1], entry.blocks[2], entry.blocks[3]),
            entry.base_width,
        )
        # heads[view][level]
        self.heads = nn.ModuleList(
            [nn.ModuleList([nn.Conv2d(channels, channels, 1) for channels in entry.channels]) for _ in range(2)]
        )
        self._initialise()
        self.frozen = copy.deepcopy(self.encoder)
        self.frozen.requires_grad_(False)
        self.train()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def channels(self) -> tuple[int, int, int]:
        """Channels of the three levels."""
        return BACKBONES[self.backbone_name].channels

    def load_encoder_weights(self, weights: Literal["imagenet", "random"] | object) -> str:
        """Load the same pretrained weights into both encoders; see ``backbones.load_weights``."""
        from recontrast_train.backbones import load_weights

        digest = load_weights(self.encoder, self.backbone_name, weights)  # type: ignore[arg-type]
        self.frozen.load_state_dict(self.encoder.state_dict())
        return digest

    def train(self, mode: bool = True) -> ReContrast:
        super().train(mode)
        self.frozen.eval()
        if self.encoder_bn == "eval":
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Pairs:
        """Both views.

        Args:
            images: (N, 3, H, W), normalised; H and W multiples of 32.

        Returns:
            ``pairs[0]``: frozen features, reconstructed from the trained encoder's by head set 0.
            ``pairs[1]``: trained features, reconstructed from the frozen encoder's by head set 1.
            Each head set runs on its own half of the batch only.
        """
        trained = self.encoder(images)
        with torch.no_grad():
            frozen = self.frozen(images)
        both = [torch.cat(pair, dim=0) for pair in zip(trained, frozen, strict=True)]
        trunk = self.decoder(self.bottleneck(both))
        halves = [level.chunk(2, dim=0) for level in trunk]
        targets = (frozen, trained)
        return [
            [(targets[view][level], head(halves[level][view])) for level, head in enumerate(cast(nn.ModuleList, heads))]
            for view, heads in enumerate(self.heads)
        ]
