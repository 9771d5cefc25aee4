"""A folder that grows, written to in all the ways in which cameras and programs do."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest

from recontrast_edge.camera_plan import Retry
from recontrast_edge.engines import open_engine
from recontrast_edge.errors import InputError, SourceError, UsageError
from recontrast_edge.frame import EndOfStream, Frame, Source
from recontrast_edge.sources import open_source, watch
from tests.edge.fakes_line import FakeSink, run
from tests.edge.leaks import assert_reopening_leaves_nothing


def png(value: int, size: int = 16) -> bytes:
    return cv2.imencode(".png", np.full((size, size), value, np.uint8))[1].tobytes()


def bmp(value: int) -> bytes:
    return cv2.imencode(".bmp", np.full((64, 64), value, np.uint8))[1].tobytes()


def write(path: Path, value: int) -> Path:
    path.write_bytes(png(value))
    return path


def values(frames: list[Frame]) -> list[int | None]:
    return [None if frame.image is None else int(frame.image[0, 0]) for frame in frames]


def read(source: Source, count: int, timeout_s: float = 5.0) -> list[Frame]:
    frames = []
    for _ in range(count):
        frame = source.read(timeout_s)
        assert frame is not None, f"only {len(frames)} of {count}"
        frames.append(frame)
    return frames


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "incoming"
    path.mkdir()
    return path


def test_new_images_come_in_the_order_in_which_they_are_completed(folder: Path) -> None:
    write(folder / "0.png", 1)
    with closing(open_source(f"watch:{folder}?settle_s=0.05")) as source:
        assert not source.live
        assert source.read(0.1) is None
        slow, data = folder / "1.png", png(20)
        with slow.open("wb") as file:
            file.write(data[:40])
            file.flush()
            write(folder / "2.png", 30)
            (first,) = read(source, 1)
            for byte in data[40:]:
                assert source.read(0.0) is None
                file.write(bytes([byte]))
                file.flush()
        (second,) = read(source, 1)
        assert values([first, second]) == [30, 20]
        assert [frame.frame_id for frame in (first, second)] == [0, 1]
        assert time.monotonic() - second.captured_s < 1
        assert source.read(0.1) is None


def test_an_image_renamed_into_place_is_never_seen_before(folder: Path) -> None:
    with closing(open_source(f"watch:{folder}?settle_s=0.05")) as source:
        for name in (".1.png.part", "2.png.tmp", ".hidden.png", "notes.txt"):
            (folder / name).write_bytes(png(1))
        (folder / "subfolder.png").mkdir()
        assert source.read(0.3) is None
        (folder / "2.png.tmp").rename(folder / "2.png")
        assert read(source, 1)[0].source == str(folder / "2.png")
        assert source.read(0.2) is None


def test_a_pause_in_writing_is_no_end(folder: Path) -> None:
    """Longer than the time to settle, but what is there cannot be decoded; and BMP, which can, while it is written."""
    with closing(open_source(f"watch:{folder}?settle_s=0.1")) as source:
        data = png(9, size=64)
        (folder / "1.png").write_bytes(data[: len(data) // 2])
        assert source.read(0.4) is None
        with (folder / "1.png").open("ab") as file:
            file.write(data[len(data) // 2 :])
        assert values(read(source, 1)) == [9]

        whole = bmp(200)
        with (folder / "2.bmp").open("wb") as file:
            file.write(whole[:1078])
            file.truncate(len(whole))
            file.flush()
            for index in range(1078, len(whole), 512):
                assert source.read(0.0) is None
                file.seek(index)
                file.write(whole[index : index + 512])
                file.flush()
                assert source.read(0.03) is None
        (frame,) = read(source, 1)
        assert frame.image is not None
        assert int(frame.image.min()) == 200


def test_a_broken_image_is_a_fault_after_a_while_and_holds_up_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "GIVE_UP_S", 1.5)
    with closing(open_source(f"watch:{folder}?settle_s=0.05")) as source:
        (folder / "1.png").write_bytes(png(1)[:30])
        (folder / "2.png").touch()
        write(folder / "3.png", 3)
        (good,) = read(source, 1)
        broken = read(source, 2)
        assert values([good, *broken]) == [3, None, None]
        assert {frame.fault for frame in broken} == {"unreadable_image"}
        assert "empty" in (broken[1].detail or "")


def test_what_is_there_already(folder: Path) -> None:
    for index in (10, 9, 8):
        write(folder / f"{index}.png", index)
    # In the order in which they were written, then by name.
    os.utime(folder / "9.png", ns=(0, 5))
    with closing(open_source(f"watch:{folder}?existing=first&settle_s=0")) as source:
        assert values(read(source, 3)) == [9, 10, 8]
    for index in (8, 9, 10):
        os.utime(folder / f"{index}.png", ns=(0, 5))
    with closing(open_source(f"watch:{folder}?existing=first&settle_s=0")) as source:
        assert values(read(source, 3)) == [8, 9, 10]


def test_a_name_that_is_used_again_by_a_new_file(folder: Path, tmp_path: Path) -> None:
    with closing(open_source(f"watch:{folder}?settle_s=0.02")) as source:
        for value in (1, 2, 3):
            write(tmp_path / "next.png", value).replace(folder / "current.png")
            assert values(read(source, 1)) == [value]


def test_file_numbers_that_change_by_themselves_bring_nothing_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on network file systems that make them up."""
    numbers = itertools.count()
    scandir = os.scandir

    class Renumbered:
        def __init__(self, entry: os.DirEntry[str]) -> None:
            self.name, self.is_file = entry.name, entry.is_file

        def inode(self) -> int:
            return next(numbers)

    @contextmanager
    def renumbering(path: Path) -> Iterator[Iterator[Renumbered]]:
        with scandir(path) as entries:
            yield map(Renumbered, entries)

    monkeypatch.setattr(os, "scandir", renumbering)
    with closing(open_source(f"watch:{folder}?settle_s=0.02")) as source:
        for value in (1, 2, 3):
            write(folder / f"{value}.png", value)
            assert values(read(source, 1)) == [value]
            assert source.read(0.1) is None


