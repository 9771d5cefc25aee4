"""Annotated frames beside their heat maps, as a video.

    VideoSink(Path("annotated.mp4"), engine.spec.input, fps=30.0).write(judgement)

One judgement is one picture at a constant rate, so that the video has as many pictures as there are records. H.264
where PyAV was built with it, MPEG-4 otherwise. The file appears under its name when it is closed, and not before.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from recontrast_edge.frame import Judgement
from recontrast_edge.images import atomic_write
from recontrast_edge.render import GAP, STRIP_HEIGHT, annotate, panel_size
from recontrast_edge.spec import InputSpec

CONTAINERS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov", ".avi": "avi"}
"""File suffix -> FFmpeg's name of the container."""

FPS_RANGE = (1.0, 240.0)

# Fast presets: the encoder shares the cores with the engine.
_ENCODERS = {
    "libx264": {"preset": "veryfast", "crf": "22"},
    "libopenh264": {},
    "mpeg4": {"qscale": "4"},
}


class _Empty(Exception):  # noqa: N818 - no error: there is nothing to keep
    """Thrown into ``atomic_write`` so that it leaves no file."""


class VideoSink:
    """Writes one video; the first judgement fixes the size, later images of another one are letterboxed.

    Raises:
        OutputError: nothing can be written there.
    """

    def __init__(self, path: Path, input_spec: InputSpec, *, fps: float) -> None:
        self.uri = f"video:{path}"
        self._path = path
        self._input_spec = input_spec
        self._fps = Fraction(fps).limit_denominator(1001)
        self._panel_wh: tuple[int, int] | None = None
        self._container: Any = None
        self._stream: Any = None
        self._stack = ExitStack()
        self._stack.enter_context(suppress(_Empty))
        self._file = self._stack.enter_context(atomic_write(path))

    def write(self, judgement: Judgement) -> None:
        """See ``Sink.write``."""
        try:
            if self._panel_wh is None:
                self._panel_wh = panel_size(judgement.frame.image)
                self._open(self._panel_wh)
            picture = annotate(judgement, self._input_spec, self._panel_wh)
            self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")))
        except (OSError, av.FFmpegError) as error:
            self._abandon(error)

    def _open(self, panel_wh: tuple[int, int]) -> None:
        self._container = av.open(self._file, "w", format=CONTAINERS[self._path.suffix.lower()])
        encoder = next(name for name in _ENCODERS if name in av.codecs_available)
        self._stream = self._container.add_stream(encoder, rate=self._fps, options=_ENCODERS[encoder])
        self._stream.width = 2 * panel_wh[0] + GAP
        self._stream.height = panel_wh[1] + STRIP_HEIGHT
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.thread_count = 1

    def close(self) -> None:
        """Complete the video and give it its name; without a single judgement there is none."""
        if self._panel_wh is None:
            self._stack.__exit__(_Empty, _Empty(), None)
        elif self._container is not None:
            try:
                self._container.mux(self._stream.encode(None))
                self._container.close()
            except (OSError, av.FFmpegError) as error:
                self._abandon(error)
            self._container = None
            self._stack.close()

    def _abandon(self, error: Exception) -> None:
        """Remove the unfinished file; raises the OutputError that ``atomic_write`` makes of the cause."""
        cause = error if isinstance(error, OSError) else OSError(str(error))
        container, self._container = self._container, None
        if container is not None:
            with suppress(OSError, av.FFmpegError):
                container.close()
        self._stack.__exit__(OSError, cause, None)
