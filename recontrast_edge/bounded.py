"""Waiting for what may never come: a driver that hangs must not keep the line from stopping.

    if not call_bounded(source.close, timeout_s=1.0, name="close rtsp://camera"): ...

Nobody can end a thread that hangs in a driver or a library. It is left behind and listed by ``left_behind``, and the
command line then ends the process without waiting for it.

Waiting here is polling with ``time.sleep``: before Python 3.11 a lock's timeout is measured on the wall clock, so that
setting the clock back by an hour would make it last an hour longer.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

POLL_S = 0.01

_left: list[threading.Thread] = []


class LeftBehindError(Exception):
    """What was called has not returned, and nobody waits for it any more; the message names it."""


def wait_until(condition: Callable[[], bool], until_s: float) -> bool:
    """Wait for a condition until a moment on ``time.monotonic()``'s clock; returns whether it holds."""
    while not condition():
        remaining_s = until_s - time.monotonic()
        if remaining_s <= 0:
            return False
        time.sleep(min(POLL_S, remaining_s))
    return True


def join(thread: threading.Thread, until_s: float) -> bool:
    """Wait for a thread to end; one that does not is left behind, and the answer is False."""
    if wait_until(lambda: not thread.is_alive(), until_s):
        return True
    leave(thread)
    return False


def leave(thread: threading.Thread) -> None:
    """Wait no longer for a thread, ever."""
    _log.warning("%s does not answer and is left behind", thread.name)
    _left[:] = [known for known in _left if known.is_alive()] + [thread]


def call_bounded(function: Callable[[], object], *, timeout_s: float, name: str) -> bool:
    """Call on a thread of its own and wait; False: it has not returned in time, and was left behind.

    What it raises is logged: this is for closing things, when nothing can be done about them any more.
    """

    def call() -> None:
        try:
            function()
        except Exception as error:
            _log.warning("%s: %s", name, error)

    thread = threading.Thread(target=call, name=name, daemon=True)
    thread.start()
    return join(thread, time.monotonic() + timeout_s)


def call_apart(function: Callable[[], Result], *, name: str, wanted: Callable[[], bool] = lambda: True) -> Result:
    """Call on a thread of its own and wait, so that a signal is heard while a library is at work, or hangs.

    Args:
        wanted: asked again and again. When it says no, or a signal's handler raises, the thread is left behind.

    Raises:
        LeftBehindError: it was not wanted any more.
        Exception: whatever the function raised.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, name=name, daemon=True)
    thread.start()
    try:
        wait_until(lambda: not (thread.is_alive() and wanted()), math.inf)
    finally:
        if thread.is_alive():
            leave(thread)
    if errors:
        raise as_exception(errors[0])
    if not results:
        raise LeftBehindError(name)
    return results[0]


def as_exception(error: BaseException) -> Exception:
    """What ended a thread, as another one can raise it.

    Libraries also end a thread with what is no ``Exception``: SystemExit, or the panic of one that is written in Rust.
    """
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")


def left_behind() -> list[str]:
    """Names of the threads that were left behind and still have not returned."""
    return [thread.name for thread in _left if thread.is_alive()]
