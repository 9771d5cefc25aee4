"""A folder with a picture, a map and a record of each reject, or of others.

    ImagesSink(Path("rejects"), engine.spec.input).write(judgement)

Frame 12 becomes ``20260301T080000.123Z-00000012.png`` (annotated), the same with ``.map.png`` (16-bit grey: map value =
pixel * ``map_step`` of the record) and with ``.json`` (the record, written last: where it is, the others are complete).
Names begin with the time of day, in UTC, and sort by it; frames of a named camera have its name before the number.
"""

from __future__ import annotations

import json
import re
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np

from recontrast_edge.errors import OutputError
from recontrast_edge.frame import Judgement, VerdictName
from recontrast_edge.images import atomic_write, write_image
from recontrast_edge.render import annotate, panel_size
from recontrast_edge.sinks.message import VERDICTS
from recontrast_edge.sinks.outage import Outage
from recontrast_edge.spec import InputSpec

MAP_STEP = 5e-4
"""Map value of one grey step: 65535 steps hold two views of eight levels, each at its largest distance of 2."""

SUFFIXES = (".png", ".map.png", ".original.png", ".json")

_STEM = re.compile(r"(\d{8}T\d{6}\.\d{3}Z)-(?:[\w.-]+-)?\d{8,}", re.ASCII)
_TEMPORARY = re.compile(rf"\.{_STEM.pattern}\.[\w.]+\.part", re.ASCII)
_MAX_RECORD_BYTES = 1 << 20

STALE_S = 60.0
"""Nobody writes one file for so long: the process that began it was killed."""


@dataclass(frozen=True)
class _Kept:
    """The files of one frame."""

    stem: str
    size: int

    @property
    def moment(self) -> datetime:
        return datetime.strptime(self.stem[:19] + "+0000", "%Y%m%dT%H%M%S.%f%z")


class ImagesSink:
    """Writes judgements as files of a folder, and removes the oldest beyond a size or an age.

    Only files that this sink wrote, now or in earlier runs, count and are ever removed: their names have its form, and
    their record says so. What does not fit on a full disk is counted as ``lost``.

    Args:
        verdicts: the judgements to write.
        original: also write the frame as it came, as ``.original.png``.
        max_bytes: of all files together.
        max_age: by the system's clock.

    ``counters``: ``lost`` and ``removed``, in frames.

    Raises:
        OutputError: the folder cannot be made or read.
    """

    def __init__(
        self,
        folder: Path,
        input_spec: InputSpec,
        *,
        verdicts: frozenset[VerdictName] = VERDICTS["rejects"],
        original: bool = False,
        max_bytes: int | None = None,
        max_age: timedelta | None = None,
    ) -> None:
        self.uri = f"images:{folder}"
        self.needs_maps = "PASS" in verdicts
        self.counters = {"removed": 0}
        self._outage = Outage(self.uri, "pictures", self.counters)
        self._folder = folder
        self._input_spec = input_spec
        self._verdicts = verdicts
        self._original = original
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._closed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._ring = self._find() if max_bytes is not None or max_age is not None else None
        except OSError as error:
            raise OutputError(f"{folder}: cannot make this folder ({error.strerror or error})") from None
        self._bytes = sum(kept.size for kept in self._ring or ())

    def write(self, judgement: Judgement) -> None:
        """See ``Sink.write``."""
        if judgement.verdict not in self._verdicts or self._outage.holds():
            return
        record = judgement.record()
        stem = _stem(record)
        try:
            size = self._write_files(stem, judgement, record)
        except (OSError, OutputError) as error:
            for suffix in SUFFIXES:
                with suppress(OSError):
                    self._path(stem, suffix).unlink(missing_ok=True)
            self._outage.begin(error)
        else:
            self._outage.end()
            if self._ring is not None:
                self._ring.append(_Kept(stem, size))
                self._bytes += size
        self._remove_old()

    def _write_files(self, stem: str, judgement: Judgement, record: dict[str, object]) -> int:
        """Write all files of a frame; returns their size in bytes."""
        image = judgement.frame.image
        write_image(self._path(stem, ".png"), annotate(judgement, self._input_spec, panel_size(image)))
        if self._original and image is not None and image.size:
            write_image(self._path(stem, ".original.png"), image)
        if judgement.map is not None:
            steps = np.clip(np.rint(judgement.map / MAP_STEP), 0, np.iinfo(np.uint16).max).astype(np.uint16)
            write_image(self._path(stem, ".map.png"), steps)
            record["map_step"] = MAP_STEP
        with atomic_write(self._path(stem, ".json")) as file:
            file.write(json.dumps(record, indent=2, allow_nan=False).encode() + b"\n")
        return self._size(stem)

    def _path(self, stem: str, suffix: str) -> Path:
        return self._folder / f"{stem}{suffix}"

    def _size(self, stem: str) -> int:
        size = 0
        for suffix in SUFFIXES:
            with suppress(OSError):
                size += self._path(stem, suffix).stat().st_size
        return size

    def _find(self) -> deque[_Kept]:
        """What earlier runs left, oldest first; removes what a killed one had not completed."""
        names = sorted(path.name for path in self._folder.iterdir())
        for name in filter(_TEMPORARY.fullmatch, names):
            with suppress(OSError):
                if time.time() - (self._folder / name).stat().st_mtime > STALE_S:
                    (self._folder / name).unlink()
        stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return deque(_Kept(stem, self._size(stem)) for stem in stems if _has_time(stem))

    def _remove_old(self) -> None:
        while self._ring and self._is_old(self._ring[0]):
            oldest = self._ring.popleft()
            self._bytes -= oldest.size
            if self._is_ours(oldest.stem):
                # The record goes last: without it nobody would know whose the others are.
                for suffix in SUFFIXES:
                    with suppress(OSError):
                        self._path(oldest.stem, suffix).unlink(missing_ok=True)
                self.counters["removed"] += 1

    def _is_old(self, kept: _Kept) -> bool:
        if self._max_bytes is not None and self._bytes > self._max_bytes:
            return True
        return self._max_age is not None and datetime.now(timezone.utc) - kept.moment > self._max_age

    def _is_ours(self, stem: str) -> bool:
        try:
            with self._path(stem, ".json").open("rb") as file:
                record = json.loads(file.read(_MAX_RECORD_BYTES))
        except (OSError, ValueError):
            return False
        return isinstance(record, dict) and {"frame_id", "verdict", "time"} <= record.keys() and _stem(record) == stem

    def close(self) -> None:
        """See ``Sink.close``; every file is complete already.

        Raises:
            OutputError: pictures were lost.
        """
        if not self._closed:
            self._closed = True
            self._outage.check()


def _stem(record: dict[str, object]) -> str:
    """What the names of a frame's files begin with."""
    moment = re.sub("[-:]", "", str(record["time"]))
    camera = re.sub(r"[^\w.-]", "_", f"{record['camera']}-", flags=re.ASCII) if record.get("camera") else ""
    return f"{moment}-{camera}{int(str(record['frame_id'])):08d}"


def _has_time(stem: str) -> bool:
    if _STEM.fullmatch(stem) is None:
        return False
    try:
        return _Kept(stem, 0).moment is not None
    except ValueError:
        return False
