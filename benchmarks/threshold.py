"""What became of the false-reject rate that was promised, on parts that were never seen.

    recontrast-edge eval --engine tiles.onnx --data magnetic_tile --json scores.json
    python benchmarks/threshold.py scores.json --part 'num_(\\d+)' --gap 100

Takes the scores of good images from files that ``eval --json`` and ``calibrate --json`` wrote, so no model runs here.
The model must not have been trained on any of these parts. Again and again the parts are split into two halves; a
threshold is calibrated on the first, and good images of the second are counted above it, in four ways:

- ``highest of a part``: the highest score of each part, on both sides, as ``calibrate`` does where it knows the parts;
- ``one image a part``: one photograph of each part, on both sides, as the promise wants it;
- ``all images``: all photographs of the parts, as if each were a part of its own;
- ``split by image``: all photographs, split without looking at parts, as one does who does not know better.

Beside what was observed stands what must come out for independent images, computed exactly: of n + m exchangeable
scores the number of the m new ones above the k-th of the n old ones has a negative hypergeometric distribution,
whatever the scores' own. A study can therefore not look good or bad by luck alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.calibration import calibrate, images_needed, percent
from recontrast_edge.datasets import parts_by_name
from recontrast_edge.errors import CalibrationError, InputError, RecontrastError, UsageError
from recontrast_edge.images import atomic_write
from recontrast_edge.spec import PartNames

FORMATS = ("recontrast-edge.evaluation", "recontrast-edge.calibration")
WAYS = ("highest of a part", "one image a part", "all images", "split by image")


@dataclass(frozen=True)
class Scores:
    """Good images and the parts they show.

    Attributes:
        values: (n,) float64 scores.
        parts: (n,) int, which part each image shows, 0 ... n_parts - 1.
    """

    values: NDArray[np.float64]
    parts: NDArray[np.intp]

    @property
    def n_parts(self) -> int:
        return int(self.parts.max()) + 1


@dataclass(frozen=True)
class Row:
    """One way of calibrating, over all splits.

    Attributes:
        n_calibration, n_unseen: images on either side, mean over the splits.
        promised: the rate asked for.
        splits: those with enough images for the promise.
        rate: mean share of unseen good images rejected.
        rate_if_independent: its expectation for independent images.
        broken: share of splits in which the share of unseen good images rejected was greater than promised.
        broken_if_independent: its expectation for independent images; counting few unseen images adds to it.
    """

    way: str
    n_calibration: float
    n_unseen: float
    promised: float
    confidence: float
    splits: int
    rate: float
    rate_if_independent: float
    broken: float
    broken_if_independent: float


def read_scores(paths: Sequence[Path], part: str | None, gap: int | None) -> Scores:
    """Good images of some files as one set; an image that is in several counts once.

    Args:
        part: regular expression on the file name whose first group names the part; None: each image shows another.
        gap: the groups are numbers, and those that follow each other by at most this much are one part.

    Raises:
        InputError: no file of ours.
        UsageError: a name without its part.
    """
    scores: dict[str, float] = {}
    for path in paths:
        try:
            content = json.loads(path.read_bytes())
            if content["format"] not in FORMATS:
                raise InputError(f"{path}: expected a file of `eval --json` or `calibrate --json`")
            scores |= {
                str(entry["image"]): float(entry["score"]) for entry in content["images"] if entry["kind"] == "good"
            }
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{path}: expected a file of `eval --json` or `calibrate --json`") from None
    if len(scores) < 2:
        raise InputError(f"{', '.join(map(str, paths))}: expected at least 2 good images, got {len(scores)}")
    names = list(scores)
    return Scores(np.array([scores[name] for name in names]), _parts(names, part, gap))


def _parts(names: Sequence[str], part: str | None, gap: int | None) -> NDArray[np.intp]:
    if part is None:
        return np.arange(len(names))
    return np.unique(parts_by_name(names, PartNames(pattern=part, gap=gap)), return_inverse=True)[1].reshape(-1)


def splits(scores: Scores, way: str, n: int, seed: int) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """(calibration scores, unseen scores) of random halves."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        order = rng.permutation(scores.values.size)
        if way == "split by image":
            first = np.arange(order.size) < order.size // 2
        else:
            if way == "highest of a part":
                order = np.argsort(-scores.values, kind="stable")
            if way != "all images":
                # The first image of each part: the highest, or, in random order, any of them.
                order = order[np.unique(scores.parts[order], return_index=True)[1]]
            chosen = rng.permutation(scores.n_parts)[: scores.n_parts // 2]
            first = np.isin(scores.parts[order], chosen)
        yield scores.values[order[first]], scores.values[order[~first]]


def study(scores: Scores, way: str, promised: float, confidence: float, n_splits: int, seed: int) -> Row | None:
    """None where half of the images are too few for the promise."""
    found = []
    for old, new in splits(scores, way, n_splits, seed):
        try:
            calibration = calibrate(old, promised, confidence)
        except CalibrationError:
            continue
        rejected = int(np.count_nonzero(new > calibration.value))
        expected = rejected_distribution(old.size, calibration.rank, new.size)
        is_broken = np.arange(new.size + 1) > promised * new.size
        found.append(
            (
                old.size,
                new.size,
                rejected / new.size,
                (old.size + 1 - calibration.rank) / (old.size + 1),
                float(is_broken[rejected]),
                float(expected[is_broken].sum()),
            )
        )
    if not found:
        return None
    means = np.mean(np.array(found), axis=0).tolist()
    return Row(way, means[0], means[1], promised, confidence, len(found), *means[2:])


def rejected_distribution(n: int, rank: int, m: int) -> NDArray[np.float64]:
    """Probability of 0 ... m of m new scores lying above the ``rank``-th smallest of n, all exchangeable."""
    log_factorial = np.array([math.lgamma(i + 1) for i in range(n + m + 1)])

    def log_choose(of: Any, k: Any) -> NDArray[np.float64]:
        chosen: NDArray[np.float64] = log_factorial[of] - log_factorial[k] - log_factorial[of - k]
        return chosen

    above = np.arange(m + 1)
    below = m - above
    log_ways = log_choose(n - rank + above, above) + log_choose(rank - 1 + below, below)
    return np.exp(log_ways - log_choose(n + m, m))


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| calibrated on | images | promised | confidence | rejected, unseen | if independent | promise exceeded | "
        "if independent |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = (
            row.way,
            f"{row.n_calibration:.0f}",
            percent(row.promised),
            percent(row.confidence),
            *(f"{100 * share:.2f} %" for share in (row.rate, row.rate_if_independent)),
            *(f"{100 * share:.1f} %" for share in (row.broken, row.broken_if_independent)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "scores", type=Path, nargs="+", help="files of `eval --json` or `calibrate --json`, one model's"
    )
    parser.add_argument("--part", metavar="REGEX", help="its first group, in the file name, names the part")
    parser.add_argument("--gap", type=int, help="the groups are numbers; closer ones than this are one part")
    parser.add_argument("--splits", type=int, default=1000, help="random halves (default: %(default)s)")
    parser.add_argument("--max-false-reject-rate", type=float, nargs="+", default=[0.05], metavar="R")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="C")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows as JSON")
    options = parser.parse_args()
    try:
        if options.splits < 1:
            raise UsageError(f"--splits must be at least 1, got {options.splits}")
        scores = read_scores(options.scores, options.part, options.gap)
        rows: list[Row] = []
        for promised in options.max_false_reject_rate:
            needed = images_needed(promised, options.confidence)
            for way in WAYS if options.part is not None else ("all images",):
                row = study(scores, way, promised, options.confidence, options.splits, options.seed)
                if row is None:
                    print(f"{way}: half of them are too few to promise {percent(promised)}, which needs {needed}")
                else:
                    rows.append(row)
        if not rows:
            raise CalibrationError(
                "no half of these images supports any of these promises; collect more, or ask for less"
            )
        print(f"{scores.values.size} good images of {scores.n_parts} parts, {options.splits} splits\n\n{table(rows)}")
        if options.json is not None:
            content = {
                "images": scores.values.size,
                "parts": scores.n_parts,
                "files": [path.name for path in options.scores],
                "rows": [asdict(row) for row in rows],
            }
            with atomic_write(options.json) as file:
                file.write((json.dumps(content, indent=2) + "\n").encode())
    except RecontrastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
