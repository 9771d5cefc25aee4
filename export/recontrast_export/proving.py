"""The proof that a model in reduced precision keeps the verdicts: the same images, judged by it and by its reference.

    proof = Prover(reference, read_validation(Path("parts"), folder)).prove(candidate.infer, "int8 graph", budget)
    enforce(proof, budget)  # GateError if not

``parity`` asks whether a conversion is numerically right, on any few images; this asks what it costs, on the user's.

Good images are judged first: they give the candidate's threshold, with which each further verdict is final. The others
follow by how near their reference score is to the threshold, because the nearest change first. So a candidate that
changes too many verdicts is known for certain long before all images are judged.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.datasets import Sample, find_dataset
from recontrast_edge.engines import Engine, Inference
from recontrast_edge.errors import GateError, InputError
from recontrast_edge.evaluation import Evaluation, Metric, Rate, Scorer, evaluate
from recontrast_edge.images import read_image, write_image
from recontrast_edge.preprocess import Image
from recontrast_edge.proof import MAX_FLIPPED, Flip, Proof
from recontrast_edge.proof import Rate as RecordedRate
from recontrast_export.budget import Budget
from recontrast_export.defects import paste_defect
from recontrast_export.parity import spread

MIN_GOOD = 8
"""Good images that a threshold and the spread of good scores can be taken from."""

MAX_PASTED = 64
"""Images that get a pasted defect, where the data has no defects of its own."""

DEFAULT_REJECT_RATE = 0.01
"""Share of the good images above the threshold, where the model's own threshold promises none."""

CLEAR_MARGIN = 0.005
"""A score further from the threshold than this share of it was clear."""


@dataclass(frozen=True)
class ValidationImages:
    """Images to judge by reference and candidate.

    Attributes:
        samples: good and defective.
        source: where they come from, for people; no absolute path.
        pasted: the defects were pasted into good images.
    """

    samples: tuple[Sample, ...]
    source: str
    pasted: bool


def read_validation(path: Path, folder: Path) -> ValidationImages:
    """The test images of a data set, or good images with defects pasted into copies of them.

    Args:
        path: MVTec-layout data set, folder of good images, or text file that lists them.
        folder: of temporary files; the copies are written here and must outlive their use.

    Raises:
        InputError: nothing there, or fewer than ``MIN_GOOD`` good images.
        OutputError: a copy cannot be written.
    """
    dataset = find_dataset(path)
    samples = dataset.test or dataset.train_good
    good = [sample for sample in samples if sample.is_good]
    if len(good) < MIN_GOOD:
        raise InputError(f"{path}: validation needs at least {MIN_GOOD} good images, got {len(good)}")
    if len(good) < len(samples):
        return ValidationImages(samples, f"{len(samples)} images of {dataset.name}", pasted=False)
    pasted = [_paste(sample, index, folder) for index, sample in enumerate(spread(good, MAX_PASTED))]
    source = f"{len(good)} good images of {dataset.name}, {len(pasted)} of them again with a pasted defect"
    return ValidationImages((*good, *pasted), source, pasted=True)


def _paste(sample: Sample, index: int, folder: Path) -> Sample:
    image, mask = paste_defect(read_image(sample.path), index=index)
    # Two folders of the data may hold images of the same name.
    image_path, mask_path = folder / f"{index}-{sample.path.stem}.png", folder / f"{index}-mask.png"
    write_image(image_path, image)
    write_image(mask_path, mask.astype(np.uint8) * 255)
    return Sample(image_path, "pasted", (mask_path,))


@dataclass(frozen=True)
class GivenUp:
    """A candidate that goes beyond its budget whatever the images that were not judged would bring.

    Attributes:
        n_flips: verdicts that changed.
        n_judged: images, of all.
    """

    n_flips: int
    n_judged: int


class _OverBudgetError(Exception):
    """Ends an evaluation."""

    def __init__(self, found: GivenUp) -> None:
        super().__init__()
        self.found = found


