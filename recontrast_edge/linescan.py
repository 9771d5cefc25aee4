"""Line scan: a camera's blocks of lines become overlapping tiles of one continuous web.

    source = open_source("pylon:?lines=2048&overlap=128&line_pitch_mm=0.05"); tile = source.read(timeout_s=1.0)

Any source is a line source: its images are blocks, one row a line, one below the other without a gap. Tile ``k`` shows
the lines from ``k * (lines - overlap)`` on. Lines that are lost on the way still count, so that every position stays
right, and the tiles that should show them become FAULTs.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.assembly import LineAssembler, Tile
from recontrast_edge.errors import InputError, SourceError, UsageError
from recontrast_edge.frame import EndOfStream, Frame, Source, WebSpan
from recontrast_edge.preprocess import Image, check_image
from recontrast_edge.secrets import masked_uri
from recontrast_edge.tile_layout import spread_starts
from recontrast_edge.uri import number_option, parse_options, whole_option
from recontrast_edge.verdict import Fault

MAX_TILE_LINES = 65536
MAX_COLUMNS = 64
MAX_MERGE_LINES = 10**9
MAX_LOST_LINES = 10**7
"""A jump of the camera's ids over more lines than that is no loss, but an id that cannot be right."""

Merge = Literal["tile", "length", "part"]
"""What one verdict is about."""


@dataclass(frozen=True)
class LineScanOptions:
    """How a web is divided; the options of a source's URI.

    Attributes:
        lines: height of a tile.
        overlap: lines that a tile shares with the one before; less than ``lines``.
        line_pitch_mm: millimetres of web from line to line; None: unknown.
        pixel_pitch_mm: millimetres of web from column to column; None: unknown.
        columns: tiles across the web.
        column_overlap: pixels at least that neighbours across share; None: a sixteenth of the width over ``columns``.
        parts: whether a change of the blocks' part id starts a part, and with it a new tile.
        part_lines: length of a part. With ``parts``: what follows is no part, until the next id. Without: the web is
            one part after the other.
        merge: what one verdict is about.
        merge_lines: length of the stretch that one verdict is about; set for ``merge="length"`` only.
        encoder: lines come as the web moves, and a web may stand still.
    """

    lines: int
    overlap: int
    line_pitch_mm: float | None = None
    pixel_pitch_mm: float | None = None
    columns: int = 1
    column_overlap: int | None = None
    parts: bool = False
    part_lines: int | None = None
    merge: Merge = "tile"
    merge_lines: int | None = None
    encoder: bool = False

    @classmethod
    def parse(cls, what: str, query: str) -> LineScanOptions:
        """From ``key=value&key=value``; ``lines`` must be among them.

        Args:
            what: the URI and what it stands for, for messages.

        Raises:
            UsageError: an unknown option, a value out of range, or options that contradict each other.
        """
        given = parse_options(what, query, OPTIONS)

        def whole(key: str, low: int, high: int) -> int | None:
            return whole_option(what, key, given[key], low=low, high=high) if key in given else None

        def pitch(key: str) -> float | None:
            return number_option(what, key, given[key], low=1e-6, high=1e3) if key in given else None

        def choice(key: str, choices: tuple[_Choice, ...], default: _Choice) -> _Choice:
            for known in choices:
                if given.get(key, default) == known:
                    return known
            raise UsageError(f"{what}: {key} must be {' or '.join(filter(None, choices))}, got {given[key]!r}")

        lines = whole("lines", 1, MAX_TILE_LINES)
        assert lines is not None
        overlap = whole("overlap", 0, lines - 1)
        merges: tuple[Merge, ...] = ("tile", "length", "part")
        options = cls(
            lines=lines,
            overlap=lines // 16 if overlap is None else overlap,
            line_pitch_mm=pitch("line_pitch_mm"),
            pixel_pitch_mm=pitch("pixel_pitch_mm"),
            columns=whole("columns", 1, MAX_COLUMNS) or 1,
            column_overlap=whole("column_overlap", 0, MAX_TILE_LINES),
            parts=choice("part", ("", "id"), "") == "id",
            part_lines=whole("part_lines", 1, MAX_MERGE_LINES),
            merge=choice("merge", merges, "tile"),
            merge_lines=whole("merge_lines", 1, MAX_MERGE_LINES),
            encoder=choice("encoder", ("0", "1"), "0") == "1",
        )
        if (options.merge == "length") != (options.merge_lines is not None):
            raise UsageError(f"{what}: merge=length and merge_lines=N belong together")
        if options.merge == "part" and not options.parts and options.part_lines is None:
            raise UsageError(f"{what}: merge=part needs part=id or part_lines=N, which say where a part begins")
        if options.parts and options.part_lines is not None and options.part_lines < lines:
            raise UsageError(f"{what}: part_lines={options.part_lines} is shorter than a tile of lines={lines}")
        if options.column_overlap is not None and options.columns == 1:
            raise UsageError(f"{what}: column_overlap needs columns=N")
        return options


