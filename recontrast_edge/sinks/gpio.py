"""A reject gate on a pin: Jetson's header through Jetson.GPIO, or any line of a GPIO chip through libgpiod.

    sink = GpioSink("gpio:7", JetsonPin(7, active_high=True), GateTiming(pulse_s=0.05)); sink.write(judgement)

The pin is at its inactive level from the moment it is opened, between pulses, after a failure, and at the end; it is
then released, and what holds the level is the resistor on the wire.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from recontrast_edge.errors import MissingError, OutputError, UsageError
from recontrast_edge.frame import Judgement
from recontrast_edge.secrets import masked_uri
from recontrast_edge.sinks.gate import GATE_OPTIONS, Gate, GateTiming
from recontrast_edge.sinks.message import choice_option, missing
from recontrast_edge.uri import parse_options, whole_option

CONSUMER = "recontrast-edge"
"""What ``gpioinfo`` shows as the line's user."""


class Pin(Protocol):
    """A digital output."""

    def set(self, active: bool) -> None:
        """Change its level; raises OSError or RuntimeError."""

    def close(self) -> None:
        """Make it inactive and release it."""


class JetsonPin:
    """A pin of a Jetson's header, or of a board that Jetson.GPIO knows by other numbers.

    Args:
        number: as ``numbering`` counts.
        numbering: ``board`` (the header's), ``bcm``, ``cvm`` or ``tegra_soc``.

    Raises:
        MissingError: no Jetson.GPIO, or no permission for the GPIO chip.
        OutputError: no such pin, or it is taken.
    """

    def __init__(self, number: int | str, *, active_high: bool, numbering: str = "board") -> None:
        self._gpio = _jetson_gpio()
        self._number = number
        self._levels = (self._gpio.LOW, self._gpio.HIGH) if active_high else (self._gpio.HIGH, self._gpio.LOW)
        try:
            # One numbering for the whole process, and a second sink may have chosen it.
            if self._gpio.getmode() is None:
                self._gpio.setmode(getattr(self._gpio, numbering.upper()))
            elif self._gpio.getmode() != getattr(self._gpio, numbering.upper()):
                raise ValueError("another pin is numbered in another way; use one numbering for all")
            self._gpio.setup(number, self._gpio.OUT, initial=self._levels[False])
        except (OSError, RuntimeError, ValueError) as error:
            raise OutputError(f"gpio:{number}: cannot be used as an output ({error})") from None

    def set(self, active: bool) -> None:
        """See ``Pin``."""
        self._gpio.output(self._number, self._levels[active])

    def close(self) -> None:
        """See ``Pin``."""
        self.set(False)
        self._gpio.cleanup(self._number)


def _jetson_gpio() -> Any:
    try:
        import Jetson.GPIO as GPIO
    except ImportError as error:
        raise missing("gpio:", error, "gpio") from None
    except Exception as error:
        # It looks for its board and its permissions while it is imported.
        raise MissingError(f"gpio: needs a Jetson and access to /dev/gpiochip0 (group gpio): {error}") from None
    return GPIO


class ChipLine:
    """A line of a GPIO chip of the kernel.

    Raises:
        MissingError: no gpiod.
        OutputError: no such chip or line, it is taken, or access is denied.
    """

    def __init__(self, chip: Path, line: int, *, active_high: bool) -> None:
        try:
            import gpiod
            from gpiod.line import Direction, Value
        except ImportError as error:
            raise missing("gpiochip:", error, "gpio") from None
        self._line = line
        self._values = (Value.INACTIVE, Value.ACTIVE)
        settings = gpiod.LineSettings(
            direction=Direction.OUTPUT, active_low=not active_high, output_value=Value.INACTIVE
        )
        try:
            self._request = gpiod.request_lines(str(chip), consumer=CONSUMER, config={line: settings})
        except (OSError, ValueError) as error:
            raise OutputError(f"{chip}, line {line}: cannot be used as an output ({error})") from None

    def set(self, active: bool) -> None:
        """See ``Pin``."""
        self._request.set_value(self._line, self._values[active])

    def close(self) -> None:
        """See ``Pin``."""
        self.set(False)
        self._request.release()


class GpioSink:
    """Gives a pin a pulse for each part to be rejected.

    ``counters``: see ``Gate``.
    """

    needs_maps = False

    def __init__(self, uri: str, pin: Pin, timing: GateTiming) -> None:
        self.uri = uri
        self._pin = pin
        self._gate = Gate(pin.set, timing, name=uri)
        self._closed = False

    @property
    def counters(self) -> dict[str, int]:
        """See the class."""
        return self._gate.counters

    def write(self, judgement: Judgement) -> None:
        """See ``Sink.write``; never waits."""
        self._gate.write(judgement)

    def close(self) -> None:
        """See ``Sink.close``.

        Raises:
            OutputError: the pin could not be made inactive.
        """
        if self._closed:
            return
        self._closed = True
        self._gate.close()
        try:
            self._pin.close()
        except (OSError, RuntimeError) as error:
            raise OutputError(f"{self.uri}: the pin could not be made inactive ({error}); check the gate") from None


_NUMBERINGS = ("board", "bcm", "cvm", "tegra_soc")


def gpio_opener(uri: str, target: str, query: str) -> Callable[[], GpioSink]:
    """``gpio:PIN?active=&numbering=&on=&pulse_ms=&lead_ms=``.

    Raises:
        UsageError: something else.
    """
    what = f"output {masked_uri(uri)!r}"
    options = parse_options(what, query, (*GATE_OPTIONS, "active", "numbering"))
    numbering = choice_option(what, "numbering", options.get("numbering", "board"), _NUMBERINGS)
    number: int | str = target
    if numbering in ("board", "bcm"):
        number = whole_option(what, "the pin", target, low=0, high=1000)
    elif not re.fullmatch(r"\w+", target, re.ASCII):
        raise UsageError(f"{what}: expected a pin's name such as GP65, got {target!r}")
    active_high = _active_high(what, options)
    timing = GateTiming.of(what, options)
    return lambda: GpioSink(f"gpio:{target}", JetsonPin(number, active_high=active_high, numbering=numbering), timing)


def gpiochip_opener(uri: str, target: str, query: str) -> Callable[[], GpioSink]:
    """``gpiochip:CHIP/LINE?active=&on=&pulse_ms=&lead_ms=``; CHIP is ``0``, ``gpiochip0`` or a path in ``/dev``.

    Raises:
        UsageError: something else.
    """
    what = f"output {masked_uri(uri)!r}"
    options = parse_options(what, query, (*GATE_OPTIONS, "active"))
    chip, _, line_text = target.rpartition("/")
    name = re.fullmatch(r"(?:/dev/)?(?:gpiochip)?([0-9]{1,4})", chip)
    if name is None:
        raise UsageError(f"{what}: expected gpiochip:CHIP/LINE, such as gpiochip:0/17, got {target!r}")
    line = whole_option(what, "the line", line_text, low=0, high=65535)
    active_high = _active_high(what, options)
    timing = GateTiming.of(what, options)
    path = Path(os.sep, "dev", f"gpiochip{int(name[1])}")
    return lambda: GpioSink(f"gpiochip:{target}", ChipLine(path, line, active_high=active_high), timing)


def _active_high(what: str, options: dict[str, str]) -> bool:
    return choice_option(what, "active", options.get("active", "high"), ("high", "low")) == "high"
