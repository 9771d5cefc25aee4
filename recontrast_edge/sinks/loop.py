"""An asyncio loop on a thread of its own, for outputs whose library wants one.

loop = LoopThread("opcua"); loop.run(server.start(), timeout_s=30.0); loop.close()
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from recontrast_edge.bounded import join, wait_until

_log = logging.getLogger(__name__)

T = TypeVar("T")


class LoopThread:
    """Runs coroutines until it is closed."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, T], *, timeout_s: float) -> T:
        """Wait for a coroutine's result.

        Raises:
            TimeoutError: there is none in time; the coroutine is cancelled.
        """
        future = self._start(coroutine)
        if not wait_until(future.done, time.monotonic() + timeout_s):
            future.cancel()
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        return future.result()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Let a coroutine run until its end, or until ``close``."""
        self._start(coroutine).add_done_callback(_say)

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            raise

    def post(self, callback: Callable[[], object]) -> None:
        """Call a function in the loop, soon; in order."""
        self._loop.call_soon_threadsafe(callback)

    def close(self) -> None:
        """Cancel what runs, end the thread. May be called again."""
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        join(self._thread, time.monotonic() + 2.0)


def _say(future: Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        _log.error("a defect in an output: %s: %s", type(error).__name__, error)