_Choice = TypeVar("_Choice", bound=str)

OPTIONS = (
    "lines",
    "overlap",
    "line_pitch_mm",
    "pixel_pitch_mm",
    "columns",
    "column_overlap",
    "part",
    "part_lines",
    "merge",
    "merge_lines",
    "encoder",
)
"""Options of a source's URI that are taken out before the source itself sees it."""


@dataclass(frozen=True)
class TileSpan(WebSpan):
    """Where a tile is, and what is still to come.

    Attributes:
        web: number of the web; each opened source has another one.
        columns: width of the tile, in pixels.
        web_columns: width of the web, in pixels.
        settled_line: the lines before it have been shown, and will not be again; but by the last tile of all.
        part_line: where the tile's part begins; 0 without parts.
        ends_part: no later tile belongs to this tile's part.
    """

    web: int = 0
    columns: int = 0
    web_columns: int = 0
    settled_line: int = 0
    part_line: int = 0
    ends_part: bool = False


_webs = itertools.count()


class LineScanSource:
    """A source of tiles, over any source of blocks.

    Every tile is a frame whose ``web`` is a ``TileSpan``; its time, camera id and camera time are those of the block
    that completed it. A tile that should show lost lines is a frame without image, with fault ``lines_missed``; one
    frame stands for all tiles in a row that would show nothing but lost lines, and for the whole width.

    Blocks are lost where ``camera_frame_id`` (or ``frame_id``, where the camera has none) jumps, and where a block came
    broken. A lost block counts as many lines as the tallest one so far. The web begins with the first good block.

    Args:
        source: its images are blocks; closed with this one.
        options: how the web is divided.
        uri: of both together, credentials masked.

    Attributes:
        options: as given.
        heard_s: when the last block came, good or broken, on ``time.monotonic()``'s clock; None: none yet. Tiles come
            later than blocks, so this tells a dead camera sooner than they do.
        triggered: the lines come from an encoder, or the blocks from a trigger, so that none for a while is no fault.
        default_mode: every tile counts; the newest one alone is of no use.
    """

    default_mode = "every"

    def __init__(self, source: Source, options: LineScanOptions, uri: str) -> None:
        self.uri = uri
        self.live = source.live
        self.options = options
        self.heard_s: float | None = None
        self.triggered = options.encoder or getattr(source, "triggered", False)
        self._source = source
        self._web = next(_webs)
        self._assembler = LineAssembler(lines=options.lines, overlap=options.overlap)
        self._columns: list[tuple[int, int]] = []
        """First column and width of each tile across."""
        self._web_columns = 0
        self._block_lines = 0
        self._ready: deque[Frame] = deque()
        self._held: list[Frame] = []
        """Frames of which it is not known yet whether they are their part's last."""
        self._masks: deque[tuple[int, NDArray[np.bool_]]] = deque()
        self._next_id = 0
        self._last_block: Frame | None = None
        self._part_id: str | None = None
        self._part_line = 0
        """Where the part began, or may have begun."""
        self._part_end_line: int | None = None
        """Where it must end; None: with the next part."""
        self._between_parts = options.parts
        self._lines_lost = 0
        self._lines_between_parts = 0
        self._ended = False
        self._closed = False

    @property
    def counters(self) -> dict[str, int]:
        """Lines so far, with those of the source itself (blocks)."""
        return {
            **getattr(self._source, "counters", {}),
            "lines": self._assembler.next_line,
            "lines_lost": self._lines_lost,
            "lines_between_parts": self._lines_between_parts,
        }

    def read(self, timeout_s: float) -> Frame | None:
        """See ``Source.read``.

        Raises:
            SourceError: also for a block of another width or pixel format than before, and for ids that do not rise.
            UsageError: more columns or column overlap than the web is wide.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self._ready:
            if self._ended:
                raise EndOfStream
            try:
                block = self._source.read(max(0.0, deadline_s - time.monotonic()))
            except EndOfStream:
                if self._closed:
                    raise
                self._finish()
                continue
            if block is None:
                return None
            self.heard_s = time.monotonic()
            self._take(block)
            if not self._ready and time.monotonic() >= deadline_s:
                return None
        return self._ready.popleft()

    def close(self) -> None:
        """See ``Source.close``."""
        self._closed = True
        self._source.close()

    def _take(self, block: Frame) -> None:
        lost_blocks = self._lost_before(block)
        self._last_block = block
        image, detail = (None, block.detail or block.fault) if block.fault else (block.image, None)
        if image is not None:
            try:
                check_image(image)
            except InputError as error:
                image, detail = None, str(error)
        if not self._block_lines:
            if image is None:
                self._put(dataclasses.replace(block, image=None, fault=block.fault or Fault.INVALID_IMAGE.value))
                return
            self._lay_out(image.shape[1])
            lost_blocks = 0
        if image is None:
            lost_blocks += 1
        else:
            self._block_lines = max(self._block_lines, len(image))
        lost_lines = lost_blocks * self._block_lines
        if lost_lines > MAX_LOST_LINES:
            raise SourceError(
                f"{self.uri}: {lost_blocks} blocks are missing by the camera's frame ids, more than can be right; the "
                "camera has to be opened anew"
            )
        if lost_lines:
            self._lose(lost_lines, block, detail)
        if self.options.parts and block.part_id not in (None, self._part_id):
            self._begin_part(block, lost_lines)
        elif lost_lines and self._between_parts:
            self._miss_between(block, lost_lines)
        if image is not None:
            self._add(image, block)

    def _lost_before(self, block: Frame) -> int:
        """Blocks that are missing between the last one and this one."""
        last = self._last_block
        if last is None:
            return 0
        if last.camera_frame_id is not None and block.camera_frame_id is not None:
            before, now = last.camera_frame_id, block.camera_frame_id
        else:
            before, now = last.frame_id, block.frame_id
        if now <= before:
            raise SourceError(f"{self.uri}: expected a frame id above {before}, got {now}; ids must rise")
        return now - before - 1

    def _lay_out(self, width: int) -> None:
        """Divide the width of the web."""
        options, count = self.options, self.options.columns
        overlap = width // count // 16 if options.column_overlap is None else options.column_overlap
        if overlap >= width or count > width:
            raise UsageError(
                f"{self.uri}: expected columns and column_overlap below the width of {width} pixels, got {count} and "
                f"{overlap}"
            )
        columns = -(-(width + (count - 1) * overlap) // count)
        self._columns = [(start, columns) for start in spread_starts(width, columns, count)]
        self._web_columns = width

    # A tile is held until it is known whether it is its part's last: where the part's length is given, that is at once,
    # else the next block tells.

    def _add(self, image: Image, block: Frame) -> None:
        inside = self._within_part(len(image))
        if inside:
            self._release()
            if block.truth_mask is not None:
                self._masks.append((self._assembler.next_line, block.truth_mask[:inside]))
            self._hold(self._assembler.add(image[:inside]), block, None)
            self._settle(block)
        self._pass_over(len(image) - inside)

    def _lose(self, lines: int, block: Frame, detail: str | None) -> None:
        inside = self._within_part(lines)
        self._lines_lost += lines
        if inside:
            self._release()
            self._hold(self._assembler.skip(inside), block, detail)
            self._settle(block)
        self._pass_over(lines - inside)

    def _within_part(self, lines: int) -> int:
        """How many of the next lines belong to the part that is running."""
        if self._between_parts:
            return 0
        return lines if self._part_end_line is None else min(lines, self._part_end_line - self._assembler.next_line)

    def _pass_over(self, lines: int) -> None:
        if lines:
            self._lines_between_parts += lines
            self._assembler.pass_over(lines)

    def _settle(self, block: Frame) -> None:
        if self.options.parts and self._part_end_line is None:
            return
        if self._assembler.next_line == self._part_end_line:
            self._end_part(block)
        self._release()

    def _begin_part(self, block: Frame, lost_lines: int) -> None:
        self._end_part(block)
        self._between_parts = False
        self._part_id = block.part_id
        self._part_line = self._assembler.next_line - lost_lines
        if self.options.part_lines is not None:
            self._part_end_line = self._assembler.next_line + self.options.part_lines
        if lost_lines:
            self._miss_before(block, lost_lines, f"part {block.part_id} may have begun")

    def _miss_between(self, block: Frame, lost_lines: int) -> None:
        """A part of which nothing came, if it was one."""
        self._part_line = self._assembler.next_line - lost_lines
        self._miss_before(block, lost_lines, "a part may have passed")
        self._mark_end()

    def _miss_before(self, block: Frame, lost_lines: int, what: str) -> None:
        tile = Tile(self._part_line, lost_lines, None, lost_lines, self._assembler.next_line)
        self._held.append(self._missed(tile, block, f"{what} within {lost_lines} lines that were lost"))

    def _end_part(self, block: Frame) -> None:
        """Show the rest of the part, and say that it was the last of it."""
        if self._between_parts:
            return
        self._hold(self._assembler.end(), block, None)
        line = self._assembler.next_line
        missing = 0 if self._part_end_line is None else self._part_end_line - line
        if missing:
            tile = Tile(self._part_line, line - self._part_line, None, 0, line)
            self._held.append(self._missed(tile, block, f"the part ended {missing} lines early"))
        self._mark_end()
        self._between_parts = True

    def _mark_end(self) -> None:
        """What is held ends its part."""
        if self._held:
            last = self._held[-1]
            assert isinstance(last.web, TileSpan)
            self._held[-1] = dataclasses.replace(last, web=dataclasses.replace(last.web, ends_part=True))
        self._release()

    def _finish(self) -> None:
        """The source ended, and with it the web."""
        if self._last_block is not None and self._block_lines:
            if self.options.parts:
                self._end_part(self._last_block)
            else:
                self._hold(self._assembler.end(), self._last_block, None)
        self._release()
        self._ended = True

    def _hold(self, tiles: list[Tile], block: Frame, detail: str | None) -> None:
        for tile in tiles:
            if tile.image is None:
                why = f"{tile.lost} of {tile.lines} lines were lost" + (f" ({detail})" if detail else "")
                short = f"the web or part ended after {tile.lines} lines; a tile needs {self.options.lines}"
                self._held.append(self._missed(tile, block, why if tile.lost else short))
                continue
            mask = None if block.truth_mask is None else self._truth_mask(tile)
            for first_column, columns in self._columns:
                part = slice(first_column, first_column + columns)
                last = (first_column, columns) == self._columns[-1]
                frame = dataclasses.replace(
                    self._frame(block),
                    image=tile.image[:, part],
                    web=self._span(tile, first_column, columns, tile.settled_line if last else tile.first_line),
                    truth=None if mask is None else ("defect" if mask[:, part].any() else "good"),
                    truth_mask=None if mask is None else mask[:, part],
                )
                self._held.append(frame)

    def _release(self) -> None:
        for frame in self._held:
            self._put(frame)
        self._held.clear()

    def _put(self, frame: Frame) -> None:
        self._ready.append(dataclasses.replace(frame, frame_id=self._next_id))
        self._next_id += 1

    def _missed(self, tile: Tile, block: Frame, detail: str) -> Frame:
        span = self._span(tile, 0, self._web_columns, tile.settled_line)
        return dataclasses.replace(self._frame(block), fault=Fault.LINES_MISSED.value, detail=detail, web=span)

    def _frame(self, block: Frame) -> Frame:
        """What a block says of the tiles that it completes."""
        part_id = None if self._between_parts else self._part_id
        return dataclasses.replace(
            block, image=None, fault=None, detail=None, truth=None, truth_mask=None, part_id=part_id
        )

    def _span(self, tile: Tile, first_column: int, columns: int, settled_line: int) -> TileSpan:
        return TileSpan(
            first_line=tile.first_line,
            lines=tile.lines,
            line_pitch_mm=self.options.line_pitch_mm,
            first_column=first_column,
            pixel_pitch_mm=self.options.pixel_pitch_mm,
            web=self._web,
            columns=columns,
            web_columns=self._web_columns,
            settled_line=settled_line,
            part_line=self._part_line,
        )

    def _truth_mask(self, tile: Tile) -> NDArray[np.bool_]:
        mask = np.zeros((tile.lines, self._web_columns), np.bool_)
        while self._masks and self._masks[0][0] + len(self._masks[0][1]) <= tile.first_line:
            self._masks.popleft()
        for line, rows in self._masks:
            first, end = max(line, tile.first_line), min(line + len(rows), tile.first_line + tile.lines)
            mask[first - tile.first_line : end - tile.first_line] = rows[first - line : end - line]
        return mask


def line_source_opener(uri: str, blocks_opener: Callable[[str], Callable[[], Source]]) -> Callable[[], LineScanSource]:
    """Check the URI of a source of tiles and return what opens it.

    Args:
        uri: of the source of blocks, with the line-scan options in its query; those are taken out.
        blocks_opener: checks what is left, and returns what opens it.

    Raises:
        UsageError: an option that is unknown, out of range, or contradicts another.
    """
    options = line_options(uri)
    if options is None:
        raise UsageError(f"source {masked_uri(uri)!r}: lines=N is missing, the height of a tile")
    head, _, query = uri.partition("?")
    others = [item for item in query.split("&") if _key(item) not in OPTIONS]
    try:
        open_blocks = blocks_opener("?".join(filter(None, [head, "&".join(others)])))
    except UsageError as error:
        near = [match for item in others for match in difflib.get_close_matches(_key(item), OPTIONS, 1)]
        if not near:
            raise
        raise UsageError(f"{error}; as an option of line scan, did you mean {near[0]!r}?") from None
    return lambda: LineScanSource(open_blocks(), options, masked_uri(uri))


def line_options(uri: str) -> LineScanOptions | None:
    """How a source's URI asks for tiles of a web; None where it has no option ``lines``.

    Raises:
        UsageError: an option that is out of range, or contradicts another.
    """
    ours = [item for item in uri.partition("?")[2].split("&") if _key(item) in OPTIONS]
    if "lines" not in map(_key, ours):
        return None
    return LineScanOptions.parse(f"source {masked_uri(uri)!r}", "&".join(ours))


def _key(item: str) -> str:
    return item.partition("=")[0]
