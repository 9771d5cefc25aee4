from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from recontrast_edge import bounded, supervise
from recontrast_edge.camera_plan import CameraPlan, Retry
from recontrast_edge.errors import SourceError, UsageError
from recontrast_edge.frame import EndOfStream, Frame, Source
from recontrast_edge.health import HealthCheck, Watch
from recontrast_edge.pipeline import Line
from recontrast_edge.task import Product
from tests.edge.fakes_line import THRESHOLD, FakeSink, FakeSource, check_accounts, frame, plan, run, run_line

QUICK = Retry(first_s=0.01, longest_s=0.02)
NO_PICTURE_CHECKS = {"frozen_after": 0, "dark_share": 0.0, "saturated_share": 0.0}


def in_turn(*outcomes: Source | Exception) -> Callable[[], Source]:
    """Opens these, one after the other."""
    remaining = iter(outcomes)

    def open_next() -> Source:
        outcome = next(remaining)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return open_next


def camera(count: int, *, end: Exception | None = None, **more) -> FakeSource:
    """A live source that delivers so many frames, and then breaks or ends."""
    return FakeSource((frame(index) for index in range(count)), live=True, interval_s=0.005, end=end, **more)


class Silent(FakeSource):
    """Delivers frames and then nothing; once it is closed it says that it is at its end, or goes on saying nothing."""

    def __init__(self, count: int, *, says_so: bool = True) -> None:
        super().__init__((frame(index) for index in range(count)), live=True, interval_s=0.005)
        self._says_so = says_so

    def read(self, timeout_s: float) -> Frame | None:
        try:
            return super().read(timeout_s)
        except EndOfStream:
            if self.closed.wait(timeout_s) and self._says_so:
                raise
            return None


def test_a_camera_that_breaks_is_opened_again(engine) -> None:
    sink = FakeSink()
    cut = SourceError("the cable was pulled")
    opener = in_turn(camera(5, end=cut), camera(3, end=cut), SourceError("no camera"), camera(4))
    line = run(engine, opener, sink, mode="every", retry=QUICK)
    assert (line.stopped_by, line.errors) == ("end_of_stream", [])
    assert sink.ids == list(range(len(sink.ids))), "ids go on where they were"
    assert sink.faults == [None] * 5 + ["source_failed"] + [None] * 3 + ["source_failed"] + [None] * 4
    assert sink.taken[5].detail == "the cable was pulled"
    assert sink.state_names == ["CONNECTING", "RUNNING", "CONNECTING", "RUNNING", "CONNECTING", "RUNNING", "ENDED"]
    summary = line.summary()["cameras"][0]
    assert (summary["reconnects"], summary["state"]) == (2, "ENDED")


def test_counters_of_all_that_were_open_add_up(engine) -> None:
    first, second = camera(2, end=SourceError("gone")), camera(2)
    first.counters, second.counters = {"incomplete": 3}, {"incomplete": 2, "lost": 1}  # type: ignore[attr-defined]
    line = run(engine, in_turn(first, second), FakeSink(), retry=QUICK)
    assert line.summary()["cameras"][0]["counters"] == {"incomplete": 5, "lost": 1}


def test_only_so_many_tries(engine) -> None:
    sink = FakeSink()
    opener = in_turn(camera(2, end=SourceError("gone")), *(SourceError(f"try {index}") for index in range(1, 9)))
    line = run(engine, opener, sink, mode="every", retry=Retry(max_reconnects=3, first_s=0.001, longest_s=0.002))
    assert line.stopped_by == "source_failed"
    assert [str(error) for error in line.errors] == ["try 3"]
    assert (sink.faults[-1], sink.state_names[-1]) == ("source_failed", "ENDED")


def test_a_file_is_not_opened_again(engine) -> None:
    source = FakeSource((frame(index) for index in range(3)), end=SourceError("the file ends early"))
    line = run(engine, in_turn(source), FakeSink(), retry=QUICK)
    assert [str(error) for error in line.errors] == ["the file ends early"]


def test_a_camera_that_is_not_there_ends_the_run_unless_it_is_waited_for(engine) -> None:
    absent = [SourceError("no such camera")] * 3
    with pytest.raises(SourceError, match="no such camera"), Line([plan(engine, in_turn(*absent))]) as line:
        line.connect()
    sink = FakeSink()
    line = run(engine, in_turn(*absent, camera(2)), sink, retry=Retry(True, None, 0.01, 0.02), fault_period_s=0.001)
    assert line.errors == []
    assert sink.faults[-2:] == [None, None]
    assert set(sink.faults[:-2]) == {"source_failed"}
    assert sink.state_names[-2:] == ["RUNNING", "ENDED"]
    assert set(sink.state_names[:-2]) == {"CONNECTING"}


def test_waiting_does_not_help_against_a_wrong_option(engine) -> None:
    line = Line([plan(engine, in_turn(UsageError("unknown option")), retry=Retry(wait_for_source=True))])
    with pytest.raises(UsageError, match="unknown option"):
        line.connect()


