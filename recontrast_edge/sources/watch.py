"""A folder that grows: every new image becomes a frame once it is complete.

    WatchSource("watch:/data/incoming?pattern=*.png&after=move:done").read(timeout_s=1.0)

The folder is asked again and again, because the file system tells nothing of what another machine writes into a
shared folder, which is how many cameras deliver. It is listed only when it has changed.
"""

from __future__ import annotations

import errno
import fnmatch
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from recontrast_edge.datasets import natural_key
from recontrast_edge.errors import InputError, SourceError, UsageError
from recontrast_edge.frame import EndOfStream, Frame
from recontrast_edge.images import IMAGE_SUFFIXES, read_image
from recontrast_edge.uri import number_option, parse_options
from recontrast_edge.verdict import Fault

POLL_S = 0.02

RELIST_S = 2.0
"""For so long after a change the folder is listed now and then: file systems may note its time as coarsely as that."""

GIVE_UP_S = 5.0
"""An image that has not changed for so long, and still cannot be decoded, is broken and not incomplete."""


@dataclass
class _Candidate:
    """A file that may still be growing."""

    path: Path
    inode: int
    stamp: tuple[int, int]
    """Size in bytes, and time of the last change in nanoseconds of the wall clock."""
    changed_s: float
    """When it was first seen like this, on ``time.monotonic()``'s clock."""
    undecodable: bool = False
    """As it is now."""


@dataclass(frozen=True)
class _Options:
    """What a ``watch:`` URI asks for; see ``WatchSource``."""

    folder: Path
    existing: bool
    pattern: str
    settle_s: float
    delete: bool
    target: Path | None
    """Where to move what was read; under ``folder``."""
    part_id: re.Pattern[str] | None

    @classmethod
    def parse(cls, uri: str) -> _Options:
        what = f"source {uri!r}"
        name, _, query = uri.removeprefix("watch:").partition("?")
        options = parse_options(what, query, ("existing", "pattern", "settle_s", "after", "part_id"))
        if not name:
            raise UsageError(f"{what}: expected watch:FOLDER")
        existing, after = options.get("existing", "skip"), unquote(options.get("after", "keep"))
        if existing not in ("skip", "first"):
            raise UsageError(f"{what}: existing must be skip or first, got {existing!r}")
        folder, target = Path(name), None
        if after.startswith("move:") and after != "move:":
            target = (folder / after.removeprefix("move:")).resolve()
            if target == folder.resolve() or not target.is_relative_to(folder.resolve()):
                raise UsageError(f"{what}: after=move: expected a subfolder of {folder}, got {after[5:]!r}")
        elif after not in ("keep", "delete"):
            raise UsageError(f"{what}: after must be keep, delete or move:SUBFOLDER, got {after!r}")
        return cls(
            folder,
            existing == "first",
            unquote(options.get("pattern", "*")),
            number_option(what, "settle_s", options.get("settle_s", "0.2"), low=0.0, high=3600.0),
            after == "delete",
            target,
            _regex(what, unquote(options["part_id"])) if "part_id" in options else None,
        )

    def check_folders(self) -> None:
        """Whether the folder is there, and what is in it may be put away.

        Raises:
            InputError, SourceError: see ``WatchSource``.
        """
        _identity(self.folder)
        if self.target is None and not self.delete:
            return
        for folder in filter(None, (self.folder, self.target)):
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
                after = "delete" if self.target is None else "move"
                raise InputError(f"{folder}: may not be written to, so after={after} cannot be done")


def watch_opener(uri: str) -> Callable[[], WatchSource]:
    """Check a ``watch:`` URI and its folder, changing nothing, and return what opens it; raises as ``WatchSource``."""
    _Options.parse(uri).check_folders()
    return partial(WatchSource, uri)


