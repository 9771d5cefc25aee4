"""Frames on their way from the cameras to the thread that judges them: bounded, counted, and taken in fair turns.

lane = mailbox.lane(); lane.open(1, Overflow.REPLACE); dropped = lane.put(task); batch = mailbox.take()
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from enum import Enum

from recontrast_edge.engines import Engine
from recontrast_edge.task import Task
from recontrast_edge.verdict import Fault


class Overflow(Enum):
    """What a frame with an image does that finds its lane full."""

    REPLACE = "the oldest one makes room for it and is dropped"
    WAIT = "it waits for room"
    REFUSE = "it loses its image and becomes a FAULT"


class Lane:
    """One camera's frames. Made by ``Mailbox.lane``; ``open`` comes before the first ``put``."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._tasks: deque[Task] = deque()
        self._images = 0
        self._capacity = 1
        self._overflow = Overflow.REPLACE
        self._released = False
        self._ended = False
        self._closed = False

    def open(self, capacity: int, overflow: Overflow) -> None:
        """Say how many images it holds, and what happens to one more. Frames without image take no room."""
        self._capacity, self._overflow = capacity, overflow

    def put(self, task: Task) -> int:
        """Add a frame; returns how many were dropped for it: an older one, or itself when nobody takes any more."""
        with self._changed:
            dropped = 0
            if task.frame.image is not None and self._images >= self._capacity:
                if self._overflow is Overflow.REPLACE:
                    dropped = self._drop_oldest()
                elif self._overflow is Overflow.REFUSE:
                    task = self._refused(task)
                else:
                    self._changed.wait_for(lambda: self._released or self._images < self._capacity)
            if self._closed:
                return dropped + 1
            self._tasks.append(task)
            self._images += task.frame.image is not None
            self._changed.notify_all()
            return dropped

    def _drop_oldest(self) -> int:
        """The oldest with an image; what tells of a fault stays."""
        index = next(index for index, task in enumerate(self._tasks) if task.frame.image is not None)
        del self._tasks[index]
        self._images -= 1
        return 1

    def _refused(self, task: Task) -> Task:
        detail = f"{self._images} frames were waiting for their turn, which is as many as allowed"
        frame = dataclasses.replace(
            task.frame, image=None, truth_mask=None, fault=Fault.QUEUE_FULL.value, detail=detail
        )
        return dataclasses.replace(task, frame=frame)

    def release(self) -> None:
        """Nobody waits for room any more: what is being put fits."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing more is put."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> int:
        """Nothing more is taken; returns how many frames were left and are dropped."""
        with self._changed:
            self._released = self._ended = self._closed = True
            left = len(self._tasks)
            self._tasks.clear()
            self._images = 0
            self._changed.notify_all()
            return left

    # With the mailbox's lock held:

    @property
    def head(self) -> Task | None:
        """The oldest frame."""
        return self._tasks[0] if self._tasks else None

    @property
    def ended(self) -> bool:
        """Empty, and stays so."""
        return self._ended and not self._tasks

    def pop(self) -> Task:
        """Take the oldest frame."""
        task = self._tasks.popleft()
        self._images -= task.frame.image is not None
        self._changed.notify_all()
        return task


class Mailbox:
    """The lanes of all cameras that one thread judges.

    Args:
        batch_wait_s: how long a batch that is not full waits for frames of other cameras, in seconds.
    """

    def __init__(self, batch_wait_s: float = 0.0) -> None:
        self._batch_wait_s = batch_wait_s
        self._changed = threading.Condition()
        self._lanes: list[Lane] = []
        self._turn = 0

    def lane(self) -> Lane:
        """One more camera's lane."""
        lane = Lane(self._changed)
        self._lanes.append(lane)
        return lane

    def wake(self) -> None:
        """Let a waiting ``take`` return; called often, so that nobody needs a lock with a timeout (see ``bounded``)."""
        with self._changed:
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        """Everything was taken, and nothing more is put."""
        with self._changed:
            return all(lane.ended for lane in self._lanes)

    def take(self) -> list[Task]:
        """Frames for one engine, or one frame that needs none; waits for the first, and returns none after ``wake``.

        The lanes take turns: who began one batch is the last to begin another, so that no camera waits for more than
        one batch of each of the others. Frames of a lane stay in order.
        """
        with self._changed:
            if not any(lane.head for lane in self._lanes):
                self._changed.wait()
            first = next((lane for lane in self._in_turn() if lane.head is not None), None)
            if first is None:
                return []
            self._turn = self._lanes.index(first) + 1
            batch = [first.pop()]
            engine = batch[0].engine
            if engine is None:
                return batch
            size = max_batch(engine)
            until_s = time.monotonic() + self._batch_wait_s
            while True:
                self._fill(batch, engine, size)
                remaining_s = until_s - time.monotonic()
                others = any(lane.head is None and not lane.ended for lane in self._lanes if lane is not first)
                if len(batch) == size or remaining_s <= 0 or not others:
                    return batch
                self._changed.wait(remaining_s)

    def take_all(self) -> list[Task]:
        """Whatever waits, at once."""
        with self._changed:
            tasks: list[Task] = []
            for lane in self._lanes:
                while lane.head is not None:
                    tasks.append(lane.pop())
            return tasks

    def _in_turn(self) -> list[Lane]:
        start = self._turn % len(self._lanes)
        return self._lanes[start:] + self._lanes[:start]

    def _fill(self, batch: list[Task], engine: Engine, size: int) -> None:
        """One frame of each lane in turn, as long as there are any for this engine."""
        grown = True
        while grown:
            grown = False
            for lane in self._in_turn():
                if len(batch) < size and lane.head is not None and lane.head.engine is engine:
                    batch.append(lane.pop())
                    grown = True


def max_batch(engine: Engine) -> int:
    """How many images an engine takes at once; one where it judges them one by one, and a batch gains nothing."""
    return int(getattr(engine, "max_batch", 1))
