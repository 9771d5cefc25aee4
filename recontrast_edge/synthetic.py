"""A procedural production line with known truth: brushed metal and woven fabric, good and defective.

    part = SyntheticLine("brushed-metal", seed=0, size_wh=(256, 256), defect_rate=0.1).part(7)  # part.image: BGR uint8

A part depends on (product, seed, index, size) alone: not on what was rendered before, and not on the machine. For
that, only exactly rounded arithmetic is used: integers and elementwise ``+ - * / sqrt``. No sin or exp, no float
sums, no BLAS, no OpenCV filters, whose last bits differ between processors and end up as other pixels.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from math import sqrt
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray

from recontrast_edge.errors import OutputError, UsageError
from recontrast_edge.frame import Truth
from recontrast_edge.images import write_image
from recontrast_edge.preprocess import Image

GOOD = "good"
"""``Part.kind`` of a part without defect, and its folder's name in a data set."""

MIXED = "mixed"
"""Both products: lots of ``LOT`` parts, one after the other."""

LOT = 30

MIN_SIDE = 32
MAX_SIDE = 4096
MAX_SEED = 2**32 - 1

VISIBLE = 8
"""Grey levels by which a pixel must differ from the same part without the defect to belong to the mask. The sensor's
noise reaches 2.5."""

_Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Part:
    """One rendered part.

    Attributes:
        image: (height, width, 3) BGR uint8.
        product: ``brushed-metal`` or ``woven-fabric``.
        kind: ``good``, or the kind of defect.
        mask: (height, width) bool, the pixels that the defect changed visibly; all False for a good part.
    """

    image: Image
    product: str
    kind: str
    mask: NDArray[np.bool_]

    @property
    def truth(self) -> Truth:
        return "good" if self.kind == GOOD else "defect"


class Stream(IntEnum):
    """Disjoint supplies of random numbers: parts of two streams have nothing in common, whatever their index."""

    LINE = 0
    TRAIN = 1
    TEST_GOOD = 2
    TEST_DEFECT = 3


