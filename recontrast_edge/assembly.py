"""Blocks of lines become overlapping tiles, without losing or doubling a line.

    for tile in LineAssembler(lines=2048, overlap=128).add(block): print(tile.first_line)

A line is copied once, into the tile that it belongs to, and once more for each further tile that shows it. Tiles come
from a pool: one is used again when nothing refers to it any more, so that it cannot change while it is judged.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.errors import SourceError

FREE_TILES = 4
"""Buffers the pool keeps for later; more are given back to the system."""


@dataclass(frozen=True, eq=False)
class Tile:
    """A stretch of the web, over its full width.

    Attributes:
        first_line: counted from the start of the web.
        lines: number of lines.
        image: (lines, W) or (lines, W, 3), read-only; None where lines were lost, or there are too few for a tile.
        lost: how many of the lines were lost.
        settled_line: the lines before it have been shown, and will not be again; but by the tile that ``end`` makes.
    """

    first_line: int
    lines: int
    image: NDArray[Any] | None
    lost: int
    settled_line: int


class LineAssembler:
    """Blocks of lines in, overlapping tiles out; neither loses nor doubles a line.

        for tile in LineAssembler(lines=2048, overlap=128).add(block): ...

    Args:
        lines: height of a tile.
        overlap: lines that a tile shares with the one before; less than ``lines``.
    """

    def __init__(self, *, lines: int, overlap: int) -> None:
        self._lines = lines
        self._step = lines - overlap
        self._pool: BufferPool | None = None
        self._buffer: NDArray[Any] = np.empty(0, np.uint8)
        self._previous: NDArray[Any] = self._buffer
        self._lost: deque[tuple[int, int]] = deque()
        """Stretches (first line, line after the last) that were lost, as far back as a tile can still show them."""
        self._start_line = 0
        """Where this row of tiles begins."""
        self._tile_line = 0
        """Where the tile begins that is being filled."""
        self.next_line = 0
        """Number of the next line that comes."""

    def add(self, block: NDArray[Any]) -> list[Tile]:
        """Take the next lines; returns the tiles that are complete with them.

        Args:
            block: (n, W) or (n, W, 3); copied. The first one settles the width and the type of all.

        Raises:
            SourceError: a block of another width or another number of channels.
        """
        if self._pool is None:
            self._pool = BufferPool((self._lines, *block.shape[1:]), block.dtype)
            self._buffer = self._pool.take()
        if block.shape[1:] != self._buffer.shape[1:] or block.dtype != self._buffer.dtype:
            expected = f"{self._buffer.dtype} {self._buffer.shape[1:]}"
            raise SourceError(
                f"line {self.next_line}: expected lines of {expected} as before, got {block.dtype} {block.shape[1:]}; "
                "the camera's width and pixel format must not change while it runs"
            )
        tiles: list[Tile] = []
        row = 0
        while row < len(block):
            filled = self.next_line - self._tile_line
            count = min(len(block) - row, self._lines - filled)
            self._buffer[filled : filled + count] = block[row : row + count]
            self.next_line += count
            row += count
            if filled + count == self._lines:
                tiles.append(self._complete(self._pool))
        return tiles

    def _complete(self, pool: BufferPool) -> Tile:
        image, first_line = self._buffer, self._tile_line
        self._buffer = pool.take()
        self._buffer[: self._lines - self._step] = image[self._step :]
        self._previous = image
        self._tile_line += self._step
        return self._tile(first_line, image)

    def _tile(self, first_line: int, image: NDArray[Any]) -> Tile:
        image.flags.writeable = False
        lost = self._lost_within(first_line, first_line + self._lines)
        return Tile(first_line, self._lines, None if lost else image, lost, self._tile_line)

    def _lost_within(self, first_line: int, end_line: int) -> int:
        while self._lost and self._lost[0][1] <= first_line:
            self._lost.popleft()
        return sum(max(0, min(end, end_line) - max(first, first_line)) for first, end in self._lost)

    def skip(self, lines: int) -> list[Tile]:
        """Count lines that were lost; returns the tiles they end, one for all that would show nothing else."""
        if lines <= 0:
            return []
        first_lost, end_lost = self.next_line, self.next_line + lines
        self._lost.append((first_lost, end_lost))
        self.next_line = end_lost
        tiles: list[Tile] = []
        while self._tile_line < first_lost and self._tile_line + self._lines <= end_lost:
            first_line = self._tile_line
            self._tile_line += self._step
            lost = self._lost_within(first_line, first_line + self._lines)
            tiles.append(Tile(first_line, self._lines, None, lost, self._tile_line))
        whole = (end_lost - self._tile_line - self._lines) // self._step + 1
        if whole > 0:
            first_line, length = self._tile_line, (whole - 1) * self._step + self._lines
            self._tile_line += whole * self._step
            tiles.append(Tile(first_line, length, None, length, self._tile_line))
        return tiles

    def end(self) -> list[Tile]:
        """End the row of tiles; the next line begins a new one.

        Returns:
            The tile for the lines that no tile has shown yet, if there are any: it ends with the last line and reaches
            back as far as it must. Without image where the whole row is shorter than a tile.
        """
        start_line, end_line = self._start_line, self.next_line
        shown_line = self._tile_line - self._step + self._lines if self._tile_line > start_line else start_line
        first_line = max(start_line, end_line - self._lines)
        filled = end_line - self._tile_line
        # Lines before the tile that is being filled: the one before still has them.
        before = self._tile_line - first_line
        self._start_line = self._tile_line = end_line
        if shown_line >= end_line:
            return []
        lost = self._lost_within(first_line, end_line)
        if lost or end_line - first_line < self._lines or self._pool is None:
            return [Tile(first_line, end_line - first_line, None, lost, end_line)]
        image = self._pool.take()
        image[:before] = self._previous[self._step - before : self._step]
        image[before:] = self._buffer[:filled]
        return [self._tile(first_line, image)]

    def pass_over(self, lines: int) -> None:
        """Count lines that lie between two rows of tiles; only right after ``end``."""
        self.next_line += lines
        self._start_line = self._tile_line = self.next_line


class BufferPool:
    """Arrays of one shape whose memory is used again as soon as nothing refers to them any more.

        image = BufferPool((2048, 4096), np.dtype(np.uint8)).take()

    Views count as references, whoever holds them: NumPy gives each view the array that ``take`` made as its base.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._shape = shape
        self._dtype = dtype
        self._bytes = int(np.prod(shape)) * dtype.itemsize
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=FREE_TILES)

    def take(self) -> NDArray[Any]:
        """A writable array with whatever values."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._bytes, np.uint8)
        # Through a memoryview: views of a view of an array would refer to the memory itself, past the array in between.
        array = np.frombuffer(memoryview(memory), self._dtype)  # type: ignore[arg-type]
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.reshape(self._shape)
