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
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

from recontrast_edge.errors import UsageError
from recontrast_edge.secrets import masked_uri

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):")

_GST_TOKEN = re.compile(
    r"""(?P<key>[A-Za-z][\w-]*)\s*=\s*(?P<value>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|(?:\\.|[^\s\\])+)"""
    r"""|(?P<element>[A-Za-z][\w-]*)|\S"""
)
"""As GStreamer's parser sees a pipeline, as far as it matters here."""

_FILE_OUTPUTS = frozenset({"jsonl", "video", "images"})
_TLS_FILES = ("ca", "cert", "key")


def anchored_path(text: str, folder: Path) -> str:
    """A path, from a folder on if it is relative."""
    return os.path.join(folder, text)  # noqa: PTH118 - a pathlib.Path would rewrite what follows a question mark


def anchored_source(uri: str, folder: Path) -> str:
    """A source's URI with absolute paths.

    Raises:
        UsageError: the folder's name cannot stand in a URI.
    """
    scheme = _scheme(uri)
    if scheme is None:
        return anchored_path(uri, folder)
    rest = uri.removeprefix(f"{scheme}:")
    if not rest:
        return uri
    if scheme == "gst":
        return f"{scheme}:{_anchored_pipeline(rest, folder)}"
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


def _anchored_pipeline(pipeline: str, folder: Path) -> str:
    text, end = "", 0
    for _, path, (start, next_end) in _locations(pipeline):
        if "://" not in path and not os.path.isabs(path):  # noqa: PTH117 - as above
            escaped = re.sub(r'(["\\])', r"\\\1", anchored_path(path, folder))
            text, end = f'{text}{pipeline[end:start]}"{escaped}"', next_end
    return text + pipeline[end:]


def _locations(pipeline: str) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """What the elements of a GStreamer pipeline read and write: element, path or URL, and where it stands.

    These are the properties that are called ``location`` or end so.
    """
    element = ""
    for token in _GST_TOKEN.finditer(pipeline):
        element = token["element"] or element
        if token["key"] and token["key"].split("-")[-1] == "location":
            value = token["value"]
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
            yield element, re.sub(r"\\(.)", r"\1", value[1:-1] if quoted else value), token.span("value")


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


def changed_paths(uri: str) -> list[Path]:
    """What a source changes: the folder out of which it moves or deletes files, or files that its pipeline writes."""
    scheme = _scheme(uri)
    if scheme == "watch":
        name, _, query = uri.removeprefix("watch:").partition("?")
        keeps = all(item == "after=keep" for item in query.split("&") if item.partition("=")[0] == "after")
        return [] if keeps else [Path(name)]
    if scheme != "gst":
        return []
    # Elements that only read are called filesrc, multifilesrc, splitmuxsrc and so on.
    written = [path for element, path, _ in _locations(uri.removeprefix("gst:")) if not element.endswith("src")]
    local = [unquote(path.removeprefix("file://")) if path.startswith("file://") else path for path in written]
    return [Path(path) for path in local if "://" not in path]


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