@pytest.mark.parametrize("says_so", [True, False])
def test_a_silent_camera_is_stale_and_then_opened_again(engine, monkeypatch, says_so: bool) -> None:
    monkeypatch.setattr(supervise, "REOPEN_AFTER_S", 0.3)
    sink, silent = FakeSink(), Silent(5, says_so=says_so)
    watch = Watch(stale_after_s=0.2)
    line = run(engine, in_turn(silent, camera(5)), sink, mode="every", watch=watch, retry=QUICK, fault_period_s=0.1)
    assert silent.closed.is_set()
    assert (line.errors, bounded.left_behind()) == ([], [])
    assert sink.state_names == ["CONNECTING", "RUNNING", "STALE", "CONNECTING", "RUNNING", "ENDED"]
    last_good, first_fault = sink.taken[4], sink.taken[5]
    assert first_fault.fault == "source_stale"
    assert 0.2 <= first_fault.frame.captured_s - last_good.frame.captured_s < 1.2
    # One at the change, and one more each 0.1 s, for about 0.3 s.
    assert 2 <= sink.faults.count("source_stale") <= 6
    assert sink.faults[-5:] == [None] * 5


def test_a_camera_that_never_delivers_is_stale(engine, monkeypatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_FRAME_S", 0.2)
    monkeypatch.setattr(supervise, "REOPEN_AFTER_S", 0.1)
    sink = FakeSink()
    run(engine, in_turn(Silent(0), camera(2)), sink, watch=Watch(), retry=QUICK)
    assert sink.state_names == ["CONNECTING", "STALE", "CONNECTING", "RUNNING", "ENDED"]


@pytest.mark.parametrize("told", ["by the source", "by the plan"])
def test_a_triggered_camera_may_be_silent(engine, told: str) -> None:
    sink, stop, source = FakeSink(), threading.Event(), Silent(3)
    source.triggered = told == "by the source"  # type: ignore[attr-defined]
    threading.Timer(1.3, stop.set).start()
    watch = Watch() if source.triggered else Watch(stale_after_s=0)  # type: ignore[attr-defined]
    run(engine, in_turn(source), sink, watch=watch, stop=stop, mode="every")
    assert sink.faults == [None] * 3
    assert "STALE" not in sink.state_names


class Hanging(FakeSource):
    """A driver that never comes back from ``read``, whatever is closed."""

    def __init__(self, released: threading.Event) -> None:
        super().__init__([], live=True)
        self._released = released

    def read(self, timeout_s: float) -> Frame | None:
        self._released.wait()
        raise SourceError("came back at last")


def test_a_driver_that_hangs_is_left_and_another_thread_opens_the_camera(engine, monkeypatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_FRAME_S", 0.1)
    monkeypatch.setattr(supervise, "REOPEN_AFTER_S", 0.1)
    monkeypatch.setattr(supervise, "CLOSE_LIMIT_S", 0.2)
    released, sink = threading.Event(), FakeSink()
    line = Line([plan(engine, in_turn(Hanging(released), camera(4)), watch=Watch(), retry=QUICK, mode="every")])
    line.run([sink])
    assert bounded.left_behind() == ["source fake://"]
    released.set()
    assert bounded.wait_until(lambda: not bounded.left_behind(), time.monotonic() + 5)
    check_accounts(line)
    assert line.stopped_by == "end_of_stream"
    assert sink.faults[-4:] == [None] * 4
    assert set(sink.faults[:-4]) == {"source_stale", "source_failed"}
    assert sink.ids == list(range(len(sink.ids)))


def test_a_driver_that_hangs_again_and_again_ends_the_run(engine, monkeypatch) -> None:
    for name in ("FIRST_FRAME_S", "REOPEN_AFTER_S", "CLOSE_LIMIT_S"):
        monkeypatch.setattr(supervise, name, 0.05)
    released, sink = threading.Event(), FakeSink()
    line = Line([plan(engine, lambda: Hanging(released), watch=Watch(), retry=QUICK)])
    line.run([sink])
    assert line.stopped_by == "source_failed"
    assert "hangs on 4 threads" in str(line.errors[0])
    assert sink.faults[-1] == "source_failed"
    check_accounts(line)
    released.set()
    assert bounded.wait_until(lambda: not bounded.left_behind(), time.monotonic() + 5)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 90, (32, 32, 3), np.uint8)


def filled(value: int) -> Callable[[int], np.ndarray]:
    def image(seed: int) -> np.ndarray:
        made = np.full((32, 32, 3), value, np.uint8)
        made[0, 0] = 100 + seed % 50
        return made

    return image


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("source_frozen", lambda _: noise(1)),
        ("source_dark", filled(3)),
        ("source_saturated", filled(253)),
    ],
)
def test_pictures_that_cannot_be_right_are_faults(engine, code: str, wrong: Callable[[int], np.ndarray]) -> None:
    pictures = [
        *(noise(seed) for seed in range(100, 104)),
        *map(wrong, range(8)),
        *(noise(seed) for seed in (200, 201)),
    ]
    source = FakeSource(
        (Frame(index, "fake", image, time.monotonic()) for index, image in enumerate(pictures)), live=True
    )
    sink = FakeSink()
    run(engine, source, sink, mode="every", watch=Watch(frozen_after=4))
    wrong_from = 4 + 3 if code == "source_frozen" else 4
    assert sink.faults == [None] * wrong_from + [code] * (12 - wrong_from) + [None] * 2
    assert sink.state_names == ["CONNECTING", "RUNNING", "FAULT", "RUNNING", "ENDED"]
    assert all(judgement.frame.image is not None for judgement in sink.taken), "an output may keep the picture"


