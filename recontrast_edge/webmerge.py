"""Verdicts on the tiles of a web become one verdict per length or per part.

    merger = open_merger("pylon:?lines=2048&merge=length&merge_lines=20000"); merged = merger.add(judgement)

A stretch has the worst verdict of the tiles that show some of it: FAULT before REJECT before PASS. A rejected tile
counts only for the stretches that its defects reach into. Lines that no tile has shown make a stretch a FAULT, for
whatever reason they are missing. Defects that touch or overlap on the web are one: what lies in the overlap of two
tiles is found by both, and reported once.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterable, Sequence

from recontrast_edge.errors import UsageError
from recontrast_edge.frame import Frame, Judgement, Region, Truth, VerdictName, WebSpan
from recontrast_edge.linescan import TileSpan, line_options
from recontrast_edge.verdict import MAX_REGIONS, Fault


def open_merger(uri: str, *, gate_reserve_s: float = 0.0) -> TileMerger | None:
    """What merges the verdicts on a source's tiles, as its options say; None where each tile has its own verdict.

    Args:
        gate_reserve_s: see ``TileMerger``.

    Raises:
        UsageError: an option of line scan that is out of range, or contradicts another.
    """
    options = line_options(uri)
    if options is None or options.merge == "tile":
        return None
    if options.merge == "length":
        return TileMerger(length=options.merge_lines, gate_reserve_s=gate_reserve_s)
    length = None if options.parts else options.part_lines
    return TileMerger(length=length, number_parts=not options.parts, gate_reserve_s=gate_reserve_s)


class TileMerger:
    """See ``Merger``. Takes the judgements on the tiles of one web, in order; others go through as they are.

    A merged judgement has regions relative to its own stretch of the web, in columns of the whole web, at most
    ``MAX_REGIONS``; a region's area is an upper bound where two tiles found it. Image and map are those of the tile
    with the highest score: what the worst of it looks like. The score is the highest, but where a rejected tile's
    defects lie in another stretch it counts as the threshold.

    A stretch is at the gate when the first of its tiles is. If it has no verdict by then, it is a FAULT, in time for
    the gate; what its other tiles show comes too late.

    Args:
        length: lines of a stretch, the first one from line 0 on; None: a stretch is a part, and all tiles with its part
            id are its own.
        number_parts: each stretch of ``length`` is a part; its number is the part id.
        gate_reserve_s: how long before the gate a verdict must be there, in seconds.

    Raises:
        UsageError: a length below 1.
    """

    def __init__(self, *, length: int | None, number_parts: bool = False, gate_reserve_s: float = 0.0) -> None:
        if length is not None and length < 1:
            raise UsageError(f"expected a length of at least 1 line to merge over, got {length}")
        self._length = length
        self._number_parts = number_parts
        self._gate_reserve_s = gate_reserve_s
        self._web: int | None = None
        self._open: list[_Stretch] = []
        """Begun and not yet settled, in the order of the web."""
        self._next_stretch = 0
        """Number of the first stretch of ``length`` that has not begun."""
        self._next_id = 0

    def add(self, judgement: Judgement) -> Sequence[Judgement]:
        """See ``Merger.add``."""
        span = judgement.frame.web
        if not isinstance(span, TileSpan):
            return [self._numbered(judgement)]
        merged: list[Judgement] = []
        if span.web != self._web:
            # The camera was opened anew, and lines count from 0 again.
            merged += self.flush()
            self._web, self._next_stretch = span.web, 0
        if self._length is None:
            return merged + self._add_to_part(judgement, span)
        return merged + self._add_to_stretches(judgement, span, self._length)

    def _add_to_part(self, judgement: Judgement, span: TileSpan) -> list[Judgement]:
        merged: list[Judgement] = []
        if self._open and self._open[0].first_line != span.part_line:
            merged += self.flush()
        if not self._open:
            self._open.append(_Stretch(judgement, span.part_line, None, judgement.frame.part_id))
        self._open[0].add(judgement, span)
        if span.ends_part:
            merged += self._decide(self._open.pop(), time.monotonic())
        return merged

    def _add_to_stretches(self, judgement: Judgement, span: TileSpan, length: int) -> list[Judgement]:
        # Also a stretch that no tile has shown, because they were dropped, must have its verdict.
        end = (span.first_line + span.lines - 1) // length + 1
        for number in range(self._next_stretch, end):
            part_id = str(number) if self._number_parts else None
            self._open.append(_Stretch(judgement, number * length, (number + 1) * length, part_id))
        self._next_stretch = max(self._next_stretch, end)
        for stretch in self._open:
            stretch.add(judgement, span)
        merged: list[Judgement] = []
        while self._open and self._open[0].ends_before(span.settled_line):
            merged += self._decide(self._open.pop(0), time.monotonic())
        return merged

    def expire(self, now_s: float) -> Sequence[Judgement]:
        """See ``Merger.expire``: the stretches that are about to reach the gate. Without one a web may stand still."""
        merged: list[Judgement] = []
        for stretch in self._open:
            if self._late_s(stretch, now_s) >= 0:
                merged += self._decide(stretch, now_s)
        return merged

    def _late_s(self, stretch: _Stretch, now_s: float) -> float:
        return -math.inf if stretch.gate_s is None else now_s - (stretch.gate_s - self._gate_reserve_s)

    def _decide(self, stretch: _Stretch, now_s: float) -> list[Judgement]:
        if stretch.decided:
            return []
        stretch.decided = True
        return [self._numbered(stretch.judgement(now_s, self._late_s(stretch, now_s)))]

    def flush(self) -> Sequence[Judgement]:
        """See ``Merger.flush``: the last stretch ends where its last tile ends; a part that is not whole is a FAULT."""
        merged: list[Judgement] = []
        for stretch in self._open:
            if self._length is None or self._number_parts:
                stretch.miss(f"part {stretch.part_id} had not ended", unless_shown=True)
            else:
                stretch.cut()
            merged += self._decide(stretch, time.monotonic())
        self._open.clear()
        return merged

    def _numbered(self, judgement: Judgement) -> Judgement:
        frame = dataclasses.replace(judgement.frame, frame_id=self._next_id)
        self._next_id += 1
        return dataclasses.replace(judgement, frame=frame)


class _Stretch:
    """What is known of a stretch of the web so far.

    Args:
        first: judgement on the tile that made it begin, which need not show any of it.
        first_line: where it begins.
        end_line: where it ends; None: where its last tile does.
    """

    def __init__(self, first: Judgement, first_line: int, end_line: int | None, part_id: str | None) -> None:
        self.first_line = first_line
        self.part_id = part_id
        self._end_line = end_line
        self._last = first
        self._web_columns = 0
        self._shown: dict[tuple[int, int], int] = {}
        """First column and width of each tile across -> the line up to which its tiles have shown the stretch."""
        self._fault: tuple[str, str | None] | None = None
        """Code and sentence of the first."""
        self._rejected = False
        self._score: float | None = None
        self._worst: Judgement | None = None
        self._regions: list[Region] = []
        """In lines and columns of the web."""
        self._truths: set[Truth | None] = set()
        self.gate_s: float | None = None
        """When it is at the gate."""
        self.decided = False
        """It has had its verdict."""

    def ends_before(self, line: int) -> bool:
        return self._end_line is not None and self._end_line <= line

    def add(self, judgement: Judgement, span: TileSpan) -> None:
        """Take the judgement on a tile, if that shows some of the stretch."""
        first_line = max(span.first_line, self.first_line)
        end_line = min(span.first_line + span.lines, self._end_line or sys.maxsize)
        if first_line >= end_line:
            return
        frame = judgement.frame
        self._last = judgement
        self._web_columns = span.web_columns
        self._show((span.first_column, span.columns), first_line, end_line)
        if frame.gate_s is not None:
            self.gate_s = frame.gate_s if self.gate_s is None else min(frame.gate_s, self.gate_s)
        self._truths.add(_truth_within(frame, first_line - span.first_line, end_line - span.first_line))
        if judgement.fault is not None:
            self._fault = self._fault or (judgement.fault, judgement.detail)
            return
        assert judgement.score is not None
        score = judgement.score
        if judgement.verdict == "REJECT":
            here = [clipped for region in judgement.regions if (clipped := _within(region, span, first_line, end_line))]
            # A full list may have left out those that lie here.
            if here or len(judgement.regions) >= MAX_REGIONS:
                self._rejected = True
                self._regions = _highest(merge_regions([*self._regions, *here]))
            else:
                score = min(score, judgement.threshold)
        if self._score is None or score > self._score:
            self._score, self._worst = score, judgement

    def _show(self, columns: tuple[int, int], first_line: int, end_line: int) -> None:
        shown_line = self._shown.get(columns, self.first_line)
        if first_line > shown_line:
            self.miss(_never_judged(shown_line, first_line))
        self._shown[columns] = max(shown_line, end_line)

    def miss(self, detail: str, *, unless_shown: bool = False) -> None:
        """Make it a FAULT, if nothing else has."""
        if unless_shown and self._end_line is not None and self._unshown(self._end_line) is None:
            return
        self._fault = self._fault or (Fault.LINES_MISSED.value, detail)

    def cut(self) -> None:
        """Let it end where its tiles do."""
        self._end_line = max(self._shown.values(), default=self._end_line)

    def _unshown(self, end_line: int) -> str | None:
        """What no tile has shown, as far as the ends tell."""
        column = 0
        for (first_column, columns), shown_line in sorted(self._shown.items()):
            if shown_line < end_line:
                return _never_judged(shown_line, end_line)
            if first_column > column:
                break
            column = max(column, first_column + columns)
        if column < self._web_columns or not self._shown:
            return _never_judged(self.first_line, end_line)
        return None

    def judgement(self, decided_s: float, late_s: float) -> Judgement:
        """The verdict, so many seconds too late (negative: in time); its frame has no id yet."""
        end_line = self._end_line or max(self._shown.values(), default=self.first_line)
        unshown = self._unshown(end_line)
        if late_s >= 0 and self._fault is None:
            self._fault = Fault.GATE_MISSED.value, _late(late_s, unshown)
        if unshown is not None:
            self.miss(unshown)
        last, worst = self._last, self._worst
        span = last.frame.web
        assert span is not None
        frame = dataclasses.replace(
            last.frame,
            image=None if worst is None else worst.frame.image,
            part_id=self.part_id,
            deadline_s=None,
            fault=None,
            detail=None,
            truth=self._truth(),
            truth_mask=None,
            gate_s=self.gate_s,
            web=WebSpan(
                first_line=self.first_line,
                lines=end_line - self.first_line,
                line_pitch_mm=span.line_pitch_mm,
                pixel_pitch_mm=span.pixel_pitch_mm,
            ),
        )
        code, detail = self._fault or (None, None)
        verdict: VerdictName = "FAULT" if code else "REJECT" if self._rejected else "PASS"
        return Judgement(
            frame,
            verdict,
            None if code else self._score,
            last.threshold,
            regions=tuple(self._relative(region) for region in self._regions),
            map=None if worst is None else worst.map,
            input_spec=None if worst is None else worst.input_spec,
            latency_ms={**last.latency_ms, "total": (decided_s - last.frame.captured_s) * 1e3},
            fault=code,
            detail=detail,
            decided_s=decided_s,
        )

    def _relative(self, region: Region) -> Region:
        area = min(region.area, region.width * region.height)
        return dataclasses.replace(region, y=region.y - self.first_line, area=area)

    def _truth(self) -> Truth | None:
        if "defect" in self._truths:
            return "defect"
        return "good" if self._truths == {"good"} else None


def merge_regions(regions: Iterable[Region]) -> list[Region]:
    """Those whose boxes touch (at a corner too) or overlap become one: their common box, which may touch others again.

    The areas are added, and the peak is the highest. The order of the regions makes no difference to the result.
    """
    merged: list[Region] = []
    for region in regions:
        while touching := [other for other in merged if _touch(region, other)]:
            merged = [other for other in merged if other not in touching]
            region = _common(region, *touching)
        merged.append(region)
    return merged


def _touch(a: Region, b: Region) -> bool:
    return a.x <= b.x + b.width and b.x <= a.x + a.width and a.y <= b.y + b.height and b.y <= a.y + a.height


def _common(*regions: Region) -> Region:
    x, y = min(region.x for region in regions), min(region.y for region in regions)
    right = max(region.x + region.width for region in regions)
    bottom = max(region.y + region.height for region in regions)
    area, peak = sum(region.area for region in regions), max(region.peak for region in regions)
    return Region(x, y, right - x, bottom - y, area, peak)


def _highest(regions: list[Region]) -> list[Region]:
    return sorted(regions, key=lambda region: -region.peak)[:MAX_REGIONS]


def _within(region: Region, span: TileSpan, first_line: int, end_line: int) -> Region | None:
    """What of a tile's region lies between two lines of the web, in lines and columns of the web."""
    top = max(span.first_line + region.y, first_line)
    bottom = min(span.first_line + region.y + region.height, end_line)
    if top >= bottom:
        return None
    area = max(1, round(region.area * (bottom - top) / region.height))
    return Region(span.first_column + region.x, top, region.width, bottom - top, area, region.peak)


def _truth_within(frame: Frame, first_row: int, end_row: int) -> Truth | None:
    if frame.truth_mask is None:
        return frame.truth
    return "defect" if frame.truth_mask[first_row:end_row].any() else "good"


def _late(late_s: float, unshown: str | None) -> str:
    return f"it is at the gate, but {unshown}" if unshown else f"the last verdict came {late_s * 1e3:.1f} ms too late"


def _never_judged(first_line: int, end_line: int) -> str:
    return f"lines {first_line} to {end_line - 1} were never judged"
