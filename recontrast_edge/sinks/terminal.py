"""What a person at the line sees: counts, rate, latency and the last verdicts, live; plain lines without a terminal.

view = TerminalView(statistics, title="demo on synthetic://mixed", to_stderr=False)
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from recontrast_edge.frame import Judgement, SourceState, StateChange, VerdictName
from recontrast_edge.latency import PERCENTILES
from recontrast_edge.render import describe, frame_name
from recontrast_edge.statistics import Statistics

STYLES: dict[VerdictName, str] = {"PASS": "green", "REJECT": "bold red", "FAULT": "bold yellow"}

STATE_STYLES = {
    SourceState.CONNECTING: "yellow",
    SourceState.RUNNING: "green",
    SourceState.STALE: "bold yellow",
    SourceState.FAULT: "bold yellow",
    SourceState.ENDED: "dim",
}

LAST_FRAMES = 10
REFRESH_HZ = 5
STATUS_INTERVAL_S = 10.0
"""Without a terminal: how often a line tells that the stream is alive."""

BAR_WIDTH = 24
"""Characters of a score's bar, which ends at twice the threshold."""


class TerminalView:
    """A sink that shows instead of writing.

    Args:
        statistics: those of the pipeline, which count also what never reaches this sink.
        title: engine and source, for the frame's heading.
        to_stderr: where standard output carries records.
    """

    uri = "terminal"
    needs_maps = False

    def __init__(self, statistics: Statistics, *, title: str, to_stderr: bool) -> None:
        self._statistics = statistics
        self._title = title
        self._last: deque[Judgement] = deque(maxlen=LAST_FRAMES)
        self._console = Console(stderr=to_stderr, highlight=False)
        self._in_trouble: set[str | None] = set()
        self._live: Live | None = None
        self._status_s = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=REFRESH_HZ, transient=False
            )
            self._live.start()

    def write(self, judgement: Judgement) -> None:
        """See ``Sink.write``."""
        if self._live is not None:
            # Without image, mask and map: a view must not keep them alive.
            frame = dataclasses.replace(judgement.frame, image=None, truth_mask=None)
            self._last.append(dataclasses.replace(judgement, frame=frame, map=None))
            return
        if judgement.verdict != "PASS":
            self._print(f"{judgement.verdict:6}  {describe(judgement)}")
        if time.monotonic() - self._status_s >= STATUS_INTERVAL_S:
            self._status_s = time.monotonic()
            self._print(self._statistics.counts_line())

    def write_state(self, change: StateChange) -> None:
        """See ``Sink``; a terminal shows the states all the time, plain lines tell of trouble and its end."""
        in_trouble = change.fault is not None
        if self._live is None and (in_trouble or change.camera in self._in_trouble):
            self._print(_state_line(change))
        (self._in_trouble.add if in_trouble else self._in_trouble.discard)(change.camera)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def close(self) -> None:
        """See ``Sink.close``: leaves the last picture standing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> Panel:
        # A copy, because another thread may be adding a camera.
        states = [
            Text(_state_line(change), style=STATE_STYLES[change.state])
            for change in list(self._statistics.states.values())
        ]
        counts = Text(self._statistics.counts_line())
        return Panel(
            Group(counts, *states, Text(), self._latency_table(), Text(), self._last_table()),
            title=Text(self._title),
            title_align="left",
            expand=False,
        )

    def _latency_table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("latency, ms", min_width=12)
        for name in (*PERCENTILES, "max"):
            table.add_column(name, justify="right", min_width=8)
        for stage, row in self._statistics.latency.summary().items():
            table.add_row(stage, *(f"{row[name]:.2f}" for name in (*PERCENTILES, "max")))
        return table

    def _last_table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("frame", justify="right", min_width=6)
        table.add_column("verdict", min_width=7)
        table.add_column("score", justify="right", min_width=7)
        table.add_column("threshold at the mark", min_width=BAR_WIDTH)
        table.add_column("truth", min_width=6)
        table.add_column("ms", justify="right", min_width=6)
        for judgement in reversed(list(self._last)):
            table.add_row(
                frame_name(judgement.frame),
                Text(judgement.verdict, style=STYLES[judgement.verdict]),
                "" if judgement.score is None else f"{judgement.score:.3f}",
                _bar(judgement),
                judgement.frame.truth or "",
                f"{judgement.latency_ms.get('total', 0.0):.1f}",
            )
        return table


def _state_line(change: StateChange) -> str:
    """``left: STALE since 12 s, source_stale: no frame for 1.0 s``."""
    name = change.camera or change.source
    because = "" if change.fault is None else f", {change.fault}: {change.detail or ''}"
    return f"{name}: {change.state.value} since {time.monotonic() - change.time_s:.0f} s{because}"


def _bar(judgement: Judgement) -> Text:
    if judgement.score is None:
        return Text(judgement.fault or "", style=STYLES["FAULT"])
    middle = BAR_WIDTH // 2
    unit = judgement.threshold if judgement.threshold > 0 else 1.0
    filled = min(max(round(judgement.score / unit * middle), 0), BAR_WIDTH)
    cells = "━" * filled + " " * (BAR_WIDTH - filled)
    bar = Text(cells, style=STYLES[judgement.verdict])
    return Text.assemble(bar[:middle], ("┃", "dim"), bar[middle:])
