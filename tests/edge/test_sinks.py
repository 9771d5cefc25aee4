from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from recontrast_edge.errors import OutputError, UsageError
from recontrast_edge.frame import Frame, Judgement, Sink
from recontrast_edge.images import read_image
from recontrast_edge.render import GAP, STRIP_HEIGHT, annotate, panel_size
from recontrast_edge.sinks import open_sink
from recontrast_edge.sinks.images import MAP_STEP, ImagesSink
from recontrast_edge.sinks.outage import RETRY_S
from recontrast_edge.sinks.terminal import TerminalView
from recontrast_edge.spec import InputSpec, Roi
from recontrast_edge.statistics import Statistics
from tests.edge.judgements import faulty, passed, rejected, state

SPEC = InputSpec(size_wh=(32, 32), resize_wh=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def opened(uri: str):
    return open_sink(uri, input_spec=SPEC)


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]


def lines(path: Path) -> list[dict]:
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


WRITER = """
import os, random, signal, sys, time
from itertools import count
from recontrast_edge.sinks import open_sink
from recontrast_edge.spec import InputSpec
from tests.edge.judgements import rejected

folder, times = sys.argv[1], int(sys.argv[2])
spec = InputSpec(size_wh=(32, 32), resize_wh=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
random.seed(0)
for _ in range(times):
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        records = open_sink(f"jsonl:{folder}/r.jsonl", input_spec=spec)
        images = open_sink(f"images:{folder}/images?max_gib=0.001", input_spec=spec)
        for index in count():
            images.write(rejected(index))
            os.write(writes, b".")
            for _ in range(20):
                records.write(rejected(index))
    # Closed here, so that a child which ends by itself is noticed and not waited for.
    os.close(writes)
    if not os.read(reads, 1):
        sys.exit(f"the writer ended by itself: {os.waitpid(child, 0)}")
    time.sleep(random.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reads)
"""


def kill_while_writing(times: int, folder: Path) -> None:
    """Each time at another moment; then every record and picture that is there must be readable."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", WRITER, str(folder), str(times)], check=True, env=environment, timeout=300)
    opened(f"jsonl:{folder}/r.jsonl").close()
    assert all(record["verdict"] == "REJECT" for record in lines(folder / "r.jsonl"))
    described = list((folder / "images").glob("*.json"))
    assert described
    for path in described:
        assert json.loads(path.read_text())["verdict"] == "REJECT"
        assert path.with_suffix(".map.png").exists()
    for path in (folder / "images").glob("*.png"):
        if not path.name.startswith("."):
            read_image(path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """Take all the room there is."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return filler


def noise(index: int) -> Judgement:
    image = np.random.default_rng(index).integers(0, 255, (128, 128), np.uint8)
    return Judgement(Frame(index, "test", image, time.monotonic()), "REJECT", 1.6, 1.0)


