"""One JSON object a frame and line, complete at any moment.

    JsonlSink(Path("records.jsonl")).write(judgement)

``docs/artifacts.md`` describes the record. Each line goes out in one piece as soon as its verdict is there, so that a
reader that follows the file (or standard output) never sees half a record; when the disk is full, the file ends with
the last whole one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from recontrast_edge.errors import OutputError
from recontrast_edge.frame import Judgement


class JsonlSink:
    """Writes records to a file, or to standard output where ``path`` is None.

    Raises:
        OutputError: the file cannot be opened.
    """

    needs_maps = False

    def __init__(self, path: Path | None) -> None:
        self.uri = f"jsonl:{'-' if path is None else path}"
        self._path = path
        if path is None:
            # Unbuffered and not closed by us: what print wrote before must come before.
            sys.stdout.flush()
            self._file = io.FileIO(sys.stdout.fileno(), "w", closefd=False)
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = io.FileIO(path, "w")
        except OSError as error:
            raise OutputError(f"{path}: cannot write here ({error.strerror or error})") from None

    def write(self, judgement: Judgement) -> None:
        """Append one record.

        Raises:
            OutputError: it could not be written whole; a file ends with the record before.
            BrokenPipeError: whoever read standard output has gone.
        """
        line = json.dumps(judgement.record(), allow_nan=False).encode() + b"\n"
        written = 0
        try:
            # A pipe may take a line in pieces; a disk that is nearly full takes the first piece and then refuses.
            while written < len(line):
                written += self._file.write(line[written:])
        except BrokenPipeError:
            raise
        except OSError as error:
            self._forget(written)
            raise OutputError(f"{self.uri}: cannot write ({error.strerror or error})") from None

    def _forget(self, partial: int) -> None:
        """Cut a half-written line off; only files can."""
        if self._path is not None and partial:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), self._file.tell() - partial)

    def close(self) -> None:
        """See ``Sink.close``."""
        if self._file.closed:
            return
        try:
            if self._path is not None:
                os.fsync(self._file.fileno())
        except OSError:
            # Devices and pipes under a file's name cannot be synchronised, and need not.
            pass
        finally:
            self._file.close()
