"""Latency percentiles of an endless run in bounded memory.

    latencies = StageLatencies(); latencies.add({"infer": 8.1, "total": 9.0}); print(latencies.summary())

Each stage has a histogram with logarithmic bins: 2 % wide, so that a percentile is within 1 % of the true one, from
1 microsecond to 1000 seconds, in about 1000 counters. Mean and maximum are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

LOWEST_MS = 1e-3
HIGHEST_MS = 1e6
BIN_RATIO = 1.02
RELATIVE_ERROR = math.sqrt(BIN_RATIO) - 1
"""Of a percentile between ``LOWEST_MS`` and ``HIGHEST_MS``: a bin's geometric centre stands for all of it."""

PERCENTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}

LAST_STAGES = ("decide", "total")
"""Where a summary has them, although a frame that was never inferred may have been the first to bring them."""

_LOG_RATIO = math.log(BIN_RATIO)
_BINS = math.ceil(math.log(HIGHEST_MS / LOWEST_MS) / _LOG_RATIO)


class LatencyHistogram:
    """Durations of one stage, in milliseconds."""

    def __init__(self) -> None:
        self._counts = [0] * _BINS
        self._sum_ms = 0.0
        self._min_ms = math.inf
        self.count = 0
        self.max_ms = 0.0

    def add(self, duration_ms: float) -> None:
        """Count one duration; a negative one (a frame stamped in the future) counts as 0."""
        duration_ms = max(duration_ms, 0.0)
        position = math.log(max(duration_ms, LOWEST_MS) / LOWEST_MS) / _LOG_RATIO
        self._counts[min(int(position), _BINS - 1)] += 1
        self._sum_ms += duration_ms
        self._min_ms = min(self._min_ms, duration_ms)
        self.max_ms = max(self.max_ms, duration_ms)
        self.count += 1

    @property
    def mean_ms(self) -> float:
        """The exact mean; 0 without durations."""
        return self._sum_ms / self.count if self.count else 0.0

    def percentile_ms(self, fraction: float) -> float:
        """The smallest duration that at least ``fraction`` (0..1) of all do not exceed, within ``RELATIVE_ERROR``."""
        if not self.count:
            return 0.0
        rank = max(1, math.ceil(fraction * self.count))
        if rank >= self.count:
            return self.max_ms
        seen = 0
        for index, count in enumerate(self._counts):
            seen += count
            if seen >= rank:
                centre_ms = LOWEST_MS * math.exp((index + 0.5) * _LOG_RATIO)
                return min(max(centre_ms, self._min_ms), self.max_ms)
        return self.max_ms

    def summary(self) -> dict[str, float]:
        """``p50``, ``p90``, ``p99``, ``max`` and ``mean`` in milliseconds, and ``count``."""
        percentiles = {name: round(self.percentile_ms(fraction), 4) for name, fraction in PERCENTILES.items()}
        return {**percentiles, "max": round(self.max_ms, 4), "mean": round(self.mean_ms, 4), "count": self.count}


class StageLatencies:
    """One histogram for each stage."""

    def __init__(self) -> None:
        self.stages: dict[str, LatencyHistogram] = {}

    def add(self, latency_ms: Mapping[str, float]) -> None:
        """Count one frame's stages, in milliseconds."""
        for stage, duration_ms in latency_ms.items():
            self.stages.setdefault(stage, LatencyHistogram()).add(duration_ms)

    def summary(self) -> dict[str, dict[str, float]]:
        """Of each stage, in the order in which they were first seen, but ``LAST_STAGES`` at the end."""
        # A copy, because another thread may be adding a new stage. The sort is stable.
        seen = list(self.stages.items())
        stages = sorted(seen, key=lambda item: LAST_STAGES.index(item[0]) if item[0] in LAST_STAGES else -1)
        return {stage: histogram.summary() for stage, histogram in stages}
