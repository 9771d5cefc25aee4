"""Verdicts for PLCs, through Modbus TCP: a coil and registers of theirs that we write, or registers that they read.

    sink = ModbusServerSink("127.0.0.1", 5020); sink.write(judgement)

Both offer the same block of registers, ``registers``; ``docs/outputs.md`` has its map.
"""

from __future__ import annotations

import asyncio
import logging
import math
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from recontrast_edge.errors import OutputError, UsageError
from recontrast_edge.frame import Judgement, Region, SourceState, StateChange, VerdictName
from recontrast_edge.secrets import masked_uri
from recontrast_edge.sinks.gate import GATE_OPTIONS, Gate, GateTiming
from recontrast_edge.sinks.loop import LoopThread
from recontrast_edge.sinks.message import missing
from recontrast_edge.sinks.progress import Progress
from recontrast_edge.sinks.trouble import Trouble
from recontrast_edge.uri import host_port, parse_options, whole_option
from recontrast_edge.verdict import Fault

_log = logging.getLogger(__name__)

VERDICT_NUMBERS: dict[VerdictName | None, int] = {None: 0, "PASS": 1, "REJECT": 2, "FAULT": 3}
STATE_NUMBERS = {
    SourceState.CONNECTING: 0,
    SourceState.RUNNING: 1,
    SourceState.STALE: 2,
    SourceState.FAULT: 3,
    SourceState.ENDED: 4,
}
FAULT_NUMBERS: dict[str, int] = {
    Fault.UNREADABLE_IMAGE.value: 1,
    Fault.INVALID_IMAGE.value: 2,
    Fault.INFERENCE_FAILED.value: 3,
    Fault.NON_FINITE_SCORE.value: 4,
    Fault.DEADLINE_MISSED.value: 5,
    Fault.GATE_MISSED.value: 6,
    Fault.FRAME_MISSED.value: 7,
    Fault.QUEUE_FULL.value: 8,
    Fault.INCOMPLETE_FRAME.value: 9,
    Fault.LINES_MISSED.value: 10,
    Fault.SOURCE_STALE.value: 11,
    Fault.SOURCE_FROZEN.value: 12,
    Fault.SOURCE_DARK.value: 13,
    Fault.SOURCE_SATURATED.value: 14,
    Fault.WRONG_RATE.value: 15,
    Fault.ENGINE_STALLED.value: 16,
    Fault.SOURCE_FAILED.value: 17,
    Fault.INTERNAL_ERROR.value: 18,
    Fault.VIEW_MISSING.value: 19,
    Fault.UNKNOWN_PRODUCT.value: 20,
}
"""Numbers in PLC programs: they never change, new codes get new ones."""

OTHER_FAULT = 255
PART_ID_BYTES = 32
NO_GATE = -0x8000
HEARTBEAT_HZ = 2.0
"""How fast a server's heartbeat counts. In a PLC's registers it counts the times they were written."""

_MAX_FLOAT32 = struct.unpack(">f", b"\x7f\x7f\xff\xff")[0]
_BLOCK = struct.Struct(">HHHHffIIIIIhHHHHH32s")
REGISTERS = _BLOCK.size // 2

TIMEOUT_S = 1.0
"""For each answer of a PLC, and for connecting to it."""

RECONNECT_S = 0.5
KEEP_ALIVE_S = 1.0
"""An idle coil is written again this often, so that a lost connection is noticed before it is needed."""


