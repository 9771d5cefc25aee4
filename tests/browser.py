"""A page in headless Chromium, driven over its DevTools protocol; a context manager.

    with Browser(chromium) as browser:
        page = browser.visit(Path("report.html").as_uri(), width=390)

The protocol's messages, JSON and each ended by a zero byte, go through two pipes: no port is opened, no driver needed.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT_S = 60.0


def find_chromium() -> str | None:
    """The program, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """What came of a visit.

    Attributes:
        requests: URLs that were asked for, the page's own first; data URIs are none.
        problems: console messages of any kind, exceptions and log entries.
        width: of the page's content, in CSS pixels; more than the window's means that it must be scrolled sideways.
        outside: texts of elements that reach beyond the window's right or left edge.
        screenshot_png: the whole page.
    """

    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    width: int = 0
    outside: list[str] = field(default_factory=list)
    screenshot_png: bytes = b""


class Browser:
    """One Chromium process, its profile in a temporary folder."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # The protocol wants descriptors 3 and 4; a shell puts them there, without racing other threads for numbers.
        script = f'exec 3<&{to_browser} 4>&{from_browser} && exec "$0" "$@"'
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += [f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe", "--hide-scrollbars"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, program, *options, "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._last_id = 0
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process; may be called again."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            os.close(self._write)
            os.close(self._read)
        self._profile.cleanup()

    def visit(self, url: str, *, width: int, height: int = 900, media: str = "screen") -> Page:
        """Load a page in a window of that size, in CSS pixels, and look at it; as printed with ``media="print"``."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable", session)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", session, **metrics)
        self._call("Emulation.setEmulatedMedia", session, media=media)
        self._events.clear()
        self._call("Page.navigate", session, url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()
        page = Page()
        page.width, page.outside = self._evaluate(session, _MEASURE)
        shot = self._call("Page.captureScreenshot", session, format="png", captureBeyondViewport=True)
        page.screenshot_png = base64.b64decode(shot["data"])
        for event in self._events:
            self._note(event, page)
        self._call("Target.closeTarget", targetId=target)
        return page

    def _note(self, event: dict[str, Any], page: Page) -> None:
        method, found = event["method"], event["params"]
        if method == "Network.requestWillBeSent" and not found["request"]["url"].startswith("data:"):
            page.requests.append(found["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            page.problems.append(json.dumps(found["args"]))
        elif method == "Runtime.exceptionThrown":
            page.problems.append(json.dumps(found["exceptionDetails"]))
        elif method == "Log.entryAdded":
            page.problems.append(found["entry"]["text"])

    def _evaluate(self, session: str, expression: str) -> Any:
        answer = self._call("Runtime.evaluate", session, expression=expression, returnByValue=True)
        return answer["result"]["value"]

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        """The next message; events are kept."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline_s - time.monotonic()))
            data = os.read(self._read, 1 << 16) if ready else b""
            if not data:
                raise RuntimeError(f"Chromium does not answer (status {self._process.poll()})")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self._events.append(message)
        return message


# Text is measured by what it covers, not by its box: a box may end in time and its text run on.
_MEASURE = """
(() => {
  const outside = [], width = window.innerWidth;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_ALL);
  for (let node = walker.currentNode; node; node = walker.nextNode()) {
    const range = document.createRange();
    range.selectNode(node);
    for (const box of range.getClientRects())
      if (box.width && (box.right > width + 0.5 || box.left < -0.5)) {
        outside.push(`${node.nodeName} ${(node.textContent || "").trim().slice(0, 60)}`);
        break;
      }
  }
  return [document.documentElement.scrollWidth, outside];
})()
"""
