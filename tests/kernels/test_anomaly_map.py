"""``anomaly_map.cu``, its own source on the host, against the oracle in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recontrast_edge.kernels import AnomalyMapPlan
from recontrast_edge.scoring import (
    PROBABILITY_NAME,
    VIEWS,
    fold_maps,
    image_scores,
    level_distances,
    reconstruction_name,
    target_name,
    top_count,
    weighted,
)
from recontrast_edge.spec import Scoring
from tests.kernels.host import Host

Features = dict[str, NDArray[Any]]
LevelsChw = list[tuple[int, int, int]]

BOUND = {np.float16: 2e-3, np.float32: 1e-5}
"""Largest error of the map that is allowed."""
TIGHT = 1e-5
"""Largest error that is met: FP16 features are read exactly, so their error is FP32's too."""

LEVELS: LevelsChw = [(40, 12, 12), (72, 6, 6), (129, 3, 3)]
SIZE_WH = (48, 48)


def make_features(
    levels_chw: LevelsChw, batch: int, dtype: type, *, seed: int = 0, scale: float = 1.0, probability: bool = False
) -> Features:
    """Reconstructions that are close at some pixels and far off at others, as a trained model's are.

    With ``probability`` also what a discriminator gives.
    """
    rng = np.random.default_rng(seed)
    features: Features = {}
    for view in range(VIEWS):
        for index, chw in enumerate(levels_chw):
            target = rng.standard_normal((batch, *chw))
            noise = rng.standard_normal(target.shape) * rng.uniform(0.0, 2.0, (batch, 1, *chw[1:]))
            features[target_name(view, index)] = (scale * target).astype(dtype)
            features[reconstruction_name(view, index)] = (scale * (target + noise)).astype(dtype)
    if probability:
        features[PROBABILITY_NAME] = rng.uniform(size=(batch, 1, *levels_chw[0][1:])).astype(np.float32)
    return features


def oracle(features: Features, size_wh: tuple[int, int], scoring: Scoring) -> NDArray[np.float64]:
    levels = len(features) // (2 * VIEWS)
    pairs = [
        [
            (
                features[target_name(view, index)].astype(np.float64),
                features[reconstruction_name(view, index)].astype(np.float64),
            )
            for index in range(levels)
        ]
        for view in range(VIEWS)
    ]
    probability = features[PROBABILITY_NAME][:, 0].astype(np.float64) if PROBABILITY_NAME in features else None
    return fold_maps(weighted(level_distances(pairs), scoring, probability), size_wh, scoring.blur_sigma)


def make_plan(features: Features, size_wh: tuple[int, int] = SIZE_WH, **changes: Any) -> AnomalyMapPlan:
    levels = len(features) // (2 * VIEWS)
    first = features[target_name(0, 0)]
    options: dict[str, Any] = {"max_batch": first.shape[0], "multiprocessors": 16} | changes
    shapes = [features[target_name(0, index)].shape[1:] for index in range(levels)]
    return AnomalyMapPlan(shapes, size_wh, options.pop("scoring", Scoring()), dtype=first.dtype, **options)  # type: ignore[arg-type]


def exact_scores(maps: NDArray[np.float32], scoring: Scoring) -> NDArray[np.float64]:
    """Scores of the kernel's own map: selecting pixels has no rounding to hide behind."""
    return image_scores(maps.astype(np.float64), scoring)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_map_and_score_equal_the_oracle(host: Host, data: st.DataObject) -> None:
    side = st.integers(1, 13)
    levels_chw = data.draw(st.lists(st.tuples(st.integers(1, 150), side, side), min_size=1, max_size=3), "levels")
    size_wh = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 40)), "size_wh")
    dtype = data.draw(st.sampled_from([np.float16, np.float32]), "dtype")
    scoring = Scoring(
        blur_sigma=data.draw(st.sampled_from([0.0, 0.7, 4.0, 20.0]), "sigma"),
        rule=data.draw(st.sampled_from(["max", "top"]), "rule"),
        top_fraction=data.draw(st.sampled_from([0.01, 0.3, 0.999]), "top_fraction"),
        discriminator_weight=data.draw(st.sampled_from([None, 1.0]), "discriminator_weight"),
    )
    batch = data.draw(st.integers(1, 3), "batch")
    has_probability = scoring.discriminator_weight is not None
    features = make_features(
        levels_chw, batch, dtype, seed=data.draw(st.integers(0, 99), "seed"), probability=has_probability
    )
    plan = make_plan(
        features,
        size_wh,
        scoring=scoring,
        multiprocessors=data.draw(st.sampled_from([1, 8, 132]), "multiprocessors"),
    )
    maps, scores = host.anomaly_map(features, plan)
    assert np.abs(maps - oracle(features, size_wh, scoring)).max() <= TIGHT <= BOUND[dtype]
    np.testing.assert_allclose(scores, exact_scores(maps, scoring), rtol=2e-6, atol=0)
    if scoring.rule == "max":
        np.testing.assert_array_equal(scores, maps.max(axis=(1, 2)))