def test_patterns_and_part_ids(folder: Path) -> None:
    uri = f"watch:{folder}?pattern=cam1_*.png&part_id=_(%5Cd%2B)%5C.&existing=first&settle_s=0"
    for name in ("cam1_0042.png", "cam2_0042.png", "cam1_x.png"):
        write(folder / name, 1)
    with closing(open_source(uri)) as source:
        frames = read(source, 2)
        assert {Path(frame.source).name: frame.part_id for frame in frames} == {
            "cam1_0042.png": "0042",
            "cam1_x.png": None,
        }
        assert source.read(0.05) is None
    with closing(open_source(f"watch:{folder}?pattern=cam2*&part_id=[0-9]{{4}}&existing=first&settle_s=0")) as source:
        assert read(source, 1)[0].part_id == "0042"


class TestAfter:
    def test_delete(self, folder: Path) -> None:
        kept = (folder / "notes.txt", write(folder / "other.jpg.part", 1))
        kept[0].touch()
        with closing(open_source(f"watch:{folder}?after=delete&settle_s=0.02")) as source:
            write(folder / "1.png", 1)
            read(source, 1)
        assert sorted(folder.iterdir()) == sorted(kept)

    def test_move_overwrites_nothing(self, folder: Path) -> None:
        done = folder / "done" / "today"
        done.mkdir(parents=True)
        write(done / "1.png", 99)
        with closing(open_source(f"watch:{folder}?after=move:done/today&settle_s=0.02")) as source:
            for value in (1, 2):
                write(folder / "1.png", value)
                assert values(read(source, 1)) == [value]
        assert {path.name: path.read_bytes() for path in done.iterdir()} == {
            "1.png": png(99),
            "1-1.png": png(1),
            "1-2.png": png(2),
        }
        assert list(folder.iterdir()) == [folder / "done"]

    @pytest.mark.parametrize("target", ["../elsewhere", "/tmp", ".", "done/../..", "link/deep"])
    def test_never_leads_out_of_the_folder(self, folder: Path, tmp_path: Path, target: str) -> None:
        (folder / "link").symlink_to(tmp_path)
        with pytest.raises(UsageError, match="expected a subfolder"):
            open_source(f"watch:{folder}?after=move:{target}")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["incoming"]

    def test_what_cannot_be_put_away_is_counted_and_comes_once(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_path: Path) -> None:
            raise PermissionError(13, "Permission denied")

        with closing(open_source(f"watch:{folder}?after=delete&settle_s=0.02")) as source:
            monkeypatch.setattr(Path, "unlink", refuse)
            write(folder / "1.png", 1)
            read(source, 1)
            monkeypatch.undo()
            assert getattr(source, "counters") == {"left": 1}  # noqa: B009 - not part of the protocol
            assert source.read(0.2) is None

    def test_a_folder_that_may_not_be_written_to_is_refused_at_once(self) -> None:
        user = os.geteuid()
        # Not below pytest's own folder, which only its user may enter.
        with tempfile.TemporaryDirectory(dir="/tmp") as name:
            Path(name).chmod(0o555)
            if user == 0:
                os.seteuid(65534)
            try:
                with pytest.raises(InputError, match="after=delete"):
                    open_source(f"watch:{name}?after=delete")
            finally:
                os.seteuid(user)


def test_links_and_pipes_are_left_alone(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "secret.png", 1)
    with closing(open_source(f"watch:{folder}?settle_s=0.02&after=delete")) as source:
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
        os.mkfifo(folder / "pipe.png")
        assert source.read(0.2) is None
    assert (tmp_path / "secret.png").exists()


def test_a_folder_that_goes_away_is_an_error_and_works_again_when_opened_anew(folder: Path) -> None:
    uri = f"watch:{folder}?settle_s=0.02&existing=first"
    with closing(open_source(uri)) as source:
        assert source.read(0.05) is None
        shutil.rmtree(folder)
        with pytest.raises(SourceError, match="no such folder"):
            source.read(1.0)
    with pytest.raises(SourceError, match="is it mounted"):
        open_source(uri)
    folder.mkdir()
    write(folder / "1.png", 1)
    with closing(open_source(uri)) as source:
        assert values(read(source, 1)) == [1]
        # Another folder in its place is noticed even if it is there at once.
        folder.rename(folder.with_name("before"))
        folder.mkdir()
        with pytest.raises(SourceError, match="another folder"):
            source.read(1.0)