class SyntheticLine:
    """An endless sequence of parts, addressed by index.

    Args:
        product: one of ``PRODUCT_NAMES``.
        seed: 0..``MAX_SEED``.
        size_wh: image width and height in pixels, each ``MIN_SIDE``..``MAX_SIDE``. The view is the same at every
            size: structures and defects grow with the shorter side. 256x256 costs 3 to 10 ms.
        defect_rate: probability that a part is defective, 0..1.

    Raises:
        UsageError: an argument out of range.
    """

    def __init__(self, product: str, *, seed: int, size_wh: tuple[int, int], defect_rate: float) -> None:
        _check(product, seed, size_wh)
        if not 0.0 <= defect_rate <= 1.0:
            raise UsageError(f"expected a defect rate of 0..1, got {defect_rate}")
        self._products = tuple(_PRODUCTS) if product == MIXED else (product,)
        self._seed = seed
        self._size_wh = size_wh
        self._defect_rate = defect_rate

    def part(self, index: int) -> Part:
        """Render the part of this index (>= 0)."""
        product = self._products[index // LOT % len(self._products)]
        lottery = _generator(self._seed, product, Stream.LINE, index, _Use.LOTTERY)
        kind = GOOD
        if lottery.random() < self._defect_rate:
            kinds = _PRODUCTS[product].kinds
            kind = kinds[int(lottery.integers(len(kinds)))]
        return _render(product, kind, self._seed, Stream.LINE, index, self._size_wh)


def write_dataset(
    out: Path,
    product: str,
    *,
    n_train: int,
    n_test_good: int,
    n_test_defect: int,
    size_wh: tuple[int, int] = (256, 256),
    seed: int = 0,
) -> None:
    """Write a data set in MVTec AD's layout, complete or not at all.

    ``train/good``, ``test/good``, ``test/KIND`` and ``ground_truth/KIND/*_mask.png``; PNG. The defective images are
    spread evenly over the kinds; with ``mixed`` the two products alternate. Train, test and the streams of
    ``SyntheticLine`` share no part, not even with the same seed.

    Args:
        out: folder that does not exist or is empty.

    Raises:
        UsageError: an argument out of range.
        OutputError: the folder is not empty or cannot be written.
    """
    _check(product, seed, size_wh)
    counts = {Stream.TRAIN: n_train, Stream.TEST_GOOD: n_test_good, Stream.TEST_DEFECT: n_test_defect}
    if min(counts.values()) < 0 or not any(counts.values()):
        raise UsageError(f"expected numbers of images >= 0, at least one above, got {list(counts.values())}")
    out = out.resolve()
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(f"{out}: expected a new or empty folder; choose another or empty it first")
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}"
        temporary.mkdir()
    except OSError as error:
        raise OutputError(f"{out}: cannot write here ({error.strerror or error})") from None
    try:
        for stream, count in counts.items():
            for index in range(count):
                _write_part(temporary, product, seed, stream, index, size_wh)
        temporary.replace(out)
    except OutputError as error:
        # The reader knows the folder by its final name.
        raise OutputError(str(error).replace(str(temporary), str(out))) from None
    except OSError as error:
        raise OutputError(f"{out}: cannot write ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_part(root: Path, product: str, seed: int, stream: Stream, index: int, size_wh: tuple[int, int]) -> None:
    products = tuple(_PRODUCTS) if product == MIXED else (product,)
    turn, which = divmod(index, len(products))
    product = products[which]
    kinds = _PRODUCTS[product].kinds if stream == Stream.TEST_DEFECT else (GOOD,)
    part = _render(product, kinds[turn % len(kinds)], seed, stream, index, size_wh)
    subset = "train" if stream == Stream.TRAIN else "test"
    write_image(root / subset / part.kind / f"{index:03d}.png", part.image)
    if part.kind != GOOD:
        mask = np.where(part.mask, np.uint8(255), np.uint8(0))
        write_image(root / "ground_truth" / part.kind / f"{index:03d}_mask.png", mask)


def _check(product: str, seed: int, size_wh: tuple[int, int]) -> None:
    if product not in PRODUCT_NAMES:
        raise UsageError(f"expected a product of {', '.join(PRODUCT_NAMES)}, got {product!r}")
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"expected a seed of 0..{MAX_SEED}, got {seed}")
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in size_wh):
        raise UsageError(f"expected a size of {MIN_SIDE}..{MAX_SIDE} pixels a side, got {size_wh[0]}x{size_wh[1]}")


class _Use(IntEnum):
    """What a generator is for: each draws its own numbers, so that a defect leaves the part beneath it as it was."""

    LOTTERY = 0
    SURFACE = 1
    SENSOR = 2
    DEFECT = 3


def _generator(seed: int, product: str, stream: Stream, index: int, use: _Use) -> Generator:
    key = (list(_PRODUCTS).index(product), stream, index, use)
    return Generator(PCG64(SeedSequence(seed, spawn_key=key)))


def _render(product: str, kind: str, seed: int, stream: Stream, index: int, size_wh: tuple[int, int]) -> Part:
    grid = _Grid(*size_wh)
    surface = _PRODUCTS[product](_generator(seed, product, stream, index, _Use.SURFACE), grid)
    noise = _sensor_noise(_generator(seed, product, stream, index, _Use.SENSOR), grid)
    good = _digitise(surface.bgr, noise)
    if kind == GOOD:
        return Part(good, product, GOOD, np.zeros(good.shape[:2], np.bool_))
    bgr = surface.with_defect(kind, _generator(seed, product, stream, index, _Use.DEFECT))
    image = _digitise(bgr, noise)
    # Within the range of the two, the unsigned difference cannot wrap.
    difference = np.maximum(image, good) - np.minimum(image, good)
    mask: NDArray[np.bool_] = difference.max(axis=2) >= VISIBLE
    return Part(image, product, kind, mask)


def _sensor_noise(rng: Generator, grid: _Grid) -> _Float:
    """(height, width, 3), triangular, -2.5..2.5 grey levels."""
    dice = rng.integers(0, 256, (2, grid.height, grid.width, 3), dtype=np.uint8).astype(np.float32)
    noise: _Float = (dice[0] - dice[1]) * np.float32(2.5 / 255.0)
    return noise


