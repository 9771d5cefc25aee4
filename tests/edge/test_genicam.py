"""GenICam cameras: pylon's emulator, a GenTL producer with simulated devices, and what needs no camera at all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from recontrast_edge.errors import InputError, MissingError, RecontrastError, SourceError, UsageError
from recontrast_edge.frame import EndOfStream, Frame, Source
from recontrast_edge.sources import open_source
from recontrast_edge.sources.genicam import Buffer, FrameIds, decode, parse_camera_uri, what_is_wrong

ROOT = Path(__file__).parents[2]
MONO8, BAYER = 0x0108_0001, {"RG": 0x0108_0009, "BG": 0x0108_000B, "GR": 0x0108_0008, "GB": 0x0108_000A}


def read(source: Source, count: int) -> list[Frame]:
    frames = []
    while len(frames) < count:
        frame = source.read(10.0)
        assert frame is not None, "no frame within 10 s"
        frames.append(frame)
    return frames


class TestFrameIds:
    def run(self, *device_ids: int | None) -> list[tuple[int | None, int]]:
        ids = FrameIds()
        return [ids.next(device_id) for device_id in device_ids]

    def test_a_jump_counts_what_was_lost(self) -> None:
        assert self.run(7, 8, 11, 12) == [(7, 0), (8, 0), (11, 2), (12, 0)]

    def test_sixteen_bits_wrap_to_one_as_gige_vision_has_it(self) -> None:
        assert self.run(65534, 65535, 1, 2) == [(65534, 0), (65535, 0), (65536, 0), (65537, 0)]
        # Losses across the wrap: 65535, 1 and 2 are missing.
        assert self.run(65534, 3) == [(65534, 0), (65538, 3)]

    def test_a_counter_that_includes_zero_loses_nothing_either(self) -> None:
        assert [lost for _, lost in self.run(65534, 65535, 0, 1)] == [0, 0, 0, 0]

    def test_64_bits_do_not_wrap(self) -> None:
        assert self.run(65535, 65536, 65538) == [(65535, 0), (65536, 0), (65538, 1)]

    def test_a_device_that_counts_anew_or_not_at_all_has_lost_nothing(self) -> None:
        assert self.run(40_000, 1, 2) == [(40_000, 0), (40_001, 0), (40_002, 0)]
        assert self.run(0, 0, 0) == [(0, 0), (None, 0), (None, 0)]
        assert self.run(None, None) == [(None, 0), (None, 0)]
        assert self.run(1, 10**9) == [(1, 0), (2, 0)]

    def test_a_buffer_without_an_id_is_the_one_that_was_due(self) -> None:
        assert self.run(5, None, 7, None, 10) == [(5, 0), (6, 0), (7, 0), (8, 0), (10, 1)]
        assert self.run(65535, None, 2) == [(65535, 0), (65536, 0), (65537, 0)]


def mosaic(image_bgr: NDArray[np.uint8], pattern: str) -> NDArray[np.uint8]:
    """What a sensor with such a colour filter sees; the pattern's name is that of its first two pixels."""
    second = {"RG": "GB", "BG": "GR", "GR": "BG", "GB": "RG"}[pattern]
    raw = np.empty(image_bgr.shape[:2], np.uint8)
    for row, colours in enumerate((pattern, second)):
        for column, colour in enumerate(colours):
            raw[row::2, column::2] = image_bgr[row::2, column::2, "BGR".index(colour)]
    return raw


