"""Network streams through PyAV: RTSP, and MJPEG over HTTP.

    stream_opener("rtsp://admin@camera.local/stream1?credentials=env:CAMERA_LOGIN")().read(timeout_s=1.0)

The stream is read and decoded without pause on a thread of its own, so that whoever reads gets the newest picture and
not the end of a queue. Where decoding cannot keep up, pictures are skipped up to the next key frame, and counted.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np

from recontrast_edge.errors import InputError, SourceError, UsageError
from recontrast_edge.preprocess import Image
from recontrast_edge.secrets import bare_uri, credentials, masked_uri
from recontrast_edge.sources.threaded import Picture, Slot, ThreadedSource
from recontrast_edge.uri import number_option, parse_options

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

OPTIONS = ("transport", "timeout_s", "open_timeout_s", "ca_file", "tls_verify", "credentials")

CLOSE_ENOUGH = 0.85
"""Cameras have options of their own in their URLs. One that is so similar to one of ours is a typing error."""

BEHIND_AFTER_S = 0.5
"""Packets that never have to be waited for, for so long, are a queue that grows."""

NO_WAIT_S = 0.0005
"""A packet that takes longer to come than this was not there yet."""


def stream_opener(uri: str) -> Callable[[], ThreadedSource]:
    """Check the URI of a network stream and return what opens it.

    That raises UsageError where the camera refuses the user or the password, and SourceError where there is no camera,
    no such stream, or no video in it.

    Args:
        uri: ``rtsp``, ``rtsps``, ``http`` or ``https``, with these options among the camera's own:
            ``transport=tcp|udp`` (RTSP; default tcp), ``timeout_s`` (seconds without data that are an error; default
            1.5), ``open_timeout_s`` (default 3), ``ca_file=PATH`` and ``tls_verify=0`` (rtsps, https), ``credentials``.

    Raises:
        UsageError: a bad option.
        InputError: the credentials' file cannot be read.
    """
    shown = masked_uri(uri)
    what = f"source {shown!r}"
    scheme = uri.partition(":")[0]
    address, options = _split_options(what, bare_uri(uri), uri)
    login = credentials(uri)
    if not address.partition("://")[2].partition("/")[0]:
        raise UsageError(f"{what}: expected {scheme}://HOST/PATH")
    if login is not None:
        userinfo = f"{quote(login.user, safe='')}:{quote(login.password, safe='')}"
        address = address.replace("://", f"://{userinfo}@", 1)
    read_timeout_s = number_option(what, "timeout_s", options.get("timeout_s", "1.5"), low=0.1, high=300)
    open_timeout_s = number_option(what, "open_timeout_s", options.get("open_timeout_s", "3"), low=0.1, high=300)
    av_options = _av_options(what, scheme, options)
    run = partial(_run, shown, address, av_options, open_timeout_s, read_timeout_s)
    # FFmpeg bounds connecting, and then what it reads to learn about the stream; a resolver's wait it does not.
    return partial(ThreadedSource, uri, run, open_timeout_s=2 * open_timeout_s + 0.5)


def _split_options(what: str, bare: str, uri: str) -> tuple[str, dict[str, str]]:
    """The address with the camera's own options, and ours."""
    address, _, query = bare.partition("?")
    ours: list[str] = []
    theirs: list[str] = []
    for item in filter(None, query.split("&")):
        key = item.partition("=")[0]
        similar = difflib.get_close_matches(key, OPTIONS, 1, CLOSE_ENOUGH)
        (ours if similar else theirs).append(item)
    options = parse_options(what, "&".join(ours), OPTIONS)
    return (f"{address}?{'&'.join(theirs)}" if theirs else address), options


def _av_options(what: str, scheme: str, options: dict[str, str]) -> dict[str, str]:
    """FFmpeg's options: as little delay as it can give."""
    av_options = {"protocol_whitelist": "http,https,httpproxy,tcp,tls,crypto"}
    transport = options.get("transport", "tcp")
    if transport not in ("tcp", "udp"):
        raise UsageError(f"{what}: transport must be tcp or udp, got {transport!r}")
    if scheme.startswith("rtsp"):
        av_options["protocol_whitelist"] = "rtsp,rtsps,rtp,srtp,udp,tcp,tls"
        av_options["rtsp_transport"] = transport
        av_options["fflags"] = "nobuffer"
        av_options["allowed_media_types"] = "video"
        # The description of the stream says all that a decoder must know.
        av_options["probesize"] = "32"
    elif "transport" in options:
        raise UsageError(f"{what}: transport is for rtsp only")
    if options.get("tls_verify", "1") not in ("0", "1"):
        raise UsageError(f"{what}: tls_verify must be 0 or 1, got {options['tls_verify']!r}")
    if scheme in ("rtsps", "https"):
        av_options["tls_verify"] = options.get("tls_verify", "1")
        if "ca_file" in options:
            av_options["ca_file"] = _existing(what, unquote(options["ca_file"]))
    elif "ca_file" in options or "tls_verify" in options:
        raise UsageError(f"{what}: ca_file and tls_verify are for rtsps and https only")
    return av_options


