"""Line scan: no line lost or doubled, every position right, merged verdicts never better than those of the tiles."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recontrast_edge.assembly import BufferPool, LineAssembler, Tile
from recontrast_edge.errors import InputError, SourceError, UsageError
from recontrast_edge.frame import EndOfStream, Frame, Judgement, Region
from recontrast_edge.linescan import LineScanOptions, LineScanSource, TileSpan, line_options
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
@settings(max_examples=200, deadline=None)
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
    @settings(max_examples=100, deadline=None)
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

    def test_a_tile_waits_for_one_block_at_most(self) -> None:
        frames = [*part_blocks(["a", "a"]), None, *part_blocks(["a", "a", "a"])[2:], None]
        source = LineScanSource(Blocks(frames), LineScanOptions.parse("test", "lines=16&overlap=0&part=id"), "blocks:")
        assert source.read(0.05) is None
        tile = source.read(0.05)
        assert tile is not None
        assert parts_of([tile]) == [("a", 0, 16, None, False)]

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
        assert parts_of(tiles) == [("a", 0, 8, None, True), (None, 24, 8, "lines_missed", True)]

    @given(
        ids=st.lists(st.sampled_from([None, "a", "b", "c"]), max_size=20),
        lost=st.sets(st.integers(0, 19)),
        height=st.integers(1, 9),
        lines=st.integers(1, 20),
        length=st.one_of(st.none(), st.integers(0, 30)),
    )
    @settings(max_examples=100, deadline=None)
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


# Merging.


def touching(a: Region, b: Region) -> bool:
    """Whether boxes share a pixel or have neighbouring ones, pixel by pixel."""
    pixels_a = {(x, y) for x in range(a.x, a.x + a.width) for y in range(a.y, a.y + a.height)}
    around_b = {(x, y) for x in range(b.x - 1, b.x + b.width + 1) for y in range(b.y - 1, b.y + b.height + 1)}
    return bool(pixels_a & around_b)


def slowly_merged(regions: Iterable[Region]) -> set[tuple[int, int, int, int, int, float]]:
    """Join any two that touch, until none do."""
    boxes = list(regions)
    while pairs := [(a, b) for a, b in itertools.combinations(range(len(boxes)), 2) if touching(boxes[a], boxes[b])]:
        a, b = (boxes[index] for index in pairs[0])
        x, y = min(a.x, b.x), min(a.y, b.y)
        width, height = max(a.x + a.width, b.x + b.width) - x, max(a.y + a.height, b.y + b.height) - y
        joined = Region(x, y, width, height, a.area + b.area, max(a.peak, b.peak))
        boxes = [box for index, box in enumerate(boxes) if index not in pairs[0]] + [joined]
    return {dataclasses.astuple(box) for box in boxes}


regions_of_a_tile = st.builds(
    Region,
    st.integers(0, 11),
    st.integers(0, 11),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(11, 99).map(float),
)


@given(st.lists(regions_of_a_tile, max_size=8), st.randoms())
@settings(max_examples=100, deadline=None)
def test_regions_that_touch_become_one_in_whatever_order(regions: list[Region], random: Any) -> None:
    wanted = slowly_merged(regions)
    assert {dataclasses.astuple(region) for region in merge_regions(regions)} == wanted
    random.shuffle(regions)
    assert {dataclasses.astuple(region) for region in merge_regions(regions)} == wanted


THRESHOLD = 10.0


def passed(frame: Frame, score: float = 1.0) -> Judgement:
    return Judgement(frame, "PASS", score, THRESHOLD)


def rejected(frame: Frame, *regions: Region) -> Judgement:
    peak = max(region.peak for region in regions)
    return Judgement(frame, "REJECT", peak, THRESHOLD, regions=regions, map=np.full((4, 4), peak, np.float32))


def faulty(frame: Frame, code: str = "inference_failed") -> Judgement:
    return Judgement(frame, "FAULT", None, THRESHOLD, fault=frame.fault or code, detail=frame.detail)


def web_tiles(total: int, query: str, width: int = 16, height: int = 4) -> list[Frame]:
    frames = [
        block(index, np.zeros((min(height, total - height * index), width), np.uint8))
        for index in range(-(-total // height))
    ]
    return tiles_of(frames, query)


@st.composite
def judged_webs(draw: st.DrawFn) -> tuple[list[Judgement], int]:
    lines = draw(st.integers(2, 12))
    query = f"lines={lines}&overlap={draw(st.integers(0, lines - 1))}&columns={draw(st.integers(1, 3))}"
    blocks = draw(st.lists(st.sampled_from([True, True, True, True, False]), max_size=20))
    frames = [block(index, np.zeros((3, 16), np.uint8)) for index, came in enumerate([True, *blocks]) if came]
    judgements = []
    for frame in tiles_of(frames, query):
        what = draw(st.sampled_from(["PASS", "PASS", "PASS", "REJECT", "FAULT", "dropped"]))
        if frame.fault or what == "FAULT":
            judgements.append(faulty(frame))
        elif what == "PASS":
            judgements.append(passed(frame, draw(st.floats(0, THRESHOLD))))
        elif what == "REJECT":
            assert frame.image is not None
            rows, columns = frame.image.shape
            found = draw(st.lists(regions_of_a_tile, min_size=1, max_size=3))
            inside = [clipped(region, columns, rows) for region in found]
            judgements.append(rejected(frame, *inside))
    return judgements, draw(st.integers(1, 30))


def clipped(region: Region, columns: int, rows: int) -> Region:
    x, y = min(region.x, columns - 1), min(region.y, rows - 1)
    return dataclasses.replace(
        region, x=x, y=y, width=min(region.width, columns - x), height=min(region.height, rows - y), area=1
    )


@given(judged_webs())
@settings(max_examples=150, deadline=None)
def test_merging_over_a_length(web: tuple[list[Judgement], int]) -> None:
    """The oracle paints every tile, pixel by pixel."""
    judgements, length = web
    merger = TileMerger(length=length)
    merged = [out for judgement in judgements for out in merger.add(judgement)] + list(merger.flush())
    if not judgements:
        assert not merged
        return
    end = max(span(j.frame).first_line + span(j.frame).lines for j in judgements)
    stretches = [(first, min(first + length, end)) for first in range(0, end, length)]
    assert [(m.frame.web.first_line, m.frame.web.lines) for m in merged if m.frame.web] == [
        (first, last - first) for first, last in stretches
    ]
    assert [m.frame.frame_id for m in merged] == list(range(len(merged)))
    for (first, last), verdict in zip(stretches, merged, strict=True):
        shown = np.zeros((last - first, 16), bool)
        worst, scores, found = "PASS", [0.0], []
        settled_line = -1
        for judgement in judgements:
            place = span(judgement.frame)
            top, bottom = max(place.first_line, first), min(place.first_line + place.lines, last)
            # What the last tile of a web shows again may have had its verdict.
            if top < bottom and settled_line < min(first + length, 10**9):
                shown[top - first : bottom - first, place.first_column : place.first_column + place.columns] = True
                if judgement.verdict == "FAULT":
                    worst = "FAULT"
                here = [
                    Region(place.first_column + r.x, y0, r.width, y1 - y0, 1, r.peak)
                    for r in judgement.regions
                    for y0, y1 in [(max(place.first_line + r.y, first), min(place.first_line + r.y + r.height, last))]
                    if y0 < y1
                ]
                if here and worst == "PASS":
                    worst = "REJECT"
                found += here
                if judgement.score is not None:
                    scores.append(judgement.score if here else min(judgement.score, THRESHOLD))
            settled_line = max(settled_line, place.settled_line)
        if not shown.all():
            worst = "FAULT"
        assert verdict.verdict == worst
        assert verdict.score == (None if worst == "FAULT" else max(scores) if len(scores) > 1 else scores[0])
        wanted = {box[:4] + box[5:] for box in slowly_merged(found)}
        got = {(r.x, r.y + first, r.width, r.height, r.peak) for r in verdict.regions}
        assert got == wanted


@given(
    ids=st.lists(st.sampled_from([None, "a", "b", "c"]), max_size=16),
    lost=st.sets(st.integers(0, 15), max_size=3),
    lines=st.integers(1, 20),
    length=st.one_of(st.none(), st.integers(0, 30)),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_merging_over_parts(
    ids: list[str | None], lost: set[int], lines: int, length: int | None, data: st.DataObject
) -> None:
    """One verdict a part, as soon as its last tile is judged, and never better than the tiles'."""
    query = f"lines={lines}&part=id" + ("" if length is None else f"&part_lines={lines + length}")
    tiles = tiles_of(part_blocks(ids, 4, lost=sorted(lost)), query)
    merger = TileMerger(length=None)
    merged: list[Judgement] = []
    worst: list[str] = ["PASS"]
    wanted: list[tuple[str | None, str]] = []
    for tile in tiles:
        what = "FAULT" if tile.fault else data.draw(st.sampled_from(["PASS", "REJECT", "FAULT"]))
        region = Region(0, 0, 1, 1, 1, 20.0)
        judgement = {"PASS": passed(tile), "REJECT": rejected(tile, region), "FAULT": faulty(tile)}[what]
        merged += merger.add(judgement)
        worst.append(what)
        if span(tile).ends_part:
            wanted.append((tile.part_id, max(worst, key=["PASS", "REJECT", "FAULT"].index)))
            worst = ["PASS"]
            assert len(merged) == len(wanted)
    assert worst == ["PASS"]
    assert not merger.flush()
    assert [(m.frame.part_id, m.verdict) for m in merged] == wanted


