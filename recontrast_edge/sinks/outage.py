"""A disk that is full, or away: the line goes on, somebody is told, and writing resumes by itself.

outage = Outage("jsonl:records.jsonl", "records", counters)
if not outage.holds(): ...  # write; on OSError: outage.begin(error)
"""

from __future__ import annotations

import logging
import time

from recontrast_edge.errors import OutputError

_log = logging.getLogger(__name__)

RETRY_S = 0.5
"""While it lasts, one write in so many seconds is tried; the others cost nothing and are lost."""


class Outage:
    """Counts what one output loses, in ``counters["lost"]``, and says when that begins and ends.

    Args:
        uri: of the output.
        things: what gets lost, for people.
        counters: of the output.
    """

    def __init__(self, uri: str, things: str, counters: dict[str, int]) -> None:
        self.lost = 0
        """Since this outage began."""
        self.reason: str | None = None
        """None: there is none."""
        self._uri = uri
        self._things = things
        self._counters = counters
        self._retry_at_s = 0.0
        counters["lost"] = 0

    def holds(self) -> bool:
        """Whether it is too early to try again; what was to be written is then counted as lost."""
        if self.reason is None or time.monotonic() >= self._retry_at_s:
            return False
        self.add(1)
        return True

    def begin(self, error: OSError | OutputError, *, lost: int = 1) -> None:
        """A write failed, the first or one that was tried again."""
        reason = getattr(error, "strerror", None) or str(error)
        if self.reason is None:
            _log.error("%s: cannot write (%s); %s are lost until there is room", self._uri, reason, self._things)
        self.reason = reason
        self._retry_at_s = time.monotonic() + RETRY_S
        self.add(lost)

    def add(self, lost: int) -> None:
        """Count more that is lost."""
        self.lost += lost
        self._counters["lost"] += lost

    def end(self) -> None:
        """A write succeeded; call it after every one."""
        if self.reason is not None:
            _log.warning("%s: writing again; %d %s were lost", self._uri, self.lost, self._things)
            self.reason = None
            self.lost = 0

    def check(self) -> None:
        """At the end of the output.

        Raises:
            OutputError: something was lost.
        """
        lost = self._counters["lost"]
        if lost:
            reason = f"cannot write ({self.reason})" if self.reason else "could not write for a while"
            raise OutputError(f"{self._uri}: {reason}; {lost} {self._things} were lost")
