"""Outputs over the network against real peers: mosquitto, a pymodbus server, PLC and OPC UA clients, a web server.

python -m pytest tests/edge/test_sinks_network.py
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from recontrast_edge.errors import InputError, OutputError, UsageError
from recontrast_edge.frame import Sink
from recontrast_edge.secrets import mask_logs
from recontrast_edge.sinks import _SCHEMES, open_sink, sink_opener
from recontrast_edge.spec import InputSpec
from tests.edge.judgements import faulty, on_a_web, passed, rejected, state

SPEC = InputSpec(size_wh=(32, 32), resize_wh=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CANARY = "k4nari en/vogel@ü"
ENCODED_CANARY = quote(CANARY, safe="")
PATIENCE_S = 15.0
"""For what takes well under a second on a machine with nothing else to do."""


def opened(uri: str) -> Sink:
    return open_sink(uri, input_spec=SPEC)


def wait_for(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> float:
    """Seconds until the condition held."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < timeout_s, "it did not come"
        time.sleep(0.01)
    return time.monotonic() - started_s


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(autouse=True)
def no_leaks(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """No output leaves a thread behind, and no log holds a password."""
    before, threads = logging.getLogRecordFactory(), set(threading.enumerate())
    mask_logs()
    caplog.set_level(logging.DEBUG)
    yield caplog
    logging.setLogRecordFactory(before)
    for spelling in (CANARY, ENCODED_CANARY, quote(CANARY)):
        assert spelling not in caplog.text
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread not in threads], 5.0)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ca.pem``, and a certificate and key for 127.0.0.1 (``server``), for elsewhere, and of a client."""
    pytest.importorskip("cryptography", reason="the certificates of the tests are made with it")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    folder = tmp_path_factory.mktemp("pki")
    now = datetime.datetime.now(datetime.timezone.utc)

    def issue(name: str, names: list[x509.GeneralName], issuer=None) -> tuple:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        ca_key, ca_subject = (key, subject) if issuer is None else issuer
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(ca_key, hashes.SHA256())
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (folder / f"{name}-key.pem").write_bytes(private)
        return key, subject

    ca = issue("ca", [])
    here = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.UniformResourceIdentifier("urn:recontrast-edge")]
    issue("server", here, ca)
    issue("elsewhere", [x509.DNSName("elsewhere.example")], ca)
    issue("client", [x509.UniformResourceIdentifier("urn:test-client")], ca)
    issue("another-ca", [])
    return folder


# MQTT


@dataclass
class Broker:
    """mosquitto on a free port, and a client of the test's own that hears everything."""

    config: Path
    port: int
    process: subprocess.Popen | None = None
    heard: list[tuple[str, str, bool]] = field(default_factory=list)

    def start(self) -> None:
        program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
        log = (self.config.parent / "mosquitto.log").open("ab")
        self.process = subprocess.Popen([program, "-c", self.config], stdout=log, stderr=log)
        log.close()
        wait_for(lambda: listens(self.port))

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    @contextmanager
    def listener(self, **login: str) -> Iterator[list[tuple[str, str, bool]]]:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        client = Client(CallbackAPIVersion.VERSION2)
        subscribed = threading.Event()
        heard: list[tuple[str, str, bool]] = []
        client.on_connect = lambda *_: client.subscribe("#", qos=1)
        client.on_subscribe = lambda *_: subscribed.set()
        client.on_message = lambda _c, _d, got: heard.append((got.topic, got.payload.decode(), got.retain))
        if login:
            client.username_pw_set(login["user"], login["password"])
        client.reconnect_delay_set(1, 1)
        client.connect("127.0.0.1", self.port)
        client.loop_start()
        assert subscribed.wait(PATIENCE_S)
        try:
            yield heard
        finally:
            client.disconnect()
            client.loop_stop()


def make_broker(folder: Path, *, more: str = "allow_anonymous true") -> Broker:
    if not (shutil.which("mosquitto") or Path("/usr/sbin/mosquitto").exists()):
        pytest.skip("mosquitto is not installed (Debian's package of that name)")
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mosquitto.conf").write_text(f"user root\nlistener {port} 127.0.0.1\n{more}\n")
    return Broker(folder / "mosquitto.conf", port)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    made = make_broker(tmp_path / "broker")
    made.start()
    yield made
    made.stop()


def topics(heard: list[tuple[str, str, bool]], level: str) -> list[str]:
    return [payload for topic, payload, _ in heard if topic.endswith(level)]


