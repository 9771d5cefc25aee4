from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from recontrast_edge.errors import ModelError, SourceError
from recontrast_edge.frame import Frame, Judgement
from recontrast_edge.pipeline import stop_on_signals, warm_up
from recontrast_edge.sink_thread import SINK_JUDGEMENTS
from tests.edge.fakes_line import (
    THRESHOLD,
    FakeSink,
    FakeSource,
    Wrapped,
    endless,
    frame,
    frames,
    picture,
    run,
)


def test_every_frame_is_judged_in_order(engine) -> None:
    sink = FakeSink()
    line = run(engine, FakeSource(frames(30)), sink)
    assert (line.cameras[0].mode, line.stopped_by, line.errors) == ("every", "end_of_stream", [])
    assert sink.ids == list(range(30))
    assert line.statistics.verdicts == {"PASS": 20, "REJECT": 10, "FAULT": 0}
    assert line.statistics.confusion == {
        "good": {"PASS": 20, "REJECT": 0, "FAULT": 0},
        "defect": {"PASS": 0, "REJECT": 10, "FAULT": 0},
    }
    assert sink.taken[0].score == pytest.approx(200 / 255)


@pytest.mark.parametrize(("needs", "maps_above"), [([], THRESHOLD), ([False, False], THRESHOLD), ([False, True], None)])
def test_maps_of_good_parts_are_asked_for_only_where_a_sink_needs_them(engine, needs, maps_above) -> None:
    sinks = [FakeSink() for _ in needs]
    for sink, needs_maps in zip(sinks, needs, strict=True):
        sink.needs_maps = needs_maps
    wrapped = Wrapped(engine, lambda: None)
    run(wrapped, FakeSource(frames(1)), *sinks)
    assert wrapped.maps_above == maps_above
    run(wrapped, FakeSource(frames(1)), FakeSink())
    assert wrapped.maps_above is None, "a sink that does not say needs them"


def test_latency_stages_add_up_to_the_total(engine) -> None:
    sink = FakeSink()
    run(engine, FakeSource(frames(20)), sink)
    between_ms = []
    for judgement in sink.taken:
        stages = dict(judgement.latency_ms)
        total = stages.pop("total")
        assert list(stages) == ["wait", "preprocess", "infer", "decide"]
        assert all(value >= 0 for value in stages.values())
        between_ms.append(total - sum(stages.values()))
    assert min(between_ms) >= -0.01
    # What is missing is the time between the stages' clocks; on a busy machine another process may have had it.
    assert sorted(between_ms)[5] <= 2.0


def test_total_counts_from_capture(engine) -> None:
    sink = FakeSink()
    run(engine, FakeSource([Frame(0, "fake", picture(50), time.monotonic() - 2.0)]), sink)
    assert sink.taken[0].latency_ms["wait"] >= 2000
    assert sink.taken[0].latency_ms["total"] >= 2000


def test_every_waits_for_a_slow_sink(engine) -> None:
    sink = FakeSink(delay_s=0.01)
    line = run(engine, FakeSource(frames(40)), sink)
    assert sink.ids == list(range(40))
    assert line.outputs[0]["dropped"] == 0


def test_live_takes_the_newest_and_counts_the_rest(engine) -> None:
    judging, delivered = threading.Event(), threading.Event()

    def items() -> Iterator[Frame]:
        first, *others = frames(60)
        yield first
        judging.wait()
        yield from others
        delivered.set()

    def before() -> None:
        judging.set()
        delivered.wait()

    sink = FakeSink()
    line = run(Wrapped(engine, before), FakeSource(items(), live=True), sink)
    assert line.cameras[0].mode == "live"
    assert (line.statistics.captured, line.statistics.dropped) == (60, 58)
    assert sink.ids == [0, 59], "the newest frame is judged, whatever was dropped"


def test_live_counts_frames_the_source_went_past(engine) -> None:
    some = [item for item in frames(20) if item.frame_id not in (0, 7, 8, 9)]
    statistics = run(engine, FakeSource(some, live=True, interval_s=0.01), FakeSink()).statistics
    assert statistics.captured == 20
    assert statistics.dropped >= 4


