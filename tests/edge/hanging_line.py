"""A line of which one part hangs in C, where no signal and no exception reaches it.

python -m tests.edge.hanging_line engine summary.json

Says ``hanging`` on standard output once it does, and then waits for SIGTERM.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from pathlib import Path
from threading import Event

from recontrast_edge import cli
from recontrast_edge.cli.run import finish
from recontrast_edge.engines import open_engine
from recontrast_edge.frame import Frame, Judgement, Source
from recontrast_edge.pipeline import Line, stop_on_signals
from tests.edge.fakes_line import FakeSink, FakeSource, Wrapped, endless, frame, plan


def hang() -> None:
    print("hanging", flush=True)
    while True:
        ctypes.CDLL(None).sleep(1000)


def hang_open() -> Source:
    hang()
    raise AssertionError


class HangingRead(FakeSource):
    def read(self, timeout_s: float) -> Frame | None:
        hang()
        return None


class HangingClose(FakeSource):
    def close(self) -> None:
        hang()


class HangingSink(FakeSink):
    def write(self, judgement: Judgement) -> None:
        hang()


def after_some(count: int) -> None:
    global inferences
    inferences += 1
    if inferences == count:
        hang()


inferences = 0


@cli.app.command("hang")
def hang_command(part: str, summary: Path) -> None:
    """Run a line of which one part hangs."""
    stop = Event()
    pictures = (frame(index) for index in itertools.count())
    with open_engine("demo", threads=1) as engine:
        camera, used, sinks = {
            "nothing": (endless(0.1), engine, []),
            "open": (hang_open, engine, []),
            "read": (HangingRead([], live=True), engine, []),
            "close": (HangingClose(pictures, live=True, interval_s=0.1), engine, []),
            "engine": (endless(0.1), Wrapped(engine, lambda: after_some(3)), []),
            "engine of a file": (FakeSource(pictures, interval_s=0.1), Wrapped(engine, lambda: after_some(3)), []),
            "sink": (endless(0.1), engine, [HangingSink()]),
            "sink of a file": (FakeSource(pictures, interval_s=0.1), engine, [HangingSink(), FakeSink()]),
        }[part]
        if part in ("nothing", "close"):
            print("hanging", flush=True)
        with stop_on_signals(stop), Line([plan(used, camera)], stop=stop) as line:
            line.run(sinks)
            line.write_summary(summary)
    finish(line, to_stderr=True)


if __name__ == "__main__":
    sys.argv.insert(1, "hang")
    cli.main()
