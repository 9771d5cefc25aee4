"""USB and other V4L2 cameras, through OpenCV.

    camera_opener("usb:0?size=1920x1080&fps=30&pixel_format=MJPG")().read(timeout_s=1.0)

What was asked for is read back: where a camera does something else, the error says what it offers.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from recontrast_edge.errors import InputError, SourceError, UsageError
from recontrast_edge.preprocess import Image
from recontrast_edge.sources.threaded import Picture, Slot, ThreadedSource, captured_at
from recontrast_edge.uri import number_option, parse_options, size_option, whole_option

OPEN_TIMEOUT_S = 5.0

POLL_NS = 100_000_000

FPS_TOLERANCE = 0.01
"""Part by which a camera's rate may differ from what was asked for: 29.97 is 30."""

EXPOSURE_UNIT_US = 100
"""Unit of V4L2's control of the exposure time."""

_Raw = NDArray[np.uint8]

_TO_IMAGE: dict[str, Callable[[_Raw], Image]] = {
    "BGR3": lambda raw: raw,
    "GREY": lambda raw: raw.reshape(raw.shape[:2]),
    "NV12": lambda raw: _converted(raw, cv2.COLOR_YUV2BGR_NV12),
    "UYVY": lambda raw: _converted(raw, cv2.COLOR_YUV2BGR_UYVY),
    "YUYV": lambda raw: _converted(raw, cv2.COLOR_YUV2BGR_YUY2),
    "MJPG": lambda raw: _decoded(raw),
}
"""What a buffer of each pixel format becomes, (H, W) mono or (H, W, 3) BGR uint8."""


@dataclass(frozen=True)
class _Settings:
    size_wh: tuple[int, int] | None
    fps: float | None
    pixel_format: str | None
    exposure: int | None
    """In units of ``EXPOSURE_UNIT_US``."""
    gain: int | None


def camera_opener(uri: str) -> Callable[[], ThreadedSource]:
    """Check the URI of a V4L2 camera and return what opens it.

    That raises UsageError where the camera does not offer what was asked for, or is none, and SourceError where it is
    not there, in use by another program, or may not be read.

    Args:
        uri: ``usb:N`` for ``/dev/videoN``, or the device's path; ``/dev/v4l/by-id/...`` stays the same camera whatever
            it is plugged into. Options: ``size=WxH``, ``fps``, ``pixel_format`` (MJPG, YUYV, UYVY, NV12, GREY or
            BGR3), ``exposure_us`` (turns the automatic off), ``gain`` (in the camera's units).

    Raises:
        UsageError: a bad option.
    """
    what = f"source {uri!r}"
    place, _, query = uri.partition("?")
    options = parse_options(what, query, ("size", "fps", "pixel_format", "exposure_us", "gain"))
    number = re.fullmatch(r"usb:([0-9]{1,4})", place)
    if place.startswith("usb:") and not number:
        raise UsageError(f"{what}: expected usb:NUMBER, e.g. usb:0 for /dev/video0")
    device = Path(f"/dev/video{number[1]}" if number else place)
    settings = _settings(what, options)
    return partial(ThreadedSource, uri, partial(_run, uri, device, settings), open_timeout_s=OPEN_TIMEOUT_S)


def _settings(what: str, options: dict[str, str]) -> _Settings:
    pixel_format = options.get("pixel_format")
    if pixel_format is not None and pixel_format not in _TO_IMAGE:
        raise UsageError(f"{what}: pixel_format must be one of {', '.join(_TO_IMAGE)}, got {pixel_format!r}")
    exposure = gain = fps = None
    if "exposure_us" in options:
        exposure_us = number_option(what, "exposure_us", options["exposure_us"], low=EXPOSURE_UNIT_US, high=1e8)
        exposure = round(exposure_us / EXPOSURE_UNIT_US)
    if "gain" in options:
        gain = whole_option(what, "gain", options["gain"], low=0, high=10**6)
    if "fps" in options:
        fps = number_option(what, "fps", options["fps"], low=0.1, high=10_000)
    size_wh = size_option(what, "size", options["size"]) if "size" in options else None
    return _Settings(size_wh, fps, pixel_format, exposure, gain)


def _run(uri: str, device: Path, settings: _Settings, slot: Slot) -> None:
    offers = offered_formats(device)
    capture = cv2.VideoCapture(str(device), cv2.CAP_V4L2)
    try:
        if not capture.isOpened():
            raise SourceError(f"{uri}: {device} cannot be opened; is it in use by another program?")
        to_image = _TO_IMAGE[_set_up(uri, device, capture, settings, offers)]
        slot.opened()
        while not slot.closing:
            # Waits no longer than that, where `read` would wait for as long as the camera is silent.
            ready, _ = cv2.VideoCapture.waitAny([capture], POLL_NS)
            if not ready:
                if not device.exists():
                    raise SourceError(f"{uri}: {device} is gone; was the camera unplugged?")
                continue
            taken_ms = capture.get(cv2.CAP_PROP_POS_MSEC)
            got, buffer = capture.retrieve()
            if not got:
                raise SourceError(f"{uri}: the camera delivers nothing any more")
            raw = np.asarray(buffer, np.uint8)
            incomplete = "the JPEG is cut off" if to_image is _TO_IMAGE["MJPG"] and not _jpeg_ends(raw) else None
            slot.put(Picture(partial(to_image, raw), captured_at(taken_ms / 1e3), round(taken_ms * 1e6), incomplete))
    except cv2.error as error:
        raise SourceError(f"{uri}: the camera failed ({error.err})") from None
    finally:
        capture.release()


