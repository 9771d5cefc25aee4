"""GStreamer pipelines, run for real, and what a CSI camera's URI becomes."""

from __future__ import annotations

import shlex
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from recontrast_edge.errors import InputError, MissingError, SourceError, UsageError
from recontrast_edge.frame import EndOfStream, Frame, Source
from recontrast_edge.sources import open_source, threaded
from recontrast_edge.sources.gstreamer import _image, csi_pipeline
from tests.edge.leaks import assert_reopening_leaves_nothing

LIVE = "gst:videotestsrc is-live=true pattern=red ! video/x-raw,width=64,height=48,framerate=50/1"


def next_frame(source: Source) -> Frame:
    frame = source.read(5.0)
    assert frame is not None
    return frame


@pytest.mark.usefixtures("gi")
def test_a_gentl_camera_can_be_opened_after_a_pipeline() -> None:
    """In a process of its own: it would end with SIGSEGV or SIGABRT."""
    genicam = pytest.importorskip("genicam", reason="the extra `cameras` has it")
    producer = Path(genicam.__path__[0], "viky.cti")
    if not producer.is_file():
        pytest.skip("genicam's wheel for this machine has no simulated devices")
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from recontrast_edge.sources import open_source\n"
        f"for uri in ({LIVE!r}, 'genicam:{producer}#VikyTL_DEV_red'):\n"
        "    open_source(uri).close()\n"
        "    print('opened')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "opened\n" * 2), done.stderr


