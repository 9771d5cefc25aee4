"""What GenICam cameras have in common, whichever library they come through: options, features, pixel formats, frame
ids, and the loop that grabs.

    open_source("pylon:40012345?exposure_us=2000&trigger=hardware").read(timeout_s=1.0)

The library itself is behind ``Camera``, one thin module each: ``pylon``, ``gentl`` and ``aravis`` in this folder.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args
from urllib.parse import unquote

import cv2
import numpy as np
from numpy.typing import NDArray

from recontrast_edge.errors import InputError, SourceError, UsageError
from recontrast_edge.preprocess import Image
from recontrast_edge.secrets import mask, masked_uri
from recontrast_edge.sources.threaded import Picture, Slot, ThreadedSource
from recontrast_edge.uri import number_option, parse_options, whole_option

OPEN_TIMEOUT_S = 10.0
"""Looking for cameras on all networks takes one or two seconds, a camera that does not answer some more."""

GRAB_TIMEOUT_S = 0.05
"""How soon a closed source, or a silent camera, is noticed."""

SILENCE_S = 0.7
"""A camera that should deliver by itself is given up after so long without a frame, or after ``SILENCE_PERIODS``."""

SILENCE_PERIODS = 5.0

FIRST_FRAME_S = 3.0
"""Cameras need longer for the first one."""

BUFFERS = 16

ID_LIMIT = 0xFFFF
"""GigE Vision counts frames with 16 bits from 1 on and goes from 65535 to 1, because 0 says that there is no id: so
pylon's reference has it (``GetBlockID``), and so Aravis' simulated camera does it. Later versions of the standard, and
USB3 Vision, count with 64 bits."""

MAX_LOST = 4096
"""A larger jump of the device's ids is a device that counts anew, and no frames were lost."""

FLOAT_TOLERANCE = 1e-4
"""Relative; what a camera rounds by less is not worth a word."""

Trigger = Literal["off", "software", "hardware"]
Kind = Literal["integer", "float", "boolean", "enumeration", "string", "command"]
Value = int | float | bool | str

_log = logging.getLogger(__name__)


class Refused(Exception):  # noqa: N818 - not for users: `configure` turns it into one of recontrast_edge.errors
    """A camera would not take a value, or not name one; the message is the library's."""


class Feature(Protocol):
    """One node of a camera's feature tree. Every method may raise Refused, or SourceError if the camera is gone."""

    kind: Kind

    def writable(self) -> bool:
        """Whether it can be set, or executed, as things are now."""
        ...

    def get(self) -> Value:
        """Its value; an enumeration's is the symbolic name."""
        ...

    def set(self, value: Value) -> None:
        """Set it; a command is executed, whatever the value."""
        ...

    def limits(self) -> tuple[float, float, float]:
        """Lowest and highest value, and the step between values (0: any), of an integer or float."""
        ...

    def entries(self) -> Sequence[str]:
        """Symbolic names that an enumeration can take now."""
        ...


@dataclass(frozen=True)
class Buffer:
    """What a camera delivered.

    Attributes:
        frame_id: as the device counts; None where it does not tell.
        time_ns: on the device's clock; None where it does not tell.
        incomplete: why it must not be used; then there are no data.
        data: bytes of the picture, perhaps with more behind them; not the driver's own memory.
        width, height: pixels.
        pixel_format: code of the Pixel Format Naming Convention.
        padding_x: bytes behind each row.
    """

    frame_id: int | None
    time_ns: int | None = None
    incomplete: str | None = None
    data: NDArray[np.uint8] | None = None
    width: int = 0
    height: int = 0
    pixel_format: int = 0
    padding_x: int = 0


class Camera(Protocol):
    """An opened camera. One thread calls it, but ``Feature.set`` of the trigger may come from another."""

    def feature(self, name: str) -> Feature | None:
        """A feature by name; None if the camera has none of this name."""
        ...

    def feature_names(self) -> Sequence[str]:
        """All features."""
        ...

    def start(self, buffers: int) -> None:
        """Start to deliver; the library has so many buffers to fill."""
        ...

    def grab(self, timeout_s: float) -> Buffer | None:
        """The next buffer, or None if there is none in time.

        Raises:
            SourceError: the camera is gone.
        """
        ...

    def close(self) -> None:
        """Stop and let go of the camera."""
        ...


