"""Variations that a line's good parts may show, and pseudo-defects that they never do: from good images alone.

    augmentation = Augmentation(images, recipe)
    batch = augmentation[Draw(iteration=0, indices=(3, 1, 4, 1))]

Variations (mirroring, shift and stretch, exposure) are for products that really vary so. Pseudo-defects are altered
patches whose place is known, as CutPaste (Li et al., CVPR 2021) and DRAEM (Zavrtanik et al., ICCV 2021) make them:
smooth random shapes, thin scratches and patches, filled with other texture, other brightness, blur or a flat tone. They
need not look like real defects; they must only be unlike good texture.

Every draw follows from the seed, the iteration and the place in the batch, so a resumed training sees what an unbroken
one sees.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from recontrast_train.data import Draw, GoodImages
from recontrast_train.recipe import Recipe

Pixels = NDArray[np.float32]
"""(H, W, 3), 0..255, in the network's channel order."""

MASK_STRIDE = 4
"""Pixels of the image a mask cell spans along each axis: the finest level's stride."""

VISIBLE = 4.0
"""Change of a pixel, of 255, from which on it counts as defective; less is lost in a camera's noise."""


class Batch(NamedTuple):
    """One training batch.

    Attributes:
        clean: (N, 3, H, W) float32 good images, normalised.
        altered: (M, 3, H, W) float32, the first M images with pseudo-defects, or None.
        masks: (N, 1, H / 4, W / 4) float32, 1 where the image that is seen has a pseudo-defect; None without.
    """

    clean: Tensor
    altered: Tensor | None
    masks: Tensor | None


