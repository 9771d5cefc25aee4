"""Passwords: where they come from, and that nobody sees them.

    user, password = credentials("mqtt://broker.local/line1?credentials=env:MQTT_LOGIN")

A URI carries a password in its userinfo (``scheme://user:password@host``, special characters percent-encoded), or names
where it is: ``?credentials=env:NAME`` or ``?credentials=file:PATH`` (mode 0600), each holding ``user:password``. Every
password that was read is registered, and ``mask`` hides it in whatever people or files see.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import stat
import threading
import traceback
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from recontrast_edge.errors import InputError, UsageError

HIDDEN = "***"

_SECRET_BYTES = 4096
"""Longer files hold something else."""


class Credentials(NamedTuple):
    """Who asks, and what proves it; the representation hides the latter."""

    user: str
    password: str

    def __repr__(self) -> str:
        return f"Credentials(user={self.user!r}, password={HIDDEN!r})"


def credentials(uri: str) -> Credentials | None:
    """The user and password that a URI carries or names, registered for ``mask``; None where it has none.

    Raises:
        UsageError: given twice, of another form, or an environment variable that is not set.
        InputError: a file that is missing, unreadable, or readable by others than its owner.
    """
    check_userinfo(uri)
    userinfo, _, query = _split(uri)
    named = [item.partition("=")[2] for item in query.split("&") if item.partition("=")[0] == "credentials"]
    if len(named) + (userinfo is not None) > 1:
        raise UsageError(f"{masked_uri(uri)}: credentials are given twice; keep one of them")
    if userinfo is not None:
        given_user, _, given_password = userinfo.partition(":")
        register(given_password)
        return _registered(unquote(given_user), unquote(given_password))
    if not named:
        return None
    kind, _, place = named[0].partition(":")
    if kind == "env" and place:
        text = os.environ.get(place)
        if text is None:
            raise UsageError(f"{masked_uri(uri)}: the environment variable {place} is not set; expected user:password")
    elif kind == "file" and place:
        text = _read_private(Path(unquote(place)))
    else:
        # What stands here may be the password itself.
        register(named[0])
        raise UsageError(f"{masked_uri(uri)}: expected credentials=env:NAME or credentials=file:PATH")
    user, colon, password = text.partition(":")
    if not colon or not password or "\n" in password:
        register(text)
        raise UsageError(f"{masked_uri(uri)}: expected user:password, in one line, in {kind}:{place}")
    return _registered(user, password)


def check_userinfo(uri: str) -> None:
    """Refuse a URI whose password would be taken for something else, and so be shown.

    Raises:
        UsageError: an unencoded ``/``, ``?`` or ``#`` in front of an ``@``.
    """
    _, separator, rest = uri.partition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if separator and "@" not in authority and ":" in authority and "@" in _may_hold_userinfo(rest, authority):
        raise UsageError(
            f"{masked_uri(uri)}: percent-encode special characters of user and password (/ is %2F, ? is %3F, # is %23, "
            "@ is %40), and an @ elsewhere"
        )


def _registered(user: str, password: str) -> Credentials:
    register(password)
    if password:
        # As HTTP and RTSP send them.
        register(base64.b64encode(f"{user}:{password}".encode()).decode())
    return Credentials(user, password)


def _read_private(path: Path) -> str:
    try:
        # The checks hold for the very file that is read, even if the path leads to another one a moment later; a FIFO
        # must not make us wait.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path}: expected a file with user:password")
            if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                mode = stat.S_IMODE(status.st_mode)
                raise InputError(f"{path}: others than its owner have access (mode {mode:04o}); run: chmod 600 {path}")
            data = file.read(_SECRET_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot read the credentials ({error.strerror or error})") from None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected user:password as UTF-8 text") from None
    if len(data) > _SECRET_BYTES:
        raise InputError(f"{path}: expected user:password in one line, got more than {_SECRET_BYTES} bytes")
    return text.removesuffix("\n").removesuffix("\r")


def bare_uri(uri: str) -> str:
    """The URI without userinfo and without its ``credentials`` option, for libraries that take these apart."""
    userinfo, rest, query = _split(uri)
    if userinfo is not None:
        scheme, _, _ = uri.partition("://")
        rest = f"{scheme}://{rest}"
    kept = "&".join(item for item in query.split("&") if item.partition("=")[0] != "credentials")
    return f"{rest}?{kept}" if kept else rest


def _split(uri: str) -> tuple[str | None, str, str]:
    """Userinfo (None without), what is left before the question mark (without scheme if there is userinfo), query."""
    _, separator, rest = uri.partition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    userinfo, at, _ = authority.rpartition("@")
    if separator and at:
        before, _, query = rest[len(userinfo) + 1 :].partition("?")
        return userinfo, before, query
    before, _, query = uri.partition("?")
    return None, before, query


# What must not be seen.

_lock = threading.Lock()
_secrets: set[str] = set()
_pattern: re.Pattern[str] | None = None


def register(secret: str) -> None:
    """From now on ``mask`` hides this text."""
    global _pattern
    if not secret:
        return
    with _lock:
        _secrets.add(secret)
        longest_first = sorted(_secrets, key=len, reverse=True)
        _pattern = re.compile("|".join("".join(map(_spellings, known)) for known in longest_first))


def register_uri(text: str) -> None:
    """From now on ``mask`` hides the passwords of a URI, wherever they end up and whatever becomes of the rest.

    Args:
        text: the URI, or anything else.
    """
    for item in text.partition("?")[2].split("&"):
        name, _, value = item.partition("=")
        if _SECRET_NAME.fullmatch(name):
            register(value)
            register(unquote(value))
    _, separator, rest = text.rpartition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    userinfo, at, _ = _may_hold_userinfo(rest, authority).rpartition("@")
    if separator and at:
        password = userinfo.partition(":")[2]
        register(password)
        register(unquote(password))


def _spellings(character: str) -> str:
    """A pattern for the ways in which a character is written: as it is, percent-encoded, in JSON, in ``repr``."""
    ways = {character, repr(character)[1:-1], ascii(character)[1:-1], json.dumps(character)[1:-1], f"\\{character}"}
    encoded = "".join(f"%{byte:02x}" for byte in character.encode(errors="surrogatepass"))
    plus = r"|\+" if character == " " else ""
    escaped = "|".join(map(re.escape, sorted(ways, key=len, reverse=True)))
    # Encoded comes first: of a % at the end, %25 would leave the 25.
    return f"(?:(?i:{encoded}){plus}|{escaped})"


_URL = re.compile(r"""(?<=://)[^\s'"<>]*""")
_HOST_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.%]*\]|[^:@\[\]]*)(?::[0-9]{0,5})?")
_SECRET_NAME = re.compile(
    r"(?i:[\w-]*(?:pas(?:s(?:word|wd|phrase)?)?|pwd|user-pw|secret|token|api[_-]?key|sig(?:nature)?))"
)
_NAMED_SECRET = re.compile(rf"""(\b{_SECRET_NAME.pattern}\s*=\s*)("[^"]*"|'[^']*'|[^\s&;,"']+)""")


