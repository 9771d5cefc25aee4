"""Launch plans of the CUDA kernels: every grid, buffer and constant, as plain numbers; nothing here touches a GPU.

    plan = AnomalyMapPlan.of_spec(spec, dtype=np.float16, max_batch=8, multiprocessors=132)
    params = plan.params(feature_pointers, map_pointer=m, score_pointer=s, workspace_pointer=w, constants_pointer=c)
    for launch in plan.launches(batch=1): ...  # the kernel of this name, with ``params`` as its only argument

A launcher uploads ``plan.constants`` once, allocates ``plan.workspace_bytes`` and sets them to zero once (the kernels
leave behind what the next launch needs), and then only launches. One workspace serves one stream. The kernels are
``kernels.cu``, as a fatbin where the package was built with nvcc, else for NVRTC to compile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from recontrast_edge.errors import InputError, ModelError
from recontrast_edge.preprocess import YUV_MATRICES, Geometry, YuvStandard
from recontrast_edge.resample import Band, GroupedBand, antialias_matrix, fold_matrix
from recontrast_edge.scoring import (
    PROBABILITY_NAME,
    VIEWS,
    level_weights,
    reconstruction_name,
    target_name,
    top_count,
)
from recontrast_edge.spec import InputSpec, ModelSpec, Scoring

SOURCE = "kernels.cu"
"""Includes the other files of this folder; its kernels have C names."""
FATBIN = "kernels.fatbin"
"""Beside the source where nvcc was there when the package was built."""

KERNELS = (
    *("distance_fp16", "distance_fp32", "fold_map", "top_score"),
    *("preprocess_packed_fp16", "preprocess_packed_fp32", "preprocess_nv12_fp16", "preprocess_nv12_fp32"),
)
"""All of them, by name."""

# The same numbers stand in anomaly_map.cu and preprocess.cu; the tests compare them.
MAX_LEVELS = 8
THREADS = 256
FOLD_THREADS = 128
FOLD_COLUMNS = 2
FOLD_ROWS = 4
FOLD_TAPS = 4
TILE_WH = (64, 16)
TOP_THREADS = 512
TOP_BLOCKS = 16
_TOP_LOADS = 8
BINS = 2048

_SUMS = 3
_UNROLL = 4
_WARP = 32
_TOP_SEGMENTS = TOP_BLOCKS * TOP_THREADS // _WARP
_LOAD_BYTES = 16
_ALIGNMENT = 256
"""Of each part of workspace and constants, in bytes."""
_NO_BLOCK = 2**31 - 1
"""First block of a level that the distance kernel has nothing to do with."""
_SHARED_BYTES = 48 * 1024
"""What every GPU gives a block without being asked for more."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch; its only argument is the plan's parameter struct, by value."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    """Dynamic shared memory; there is no other."""


