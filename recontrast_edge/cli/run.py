"""``recontrast-edge run``: judge a stream."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recontrast_edge.cli import app
from recontrast_edge.errors import EXIT_FAULTS

if TYPE_CHECKING:
    from recontrast_edge.config import LineConfig
    from recontrast_edge.pipeline import Line


WATCHING, REOPENING, GATE = "Watching the source", "Opening the source again", "The reject gate"
"""Headings of the help."""


class ModeOption(str, Enum):
    """Values of --mode."""

    LIVE = "live"
    EVERY = "every"


@app.command("run")
def run_command(
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML file of a line: several cameras, products, outputs (`docs/configuration.md`). The options here "
            "win over it; those of a camera hold for all of its cameras.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="Model file (.onnx, .plan), or `demo` for the packaged one.  [default: from --config]"),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="Image, folder or video file, or a URI such as `usb:0`, `pylon:SERIAL`, `rtsp://HOST/PATH` or "
            "`synthetic://mixed?defect_rate=0.1&fps=30`; `docs/cameras.md` tells more.  "
            "[default: from --config]",
        ),
    ] = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
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
        int | None, typer.Option(metavar="N", help="Stop after N frames.  [default: no limit]")
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
    roots: Annotated[
        list[Path] | None,
        typer.Option(
            "--root",
            metavar="DIR",
            help="Refuse to write, move or delete anything outside of this folder; may be given several times.  "
            "[default: the folder of --config; without one no limit]",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each engine.  [default: chosen by the engine]")
    ] = None,
    queue_frames: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Frames of a live source that may wait in mode `every`.  [default: 32]",
        ),
    ] = None,
    engine_timeout_s: Annotated[
        float | None,
        typer.Option(metavar="S", help="An inference that takes longer, in seconds, is a FAULT.  [default: 5]"),
    ] = None,
    batch_wait_s: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Seconds that an engine which takes several images at once waits for those of other cameras.  "
            "[default: 0.002]",
        ),
    ] = None,
    gate_delay_s: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Seconds from capture to the reject gate.  [default: no gate]",
            rich_help_panel=GATE,
        ),
    ] = None,
    gate_reserve_s: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Seconds before the gate when a verdict must be there.  [default: 0]",
            rich_help_panel=GATE,
        ),
    ] = None,
    stale_after_s: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Seconds of silence that make a live source STALE; 0: none does.  [default: five frame periods, from "
            "0.5 s to 1 s]",
            rich_help_panel=WATCHING,
        ),
    ] = None,
    rate_hz: Annotated[
        float | None,
        typer.Option(
            metavar="HZ",
            help="Frames a second that a live source must deliver.  [default: any rate is right]",
            rich_help_panel=WATCHING,
        ),
    ] = None,
    rate_tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="How far the rate may be off, as a share of it.  [default: 0.2]",
            rich_help_panel=WATCHING,
        ),
    ] = None,
    frozen_after: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Equal pictures in a row, from 2, that are a fault; 0: none are.  [default: 5]",
            rich_help_panel=WATCHING,
        ),
    ] = None,
    dark_level: Annotated[
        int | None,
        typer.Option(
            metavar="LEVEL",
            help="A pixel is black up to this grey level, 0 to 255.  [default: 4]",
            rich_help_panel=WATCHING,
        ),
    ] = None,
    dark_share: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of black pixels, 0 to 1, that is a fault; 0: none is.  [default: 0.99]",
            rich_help_panel=WATCHING,
        ),
    ] = None,
    saturated_level: Annotated[
        int | None,
        typer.Option(
            metavar="LEVEL",
            help="A pixel is overexposed from this grey level on, 0 to 255.  [default: 251]",
            rich_help_panel=WATCHING,
        ),
    ] = None,
    saturated_share: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of overexposed pixels, 0 to 1, that is a fault; 0: none is.  [default: 0.99]",
            rich_help_panel=WATCHING,
        ),
    ] = None,
    fault_period_s: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Seconds from one FAULT to the next while a source delivers nothing.  [default: 1]",
            rich_help_panel=WATCHING,
        ),
    ] = None,
    wait_for_source: Annotated[
        bool | None,
        typer.Option(
            "--wait-for-source/--no-wait-for-source",
            help="Wait for a source that cannot be opened, instead of ending.  [default: no]",
            rich_help_panel=REOPENING,
        ),
    ] = None,
    max_reconnects: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="End when a live source could not be opened again N times in a row.  [default: try for ever]",
            rich_help_panel=REOPENING,
        ),
    ] = None,
    first_retry_s: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Seconds until a source that broke is opened again; doubles with each failure.  [default: 0.1]",
            rich_help_panel=REOPENING,
        ),
    ] = None,
    longest_retry_s: Annotated[
        float | None,
        typer.Option(
            metavar="S", help="What it doubles to at most, in seconds.  [default: 1]", rich_help_panel=REOPENING
        ),
    ] = None,
    quiet: Annotated[
        bool | None, typer.Option("--quiet/--no-quiet", "-q", help="No live view; only the last line.  [default: no]")
    ] = None,
    check_config: Annotated[
        bool, typer.Option("--check-config", help="Check everything that needs no camera, open nothing, and end.")
    ] = False,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print file and options as one complete file, passwords masked, and end."),
    ] = False,
    example_config: Annotated[
        bool, typer.Option("--example-config", help="Print a file to begin with, which runs without a camera, and end.")
    ] = False,
) -> None:
    """Judge every frame of one or more sources: PASS, REJECT or FAULT."""
    # By the keys of the configuration; first of all, as this is all that there is yet.
    given = {key: value for key, value in locals().items() if value is not None and key not in _ABOUT_THE_FILE}
    from recontrast_edge.config import example, load_config

    if example_config:
        typer.echo(example(), nl=False)
        return
    line_config = load_config(config, {key: _plain(value) for key, value in given.items()})
    if print_config:
        typer.echo(line_config.anchored(Path.cwd()).dumps(), nl=False)
    elif check_config:
        from recontrast_edge.line_setup import check_line

        check_line(line_config)
        counts = (len(line_config.cameras), len(line_config.products), len(line_config.outputs))
        typer.echo("well: cameras {}, products {}, outputs {}".format(*counts))
    else:
        run_line(line_config)


_ABOUT_THE_FILE = frozenset({"config", "check_config", "print_config", "example_config"})


def _plain(value: object) -> object:
    """An option's value as the file would have it."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, ModeOption) else str(value) if isinstance(value, Path) else value


