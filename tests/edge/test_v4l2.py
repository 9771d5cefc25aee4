"""V4L2 cameras: a recording fake in the place of OpenCV's, one of the kernel's answers, and real devices that are none.

No loopback camera can be made without its kernel module.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from recontrast_edge.errors import SourceError, UsageError
from recontrast_edge.frame import EndOfStream, Frame, Source
from recontrast_edge.sources import open_source, v4l2
from recontrast_edge.sources.threaded import CLOSE_TIMEOUT_S
from tests.edge.leaks import assert_reopening_leaves_nothing

WIDTH, HEIGHT, PERIOD_S = 64, 48, 0.01


def jpeg(value: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    image = np.full((HEIGHT, WIDTH, 3), value, np.uint8)
    return np.frombuffer(cv2.imencode(".jpg", image)[1].tobytes(), np.uint8).reshape(1, -1)


class FakeCapture:
    """OpenCV's V4L2 backend with a camera of 100 pictures a second that offers YUYV, MJPG and GREY at 64x48."""

    opened: list[FakeCapture] = []  # noqa: RUF012 - emptied for each test
    unplugged = False
    silent = False
    hang_s = 0.0
    buffers: Callable[[int], Any] | None = None

    def __init__(self, name: str, backend: int) -> None:
        assert backend == cv2.CAP_V4L2
        time.sleep(FakeCapture.hang_s)
        self.name, self.released, self.threads = name, False, {threading.get_ident()}
        self.calls: list[tuple[int, float]] = []
        self.properties: dict[int, float] = {
            cv2.CAP_PROP_FOURCC: cv2.VideoWriter.fourcc(*"YUYV"),
            cv2.CAP_PROP_FRAME_WIDTH: WIDTH,
            cv2.CAP_PROP_FRAME_HEIGHT: HEIGHT,
            cv2.CAP_PROP_FPS: 100,
        }
        self.count = 0
        FakeCapture.opened.append(self)

    def isOpened(self) -> bool:  # noqa: N802 - OpenCV's name
        return True

    def set(self, key: int, value: float) -> bool:
        self.calls.append((key, value))
        choices: dict[int, tuple[float, ...]] = {
            cv2.CAP_PROP_FOURCC: tuple(cv2.VideoWriter.fourcc(*code) for code in ("YUYV", "MJPG", "GREY")),
            cv2.CAP_PROP_FRAME_WIDTH: (WIDTH,),
            cv2.CAP_PROP_FRAME_HEIGHT: (HEIGHT,),
            cv2.CAP_PROP_FPS: (50, 100),
            cv2.CAP_PROP_EXPOSURE: tuple(range(1, 51)),
            cv2.CAP_PROP_AUTO_EXPOSURE: (1, 3),
            cv2.CAP_PROP_CONVERT_RGB: (0, 1),
        }
        if key not in choices or value not in choices[key]:
            return False
        self.properties[key] = value
        return True

    def get(self, key: int) -> float:
        if key == cv2.CAP_PROP_POS_MSEC:
            return time.monotonic() * 1e3 - 5
        return self.properties.get(key, 0)

    @staticmethod
    def waitAny(captures: list[FakeCapture], timeout_ns: int) -> tuple[bool, list[int]]:  # noqa: N802 - OpenCV's name
        (capture,) = captures
        capture.threads.add(threading.get_ident())
        assert not capture.released
        time.sleep(FakeCapture.hang_s)
        if FakeCapture.unplugged:
            raise cv2.error("Error is reported for camera stream")
        if FakeCapture.silent:
            time.sleep(timeout_ns / 1e9)
            return False, []
        time.sleep(PERIOD_S)
        return True, [0]

    def retrieve(self) -> tuple[bool, Any]:
        assert self.properties[cv2.CAP_PROP_CONVERT_RGB] == 0
        self.count += 1
        if FakeCapture.buffers is not None:
            return True, FakeCapture.buffers(self.count)
        buffer = np.full((HEIGHT, WIDTH, 2), 128, np.uint8)
        buffer[:, :, 0] = self.count % 256
        return True, buffer

    def release(self) -> None:
        self.threads.add(threading.get_ident())
        self.released = True


