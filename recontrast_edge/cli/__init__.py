"""The command line. ``recontrast-edge --help`` must stay fast: modules here import typer and errors, nothing else,
until a command runs.

    python -m recontrast_edge --help
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import NoReturn

import typer

from recontrast_edge.errors import EXIT_INTERRUPTED, RecontrastError

app = typer.Typer(
    name="recontrast-edge",
    help="ReContrast anomaly detection for production lines: train, export, and judge every frame on the edge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from recontrast_edge import __version__

        typer.echo(f"recontrast-edge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


def _register() -> None:
    from recontrast_edge.cli import commands  # noqa: F401 - registers on import


def main() -> None:
    """Entry point: run the command and end with the documented exit code (``docs/exit-codes.md``)."""
    # Before NumPy is imported. Its matrices are small here: threads of its own gain nothing and, spinning on cores that
    # the engine needs, turned 7 ms of preprocessing into 50 ms, and at worst into 1.2 s, on two busy cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # As Ctrl-C, so that temporary files are removed on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from recontrast_edge.secrets import mask, mask_logs

    mask_logs()
    _register()
    try:
        app()
    except RecontrastError as error:
        typer.echo(mask(f"error: {error}"), err=True)
        _exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        _exit(EXIT_INTERRUPTED)
    except SystemExit as ended:
        _exit(ended.code)
    except Exception:
        typer.echo(mask(traceback.format_exc()), err=True, nl=False)
        typer.echo("error: this is a defect in recontrast-edge; please report it with the lines above", err=True)
        _exit(RecontrastError.exit_code)


def _exit(code: str | int | None) -> NoReturn:
    """End, even where a driver hangs on a thread that was left behind: libraries' exit handlers could wait for it."""
    bounded = sys.modules.get("recontrast_edge.bounded")
    if bounded is not None and bounded.left_behind():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)
