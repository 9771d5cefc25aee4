"""``recontrast-edge demo``: watch the packaged model judge a synthetic production line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recontrast_edge.cli import app
from recontrast_edge.cli.run import finish


@app.command("demo")
def demo_command(
    frames: Annotated[int, typer.Option(min=1, metavar="N", help="Parts to judge.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the line; the same seed makes the same parts.")] = 7,
    fps: Annotated[
        float, typer.Option(min=0.0, max=240.0, help="Parts a second; 0 is as fast as this machine can.")
    ] = 30.0,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the video, the contact sheet and the report.")
    ] = Path("demo-output"),
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads.  [default: chosen by the engine]")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No live view; only the result.")] = False,
) -> None:
    """Judge a synthetic production line whose defects are known, and show how well it went."""
    from threading import Event

    from recontrast_edge.demo import REPORT_NAME, SHEET_NAME, VIDEO_NAME, run_demo
    from recontrast_edge.pipeline import stop_on_signals
    from recontrast_edge.sinks.terminal import TerminalView
    from recontrast_edge.statistics import Statistics

    def view(statistics: Statistics, title: str) -> TerminalView:
        return TerminalView(statistics, title=title, to_stderr=False)

    stop = Event()
    with stop_on_signals(stop):
        result = run_demo(
            out, frames=frames, seed=seed, fps=fps, stop=stop, threads=threads, view=None if quiet else view
        )
    for truth, row in result.line.statistics.confusion.items():
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in row.items())
        typer.echo(f"{truth:>6} parts: {verdicts}")
    if result.auroc is not None:
        typer.echo(f"AUROC of the scores against the known truth: {result.auroc:.4f}")
    for name, what in ((VIDEO_NAME, "annotated video"), (SHEET_NAME, "contact sheet"), (REPORT_NAME, "report")):
        if (out / name).exists():
            typer.echo(f"{what + ':':16} {out / name}")
    finish(result.line, to_stderr=False)
