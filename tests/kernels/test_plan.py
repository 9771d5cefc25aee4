"""The launch plan: alike with the CUDA source, blocks of equal work, every refusal."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recontrast_edge import kernels
from recontrast_edge.errors import InputError, ModelError
from recontrast_edge.kernels import KERNELS, AnomalyMapParams, AnomalyMapPlan, PreprocessParams, PreprocessPlan
from recontrast_edge.resample import fold_matrix
from recontrast_edge.scoring import VIEWS, reconstruction_name, target_name
from recontrast_edge.spec import InputSpec, Level, ModelSpec, Roi, Scoring
from tests.kernels.host import Host, kernel_folder

WIDE_RESNET50 = [(256, 64, 64), (512, 32, 32), (1024, 16, 16)]
RESNET18 = [(64, 64, 64), (128, 32, 32), (256, 16, 16)]
INPUT = InputSpec(size_wh=(256, 256), resize_wh=(256, 256), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def plan(levels_chw: list[tuple[int, int, int]] = RESNET18, **changes: Any) -> AnomalyMapPlan:
    options: dict[str, Any] = {"dtype": np.float16, "max_batch": 2, "multiprocessors": 16} | changes
    scoring = options.pop("scoring", Scoring())
    return AnomalyMapPlan(levels_chw, options.pop("size_wh", (256, 256)), scoring, **options)


def pointers(levels: int, address: int = 4096) -> dict[str, int]:
    return {
        name(view, level): address
        for level in range(levels)
        for view in range(VIEWS)
        for name in (target_name, reconstruction_name)
    }


def test_the_kernels_are_those_of_the_sources() -> None:
    text = "".join(path.read_text() for path in sorted(kernel_folder().glob("*.cu")))
    assert sorted(re.findall(r"__global__ void __launch_bounds__\(.*?\)\s+(\w+)\(", text)) == sorted(KERNELS)


def test_source_and_plan_agree_on_every_constant(host: Host) -> None:
    level = kernels._Level
    assert host.constants() == [
        kernels.MAX_LEVELS,
        VIEWS,
        kernels._SUMS,
        kernels._UNROLL,
        kernels.THREADS,
        kernels.FOLD_THREADS,
        kernels.FOLD_COLUMNS,
        kernels.FOLD_ROWS,
        kernels.FOLD_TAPS,
        *kernels.TILE_WH,
        kernels.TOP_THREADS,
        kernels.TOP_BLOCKS,
        kernels._TOP_SEGMENTS,
        kernels._TOP_LOADS,
        kernels.BINS,
        kernels.THREADS,
        ctypes.sizeof(level),
        ctypes.sizeof(AnomalyMapParams),
        ctypes.sizeof(PreprocessParams),
        plan(scoring=Scoring(rule="top")).launches(1)[-1].shared_bytes,
        level.channels.offset,
        level.first_block.offset,
        level.tile_columns.offset,
        AnomalyMapParams.map.offset,
        AnomalyMapParams.max_key.offset,
        AnomalyMapParams.segment_pixels.offset,
        PreprocessParams.source_pitch.offset,
        PreprocessParams.channel.offset,
        PreprocessParams.blue_u.offset,
    ]


@pytest.mark.parametrize("multiprocessors", [8, 16, 46, 132])
@pytest.mark.parametrize("levels_chw", [WIDE_RESNET50, RESNET18])
def test_blocks_have_equal_work_and_fill_the_gpu(levels_chw: list[tuple[int, int, int]], multiprocessors: int) -> None:
    made = plan(levels_chw, multiprocessors=multiprocessors)
    work = {level.split_channels * level.tile_pixels for level in made.levels}
    assert len(work) == 1
    assert all(level.pixels_per_load == 8 for level in made.levels)
    blocks = sum(level.blocks for level in made.levels)
    shallowest = all(level.split_channels == 4 * level.rows for level in made.levels)
    assert blocks >= 1.5 * multiprocessors or shallowest


def test_the_division_does_not_depend_on_the_batch() -> None:
    assert plan(max_batch=1).levels == plan(max_batch=64).levels


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    channels=st.integers(1, 3000),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    dtype=st.sampled_from([np.float16, np.float32]),
    alignment=st.sampled_from([4, 8, 16, 256]),
    multiprocessors=st.integers(1, 160),
)
def test_every_feature_belongs_to_exactly_one_block(
    channels: int, height: int, width: int, dtype: type, alignment: int, multiprocessors: int
) -> None:
    made = plan(
        [(channels, height, width)],
        size_wh=(width, height),
        dtype=dtype,
        alignment=alignment,
        multiprocessors=multiprocessors,
    )
    (level,) = made.levels
    assert level.split_channels * level.splits >= channels > level.split_channels * (level.splits - 1)
    assert level.tile_pixels * level.tiles >= height * width > level.tile_pixels * (level.tiles - 1)
    assert level.pixels_per_load * np.dtype(dtype).itemsize <= max(alignment, np.dtype(dtype).itemsize)
    assert height * width % level.pixels_per_load == 0
    assert level.columns * level.rows == kernels.THREADS


def test_of_spec_takes_levels_and_sizes_from_the_spec() -> None:
    spec = ModelSpec(
        class_name="x",
        backbone="x",
        input=INPUT.model_copy(update={"size_wh": (256, 128), "resize_wh": (256, 128)}),
        levels=(Level(stride=4, channels=24), Level(stride=8, channels=40)),
        weights_sha256="0" * 64,
    )
    made = AnomalyMapPlan.of_spec(spec, dtype=np.float32, max_batch=1, multiprocessors=16)
    assert [(level.channels, level.height, level.width) for level in made.levels] == [(24, 32, 64), (40, 16, 32)]
    assert made.size_wh == (256, 128)


def test_parts_of_the_workspace_do_not_overlap() -> None:
    for rule in ("max", "top"):
        made = plan(WIDE_RESNET50, max_batch=3, scoring=Scoring(rule=rule))  # type: ignore[arg-type]
        params = made.params(
            pointers(3), map_pointer=4096, score_pointer=4096, workspace_pointer=1 << 20, constants_pointer=4096
        )
        spans = []
        for index, level in enumerate(made.levels):
            at, tiles = params.level[index], 3 * level.tiles
            spans += [
                (at.arrivals, 4 * tiles),
                (at.partials, 4 * tiles * level.parts * 3 * level.tile_pixels),
                (at.distances, 4 * 3 * level.height * level.width),
            ]
        spans += [(params.arrivals, 12)]
        if rule == "max":
            spans += [(params.max_key, 12)]
            assert params.histogram is None
        else:
            segments = 3 * kernels._TOP_SEGMENTS
            spans += [(params.histogram, 4 * 3 * kernels.BINS), (params.candidate_counts, 4 * segments)]
            spans += [(params.candidates, 4 * segments * params.segment_pixels)]
        ends = [1 << 20]
        for start, size in sorted(spans):
            assert start >= ends[-1]
            ends.append(start + size)
        assert ends[-1] <= (1 << 20) + made.workspace_bytes


@pytest.mark.parametrize("sigma", [0.0, 0.5, 4.0, 64.0])
@pytest.mark.parametrize(("source", "target"), [(1, 7), (3, 8), (16, 256), (64, 256), (56, 224), (9, 9), (20, 161)])
def test_a_fold_holds_its_matrices(source: int, target: int, sigma: float) -> None:
    """Each read back as the kernel reads it: nothing lost, nothing past an edge but zeros."""
    made = plan([(1, source, source)], size_wh=(target, target), scoring=Scoring(blur_sigma=sigma))
    (fold,) = made.folds
    matrix = fold_matrix(source, target, sigma)
    rows, columns = np.zeros((2, 2 * target + 200, 2 * source + 200))
    assert len(fold.rows.weights[0]) % kernels.FOLD_TAPS == fold.column_taps % kernels.FOLD_TAPS == 0
    for group, (first, weights) in enumerate(zip(fold.rows.first, fold.rows.weights, strict=True)):
        assert 0 <= first < source
        rows[4 * group : 4 * group + 4, first : first + len(weights)] = weights.T
    tile_width, pairs = kernels.TILE_WH[0], kernels.TILE_WH[0] // 2
    for tile, weights in enumerate(fold.column_weights):
        assert 0 <= fold.tile_first[tile] < source
        for pair in range(pairs):
            offset = fold.column_first[tile, pair]
            assert 0 <= offset <= fold.tile_columns - fold.column_taps
            first, x = fold.tile_first[tile] + offset, tile * tile_width + 2 * pair
            columns[x : x + 2, first : first + fold.column_taps] = weights[:, 2 * pair : 2 * pair + 2].T
    for found in (rows, columns):
        np.testing.assert_allclose(found[:target, :source], matrix, atol=1e-7)
        assert not found[target:].any()
        assert not found[:, source:].any()


def test_batch_outside_the_plan_is_refused() -> None:
    for batch in (0, 3):
        with pytest.raises(ValueError, match=r"1\.\.2"):
            plan().launches(batch)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": np.int8},
        {"max_batch": 0},
        {"max_batch": 65536},
        {"multiprocessors": 0},
        {"alignment": 12},
        {"alignment": 1},
    ],
)
def test_impossible_arguments_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|must be|impossible"):
        plan(**changes)


def test_models_beyond_the_kernel_are_refused_with_the_way_out() -> None:
    with pytest.raises(ModelError, match="--head map"):
        plan([(1, 4, 4)] * 9, size_wh=(4, 4))
    plan([(1, 1, 1)] * kernels.MAX_LEVELS)
    with pytest.raises(ModelError, match="this model has 9"):
        plan([(1, 1, 1)] * kernels.MAX_LEVELS, scoring=Scoring(discriminator_weight=1.0))
    with pytest.raises(ModelError, match="shared memory"):
        plan([(1, 512, 512)] * 4, size_wh=(512, 512), scoring=Scoring(blur_sigma=64.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": {}}, "expected the features"),
        ({"features": pointers(3, 0)}, "multiple of 16"),
        ({"features": pointers(3, 4104)}, "multiple of 16"),
        ({"map_pointer": 0}, "float32 results"),
        ({"score_pointer": 4097}, "float32 results"),
        ({"workspace_pointer": 4}, "buffers aligned"),
        ({"constants_pointer": 0}, "buffers aligned"),
    ],
)
def test_wrong_pointers_are_refused(changes: dict[str, Any], message: str) -> None:
    options = {
        "features": pointers(3),
        "map_pointer": 4096,
        "score_pointer": 4096,
        "workspace_pointer": 4096,
        "constants_pointer": 4096,
    } | changes
    with pytest.raises(ValueError, match=message):
        plan().params(options.pop("features"), **options)


def test_a_discriminators_probability_must_be_there() -> None:
    made = plan(scoring=Scoring(discriminator_weight=1.0))
    addresses = dict.fromkeys(("map_pointer", "score_pointer", "workspace_pointer", "constants_pointer"), 4096)
    with pytest.raises(ValueError, match="defect_probability"):
        made.params(pointers(3), **addresses)
    made.params({**pointers(3), "defect_probability": 4096}, **addresses)


@pytest.mark.parametrize(
    ("spec", "source_wh", "pixel_format", "message"),
    [
        (INPUT, (0, 1920), "mono8", "at least 1x1"),
        (INPUT, (1921, 1080), "nv12", "even for NV12"),
        (INPUT.model_copy(update={"roi": Roi(x=1, y=0, width=100, height=100)}), (100, 100), "bgr8", "ROI"),
        (INPUT.model_copy(update={"size_wh": (1, 1), "resize_wh": (1, 1)}), (8192, 8), "bgr8", "too wide"),
    ],
)
def test_impossible_frames_are_refused(
    spec: InputSpec, source_wh: tuple[int, int], pixel_format: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        PreprocessPlan(spec, source_wh, pixel_format, dtype=np.float16)


@pytest.mark.parametrize(
    ("pixel_format", "changes", "message"),
    [
        ("bgr8", {"source_pointer": 0}, "null"),
        ("bgr8", {"out_pointer": 4097}, "misaligned"),
        ("bgr8", {"source_pitch": 299}, "at least 300"),
        ("mono8", {"source_pitch": 99}, "at least 100"),
        ("nv12", {"chroma_pointer": 0}, "chroma"),
        ("nv12", {"chroma_pitch": 99}, "chroma"),
    ],
)
def test_wrong_frame_pointers_are_refused(pixel_format: Any, changes: dict[str, int], message: str) -> None:
    made = PreprocessPlan(INPUT, (100, 100), pixel_format, dtype=np.float16)
    options = {
        "source_pointer": 4096,
        "source_pitch": 400,
        "out_pointer": 4096,
        "constants_pointer": 4096,
        "chroma_pointer": 4096,
        "chroma_pitch": 400,
    } | changes
    with pytest.raises(ValueError, match=message):
        made.params(**options)


def test_preprocess_tiles_fit_shared_memory_up_to_large_frames() -> None:
    for source_wh in [(64, 48), (640, 480), (1920, 1200), (4096, 3000), (16384, 16384)]:
        for pixel_format in ("bgr8", "mono8", "nv12"):
            made = PreprocessPlan(INPUT, source_wh, pixel_format, dtype=np.float16)  # type: ignore[arg-type]
            (launch,) = made.launches()
            assert launch.shared_bytes <= 48 * 1024
            assert launch.grid[0] * made.tile_wh[0] >= 256
            assert launch.grid[1] * made.tile_wh[1] >= 256