def test_every_makes_a_fault_of_frames_the_source_went_past(engine) -> None:
    sink = FakeSink()
    some = [item for item in frames(10) if item.frame_id not in (4, 5)]
    line = run(engine, FakeSource(some, live=True), sink, mode="every")
    assert sink.ids == list(range(10))
    assert [judgement.fault for judgement in sink.taken[4:6]] == ["frame_missed"] * 2
    assert line.statistics.faults == {"frame_missed": 2}


def test_live_never_waits_for_a_slow_sink(engine) -> None:
    released = threading.Event()
    fast = FakeSink()

    class Stuck(FakeSink):
        def write(self, judgement: Judgement) -> None:
            released.wait()

    def items() -> Iterator[Frame]:
        for index in range(2 * SINK_JUDGEMENTS):
            yield frame(index)
            while len(fast.taken) <= index:
                time.sleep(0.001)
        released.set()

    line = run(engine, FakeSource(items(), live=True), Stuck(), fast)
    by_stuck, by_fast = line.outputs
    count = 2 * SINK_JUDGEMENTS
    assert fast.ids == list(range(count)), "the others get theirs at once"
    assert by_stuck["written"] + by_stuck["dropped"] == count
    assert by_stuck["dropped"] >= count - SINK_JUDGEMENTS - 1
    assert by_fast == {"uri": "fake-sink", "written": count, "dropped": 0, "error": None, "counters": {}}


@pytest.mark.parametrize("mode", ["live", "every"])
def test_max_frames(engine, mode: str) -> None:
    sink = FakeSink()
    line = run(engine, FakeSource(frames(50), interval_s=0.001), sink, mode=mode, max_frames=7)
    assert line.stopped_by == "max_frames"
    assert line.statistics.judged == len(sink.taken) == 7
    if mode == "every":
        assert line.statistics.captured == 7, "nothing is read that is not judged"


def test_max_frames_also_ends_in_a_gap(engine) -> None:
    sink = FakeSink()
    line = run(engine, FakeSource([frames(1)[0], frames(1000)[999]]), sink, max_frames=5)
    assert sink.ids == list(range(5))
    assert line.stopped_by == "max_frames"


@pytest.mark.parametrize("mode", ["live", "every"])
def test_a_stop_ends_an_endless_stream(engine, mode: str) -> None:
    stop, sink = threading.Event(), FakeSink()
    threading.Timer(0.15, stop.set).start()
    line = run(engine, endless(), sink, mode=mode, stop=stop)
    assert line.stopped_by == "signal"
    assert line.statistics.judged == len(sink.taken) > 0
    if mode == "every":
        assert line.statistics.dropped == 0, "what was captured is judged"


def test_a_source_that_times_out_goes_on(engine) -> None:
    first, second = frames(2)
    sink = FakeSink()
    run(engine, FakeSource([None, first, None, None, second]), sink)
    assert sink.ids == [0, 1]


@pytest.mark.parametrize("mode", ["live", "every"])
def test_a_broken_source_leaves_a_last_record(engine, mode: str) -> None:
    sink = FakeSink()
    source = FakeSource(frames(5), end=SourceError("the cable was pulled"), interval_s=0.005)
    line = run(engine, source, sink, mode=mode)
    last = sink.taken[-1]
    assert (last.frame.frame_id, last.verdict, last.fault) == (5, "FAULT", "source_failed")
    assert last.detail == "the cable was pulled"
    assert line.stopped_by == "source_failed"
    assert [str(error) for error in line.errors] == ["the cable was pulled"]


def test_ids_that_do_not_rise_are_a_broken_source(engine) -> None:
    first, second = frames(2)
    line = run(engine, FakeSource([second, first]), FakeSink())
    assert isinstance(line.errors[0], SourceError)


def test_a_broken_image_is_a_fault_and_the_stream_goes_on(engine) -> None:
    first, second, third, fourth = frames(4)
    broken = Frame(1, "fake", None, second.captured_s, fault="unreadable_image", detail="cut off")
    unplugged = Frame(2, "fake", np.zeros((0, 1920), np.uint8), third.captured_s)
    sink = FakeSink()
    line = run(engine, FakeSource([first, broken, unplugged, fourth]), sink)
    assert [judgement.verdict for judgement in sink.taken] == ["REJECT", "FAULT", "FAULT", "REJECT"]
    assert [judgement.fault for judgement in sink.taken[1:3]] == ["unreadable_image", "invalid_image"]
    assert sink.taken[1].detail == "cut off"
    assert line.errors == []


