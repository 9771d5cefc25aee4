"""Aravis' simulated GigE Vision camera, in a network namespace of its own, and what the tests do with it there.

A process can be moved into a namespace only as a whole, and PyGObject may live beside the system's Python only: so each
scenario below is a process, which prints what it saw as JSON.

    outcome = in_namespace("frames", "aravis:Aravis-Fake-GV07", "5")
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

CAMERA = "arv-fake-gv-camera-0.8"
SYSTEM_PACKAGES = "/usr/lib/python3/dist-packages"
URI = "aravis:Aravis-Fake-GV07"
ROOT = Path(__file__).parents[2]
UNSHARE = ("unshare", "--user", "--map-root-user", "--net")


@cache
def missing() -> str | None:
    """Why the scenarios cannot run here; None if they can."""
    if shutil.which(CAMERA) is None:
        return f"{CAMERA} is not installed (Debian: aravis-tools)"
    try:
        subprocess.run([*UNSHARE, "true"], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"network namespaces are not permitted here ({error})"
    code = "import gi; gi.require_version('Aravis', '0.8'); from gi.repository import Aravis"
    done = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, timeout=60)
    if done.returncode:
        return f"no PyGObject for this Python (Debian: gir1.2-aravis-0.8 python3-gi): {done.stderr.strip()[-200:]}"
    return None


def _environment() -> dict[str, str]:
    # Last: the system's NumPy must not hide ours.
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), SYSTEM_PACKAGES])}


def in_namespace(*arguments: str, timeout_s: float = 120.0, **environment: str) -> Any:
    """What a scenario saw."""
    command = [*UNSHARE, sys.executable, "-m", "tests.edge.gige_camera", *arguments]
    variables = {**_environment(), **environment}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


# Inside of the namespace.


def _loopback_up() -> None:
    """As ``ip link set lo up``."""
    set_flags, up_and_running = 0x8914, 0x41
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh14x", b"lo", up_and_running))


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen([CAMERA, "-i", "127.0.0.1", "-s", "GV07"])


def _wait_for_camera() -> None:
    """Until it listens on the port of the control protocol."""
    give_up_s = time.monotonic() + 20
    while ":0F74 " not in Path("/proc/net/udp").read_text():
        assert time.monotonic() < give_up_s, "the simulated camera does not start"
        time.sleep(0.01)


@contextlib.contextmanager
def _camera() -> Iterator[subprocess.Popen[bytes]]:
    camera = _start()
    try:
        _wait_for_camera()
        yield camera
    finally:
        camera.kill()
        camera.wait()


def frames(uri: str, wanted: str) -> Any:
    """Reads frames; what they say of themselves."""
    from recontrast_edge.sources import open_source

    with _camera(), contextlib.closing(open_source(uri)) as source:
        seen: list[Any] = []
        while len(seen) < int(wanted):
            frame = source.read(10.0)
            assert frame is not None
            shape = None if frame.image is None else frame.image.shape
            seen.append(
                (frame.frame_id, frame.camera_frame_id, frame.camera_time_ns, frame.part_id, shape, frame.fault)
            )
        return {"frames": seen, "counters": source.counters, "triggered": source.triggered}


def refusals(*uris: str) -> Any:
    """Opens what cannot be opened; the errors' classes and messages."""
    from recontrast_edge.errors import RecontrastError
    from recontrast_edge.sources import open_source

    found = []
    with _camera():
        for uri in uris:
            try:
                open_source(uri).close()
            except RecontrastError as error:
                found.append((type(error).__name__, str(error)))
            else:
                found.append(("opened", ""))
    return found


def killed() -> Any:
    """Kills the camera while it delivers, and starts it again: how long until the one and the other are noticed."""
    from recontrast_edge.errors import SourceError
    from recontrast_edge.sources import open_source

    with _camera() as camera:
        source = open_source(URI)
        for _ in range(20):
            assert source.read(10.0) is not None
        camera.kill()
        camera.wait()
        killed_s = time.monotonic()
        try:
            while True:
                source.read(0.1)
        except SourceError as error:
            noticed_s, message = time.monotonic() - killed_s, str(error)
        closing_s = time.monotonic()
        source.close()
        closed_s = time.monotonic() - closing_s
        attempts = 0
    time.sleep(2.0)
    with _camera():
        returned_s = time.monotonic()
        while True:
            attempts += 1
            assert time.monotonic() - returned_s < 60
            try:
                with contextlib.closing(open_source(URI)) as source:
                    frame = source.read(2.0)
            except SourceError:
                # As the supervisor does.
                time.sleep(0.2)
                continue
            if frame is not None and frame.image is not None:
                running_s = time.monotonic() - returned_s
                return {"noticed_s": noticed_s, "closed_s": closed_s, "running_s": running_s, "message": message}


def reopened(times: str) -> Any:
    """Opens, reads and closes again and again; raises if anything stays behind."""
    with _camera():
        reopen(URI, int(times))
    return "nothing stays behind"


def reopen(uri: str, times: int) -> None:
    """The same, for any source."""
    from recontrast_edge.sources import open_source
    from tests.edge.leaks import assert_reopening_leaves_nothing

    def use() -> None:
        with contextlib.closing(open_source(uri)) as source:
            for _ in range(2):
                assert source.read(20.0) is not None

    assert_reopening_leaves_nothing(use, times=times)


def listed() -> Any:
    """What ``recontrast-edge cameras`` says."""
    with _camera():
        command = [sys.executable, "-m", "recontrast_edge", "cameras", "--json"]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout)


if __name__ == "__main__":
    _loopback_up()
    scenarios = {scenario.__name__: scenario for scenario in (frames, refusals, killed, reopened, listed)}
    print("\n" + json.dumps(scenarios[sys.argv[1]](*sys.argv[2:])))