class TestMerging:
    def test_a_defect_in_the_overlap_is_reported_once(self) -> None:
        first, second = web_tiles(28, "lines=16&overlap=4&line_pitch_mm=0.5&pixel_pitch_mm=2")
        merger = TileMerger(length=28)
        assert not merger.add(rejected(first, Region(2, 12, 4, 3, 10, 11.0)))
        assert not merger.add(rejected(second, Region(3, 0, 3, 4, 9, 14.0)))
        (merged,) = merger.flush()
        assert merged.verdict == "REJECT"
        assert merged.score == 14.0
        assert merged.regions == (Region(2, 12, 4, 4, 16, 14.0),)
        assert merged.frame.image is second.image
        record = merged.record()
        assert record["web"] == {"first_line": 0, "lines": 28, "first_mm": 0.0, "last_mm": 13.5, "first_column": 0}
        (region,) = record["regions"]
        assert (region["line"], region["line_mm"], region["column"], region["column_mm"]) == (12, 6.0, 2, 4.0)

    def test_a_stretch_has_its_verdict_with_the_last_tile_that_shows_it(self) -> None:
        tiles = web_tiles(48, "lines=16&overlap=4")
        merger = TileMerger(length=12)
        counts = [len(merger.add(passed(tile))) for tile in tiles]
        assert [span(tile).first_line for tile in tiles] == [0, 12, 24, 32]
        assert counts == [1, 1, 1, 1]
        assert not merger.flush()

    def test_a_reject_counts_where_its_defects_are(self) -> None:
        tiles = web_tiles(32, "lines=16&overlap=0")
        merger = TileMerger(length=8)
        merged = [*merger.add(rejected(tiles[0], Region(0, 6, 4, 4, 16, 30.0))), *merger.add(passed(tiles[1]))]
        assert [m.verdict for m in merged] == ["REJECT", "REJECT", "PASS", "PASS"]
        assert [[(r.y, r.height, r.area) for r in m.regions] for m in merged] == [[(6, 2, 8)], [(0, 2, 8)], [], []]

        merger = TileMerger(length=8)
        merged = list(merger.add(rejected(tiles[0], Region(0, 1, 4, 4, 16, 30.0))))
        assert [(m.verdict, m.score) for m in merged] == [("REJECT", 30.0), ("PASS", THRESHOLD)]

    def test_a_full_list_of_defects_may_have_left_some_out(self) -> None:
        (tile,) = web_tiles(16, "lines=16&overlap=0")
        regions = [Region(x, 0, 1, 1, 1, 30.0) for x in range(MAX_REGIONS)]
        merged = TileMerger(length=8).add(rejected(tile, *regions))
        assert [m.verdict for m in merged] == ["REJECT", "REJECT"]

    def test_tiles_that_never_came_make_a_fault(self) -> None:
        tiles = web_tiles(64, "lines=16&overlap=0")
        merger = TileMerger(length=16)
        merged = [*merger.add(passed(tiles[0])), *merger.add(passed(tiles[3]))]
        assert [(m.verdict, m.fault) for m in merged] == [
            ("PASS", None),
            ("FAULT", "lines_missed"),
            ("FAULT", "lines_missed"),
            ("PASS", None),
        ]
        assert merged[1].detail == "lines 16 to 31 were never judged"

    def test_a_tile_that_never_came_in_the_middle_of_a_stretch(self) -> None:
        tiles = web_tiles(48, "lines=16&overlap=0")
        merger = TileMerger(length=48)
        (merged,) = [m for tile in (tiles[0], tiles[2]) for m in merger.add(passed(tile))]
        assert (merged.verdict, merged.detail) == ("FAULT", "lines 16 to 31 were never judged")

    def test_a_web_of_numbered_parts(self) -> None:
        merger = open_merger("blocks:?lines=16&overlap=4&part_lines=20&merge=part")
        assert merger is not None
        merged = [m for tile in web_tiles(50, "lines=16&overlap=4") for m in merger.add(passed(tile))]
        merged += merger.flush()
        assert [(m.frame.part_id, m.verdict) for m in merged] == [("0", "PASS"), ("1", "PASS"), ("2", "FAULT")]
        assert merged[2].detail == "part 2 had not ended"

    def test_other_verdicts_go_through(self) -> None:
        (tile,) = web_tiles(16, "lines=16")
        merger = TileMerger(length=16)
        merger.add(passed(tile))
        stale = faulty(Frame(7, "camera", None, 0.0, fault="source_stale"))
        (through,) = merger.add(stale)
        assert through.fault == "source_stale"
        assert [m.verdict for m in merger.flush()] == ["PASS"]

    def test_a_camera_that_was_opened_anew_begins_a_web(self) -> None:
        query = "lines=16&overlap=0"
        before, after = web_tiles(16, query), web_tiles(32, query)
        merger = TileMerger(length=32)
        merger.add(passed(before[0]))
        merged = [m for tile in after for m in merger.add(passed(tile))]
        assert [(m.frame.web.lines, m.verdict) for m in merged if m.frame.web] == [(16, "PASS"), (32, "PASS")]

    def test_the_earliest_gate_and_the_latest_capture_hold(self) -> None:
        gate_s = time.monotonic() + 60
        tiles = [dataclasses.replace(t, gate_s=gate_s - i) for i, t in enumerate(web_tiles(32, "lines=16&overlap=0"))]
        merger = TileMerger(length=32)
        (merged,) = [m for tile in tiles for m in merger.add(passed(tile))]
        assert merged.verdict == "PASS"
        assert merged.frame.gate_s == gate_s - 1
        assert merged.frame.captured_s == tiles[1].captured_s
        assert merged.gate_in_ms == pytest.approx(59_000, abs=5_000)

    def test_a_stretch_that_is_not_decided_at_the_gate_is_a_fault_at_once(self) -> None:
        gate_s = time.monotonic() + 60
        tiles = [dataclasses.replace(tile, gate_s=gate_s) for tile in web_tiles(64, "lines=16&overlap=0")]
        merger = TileMerger(length=32, gate_reserve_s=59.9)
        merger.add(passed(tiles[0]))
        assert not merger.expire(time.monotonic())
        (merged,) = merger.expire(gate_s - 59.8)
        assert (merged.verdict, merged.fault) == ("FAULT", "gate_missed")
        assert merged.detail == "it is at the gate, but lines 16 to 31 were never judged"
        assert not merger.expire(gate_s)
        # Its other tile changes nothing any more, and the next stretch has its own verdict.
        later = [m for tile in tiles[1:] for m in merger.add(passed(tile))]
        assert [m.frame.web.first_line for m in later if m.frame.web] == [32]

    def test_a_verdict_after_the_gate_is_a_fault(self) -> None:
        (tile,) = web_tiles(16, "lines=16&overlap=0")
        late = dataclasses.replace(tile, gate_s=time.monotonic() - 0.5)
        (merged,) = TileMerger(length=16).add(rejected(late, Region(0, 0, 1, 1, 1, 30.0)))
        assert (merged.verdict, merged.fault) == ("FAULT", "gate_missed")
        assert "ms too late" in (merged.detail or "")
        assert merged.regions

    def test_truth_is_that_of_the_stretch(self) -> None:
        mask = np.zeros((16, 16), np.bool_)
        mask[12, 3] = True
        (tile,) = tiles_of([block(0, np.zeros((16, 16), np.uint8), truth_mask=mask)], "lines=16&overlap=0")
        assert tile.truth == "defect"
        merged = TileMerger(length=8).add(passed(tile))
        assert [m.frame.truth for m in merged] == ["good", "defect"]


