"""Training images that a person should look at before they are trusted to be good: those least like the others.

    ranked = rank_suspects(encoder, images := GoodImages(paths, input_spec))
    write_suspects(Path("suspects.csv"), ranked, images)

Each position of an image is compared with the other images, in the pretrained features of strides 8 and 16 as PatchCore
(Roth et al., CVPR 2022) takes them. Where it is known which images show one part, its distance is that to the nearest
image of another part; else that to the image of third-nearest likeness, so that a defect that two other images share
still stands out. An image's score is its largest distance. No trained model is needed: the list comes before training.

    ranked = with_model(ranked, scores)  # of the trained model, which has seen what is good about most images

``docs/training.md`` has figures.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from recontrast_edge.errors import UsageError
from recontrast_edge.images import atomic_write
from recontrast_train.data import GoodImages

NEIGHBOUR = 3
"""Which of the other images, by likeness, a position's distance is measured to where parts are not known."""

BANK = 20_000
"""Positions kept of all images together; of more, each image gives equally many, drawn at random."""

DIMENSIONS = 256
"""Features with more channels are projected to so many: that keeps distances well enough for ranking."""

CHUNK = 1024
"""Positions compared at once, which bounds the memory to 80 MB."""

SHEET_IMAGES = 24
_COLUMNS = 6


@dataclass(frozen=True, eq=False)
class Suspect:
    """One training image; of one that is cut into tiles, its most suspicious tile.

    Attributes:
        index: of the image, or tile, among the training images.
        path: of the image.
        score: its largest distance; comparable within one ranking only.
        relative: the score as a multiple of the median score of all training images.
        heat: (h, w) float32 distances at stride 8.
        by_model: the trained model's score of the image, as such a multiple; None before training.
    """

    index: int
    path: Path
    score: float
    relative: float
    heat: NDArray[np.float32]
    by_model: float | None = None


