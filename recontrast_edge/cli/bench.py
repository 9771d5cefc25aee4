"""``recontrast-edge bench``: latency and throughput of an engine on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from recontrast_edge.cli import app


@app.command("bench")
def bench_command(
    engine: Annotated[
        str | None, typer.Option(help="Model file (.onnx or .plan), or `demo` for the packaged one.")
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="FILE FILE", help="Measure two engines in turns, in one run, instead of --engine."),
    ] = None,
    source: Annotated[
        str,
        typer.Option(help="Where frames come from, as for `run`; all but a camera's are held in memory."),
    ] = "synthetic://mixed?fps=0",
    frames: Annotated[int, typer.Option(min=10, max=1_000_000, metavar="N", help="Measured verdicts.")] = 500,
    warmup: Annotated[int, typer.Option(min=1, max=100_000, metavar="N", help="Verdicts before measuring.")] = 50,
    batch: Annotated[
        str, typer.Option(metavar="N,N", help="Batch sizes whose throughput is measured; '' for none.")
    ] = "1,2,4,8,16",
    line_rate: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=100_000,
            metavar="HZ",
            help="Frames fall due at this rate, and each verdict before the next frame; counts those that do not.  "
            "[default: one frame after the other]",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads of ONNX Runtime.  [default: chosen by the engine]")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw latency over time, its distribution and stages.")
    ] = None,
) -> None:
    """Measure latency and throughput on this machine, after checking that the engine is right."""
    import json
    from contextlib import ExitStack

    from rich.console import Console

    from recontrast_edge.bench import Settings, bench, check_engines, parse_batches
    from recontrast_edge.errors import UsageError
    from recontrast_edge.images import atomic_write

    names = check_engines(engine, compare)
    settings = Settings(
        frames=frames, warmup=warmup, batches=parse_batches(batch), line_rate_hz=line_rate, threads=threads
    )
    if plot is not None and plot.suffix != ".png":
        raise UsageError(f"--plot: expected a file ending in .png, got {plot}")
    with ExitStack() as stack:
        # Before minutes of measuring: where nothing can be written, it is said now.
        json_out = None if json_file is None else stack.enter_context(atomic_write(json_file))
        plot_out = None if plot is None else stack.enter_context(atomic_write(plot))
        status = stack.enter_context(Console(stderr=True).status("opening"))
        done = 0

        def progress(phase: str, count: int) -> None:
            nonlocal done
            done += count
            status.update(f"{phase} {done}/{frames * len(names)}" if count else phase)

        report, latencies = bench(names, source, settings, progress=progress)
        if json_out is not None:
            json_out.write(json.dumps(report, indent=2, allow_nan=False).encode() + b"\n")
        if plot_out is not None:
            from recontrast_edge.bench_plot import draw_png

            labels = [f"{letter}: {entry['file']}" for letter, entry in zip("AB", report["engines"], strict=False)]
            title = f"{report['engines'][0]['name']}; {report['machine']['cpu']}; {source}"
            runs = dict(zip(labels, latencies, strict=True))
            plot_out.write(draw_png(runs, title=title, deadline_ms=None if line_rate is None else 1e3 / line_rate))
    _show(report)


def _show(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    settings = report["settings"]
    for entry in report["engines"]:
        checks = entry["correctness"]
        against = (
            f"map error {checks['against_reference']:.2g} of its range against {checks['reference']}"
            if "reference" in checks
            else "no reference model beside it, only checked against itself"
        )
        console.print(f"\n[bold]{entry['file']}[/bold]  {entry['name']}\nchecked: {against}", soft_wrap=True)
        table = Table(
            title=f"ms a frame, {settings['frames']} frames after {settings['warmup']} to warm up",
            title_justify="left",
            box=box.SIMPLE_HEAD,
        )
        rows = {**entry["latency_ms"], **{f"GPU: {k}": v for k, v in entry.get("gpu_stages_ms", {}).items()}}
        table.add_column("stage")
        for column in next(iter(rows.values())):
            table.add_column(column, justify="right")
        for stage, values in rows.items():
            table.add_row(stage, *("-" if value is None else f"{value:.3f}" for value in values.values()))
        console.print(table)
        if "gpu_stages_error" in entry:
            console.print(f"GPU stages not measured: {entry['gpu_stages_error']}", soft_wrap=True, markup=False)
        if "deadline" in entry:
            deadline = entry["deadline"]
            console.print(f"later than {deadline['ms']:.4g} ms: {deadline['missed']} of {deadline['of']}")
        if entry["throughput"]:
            listed = ", ".join(f"{row['batch']}: {row['images_per_s']:.1f}" for row in entry["throughput"])
            console.print(f"images a second by batch size: {listed}")
    if "comparison" in report:
        found, error = report["comparison"]["latency_ratio"], report["comparison"]["map_error"]
        console.print(
            f"\nsecond / first, median latency of {found['turns']} turns: {found['median']:.3f} "
            f"(p10 {found['p10']:.3f}, p90 {found['p90']:.3f}); "
            + ("maps of different sizes" if error is None else f"maps differ by {error:.2g} of their range"),
            soft_wrap=True,
        )
    memory = report["memory"]
    console.print(f"memory: {memory['resident_mib']:.0f} MiB resident, {memory['peak_mib']:.0f} MiB at most")
    sensors = ", ".join(
        f"{name} {value['mean']:g}" for name, value in report["sensors_under_load"].items() if isinstance(value, dict)
    )
    if sensors:
        console.print(f"under load: {sensors}", soft_wrap=True)
    console.print(f"not included: {report['excluded']}", soft_wrap=True)