def registers(progress: Progress, heartbeat: int) -> list[int]:
    """``REGISTERS`` values of 16 bits; numbers of 32 bits have their high word first."""
    last, counts = progress.last, progress.counts
    gate_in_ms = None if last is None else last.gate_in_ms
    region = last.regions[0] if last is not None and last.regions else None
    fault = None if last is None else last.fault
    block = _BLOCK.pack(
        VERDICT_NUMBERS[None if last is None else last.verdict],
        STATE_NUMBERS[progress.state],
        heartbeat & 0xFFFF,
        0 if fault is None else FAULT_NUMBERS.get(fault, OTHER_FAULT),
        _float32(None if last is None else last.score),
        _float32(None if last is None else last.threshold),
        *(count & 0xFFFFFFFF for count in (progress.judged, counts["PASS"], counts["REJECT"], counts["FAULT"])),
        0 if last is None else last.frame.frame_id & 0xFFFFFFFF,
        NO_GATE if gate_in_ms is None else round(min(max(gate_in_ms, NO_GATE + 1), 0x7FFF)),
        0 if last is None else len(last.regions),
        *((0, 0, 0, 0) if region is None else (min(max(value, 0), 0xFFFF) for value in _box(region))),
        _part_id(last),
    )
    return list(struct.unpack(f">{REGISTERS}H", block))


def bits(progress: Progress) -> list[bool]:
    """The last verdict is PASS, is REJECT, is FAULT; all cameras are running."""
    verdict = None if progress.last is None else progress.last.verdict
    return [*(verdict == name for name in progress.counts), progress.state is SourceState.RUNNING]


def _float32(value: float | None) -> float:
    """What ``struct`` can pack."""
    return math.nan if value is None else min(max(value, -_MAX_FLOAT32), _MAX_FLOAT32)


def _box(region: Region) -> tuple[int, int, int, int]:
    return region.x, region.y, region.width, region.height


def _part_id(judgement: Judgement | None) -> bytes:
    text = "" if judgement is None else judgement.frame.part_id or ""
    # Cut between characters.
    return text.encode()[:PART_ID_BYTES].decode(errors="ignore").encode()


