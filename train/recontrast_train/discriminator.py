"""A small network that learns where features and reconstruction disagree as defects make them, not as texture does.

    logits = Discriminator((256, 512, 1024))(agreements(pairs))

Cosine distances alone are as large at rare but good texture (bright streaks, edges) as at faint defects. Which channels
disagree tells the two apart. As in DRAEM (Zavrtanik et al., ICCV 2021) and DeSTSeg (Zhang et al., CVPR 2023) that is
learnt from pseudo-defects on good images; the input, the summands of each pair's cosine, is that of DeSTSeg.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from recontrast_edge.scoring import EPS

Pairs = list[list[tuple[Tensor, Tensor]]]

WIDTH = 64
"""Channels a level is brought to."""

FOCUS = 2.0
"""Exponent of the focal loss (Lin et al., ICCV 2017)."""

FOCAL_SHARE = 10.0
"""Weight of the focal loss beside the absolute error."""


def agreements(pairs: Pairs) -> list[Tensor]:
    """What each channel adds to a pair's cosine.

    Args:
        pairs: ``pairs[view][level]`` is (target, reconstruction), each (N, C_l, h_l, w_l).

    Returns:
        (N, 2 * C_l, h_l, w_l) float32 a level, the views one after the other, times ``sqrt(C_l)`` so that the size of
        a summand does not depend on the number of channels.
    """
    out = []
    for level in range(len(pairs[0])):
        views = []
        for view in pairs:
            target, reconstruction = (features.float() for features in view[level])
            norms = (features.square().sum(1, keepdim=True).sqrt() for features in (target, reconstruction))
            target_norm, reconstruction_norm = (norm.clamp_min(EPS) for norm in norms)
            summands = target * reconstruction / (target_norm * reconstruction_norm)
            views.append(summands * target.shape[1] ** 0.5)
        out.append(torch.cat(views, dim=1))
    return out


class Discriminator(nn.Module):
    """Coarse to fine: each level is narrowed, joined to what the coarser ones found, and convolved.

    Args:
        channels: of the three levels' features, finest first.
    """

    def __init__(self, channels: tuple[int, int, int]) -> None:
        super().__init__()
        self.fine, self.middle, self.coarse = (_convolution(2 * count, WIDTH, 1) for count in channels)
        self.coarse_stage = _convolution(WIDTH, WIDTH, 3)
        self.to_middle = nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2)
        self.middle_stage = _convolution(2 * WIDTH, WIDTH, 3)
        self.to_fine = nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2)
        self.fine_stage = _convolution(2 * WIDTH, WIDTH // 2, 3)
        self.last = nn.Conv2d(WIDTH // 2, 1, 1)
        # Most of every image is good: training begins by saying so.
        nn.init.constant_(self.last.bias, -3.0)  # type: ignore[arg-type]

    def forward(self, levels: list[Tensor]) -> Tensor:
        """``agreements`` -> (N, 1, h_0, w_0) logits of a defect, at the finest level's resolution."""
        x = self.coarse_stage(self.coarse(levels[2]))
        x = self.middle_stage(torch.cat([self.to_middle(x), self.middle(levels[1])], dim=1))
        x = self.fine_stage(torch.cat([self.to_fine(x), self.fine(levels[0])], dim=1))
        logits: Tensor = self.last(x)
        return logits


def _convolution(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, 1, kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def discriminator_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Focal loss, which lets the many easy positions count little, and the mean absolute error.

    Args:
        logits: (N, 1, h, w).
        masks: (N, 1, h, w) float32, 1 where the image has a pseudo-defect, else 0.
    """
    logits = logits.float()
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    probability = torch.sigmoid(logits)
    error = (probability - masks).abs()
    return FOCAL_SHARE * (error**FOCUS * cross_entropy).mean() + error.mean()
