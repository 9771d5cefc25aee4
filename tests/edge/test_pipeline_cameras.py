"""Several cameras, products, batches, gates and parts on one line."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from recontrast_edge.engines import open_engine
from recontrast_edge.errors import UsageError
from recontrast_edge.frame import Frame, Judgement, VerdictName
from recontrast_edge.mailbox import Lane, Mailbox, Overflow
from recontrast_edge.parts import PartMerger
from recontrast_edge.pipeline import Line
from recontrast_edge.task import Assignment, Product, Task
from tests.edge.fakes_line import (
    DEFECT,
    GOOD,
    THRESHOLD,
    FakeSink,
    FakeSource,
    Wrapped,
    endless,
    frame,
    frames,
    picture,
    plan,
    run,
    run_line,
)

# Several cameras, one engine.


def test_cameras_share_an_engine_and_keep_their_own_accounts(engine) -> None:
    sink = FakeSink()
    plans = [plan(engine, FakeSource(frames(count)), name=name) for name, count in (("top", 7), ("side", 4))]
    line = run_line(Line(plans), sink)
    for name, count in (("top", 7), ("side", 4)):
        own = [judgement for judgement in sink.taken if judgement.frame.camera == name]
        assert [judgement.frame.frame_id for judgement in own] == list(range(count))
        assert all(judgement.record()["camera"] == name for judgement in own)
    assert {camera["camera"]: camera["judged"] for camera in line.summary()["cameras"]} == {"top": 7, "side": 4}


def filled_lanes(mailbox: Mailbox, engine, counts: list[int], *, first: int = 0) -> list[Lane]:
    """A lane for each count, filled with so many frames; their cameras are numbered."""
    lanes = []
    for number, count in enumerate(counts, first):
        lane = mailbox.lane()
        lane.open(1000, Overflow.REFUSE)
        for index in range(count):
            assignment = Assignment(lambda judgement: None, THRESHOLD)
            lane.put(Task(frame(index, camera=str(number)), Product(engine, THRESHOLD), assignment))
        lanes.append(lane)
    return lanes


def taken(batch: list[Task]) -> list[tuple[str | None, int]]:
    return [(task.frame.camera, task.frame.frame_id) for task in batch]


def test_a_busy_camera_does_not_starve_the_others(engine) -> None:
    mailbox = Mailbox()
    filled_lanes(mailbox, Wrapped(engine), [100, 3, 1])
    order = [taken(mailbox.take())[0][0] for _ in range(10)]
    assert order == ["0", "1", "2", "0", "1", "0", "1", "0", "0", "0"]


def test_batches_take_one_of_each_camera_in_turn(engine) -> None:
    mailbox = Mailbox()
    filled_lanes(mailbox, Wrapped(engine, max_batch=4), [9, 1, 2])
    assert taken(mailbox.take()) == [("0", 0), ("1", 0), ("2", 0), ("0", 1)]
    assert taken(mailbox.take()) == [("2", 1), ("0", 2), ("0", 3), ("0", 4)]


def test_a_batch_has_one_engine_and_no_broken_frames(engine) -> None:
    mailbox = Mailbox()
    one, other = Wrapped(engine, max_batch=8), Wrapped(engine, max_batch=8)
    (lane,) = filled_lanes(mailbox, one, [2])
    filled_lanes(mailbox, other, [2], first=1)
    assignment = Assignment(lambda judgement: None, THRESHOLD)
    lane.put(Task(Frame(2, "fake", None, 0.0, fault="incomplete_frame", camera="0"), Product(one, 0.5), assignment))
    assert taken(mailbox.take()) == [("0", 0), ("0", 1)]
    assert taken(mailbox.take()) == [("1", 0), ("1", 1)]
    assert taken(mailbox.take()) == [("0", 2)]


def test_a_batch_waits_for_other_cameras_but_not_for_long(engine) -> None:
    mailbox = Mailbox(batch_wait_s=0.2)
    first, second = filled_lanes(mailbox, Wrapped(engine, max_batch=2), [1, 0])
    late = Task(frame(0, camera="1"), Product(engine, THRESHOLD), Assignment(lambda judgement: None, THRESHOLD))
    started_s = time.monotonic()
    assert len(mailbox.take()) == 1
    assert 0.2 <= time.monotonic() - started_s < 2.0
    first.put(late)
    second.end()
    started_s = time.monotonic()
    assert len(mailbox.take()) == 1
    assert time.monotonic() - started_s < 0.15, "nobody is left to wait for"


def test_a_batched_run_gives_the_verdicts_of_single_frames(engine) -> None:
    batching, sink = Wrapped(engine, lambda: time.sleep(0.01), max_batch=4), FakeSink()
    run_line(Line([plan(batching, FakeSource(frames(20)), name=name) for name in "abcd"]), sink)
    assert max(batching.batches) == 4
    for judgement in sink.taken:
        assert judgement.verdict == ("REJECT" if judgement.frame.truth == "defect" else "PASS")
    assert Counter(judgement.frame.camera for judgement in sink.taken) == dict.fromkeys("abcd", 20)


def test_one_bad_image_does_not_spoil_its_batch(engine) -> None:
    sink = FakeSink()
    sources = [FakeSource([Frame(0, "fake", image, time.monotonic())]) for image in (picture(GOOD), picture(GOOD)[:0])]
    batching = Wrapped(engine, max_batch=2)
    run_line(Line([plan(batching, source, name=name) for name, source in zip("ab", sources, strict=True)]), sink)
    assert {judgement.frame.camera: judgement.fault for judgement in sink.taken} == {"a": None, "b": "invalid_image"}


def test_cameras_without_a_common_engine_do_not_wait_for_each_other(engine, tiny_model: Path) -> None:
    entered, released, sink = threading.Event(), threading.Event(), FakeSink()

    def slow() -> None:
        entered.set()
        released.wait()

    def items() -> Iterator[Frame]:
        entered.wait()
        yield from frames(3)
        while len(sink.taken) < 3:
            time.sleep(0.001)
        released.set()

    with open_engine(tiny_model, threads=1) as other:
        plans = [
            plan(Wrapped(engine, slow), FakeSource(frames(1)), name="slow"),
            plan(other, FakeSource(items()), name="fast"),
        ]
        run_line(Line(plans), sink)
    assert [judgement.frame.camera for judgement in sink.taken] == ["fast"] * 3 + ["slow"]


# One camera, several engines.


def test_the_product_chooses_engine_and_threshold(engine) -> None:
    cap, lid = Wrapped(engine), Wrapped(engine)
    products = {"cap": Product(cap, 0.5), "lid": Product(lid, 0.9)}
    parts = [frame(index, DEFECT, part_id=name) for index, name in enumerate(("cap", "lid", "cap", "jar"))]
    sink = FakeSink()
    line = run(engine, FakeSource(parts), sink, product=products, product_of=lambda part: part.part_id)
    assert [judgement.verdict for judgement in sink.taken] == ["REJECT", "PASS", "REJECT", "FAULT"]
    assert [judgement.threshold for judgement in sink.taken] == [0.5, 0.9, 0.5, 0.5]
    assert sink.faults[3] == "unknown_product"
    assert (cap.batches, lid.batches) == ([1, 1], [1])
    products_of_summary = line.summary()["cameras"][0]["products"]
    assert [(entry["product"], entry["threshold"]) for entry in products_of_summary] == [("cap", 0.5), ("lid", 0.9)]


def test_the_product_is_chosen_when_the_frame_is_captured(engine) -> None:
    """The recipe changes while frames wait: they are still judged by the one that they were made under."""
    recipe, captured = ["cap"], threading.Event()

    def items() -> Iterator[Frame]:
        yield from (frame(index, DEFECT) for index in range(3))
        recipe[0] = "lid"
        yield frame(3, DEFECT)
        captured.set()

    slow = Wrapped(engine, lambda: captured.wait() and None)
    products = {"cap": Product(slow, 0.5), "lid": Product(slow, 0.9)}
    sink = FakeSink()
    run(engine, FakeSource(items()), sink, product=products, product_of=lambda _: recipe[0])
    assert [judgement.verdict for judgement in sink.taken] == ["REJECT", "REJECT", "REJECT", "PASS"]


# The bound of mode `every`.


def test_every_makes_a_fault_of_what_a_live_source_brings_beyond_the_bound(engine) -> None:
    delivered, sink = threading.Event(), FakeSink()

    def items() -> Iterator[Frame]:
        yield from frames(50)
        delivered.set()

    slow = Wrapped(engine, lambda: delivered.wait() and None)
    line = run(slow, FakeSource(items(), live=True), sink, mode="every", queue_frames=8)
    assert sink.ids == list(range(50)), "nothing is skipped"
    # Eight that wait, and one that the engine has taken: the first, sooner or later.
    assert sink.faults[:8] == [None] * 8
    assert sink.faults.count(None) in (8, 9)
    assert set(sink.faults) == {None, "queue_full"}
    assert line.statistics.dropped == 0
    refused = [judgement.frame for judgement in sink.taken if judgement.fault is not None]
    assert all(frame.image is None for frame in refused), "their memory is bounded"


# The gate.


def test_a_verdict_after_the_gate_is_a_fault(engine) -> None:
    delays_s = iter([0.0, 0.3, 0.0])
    now_s = time.monotonic()
    parts = [
        Frame(0, "fake", picture(DEFECT), now_s, part_id="in time"),
        Frame(1, "fake", picture(DEFECT), now_s - 59.9, part_id="late"),
        Frame(2, "fake", picture(DEFECT), now_s - 70, part_id="over"),
        Frame(3, "fake", picture(DEFECT), now_s, part_id="knows better", gate_s=now_s + 5),
    ]
    sink = FakeSink()
    slow = Wrapped(engine, lambda: time.sleep(next(delays_s)))
    line = run(slow, FakeSource(parts), sink, gate_delay_s=60.0)
    assert sink.faults == [None, "gate_missed", "gate_missed", None]
    assert line.statistics.faults == {"gate_missed": 2}
    assert slow.batches == [1, 1, 1], "a part that has passed the gate is not inferred"
    left_ms = [judgement.gate_in_ms or 0.0 for judgement in sink.taken]
    assert 55_000 < left_ms[0] <= 60_000
    assert -5_000 < left_ms[1] < 0
    assert left_ms[2] < -9_000
    assert 0 < left_ms[3] <= 5_000
    assert sink.taken[0].record()["gate_in_ms"] == pytest.approx(left_ms[0], abs=0.001)


def test_the_reserve_is_for_the_output(engine) -> None:
    sink = FakeSink()
    parts = [Frame(index, "fake", picture(GOOD), time.monotonic()) for index in range(2)]
    run(engine, FakeSource(parts[:1]), sink, gate_delay_s=60.0, gate_reserve_s=59.0)
    run(engine, FakeSource(parts[:1]), sink, gate_delay_s=60.0, gate_reserve_s=60.0)
    assert sink.faults == [None, "gate_missed"]


# Parts that several cameras see.


def view(
    camera: str, part_id: str | None, verdict: VerdictName = "PASS", score: float = 0.1, *, at_s: float = 0.0, **more
) -> Judgement:
    seen = Frame(0, camera, None, at_s, part_id=part_id, camera=camera, **more)
    code = "inference_failed" if verdict == "FAULT" else None
    return Judgement(seen, verdict, None if code else score, THRESHOLD, fault=code, decided_s=at_s)


@pytest.mark.parametrize(
    ("verdicts", "worst"),
    [
        (("PASS", "PASS"), "PASS"),
        (("PASS", "REJECT"), "REJECT"),
        (("REJECT", "FAULT"), "FAULT"),
        (("FAULT", "PASS"), "FAULT"),
    ],
)
def test_a_part_has_the_worst_verdict_of_its_views(verdicts: tuple[VerdictName, ...], worst: str) -> None:
    now_s = time.monotonic()
    merger = PartMerger(["top", "side"], window_s=10.0)
    assert merger.add(view("top", "7", verdicts[0], 0.2, at_s=now_s)) == []
    (part,) = merger.add(view("side", "7", verdicts[1], 0.7, at_s=now_s + 0.1))
    assert (part.verdict, part.frame.part_id) == (worst, "7")
    assert merger.flush() == []


def test_the_worse_of_two_rejects_is_shown() -> None:
    now_s = time.monotonic()
    merger = PartMerger(["top", "side"], window_s=10.0)
    merger.add(view("top", "7", "REJECT", 0.9, at_s=now_s))
    (part,) = merger.add(view("side", "7", "REJECT", 0.6, at_s=now_s))
    assert (part.frame.camera, part.score) == ("top", 0.9)


def test_a_missing_view_is_a_fault_when_the_window_ends() -> None:
    merger = PartMerger(["top", "side", "end"], window_s=1.0)
    merger.add(view("top", "7", at_s=100.0))
    merger.add(view("end", "7", at_s=100.2))
    assert merger.expire(100.9) == []
    (part,) = merger.expire(101.1)
    assert (part.verdict, part.fault) == ("FAULT", "view_missing")
    assert "side" in (part.detail or "")
    assert "top" not in (part.detail or "")
    assert merger.add(view("side", "7", at_s=100.4)) == [], "too late: the part has its verdict"
    assert merger.flush() == []


def test_a_part_is_decided_before_it_reaches_the_gate() -> None:
    merger = PartMerger(["top", "side"], window_s=10.0, gate_reserve_s=0.1)
    merger.add(view("top", "7", at_s=100.0, gate_s=101.0))
    assert merger.expire(100.8) == []
    (part,) = merger.expire(100.95)
    assert part.fault == "view_missing"
    assert part.gate_in_ms == pytest.approx(50.0)


def test_a_last_view_after_the_gate_is_a_fault() -> None:
    now_s = time.monotonic()
    merger = PartMerger(["top", "side"], window_s=1000.0)
    merger.add(view("top", "7", "REJECT", 0.9, at_s=now_s - 10, gate_s=now_s - 5))
    (part,) = merger.add(view("side", "7", at_s=now_s - 10))
    assert part.fault == "gate_missed"
    assert "REJECT" in (part.detail or "")


def test_a_part_id_that_comes_again_is_another_part() -> None:
    now_s = time.monotonic()
    merger = PartMerger(["top", "side"], window_s=1.0)
    merger.add(view("top", "7", at_s=now_s))
    (first,) = merger.add(view("top", "7", at_s=now_s + 50))
    assert first.fault == "view_missing"
    (second,) = merger.add(view("side", "7", at_s=now_s + 50.1))
    assert second.verdict == "PASS"
    assert [first.frame.frame_id, second.frame.frame_id] == [0, 1]


def test_what_cannot_belong_to_a_part_is_not_hidden() -> None:
    merger = PartMerger(["top", "side"], window_s=1.0)
    (lost,) = merger.add(view("top", None))
    assert (lost.verdict, lost.fault) == ("FAULT", "view_missing")
    (silent,) = merger.add(view("top", None, "FAULT"))
    assert silent.fault == "inference_failed"
    other = view("elsewhere", None)
    assert merger.add(other) == [other]


@pytest.mark.parametrize(
    "wrong", [{"views": ["top"]}, {"views": ["a", "a"]}, {"window_s": 0.0}, {"gate_reserve_s": -1}]
)
def test_part_merger_refuses_what_makes_no_sense(wrong: dict) -> None:
    with pytest.raises(UsageError):
        PartMerger(**{"views": ["top", "side"], "window_s": 1.0, **wrong})


def test_a_line_merges_views_and_counts_the_parts(engine) -> None:
    """The side camera misses part 3 and finds a defect on part 5."""
    now_s = time.monotonic()

    def seen(ids, bad=()) -> FakeSource:
        items = (
            Frame(index, "fake", picture(DEFECT if part in bad else GOOD), now_s, part_id=str(part))
            for index, part in enumerate(ids)
        )
        return FakeSource(items, interval_s=0.002)

    sink = FakeSink()
    plans = [plan(engine, seen(range(8)), name="top")]
    plans.append(plan(engine, seen([0, 1, 2, 4, 5, 6, 7], bad=[5]), name="side"))
    line = run_line(Line(plans, merger=PartMerger(["top", "side"], window_s=60.0)), sink)
    verdicts = {judgement.frame.part_id: (judgement.verdict, judgement.fault) for judgement in sink.taken}
    assert len(sink.taken) == 8
    assert verdicts.pop("3") == ("FAULT", "view_missing")
    assert verdicts.pop("5") == ("REJECT", None)
    assert set(verdicts.values()) == {("PASS", None)}
    assert line.summary()["merged"] == {"PASS": 6, "REJECT": 1, "FAULT": 1}
    assert line.statistics.judged == 15
    assert line.faults == 1, "the exit code must tell"


def test_a_view_that_stays_away_does_not_keep_a_part_waiting(engine) -> None:
    sink, stop = FakeSink(), threading.Event()

    def one_part() -> Iterator[Frame | None]:
        yield Frame(0, "fake", picture(GOOD), time.monotonic(), part_id="1")
        while not stop.is_set():
            yield None

    def nothing() -> Iterator[Frame | None]:
        while not sink.taken:
            yield None
        stop.set()

    plans = [
        plan(engine, FakeSource(one_part(), interval_s=0.01), name="top"),
        plan(engine, FakeSource(nothing(), interval_s=0.01), name="side"),
    ]
    run_line(Line(plans, merger=PartMerger(["top", "side"], window_s=0.1), stop=stop), sink)
    assert sink.faults == ["view_missing"]
    assert 100 <= sink.taken[0].latency_ms["total"] < 2000


def test_a_dead_camera_among_several_is_seen_and_the_others_go_on(engine) -> None:
    sink, stop = FakeSink(), threading.Event()
    dead = FakeSource(itertools.repeat(None), live=True, interval_s=0.01)
    plans = [plan(engine, endless(0.01), name="alive"), plan(engine, dead, name="dead")]
    threading.Timer(0.5, stop.set).start()
    line = run_line(Line(plans, stop=stop), sink)
    states = {camera["camera"]: camera["state"] for camera in line.summary()["cameras"]}
    assert states == {"alive": "ENDED", "dead": "ENDED"}
    assert {change.camera for change in sink.states if change.state.value == "RUNNING"} == {"alive"}
    assert np.mean([judgement.verdict == "PASS" for judgement in sink.taken]) == 1.0
