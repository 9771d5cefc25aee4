"""Gates: the pulse's time and length, on a recording fake of Jetson.GPIO and of libgpiod.

python -m pytest tests/edge/test_sinks_gate.py
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import pytest

from recontrast_edge.errors import MissingError, OutputError, UsageError
from recontrast_edge.frame import Sink
from recontrast_edge.sinks import gate as gate_module
from recontrast_edge.sinks import open_sink, sink_opener
from recontrast_edge.sinks.gate import Gate, GateTiming
from recontrast_edge.spec import InputSpec
from tests.edge.judgements import faulty, passed, rejected

SPEC = InputSpec(size_wh=(32, 32), resize_wh=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
TOLERANCE_S = 0.03
"""For a machine that does other things, too; with real-time priority it is 1 ms."""


class FakeGpio(ModuleType):
    """The functions of Jetson.GPIO that are used, with its rules; remembers every level and when it came."""

    BOARD, BCM, CVM, TEGRA_SOC = 10, 11, 1001, 1000
    LOW, HIGH = 0, 1
    OUT = 0

    def __init__(self) -> None:
        super().__init__("Jetson.GPIO")
        self.mode: int | None = None
        self.levels: dict[int | str, list[tuple[float, int]]] = {}
        self.taken: set[int | str] = set()
        self.fails = False

    def getmode(self) -> int | None:
        return self.mode

    def setmode(self, mode: int) -> None:
        assert self.mode is None
        self.mode = mode

    def setup(self, channel: int | str, direction: int, initial: int | None = None) -> None:
        assert direction == self.OUT
        if channel == 99:
            raise ValueError("Channel 99 is invalid")
        self.taken.add(channel)
        assert initial is not None
        self.levels[channel] = [(time.monotonic(), initial)]

    def output(self, channel: int | str, level: int) -> None:
        if self.fails:
            raise OSError(5, "Input/output error")
        assert channel in self.taken
        self.levels[channel].append((time.monotonic(), level))

    def cleanup(self, channel: int | str) -> None:
        self.taken.discard(channel)
        if not self.taken:
            self.mode = None

    def pulses(self, channel: int | str, active: int = 1) -> list[tuple[float, float]]:
        """(when it began, for how long) of each."""
        found, began = [], None
        for at_s, level in self.levels[channel]:
            if level == active and began is None:
                began = at_s
            elif level != active and began is not None:
                found.append((began, at_s - began))
                began = None
        assert began is None, "the output was left active"
        return found


@pytest.fixture
def gpio(monkeypatch: pytest.MonkeyPatch) -> FakeGpio:
    package, fake = ModuleType("Jetson"), FakeGpio()
    package.GPIO = fake
    monkeypatch.setitem(sys.modules, "Jetson", package)
    monkeypatch.setitem(sys.modules, "Jetson.GPIO", fake)
    return fake


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gate")]


def opened(uri: str) -> Sink:
    return open_sink(uri, input_spec=SPEC)


class TestGpio:
    def test_the_pulse_is_at_the_gate_in_time(self, gpio: FakeGpio) -> None:
        sink = opened("gpio:7?pulse_ms=40&lead_ms=30")
        gates_s = [time.monotonic() + delay_s for delay_s in (0.3, 0.45, 0.6)]
        # Verdicts need not come in the order of their parts.
        for index in (1, 0, 2):
            sink.write(rejected(index, gate_s=gates_s[index]))
        sink.close()
        pulses = gpio.pulses(7)
        assert len(pulses) == 3
        for gate_s, (began_s, length_s) in zip(gates_s, pulses, strict=True):
            assert 0 <= began_s - (gate_s - 0.03) < TOLERANCE_S
            assert 0.04 <= length_s < 0.04 + TOLERANCE_S
        assert sink.counters["pulses"] == 3
        assert sink.counters["worst_delay_us"] < TOLERANCE_S * 1e6
        assert not gpio.taken, "the pin is released"

    def test_without_a_gate_it_fires_with_the_verdict(self, gpio: FakeGpio) -> None:
        sink = opened("gpio:7?pulse_ms=10")
        written_s = time.monotonic()
        sink.write(rejected())
        sink.close()
        ((began_s, length_s),) = gpio.pulses(7)
        assert 0 <= began_s - written_s < TOLERANCE_S
        assert length_s >= 0.01

    def test_pulses_that_overlap_become_one(self, gpio: FakeGpio) -> None:
        sink = opened("gpio:7?pulse_ms=60")
        first_s = time.monotonic() + 0.05
        for delay_s in (0.0, 0.03, 0.05):
            sink.write(rejected(gate_s=first_s + delay_s))
        sink.close()
        ((began_s, length_s),) = gpio.pulses(7)
        assert abs(began_s - first_s) < TOLERANCE_S
        ended_s = began_s + length_s
        assert 0.11 <= ended_s - first_s < 0.11 + TOLERANCE_S
        assert sink.counters["pulses"] == 3

    def test_what_has_passed_the_gate_is_counted_and_moves_nothing(self, gpio: FakeGpio) -> None:
        sink = opened("gpio:7?pulse_ms=10")
        sink.write(rejected(gate_s=time.monotonic() - 0.001))
        sink.close()
        assert gpio.pulses(7) == []
        assert (sink.counters["late"], sink.counters["pulses"]) == (1, 0)

    def test_within_the_lead_it_fires_at_once(self, gpio: FakeGpio) -> None:
        sink = opened("gpio:7?pulse_ms=10&lead_ms=500")
        written_s = time.monotonic()
        sink.write(rejected(gate_s=written_s + 0.3))
        sink.close()
        ((began_s, _),) = gpio.pulses(7)
        assert began_s - written_s < TOLERANCE_S
        assert sink.counters["short_lead"] == 1

    @pytest.mark.parametrize(("on", "pulses"), [("", 2), ("&on=not_pass", 2), ("&on=reject", 1)])
    def test_a_fault_is_not_trusted(self, on: str, pulses: int, gpio: FakeGpio) -> None:
        sink = opened(f"gpio:7?pulse_ms=10{on}")
        now_s = time.monotonic()
        for index, judgement in enumerate((passed, rejected, faulty), 1):
            sink.write(judgement(gate_s=now_s + 0.05 * index))
        sink.close()
        assert len(gpio.pulses(7)) == pulses

    def test_active_low(self, gpio: FakeGpio) -> None:
        sink = opened("gpio:7?pulse_ms=10&active=low")
        assert gpio.levels[7][0][1] == gpio.HIGH, "inactive from the first moment on"
        sink.write(rejected())
        sink.close()
        assert len(gpio.pulses(7, active=gpio.LOW)) == 1

    def test_at_the_end_parts_on_their_way_are_waited_for_but_not_for_ever(self, gpio, monkeypatch) -> None:
        monkeypatch.setattr(gate_module, "FINISH_S", 0.2)
        sink = opened("gpio:7?pulse_ms=20")
        closed_s = time.monotonic()
        for delay_s in (0.1, 30.0):
            sink.write(rejected(gate_s=closed_s + delay_s))
        sink.close()
        sink.close()
        assert time.monotonic() - closed_s < 1.0
        assert len(gpio.pulses(7)) == 1
        assert sink.counters["cancelled"] == 1

    def test_a_failing_pin_is_counted_and_said(self, gpio: FakeGpio, caplog: pytest.LogCaptureFixture) -> None:
        sink = opened("gpio:7?pulse_ms=10")
        gpio.fails = True
        sink.write(rejected())
        with pytest.raises(OutputError, match=r"gpio:7: the pin could not be made inactive .*Input/output error"):
            sink.close()
        assert sink.counters["failed"] >= 2
        assert "gpio:7: cannot set the output" in caplog.text

    def test_two_pins_share_one_numbering(self, gpio: FakeGpio) -> None:
        first, second = opened("gpio:7"), opened("gpio:11")
        with pytest.raises(OutputError, match="one numbering"):
            opened("gpio:4?numbering=bcm")
        first.close()
        second.close()
        opened("gpio:4?numbering=bcm").close()

    def test_no_such_pin(self, gpio: FakeGpio) -> None:
        with pytest.raises(OutputError, match="gpio:99: cannot be used as an output"):
            opened("gpio:99")

    def test_a_machine_that_is_no_jetson(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "Jetson", None)
        monkeypatch.setitem(sys.modules, "Jetson.GPIO", None)
        with pytest.raises(MissingError, match=r"recontrast-edge\[gpio\]"):
            opened("gpio:7")

    @pytest.mark.parametrize(
        ("uri", "message"),
        [
            ("gpio:", "missing after"),
            ("gpio:seven", "whole number"),
            ("gpio:7?puls_ms=5", "did you mean 'pulse_ms'"),
            ("gpio:7?pulse_ms=0", "from 1 to 60000"),
            ("gpio:7?lead_ms=nan", "from 0 to 60000"),
            ("gpio:7?on=pass", "one of not_pass, reject"),
            ("gpio:7?active=up", "one of high, low"),
            ("gpio:a-b?numbering=cvm", "pin's name"),
            ("gpiochip:17", "gpiochip:0/17"),
            ("gpiochip:../../etc/passwd/1", "gpiochip:0/17"),
            ("gpiochip:0/17?numbering=bcm", "unknown option"),
        ],
    )
    def test_bad_uris_say_what_is_wrong(self, uri: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            sink_opener(uri)


class TestGpiochip:
    def test_a_line_of_a_chip(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpiod = pytest.importorskip("gpiod", reason="libgpiod's Python package makes the settings")
        done: list[object] = []

        def request_lines(chip: str, *, consumer: str, config: dict) -> SimpleNamespace:
            done.append((chip, consumer, config))
            return SimpleNamespace(
                set_value=lambda line, value: done.append((line, value)), release=lambda: done.append("released")
            )

        monkeypatch.setattr(gpiod, "request_lines", request_lines)
        sink = opened("gpiochip:gpiochip1/17?active=low&pulse_ms=5")
        sink.write(rejected())
        sink.close()
        (chip, consumer, config), *changes, released = done
        assert (chip, consumer, released) == ("/dev/gpiochip1", "recontrast-edge", "released")
        settings = config[17]
        active, inactive = gpiod.line.Value.ACTIVE, gpiod.line.Value.INACTIVE
        assert (settings.direction, settings.active_low) == (gpiod.line.Direction.OUTPUT, True)
        assert settings.output_value == inactive
        assert changes[:2] == [(17, active), (17, inactive)]
        assert changes[-1] == (17, inactive)

    def test_no_such_chip(self) -> None:
        pytest.importorskip("gpiod")
        with pytest.raises(OutputError, match="/dev/gpiochip9999, line 0: cannot be used"):
            opened("gpiochip:9999/0")


def test_the_clock_on_the_wall_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `time.time` says, also while waiting."""
    changes: list[tuple[float, bool]] = []
    jump = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(time, "time", lambda: float(next(jump)))
    gate = Gate(lambda active: changes.append((time.monotonic(), active)), GateTiming(pulse_s=0.02), name="test")
    due_s = time.monotonic() + 0.1
    gate.write(rejected(gate_s=due_s))
    gate.close()
    (began_s, _), *_ = [change for change in changes if change[1]]
    assert abs(began_s - due_s) < TOLERANCE_S


def test_a_gate_that_is_flooded_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "MAX_PENDING", 10)
    monkeypatch.setattr(gate_module, "FINISH_S", 0.0)
    set_output: Callable[[bool], None] = lambda active: None  # noqa: E731 - a name for its type
    gate = Gate(set_output, GateTiming(), name="test")
    far_s = time.monotonic() + 60
    for index in range(25):
        gate.write(rejected(index, gate_s=far_s))
    gate.close()
    assert gate.counters["cancelled"] == 25
