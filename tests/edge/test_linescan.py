"""Line scan: no line lost or doubled, every position right, and merged verdicts that are never better than the tiles'."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recontrast_edge.errors import InputError, SourceError, UsageError
from recontrast_edge.frame import EndOfStream, Frame, Judgement, Region
from recontrast_edge.linescan import (
    BufferPool,
    LineAssembler,
    LineScanOptions,
    LineScanSource,
    Tile,
    TileSpan,
    line_options,
)
from recontrast_edge.sources import open_source
from recontrast_edge.verdict import MAX_REGIONS
from recontrast_edge.webmerge import TileMerger, merge_regions, open_merger

WIDTH = 8


def numbered_lines(first_line: int, count: int) -> np.ndarray:
    """(count, WIDTH) uint8; each line holds its own number."""
    numbers = np.arange(first_line, first_line + count, dtype=np.uint32)
    return np.repeat(numbers[:, None], WIDTH // 4, axis=1).view(np.uint8)


def line_numbers(image: np.ndarray) -> list[int]:
    numbers = np.ascontiguousarray(image[:, :4]).view(np.uint32)[:, 0]
    return [int(number) for number in numbers]


# Slow oracles: every line on its own, no arithmetic over stretches.


def expected_tiles(start: int, end: int, lines: int, overlap: int) -> list[tuple[int, int]]:
    """(first line, number of lines) of a row of tiles from ``start`` to ``end``."""
    tiles = []
    shown = set[int]()
    first = start
    while first + lines <= end:
        tiles.append((first, lines))
        shown |= set(range(first, first + lines))
        first += lines - overlap
    if any(line not in shown for line in range(start, end)):
        first = max(start, end - lines)
        tiles.append((first, end - first))
    return tiles


def single_tiles(first: int, count: int, lines: int, overlap: int) -> list[tuple[int, int]]:
    """A stretch that one tile stands for, as the tiles it stands for."""
    if count <= lines:
        return [(first, count)]
    step = lines - overlap
    assert (count - lines) % step == 0
    return [(first + index * step, lines) for index in range((count - lines) // step + 1)]


@st.composite
def webs(draw: st.DrawFn) -> tuple[int, int, list[tuple[str, int]]]:
    lines = draw(st.integers(1, 40))
    overlap = draw(st.integers(0, lines - 1))
    event = st.tuples(st.sampled_from(["block", "block", "block", "lost", "end"]), st.integers(1, 64))
    return lines, overlap, draw(st.lists(event, max_size=30))


@given(webs())
@settings(max_examples=300, deadline=None)
def test_no_line_is_lost_or_doubled(web: tuple[int, int, list[tuple[str, int]]]) -> None:
    lines, overlap, events = web
    assembler = LineAssembler(lines=lines, overlap=overlap)
    tiles: list[Tile] = []
    closing: list[Tile] = []
    lost: set[int] = set()
    starts, line = [0], 0
    for what, count in [*events, ("end", 0)]:
        if what == "block":
            tiles += assembler.add(numbered_lines(line, count))
            line += count
        elif what == "lost":
            tiles += assembler.skip(count)
            lost |= set(range(line, line + count))
            line += count
        else:
            last = assembler.end()
            closing += last
            tiles += last
            starts.append(line)
    assert assembler.next_line == line

    wanted = [tile for start, end in itertools.pairwise(starts) for tile in expected_tiles(start, end, lines, overlap)]
    got = [single for tile in tiles for single in single_tiles(tile.first_line, tile.lines, lines, overlap)]
    assert got == wanted
    for tile in tiles:
        shown = range(tile.first_line, tile.first_line + tile.lines)
        assert tile.lost == len(lost & set(shown))
        assert (tile.image is None) == (tile.lost > 0 or tile.lines < lines)
        # Only now, when all of them have been made: none was written to in the meantime.
        if tile.image is not None:
            assert line_numbers(tile.image) == list(shown)
    for tile, following in itertools.pairwise(tiles):
        # Dataclasses with arrays compare by identity.
        assert tile.first_line < tile.settled_line <= following.first_line or following in closing


@given(heights=st.lists(st.integers(1, 64), min_size=1, max_size=20), lines=st.integers(1, 50), data=st.data())
@settings(max_examples=50, deadline=None)
def test_every_line_comes_as_often_as_the_overlap_says(heights: list[int], lines: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, lines - 1))
    assembler = LineAssembler(lines=lines, overlap=overlap)
    tiles = list(itertools.chain.from_iterable(assembler.add(block) for block in blocks_of(heights)))
    tiles += assembler.end()
    delivered = Counter(line for tile in tiles if tile.image is not None for line in line_numbers(tile.image))
    wanted = expected_tiles(0, sum(heights), lines, overlap)
    assert delivered == Counter(
        line for first, count in wanted if count == lines for line in range(first, first + count)
    )


def blocks_of(heights: Iterable[int]) -> Iterable[np.ndarray]:
    line = 0
    for height in heights:
        yield numbered_lines(line, height)
        line += height


def test_colour_lines_and_a_change_of_width() -> None:
    assembler = LineAssembler(lines=4, overlap=1)
    (tile,) = assembler.add(np.full((4, 5, 3), 9, np.uint8))
    assert tile.image is not None
    assert tile.image.shape == (4, 5, 3)
    with pytest.raises(ValueError, match="read-only"):
        tile.image[0] = 0
    for block in (np.zeros((1, 6, 3), np.uint8), np.zeros((1, 5), np.uint8)):
        with pytest.raises(SourceError, match=r"line 4: expected lines of uint8 \(5, 3\)"):
            assembler.add(block)


class TestPool:
    def test_what_somebody_looks_at_is_not_used_again(self) -> None:
        pool = BufferPool((16, 16), np.dtype(np.uint8))
        first = pool.take()
        first[:] = 7
        # Not even the array itself, but a view of a view of it.
        corner = first[:8][:, :8].reshape(-1)
        del first
        others = [pool.take() for _ in range(20)]
        assert not any(np.shares_memory(corner, other) for other in others)
        del others
        for _ in range(20):
            pool.take()[:] = 0
        assert (corner == 7).all()

    def test_what_nobody_looks_at_is_used_again(self) -> None:
        pool = BufferPool((16, 16), np.dtype(np.uint8))
        addresses = set()
        for _ in range(50):
            addresses.add(pool.take().ctypes.data)
            gc.collect(0)
        assert len(addresses) == 1

    def test_tiles_that_wait_are_not_overwritten(self) -> None:
        """As in a queue of which the oldest go while new ones come."""
        assembler = LineAssembler(lines=32, overlap=8)
        waiting: list[Tile] = []
        for block in blocks_of([16] * 400):
            waiting += assembler.add(block)
            while len(waiting) > 5:
                tile = waiting.pop(0)
                assert tile.image is not None
                assert line_numbers(tile.image) == list(range(tile.first_line, tile.first_line + 32))


class Blocks:
    """A line source out of a list: heights, and what is between them."""

    uri = "blocks:"
    live = True

    def __init__(self, frames: Iterable[Frame | None]) -> None:
        self.counters = {"incomplete": 3}
        self.closed = False
        self._frames = iter(frames)

    def read(self, timeout_s: float) -> Frame | None:
        for frame in self._frames:
            if frame is None:
                time.sleep(min(timeout_s, 0.01))
            return frame
        raise EndOfStream

    def close(self) -> None:
        self.closed = True


def block(index: int, image: np.ndarray | None, **more: Any) -> Frame:
    return Frame(index, "blocks:", image, captured_s=float(index), **more)


def tiles_of(frames: Iterable[Frame | None], query: str) -> list[Frame]:
    source = LineScanSource(Blocks(frames), LineScanOptions.parse("test", query), f"blocks:?{query}")
    return read_all(source)


def read_all(source: Any) -> list[Frame]:
    tiles: list[Frame] = []
    while True:
        try:
            tile = source.read(1.0)
        except EndOfStream:
            return tiles
        if tile is not None:
            tiles.append(tile)


def span(tile: Frame) -> TileSpan:
    assert isinstance(tile.web, TileSpan)
    return tile.web


def places(tiles: Sequence[Frame]) -> list[tuple[int, int, str | None]]:
    return [(span(tile).first_line, span(tile).lines, tile.fault) for tile in tiles]


class TestSource:
    def test_tiles_carry_what_the_last_block_says(self) -> None:
        frames = [
            block(index, numbered_lines(16 * index, 16), camera_frame_id=100 + index, camera_time_ns=7 * index)
            for index in range(5)
        ]
        tiles = tiles_of(frames, "lines=32&overlap=8&line_pitch_mm=0.5&pixel_pitch_mm=0.25")
        assert places(tiles) == [(0, 32, None), (24, 32, None), (48, 32, None)]
        assert [tile.frame_id for tile in tiles] == [0, 1, 2]
        assert [(tile.captured_s, tile.camera_frame_id, tile.camera_time_ns) for tile in tiles] == [
            (1.0, 101, 7),
            (3.0, 103, 21),
            (4.0, 104, 28),
        ]
        assert span(tiles[1]).record() == {
            "first_line": 24,
            "lines": 32,
            "first_mm": 12.0,
            "last_mm": 27.5,
            "first_column": 0,
        }

    def test_the_rest_of_the_web_is_shown_by_a_tile_that_reaches_back(self) -> None:
        frames = [block(index, numbered_lines(16 * index, 16)) for index in range(3)]
        tiles = tiles_of(frames, "lines=32&overlap=8")
        assert places(tiles) == [(0, 32, None), (16, 32, None)]
        assert tiles[1].image is not None
        assert line_numbers(tiles[1].image) == list(range(16, 48))

    def test_a_web_shorter_than_a_tile_is_a_fault(self) -> None:
        (tile,) = tiles_of([block(0, numbered_lines(0, 20))], "lines=32")
        assert places([tile]) == [(0, 20, "lines_missed")]
        assert "a tile needs 32" in (tile.detail or "")

    @pytest.mark.parametrize("id_of", ["camera_frame_id", "frame_id"])
    def test_lost_blocks_are_faults_and_positions_stay_right(self, id_of: str) -> None:
        kept = [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]
        frames = [
            block(number if id_of == "frame_id" else index, numbered_lines(8 * number, 8))
            if id_of == "frame_id"
            else block(index, numbered_lines(8 * number, 8), camera_frame_id=10 + number)
            for index, number in enumerate(kept)
        ]
        source = LineScanSource(Blocks(frames), LineScanOptions.parse("test", "lines=16&overlap=0"), "blocks:")
        tiles = read_all(source)
        assert places(tiles) == [
            (0, 16, None),
            (16, 16, "lines_missed"),
            (32, 16, "lines_missed"),
            (48, 16, None),
            (64, 16, None),
            (80, 16, None),
        ]
        assert tiles[1].detail == "8 of 16 lines were lost"
        for tile in tiles:
            if tile.image is not None:
                assert line_numbers(tile.image)[0] == span(tile).first_line
        assert source.counters == {"incomplete": 3, "lines": 96, "lines_lost": 16, "lines_between_parts": 0}

    def test_a_broken_block_is_a_lost_one(self) -> None:
        frames = [block(index, numbered_lines(8 * index, 8)) for index in range(6)]
        frames[2] = block(2, None, fault="incomplete_frame", detail="3 packets are missing")
        frames[4] = block(4, np.zeros((0, WIDTH), np.uint8))
        tiles = tiles_of(frames, "lines=8&overlap=0")
        assert places(tiles) == [(8 * index, 8, "lines_missed" if index in (2, 4) else None) for index in range(6)]
        assert "3 packets are missing" in (tiles[2].detail or "")
        assert "empty" in (tiles[4].detail or "")

    def test_a_long_gap_is_one_fault(self) -> None:
        frames = [block(0, numbered_lines(0, 8)), block(100_000, numbered_lines(800_000, 8))]
        tiles = tiles_of(frames, "lines=16&overlap=4")
        # 0 and 799,992 show lines that came; between them are 66,665 tiles.
        assert len(tiles) <= 4
        assert all(tile.fault == "lines_missed" for tile in tiles)
        assert span(tiles[-1]).first_line + span(tiles[-1]).lines == 800_008

    def test_ids_that_cannot_be_right_break_it(self) -> None:
        good = block(5, numbered_lines(0, 8), camera_frame_id=5)
        for later in (good, block(6, numbered_lines(0, 8), camera_frame_id=4)):
            with pytest.raises(SourceError, match="ids must rise"):
                tiles_of([good, later], "lines=16")
        with pytest.raises(SourceError, match="more than can be right"):
            tiles_of([good, block(6, numbered_lines(0, 8), camera_frame_id=1 << 40)], "lines=16")

    def test_what_comes_before_the_first_good_block_is_no_web(self) -> None:
        frames = [
            block(0, None, fault="incomplete_frame"),
            block(4, numbered_lines(0, 8)),
            block(5, numbered_lines(8, 8)),
        ]
        tiles = tiles_of(frames, "lines=8&overlap=0")
        assert [(tile.fault, tile.web is None) for tile in tiles] == [
            ("incomplete_frame", True),
            (None, False),
            (None, False),
        ]
        assert span(tiles[1]).first_line == 0

    def test_columns_cover_the_width(self) -> None:
        image = np.tile(np.arange(100, dtype=np.uint8), (8, 1))
        tiles = tiles_of([block(0, image)], "lines=8&columns=3&column_overlap=10")
        spans = [span(tile) for tile in tiles]
        assert [(part.first_column, part.columns) for part in spans] == [(0, 40), (30, 40), (60, 40)]
        for tile in tiles:
            assert tile.image is not None
            assert tile.image[0, 0] == span(tile).first_column
        assert [part.settled_line for part in spans] == [0, 0, 8]

    @given(width=st.integers(1, 300), count=st.integers(1, 64), overlap=st.one_of(st.none(), st.integers(0, 300)))
    @settings(max_examples=200, deadline=None)
    def test_neighbours_across_overlap_enough(self, width: int, count: int, overlap: int | None) -> None:
        query = f"lines=1&columns={count}" + ("" if overlap is None or count == 1 else f"&column_overlap={overlap}")
        frames = [block(0, np.zeros((1, width), np.uint8))]
        if count > width or (count > 1 and (overlap or 0) >= width):
            with pytest.raises(UsageError, match="below the width"):
                tiles_of(frames, query)
            return
        spans = [span(tile) for tile in tiles_of(frames, query)]
        assert spans[0].first_column == 0
        assert spans[-1].first_column + spans[-1].columns == width
        for left, right in itertools.pairwise(spans):
            assert left.first_column + left.columns - right.first_column >= (
                width // count // 16 if overlap is None else overlap
            )

    def test_timeouts_and_the_end(self) -> None:
        frames = [block(0, numbered_lines(0, 8)), None, None, block(1, numbered_lines(8, 8))]
        blocks = Blocks(frames)
        source = LineScanSource(blocks, LineScanOptions.parse("test", "lines=16"), "blocks:")
        assert source.heard_s is None
        assert source.read(0.01) is None
        heard_s = source.heard_s
        assert heard_s is not None
        assert source.read(0.01) is None
        assert source.heard_s == heard_s
        assert source.read(0.01) is not None
        assert source.heard_s > heard_s
        with pytest.raises(EndOfStream):
            source.read(0.01)
        source.close()
        assert blocks.closed

    def test_after_close_nothing_comes(self) -> None:
        source = open_source("synthetic-web://brushed-metal?width=32&lines=64")
        assert source.read(1.0) is not None
        source.close()
        source.close()
        with pytest.raises(EndOfStream):
            source.read(1.0)


def part_blocks(ids: Sequence[str | None], height: int = 8, lost: Sequence[int] = ()) -> list[Frame]:
    return [
        block(index, numbered_lines(height * index, height), part_id=part_id)
        for index, part_id in enumerate(ids)
        if index not in lost
    ]


def parts_of(tiles: Sequence[Frame]) -> list[tuple[str | None, int, int, str | None, bool]]:
    return [(t.part_id, span(t).first_line, span(t).lines, t.fault, span(t).ends_part) for t in tiles]


class TestParts:
    def test_a_part_begins_with_its_id_and_a_tile(self) -> None:
        tiles = tiles_of(part_blocks(["a", "a", None, "b", "b", "b"]), "lines=16&overlap=4&part=id")
        assert parts_of(tiles) == [
            ("a", 0, 16, None, False),
            ("a", 8, 16, None, True),
            ("b", 24, 16, None, False),
            ("b", 32, 16, None, True),
        ]

    def test_the_last_tile_of_a_part_that_ends_with_it(self) -> None:
        tiles = tiles_of(part_blocks(["a", "a", "b", "b"]), "lines=16&overlap=4&part=id")
        assert parts_of(tiles) == [("a", 0, 16, None, True), ("b", 16, 16, None, True)]

    def test_a_part_of_known_length_ends_at_once(self) -> None:
        query = "lines=12&overlap=4&part=id&part_lines=20"
        source = LineScanSource(
            Blocks([*part_blocks(["a", None, None]), *([None] * 5)]), LineScanOptions.parse("test", query), "blocks:"
        )
        tiles = [source.read(0.05), source.read(0.05)]
        assert parts_of([tile for tile in tiles if tile]) == [("a", 0, 12, None, False), ("a", 8, 12, None, True)]
        assert source.counters["lines_between_parts"] == 4

    def test_what_lies_between_parts_is_not_shown(self) -> None:
        ids = [None, None, "a", None, None, None, "b", None]
        tiles = tiles_of(part_blocks(ids), "lines=16&overlap=0&part=id&part_lines=16")
        assert parts_of(tiles) == [("a", 16, 16, None, True), ("b", 48, 16, None, True)]
        for tile in tiles:
            assert tile.image is not None
            assert line_numbers(tile.image)[0] == span(tile).first_line

    def test_a_part_that_is_too_short_is_a_fault(self) -> None:
        tiles = tiles_of(part_blocks(["a", "a", "b", "b", "b"]), "lines=16&overlap=0&part=id&part_lines=24")
        assert parts_of(tiles) == [
            ("a", 0, 16, None, False),
            ("a", 0, 16, "lines_missed", True),
            ("b", 16, 16, None, False),
            ("b", 24, 16, None, True),
        ]
        tiles = tiles_of(part_blocks(["a", "b", "b"]), "lines=16&overlap=0&part=id")
        assert parts_of(tiles) == [("a", 0, 8, "lines_missed", True), ("b", 8, 16, None, True)]

    def test_lines_lost_between_two_parts_make_both_faults(self) -> None:
        tiles = tiles_of(part_blocks(["a", "a", "a", "b", "b", "b"], lost=[2]), "lines=16&overlap=0&part=id")
        assert parts_of(tiles) == [
            ("a", 0, 16, None, False),
            ("a", 8, 16, "lines_missed", True),
            ("b", 16, 8, "lines_missed", False),
            ("b", 24, 16, None, False),
            ("b", 32, 16, None, True),
        ]

    def test_lines_lost_where_a_part_may_have_begun(self) -> None:
        tiles = tiles_of(part_blocks(["a", None, None, None, None], lost=[3]), "lines=8&part=id&part_lines=8")
        assert parts_of(tiles) == [("a", 0, 8, None, True), (None, 24, 8, "lines_missed", False)]

    @given(
        ids=st.lists(st.sampled_from([None, "a", "b", "c"]), max_size=20),
        lost=st.sets(st.integers(0, 19)),
        height=st.integers(1, 9),
        lines=st.integers(1, 20),
        length=st.one_of(st.none(), st.integers(0, 30)),
    )
    @settings(max_examples=200, deadline=None)
    def test_every_line_of_a_part_is_shown_or_missed(
        self, ids: list[str | None], lost: set[int], height: int, lines: int, length: int | None
    ) -> None:
        """The oracle walks line by line: which part a line belongs to, and whether it came."""
        query = f"lines={lines}&part=id" + ("" if length is None else f"&part_lines={lines + length}")
        frames = part_blocks(ids, height, lost=sorted(lost))
        tiles = tiles_of(frames, query)
        # Nothing is known of lines before the first block that came, nor of those after the last.
        came = [index for index in range(len(ids)) if index not in lost]
        owner: dict[int, str] = {}
        current, left = None, 0
        for index in came:
            for line in range(height):
                if line == 0 and ids[index] not in (None, current):
                    current, left = ids[index], height * len(ids) if length is None else lines + length
                if line == 0 and index - 1 not in came and index != came[0] and length is not None:
                    gap = index - max(other for other in came if other < index) - 1
                    if ids[index] != current or left != lines + length:
                        left = max(0, left - gap * height)
                if left > 0 and current is not None:
                    owner[height * (index - came[0]) + line] = current
                    left -= 1
        shown: dict[int, set[str | None]] = {}
        for tile in tiles:
            for line in range(span(tile).first_line, span(tile).first_line + span(tile).lines):
                shown.setdefault(line, set()).add(tile.part_id)
        for line, part_id in owner.items():
            assert part_id in shown.get(line, set())
        for tile in tiles:
            if tile.image is not None:
                numbers = [number - height * came[0] for number in line_numbers(tile.image)]
                assert numbers == list(range(span(tile).first_line, span(tile).first_line + lines))
                assert {owner[number] for number in numbers} == {tile.part_id}