def rank_suspects(
    encoder: nn.Module, images: GoodImages, *, parts: Sequence[str] | None = None, seed: int = 0
) -> list[Suspect]:
    """All training images, the most suspicious first.

    Args:
        encoder: pretrained, in eval mode; gives the features at strides 4, 8 and 16.
        images: at least 2.
        parts: the part that each image, or tile, shows; at least 2. None where that is not known.
        seed: of the draws.

    Raises:
        UsageError: fewer than 2 images or parts.
        InputError: an image cannot be read.
    """
    count = len(images)
    if count < 2 or (parts is not None and len(set(parts)) < 2):
        what = "parts, for they are told by their names" if count >= 2 else "images"
        raise UsageError(f"--suspects compares images with each other; expected at least 2 {what}, got 1")
    own = torch.arange(count) if parts is None else torch.from_numpy(np.unique(parts, return_inverse=True)[1])
    neighbour = 1 if parts is not None else min(NEIGHBOUR, count - 1)
    generator = torch.Generator().manual_seed(seed)
    share = max(1, BANK // count)
    bank = torch.stack([_draw(features, share, generator) for features, _ in _features(encoder, images, seed)])
    squares = bank.square().sum(2)
    heats: list[NDArray[np.float32]] = []
    for index, (features, size_hw) in enumerate(_features(encoder, images, seed)):
        to_images = torch.cat([_to_images(some, bank, squares) for some in features.split(CHUNK)])
        to_images[:, (own == own[index]).to(to_images.device)] = torch.inf
        nearest = to_images.topk(neighbour, dim=1, largest=False).values[:, -1].clamp_min(0).sqrt()
        heat = functional.avg_pool2d(nearest.reshape(1, 1, *size_hw), 3, 1, 1, count_include_pad=False)
        heats.append(heat[0, 0].cpu().numpy())
    scores = np.array([heat.max() for heat in heats])
    median = max(float(np.median(scores)), 1e-12)
    ranked: dict[Path, Suspect] = {}
    for index in map(int, np.argsort(-scores, kind="stable")):
        path, score = images.path(index), float(scores[index])
        ranked.setdefault(path, Suspect(index, path, score, score / median, heats[index]))
    return list(ranked.values())


def with_model(suspects: Sequence[Suspect], scores: Sequence[float]) -> list[Suspect]:
    """Ranked anew by distances and the trained model's scores together: the sum of both, standardised.

    A model is shown the defects as if they were good, but so few of them that it hardly learns them; and where it also
    learnt from pseudo-defects it knows what tells a defect from a rare good place.

    Args:
        suspects: of ``rank_suspects``.
        scores: of their images by the model, finite, in the same order.
    """
    by_model = np.array(scores, np.float64)
    together = _standardised(np.array([suspect.score for suspect in suspects])) + _standardised(by_model)
    median = max(float(np.median(by_model)), 1e-12)
    return [
        replace(suspects[index], by_model=float(by_model[index]) / median)
        for index in np.argsort(-together, kind="stable")
    ]


def _standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((values - values.mean()) / max(float(values.std()), 1e-12), np.float64)


def _to_images(features: Tensor, bank: Tensor, squares: Tensor) -> Tensor:
    """Squared distances from (p, C) positions to the nearest of each image's in the (n, m, C) bank: (p, n)."""
    products = torch.einsum("pc,nmc->pnm", features, bank)
    return (features.square().sum(1)[:, None, None] + squares - 2 * products).amin(2)


def _features(encoder: nn.Module, images: GoodImages, seed: int) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Of one image after the other: features (positions, C) and the grid's (height, width)."""
    device = next(encoder.parameters()).device
    projection: Tensor | None = None
    for index in range(len(images)):
        with torch.inference_mode():
            levels = encoder(images[index][None].to(device))
            middle, coarse = (functional.avg_pool2d(level.float(), 3, 1, 1) for level in levels[1:])
            size_hw = (middle.shape[2], middle.shape[3])
            coarse = functional.interpolate(coarse, size_hw, mode="bilinear", align_corners=False)
            features = torch.cat([middle, coarse], dim=1)[0].flatten(1).T
            if features.shape[1] > DIMENSIONS:
                if projection is None:
                    normal = torch.randn(features.shape[1], DIMENSIONS, generator=torch.Generator().manual_seed(seed))
                    projection = (normal / DIMENSIONS**0.5).to(device)
                features = features @ projection
            yield features.contiguous(), size_hw


def _draw(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if count >= len(features):
        return features
    return features[torch.randperm(len(features), generator=generator)[:count].to(features.device)]


def _picture(images: GoodImages, index: int) -> NDArray[np.float32]:
    spec = images.spec
    rgb = images[index].numpy().transpose(1, 2, 0) * np.array(spec.std) + np.array(spec.mean)
    return np.asarray(rgb.clip(0, 1), np.float32)


def sheet_path(path: Path) -> Path:
    """Where the pictures go that belong to a ranking."""
    return path.with_suffix(".png")


def write_suspects(path: Path, suspects: Sequence[Suspect], images: GoodImages) -> None:
    """Write the ranking as CSV, and a sheet of the first ones beside it, ``sheet_path(path)``.

    Raises:
        OutputError: a file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "image", "score", "times_median", "model_times_median"])
    for rank, suspect in enumerate(suspects, 1):
        by_model = "" if suspect.by_model is None else f"{suspect.by_model:.3f}"
        writer.writerow([rank, suspect.path, f"{suspect.score:.6g}", f"{suspect.relative:.3f}", by_model])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))
    with atomic_write(sheet_path(path)) as file:
        file.write(_sheet(suspects[:SHEET_IMAGES], images))


def _sheet(shown: Sequence[Suspect], images: GoodImages) -> bytes:
    """Images with their suspicious places outlined, as PNG."""
    rows = -(-len(shown) // _COLUMNS)
    figure = Figure(figsize=(2.4 * _COLUMNS, 2.75 * rows + 0.4), layout="constrained")
    figure.suptitle("Least like the others; outlined is what made them so. Times: score by the median of all")
    grid = np.asarray(figure.subplots(rows, _COLUMNS, squeeze=False)).ravel()
    for axes in grid:
        axes.set_axis_off()
    for rank, (axes, suspect) in enumerate(zip(grid[: len(shown)], shown, strict=True), 1):
        picture = _picture(images, suspect.index)
        axes.imshow(picture)
        # Centres of the heat's cells in the picture's pixels.
        (height, width), (heat_height, heat_width) = picture.shape[:2], suspect.heat.shape
        y = (np.arange(heat_height) + 0.5) * height / heat_height - 0.5
        x = (np.arange(heat_width) + 0.5) * width / heat_width - 0.5
        # Half way from the image's usual distance to its largest, so that every image shows one place at least.
        level = (float(np.median(suspect.heat)) + float(suspect.heat.max())) / 2
        if min(suspect.heat.shape) > 1 and level < suspect.heat.max():
            axes.contour(x, y, suspect.heat, levels=[level], colors="#ff3b30", linewidths=1.5)
        # The name's bytes may be no text.
        name = os.fsencode(suspect.path.name).decode(errors="replace")
        name = name if len(name) <= 26 else f"...{name[-23:]}"
        # A dollar sign in a file's name is no formula.
        by_model = "" if suspect.by_model is None else f", model {suspect.by_model:.2f}"
        axes.set_title(f"{rank}: {suspect.relative:.2f} times{by_model}\n{name}", fontsize=8, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
