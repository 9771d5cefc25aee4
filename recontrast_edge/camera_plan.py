"""What is said of a camera before it runs: what to open, what its parts are judged by, and what happens when it breaks.

plan = CameraPlan("usb:0", lambda: open_source("usb:0"), Product(engine, threshold), mode="live", gate_delay_s=0.4)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from recontrast_edge.errors import UsageError
from recontrast_edge.frame import Frame, Merger, Source
from recontrast_edge.health import Watch
from recontrast_edge.task import Product

Mode = Literal["live", "every"]


@dataclass(frozen=True)
class Retry:
    """What happens when a live source cannot be opened or breaks.

    Attributes:
        wait_for_source: wait for one that cannot be opened at the start, instead of ending with its error.
        max_reconnects: tries in a row that may fail; None: for ever.
        first_s, longest_s: the pause before the first try and the longest one, in seconds. It doubles each time, and
            each is shortened at random by up to a half, so that cameras that fell together do not come back together.
    """

    wait_for_source: bool = False
    max_reconnects: int | None = None
    first_s: float = 0.1
    longest_s: float = 1.0

    def __post_init__(self) -> None:
        if self.max_reconnects is not None and self.max_reconnects < 0:
            raise UsageError(f"max_reconnects: expected a whole number from 0, got {self.max_reconnects}")
        if not 0 < self.first_s <= self.longest_s < math.inf:
            raise UsageError(f"expected 0 < first_s <= longest_s, got {self.first_s} and {self.longest_s}")

    def pause_s(self, failures: int) -> float:
        """How long to wait after so many tries in a row have failed (1, 2, ...)."""
        longest_s = min(self.first_s * 2.0 ** min(failures - 1, 32), self.longest_s)
        return longest_s * random.uniform(0.5, 1.0)


@dataclass(frozen=True)
class CameraPlan:
    """One camera of a line.

    Attributes:
        uri: what it is called in messages until it is open, credentials masked.
        open_source: opens it, within a bounded time; see ``frame.Source``.
        product: what its parts are judged by; or several by name.
        product_of: with several: chooses the name when a frame is captured.
        name: tells it from other cameras; in every record.
        mode: None is what the source prefers: ``live`` for most live ones, ``every`` for any other.
        queue_frames: mode ``every`` of a live source: images that may wait; one more becomes a FAULT.
        gate_delay_s: from capture to the reject gate, in seconds; None: no gate, or the source knows.
        gate_reserve_s: how long before the gate a verdict must be there, for the output to act, in seconds.
        watch: what makes it one that cannot be trusted; None: nothing does.
        retry: what happens when it breaks.
        fault_period_s: while it delivers nothing, a FAULT is recorded at once and then every so many seconds.
        merger: makes one verdict of several, such as of a web's tiles.
    """

    uri: str
    open_source: Callable[[], Source]
    product: Product | Mapping[str, Product]
    product_of: Callable[[Frame], str | None] | None = None
    name: str | None = None
    mode: Mode | None = None
    queue_frames: int = 32
    gate_delay_s: float | None = None
    gate_reserve_s: float = 0.0
    watch: Watch | None = field(default_factory=Watch)
    retry: Retry = field(default_factory=Retry)
    fault_period_s: float = 1.0
    merger: Merger | None = None

    def __post_init__(self) -> None:
        what = f"camera {self.name or self.uri!r}"
        if not self.products:
            raise UsageError(f"{what}: expected at least one product")
        if isinstance(self.product, Mapping) and len(self.product) > 1 and self.product_of is None:
            raise UsageError(
                f"{what}: has {len(self.product)} products, but nothing chooses one: product_of is missing"
            )
        if self.mode not in (None, *get_args(Mode)):
            raise UsageError(f"{what}: mode must be live or every, got {self.mode!r}")
        for name, least in (("queue_frames", 1), ("gate_reserve_s", 0.0), ("gate_delay_s", 0.0)):
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise UsageError(f"{what}: {name} must be at least {least}, got {value}")
        if not 0 < self.fault_period_s < math.inf:
            raise UsageError(f"{what}: fault_period_s must be above 0, got {self.fault_period_s}")

    @property
    def products(self) -> dict[str | None, Product]:
        """By name; a single one has none."""
        if isinstance(self.product, Product):
            return {None: self.product}
        return {name: product for name, product in self.product.items()}

    def choose(self, frame: Frame) -> Product | None:
        """What a frame is judged by; None where its product is not known."""
        if isinstance(self.product, Product):
            return self.product
        if self.product_of is None:
            return next(iter(self.product.values()))
        name = self.product_of(frame)
        return None if name is None else self.product.get(name)