def _digitise(bgr: _Float, noise: _Float) -> Image:
    image: Image = np.rint(np.clip(bgr + noise, 0.0, 255.0)).astype(np.uint8)
    return image


class _Grid:
    """Pixel coordinates, as a row and a column that broadcast, in units of 1/256 of the shorter side.

    Small images show a part of the view instead: below 64 pixels structures would be finer than a pixel.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.height = height
        self.pixel = min(4.0, 256.0 / min(width, height))
        """Units a pixel spans."""
        self.x = (np.arange(width, dtype=np.float32) * np.float32(self.pixel))[None, :]
        self.y = (np.arange(height, dtype=np.float32) * np.float32(self.pixel))[:, None]

    def pixels(self, units: float) -> int:
        """A length in whole pixels, at least 1."""
        return max(1, round(units / self.pixel))

    def place(self, rng: Generator) -> tuple[float, float]:
        """A random position well inside the image, in units."""
        x = _uniform(rng, 0.18, 0.82) * self.width * self.pixel
        y = _uniform(rng, 0.18, 0.82) * self.height * self.pixel
        return x, y


def _uniform(rng: Generator, low: float, high: float) -> float:
    # ``Generator.uniform`` may fuse this multiplication and addition on some processors, which rounds differently.
    return low + (high - low) * rng.random()


def _direction(rng: Generator, flattest: float, steepest: float) -> tuple[float, float]:
    """A random unit vector whose slope is within these bounds, to either side."""
    slope = _uniform(rng, flattest, steepest) * (1.0 if rng.random() < 0.5 else -1.0)
    norm = sqrt(1.0 + slope * slope)
    return 1.0 / norm, slope / norm


def _noise(rng: Generator, height: int, width: int) -> NDArray[np.int32]:
    return rng.integers(0, 256, (height, width), dtype=np.uint8).astype(np.int32)


def _streaks(rng: Generator, height: int, width: int, length: int) -> _Float:
    """Noise smeared along x over ``length`` pixels: (height, width), mean 0, variance 1."""
    sums = np.cumsum(_noise(rng, height, width + length), axis=1, dtype=np.int32)
    smeared = (sums[:, length:] - sums[:, :-length]).astype(np.float32)
    # A byte has mean 127.5 and deviation 73.9.
    streaks: _Float = (smeared - np.float32(127.5 * length)) * np.float32(1.0 / (73.9 * sqrt(length)))
    return streaks


def _smooth_noise(rng: Generator, grid: _Grid, cell: float) -> _Float:
    """Value noise with features of about ``cell`` units: (height, width), -1..1."""
    rows = int(grid.height * grid.pixel / cell) + 2
    columns = int(grid.width * grid.pixel / cell) + 2
    lattice = _noise(rng, rows, columns).astype(np.float32) * np.float32(2.0 / 255.0) - np.float32(1.0)
    top, weight_y = _cells(grid.y[:, 0], cell)
    left, weight_x = _cells(grid.x[0], cell)
    weight_y = weight_y[:, None]
    by_row = lattice[top] * (1 - weight_y) + lattice[top + 1] * weight_y
    smooth: _Float = by_row[:, left] * (1 - weight_x) + by_row[:, left + 1] * weight_x
    return smooth


def _cells(position: _Float, cell: float) -> tuple[NDArray[np.intp], _Float]:
    """Lattice cell of each position and the eased weight of its far corner."""
    scaled = position * np.float32(1.0 / cell)
    low = np.floor(scaled)
    fraction = scaled - low
    return low.astype(np.intp), fraction * fraction * (3 - 2 * fraction)


def _bgr(colour: tuple[float, float, float]) -> _Float:
    return np.array(colour, np.float32)


class _Surface(Protocol):
    """A part's surface under its light, before the sensor."""

    kinds: ClassVar[tuple[str, ...]]
    bgr: _Float
    """(height, width, 3), 0..255 and a little beyond."""

    def __init__(self, rng: Generator, grid: _Grid) -> None: ...

    def with_defect(self, kind: str, rng: Generator) -> _Float:
        """``bgr`` with one defect of this kind."""
        ...


