"""Tell systemd how the service is doing (``Type=notify``), and print the unit that asks for it.

    python -m recontrast_edge.systemd > recontrast-edge@.service

The protocol is one datagram for each message (sd_notify(3)), too little for a dependency. Without systemd, which the
environment tells, every call does nothing.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import time
from collections.abc import Mapping
from importlib.resources import files

_log = logging.getLogger(__name__)

UNIT_NAME = "recontrast-edge@.service"


class Notifier:
    """Messages to the service manager that started this process.

    Args:
        environment: with ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` as systemd sets them.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._socket: socket.socket | None = None
        self._address = environment.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            # A manager that does not read must not stop the line.
            self._socket.setblocking(False)
        self._watchdog_s = _watchdog_s(environment)
        self._alive_s = -math.inf
        self._status: str | None = None

    @property
    def patience_s(self) -> float:
        """What has not moved for so long must not be called alive: half of the watchdog's time, in seconds."""
        return math.inf if self._watchdog_s is None else self._watchdog_s / 2

    def ready(self) -> None:
        """The service does its work now."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``; only a change is sent."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={' '.join(text.split())}")

    def alive(self) -> None:
        """Feed the watchdog; may be called as often as one likes."""
        now_s = time.monotonic()
        if self._watchdog_s is not None and now_s - self._alive_s >= self._watchdog_s / 4:
            self._alive_s = now_s
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The service is about to end."""
        self._send("STOPPING=1")

    def close(self) -> None:
        """Release the socket; may be called again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(message.encode(), self._address)
        except OSError as error:
            _log.debug("systemd does not listen: %s", error)


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    text, process = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        return None
    # The variables are inherited by children, for whom they are not meant.
    return int(text) / 1e6 if process in ("", str(os.getpid())) else None


def unit(command: str) -> str:
    """The unit template, for a ``recontrast-edge`` that is started with this command."""
    return (files("recontrast_edge") / UNIT_NAME).read_text(encoding="utf-8").replace("@COMMAND@", command)


if __name__ == "__main__":
    print(unit(f"{sys.executable} -m recontrast_edge"), end="")
