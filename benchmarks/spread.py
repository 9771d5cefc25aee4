"""A figure over several seeds, as the tables of these programs show it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def percent_and_spread(shares: Sequence[float | None]) -> str:
    """Mean in per cent, with the standard deviation where there are several; ``-`` where nothing is known."""
    known = [100 * share for share in shares if share is not None]
    if not known:
        return "-"
    deviation = f" ± {np.std(known, ddof=1):.1f}" if len(known) > 1 else ""
    return f"{np.mean(known):.1f}{deviation}"
