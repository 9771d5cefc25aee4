from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from recontrast_edge.errors import OutputError, UsageError
from recontrast_edge.frame import Frame, Judgement, Region, Sink
from recontrast_edge.render import GAP, STRIP_HEIGHT, annotate, panel_size
from recontrast_edge.sinks import open_sink
from recontrast_edge.sinks.images import MAP_STEP
from recontrast_edge.sinks.terminal import TerminalView
from recontrast_edge.spec import InputSpec, Roi
from recontrast_edge.statistics import Statistics

SPEC = InputSpec(size_wh=(32, 32), resize_wh=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def reject(frame_id: int = 0, *, height: int = 96, width: int = 128) -> Judgement:
    image = np.full((height, width, 3), (90, 110, 130), np.uint8)
    anomaly_map = np.full((32, 32), 0.1, np.float32)
    anomaly_map[8:16, 4:12] = 1.6
    region = Region(16, 24, 32, 24, 768, 1.6)
    frame = Frame(frame_id, "test", image, time.monotonic(), truth="defect")
    return Judgement(frame, "REJECT", 1.6, 1.0, (region,), anomaly_map, {"total": 12.345678})


def passed(frame_id: int = 0) -> Judgement:
    frame = Frame(frame_id, "test", np.full((96, 128), 100, np.uint8), time.monotonic())
    return Judgement(frame, "PASS", 0.2, 1.0, map=np.full((32, 32), 0.2, np.float32), latency_ms={"total": 1.0})


def unreadable(frame_id: int = 0) -> Judgement:
    frame = Frame(frame_id, "test", None, time.monotonic(), fault="unreadable_image")
    return Judgement(frame, "FAULT", None, 1.0, fault="unreadable_image", detail="cut off")


def opened(uri: str):
    return open_sink(uri, input_spec=SPEC)


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]