class _BrushedMetal:
    """Sheet brushed along x, lit by a broad lamp whose highlight wanders a little from part to part."""

    kinds: ClassVar[tuple[str, ...]] = ("scratch", "dent", "stain")

    def __init__(self, rng: Generator, grid: _Grid) -> None:
        self._grid = grid
        slope = _uniform(rng, -0.03, 0.03)
        brushing = self._brushing(rng, slope)
        exposure = _uniform(rng, 0.95, 1.05)
        highlight = (grid.x - _uniform(rng, 80.0, 176.0) + grid.y * _uniform(rng, -0.25, 0.25)) * (1.0 / 150.0)
        light = 0.74 + 0.34 / (1.0 + highlight * highlight)
        light = light + 0.02 * _smooth_noise(rng, grid, 90.0)
        grey = (150.0 + brushing) * (light * exposure)
        self.bgr = grey[:, :, None] * _bgr((1.03, 1.0, 0.975))

    def _brushing(self, rng: Generator, slope: float) -> _Float:
        grid = self._grid
        # Coarse grooves, hairlines and glints.
        layers = ((230.0, 4.0, 4.0), (110.0, 1.0, 5.0), (30.0, 1.0, 2.0))
        drop = grid.x[0] * np.float32(slope / grid.pixel)
        drop = drop - drop.min()
        floor = np.floor(drop)
        whole, fraction = floor.astype(np.intp), drop - floor
        rows = grid.height + int(whole.max()) + 2
        brushing = np.zeros((rows, grid.width), np.float32)
        for length, thickness, strength in layers:
            repeat = grid.pixels(thickness)
            streaks = _streaks(rng, rows // repeat + 1, grid.width, grid.pixels(length))
            brushing += np.float32(strength) * np.repeat(streaks, repeat, axis=0)[:rows]
        # The part lies a little askew: shear the streaks, interpolating between rows.
        index = np.arange(grid.height)[:, None] + whole
        columns = np.arange(grid.width)
        sheared: _Float = brushing[index, columns] * (1 - fraction) + brushing[index + 1, columns] * fraction
        return sheared

    def with_defect(self, kind: str, rng: Generator) -> _Float:
        defects: dict[str, Callable[[Generator], _Float]] = {
            "scratch": self._scratch,
            "dent": self._dent,
            "stain": self._stain,
        }
        return defects[kind](rng)

    def _scratch(self, rng: Generator) -> _Float:
        """A bowed groove across the brushing: a bright burr and its shadow, fading towards the ends."""
        grid = self._grid
        x, y = grid.place(rng)
        along_x, along_y = _direction(rng, 0.35, 3.0)
        length = _uniform(rng, 28.0, 130.0)
        # Whatever the resolution, a scratch that can be seen is about a pixel wide.
        half_width = max(_uniform(rng, 0.8, 2.0), 0.8 * grid.pixel)
        strength = _uniform(rng, 40.0, 95.0)
        bow = _uniform(rng, -0.12, 0.12) * length
        shadow_side = 1.0 if rng.random() < 0.5 else -1.0
        position = ((grid.x - x) * along_x + (grid.y - y) * along_y) * (1.0 / length)
        taper = np.clip(1.0 - 4.0 * position * position, 0.0, 1.0)
        across = (grid.y - y) * along_x - (grid.x - x) * along_y - bow * taper
        burr = np.clip(1.6 - np.abs(across) * (1.0 / half_width), 0.0, 1.0)
        shadow = np.clip(1.6 - np.abs(across - shadow_side * 2.0 * half_width) * (1.0 / half_width), 0.0, 1.0)
        pressure = np.clip(taper * 3.0, 0.0, 1.0) * (0.8 + 0.2 * _smooth_noise(rng, grid, 12.0))
        bgr: _Float = self.bgr + (np.float32(strength) * pressure * (burr - 0.55 * shadow))[:, :, None]
        return bgr

    def _dent(self, rng: Generator) -> _Float:
        """A hollow: one slope turned to the lamp, the other away from it, and less light from its floor."""
        grid = self._grid
        x, y = grid.place(rng)
        radius_x = _uniform(rng, 9.0, 24.0)
        radius_y = radius_x * _uniform(rng, 0.7, 1.3)
        strength = _uniform(rng, 0.35, 0.8)
        lamp_x, lamp_y = _direction(rng, 0.2, 2.0)
        u = (grid.x - x) * (1.0 / radius_x)
        v = (grid.y - y) * (1.0 / radius_y)
        bowl = np.clip(1.0 - u * u - v * v, 0.0, 1.0)
        shading = 2.0 * bowl * (u * lamp_x + v * lamp_y) - 0.35 * bowl * bowl
        bgr: _Float = self.bgr * (1.0 + np.float32(strength) * shading)[:, :, None]
        return bgr

    def _stain(self, rng: Generator) -> _Float:
        density, _ = _film(rng, self._grid, radius=_uniform(rng, 9.0, 30.0), depth=_uniform(rng, 0.22, 0.5))
        stained: _Float = self.bgr * (1.0 - density[:, :, None] * _bgr((1.0, 0.85, 0.65)))
        return stained


class _WovenFabric:
    """Plain weave of ecru warp and blue weft, with yarns of uneven thickness, brightness and course."""

    kinds: ClassVar[tuple[str, ...]] = ("missing-thread", "stain", "hole")

    _WARP = (150.0, 178.0, 196.0)
    _WEFT = (152.0, 128.0, 98.0)
    _MATTED = (116.0, 118.0, 113.0)

    def __init__(self, rng: Generator, grid: _Grid) -> None:
        self._grid = grid
        self._pitch = _uniform(rng, 12.7, 13.3)
        tilt = _uniform(rng, -0.025, 0.025)
        course_warp = 0.16 * _smooth_noise(rng, grid, 60.0)
        course_weft = 0.16 * _smooth_noise(rng, grid, 60.0)
        u = (grid.x + tilt * grid.y) * (1.0 / self._pitch) + (2.0 + rng.random() + course_warp)
        v = (grid.y - tilt * grid.x) * (1.0 / self._pitch) + (2.0 + rng.random() + course_weft)
        warp_number, weft_number = np.floor(u), np.floor(v)
        self._warp_index = warp_number.astype(np.intp)
        self._weft_index = weft_number.astype(np.intp)
        # Within a cell, -1..1 across the warp yarn and across the weft yarn.
        across_warp = 2.0 * (u - warp_number) - 1.0
        across_weft = 2.0 * (v - weft_number) - 1.0
        warp_tone = self._yarn_tone(rng, self._warp_index)
        weft_tone = self._yarn_tone(rng, self._weft_index)
        length = grid.pixels(7.0)
        weft_fibres = _streaks(rng, grid.height, grid.width, length)
        warp_fibres = _streaks(rng, grid.width, grid.height, length).T
        light = _uniform(rng, 0.95, 1.05) + 0.05 * _smooth_noise(rng, grid, 120.0)
        warp = (light * warp_tone * (1.0 + 0.06 * warp_fibres))[:, :, None] * _bgr(self._WARP)
        weft = (light * weft_tone * (1.0 + 0.06 * weft_fibres))[:, :, None] * _bgr(self._WEFT)
        self._warp_lit = warp * self._relief(across_warp, across_weft)[:, :, None]
        self._weft_lit = weft * self._relief(across_weft, across_warp)[:, :, None]
        self._warp_on_top = (self._warp_index + self._weft_index) % 2 == 0
        self.bgr = np.where(self._warp_on_top[:, :, None], self._warp_lit, self._weft_lit)

    @staticmethod
    def _yarn_tone(rng: Generator, index: NDArray[np.intp]) -> _Float:
        tones = 1.0 + 0.09 * (rng.random(int(index.max()) + 1) + rng.random(int(index.max()) + 1) - 1.0)
        tone: _Float = tones.astype(np.float32)[index]
        return tone

    @staticmethod
    def _relief(across: _Float, along: _Float) -> _Float:
        """A yarn is round across and dives under its neighbours along; 0.3 in the gaps, 1 on the crest."""
        crest = (1.0 - across * across) * (1.0 - 0.45 * along * along)
        relief: _Float = np.float32(0.3) + np.float32(0.7) * np.sqrt(crest)
        return relief

    def with_defect(self, kind: str, rng: Generator) -> _Float:
        defects: dict[str, Callable[[Generator], _Float]] = {
            "missing-thread": self._missing_thread,
            "stain": self._stain,
            "hole": self._hole,
        }
        return defects[kind](rng)

    def _missing_thread(self, rng: Generator) -> _Float:
        """One yarn is missing over some length: the crossing yarns show, sunk into the shade of the gap."""
        grid = self._grid
        x, y = grid.place(rng)
        column, row = int(x / grid.pixel), int(y / grid.pixel)
        shade = np.float32(_uniform(rng, 0.12, 0.34))
        half_length = _uniform(rng, 30.0, 130.0)
        if rng.random() < 0.5:
            missing = (self._warp_index == self._warp_index[row, column]) & (np.abs(grid.y - y) <= half_length)
            crossing = self._weft_lit
        else:
            missing = (self._weft_index == self._weft_index[row, column]) & (np.abs(grid.x - x) <= half_length)
            crossing = self._warp_lit
        return np.where(missing[:, :, None], crossing * shade, self.bgr)

    def _stain(self, rng: Generator) -> _Float:
        # What soaks in also mats the yarns together and fills the gaps between them.
        density, film = _film(rng, self._grid, radius=_uniform(rng, 13.0, 30.0), depth=_uniform(rng, 0.35, 0.6))
        matted = self.bgr + (np.float32(0.8) * film)[:, :, None] * (_bgr(self._MATTED) - self.bgr)
        stained: _Float = matted * (1.0 - density[:, :, None] * _bgr((1.0, 0.9, 0.8)))
        return stained

    def _hole(self, rng: Generator) -> _Float:
        """A tear down to the dark underlay, with a frayed, pale rim."""
        grid = self._grid
        blob = _blob(rng, grid, radius=_uniform(rng, 7.0, 15.0), roughness=0.5)
        underlay = _uniform(rng, 16.0, 42.0)
        inside = np.clip(blob * 5.0, 0.0, 1.0)[:, :, None]
        rim = np.clip(1.0 - np.abs(blob + 0.05) * 7.0, 0.0, 1.0)[:, :, None]
        frayed = self.bgr * (1.0 + np.float32(0.35) * rim)
        bgr: _Float = frayed * (1.0 - inside) + np.float32(underlay) * inside
        return bgr


def _blob(rng: Generator, grid: _Grid, *, radius: float, roughness: float) -> _Float:
    """A lumpy ellipse: (height, width), 1 at its centre, 0 at its outline, negative outside."""
    x, y = grid.place(rng)
    stretch = _uniform(rng, 0.75, 1.35)
    u = (grid.x - x) * (stretch / radius)
    v = (grid.y - y) * (1.0 / (stretch * radius))
    distance = np.sqrt(u * u + v * v)
    # Lumps are relative to the distance, so that they fade towards the centre and no blob can vanish.
    blob: _Float = 1.0 - distance * (1.0 + np.float32(roughness) * _smooth_noise(rng, grid, 0.7 * radius))
    return blob


def _film(rng: Generator, grid: _Grid, *, radius: float, depth: float) -> tuple[_Float, _Float]:
    """A dried drop, sharp or soft at its outline: what it absorbs, more at its seam, and where it is; (h, w), 0..1."""
    blob = _blob(rng, grid, radius=radius, roughness=0.4)
    film = np.clip(blob * _uniform(rng, 2.5, 8.0), 0.0, 1.0)
    seam = np.clip(1.0 - np.abs(blob - 0.15) * 7.0, 0.0, 1.0)
    density: _Float = np.float32(depth) * (0.8 * film + 0.2 * seam)
    return density, film


_PRODUCTS: dict[str, type[_Surface]] = {"brushed-metal": _BrushedMetal, "woven-fabric": _WovenFabric}

PRODUCT_NAMES = (*_PRODUCTS, MIXED)