class TestMqtt:
    def test_judgements_states_and_status(self, broker: Broker) -> None:
        with broker.listener() as heard:
            sink = opened(f"mqtt://127.0.0.1:{broker.port}/plant/line%201")
            for judgement in (passed(0, part_id="A-1"), on_a_web(1), faulty(2)):
                sink.write(judgement)
            sink.write_state(state("STALE", camera="left/1", fault="source_stale"))
            wait_for(lambda: len(topics(heard, "/judgement")) == 3 and topics(heard, "/status"))
            sink.close()
            sink.close()
            wait_for(lambda: len(topics(heard, "/status")) == 2)
        first, second, third = map(json.loads, topics(heard, "/judgement"))
        assert first["verdict"] == "PASS"
        assert first["part_id"] == "A-1"
        assert second["web"]["first_mm"] == 500.0
        assert second["regions"][0]["line"] == 5024
        assert (third["verdict"], third["fault"], third["score"]) == ("FAULT", "unreadable_image", None)
        assert topics(heard, "plant/line 1/status") == ["online", "offline"]
        (changed,) = map(json.loads, topics(heard, "plant/line 1/state/left_1"))
        assert (changed["type"], changed["state"], changed["fault"]) == ("state", "STALE", "source_stale")
        assert sink.counters == {"delivered": 6, "dropped": 0, "reconnects": 0, "connected": 0}
        with broker.listener() as later:
            wait_for(lambda: len(later) >= 2)
            assert all(retained for _, _, retained in later)
            assert {topic.rpartition("line 1/")[2] for topic, _, _ in later} == {"status", "state/left_1"}

    def test_the_last_will_says_offline(self, broker: Broker) -> None:
        """Of a process that is killed."""
        script = (
            "import sys, time; from recontrast_edge.sinks.mqtt import MqttSink; "
            "sink = MqttSink('127.0.0.1', int(sys.argv[1]), 'line'); time.sleep(60)"
        )
        with broker.listener() as heard:
            process = subprocess.Popen([sys.executable, "-c", script, str(broker.port)])
            try:
                wait_for(lambda: topics(heard, "/status") == ["online"], 30.0)
            finally:
                process.kill()
                process.wait()
            wait_for(lambda: topics(heard, "/status") == ["online", "offline"])

    def test_a_broker_that_is_gone_for_a_while(self, broker: Broker) -> None:
        sink = opened(f"mqtt://127.0.0.1:{broker.port}/line?queue=20")
        wait_for(lambda: sink.counters["connected"])
        wait_for(lambda: sink.counters["delivered"] == 1)
        broker.stop()
        wait_for(lambda: not sink.counters["connected"])
        started_s = time.monotonic()
        for index in range(200):
            sink.write(rejected(index))
        assert time.monotonic() - started_s < 2.0, "nobody waits for a broker"
        assert sink.counters["dropped"] == 180
        time.sleep(3.0)
        broker.start()
        assert wait_for(lambda: sink.counters["connected"]) < 2.0 + 1.0
        wait_for(lambda: sink.counters["delivered"] == 1 + 20 + 1)
        assert sink.counters["reconnects"] == 1
        sink.close()
        assert sink.counters["dropped"] == 180

    def test_without_a_broker_the_end_is_quick_and_the_loss_is_counted(self, no_leaks) -> None:
        sink = opened(f"mqtt://127.0.0.1:{free_port()}/line")
        for index in range(5):
            sink.write(rejected(index))
        started_s = time.monotonic()
        sink.close()
        assert time.monotonic() - started_s < 2.5
        assert sink.counters["dropped"] == 5
        assert "before 5 messages were delivered" in no_leaks.text

    def test_only_what_was_asked_for(self, broker: Broker) -> None:
        with broker.listener() as heard, closing(opened(f"mqtt://127.0.0.1:{broker.port}/line?which=not_pass")) as sink:
            for judgement in (passed(0), rejected(1), faulty(2)):
                sink.write(judgement)
            wait_for(lambda: len(topics(heard, "/judgement")) == 2)
        assert [json.loads(text)["frame_id"] for text in topics(heard, "/judgement")] == [1, 2]

    def test_passwords(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leaks) -> None:
        passwords = tmp_path / "passwords"
        program = shutil.which("mosquitto_passwd")
        if program is None:
            pytest.skip("mosquitto_passwd is not installed (Debian's package mosquitto)")
        subprocess.run([program, "-b", "-c", passwords, "line1", CANARY], check=True, capture_output=True)
        broker = make_broker(tmp_path, more=f"allow_anonymous false\npassword_file {passwords}")
        secret_file = tmp_path / "login"
        secret_file.write_text(f"line1:{CANARY}")
        secret_file.chmod(0o600)
        monkeypatch.setenv("MQTT_LOGIN", f"line1:{CANARY}")
        broker.start()
        try:
            for uri in (
                f"mqtt://line1:{ENCODED_CANARY}@127.0.0.1:{broker.port}/line",
                f"mqtt://127.0.0.1:{broker.port}/line?credentials=env:MQTT_LOGIN",
                f"mqtt://127.0.0.1:{broker.port}/line?credentials=file:{secret_file}",
            ):
                with closing(opened(uri)) as sink:
                    wait_for(lambda sink=sink: sink.counters["connected"])
                assert CANARY not in sink.uri
                assert "vogel" not in sink.uri
            with closing(opened(f"mqtt://line2:{ENCODED_CANARY}@127.0.0.1:{broker.port}/line")) as sink:
                wait_for(lambda: "the broker refuses the connection" in no_leaks.text)
                assert not sink.counters["connected"]
        finally:
            broker.stop()

    def test_tls_is_verified(self, tmp_path: Path, pki: Path, no_leaks) -> None:
        def tls(name: str) -> str:
            return f"allow_anonymous true\ncafile {pki}/ca.pem\ncertfile {pki}/{name}.pem\nkeyfile {pki}/{name}-key.pem"

        good = make_broker(tmp_path / "good", more=f"{tls('server')}\nrequire_certificate true")
        elsewhere = make_broker(tmp_path / "elsewhere", more=tls("elsewhere"))
        good.start()
        elsewhere.start()
        ours = f"ca={pki}/ca.pem&cert={pki}/client.pem&key={pki}/client-key.pem"
        try:
            with closing(opened(f"mqtts://127.0.0.1:{good.port}/line?{ours}")) as sink:
                sink.write(rejected())
                wait_for(lambda: sink.counters["delivered"] == 2)
            for uri, reason in (
                (f"mqtts://127.0.0.1:{good.port}/line", "certificate verify failed"),
                (f"mqtts://127.0.0.1:{good.port}/line?ca={pki}/another-ca.pem", "certificate verify failed"),
                (f"mqtts://a:{ENCODED_CANARY}@127.0.0.1:{elsewhere.port}/line?ca={pki}/ca.pem", "IP address mismatch"),
            ):
                no_leaks.clear()
                with closing(opened(uri)) as sink:
                    wait_for(lambda reason=reason: reason in no_leaks.text)
                    assert not sink.counters["connected"]
        finally:
            good.stop()
            elsewhere.stop()

    @pytest.mark.parametrize(
        ("uri", "message"),
        [
            ("mqtt:host/topic", "expected mqtt://HOST/TOPIC"),
            ("mqtt://host", "expected mqtt://HOST/TOPIC"),
            ("mqtt://host/a/#", "without wildcards"),
            ("mqtt://host/a/%23", "without wildcards"),
            ("mqtt://host/$SYS/x", "without wildcards"),
            ("mqtt://host:0/a", "port from 1 to 65535"),
            ("mqtt://host:1883x/a", "port from 1 to 65535"),
            ("mqtt:///a", "HOST"),
            ("mqtt://a..b/a", "host's name"),
            ("mqtt://host/a?quue=3", "did you mean 'queue'"),
            ("mqtt://host/a?ca=x", "unknown option 'ca'"),
            ("mqtt://host/a?which=good", "one of all"),
            ("mqtts://host/a?cert=x", "belong together"),
            (f"mqtt://a:{CANARY}@host/a?quue=3", "percent-encode"),
            (f"mqtt://a:{ENCODED_CANARY}@host/a?quue=3", "did you mean"),
        ],
    )
    def test_bad_uris_say_what_is_wrong(self, uri: str, message: str) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            sink_opener(uri)
        assert CANARY not in str(caught.value)
        assert "vogel" not in str(caught.value)

    def test_bad_certificates(self, tmp_path: Path, pki: Path) -> None:
        (tmp_path / "empty.pem").write_text("")
        for query in (
            f"ca={tmp_path}/absent.pem",
            f"ca={tmp_path}/empty.pem",
            f"cert={pki}/client.pem&key={pki}/server-key.pem",
        ):
            with pytest.raises(InputError, match=r"\.pem"):
                sink_opener(f"mqtts://host/line?{query}")


