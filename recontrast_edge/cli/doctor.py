"""``recontrast-edge doctor``: what this machine has, and what is missing for what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from recontrast_edge.cli import app

if TYPE_CHECKING:
    from recontrast_edge.doctor import Library, Report


@app.command("doctor")
def doctor_command(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Show what this machine has (GPU, drivers, libraries, codecs, cameras) and what is missing for what."""
    from recontrast_edge.doctor import examine

    report = examine()
    if as_json:
        import json

        typer.echo(json.dumps(report.to_json(), indent=2))
        return
    _show(report)


def _show(report: Report) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)

    def show(title: str, rows: list[tuple[Text, Text]]) -> None:
        table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE_HEAD, title_style="bold")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)

    show("This machine", [(Text(name), Text(_plain(value))) for name, value in report.machine.items()])
    show("Libraries", [(Text(name), _library(library)) for name, library in report.libraries.items()])
    rows = [
        (
            Text(item.name),
            Text("ready", "green") if item.ready else Text("\n".join(f"- {step}" for step in item.to_do), "yellow"),
        )
        for item in report.capabilities
    ]
    show("What works here, or what to install for it", rows)


def _library(library: Library) -> Any:
    from rich.text import Text

    if library.status == "missing":
        return Text("not installed", "dim")
    if library.status == "broken":
        return Text(f"{library.version or ''} broken: {library.error}".strip(), "red")
    details = "; ".join(f"{name}: {_plain(value)}" for name, value in library.details.items())
    return Text(" ".join(part for part in (library.version, details and f"({details})") if part) or "found")


def _plain(value: Any) -> str:
    """A fact as people read it."""
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)
