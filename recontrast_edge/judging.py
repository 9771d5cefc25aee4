"""The thread that judges: frames out of a mailbox, through the engines, to verdicts; and what to do when it hangs.

    judge = JudgeThread(mailbox, maps_wanted=False, engine_timeout_s=5.0, delivery=RLock()); judge.thread.start()

One thread serves all cameras that share an engine. A frame's verdict is a FAULT wherever it would come too late to be
acted upon: after its deadline, or after the part has passed the gate.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence

from recontrast_edge.bounded import as_exception
from recontrast_edge.engines import Inference
from recontrast_edge.errors import InputError, ModelError, StallError
from recontrast_edge.frame import Judgement
from recontrast_edge.mailbox import Mailbox
from recontrast_edge.task import Task
from recontrast_edge.verdict import Fault, judge

GIVE_UP_TIMES = 3
"""An engine that has not returned after so many times its timeout is given up, and the run ends."""


class JudgeThread:
    """Judges what comes into a mailbox until its lanes have ended.

    Args:
        mailbox: where the frames are.
        maps_wanted: whether somebody wants the maps of good parts too.
        engine_timeout_s: an inference that takes longer makes FAULTs of the frames that it keeps waiting, in seconds.
        delivery: held while a judgement is handed over.
    """

    def __init__(
        self, mailbox: Mailbox, *, maps_wanted: bool, engine_timeout_s: float, delivery: threading.RLock
    ) -> None:
        self.mailbox = mailbox
        self._maps_wanted = maps_wanted
        self._engine_timeout_s = engine_timeout_s
        self._delivery = delivery
        self._lock = threading.Lock()
        self._tasks: list[Task] = []
        self._inferring_since_s: float | None = None
        self._turned_s = time.monotonic()
        self.error: Exception | None = None
        """What ended it: a defect of ours, or a StallError of the engine, which has lost its GPU."""
        self.thread = threading.Thread(target=self._run, name="judge", daemon=True)

    # For the thread that watches over this one.

    def turns(self, now_s: float, patience_s: float) -> bool:
        """Whether it came round within that time, or has nothing left to do."""
        return now_s - self._turned_s < patience_s or not self.thread.is_alive()

    def stalled_s(self, now_s: float) -> float:
        """For how long the engine has been over its time, in seconds; 0 while it is not."""
        with self._lock:
            since_s = self._inferring_since_s
        return 0.0 if since_s is None else max(0.0, now_s - since_s - self._engine_timeout_s)

    def rescue(self, now_s: float) -> None:
        """Make FAULTs of the frames that an engine over its time keeps waiting; never waits itself.

        Raises:
            StallError: the engine is given up.
        """
        stalled_s = self.stalled_s(now_s)
        if not stalled_s:
            return
        self.fault_all(f"the engine has not answered for {self._engine_timeout_s:g} s")
        if stalled_s > (GIVE_UP_TIMES - 1) * self._engine_timeout_s:
            raise StallError(
                f"the engine has not answered for {GIVE_UP_TIMES * self._engine_timeout_s:g} s, and nothing can stop "
                "it from within: start the process again (systemd does), and see `recontrast-edge doctor`"
            )

    def fault_all(self, detail: str) -> None:
        """Take the frames that the engine has, and those that wait, away from it, as FAULTs."""
        # Whoever waits for a slow output holds it; then a later call will do.
        if not self._delivery.acquire(blocking=False):
            return
        try:
            with self._lock:
                tasks, self._tasks = self._tasks, []
            for task in (*tasks, *self.mailbox.take_all()):
                self._deliver(task, task.fault(Fault.ENGINE_STALLED, detail), time.monotonic())
        finally:
            self._delivery.release()

    # The thread.

    def _run(self) -> None:
        try:
            while not self.mailbox.ended:
                self._turned_s = time.monotonic()
                tasks = self.mailbox.take()
                if tasks:
                    with self._lock:
                        self._tasks = list(tasks)
                    self._judge(tasks)
        except BaseException as error:
            self.error = as_exception(error)
            with self._lock:
                tasks, self._tasks = self._tasks, []
            for task in tasks:
                if isinstance(error, StallError):
                    judgement = task.fault(Fault.INFERENCE_FAILED, str(error))
                else:
                    judgement = task.fault(Fault.INTERNAL_ERROR, f"{type(error).__name__}: {error}")
                self._deliver(task, judgement, time.monotonic())

    def _judge(self, tasks: Sequence[Task]) -> None:
        started_s = time.monotonic()
        early = [_without_engine(task, started_s) for task in tasks]
        found = iter(self._infer([task for task, judgement in zip(tasks, early, strict=True) if judgement is None]))
        inferred_s = time.monotonic()
        for task, judgement in zip(tasks, early, strict=True):
            result = judgement or next(found)
            if isinstance(result, Inference):
                assert task.product is not None
                verdict = judge(task.frame, result, task.product.threshold, task.product.engine.spec.input)
            else:
                verdict = result
            with self._lock:
                if not self._tasks:
                    # They were taken away meanwhile, and are FAULTs by now.
                    return
                self._tasks.pop(0)
            if isinstance(result, Inference):
                self._deliver(task, verdict, started_s, result.stage_ms, inferred_s)
            else:
                self._deliver(task, verdict, started_s)

    def _infer(self, tasks: Sequence[Task]) -> list[Inference | Judgement]:
        """Of each task what the engine found, or the FAULT that it led to. All tasks have the same engine."""
        if not tasks:
            return []
        products = [task.product for task in tasks if task.product is not None]
        images = [task.frame.image for task in tasks if task.frame.image is not None]
        maps_above = None if self._maps_wanted else min(product.threshold for product in products)
        with self._lock:
            self._inferring_since_s = time.monotonic()
        try:
            batch = products[0].engine.infer(images, maps_above=maps_above)
        except InputError as error:
            if len(tasks) == 1:
                return [tasks[0].fault(Fault.INVALID_IMAGE, str(error))]
            # One of them is to blame: the others must not suffer for it.
            return [result for task in tasks for result in self._infer([task])]
        except ModelError as error:
            return [task.fault(Fault.INFERENCE_FAILED, str(error)) for task in tasks]
        finally:
            with self._lock:
                self._inferring_since_s = None
        return [
            Inference(batch.maps[index : index + 1], batch.scores[index : index + 1], batch.stage_ms)
            for index in range(len(tasks))
        ]

    def _deliver(
        self,
        task: Task,
        judgement: Judgement,
        started_s: float,
        stage_ms: dict[str, float] | None = None,
        inferred_s: float | None = None,
    ) -> None:
        """Make a FAULT of what came too late, add the times, and hand it over."""
        decided_s = time.monotonic()
        late = task.lateness(decided_s) if judgement.fault is None else None
        if late is not None:
            code, late_ms = late
            judgement = task.fault(code, f"{judgement.verdict} came {late_ms:.1f} ms too late")
        captured_s = task.frame.captured_s
        latency_ms = {
            "wait": (started_s - captured_s) * 1e3,
            **(stage_ms or {}),
            "decide": (decided_s - (started_s if inferred_s is None else inferred_s)) * 1e3,
            "total": (decided_s - captured_s) * 1e3,
        }
        task.assignment.deliver(dataclasses.replace(judgement, latency_ms=latency_ms, decided_s=decided_s))


def _without_engine(task: Task, now_s: float) -> Judgement | None:
    """The FAULT of a frame that the engine need not see; None where it must."""
    frame = task.frame
    if frame.fault is not None:
        return task.fault(frame.fault, frame.detail)
    if frame.image is None:
        return task.fault(Fault.INVALID_IMAGE, "the source delivered no image")
    if task.product is None:
        return task.fault(Fault.UNKNOWN_PRODUCT, f"no engine is there for part {frame.part_id!r}")
    late = task.lateness(now_s)
    return None if late is None else task.fault(late[0], "it was over before the frame's turn came")
