"""Metadata of ONNX files without the onnx package: read, replace, and a digest of everything else.

    metadata = read_metadata(Path("model.onnx"))["recontrast_edge.spec"]

The runtime must read a model's spec and write a threshold into it on machines that have no onnx package. An ONNX file
is one protobuf message; its top-level fields are walked, ``metadata_props`` (field 14 of ModelProto in onnx.proto) are
decoded, and all other bytes are kept as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from recontrast_edge.errors import ModelError
from recontrast_edge.images import atomic_write
from recontrast_edge.spec import ModelSpec

SPEC_KEY = "recontrast_edge.spec"

# Of ModelProto: graph and metadata_props; of GraphProto: output; of ValueInfoProto: name.
_GRAPH_FIELD = 7
_METADATA_FIELD = 14
_OUTPUT_FIELD = 12
_NAME_FIELD = 1
# Of StringStringEntryProto.
_KEY_FIELD = 1
_VALUE_FIELD = 2
# Wire type.
_LENGTH_DELIMITED = 2


class _BrokenError(Exception):
    """Not a well-formed protobuf message."""


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise _BrokenError
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (field number, wire type, field start, payload start, end) of each top-level field."""
    at = 0
    while at < len(data):
        start = at
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        payload = at
        if wire == 0:
            _, at = _varint(data, at)
        elif wire == 1:
            at += 8
        elif wire == _LENGTH_DELIMITED:
            length, payload = _varint(data, at)
            at = payload + length
        elif wire == 5:
            at += 4
        else:
            raise _BrokenError
        if number == 0 or at > len(data):
            raise _BrokenError
        yield number, wire, start, payload, at


def _load(path: Path) -> memoryview:
    try:
        return memoryview(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path}: no such model file") from None
    except IsADirectoryError:
        raise ModelError(f"{path}: is a folder, expected an .onnx file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None


def _entry(payload: memoryview) -> tuple[str, str]:
    key = value = b""
    for number, wire, _, start, end in _fields(payload):
        if wire == _LENGTH_DELIMITED and number == _KEY_FIELD:
            key = bytes(payload[start:end])
        elif wire == _LENGTH_DELIMITED and number == _VALUE_FIELD:
            value = bytes(payload[start:end])
    try:
        return key.decode(), value.decode()
    except UnicodeDecodeError:
        raise _BrokenError from None


def _split(path: Path) -> tuple[list[memoryview], dict[str, str]]:
    """Everything but the metadata, as slices in file order, and the metadata."""
    data = _load(path)
    rest: list[memoryview] = []
    metadata: dict[str, str] = {}
    try:
        for number, wire, start, payload, end in _fields(data):
            if number == _METADATA_FIELD and wire == _LENGTH_DELIMITED:
                key, value = _entry(data[payload:end])
                metadata[key] = value
            else:
                rest.append(data[start:end])
    except _BrokenError:
        raise ModelError(f"{path}: not a complete ONNX file; it is damaged or cut off, export it again") from None
    if not rest:
        raise ModelError(f"{path}: the file is empty, expected an ONNX model")
    return rest, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The file's ``metadata_props``.

    Raises:
        ModelError: missing, unreadable, empty or damaged file.
    """
    return _split(path)[1]


def read_spec(path: Path) -> ModelSpec:
    """The model spec that the file carries.

    Raises:
        ModelError: missing, damaged, or no model of ours.
    """
    metadata = read_metadata(path)
    if SPEC_KEY not in metadata:
        raise ModelError(
            f"{path}: an ONNX file, but no recontrast-edge model (metadata {SPEC_KEY!r} is missing); "
            "make one with `recontrast-edge export`"
        )
    return ModelSpec.loads(metadata[SPEC_KEY], where=str(path))


def output_names(path: Path) -> list[str]:
    """Names of the graph's outputs.

    Raises:
        ModelError: missing, unreadable or damaged file.
    """
    data = _load(path)
    try:
        return [
            bytes(value[start:end]).decode()
            for graph in _payloads(data, _GRAPH_FIELD)
            for value in _payloads(graph, _OUTPUT_FIELD)
            for number, _, _, start, end in _fields(value)
            if number == _NAME_FIELD
        ]
    except (_BrokenError, UnicodeDecodeError):
        raise ModelError(f"{path}: not a complete ONNX file; it is damaged or cut off, export it again") from None


def _payloads(data: memoryview, wanted: int) -> Iterator[memoryview]:
    for number, wire, _, start, end in _fields(data):
        if number == wanted and wire == _LENGTH_DELIMITED:
            yield data[start:end]


def graph_sha256(path: Path) -> str:
    """SHA-256 over everything but the metadata: the identity of graph and weights, whatever the threshold."""
    digest = hashlib.sha256()
    for piece in _split(path)[0]:
        digest.update(piece)
    return digest.hexdigest()


def replace_metadata(path: Path, updates: dict[str, str]) -> None:
    """Set entries of ``metadata_props``, atomically; graph and weights stay the same bytes.

    Raises:
        ModelError: missing or damaged file.
        OutputError: the file cannot be written.
    """
    rest, metadata = _split(path)
    metadata.update(updates)
    with atomic_write(path) as file:
        for piece in rest:
            file.write(piece)
        for key, value in metadata.items():
            entry = _delimited(_KEY_FIELD, key.encode()) + _delimited(_VALUE_FIELD, value.encode())
            file.write(_delimited(_METADATA_FIELD, entry))


def _delimited(field: int, payload: bytes) -> bytes:
    return _encode_varint(field << 3 | _LENGTH_DELIMITED) + _encode_varint(len(payload)) + payload


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