def test_levels_count_by_their_weights(host: Host) -> None:
    features = make_features(LEVELS, 2, np.float16)
    scoring = Scoring(level_weights=(0.0, 2.5, 0.4))
    maps, _ = host.anomaly_map(features, make_plan(features, scoring=scoring))
    assert np.abs(maps - oracle(features, SIZE_WH, scoring)).max() <= 2.5 * TIGHT
    assert np.abs(maps - oracle(features, SIZE_WH, Scoring())).max() > 0.1


@pytest.mark.parametrize("probability", [False, True])
def test_what_is_in_a_level_of_weight_zero_has_no_say(host: Host, probability: bool) -> None:
    weights = (0.0, 0.0, 0.0) if probability else (0.0, 1.0, 0.0)
    scoring = Scoring(level_weights=weights, discriminator_weight=2.0 if probability else None)
    features = make_features(LEVELS, 2, np.float16, probability=probability)
    expected = oracle(features, SIZE_WH, scoring)
    for view in range(VIEWS):
        features[target_name(view, 0)][:] = np.inf
        features[reconstruction_name(view, 2)][:] = np.nan
    plan = make_plan(features, scoring=scoring)
    maps, scores = host.anomaly_map(features, plan)
    assert np.abs(maps - expected).max() <= 2 * TIGHT
    np.testing.assert_array_equal(scores, maps.max(axis=(1, 2)))
    assert len(plan.levels) == (0 if probability else 1)