def mask(text: str) -> str:
    """The text with ``***`` for every registered secret, for userinfo in URLs, and for ``password=...`` and the like.

    Secrets are found as they are, percent-encoded, and escaped as in JSON and ``repr``.
    """
    if _pattern is not None:
        text = _pattern.sub(HIDDEN, text)
    return _NAMED_SECRET.sub(rf"\1{HIDDEN}", _URL.sub(lambda found: _hide_userinfo(found[0]), text))


def masked_uri(uri: str) -> str:
    """A URI as people may see it; unlike ``mask`` it takes all of the text for one URI, white space included."""
    scheme, separator, rest = uri.rpartition("://")
    return mask(f"{scheme}{separator}{_hide_userinfo(rest)}" if separator else uri)


def _hide_userinfo(rest: str) -> str:
    """``rest`` is a URL without its ``scheme://``. Where it is not well-formed, rather too much is hidden."""
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    userinfo, at, _ = _may_hold_userinfo(rest, authority).rpartition("@")
    if not at:
        return rest
    user, colon, _ = userinfo.partition(":")
    return f"{user}:{HIDDEN}@{rest[len(userinfo) + 1 :]}" if colon else f"{HIDDEN}@{rest[len(userinfo) + 1 :]}"


def _may_hold_userinfo(rest: str, authority: str) -> str:
    """The part of a URL whose last ``@`` may end a password; with a well-formed authority its query does not count."""
    return rest.partition("?")[0] if _HOST_PORT.fullmatch(authority) else rest


class _MaskedRecord(logging.LogRecord):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.msg, self.args = mask(self.getMessage()), None
        if self.exc_info:
            # A formatter takes this text instead of making its own.
            self.exc_text = mask("".join(traceback.format_exception(*self.exc_info)).rstrip())


def mask_logs() -> None:
    """Mask every record of Python's logging from now on, tracebacks included: those of libraries, too."""
    logging.setLogRecordFactory(_MaskedRecord)