def _set_up(
    uri: str, device: Path, capture: cv2.VideoCapture, settings: _Settings, offers: tuple[PixelFormat, ...]
) -> str:
    """Set what was asked for, check that it holds, and return the pixel format."""
    # Without conversion: only raw JPEG tells whether it is complete, and pictures that nobody wants are not decoded.
    capture.set(cv2.CAP_PROP_CONVERT_RGB, 0)
    if settings.pixel_format is not None:
        capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*settings.pixel_format))
    if settings.size_wh is not None:
        capture.set(cv2.CAP_PROP_FRAME_WIDTH, settings.size_wh[0])
        capture.set(cv2.CAP_PROP_FRAME_HEIGHT, settings.size_wh[1])
    if settings.fps is not None:
        capture.set(cv2.CAP_PROP_FPS, settings.fps)
    pixel_format = _fourcc_text(int(capture.get(cv2.CAP_PROP_FOURCC)))
    size_wh = (int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)))
    fps = capture.get(cv2.CAP_PROP_FPS)
    wrong = []
    if pixel_format not in _TO_IMAGE or pixel_format != (settings.pixel_format or pixel_format):
        wrong.append(f"pixel_format {settings.pixel_format or ' or '.join(_TO_IMAGE)}, got {pixel_format}")
    if size_wh != (settings.size_wh or size_wh):
        wrong.append("size {}x{}, got {}x{}".format(*(settings.size_wh or size_wh), *size_wh))
    if settings.fps is not None and abs(fps - settings.fps) > FPS_TOLERANCE * settings.fps:
        wrong.append(f"fps {settings.fps:g}, got {fps:g}")
    if wrong:
        offered = "; ".join(map(str, offers)) or "nothing that it names"
        raise UsageError(f"{uri}: expected {', '.join(wrong)}; {device} offers {offered}")
    if settings.exposure is not None:
        capture.set(cv2.CAP_PROP_AUTO_EXPOSURE, _MANUAL_EXPOSURE)
        _set_control(uri, device, capture, cv2.CAP_PROP_EXPOSURE, "exposure_us", settings.exposure, EXPOSURE_UNIT_US)
    if settings.gain is not None:
        _set_control(uri, device, capture, cv2.CAP_PROP_GAIN, "gain", settings.gain, 1)
    return pixel_format


_MANUAL_EXPOSURE = 1


def _set_control(
    uri: str, device: Path, capture: cv2.VideoCapture, control: int, name: str, value: int, unit: int
) -> None:
    taken = capture.set(control, value)
    got = capture.get(control)
    if not taken or got != value:
        offered = control_range(device, _CONTROL_IDS[control])
        limits = f"offers {offered[0] * unit} to {offered[1] * unit}" if offered else "does not offer it"
        raise UsageError(f"{uri}: expected {name} {value * unit}, got {got * unit:g}; {device} {limits}")


def _converted(raw: _Raw, code: int) -> Image:
    try:
        return np.asarray(cv2.cvtColor(raw, code), np.uint8)
    except cv2.error as error:
        raise InputError(f"a buffer of shape {raw.shape} is no picture ({error.err})") from None


def _jpeg_ends(raw: _Raw) -> bool:
    """Whether JPEG data have their end marker; drivers may fill up the buffer with zeros behind it."""
    used = np.flatnonzero(raw.reshape(-1)[-4096:])
    return len(used) > 1 and bytes(raw.reshape(-1)[-4096:][: used[-1] + 1][-2:]) == b"\xff\xd9"


def _decoded(raw: _Raw) -> Image:
    image = cv2.imdecode(raw.reshape(-1), cv2.IMREAD_COLOR)
    if image is None:
        raise InputError("the camera's JPEG cannot be decoded")
    return np.asarray(image, np.uint8)


# What a device offers. OpenCV does not tell; the kernel does.


@dataclass(frozen=True)
class PixelFormat:
    """A pixel format of a camera, with the sizes that go with it.

    Attributes:
        fourcc: V4L2's code of four characters.
        sizes: ``WIDTHxHEIGHT``, or ``WIDTHxHEIGHT..WIDTHxHEIGHT`` for a range, with the rates where the camera names
            them: ``640x480 (30, 15 fps)``.
    """

    fourcc: str
    sizes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.fourcc} {', '.join(self.sizes)}".strip()