# Modbus


class Plc:
    """A pymodbus server that remembers when its coil changed."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.coil: list[tuple[float, bool]] = []
        self.registers: list[int] = []
        self.writes = 0
        self.refuses = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(self._listen())

    def _run(self, coroutine: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    async def _listen(self) -> Any:
        from pymodbus.server import ModbusTcpServer
        from pymodbus.simulator import DataType, SimData, SimDevice

        flags = SimData(0, values=[False] * 16, datatype=DataType.BITS)
        words = SimData(100, values=[0] * 40, datatype=DataType.REGISTERS)
        device = SimDevice(0, simdata=([flags], [flags], [words], [words]), action=self._written)
        server = ModbusTcpServer(device, address=("127.0.0.1", self.port))
        await server.serve_forever(background=True)
        return server

    async def _written(self, function, start, address, count, current, values) -> Any:
        from pymodbus.constants import ExcCodes

        if values is None:
            return None
        if self.refuses:
            return ExcCodes.ILLEGAL_ADDRESS
        self.writes += 1
        if function == 5:
            if not self.coil or self.coil[-1][1] != values[0]:
                self.coil.append((time.monotonic(), values[0]))
            assert address == 3
        elif function == 16:
            self.registers = list(values)
        return None

    def pulses(self) -> list[tuple[float, float]]:
        changes = self.coil[1:] if self.coil and not self.coil[0][1] else self.coil
        return [(on, off - on) for (on, _), (off, _) in zip(changes[::2], changes[1::2], strict=True)]

    def close(self) -> None:
        self._run(self._server.shutdown())
        self._run(asyncio.sleep(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def plc() -> Iterator[Plc]:
    pytest.importorskip("pymodbus")
    made = Plc(free_port())
    yield made
    made.close()


def unpacked(registers: list[int]) -> dict[str, Any]:
    """The documented map, read in a way of its own."""
    data = struct.pack(">40H", *registers)
    names = ("verdict", "state", "heartbeat", "fault")
    found: dict[str, Any] = dict(zip(names, struct.unpack(">4H", data[:8]), strict=True))
    found["score"], found["threshold"] = struct.unpack(">ff", data[8:16])
    names = ("judged", "passed", "rejected", "faults", "frame_id")
    found.update(zip(names, struct.unpack(">5I", data[16:36]), strict=True))
    (found["gate_in_ms"],) = struct.unpack(">h", data[36:38])
    found["n_regions"], *found["box"] = struct.unpack(">5H", data[38:48])
    found["part_id"] = data[48:80].rstrip(b"\0").decode()
    return found


class TestModbusClient:
    def test_a_pulse_at_the_gate(self, plc: Plc) -> None:
        sink = opened(f"modbus://127.0.0.1:{plc.port}/3?pulse_ms=80&lead_ms=20")
        wait_for(lambda: sink.counters["connected"])
        gate_s = time.monotonic() + 0.2
        for judgement in (passed(0, gate_s=gate_s), rejected(1, gate_s=gate_s), rejected(2, gate_s=gate_s - 60)):
            sink.write(judgement)
        sink.close()
        sink.close()
        ((began_s, length_s),) = plc.pulses()
        assert -0.001 <= began_s - (gate_s - 0.02) < 0.05
        assert abs(length_s - 0.08) < 0.05
        assert (sink.counters["pulses"], sink.counters["late"], sink.counters["dropped"]) == (1, 1, 0)
        assert plc.coil[-1][1] is False

    def test_registers_of_each_judgement(self, plc: Plc) -> None:
        sink = opened(f"modbus://127.0.0.1:{plc.port}/3?registers=100")
        sink.write(passed(0))
        sink.write(rejected(70_000, part_id="Teil-ü-0815"))
        wait_for(lambda: plc.registers and unpacked(plc.registers)["frame_id"] == 70_000)
        shown = unpacked(plc.registers)
        assert (shown["verdict"], shown["judged"], shown["passed"], shown["rejected"]) == (2, 2, 1, 1)
        assert shown["score"] == pytest.approx(1.6)
        assert shown["part_id"] == "Teil-ü-0815"
        sink.close()
        assert unpacked(plc.registers)["state"] == 4

    def test_a_plc_that_is_gone_for_a_while(self, no_leaks) -> None:
        plc = Plc(free_port())
        sink = opened(f"modbus://127.0.0.1:{plc.port}/3?pulse_ms=20")
        wait_for(lambda: sink.counters["connected"])
        plc.close()
        wait_for(lambda: not sink.counters["connected"])
        for index in range(3):
            sink.write(rejected(index))
        wait_for(lambda: sink.counters["pulses"] == 3)
        wait_for(lambda: sink.counters["dropped"] >= 1)
        back = Plc(plc.port)
        assert wait_for(lambda: sink.counters["connected"]) < 2.0 + 1.0
        time.sleep(0.2)
        assert not any(value for _, value in back.coil), "a part that has gone by moves nothing any more"
        sink.write(rejected(9))
        wait_for(lambda: [value for _, value in back.coil] == [False, True, False])
        sink.close()
        back.close()
        assert sink.counters["reconnects"] == 1

    def test_a_coil_that_the_plc_does_not_have(self, plc: Plc, no_leaks) -> None:
        plc.refuses = True
        with closing(opened(f"modbus://127.0.0.1:{plc.port}/3")) as sink:
            wait_for(lambda: sink.counters["refused"])
        assert "refuses to have its coil at 3 written" in no_leaks.text

    def test_without_a_plc_the_end_is_quick(self) -> None:
        sink = opened(f"modbus://127.0.0.1:{free_port()}/3?registers=100&pulse_ms=10")
        sink.write(rejected())
        started_s = time.monotonic()
        sink.close()
        assert time.monotonic() - started_s < 3.0
        assert sink.counters["dropped"] == 1

    @pytest.mark.parametrize(
        ("uri", "message"),
        [
            ("modbus://plc", "modbus://HOST"),
            ("modbus:plc/3", "modbus://HOST"),
            ("modbus://plc/coil", "whole number from 0 to 65535"),
            ("modbus://plc/65536", "whole number from 0 to 65535"),
            ("modbus://plc/1?registers=65500", "from 0 to 65496"),
            ("modbus://plc:99999/1", "port from 1 to 65535"),
            ("modbus-server://plc:502/1", "HOST"),
            ("modbus-server://127.0.0.1?unit=1", "unknown option"),
        ],
    )
    def test_bad_uris_say_what_is_wrong(self, uri: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            sink_opener(uri)


class TestModbusServer:
    @contextmanager
    def serving(self) -> Iterator[tuple[Sink, Any]]:
        from pymodbus.client import ModbusTcpClient

        port = free_port()
        sink = opened(f"modbus-server://127.0.0.1:{port}")
        client = ModbusTcpClient("127.0.0.1", port=port, timeout=PATIENCE_S)
        assert client.connect()
        try:
            yield sink, client
        finally:
            client.close()
            sink.close()
            sink.close()
            assert not listens(port)

    def test_the_map(self) -> None:
        with self.serving() as (sink, client):
            empty = unpacked(client.read_input_registers(0, count=40, device_id=1).registers)
            assert (empty["verdict"], empty["state"], empty["gate_in_ms"]) == (0, 0, -0x8000)
            assert math.isnan(empty["score"])
            sink.write(passed(0))
            now_s = time.monotonic()
            sink.write(rejected(1, gate_s=now_s + 1.5, part_id="x" * 40))
            wait_for(lambda: unpacked(client.read_input_registers(0, count=40).registers)["judged"] == 2)
            shown = unpacked(client.read_input_registers(0, count=40, device_id=7).registers)
            assert (shown["verdict"], shown["state"], shown["fault"]) == (2, 1, 0)
            assert (shown["n_regions"], shown["box"]) == (1, [16, 24, 32, 24])
            assert 1400 <= shown["gate_in_ms"] <= 1500
            assert shown["part_id"] == "x" * 32
            assert client.read_holding_registers(0, count=2).registers == [2, 1]
            assert client.read_discrete_inputs(0, count=4).bits[:4] == [False, True, False, True]
            sink.write(faulty(2))
            sink.write_state(state("STALE", camera="left", fault="source_stale"))
            wait_for(lambda: unpacked(client.read_input_registers(0, count=40).registers)["judged"] == 3)
            shown = unpacked(client.read_input_registers(0, count=40).registers)
            assert (shown["verdict"], shown["fault"], shown["faults"], shown["state"]) == (3, 1, 1, 2)
            assert math.isnan(shown["score"])
            before = shown["heartbeat"]
            wait_for(lambda: client.read_input_registers(2, count=1).registers[0] > before, 3.0)

    def test_nobody_writes(self) -> None:
        with self.serving() as (_, client):
            assert client.write_register(0, 5).isError()
            assert client.write_registers(0, [5, 6]).isError()
            assert client.write_coil(0, True).isError()
            assert client.mask_write_register(address=0, and_mask=0, or_mask=5).isError()
            assert client.read_input_registers(0, count=1).registers == [0]
            assert client.read_input_registers(39, count=2).isError()

    def test_a_port_that_is_taken(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(OutputError, match="cannot listen here"):
                opened(f"modbus-server://127.0.0.1:{taken.getsockname()[1]}")

    def test_loopback_unless_told_otherwise(self) -> None:
        from recontrast_edge.sinks.modbus import modbus_server_opener

        with closing(modbus_server_opener("modbus-server:", "//", "")()) as sink:
            assert sink.uri == "modbus-server://127.0.0.1:5020"


# OPC UA


async def read_nodes(client: Any) -> dict[str, Any]:
    index = await client.get_namespace_index("urn:recontrast-edge:inspection")
    inspection = await client.nodes.objects.get_child(f"{index}:Inspection")
    found = {}
    for node in await inspection.get_children():
        found[(await node.read_browse_name()).Name] = await node.read_value()
    return found


class TestOpcua:
    def test_nodes_follow_the_judgements(self) -> None:
        pytest.importorskip("asyncua")
        from asyncua import Client, ua

        port = free_port()
        sink = opened(f"opcua://127.0.0.1:{port}")
        assert sink.uri == f"opcua://127.0.0.1:{port}"

        async def client_side() -> tuple[dict, dict, list[str]]:
            async with Client(f"opc.tcp://127.0.0.1:{port}/") as client:
                before = await read_nodes(client)
                node = client.get_node("ns=2;s=Inspection.Verdict")
                refused = []
                for value in ("PASS", 1):
                    with pytest.raises(ua.UaStatusCodeError) as caught:
                        await node.write_value(value)
                    refused.append(type(caught.value).__name__)
                with pytest.raises(ua.UaStatusCodeError, match="Bad"):
                    await client.nodes.objects.add_object(2, "intruder")
                for judgement in (passed(0), faulty(1), on_a_web(2)):
                    sink.write(judgement)
                while await client.get_node("ns=2;s=Inspection.Judged").read_value() < 3:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.1)
                return before, await read_nodes(client), refused

        before, after, refused = asyncio.run(asyncio.wait_for(client_side(), 60))
        assert (before["State"], before["Verdict"], before["Judged"]) == ("CONNECTING", "", 0)
        assert refused == ["BadUserAccessDenied"] * 2
        assert (after["State"], after["Verdict"], after["Judged"], after["Faults"]) == ("RUNNING", "REJECT", 3, 1)
        assert after["Score"] == 1.6
        assert (after["DefectX"], after["DefectY"], after["DefectLine"]) == ([16], [24], [5024])
        assert json.loads(after["Record"])["frame_id"] == 2
        sink.close()
        sink.close()
        assert not listens(port)

    def test_a_password_and_encryption(self, pki: Path) -> None:
        pytest.importorskip("asyncua")
        from asyncua import Client, ua
        from asyncua.crypto.security_policies import SecurityPolicyBasic256Sha256

        port = free_port()
        uri = f"opcua://plc:{ENCODED_CANARY}@127.0.0.1:{port}?cert={pki}/server.pem&key={pki}/server-key.pem"
        sink = opened(uri)
        assert "vogel" not in sink.uri

        async def connect(user: str | None, password: str | None, *, encrypted: bool) -> str:
            client = Client(f"opc.tcp://127.0.0.1:{port}/")
            client.application_uri = "urn:test-client"
            if user is not None:
                client.set_user(user)
                client.set_password(password)
            try:
                if encrypted:
                    await client.set_security(
                        SecurityPolicyBasic256Sha256,
                        f"{pki}/client.pem",
                        f"{pki}/client-key.pem",
                        mode=ua.MessageSecurityMode.SignAndEncrypt,
                    )
                async with client:
                    return (await read_nodes(client))["State"]
            except (ua.UaError, ConnectionError, TimeoutError, asyncio.TimeoutError) as error:
                return type(error).__name__

        async def client_side() -> list[str]:
            return [
                await connect("plc", CANARY, encrypted=True),
                await connect("plc", "wrong", encrypted=True),
                await connect("admin", "", encrypted=True),
                await connect(None, None, encrypted=True),
                await connect("plc", CANARY, encrypted=False),
            ]

        good, *others = asyncio.run(asyncio.wait_for(client_side(), 90))
        sink.close()
        assert good == "CONNECTING"
        assert "CONNECTING" not in others

    def test_refused(self, tmp_path: Path, pki: Path) -> None:
        pytest.importorskip("asyncua")
        with pytest.raises(UsageError, match="a password needs encryption"):
            sink_opener(f"opcua://plc:{ENCODED_CANARY}@0.0.0.0:4840")
        with pytest.raises(UsageError, match="belong together"):
            sink_opener("opcua://127.0.0.1?cert=x")
        (tmp_path / "broken.pem").write_text("no key")
        with pytest.raises(InputError, match=r"broken\.pem"):
            opened(f"opcua://127.0.0.1:{free_port()}?cert={pki}/server.pem&key={tmp_path}/broken.pem")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(OutputError, match="cannot listen here"):
                opened(f"opcua://127.0.0.1:{taken.getsockname()[1]}")


# Webhooks


class Hook(ThreadingHTTPServer):
    """Remembers what was posted; answers with the statuses that were set, then with 204."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.posted: list[tuple[str, dict[str, str], Any]] = []
        self.statuses: list[int] = []
        self.location = ""
        self.delay_s = 0.0
        self.connections = 0
        hook = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                hook.posted.append((self.path, headers, json.loads(body)))
                time.sleep(hook.delay_s)
                self.send_response(hook.statuses.pop(0) if hook.statuses else 204)
                if hook.location:
                    self.send_header("Location", hook.location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.port = self.server_address[1]
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, *_: object) -> None:
        pass

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


