"""How much worse a model in reduced precision may be, as people write it.

budget = Budget.parse("verdict_flips<=0.5%,delta_i_auroc<=0.003,delta_aupro<=0.01")
for violation in budget.violations(proof): print(violation)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal

from recontrast_edge.errors import UsageError
from recontrast_edge.proof import Proof

Relation = Literal["<=", ">="]


@dataclass(frozen=True)
class _Metric:
    relation: Relation
    value: Callable[[Proof], float | None]


METRICS: dict[str, _Metric] = {
    "verdict_flips": _Metric("<=", lambda proof: proof.verdict_flips.count / proof.verdict_flips.of),
    "clear_flips": _Metric("<=", lambda proof: proof.clear_flips / proof.verdict_flips.of),
    "delta_i_auroc": _Metric("<=", lambda proof: proof.delta_i_auroc),
    "delta_aupro": _Metric("<=", lambda proof: proof.delta_aupro),
    "map_correlation": _Metric(">=", lambda proof: proof.map_correlation),
    "map_error": _Metric("<=", lambda proof: proof.map_error),
    "map_error_p999": _Metric("<=", lambda proof: proof.map_error_p999),
    "score_shift": _Metric("<=", lambda proof: abs(proof.score_shift)),
    "rank_correlation": _Metric(">=", lambda proof: proof.rank_correlation),
}
"""What can be limited, by its name in ``proof.Proof``; flips as shares of all images, the shift without its sign."""

_TERM = re.compile(r"(?P<name>\w+)\s*(?P<relation><=|>=|<|>|==?)\s*(?P<number>[^\s%]+)\s*(?P<percent>%?)")


@dataclass(frozen=True)
class Budget:
    """Limits, by metric.

    Attributes:
        limits: upper or lower bound of each metric that is limited, as ``METRICS`` has it.
    """

    limits: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``NAME<=NUMBER`` or ``NAME>=NUMBER``, separated by commas; a number may end in %.

        Raises:
            UsageError: nothing there, an unknown or repeated name, the wrong relation, or no number.
        """
        limits: dict[str, float] = {}
        for part in text.split(","):
            term = _TERM.fullmatch(part.strip())
            if term is None:
                raise UsageError(f"--budget: {part.strip()!r}: expected NAME<=NUMBER, such as verdict_flips<=0.5%")
            name, relation = term["name"], term["relation"]
            if name not in METRICS:
                raise UsageError(f"--budget: {name!r} is unknown; expected one of {', '.join(METRICS)}")
            if relation != METRICS[name].relation:
                raise UsageError(f"--budget: expected {name}{METRICS[name].relation}..., got {part.strip()!r}")
            if name in limits:
                raise UsageError(f"--budget: {name} is given twice")
            limits[name] = _number(term["number"], part, percent=bool(term["percent"]))
        return cls(limits)

    def __str__(self) -> str:
        return ",".join(f"{name}{METRICS[name].relation}{limit:.12g}" for name, limit in self.limits.items())

    def violations(self, proof: Proof) -> list[str]:
        """What is over the budget, one phrase each; a limit on something that is undefined cannot be kept."""
        found = []
        for name, limit in self.limits.items():
            metric = METRICS[name]
            value = metric.value(proof)
            if value is None:
                found.append(f"{name} is undefined on these images (leave it out of the budget)")
            elif not self.allows(name, value):
                found.append(f"{name} is {value:.7g}, expected {metric.relation} {limit:g}")
        return found

    def allows(self, name: str, value: float) -> bool:
        """Whether a value of one of ``METRICS`` is within its limit; NaN is not, and what has no limit always is."""
        if name not in self.limits:
            return True
        limit = self.limits[name]
        return value <= limit if METRICS[name].relation == "<=" else value >= limit


def _number(text: str, part: str, *, percent: bool) -> float:
    try:
        # Decimal, so that 99.9 % is the same number as 0.999.
        value = float(Decimal(text) / (100 if percent else 1))
    except InvalidOperation:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"--budget: {part.strip()!r}: expected a number >= 0 after the relation, got {text!r}")
    return value
