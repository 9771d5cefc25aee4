"""What outputs send, and which judgements they take.

if judgement.verdict in verdicts_option(what, "which", "not_pass"): send(message(judgement.record()))
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from recontrast_edge.errors import MissingError, UsageError
from recontrast_edge.frame import VerdictName

VERDICTS: dict[str, frozenset[VerdictName]] = {
    "all": frozenset({"PASS", "REJECT", "FAULT"}),
    "not_pass": frozenset({"REJECT", "FAULT"}),
    "rejects": frozenset({"REJECT"}),
    "faults": frozenset({"FAULT"}),
}
"""Values of ``which=``: the verdicts that an output takes."""

GATE_VERDICTS: dict[str, frozenset[VerdictName]] = {"not_pass": VERDICTS["not_pass"], "reject": VERDICTS["rejects"]}
"""Values of ``on=``: the verdicts that move a gate."""


def choice_option(what: str, key: str, text: str, known: Collection[str]) -> str:
    """One of the known values.

    Raises:
        UsageError: another one.
    """
    if text not in known:
        raise UsageError(f"{what}: {key} must be one of {', '.join(known)}, got {text!r}")
    return text


def message(record: dict[str, Any]) -> bytes:
    """A record as it goes over the network: JSON in UTF-8, without NaN."""
    return json.dumps(record, allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode()


def missing(what: str, error: ImportError, extra: str) -> MissingError:
    """The error about a library that an output needs."""
    return MissingError(f"{what} needs {error.name}, which is not installed: pip install 'recontrast-edge[{extra}]'")
