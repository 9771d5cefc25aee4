"""What range of a network's values 8 bits should cover, from a histogram of their magnitudes.

    magnitudes = Magnitudes()
    magnitudes.add(values)
    limit = magnitudes.limit("mse")

One histogram a value, from one pass over the images, serves all methods: ranges are symmetric about 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Method = Literal["minmax", "percentile", "entropy", "mse"]

METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy", "mse")
"""``minmax``: the largest magnitude. ``percentile``: all but 0.01 %. ``entropy``: the least information lost (Migacz,
"8-bit inference with TensorRT", GTC 2017). ``mse``: the least squared error of rounding and clipping together."""

LEVELS = 127
"""Positive steps of a symmetric INT8 scale."""

_BINS = 4096
_PERCENTILE = 0.9999
_SMALLEST_END = 2.0**-100
# Candidates of the entropy method: every 32nd bin, from the fewest bins that 8 bits tell apart.
_ENTROPY_BINS = range(128, _BINS + 1, 32)
_MSE_SHARES = np.linspace(0.05, 1.0, 96)


class Magnitudes:
    """A histogram of ``|x|``; its upper end is a power of two, so that histograms can be added exactly.

    Attributes:
        counts: (4096,) int64, bins of equal width from 0 to ``end``.
        end: upper end of the last bin; 0 until a value other than 0 came.
        largest: largest magnitude.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, np.int64)
        self.end = 0.0
        self.largest = 0.0

    def add(self, values: NDArray[np.float32]) -> None:
        """Count finite values of any shape."""
        magnitudes = np.abs(values).reshape(-1)
        largest = float(magnitudes.max(initial=0.0))
        self._reach(largest)
        if self.end == 0.0:
            self.counts[0] += magnitudes.size
            return
        bins = np.minimum((magnitudes * np.float32(_BINS / self.end)).astype(np.int32), _BINS - 1)
        self.counts += np.bincount(bins, minlength=_BINS)

    @classmethod
    def merged(cls, parts: Iterable[Magnitudes]) -> Magnitudes:
        """The histogram of all their values."""
        parts = list(parts)
        merged = cls()
        merged._reach(max(part.largest for part in parts))
        for part in parts:
            counts = part.counts
            if part.end == 0.0:
                merged.counts[0] += counts[0]
                continue
            for _ in range(round(math.log2(merged.end / part.end))):
                counts = _halved(counts)
            merged.counts += counts
        return merged

    def _reach(self, largest: float) -> None:
        self.largest = max(self.largest, largest)
        if largest <= self.end:
            return
        # Not below what float32 can divide by.
        end = max(2.0 ** math.ceil(math.log2(largest)), _SMALLEST_END)
        if self.end:
            for _ in range(round(math.log2(end / self.end))):
                self.counts = _halved(self.counts)
        self.end = end

    def limit(self, method: Method) -> float:
        """The magnitude that the largest of 127 steps should stand for; 0 where all values are 0."""
        if self.largest == 0.0:
            return 0.0
        return min(_LIMITS[method](self), self.largest)


def _halved(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same counts in bins of twice the width."""
    halved = np.zeros_like(counts)
    halved[: _BINS // 2] = counts[0::2] + counts[1::2]
    return halved


def _minmax(of: Magnitudes) -> float:
    return of.largest


def _percentile(of: Magnitudes) -> float:
    cumulative = np.cumsum(of.counts)
    index = int(np.searchsorted(cumulative, _PERCENTILE * cumulative[-1]))
    return (index + 1) * of.end / _BINS


def _entropy(of: Magnitudes) -> float:
    counts = of.counts.astype(np.float64)
    # The zeros that a Relu leaves are exact at every scale and would drown everything else.
    counts[0] = 0.0
    if not counts.any():
        return of.largest
    used = int(np.flatnonzero(counts)[-1]) + 1
    best, best_loss = used, math.inf
    for bins in [*(bins for bins in _ENTROPY_BINS if bins < used), used]:
        reference = counts[:bins].copy()
        reference[-1] += counts[bins:].sum()
        loss = _information_lost(reference, counts[:bins])
        if loss < best_loss:
            best, best_loss = bins, loss
    return best * of.end / _BINS


def _information_lost(reference: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
    """Kullback-Leibler divergence of the reference from the counts at 128 levels, spread over the bins in use."""
    level = np.arange(counts.size) * (LEVELS + 1) // counts.size
    in_use = counts > 0
    sums = np.bincount(level, counts, LEVELS + 1)
    members = np.bincount(level, in_use, LEVELS + 1)
    spread = np.where(in_use, (sums / np.maximum(members, 1))[level], 0.0)
    if not spread.any():
        return math.inf
    p, q = reference / reference.sum(), spread / spread.sum()
    # Where only the reference has something, the divergence would be infinite; a small share stands for it.
    positive = p > 0
    return float(np.sum(p[positive] * np.log(p[positive] / np.maximum(q[positive], 1e-9))))


def _mse(of: Magnitudes) -> float:
    centres = (np.arange(_BINS) + 0.5) * (of.end / _BINS)
    present = np.flatnonzero(of.counts)
    centres, weights = centres[present], of.counts[present]
    # In the first bin are mostly exact zeros.
    centres[centres < of.end / _BINS] = 0.0
    limits = _MSE_SHARES * of.largest
    errors = []
    for limit in limits:
        step = limit / LEVELS
        errors.append(np.sum(weights * (centres - np.minimum(np.rint(centres / step), LEVELS) * step) ** 2))
    return float(limits[int(np.argmin(errors))])


_LIMITS: dict[Method, Callable[[Magnitudes], float]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
