"""The parity gate: an exported or built model must give the maps and scores of its reference, on images.

    report = compare(TorchScorer(model, spec), engine.infer, read_images([Path("tiles")]))
    report.enforce(FP32_TOLERANCE)  # GateError if not

Nothing here knows what reference and candidate are, so the same gate serves every conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.datasets import Sample, find_dataset
from recontrast_edge.engines import Inference
from recontrast_edge.errors import GateError, InputError
from recontrast_edge.images import IMAGE_SUFFIXES, read_image
from recontrast_edge.preprocess import Image
from recontrast_edge.spec import InputSpec
from recontrast_edge.synthetic import SyntheticLine

MIN_IMAGES = 8
"""Fewer say too little about maps and nothing about the order of scores."""

MAX_IMAGES = 16
"""Of more images a sample is taken: parity is a property of the conversion, not of the data."""

Infer = Callable[[Sequence[Image]], Inference]


@dataclass(frozen=True)
class Tolerance:
    """How far a candidate may be from its reference; both as shares of the map's range (maximum - minimum).

    Attributes:
        map_error: largest error of any pixel, relative to the range of its own image's map.
        tie: reference scores closer than this, relative to the widest range of a map, count as equal and may swap.
    """

    map_error: float
    tie: float


FP32_TOLERANCE = Tolerance(map_error=1e-3, tie=1e-5)
"""For float32 weights. Rounding alone gives errors of about 1e-6; the tie bound leaves room for nothing else."""

# The 1e-6 above is between libraries on CPUs, which sum in similar order. A GPU's kernels split sums over threads and
# transform convolutions (Winograd, FFT), and what that rounds differently grows with the depth of the network.
GPU_FP32_TOLERANCE = Tolerance(map_error=1e-3, tie=1e-4)
"""For float32 on a GPU against float32 on a CPU."""


@dataclass(frozen=True, eq=False)
class ParityImage:
    """An image to compare on, its name and what it shows: ``good``, a kind of defect, or empty where unknown."""

    name: str
    kind: str
    image: Image


@dataclass(frozen=True, eq=False)
class ParitySet:
    """Images to compare on.

    Attributes:
        images: at least ``MIN_IMAGES``.
        source: where they come from, for people.
    """

    images: tuple[ParityImage, ...]
    source: str


@dataclass(frozen=True, eq=False)
class ParityReport:
    """What a comparison found; arrays have one entry an image, in the order of ``on.images``.

    Attributes:
        on: what was compared on.
        map_ranges: maximum - minimum of the reference's map.
        map_errors: largest absolute difference of the two maps.
        reference_scores, candidate_scores: image scores.
    """

    on: ParitySet
    map_ranges: NDArray[np.float64]
    map_errors: NDArray[np.float64]
    reference_scores: NDArray[np.float64]
    candidate_scores: NDArray[np.float64]

    @property
    def relative_map_errors(self) -> NDArray[np.float64]:
        """``map_errors`` as shares of ``map_ranges``."""
        # A flat reference map leaves nothing to compare with; it is given the smallest range instead of none.
        return self.map_errors / np.maximum(self.map_ranges, np.finfo(np.float32).tiny)

    @property
    def score_errors(self) -> NDArray[np.float64]:
        """Absolute differences of the scores."""
        return np.abs(self.candidate_scores - self.reference_scores)

    def swapped(self, tolerance: Tolerance) -> list[tuple[int, int]]:
        """Pairs (a, b) of images that the reference scores a > b, by more than a tie, and the candidate does not."""
        ahead = self.reference_scores[:, None] - self.reference_scores[None, :]
        kept = self.candidate_scores[:, None] > self.candidate_scores[None, :]
        pairs = np.argwhere((ahead > tolerance.tie * self.map_ranges.max()) & ~kept)
        return [(int(a), int(b)) for a, b in pairs]

    def enforce(self, tolerance: Tolerance) -> None:
        """Pass, or refuse.

        Raises:
            GateError: a map error over the tolerance, a swapped pair of scores, or numbers that are not finite.
        """
        worst = int(np.argmax(np.nan_to_num(self.relative_map_errors, nan=np.inf)))
        error = self.relative_map_errors[worst]
        # Written so that NaN is refused.
        if not error <= tolerance.map_error:
            raise GateError(
                f"the model does not reproduce its reference: on {self.on.images[worst].name} the map is off by "
                f"{error:.2e} of its range, expected at most {tolerance.map_error:.0e}; nothing was written"
            )
        swapped = self.swapped(tolerance)
        if swapped or not np.isfinite(self.candidate_scores).all():
            names = [f"{self.on.images[a].name} over {self.on.images[b].name}" for a, b in swapped[:3]]
            raise GateError(
                f"the model does not reproduce its reference: it orders {len(swapped)} pair(s) of images differently "
                f"by score (expected {', '.join(names) or 'finite scores'}); nothing was written"
            )


def compare(reference: Infer, candidate: Infer, on: ParitySet) -> ParityReport:
    """Run both on every image, one at a time.

    Raises:
        InputError: an image that the model cannot take, such as one without its ROI.
    """
    # One after the other, not in turns: thread pools of two libraries that spin for the same cores cost tenfold.
    expected = [reference([entry.image]) for entry in on.images]
    got = [candidate([entry.image]) for entry in on.images]
    rows = []
    for found, wanted in zip(got, expected, strict=True):
        error = np.abs(found.maps[0].astype(np.float64) - wanted.maps[0]).max()
        rows.append((np.ptp(wanted.maps[0]), error, wanted.scores[0], found.scores[0]))
    columns = np.array(rows, dtype=np.float64).T
    return ParityReport(on, *columns)


def read_images(paths: Sequence[Path]) -> ParitySet:
    """At most ``MAX_IMAGES`` of the images given, spread evenly; half of them defective where that is possible.

    Args:
        paths: image files, folders of images, MVTec-layout data sets (their test images, if there are any), and text
            files that list images.

    Raises:
        InputError: one of them is missing or damaged, or there are fewer than ``MIN_IMAGES`` in all.
    """
    samples: list[Sample] = []
    for path in paths:
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir():
            samples.append(Sample(path, kind=""))
        else:
            dataset = find_dataset(path)
            samples += dataset.test or dataset.train_good
    if len(samples) < MIN_IMAGES:
        raise InputError(
            f"the parity gate needs at least {MIN_IMAGES} images, got {len(samples)} from "
            f"{', '.join(map(str, paths))}; give a folder with more"
        )
    good = [sample for sample in samples if sample.is_good]
    others = [sample for sample in samples if not sample.is_good]
    n_others = min(len(others), max(MAX_IMAGES // 2, MAX_IMAGES - len(good)))
    chosen = spread(good, MAX_IMAGES - n_others) + spread(others, n_others)
    images = tuple(ParityImage(sample.path.name, sample.kind, read_image(sample.path)) for sample in chosen)
    return ParitySet(images, f"{len(images)} of {len(samples)} images in {', '.join(map(str, paths))}")


_Item = TypeVar("_Item")


def spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most ``count`` of the items, from the first to the last."""
    count = min(count, len(items))
    return [items[index] for index in np.linspace(0, len(items) - 1, count).round().astype(int)]


def synthetic_images(spec: InputSpec) -> ParitySet:
    """Images of the procedural line, good and defective, where no real ones are at hand."""
    roi = spec.roi
    size_wh = spec.resize_wh if roi is None else (roi.x + roi.width, roi.y + roi.height)
    images = []
    for product in ("brushed-metal", "woven-fabric"):
        line = SyntheticLine(product, seed=0, size_wh=size_wh, defect_rate=0.5)
        for index in range(MAX_IMAGES // 2):
            part = line.part(index)
            images.append(ParityImage(f"{product}-{index}", part.kind, part.image))
    return ParitySet(tuple(images), f"{len(images)} SYNTHETIC images; for your own give --images")
