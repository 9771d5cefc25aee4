"""The procedural line as a source: a camera over parts whose truth is known, or a line camera over an endless web.

frame = SyntheticSource("synthetic://brushed-metal?defect_rate=0.1&fps=30").read(timeout_s=1.0)
"""

from __future__ import annotations

import math
import threading
import time

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.errors import UsageError
from recontrast_edge.frame import EndOfStream, Frame, Truth
from recontrast_edge.preprocess import Image
from recontrast_edge.synthetic import MAX_SEED, MAX_SIDE, MIN_SIDE, SyntheticLine
from recontrast_edge.uri import number_option, parse_options, size_option, whole_option

MAX_FPS = 1000.0
MAX_FRAMES = 10**9
MAX_LINE_RATE_HZ = 1e6
MAX_BLOCK_LINES = 1024

PIECE_LINES = 512
"""A web is made of parts of so many lines, at most one defect in each ..."""

SEAM_LINES = 128
"""... and each fades into the next one over so many."""


class SyntheticSource:
    """Parts of a ``SyntheticLine``.

    With ``fps`` > 0 it behaves as a camera: parts pass at that rate from the first ``read`` on, whoever comes late gets
    the newest, and the ids tell how many were missed. With ``fps=0`` nothing passes unread.

    Args:
        uri: ``synthetic://PRODUCT?defect_rate=0.1&seed=0&fps=30&size=256x256&frames=N``; the values shown are the
            defaults, and without ``frames`` it never ends.

    Raises:
        UsageError: unknown product or option, or a value out of range.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        what = f"source {uri!r}"
        product, _, query = uri.removeprefix("synthetic:").removeprefix("//").partition("?")
        options = parse_options(what, query, ("defect_rate", "seed", "fps", "size", "frames"))
        self._fps = number_option(what, "fps", options.get("fps", "30"), low=0.0, high=MAX_FPS)
        self._frames = whole_option(what, "frames", options.get("frames", str(MAX_FRAMES)), low=1, high=MAX_FRAMES)
        self._line = SyntheticLine(
            product,
            seed=whole_option(what, "seed", options.get("seed", "0"), low=0, high=MAX_SEED),
            size_wh=size_option(what, "size", options.get("size", "256x256")),
            defect_rate=number_option(what, "defect_rate", options.get("defect_rate", "0.1"), low=0.0, high=1.0),
        )
        self.live = self._fps > 0
        self._next = 0
        self._start_s: float | None = None
        self._closed = threading.Event()

    def read(self, timeout_s: float) -> Frame | None:
        """See ``Source.read``."""
        if self._closed.is_set() or self._next >= self._frames:
            raise EndOfStream
        if self.live and not self._wait(timeout_s):
            return None
        frame_id = self._next
        self._next += 1
        part = self._line.part(frame_id)
        return Frame(frame_id, self.uri, part.image, time.monotonic(), truth=part.truth, truth_mask=part.mask)

    def _wait(self, timeout_s: float) -> bool:
        """Until the next part is there; skips those that have passed."""
        now_s = time.monotonic()
        if self._start_s is None:
            self._start_s = now_s
        wait_s = self._start_s + self._next / self._fps - now_s
        if wait_s > 0:
            if self._closed.wait(min(wait_s, timeout_s)):
                raise EndOfStream
            if wait_s > timeout_s:
                return False
            now_s = time.monotonic()
        newest = math.floor((now_s - self._start_s) * self._fps)
        self._next = min(max(self._next, newest), self._frames - 1)
        return True

    def close(self) -> None:
        """See ``Source.close``."""
        self._closed.set()


class SyntheticWebSource:
    """An endless web of brushed metal with known defects, in blocks of lines, as a line camera delivers it.

    With ``line_rate`` > 0 lines pass at that rate from the first ``read`` on. A reader that is late finds them waiting,
    as in a driver with memory enough: none is lost. The web depends on seed, width and defect rate alone.

    Args:
        uri: ``synthetic-web://brushed-metal?width=256&block=16&line_rate=0&defect_rate=0.1&seed=0&total=N``; the values
            shown are the defaults. ``block``: lines of a block; ``line_rate``: lines a second, 0 is as fast as they are
            read; ``defect_rate``: defects per 512 lines; ``total``: lines of the whole web, without it there is no end.

    Raises:
        UsageError: unknown product or option, or a value out of range.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        what = f"source {uri!r}"
        product, _, query = uri.removeprefix("synthetic-web:").removeprefix("//").partition("?")
        # The threads of a weave would not meet at the seams.
        if product != "brushed-metal":
            raise UsageError(f"{what}: expected synthetic-web://brushed-metal, got {product!r}")
        options = parse_options(what, query, ("width", "block", "line_rate", "defect_rate", "seed", "total"))
        width = whole_option(what, "width", options.get("width", "256"), low=MIN_SIDE, high=MAX_SIDE)
        self._block = whole_option(what, "block", options.get("block", "16"), low=1, high=MAX_BLOCK_LINES)
        self._rate_hz = number_option(what, "line_rate", options.get("line_rate", "0"), low=0.0, high=MAX_LINE_RATE_HZ)
        self._total = whole_option(what, "total", options.get("total", str(MAX_FRAMES)), low=1, high=MAX_FRAMES)
        self._line = SyntheticLine(
            product,
            seed=whole_option(what, "seed", options.get("seed", "0"), low=0, high=MAX_SEED),
            size_wh=(width, PIECE_LINES + SEAM_LINES),
            defect_rate=number_option(what, "defect_rate", options.get("defect_rate", "0.1"), low=0.0, high=1.0),
        )
        self.live = self._rate_hz > 0
        self._next_id = 0
        self._next_line = 0
        self._pieces = 0
        self._seam: tuple[Image, NDArray[np.bool_]] | None = None
        self._image = np.empty((0, width, 3), np.uint8)
        """Lines that are rendered and not yet read, after those that are."""
        self._mask = np.empty((0, width), np.bool_)
        self._row = 0
        self._start_s: float | None = None
        self._closed = threading.Event()

    def read(self, timeout_s: float) -> Frame | None:
        """See ``Source.read``; the last block may be shorter."""
        if self._closed.is_set() or self._next_line >= self._total:
            raise EndOfStream
        count = min(self._block, self._total - self._next_line)
        if self.live and not self._wait(count, timeout_s):
            return None
        while len(self._image) - self._row < count:
            self._render()
        rows = slice(self._row, self._row + count)
        image, mask = self._image[rows], self._mask[rows]
        frame_id = self._next_id
        self._next_id += 1
        self._row += count
        self._next_line += count
        truth: Truth = "defect" if mask.any() else "good"
        return Frame(frame_id, self.uri, image, time.monotonic(), truth=truth, truth_mask=mask)

    def _wait(self, lines: int, timeout_s: float) -> bool:
        """Until the next lines have passed."""
        now_s = time.monotonic()
        if self._start_s is None:
            self._start_s = now_s
        wait_s = self._start_s + (self._next_line + lines) / self._rate_hz - now_s
        if wait_s > 0 and self._closed.wait(min(wait_s, timeout_s)):
            raise EndOfStream
        return wait_s <= timeout_s

    def _render(self) -> None:
        """The next piece of web, after what is left of the one before."""
        part = self._line.part(self._pieces)
        self._pieces += 1
        image, mask = part.image[:PIECE_LINES].copy(), part.mask[:PIECE_LINES].copy()
        if self._seam is not None:
            weight = ((np.arange(SEAM_LINES, dtype=np.uint32) * 256) // SEAM_LINES)[:, None, None]
            faded = self._seam[0] * (256 - weight) + image[:SEAM_LINES] * weight
            image[:SEAM_LINES] = faded // 256
            mask[:SEAM_LINES] |= self._seam[1]
        self._seam = part.image[PIECE_LINES:], part.mask[PIECE_LINES:]
        self._image = np.concatenate([self._image[self._row :], image])
        self._mask = np.concatenate([self._mask[self._row :], mask])
        self._row = 0

    def close(self) -> None:
        """See ``Source.close``."""
        self._closed.set()
