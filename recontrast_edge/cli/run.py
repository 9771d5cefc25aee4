"""``recontrast-edge run``: judge a stream."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recontrast_edge.cli import app
from recontrast_edge.errors import EXIT_FAULTS, UsageError

if TYPE_CHECKING:
    from recontrast_edge.pipeline import Line


ENGINE_CLOSE_S = 0.5
"""How long the command waits for the engine to close, in seconds."""


class ModeOption(str, Enum):
    """Values of --mode."""

    LIVE = "live"
    EVERY = "every"


@app.command("run")
def run_command(
    engine: Annotated[str, typer.Option(help="Model file (.onnx), or `demo` for the packaged one.")],
    source: Annotated[
        str,
        typer.Option(
            help="Image, folder or video file, or a URI such as `synthetic://mixed?defect_rate=0.1&fps=30`.",
        ),
    ],
    output: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URI",
            help="Where verdicts go; may be given several times: `jsonl:FILE` (`-` is standard output), "
            "`video:FILE?fps=30`, `images:DIR?which=rejects`, `mqtt://HOST/TOPIC`, `webhook:https://HOST/PATH`, "
            "`modbus://HOST/COIL`, `modbus-server://HOST`, `opcua://HOST`, `gpio:PIN`; `docs/outputs.md` tells more.",
        ),
    ] = None,
    mode: Annotated[
        ModeOption | None,
        typer.Option(
            help="`live`: the newest frame wins, others are dropped and counted. `every`: no frame is skipped, whoever "
            "is slow makes the others wait.  [default: live for a live source, every for others]",
        ),
    ] = None,
    max_frames: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stop after N frames.  [default: no limit]")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(metavar="X", help="Reject above this score.  [default: the model's own threshold]")
    ] = None,
    summary: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write counts, faults, confusion and latency percentiles (ms) to this JSON file."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads.  [default: chosen by the engine]")
    ] = None,
    wait_for_source: Annotated[
        bool, typer.Option("--wait-for-source", help="Wait for a source that cannot be opened, instead of ending.")
    ] = False,
    max_reconnects: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="End when a live source could not be opened again N times in a row.  [default: try for ever]",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No live view; only the last line.")] = False,
) -> None:
    """Judge every frame of a source: PASS, REJECT or FAULT."""
    from contextlib import ExitStack, closing
    from threading import Event

    from recontrast_edge.bounded import call_bounded
    from recontrast_edge.camera_plan import CameraPlan, Retry
    from recontrast_edge.engines import open_engine
    from recontrast_edge.pipeline import Line, stop_on_signals, warm_up
    from recontrast_edge.secrets import masked_uri
    from recontrast_edge.sinks import sink_opener
    from recontrast_edge.sinks.terminal import TerminalView
    from recontrast_edge.sources import open_source
    from recontrast_edge.statistics import Statistics
    from recontrast_edge.task import Product
    from recontrast_edge.verdict import resolve_threshold
    from recontrast_edge.webmerge import open_merger

    outputs = output or []
    if len(set(outputs)) < len(outputs):
        raise UsageError("the same --output was given twice")
    records_on_stdout = any(uri.partition("?")[0] == "jsonl:-" for uri in outputs)
    openers = [sink_opener(uri) for uri in outputs]
    stop, statistics = Event(), Statistics()
    with ExitStack() as stack:
        opened = open_engine(engine, threads=threads)
        # One that hangs must not keep the command from ending.
        stack.callback(call_bounded, opened.close, timeout_s=ENGINE_CLOSE_S, name="close the engine")
        product = Product(opened, resolve_threshold(opened, threshold))
        warm_up(opened)
        plan = CameraPlan(
            masked_uri(source),
            lambda: open_source(source),
            product,
            mode=None if mode is None else mode.value,
            retry=Retry(wait_for_source=wait_for_source, max_reconnects=max_reconnects),
            merger=open_merger(source),
        )
        line = stack.enter_context(Line([plan], max_frames=max_frames, stop=stop, statistics=statistics))
        stack.enter_context(stop_on_signals(stop))
        line.connect()
        with ExitStack() as until_run:
            sinks = [until_run.enter_context(closing(open_sink(opened.spec.input))) for open_sink in openers]
            if not quiet:
                title = f"{opened.spec.class_name} · {opened.name} · {line.cameras[0].uri}"
                view = TerminalView(statistics, title=title, to_stderr=records_on_stdout)
                sinks.append(until_run.enter_context(closing(view)))
            # From here on the line closes them, and does not wait for one that hangs.
            until_run.pop_all()
        line.run(sinks)
        if summary is not None:
            line.write_summary(summary)
    finish(line, to_stderr=records_on_stdout)


def finish(line: Line, *, to_stderr: bool) -> None:
    """Say how the run ended, in one line, and end with the exit code that belongs to it."""
    from recontrast_edge.secrets import mask

    statistics = line.statistics
    reason = line.stopped_by.replace("_", " ")
    typer.echo(f"{statistics.counts_line()}; {statistics.latency_line()}; stopped by {reason}", err=to_stderr)
    # Whoever read the records on standard output (`| head`) may leave; that is no error.
    errors = [error for error in line.errors if not isinstance(error, BrokenPipeError)]
    if errors:
        for error in errors[1:]:
            typer.echo(mask(f"error: {error}"), err=True)
        raise errors[0]
    if line.faults:
        raise typer.Exit(EXIT_FAULTS)
