"""A reject gate: which judgements move it, when, and for how long.

    gate = Gate(set_output, GateTiming(pulse_s=0.05, lead_s=0.01), name="gpio:7"); gate.write(judgement)

A part is at the gate at its frame's ``gate_s``; the pulse starts ``lead_s`` before. Without ``gate_s`` it starts when
the verdict is there. Pulses that overlap become one: the output stays active until the last of them ends, so that every
part finds the gate open for its whole time. All times are on ``time.monotonic()``'s clock.
"""

from __future__ import annotations

import heapq
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from recontrast_edge.bounded import POLL_S, join, wait_until
from recontrast_edge.frame import Judgement, VerdictName
from recontrast_edge.sinks.message import GATE_VERDICTS, choice_option
from recontrast_edge.uri import number_option

_log = logging.getLogger(__name__)

GATE_OPTIONS = ("on", "pulse_ms", "lead_ms")
"""Options of every output that moves a gate."""

MAX_PENDING = 4096
"""Pulses that may be ahead; more parts than that are between no camera and its gate."""

REAL_TIME_PRIORITY = 10
"""Of 1..99. With twenty busy threads on two cores the worst of 300 pulses was 1.1 ms late with it, 48 ms without."""

FINISH_S = 1.5
"""At the end, parts that are on their way to the gate are waited for, up to this."""


@dataclass(frozen=True)
class GateTiming:
    """When a gate moves.

    Attributes:
        pulse_s: how long the output is active for one part, in seconds.
        lead_s: how long before the part is there; what the gate takes to move.
        verdicts: those that move it.
    """

    pulse_s: float = 0.1
    lead_s: float = 0.0
    verdicts: frozenset[VerdictName] = GATE_VERDICTS["not_pass"]

    @classmethod
    def of(cls, what: str, options: dict[str, str]) -> GateTiming:
        """From the options of a URI.

        Raises:
            UsageError: a value out of range.
        """
        return cls(
            pulse_s=number_option(what, "pulse_ms", options.get("pulse_ms", "100"), low=1.0, high=60_000.0) / 1e3,
            lead_s=number_option(what, "lead_ms", options.get("lead_ms", "0"), low=0.0, high=60_000.0) / 1e3,
            verdicts=GATE_VERDICTS[choice_option(what, "on", options.get("on", "not_pass"), GATE_VERDICTS)],
        )


class Gate:
    """Gives pulses to an output, on a thread of its own.

    Args:
        set_output: makes the output active (True) or inactive; must return at once. What it raises is counted, logged,
            and answered with another try to make the output inactive.
        name: of the output, credentials masked.

    ``counters``: ``pulses`` given, one a part; ``late`` verdicts, which came after the part and moved nothing;
    ``short_lead`` ones, which came within ``lead_s`` of it and moved the gate at once; ``cancelled`` pulses, which were
    still ahead at the end; ``failed`` changes of the output; ``worst_delay_us``, by which a pulse started too late.
    """

    def __init__(self, set_output: Callable[[bool], None], timing: GateTiming, *, name: str) -> None:
        self.counters = dict.fromkeys(("pulses", "late", "short_lead", "cancelled", "failed", "worst_delay_us"), 0)
        self._set_output = set_output
        self._timing = timing
        self._name = name
        self._changed = threading.Condition()
        self._starts_s: list[float] = []
        self._active_until_s: float | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"gate {name}", daemon=True)
        self._thread.start()

    def write(self, judgement: Judgement) -> None:
        """Plan the pulse of a judgement, if it moves the gate."""
        if judgement.verdict not in self._timing.verdicts:
            return
        now_s, gate_s = time.monotonic(), judgement.frame.gate_s
        start_s = now_s if gate_s is None else gate_s - self._timing.lead_s
        with self._changed:
            if gate_s is not None and now_s >= gate_s:
                self.counters["late"] += 1
                return
            if len(self._starts_s) >= MAX_PENDING or self._closed:
                self.counters["cancelled"] += 1
                return
            self.counters["short_lead"] += start_s < now_s
            heapq.heappush(self._starts_s, max(start_s, now_s))
            self._changed.notify()

    def close(self) -> None:
        """Wait for the pulses ahead, up to ``FINISH_S``; leave the output inactive. May be called again."""
        if self._closed:
            return
        wait_until(lambda: self._idle, time.monotonic() + FINISH_S)
        with self._changed:
            self._closed = True
            self.counters["cancelled"] += len(self._starts_s)
            self._starts_s.clear()
            self._changed.notify()
        if self.counters["cancelled"]:
            _log.warning("%s: stopped before %d parts were at the gate", self._name, self.counters["cancelled"])
        join(self._thread, time.monotonic() + 1.0)

    @property
    def _idle(self) -> bool:
        return not self._starts_s and self._active_until_s is None

    def _run(self) -> None:
        _ask_for_real_time(self._name)
        try:
            while self._step():
                pass
        finally:
            self._set(False)

    def _step(self) -> bool:
        """One change of the output, or a short wait for it; False at the end."""
        with self._changed:
            while self._idle and not self._closed:
                self._changed.wait()
            if self._closed:
                return False
            now_s, active = time.monotonic(), self._active_until_s is not None
            while self._starts_s and self._starts_s[0] <= now_s:
                start_s = heapq.heappop(self._starts_s)
                delay_us = round((now_s - start_s) * 1e6)
                self.counters["worst_delay_us"] = max(self.counters["worst_delay_us"], delay_us)
                self.counters["pulses"] += 1
                self._active_until_s = now_s + self._timing.pulse_s
            if self._active_until_s is not None and self._active_until_s <= now_s:
                self._active_until_s = None
        if self._active_until_s is None and active:
            self._set(False)
        elif self._active_until_s is not None and not active:
            self._set(True)
            # The whole length, however long the change took.
            self._active_until_s = time.monotonic() + self._timing.pulse_s
        due_s = [*self._starts_s[:1], *([] if self._active_until_s is None else [self._active_until_s])]
        remaining_s = min(due_s, default=0.0) - time.monotonic()
        if remaining_s > 0:
            # Not a lock's timeout, see `bounded`. A pulse that is planned meanwhile is at most this late.
            time.sleep(min(remaining_s, POLL_S / 10))
        return True

    def _set(self, active: bool) -> None:
        try:
            self._set_output(active)
        except Exception as error:
            self.counters["failed"] += 1
            _log.warning("%s: cannot set the output (%s)", self._name, error)
            if active:
                self._set(False)


def _ask_for_real_time(name: str) -> None:
    """Let this thread run as soon as it is due, if we may (root, CAP_SYS_NICE or ``LimitRTPRIO=`` of systemd)."""
    try:
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_FIFO, os.sched_param(REAL_TIME_PRIORITY))
    except (AttributeError, OSError) as error:
        _log.info(
            "%s: pulses may be some ms late on a busy machine, as real-time priority is not allowed (%s)", name, error
        )