class _Level(ctypes.Structure):
    """``Level`` of anomaly_map.cu."""

    _fields_ = [
        ("target", ctypes.c_void_p * VIEWS),
        ("reconstruction", ctypes.c_void_p * VIEWS),
        ("partials", ctypes.c_void_p),
        ("distances", ctypes.c_void_p),
        ("arrivals", ctypes.c_void_p),
        ("row_first", ctypes.c_void_p),
        ("row_weights", ctypes.c_void_p),
        ("tile_first", ctypes.c_void_p),
        ("channels", ctypes.c_int),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("row_taps", ctypes.c_int),
        ("column_taps", ctypes.c_int),
        ("tile_columns", ctypes.c_int),
        ("pixels_per_load", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("splits", ctypes.c_int),
        ("split_channels", ctypes.c_int),
        ("first_block", ctypes.c_int),
    ]


class AnomalyMapParams(ctypes.Structure):
    """``AnomalyMapParams`` of anomaly_map.cu."""

    _fields_ = [
        ("level", _Level * MAX_LEVELS),
        ("map", ctypes.c_void_p),
        ("score", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("max_key", ctypes.c_void_p),
        ("arrivals", ctypes.c_void_p),
        ("histogram", ctypes.c_void_p),
        ("candidates", ctypes.c_void_p),
        ("candidate_counts", ctypes.c_void_p),
        ("levels", ctypes.c_int),
        ("fold_columns", ctypes.c_int),
        ("fold_taps", ctypes.c_int),
        ("stages_columns", ctypes.c_int),
        ("map_height", ctypes.c_int),
        ("map_width", ctypes.c_int),
        ("top_count", ctypes.c_int),
        ("segment_pixels", ctypes.c_int),
    ]


class PreprocessParams(ctypes.Structure):
    """``PreprocessParams`` of preprocess.cu."""

    _fields_ = [
        ("source", ctypes.c_void_p),
        ("chroma", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("row_first", ctypes.c_void_p),
        ("row_weights", ctypes.c_void_p),
        ("column_first", ctypes.c_void_p),
        ("column_weights", ctypes.c_void_p),
        ("source_pitch", ctypes.c_int),
        ("chroma_pitch", ctypes.c_int),
        ("pixel_bytes", ctypes.c_int),
        ("word_loads", ctypes.c_int),
        ("width", ctypes.c_int),
        ("height", ctypes.c_int),
        ("row_taps", ctypes.c_int),
        ("column_taps", ctypes.c_int),
        ("tile_width", ctypes.c_int),
        ("tile_height", ctypes.c_int),
        ("channel", ctypes.c_int * 3),
        ("scale", ctypes.c_float * 3),
        ("offset", ctypes.c_float * 3),
        ("luma_gain", ctypes.c_int),
        ("red_v", ctypes.c_int),
        ("green_u", ctypes.c_int),
        ("green_v", ctypes.c_int),
        ("blue_u", ctypes.c_int),
    ]


class _Layout:
    """Where the parts of one allocation lie."""

    def __init__(self) -> None:
        self.bytes = 0
        self.offsets: dict[str, int] = {}

    def add(self, name: str, size_bytes: int) -> None:
        self.offsets[name] = self.bytes
        self.bytes += _round_up(size_bytes, _ALIGNMENT)


class _Constants:
    """Arrays gathered into the one buffer that is uploaded."""

    def __init__(self) -> None:
        self._layout = _Layout()
        self._arrays: list[tuple[int, NDArray[np.uint8]]] = []

    def add(self, name: str, array: NDArray[Any]) -> None:
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        self._layout.add(name, data.size)
        self._arrays.append((self._layout.offsets[name], data))

    def add_band(self, name: str, band: Band) -> None:
        """``first`` and ``weights``, as ``<name>_first`` and ``<name>_weights``."""
        self.add(f"{name}_first", band.first)
        self.add(f"{name}_weights", band.weights)

    def gather(self) -> tuple[NDArray[np.uint8], dict[str, int]]:
        """The buffer and the offset of each array in it."""
        buffer = np.zeros(self._layout.bytes, np.uint8)
        for offset, data in self._arrays:
            buffer[offset : offset + data.size] = data
        return buffer, self._layout.offsets


@dataclass(frozen=True)
class LevelPlan:
    """How one level's features are divided among blocks of ``THREADS`` threads."""

    index: int
    """Of the model's levels, finest first."""
    channels: int
    height: int
    width: int
    pixels_per_load: int
    """Neighbouring pixels a thread reads with one load."""
    columns: int
    """Threads of a block along the pixels; the others go along the channels."""
    tiles: int
    """Blocks along the pixels."""
    splits: int
    """Blocks along the channels."""
    split_channels: int
    first_block: int
    """Of this level in the grid."""

    @property
    def rows(self) -> int:
        """Threads of a block along the channels."""
        return THREADS // self.columns

    @property
    def parts(self) -> int:
        """Blocks that share one tile."""
        return VIEWS * self.splits

    @property
    def blocks(self) -> int:
        """Blocks for one image."""
        return self.tiles * self.parts

    @property
    def tile_pixels(self) -> int:
        return self.columns * self.pixels_per_load


@dataclass(frozen=True, eq=False)
class Fold:
    """One level's two matrices as ``fold_map`` reads them.

    Attributes:
        rows: ``R_l`` in groups of ``FOLD_ROWS`` rows.
        tile_first: (tiles,) int32, first column of ``d_l`` under each tile.
        tile_columns: columns under any tile; what lies past the last one of ``d_l`` has weight 0.
        column_first: (tiles, 32) int32, first column that ``FOLD_COLUMNS`` pixels take, counted from the tile's.
        column_weights: (tiles, column_taps, TILE_WH[0]) float32.
    """

    rows: GroupedBand
    tile_first: NDArray[np.int32]
    tile_columns: int
    column_first: NDArray[np.int32]
    column_weights: NDArray[np.float32]

    @property
    def column_taps(self) -> int:
        return int(self.column_weights.shape[1])

    @classmethod
    def of(cls, rows: NDArray[np.float64], columns: NDArray[np.float64]) -> Fold:
        """From ``R_l`` (height, h_l) and ``C_l`` (width, w_l)."""
        band = GroupedBand.of(columns, rows=FOLD_COLUMNS, taps_multiple=FOLD_TAPS)
        groups, taps, _ = band.weights.shape
        pairs = TILE_WH[0] // FOLD_COLUMNS
        # The last tile's pixels past the edge read what its last ones do, and have no weight.
        missing = -groups % pairs
        first = np.pad(band.first, (0, missing), mode="edge").reshape(-1, pairs)
        weights = np.pad(band.weights, ((0, missing), (0, 0), (0, 0))).reshape(-1, pairs, taps, FOLD_COLUMNS)
        tile_first = first.min(axis=1)
        return cls(
            rows=GroupedBand.of(rows, rows=FOLD_ROWS, taps_multiple=FOLD_TAPS),
            tile_first=tile_first.astype(np.int32),
            tile_columns=int((first.max(axis=1) - tile_first).max()) + taps,
            column_first=(first - tile_first[:, None]).astype(np.int32),
            column_weights=weights.transpose(0, 2, 1, 3).reshape(len(first), taps, TILE_WH[0]),
        )


class AnomalyMapPlan:
    """Launch plan of ``anomaly_map.cu``: feature pairs to anomaly maps and scores.

    The division of the channels depends on the model and the GPU, never on the batch, so that an image gets the same
    bits alone and in a batch.

    Args:
        levels_chw: (channels, height, width) of each level's features, finest first.
        size_wh: width and height of the map in pixels.
        scoring: blur, score rule and weights, of a discriminator as well.
        dtype: of the features, float16 or float32.
        max_batch: images that the workspace has room for, 1..65535.
        multiprocessors: of the GPU.
        alignment: bytes that every feature pointer is a multiple of. Less than 16 gives slow scalar loads.

    Raises:
        ModelError: the model has more levels, or needs more shared memory, than the kernel offers.
        ValueError: another argument is out of its range.
    """

    def __init__(
        self,
        levels_chw: Sequence[tuple[int, int, int]],
        size_wh: tuple[int, int],
        scoring: Scoring,
        *,
        dtype: DTypeLike,
        max_batch: int,
        multiprocessors: int,
        alignment: int = _LOAD_BYTES,
    ) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float16), np.dtype(np.float32)):
            raise ValueError(f"expected features of float16 or float32, got {self.dtype}")
        if not 1 <= max_batch <= 65535:
            raise ValueError(f"max_batch must be 1..65535, got {max_batch}")
        if multiprocessors < 1 or alignment < self.dtype.itemsize or alignment & (alignment - 1):
            raise ValueError(f"impossible GPU or alignment: {multiprocessors} multiprocessors, {alignment} bytes")
        # A discriminator's probability is folded like the distances of one more level.
        n_folded = len(levels_chw) + (scoring.discriminator_weight is not None)
        if not levels_chw or n_folded > MAX_LEVELS:
            raise ModelError(
                f"the CUDA kernel folds 1 to {MAX_LEVELS} levels, this model has {n_folded}; export it with "
                "`--head map`, which needs no kernel"
            )
        self.size_wh = size_wh
        self.scoring = scoring
        self.max_batch = max_batch
        self.alignment = alignment
        self._n_levels = len(levels_chw)
        self._probability_hw = levels_chw[0][1:]
        weights = level_weights(scoring, len(levels_chw))
        # As in the oracle, a level of weight 0 is left out: whatever is in it has no say.
        counted = [index for index, weight in enumerate(weights) if weight]
        self.levels = _divide({i: levels_chw[i] for i in counted}, self.dtype.itemsize, alignment, multiprocessors)
        # A level's weight goes into one of its two matrices.
        sizes = [(*levels_chw[index][1:], weights[index]) for index in counted]
        if scoring.discriminator_weight is not None:
            sizes.append((*levels_chw[0][1:], scoring.discriminator_weight))
        self.folds = [
            Fold.of(
                weight * fold_matrix(height, size_wh[1], scoring.blur_sigma),
                fold_matrix(width, size_wh[0], scoring.blur_sigma),
            )
            for height, width, weight in sizes
        ]
        constants = _Constants()
        for index, fold in enumerate(self.folds):
            constants.add(f"row_first{index}", fold.rows.first)
            constants.add(f"row_weights{index}", fold.rows.weights)
            constants.add(f"tile_first{index}", fold.tile_first)
        matrices = [fold.column_weights.reshape(len(fold.tile_first), -1) for fold in self.folds]
        constants.add(
            "columns", np.concatenate([*matrices, *(fold.column_first.view(np.float32) for fold in self.folds)], 1)
        )
        self.constants, self._constant_offsets = constants.gather()
        warps = FOLD_THREADS // _WARP
        self._fold_columns = sum(fold.tile_columns for fold in self.folds)
        self._fold_taps = sum(fold.column_taps for fold in self.folds)
        # A key each warp, a tile's columns, and for each warp its rows folded. A wide blur's columns are not copied.
        columns = self._fold_taps * TILE_WH[0] + len(self.folds) * _WARP
        folded = warps + warps * self._fold_columns * FOLD_ROWS
        self.stages_columns = 4 * (columns + folded) <= _SHARED_BYTES
        self._fold_shared_bytes = 4 * (folded + (columns if self.stages_columns else 0))
        if self._fold_shared_bytes > _SHARED_BYTES:
            raise ModelError(
                f"a blur of sigma {scoring.blur_sigma} over these levels needs {self._fold_shared_bytes} bytes of "
                f"shared memory, a GPU block has {_SHARED_BYTES}; export the model with `--head map`, which needs no "
                "kernel"
            )
        self._workspace = self._lay_out_workspace()

    @classmethod
    def of_spec(
        cls,
        spec: ModelSpec,
        *,
        dtype: DTypeLike,
        max_batch: int,
        multiprocessors: int,
        alignment: int = _LOAD_BYTES,
    ) -> AnomalyMapPlan:
        """The plan for a model; see the class for the arguments."""
        levels_chw = []
        for index, level in enumerate(spec.levels):
            width, height = spec.level_wh(index)
            levels_chw.append((level.channels, height, width))
        return cls(
            levels_chw,
            spec.input.size_wh,
            spec.scoring,
            dtype=dtype,
            max_batch=max_batch,
            multiprocessors=multiprocessors,
            alignment=alignment,
        )

    def _lay_out_workspace(self) -> _Layout:
        layout = _Layout()
        for index, level in enumerate(self.levels):
            tiles = self.max_batch * level.tiles
            layout.add(f"arrivals{index}", 4 * tiles)
            layout.add(f"partials{index}", 4 * tiles * level.parts * _SUMS * level.tile_pixels)
            layout.add(f"distances{index}", 4 * self.max_batch * level.height * level.width)
        layout.add("map_arrivals", 4 * self.max_batch)
        if self.scoring.rule == "max":
            layout.add("max_key", 4 * self.max_batch)
        else:
            layout.add("histogram", 4 * self.max_batch * BINS)
            layout.add("candidates", 4 * self.max_batch * _TOP_SEGMENTS * self._segment_pixels)
            layout.add("candidate_counts", 4 * self.max_batch * _TOP_SEGMENTS)
        return layout

    @property
    def _segment_pixels(self) -> int:
        """Of the map, for each warp of ``top_score``."""
        return _round_up(-(-self.size_wh[0] * self.size_wh[1] // _TOP_SEGMENTS), _TOP_LOADS * _WARP)

    @property
    def workspace_bytes(self) -> int:
        """Device memory to allocate and to set to zero once."""
        return self._workspace.bytes

    def launches(self, batch: int) -> list[Launch]:
        """The launches, in order, for a batch of 1..``max_batch`` images."""
        if not 1 <= batch <= self.max_batch:
            raise ValueError(f"expected a batch of 1..{self.max_batch}, got {batch}")
        suffix = "fp16" if self.dtype == np.float16 else "fp32"
        width, height = self.size_wh
        launches = []
        if self.levels:
            blocks = sum(level.blocks for level in self.levels)
            widest_load = max(level.pixels_per_load for level in self.levels)
            # 16 bytes for the flag before the sums, which have kThreads rows of pixels_per_load.
            shared_bytes = 16 + 4 * _SUMS * THREADS * widest_load
            launches.append(Launch(f"distance_{suffix}", (blocks, batch, 1), (THREADS, 1, 1), shared_bytes))
        tiles = (-(-width // TILE_WH[0]), -(-height // TILE_WH[1]))
        launches.append(Launch("fold_map", (*tiles, batch), (FOLD_THREADS, 1, 1), self._fold_shared_bytes))
        if self.scoring.rule == "top":
            # TopShared.
            shared_bytes = 4 * (BINS + _TOP_SEGMENTS + 2 * TOP_THREADS // _WARP + 3)
            launches.append(Launch("top_score", (TOP_BLOCKS, batch, 1), (TOP_THREADS, 1, 1), shared_bytes))
        return launches

    def params(
        self,
        features: Mapping[str, int],
        *,
        map_pointer: int,
        score_pointer: int,
        workspace_pointer: int,
        constants_pointer: int,
    ) -> AnomalyMapParams:
        """The kernels' argument.

        Args:
            features: device pointer of each output of a ``features`` graph, by name; (N, C, h, w), contiguous.
            map_pointer: (N, height, width) float32.
            score_pointer: (N,) float32.
            workspace_pointer: ``workspace_bytes``, zero before the first launch.
            constants_pointer: a copy of ``constants``.

        Raises:
            ValueError: a tensor is missing or a pointer is not as aligned as promised.
        """
        self._check_pointers(features, (map_pointer, score_pointer), (workspace_pointer, constants_pointer))

        def workspace(name: str) -> int:
            return workspace_pointer + self._workspace.offsets[name]

        def constant(name: str) -> int:
            return constants_pointer + self._constant_offsets[name]

        params = AnomalyMapParams()
        for index, plan in enumerate(self.levels):
            level = params.level[index]
            for view in range(VIEWS):
                level.target[view] = features[target_name(view, plan.index)]
                level.reconstruction[view] = features[reconstruction_name(view, plan.index)]
            for part in ("partials", "distances", "arrivals"):
                setattr(level, part, workspace(f"{part}{index}"))
            for name in (
                "channels",
                "height",
                "width",
                "pixels_per_load",
                "columns",
                "tiles",
                "splits",
                "split_channels",
                "first_block",
            ):
                setattr(level, name, getattr(plan, name))
        if self.scoring.discriminator_weight is not None:
            level = params.level[len(self.levels)]
            level.distances = features[PROBABILITY_NAME]
            level.height, level.width = self._probability_hw
            # No block of the grid is its own.
            level.first_block = _NO_BLOCK
        for index, fold in enumerate(self.folds):
            level = params.level[index]
            for name in ("row_first", "row_weights", "tile_first"):
                setattr(level, name, constant(f"{name}{index}"))
            level.row_taps = fold.rows.weights.shape[1]
            level.column_taps = fold.column_taps
            level.tile_columns = fold.tile_columns
        params.columns = constant("columns")
        params.fold_columns = self._fold_columns
        params.fold_taps = self._fold_taps
        params.stages_columns = self.stages_columns
        params.map = map_pointer
        params.score = score_pointer
        params.arrivals = workspace("map_arrivals")
        if self.scoring.rule == "max":
            params.max_key = workspace("max_key")
        else:
            for name in ("histogram", "candidates", "candidate_counts"):
                setattr(params, name, workspace(name))
            params.segment_pixels = self._segment_pixels
        params.levels = len(self.folds)
        params.map_width, params.map_height = self.size_wh
        params.top_count = top_count(self.size_wh[0] * self.size_wh[1], self.scoring)
        return params

    def _check_pointers(self, features: Mapping[str, int], results: Iterable[int], buffers: Iterable[int]) -> None:
        """``results``: map and score."""
        expected = {
            name(view, index)
            for index in range(self._n_levels)
            for view in range(VIEWS)
            for name in (target_name, reconstruction_name)
        }
        if self.scoring.discriminator_weight is not None:
            expected.add(PROBABILITY_NAME)
        if set(features) != expected:
            raise ValueError(f"expected the features {sorted(expected)}, got {sorted(features)}")
        for name, pointer in features.items():
            if pointer == 0 or pointer % self.alignment:
                raise ValueError(f"{name}: expected a multiple of {self.alignment} bytes, got pointer {pointer:#x}")
        for pointer, multiple in zip(results, (4 * FOLD_COLUMNS, 4), strict=True):
            if pointer == 0 or pointer % multiple:
                raise ValueError(f"expected float32 results, aligned to {multiple} bytes, got pointer {pointer:#x}")
        for pointer in buffers:
            if pointer == 0 or pointer % _LOAD_BYTES:
                raise ValueError(f"expected buffers aligned to {_LOAD_BYTES} bytes, got pointer {pointer:#x}")


def _divide(
    levels_chw: Mapping[int, tuple[int, int, int]], item_bytes: int, alignment: int, multiprocessors: int
) -> tuple[LevelPlan, ...]:
    """Blocks of equal work: as many channels a thread as leave 3 blocks for every 2 multiprocessors, at least 4."""
    depth = _UNROLL
    plans = _divide_by_depth(levels_chw, item_bytes, alignment, depth)
    # Deeper than this, the blocks of some levels would have less to do than others'.
    deepest = min((-(-level.channels // level.rows) for level in plans), default=0)
    while (depth := 2 * depth) <= deepest:
        deeper = _divide_by_depth(levels_chw, item_bytes, alignment, depth)
        if 2 * sum(level.blocks for level in deeper) < 3 * multiprocessors:
            break
        plans = deeper
    return plans


def _divide_by_depth(
    levels_chw: Mapping[int, tuple[int, int, int]], item_bytes: int, alignment: int, depth: int
) -> tuple[LevelPlan, ...]:
    plans: list[LevelPlan] = []
    first_block = 0
    for index, (channels, height, width) in levels_chw.items():
        pixels = height * width
        pixels_per_load = 1
        for load_bytes in (16, 8):
            candidate = load_bytes // item_bytes
            if candidate >= 4 and alignment >= load_bytes and pixels % candidate == 0:
                pixels_per_load = candidate
                break
        loads = pixels // pixels_per_load
        columns = min(_WARP, 1 << (loads - 1).bit_length())
        rows = THREADS // columns
        splits = -(-channels // (rows * depth))
        # Evenly, in whole rounds of the rows.
        split_channels = _round_up(-(-channels // splits), rows)
        plan = LevelPlan(
            index=index,
            channels=channels,
            height=height,
            width=width,
            pixels_per_load=pixels_per_load,
            columns=columns,
            tiles=-(-loads // columns),
            splits=-(-channels // split_channels),
            split_channels=split_channels,
            first_block=first_block,
        )
        first_block += plan.blocks
        plans.append(plan)
    return tuple(plans)


PixelFormat = Literal["bgr8", "rgb8", "mono8", "nv12"]


class PreprocessPlan:
    """Launch plan of ``preprocess.cu``: one camera frame to the network's input.

    Args:
        spec: the model's input rule.
        source_wh: width and height of the frame in pixels; even for NV12.
        pixel_format: of the frame.
        dtype: of the network's input, float16 or float32.
        yuv: matrix of NV12; see ``preprocess.nv12_to_bgr``.

    Raises:
        InputError: the ROI does not lie inside the frame, an odd NV12 size, or a frame so much larger than the
            network's input that not even one output pixel's source fits shared memory.
    """

    def __init__(
        self,
        spec: InputSpec,
        source_wh: tuple[int, int],
        pixel_format: PixelFormat,
        *,
        dtype: DTypeLike,
        yuv: YuvStandard = "bt601",
    ) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float16), np.dtype(np.float32)):
            raise ValueError(f"expected a network input of float16 or float32, got {self.dtype}")
        width, height = source_wh
        if width < 1 or height < 1 or (pixel_format == "nv12" and (width % 2 or height % 2)):
            even = ", even for NV12" if pixel_format == "nv12" else ""
            raise InputError(f"expected a frame of at least 1x1 pixels{even}, got {width}x{height}")
        self.spec = spec
        self.source_wh = source_wh
        self.pixel_format = pixel_format
        self._yuv = YUV_MATRICES[yuv]
        self._pixel_bytes = 3 if pixel_format in ("bgr8", "rgb8") else 1
        geometry = Geometry.of(spec, np.broadcast_to(np.uint8(0), (height, width)))
        self._rows = _crop_band(geometry.y, geometry.height, spec.resize_wh[1], geometry.crop_y, spec.size_wh[1])
        self._columns = _crop_band(geometry.x, geometry.width, spec.resize_wh[0], geometry.crop_x, spec.size_wh[0])
        constants = _Constants()
        constants.add_band("row", self._rows)
        constants.add_band("column", self._columns)
        self.constants, self._constant_offsets = constants.gather()
        self.tile_wh, self._shared_bytes = self._choose_tile()

    def _choose_tile(self) -> tuple[tuple[int, int], int]:
        # NV12 pixels are held as (B, G, R); a packed row may start and end 3 bytes early and late, to whole words.
        values = 1 if self.pixel_format == "mono8" else 3
        margin = 0 if self.pixel_format == "nv12" else 6
        for tile_width in (32, 16, 8, 4, 2, 1):
            row_bytes = 4 * (values * _widest_tile(self._columns, tile_width) + margin)
            for tile_height in (8, 4, 2, 1):
                if tile_height * row_bytes <= _SHARED_BYTES:
                    return (tile_width, tile_height), tile_height * row_bytes
        raise InputError(
            f"a frame of {self.source_wh[0]} columns is too wide to be resized to {self.spec.resize_wh[0]} in one step "
            "on the GPU; set an ROI, or let the camera bin its pixels"
        )

    def launches(self) -> list[Launch]:
        """The launch for one frame."""
        width, height = self.spec.size_wh
        kind = "nv12" if self.pixel_format == "nv12" else "packed"
        suffix = "fp16" if self.dtype == np.float16 else "fp32"
        grid = (-(-width // self.tile_wh[0]), -(-height // self.tile_wh[1]), 1)
        return [Launch(f"preprocess_{kind}_{suffix}", grid, (THREADS, 1, 1), self._shared_bytes)]

    def params(
        self,
        *,
        source_pointer: int,
        source_pitch: int,
        out_pointer: int,
        constants_pointer: int,
        chroma_pointer: int = 0,
        chroma_pitch: int = 0,
    ) -> PreprocessParams:
        """The kernel's argument.

        Args:
            source_pointer: the frame, or NV12's luma; all of height times pitch bytes are readable.
            source_pitch: bytes from row to row; a multiple of 4, like the pointer, makes it faster.
            out_pointer: (3, height, width) of ``dtype``: one image of the network's input.
            constants_pointer: a copy of ``constants``.
            chroma_pointer, chroma_pitch: NV12's interleaved U and V.

        Raises:
            ValueError: a pointer is null or misaligned, or a pitch is shorter than a row.
        """
        if not (source_pointer and out_pointer and constants_pointer):
            raise ValueError("expected device pointers, got null")
        if out_pointer % self.dtype.itemsize or constants_pointer % _LOAD_BYTES:
            raise ValueError(f"misaligned pointers: output {out_pointer:#x}, constants {constants_pointer:#x}")
        row_bytes = self.source_wh[0] * self._pixel_bytes
        if not row_bytes <= source_pitch < 1 << 31:
            raise ValueError(f"expected a pitch of at least {row_bytes} bytes, got {source_pitch}")
        if self.pixel_format == "nv12" and not (chroma_pointer and row_bytes <= chroma_pitch < 1 << 31):
            raise ValueError(f"expected NV12's chroma with a pitch of at least {row_bytes} bytes, got {chroma_pitch}")
        params = PreprocessParams()
        params.source, params.source_pitch = source_pointer, source_pitch
        params.chroma, params.chroma_pitch = chroma_pointer, chroma_pitch
        params.out = out_pointer
        for axis, band in (("row", self._rows), ("column", self._columns)):
            for array in ("first", "weights"):
                setattr(params, f"{axis}_{array}", constants_pointer + self._constant_offsets[f"{axis}_{array}"])
            setattr(params, f"{axis}_taps", band.weights.shape[1])
        params.pixel_bytes = self._pixel_bytes
        params.word_loads = int(source_pointer % 4 == 0 and source_pitch % 4 == 0)
        params.width, params.height = self.spec.size_wh
        params.tile_width, params.tile_height = self.tile_wh
        for plane, channel in enumerate(self._channels()):
            params.channel[plane] = channel
            params.scale[plane] = 1.0 / (255.0 * self.spec.std[plane])
            params.offset[plane] = -self.spec.mean[plane] / self.spec.std[plane]
        for name in ("luma_gain", "red_v", "green_u", "green_v", "blue_u"):
            setattr(params, name, getattr(self._yuv, name))
        return params

    def _channels(self) -> tuple[int, int, int]:
        """Channel of the source pixel that becomes each plane."""
        if self.pixel_format == "mono8":
            return 0, 0, 0
        source = "rgb" if self.pixel_format == "rgb8" else "bgr"
        return (0, 1, 2) if source == self.spec.colour else (2, 1, 0)


def _crop_band(start: int, length: int, resized: int, crop: int, size: int) -> Band:
    """Resize of ``length`` pixels from ``start`` on to ``resized``, of which ``size`` from ``crop`` on are kept."""
    band = Band.of(antialias_matrix(length, resized)[crop : crop + size])
    return Band(band.first + np.int32(start), band.weights)


def _widest_tile(band: Band, size: int) -> int:
    """Columns under the widest tile of ``size`` rows of the band."""
    starts = np.arange(0, len(band.first), size)
    ends = np.minimum(starts + size, len(band.first)) - 1
    widest = int(np.max(band.first[ends] - band.first[starts]))
    taps: int = band.weights.shape[1]
    return widest + taps


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