def test_a_line_waits_for_a_folder_that_went_away(folder: Path, tiny_model: Path) -> None:
    sink, stop = FakeSink(), threading.Event()

    def until(condition: Callable[[], bool]) -> None:
        give_up_s = time.monotonic() + 10
        while not condition() and time.monotonic() < give_up_s:
            time.sleep(0.01)

    def scenario() -> None:
        write(folder / "1.png", 1)
        until(lambda: len(sink.taken) == 1)
        shutil.rmtree(folder)
        until(lambda: "source_failed" in sink.faults)
        folder.mkdir()
        write(folder / "2.png", 200)
        until(lambda: sink.taken[-1].verdict == "REJECT")
        stop.set()

    writer = threading.Thread(target=scenario)
    writer.start()
    with open_engine(tiny_model, threads=1) as engine:
        uri = f"watch:{folder}?settle_s=0.02&existing=first"
        line = run(engine, lambda: open_source(uri), sink, stop=stop, retry=Retry(first_s=0.01, longest_s=0.02))
    writer.join()
    assert (line.stopped_by, line.errors) == ("signal", [])
    assert [judgement.verdict for judgement in sink.taken if judgement.fault is None] == ["PASS", "REJECT"]


@pytest.fixture
def mounted(folder: Path) -> Iterator[Path]:
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"cannot mount: {error}")
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], capture_output=True)


def test_an_unmounted_share_is_an_error_although_its_mount_point_is_there(mounted: Path) -> None:
    with closing(open_source(f"watch:{mounted}?settle_s=0.02")) as source:
        write(mounted / "1.png", 1)
        assert values(read(source, 1)) == [1]
        subprocess.run(["umount", str(mounted)], check=True)
        assert mounted.is_dir()
        with pytest.raises(SourceError, match="another folder"):
            source.read(1.0)


def test_a_large_folder_costs_nothing_while_nothing_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(300):
        (folder / f"{index}.png").touch()
    monkeypatch.setattr(watch, "RELIST_S", 0.05)
    scans = itertools.count()
    scandir = os.scandir

    def counted(path: Path) -> Iterator[os.DirEntry[str]]:
        next(scans)
        return scandir(path)

    with closing(open_source(f"watch:{folder}?settle_s=0.02")) as source:
        monkeypatch.setattr(os, "scandir", counted)
        source.read(0.2)
        quiet = next(scans)
        assert source.read(0.4) is None
        assert next(scans) == quiet + 1
        write(folder / "new.png", 5)
        assert values(read(source, 1)) == [5]


@pytest.mark.parametrize("looks", [1, 3])
def test_close_wakes_a_reader_that_looks_at_a_large_folder(folder: Path, monkeypatch, looks: int) -> None:
    """On a share that takes its time for each file, here from the first or third look at each on."""
    for number in range(100):
        write(folder / f"{number}.png", number)
    stamp, looked = watch._stamp, itertools.count(1)
    begun = threading.Event()

    def slow_stamp(path: Path) -> tuple[int, int] | None:
        if next(looked) > 100 * (looks - 1):
            begun.set()
            time.sleep(0.1)
        return stamp(path)

    monkeypatch.setattr(watch, "_stamp", slow_stamp)
    source = open_source(f"watch:{folder}?existing=first&settle_s=60")
    closer = threading.Thread(target=lambda: begun.wait() and source.close())
    closer.start()
    started_s = time.monotonic()
    with pytest.raises(EndOfStream):
        read(source, 1, timeout_s=20.0)
    assert time.monotonic() - started_s < 5.0, "it takes 10 s to look at all"
    closer.join()


def test_close_wakes_the_reader(folder: Path) -> None:
    source = open_source(f"watch:{folder}")
    threading.Timer(0.1, source.close).start()
    started_s = time.monotonic()
    with pytest.raises(EndOfStream):
        source.read(5.0)
    assert time.monotonic() - started_s < 2


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("existing=all", "skip or first"),
        ("after=burn", "keep, delete or move"),
        ("after=move:", "keep, delete or move"),
        ("part_id=(", "regular expression"),
        ("settle_s=-1", "settle_s must be"),
        ("patern=*", "did you mean 'pattern'"),
    ],
)
def test_bad_options(folder: Path, query: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_source(f"watch:{folder}?{query}")


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="watch:FOLDER"):
        open_source("watch:")
    with pytest.raises(InputError, match="expected a folder"):
        open_source(f"watch:{write(tmp_path / '1.png', 1)}")


@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.soak)])
def test_reopening_leaves_nothing_behind(folder: Path, times: int) -> None:
    write(folder / "1.png", 1)

    def use() -> None:
        with closing(open_source(f"watch:{folder}?existing=first&settle_s=0")) as source:
            read(source, 1)

    assert_reopening_leaves_nothing(use, times=times)
