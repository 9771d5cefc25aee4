"""What takes long to make again, kept in files of this user: compiled kernels, for one.

    content = read_cached("kernels", "sm_87-0123.cubin"); write_cached("kernels", "sm_87-0123.cubin", made)

Files lie in ``$XDG_CACHE_HOME/recontrast-edge/<kind>`` (``~/.cache`` by default) and end with the SHA-256 of what is
before it; the oldest make room. What is in them becomes code on the GPU, so nothing is read that another user could
have written. A cache never makes anything fail: without one, everything is made again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

from recontrast_edge.errors import OutputError
from recontrast_edge.images import atomic_write

_log = logging.getLogger(__name__)

MAX_BYTES = 256 << 20
"""The largest file that is read or written."""
KEPT_FILES = 8
"""Of a kind, those that were used last."""

_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder(kind: str) -> Path:
    """Where files of a kind are kept; it need not be there.

    Raises:
        OSError: this user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rule: a relative path is to be ignored.
    if Path(base).is_absolute():
        return Path(base) / "recontrast-edge" / kind
    try:
        return Path.home() / ".cache" / "recontrast-edge" / kind
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from None


def read_cached(kind: str, name: str) -> bytes | None:
    """What was written last under this name; None where there is nothing, or nothing to be trusted."""
    try:
        path = _private(cache_folder(kind)) / name
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            if facts.st_uid != os.geteuid() or not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_BYTES:
                raise PermissionError(f"expected a file of this user, of at most {MAX_BYTES} bytes")
            content = file.read(MAX_BYTES)
        with suppress(OSError):
            os.utime(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("%s cache: %s is not used: %s", kind, name, error)
        return None
    if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() != content[-_DIGEST_BYTES:]:
        _log.warning("%s cache: %s is damaged and not used", kind, name)
        return None
    return content[:-_DIGEST_BYTES]


def write_cached(kind: str, name: str, content: bytes) -> None:
    """Keep something under this name; what was used longest ago makes room."""
    try:
        if len(content) + _DIGEST_BYTES > MAX_BYTES:
            raise OutputError(f"{len(content)} bytes are too many")
        folder = cache_folder(kind)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(_private(folder) / name) as file:
            file.write(content)
            file.write(hashlib.sha256(content).digest())
        _make_room(folder)
    except (OSError, OutputError) as error:
        _log.warning("%s cache: %s cannot be kept and is made again next time: %s", kind, name, error)


def _private(folder: Path) -> Path:
    """The folder, out of everybody else's reach."""
    facts = folder.stat()
    if facts.st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to another user")
    if facts.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _make_room(folder: Path) -> None:
    ages: list[tuple[float, Path]] = []
    for path in folder.iterdir():
        try:
            ages.append((path.stat().st_mtime, path))
        except FileNotFoundError:
            # Another process makes room, too.
            continue
    for _, path in sorted(ages)[:-KEPT_FILES]:
        path.unlink(missing_ok=True)