class TestFullDisk:
    """Verdicts go on, it is told at once, and writing resumes when there is room."""

    def test_records(self, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = small_disk / "r.jsonl"
        sink = opened(f"jsonl:{path}")
        sink.write(rejected(0))
        filler = fill(small_disk)
        index, started_s = 0, time.monotonic()
        while "cannot write (No space left on device)" not in caplog.text:
            assert time.monotonic() - started_s < 1.0
            index += 1
            sink.write(rejected(index))
        for _ in range(50):
            index += 1
            sink.write(rejected(index))
        assert time.monotonic() - started_s < 1.0, "nobody waits for a disk"
        filler.unlink()
        freed_s = time.monotonic()
        while "writing again" not in caplog.text:
            assert time.monotonic() - freed_s < 5.0
            index += 1
            sink.write(rejected(index))
            time.sleep(0.05)
        assert caplog.text.count("cannot write") == 1
        with pytest.raises(OutputError, match=r"could not write for a while; \d+ records were lost"):
            sink.close()
        records = lines(path)
        (lost,) = [record for record in records if record.get("type") == "lost"]
        assert lost["records"] == sink.counters["lost"] > 0
        assert lost["detail"] == "No space left on device"
        assert len(records) - 1 + lost["records"] == index + 1, "every record is there, or counted"

    def test_images(self, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
        sink = opened(f"images:{small_disk}/rejects")
        index = 0
        while "cannot write" not in caplog.text:
            sink.write(noise(index))
            index += 1
            assert index < 1000
        sink.write(noise(index))
        fill(small_disk)
        before = {path.name for path in (small_disk / "rejects").iterdir()}
        assert {name.partition(".")[0] for name in before}
        assert len([name for name in before if name.endswith(".json")]) == index - 1, "no frame is there in part"
        assert len(before) == 2 * (index - 1)
        (small_disk / "filler").unlink()
        for path in sorted((small_disk / "rejects").iterdir())[:20]:
            path.unlink()
        time.sleep(RETRY_S)
        sink.write(noise(5000))
        assert list((small_disk / "rejects").glob("*-00005000.json"))
        with pytest.raises(OutputError, match="2 pictures were lost"):
            sink.close()

    def test_video(self, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = small_disk / "out.mp4"
        sink = opened(f"video:{path}")
        index = 0
        while "cannot write (No space left on device)" not in caplog.text:
            sink.write(noise(index))
            index += 1
            assert index < 3000
        assert len(decoded(path)) == index, "the video is complete, with every picture so far"
        moved = small_disk.parent / "out.mp4"
        shutil.move(path, moved)
        time.sleep(RETRY_S)
        for more in range(5):
            sink.write(noise(index + more))
        sink.close()
        assert len(decoded(small_disk / "out-2.mp4")) == 5
        assert sink.counters == {"segments": 2, "lost": 0}
        assert sorted(entry.name for entry in small_disk.iterdir()) == ["out-2.mp4"]


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
            ("ftp:host", "expected one of jsonl"),
            ("jsonl:", "missing after"),
            ("jsonl:x?fps=3", "unknown option 'fps'"),
            ("video:x.mp4?fsp=3", "did you mean 'fps'"),
            ("video:x.mp4?fps=0", "from 1 to 240"),
            ("video:x.mp4?fps=nan", "from 1 to 240"),
            ("video:x.mp4?fps=many", "from 1 to 240"),
            ("video:x.mp4?fps", "key=value"),
            ("video:x.mp4?fps=3&fps=4", "once"),
            ("video:x.gif", r"\.mp4"),
            ("images:x?which=good", "one of all, not_pass, rejects, faults"),
            ("images:x?max_gib=0", "from 0.001 to"),
            ("images:x?max_days=-1", "from 0.001 to"),
            ("images:x?original=maybe", "one of yes, no"),
            ("jsonl:x?keep=0", "from 1 to 9999"),
            ("jsonl:-?rotate_mb=1", "unknown option"),
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
        for count, judgement in enumerate([rejected(0), passed(1), faulty(2)], 1):
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

    def test_records_are_added_to_those_of_earlier_runs(self, tmp_path: Path) -> None:
        path = tmp_path / "records.jsonl"
        for index in range(2):
            with closing(opened(f"jsonl:{path}")) as sink:
                sink.write(passed(index))
        assert [record["frame_id"] for record in lines(path)] == [0, 1]

    @pytest.mark.parametrize(
        ("rest", "mended"), [('{"frame_id": 7, "ver', 1), ("{", 1), ("\0" * 300, 1), ('{"frame_id": 7}', 0), ("", 0)]
    )
    def test_a_line_that_was_cut_is_mended(self, rest: str, mended: int, tmp_path: Path) -> None:
        path = tmp_path / "records.jsonl"
        path.write_text('{"frame_id": 6}\n' + rest)
        with closing(opened(f"jsonl:{path}")) as sink:
            sink.write(passed(8))
            assert sink.counters["mended"] == mended
        expected = [6, 7, 8] if rest.endswith("}") else [6, 8]
        assert [record["frame_id"] for record in lines(path)] == expected

    @pytest.mark.parametrize("text", ["a letter to my aunt", "a\nb", "x" * (2 << 20)])
    def test_a_file_of_something_else_stays_as_it_is(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "letter.txt"
        path.write_text(text)
        with pytest.raises(OutputError, match="does not end with a record"):
            opened(f"jsonl:{path}")
        assert path.read_text() == text

    def test_two_outputs_do_not_write_to_one_file(self, tmp_path: Path) -> None:
        with closing(opened(f"jsonl:{tmp_path}/r.jsonl")), pytest.raises(OutputError, match="another output"):
            opened(f"jsonl:{tmp_path}/r.jsonl")
        opened(f"jsonl:{tmp_path}/r.jsonl").close()

    def test_states_are_records_of_their_own(self, tmp_path: Path) -> None:
        path = tmp_path / "records.jsonl"
        for states in ("no", "yes"):
            with closing(opened(f"jsonl:{path}?states={states}")) as sink:
                sink.write(passed(0))
                sink.write_state(state("STALE", fault="source_stale"))
        assert [record.get("type") for record in lines(path)] == [None, None, "state"]

    def test_rotation_keeps_so_many_files_and_loses_nothing_in_between(self, tmp_path: Path) -> None:
        path = tmp_path / "records.jsonl"
        with closing(opened(f"jsonl:{path}?rotate_mb=0.01&keep=3")) as sink:
            write_all(sink, (rejected(index) for index in range(150)))
        files = [path.with_name(f"records.jsonl.{number}") for number in (3, 2, 1)] + [path]
        assert sorted(tmp_path.iterdir()) == sorted(files)
        assert all(file.stat().st_size <= 10_000 for file in files)
        ids = [record["frame_id"] for file in files for record in lines(file)]
        assert ids == list(range(ids[0], 150))
        assert 0 < ids[0] < 120

    def test_a_killed_process_leaves_whole_records(self, tmp_path: Path) -> None:
        kill_while_writing(20, tmp_path)

    @pytest.mark.soak
    def test_a_process_killed_a_hundred_times_leaves_whole_records(self, tmp_path: Path) -> None:
        kill_while_writing(100, tmp_path)

    def test_a_full_disk_leaves_whole_records(self, tmp_path: Path) -> None:
        path = tmp_path / "records.jsonl"
        sink = opened(f"jsonl:{path}")
        with file_size_limit(1500):
            write_all(sink, (rejected(index) for index in range(100)))
        records = lines(path)
        assert 1 < len(records) < 10
        with pytest.raises(OutputError, match=rf"File too large\); {100 - len(records)} records were lost"):
            sink.close()
        sink.close()

    def test_a_file_that_is_moved_or_deleted_is_made_again(self, tmp_path: Path) -> None:
        path = tmp_path / "out" / "records.jsonl"
        sink = opened(f"jsonl:{path}")
        write_all(sink, [rejected(0), rejected(1)])
        path.rename(tmp_path / "yesterday.jsonl")
        write_all(sink, [rejected(2)])
        shutil.rmtree(path.parent)
        path.parent.touch()
        write_all(sink, [rejected(3)])
        path.parent.unlink()
        time.sleep(RETRY_S)
        write_all(sink, [rejected(4)])
        with pytest.raises(OutputError, match="1 records were lost"):
            sink.close()
        assert [record["frame_id"] for record in lines(tmp_path / "yesterday.jsonl")] == [0, 1]
        assert [record.get("frame_id", "lost") for record in lines(path)] == ["lost", 4]

    def test_a_device_without_room(self) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        sink = opened("jsonl:/dev/full")
        with pytest.raises(OutputError, match="No space left"):
            sink.write(rejected())
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
        judgement = rejected(1, camera="left/1")
        for each in (passed(0), judgement, faulty(2)):
            sink.write(each)
        sink.close()
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        time_of_day = re.sub("[-:]", "", judgement.record()["time"])
        assert re.fullmatch(r"\d{8}T\d{6}\.\d{3}Z", time_of_day)
        assert [name[21:] for name in names] == [f"left_1-00000001{end}" for end in (".json", ".map.png", ".png")]
        assert abs(int(names[0][9:15]) - int(time_of_day[9:15])) <= 1

    def test_the_frame_as_it_came(self, tmp_path: Path) -> None:
        judgement = rejected(1)
        with closing(opened(f"images:{tmp_path}?original=yes")) as sink:
            sink.write(judgement)
        (original,) = tmp_path.glob("*.original.png")
        np.testing.assert_array_equal(cv2.imread(str(original)), judgement.frame.image)

    @pytest.mark.parametrize(
        ("which", "ids"), [("rejects", [1]), ("faults", [2]), ("not_pass", [1, 2]), ("all", [0, 1, 2])]
    )
    def test_which(self, which: str, ids: list[int], tmp_path: Path) -> None:
        with closing(opened(f"images:{tmp_path}?which={which}")) as sink:
            for each in (passed(0), rejected(1), faulty(2)):
                sink.write(each)
        assert sorted(json.loads(path.read_text())["frame_id"] for path in tmp_path.glob("*.json")) == ids

    def test_the_ring_removes_the_oldest_and_nothing_else(self, tmp_path: Path) -> None:
        foreign = ["notes.json", "20200101T000000.000Z-00000001.png", "20200101T000000.000Z-00000002.json", "x.png"]
        for name in foreign:
            (tmp_path / name).write_text('{"frame_id": 2}')
        with closing(opened(f"images:{tmp_path}")) as sink:
            write_all(sink, (rejected(index) for index in range(10)))
        one = sum(path.stat().st_size for path in tmp_path.glob("*-00000009.*"))
        # An earlier run's count, too.
        with closing(ImagesSink(tmp_path, SPEC, max_bytes=round(6.5 * one))) as sink:
            write_all(sink, (rejected(index) for index in range(10, 15)))
            assert sink.counters["removed"] == 9
        ours = sorted(path for path in tmp_path.glob("*.json") if path.name not in foreign)
        assert [json.loads(path.read_text())["frame_id"] for path in ours] == list(range(9, 15))
        assert len(list(tmp_path.iterdir())) == 3 * 6 + len(foreign)

    def test_what_a_killed_process_left_is_removed(self, tmp_path: Path) -> None:
        name = "20260301T080000.123Z-00000012"
        stale, fresh, foreign = (f".{name}.png.abc123.part", f".{name}.map.png.x_9.part", ".other.png.abc123.part")
        for each in (stale, fresh, foreign):
            (tmp_path / each).write_bytes(b"half")
        for each in (stale, foreign):
            os.utime(tmp_path / each, (1e9, 1e9))
        opened(f"images:{tmp_path}?max_days=1").close()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([fresh, foreign])

    def test_the_ring_forgets_after_days(self, tmp_path: Path) -> None:
        old = rejected(0)
        old = dataclasses.replace(old, frame=dataclasses.replace(old.frame, captured_s=time.monotonic() - 3 * 86400))
        with closing(opened(f"images:{tmp_path}")) as sink:
            write_all(sink, [old, rejected(1)])
        with closing(opened(f"images:{tmp_path}?max_days=2")) as sink:
            sink.write(rejected(2))
        assert sorted(json.loads(path.read_text())["frame_id"] for path in tmp_path.glob("*.json")) == [1, 2]

    def test_all_and_the_map_can_be_read_back(self, tmp_path: Path) -> None:
        sink = opened(f"images:{tmp_path}?which=all")
        for judgement in (passed(0), rejected(1), faulty(2)):
            sink.write(judgement)
        assert len(list(tmp_path.glob("*.json"))) == 3
        assert not list(tmp_path.glob("*-00000002.map.png"))
        (described,) = tmp_path.glob("*-00000001.json")
        record = json.loads(described.read_text())
        steps = cv2.imread(str(described.with_suffix(".map.png")), cv2.IMREAD_UNCHANGED)
        assert steps.dtype == np.uint16
        assert record["map_step"] == MAP_STEP
        np.testing.assert_allclose(steps * record["map_step"], rejected().map, atol=MAP_STEP / 2 + 1e-6)

    def test_a_full_disk_leaves_nothing_half_written(self, tmp_path: Path) -> None:
        folder = tmp_path / "out"
        sink = opened(f"images:{folder}")
        with file_size_limit(500):
            sink.write(rejected())
        assert list(folder.iterdir()) == []
        with pytest.raises(OutputError, match="1 pictures were lost"):
            sink.close()


class TestVideo:
    @pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi"])
    def test_as_many_pictures_as_judgements(self, suffix: str, tmp_path: Path) -> None:
        path = tmp_path / f"out{suffix}"
        sink = opened(f"video:{path}?fps=12.5")
        judgements = [rejected(0), passed(1), faulty(2), rejected(3, height=300, width=100), passed(4)]
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
        for judgement in (faulty(0), rejected(1)):
            sink.write(judgement)
        sink.close()
        assert len(decoded(tmp_path / "out.mp4")) == 2

    def test_without_frames_there_is_no_file(self, tmp_path: Path) -> None:
        opened(f"video:{tmp_path / 'out.mp4'}").close()
        assert list(tmp_path.iterdir()) == []

    def test_what_cannot_be_completed_is_not_left_behind(self, tmp_path: Path) -> None:
        sink = opened(f"video:{tmp_path / 'out.mp4'}")
        with file_size_limit(30_000):
            write_all(sink, map(noise, range(200)))
            with pytest.raises(OutputError, match=r"out\.mp4: cannot write .*; 200 pictures were lost"):
                sink.close()
        assert list(tmp_path.iterdir()) == []


class TestTerminal:
    def test_plain_lines_without_a_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        statistics = Statistics()
        view = TerminalView(statistics, title="test", to_stderr=False)
        for judgement in (passed(0), rejected(1), faulty(2)):
            statistics.add(judgement)
            view.write(judgement)
        view.close()
        assert capsys.readouterr().out.splitlines() == [
            "REJECT  #1  1.600 > 1.000  truth defect",
            "FAULT   #2  unreadable_image",
        ]

    def test_states(self, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
        change = state("STALE", camera="left", fault="source_stale")
        view = TerminalView(Statistics(), title="test", to_stderr=False)
        for each in (
            state("RUNNING", camera="left"),
            change,
            state("RUNNING", camera="left"),
            state("ENDED", camera="left"),
        ):
            view.write_state(each)
        view.close()
        assert capsys.readouterr().out.splitlines() == [
            "left: STALE since 0 s, source_stale: no frame for 1.0 s",
            "left: RUNNING since 0 s",
        ]
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        statistics = Statistics()
        statistics.states["left"] = change
        view = TerminalView(statistics, title="test", to_stderr=False)
        view.write_state(change)
        view.close()
        assert capsys.readouterr().out.count("left: STALE since 0 s, source_stale: no frame for 1.0 s") >= 1

    def test_live_table_on_a_terminal(self, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        monkeypatch.setenv("COLUMNS", "100")
        statistics = Statistics()
        view = TerminalView(statistics, title="engine · source", to_stderr=True)
        for judgement in (passed(0), rejected(1), faulty(2)):
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
        picture = annotate(rejected(), SPEC, (128, 96))[STRIP_HEIGHT:]
        heat = picture[:, 128 + GAP :].astype(int)
        coloured = np.ptp(heat, axis=2) > 60
        ys, xs = np.nonzero(coloured)
        assert abs(xs.mean() - 32) < 3
        assert abs(ys.mean() - 36) < 3

    def test_the_map_covers_only_the_roi(self) -> None:
        spec = SPEC.model_copy(update={"roi": Roi(x=64, y=0, width=64, height=96)})
        judgement = rejected()
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
        judgement = rejected()
        annotate(Judgement(judgement.frame, "REJECT", 1.6, threshold, map=judgement.map), SPEC, (128, 96))

    @pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 4000), (5000, 3000), (333, 777)])
    def test_panels_are_even_and_bounded(self, width: int, height: int) -> None:
        panel_wh = panel_size(np.zeros((height, width), np.uint8))
        assert all(side % 2 == 0 and 2 <= side <= 960 for side in panel_wh)
