"""Judgements to a web server, as JSON by HTTP POST.

    sink = WebhookSink("https://mes.local/inspection"); sink.write(judgement)

What the server does not take with a status of 2xx is sent again with growing pauses, and given up after ``ATTEMPTS``;
meanwhile newer judgements push the oldest out of a bounded queue. Redirects are not followed: a judgement, and the
password that goes with it, reach the host that was named or none.
"""

from __future__ import annotations

import logging
import re
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

from recontrast_edge.bounded import POLL_S, join
from recontrast_edge.errors import UsageError
from recontrast_edge.frame import Judgement, StateChange, VerdictName
from recontrast_edge.secrets import Credentials, bare_uri, credentials, masked_uri, register
from recontrast_edge.sinks.message import VERDICTS, choice_option, message, missing
from recontrast_edge.sinks.tls import TLS_OPTIONS, tls_context
from recontrast_edge.sinks.trouble import Trouble
from recontrast_edge.uri import host_port, number_option, parse_options

_log = logging.getLogger(__name__)

QUEUED_MESSAGES = 256
ATTEMPTS = 5
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0
FLUSH_S = 1.0
"""At the end, what is queued may still be delivered for so long."""

MAX_REPLY_BYTES = 65536
"""Of a reply; nothing in it is looked at, but a connection can be used again only after it was read."""


