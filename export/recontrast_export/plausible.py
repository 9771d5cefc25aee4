"""Refuse calibration images that do not look like the model's good parts: noise, empty frames, another product.

    require_good_images(engine, paths)  # InputError if not

The model itself is asked. Does it see a structure? Then its map changes when the same pixels are put into random order;
for noise and for empty frames it does not (measured, of the map's mean: by 0 to 3 %, and for good parts by a factor of
2 to 8). Do the images score as good ones do: not nearly all of them above the training images, where the model knows
the scores of these, and most of them below its threshold, where it has one?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recontrast_edge.calibration import score_shift
from recontrast_edge.datasets import Sample
from recontrast_edge.engines import Engine
from recontrast_edge.errors import InputError
from recontrast_edge.images import read_image
from recontrast_edge.preprocess import Image
from recontrast_export.parity import spread

MAX_IMAGES = 16
"""Of more images a sample is looked at."""

MIN_CHANGE = 0.05
"""Least median change of the mean map, as a share of it, that shuffled pixels must make."""

MAX_SHARE_ABOVE_TRAINING = 0.98
"""Largest probability that one of the images scores higher than a training image. Held-out good parts score somewhat
higher than those trained on, so that 0.6 to 0.9 is nothing unusual."""

MAX_REJECTED = 0.5
"""Largest share of the images above the model's threshold."""


def require_good_images(engine: Engine, paths: Sequence[Path]) -> None:
    """Look at a sample of the images.

    Args:
        engine: the FP32 model; its threshold counts if it was derived from this very engine.
        paths: at least one image.

    Raises:
        InputError: they are noise, empty, or do not score as good parts do; or one is damaged.
    """
    rng = np.random.default_rng(0)
    changes, scores = [], []
    for sample in spread([Sample(path) for path in paths], MAX_IMAGES):
        image = read_image(sample.path)
        seen = engine.infer([image])
        shuffled = engine.infer([_shuffled(image, rng)])
        changes.append(abs(math.log(float(shuffled.maps.mean()) / max(float(seen.maps.mean()), 1e-9))))
        scores.append(float(seen.scores[0]))
    advice = "expected images of good parts, as the model was trained on; INT8 scales from others would be wrong"
    change = math.expm1(float(np.median(changes)))
    if not change >= MIN_CHANGE:
        raise InputError(
            "the calibration images look like noise or empty frames: with their pixels in random order the model's map "
            f"changes by only {100 * change:.1f} % (expected {100 * MIN_CHANGE:.0f} % or more); {advice}"
        )
    shift = score_shift(scores, engine.spec.training.good_scores)
    if shift is not None and shift.share > MAX_SHARE_ABOVE_TRAINING:
        raise InputError(
            f"of {len(scores)} calibration images and the training images, a calibration image scores higher with "
            f"probability {shift.share:.3f} (expected at most {MAX_SHARE_ABOVE_TRAINING}); {advice}"
        )
    threshold = engine.spec.threshold
    if threshold is not None and threshold.engine_sha256 == engine.sha256:
        rejected = int(np.count_nonzero(np.array(scores) > threshold.value))
        if rejected > MAX_REJECTED * len(scores):
            raise InputError(
                f"the model rejects {rejected} of {len(scores)} calibration images at its threshold "
                f"{threshold.value:.4g}; {advice}"
            )


def _shuffled(image: Image, rng: np.random.Generator) -> Image:
    """The same pixels, colours kept together, in random order."""
    pixels = image.reshape(-1, *image.shape[2:])
    return np.ascontiguousarray(rng.permutation(pixels, axis=0).reshape(image.shape))