def offered_formats(device: Path) -> tuple[PixelFormat, ...]:
    """The pixel formats and sizes that a V4L2 device offers, as its driver names them.

    Raises:
        UsageError: not a camera.
        SourceError: it is not there, or may not be read.
    """
    with _opened(device) as handle:
        capability = _query(handle, _QUERYCAP, struct.pack("<104x"))
        if capability is None:
            raise UsageError(f"{device}: not a camera; expected a V4L2 device such as /dev/video0")
        capabilities, device_capabilities = struct.unpack_from("<II", capability, 84)
        if capabilities & _CAP_DEVICE_CAPS:
            capabilities = device_capabilities
        if not capabilities & _CAP_VIDEO_CAPTURE:
            raise UsageError(f"{device}: delivers no pictures; a camera often has several devices, try the next one")
        return tuple(_formats(handle))


def control_range(device: Path, control_id: int) -> tuple[int, int] | None:
    """Smallest and largest value of a V4L2 control; None where there is no such control."""
    with _opened(device) as handle:
        answer = _query(handle, _QUERYCTRL, struct.pack("<I64x", control_id))
        return None if answer is None else struct.unpack_from("<ii", answer, 40)


@contextmanager
def _opened(device: Path) -> Iterator[int]:
    try:
        handle = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = {
            errno.ENOENT: "no such camera; `recontrast-edge cameras` lists those that are connected",
            errno.ENXIO: "no such camera; `recontrast-edge cameras` lists those that are connected",
            errno.ENODEV: "no such camera; `recontrast-edge cameras` lists those that are connected",
            errno.EACCES: "no permission; add the user to the group `video` and log in again",
            errno.EBUSY: "in use by another program",
        }.get(error.errno or 0, error.strerror)
        raise SourceError(f"{device}: {reason}") from None
    try:
        yield handle
    finally:
        os.close(handle)


def _query(handle: int, request: int, argument: bytes) -> bytes | None:
    """The answer to an ioctl; None where the device has none."""
    try:
        return fcntl.ioctl(handle, request, argument)
    except OSError:
        return None


def _formats(handle: int) -> Iterator[PixelFormat]:
    index = 0
    while answer := _query(handle, _ENUM_FMT, struct.pack("<II56x", index, _VIDEO_CAPTURE)):
        (code,) = struct.unpack_from("<I", answer, 44)
        yield PixelFormat(_fourcc_text(code), tuple(_sizes(handle, code)))
        index += 1


def _sizes(handle: int, code: int) -> Iterator[str]:
    index = 0
    while answer := _query(handle, _ENUM_FRAMESIZES, struct.pack("<II36x", index, code)):
        kind, *sides = struct.unpack_from("<7I", answer, 8)
        if kind != _DISCRETE:
            low_width, high_width, _, low_height, high_height, _ = sides
            yield f"{low_width}x{low_height}..{high_width}x{high_height}"
            return
        width, height = sides[:2]
        rates = ", ".join(f"{rate:g}" for rate in _rates(handle, code, width, height))
        yield f"{width}x{height}" + (f" ({rates} fps)" if rates else "")
        index += 1


def _rates(handle: int, code: int, width: int, height: int) -> Iterator[float]:
    index = 0
    while answer := _query(handle, _ENUM_FRAMEINTERVALS, struct.pack("<4I36x", index, code, width, height)):
        kind, numerator, denominator = struct.unpack_from("<3I", answer, 16)
        if kind != _DISCRETE or not numerator:
            return
        yield round(denominator / numerator, 3)
        index += 1


def _fourcc_text(code: int) -> str:
    return code.to_bytes(4, "little").decode("ascii", "replace").strip() if 0 <= code < 2**32 else str(code)


def _ioctl(direction: int, number: int, size: int) -> int:
    """As the macros of linux/ioctl.h make them; V4L2's type is `V`."""
    return direction << 30 | size << 16 | ord("V") << 8 | number


_QUERYCAP = _ioctl(2, 0, 104)
_ENUM_FMT = _ioctl(3, 2, 64)
_QUERYCTRL = _ioctl(3, 36, 68)
_ENUM_FRAMESIZES = _ioctl(3, 74, 44)
_ENUM_FRAMEINTERVALS = _ioctl(3, 75, 52)

_VIDEO_CAPTURE = 1
_DISCRETE = 1
_CAP_VIDEO_CAPTURE = 0x0000_0001
_CAP_DEVICE_CAPS = 0x8000_0000

_CONTROL_IDS = {cv2.CAP_PROP_EXPOSURE: 0x009A_0902, cv2.CAP_PROP_GAIN: 0x0098_0913}
"""OpenCV's property -> V4L2_CID_EXPOSURE_ABSOLUTE, V4L2_CID_GAIN."""
