"""Where frames come from.

    source = open_source("synthetic://brushed-metal?defect_rate=0.1&fps=30")

| source | frames |
| --- | --- |
| `part.png` | one image |
| `FOLDER` | its images, subfolders included, in natural order of their names |
| `belt.mp4` | a video file's |
| `synthetic://PRODUCT?defect_rate=0.1&seed=0&fps=30&size=256x256&frames=N` | a procedural line's, with known truth |

PRODUCT is `brushed-metal`, `woven-fabric` or `mixed`; with `fps=0` frames come as fast as they are read.
Paths may also be written `file://PATH`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from recontrast_edge.errors import InputError, UsageError
from recontrast_edge.frame import Source
from recontrast_edge.images import IMAGE_SUFFIXES


def open_source(uri: str) -> Source:
    """Open a source.

    Args:
        uri: a path, or ``scheme://...``.

    Raises:
        UsageError: unknown scheme or option, or a value out of range.
        InputError: a missing, empty or broken image or folder.
        SourceError: a video that cannot be opened.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return _open_path(uri)
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://..." for name in _SCHEMES)
        raise UsageError(
            f"source {uri!r}: unknown scheme {scheme!r}; expected an image, folder or video file, or {known}"
        )
    return _SCHEMES[scheme](rest)


def _open_path(text: str) -> Source:
    path = Path(text)
    if not text or not path.exists():
        raise InputError(f"source {text!r}: no such file or folder")
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        from recontrast_edge.sources.files import ImageSource

        return ImageSource(path)
    from recontrast_edge.sources.video import VideoSource

    return VideoSource(path)


def _open_synthetic(rest: str) -> Source:
    from recontrast_edge.sources.synthetic import SyntheticSource

    return SyntheticSource(rest)


_SCHEMES: dict[str, Callable[[str], Source]] = {
    "file": _open_path,
    "synthetic": _open_synthetic,
}
