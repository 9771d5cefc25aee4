"""An RTSP camera in a process of its own, which tests can stop, kill and start again.

with RtspCamera() as camera: open_source(camera.uri)
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recontrast_edge.preprocess import Image

SERVER = Path(__file__).with_name("rtsp_server.py")
PYTHON = "/usr/bin/python3"
BITS = 32


@cache
def _missing() -> str | None:
    code = (
        "import gi; gi.require_version('Gst', '1.0'); gi.require_version('GstRtspServer', '1.0')\n"
        "from gi.repository import Gst, GstRtspServer; Gst.init(None)\n"
        "print([name for name in ('x264enc', 'rtph264pay', 'videoconvert') if not Gst.ElementFactory.find(name)])"
    )
    try:
        done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, timeout=60)
    except OSError as error:
        return str(error)
    return None if done.stdout.strip() == "[]" else done.stdout + done.stderr[-200:]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class RtspCamera:
    """GStreamer's RTSP server; ``options`` are those of ``rtsp_server.py``. Skips the test where it cannot run."""

    def __init__(self, **options: object) -> None:
        if reason := _missing():
            pytest.skip(f"GStreamer's RTSP server cannot run; .ci/run lists the Debian packages ({reason})")
        self.port = free_port()
        self.uri = f"{'rtsps' if 'certificate' in options else 'rtsp'}://127.0.0.1:{self.port}/cam"
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        self._command = [PYTHON, str(SERVER), f"--port={self.port}", *arguments]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> RtspCamera:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()


def lag_ms(image: Image) -> float:
    """Milliseconds since the picture was made, which it shows itself."""
    bar = image.shape[1] // BITS
    bits = image[image.shape[0] // 2].mean(axis=1)[bar // 2 :: bar] > 128
    made_ms = int("".join(map(str, bits.astype(np.uint8))), 2)
    return (time.monotonic() * 1e3 - made_ms) % 2**BITS


def stop(camera: RtspCamera) -> None:
    camera.signal(signal.SIGSTOP)
    # The signal takes effect some time later.
    assert camera._process is not None
    while Path(f"/proc/{camera._process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        os.sched_yield()
