"""The ReContrast network: two encoders, one bottleneck, one decoder with a set of heads for each view.

    model = ReContrast("resnet18")
    pairs = model(images)  # pairs[view][level] = (target, reconstruction)

Guo et al., "ReContrast: Domain-Specific Anomaly Detection via Contrastive Reconstruction", NeurIPS 2023, section 3.
Bottleneck and decoder follow reverse distillation (Deng and Li, CVPR 2022): multi-scale fusion, then a reversed ResNet.
"""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from recontrast_train.backbones import BACKBONES, BasicBlock, Block, backbone, make_stage
from recontrast_train.discriminator import Discriminator, Pairs, agreements

STRIDES = (4, 8, 16)


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


class Denoised(NamedTuple):
    """What training on altered images compares.

    Attributes:
        pairs: the clean images' features, and what was reconstructed from the altered ones'.
        seen: the altered images' own features, and the same reconstructions.
    """

    pairs: Pairs
    seen: Pairs


class ReContrast(nn.Module):
    """The whole network.

    Pairs are ``pairs[view][level]``, each (target, reconstruction) of shape (N, C_l, h_l, w_l). In view 0 the targets
    are the frozen encoder's features, reconstructed from the trained encoder's by head set 0; in view 1 the other way
    round, by head set 1. Each head set runs on its own half of the batch only.

    Args:
        backbone_name: a key of ``BACKBONES``. Both encoders start from the same initialisation; load weights with
            ``load_encoder_weights``.
        discriminator: with one, see ``discriminator.py``.

    ``train()`` leaves the frozen encoder in eval mode, and the trained one too where ``encoder_bn`` is ``eval``.
    """

    def __init__(
        self, backbone_name: str, *, encoder_bn: Literal["train", "eval"] = "train", discriminator: bool = False
    ) -> None:
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
        # Last, so that the rest begins with the same weights with it as without it.
        self.discriminator = Discriminator(entry.channels) if discriminator else None
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
        """Pairs of the images, (N, 3, H, W), normalised; H and W multiples of 32."""
        trained, frozen = self._features(images)
        reconstructions = self._reconstruct(trained, frozen)
        return _paired((frozen, trained), reconstructions)

    def denoise(self, clean: Tensor, altered: Tensor) -> Denoised:
        """Reconstruct the features of clean images from those of altered ones, as in DRAEM and RD++.

        Args:
            clean: (N, 3, H, W), normalised.
            altered: (M, 3, H, W), the first M of them with pseudo-defects; the others are seen as they are.
        """
        count = len(altered)
        trained, frozen = self._features(torch.cat([altered, clean]))
        seen = [[torch.cat([level[:count], level[2 * count :]]) for level in levels] for levels in (trained, frozen)]
        wanted = [[level[count:] for level in levels] for levels in (trained, frozen)]
        reconstructions = self._reconstruct(*seen)
        return Denoised(
            _paired((wanted[1], wanted[0]), reconstructions),
            _paired((seen[1], seen[0]), reconstructions),
        )

    def _features(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        trained = self.encoder(images)
        with torch.no_grad():
            frozen = self.frozen(images)
        return trained, frozen

    def _reconstruct(self, trained: list[Tensor], frozen: list[Tensor]) -> list[list[Tensor]]:
        """Frozen features from the trained ones, then trained features from the frozen ones."""
        both = [torch.cat(pair, dim=0) for pair in zip(trained, frozen, strict=True)]
        trunk = self.decoder(self.bottleneck(both))
        halves = [level.chunk(2, dim=0) for level in trunk]
        return [
            [head(halves[level][view]) for level, head in enumerate(cast(nn.ModuleList, heads))]
            for view, heads in enumerate(self.heads)
        ]

    def discriminate(self, pairs: Pairs) -> Tensor:
        """(N, 1, H / 4, W / 4) float32 logits of a defect; only with a discriminator."""
        if self.discriminator is None:
            raise ValueError("this model has no discriminator")
        logits: Tensor = self.discriminator(agreements(pairs))
        return logits.float()


def _paired(targets: tuple[list[Tensor], list[Tensor]], reconstructions: list[list[Tensor]]) -> Pairs:
    return [list(zip(*view, strict=True)) for view in zip(targets, reconstructions, strict=True)]
