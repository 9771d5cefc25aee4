"""Outputs: where judgements go.

    sink = open_sink("video:annotated.mp4?fps=30", input_spec=engine.spec.input)

| URI | writes |
| --- | --- |
| `jsonl:FILE` | one JSON object a frame and line; `jsonl:-` is standard output |
| `video:FILE?fps=30` | annotated frames beside their heat maps; `.mp4`, `.mkv`, `.mov` or `.avi` |
| `images:DIR?which=rejects` | annotated PNG, 16-bit map and JSON record of each |
| `mqtt://HOST/TOPIC`, `mqtts:` | JSON to a broker |
| `webhook:https://HOST/PATH` | JSON by HTTP POST |
| `modbus://HOST/COIL` | a PLC's coil for each part to be rejected, and its registers |
| `modbus-server://HOST` | registers that a PLC reads |
| `opcua://HOST` | nodes that OPC UA clients read |
| `gpio:PIN`, `gpiochip:CHIP/LINE` | a pulse on a pin for each part to be rejected |

`docs/outputs.md` lists the options of each.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from recontrast_edge.errors import UsageError
from recontrast_edge.frame import Sink
from recontrast_edge.secrets import check_userinfo, masked_uri
from recontrast_edge.spec import InputSpec
from recontrast_edge.uri import number_option, parse_options, whole_option

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
        raise UsageError(f"output {masked_uri(uri)!r}: a file, folder or host is missing after {scheme!r}:")
    return scheme, target, query


def _jsonl(uri: str, target: str, query: str) -> Opener:
    from recontrast_edge.sinks.jsonl import JsonlSink
    from recontrast_edge.sinks.message import choice_option

    what = f"output {uri!r}"
    options = parse_options(what, query, ("states",) if target == "-" else ("states", "rotate_mb", "keep"))
    states = choice_option(what, "states", options.get("states", "no"), ("yes", "no")) == "yes"
    rotate_bytes = None
    if "rotate_mb" in options:
        rotate_bytes = round(1e6 * number_option(what, "rotate_mb", options["rotate_mb"], low=0.01, high=1e6))
    keep = whole_option(what, "keep", options.get("keep", "5"), low=1, high=9999)
    path = None if target == "-" else Path(target)
    return lambda _input_spec: JsonlSink(path, rotate_bytes=rotate_bytes, keep=keep, states=states)


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
    from recontrast_edge.sinks.message import VERDICTS, choice_option

    what = f"output {uri!r}"
    options = parse_options(what, query, ("which", "original", "max_gib", "max_days"))
    verdicts = VERDICTS[choice_option(what, "which", options.get("which", "rejects"), VERDICTS)]
    original = choice_option(what, "original", options.get("original", "no"), ("yes", "no")) == "yes"
    max_bytes = max_age = None
    if "max_gib" in options:
        max_bytes = round(2**30 * number_option(what, "max_gib", options["max_gib"], low=0.001, high=1e6))
    if "max_days" in options:
        max_age = timedelta(days=number_option(what, "max_days", options["max_days"], low=0.001, high=36500.0))
    return lambda input_spec: ImagesSink(
        Path(target), input_spec, verdicts=verdicts, original=original, max_bytes=max_bytes, max_age=max_age
    )


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