def _existing(what: str, name: str) -> str:
    if not Path(name).is_file():
        raise UsageError(f"{what}: ca_file: no such file: {name!r}")
    return name


def _run(
    shown: str, address: str, options: dict[str, str], open_timeout_s: float, read_timeout_s: float, slot: Slot
) -> None:
    import av

    reason: str | None = None
    refused = connected = False
    asked_s = time.monotonic()
    try:
        with av.open(address, options=options, timeout=(open_timeout_s, read_timeout_s)) as container:
            if not container.streams.video:
                raise SourceError(f"{shown}: holds no video stream")
            slot.opened()
            connected = True
            _deliver(container, slot, open_timeout_s, read_timeout_s)
    except (av.error.HTTPUnauthorizedError, av.error.HTTPForbiddenError):
        refused = True
    except av.error.HTTPNotFoundError:
        reason = "no such stream; check the path"
    except (av.error.ExitError, _SilentError):
        reason = f"no data for {read_timeout_s:g} s" if connected else f"no answer within {open_timeout_s:g} s"
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        if connected:
            reason = f"the server ended the stream ({reason})"
        elif time.monotonic() - asked_s >= open_timeout_s:
            # FFmpeg takes no answer for a bad one.
            reason = f"no answer within {open_timeout_s:g} s"
        else:
            certificate = ", the camera's certificate (ca_file)" if shown.startswith(("rtsps", "https")) else ""
            reason = f"cannot be opened ({reason}); check the host's name, the port, the network{certificate}"
    if refused:
        raise UsageError(f"{shown}: the camera refuses the user or the password; give both with credentials=env:NAME")
    if reason is not None:
        raise SourceError(f"{shown}: {reason}")
    if not slot.closing:
        raise SourceError(f"{shown}: the server ended the stream")


class _SilentError(Exception):
    """No data in time."""


def _deliver(container: InputContainer, slot: Slot, open_timeout_s: float, read_timeout_s: float) -> None:
    """Decode until the end, or until nobody wants any more."""
    import av
    from av.codec.context import Flags

    stream: Any = container.streams.video[0]
    # Decoding several frames at once would hold each back until the next ones are there.
    stream.thread_type = "SLICE"
    decoder = stream.codec_context
    decoder.flags |= Flags.low_delay
    backlog = _Backlog()
    skipped = 0
    # A camera may take longer until its first picture than from one to the next.
    started, start_by_s = False, time.monotonic() + open_timeout_s
    packets = container.demux(stream)
    while not slot.closing:
        asked_s = time.monotonic()
        try:
            packet = next(packets, None)
        except av.error.ExitError:
            if started or time.monotonic() > start_by_s:
                raise
            packets = container.demux(stream)
            continue
        if packet is None:
            return
        arrived_s = time.monotonic()
        if arrived_s - asked_s >= read_timeout_s:
            # FFmpeg has given up waiting and hands out what it held back: a picture that is as old.
            if started or arrived_s > start_by_s:
                raise _SilentError
            continue
        started = True
        if not packet.size:
            continue
        if backlog.skip(arrived_s - asked_s, arrived_s, is_keyframe=packet.is_keyframe):
            skipped += 1
            continue
        try:
            frames = decoder.decode(packet)
        except av.error.FFmpegError as error:
            damage = f"the decoder reports damaged data ({error.strerror})"
            slot.put(Picture(_nothing, arrived_s, incomplete=damage, lost=skipped))
            skipped = 0
            continue
        for frame in frames:
            incomplete = "parts of the picture were lost on the way" if packet.is_corrupt or frame.is_corrupt else None
            time_ns = None if frame.pts is None else round(frame.pts * frame.time_base * 10**9)
            slot.put(Picture(partial(_bgr, frame), arrived_s, time_ns, incomplete, skipped))
            skipped = 0


class _Backlog:
    """Notices that packets come faster than they are decoded, without any clock of the camera's."""

    def __init__(self) -> None:
        self._waited_s: float | None = None
        self._skipping = False

    def skip(self, wait_s: float, now_s: float, *, is_keyframe: bool) -> bool:
        """Whether to drop a packet that had to be waited for so long."""
        if wait_s > NO_WAIT_S or self._waited_s is None:
            self._waited_s = now_s
        behind = now_s - self._waited_s > BEHIND_AFTER_S
        # What follows needs all that came since the last key frame.
        self._skipping = behind or (self._skipping and not is_keyframe)
        return self._skipping


def _bgr(frame: VideoFrame) -> Image:
    try:
        return np.ascontiguousarray(frame.to_ndarray(format="bgr24"))
    except ValueError as error:
        raise InputError(f"a picture in a format that cannot be converted ({error})") from None


def _nothing() -> Image:
    raise InputError("there is no picture")