class WebhookSink:
    """Posts judgements and states, one after another, on a thread of its own.

    ``counters``: ``delivered``, ``retries``, ``dropped`` (pushed out of the queue, given up, or left at the end).

    Args:
        url: where to, ``http:`` or ``https:``, without userinfo.
        verdicts: the judgements to post.
        timeout_s: for connecting and for each wait for the server.
        login: for HTTP's basic authentication or, with ``bearer``, the password as a token.
        tls: None for the system's certificates.
    """

    needs_maps = False

    def __init__(
        self,
        url: str,
        *,
        verdicts: frozenset[VerdictName] = VERDICTS["not_pass"],
        timeout_s: float = 3.0,
        login: Credentials | None = None,
        bearer: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        import urllib3

        parts = urlsplit(url)
        # What follows the question mark is a secret more often than not.
        self.uri = f"webhook:{parts.scheme}://{parts.netloc}{parts.path}" + ("?..." if parts.query else "")
        self.counters = dict.fromkeys(("delivered", "retries", "dropped"), 0)
        self._url = url
        self._verdicts = verdicts
        self._headers = {"Content-Type": "application/json", "User-Agent": "recontrast-edge"}
        if login is not None and bearer:
            self._headers["Authorization"] = f"Bearer {login.password}"
        elif login is not None:
            self._headers.update(urllib3.make_headers(basic_auth=f"{login.user}:{login.password}"))
        timeout = urllib3.Timeout(connect=timeout_s, read=timeout_s)
        self._http = urllib3.PoolManager(num_pools=1, maxsize=1, timeout=timeout, retries=False, ssl_context=tls)
        self._queue: deque[bytes] = deque(maxlen=QUEUED_MESSAGES)
        self._changed = threading.Condition()
        self._stop_at_s: float | None = None
        self._trouble = Trouble(_log, self.uri, well="delivers again")
        self._thread = threading.Thread(target=self._run, name=self.uri, daemon=True)
        self._thread.start()

    def write(self, judgement: Judgement) -> None:
        """See ``Sink.write``; never waits."""
        if judgement.verdict in self._verdicts:
            self._put(message(judgement.record()))

    def write_state(self, change: StateChange) -> None:
        """See ``Sink``."""
        self._put(message(change.record()))

    def _put(self, payload: bytes) -> None:
        with self._changed:
            self.counters["dropped"] += len(self._queue) == QUEUED_MESSAGES
            self._queue.append(payload)
            self._changed.notify()

    def close(self) -> None:
        """See ``Sink.close``: what can be delivered within ``FLUSH_S`` is."""
        with self._changed:
            if self._stop_at_s is not None:
                return
            self._stop_at_s = time.monotonic() + FLUSH_S
            self._changed.notify()
        join(self._thread, self._stop_at_s + 0.5)
        self._http.clear()
        left = len(self._queue)
        if left:
            self.counters["dropped"] += left
            _log.warning("%s: stopped before %d messages were delivered", self.uri, left)

    # The thread.

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and self._stop_at_s is None:
                    self._changed.wait()
                if not self._queue or self._stopped:
                    return
                payload = self._queue.popleft()
            if self._deliver(payload):
                self.counters["delivered"] += 1
            else:
                self.counters["dropped"] += 1

    @property
    def _stopped(self) -> bool:
        return self._stop_at_s is not None and time.monotonic() >= self._stop_at_s

    def _deliver(self, payload: bytes) -> bool:
        pause_s = FIRST_PAUSE_S
        for attempt in range(ATTEMPTS):
            if attempt:
                self.counters["retries"] += 1
                until_s = time.monotonic() + pause_s
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                while time.monotonic() < until_s:
                    if self._stopped:
                        return False
                    time.sleep(POLL_S)
            trouble = self._post(payload)
            self._trouble.say(None if trouble is None else f"cannot deliver ({trouble}); trying again")
            if trouble is None:
                return True
            if self._stopped:
                return False
        return False

    def _post(self, payload: bytes) -> str | None:
        """Send once; returns what went wrong."""
        import urllib3

        try:
            reply = self._http.request(
                "POST", self._url, body=payload, headers=self._headers, redirect=False, preload_content=False
            )
            try:
                reply.read(MAX_REPLY_BYTES)
                whole = reply.tell() < MAX_REPLY_BYTES
            finally:
                (reply.release_conn if whole else reply.close)()
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return None if 200 <= reply.status < 300 else f"status {reply.status}"


OPTIONS = ("which", "query", "timeout_ms", "auth", "credentials", *TLS_OPTIONS)


def webhook_opener(uri: str, target: str, query: str) -> Callable[[], WebhookSink]:
    """``webhook:http[s]://[USER:PASSWORD@]HOST[:PORT]/PATH?OPTIONS``; ``query=`` is what the server gets as its query.

    Raises:
        UsageError: something else.
    """
    what = f"output {masked_uri(uri)!r}"
    options = parse_options(what, query, OPTIONS)
    scheme, separator, _ = target.partition("://")
    if not separator or scheme not in ("http", "https"):
        raise UsageError(f"{what}: expected webhook:https://HOST/PATH, or http:")
    authority, slash, path = bare_uri(f"{target}?").removesuffix("?").removeprefix(f"{scheme}://").partition("/")
    host_port(what, authority, default_port=443 if scheme == "https" else 80)
    if re.search(r"[^!-~]", path):
        raise UsageError(f"{what}: a path may hold only printable ASCII; percent-encode the rest")
    for name in TLS_OPTIONS:
        if name in options and scheme == "http":
            raise UsageError(f"{what}: {name} needs https")
    verdicts = VERDICTS[choice_option(what, "which", options.get("which", "not_pass"), VERDICTS)]
    timeout_s = number_option(what, "timeout_ms", options.get("timeout_ms", "3000"), low=10.0, high=60_000.0) / 1e3
    bearer = choice_option(what, "auth", options.get("auth", "basic"), ("basic", "bearer")) == "bearer"
    try:
        import urllib3  # noqa: F401
    except ImportError as error:
        raise missing(what, error, "serve") from None
    login = credentials(uri)
    if "query" in options:
        register(options["query"])
    server_query = f"?{unquote(options['query'])}" if "query" in options else ""
    url = f"{scheme}://{authority}{slash}{path}{server_query}"
    tls = tls_context(what, options) if scheme == "https" else None
    return lambda: WebhookSink(url, verdicts=verdicts, timeout_s=timeout_s, login=login, bearer=bearer, tls=tls)
