"""The procedural line as a source: a camera over parts whose truth is known.

frame = SyntheticSource("synthetic://brushed-metal?defect_rate=0.1&fps=30").read(timeout_s=1.0)
"""

from __future__ import annotations

import math
import threading
import time

from recontrast_edge.frame import EndOfStream, Frame
from recontrast_edge.synthetic import MAX_SEED, SyntheticLine
from recontrast_edge.uri import number_option, parse_options, size_option, whole_option

MAX_FPS = 1000.0
MAX_FRAMES = 10**9


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