@pytest.fixture
def hook() -> Iterator[Hook]:
    made = Hook()
    yield made
    made.close()


class TestWebhook:
    def test_rejects_and_faults_are_posted_over_one_connection(self, hook: Hook) -> None:
        sink = opened(f"webhook:http://127.0.0.1:{hook.port}/mes/inspection?query=line%3D1")
        for judgement in (passed(0), rejected(1, part_id="ü"), faulty(2)):
            sink.write(judgement)
        sink.write_state(state("STALE", fault="source_stale"))
        sink.close()
        sink.close()
        assert [body.get("frame_id", body.get("type")) for _, _, body in hook.posted] == [1, 2, "state"]
        path, headers, body = hook.posted[0]
        assert (path, headers["content-type"], body["part_id"]) == ("/mes/inspection?line=1", "application/json", "ü")
        assert hook.connections == 1
        assert sink.counters == {"delivered": 3, "retries": 0, "dropped": 0}

    def test_again_after_a_failure_in_order(self, hook: Hook, no_leaks) -> None:
        hook.statuses = [503, 500]
        sink = opened(f"webhook:http://127.0.0.1:{hook.port}/")
        sink.write(rejected(1))
        sink.write(rejected(2))
        wait_for(lambda: sink.counters["delivered"] == 2)
        sink.close()
        assert [body["frame_id"] for _, _, body in hook.posted] == [1, 1, 1, 2]
        assert sink.counters["retries"] == 2
        assert "cannot deliver (status 503)" in no_leaks.text

    def test_a_dead_server_bounds_everything(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from recontrast_edge.sinks import webhook

        monkeypatch.setattr(webhook, "FIRST_PAUSE_S", 0.01)
        sink = opened(f"webhook:http://127.0.0.1:{free_port()}/")
        started_s = time.monotonic()
        for index in range(1000):
            sink.write(faulty(index))
        assert time.monotonic() - started_s < 2.0, "nobody waits for a server"
        assert sink.counters["dropped"] >= 1000 - webhook.QUEUED_MESSAGES - 100
        sink.close()
        assert time.monotonic() - started_s < 5.0
        assert sink.counters["dropped"] == 1000

    def test_a_server_that_hangs_does_not_keep_the_end(self, hook: Hook) -> None:
        hook.delay_s = 3.0
        sink = opened(f"webhook:http://127.0.0.1:{hook.port}/?timeout_ms=300")
        sink.write(rejected())
        wait_for(lambda: hook.posted)
        started_s = time.monotonic()
        sink.close()
        assert time.monotonic() - started_s < 2.0
        assert sink.counters["dropped"] == 1

    def test_redirects_are_not_followed(self, hook: Hook) -> None:
        other = Hook()
        hook.statuses, hook.location = [307] * 9, f"http://127.0.0.1:{other.port}/stolen"
        sink = opened(f"webhook:http://a:{ENCODED_CANARY}@127.0.0.1:{hook.port}/")
        sink.write(rejected())
        wait_for(lambda: len(hook.posted) >= 2)
        sink.close()
        other.close()
        assert other.posted == []

    @pytest.mark.parametrize("auth", ["basic", "bearer"])
    def test_passwords(self, auth: str, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
        import base64

        monkeypatch.setenv("HOOK", "line1:canary-token")
        sink = opened(f"webhook:http://127.0.0.1:{hook.port}/?credentials=env:HOOK&auth={auth}")
        sink.write(rejected())
        sink.close()
        ((_, headers, _),) = hook.posted
        basic = "Basic " + base64.b64encode(b"line1:canary-token").decode()
        assert headers["authorization"] == {"basic": basic, "bearer": "Bearer canary-token"}[auth]

    def test_tls_is_verified(self, pki: Path, no_leaks) -> None:
        def serving(name: str) -> Hook:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pki / f"{name}.pem", pki / f"{name}-key.pem")
            return Hook(context)

        good, elsewhere = serving("server"), serving("elsewhere")
        try:
            with closing(opened(f"webhook:https://127.0.0.1:{good.port}/?ca={pki}/ca.pem")) as sink:
                sink.write(rejected())
                wait_for(lambda: sink.counters["delivered"] == 1)
            for uri, reason in (
                (f"webhook:https://a:{ENCODED_CANARY}@127.0.0.1:{good.port}/", "certificate verify failed"),
                (f"webhook:https://127.0.0.1:{elsewhere.port}/?ca={pki}/ca.pem", "IP address mismatch"),
            ):
                no_leaks.clear()
                with closing(opened(uri)) as sink:
                    sink.write(rejected())
                    wait_for(lambda reason=reason: reason in no_leaks.text)
            assert (len(good.posted), elsewhere.posted) == (1, [])
        finally:
            good.close()
            elsewhere.close()

    @pytest.mark.parametrize(
        ("uri", "message"),
        [
            ("webhook:host/path", "webhook:https://HOST/PATH"),
            ("webhook:ftp://host/path", "webhook:https://HOST/PATH"),
            ("webhook:https://host:port/path", "port from 1 to 65535"),
            ("webhook:https://host/pa th", "percent-encode"),
            ("webhook:https://host/path?line=1", "unknown option 'line'"),
            ("webhook:http://host/path?ca=x", "needs https"),
            ("webhook:https://host/?auth=digest", "one of basic, bearer"),
            ("webhook:https://host/?timeout_ms=1", "from 10 to 60000"),
        ],
    )
    def test_bad_uris_say_what_is_wrong(self, uri: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            sink_opener(uri)


# All of it, from the command line


def test_no_password_is_shown_whatever_fails(tiny_model: Path, tmp_path: Path, pki: Path, monkeypatch) -> None:
    """Refused connection, wrong password, failed TLS; from the URI, the environment and a file; and a broker that hangs
    does not keep SIGTERM from ending it all in time."""
    secret_file = tmp_path / "login"
    secret_file.write_text(f"line1:{CANARY}")
    secret_file.chmod(0o600)
    with_tls = f"allow_anonymous true\ncertfile {pki}/elsewhere.pem\nkeyfile {pki}/elsewhere-key.pem"
    brokers = [make_broker(tmp_path / "closed", more="allow_anonymous false"), make_broker(tmp_path / "open")]
    brokers.append(make_broker(tmp_path / "tls", more=with_tls))
    for broker in brokers:
        broker.start()
    closed, hanging, tls = brokers
    outputs = [
        f"mqtt://line1:{ENCODED_CANARY}@127.0.0.1:{free_port()}/refused",
        f"mqtt://127.0.0.1:{closed.port}/wrong?credentials=env:CANARY_LOGIN",
        f"mqtt://127.0.0.1:{hanging.port}/hangs?credentials=file:{quote(str(secret_file))}",
        f"mqtts://127.0.0.1:{tls.port}/tls?credentials=file:{quote(str(secret_file))}&ca={pki}/ca.pem",
        f"webhook:http://line1:{ENCODED_CANARY}@127.0.0.1:{free_port()}/hook?which=all",
        f"webhook:https://127.0.0.1:{tls.port}/hook?which=all&credentials=env:CANARY_LOGIN&auth=bearer",
        f"opcua://line1:{ENCODED_CANARY}@127.0.0.1:{free_port()}",
        f"modbus://127.0.0.1:{free_port()}/1",
        f"jsonl:{tmp_path}/out/r.jsonl",
    ]
    command = [sys.executable, "-m", "recontrast_edge", "run", "--engine", str(tiny_model), "--threads", "1"]
    command += ["--source", "synthetic://mixed?fps=30&size=64x64", "--summary", f"{tmp_path}/out/summary.json"]
    command += [argument for output in outputs for argument in ("--output", output)]
    environment = {**os.environ, "CANARY_LOGIN": f"line1:{CANARY}", "PYTHONPATH": os.pathsep.join(sys.path)}
    log = (tmp_path / "log").open("wb")
    with subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process:
        records = tmp_path / "out" / "r.jsonl"
        wait_for(lambda: records.exists() and records.read_text().count("\n") > 40, 60.0)
        assert hanging.process is not None
        hanging.process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        stopped_s = time.monotonic()
        # The interpreter's own end comes after that.
        wait_for((tmp_path / "out" / "summary.json").exists)
        took_s = time.monotonic() - stopped_s
        process.wait(60.0)
    log.close()
    for broker in brokers:
        broker.stop()
    shown = (tmp_path / "log").read_text()
    assert process.returncode == 0, shown
    assert took_s < 5.0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["stopped_by"] == "signal"
    states = [output["counters"] for output in summary["outputs"]]
    assert [counters.get("connected") for counters in states[:4]] == [0, 0, 0, 0]
    assert all(counters["dropped"] > 0 for counters in states[:2])
    for reason in ("Connection refused", "the broker refuses the connection", "certificate verify failed"):
        assert reason in shown
    looked_at = [path for path in (tmp_path / "log", *(tmp_path / "out").iterdir())]
    for text in (path.read_text() for path in looked_at):
        for spelling in (CANARY, ENCODED_CANARY, quote(CANARY), json.dumps(CANARY)[1:-1]):
            assert spelling not in text


@pytest.mark.soak
def test_a_broker_that_is_gone_for_a_minute_costs_no_memory(broker: Broker) -> None:
    """At 200 judgements a second: once the queue is full, the process does not grow."""
    gone_s = float(os.environ.get("RECONTRAST_SOAK_BROKER_S", "60"))

    def resident_mib() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    with closing(opened(f"mqtt://127.0.0.1:{broker.port}/line")) as sink:
        wait_for(lambda: sink.counters["delivered"] == 1)  # its "online", which would else wait along
        broker.stop()
        started_s, written, resident = time.monotonic(), 0, 0.0
        while time.monotonic() - started_s < gone_s:
            sink.write(rejected(written))
            written += 1
            time.sleep(0.005)
            if written == 2000:
                resident = resident_mib()
        assert resident > 0, "RECONTRAST_SOAK_BROKER_S is too short"
        assert resident_mib() - resident < 5.0
        assert sink.counters["dropped"] == written - 1000
        broker.start()
        assert wait_for(lambda: sink.counters["connected"]) < 2.0
        wait_for(lambda: sink.counters["delivered"] == 1 + 1000 + 1)


# The page about outputs


OUTPUTS = (Path(__file__).parents[2] / "docs" / "outputs.md").read_text(encoding="utf-8")


def test_the_numbers_of_faults_are_documented() -> None:
    from recontrast_edge.sinks.modbus import FAULT_NUMBERS, OTHER_FAULT
    from recontrast_edge.verdict import Fault

    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|$", OUTPUTS, re.MULTILINE)
    assert {code: int(number) for number, code in rows} == FAULT_NUMBERS
    assert set(FAULT_NUMBERS) == {fault.value for fault in Fault}, "a new code gets a new number"
    assert len(set(FAULT_NUMBERS.values())) == len(FAULT_NUMBERS)
    assert f"| {OTHER_FAULT} | another |" in OUTPUTS


def test_every_node_is_documented() -> None:
    from recontrast_edge.sinks.opcua import values
    from recontrast_edge.sinks.progress import Progress

    body = OUTPUTS.partition("\n## OPC UA\n")[2].partition("\n| option |")[0]
    named = {
        name for line in re.findall(r"^\| (`[^|]+) \|", body, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)
    }
    assert named == set(values(Progress())) | {"Version"}


def test_messages_have_the_documented_fields() -> None:
    judgement, change = (
        json.loads(block) for block in re.findall(r"```json\n(.*?)```", OUTPUTS, re.DOTALL) if '"lost"' not in block
    )
    assert list(judgement) == list(rejected().record())
    assert list(change) == list(state("STALE").record())


@pytest.mark.parametrize("scheme", sorted(_SCHEMES))
def test_every_scheme_and_option_is_documented(scheme: str) -> None:
    """The names come from what is said of an option that nobody knows."""
    rest = {"modbus": "//h/1", "mqtt": "//h/t", "mqtts": "//h/t", "gpiochip": "0/1", "webhook": "https://h/"}
    target = rest.get(scheme, "//127.0.0.1" if scheme in ("opcua", "modbus-server") else "x.mp4")
    with pytest.raises(UsageError, match="known: ") as caught:
        sink_opener(f"{scheme}:{target}?qqqqqq=1")
    known = str(caught.value).partition("known: ")[2].split(", ")
    assert f"`{scheme}:" in OUTPUTS
    assert not [name for name in known if name != "none" and f"`{name}`" not in OUTPUTS and f"?{name}=" not in OUTPUTS]
