"""The command line. ``recontrast-edge --help`` must stay fast: modules here import typer and errors, nothing else,
until a command runs.

    python -m recontrast_edge --help
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from recontrast_edge.errors import EXIT_INTERRUPTED, RecontrastError


@contextmanager
def _without_passwords() -> Iterator[None]:
    """What the parser says of a wrong command line quotes it, and may quote a URI."""
    try:
        yield
    except Exception as error:
        message = getattr(error, "message", None)
        if isinstance(message, str):
            from recontrast_edge.secrets import mask

            error.__dict__["message"] = mask(message)
        raise


class _Commands(TyperGroup):
    def make_context(self, *arguments: Any, **more: Any) -> Any:
        with _without_passwords():
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: Any) -> Any:
        with _without_passwords():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
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
    from recontrast_edge.secrets import mask, mask_logs, register_uri

    mask_logs()
    sys.stdout, sys.stderr = _whose_reader_may_leave(sys.stdout), _whose_reader_may_leave(sys.stderr)
    for argument in sys.argv[1:]:
        register_uri(argument)
    threading.excepthook = _thread_failed
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


class _UntilReaderLeaves(io.FileIO):
    """Whoever reads what is shown may leave (`| head`): the rest goes nowhere, and the command does its work."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - pathlib is not needed for more
                os.dup2(nowhere.fileno(), self.fileno())
            return memoryview(data).nbytes


def _whose_reader_may_leave(stream: TextIO) -> TextIO:
    """The same stream; one that is not the process' own, or is closed, stays as it is."""
    if stream is None or stream not in (sys.__stdout__, sys.__stderr__) or not isinstance(stream, io.TextIOWrapper):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_UntilReaderLeaves(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        # What the terminal's encoding does not have must not stop a command.
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """As Python tells of it, of a library's thread for example, without passwords."""
    from recontrast_edge.secrets import mask

    error = failed.exc_value or failed.exc_type()
    typer.echo(mask("".join(traceback.format_exception(error))), err=True, nl=False)


def _exit(code: str | int | None) -> NoReturn:
    """End, even where a driver hangs on a thread that was left behind: libraries' exit handlers could wait for it."""
    bounded = sys.modules.get("recontrast_edge.bounded")
    if bounded is not None and bounded.left_behind():
        for stream in (sys.stdout, sys.stderr):
            # None where the process was started without one.
            if stream is not None:
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)
