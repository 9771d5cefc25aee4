"""``recontrast-edge cameras``: the cameras that this machine sees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recontrast_edge.cli import app


@app.command("cameras")
def cameras_command(
    cti: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A GenTL producer (.cti) to look through, besides those in the folders of GENICAM_GENTL64_PATH; may "
            "be given several times. It is native code: give only files that you trust.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the cameras that this machine sees, each with the URI for `--source`."""
    from recontrast_edge.cameras import find_cameras

    searches = find_cameras(cti or ())
    if as_json:
        import json

        typer.echo(json.dumps([search.to_json() for search in searches], indent=2))
        return
    for search in searches:
        typer.echo(f"{search.where}{f': {search.note}' if search.note else ''}")
        for camera in search.cameras:
            typer.echo(f"  {camera.uri}  {camera.name}")
            for offered in camera.formats:
                typer.echo(f"    {offered}")
