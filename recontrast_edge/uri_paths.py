"""Paths inside the URIs of sources and outputs: made absolute, and kept under the folders that a line may change.

    uri = anchored_output("jsonl:records.jsonl", Path("/etc/line"))  # "jsonl:/etc/line/records.jsonl"
    confine("output", uri, output_path(uri), [Path("/etc/line")])

Confinement keeps a configuration that somebody else has written, or mistyped, from changing files elsewhere: links and
``..`` are followed first. It is checked whenever something is opened, so it is no wall against whoever may change links
inside these folders at that very moment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

from recontrast_edge.errors import UsageError
from recontrast_edge.secrets import masked_uri

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):")

_FILE_OUTPUTS = frozenset({"jsonl", "video", "images"})
_TLS_FILES = ("ca", "cert", "key")


def anchored_path(text: str, folder: Path) -> str:
    """A path, from a folder on if it is relative."""
    return os.path.join(folder, text)  # noqa: PTH118 - a pathlib.Path would rewrite what follows a question mark


def anchored_source(uri: str, folder: Path) -> str:
    """A source's URI with absolute paths; ``gst:`` pipelines stay as they are.

    Raises:
        UsageError: the folder's name cannot stand in a URI.
    """
    scheme = _scheme(uri)
    if scheme is None:
        return anchored_path(uri, folder)
    rest = uri.removeprefix(f"{scheme}:")
    if scheme == "gst" or not rest:
        return uri
    if scheme in ("list", "watch"):
        return f"{scheme}:{_joined(rest, folder)}"
    if scheme == "genicam":
        place, question_mark, query = rest.partition("?")
        file, number_sign, name = place.partition("#")
        # A bare name may also be that of a file in one of the makers' folders.
        if file and ("/" in unquote(file) or (folder / unquote(file)).is_file()):
            file = quote(anchored_path(unquote(file), folder))
        return f"{scheme}:{file}{number_sign}{name}{question_mark}{query}"
    return _with_anchored_options(uri, folder, ("ca_file",))


def anchored_output(uri: str, folder: Path) -> str:
    """An output's URI with absolute paths.

    Raises:
        UsageError: the folder's name cannot stand in a URI.
    """
    scheme = _scheme(uri)
    if scheme not in _FILE_OUTPUTS:
        return _with_anchored_options(uri, folder, _TLS_FILES)
    rest = uri.removeprefix(f"{scheme}:")
    return uri if rest.partition("?")[0] in ("", "-") else f"{scheme}:{_joined(rest, folder)}"


def _scheme(uri: str) -> str | None:
    match = _SCHEME.match(uri)
    return None if match is None else match[1]


def _joined(rest: str, folder: Path) -> str:
    if "?" in str(folder) and not os.path.isabs(rest):  # noqa: PTH117 - as above
        raise UsageError(f"{folder}: a folder with a question mark in its name cannot stand in a URI; use another one")
    return anchored_path(rest, folder)


def _with_anchored_options(uri: str, folder: Path, names: Collection[str]) -> str:
    head, question_mark, query = uri.partition("?")
    items = [_anchored_option(item, folder, names) for item in query.split("&")]
    return f"{head}{question_mark}{'&'.join(items)}"


def _anchored_option(item: str, folder: Path, names: Collection[str]) -> str:
    key, _, value = item.partition("=")
    kind = ""
    if key == "credentials" and value.startswith("file:"):
        kind, value = "file:", value.removeprefix("file:")
    elif key not in names:
        return item
    if not value or os.path.isabs(unquote(value)):  # noqa: PTH117 - as above
        return item
    return f"{key}={kind}{quote(anchored_path(unquote(value), folder))}"


def output_path(uri: str) -> Path | None:
    """The file or folder that an output writes; None for one without."""
    scheme = _scheme(uri)
    target = uri.removeprefix(f"{scheme}:").partition("?")[0]
    return Path(target) if scheme in _FILE_OUTPUTS and target not in ("", "-") else None


def changed_folder(uri: str) -> Path | None:
    """The folder out of which a source moves or deletes files; None for one that only reads."""
    if _scheme(uri) != "watch":
        return None
    name, _, query = uri.removeprefix("watch:").partition("?")
    keeps = all(item == "after=keep" for item in query.split("&") if item.partition("=")[0] == "after")
    return None if keeps else Path(name)


def confine(what: str, path: Path | None, roots: Sequence[str | Path]) -> None:
    """Refuse a path outside of all of these folders, links and ``..`` followed; None is nowhere, and well.

    Args:
        what: what wants to change it, for the message.

    Raises:
        UsageError: it lies elsewhere.
    """
    if path is None:
        return
    real = _real(what, path)
    if not any(real.is_relative_to(_real(what, Path(root))) for root in roots):
        leads = "" if real == Path(os.path.abspath(path)) else f" (leads to {real})"  # noqa: PTH100 - follows no links
        raise UsageError(
            f"{masked_uri(what)}: {path}{leads} lies outside of {', '.join(map(str, roots))}; choose a place under it, "
            "or allow another folder (`roots` in the file, or --root)"
        )


def _real(what: str, path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        # Links in a circle; a NUL.
        raise UsageError(f"{masked_uri(what)}: {str(path)!r} leads nowhere ({error})") from None