class ModbusSink:
    """Writes a coil of a PLC for each part to be rejected, and its registers for each judgement.

    The connection is made anew by itself. A pulse that falls into a time without one is counted as ``dropped``, and the
    coil is set to off first thing when the PLC is back; of the registers only the newest values are ever written.

    ``counters``: those of ``Gate``; requests ``written``, which the PLC confirmed, and ``refused`` (no such coil or
    register); ``dropped`` pulses; ``reconnects``; ``connected`` (0 or 1).

    Args:
        coil: address from 0, as on the wire.
        first_register: address from 0 of the first of ``REGISTERS`` holding registers; None: they are not written.
        unit: the PLC's unit id, which gateways look at.
    """

    needs_maps = False

    def __init__(
        self, host: str, port: int, coil: int, *, timing: GateTiming, first_register: int | None = None, unit: int = 1
    ) -> None:
        self.uri = f"modbus://{f'[{host}]' if ':' in host else host}:{port}/{coil}"
        self._address = (host, port)
        self._coil = coil
        self._first_register = first_register
        self._unit = unit
        self._progress = Progress()
        self._own = dict.fromkeys(("written", "dropped", "refused", "reconnects", "connected"), 0)
        self._coil_values: asyncio.Queue[bool] = asyncio.Queue()
        self._heartbeat = 0
        self._registers_changed = False
        self._wake: asyncio.Event = asyncio.Event()
        self._trouble = Trouble(_log, self.uri, well="connected")
        self._ever_connected = False
        self._closed = False
        self._loop = LoopThread(self.uri)
        self._loop.start(self._serve())
        self._gate = Gate(lambda active: self._loop.post(lambda: self._set_coil(active)), timing, name=self.uri)

    @property
    def counters(self) -> dict[str, int]:
        """See the class."""
        return {**self._gate.counters, **self._own}

    def write(self, judgement: Judgement) -> None:
        """See ``Sink.write``; never waits."""
        self._gate.write(judgement)
        if self._first_register is not None:
            self._loop.post(lambda: self._show(lambda: self._progress.add(judgement)))

    def write_state(self, change: StateChange) -> None:
        """See ``Sink``."""
        if self._first_register is not None:
            self._loop.post(lambda: self._show(lambda: self._progress.change(change)))

    def close(self) -> None:
        """See ``Sink.close``: the coil is off, the registers say that it has ended, if the PLC can be reached."""
        if self._closed:
            return
        self._closed = True
        self._gate.close()
        with suppress(TimeoutError):
            self._loop.run(self._finish(), timeout_s=0.5)
        self._loop.close()

    # In the loop.

    def _set_coil(self, active: bool) -> None:
        if self._own["connected"]:
            self._coil_values.put_nowait(active)
            self._wake.set()
        else:
            self._own["dropped"] += active

    def _show(self, update: Callable[[], None]) -> None:
        update()
        self._registers_changed = True
        self._wake.set()

    async def _finish(self) -> None:
        if self._first_register is not None:
            self._show(self._progress.end)
        while self._own["connected"] and (self._registers_changed or not self._coil_values.empty()):
            await asyncio.sleep(0.01)

    async def _serve(self) -> None:
        from pymodbus.client import AsyncModbusTcpClient

        host, port = self._address
        while True:
            client = AsyncModbusTcpClient(host, port=port, timeout=TIMEOUT_S, retries=0, reconnect_delay=0)
            try:
                if await client.connect():
                    await self._drive(client)
                else:
                    self._trouble.say("cannot connect; trying again")
            except Exception as error:
                # Whatever the PLC or the library did: a gate must not be given up.
                self._trouble.say(f"connection lost ({error}); trying again")
            finally:
                client.close()
            self._own["connected"] = 0
            while not self._coil_values.empty():
                self._own["dropped"] += self._coil_values.get_nowait()
            await asyncio.sleep(RECONNECT_S)

    async def _drive(self, client: Any) -> None:
        """Write what is to be written until the connection fails."""
        value = False
        await self._request(client.write_coil(self._coil, value, device_id=self._unit), "coil", self._coil)
        self._own["connected"] = 1
        self._own["reconnects"] += self._ever_connected
        self._ever_connected = True
        self._trouble.say(None)
        while True:
            try:
                await asyncio.wait_for(self._wake.wait(), KEEP_ALIVE_S)
            except (TimeoutError, asyncio.TimeoutError):
                await self._request(client.write_coil(self._coil, value, device_id=self._unit), "coil", self._coil)
                continue
            self._wake.clear()
            # The gate first: registers can wait.
            while not self._coil_values.empty():
                value = self._coil_values.get_nowait()
                try:
                    await self._request(client.write_coil(self._coil, value, device_id=self._unit), "coil", self._coil)
                except BaseException:
                    self._own["dropped"] += value
                    raise
            if self._registers_changed and self._first_register is not None:
                self._registers_changed = False
                self._heartbeat += 1
                values = registers(self._progress, self._heartbeat)
                request = client.write_registers(self._first_register, values, device_id=self._unit)
                await self._request(request, "registers", self._first_register)

    async def _request(self, request: Any, what: str, address: int) -> None:
        response = await request
        if response.isError():
            self._own["refused"] += 1
            self._trouble.say(f"the PLC refuses to have its {what} at {address} written ({response})")
        else:
            self._own["written"] += 1


