"""Sources: every form they take, every way they break."""

from __future__ import annotations

import re
import threading
import time
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from recontrast_edge.errors import InputError, RecontrastError, SourceError, UsageError
from recontrast_edge.frame import EndOfStream, Frame, Source
from recontrast_edge.sources import open_source
from tests.edge.leaks import assert_reopening_leaves_nothing


def read_all(source: Source, frames: list[Frame] | None = None) -> list[Frame]:
    """All frames; those before an error are in the list that was given."""
    frames = [] if frames is None else frames
    while True:
        try:
            frame = source.read(1.0)
        except EndOfStream:
            return frames
        assert frame is not None
        frames.append(frame)


def write_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((6, 8, 3), value, np.uint8))


class TestImages:
    def test_a_folder_comes_in_natural_order_with_its_truth(self, tmp_path: Path) -> None:
        for name, value in (
            ("test/good/2.png", 20),
            ("test/good/10.png", 30),
            ("test/dent/1.png", 10),
            ("train/good/1.png", 40),
        ):
            write_image(tmp_path / name, value)
        (tmp_path / "test" / "notes.txt").write_text("no image")
        source = open_source(str(tmp_path))
        assert not source.live
        frames = read_all(source)
        assert [frame.frame_id for frame in frames] == [0, 1, 2, 3]
        assert [int(frame.image[0, 0, 0]) for frame in frames if frame.image is not None] == [10, 20, 30, 40]
        assert [frame.truth for frame in frames] == ["defect", "good", "good", "good"]
        assert frames[0].source.endswith("test/dent/1.png")

    def test_truth_is_not_guessed(self, tmp_path: Path) -> None:
        write_image(tmp_path / "monday" / "good" / "1.png", 1)
        assert read_all(open_source(str(tmp_path)))[0].truth is None

        write_image(tmp_path / "test" / "images" / "1.png", 1)
        assert read_all(open_source(str(tmp_path / "test")))[0].truth is None

    def test_masks_are_no_frames(self, tmp_path: Path) -> None:
        for name in ("bottle/test/dent/1.png", "bottle/ground_truth/dent/1_mask.png", "tile/ground_truth/1.png"):
            write_image(tmp_path / name, 1)
        names = [Path(frame.source).relative_to(tmp_path).as_posix() for frame in read_all(open_source(str(tmp_path)))]
        assert names == ["bottle/test/dent/1.png", "tile/ground_truth/1.png"]
        # Asked for by name, they are.
        assert len(read_all(open_source(str(tmp_path / "bottle" / "ground_truth")))) == 1

    def test_a_broken_image_in_a_folder_is_a_fault_and_not_the_end(self, tmp_path: Path) -> None:
        for index in range(3):
            write_image(tmp_path / f"{index}.png", index)
        data = (tmp_path / "1.png").read_bytes()
        (tmp_path / "1.png").write_bytes(data[: len(data) // 2])
        frames = read_all(open_source(str(tmp_path)))
        assert [frame.fault for frame in frames] == [None, "unreadable_image", None]
        assert frames[1].image is None
        assert "1.png" in (frames[1].detail or "")

    def test_one_image_by_path_and_by_uri(self, tmp_path: Path) -> None:
        path = tmp_path / "part: 1%.png"
        write_image(path, 7)
        for uri in (str(path), path.as_uri(), path.as_uri().replace("file://", "file://localhost")):
            assert len(read_all(open_source(uri))) == 1

    def test_a_name_that_looks_like_a_scheme(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_image(tmp_path / "line:7" / "1.png", 7)
        monkeypatch.chdir(tmp_path)
        assert len(read_all(open_source("line:7"))) == 1

    def test_what_is_not_there_or_empty_or_broken_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no such file"):
            open_source(str(tmp_path / "none.png"))
        for text in ("", "a\0b", "a" * 5000):
            with pytest.raises(InputError, match="no such file"):
                open_source(text)
        with pytest.raises(InputError, match="no images"):
            open_source(str(tmp_path))
        (tmp_path / "empty.png").write_bytes(b"")
        with pytest.raises(InputError, match="empty"):
            open_source(str(tmp_path / "empty.png"))

    def test_closed_is_closed(self, tmp_path: Path) -> None:
        write_image(tmp_path / "part.png", 7)
        source = open_source(str(tmp_path))
        source.close()
        source.close()
        with pytest.raises(EndOfStream):
            source.read(1.0)


class TestList:
    def test_in_the_lists_order_and_every_bad_entry_is_a_fault(self, tmp_path: Path) -> None:
        for value, name in ((1, "b/1.png"), (2, "a.png"), (3, "out of order.png")):
            write_image(tmp_path / "images" / name, value)
        (tmp_path / "images" / "cut.png").write_bytes((tmp_path / "images" / "a.png").read_bytes()[:40])
        entries = [
            "# a comment",
            "out of order.png",
            "",
            "  b/1.png  ",
            "missing.png",
            "cut.png",
            "b",
            "x" * 5000,
            "a.png",
        ]
        listed = tmp_path / "images" / "list.txt"
        listed.write_text("\n".join([*entries, "a\0b.png", str(tmp_path / "images" / "a.png")]))
        source = open_source(f"list:{listed}")
        assert not source.live
        frames = read_all(source)
        values = [None if frame.image is None else int(frame.image[0, 0, 0]) for frame in frames]
        assert values == [3, 1, None, None, None, None, 2, None, 2]
        assert {frame.fault for frame in frames if frame.image is None} == {"unreadable_image"}
        assert [frame.frame_id for frame in frames] == list(range(9))
        assert "missing.png" in (frames[2].detail or "")

    @pytest.mark.parametrize("content", [b"", b"# only a comment\n", b"\xff\xfe\x00", None])
    def test_what_is_no_list(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "list.txt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=r"list\.txt"):
            open_source(f"list:{path}")


FRAMES = 40


def write_video(path: Path, codec: str, frames: int = FRAMES, **options: str) -> Path:
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=20)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        rng = np.random.default_rng(0)
        for index in range(frames):
            picture = rng.integers(0, 60, (64, 96, 3), np.uint8) + np.uint8(4 * index)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


class TestVideo:
    @pytest.mark.parametrize("name", ["belt.mp4", "belt.mkv", "belt.avi"])
    def test_every_frame_comes(self, tmp_path: Path, name: str) -> None:
        frames = read_all(open_source(str(write_video(tmp_path / name, "mpeg4"))))
        assert [frame.frame_id for frame in frames] == list(range(FRAMES))
        first, last = frames[0].image, frames[-1].image
        assert first is not None
        assert last is not None
        assert first.shape == (64, 96, 3)
        assert last.mean() - first.mean() == pytest.approx(4 * (FRAMES - 1), abs=8)

    def test_colours_are_bgr(self, tmp_path: Path) -> None:
        with av.open(str(tmp_path / "red.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=20)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            red = np.zeros((64, 64, 3), np.uint8)
            red[:, :, 0] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(red, format="rgb24")))
            container.mux(stream.encode(None))
        image = read_all(open_source(str(tmp_path / "red.mp4")))[0].image
        assert image is not None
        blue, green, strength = image.mean(axis=(0, 1))
        assert strength > 150
        assert max(blue, green) < 60

    @pytest.mark.parametrize(
        ("name", "options"), [("belt.mp4", {"movflags": "faststart"}), ("belt.mkv", {}), ("belt.avi", {})]
    )
    def test_a_video_that_breaks_off_is_an_error_after_its_frames(
        self, tmp_path: Path, name: str, options: dict[str, str]
    ) -> None:
        path = write_video(tmp_path / name, "mpeg4", **options)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.75)])
        source = open_source(str(path))
        frames: list[Frame] = []
        with pytest.raises(SourceError, match="breaks off after") as caught:
            read_all(source, frames)
        assert 3 < len(frames) < FRAMES
        assert re.search(rf"after {len(frames)} of (about )?{FRAMES} frames", str(caught.value))

    def test_the_last_frame_alone_may_be_cut_off(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "belt.mp4", "mpeg4", movflags="faststart")
        path.write_bytes(path.read_bytes()[:-1])
        frames: list[Frame] = []
        with pytest.raises(SourceError, match="last frame is cut off"):
            read_all(open_source(str(path)), frames)
        assert len(frames) == FRAMES
        assert [frame.fault for frame in frames[-2:]] == [None, "unreadable_image"]

    @pytest.mark.parametrize("name", ["belt.mp4", "belt.mkv"])
    def test_an_uneven_rate_and_a_longer_sound_are_no_broken_video(self, tmp_path: Path, name: str) -> None:
        times_ms = [33 * index if index < 20 else 660 + 200 * (index - 20) for index in range(FRAMES)]
        with av.open(str(tmp_path / name), "w") as container:
            video = container.add_stream("mpeg4", rate=30)
            video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
            video.codec_context.time_base = Fraction(1, 1000)
            sound = container.add_stream("pcm_s16le" if name.endswith("mkv") else "aac", rate=8000)
            for time_ms in times_ms:
                picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 90, np.uint8), format="rgb24")
                picture.pts, picture.time_base = time_ms, Fraction(1, 1000)
                container.mux(video.encode(picture))
            container.mux(video.encode(None))
            silence = np.zeros((1, 8000 * 9), np.int16)
            samples = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
            samples.sample_rate, samples.pts = 8000, 0
            container.mux(sound.encode(samples))
            container.mux(sound.encode(None))
        assert len(read_all(open_source(str(tmp_path / name)))) == FRAMES

    def test_a_trimmed_video_is_complete_although_it_counts_more_frames(self, tmp_path: Path) -> None:
        whole, trimmed = write_video(tmp_path / "whole.mp4", "mpeg4"), tmp_path / "trimmed.mp4"
        with (
            av.open(str(whole)) as source,
            av.open(str(trimmed), "w", options={"avoid_negative_ts": "disabled"}) as copy,
        ):
            stream = source.streams.video[0]
            target = copy.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.pts is not None and packet.dts is not None:
                    packet.pts -= int(1 / stream.time_base)
                    packet.dts -= int(1 / stream.time_base)
                    packet.stream = target
                    copy.mux(packet)
        with av.open(str(trimmed)) as check:
            assert check.streams.video[0].frames == FRAMES
        # At 20 frames a second, one second less.
        assert len(read_all(open_source(str(trimmed)))) == FRAMES - 20

    def test_a_video_without_its_index_is_refused(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "belt.mp4", "mpeg4")
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
        with pytest.raises(SourceError, match="not a video"):
            open_source(str(path))

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("no video " * 100)
        with pytest.raises(SourceError, match="not a video"):
            open_source(str(tmp_path / "notes.txt"))
        (tmp_path / "empty.mp4").write_bytes(b"")
        with pytest.raises(SourceError, match="not a video"):
            open_source(str(tmp_path / "empty.mp4"))

    def test_closing_while_another_thread_reads(self, tmp_path: Path) -> None:
        source = open_source(str(write_video(tmp_path / "belt.mp4", "mpeg4")))
        ended = threading.Event()

        def read() -> None:
            read_all(source)
            ended.set()

        thread = threading.Thread(target=read)
        thread.start()
        source.close()
        source.close()
        thread.join(5)
        assert ended.is_set()


