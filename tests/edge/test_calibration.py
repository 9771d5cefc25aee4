"""The promise of a calibrated threshold: against SciPy, by simulation, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pil

from recontrast_edge.binomial import clopper_pearson, cumulative
from recontrast_edge.calibration import (
    best_rate,
    calibrate,
    held_out,
    images_needed,
    percent,
    score_shift,
    write_threshold,
)
from recontrast_edge.datasets import combined_sha256, data_sha256, file_sha256, find_dataset
from recontrast_edge.errors import CalibrationError, ModelError, UsageError
from recontrast_edge.onnxfile import read_spec
from recontrast_edge.spec import Threshold, Training


def test_the_documented_numbers_are_those_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "threshold.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([0-9.]+) % \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert len(rows) == 6
    for rate, *needed in rows:
        expected = [images_needed(float(rate) / 100, confidence) for confidence in (0.9, 0.95, 0.99)]
        assert [int(number) for number in needed] == expected


@pytest.mark.parametrize(("n", "p"), [(1, 0.5), (10, 0.03), (185, 0.99), (5000, 0.999), (20000, 1e-4)])
def test_binomial_equals_scipy(n: int, p: float) -> None:
    from scipy.stats import binom

    np.testing.assert_allclose(cumulative(n, p), binom.cdf(np.arange(n + 1), n, p), atol=1e-10)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 185), (3, 185), (17, 40), (40, 40)])
def test_clopper_pearson_equals_scipy(k: int, n: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(k, n).proportion_ci(0.9, method="exact")
    assert clopper_pearson(k, n, 0.9) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(rate=st.floats(1e-3, 0.5), confidence=st.floats(0.5, 0.999))
def test_images_needed_is_the_smallest_number_that_suffices(rate: float, confidence: float) -> None:
    n = images_needed(rate, confidence)
    assert 1 - (1 - rate) ** n >= confidence - 1e-9
    assert n == 1 or 1 - (1 - rate) ** (n - 1) < confidence
    assert best_rate(n, confidence) <= rate * (1 + 1e-9)
    if n < 3000:
        assert calibrate(np.arange(n), rate, confidence).rank == n


def test_images_needed_known_values() -> None:
    assert images_needed(0.05, 0.95) == 59  # Wilks' classic
    assert images_needed(0.01, 0.95) == 299
    assert images_needed(0.5, 0.5) == 1


@given(n=st.integers(1, 2000), rate=st.floats(0.002, 0.5), confidence=st.floats(0.5, 0.99))
def test_rank_is_the_smallest_that_keeps_the_promise(n: int, rate: float, confidence: float) -> None:
    from scipy.stats import binom

    if n < images_needed(rate, confidence):
        with pytest.raises(CalibrationError):
            calibrate(np.arange(n), rate, confidence)
        return
    calibration = calibrate(np.arange(n)[::-1] / 7, rate, confidence)
    k = calibration.rank
    assert calibration.value == (k - 1) / 7
    assert binom.cdf(k - 1, n, 1 - rate) >= confidence - 1e-9
    assert k == 1 or binom.cdf(k - 2, n, 1 - rate) < confidence + 1e-9


@pytest.mark.parametrize("ties", [False, True])
def test_the_promise_holds_in_simulation(ties: bool) -> None:
    """Over many draws from a skewed distribution, the share of thresholds that keep the promise is at least C."""
    rng = np.random.default_rng(7)
    n, rate, confidence, draws = 150, 0.03, 0.9, 4000
    kept = 0
    for _ in range(draws):
        scores = rng.lognormal(0, 1, n)
        if ties:
            scores = np.round(scores, 1)
        value = calibrate(scores, rate, confidence).value
        # A good part is rejected where its score, rounded or not, is above the threshold.
        edge = value + 0.05 if ties else value
        true_rate = 0.5 * math.erfc(math.log(edge) / math.sqrt(2))
        kept += true_rate <= rate
    error = math.sqrt(confidence * (1 - confidence) / draws)
    assert kept / draws >= confidence - 3 * error
    if not ties:
        # Not needlessly strict either: the next smaller rank would break the promise (n = 150: 0.9339 reached).
        assert kept / draws <= cumulative(n, 1 - rate)[calibrate(np.arange(n), rate, confidence).rank - 1] + 3 * error


def test_refusal_says_what_is_needed_and_what_is_possible() -> None:
    with pytest.raises(CalibrationError) as refused:
        calibrate(np.arange(185), 0.001, 0.95)
    text = str(refused.value)
    assert "at most 0.1 % with 95 % confidence needs 2995 good images, got 185" in text
    assert "185 images can promise 1.61 % at best" in text
    assert "Collect 2810 more" in text
    suggestion = float(text.rsplit(" ", 1)[1])
    assert calibrate(np.arange(185), suggestion, 0.95).rank == 185
    with pytest.raises(CalibrationError, match="got none"):
        calibrate([], 0.5, 0.5)


@pytest.mark.parametrize(("rate", "confidence"), [(0, 0.9), (1, 0.9), (0.1, 0), (0.1, 1), (math.nan, 0.9), (5, 0.9)])
def test_promises_out_of_range(rate: float, confidence: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        calibrate([1.0] * 100, rate, confidence)


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CalibrationError, match="finite"):
        calibrate([1.0, math.nan] * 50, 0.1, 0.9)


def test_percent_does_not_round_confidence_up() -> None:
    assert [percent(share) for share in (0.95, 0.9995, 0.01, 0.0001)] == ["95 %", "99.95 %", "1 %", "0.01 %"]


def images_of(folder: Path, greys: Sequence[int]) -> Path:
    folder.mkdir()
    for index, grey in enumerate(greys):
        Pil.fromarray(np.full((8, 8), grey, np.uint8)).save(folder / f"{index}.png")
    return folder


def test_copies_count_once_and_training_images_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    spec = read_spec(tiny_model)
    samples = find_dataset(images_of(tmp_path / "good", [1, 2, 1, 3, 2])).train_good
    images = held_out(samples, spec)
    assert [sample.path.name for sample in images.samples] == ["0.png", "1.png", "3.png"]
    assert images.n_copies == 2
    assert images.sha256 == data_sha256(images.samples)
    assert images.sha256 != combined_sha256([])
    trained = spec.model_copy(update={"training": Training(data_sha256=data_sha256(samples))})
    with pytest.raises(CalibrationError, match="trained on"):
        held_out(samples, trained)


def test_images_that_were_trained_on_are_left_out_one_by_one(tmp_path: Path, tiny_model: Path) -> None:
    folder = images_of(tmp_path / "good", [1, 2, 1, 3, 2, 4])
    samples = find_dataset(folder).train_good
    digests = tuple(file_sha256(folder / name)[:16] for name in ("0.png", "5.png"))
    spec = read_spec(tiny_model).model_copy(update={"training": Training(image_digests=digests)})
    images = held_out(samples, spec)
    assert [sample.path.name for sample in images.samples] == ["1.png", "3.png"]
    assert (images.n_trained_on, images.n_copies) == (3, 1)
    assert images.sha256 == data_sha256(images.samples)
    with pytest.raises(CalibrationError, match="trained on"):
        held_out([samples[0], samples[2], samples[5]], spec)


@given(seed=st.integers(0, 10**6), n=st.integers(20, 90), m=st.integers(20, 200), shift=st.floats(-1, 1))
def test_score_shift_equals_scipy(seed: int, n: int, m: int, shift: float) -> None:
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(seed)
    new, known = rng.normal(shift, 1, n), rng.normal(0, 1, m)
    found = score_shift(new, known)
    assert found is not None
    expected = mannwhitneyu(new, known, alternative="greater", method="asymptotic", use_continuity=False)
    assert found.share == pytest.approx(expected.statistic / (n * m), abs=1e-12)
    assert found.p_value == pytest.approx(expected.pvalue, abs=1e-9)


def test_images_look_like_training_images_unless_they_score_higher() -> None:
    rng = np.random.default_rng(3)
    known = rng.normal(0, 1, 200)
    for shift, like_training in ((0.0, True), (-1.0, True), (0.5, False)):
        found = score_shift(rng.normal(shift, 1, 100), known)
        assert found is not None
        assert found.like_training is like_training, shift
    assert score_shift(known[:19], known) is None
    assert score_shift(known, known[:19]) is None
    assert score_shift(known, ()) is None


def test_a_threshold_is_written_only_into_files_that_hold_one(tmp_path: Path, tiny_model: Path) -> None:
    spec = read_spec(tiny_model)
    with pytest.raises(ModelError, match=r"expected an \.onnx or \.plan file"):
        write_threshold(tmp_path / "model.safetensors", spec, Threshold(value=1.0, method="manual"))