FORMATS = (
    v4l2.PixelFormat("YUYV", ("64x48 (50, 100 fps)",)),
    v4l2.PixelFormat("MJPG", ("64x48 (50, 100 fps)",)),
)


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[FakeCapture]]:
    class Fresh(FakeCapture):
        pass

    FakeCapture.opened, FakeCapture.buffers = [], None
    FakeCapture.unplugged = FakeCapture.silent = False
    FakeCapture.hang_s = 0.0
    monkeypatch.setattr(cv2, "VideoCapture", Fresh)
    monkeypatch.setattr(v4l2, "offered_formats", lambda _device: FORMATS)
    monkeypatch.setattr(v4l2, "control_range", lambda _device, control: (1, 50) if control == 0x009A0902 else None)
    yield FakeCapture
    FakeCapture.hang_s = 0.0


def next_frame(source: Source) -> Frame:
    frame = source.read(5.0)
    assert frame is not None
    return frame


class TestFake:
    def test_a_late_reader_gets_the_newest_and_one_thread_does_everything(self, camera: type[FakeCapture]) -> None:
        with closing(open_source("usb:2")) as source:
            assert source.live
            first = next_frame(source)
            time.sleep(0.3)
            late = next_frame(source)
            assert late.frame_id > first.frame_id + 8
            # The driver's own timestamp, 5 ms before.
            assert late.camera_time_ns is not None
            assert late.captured_s == pytest.approx(late.camera_time_ns / 1e9, abs=1e-6)
            assert time.monotonic() - late.captured_s < 0.2
            assert late.image is not None
            assert late.image.shape == (HEIGHT, WIDTH, 3)
        (capture,) = camera.opened
        assert capture.name == "/dev/video2"
        assert capture.released
        assert len(capture.threads) == 1
        assert threading.get_ident() not in capture.threads

    def test_options_are_set_in_an_order_that_works_and_read_back(self, camera: type[FakeCapture]) -> None:
        uri = "/dev/video0?gain=0&fps=50&size=64x48&pixel_format=MJPG&exposure_us=500"
        camera.buffers = jpeg  # type: ignore[assignment]
        with pytest.raises(UsageError, match=r"gain 0, got 0; /dev/video0 does not offer it"):
            open_source(uri)
        with closing(open_source(uri.replace("gain=0&", ""))) as source:
            next_frame(source)
        keys = [key for key, _ in camera.opened[1].calls]
        fourcc, width = keys.index(cv2.CAP_PROP_FOURCC), keys.index(cv2.CAP_PROP_FRAME_WIDTH)
        assert fourcc < width < keys.index(cv2.CAP_PROP_FPS)
        # Manual first: an automatic would overrule the value.
        assert camera.opened[1].calls[-2:] == [(cv2.CAP_PROP_AUTO_EXPOSURE, 1), (cv2.CAP_PROP_EXPOSURE, 5)]
        assert all(capture.released for capture in camera.opened)

    @pytest.mark.parametrize(
        ("query", "message"),
        [
            (
                "size=1920x1080",
                r"expected size 1920x1080, got 64x48; /dev/video0 offers YUYV 64x48 \(50, 100 fps\); MJPG",
            ),
            ("fps=30", "expected fps 30, got 100"),
            ("pixel_format=UYVY", "expected pixel_format UYVY, got YUYV"),
            ("exposure_us=9000", "expected exposure_us 9000, got 0; /dev/video0 offers 100 to 5000"),
            ("sise=1x1", "did you mean 'size'"),
            ("pixel_format=JPEG", "one of BGR3, GREY"),
            ("exposure_us=1", "exposure_us must be"),
        ],
    )
    def test_what_the_camera_does_not_do(self, camera: type[FakeCapture], query: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            open_source(f"usb:0?{query}")
        assert all(capture.released for capture in camera.opened)

    def test_pixel_formats(self, camera: type[FakeCapture]) -> None:
        grey = np.full((HEIGHT, WIDTH), 77, np.uint8)
        for code, buffer, shape in (("GREY", grey, (HEIGHT, WIDTH)), ("MJPG", jpeg(77), (HEIGHT, WIDTH, 3))):
            camera.buffers = lambda _count, buffer=buffer: buffer  # type: ignore[assignment,misc]
            with closing(open_source(f"usb:0?pixel_format={code}")) as source:
                image = next_frame(source).image
            assert image is not None
            assert image.shape == shape
            assert np.abs(image.astype(int) - 77).max() <= 1

    def test_a_jpeg_that_is_cut_off_is_counted_and_never_an_image(self, camera: type[FakeCapture]) -> None:
        whole = jpeg(90)
        padded = np.concatenate([whole, np.zeros((1, 500), np.uint8)], axis=1)
        camera.buffers = lambda count: padded if count % 2 else whole[:, :-40]  # type: ignore[assignment,misc]
        with closing(open_source("usb:0?pixel_format=MJPG")) as source:
            frames = [next_frame(source) for _ in range(20)]
            counted = getattr(source, "counters")["incomplete"]  # noqa: B009 - not part of the protocol
        broken = [frame for frame in frames if frame.fault is not None]
        assert {frame.fault for frame in broken} == {"incomplete_frame"}
        assert all(frame.image is None for frame in broken)
        assert 5 <= len(broken) <= counted
        assert all((frame.image is not None) == (frame.frame_id % 2 == 0) for frame in frames)

    def test_an_unplugged_camera_is_an_error(self, camera: type[FakeCapture]) -> None:
        with closing(open_source("usb:0")) as source:
            next_frame(source)
            camera.unplugged = True
            with pytest.raises(SourceError, match="the camera failed"):  # noqa: PT012 - frames may be on their way
                while True:
                    source.read(1.0)

    def test_a_silent_camera_that_is_gone_is_an_error_and_one_that_is_not_is_none(
        self, camera: type[FakeCapture], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        device = tmp_path / "video0"
        device.touch()
        camera.silent = True
        with closing(v4l2.camera_opener(str(device))()) as source:
            assert source.read(0.3) is None
            device.unlink()
            with pytest.raises(SourceError, match="unplugged"):
                source.read(1.0)

    def test_a_driver_that_hangs_keeps_nobody_waiting(self, camera: type[FakeCapture]) -> None:
        source = open_source("usb:0")
        next_frame(source)
        camera.hang_s = CLOSE_TIMEOUT_S + 0.7
        time.sleep(0.1)
        started_s = time.monotonic()
        while source.read(0.1) is not None:
            pass
        assert time.monotonic() - started_s < 0.5
        source.close()
        assert time.monotonic() - started_s < CLOSE_TIMEOUT_S + 0.5
        with pytest.raises(EndOfStream):
            source.read(0.1)
        # One thread that hangs is enough.
        with pytest.raises(SourceError, match="still hangs"):
            open_source("usb:0")
        camera.hang_s = 0.0
        time.sleep(1.0)
        assert camera.opened[0].released
        with closing(open_source("usb:0")) as again:
            next_frame(again)

    def test_an_open_that_hangs_is_given_up(self, camera: type[FakeCapture], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(v4l2, "OPEN_TIMEOUT_S", 0.2)
        camera.hang_s = 0.6
        with pytest.raises(SourceError, match=r"could not be opened within 0\.2 s"):
            open_source("usb:0")
        camera.hang_s = 0.0
        assert camera.opened[0].released

    @pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.soak)])
    def test_reopening_leaves_nothing_behind(self, camera: type[FakeCapture], times: int) -> None:
        def use() -> None:
            with closing(open_source("usb:0")) as source:
                next_frame(source)
            camera.opened.clear()

        assert_reopening_leaves_nothing(use, times=times)


