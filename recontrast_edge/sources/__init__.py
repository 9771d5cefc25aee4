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
from pathlib import Path
from urllib.parse import unquote

from recontrast_edge.errors import InputError, UsageError
from recontrast_edge.frame import Source
from recontrast_edge.images import IMAGE_SUFFIXES
from recontrast_edge.secrets import credentials, masked_uri
from recontrast_edge.uri import parse_options


def open_source(uri: str) -> Source:
    """Open a source.

    Args:
        uri: a path, or ``scheme:...``. What exists as a file or folder is one, whatever its name. With the option
            ``lines`` its images are blocks of lines, and become tiles of a web (``recontrast_edge.linescan``).

    Raises:
        UsageError: unknown scheme or option, or a value out of range.
        InputError: a missing, empty or broken image or folder.
        SourceError: a video that cannot be opened.
    """
    # Looked for before the module is loaded, which most sources can do without.
    if "lines=" in uri and not _exists(Path(uri)):
        from recontrast_edge.linescan import line_options, open_line_source

        if line_options(uri) is not None:
            return open_line_source(uri, _open_frames)
    return _open_frames(uri)


def check_source(uri: str) -> None:
    """Check what can be checked while nothing is opened: scheme, path, options of line scan, credentials.

    Raises:
        UsageError, InputError: as ``open_source`` would.
    """
    scheme = _SCHEME.match(uri)
    if scheme is None or (scheme[1] not in _SCHEMES and _exists(Path(uri))):
        if not (_VIDEO_DEVICE.match(uri) or _exists(Path(uri)) or _exists(Path(uri.partition("?")[0]))):
            raise _no_such(uri.partition("?")[0])
        return
    if scheme[1] not in _SCHEMES:
        raise _unknown_scheme(uri, scheme[1])
    if "lines=" in uri:
        from recontrast_edge.linescan import line_options

        line_options(uri)
    credentials(uri)


def _open_frames(uri: str) -> Source:
    scheme = _SCHEME.match(uri)
    if scheme and scheme[1] in _SCHEMES:
        return _SCHEMES[scheme[1]](uri)
    if scheme and not _exists(Path(uri)):
        raise _unknown_scheme(uri, scheme[1])
    return _open_path(uri)


def _unknown_scheme(uri: str, scheme: str) -> UsageError:
    known = ", ".join(f"{name}:..." for name in _SCHEMES)
    return UsageError(
        f"source {masked_uri(uri)!r}: unknown scheme {scheme!r}; expected an image, folder or video file, or {known}"
    )


def _no_such(name: str) -> InputError:
    return InputError(f"source {name!r}: no such file or folder")


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
    if _VIDEO_DEVICE.match(text):
        return _open_v4l2(text)
    name, query = text, ""
    if not _exists(Path(name)):
        name, _, query = text.partition("?")
    path = Path(name)
    if not name or not _exists(path):
        raise _no_such(name)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        from recontrast_edge.sources.files import open_images

        parse_options(f"source {text!r}", query, ())
        return open_images(path)
    from recontrast_edge.sources.video import open_video

    return open_video(path, query)


def _open_synthetic(uri: str) -> Source:
    from recontrast_edge.sources.synthetic import SyntheticSource

    return SyntheticSource(uri)


def _open_synthetic_web(uri: str) -> Source:
    from recontrast_edge.sources.synthetic import SyntheticWebSource

    return SyntheticWebSource(uri)


def _open_list(uri: str) -> Source:
    from recontrast_edge.sources.files import open_list

    return open_list(uri)


def _open_watch(uri: str) -> Source:
    from recontrast_edge.sources.watch import WatchSource

    return WatchSource(uri)


def _open_v4l2(uri: str) -> Source:
    from recontrast_edge.sources.v4l2 import open_camera

    return open_camera(uri)


def _open_csi(uri: str) -> Source:
    from recontrast_edge.sources.gstreamer import open_csi

    return open_csi(uri)


def _open_gst(uri: str) -> Source:
    from recontrast_edge.sources.gstreamer import open_pipeline

    return open_pipeline(uri)


def _open_pylon(uri: str) -> Source:
    from recontrast_edge.sources.pylon import open_pylon

    return open_pylon(uri)


def _open_gentl(uri: str) -> Source:
    from recontrast_edge.sources.gentl import open_gentl

    return open_gentl(uri)


def _open_aravis(uri: str) -> Source:
    from recontrast_edge.sources.aravis import open_aravis

    return open_aravis(uri)


def _open_stream(uri: str) -> Source:
    from recontrast_edge.sources.rtsp import open_stream

    return open_stream(uri)


_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):")
_VIDEO_DEVICE = re.compile(r"/dev/(video[0-9]+|v4l/by-(id|path)/[^?]+)(\?|$)")

_SCHEMES: dict[str, Callable[[str], Source]] = {
    "file": _open_file_uri,
    "synthetic": _open_synthetic,
    "synthetic-web": _open_synthetic_web,
    "list": _open_list,
    "watch": _open_watch,
    "usb": _open_v4l2,
    "csi": _open_csi,
    "gst": _open_gst,
    "pylon": _open_pylon,
    "genicam": _open_gentl,
    "aravis": _open_aravis,
    "rtsp": _open_stream,
    "rtsps": _open_stream,
    "http": _open_stream,
    "https": _open_stream,
}
"""What opens a URI of each scheme; it takes the whole URI."""