@pytest.mark.usefixtures("gi")
class TestPipelines:
    @pytest.mark.parametrize(
        ("caps", "shape", "pixel"),
        [
            ("format=BGR,width=101,height=51", (51, 101, 3), (0, 0, 255)),
            ("format=NV12,width=322,height=46", (46, 322, 3), (0, 0, 254)),
            ("format=GRAY8,width=321,height=51", (51, 321), (81,)),
        ],
    )
    def test_pixel_formats_with_padded_lines(self, caps: str, shape: tuple[int, ...], pixel: tuple[int, ...]) -> None:
        with closing(open_source(f"gst:videotestsrc is-live=true pattern=red ! video/x-raw,{caps}")) as source:
            assert source.live
            image = next_frame(source).image
        assert image is not None
        assert image.shape == shape
        assert np.abs(image.reshape(*shape[:2], -1).astype(int) - pixel).max() <= 2

    def test_a_live_pipeline_gives_a_late_reader_the_newest_and_tells_when_it_was_taken(self) -> None:
        with closing(open_source(LIVE + " ! videoconvert")) as source:
            first = next_frame(source)
            time.sleep(0.5)
            late = next_frame(source)
            assert time.monotonic() - late.captured_s < 0.2
            assert late.frame_id - first.frame_id == pytest.approx(25, abs=8)
            assert first.camera_time_ns is not None
            assert late.camera_time_ns is not None
            assert late.camera_time_ns - first.camera_time_ns == pytest.approx(
                (late.frame_id - first.frame_id) * 2e7, rel=0.1
            )
            assert late.captured_s - first.captured_s == pytest.approx((late.frame_id - first.frame_id) / 50, abs=0.03)

    def test_any_other_waits_for_its_reader_and_ends(self) -> None:
        with closing(open_source("gst:videotestsrc num-buffers=40 ! videoconvert")) as source:
            assert not source.live
            frames = [next_frame(source)]
            time.sleep(0.3)
            with pytest.raises(EndOfStream):  # noqa: PT012 - the frames before it are what is tested
                while True:
                    frames.append(next_frame(source))
            assert [frame.frame_id for frame in frames] == list(range(40))

    def test_an_element_that_fails_later_is_an_error_after_its_frames(self) -> None:
        with closing(open_source("gst:videotestsrc ! identity error-after=5 ! videoconvert")) as source:
            for _ in range(4):
                next_frame(source)
            with pytest.raises(SourceError, match=r"identity\d: Failed"):
                next_frame(source)

    def test_no_picture_is_lost_while_it_opens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = threaded.Slot.opened

        def late(slot: threaded.Slot, *, live: bool = True) -> None:
            time.sleep(0.3)
            opened(slot, live=live)

        monkeypatch.setattr(threaded.Slot, "opened", late)
        with closing(open_source("gst:videotestsrc num-buffers=5 ! videoconvert")) as source:
            assert [next_frame(source).frame_id for _ in range(5)] == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("pipeline", "kind", "message"),
        [
            ("nosuchelement ! videoconvert", MissingError, "nosuchelement"),
            ("videotestsrc ! video/x-raw,format=RGB", UsageError, "format=.string.RGB"),
            ("videotestsrc ! ! videoconvert", UsageError, "syntax"),
            ("videotestsrc !", UsageError, "gst:PIPELINE"),
            ("", UsageError, "gst:PIPELINE"),
            ("filesrc location=/nonexistent ! pngdec ! videoconvert", SourceError, "No such file"),
            ("souphttpsrc location=http://a:canary@127.0.0.1:9/ ! fakesink user-pw=canary", Exception, r"a:\*\*\*@"),
        ],
    )
    def test_what_cannot_run(self, pipeline: str, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message) as caught:
            open_source(f"gst:{pipeline}")
        assert "canary" not in str(caught.value)

    def test_a_stream_without_any_picture_is_an_error(self) -> None:
        source = open_source("gst:videotestsrc num-buffers=0 ! videoconvert")
        with pytest.raises(SourceError, match="without a picture"):
            source.read(5.0)
        source.close()

    def test_the_text_never_reaches_a_shell(self, tmp_path: Path) -> None:
        for attack in (f"; touch {tmp_path}/a ! videoconvert", f"! $(touch {tmp_path}/a)", f"! `touch {tmp_path}/a`"):
            with pytest.raises((UsageError, MissingError)):
                open_source(f"gst:videotestsrc{attack}")
        assert list(tmp_path.iterdir()) == []

    def test_close_wakes_the_reader_and_stops_a_pipeline_that_waits(self) -> None:
        source = open_source("gst:videotestsrc ! videoconvert")
        assert isinstance(source, threaded.ThreadedSource)
        time.sleep(0.1)
        threading.Timer(0.1, source.close).start()
        ended = False
        started_s = time.monotonic()
        while not ended:
            try:
                source.read(5.0)
            except EndOfStream:
                ended = True
        source.close()
        assert time.monotonic() - started_s < 2

    @pytest.mark.parametrize("pipeline", [LIVE + " ! videoconvert", "gst:videotestsrc ! videoconvert"])
    def test_reopening_leaves_nothing_behind(self, pipeline: str) -> None:
        reopen(pipeline, 10)

    @pytest.mark.soak
    def test_reopening_a_hundred_times_leaves_nothing_behind(self) -> None:
        """A quarter of a minute."""
        reopen(LIVE + " ! videoconvert", 100)

    def test_a_csi_camera_needs_a_jetson(self) -> None:
        with pytest.raises(MissingError, match="nvarguscamerasrc"):
            open_source("csi:0")


def reopen(uri: str, times: int) -> None:
    def use() -> None:
        with closing(open_source(uri)) as source:
            next_frame(source)

    assert_reopening_leaves_nothing(use, times=times)


def test_without_the_bindings_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gi", None)
    with pytest.raises(MissingError, match="apt-get install python3-gi"):
        open_source("gst:videotestsrc")


