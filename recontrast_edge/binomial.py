"""The binomial distribution, as far as promises about rates need it, without SciPy.

low, high = clopper_pearson(3, 185, confidence=0.95)
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def cumulative(n: int, p: float) -> NDArray[np.float64]:
    """``P[Binomial(n, p) <= k]`` for k = 0 ... n.

    Args:
        n: trials, >= 0.
        p: probability of a success, (0, 1).

    Returns:
        (n + 1,) float64, rising to 1.
    """
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))
    k = np.arange(n + 1)
    log_pmf = log_factorial[n] - log_factorial - log_factorial[::-1] + k * math.log(p) + (n - k) * math.log1p(-p)
    below: NDArray[np.float64] = np.minimum(np.cumsum(np.exp(log_pmf)), 1.0)
    return below


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided exact confidence interval of a rate (Clopper and Pearson, Biometrika 26, 1934).

    Args:
        successes: 0 ... n.
        n: trials, >= 1.
        confidence: (0, 1).

    Returns:
        (low, high), 0 <= low <= successes / n <= high <= 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    tail = (1.0 - confidence) / 2.0
    # P[X <= k] falls as p grows: the bounds are where a tail crosses its share.
    low = 0.0 if successes == 0 else _crossing(successes - 1, n, 1.0 - tail)
    high = 1.0 if successes == n else _crossing(successes, n, tail)
    return low, high


def _crossing(k: int, n: int, probability: float) -> float:
    """The p at which ``P[Binomial(n, p) <= k]`` equals ``probability``, by bisection."""
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high) and high - low > 1e-12:
        if cumulative(n, middle)[k] > probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2