class TestPace:
    def test_a_video_played_several_times_counts_on(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "belt.mp4", "mpeg4", frames=10)
        source = open_source(f"{path}?loop=3")
        assert not source.live
        frames = read_all(source)
        assert [frame.frame_id for frame in frames] == list(range(30))
        times_ns = [frame.camera_time_ns for frame in frames if frame.camera_time_ns is not None]
        # 20 frames a second, over the seams too.
        assert np.diff(times_ns) == pytest.approx(np.full(29, 5e7), abs=1e4)

    def test_at_its_own_pace_it_behaves_as_a_camera(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "belt.mp4", "mpeg4", frames=20)
        with closing(open_source(f"{path}?pace=realtime&loop=forever")) as source:
            assert source.live
            first = source.read(1.0)
            assert first is not None
            assert first.frame_id == 0
            assert source.read(0.01) is None
            frames = [source.read(1.0) for _ in range(10)]
            seen = [frame for frame in frames if frame is not None]
            assert seen[-1].captured_s - seen[0].captured_s == pytest.approx(
                (seen[-1].frame_id - seen[0].frame_id) * 0.05, abs=1e-3
            )
            time.sleep(0.8)
            late = source.read(1.0)
            assert late is not None
            assert late.frame_id >= seen[-1].frame_id + 15
            assert 0 <= time.monotonic() - late.captured_s < 0.2

    def test_at_its_own_pace_it_ends(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "belt.mp4", "mpeg4", frames=8)
        started_s = time.monotonic()
        frames = read_all(open_source(f"{path}?pace=realtime"))
        assert 0.35 <= time.monotonic() - started_s < 3
        assert frames[-1].frame_id == 7

    def test_one_that_breaks_off_is_an_error_after_its_frames(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "belt.avi", "mpeg4", frames=20)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.75)])
        source = open_source(f"{path}?pace=realtime")
        frames: list[Frame] = []
        with pytest.raises(SourceError, match="breaks off"):
            read_all(source, frames)
        assert frames

    def test_close_wakes_the_reader(self, tmp_path: Path) -> None:
        source = open_source(f"{write_video(tmp_path / 'belt.mp4', 'mpeg4')}?pace=realtime&loop=forever")
        threading.Timer(0.2, source.close).start()
        started_s = time.monotonic()
        assert read_all(source)
        assert time.monotonic() - started_s < 2

    @pytest.mark.parametrize(
        ("query", "message"),
        [("pace=fast", "pace must be realtime"), ("loop=0", "loop must be"), ("looop=2", "did you mean 'loop'")],
    )
    def test_bad_options(self, tmp_path: Path, query: str, message: str) -> None:
        path = write_video(tmp_path / "belt.mp4", "mpeg4", frames=2)
        with pytest.raises(UsageError, match=message):
            open_source(f"{path}?{query}")

    def test_a_file_with_a_question_mark_in_its_name(self, tmp_path: Path) -> None:
        write_video(tmp_path / "belt.mp4", "mpeg4", frames=2).rename(tmp_path / "what?.mp4")
        assert len(read_all(open_source(f"{tmp_path}/what?.mp4"))) == 2


