"""Annotated frames beside their heat maps, as a video.

    VideoSink(Path("annotated.mp4"), engine.spec.input, fps=30.0).write(judgement)

One judgement is one picture at a constant rate, so that the video has as many pictures as there are records. H.264
where PyAV was built with it, MPEG-4 otherwise. The file appears under its name when it is closed, and not before. When
the disk is full, the video is completed with what it has, and once there is room it goes on in ``annotated-2.mp4``.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av

from recontrast_edge.errors import OutputError
from recontrast_edge.frame import Judgement
from recontrast_edge.images import atomic_write
from recontrast_edge.render import annotate, panel_size
from recontrast_edge.sinks.outage import Outage
from recontrast_edge.spec import InputSpec

CONTAINERS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov", ".avi": "avi"}
"""File suffix -> FFmpeg's name of the container."""

FPS_RANGE = (1.0, 240.0)

RESERVE_BYTES = 2 << 20
"""Kept free for the end of a video, which holds an index of all its pictures."""

# Fast presets: the encoder shares the cores with the engine.
_ENCODERS = {
    "libx264": {"preset": "veryfast", "crf": "22"},
    "libopenh264": {},
    "mpeg4": {"qscale": "4"},
}


class VideoSink:
    """Writes one video; the first judgement fixes the size, later images of another one are letterboxed.

    ``counters``: ``segments`` completed, and pictures ``lost``.

    Raises:
        OutputError: nothing can be written there.
    """

    def __init__(self, path: Path, input_spec: InputSpec, *, fps: float) -> None:
        self.uri = f"video:{path}"
        self.counters = {"segments": 0}
        self._outage = Outage(self.uri, "pictures", self.counters)
        self._path = path
        self._input_spec = input_spec
        self._fps = Fraction(fps).limit_denominator(1001)
        self._panel_wh: tuple[int, int] | None = None
        self._segment: _Segment | None = None
        self._closed = False
        # Now, while somebody is there to read that it cannot be written.
        with suppress(_Empty), atomic_write(path):
            raise _Empty

    def write(self, judgement: Judgement) -> None:
        """See ``Sink.write``."""
        if self._outage.holds():
            return
        if self._panel_wh is None:
            self._panel_wh = panel_size(judgement.frame.image)
        picture = annotate(judgement, self._input_spec, self._panel_wh)
        try:
            if self._segment is None:
                self._segment = _Segment(self._free_path(), (picture.shape[1], picture.shape[0]), self._fps)
            self._segment.write(picture)
        except (OSError, OutputError, av.FFmpegError) as error:
            self._abandon(error, unwritten=1)
            return
        full = self._segment.full
        if full is None:
            self._outage.end()
        else:
            self._complete()
            self._outage.begin(full, lost=0)

    def _free_path(self) -> Path:
        """Where the next segment goes; the first replaces an older video of the same name."""
        if not self.counters["segments"]:
            return self._path
        number = self.counters["segments"] + 1
        while (path := self._path.with_stem(f"{self._path.stem}-{number}")).exists():
            number += 1
        return path

    def _complete(self) -> None:
        if self._segment is None:
            return
        try:
            self._segment.close()
        except (OSError, OutputError, av.FFmpegError) as error:
            self._abandon(error)
        else:
            self._segment = None
            self.counters["segments"] += 1

    def _abandon(self, error: Exception, *, unwritten: int = 0) -> None:
        """What cannot be completed is removed, and its pictures are lost."""
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.abandon()
            unwritten += segment.pictures
        cause = error if isinstance(error, (OSError, OutputError)) else OSError(str(error))
        self._outage.begin(cause, lost=unwritten)

    def close(self) -> None:
        """Complete the video and give it its name; without a single judgement there is none.

        Raises:
            OutputError: pictures were lost.
        """
        if self._closed:
            return
        self._closed = True
        self._complete()
        self._outage.check()


class _Empty(Exception):  # noqa: N818 - no error: there is nothing to keep
    """Thrown into ``atomic_write`` so that it leaves no file."""


class _Segment:
    """A video file being written.

    Attributes:
        pictures: in it so far.
    """

    def __init__(self, path: Path, size_wh: tuple[int, int], fps: Fraction) -> None:
        self.pictures = 0
        self._stack = ExitStack()
        file = self._stack.enter_context(atomic_write(path))
        try:
            self._file = self._stack.enter_context(_ReservedFile(file, path))
            self._container: Any = av.open(self._file, "w", format=CONTAINERS[path.suffix.lower()])
            encoder = next(name for name in _ENCODERS if name in av.codecs_available)
            stream: Any = self._container.add_stream(encoder, rate=fps, options=_ENCODERS[encoder])
            self._stream = stream
            self._stream.width, self._stream.height = size_wh
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.thread_count = 1
        except BaseException:
            self.abandon()
            raise

    @property
    def full(self) -> OSError | None:
        """Why nothing more should be written; what has been is safe."""
        return self._file.full

    def write(self, picture: Any) -> None:
        """Add a picture, (height, width, 3) BGR uint8."""
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")))
        self.pictures += 1

    def close(self) -> None:
        """Complete the file and give it its name."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._stack.close()

    def abandon(self) -> None:
        """Remove the file."""
        container = getattr(self, "_container", None)
        if container is not None:
            with suppress(OSError, av.FFmpegError):
                container.close()
        with suppress(_Empty):
            self._stack.__exit__(_Empty, _Empty(), None)


class _ReservedFile:
    """A file that has some room left when the disk is full: what FFmpeg is told to write is written all the same.

    Attributes:
        full: the error that the disk gave, from then on.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.full: OSError | None = None
        # Without a buffer, which could hold back what a full disk refuses.
        self._file: Any = getattr(file, "raw", file)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".reserve")
        self._reserve = Path(name)
        try:
            os.posix_fallocate(handle, 0, RESERVE_BYTES)
        except BaseException:
            self._reserve.unlink()
            raise
        finally:
            os.close(handle)

    def __enter__(self) -> _ReservedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._reserve.unlink(missing_ok=True)

    def write(self, data: Any) -> int:
        """All of it, with the reserve if need be."""
        view = memoryview(data)
        done = 0
        while done < len(view):
            try:
                done += self._file.write(view[done:])
            except OSError as error:
                if self.full is not None:
                    raise
                self.full = error
                self._reserve.unlink(missing_ok=True)
        return done

    def seek(self, offset: int, whence: int = 0) -> int:
        """See ``io.IOBase.seek``."""
        position: int = self._file.seek(offset, whence)
        return position

    def tell(self) -> int:
        """See ``io.IOBase.tell``."""
        position: int = self._file.tell()
        return position
