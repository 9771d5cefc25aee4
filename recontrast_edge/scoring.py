"""From feature pairs to anomaly map and score: the NumPy oracle that every engine and kernel is compared with.

    anomaly_map = fold_maps(level_distances(pairs), size_wh=(256, 256), sigma=4.0)
    score = image_scores(anomaly_map, Scoring())

Guo et al., "ReContrast: Domain-Specific Anomaly Detection via Contrastive Reconstruction", NeurIPS 2023, section 3.4:
the map is the sum over the pairs of ``1 - cos`` along the channels, each upsampled bilinearly (align_corners=True) to
the input size, then blurred by a Gaussian.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.resample import fold_matrix
from recontrast_edge.spec import ModelSpec, Scoring

Float = TypeVar("Float", np.float32, np.float64)

VIEWS = 2
"""Reconstruction pairs per level: frozen features (head set 0) and trained features (head set 1)."""

EPS = 1e-8
"""Lower bound of a feature vector's norm; a zero vector has distance 1 to everything."""


def target_name(view: int, level: int) -> str:
    """Tensor name of an encoder's features in a ``features`` graph."""
    return f"target{view}_{level}"


def reconstruction_name(view: int, level: int) -> str:
    """Tensor name of the decoder's features in a ``features`` graph."""
    return f"reconstruction{view}_{level}"


PROBABILITY_NAME = "defect_probability"
"""In a ``features`` graph what a discriminator found, (N, 1, h_0, w_0) float32; in a ``map`` graph inside of it."""

MAP_NAME = "anomaly_map"
SCORE_NAME = "anomaly_score"
INPUT_NAME = "image"


def feature_shapes(spec: ModelSpec) -> dict[str, tuple[int, int, int]]:
    """(C, h, w) of each output of a ``features`` graph: by view, level, then target and reconstruction.

    A discriminator's probability comes last.
    """
    shapes: dict[str, tuple[int, int, int]] = {}
    for view in range(VIEWS):
        for index, level in enumerate(spec.levels):
            width, height = spec.level_wh(index)
            for name in (target_name(view, index), reconstruction_name(view, index)):
                shapes[name] = (level.channels, height, width)
    if spec.scoring.discriminator_weight is not None:
        width, height = spec.level_wh(0)
        shapes[PROBABILITY_NAME] = (1, height, width)
    return shapes


def cosine_distance(target: NDArray[Float], reconstruction: NDArray[Float]) -> NDArray[Float]:
    """``1 - cos`` along the channels.

    Args:
        target, reconstruction: (N, C, h, w), same shape and dtype.

    Returns:
        (N, h, w) of the same dtype, in [0, 2]; 1 where either vector is zero.
    """
    if target.shape != reconstruction.shape or target.ndim != 4:
        raise ValueError(f"expected two equal (N, C, h, w) shapes, got {target.shape} and {reconstruction.shape}")
    dot = np.einsum("nchw,nchw->nhw", target, reconstruction)
    norm_t = np.sqrt(np.einsum("nchw,nchw->nhw", target, target))
    norm_r = np.sqrt(np.einsum("nchw,nchw->nhw", reconstruction, reconstruction))
    eps = target.dtype.type(EPS)
    distance: NDArray[Float] = 1 - dot / (np.maximum(norm_t, eps) * np.maximum(norm_r, eps))
    return distance


def level_distances(
    pairs: Sequence[Sequence[tuple[NDArray[Float], NDArray[Float]]]],
) -> list[NDArray[Float]]:
    """Distance maps of each level, the views added.

    Args:
        pairs: ``pairs[view][level]`` is (target, reconstruction), each (N, C_l, h_l, w_l).

    Returns:
        One (N, h_l, w_l) a level, in [0, 4] for two views.
    """
    levels = len(pairs[0])
    out: list[NDArray[Float]] = []
    for level in range(levels):
        total = cosine_distance(*pairs[0][level])
        for view in range(1, len(pairs)):
            total = total + cosine_distance(*pairs[view][level])
        out.append(total)
    return out


def weighted(
    distances: Sequence[NDArray[Float]], scoring: Scoring, probability: NDArray[Float] | None = None
) -> list[NDArray[Float]]:
    """What is folded into the map: each level's distances by their weight, then the discriminator's probability.

    Args:
        distances: (N, h_l, w_l) a level.
        scoring: weights; a level of weight 0 is left out.
        probability: (N, h_0, w_0) of a defect, 0..1, of a model with a discriminator, else None.
    """
    if (probability is None) != (scoring.discriminator_weight is None):
        raise ValueError("expected a probability for a model with a discriminator, and for no other")
    weights = level_weights(scoring, len(distances))
    parts = [level * level.dtype.type(weight) for level, weight in zip(distances, weights, strict=True) if weight]
    if probability is not None:
        parts.append(probability * probability.dtype.type(scoring.discriminator_weight))
    return parts


def level_weights(scoring: Scoring, levels: int) -> tuple[float, ...]:
    """What each level's distances count in the map, finest first."""
    return scoring.level_weights or (1.0,) * levels


def fold_maps(distances: Sequence[NDArray[Float]], size_wh: tuple[int, int], sigma: float) -> NDArray[Float]:
    """Upsample, add and blur the levels: ``sum_l R_l d_l C_l^T``.

    Args:
        distances: (N, h_l, w_l) a level.
        size_wh: output (width, height) in pixels.
        sigma: Gaussian sigma in output pixels, 0 for none.

    Returns:
        (N, height, width) of the distances' dtype.
    """
    width, height = size_wh
    total: NDArray[Float] | None = None
    for distance in distances:
        rows = fold_matrix(distance.shape[1], height, sigma).astype(distance.dtype)
        columns = fold_matrix(distance.shape[2], width, sigma).astype(distance.dtype)
        part: NDArray[Float] = rows @ distance @ columns.T
        total = part if total is None else total + part
    if total is None:
        raise ValueError("no distance maps")
    return total


def image_scores(maps: NDArray[Float], scoring: Scoring) -> NDArray[Float]:
    """Image score of each map: its maximum, or the mean of its largest ``top_fraction`` (at least one pixel).

    Args:
        maps: (N, height, width).

    Returns:
        (N,) of the maps' dtype.
    """
    flat = maps.reshape(maps.shape[0], -1)
    if scoring.rule == "max":
        scores: NDArray[Float] = flat.max(axis=1)
        return scores
    count = top_count(flat.shape[1], scoring)
    top = np.partition(flat, flat.shape[1] - count, axis=1)[:, -count:]
    # Sorted, so that the sum does not depend on the order in which partition leaves the pixels.
    top_scores: NDArray[Float] = np.sort(top, axis=1).mean(axis=1, dtype=maps.dtype)
    return top_scores


def top_count(pixels: int, scoring: Scoring) -> int:
    """Pixels that the ``top`` rule averages."""
    return max(1, int(pixels * scoring.top_fraction))
