"""The cameras that this machine sees, each with the URI to use: the facts behind ``recontrast-edge cameras``.

    for search in find_cameras(): print(search.where, [camera.uri for camera in search.cameras], search.note)

Every library is asked in a child process of its own (``python -m recontrast_edge.cameras KIND``), with a time limit.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from recontrast_edge.apart import NoAnswerError, answer_of
from recontrast_edge.errors import RecontrastError
from recontrast_edge.sources.gentl import producer_folders

TIMEOUT_S = 30.0
"""Producers look on all networks, one after the other."""

DEVICES = Path("/dev")


@dataclass(frozen=True)
class FoundCamera:
    """A camera.

    Attributes:
        uri: for ``--source``.
        name: maker and model, or what the driver calls it.
        formats: pixel formats with sizes in pixels and rates, where they can be read without opening the camera.
    """

    uri: str
    name: str
    formats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Search:
    """Where was looked, and what was found.

    Attributes:
        where: the interface or library; for a GenTL producer with its path.
        note: what is missing, wrong, or could be done where nothing was found; None if there is nothing to say.
    """

    where: str
    cameras: tuple[FoundCamera, ...] = ()
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As one JSON-able object."""
        return asdict(self)


def find_cameras(producers: Sequence[Path] = ()) -> list[Search]:
    """Look everywhere; takes a few seconds, and raises nothing for what is wrong with one library.

    Args:
        producers: GenTL producers (.cti), besides those in the folders of ``GENICAM_GENTL64_PATH``.
    """
    files = dict.fromkeys(
        [*producers, *(file for folder in producer_folders() for file in sorted(folder.glob("*.cti")))]
    )
    asked = [("v4l2",), ("pylon",), *(("genicam", str(file)) for file in files), ("aravis",)]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        searches = list(pool.map(_apart, asked))
    if not files:
        advice = (
            "no producer: install the camera maker's, and set GENICAM_GENTL64_PATH to its folder or give --cti FILE"
        )
        searches.insert(2, Search("GenTL", note=advice))
    return searches


def _apart(asked: tuple[str, ...]) -> Search:
    try:
        answer = answer_of(__name__, *asked, timeout_s=TIMEOUT_S)
        cameras = (FoundCamera(camera["uri"], camera["name"], tuple(camera["formats"])) for camera in answer["cameras"])
        return Search(answer["where"], tuple(cameras), answer["note"])
    except (NoAnswerError, KeyError, TypeError) as error:
        return Search(_where(*asked), note=f"failed: {error}")


def _where(kind: str, file: str = "") -> str:
    return {"v4l2": "V4L2", "pylon": "pylon", "aravis": "Aravis"}.get(kind, f"GenTL {file}")


def _search(kind: str, file: str = "") -> Search:
    """In the child."""
    finders: dict[str, Callable[[], list[FoundCamera]]] = {
        "v4l2": _v4l2,
        "pylon": _pylon,
        "genicam": partial(_genicam, file),
        "aravis": _aravis,
    }
    try:
        found = finders[kind]()
    except RecontrastError as error:
        return Search(_where(kind, file), note=str(error))
    nothing = {
        "v4l2": "no /dev/video* delivers pictures; a container needs --device",
        "pylon": "no camera; PYLON_CAMEMU=1 simulates one",
    }
    return Search(_where(kind, file), tuple(found), None if found else nothing.get(kind, "no camera"))


def _v4l2() -> list[FoundCamera]:
    from recontrast_edge.sources.v4l2 import offered_formats

    found = []
    numbered = sorted(DEVICES.glob("video[0-9]*"), key=lambda path: (len(path.name), path.name))
    for device in numbered:
        label = Path("/sys/class/video4linux", device.name, "name")
        name = label.read_text(errors="replace").strip() if label.is_file() else "unnamed"
        try:
            formats = tuple(str(offered) for offered in offered_formats(device))
        except RecontrastError as error:
            # Most cameras have a second device, for metadata, that delivers no pictures; the rest is worth a line.
            if os.access(device, os.R_OK | os.W_OK):
                continue
            formats = (str(error),)
        found.append(FoundCamera(str(device), name, formats))
    return found


def _pylon() -> list[FoundCamera]:
    from recontrast_edge.sources.pylon import find_devices

    return [
        FoundCamera(_uri("pylon", info.GetSerialNumber()), f"{info.GetVendorName()} {info.GetModelName()}")
        for info in find_devices()
    ]


def _genicam(file: str) -> list[FoundCamera]:
    from recontrast_edge.sources.gentl import find_devices, find_producer

    path = find_producer(file)
    return [
        FoundCamera(f"{_uri('genicam', str(path))}#{quote(device.id, safe=_SAFE)}", device.description)
        for device in find_devices(path)
    ]


def _aravis() -> list[FoundCamera]:
    from recontrast_edge.sources.aravis import find_devices

    return [FoundCamera(_uri("aravis", device.id), device.description) for device in find_devices()]


_SAFE = "/:+@ ,()[]"
"""Characters that a URI's place may hold as they are, besides letters, digits and ``_.-~``."""


def _uri(scheme: str, place: str) -> str:
    return f"{scheme}:{quote(place, safe=_SAFE)}"


if __name__ == "__main__":
    print("\n" + json.dumps(_search(*sys.argv[1:]).to_json()))