class TestDevices:
    """The real file system and the real kernel."""

    def test_not_there(self) -> None:
        with pytest.raises(SourceError, match="no such camera"):
            open_source("usb:987")
        with pytest.raises(SourceError, match="no such camera"):
            open_source("/dev/v4l/by-id/usb-none-index0?fps=30")

    @pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
    def test_not_a_camera(self, device: str) -> None:
        with pytest.raises(UsageError, match="not a camera"):
            v4l2.camera_opener(device)()

    def test_no_permission(self, tmp_path: Path) -> None:
        device = tmp_path / "video0"
        device.touch(mode=0o000)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(SourceError, match="group `video`"):
                v4l2.camera_opener(str(device))()
        finally:
            os.seteuid(user)

    @pytest.mark.parametrize("number", ["", "x", "-1", "0x1", "99999"])
    def test_bad_numbers(self, number: str) -> None:
        with pytest.raises(UsageError, match="usb:NUMBER"):
            open_source(f"usb:{number}")


class TestKernelAnswers:
    """What ``linux/videodev2.h`` defines, packed by hand."""

    def test_formats_sizes_and_rates(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        device = tmp_path / "video0"
        device.touch()
        formats = [b"YUYV", b"MJPG"]

        def ioctl(_handle: int, request: int, argument: bytes) -> bytes:
            if request == 0x80685600:  # VIDIOC_QUERYCAP
                # capabilities of the whole camera, and of this device: capture
                return bytes(84) + struct.pack("<II", 0x84A00001, 0x04200001) + bytes(12)
            if request == 0xC0405602:  # VIDIOC_ENUM_FMT
                index, kind = struct.unpack_from("<II", argument)
                assert kind == 1
                if index < len(formats):
                    return struct.pack("<III32s4s16x", index, kind, 0, b"a format", formats[index])
            if request == 0xC02C564A:  # VIDIOC_ENUM_FRAMESIZES
                index, code = struct.unpack_from("<I4s", argument)
                if code == b"YUYV" and index < 2:
                    return struct.pack("<I4sI6I8x", index, code, 1, *[(640, 480), (1280, 720)][index], 0, 0, 0, 0)
                if code == b"MJPG" and index == 0:
                    return struct.pack("<I4sI6I8x", index, code, 3, 32, 1920, 2, 16, 1080, 2)
            if request == 0xC034564B:  # VIDIOC_ENUM_FRAMEINTERVALS
                index, _, width, _ = struct.unpack_from("<I4sII", argument)
                rates = [(1, 30), (1001, 15000)] if width == 640 else [(1, 10)]
                if index < len(rates):
                    return argument[:16] + struct.pack("<I2I", 1, *rates[index]) + bytes(24)
            raise OSError(22, "Invalid argument")

        monkeypatch.setattr("fcntl.ioctl", ioctl)
        assert [str(offer) for offer in v4l2.offered_formats(device)] == [
            "YUYV 640x480 (30, 14.985 fps), 1280x720 (10 fps)",
            "MJPG 32x16..1920x1080",
        ]

    def test_a_device_without_pictures(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        device = tmp_path / "video1"
        device.touch()
        # The camera captures, but this device of it is for metadata.
        answer = bytes(84) + struct.pack("<II", 0x84A00001, 0x04A00000) + bytes(12)
        monkeypatch.setattr("fcntl.ioctl", lambda *_: answer)
        with pytest.raises(UsageError, match="try the next one"):
            v4l2.camera_opener(str(device))()

    def test_the_range_of_a_control(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        device = tmp_path / "video0"
        device.touch()

        def ioctl(_handle: int, request: int, argument: bytes) -> bytes:
            assert (request, argument[:4]) == (0xC0445624, (0x009A0902).to_bytes(4, "little"))
            return struct.pack("<II32siiii12x", 0x009A0902, 1, b"Exposure Time, Absolute", 3, 2047, 1, 250)

        monkeypatch.setattr("fcntl.ioctl", ioctl)
        assert v4l2.control_range(device, 0x009A0902) == (3, 2047)