@pytest.mark.parametrize("weights", [None, (0.0, 2.5, 0.4)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_a_discriminator_found_is_one_more_level(host: Host, dtype: type, weights: Any) -> None:
    features = make_features(LEVELS, 3, dtype, probability=True)
    scoring = Scoring(level_weights=weights, discriminator_weight=12.0)
    plan = make_plan(features, scoring=scoring)
    maps, scores = host.anomaly_map(features, plan, before=[make_features(LEVELS, 3, dtype, seed=1, probability=True)])
    assert np.abs(maps - oracle(features, SIZE_WH, scoring)).max() <= 12 * TIGHT
    np.testing.assert_array_equal(scores, maps.max(axis=(1, 2)))
    features[PROBABILITY_NAME][1, 0, 5, 7] = np.nan
    maps, scores = host.anomaly_map(features, plan)
    np.testing.assert_array_equal(np.isnan(scores), [False, True, False])


@pytest.mark.parametrize("sigma", [4.0, 64.0])
def test_a_blur_too_wide_for_shared_memory(host: Host, sigma: float) -> None:
    """Its matrices are read where they are."""
    features = make_features([(2, 64, 64), (3, 64, 64), (4, 64, 64)], 1, np.float32)
    plan = make_plan(features, (65, 64), scoring=Scoring(blur_sigma=sigma))
    assert plan.stages_columns == (sigma < 64)
    maps, scores = host.anomaly_map(features, plan)
    assert np.abs(maps - oracle(features, (65, 64), plan.scoring)).max() <= TIGHT
    np.testing.assert_array_equal(scores, maps.max(axis=(1, 2)))


@pytest.mark.parametrize("size_wh", [(48, 48), (160, 128)])
def test_the_top_of_a_flat_map(host: Host, size_wh: tuple[int, int]) -> None:
    """As a good part's is: every pixel may belong to it."""
    features = make_features([(4, 12, 12)], 1, np.float32)
    for tensor in features.values():
        tensor[:] = 1.0
    features[target_name(0, 0)][0, 0] += np.random.default_rng(0).uniform(0, 1e-3, (12, 12))
    plan = make_plan(features, size_wh, scoring=Scoring(rule="top"))
    maps, scores = host.anomaly_map(features, plan)
    np.testing.assert_allclose(scores, exact_scores(maps, plan.scoring), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("rule", ["max", "top"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_geometry_of_a_real_model(host: Host, dtype: type, rule: Any) -> None:
    features = make_features([(64, 32, 32), (128, 16, 16), (256, 8, 8)], 1, dtype)
    plan = make_plan(features, (128, 128), scoring=Scoring(rule=rule), multiprocessors=132)
    assert all(level.splits > 1 for level in plan.levels)
    maps, scores = host.anomaly_map(features, plan)
    assert np.abs(maps - oracle(features, (128, 128), plan.scoring)).max() <= TIGHT
    np.testing.assert_allclose(scores, exact_scores(maps, plan.scoring), rtol=2e-6)


@pytest.mark.parametrize(("dtype", "alignment"), [(np.float16, 2), (np.float16, 8), (np.float32, 4), (np.float32, 8)])
def test_features_less_aligned_than_a_wide_load(host: Host, dtype: type, alignment: int) -> None:
    features = make_features(LEVELS, 2, dtype)
    shifted = {}
    for name, tensor in features.items():
        start = alignment // tensor.itemsize
        shifted[name] = np.empty(tensor.size + start, dtype)[start:].reshape(tensor.shape)
        shifted[name][:] = tensor
        assert shifted[name].ctypes.data % 16 == alignment
    plan = make_plan(features, alignment=alignment)
    assert all(level.pixels_per_load * features[target_name(0, 0)].itemsize <= 8 for level in plan.levels)
    maps, _ = host.anomaly_map(shifted, plan)
    assert np.abs(maps - oracle(features, SIZE_WH, plan.scoring)).max() <= TIGHT


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("zero", ["target", "reconstruction", "both"])
def test_zero_vectors_have_distance_one(host: Host, dtype: type, zero: str) -> None:
    features = make_features(LEVELS, 1, dtype)
    for name, tensor in features.items():
        if zero in (name.rstrip("0123456789_"), "both"):
            tensor[:] = 0
    maps, scores = host.anomaly_map(features, make_plan(features))
    assert np.abs(maps - VIEWS * len(LEVELS)).max() <= TIGHT
    assert np.abs(scores - VIEWS * len(LEVELS)).max() <= TIGHT


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(np.float16, 6e4 / 9), (np.float16, 2e-6), (np.float32, 1e17), (np.float32, 1e-8), (np.float32, 1e-25)],
)
def test_huge_and_tiny_values(host: Host, dtype: type, scale: float) -> None:
    features = make_features(LEVELS, 1, dtype, scale=scale)
    assert all(np.isfinite(tensor).all() for tensor in features.values())
    plan = make_plan(features)
    maps, scores = host.anomaly_map(features, plan)
    assert np.abs(maps - oracle(features, SIZE_WH, plan.scoring)).max() <= TIGHT
    assert np.isfinite(scores).all()


def test_the_largest_fp16_value_everywhere_does_not_overflow(host: Host) -> None:
    features = make_features([(300, 4, 4)], 1, np.float16)
    for tensor in features.values():
        tensor[:] = np.float16(65504.0)
    maps, _ = host.anomaly_map(features, make_plan(features, (16, 16)))
    assert np.abs(maps).max() <= TIGHT


def test_the_documented_range_of_fp32(host: Host) -> None:
    """Vectors up to a norm of 1.8e19 are compared; 1e18 in each of 300 channels has 1.7e19."""
    features = make_features([(300, 4, 4)], 1, np.float32)
    for index, tensor in enumerate(features.values()):
        tensor[:] = 1e18 if index % 2 else -1e18
    maps, _ = host.anomaly_map(features, make_plan(features, (16, 16)))
    assert np.abs(maps - 2 * VIEWS).max() <= TIGHT


@pytest.mark.parametrize("rule", ["max", "top"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e19])
@pytest.mark.parametrize("tensor", [target_name(0, 0), reconstruction_name(1, 1)])
def test_what_cannot_be_compared_reaches_the_score(host: Host, tensor: str, value: float, rule: Any) -> None:
    levels_chw = [(9, 4, 4), (16, 2, 2)]
    features = make_features(levels_chw, 2, np.float32)
    features[tensor][1, 5, 1, 1] = value
    # Against a zero vector, an overflow of the one norm alone would look like distance 1.
    other = {target_name(0, 0): reconstruction_name(0, 0), reconstruction_name(1, 1): target_name(1, 1)}[tensor]
    features[other][1, :, 1, 1] = 0
    _, scores = host.anomaly_map(features, make_plan(features, (16, 16), scoring=Scoring(rule=rule)))
    assert np.isfinite(scores[0])
    assert np.isnan(scores[1])


@pytest.mark.parametrize("rule", ["max", "top"])
def test_fp16_infinity_reaches_the_score(host: Host, rule: Any) -> None:
    features = make_features([(9, 4, 4)], 1, np.float16)
    features[target_name(1, 0)][0, 8, 3, 3] = np.inf
    _, scores = host.anomaly_map(features, make_plan(features, (16, 16), scoring=Scoring(rule=rule)))
    assert np.isnan(scores[0])


@pytest.mark.parametrize("rule", ["max", "top"])
def test_an_image_gets_the_same_bits_alone_in_a_batch_and_whatever_block_comes_last(host: Host, rule: Any) -> None:
    features = make_features(LEVELS, 3, np.float16)
    options = {"scoring": Scoring(rule=rule), "multiprocessors": 132}
    maps, scores = host.anomaly_map(features, make_plan(features, **options))
    alone = {name: tensor[1:2].copy() for name, tensor in features.items()}
    try:
        host.teams, host.seed = 2, 7
        map_alone, score_alone = host.anomaly_map(alone, make_plan(alone, **options))
    finally:
        host.teams, host.seed = 1, 0
    np.testing.assert_array_equal(map_alone[0], maps[1])
    assert score_alone[0] == scores[1]


@pytest.mark.parametrize("rule", ["max", "top"])
def test_a_frame_leaves_nothing_behind_for_the_next(host: Host, rule: Any) -> None:
    levels_chw = [(40, 5, 5), (16, 2, 2)]
    features = make_features(levels_chw, 2, np.float16)
    opposite = {name: tensor * (-1 if name.startswith("target") else 1) for name, tensor in features.items()}
    zero = {name: np.zeros_like(tensor) for name, tensor in features.items()}
    nan = {name: np.full_like(tensor, np.nan) for name, tensor in features.items()}
    plan = make_plan(features, (32, 16), scoring=Scoring(rule=rule), max_batch=4, multiprocessors=132)
    maps, scores = host.anomaly_map(features, plan)
    maps_later, scores_later = host.anomaly_map(features, plan, before=[opposite, nan, zero])
    np.testing.assert_array_equal(maps_later, maps)
    np.testing.assert_array_equal(scores_later, scores)


def test_keys_have_the_order_of_floats_with_nan_on_top(host: Host) -> None:
    ascending = np.array([-np.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1e-7, 1.0, 4.0, 3e38, np.inf], np.float32)
    keys = [host.key_of(value) for value in ascending]
    assert keys == sorted(set(keys))
    assert [host.value_of(key) for key in keys] == ascending.tolist()
    for bits in (0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF):
        key = host.key_of(np.uint32(bits).view(np.float32))
        assert key > keys[-1]
        assert np.isnan(host.value_of(key))


@pytest.mark.parametrize("top_fraction", [0.001, 0.1, 0.5, 0.999])
def test_top_of_a_map_full_of_ties(host: Host, top_fraction: float) -> None:
    """Whole areas of one value: the smallest of the top is shared by pixels inside and outside of it."""
    features = make_features([(4, 8, 8)], 1, np.float32)
    for name, tensor in features.items():
        tensor[:] = 1.0
        if name.startswith("target"):
            tensor[:, 0, :4] = 3.0
            tensor[:, 1, 0] = -5.0
    scoring = Scoring(blur_sigma=0.0, rule="top", top_fraction=top_fraction)
    maps, scores = host.anomaly_map(features, make_plan(features, (8, 8), scoring=scoring))
    assert len(np.unique(maps)) <= 4
    np.testing.assert_allclose(scores, exact_scores(maps, scoring), rtol=2e-6)
    assert top_count(64, scoring) == max(1, int(64 * top_fraction))