@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", ["video", "paced", "list", "folder", "synthetic"])
def test_reopening_leaves_nothing_behind(tmp_path: Path, kind: str, times: int) -> None:
    write_image(tmp_path / "1.png", 1)
    (tmp_path / "list.txt").write_text("1.png")
    video = write_video(tmp_path / "belt.mp4", "mpeg4", frames=4)
    uri = {
        "video": str(video),
        "paced": f"{video}?pace=realtime&loop=forever",
        "list": f"list:{tmp_path / 'list.txt'}",
        "folder": str(tmp_path),
        "synthetic": "synthetic://mixed?fps=100&size=64x64",
    }[kind]

    def use() -> None:
        with closing(open_source(uri)) as source:
            assert source.read(1.0) is not None

    assert_reopening_leaves_nothing(use, times=times)


class TestSynthetic:
    def test_as_fast_as_read_nothing_is_skipped(self) -> None:
        frames = read_all(open_source("synthetic://brushed-metal?fps=0&size=64x48&frames=25&defect_rate=0.4&seed=2"))
        assert [frame.frame_id for frame in frames] == list(range(25))
        assert {frame.truth for frame in frames} == {"good", "defect"}
        for frame in frames:
            assert frame.image is not None
            assert frame.image.shape == (48, 64, 3)
            assert frame.truth_mask is not None
            assert frame.truth_mask.any() == (frame.truth == "defect")

    def test_a_camera_keeps_its_rate_and_a_late_reader_gets_the_newest(self) -> None:
        source = open_source("synthetic://woven-fabric?fps=50&size=32x32")
        assert source.live
        first = source.read(1.0)
        assert first is not None
        assert first.frame_id == 0
        time.sleep(0.31)
        late = source.read(1.0)
        assert late is not None
        assert late.frame_id >= 15
        started = time.monotonic()
        ids = [frame.frame_id for frame in (source.read(1.0) for _ in range(10)) if frame is not None]
        assert time.monotonic() - started > 0.15
        assert ids == sorted(set(ids))
        assert ids[-1] >= late.frame_id + 10

    def test_no_frame_in_time_is_none_and_close_wakes_the_reader(self) -> None:
        source = open_source("synthetic://woven-fabric?fps=0.2&size=32x32")
        assert source.read(1.0) is not None
        started = time.monotonic()
        assert source.read(0.05) is None
        assert time.monotonic() - started < 1
        threading.Timer(0.1, source.close).start()
        with pytest.raises(EndOfStream):
            source.read(4.0)
        assert time.monotonic() - started < 3

    @pytest.mark.parametrize(
        ("uri", "message"),
        [
            ("synthetic://wood", "brushed-metal"),
            ("synthetic://mixed?defectrate=0.1", "did you mean 'defect_rate'"),
            ("synthetic://mixed?fps=fast", "fps must be a number"),
            ("synthetic://mixed?fps=nan", "fps must be a number"),
            ("synthetic://mixed?defect_rate=2", "defect_rate"),
            ("synthetic://mixed?size=256", "WIDTHxHEIGHT"),
            ("synthetic://mixed?size=1x1", "size"),
            ("synthetic://mixed?seed=-1", "seed"),
            ("synthetic://mixed?frames=0", "frames"),
            ("synthetic://mixed?fps=1&fps=2", "once"),
            ("synthetic://mixed?seed=" + "9" * 5000, "seed"),
            ("synthetic://mixed?size=" + "9" * 5000 + "x64", "size"),
            ("ftp://camera/1", "unknown scheme 'ftp'"),
            ("usb:front", "usb:NUMBER"),
            ("file:part.png", "ABSOLUTE"),
            ("file://other/part.png", "ABSOLUTE"),
        ],
    )
    def test_bad_uris_are_refused_by_name(self, uri: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            open_source(uri)


def test_every_refusal_has_an_exit_code() -> None:
    for uri in ("synthetic://wood", "/nonexistent/folder", "ftp://x"):
        with pytest.raises(RecontrastError) as caught:
            open_source(uri)
        assert caught.value.exit_code in (2, 3)
