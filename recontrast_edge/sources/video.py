"""Video files as frames, through PyAV: as fast as they are read, or at their own pace as a camera would.

frame = video_opener(Path("belt.mp4"), "pace=realtime&loop=forever")().read(timeout_s=1.0)
"""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recontrast_edge.errors import SourceError, UsageError
from recontrast_edge.frame import EndOfStream, Frame, Source
from recontrast_edge.uri import parse_options, whole_option
from recontrast_edge.verdict import Fault

if TYPE_CHECKING:
    from av.container import InputContainer

SLACK_FRAMES = 1.5
"""Frame periods by which a video may end before the time its container promised: times are rounded."""


def video_opener(path: Path, query: str) -> Callable[[], Source]:
    """Check the options of a video file and return what opens it.

    That raises SourceError where it is no video, has no video stream, or is damaged at its head.

    Args:
        path: the file.
        query: ``pace=realtime`` (frames come at the video's own rate, and whoever comes late gets the newest),
            ``loop=N`` (play it N times) or ``loop=forever``.

    Raises:
        UsageError: a bad option.
    """
    what = f"source {f'{path}?{query}'!r}"
    options = parse_options(what, query, ("pace", "loop"))
    if options.get("pace", "realtime") != "realtime":
        raise UsageError(
            f"{what}: pace must be realtime, got {options['pace']!r}; leave it out to read as fast as can be"
        )
    loop = options.get("loop", "1")
    times = None if loop == "forever" else whole_option(what, "loop", loop, low=1, high=10**9)
    paced = "pace" in options

    def open_video() -> Source:
        source: Source = VideoSource(path) if times == 1 else LoopedVideo(path, times)
        return PacedSource(source) if paced else source

    return open_video