def write_all(sink: Sink, judgements: Iterable[Judgement]) -> None:
    for judgement in judgements:
        sink.write(judgement)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """As if the disk were full: the kernel refuses to let any file grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestFactory:
    @pytest.mark.parametrize(
        ("uri", "message"),
        [
            ("records.jsonl", "jsonl:records.jsonl"),
            ("mqtt:host", "expected one of jsonl"),
            ("jsonl:", "missing after"),
            ("jsonl:x?fps=3", "unknown option 'fps'"),
            ("video:x.mp4?fsp=3", "did you mean 'fps'"),
            ("video:x.mp4?fps=0", "from 1 to 240"),
            ("video:x.mp4?fps=nan", "from 1 to 240"),
            ("video:x.mp4?fps=many", "from 1 to 240"),
            ("video:x.mp4?fps", "key=value"),
            ("video:x.mp4?fps=3&fps=4", "once"),
            ("video:x.gif", r"\.mp4"),
            ("images:x?which=good", "'rejects' or 'all'"),
        ],
    )
    def test_bad_uris_say_what_is_wrong(self, uri: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            opened(uri)

    @pytest.mark.parametrize("uri", ["jsonl:{0}/x.jsonl", "video:{0}/x.mp4", "images:{0}/x"])
    def test_a_file_in_the_way_of_the_folder(self, uri: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot"):
            opened(uri.format(tmp_path / "file"))


class TestJsonl:
    def test_records_are_whole_at_any_moment(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "records.jsonl"
        sink = opened(f"jsonl:{path}")
        for count, judgement in enumerate([reject(0), passed(1), unreadable(2)], 1):
            sink.write(judgement)
            assert path.read_text().endswith("\n")
            assert len(path.read_text().splitlines()) == count
        sink.close()
        sink.close()
        first, _, last = map(json.loads, path.read_text().splitlines())
        assert first["regions"] == [{"x": 16, "y": 24, "width": 32, "height": 24, "area": 768, "peak": 1.6}]
        assert first["latency_ms"] == {"total": 12.3457}
        assert (last["verdict"], last["score"], last["fault"], last["detail"]) == (
            "FAULT",
            None,
            "unreadable_image",
            "cut off",
        )

    def test_a_full_disk_leaves_whole_records(self, tmp_path: Path) -> None:
        path = tmp_path / "records.jsonl"
        with (
            pytest.raises(OutputError, match="cannot write"),
            file_size_limit(1000),
            closing(opened(f"jsonl:{path}")) as sink,
        ):
            write_all(sink, (reject(index) for index in range(100)))
        lines = path.read_text().splitlines(keepends=True)
        assert 1 < len(lines) < 10
        assert all(line.endswith("\n") and json.loads(line)["verdict"] == "REJECT" for line in lines)

    def test_a_device_without_room(self) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        sink = opened("jsonl:/dev/full")
        with pytest.raises(OutputError, match="No space left"):
            sink.write(reject())
        sink.close()

    def test_standard_output(self) -> None:
        script = (
            "from recontrast_edge.frame import Frame, Judgement\n"
            "from recontrast_edge.sinks.jsonl import JsonlSink\n"
            "sink = JsonlSink(None)\n"
            "sink.write(Judgement(Frame(3, 's', None, 0.0), 'FAULT', None, 1.0, fault='source_failed'))\n"
            "sink.close()\n"
            "print('after')\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        record, after = done.stdout.splitlines()
        assert json.loads(record)["frame_id"] == 3
        assert after == "after"


class TestImages:
    def test_rejects_only(self, tmp_path: Path) -> None:
        sink = opened(f"images:{tmp_path / 'out'}")
        for judgement in (passed(0), reject(1), unreadable(2)):
            sink.write(judgement)
        sink.close()
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == ["00000001.json", "00000001.map.png", "00000001.png"]

    def test_all_and_the_map_can_be_read_back(self, tmp_path: Path) -> None:
        sink = opened(f"images:{tmp_path}?which=all")
        for judgement in (passed(0), reject(1), unreadable(2)):
            sink.write(judgement)
        assert len(list(tmp_path.glob("*.json"))) == 3
        assert not (tmp_path / "00000002.map.png").exists()
        record = json.loads((tmp_path / "00000001.json").read_text())
        steps = cv2.imread(str(tmp_path / "00000001.map.png"), cv2.IMREAD_UNCHANGED)
        assert steps.dtype == np.uint16
        assert record["map_step"] == MAP_STEP
        np.testing.assert_allclose(steps * record["map_step"], reject().map, atol=MAP_STEP / 2 + 1e-6)

    def test_a_full_disk_leaves_nothing_half_written(self, tmp_path: Path) -> None:
        folder = tmp_path / "out"
        with pytest.raises(OutputError), file_size_limit(500), closing(opened(f"images:{folder}")) as sink:
            sink.write(reject())
        assert list(folder.iterdir()) == []


class TestVideo:
    @pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi"])
    def test_as_many_pictures_as_judgements(self, suffix: str, tmp_path: Path) -> None:
        path = tmp_path / f"out{suffix}"
        sink = opened(f"video:{path}?fps=12.5")
        judgements = [reject(0), passed(1), unreadable(2), reject(3, height=300, width=100), passed(4)]
        for judgement in judgements:
            sink.write(judgement)
        assert not path.exists(), "it gets its name when it is complete"
        sink.close()
        sink.close()
        assert list(tmp_path.iterdir()) == [path]
        pictures = decoded(path)
        assert len(pictures) == len(judgements)
        width, height = panel_size(judgements[0].frame.image)
        assert pictures[0].shape == (height + STRIP_HEIGHT, 2 * width + GAP, 3)
        with av.open(str(path)) as container:
            assert float(container.streams.video[0].average_rate) == pytest.approx(12.5)

    def test_a_fault_may_come_first(self, tmp_path: Path) -> None:
        sink = opened(f"video:{tmp_path / 'out.mp4'}")
        for judgement in (unreadable(0), reject(1)):
            sink.write(judgement)
        sink.close()
        assert len(decoded(tmp_path / "out.mp4")) == 2

    def test_without_frames_there_is_no_file(self, tmp_path: Path) -> None:
        opened(f"video:{tmp_path / 'out.mp4'}").close()
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_leaves_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "out.mp4"
        rng = np.random.default_rng(0)
        noise = (rng.integers(0, 255, (256, 256), np.uint8) for _ in range(200))
        judgements = (
            Judgement(Frame(index, "test", image, 0.0), "PASS", 0.1, 1.0) for index, image in enumerate(noise)
        )
        with (
            pytest.raises(OutputError, match=r"out\.mp4: cannot write"),
            file_size_limit(30_000),
            closing(opened(f"video:{path}")) as sink,
        ):
            write_all(sink, judgements)
        assert list(tmp_path.iterdir()) == []


class TestTerminal:
    def test_plain_lines_without_a_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        statistics = Statistics()
        view = TerminalView(statistics, title="test", to_stderr=False)
        for judgement in (passed(0), reject(1), unreadable(2)):
            statistics.add(judgement)
            view.write(judgement)
        view.close()
        assert capsys.readouterr().out.splitlines() == [
            "REJECT  #1  1.600 > 1.000  truth defect",
            "FAULT   #2  unreadable_image",
        ]

    def test_live_table_on_a_terminal(self, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        monkeypatch.setenv("COLUMNS", "100")
        statistics = Statistics()
        view = TerminalView(statistics, title="engine · source", to_stderr=True)
        for judgement in (passed(0), reject(1), unreadable(2)):
            statistics.add(judgement)
            view.write(judgement)
        view.close()
        view.close()
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "engine · source" in captured.err
        assert "1 PASS, 1 REJECT, 1 FAULT" in captured.err


class TestRender:
    def test_a_good_part_looks_calm(self) -> None:
        right = annotate(passed(), SPEC, (128, 96))[STRIP_HEIGHT:, 128 + GAP :]
        assert np.ptp(right.astype(int), axis=2).max() == 0, "grey, not tinted"

    def test_the_colour_lies_where_the_map_is(self) -> None:
        picture = annotate(reject(), SPEC, (128, 96))[STRIP_HEIGHT:]
        heat = picture[:, 128 + GAP :].astype(int)
        coloured = np.ptp(heat, axis=2) > 60
        ys, xs = np.nonzero(coloured)
        assert abs(xs.mean() - 32) < 3
        assert abs(ys.mean() - 36) < 3

    def test_the_map_covers_only_the_roi(self) -> None:
        spec = SPEC.model_copy(update={"roi": Roi(x=64, y=0, width=64, height=96)})
        judgement = reject()
        judgement.map[:] = 1.8
        heat = annotate(judgement, spec, (128, 96))[STRIP_HEIGHT:, 128 + GAP :].astype(int)
        tint = np.ptp(heat, axis=2)
        assert tint[5:-5, 5:60].max() < 30
        assert tint[5:-5, 70:120].min() > 60

    @pytest.mark.parametrize("shape", [(0, 1920), (8, 8, 4)])
    def test_what_cannot_be_drawn_is_said(self, shape: tuple[int, ...]) -> None:
        frame = Frame(0, "test", np.zeros(shape, np.uint8), 0.0)
        picture = annotate(Judgement(frame, "FAULT", None, 1.0, fault="invalid_image"), SPEC, panel_size(frame.image))
        assert picture.ndim == 3

    @pytest.mark.parametrize("threshold", [0.0, -1.0])
    def test_thresholds_that_are_no_scale(self, threshold: float) -> None:
        judgement = reject()
        annotate(Judgement(judgement.frame, "REJECT", 1.6, threshold, map=judgement.map), SPEC, (128, 96))

    @pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 4000), (5000, 3000), (333, 777)])
    def test_panels_are_even_and_bounded(self, width: int, height: int) -> None:
        panel_wh = panel_size(np.zeros((height, width), np.uint8))
        assert all(side % 2 == 0 and 2 <= side <= 960 for side in panel_wh)
