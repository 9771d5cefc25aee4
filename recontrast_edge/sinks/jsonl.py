"""One JSON object a frame and line, complete at any moment.

    JsonlSink(Path("records.jsonl")).write(judgement)

``docs/artifacts.md`` describes the record. Each line goes out in one piece as soon as its verdict is there, so that a
reader that follows the file (or standard output) never sees half a record. Records are added to those of earlier runs;
what a killed process left of a last line is cut off. While the disk is full, records are counted, and later the file
tells how many are missing: ``{"type": "lost", "records": 12, ...}``.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

from recontrast_edge.errors import OutputError
from recontrast_edge.frame import Judgement, StateChange, time_of_day
from recontrast_edge.sinks.outage import Outage

MAX_LINE_BYTES = 1 << 20
"""A record is far shorter."""


class JsonlSink:
    """Writes records to a file, or to standard output where ``path`` is None.

    ``counters``: ``lost`` records; ``mended`` lines that an earlier process had left half-written.

    Args:
        rotate_bytes: when the file would become larger, it becomes ``FILE.1``, that one ``FILE.2``, and so on.
        keep: files of that kind; older ones are replaced.
        states: also write the cameras' changes of state.

    Raises:
        OutputError: the file cannot be opened, is written by another process, or holds something else.
    """

    needs_maps = False

    def __init__(
        self, path: Path | None, *, rotate_bytes: int | None = None, keep: int = 5, states: bool = False
    ) -> None:
        self.uri = f"jsonl:{'-' if path is None else path}"
        self.counters = {"mended": 0}
        self._outage = Outage(self.uri, "records", self.counters)
        self._path = path
        self._rotate_bytes = rotate_bytes
        self._keep = keep
        self._states = states
        self._closed = False
        if path is None:
            # Unbuffered and not closed by us: what print wrote before must come before.
            sys.stdout.flush()
            self._file = io.FileIO(sys.stdout.fileno(), "w", closefd=False)
            self._regular = False
            return
        try:
            self._regular = not path.exists() or path.is_file()
            self._file = self._open(path) if self._regular else io.FileIO(path, "w")
        except OSError as error:
            raise OutputError(f"{path}: cannot write here ({error.strerror or error})") from None

    def write(self, judgement: Judgement) -> None:
        """Append one record.

        Raises:
            OutputError: a device or pipe does not take it.
            BrokenPipeError: whoever read standard output has gone.
        """
        self._append(judgement.record())

    def write_state(self, change: StateChange) -> None:
        """Append a camera's change of state, where that is wanted; raises as ``write``."""
        if self._states:
            self._append(change.record())

    def _append(self, record: dict[str, Any]) -> None:
        if self._outage.holds():
            return
        line = _line(record)
        try:
            if self._path is not None and self._regular and (self._outage.reason is not None or self._is_elsewhere()):
                # A new descriptor: the old one may lead to a file that was deleted, or to a disk that was exchanged.
                self._file.close()
                self._file = self._open(self._path)
            if self._outage.reason is not None:
                lost = {"records": self._outage.lost, "detail": self._outage.reason}
                line = _line({"type": "lost", "time": time_of_day(time.monotonic()), **lost}) + line
            self._write(line)
        except BrokenPipeError:
            raise
        except (OSError, OutputError) as error:
            if not self._regular:
                raise OutputError(f"{self.uri}: cannot write ({getattr(error, 'strerror', None) or error})") from None
            self._outage.begin(error)
        else:
            self._outage.end()

    def _is_elsewhere(self) -> bool:
        """Whether the file was deleted, or moved away as by a program that rotates logs."""
        try:
            return self._path is None or not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except OSError:
            return True

    def _write(self, line: bytes) -> None:
        if self._rotate_bytes is not None and self._path is not None:
            size = os.fstat(self._file.fileno()).st_size
            if 0 < size > self._rotate_bytes - len(line):
                self._rotate(self._path)
        written = 0
        try:
            # A pipe may take a line in pieces; a disk that is nearly full takes the first piece and then refuses.
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            if self._regular and written:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), os.fstat(self._file.fileno()).st_size - written)
            raise

    def _rotate(self, path: Path) -> None:
        for number in range(self._keep - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                _numbered(path, number).replace(_numbered(path, number + 1))
        path.replace(_numbered(path, 1))
        self._file.close()
        self._file = self._open(path)

    def _open(self, path: Path) -> io.FileIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
        try:
            # Two processes would cut each other's last line off. File systems without locks have to do without.
            with contextlib.suppress(OSError):
                try:
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise OutputError(f"{path}: another output writes to it; give each its own file") from None
            self.counters["mended"] += _mend(path, file.fileno())
        except BaseException:
            file.close()
            raise
        return file

    def close(self) -> None:
        """See ``Sink.close``.

        Raises:
            OutputError: records were lost.
        """
        if self._closed:
            return
        self._closed = True
        # Devices and pipes cannot be synchronised, and need not.
        with contextlib.suppress(OSError):
            if self._regular and not self._file.closed:
                os.fsync(self._file.fileno())
        self._file.close()
        self._outage.check()


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _mend(path: Path, descriptor: int) -> bool:
    """Make a file end with a whole line; returns whether something was cut off.

    Raises:
        OutputError: it ends with something that was never a record.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        return False
    window = os.pread(descriptor, MAX_LINE_BYTES, max(0, status.st_size - MAX_LINE_BYTES))
    rest = window[window.rfind(b"\n") + 1 :]
    if not rest:
        return False
    if len(rest) < len(window) or status.st_size <= MAX_LINE_BYTES:
        if _is_record(rest):
            os.write(descriptor, b"\n")
            return False
        # After a power failure the end may be zeros.
        if rest.startswith(b"{") or not rest.strip(b"\0"):
            os.ftruncate(descriptor, status.st_size - len(rest))
            return True
    raise OutputError(f"{path}: it does not end with a record; give another file, so that nothing else is overwritten")


def _is_record(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
