"""Lines a second through the assembly of tiles on this CPU, and how much of the time is the copying itself.

    python benchmarks/linescan.py --json linescan.json

Lines of 4096 mono pixels, tiles of 2048 lines that overlap by 128, in blocks of 64 lines and of 1. The blocks come
from 16 MB of memory, as from a driver's buffers. A tile is looked at by nobody here, and forgotten a few tiles later;
the camera's driver is excluded. Every way is first compared with the lines that went in. Ways:

- ``tiles``: ``LineAssembler``, which fills pooled tiles.
- ``frames``: ``LineScanSource``, with ids, positions and the checks of every block.
- ``fresh``: as ``tiles``, with new memory for every tile instead of the pool.
- ``ring``: a ring of twice the size that is written twice, so that every tile is contiguous in it, and copied out.
- ``copy``: only the bytes that ``tiles`` has to copy, in the same portions: the floor.

The ways take turns. Reported is the median over the turns with the lowest and the highest, in CPU time of the one
thread, which is what a core of its own would give: other programs on the machine disturb it less than the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from recontrast_edge import assembly
from recontrast_edge.assembly import LineAssembler
from recontrast_edge.doctor import published_facts
from recontrast_edge.frame import EndOfStream, Frame
from recontrast_edge.images import atomic_write
from recontrast_edge.linescan import LineScanOptions, LineScanSource

WIDTH = 4096
LINES, OVERLAP = 2048, 128
STEP = LINES - OVERLAP
DRIVER_BYTES = 16 << 20
KEPT_TILES = 3
"""Tiles that somebody still holds while the next ones are made."""

Blocks = Iterator[np.ndarray]
Way = Callable[[Blocks], Iterator[np.ndarray]]


def driver_blocks(height: int, count: int) -> Blocks:
    """``count`` blocks (height, WIDTH) uint8, over and over the same memory."""
    memory = np.random.default_rng(0).integers(0, 256, (DRIVER_BYTES // WIDTH, WIDTH), dtype=np.uint8)
    blocks = [memory[row : row + height] for row in range(0, len(memory), height)]
    return itertools.islice(itertools.cycle(blocks), count)


def tiles_way(blocks: Blocks) -> Iterator[np.ndarray]:
    assembler = LineAssembler(lines=LINES, overlap=OVERLAP)
    for block in blocks:
        for tile in assembler.add(block):
            assert tile.image is not None
            yield tile.image


class _Driver:
    """A source that has nothing to do."""

    uri = "driver"
    live = True

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = enumerate(blocks)

    def read(self, timeout_s: float) -> Frame:
        for index, block in self._blocks:
            return Frame(index, self.uri, block, time.monotonic(), camera_frame_id=index)
        raise EndOfStream

    def close(self) -> None:
        pass


def frames_way(blocks: Blocks) -> Iterator[np.ndarray]:
    source = LineScanSource(_Driver(blocks), LineScanOptions(lines=LINES, overlap=OVERLAP), "driver")
    while True:
        try:
            frame = source.read(1.0)
        except EndOfStream:
            return
        # The last tile reaches back, which the other ways do not do.
        if frame is not None and frame.image is not None and frame.web and frame.web.first_line % STEP == 0:
            yield frame.image


class _NoPool(assembly.BufferPool):
    def take(self) -> np.ndarray:
        return np.empty(self._shape, self._dtype)


def fresh_way(blocks: Blocks) -> Iterator[np.ndarray]:
    pool, assembly.BufferPool = assembly.BufferPool, _NoPool
    try:
        yield from tiles_way(blocks)
    finally:
        assembly.BufferPool = pool


def ring_way(blocks: Blocks) -> Iterator[np.ndarray]:
    ring = np.empty((2 * LINES, WIDTH), np.uint8)
    first = line = 0
    for block in blocks:
        row = 0
        while row < len(block):
            at = line % LINES
            count = min(len(block) - row, LINES - at, first + LINES - line)
            part = block[row : row + count]
            ring[at : at + count] = part
            ring[at + LINES : at + LINES + count] = part
            line, row = line + count, row + count
            if line == first + LINES:
                yield ring[first % LINES : first % LINES + LINES].copy()
                first += STEP


def copy_way(blocks: Blocks) -> Iterator[np.ndarray]:
    # As many tiles as are alive in the other ways, so that no cache holds them either.
    tiles = itertools.cycle([np.zeros((LINES, WIDTH), np.uint8) for _ in range(KEPT_TILES + 2)])
    tile, row = next(tiles), 0
    for block in blocks:
        if row + len(block) > LINES:
            full, tile, row = tile, next(tiles), OVERLAP
            tile[:OVERLAP] = full[STEP:]
        tile[row : row + len(block)] = block
        row += len(block)
    return iter(())


WAYS: dict[str, Way] = {
    "tiles": tiles_way,
    "frames": frames_way,
    "fresh": fresh_way,
    "ring": ring_way,
    "copy": copy_way,
}


def check(name: str, height: int) -> None:
    """Refuse a way whose tiles are not the lines that went in."""
    count = 4 * LINES // height
    lines = np.concatenate(list(driver_blocks(height, count)))
    tiles = list(WAYS[name](driver_blocks(height, count)))
    right = all(np.array_equal(tile, lines[k * STEP : k * STEP + LINES]) for k, tile in enumerate(tiles))
    if not right or len(tiles) != (len(lines) - LINES) // STEP + 1:
        sys.exit(f"{name}, blocks of {height}: the tiles are not the lines that went in")


def seconds(name: str, height: int, lines: int) -> float:
    """CPU seconds that one way takes for so many lines."""
    blocks = driver_blocks(height, lines // height)
    kept: deque[np.ndarray] = deque(maxlen=KEPT_TILES)
    started_s = time.process_time()
    for tile in WAYS[name](blocks):
        kept.append(tile)
    return time.process_time() - started_s


def measure(height: int, lines: int, turns: int) -> dict[str, Any]:
    """Lines a second of every way: median, lowest, highest; and the share of ``tiles`` that ``copy`` takes."""
    for name in WAYS:
        if name != "copy":
            check(name, height)
        seconds(name, height, lines)
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(turns):
        for name in WAYS:
            taken[name].append(seconds(name, height, lines))
    rates = {name: sorted(lines / value for value in values) for name, values in taken.items()}
    result: dict[str, Any] = {
        name: {
            "lines_per_s": round(statistics.median(values)),
            "lowest": round(values[0]),
            "highest": round(values[-1]),
        }
        for name, values in rates.items()
    }
    for name in ("tiles", "frames"):
        shares = [copy / whole for copy, whole in zip(taken["copy"], taken[name], strict=True)]
        result[name]["copying_share"] = round(statistics.median(shares), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lines", type=int, default=200_000, help="lines of one turn (default %(default)s)")
    parser.add_argument("--turns", type=int, default=9, help="(default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    arguments = parser.parse_args()
    results = {}
    for height in (64, 1):
        results[f"blocks of {height}"] = measured = measure(height, arguments.lines, arguments.turns)
        print(f"blocks of {height} x {WIDTH}, tiles of {LINES} lines with {OVERLAP} shared; lines/s")
        for name, row in measured.items():
            share = f"   copying {row['copying_share']:.0%}" if "copying_share" in row else ""
            print(f"  {name:8}{row['lines_per_s']:>12,}   ({row['lowest']:,} to {row['highest']:,}){share}")
    if arguments.json:
        setup = {"width": WIDTH, "tile_lines": LINES, "overlap": OVERLAP, "lines": arguments.lines}
        with atomic_write(arguments.json) as file:
            file.write(json.dumps({"machine": published_facts(), **setup, **results}, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