class Prover:
    """Judges candidates against one reference, whose answers are kept.

    Its maps lie in an unnamed temporary file, 4 bytes a pixel.

    Args:
        reference: the FP32 model.
        images: to judge.
        progress: show bars on stderr.

    Raises:
        InputError, ModelError, OutputError: as ``evaluation.evaluate``.
    """

    def __init__(self, reference: Engine, images: ValidationImages, *, progress: bool = False) -> None:
        self.images = images
        self._progress = progress
        self._spec = reference.spec
        width, height = self._spec.input.map_wh
        shape = (len(images.samples), height, width)
        with tempfile.TemporaryFile() as file:
            self._maps: NDArray[np.float32] = np.memmap(file, np.float32, "w+", shape=shape)
        self._good = np.array([sample.is_good for sample in images.samples])
        threshold = self._spec.threshold
        self._reject_rate = (threshold and threshold.max_false_reject_rate) or DEFAULT_REJECT_RATE

        def keep(index: int, result: Inference) -> None:
            self._maps[index] = result.maps[0]

        self._order = np.arange(len(images.samples))
        self._reference = self._evaluate(reference.infer, keep)
        self._scores = self._reference.scores.astype(np.float64)
        self._limit = self._threshold(self._scores)
        distance = np.abs(self._scores - self._limit)
        self._clear = distance > CLEAR_MARGIN * abs(self._limit)
        self._order = np.lexsort((distance, ~self._good))

    def _evaluate(self, scorer: Scorer, see: Callable[[int, Inference], None]) -> Evaluation:
        """Judge all images, one at a time; ``see`` is told the index among ``images`` and the result."""
        order = iter(self._order)

        def judge(images: Sequence[Image]) -> Inference:
            result = scorer(images)
            see(int(next(order)), result)
            return result

        samples = [self.images.samples[index] for index in self._order]
        return evaluate(judge, samples, self._spec, batch_size=1, progress=self._progress)

    def prove(self, candidate: Scorer, what: str, budget: Budget) -> Proof:
        """Judge all images and compare; nothing is refused yet.

        Args:
            candidate: judges a batch; ``Engine.infer``.
            what: what the candidate is and runs on, for people.
            budget: goes on record; see ``enforce``.

        Raises:
            ModelError: a score or map that is not finite.
        """
        return self._prove(candidate, what, budget, lambda scores: None)

    def attempt(self, candidate: Scorer, what: str, budget: Budget) -> Proof | GivenUp:
        """The same, as long as the verdicts can be within the budget."""

        def require_chance(scores: NDArray[np.float64]) -> None:
            judged = np.isfinite(scores)
            if not judged[self._good].all():
                return
            flipped = self._flipped(scores) & judged
            for name, counted in (("verdict_flips", flipped), ("clear_flips", flipped & self._clear)):
                if not budget.allows(name, np.count_nonzero(counted) / counted.size):
                    raise _OverBudgetError(GivenUp(int(np.count_nonzero(flipped)), int(np.count_nonzero(judged))))

        try:
            return self._prove(candidate, what, budget, require_chance)
        except _OverBudgetError as over:
            return over.found

    def _prove(
        self, candidate: Scorer, what: str, budget: Budget, watch: Callable[[NDArray[np.float64]], None]
    ) -> Proof:
        """``watch`` is given the scores after each image, NaN for those to come."""
        maps = MapErrors()
        scores = np.full(len(self._good), np.nan)

        def compare(index: int, result: Inference) -> None:
            maps.add(self._maps[index], result.maps[0])
            scores[index] = result.scores[0]
            watch(scores)

        found = self._evaluate(candidate, compare)
        wanted, reference = self._reference, self._scores
        flipped = self._flipped(scores)
        flips = [
            Flip(
                image=f"{sample.kind}/{sample.path.name}",
                reference_score=float(reference[index]),
                candidate_score=float(scores[index]),
            )
            for index, sample in enumerate(self.images.samples)
            if flipped[index]
        ]
        return Proof(
            candidate=what,
            images=self.images.source,
            n_good=int(self._good.sum()),
            n_defect=int((~self._good).sum()),
            pasted_defects=self.images.pasted,
            map_correlation=float(np.mean(maps.correlations)),
            map_correlation_lowest=min(maps.correlations),
            map_error=maps.largest,
            map_error_p999=maps.quantile(0.999),
            score_shift=_shift(reference[self._good], scores[self._good]),
            score_error=float(np.abs(scores - reference).max()),
            rank_correlation=correlation(_ranks(reference), _ranks(scores)),
            delta_i_auroc=_loss(wanted.overall.i_auroc, found.overall.i_auroc),
            delta_aupro=_loss(wanted.overall.aupro, found.overall.aupro),
            reference_threshold=self._limit,
            candidate_threshold=self._threshold(scores),
            verdict_flips=_rate(flipped),
            clear_flips=int(np.count_nonzero(flipped & self._clear)),
            flipped=tuple(flips[:MAX_FLIPPED]),
            budget=str(budget),
        )

    def _flipped(self, scores: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whose verdict changed; a score that is NaN passes."""
        return (self._scores > self._limit) != (scores > self._threshold(scores))

    def _threshold(self, scores: NDArray[np.float64]) -> float:
        """The order statistic of the good scores that leaves the model's promised share of them above it.

        Each precision is given its own, as it is on the line.
        """
        good = np.sort(scores[self._good])
        return float(good[math.ceil((1.0 - self._reject_rate) * good.size) - 1])


class MapErrors:
    """How far maps are from their references.

    Attributes:
        correlations: Pearson correlation of each image's two maps.
        largest: of all pixels' errors, as shares of the range (maximum - minimum) of their image's reference map.
    """

    _BINS = 20_000

    def __init__(self) -> None:
        self.correlations: list[float] = []
        self.largest = 0.0
        self._counts = np.zeros(self._BINS, np.int64)

    def add(self, reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> None:
        """Compare the (h, w) maps of one image."""
        # A flat map leaves nothing to compare with; it is given the smallest range instead of none.
        value_range = max(float(np.ptp(reference)), float(np.finfo(np.float32).tiny))
        errors = np.abs(candidate.astype(np.float64) - reference) / value_range
        self.largest = max(self.largest, float(errors.max()))
        self._counts += np.histogram(np.minimum(errors, 1.0), self._BINS, (0.0, 1.0))[0]
        self.correlations.append(correlation(reference, candidate))

    def quantile(self, share: float) -> float:
        """The error that this share of all pixels does not exceed, to 0.00005; errors over 1 count as 1."""
        cumulative = np.cumsum(self._counts)
        return float(np.searchsorted(cumulative, share * cumulative[-1]) + 1) / self._BINS


def correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Pearson's; of something flat 1 if the other one is flat too, else 0."""
    x, y = (values.reshape(-1).astype(np.float64) - values.mean(dtype=np.float64) for values in (a, b))
    norms = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    if 0.0 in norms:
        return float(norms[0] == norms[1])
    return float(np.clip(x @ y / (norms[0] * norms[1]), -1.0, 1.0))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; ties get the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: NDArray[np.float64] = (last - (counts + 1) / 2)[inverse]
    return ranks


def _shift(reference: NDArray[np.float64], scores: NDArray[np.float64]) -> float:
    spread_of_good = max(float(reference.std()), float(np.finfo(np.float32).tiny))
    return float((scores - reference).mean()) / spread_of_good


def _loss(reference: Metric, candidate: Metric) -> float | None:
    return None if reference.value is None or candidate.value is None else reference.value - candidate.value


def _rate(events: NDArray[np.bool_]) -> RecordedRate:
    counted = Rate.counted(events)
    assert counted is not None
    return RecordedRate(count=counted.count, of=counted.of, low=counted.low, high=counted.high)


def enforce(proof: Proof, budget: Budget) -> None:
    """Pass, or refuse.

    Raises:
        GateError: over the budget.
    """
    if violations := budget.violations(proof):
        names = ", ".join(flip.image for flip in proof.flipped[:5])
        listed = f"; verdicts that changed: {names}" if names else ""
        raise GateError(
            f"{proof.candidate} is over its budget on {proof.images}: {'; '.join(violations)}{listed}; nothing was "
            "written"
        )
