"""The configuration of a line: a TOML file, options of the command line, or both; checked as a whole.

    config = load_config(Path("line.toml"), {"mode": "every"}); print(config.dumps())

``python -m recontrast_edge.config`` prints the tables of ``docs/configuration.md`` from the models below.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from recontrast_edge.camera_plan import CameraPlan, Retry
from recontrast_edge.engines import DEMO
from recontrast_edge.errors import InputError, UsageError
from recontrast_edge.health import Watch
from recontrast_edge.secrets import HIDDEN, check_userinfo, masked_uri, register_uri
from recontrast_edge.uri_paths import anchored_output, anchored_path, anchored_source
from recontrast_edge.webmerge import open_merger

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 1 << 20
"""Larger files hold something else."""

CAMERA_NAME, PRODUCT_NAME = "camera", "product"
"""What the camera and the product of a command line without a file are called."""

SHOWN_CHARACTERS = 80
"""Of a wrong value, in a message."""

Location = tuple[str | int, ...]
"""Keys that lead to a value: ``("cameras", "top", "source")``, ``("outputs", 0)``."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
Text = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ProductConfig(_Section):
    """What parts are judged by. The name is free."""

    engine: Text = Field(description=f"model file (`.onnx`, `.plan`), or `{DEMO}` for the packaged one")
    threshold: float | None = Field(None, description="REJECT above this score. Without it: the model's own threshold")
    part_ids: Text | None = Field(
        None,
        description="regular expression for the whole part id, where a camera has several products. A part whose id "
        "matches none of them, or several, is a FAULT `unknown_product`",
    )


class CameraConfig(_Section):
    """A camera, or another source. The name is free; it is in every record where a line has several cameras."""

    source: Text = Field(description="URI or path, with options of its own ([cameras](cameras.md))")
    products: tuple[str, ...] | None = Field(
        None, min_length=1, description="names of the products that may come. Without it: all of the file"
    )
    mode: Literal["live", "every"] | None = Field(
        None,
        description="`live`: the newest frame wins, others are dropped and counted. `every`: no frame is skipped. "
        "Without it: `live` for a live source, `every` for others",
    )
    queue_frames: int = Field(
        CameraPlan.queue_frames, ge=1, le=100_000, description="frames of a live source that may wait in mode `every`"
    )
    gate_delay_s: float | None = Field(
        None, ge=0, le=86_400, description="seconds from capture to the reject gate. Without it: no gate"
    )
    gate_reserve_s: float = Field(
        CameraPlan.gate_reserve_s, ge=0, le=3600, description="seconds before the gate when a verdict must be there"
    )
    stale_after_s: float | None = Field(
        None,
        ge=0,
        le=86_400,
        description="seconds of silence that make a live source STALE; 0: none does. Without it: five frame periods, "
        "from 0.5 s to 1 s",
    )
    rate_hz: float | None = Field(
        None,
        ge=1e-3,
        le=100_000,
        description="frames a second that a live source must deliver. Without it: any rate is right",
    )
    rate_tolerance: float = Field(
        Watch.rate_tolerance, ge=1e-3, le=1, description="how far the rate may be off, as a share of it"
    )
    frozen_after: int = Field(
        Watch.frozen_after, ge=0, le=10**6, description="equal pictures in a row, from 2, that are a fault; 0: none are"
    )
    dark_level: int = Field(Watch.dark_level, ge=0, le=255, description="a pixel is black up to this grey level")
    dark_share: float = Field(
        Watch.dark_share, ge=0, le=1, description="share of black pixels that is a fault; 0: none is"
    )
    saturated_level: int = Field(
        Watch.saturated_level, ge=0, le=255, description="a pixel is overexposed from this grey level on"
    )
    saturated_share: float = Field(
        Watch.saturated_share, ge=0, le=1, description="share of overexposed pixels that is a fault; 0: none is"
    )
    fault_period_s: float = Field(
        CameraPlan.fault_period_s,
        ge=0.01,
        le=86_400,
        description="seconds from one FAULT to the next while a source delivers nothing",
    )
    wait_for_source: bool = Field(
        Retry.wait_for_source, description="wait for a source that cannot be opened, instead of ending"
    )
    max_reconnects: int | None = Field(
        None,
        ge=0,
        description="end when a live source could not be opened again so many times in a row. Without it: try for ever",
    )
    first_retry_s: float = Field(
        Retry.first_s,
        ge=1e-3,
        le=3600,
        description="seconds until a source that broke is opened again; doubles with each failure",
    )
    longest_retry_s: float = Field(
        Retry.longest_s, ge=1e-3, le=3600, description="what it doubles to at most, in seconds"
    )

    @property
    def watch(self) -> Watch:
        """What makes it one that cannot be trusted."""
        return Watch(**{name: getattr(self, name) for name in Watch.__dataclass_fields__})

    @property
    def retry(self) -> Retry:
        """What happens when it breaks."""
        return Retry(self.wait_for_source, self.max_reconnects, self.first_retry_s, self.longest_retry_s)


