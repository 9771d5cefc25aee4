"""Errors a user can cause or meet, each with the exit code the command line ends with.

Every message states what was expected, what came, and what to do about it. The page of exit codes is generated from
this module:

    python -m recontrast_edge.errors > docs/exit-codes.md
"""

from __future__ import annotations

from typing import ClassVar

EXIT_OK = 0
EXIT_FAULTS = 10
EXIT_FELL_BACK = 12
EXIT_UNFINISHED = 13
EXIT_INTERRUPTED = 130


class RecontrastError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code: ClassVar[int] = 1
    meaning: ClassVar[str] = "a defect in recontrast-edge itself; please report it with the traceback"


class UsageError(RecontrastError):
    """Options that contradict each other, an unknown URI scheme, an unknown query key."""

    exit_code: ClassVar[int] = 2
    meaning: ClassVar[str] = "the command line is wrong: unknown option, source, output or value"


class InputError(RecontrastError):
    """An image, folder, mask or data set that cannot be used."""

    exit_code: ClassVar[int] = 3
    meaning: ClassVar[str] = "an image, folder or data set is missing, broken or of the wrong form"


class ModelError(RecontrastError):
    """A model, spec, weights or engine file that is missing, broken, edited or of another version."""

    exit_code: ClassVar[int] = 4
    meaning: ClassVar[str] = "a model, its spec or its weights is missing, broken, edited, too new or lacks a threshold"


class SourceError(RecontrastError):
    """A frame source that could not be opened or broke off."""

    exit_code: ClassVar[int] = 5
    meaning: ClassVar[str] = "a frame source could not be opened or broke off before its end"


class GateError(RecontrastError):
    """A parity or accuracy gate that was not passed; the artifact is not written."""

    exit_code: ClassVar[int] = 6
    meaning: ClassVar[str] = "an exported or built model does not reproduce its reference; nothing was written"


class OutputError(RecontrastError):
    """An output that cannot be written: full disk, missing permission, folder in the way."""

    exit_code: ClassVar[int] = 7
    meaning: ClassVar[str] = "an output could not be written (full disk, permission, path in the way)"


class MissingError(RecontrastError):
    """An optional dependency or device that this command needs and this machine lacks."""

    exit_code: ClassVar[int] = 8
    meaning: ClassVar[str] = "an optional dependency or a device is missing; the message says what to install"


class CalibrationError(RecontrastError):
    """A promise (false-reject rate, confidence) that the given images cannot support."""

    exit_code: ClassVar[int] = 9
    meaning: ClassVar[str] = "calibration refused: the images cannot support the wished promise"


class StallError(RecontrastError):
    """An engine that hangs, or has lost its GPU, which nothing within the process can mend; only a new one helps."""

    exit_code: ClassVar[int] = 11
    meaning: ClassVar[str] = "the engine hangs or has lost its GPU; the process must be started again"


class GpuError(ModelError):
    """A GPU that failed, perhaps for now only: while a process that is ending still holds its memory, say."""

    exit_code: ClassVar[int] = 14
    meaning: ClassVar[str] = "the GPU failed or was not ready (out of memory, driver still starting); try again"


class GpuNotReadyError(MissingError):
    """A driver that is there, but gives no GPU: it may still be starting, as the machine is."""

    exit_code: ClassVar[int] = GpuError.exit_code
    meaning: ClassVar[str] = GpuError.meaning


def exit_code_table() -> list[tuple[int, str]]:
    """All exit codes with their meaning, ascending."""
    classes = (
        RecontrastError,
        UsageError,
        InputError,
        ModelError,
        SourceError,
        GateError,
        OutputError,
        MissingError,
        CalibrationError,
        StallError,
        # And of GpuNotReadyError, which ends the same way.
        GpuError,
    )
    rows = [(cls.exit_code, cls.meaning) for cls in classes]
    rows.append((EXIT_OK, "done as asked; for `run` also a clean stop by Ctrl-C or SIGTERM"))
    rows.append((EXIT_FAULTS, "`run` or `demo` ended as asked, but at least one frame's verdict was FAULT"))
    rows.append((EXIT_FELL_BACK, "`quantize` wrote an FP16 model, because no INT8 one keeps the budget"))
    rows.append((EXIT_UNFINISHED, "`train --max-minutes`: the time was over first; `--resume` goes on"))
    rows.append((EXIT_INTERRUPTED, "stopped by Ctrl-C or SIGTERM before the work was done (`train` can be resumed)"))
    return sorted(rows)


if __name__ == "__main__":
    print("<!-- Generated: make docs -->\n# Exit codes\n")
    print("Every command ends with one of these. Errors go to standard error, as one line: `error: ...`.\n")
    print("| code | meaning |\n| --- | --- |")
    for code, meaning in exit_code_table():
        print(f"| {code} | {meaning} |")
