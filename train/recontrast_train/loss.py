"""Global cosine loss with stop-gradient and hard mining.

    loss = recontrast_loss(model(images), alpha=mining_alpha(iteration, total))
    loss.backward()

Guo et al. 2023, sections 3.2 and 3.3: the distance of whole flattened feature maps, whose gradient is kept only at the
positions that are still hard to reconstruct.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from recontrast_train.discriminator import Pairs
from recontrast_train.distributed import mean_and_std


def mining_alpha(iteration: int, iterations: int, *, start: float = -3.0, end: float = 1.0, ramp: float = 0.1) -> float:
    """Mining strength: from ``start`` linearly to ``end`` over the first ``ramp`` of the iterations, then ``end``."""
    last = iterations * ramp
    return start + (end - start) * min(iteration, last) / last


def easy_positions(target: Tensor, reconstruction: Tensor, alpha: float) -> Tensor:
    """Positions whose distance is under ``mean + alpha * std``, both over positions and batch: the whole one, if
    several processes share it.

    Args:
        target, reconstruction: (N, C, h, w).

    Returns:
        (N, 1, h, w) bool.
    """
    with torch.no_grad():
        distance = 1 - functional.cosine_similarity(target, reconstruction, dim=1)
        mean, std = mean_and_std(distance)
        threshold = mean + alpha * std
        return (distance < threshold).unsqueeze(1)


def pair_loss(target: Tensor, reconstruction: Tensor, alpha: float) -> Tensor:
    """``mean(1 - cos(flatten(sg(target)), flatten(reconstruction)))``; no gradient at easy positions.

    Args:
        target, reconstruction: (N, C, h, w); computed in float32 whatever their dtype.
        alpha: mining strength, see ``mining_alpha``.

    Returns:
        Scalar.
    """
    target = target.detach().float()
    # A view, because a hook on the tensor itself would mask what flows into it from elsewhere too.
    reconstruction = reconstruction.float().view_as(reconstruction)
    if reconstruction.requires_grad:
        easy = easy_positions(target, reconstruction, alpha)
        reconstruction.register_hook(lambda gradient: gradient.masked_fill(easy, 0.0))
    return (1 - functional.cosine_similarity(target.flatten(1), reconstruction.flatten(1), dim=1)).mean()


def recontrast_loss(pairs: Pairs, alpha: float) -> Tensor:
    """Half the sum over the levels for each view, added."""
    total = pairs[0][0][1].new_zeros((), dtype=torch.float32)
    for view in pairs:
        for target, reconstruction in view:
            total = total + pair_loss(target, reconstruction, alpha) / len(pairs)
    return total