def full_range_yuv(image_bgr: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Y, U, V as JPEG defines them, with all 256 levels, from the defining equations."""
    blue, green, red = (image_bgr[:, :, channel].astype(float) for channel in range(3))
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    u, v = (blue - y) / 1.772 + 128, (red - y) / 1.402 + 128
    return tuple(np.clip(np.round(plane), 0, 255).astype(np.uint8) for plane in (y, u, v))  # type: ignore[return-value]


class TestDecode:
    @pytest.fixture
    def image_bgr(self) -> NDArray[np.uint8]:
        """Three patches, so large that the interpolation between them does not matter."""
        image = np.zeros((32, 96, 3), np.uint8)
        image[:, :32], image[:, 32:64], image[:, 64:] = (200, 40, 10), (30, 180, 60), (20, 90, 220)
        return image

    def check(self, buffer: Buffer, image_bgr: NDArray[np.uint8]) -> None:
        decoded = decode(buffer)
        assert decoded.shape == image_bgr.shape
        assert decoded.dtype == np.uint8
        inner = (slice(4, -4), [16, 48, 80])
        np.testing.assert_allclose(decoded[inner].astype(int), image_bgr[inner], atol=3)

    @pytest.mark.parametrize("pattern", ["RG", "BG", "GR", "GB"])
    def test_bayer(self, image_bgr: NDArray[np.uint8], pattern: str) -> None:
        data = mosaic(image_bgr, pattern).reshape(-1)
        self.check(Buffer(0, data=data, width=96, height=32, pixel_format=BAYER[pattern]), image_bgr)

    def test_rgb_bgr_and_with_alpha(self, image_bgr: NDArray[np.uint8]) -> None:
        alpha = np.full((32, 96, 1), 7, np.uint8)
        rgb = image_bgr[:, :, ::-1]
        for code, pixels in (
            (0x0218_0014, rgb),
            (0x0218_0015, image_bgr),
            (0x0220_0016, np.concatenate([rgb, alpha], axis=2)),
            (0x0220_0017, np.concatenate([image_bgr, alpha], axis=2)),
        ):
            self.check(Buffer(0, data=pixels.reshape(-1), width=96, height=32, pixel_format=code), image_bgr)

    @pytest.mark.parametrize(("code", "order"), [(0x0210_0032, "YUYV"), (0x0210_001F, "UYVY"), (0x0210_003B, "YUYV")])
    def test_full_range_yuv_with_one_chroma_for_two_pixels(
        self, image_bgr: NDArray[np.uint8], code: int, order: str
    ) -> None:
        image_bgr[:, :32] = 252  # All levels are used: studio range would clip this.
        y, u, v = full_range_yuv(image_bgr)
        planes = {"U": [u[:, 0::2]], "V": [v[:, 0::2]], "Y": [y[:, 1::2], y[:, 0::2]]}
        data = np.stack([planes[name].pop() for name in order], axis=2).reshape(-1)
        self.check(Buffer(0, data=data, width=96, height=32, pixel_format=code), image_bgr)

    @pytest.mark.parametrize(("code", "order"), [(0x0210_003E, "YUYV"), (0x0210_0044, "UYVY")])
    def test_yuv_of_bt_601_has_studio_range(self, image_bgr: NDArray[np.uint8], code: int, order: str) -> None:
        i420 = cv2.cvtColor(image_bgr, cv2.COLOR_BGR2YUV_I420)
        y, chroma = i420[:32], i420[32:].reshape(2, 16, 48).repeat(2, axis=1)
        planes = {"U": [chroma[0]], "V": [chroma[1]], "Y": [y[:, 1::2], y[:, 0::2]]}
        data = np.stack([planes[name].pop() for name in order], axis=2).reshape(-1)
        self.check(Buffer(0, data=data, width=96, height=32, pixel_format=code), image_bgr)

    def test_padding_and_what_lies_behind_the_picture_are_left_out(self) -> None:
        rows = np.arange(5 * 9, dtype=np.uint8).reshape(5, 9)
        data = np.concatenate([rows.reshape(-1), np.full(20, 255, np.uint8)])
        decoded = decode(Buffer(0, data=data, width=7, height=5, pixel_format=MONO8, padding_x=2))
        np.testing.assert_array_equal(decoded, rows[:, :7])
        assert decoded.flags.c_contiguous

    def test_other_formats_and_impossible_sizes_are_refused(self) -> None:
        data = np.zeros(64, np.uint8)
        with pytest.raises(InputError, match="0x01100003"):
            decode(Buffer(0, data=data, width=4, height=4, pixel_format=0x0110_0003))
        with pytest.raises(InputError, match="cannot be converted"):
            decode(Buffer(0, data=data, width=3, height=4, pixel_format=0x0210_0032))

    def test_odd_buffers_are_no_pictures(self) -> None:
        data = np.zeros(12, np.uint8)
        assert what_is_wrong(Buffer(0, data=data, width=4, height=3, pixel_format=MONO8), (4, 3)) is None
        # As seen after unplugging.
        assert "0x1920" in (what_is_wrong(Buffer(0, data=data, width=0, height=1920), (4, 3)) or "")
        short = Buffer(0, data=data[:11], width=4, height=3, pixel_format=MONO8)
        assert what_is_wrong(short, (4, 3)) == "11 of 12 bytes"
        padded = Buffer(0, data=data, width=4, height=3, pixel_format=MONO8, padding_x=1)
        assert what_is_wrong(padded, (4, 3)) == "12 of 15 bytes"


class TestOptions:
    @pytest.mark.parametrize(
        ("query", "message"),
        [
            ("exposure=3", "did you mean 'exposure_us'"),
            ("exposure_us=long", "exposure_us must be a number"),
            ("roi=640x480", "roi must be WxH+X+Y"),
            ("pixel_format=Mono12", "pixel_format must be one of Mono8, BayerRG8"),
            ("trigger=on", "trigger must be one of off, software, hardware"),
            ("trigger=software", "needs trigger_rate_hz"),
            ("trigger_rate_hz=5", "goes with trigger=software"),
            ("fps=5&trigger=hardware", "goes with trigger=off"),
            ("trigger_source=Line1", "goes with trigger=hardware"),
            ("part_id=counter", "part_id must be one of frame"),
            ("buffers=0", "buffers must be a whole number"),
            ("feature.=1", "expected feature.NAME=VALUE"),
            ("feature.Gamma", "expected feature.NAME=VALUE"),
            ("fps=1&fps=2", "once"),
        ],
    )
    @pytest.mark.parametrize("scheme", ["pylon", "aravis", "genicam:x.cti#"])
    def test_bad_ones_are_refused_by_name_before_any_camera_is_touched(
        self, scheme: str, query: str, message: str
    ) -> None:
        with pytest.raises(UsageError, match=re.escape(message)):
            open_source(f"{scheme}{'' if '#' in scheme else ':'}1?{query}")

    def test_places_and_values_are_percent_decoded_and_features_keep_their_order(self) -> None:
        uri = "pylon:Line%201%3F?feature.LineSelector=Line1&feature.LineMode=Input&feature.LineSelector=a%26b"
        place, options = parse_camera_uri(uri, "pylon")
        assert place == "Line 1?"
        assert options.features == (("LineSelector", "Line1"), ("LineMode", "Input"), ("LineSelector", "a&b"))

    @pytest.mark.parametrize(
        ("uri", "module", "advice"),
        [
            ("pylon:1", "pypylon", "pip install 'recontrast-edge[cameras]'"),
            ("genicam:/etc/hostname#1", "harvesters", "pip install 'recontrast-edge[cameras]'"),
            ("aravis:1", "gi", "gir1.2-aravis-0.8 python3-gi"),
        ],
    )
    def test_a_missing_library_is_named_with_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, uri: str, module: str, advice: str
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingError, match=re.escape(advice)):
            open_source(uri)


# Pylon reads it once in a process.
os.environ.setdefault("PYLON_CAMEMU", "3")
# A camera keeps what was set: one shows pictures from files, one is set wrong.
WITH_PICTURES, CAMERA, REFUSING = "pylon:0815-0000", "pylon:0815-0001", "pylon:0815-0002"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[NDArray[np.uint8]]]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (48, 64), np.uint8) for _ in range(3)]
    for index, image in enumerate(images):
        cv2.imwrite(str(folder / f"{index}.png"), image)
    return folder, images


class TestPylon:
    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        pytest.importorskip("pypylon", reason="the extra `cameras` has it")

    def test_pictures_come_as_they_are_with_ids_and_parts(self, pictures: tuple[Path, list[NDArray[np.uint8]]]) -> None:
        folder, images = pictures
        uri = (
            f"{WITH_PICTURES}?roi=64x48+0+0&pixel_format=Mono8&fps=100&part_id=frame&buffers=64"
            f"&feature.ImageFilename={folder}&feature.ImageFileMode=On&feature.TestImageSelector=Off"
        )
        with closing(open_source(uri)) as source:
            assert source.live
            frames = read(source, 12)
            assert source.counters["incomplete"] == 0
        first = frames[0].camera_frame_id
        assert first is not None
        for frame in frames:
            assert frame.fault is None
            assert frame.image is not None
            assert any(np.array_equal(frame.image, image) for image in images)
            assert frame.camera_frame_id == first + frame.frame_id
            assert frame.part_id == str(frame.camera_frame_id)
            # The emulator has no clock.
            assert frame.camera_time_ns is None
        assert len({frame.image.tobytes() for frame in frames if frame.image is not None}) == 3

    def test_the_rate_is_set(self) -> None:
        with closing(open_source(f"{CAMERA}?fps=20&roi=64x64+0+0&buffers=64")) as source:
            frames = read(source, 21)
        passed = frames[-1].frame_id - frames[0].frame_id
        assert frames[-1].captured_s - frames[0].captured_s == pytest.approx(passed / 20, rel=0.2)

    @pytest.mark.parametrize("name", ["BayerRG8", "BayerGB8", "RGB8", "BGR8"])
    def test_colour_becomes_bgr(self, name: str) -> None:
        with closing(open_source(f"{CAMERA}?pixel_format={name}&roi=66x34+2+4")) as source:
            (frame,) = read(source, 1)
        assert frame.image is not None
        assert frame.image.shape == (34, 66, 3)

    def test_software_trigger_fires_at_its_rate(self) -> None:
        uri = f"{CAMERA}?trigger=software&trigger_rate_hz=20&roi=64x64+0+0&buffers=64"
        with closing(open_source(uri)) as source:
            assert not source.triggered
            frames = read(source, 15)
        # A busy machine may make it slower; without the trigger it would be 100 a second.
        assert frames[-1].captured_s - frames[0].captured_s > 0.9 * 14 / 20

    def test_a_camera_that_waits_for_parts_may_be_silent(self) -> None:
        with closing(open_source(f"{CAMERA}?trigger=hardware&trigger_source=Line3")) as source:
            assert source.triggered
            assert source.read(1.5) is None
        # And left in that state it is set right by the next one to open it.
        with closing(open_source(CAMERA)) as source:
            read(source, 1)

    def test_a_camera_that_should_deliver_may_not(self) -> None:
        uri = f"{CAMERA}?timeout_s=0.3&feature.TriggerMode=On&feature.TriggerSource=Line1"
        with closing(open_source(uri)) as source:
            started_s = time.monotonic()
            with pytest.raises(SourceError, match="delivered nothing"):
                source.read(10.0)
            # The first frame has longer.
            assert 2.5 < time.monotonic() - started_s < 8

    def test_five_forced_bad_grabs_are_five_counted_and_none_scored(self, tiny_model: Path, tmp_path: Path) -> None:
        forced = "feature.ForceFailedBufferCount=5&feature.ForceFailedBuffer=execute"
        uri = f"{CAMERA}?roi=32x32+0+0&fps=20&buffers=64&{forced}"
        records, summary = tmp_path / "records.jsonl", tmp_path / "summary.json"
        command = [sys.executable, "-m", "recontrast_edge", "run", "--engine", str(tiny_model), "--source", uri]
        command += ["--mode", "every", "--max-frames", "25", "--output", f"jsonl:{records}"]
        command += ["--summary", str(summary), "--quiet"]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 10, done.stderr
        judged = [json.loads(line) for line in records.read_text().splitlines()]
        incomplete = [record for record in judged if record["fault"] == "incomplete_frame"]
        assert len(incomplete) == 5
        assert {record["score"] for record in incomplete} == {None}
        assert {record["verdict"] for record in incomplete} == {"FAULT"}
        assert json.loads(summary.read_text())["faults"]["incomplete_frame"] == 5
        assert "incompletely grabbed" in incomplete[0]["detail"]
        assert any(record["score"] is not None for record in judged)

    def test_what_the_camera_rounds_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        open_source(f"{CAMERA}?exposure_us=100.7").close()
        assert "rounded ExposureTime from 100.7 to 101" in caplog.text

    @pytest.mark.parametrize(
        ("query", "message"),
        [
            ("roi=64x64+5000+0", "OffsetX must be a whole number from 0 to 4032"),
            ("gain_db=99", "Gain must be a number from 0 to 48"),
            ("pixel_format=YUV422", "it has Mono8 or BayerRG8"),
            ("feature.Gama=1", "did you mean 'Gamma'"),
            ("feature.TestImageSelector=TestImage1", "must be one of Off, Testimage1, Testimage2; did you mean"),
            ("feature.DeviceModelName=x", "cannot be set (read only"),
            ("feature.PixelFormat=Mono16", "choose pixel_format=Mono8"),
            ("trigger=hardware&trigger_source=Line9", "TriggerSource must be one of"),
        ],
    )
    def test_values_are_checked_against_the_camera(self, query: str, message: str) -> None:
        with pytest.raises(UsageError, match=re.escape(message)):
            open_source(f"{REFUSING}?{query}")

    def test_which_camera(self) -> None:
        with pytest.raises(UsageError, match="several cameras; expected one of pylon:0815-0000, pylon:0815-0001"):
            open_source("pylon:")
        with pytest.raises(SourceError, match="no such camera; pylon sees 0815-0000"):
            open_source("pylon:4711")

    def test_a_late_reader_gets_what_the_buffers_hold_and_the_ids_tell_the_rest(self) -> None:
        with closing(open_source(f"{CAMERA}?fps=50&roi=64x64+0+0&buffers=4")) as source:
            read(source, 1)
            time.sleep(1.0)
            late = [frame.frame_id for frame in read(source, 5)]
        assert late[0] > 20
        assert late[:4] == list(range(late[0], late[0] + 4))

    def test_closing_wakes_the_reader_and_ends_the_stream(self) -> None:
        source = open_source(f"{CAMERA}?trigger=hardware&trigger_source=Line1")
        started_s = time.monotonic()
        source.close()
        source.close()
        assert time.monotonic() - started_s < 2.5
        with pytest.raises(EndOfStream):
            source.read(5.0)


@pytest.fixture(scope="module")
def producer() -> str:
    genicam = pytest.importorskip("genicam", reason="the extra `cameras` has it")
    pytest.importorskip("harvesters", reason="the extra `cameras` has it")
    path = Path(genicam.__path__[0], "viky.cti")
    if not path.is_file():
        pytest.skip("genicam's wheel for this machine has no simulated devices")
    return str(path)


class TestGenTL:
    def test_two_cameras_of_one_producer_at_a_time(self, producer: str) -> None:
        mono = f"genicam:{producer}#VikyTL_DEV_blue?pixel_format=Mono8&fps=50&part_id=frame&buffers=64"
        with closing(open_source(mono)) as first, closing(open_source(f"genicam:{producer}#0")) as second:
            grey, colour = read(first, 10), read(second, 2)
            # A third look at the producer must not disturb the two.
            with pytest.raises(SourceError, match="the producer sees VikyTL_DEV_red, VikyTL_DEV_green"):
                open_source(f"genicam:{producer}#none")
            grey += read(first, 2)
        assert {frame.image.shape for frame in grey if frame.image is not None} == {(400, 400)}
        assert {frame.image.shape for frame in colour if frame.image is not None} == {(400, 400, 3)}
        assert [frame.camera_frame_id for frame in grey] == [frame.frame_id + 1 for frame in grey]
        assert [frame.part_id for frame in grey] == [str(frame.camera_frame_id) for frame in grey]

    def test_by_name_along_the_search_path(self, producer: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GENICAM_GENTL64_PATH", f"/nonexistent:{Path(producer).parent}")
        with closing(open_source("genicam:viky.cti#2?fps=50")) as source:
            read(source, 1)

    @pytest.mark.parametrize(
        ("uri", "kind", "message"),
        [
            ("genicam:{}", UsageError, "several cameras; expected #ID with one of VikyTL_DEV_red"),
            ("genicam:#1", UsageError, "expected genicam:FILE.cti#ID"),
            ("genicam:/nonexistent.cti#1", InputError, "no such GenTL producer"),
            ("genicam:/etc/hostname#1", InputError, "not a GenTL producer"),
            ("genicam:{}#1?exposure_us=5", UsageError, "has no ExposureTime"),
            ("genicam:{}#1?trigger=hardware", UsageError, "has no TriggerMode"),
            ("genicam:{}#1?feature.Widht=5", UsageError, "did you mean 'Width'"),
            ("genicam:{}#1?feature.Width=5", UsageError, "Width must be a whole number from 100 to 800"),
        ],
    )
    def test_errors(self, producer: str, uri: str, kind: type[RecontrastError], message: str) -> None:
        with pytest.raises(kind, match=re.escape(message)):
            open_source(uri.format(producer))


@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.soak)])
@pytest.mark.parametrize("scheme", ["pylon", "genicam"])
def test_reopening_leaves_nothing_behind(scheme: str, times: int, request: pytest.FixtureRequest) -> None:
    """In a process of its own, in which nothing else takes memory."""
    pytest.importorskip("pypylon" if scheme == "pylon" else "harvesters", reason="the extra `cameras` has it")
    uri = "pylon:" if scheme == "pylon" else f"genicam:{request.getfixturevalue('producer')}#0?fps=100"
    code = f"from tests.edge.gige_camera import reopen; reopen({uri!r}, {times})"
    # Memory that was given back to malloc shall not count; with a fixed threshold it goes back to the system.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYLON_CAMEMU": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60 + 10 * times
    )
    assert done.returncode == 0, done.stderr
