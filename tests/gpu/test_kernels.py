"""The kernels on a GPU, with the very tests that their source passes on the host, and what only a GPU can show.

python -m pytest tests/gpu/test_kernels.py
"""

from __future__ import annotations

import numpy as np
import pytest

from recontrast_edge.cuda import compiler
from recontrast_edge.cuda.compiler import compiled_kernels
from recontrast_edge.errors import MissingError
from recontrast_edge.kernels import PreprocessPlan
from recontrast_edge.preprocess import preprocess
from recontrast_edge.spec import Scoring
from recontrast_edge.user_cache import cache_folder
from tests.gpu.gpu import Gpu
from tests.kernels.test_anomaly_map import (  # noqa: F401 - collected here as this module's tests
    LEVELS,
    make_features,
    make_plan,
    oracle,
    test_a_frame_leaves_nothing_behind_for_the_next,
    test_an_image_gets_the_same_bits_alone_in_a_batch_and_whatever_block_comes_last,
    test_features_less_aligned_than_a_wide_load,
    test_fp16_infinity_reaches_the_score,
    test_geometry_of_a_real_model,
    test_huge_and_tiny_values,
    test_levels_count_by_their_weights,
    test_map_and_score_equal_the_oracle,
    test_the_documented_range_of_fp32,
    test_the_largest_fp16_value_everywhere_does_not_overflow,
    test_top_of_a_map_full_of_ties,
    test_what_a_discriminator_found_is_one_more_level,
    test_what_cannot_be_compared_reaches_the_score,
    test_zero_vectors_have_distance_one,
)
from tests.kernels.test_preprocess import (  # noqa: F401 - collected here as this module's tests
    BOUND,
    make_spec,
    test_a_camera_frame_much_larger_than_the_network,
    test_nv12_takes_the_matrix_it_is_told,
    test_nv12_with_rows_longer_than_the_picture,
    test_word_loads_only_where_rows_are_aligned,
)


@pytest.fixture(scope="session")
def host(gpu: Gpu) -> Gpu:
    """What the imported tests call the machine that runs the kernels."""
    return gpu


WIDE_RESNET = [(256, 64, 64), (512, 32, 32), (1024, 16, 16)]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("rule", ["max", "top"])
@pytest.mark.parametrize(("dtype", "bound"), [(np.float16, 2e-3), (np.float32, 1e-5)])
def test_wide_resnet_at_its_full_size(gpu: Gpu, batch: int, rule, dtype: type, bound: float) -> None:
    features = make_features(WIDE_RESNET, batch, dtype)
    scoring = Scoring(rule=rule)
    plan = make_plan(features, (256, 256), scoring=scoring, multiprocessors=gpu.device.multiprocessors)
    maps, scores = gpu.anomaly_map(features, plan)
    assert np.abs(maps - oracle(features, (256, 256), scoring)).max() <= bound
    if rule == "max":
        np.testing.assert_array_equal(scores, maps.max(axis=(1, 2)))


@pytest.mark.parametrize("rule", ["max", "top"])
def test_a_graph_gives_the_same_bits(gpu: Gpu, rule) -> None:
    features = make_features(LEVELS, 3, np.float16)
    plan = make_plan(features, scoring=Scoring(rule=rule), multiprocessors=gpu.device.multiprocessors)
    plain = gpu.anomaly_map(features, plan)
    for _ in range(3):
        captured = gpu.anomaly_map(features, plan, graph=True)
        np.testing.assert_array_equal(captured[0], plain[0])
        np.testing.assert_array_equal(captured[1], plain[1])


@pytest.mark.parametrize(
    "shape", [(1200, 1920, 3), (1040, 1024), (37, 45, 3), (256, 256, 3)], ids=["large", "mono", "smallest", "equal"]
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_frames_of_cameras(gpu: Gpu, shape: tuple[int, ...], dtype: type) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    spec = make_spec(size_wh=(256, 256), resize_wh=(256, 256))
    plan = PreprocessPlan(spec, (shape[1], shape[0]), "bgr8" if len(shape) == 3 else "mono8", dtype=dtype)
    assert np.abs(gpu.preprocess(image, plan) - preprocess(image, spec)).max() <= BOUND[dtype]


def test_kernels_that_were_compiled_here_load(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """What a GPU gets that the packaged fatbin does not know."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        image = compiled_kernels(gpu.device.compute_capability)
    except MissingError as error:
        pytest.skip(str(error))
    assert len(list(cache_folder(compiler.CACHE_KIND).iterdir())) == 1
    with gpu.device.current():
        module = gpu.device.load(image)
        module.function("distance_fp16")
        module.close()