class TestUris:
    @pytest.mark.parametrize(
        ("query", "message"),
        [
            ("lines=0", "lines must be a whole number from 1"),
            ("lines=100000", "lines must be a whole number"),
            ("lines=64&overlap=64", "overlap must be a whole number from 0 to 63"),
            ("lines=64&overlp=8", "did you mean 'overlap'"),
            ("lines=64&lines=64", "each option once"),
            ("lines=64&line_pitch_mm=0", "line_pitch_mm must be a number"),
            ("lines=64&merge=row", "merge must be tile or length or part, got 'row'"),
            ("lines=64&merge=length", "merge_lines=N belong together"),
            ("lines=64&merge_lines=100", "merge_lines=N belong together"),
            ("lines=64&merge=part", "needs part=id or part_lines=N"),
            ("lines=64&part=name", "part must be id, got 'name'"),
            ("lines=64&part=id&part_lines=32", "shorter than a tile"),
            ("lines=64&column_overlap=4", "needs columns=N"),
            ("lines=64&encoder=yes", "encoder must be 0 or 1"),
            ("overlap=8", "unknown option 'overlap'"),
            ("lines=64&width=8", "width must be a whole number from 32"),
            ("lines=64&block=0", "block must be a whole number"),
        ],
    )
    def test_bad_options_are_refused_by_name(self, query: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            open_source(f"synthetic-web://brushed-metal?{query}").close()

    def test_what_the_options_mean(self) -> None:
        options = line_options("pylon:123?exposure_us=50&lines=2048&columns=2&encoder=1")
        assert options == LineScanOptions(lines=2048, overlap=128, columns=2, encoder=True)
        assert line_options("pylon:123?exposure_us=50") is None
        assert open_merger("pylon:123?lines=64") is None
        source = open_source("synthetic-web://brushed-metal?width=32&lines=64&encoder=1&seed=3")
        assert source.uri == "synthetic-web://brushed-metal?width=32&lines=64&encoder=1&seed=3"
        assert getattr(source, "triggered", False) is True
        source.close()

    def test_a_password_stays_hidden(self) -> None:
        with pytest.raises(UsageError) as caught:
            open_source("rtsp://user:canary@camera/1?lines=none")
        assert "canary" not in str(caught.value)

    def test_a_folder_of_blocks(self, tmp_path: Any) -> None:
        import cv2

        for index in range(4):
            cv2.imwrite(str(tmp_path / f"{index}.png"), numbered_lines(10 * index, 10))
        tiles = read_all(open_source(f"{tmp_path}?lines=16&overlap=4"))
        assert [line_numbers(tile.image)[0] for tile in tiles if tile.image is not None] == [0, 12, 24]
        with pytest.raises(InputError, match="no such file"):
            open_source(f"{tmp_path}/none?lines=16")


class TestSyntheticWeb:
    URI = "synthetic-web://brushed-metal?width=64&defect_rate=1&seed=4&total=1500"

    def test_the_web_does_not_depend_on_how_it_is_read(self) -> None:
        webs = []
        for height in (1, 48, 1024):
            frames = read_all(open_source(f"{self.URI}&block={height}"))
            webs.append(np.concatenate([frame.image for frame in frames if frame.image is not None]))
            assert {len(frame.image) for frame in frames[:-1] if frame.image is not None} == {height}
            masks = np.concatenate([frame.truth_mask for frame in frames if frame.truth_mask is not None])
            assert masks.shape == (1500, 64)
            assert masks[:512].any()
        assert webs[0].shape == (1500, 64, 3)
        assert all(np.array_equal(webs[0], web) for web in webs)

    def test_tiles_know_their_defects(self) -> None:
        tiles = read_all(open_source(f"{self.URI}&lines=128&overlap=32"))
        assert {tile.truth for tile in tiles} == {"good", "defect"}
        blocks = read_all(open_source(self.URI))
        mask = np.concatenate([frame.truth_mask for frame in blocks if frame.truth_mask is not None])
        for tile in tiles:
            first = span(tile).first_line
            assert tile.truth_mask is not None
            assert np.array_equal(tile.truth_mask, mask[first : first + 128])

    def test_lines_come_at_their_rate_and_none_is_skipped(self) -> None:
        source = open_source("synthetic-web://brushed-metal?width=32&block=50&line_rate=1000")
        assert source.live
        started_s = time.monotonic()
        assert source.read(0.01) is None
        frames = []
        for _ in range(4):
            time.sleep(0.1)
            frames.append(source.read(1.0))
        assert time.monotonic() - started_s >= 0.2
        assert [frame.frame_id for frame in frames if frame] == [0, 1, 2, 3]
        source.close()


class TestPylonEmulator:
    """Real blocks: pylon's own simulated camera, its grab engine and its buffers.

    Cameras keep what was set within a process: this is one that other tests leave as it was.
    """

    URI = "pylon:0815-0001?roi=4096x64+0+0&pixel_format=Mono8&exposure_us=100&fps=800&buffers=256&lines=512&overlap=64"

    def test_tiles_and_broken_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("pypylon", reason="pypylon brings the simulated camera")
        monkeypatch.setenv("PYLON_CAMEMU", "3")
        from recontrast_edge.sources import pylon

        cameras: list[pylon.PylonCamera] = []
        start = pylon.PylonCamera.start
        monkeypatch.setattr(pylon.PylonCamera, "start", lambda self, *rest: (cameras.append(self), start(self, *rest)))
        source = open_source(self.URI)
        try:
            tiles = [tile for tile in (source.read(5.0) for _ in range(4)) if tile is not None]
            for name, value in (("ForceFailedBufferCount", 3), ("ForceFailedBuffer", "execute")):
                feature = cameras[0].feature(name)
                assert feature is not None
                feature.set(value)
            until_s = time.monotonic() + 20
            while source.counters["incomplete"] < 3 or tiles[-1].fault or len(tiles) < 12:  # type: ignore[attr-defined]
                assert time.monotonic() < until_s
                tile = source.read(1.0)
                if tile is not None:
                    tiles.append(tile)
            counters = source.counters  # type: ignore[attr-defined]
        finally:
            source.close()
        ends = [span(tile).first_line + span(tile).lines for tile in tiles]
        assert ends == [512 + 448 * index for index in range(len(tiles))]
        assert counters["incomplete"] == 3
        faults = [tile for tile in tiles if tile.fault]
        # Three blocks in a row lie in one tile, or in two, or in the overlap of two.
        assert 1 <= len(faults) <= 3
        assert {tile.fault for tile in faults} == {"lines_missed"}
        lost = counters["lines_lost"]
        assert lost == 64 * (counters["incomplete"] + counters["lost"])
        for tile in tiles:
            assert (tile.image is None) == (tile.fault is not None)
            assert tile.image is None or tile.image.shape == (512, 4096)


def copying_s(blocks: Sequence[np.ndarray], tiles: Sequence[np.ndarray], overlap: int) -> float:
    """CPU seconds to copy the same bytes that tiles of these blocks need."""
    started_s = time.process_time()
    tile_numbers = itertools.cycle(range(len(tiles)))
    tile, row = tiles[next(tile_numbers)], 0
    for part in blocks:
        if row + len(part) > len(tile):
            full, tile, row = tile, tiles[next(tile_numbers)], overlap
            tile[:overlap] = full[len(tile) - overlap :]
        tile[row : row + len(part)] = part
        row += len(part)
    return time.process_time() - started_s


def reading_s(blocks: Sequence[np.ndarray], query: str) -> float:
    frames = [block(index, part, camera_frame_id=index) for index, part in enumerate(blocks)]
    source = LineScanSource(Blocks(frames), LineScanOptions.parse("test", query), "blocks:")
    kept: list[Frame] = []
    started_s = time.process_time()
    while True:
        try:
            tile = source.read(1.0)
        except EndOfStream:
            return time.process_time() - started_s
        if tile is not None:
            kept = [*kept[-2:], tile]


def test_assembly_costs_little_more_than_copying() -> None:
    """In CPU time and against the same copies, so that a busy machine is no excuse; measured: 1.2 to 2 times."""
    memory = np.random.default_rng(0).integers(0, 256, (4096, 4096), dtype=np.uint8)
    blocks = [memory[row : row + 64] for row in range(0, 4096, 64)] * 6
    tiles = [np.zeros((2048, 4096), np.uint8) for _ in range(5)]
    copying = [copying_s(blocks, tiles, 128) for _ in range(5)]
    reading = [reading_s(blocks, "lines=2048&overlap=128") for _ in range(5)]
    assert min(reading) < 4 * min(copying)
    assert 64 * len(blocks) / min(reading) > 50_000


@pytest.mark.soak
@pytest.mark.parametrize(("height", "count", "clock"), [(64, 40_000, time.monotonic), (1, 500_000, time.process_time)])
def test_lines_a_second(height: int, count: int, clock: Any) -> None:
    """50,000 lines/s of 4096 pixels, with everything that a block goes through.

    In blocks of 64 by the clock; in blocks of a single line only of a core that does nothing else.
    """
    memory = np.random.default_rng(0).integers(0, 256, (4096, 4096), dtype=np.uint8)
    blocks = [memory[row : row + height] for row in range(0, 4096, height)]

    def frames() -> Iterable[Frame]:
        for index, part in enumerate(itertools.islice(itertools.cycle(blocks), count)):
            yield block(index, part, camera_frame_id=index)

    source = LineScanSource(Blocks(frames()), LineScanOptions.parse("test", "lines=2048&overlap=128"), "blocks:")
    started_s = clock()
    tiles = 0
    while True:
        try:
            tiles += source.read(1.0) is not None
        except EndOfStream:
            break
    rate_hz = height * count / (clock() - started_s)
    assert tiles >= (height * count - 2048) // 1920 + 1
    assert rate_hz > 50_000, f"{rate_hz:.0f} lines/s"
