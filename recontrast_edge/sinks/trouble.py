"""Say once that a peer cannot be reached, and once that it can again, however often it is tried.

trouble = Trouble(logging.getLogger(__name__), "mqtt://broker:1883/line", well="connected")
trouble.say("cannot connect (timed out); trying again")
trouble.say(None)
"""

from __future__ import annotations

import logging

from recontrast_edge.secrets import mask


class Trouble:
    """What a peer's trouble is now.

    Args:
        log: of the output.
        uri: of the output, credentials masked.
        well: what is said when the trouble is over.
    """

    def __init__(self, log: logging.Logger, uri: str, *, well: str) -> None:
        self._log, self._uri, self._well = log, uri, well
        self._kind: str | None = None

    def say(self, trouble: str | None) -> None:
        """Log a change: another trouble, by its words before the first colon, or none."""
        kind = None if trouble is None else trouble.partition(":")[0]
        if kind == self._kind:
            return
        self._kind = kind
        if trouble is None:
            self._log.info("%s: %s", self._uri, self._well)
        else:
            self._log.warning("%s: %s", self._uri, mask(trouble))