class PartsConfig(_Section):
    """Several cameras look at one part, and their verdicts become one ([pipeline](pipeline.md))."""

    cameras: tuple[str, ...] = Field(min_length=2, description="names of the cameras that look at each part")
    window_s: float = Field(
        gt=0, le=3600, description="seconds from the first view's capture to the last one's verdict"
    )
    gate_reserve_s: float | None = Field(
        None,
        ge=0,
        le=3600,
        description="seconds before the gate when a part must be decided. Without it: the longest of its cameras'",
    )


class LineConfig(_Section):
    """The line as a whole. These keys stand at the top of the file, before the first `[table]`."""

    outputs: tuple[Text, ...] = Field(
        (), description="where verdicts go: URIs with options of their own ([outputs](outputs.md))"
    )
    summary: Text | None = Field(
        None, description="JSON file with counts, faults and latencies, written at the end. Without it: none"
    )
    roots: tuple[Text, ...] = Field(
        (),
        min_length=1,
        description="folders; what the line writes, moves or deletes must lie under one of them. Without it: the "
        "folder of the file; on a command line without a file: anywhere",
    )
    max_frames: int | None = Field(None, ge=1, description="stop after so many verdicts. Without it: no limit")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of each engine. Without it: chosen by the engine"
    )
    engine_timeout_s: float = Field(
        5.0, ge=0.01, le=3600, description="seconds; an inference that takes longer is a FAULT `engine_stalled`"
    )
    batch_wait_s: float = Field(
        0.002,
        ge=0,
        le=1,
        description="seconds that an engine which takes several images at once waits for those of other cameras",
    )
    quiet: bool = Field(False, description="no live view, only the last line")
    products: dict[Name, ProductConfig] = Field(min_length=1, description="what parts are judged by")
    cameras: dict[Name, CameraConfig] = Field(min_length=1, description="where frames come from")
    parts: PartsConfig | None = Field(None, description="parts that several cameras see")

    def products_of(self, camera: str) -> dict[str, ProductConfig]:
        """What the parts in front of a camera may be, by name."""
        names = self.cameras[camera].products
        return dict(self.products) if names is None else {name: self.products[name] for name in names}

    @property
    def uris(self) -> Iterator[tuple[Location, str]]:
        """All URIs of sources and outputs, and where they stand."""
        for name, camera in self.cameras.items():
            yield ("cameras", name, "source"), camera.source
        for index, uri in enumerate(self.outputs):
            yield ("outputs", index), uri

    def anchored(self, folder: Path) -> LineConfig:
        """The same with absolute paths; relative ones begin at a folder.

        Raises:
            UsageError: the folder's name cannot stand in a URI.
        """
        return self.model_copy(
            update={
                "outputs": tuple(anchored_output(uri, folder) for uri in self.outputs),
                "summary": None if self.summary is None else anchored_path(self.summary, folder),
                "roots": tuple(anchored_path(root, folder) for root in self.roots),
                "products": {
                    name: product.model_copy(update={"engine": _anchored_engine(product.engine, folder)})
                    for name, product in self.products.items()
                },
                "cameras": {
                    name: camera.model_copy(update={"source": anchored_source(camera.source, folder)})
                    for name, camera in self.cameras.items()
                },
            }
        )

    def dumps(self) -> str:
        """As TOML that ``load_config`` reads back to the same. Passwords are masked, and then it refuses them."""
        body = self.model_dump(mode="json", exclude_none=True)
        body["outputs"] = [masked_uri(uri) for uri in self.outputs]
        for camera in body["cameras"].values():
            camera["source"] = masked_uri(camera["source"])
        return tomli_w.dumps(body)


def _anchored_engine(engine: str, folder: Path) -> str:
    return engine if engine == DEMO else anchored_path(engine, folder)


def example() -> str:
    """A file to begin with, which runs without a camera."""
    return (files("recontrast_edge") / "line.toml").read_text(encoding="utf-8")


# From files and options.

PRODUCT_OPTIONS = frozenset({"engine", "threshold"})
CAMERA_OPTIONS = frozenset(CameraConfig.model_fields) - {"products"}
LINE_OPTIONS = frozenset(LineConfig.model_fields) - {"products", "cameras", "parts"}
"""Keys that are also options of the command line: all but those that only several products or cameras need."""