class WatchSource:
    """The images that appear in a folder, in the order in which they are completed; subfolders are not looked at.

    A file is complete when it has not changed for ``settle_s`` and can be decoded. Those whose name begins with a dot
    or has no image's suffix are ignored, so a writer is safe that writes under such a name and then renames. Each file
    is taken once: a name that is used again must belong to a new file. What is still there waits on the disk, so
    nothing is lost where judging is slower.

    Args:
        uri: ``watch:DIR`` with ``existing=skip|first`` (images that are there already; default skip), ``pattern=GLOB``,
            ``settle_s`` (default 0.2), ``after=keep|delete|move:SUBFOLDER`` (what becomes of a file that has been read;
            default keep) and ``part_id=REGEX`` (its first group, or all of it, in the file's name is the part's id).
            Values may be percent-encoded.

    Raises:
        UsageError: a bad option.
        InputError: not a folder, or files that are to be moved or deleted cannot be.
        SourceError: the folder is not there.
    """

    live = False
    reopens = True

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.counters = {"left": 0}
        self._options = options = _Options.parse(uri)
        self._folder = options.folder
        self._identity = _identity(self._folder)
        if options.target is not None:
            try:
                options.target.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"{options.target}: cannot be made ({error.strerror or error})") from None
        options.check_folders()
        self._closed = threading.Event()
        self._next_id = 0
        self._seen: dict[str, tuple[int, tuple[int, int]]] = {}
        """Name -> inode and stamp of the files that were taken, or are candidates."""
        self._candidates: dict[str, _Candidate] = {}
        self._complete: deque[tuple[_Candidate, bool]] = deque()
        self._listed_ns: int | None = None
        self._changed_s = self._relist_s = -math.inf
        """When the folder's list of files was last seen to change, and when to list it again without a change."""
        if not options.existing:
            self._list()
            self._candidates.clear()

    def read(self, timeout_s: float) -> Frame | None:
        """See ``Source.read``."""
        give_up_s = time.monotonic() + timeout_s
        while True:
            if self._closed.is_set():
                raise EndOfStream
            if not self._complete:
                self._look()
            while self._complete:
                candidate, broken = self._complete.popleft()
                frame = self._frame(candidate, broken=broken)
                if frame is not None:
                    self._seen[candidate.path.name] = (candidate.inode, candidate.stamp)
                    self._put_away(candidate.path)
                    return frame
            left_s = give_up_s - time.monotonic()
            if left_s <= 0:
                return None
            self._closed.wait(min(POLL_S, left_s))

    def close(self) -> None:
        """See ``Source.close``."""
        self._closed.set()

    def _look(self) -> None:
        """Notice new files, and whether those that were not complete have changed."""
        identity = _identity(self._folder)
        if identity[:2] != self._identity[:2]:
            raise SourceError(f"{self._folder}: is another folder now; was it mounted or made anew?")
        now_s = time.monotonic()
        if identity[2] != self._listed_ns:
            self._listed_ns = identity[2]
            self._changed_s = self._relist_s = now_s
        if self._changed_s <= self._relist_s <= now_s:
            self._list()
            # Less and less often.
            since_s = now_s - self._changed_s
            self._relist_s = now_s + max(POLL_S, since_s) if since_s < RELIST_S else -math.inf
        for candidate in list(self._candidates.values()):
            self._check_wanted()
            stamp = _stamp(candidate.path)
            if stamp is None:
                del self._candidates[candidate.path.name]
            elif stamp != candidate.stamp:
                candidate.stamp, candidate.changed_s, candidate.undecodable = stamp, now_s, False
        self._sort_out()

    def _list(self) -> None:
        now_s = time.monotonic()
        present: dict[str, tuple[int, tuple[int, int]]] = {}
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    self._check_wanted()
                    name, inode = entry.name, entry.inode()
                    known = self._seen.get(name)
                    if known is not None and known[0] == inode:
                        present[name] = known
                    elif self._wanted(entry):
                        path = self._folder / name
                        stamp = _stamp(path)
                        if stamp is None:
                            continue
                        present[name] = (inode, stamp)
                        # Some network file systems number the same file anew.
                        if known is None or known[1] != stamp:
                            self._candidates[name] = _Candidate(path, inode, stamp, now_s)
        except OSError as error:
            raise _gone(self._folder, error) from None
        self._seen = present

    def _check_wanted(self) -> None:
        """To look at all files of a large folder on a share takes minutes, which nobody may have to wait for."""
        if self._closed.is_set():
            raise EndOfStream

    def _wanted(self, entry: os.DirEntry[str]) -> bool:
        return (
            Path(entry.name).suffix.lower() in IMAGE_SUFFIXES
            and not entry.name.startswith(".")
            and fnmatch.fnmatchcase(entry.name, self._options.pattern)
            # A link could lead anywhere, and reading a pipe would never end.
            and entry.is_file(follow_symlinks=False)
        )

    def _sort_out(self) -> None:
        """Take out those that seem complete, in the order in which they were."""
        now_s = time.monotonic()
        complete: list[tuple[_Candidate, bool]] = []
        for candidate in self._candidates.values():
            unchanged_s = now_s - candidate.changed_s
            broken = unchanged_s >= max(GIVE_UP_S, self._options.settle_s)
            if unchanged_s >= self._options.settle_s and (broken or not candidate.undecodable):
                complete.append((candidate, broken))
        complete.sort(key=lambda item: (item[0].stamp[1], natural_key(item[0].path.name)))
        for candidate, _ in complete:
            del self._candidates[candidate.path.name]
        self._complete.extend(complete)

    def _frame(self, candidate: _Candidate, *, broken: bool) -> Frame | None:
        """The frame of a file; None where it may still become one, which is tried again, or where it is gone."""
        path = candidate.path
        image = code = detail = None
        try:
            image = read_image(path)
        except (InputError, OSError) as error:
            code, detail = Fault.UNREADABLE_IMAGE.value, str(error)
        # It may have been written to, or taken away, in the meantime.
        if _stamp(path) != candidate.stamp or (image is None and not broken):
            candidate.undecodable = image is None
            self._candidates[path.name] = candidate
            return None
        frame_id = self._next_id
        self._next_id += 1
        return Frame(
            frame_id,
            str(path),
            image,
            candidate.changed_s,
            part_id=self._part_id_of(path.name),
            fault=code,
            detail=detail,
        )

    def _part_id_of(self, name: str) -> str | None:
        found = self._options.part_id.search(name) if self._options.part_id else None
        return None if found is None else found[1 if found.re.groups else 0]

    def _put_away(self, path: Path) -> None:
        """What ``after`` says. A file that cannot be put away is counted and left where it is: judging goes on."""
        try:
            if self._options.delete:
                path.unlink()
            elif self._options.target is not None:
                _move(path, self._options.target)
        except OSError:
            self.counters["left"] += 1


def _move(path: Path, folder: Path) -> None:
    """Move into a folder; where the name is taken, ``name-1.png`` and so on."""
    number = 0
    while True:
        target = folder / (f"{path.stem}-{number}{path.suffix}" if number else path.name)
        try:
            # Reserves the name, so that nothing is overwritten but this.
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC))
        except FileExistsError:
            number += 1
            continue
        try:
            path.replace(target)
        except OSError:
            target.unlink()
            raise
        return


def _identity(folder: Path) -> tuple[int, int, int]:
    """Device, inode, and time of the last change of its list of files in nanoseconds."""
    try:
        status = folder.stat()
        if not folder.is_dir():
            raise InputError(f"{folder}: is a file; expected a folder to watch")
    except (OSError, ValueError) as error:
        raise _gone(folder, error) from None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _gone(folder: Path, error: OSError | ValueError) -> SourceError:
    if getattr(error, "errno", None) == errno.ENOENT:
        return SourceError(f"{folder}: no such folder; is it mounted?")
    return SourceError(f"{folder}: cannot be read ({getattr(error, 'strerror', None) or error})")


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change; None where it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _regex(what: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"{what}: part_id must be a regular expression, got {text!r} ({error})") from None
