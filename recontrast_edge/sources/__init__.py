"""Where frames come from.

    source = open_source("synthetic://brushed-metal?defect_rate=0.1&fps=30")

| source | frames |
| --- | --- |
| `part.png` | one image |
| `FOLDER` | its images, subfolders included, in natural order of their names |
| `belt.mp4?pace=realtime&loop=forever` | a video file's; as fast as they are read, once, without these options |
| `list:FILE` | images, a path a line |
| `watch:DIR?existing=skip&after=keep` | new images of a folder that grows |
| `usb:0`, `/dev/video0` | a camera's, through V4L2 |
| `csi:0` | a Jetson's camera's |
| `gst:PIPELINE` | whatever a GStreamer pipeline makes |
| `pylon:SERIAL`, `genicam:FILE.cti#ID`, `aravis:NAME` | an industrial camera's |
| `rtsp://HOST/PATH`, also rtsps, http and https | a network camera's |
| `synthetic://PRODUCT?defect_rate=0.1&seed=0&fps=30&size=256x256&frames=N` | a procedural line's, with known truth |

`docs/cameras.md` has the options of each. PRODUCT is `brushed-metal`, `woven-fabric` or `mixed`; with `fps=0` frames
come as fast as they are read.
With `?lines=2048&overlap=128` the images of any of them are blocks of lines, and become tiles of a web (see
`docs/line-scan.md`); `synthetic-web://brushed-metal?width=256&block=16` is one to try that with.
Paths may also be written `file:///ABSOLUTE/PATH`, with `%20` for a space as in any such URI.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from recontrast_edge.errors import InputError, UsageError
from recontrast_edge.frame import Source
from recontrast_edge.images import IMAGE_SUFFIXES
from recontrast_edge.secrets import masked_uri
from recontrast_edge.uri import parse_options

Opener = Callable[[], Source]
"""Opens a source whose URI was checked; raises SourceError, or UsageError or InputError for what only opening shows."""


def open_source(uri: str) -> Source:
    """Open a source.

    Args:
        uri: a path, or ``scheme:...``. What exists as a file or folder is one, whatever its name. With the option
            ``lines`` its images are blocks of lines, and become tiles of a web (``recontrast_edge.linescan``).

    Raises:
        UsageError: unknown scheme or option, or a value out of range or that the camera does not take.
        InputError: a missing, empty or broken image or folder.
        SourceError: a camera, stream, video or watched folder that cannot be opened.
        MissingError: a library that the source needs is not installed.
    """
    return source_opener(uri)()


def source_opener(uri: str) -> Opener:
    """Check a source's URI and load what it needs, but touch no camera and change nothing yet.

    Raises:
        UsageError, InputError, SourceError, MissingError: as ``open_source``, as far as it shows without opening.
    """
    # Looked for before the module is loaded, which most sources can do without.
    if "lines=" in uri and not _exists(Path(uri)):
        from recontrast_edge.linescan import line_options, line_source_opener

        if line_options(uri) is not None:
            return line_source_opener(uri, _frames_opener)
    return _frames_opener(uri)


def check_source(uri: str) -> None:
    """Check all that can be checked without a camera; images and videos are opened for a moment.

    Raises:
        UsageError, InputError, SourceError, MissingError: as ``open_source`` would.
    """
    open_checked = source_opener(uri)
    scheme = _SCHEME.match(uri)
    is_path = scheme is None or scheme[1] not in _SCHEMES or _exists(Path(uri))
    if (is_path and not _VIDEO_DEVICE.match(uri)) or uri.startswith("list:"):
        open_checked().close()


def _frames_opener(uri: str) -> Opener:
    scheme = _SCHEME.match(uri)
    if scheme and scheme[1] in _SCHEMES:
        return _SCHEMES[scheme[1]](uri)
    if scheme and not _exists(Path(uri)):
        raise _unknown_scheme(uri, scheme[1])
    return _path(uri)


def _unknown_scheme(uri: str, scheme: str) -> UsageError:
    known = ", ".join(f"{name}:..." for name in _SCHEMES)
    return UsageError(
        f"source {masked_uri(uri)!r}: unknown scheme {scheme!r}; expected an image, folder or video file, or {known}"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        # A name that is too long, without permission, or with a NUL.
        return False


def _file_uri(uri: str) -> Opener:
    rest = uri.removeprefix("file:").removeprefix("//localhost")
    text = unquote(rest.removeprefix("//"))
    if not text.startswith("/"):
        raise UsageError(f"source {uri!r}: expected file:///ABSOLUTE/PATH; write a relative path without `file:`")
    return _path(text)


def _path(text: str) -> Opener:
    if _VIDEO_DEVICE.match(text):
        return _v4l2(text)
    name, query = text, ""
    if not _exists(Path(name)):
        name, _, query = text.partition("?")
    path = Path(name)
    if not name or not _exists(path):
        raise InputError(f"source {name!r}: no such file or folder")
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        from recontrast_edge.sources.files import open_images

        parse_options(f"source {text!r}", query, ())
        return partial(open_images, path)
    from recontrast_edge.sources.video import video_opener

    return video_opener(path, query)


def _synthetic(uri: str) -> Opener:
    from recontrast_edge.sources.synthetic import SyntheticSource

    return _made_at_once(SyntheticSource, uri)


def _synthetic_web(uri: str) -> Opener:
    from recontrast_edge.sources.synthetic import SyntheticWebSource

    return _made_at_once(SyntheticWebSource, uri)


def _made_at_once(kind: Callable[[str], Source], uri: str) -> Opener:
    """Of a source that only remembers what it is told, so that making one is all the check there is."""
    kind(uri)
    return partial(kind, uri)


def _list(uri: str) -> Opener:
    from recontrast_edge.sources.files import open_list

    return partial(open_list, uri)


def _watch(uri: str) -> Opener:
    from recontrast_edge.sources.watch import watch_opener

    return watch_opener(uri)


def _v4l2(uri: str) -> Opener:
    from recontrast_edge.sources.v4l2 import camera_opener

    return camera_opener(uri)


def _csi(uri: str) -> Opener:
    from recontrast_edge.sources.gstreamer import csi_opener

    return csi_opener(uri)


def _gst(uri: str) -> Opener:
    from recontrast_edge.sources.gstreamer import pipeline_opener

    return pipeline_opener(uri)


def _pylon(uri: str) -> Opener:
    from recontrast_edge.sources.pylon import pylon_opener

    return pylon_opener(uri)


def _gentl(uri: str) -> Opener:
    from recontrast_edge.sources.gentl import gentl_opener

    return gentl_opener(uri)


def _aravis(uri: str) -> Opener:
    from recontrast_edge.sources.aravis import aravis_opener

    return aravis_opener(uri)


def _stream(uri: str) -> Opener:
    from recontrast_edge.sources.rtsp import stream_opener

    return stream_opener(uri)


_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):")
_VIDEO_DEVICE = re.compile(r"/dev/(video[0-9]+|v4l/by-(id|path)/[^?]+)(\?|$)")

_SCHEMES: dict[str, Callable[[str], Opener]] = {
    "file": _file_uri,
    "synthetic": _synthetic,
    "synthetic-web": _synthetic_web,
    "list": _list,
    "watch": _watch,
    "usb": _v4l2,
    "csi": _csi,
    "gst": _gst,
    "pylon": _pylon,
    "genicam": _gentl,
    "aravis": _aravis,
    "rtsp": _stream,
    "rtsps": _stream,
    "http": _stream,
    "https": _stream,
}
"""What checks a URI of each scheme; it takes the whole URI."""