def run_line(config: LineConfig) -> None:
    """Run a line until it ends, and end with the exit code that belongs to that."""
    from contextlib import ExitStack, closing
    from functools import partial
    from threading import Event

    from recontrast_edge.bounded import call_apart
    from recontrast_edge.line_setup import camera_plans, check_places, open_products, output_openers, parts_merger
    from recontrast_edge.pipeline import Line, stop_on_signals
    from recontrast_edge.secrets import masked_uri
    from recontrast_edge.sinks.terminal import TerminalView
    from recontrast_edge.statistics import Statistics

    records_on_stdout = any(uri.partition("?")[0] == "jsonl:-" for uri in config.outputs)
    check_places(config)
    openers = output_openers(config)
    stop, statistics = Event(), Statistics()
    with ExitStack() as stack:
        products = call_apart(partial(open_products, config, stack), name="open the engines")
        line = stack.enter_context(
            Line(
                camera_plans(config, products),
                merger=parts_merger(config),
                max_frames=config.max_frames,
                batch_wait_s=config.batch_wait_s,
                engine_timeout_s=config.engine_timeout_s,
                stop=stop,
                statistics=statistics,
            )
        )
        stack.enter_context(stop_on_signals(stop))
        line.connect()
        engines = list({id(product.engine): product.engine for product in products.values()}.values())
        with ExitStack() as until_run:
            sinks = []
            for uri, open_sink in zip(config.outputs, openers, strict=True):
                sink = line.open_sink(masked_uri(uri), partial(open_sink, engines[0].spec.input))
                sinks.append(until_run.enter_context(closing(sink)))
            if not config.quiet:
                names = ", ".join(dict.fromkeys(f"{engine.spec.class_name} · {engine.name}" for engine in engines))
                sources = f"{len(line.cameras)} cameras" if len(line.cameras) > 1 else line.cameras[0].uri
                title = f"{names} · {sources}"
                view = TerminalView(statistics, title=title, to_stderr=records_on_stdout)
                sinks.append(until_run.enter_context(closing(view)))
            # From here on the line closes them, and does not wait for one that hangs.
            until_run.pop_all()
        line.run(sinks)
        if config.summary is not None:
            line.write_summary(Path(config.summary))
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