# Options.


@dataclass(frozen=True)
class CameraOptions:
    """What the URI asks for; None leaves the camera as it is.

    Attributes:
        roi: width, height, x, y in pixels of the sensor.
        features: name and value of GenICam features, in the order in which they are set.
    """

    exposure_us: float | None
    gain_db: float | None
    roi: tuple[int, int, int, int] | None
    pixel_format: str | None
    trigger: Trigger
    trigger_source: str
    trigger_rate_hz: float | None
    fps: float | None
    packet_size: int | None
    buffers: int
    timeout_s: float | None
    part_id: bool
    features: tuple[tuple[str, str], ...]


_OPTIONS = (
    "exposure_us",
    "gain_db",
    "roi",
    "pixel_format",
    "trigger",
    "trigger_source",
    "trigger_rate_hz",
    "fps",
    "packet_size",
    "buffers",
    "timeout_s",
    "part_id",
    "feature.NAME",
)
_FEATURE = "feature."


def parse_camera_uri(uri: str, scheme: str) -> tuple[str, CameraOptions]:
    """Which camera, percent-decoded, and the options; ``docs/cameras.md`` has them all.

    Raises:
        UsageError: unknown option, value out of range, or options that contradict each other.
    """
    what = f"source {masked_uri(uri)!r}"
    place, _, query = uri.removeprefix(f"{scheme}:").partition("?")
    items = query.split("&")
    # Features may be repeated, as selectors need it: LineSelector, LineMode, LineSelector, LineMode.
    features = [item.removeprefix(_FEATURE).partition("=") for item in items if item.startswith(_FEATURE)]
    if not all(name and value for name, _, value in features):
        raise UsageError(f"{what}: expected feature.NAME=VALUE, e.g. feature.Gamma=1.0")
    options = parse_options(what, "&".join(item for item in items if not item.startswith(_FEATURE)), _OPTIONS)

    def number(key: str, low: float, high: float) -> float | None:
        return number_option(what, key, options[key], low=low, high=high) if key in options else None

    def whole(key: str, low: int, high: int) -> int | None:
        return whole_option(what, key, options[key], low=low, high=high) if key in options else None

    def choice(key: str, choices: Sequence[str]) -> str | None:
        if key in options and options[key] not in choices:
            raise UsageError(f"{what}: {key} must be one of {', '.join(choices)}, got {options[key]!r}")
        return options.get(key)

    roi = None
    if "roi" in options:
        sides = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})\+([0-9]{1,9})\+([0-9]{1,9})", options["roi"])
        if not sides:
            raise UsageError(f"{what}: roi must be WxH+X+Y in pixels, e.g. 640x480+0+120, got {options['roi']!r}")
        roi = (int(sides[1]), int(sides[2]), int(sides[3]), int(sides[4]))
    trigger: Trigger = next(
        name for name in get_args(Trigger) if name == (choice("trigger", get_args(Trigger)) or "off")
    )
    only_with = {"trigger_rate_hz": "software", "trigger_source": "hardware", "fps": "off"}
    for key, wanted in only_with.items():
        if key in options and trigger != wanted:
            raise UsageError(f"{what}: {key} goes with trigger={wanted}, and not with trigger={trigger}")
    if trigger == "software" and "trigger_rate_hz" not in options:
        raise UsageError(f"{what}: trigger=software needs trigger_rate_hz, e.g. trigger_rate_hz=10")
    return unquote(place), CameraOptions(
        exposure_us=number("exposure_us", 0.01, 1e9),
        gain_db=number("gain_db", -100.0, 100.0),
        roi=roi,
        pixel_format=choice("pixel_format", pixel_format_names()),
        trigger=trigger,
        trigger_source=options.get("trigger_source", "Line1"),
        trigger_rate_hz=number("trigger_rate_hz", 0.001, 10_000.0),
        fps=number("fps", 0.001, 100_000.0),
        packet_size=whole("packet_size", 220, 16_404),
        buffers=whole("buffers", 1, 4096) or BUFFERS,
        timeout_s=number("timeout_s", 0.1, 3600.0),
        part_id=choice("part_id", ("frame",)) is not None,
        features=tuple((unquote(name), unquote(value)) for name, _, value in features),
    )


