"""Score images with a PyTorch model by the same rules as the engines: the reference of every export.

inference = TorchScorer(model, spec)(images)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from recontrast_edge.calibration import SHIFT_MIN_IMAGES
from recontrast_edge.datasets import Sample, file_sha256
from recontrast_edge.engines import Inference
from recontrast_edge.evaluation import score_samples
from recontrast_edge.preprocess import Image, preprocess
from recontrast_edge.scoring import fold_maps, image_scores, level_distances, weighted
from recontrast_edge.spec import IMAGE_DIGEST_DIGITS, ModelSpec
from recontrast_edge.tiling import infer_tiles
from recontrast_train.data import GoodImages
from recontrast_train.model import ReContrast

TRAINING_SCORES = 200
"""Training images whose scores go into the spec: enough to notice a shift of a fifth of the scores' spread. Images of
many tiles take long to judge; of those, fewer."""

TILES_AT_ONCE = 8
"""Tiles in one batch, which bounds the memory."""


class TorchScorer:
    """FP32 network in PyTorch, distances and map by the NumPy oracle.

    Args:
        model: put in eval mode here.
        spec: input and scoring rules.
    """

    def __init__(self, model: ReContrast, spec: ModelSpec) -> None:
        self._model = model.eval()
        self._spec = spec
        self._device = next(model.parameters()).device

    def __call__(self, images: Sequence[Image]) -> Inference:
        """Maps (N, H, W) and scores (N,) of uint8 images, (H, W) mono or (H, W, 3) BGR."""
        if self._spec.input.is_tiled:
            return infer_tiles(self._infer, images, self._spec, batch=TILES_AT_ONCE)
        return self._infer(images)

    def _infer(self, images: Sequence[Image]) -> Inference:
        input_spec = self._spec.input.of_tile
        start = time.perf_counter()
        tensor = torch.from_numpy(np.stack([preprocess(image, input_spec) for image in images]))
        prepared = time.perf_counter()
        with torch.inference_mode():
            pairs = self._model(tensor.to(self._device))
            probability = None
            if self._model.discriminator is not None:
                probability = torch.sigmoid(self._model.discriminate(pairs))[:, 0].cpu().numpy()
        arrays = [[(a.cpu().numpy(), b.cpu().numpy()) for a, b in view] for view in pairs]
        scoring = self._spec.scoring
        parts = weighted(level_distances(arrays), scoring, probability)
        maps = fold_maps(parts, input_spec.size_wh, scoring.blur_sigma)
        scores = image_scores(maps, scoring)
        stages = {"preprocess": (prepared - start) * 1e3, "infer": (time.perf_counter() - prepared) * 1e3}
        return Inference(maps, scores, stages)


def level_spreads(model: ReContrast, images: GoodImages) -> tuple[float, ...]:
    """Standard deviation of each level's distances, the views added, over positions of good images.

    Args:
        model: put in eval mode here.
        images: the training images, or tiles; at most ``TRAINING_SCORES`` are used, spread over them.
    """
    model.eval()
    device = next(model.parameters()).device
    chosen = np.linspace(0, len(images) - 1, min(len(images), TRAINING_SCORES)).round().astype(int)
    values: list[list[NDArray[np.float32]]] = [[] for _ in model.channels]
    for index in chosen:
        with torch.inference_mode():
            pairs = model(images[int(index)][None].to(device))
        arrays = [[(a.cpu().numpy(), b.cpu().numpy()) for a, b in view] for view in pairs]
        for level, distances in enumerate(level_distances(arrays)):
            values[level].append(distances.ravel())
    # A level without any spread would be divided by nothing.
    return tuple(max(float(np.concatenate(level).std(dtype=np.float64)), 1e-6) for level in values)


def with_training_images(spec: ModelSpec, model: ReContrast, paths: Sequence[Path]) -> ModelSpec:
    """The spec with what tells training images from others: their digests, and how the model scores some of them.

    ``calibrate`` needs that: a threshold that rests on images the model has seen rejects more good parts than promised.

    Args:
        spec: of the trained model.
        model: put in eval mode here.
        paths: all training images, in natural order; the scored ones are spread over them.

    Raises:
        InputError, ModelError: as ``evaluation.score_samples``.
    """
    count = min(len(paths), max(SHIFT_MIN_IMAGES, TRAINING_SCORES // spec.input.n_tiles))
    chosen = np.linspace(0, len(paths) - 1, count).round().astype(int)
    scored = score_samples(TorchScorer(model, spec), [Sample(paths[index]) for index in chosen], spec)
    training = spec.training.model_copy(
        update={
            "image_digests": tuple(file_sha256(path)[:IMAGE_DIGEST_DIGITS] for path in paths),
            "good_scores": tuple(sorted(float(each.score) for each in scored)),
        }
    )
    return spec.model_copy(update={"training": training})
