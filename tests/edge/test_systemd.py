from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recontrast_edge.errors import (
    EXIT_FAULTS,
    GpuError,
    GpuNotReadyError,
    InputError,
    MissingError,
    ModelError,
    UsageError,
)
from recontrast_edge.pipeline import Line
from recontrast_edge.systemd import UNIT_NAME, Notifier, unit
from tests.edge.fakes_line import FakeSource, Wrapped, endless, frame, plan, run_line

ROOT = Path(__file__).parents[2]


class Manager:
    """The receiving end, as systemd has it."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)
        self.environment = {"NOTIFY_SOCKET": address.replace("\0", "@")}

    def received(self) -> list[str]:
        messages = []
        while True:
            try:
                messages.append(self._socket.recv(65536).decode())
            except BlockingIOError:
                return messages

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["a path", "an abstract name"])
def manager(request, tmp_path: Path) -> Iterator[Manager]:
    abstract = f"\0recontrast-edge-test-{os.getpid()}-{time.monotonic_ns()}"
    opened = Manager(str(tmp_path / "notify") if request.param == "a path" else abstract)
    yield opened
    opened.close()


def test_messages(manager: Manager) -> None:
    notifier = Notifier(manager.environment)
    notifier.ready()
    for status in ("two\nlines", "two\nlines", "another"):
        notifier.status(status)
    notifier.alive()
    notifier.stopping()
    notifier.close()
    notifier.close()
    notifier.ready()
    assert manager.received() == ["READY=1", "STATUS=two lines", "STATUS=another", "STOPPING=1"]


@pytest.mark.parametrize("process", [None, str(os.getpid())], ids=["any process", "this process"])
def test_the_watchdog_is_fed_as_often_as_it_must_be(manager: Manager, process: str | None) -> None:
    environment = {**manager.environment, "WATCHDOG_USEC": "400000"}
    if process is not None:
        environment["WATCHDOG_PID"] = process
    notifier = Notifier(environment)
    assert notifier.patience_s == 0.2
    until_s = time.monotonic() + 0.55
    while time.monotonic() < until_s:
        notifier.alive()
        time.sleep(0.005)
    notifier.close()
    assert 2 <= manager.received().count("WATCHDOG=1") <= 6


@pytest.mark.parametrize(
    "watchdog", [{"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "0"}, {}]
)
def test_a_watchdog_that_is_not_for_us_is_not_fed(manager: Manager, watchdog: dict[str, str]) -> None:
    notifier = Notifier({**manager.environment, **watchdog})
    notifier.alive()
    notifier.close()
    assert manager.received() == []


def test_without_systemd_nothing_happens(tmp_path: Path) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": str(tmp_path / "nobody listens")}):
        notifier = Notifier(environment)
        notifier.ready()
        notifier.status("fine")
        notifier.alive()
        notifier.close()


def test_a_manager_that_does_not_read_stops_nobody(manager: Manager) -> None:
    notifier = Notifier(manager.environment)
    started_s = time.monotonic()
    for index in range(5000):
        notifier.status(f"{index} " + "x" * 1000)
    notifier.close()
    assert time.monotonic() - started_s < 5


@pytest.fixture
def in_service(manager: Manager, monkeypatch) -> Manager:
    """This process, as one that systemd started, with a watchdog of 0.8 s."""
    for name, value in {**manager.environment, "WATCHDOG_USEC": "800000"}.items():
        monkeypatch.setenv(name, value)
    return manager


@pytest.mark.parametrize("manager", ["a path"], indirect=True)
def test_a_line_is_ready_when_every_camera_runs(engine, in_service: Manager) -> None:
    stop, plugged_in = threading.Event(), threading.Event()

    def late():
        plugged_in.wait()
        yield from (frame(index) for index in range(10**6))

    plans = [
        plan(engine, endless(0.01), name="a"),
        plan(engine, FakeSource(late(), live=True, interval_s=0.01), name="b"),
    ]
    runner = threading.Thread(target=run_line, args=(Line(plans, stop=stop),))
    runner.start()
    time.sleep(0.7)
    early = in_service.received()
    plugged_in.set()
    time.sleep(0.7)
    stop.set()
    runner.join(10)
    later = in_service.received()
    assert "READY=1" not in early
    assert "WATCHDOG=1" in early
    assert any(message.startswith("STATUS=") and "b is CONNECTING" in message for message in early)
    assert (later.count("READY=1"), later[-1]) == (1, "STOPPING=1")


@pytest.mark.parametrize("manager", ["a path"], indirect=True)
def test_the_watchdog_starves_when_judging_hangs(engine, in_service: Manager) -> None:
    hung, released, stop = threading.Event(), threading.Event(), threading.Event()

    def hang() -> None:
        hung.set()
        released.wait()

    line = Line([plan(Wrapped(engine, hang), endless(0.01))], stop=stop, engine_timeout_s=60.0)
    runner = threading.Thread(target=run_line, args=(line,))
    runner.start()
    hung.wait()
    time.sleep(0.5)
    in_service.received()
    time.sleep(0.7)
    while_hanging = in_service.received()
    released.set()
    time.sleep(0.5)
    afterwards = in_service.received()
    stop.set()
    runner.join(10)
    assert "WATCHDOG=1" not in while_hanging
    assert "WATCHDOG=1" in afterwards


def test_the_unit_says_what_the_documentation_says(tmp_path: Path) -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "recontrast_edge.systemd"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert printed == unit(f"{sys.executable} -m recontrast_edge")
    settings = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line and not line.startswith("#"))
    assert settings["Type"] == "notify"
    assert settings["ExecStart"].startswith(f"{sys.executable} -m recontrast_edge run ")
    # Trying again does not help against these; anything else may have been the camera.
    hopeless = {UsageError, InputError, ModelError, MissingError}
    assert {int(code) for code in settings["RestartPreventExitStatus"].split()} == {cls.exit_code for cls in hopeless}
    assert not {GpuError.exit_code, GpuNotReadyError.exit_code} & {cls.exit_code for cls in hopeless}
    assert settings["SuccessExitStatus"] == str(EXIT_FAULTS)
    # Longer than the engine's timeout until it is given up, and than a stop takes.
    assert int(settings["WatchdogSec"]) > 15
    assert int(settings["TimeoutStopSec"]) > 5
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: the unit's syntax was not checked")
    instance = tmp_path / UNIT_NAME.replace("@", "@press")
    instance.write_text(printed)
    checked = subprocess.run(["systemd-analyze", "verify", "--man=no", instance], capture_output=True, text=True)
    assert instance.name not in checked.stderr, checked.stderr
