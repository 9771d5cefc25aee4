"""What a process holds: memory, file descriptors, threads.

assert_reopening_leaves_nothing(lambda: open_source(uri).close(), times=10)
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

MAX_GROWTH_BYTES = 5 * 2**20
SETTLE_S = 5.0


def memory_bytes() -> int:
    """Resident memory of this process, without the pages of libraries, which the kernel drops and reads as it likes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def held() -> tuple[int, int]:
    """File descriptors and threads of this process, those of native libraries included."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))  # noqa: PTH208 - only the number


def assert_reopening_leaves_nothing(use: Callable[[], None], *, times: int) -> None:
    """``use`` opens, uses and closes. Libraries keep what the first uses needed, and heaps for some of the threads."""
    for _ in range(max(3, times // 3)):
        use()
    gc.collect()
    before_bytes, before = memory_bytes(), held()
    for _ in range(times):
        use()
    gc.collect()
    give_up_s = time.monotonic() + SETTLE_S
    while any(now > then for now, then in zip(held(), before, strict=True)) and time.monotonic() < give_up_s:
        time.sleep(0.05)
    after = held()
    assert all(now <= then for now, then in zip(after, before, strict=True)), f"(fds, threads): {before} -> {after}"
    growth_bytes = memory_bytes() - before_bytes
    assert growth_bytes < MAX_GROWTH_BYTES, f"grew by {growth_bytes / 2**20:.1f} MB in {times} uses"
