from __future__ import annotations

import numpy as np
import pytest

from recontrast_edge.latency import (
    HIGHEST_MS,
    LOWEST_MS,
    PERCENTILES,
    RELATIVE_ERROR,
    LatencyHistogram,
    StageLatencies,
)


def filled(durations_ms) -> LatencyHistogram:
    histogram = LatencyHistogram()
    for duration_ms in durations_ms:
        histogram.add(float(duration_ms))
    return histogram


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
@pytest.mark.parametrize("draw", ["lognormal", "uniform", "bimodal"])
def test_percentiles_are_within_the_stated_error(draw: str, count: int) -> None:
    rng = np.random.default_rng(count)
    durations_ms = {
        "lognormal": rng.lognormal(2.0, 1.5, count),
        "uniform": rng.uniform(0.002, 50.0, count),
        "bimodal": np.where(rng.random(count) < 0.95, 8.0, 400.0) * rng.uniform(0.9, 1.1, count),
    }[draw]
    histogram = filled(durations_ms)
    for fraction in [0.0, 0.01, *PERCENTILES.values(), 1.0]:
        expected = np.percentile(durations_ms, 100 * fraction, method="inverted_cdf")
        assert histogram.percentile_ms(fraction) == pytest.approx(expected, rel=RELATIVE_ERROR + 1e-9)
    assert histogram.max_ms == durations_ms.max()
    assert histogram.mean_ms == pytest.approx(durations_ms.mean())
    assert histogram.count == count


def test_the_stated_error_is_small() -> None:
    assert RELATIVE_ERROR < 0.01


def test_ends_of_the_range_and_beyond() -> None:
    for duration_ms in (0.0, LOWEST_MS / 10, LOWEST_MS, HIGHEST_MS, 10 * HIGHEST_MS):
        histogram = filled([duration_ms] * 3)
        assert histogram.percentile_ms(0.5) == duration_ms


def test_a_frame_from_the_future_counts_as_zero() -> None:
    assert filled([-5.0]).summary() == {"p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0, "mean": 0.0, "count": 1}


def test_an_empty_histogram_has_zeros() -> None:
    assert set(LatencyHistogram().summary().values()) == {0}


def test_stages_keep_their_order_and_counts() -> None:
    latencies = StageLatencies()
    latencies.add({"wait": 1.0, "decide": 1.0, "total": 3.0})
    latencies.add({"wait": 1.0, "infer": 2.0, "decide": 1.0, "total": 3.0})
    summary = latencies.summary()
    assert list(summary) == ["wait", "infer", "decide", "total"]
    assert [row["count"] for row in summary.values()] == [2, 1, 2, 2]