_PLURALS = {"outputs": "output", "roots": "root"}
_SECTIONS: dict[str, type[_Section]] = {"products": ProductConfig, "cameras": CameraConfig}
"""Tables that hold a table for each name."""


def option_name(key: str) -> str:
    """The option of the command line for a key: ``--gate-delay-s``. For a list, it may be given several times."""
    return f"--{_PLURALS.get(key, key).replace('_', '-')}"


def load_config(path: Path | None, options: Mapping[str, Any]) -> LineConfig:
    """A line from a file, from options, or from both; options win.

    Options of a camera hold for all cameras of the file. Relative paths begin at the file's folder, which is also the
    only root unless the file names others, and in options at the working directory.

    Args:
        path: TOML file; None: one camera and one product, from options alone.
        options: those that were given, by key.

    Raises:
        UsageError: an unknown key, a wrong type or value, or keys that contradict each other, with the place.
        InputError: a file that cannot be read, is no TOML, or shows a password to all users of the machine.
    """
    if path is None:
        missing = [option_name(key) for key in ("engine", "source") if key not in options]
        if missing:
            raise UsageError(f"{' and '.join(missing)} missing: expected --engine and --source, or --config FILE")
        return _Reader(None, "").config(
            {"roots": ["/"], "products": {PRODUCT_NAME: {}}, "cameras": {CAMERA_NAME: {}}}, options
        )
    text, mode = _read(path)
    reader = _Reader(path, text)
    folder = Path.cwd() / path.parent
    body = {"roots": [str(folder)], **reader.body()}
    config = reader.config(body, _anchored_options(options)).anchored(folder)
    if mode & stat.S_IRWXO and any(masked_uri(uri) != uri for _, uri in config.uris):
        raise InputError(
            f"{path}: holds a password, and all users of this machine have access (mode {mode:04o}); run: "
            f"chmod o= {path}, or write credentials=env:NAME or credentials=file:PATH instead of the password"
        )
    return config


def _read(path: Path) -> tuple[str, int]:
    """The text of a file, and its permissions."""
    try:
        # The permissions are those of the very file that is read; a FIFO must not make us wait.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path}: expected a configuration file")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES} bytes; expected a configuration file")
    try:
        # Editors on Windows put a byte order mark first.
        return data.decode("utf-8-sig"), stat.S_IMODE(status.st_mode)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: expected UTF-8 text") from None


