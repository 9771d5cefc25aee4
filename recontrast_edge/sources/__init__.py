"""Where frames come from.

    source = open_source("synthetic://brushed-metal?defect_rate=0.1&fps=30")

| source | frames |
| --- | --- |
| `part.png` | one image |
| `FOLDER` | its images, subfolders included, in natural order of their names |
| `belt.mp4` | a video file's |
| `synthetic://PRODUCT?defect_rate=0.1&seed=0&fps=30&size=256x256&frames=N` | a procedural line's, with known truth |

PRODUCT is `brushed-metal`, `woven-fabric` or `mixed`; with `fps=0` frames come as fast as they are read.
Paths may also be written `file:///ABSOLUTE/PATH`, with `%20` for a space as in any such URI.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

from recontrast_edge.errors import InputError, UsageError
from recontrast_edge.frame import Source
from recontrast_edge.images import IMAGE_SUFFIXES


def open_source(uri: str) -> Source:
    """Open a source.

    Args:
        uri: a path, or ``scheme:...``. What exists as a file or folder is one, whatever its name.

    Raises:
        UsageError: unknown scheme or option, or a value out of range.
        InputError: a missing, empty or broken image or folder.
        SourceError: a video that cannot be opened.
    """
    scheme = re.match(r"([a-z][a-z0-9+.-]*):", uri)
    if scheme and scheme[1] in _SCHEMES:
        return _SCHEMES[scheme[1]](uri)
    if scheme and not _exists(Path(uri)):
        known = ", ".join(f"{name}://..." for name in _SCHEMES)
        raise UsageError(
            f"source {uri!r}: unknown scheme {scheme[1]!r}; expected an image, folder or video file, or {known}"
        )
    return _open_path(uri)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        # A name that is too long, without permission, or with a NUL.
        return False


def _open_file_uri(uri: str) -> Source:
    rest = uri.removeprefix("file:").removeprefix("//localhost")
    text = unquote(rest.removeprefix("//"))
    if not text.startswith("/"):
        raise UsageError(f"source {uri!r}: expected file:///ABSOLUTE/PATH; write a relative path without `file:`")
    return _open_path(text)


def _open_path(text: str) -> Source:
    path = Path(text)
    if not text or not _exists(path):
        raise InputError(f"source {text!r}: no such file or folder")
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        from recontrast_edge.sources.files import ImageSource

        return ImageSource(path)
    from recontrast_edge.sources.video import VideoSource

    return VideoSource(path)


def _open_synthetic(uri: str) -> Source:
    from recontrast_edge.sources.synthetic import SyntheticSource

    return SyntheticSource(uri)


_SCHEMES: dict[str, Callable[[str], Source]] = {
    "file": _open_file_uri,
    "synthetic": _open_synthetic,
}
"""What opens a URI of each scheme; it takes the whole URI."""