class Augmentation(Dataset[Batch]):
    """Good images as batches, varied and altered as the recipe says; without such options they stay as they are."""

    def __init__(self, images: GoodImages, recipe: Recipe) -> None:
        self._images = images
        self._recipe = recipe
        self._scale = 255 * np.array(images.spec.std, np.float32)
        self._offset = 255 * np.array(images.spec.mean, np.float32)

    def __getitem__(self, draw: Draw) -> Batch:
        places = draw.places
        clean = [self._varied(draw.indices[place], draw, place) for place in places]
        count = round(self._recipe.pseudo_defects * len(draw.indices))
        if not count:
            return Batch(torch.stack(clean), None, None)
        altered, masks = [], []
        for tensor, place in zip(clean, places, strict=True):
            if place >= count:
                break
            pixels = self._pixels(tensor)
            changed = self._altered(pixels, self._generator(draw, place, 1)).clip(0, 255)
            altered.append(self._tensor(changed))
            masks.append(np.abs(changed - pixels).max(axis=2))
        images = torch.stack(clean)
        # A process that shares its batch with others may have no altered image of it.
        seen = torch.stack(altered) if altered else images[:0]
        cells = images.new_zeros(len(clean), 1, images.shape[2] // MASK_STRIDE, images.shape[3] // MASK_STRIDE)
        if masks:
            mask = torch.from_numpy(np.stack(masks))[:, None] > VISIBLE
            cells[: len(masks)] = torch.nn.functional.max_pool2d(mask.float(), MASK_STRIDE)
        return Batch(images, seen, cells)

    def _generator(self, draw: Draw, place: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._recipe.seed, 4, draw.iteration, place, purpose])

    def _pixels(self, tensor: Tensor) -> Pixels:
        pixels: Pixels = tensor.numpy().transpose(1, 2, 0) * self._scale + self._offset
        return pixels

    def _tensor(self, pixels: Pixels) -> Tensor:
        values = (pixels - self._offset) / self._scale
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

    def _varied(self, index: int, draw: Draw, place: int) -> Tensor:
        recipe, tensor = self._recipe, self._images[index]
        if not (recipe.mirror_x or recipe.mirror_y or recipe.shift or recipe.stretch or recipe.exposure_stops):
            return tensor
        rng = self._generator(draw, place, 0)
        pixels = self._pixels(tensor)
        if recipe.mirror_x and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        if recipe.mirror_y and rng.random() < 0.5:
            pixels = pixels[::-1]
        if recipe.shift or recipe.stretch:
            pixels = _moved(np.ascontiguousarray(pixels), recipe.shift, recipe.stretch, rng)
        if recipe.exposure_stops:
            pixels = pixels * np.float32(2 ** rng.uniform(-recipe.exposure_stops, recipe.exposure_stops))
        return self._tensor(pixels.clip(0, 255))

    def _altered(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """With one to three pseudo-defects."""
        for _ in range(rng.integers(1, 4)):
            shape = (_blobs, _scratch, _patch)[rng.choice(3, p=(0.4, 0.3, 0.3))]
            weight = _blurred(shape(pixels.shape[1], pixels.shape[0], rng), rng.uniform(0.5, 1.5))
            pixels = pixels + weight[:, :, None] * (self._filling(pixels, rng) - pixels)
        return pixels

    def _filling(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        share = np.float32(rng.uniform(0.3, 1.0))
        kind = rng.random()
        if kind < 0.4:
            other = self._pixels(self._images[int(rng.integers(len(self._images)))])
            other = np.roll(other, (rng.integers(other.shape[0]), rng.integers(other.shape[1])), axis=(0, 1))
            if rng.random() < 0.5:
                other = other * (pixels.mean() / max(other.mean(), 1.0))
            return pixels + share * (other - pixels)
        if kind < 0.75:
            return pixels * np.float32(rng.uniform(0.4, 1.4))
        if kind < 0.9:
            return _blurred(pixels, rng.uniform(1.5, 5.0)) * np.float32(rng.uniform(0.8, 1.15))
        # Equal channels: a grey camera must not learn that colour is what makes a defect.
        return pixels + share * (np.float32(rng.uniform(0, 255)) - pixels)


def _moved(pixels: Pixels, shift: float, stretch: float, rng: np.random.Generator) -> Pixels:
    height, width = pixels.shape[:2]
    scale_x, scale_y = np.exp(rng.uniform(-stretch, stretch, 2))
    left, top = rng.uniform(-shift, shift, 2) * (width, height)
    matrix = np.array(
        [[scale_x, 0, width / 2 * (1 - scale_x) + left], [0, scale_y, height / 2 * (1 - scale_y) + top]], np.float32
    )
    moved = cv2.warpAffine(pixels, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(moved, np.float32)


def _blurred(image: Pixels, sigma: float) -> Pixels:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32)


def _blobs(width: int, height: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """The peaks of smooth noise, of a size between specks and a tenth of the image; mostly within a window."""
    longest = max(width, height)
    grain = float(np.exp(rng.uniform(np.log(1.5), np.log(0.1 * longest))))
    # Drawn at half the grain and enlarged: smooth noise at full size would cost more than the network.
    step = max(1, int(grain / 2))
    noise = rng.standard_normal((height // step + 1, width // step + 1)).astype(np.float32)
    noise = np.asarray(cv2.resize(_blurred(noise, max(0.6, grain / step)), (width, height)), np.float32)
    weight = (noise > noise.std() * rng.uniform(1.2, 2.6)).astype(np.float32)
    if rng.random() < 0.7:
        window = np.zeros_like(weight)
        w, h = int(rng.uniform(0.08, 0.6) * width), int(rng.uniform(0.08, 0.6) * height)
        x, y = rng.integers(width - w), rng.integers(height - h)
        window[y : y + h, x : x + w] = 1
        weight *= window
    return weight


def _scratch(width: int, height: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A bent line, one to three pixels thick, up to a third of the image long."""
    weight = np.zeros((height, width), np.float32)
    step = rng.uniform(0.03, 0.35) * max(width, height) / 5
    angle = rng.uniform(0, np.pi)
    point = rng.uniform(0, 1, 2) * (width, height)
    points = [point]
    for _ in range(5):
        angle += rng.normal(0, 0.35)
        point = point + step * np.array([np.cos(angle), np.sin(angle)])
        points.append(point)
    cv2.polylines(weight, [np.array(points).astype(np.int32)], False, 1.0, int(rng.integers(1, 4)))
    return weight


def _patch(width: int, height: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A rectangle, slightly turned, of 6 pixels to more than half of the image a side."""
    weight = np.zeros((height, width), np.float32)
    sides = np.exp(rng.uniform(np.log(6), np.log((0.6 * width, 0.6 * height))))
    x, y = rng.uniform(0, 1, 2) * (width, height)
    corners = cv2.boxPoints(((x, y), (sides[0], sides[1]), rng.uniform(-15, 15)))
    cv2.fillPoly(weight, [corners.astype(np.int32)], 1.0)
    return weight