class TestCsi:
    def test_defaults(self) -> None:
        assert csi_pipeline("csi:0") == (
            "nvarguscamerasrc sensor-id=0 ! video/x-raw(memory:NVMM),width=1920,height=1080,framerate=30000/1000 "
            "! nvvidconv flip-method=0 ! video/x-raw,format=NV12"
        )

    def test_every_option(self) -> None:
        uri = "csi:1?size=1280x720&fps=59.94&sensor_mode=3&flip=2&exposure_us=500.5&gain=2.5"
        assert csi_pipeline(uri) == (
            'nvarguscamerasrc sensor-id=1 sensor-mode=3 exposuretimerange="500500 500500" aelock=true '
            'gainrange="2.5 2.5" ispdigitalgainrange="1 1" '
            "! video/x-raw(memory:NVMM),width=1280,height=720,framerate=59940/1000 "
            "! nvvidconv flip-method=2 ! video/x-raw,format=NV12"
        )

    def test_every_property_is_one_that_the_element_has(self) -> None:
        """As `gst-inspect-1.0` lists them on a Jetson."""
        known = {
            "nvarguscamerasrc": {
                *("sensor-id", "sensor-mode", "exposuretimerange", "gainrange", "ispdigitalgainrange", "aelock"),
                *("awblock", "bufapi-version", "ee-mode", "wbmode", "tnr-mode", "timeout", "num-buffers"),
            },
            "nvvidconv": {"flip-method", "bl-output", "interpolation-method", "left", "right", "top", "bottom"},
        }
        text = csi_pipeline("csi:1?sensor_mode=3&flip=2&exposure_us=500.5&gain=2.5")
        for element in text.split(" ! "):
            name, *properties = shlex.split(element)
            if not name.startswith("video/"):
                assert {item.partition("=")[0] for item in properties} <= known[name]

    @pytest.mark.usefixtures("gi")
    def test_the_pipeline_is_well_formed(self) -> None:
        """With elements that exist everywhere in the place of NVIDIA's, which take the same properties' syntax."""
        text = csi_pipeline("csi:0?size=320x240&fps=30&flip=2")
        text = text.replace("nvarguscamerasrc sensor-id=0", "videotestsrc is-live=true").replace("(memory:NVMM)", "")
        text = text.replace("nvvidconv flip-method=2", "videoconvert")
        with closing(open_source(f"gst:{text}")) as source:
            image = next_frame(source).image
        assert image is not None
        assert image.shape == (240, 320, 3)

    @pytest.mark.parametrize(
        ("uri", "message"),
        [
            ("csi:", "the sensor must be a whole number"),
            ("csi:front", "the sensor must be a whole number"),
            ("csi:0?flip=8", "flip must be"),
            ("csi:0?exposure=5", "did you mean 'exposure_us'"),
            ("csi:0?gain=0", "gain must be"),
            ("csi:0?size=big", "WIDTHxHEIGHT"),
        ],
    )
    def test_bad_options(self, uri: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            csi_pipeline(uri)


class TestBuffers:
    def test_lines_and_planes_lie_where_the_buffer_says(self) -> None:
        """NV12 of 4x2 with lines of 6 bytes and 3 bytes before the chroma."""
        luma = np.full((2, 6), 99, np.uint8)
        luma[:, :4] = [[16, 81, 145, 235], [16, 81, 145, 235]]
        chroma = np.full((1, 6), 99, np.uint8)
        chroma[:, :4] = 128
        data = luma.tobytes() + b"\x63" * 3 + chroma.tobytes()
        image = _image(data, "NV12", (4, 2), [(0, 6), (15, 6)])
        # Grey: full range from 16..235.
        assert np.abs(image.astype(int) - np.array([0, 76, 150, 255])[None, :, None]).max() <= 1

    def test_a_buffer_that_is_too_small_is_refused(self) -> None:
        with pytest.raises(InputError, match="too small"):
            _image(b"\0" * 47, "BGR", (4, 4), [(0, 12)])

    def test_odd_sides_of_nv12_are_refused(self) -> None:
        with pytest.raises(InputError, match="even sides"):
            _image(b"\0" * 100, "NV12", (3, 3), [(0, 4), (12, 4)])
