"""Outputs: where judgements go.

    sink = open_sink("video:annotated.mp4?fps=30", input_spec=engine.spec.input)

| URI | writes |
| --- | --- |
| `jsonl:FILE` | one JSON object a frame and line; `jsonl:-` is standard output |
| `video:FILE?fps=30` | annotated frames beside their heat maps; `.mp4`, `.mkv`, `.mov` or `.avi` |
| `images:DIR?which=rejects` | annotated PNG, 16-bit map and JSON record of rejects, or of `all` |
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from recontrast_edge.errors import UsageError
from recontrast_edge.frame import Sink
from recontrast_edge.secrets import check_userinfo, masked_uri
from recontrast_edge.spec import InputSpec
from recontrast_edge.uri import number_option, parse_options

Opener = Callable[[InputSpec], Sink]
"""Opens an output; takes where the engine's maps lie in the images; raises OutputError."""


def open_sink(uri: str, *, input_spec: InputSpec) -> Sink:
    """Open an output.

    Args:
        uri: ``scheme:target?key=value&key=value``.
        input_spec: where the engine's maps lie in the images.

    Raises:
        UsageError: unknown scheme, key or value.
        OutputError: nothing can be written there.
    """
    return sink_opener(uri)(input_spec)


def sink_opener(uri: str) -> Opener:
    """Check an output's URI and load what it needs, but touch no file yet: then opening it takes no time.

    Raises:
        UsageError: unknown scheme, key or value.
    """
    check_userinfo(uri)
    scheme, target, query = _split(uri)
    return _SCHEMES[scheme](uri, target, query)


def _split(uri: str) -> tuple[str, str, str]:
    scheme, colon, rest = uri.partition(":")
    if not colon or scheme not in _SCHEMES:
        raise UsageError(
            f"output {masked_uri(uri)!r}: expected one of {', '.join(f'{known}:...' for known in _SCHEMES)}; "
            f"for records in a file: jsonl:{'FILE' if colon else masked_uri(uri)}"
        )
    target, _, query = rest.partition("?")
    if not target:
        raise UsageError(f"output {masked_uri(uri)!r}: it is not said where to, after {scheme!r}:")
    return scheme, target, query


def _jsonl(uri: str, target: str, query: str) -> Opener:
    from recontrast_edge.sinks.jsonl import JsonlSink

    parse_options(f"output {uri!r}", query, ())
    return lambda _input_spec: JsonlSink(None if target == "-" else Path(target))


def _video(uri: str, target: str, query: str) -> Opener:
    from recontrast_edge.sinks.video import CONTAINERS, FPS_RANGE, VideoSink

    what = f"output {uri!r}"
    options = parse_options(what, query, ("fps",))
    path = Path(target)
    if path.suffix.lower() not in CONTAINERS:
        raise UsageError(f"{what}: expected a file ending in {', '.join(CONTAINERS)}, got {path.suffix!r}")
    fps = number_option(what, "fps", options.get("fps", "30"), low=FPS_RANGE[0], high=FPS_RANGE[1])
    return lambda input_spec: VideoSink(path, input_spec, fps=fps)


def _mqtt(uri: str, target: str, query: str) -> Opener:
    from recontrast_edge.sinks.mqtt import mqtt_opener

    return _without_spec(mqtt_opener(uri, target, query))


def _modbus(uri: str, target: str, query: str) -> Opener:
    from recontrast_edge.sinks.modbus import modbus_opener

    return _without_spec(modbus_opener(uri, target, query))


def _modbus_server(uri: str, target: str, query: str) -> Opener:
    from recontrast_edge.sinks.modbus import modbus_server_opener

    return _without_spec(modbus_server_opener(uri, target, query))


def _opcua(uri: str, target: str, query: str) -> Opener:
    from recontrast_edge.sinks.opcua import opcua_opener

    return _without_spec(opcua_opener(uri, target, query))


def _gpio(uri: str, target: str, query: str) -> Opener:
    from recontrast_edge.sinks.gpio import gpio_opener

    return _without_spec(gpio_opener(uri, target, query))


def _gpiochip(uri: str, target: str, query: str) -> Opener:
    from recontrast_edge.sinks.gpio import gpiochip_opener

    return _without_spec(gpiochip_opener(uri, target, query))


def _webhook(uri: str, target: str, query: str) -> Opener:
    from recontrast_edge.sinks.webhook import webhook_opener

    return _without_spec(webhook_opener(uri, target, query))


def _without_spec(opener: Callable[[], Sink]) -> Opener:
    """Of an output that has nothing to do with where the maps lie."""
    return lambda _input_spec: opener()


def _images(uri: str, target: str, query: str) -> Opener:
    from recontrast_edge.sinks.images import ImagesSink

    options = parse_options(f"output {uri!r}", query, ("which",))
    which = options.get("which", "rejects")
    if which not in ("rejects", "all"):
        raise UsageError(f"output {uri!r}: which must be 'rejects' or 'all', got {which!r}")
    return lambda input_spec: ImagesSink(Path(target), input_spec, every=which == "all")


_SCHEMES: dict[str, Callable[[str, str, str], Opener]] = {
    "jsonl": _jsonl,
    "video": _video,
    "images": _images,
    "mqtt": _mqtt,
    "mqtts": _mqtt,
    "modbus": _modbus,
    "modbus-server": _modbus_server,
    "opcua": _opcua,
    "gpio": _gpio,
    "gpiochip": _gpiochip,
    "webhook": _webhook,
}
