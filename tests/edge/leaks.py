"""What a process holds: memory, file descriptors, threads.

assert_reopening_leaves_nothing(lambda: open_source(uri).close(), times=10)
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MAX_GROWTH_BYTES = 5 * 2**20
SETTLE_S = 5.0


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def held() -> tuple[int, int]:
    """File descriptors and threads of this process, those of native libraries included."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))  # noqa: PTH208 - only the number


def assert_reopening_leaves_nothing(use: Callable[[], None], *, times: int) -> None:
    """``use`` opens, uses and closes; libraries may keep what the first uses needed."""
    for _ in range(3):
        use()
    gc.collect()
    before_bytes, before = rss_bytes(), held()
    for _ in range(times):
        use()
    gc.collect()
    give_up_s = time.monotonic() + SETTLE_S
    while any(now > then for now, then in zip(held(), before, strict=True)) and time.monotonic() < give_up_s:
        time.sleep(0.05)
    after = held()
    assert all(now <= then for now, then in zip(after, before, strict=True)), f"(fds, threads): {before} -> {after}"
    growth_mb = (rss_bytes() - before_bytes) / 2**20
    assert rss_bytes() - before_bytes < MAX_GROWTH_BYTES, f"grew by {growth_mb:.1f} MB in {times} uses"
