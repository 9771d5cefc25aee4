"""What the studies of accuracy share: how they end, and how they show a figure over several seeds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from recontrast_edge.errors import RecontrastError
from recontrast_edge.images import atomic_write
from recontrast_train.fit import TrainingStoppedError


def percent_and_spread(shares: Sequence[float | None]) -> str:
    """Mean in per cent, with the standard deviation where there are several; ``-`` where nothing is known."""
    known = [100 * share for share in shares if share is not None]
    if not known:
        return "-"
    deviation = f" ± {np.std(known, ddof=1):.1f}" if len(known) > 1 else ""
    return f"{np.mean(known):.1f}{deviation}"


def publish(table: str, path: Path) -> None:
    """Write a table and print it."""
    with atomic_write(path) as file:
        file.write(table.encode())
    print(table, end="")


def exit_code(work: Callable[[], None]) -> int:
    """Run a study; errors and Ctrl-C are told as the command line tells them."""
    try:
        work()
    except RecontrastError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except TrainingStoppedError as stopped:
        print(f"{stopped}; the same command goes on", file=sys.stderr)
        return stopped.exit_code
    return 0