def _anchored_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options whose relative paths begin at the working directory, beside a file whose begin elsewhere."""
    here = Path.cwd()
    anchored = dict(options)
    for key, anchor in (("engine", _anchored_engine), ("source", anchored_source), ("summary", anchored_path)):
        if key in anchored:
            anchored[key] = anchor(anchored[key], here)
    for key, anchor in (("outputs", anchored_output), ("roots", anchored_path)):
        if key in anchored:
            anchored[key] = [anchor(value, here) for value in anchored[key]]
    return anchored


class _Reader:
    """Makes a configuration of a file's text, and says where in the file something is wrong."""

    def __init__(self, path: Path | None, text: str) -> None:
        self._path = path
        self._lines = [f"{line}\n" for line in text.split("\n")]
        self._options: dict[Location, str] = {}
        """What came from an option, and its name."""

    def body(self) -> dict[str, Any]:
        """The file as it is written."""
        try:
            body: dict[str, Any] = tomllib.loads("".join(self._lines))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self._path}: is no TOML: {error}") from None
        _register_passwords(body)
        return body

    def config(self, body: dict[str, Any], options: Mapping[str, Any]) -> LineConfig:
        """Validate all of it."""
        body = self._merged(body, options)
        try:
            config = LineConfig.model_validate(_with_tuples(body))
        except ValidationError as invalid:
            # A misspelt key explains the one that is missing, not the other way round.
            first, *others = sorted(invalid.errors(), key=lambda error: error["type"] != "extra_forbidden")
            more = f" (and {len(others)} more)" if others else ""
            location, text = _problem(first["type"], first["loc"], first["input"])
            raise UsageError(f"{self._place(location)}: {text}{more}") from None
        for location, text in _contradictions(config):
            raise UsageError(f"{self._place(location)}: {text}")
        return config

    def _merged(self, body: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        merged = dict(body)
        for key, value in options.items():
            if key in LINE_OPTIONS:
                merged[key] = value
                self._options[(key,)] = option_name(key)
                continue
            table = "products" if key in PRODUCT_OPTIONS else "cameras"
            default = PRODUCT_NAME if table == "products" else CAMERA_NAME
            named = merged.get(table, {default: {}})
            if not isinstance(named, dict) or not all(isinstance(section, dict) for section in named.values()):
                # What is wrong with the file is said first.
                continue
            if key in (*PRODUCT_OPTIONS, "source") and len(named) > 1:
                raise UsageError(
                    f"{option_name(key)}: {self._path} has {len(named)} {table} ({', '.join(named)}), so nobody knows "
                    "which one it is for; change it there"
                )
            merged[table] = {name: {**section, key: value} for name, section in named.items()}
            self._options.update({(table, name, key): option_name(key) for name in named})
        return merged

    def _place(self, location: Location) -> str:
        """``line.toml:12: cameras.top.mode``, or ``--mode``."""
        for length in range(len(location), 0, -1):
            if location[:length] in self._options:
                return self._options[location[:length]]
        if self._path is None:
            return option_name(str(location[-1]))
        dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
        line = self._line(location)
        where = f"{self._path}" if line is None else f"{self._path}:{line}"
        return f"{where}: {dotted}" if dotted else where

    def _line(self, location: Location) -> int | None:
        """The line, from 1, at which the statement begins that gives a value: the one after the longest beginning of
        the file that is valid TOML and has no such value yet."""
        low, high = 0, len(self._lines)
        if not location or not self._has(location, high):
            return None
        while low < high:
            middle = (low + high) // 2
            # A value over several lines is valid with its last one only.
            end = next(end for end in range(middle, len(self._lines) + 1) if self._has(location, end) is not None)
            if self._has(location, end):
                high = middle
            else:
                low = end + 1
        return low

    def _has(self, location: Location, end: int) -> bool | None:
        """Whether the first lines give a value; None where they end within a statement."""
        try:
            value: Any = tomllib.loads("".join(self._lines[:end]))
        except (ValueError, RecursionError):
            return None
        for part in location:
            try:
                value = value[part]
            except (IndexError, KeyError, TypeError):
                return False
        return True


def _register_passwords(value: object) -> None:
    """Of all URIs, also those in a place where nobody expects one."""
    if isinstance(value, str):
        register_uri(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            register_uri(key)
            _register_passwords(item)
    elif isinstance(value, list):
        for item in value:
            _register_passwords(item)


def _with_tuples(value: Any) -> Any:
    """Models are frozen, lists are not."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


# What is wrong with it, for people.


def _problem(kind: str, location: Location, given: object) -> tuple[Location, str]:
    """Where it is, and what was expected instead."""
    if location[-1] == "[key]":
        return location[:-1], "a name is 1 to 64 letters, digits, - and _, and begins with a letter or digit"
    *parent, key = location
    section = _section(tuple(parent))
    if kind == "extra_forbidden":
        return location, f"unknown key; {_hint(str(key), section)}"
    if kind == "missing" and section is not None:
        meaning = _LINK.sub("", section.model_fields[str(key)].description or "")
        return tuple(parent), f"{key} is missing: {meaning}"
    if _section(location) is not None or (location[0] in _SECTIONS and len(location) == 1):
        return location, f"expected {'tables' if len(location) == 1 else 'a table'}, got {_shown(given)}"
    if section is None:
        # An item of a list.
        return location, f"expected a text, got {_shown(given)}"
    return location, f"expected {_expected(section.model_fields[str(key)])}, got {_shown(given)}"


def _section(location: Location) -> type[_Section] | None:
    """The model of the table at a location."""
    if location == ("parts",):
        return PartsConfig
    if len(location) == 2 and isinstance(location[0], str):
        return _SECTIONS.get(location[0])
    return None if location else LineConfig


def _hint(key: str, section: type[_Section] | None) -> str:
    """What may have been meant by an unknown key."""
    known = LineConfig if section is None else section
    near = difflib.get_close_matches(key, known.model_fields, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    for other, place in (
        (LineConfig, "at the top of the file, before the first [table]"),
        (CameraConfig, "in a table [cameras.NAME]"),
        (ProductConfig, "in a table [products.NAME]"),
        (PartsConfig, "in the table [parts]"),
    ):
        if key in other.model_fields:
            return f"{key} belongs {place}"
    return f"known: {', '.join(known.model_fields)}"


def _shown(value: object) -> str:
    """A wrong value as the file has it, without passwords."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, tuple):
        return f"a list of {len(value)}"
    text = json.dumps(masked_uri(value), ensure_ascii=False) if isinstance(value, str) else str(value).lower()
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


_LINK = re.compile(r" \(\[[^]]*\]\([^)]*\)\)")
_TYPE_TEXTS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _expected(field: FieldInfo) -> str:
    """What a value must be: ``a number from 0 to 3600``."""
    members = typing.get_args(field.annotation)
    kind = members[0] if types.NoneType in members else field.annotation
    if typing.get_origin(kind) is Literal:
        return " or ".join(f'"{choice}"' for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        least = _limit(field, "min_length")
        return "a list of texts" if least is None else f"a list of {least} or more texts"
    low, high, above = _limit(field, "ge"), _limit(field, "le"), _limit(field, "gt")
    limits = f" from {low}" if low is not None else f" above {above}" if above is not None else ""
    limits += "" if high is None else f" up to {high}" if above is not None else f" to {high}"
    text = _TYPE_TEXTS[typing.get_origin(kind) or kind] if kind in _TYPE_TEXTS else "a text"
    return f"{text}{limits}"


def _limit(field: FieldInfo, name: str) -> Any:
    return next((getattr(limit, name) for limit in field.metadata if hasattr(limit, name)), None)


def _contradictions(config: LineConfig) -> Iterator[tuple[Location, str]]:
    """What no single key shows."""
    for location, uri in config.uris:
        if HIDDEN in uri:
            yield (
                location,
                f"{HIDDEN} stands for a password that was masked; write the password, or credentials=env:NAME or "
                "credentials=file:PATH",
            )
        if location[0] == "outputs" and config.outputs.index(uri) != location[1]:
            yield location, "the same output is given twice"
        yield from _refused(location, lambda uri=uri: check_userinfo(uri))
    for name, product in config.products.items():
        if product.part_ids is not None:
            try:
                re.compile(product.part_ids)
            except re.error as error:
                yield (
                    ("products", name, "part_ids"),
                    f"expected a regular expression, got {product.part_ids!r} ({error})",
                )
    for name, camera in config.cameras.items():
        location = ("cameras", name)
        yield from _unknown_names((*location, "products"), camera.products or (), config.products)
        several = config.products_of(name)
        silent = [product for product, given in several.items() if given.part_ids is None]
        if len(several) > 1 and silent:
            yield (
                location,
                f"has {len(several)} products, so each needs part_ids that say which parts are its own; "
                f"{', '.join(silent)} {'has' if len(silent) == 1 else 'have'} none",
            )
        if camera.frozen_after == 1:
            yield (*location, "frozen_after"), "expected 0 or at least 2 equal pictures, got 1"
        if camera.first_retry_s > camera.longest_retry_s:
            limit = f"at most longest_retry_s, {camera.longest_retry_s:g}"
            yield (*location, "first_retry_s"), f"expected {limit}, got {camera.first_retry_s:g}"
        yield from _refused((*location, "source"), lambda camera=camera: open_merger(camera.source))
    if config.parts is not None:
        yield from _unknown_names(("parts", "cameras"), config.parts.cameras, config.cameras)


def _refused(location: Location, check: Any) -> Iterator[tuple[Location, str]]:
    try:
        check()
    except UsageError as error:
        yield location, str(error)


def _unknown_names(
    location: Location, names: tuple[str, ...], known: Mapping[str, object]
) -> Iterator[tuple[Location, str]]:
    for index, name in enumerate(names):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            yield location, f"{name!r} is not in [{location[-1]}]; {hint}"
        elif name in names[:index]:
            yield location, f"{name!r} is named twice"


def tables() -> str:
    """All keys, as the tables of ``docs/configuration.md``."""
    sections: dict[str, type[_Section]] = {
        "The line": LineConfig,
        "`[products.NAME]`": ProductConfig,
        "`[cameras.NAME]`": CameraConfig,
        "`[parts]`": PartsConfig,
    }
    return "\n\n".join(_table(title, section) for title, section in sections.items())


def _table(title: str, section: type[_Section]) -> str:
    rows = [
        f"### {title}",
        "",
        section.__doc__ or "",
        "",
        "| key | value | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for key, field in section.model_fields.items():
        if section is LineConfig and key in (*_SECTIONS, "parts"):
            continue
        rows.append(f"| `{key}` | {_expected(field)} | {_default(field)} | {field.description} |")
    return "\n".join(rows)


def _default(field: FieldInfo) -> str:
    """As the file would have it; empty where the key need not be there."""
    if field.is_required():
        return "required"
    if field.default in (None, ()):
        return ""
    return tomli_w.dumps({"key": field.default}).replace("key = ", "`").replace("\n", "`")


if __name__ == "__main__":
    print(tables())
