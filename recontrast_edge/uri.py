"""Options of source and output URIs, checked by name.

options = parse_options("output 'video:a.mp4?fps=30'", "fps=30", known=("fps",))  # {"fps": "30"}
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection

from recontrast_edge.errors import UsageError

# `int` refuses very long numbers with an error of its own.
_WHOLE = re.compile("[0-9]{1,20}")


def parse_options(what: str, query: str, known: Collection[str]) -> dict[str, str]:
    """Split ``key=value&key=value``.

    Args:
        what: the URI and what it stands for, for messages.
        query: what follows the question mark, without it.
        known: keys there are.

    Raises:
        UsageError: an item that is no ``key=value``, a key twice, or an unknown key (the nearest known one is named).
    """
    options: dict[str, str] = {}
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not equals or not value or key in options:
            raise UsageError(f"{what}: expected each option once, as key=value, got {item!r}")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
            raise UsageError(f"{what}: unknown option {key!r}; {hint}")
        options[key] = value
    return options


def number_option(what: str, key: str, text: str, *, low: float, high: float) -> float:
    """A number within a range.

    Raises:
        UsageError: not a number, or outside of ``low..high``.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise UsageError(f"{what}: {key} must be a number from {low:g} to {high:g}, got {text!r}")
    return value


def whole_option(what: str, key: str, text: str, *, low: int, high: int) -> int:
    """A whole number within a range.

    Raises:
        UsageError: not a whole number, or outside of ``low..high``.
    """
    if not _WHOLE.fullmatch(text) or not low <= int(text) <= high:
        raise UsageError(f"{what}: {key} must be a whole number from {low} to {high}, got {text!r}")
    return int(text)


def size_option(what: str, key: str, text: str) -> tuple[int, int]:
    """``WIDTHxHEIGHT`` in pixels.

    Raises:
        UsageError: of another form.
    """
    width, _, height = text.lower().partition("x")
    if not (_WHOLE.fullmatch(width) and _WHOLE.fullmatch(height)):
        raise UsageError(f"{what}: {key} must be WIDTHxHEIGHT in pixels, e.g. 256x256, got {text!r}")
    return int(width), int(height)


_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^:@\[\]\s]+)(?::([0-9]{1,5}))?")


def host_port(what: str, text: str, *, default_port: int) -> tuple[str, int]:
    """``HOST[:PORT]``, an IPv6 address in brackets; returns it without these.

    Raises:
        UsageError: of another form, or a port outside of 1..65535.
    """
    match = _HOST_PORT.fullmatch(text)
    port = default_port if match is None or match[2] is None else int(match[2])
    if match is None or not 1 <= port <= 65535:
        raise UsageError(f"{what}: expected HOST or HOST:PORT with a port from 1 to 65535, got {text!r}")
    host = match[1].strip("[]")
    try:
        # As the resolver will, on a thread where nobody expects an error.
        host.encode("idna")
    except UnicodeError as error:
        raise UsageError(f"{what}: {host!r} cannot be a host's name ({error})") from None
    return host, port