class ModbusServerSink:
    """A Modbus TCP server whose registers show the last judgement; every unit id, read only.

    Input and holding registers from 0: ``registers``; discrete inputs and coils from 0: ``bits``. What
    one request reads belongs to one judgement.

    Raises:
        OutputError: the address cannot be listened on.
    """

    needs_maps = False

    def __init__(self, host: str, port: int) -> None:
        self.uri = f"modbus-server://{f'[{host}]' if ':' in host else host}:{port}"
        self.counters = {"requests": 0}
        self._closed = False
        self._started_s = time.monotonic()
        self._progress = Progress()
        self._loop = LoopThread(self.uri)
        try:
            self._server = self._loop.run(self._listen(host, port), timeout_s=10.0)
        except (RuntimeError, OSError) as error:
            self._loop.close()
            raise OutputError(f"{self.uri}: cannot listen here ({error})") from None

    async def _listen(self, host: str, port: int) -> Any:
        from pymodbus.server import ModbusTcpServer
        from pymodbus.simulator import DataType, SimData, SimDevice

        flags = SimData(0, values=[False] * 16, datatype=DataType.BITS)
        words = SimData(0, values=[0] * REGISTERS, datatype=DataType.REGISTERS)
        device = SimDevice(0, simdata=([flags], [flags], [words], [words]), action=self._answer)
        server = ModbusTcpServer(device, address=(host, port))
        await server.serve_forever(background=True)
        return server

    async def _answer(
        self, function: int, _start: int, _address: int, _count: int, current: list[int], values: Any
    ) -> Any:
        """Called by the server before it answers: refuse to write, bring what is read up to date."""
        from pymodbus.constants import ExcCodes

        if values is not None:
            return ExcCodes.ILLEGAL_FUNCTION
        self.counters["requests"] += 1
        if function in (1, 2):
            current[0] = sum(bit << index for index, bit in enumerate(bits(self._progress)))
        else:
            current[:] = registers(self._progress, int((time.monotonic() - self._started_s) * HEARTBEAT_HZ))
        return None

    def write(self, judgement: Judgement) -> None:
        """See ``Sink.write``; never waits."""
        self._loop.post(lambda: self._progress.add(judgement))

    def write_state(self, change: StateChange) -> None:
        """See ``Sink``."""
        self._loop.post(lambda: self._progress.change(change))

    def close(self) -> None:
        """See ``Sink.close``: a PLC notices that the connection has gone."""
        if self._closed:
            return
        self._closed = True
        with suppress(TimeoutError):
            self._loop.run(self._server.shutdown(), timeout_s=2.0)
        self._loop.close()


def _check_library(what: str) -> None:
    try:
        import pymodbus.client
    except ImportError as error:
        raise missing(what, error, "serve") from None
    # What it says of lost connections, on every try, we say once.
    logging.getLogger(pymodbus.__name__).setLevel(logging.CRITICAL)


def modbus_opener(uri: str, target: str, query: str) -> Callable[[], ModbusSink]:
    """``modbus://HOST[:PORT]/COIL?on=&pulse_ms=&lead_ms=&registers=&unit=``.

    Raises:
        UsageError: something else.
    """
    what = f"output {masked_uri(uri)!r}"
    options = parse_options(what, query, (*GATE_OPTIONS, "registers", "unit"))
    authority, slash, coil_text = target.removeprefix("//").partition("/")
    if not target.startswith("//") or not slash:
        raise UsageError(f"{what}: expected modbus://HOST[:PORT]/COIL")
    host, port = host_port(what, authority, default_port=502)
    coil = whole_option(what, "the coil's address", coil_text, low=0, high=65535)
    first_register = None
    if "registers" in options:
        first_register = whole_option(what, "registers", options["registers"], low=0, high=65536 - REGISTERS)
    unit = whole_option(what, "unit", options.get("unit", "1"), low=0, high=255)
    timing = GateTiming.of(what, options)
    _check_library(what)
    return lambda: ModbusSink(host, port, coil, timing=timing, first_register=first_register, unit=unit)


def modbus_server_opener(uri: str, target: str, query: str) -> Callable[[], ModbusServerSink]:
    """``modbus-server://HOST[:PORT]``; without a host, or port: ``127.0.0.1:5020``.

    Raises:
        UsageError: something else.
    """
    what = f"output {masked_uri(uri)!r}"
    parse_options(what, query, ())
    authority = target.removeprefix("//").removesuffix("/")
    host, port = host_port(what, authority or "127.0.0.1", default_port=5020)
    _check_library(what)
    return lambda: ModbusServerSink(host, port)