def test_a_wrong_rate_is_a_fault() -> None:
    def faults(interval_s: float, count: int) -> list[str | None]:
        check = HealthCheck(Watch(rate_hz=10.0, rate_tolerance=0.2, **NO_PICTURE_CHECKS))
        found = [check.frame(Frame(index, "fake", None, index * interval_s)) for index in range(count)]
        return [None if wrong is None else wrong[0].value for wrong in found]

    assert set(faults(0.1, 100)) == set(faults(0.118, 100)) == {None}
    for interval_s in (0.2, 0.05):
        found = faults(interval_s, 100)
        assert set(found[: int(1.9 / interval_s)]) == {None}, "two seconds are too short to tell"
        assert set(found[int(2.1 / interval_s) :]) == {"wrong_rate"}


def test_frames_lost_on_the_way_do_not_make_a_camera_slow() -> None:
    check = HealthCheck(Watch(rate_hz=10.0, **NO_PICTURE_CHECKS))
    assert not any(check.frame(Frame(index, "fake", None, index * 0.1)) for index in range(0, 200, 3))


@pytest.mark.parametrize(
    ("watch", "interval_s", "expected_s"),
    [
        (Watch(), 0.01, 0.5),
        (Watch(), 0.15, 0.75),
        (Watch(), 0.5, 1.0),
        (Watch(rate_hz=8.0), 0.01, 0.625),
        (Watch(stale_after_s=3.0), 0.01, 3.0),
        (Watch(stale_after_s=0), 0.01, float("inf")),
    ],
)
def test_when_silence_is_too_long(watch: Watch, interval_s: float, expected_s: float) -> None:
    check = HealthCheck(watch)
    for index in range(50):
        check.frame(Frame(index, "fake", None, index * interval_s))
    assert check.stale_after_s() == pytest.approx(expected_s)


@pytest.mark.parametrize(
    "bad", [{"stale_after_s": -1}, {"rate_hz": 0}, {"frozen_after": 1}, {"dark_share": 1.5}, {"dark_level": 300}]
)
def test_watch_refuses_what_makes_no_sense(bad: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        Watch(**bad)


def test_pauses_grow_to_a_limit_and_differ() -> None:
    retry = Retry(first_s=0.1, longest_s=1.0)
    for failures, longest_s in ((1, 0.1), (2, 0.2), (3, 0.4), (5, 1.0), (10_000, 1.0)):
        pauses_s = [retry.pause_s(failures) for _ in range(50)]
        assert all(longest_s / 2 <= pause_s <= longest_s for pause_s in pauses_s)
        assert len(set(pauses_s)) > 1
    for wrong in ({"first_s": 0}, {"first_s": 2.0, "longest_s": 1.0}, {"max_reconnects": -1}):
        with pytest.raises(UsageError):
            Retry(**wrong)


def test_a_jump_of_the_device_is_counted_live_and_judged_as_faults_in_every(engine) -> None:
    ids = [0, 1, 5, 6]
    for mode, faults in (("live", {None}), ("every", {None, "frame_missed"})):
        sink = FakeSink()
        source = FakeSource((frame(index) for index in ids), live=True, interval_s=0.02)
        line = run(engine, source, sink, mode=mode)
        assert line.statistics.captured == 7
        assert set(sink.faults) == faults
    source = FakeSource((frame(index) for index in (0, 10**9)), live=True)
    line = run(engine, in_turn(source, SourceError("gone")), FakeSink(), mode="every", retry=Retry(max_reconnects=0))
    assert "expected frame id 1" in str(line.errors[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"product": {}}, "at least one product"),
        ({"mode": "sometimes"}, "live or every"),
        ({"queue_frames": 0}, "queue_frames"),
        ({"gate_delay_s": float("nan")}, "gate_delay_s"),
        ({"fault_period_s": 0}, "fault_period_s"),
    ],
)
def test_plans_refuse_what_makes_no_sense(engine, wrong: dict, message: str) -> None:
    options = {"product": Product(engine, THRESHOLD), **wrong}
    with pytest.raises(UsageError, match=message):
        CameraPlan("fake://", lambda: camera(1), **options)
    with pytest.raises(UsageError, match="product_of is missing"):
        CameraPlan("fake://", lambda: camera(1), {"a": Product(engine, 1.0), "b": Product(engine, 2.0)})


def test_cameras_need_names_that_tell_them_apart(engine) -> None:
    for names in ([None, None], ["a", None], ["a", "a"], []):
        with pytest.raises(UsageError, match="name"):
            Line([plan(engine, camera(1), name=name) for name in names])
    run_line(Line([plan(engine, camera(1), name="a"), plan(engine, camera(1), name="b")]))