def test_no_image_and_no_reason_is_a_fault(engine) -> None:
    sink = FakeSink()
    run(engine, FakeSource([Frame(0, "fake", None, time.monotonic())]), sink)
    assert sink.taken[0].fault == "invalid_image"


def test_a_failing_engine_is_a_fault_for_each_frame(engine) -> None:
    def fail() -> None:
        raise ModelError("the device is lost")

    sink = FakeSink()
    line = run(Wrapped(engine, fail), FakeSource(frames(3)), sink)
    assert [judgement.fault for judgement in sink.taken] == ["inference_failed"] * 3
    assert line.errors == []


def test_a_defect_of_ours_stops_the_run_and_surfaces(engine) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a defect")

    sink = FakeSink()
    line = run(Wrapped(engine, fail), FakeSource(frames(50)), sink)
    assert [judgement.fault for judgement in sink.taken] == ["internal_error"]
    assert line.stopped_by == "internal_error"
    assert isinstance(line.errors[0], ZeroDivisionError)


@pytest.mark.parametrize("part", ["source", "engine", "sink"])
def test_what_is_no_exception_stops_the_run_as_well(engine, part: str) -> None:
    """Libraries end a thread with SystemExit, or with the panic of one that is written in Rust."""

    def end_thread(*_: object) -> None:
        raise SystemExit(1)

    source, sink = FakeSource(frames(600)), FakeSink()
    if part == "source":
        source.read = end_thread
    elif part == "sink":
        sink.write = end_thread
    line = run(Wrapped(engine, end_thread) if part == "engine" else engine, source, sink)
    assert [str(error) for error in line.errors] == ["SystemExit: 1"]
    assert line.stopped_by == {"source": "source_failed", "engine": "internal_error", "sink": "output_failed"}[part]


def test_deadlines(engine) -> None:
    now_s = time.monotonic()
    over = Frame(0, "fake", picture(50), now_s, deadline_s=now_s - 1)
    late = Frame(1, "fake", picture(50), now_s, deadline_s=now_s + 1.0)
    in_time = Frame(2, "fake", picture(50), now_s, deadline_s=now_s + 60)
    delays_s = iter([1.2, 0.0])
    inferred = []

    def before() -> None:
        inferred.append(True)
        time.sleep(next(delays_s))

    sink = FakeSink()
    run(Wrapped(engine, before), FakeSource([over, late, in_time]), sink)
    assert [judgement.fault for judgement in sink.taken] == ["deadline_missed", "deadline_missed", None]
    assert len(inferred) == 2, "a frame that is over is not inferred"
    assert "PASS came" in (sink.taken[1].detail or "")


def test_a_failing_sink_ends_the_run_and_completes_the_others(engine) -> None:
    failing, other = FakeSink(fail_at=3), FakeSink()
    source = endless()
    line = run(engine, source, failing, other, mode="every")
    assert line.stopped_by == "output_failed"
    assert [str(error) for error in line.errors] == ["the disk is full"]
    assert other.ids == list(range(line.statistics.judged))
    assert line.outputs[0]["error"] == "the disk is full"
    assert line.outputs[0]["written"] == 3
    assert line.outputs[0]["dropped"] == line.statistics.judged - 3


def test_a_signal_stops_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = threading.Event()
    with stop_on_signals(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        # As `timeout` does it: to the process, and to its group.
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(1.0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_warm_up_reaches_the_roi(engine) -> None:
    from recontrast_edge.spec import Roi

    roi = Roi(x=10, y=20, width=30, height=40)
    engine.spec = engine.spec.model_copy(update={"input": engine.spec.input.model_copy(update={"roi": roi})})
    warm_up(engine)


def test_scores_do_not_depend_on_the_mode(engine) -> None:
    scores: dict[str, dict[int, float | None]] = {}
    for mode in ("live", "every"):
        sink = FakeSink()
        run(engine, FakeSource(frames(12), interval_s=0.002), sink, mode=mode)
        scores[mode] = {judgement.frame.frame_id: judgement.score for judgement in sink.taken}
    assert scores["live"].items() <= scores["every"].items()