class VideoSource:
    """A video file, frame by frame, BGR.

    A video that breaks off delivers every frame that can be decoded and then raises ``SourceError``. It is noticed by
    the container's error, by a last packet that is cut off, and by an end before the one that the container promises:
    a number of frames in AVI, a time elsewhere. Cuts that cannot be seen: at a packet's border where nothing is
    promised or the promise was derived from the shortened file (MPEG-TS, raw streams, a recording that was never
    completed), and the loss of no more than the last frame or, where frames are stored out of order, the last few.

    A damaged frame becomes a frame without image, for a FAULT. What a decoder repairs without a word is not noticed.

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
            container = av.open(f"file:{path}", metadata_errors="ignore", options={"protocol_whitelist": "file"})
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise SourceError(f"{path}: not a video that can be read ({_reason(error)})") from None
        # FFmpeg draws any text file as a terminal's screen.
        if not container.streams.video or container.format.name == "tty":
            container.close()
            raise SourceError(f"{path}: not a video: it holds no video stream")
        stream = container.streams.video[0]
        # Decoding several frames at once would lose whole ones beside a damaged one.
        stream.thread_type = "SLICE"
        self._container = container
        self._promise = _Promise.of(container, stream)
        self._packets = 0
        self._end_s: float | None = None
        self._cut_off = False
        self._frames = self._decode(container, stream)

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
            time_ns = None if picture.pts is None else round(picture.pts * picture.time_base * 10**9)
            return Frame(frame_id, self.uri, image, time.monotonic(), camera_time_ns=time_ns)

    def _decode(self, container: InputContainer, stream: Any) -> Iterator[Any]:
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
                # The decoder still holds frames.
                broken, packet = error, None
            if packet is not None and packet.size:
                self._packets += 1
                self._cut_off = packet.is_corrupt
                if packet.pts is not None:
                    end_s = float((packet.pts + (packet.duration or 0)) * stream.time_base)
                    self._end_s = max(end_s, self._end_s or end_s)
            try:
                yield from stream.codec_context.decode(packet)
            except av.error.EOFError:
                pass
            except av.error.FFmpegError:
                yield None
            if broken is not None:
                raise broken

    def _check_complete(self) -> None:
        promise = self._promise
        if self._next == 0:
            raise SourceError(self._broken("no frame can be decoded"))
        if self._cut_off:
            raise SourceError(self._broken("its last frame is cut off"))
        if promise.packets and self._packets < promise.packets:
            raise SourceError(self._broken("the file ends early"))
        if promise.end_s and self._end_s is not None and self._end_s < promise.end_s - promise.slack_s:
            reason = f"the file ends at {self._end_s:.2f} s of {promise.end_s:.2f} s"
            raise SourceError(self._broken(reason))

    def _broken(self, reason: str) -> str:
        promised = f" of {self._promise.frames}" if self._promise.frames else ""
        return f"{self._path}: the video breaks off after {self._next}{promised} frames ({reason}); copy it again"

    def close(self) -> None:
        """See ``Source.close``."""
        with self._lock:
            container, self._container = self._container, None
        if container is not None:
            container.close()


class LoopedVideo:
    """A video file, again and again; ids and times go on rising.

    Args:
        path: the file.
        times: how often; None is for ever.

    Raises:
        SourceError: as ``VideoSource``.
    """

    live = False

    def __init__(self, path: Path, times: int | None) -> None:
        self.uri = str(path)
        self._path = path
        self._left = times
        self._lock = threading.Lock()
        self._closed = False
        self._video = VideoSource(path)
        self._first_id = self._next_id = 0
        self._first_ns = self._last_ns = 0
        self._period_ns = 0

    def read(self, timeout_s: float) -> Frame | None:
        """See ``Source.read``; never times out."""
        try:
            frame = self._video.read(timeout_s)
        except EndOfStream:
            self._rewind()
            frame = self._video.read(timeout_s)
        assert frame is not None
        frame_id = self._first_id + frame.frame_id
        self._next_id = frame_id + 1
        time_ns = None
        if frame.camera_time_ns is not None:
            time_ns = self._first_ns + frame.camera_time_ns
            if frame.frame_id:
                self._period_ns = time_ns - self._last_ns
            self._last_ns = time_ns
        return dataclasses.replace(frame, frame_id=frame_id, camera_time_ns=time_ns)

    def _rewind(self) -> None:
        with self._lock:
            self._left = None if self._left is None else self._left - 1
            if self._closed or self._left == 0:
                raise EndOfStream
            self._video.close()
            self._video = VideoSource(self._path)
            self._first_id = self._next_id
            self._first_ns = self._last_ns + self._period_ns

    def close(self) -> None:
        """See ``Source.close``."""
        with self._lock:
            self._closed = True
            self._video.close()


class PacedSource:
    """A recording that behaves as the camera did: each frame comes in its time, and none waits for anybody.

    Args:
        source: with ``camera_time_ns`` on its frames; one without comes right after the one before.
    """

    live = True

    def __init__(self, source: Source) -> None:
        self.uri = source.uri
        self._source = source
        self._closed = threading.Event()
        self._ahead: Frame | None = None
        self._due_s = 0.0
        self._zero_s: float | None = None
        """When the recording's time 0 was, on ``time.monotonic()``'s clock."""
        self._outcome: Exception | None = None

    def read(self, timeout_s: float) -> Frame | None:
        """See ``Source.read``."""
        give_up_s = time.monotonic() + timeout_s
        newest: Frame | None = None
        while True:
            if self._closed.is_set():
                raise EndOfStream
            if self._ahead is None and not self._look_ahead():
                if newest is None:
                    assert self._outcome is not None
                    raise self._outcome
                return newest
            now_s = time.monotonic()
            wait_s = self._due_s - now_s
            if wait_s <= 0:
                newest, self._ahead = self._ahead, None
            # Where decoding is slower than the recording, the newest will never be there.
            if newest is not None and (wait_s > 0 or now_s > give_up_s):
                return newest
            if wait_s > 0:
                self._closed.wait(min(wait_s, give_up_s - now_s))
                if self._due_s > give_up_s:
                    return None

    def _look_ahead(self) -> bool:
        """Decode the next frame and learn when it is due; False at the end."""
        if self._outcome is None:
            try:
                frame = self._source.read(0.0)
            except (EndOfStream, SourceError) as outcome:
                self._outcome = outcome
            else:
                assert frame is not None
                if frame.camera_time_ns is not None:
                    time_s = frame.camera_time_ns / 1e9
                    if self._zero_s is None:
                        self._zero_s = time.monotonic() - time_s
                    self._due_s = self._zero_s + time_s
                self._ahead = dataclasses.replace(frame, captured_s=self._due_s or frame.captured_s)
        return self._ahead is not None

    def close(self) -> None:
        """See ``Source.close``."""
        self._closed.set()
        self._source.close()


@dataclass(frozen=True)
class _Promise:
    """What a container tells of the video's end before it has been read; 0 where it tells nothing."""

    packets: int
    """Exact number."""
    end_s: float
    """When the last frame's time is over, on the frames' clock, in seconds."""
    slack_s: float
    frames: str
    """For people."""

    @classmethod
    def of(cls, container: InputContainer, stream: Any) -> _Promise:
        rate_hz = float(stream.average_rate or 0)
        end_s = _promised_end_s(container, stream)
        # AVI estimates its duration from the file's size, but counts. Elsewhere an edit list may hide counted packets.
        packets = stream.frames if container.format.name == "avi" else 0
        slack_s = SLACK_FRAMES / rate_hz if rate_hz else 0.1
        frames = str(stream.frames or "")
        if not frames and end_s and rate_hz:
            start_s = float((stream.start_time or 0) * stream.time_base)
            frames = f"about {round((end_s - start_s) * rate_hz)}"
        return cls(packets, 0.0 if packets else end_s, slack_s, frames)


def _promised_end_s(container: InputContainer, stream: Any) -> float:
    if stream.duration:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    # Matroska has no duration of a stream but in this tag, which its common writers set.
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""), re.ASCII)
    if tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    # Another stream may go on for longer.
    alone = len(container.streams) == 1
    return container.duration / 1e6 if alone and container.duration else 0.0


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0]
