"""Video files as frames, through PyAV.

frame = VideoSource(Path("belt.mp4")).read(timeout_s=1.0)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recontrast_edge.errors import SourceError
from recontrast_edge.frame import EndOfStream, Frame
from recontrast_edge.verdict import Fault

if TYPE_CHECKING:
    from av.container import InputContainer

MISSING_FRAMES = 2
MISSING_SHARE = 0.02
"""A video may end with so many frames, or such a share of them, fewer than its container promised: durations are
rounded, and encoders drop the odd frame. More is a video that was cut off."""


class VideoSource:
    """A video file, frame by frame, BGR.

    A video that breaks off delivers every frame that can be decoded and then raises ``SourceError``. It is noticed by
    the container's error, or by fewer frames than its header promised (MP4, AVI: their number; Matroska: their
    duration). A cut cannot be seen where the header promises nothing: MPEG-TS, raw streams, and
    Matroska that was never completed. A damaged frame becomes a frame without image, for a FAULT.

    Raises:
        SourceError: not a video, no video stream in it, or damaged at its head.
    """

    live = False

    def __init__(self, path: Path) -> None:
        import av

        self.uri = str(path)
        self._path = path
        self._lock = threading.Lock()
        self._next = 0
        self._container: InputContainer | None = None
        try:
            # A playlist must not make us fetch what it names.
            container = av.open(str(path), metadata_errors="ignore", options={"protocol_whitelist": "file"})
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise SourceError(f"{path}: not a video that can be read ({_reason(error)})") from None
        # FFmpeg draws any text file as a terminal's screen.
        if not container.streams.video or container.format.name == "tty":
            container.close()
            raise SourceError(f"{path}: not a video: it holds no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        self._promised = _promised_frames(stream, container.duration)
        self._container = container
        self._frames = _decode(container, stream)

    def read(self, timeout_s: float) -> Frame | None:
        """See ``Source.read``; never times out."""
        import av

        # The decoder must not lose its container while it is at work.
        with self._lock:
            if self._container is None:
                raise EndOfStream
            try:
                picture = next(self._frames)
            except StopIteration:
                self._check_complete()
                raise EndOfStream from None
            except (av.error.FFmpegError, OSError, ValueError) as error:
                raise SourceError(self._broken(_reason(error))) from None
            frame_id = self._next
            self._next += 1
            if picture is None or picture.is_corrupt:
                code, detail = Fault.UNREADABLE_IMAGE.value, "the decoder reports a damaged frame"
                return Frame(frame_id, self.uri, None, time.monotonic(), fault=code, detail=detail)
            image = np.ascontiguousarray(picture.to_ndarray(format="bgr24"))
            return Frame(frame_id, self.uri, image, time.monotonic())

    def _check_complete(self) -> None:
        allowed = max(MISSING_FRAMES, MISSING_SHARE * self._promised)
        if self._next == 0 or self._next < self._promised - allowed:
            raise SourceError(self._broken("the file ends early"))

    def _broken(self, reason: str) -> str:
        promised = f" of {self._promised}" if self._promised else ""
        return f"{self._path}: the video breaks off after {self._next}{promised} frames ({reason}); copy it again"

    def close(self) -> None:
        """See ``Source.close``."""
        with self._lock:
            container, self._container = self._container, None
        if container is not None:
            container.close()


def _decode(container: InputContainer, stream: Any) -> Iterator[Any]:
    """All frames that can be had, None for a packet that cannot be decoded; then the container's error, if any."""
    import av

    broken: Exception | None = None
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (av.error.FFmpegError, OSError, ValueError) as error:
            # The decoder's threads still hold frames.
            broken, packet = error, None
        try:
            yield from stream.codec_context.decode(packet)
        except av.error.EOFError:
            return
        except av.error.FFmpegError:
            yield None
        if broken is not None:
            raise broken


def _promised_frames(stream: Any, duration_us: int | None) -> int:
    """Frames that the header tells of; 0 where it does not."""
    if stream.frames:
        return int(stream.frames)
    if duration_us and stream.average_rate:
        return int(duration_us / 1e6 * float(stream.average_rate))
    return 0


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0]