# Pixel formats.


@dataclass(frozen=True)
class PixelFormat:
    """A pixel format that can be converted.

    Attributes:
        option: its name in ``pixel_format=``.
        names: as cameras call it, today and before the naming convention.
        code: Pixel Format Naming Convention.
        to_image: (H, W * bytes_per_pixel) uint8 rows to (H, W) mono or (H, W, 3) BGR.
    """

    option: str
    names: tuple[str, ...]
    code: int
    bytes_per_pixel: int
    to_image: Callable[[NDArray[np.uint8]], Image]


def _converter(channels: int, code: int) -> Callable[[NDArray[np.uint8]], Image]:
    def convert(rows: NDArray[np.uint8]) -> Image:
        pixels = rows if channels == 1 else rows.reshape(rows.shape[0], -1, channels)
        return np.asarray(cv2.cvtColor(pixels, code), np.uint8)

    return convert


def _full_range_yuv(y: int, u: int, v: int) -> Callable[[NDArray[np.uint8]], Image]:
    """For YUV with all 256 levels; the arguments are the places of the first luma and of the chroma among 4 bytes."""

    def convert(rows: NDArray[np.uint8]) -> Image:
        height, row_bytes = rows.shape
        # OpenCV wants the two chroma channels in the other order.
        chroma = np.repeat(rows.reshape(height, -1, 4)[:, :, (v, u)], 2, axis=1)
        luma = rows.reshape(height, row_bytes // 2, 2)[:, :, y, None]
        return np.asarray(cv2.cvtColor(np.concatenate([luma, chroma], axis=2), cv2.COLOR_YCrCb2BGR), np.uint8)

    return convert


_YUYV, _UYVY = _full_range_yuv(0, 1, 3), _full_range_yuv(1, 0, 2)
_YUYV_601 = _converter(2, cv2.COLOR_YUV2BGR_YUY2)
_UYVY_601 = _converter(2, cv2.COLOR_YUV2BGR_UYVY)

PIXEL_FORMATS = (
    PixelFormat("Mono8", ("Mono8",), 0x0108_0001, 1, lambda rows: rows),
    # OpenCV names a pattern by its second row, or, as here, by all four pixels.
    PixelFormat("BayerRG8", ("BayerRG8",), 0x0108_0009, 1, _converter(1, cv2.COLOR_BayerRGGB2BGR)),
    PixelFormat("BayerBG8", ("BayerBG8",), 0x0108_000B, 1, _converter(1, cv2.COLOR_BayerBGGR2BGR)),
    PixelFormat("BayerGR8", ("BayerGR8",), 0x0108_0008, 1, _converter(1, cv2.COLOR_BayerGRBG2BGR)),
    PixelFormat("BayerGB8", ("BayerGB8",), 0x0108_000A, 1, _converter(1, cv2.COLOR_BayerGBRG2BGR)),
    PixelFormat("RGB8", ("RGB8", "RGB8Packed"), 0x0218_0014, 3, _converter(3, cv2.COLOR_RGB2BGR)),
    PixelFormat("BGR8", ("BGR8", "BGR8Packed"), 0x0218_0015, 3, lambda rows: rows.reshape(rows.shape[0], -1, 3)),
    PixelFormat("RGBa8", ("RGBa8", "RGBA8Packed"), 0x0220_0016, 4, _converter(4, cv2.COLOR_RGBA2BGR)),
    PixelFormat("BGRa8", ("BGRa8", "BGRA8Packed"), 0x0220_0017, 4, _converter(4, cv2.COLOR_BGRA2BGR)),
    PixelFormat("YUV422", ("YUV422_8_UYVY", "YUV422Packed"), 0x0210_001F, 2, _UYVY),
    PixelFormat("YUV422", ("YUV422_8", "YUV422_YUYV_Packed"), 0x0210_0032, 2, _YUYV),
    PixelFormat("YUV422", ("YCbCr422_8",), 0x0210_003B, 2, _YUYV),
    PixelFormat("YUV422", ("YCbCr422_8_CbYCrY",), 0x0210_0043, 2, _UYVY),
    PixelFormat("YUV422", ("YCbCr601_422_8",), 0x0210_003E, 2, _YUYV_601),
    PixelFormat("YUV422", ("YCbCr601_422_8_CbYCrY",), 0x0210_0044, 2, _UYVY_601),
)

_BY_CODE = {known.code: known for known in PIXEL_FORMATS}


def pixel_format_names() -> tuple[str, ...]:
    """What ``pixel_format=`` can be."""
    return tuple(dict.fromkeys(known.option for known in PIXEL_FORMATS))


def decode(buffer: Buffer) -> Image:
    """The picture in a complete buffer, (H, W) mono or (H, W, 3) BGR uint8.

    Raises:
        InputError: a pixel format that is not in ``PIXEL_FORMATS``, or one that cannot have such a size.
    """
    known = _BY_CODE.get(buffer.pixel_format)
    if known is None or buffer.data is None:
        raise InputError(
            f"the camera's buffer has the pixel format 0x{buffer.pixel_format:08X}, which is not supported"
        )
    row_bytes = buffer.width * known.bytes_per_pixel
    stride = row_bytes + buffer.padding_x
    rows = buffer.data[: stride * buffer.height].reshape(buffer.height, stride)[:, :row_bytes]
    try:
        return np.ascontiguousarray(known.to_image(rows))
    except (cv2.error, ValueError):
        size = f"{buffer.width}x{buffer.height}"
        raise InputError(f"a {known.names[0]} picture of {size} pixels cannot be converted") from None


def what_is_wrong(buffer: Buffer, size_wh: tuple[int, int]) -> str | None:
    """Why a buffer that came as complete is none: unplugging has been seen to give pictures without rows or columns."""
    if (buffer.width, buffer.height) != size_wh:
        return "a picture of {}x{} pixels where {}x{} are set".format(buffer.width, buffer.height, *size_wh)
    known = _BY_CODE.get(buffer.pixel_format)
    have = 0 if buffer.data is None else buffer.data.size
    need = (buffer.width * (known.bytes_per_pixel if known else 1) + buffer.padding_x) * buffer.height
    return f"{have} of {need} bytes" if have < need else None


# Frame ids.


class FrameIds:
    """Makes numbers that only rise of a device's frame ids, and counts those that are missing in between."""

    def __init__(self) -> None:
        self._device_id: int | None = None
        self._unwrapped = 0

    def next(self, device_id: int | None) -> tuple[int | None, int]:
        """The next frame's number, None where the device does not tell, and how many frames were lost before it.

        Args:
            device_id: None where this one buffer has none; it then counts as the one that was due.
        """
        if self._device_id is None:
            self._device_id = device_id
            self._unwrapped = device_id or 0
            return device_id, 0
        if device_id is None:
            self._device_id += 1
            self._unwrapped += 1
            return self._unwrapped, 0
        step = device_id - self._device_id
        if step == 0:
            # Always the same, mostly 0: it does not count.
            return None, 0
        # One more than the limit: counted on above, for a buffer without an id.
        if step < 0 and self._device_id <= ID_LIMIT + 1:
            step %= ID_LIMIT
        if not 1 <= step <= MAX_LOST:
            step = 1
        self._device_id = device_id
        self._unwrapped += step
        return self._unwrapped, step - 1


# Features.


class Features:
    """Sets features of a camera: by name, checked before, and read back after.

    Args:
        what: the source, for messages.
    """

    def __init__(self, what: str, camera: Camera) -> None:
        self._what = what
        self._camera = camera

    def first(self, *names: str) -> str | None:
        """The first of these features that the camera has and that can be set now."""
        for name in names:
            feature = self._camera.feature(name)
            if feature is not None and feature.writable():
                return name
        return None

    def value(self, name: str) -> Value | None:
        """A feature's value; None if the camera does not have it or does not tell."""
        feature = self._camera.feature(name)
        try:
            return None if feature is None else feature.get()
        except Refused:
            return None

    def entries(self, name: str) -> Sequence[str]:
        """The symbolic names of an enumeration; none if the camera does not have it."""
        feature = self._camera.feature(name)
        return () if feature is None or feature.kind != "enumeration" else feature.entries()

    def set(self, name: str, text: str) -> None:
        """Set a feature.

        Args:
            text: a number, ``true`` or ``false``, an enumeration's symbolic name, or ``execute`` for a command.

        Raises:
            UsageError: no such feature, a value it cannot take, or the camera refused.
        """
        feature = self._camera.feature(name)
        if feature is None:
            near = difflib.get_close_matches(name, self._camera.feature_names(), 1)
            raise UsageError(f"{self._what}: the camera has no feature {name!r}{_did_you_mean(near)}")
        if not feature.writable():
            raise UsageError(
                f"{self._what}: the camera's {name} cannot be set (read only, or locked by another setting)"
            )
        try:
            value = self._checked(name, feature, text)
            feature.set(value)
            if feature.kind != "command":
                self._check_taken(name, value, feature.get())
        except Refused as error:
            raise UsageError(f"{self._what}: the camera refused {name}={text}: {error}") from None

    def _checked(self, name: str, feature: Feature, text: str) -> Value:
        expected = ""
        if feature.kind in ("integer", "float"):
            low, high, step = feature.limits()
            number = _number(text)
            if number is not None and low <= number <= high:
                if feature.kind == "float":
                    return number
                # Not through a float, which cannot hold large integers.
                if re.fullmatch("-?[0-9]+", text) and (step <= 1 or (int(text) - int(low)) % int(step) == 0):
                    return int(text)
            steps = f" in steps of {step:g}" if feature.kind == "integer" and step > 1 else ""
            whole = "a whole number" if feature.kind == "integer" else "a number"
            expected = f"{whole} from {low:.10g} to {high:.10g}{steps}"
        elif feature.kind == "boolean":
            if text.lower() in ("true", "false", "1", "0"):
                return text.lower() in ("true", "1")
            expected = "true or false"
        elif feature.kind == "enumeration":
            entries = feature.entries()
            if text in entries:
                return text
            near = difflib.get_close_matches(text, entries, 1)
            expected = f"one of {', '.join(entries)}{_did_you_mean(near)}"
        elif feature.kind == "command":
            if text == "execute":
                return text
            expected = "execute: it is a command"
        else:
            return text
        raise UsageError(f"{self._what}: the camera's {name} must be {expected}; got {text!r}")

    def _check_taken(self, name: str, value: Value, taken: Value) -> None:
        if isinstance(value, float) and isinstance(taken, (int, float)):
            if not math.isclose(value, taken, rel_tol=FLOAT_TOLERANCE):
                _log.warning("%s: the camera rounded %s from %.10g to %.10g", self._what, name, value, taken)
        elif value != taken:
            raise UsageError(f"{self._what}: the camera's {name} is {taken!r} after it was set to {value!r}")


def _did_you_mean(near: Sequence[str]) -> str:
    return f"; did you mean {near[0]!r}?" if near else ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def configure(features: Features, what: str, options: CameraOptions) -> None:
    """Set what the options ask for. What they do not name stays as it is, but for the trigger, which is then off.

    Raises:
        UsageError: the camera does not have it, or refused it.
    """

    def one_of(option: str, *names: str) -> str:
        name = features.first(*names)
        if name is None:
            raise UsageError(
                f"{what}: this camera cannot take {option}: it has no {' or '.join(names)} that can be set"
            )
        return name

    def set_if_there(name: str, value: str) -> None:
        if value in features.entries(name) and features.first(name):
            features.set(name, value)

    set_if_there("AcquisitionMode", "Continuous")
    if options.pixel_format is not None:
        _set_pixel_format(features, what, options.pixel_format)
    if options.roi is not None:
        width, height, x, y = options.roi
        # With the offsets at 0 every size is allowed; their order then cannot matter.
        for name, value in (("OffsetX", 0), ("OffsetY", 0), ("Width", width), ("Height", height)):
            features.set(one_of("roi", name), str(value))
        for name, value in (("OffsetX", x), ("OffsetY", y)):
            features.set(name, str(value))
    if options.exposure_us is not None:
        set_if_there("ExposureAuto", "Off")
        set_if_there("ExposureMode", "Timed")
        features.set(one_of("exposure_us", "ExposureTime", "ExposureTimeAbs"), str(options.exposure_us))
    if options.gain_db is not None:
        set_if_there("GainAuto", "Off")
        if not isinstance(features.value("Gain"), float):
            raise UsageError(f"{what}: this camera has no Gain in dB; set its own unit with feature.GainRaw=N")
        features.set("Gain", str(options.gain_db))
    if options.packet_size is not None:
        features.set(one_of("packet_size", "GevSCPSPacketSize"), str(options.packet_size))
    _set_trigger(features, what, options)
    if options.fps is not None:
        for name in ("AcquisitionFrameRateEnable", "AcquisitionFrameRateEnabled"):
            if features.first(name):
                features.set(name, "true")
        features.set(one_of("fps", "AcquisitionFrameRate", "AcquisitionFrameRateAbs"), str(options.fps))
    for name, text in options.features:
        features.set(name, text)
    current, usable = features.value("PixelFormat"), _usable_formats(features)
    if current not in [name for _, name in usable]:
        raise UsageError(
            f"{what}: the camera is set to {current}, which is not supported; choose pixel_format={_options(usable)}"
        )


def _usable_formats(features: Features) -> list[tuple[str, str]]:
    """What the camera offers and we can convert: our name and the camera's."""
    offered = features.entries("PixelFormat")
    return [(known.option, name) for known in PIXEL_FORMATS for name in known.names if name in offered]


def _options(usable: Sequence[tuple[str, str]]) -> str:
    return " or ".join(dict.fromkeys(option for option, _ in usable)) or "nothing that is supported"


def _set_pixel_format(features: Features, what: str, wanted: str) -> None:
    usable = _usable_formats(features)
    name = next((name for option, name in usable if option == wanted), None)
    if name is None:
        raise UsageError(f"{what}: this camera does not have pixel_format={wanted}; it has {_options(usable)}")
    features.set("PixelFormat", name)


def _set_trigger(features: Features, what: str, options: CameraOptions) -> None:
    if features.first("TriggerMode") is None:
        if options.trigger != "off":
            raise UsageError(f"{what}: this camera cannot take trigger={options.trigger}: it has no TriggerMode")
        return
    selectors = features.entries("TriggerSelector")
    # Any trigger that another program left on would keep the camera silent.
    for selector in selectors or (None,):
        if selector is not None:
            features.set("TriggerSelector", selector)
        if features.value("TriggerMode") == "On" and features.first("TriggerMode"):
            features.set("TriggerMode", "Off")
    if "FrameStart" in selectors:
        features.set("TriggerSelector", "FrameStart")
    if options.trigger != "off":
        features.set("TriggerSource", "Software" if options.trigger == "software" else options.trigger_source)
        features.set("TriggerMode", "On")


# Grabbing.


def genicam_opener(uri: str, options: CameraOptions, connect: Callable[[], Camera]) -> Callable[[], ThreadedSource]:
    """What opens a camera as a source; everything that touches it happens on a thread of its own.

    Args:
        uri: as given.
        connect: finds and opens the camera.

    It raises UsageError where the camera lacks a feature, or refuses a value, and SourceError where it is not there, in
    use by another program, or does not answer in time.
    """
    return partial(
        ThreadedSource,
        uri,
        partial(_run, masked_uri(uri), options, connect),
        open_timeout_s=OPEN_TIMEOUT_S,
        buffers=options.buffers,
        triggered=options.trigger == "hardware",
    )


def _run(what: str, options: CameraOptions, connect: Callable[[], Camera], slot: Slot) -> None:
    with closing(connect()) as camera:
        features = Features(what, camera)
        configure(features, what, options)
        camera.start(options.buffers)
        slot.opened()
        try:
            with _software_trigger(what, camera, options.trigger_rate_hz) as failures:
                _grab(what, camera, features, options, slot, failures)
        except SourceError as error:
            # Now: to let go of a camera that is gone can take many seconds. A fresh one, which refers to nothing.
            slot.end(SourceError(mask(str(error))))
            raise


def _grab(
    what: str, camera: Camera, features: Features, options: CameraOptions, slot: Slot, failures: Sequence[SourceError]
) -> None:
    size_wh = (int(features.value("Width") or 0), int(features.value("Height") or 0))
    silence_s = _silence_s(features, options)
    ids, seen, last_s = FrameIds(), False, time.monotonic()
    while not slot.closing:
        if failures:
            raise failures[0]
        buffer = camera.grab(GRAB_TIMEOUT_S)
        now_s = time.monotonic()
        if buffer is not None:
            seen, last_s = True, now_s
            slot.put(_picture(buffer, ids, size_wh, now_s, part_id=options.part_id))
        elif silence_s is not None and now_s - last_s > (silence_s if seen else max(silence_s, FIRST_FRAME_S)):
            raise SourceError(f"{what}: the camera has delivered nothing for {now_s - last_s:.1f} s")


def _picture(buffer: Buffer, ids: FrameIds, size_wh: tuple[int, int], captured_s: float, *, part_id: bool) -> Picture:
    frame_id, lost = ids.next(buffer.frame_id)
    return Picture(
        partial(decode, buffer),
        captured_s,
        time_ns=buffer.time_ns,
        incomplete=buffer.incomplete or what_is_wrong(buffer, size_wh),
        lost=lost,
        camera_frame_id=frame_id,
        part_id=str(frame_id) if part_id and frame_id is not None else None,
    )


def _silence_s(features: Features, options: CameraOptions) -> float | None:
    """After how many seconds without a frame the camera is given up; None: never, it waits for parts."""
    if options.timeout_s is not None or options.trigger == "hardware":
        return options.timeout_s
    rate_hz: Value | None = options.trigger_rate_hz or options.fps
    for name in ("ResultingFrameRate", "ResultingFrameRateAbs", "AcquisitionFrameRate", "AcquisitionFrameRateAbs"):
        rate_hz = rate_hz or features.value(name)
    if not isinstance(rate_hz, (int, float)) or rate_hz <= 0:
        return SILENCE_S
    return max(SILENCE_S, SILENCE_PERIODS / rate_hz)


@contextmanager
def _software_trigger(what: str, camera: Camera, rate_hz: float | None) -> Iterator[list[SourceError]]:
    """While it lasts, the trigger is fired at this rate (never for None); what went wrong is in the list."""
    failures: list[SourceError] = []
    if rate_hz is None:
        yield failures
        return
    command = camera.feature("TriggerSoftware")
    if command is None:
        raise UsageError(f"{what}: this camera cannot take trigger=software: it has no TriggerSoftware")
    ended = threading.Event()

    def fire() -> None:
        due_s = time.monotonic()
        while not ended.wait(max(0.0, due_s - time.monotonic())):
            try:
                command.set("execute")
            except Refused:
                # Not ready for the next one yet; the camera's own limit is then its rate.
                pass
            except SourceError as error:
                failures.append(error)
                return
            # Late ones are left out, not made up for.
            due_s = max(due_s + 1 / rate_hz, time.monotonic())

    thread = threading.Thread(target=fire, name=f"trigger {what}", daemon=True)
    thread.start()
    try:
        yield failures
    finally:
        ended.set()
        thread.join()
