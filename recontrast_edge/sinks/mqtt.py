"""Judgements to an MQTT broker, as JSON.

    sink = MqttSink("broker.local", 1883, "plant/line1"); sink.write(judgement)

| topic | payload | retained |
| --- | --- | --- |
| ``TOPIC/judgement`` | the record of a judgement | no |
| ``TOPIC/state``, of several cameras ``TOPIC/state/CAMERA`` | the record of a change of state | yes |
| ``TOPIC/status`` | ``online``; ``offline`` after a clean end and, as last will, after any other | yes |

QoS 1. Messages wait in a bounded queue while the broker cannot be reached; what does not fit is dropped and counted.
"""

from __future__ import annotations

import logging
import re
import ssl
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from recontrast_edge.bounded import call_bounded, wait_until
from recontrast_edge.errors import UsageError
from recontrast_edge.frame import Judgement, StateChange, VerdictName
from recontrast_edge.secrets import Credentials, bare_uri, credentials, masked_uri
from recontrast_edge.sinks.message import VERDICTS, choice_option, message, missing
from recontrast_edge.sinks.tls import TLS_OPTIONS, tls_context
from recontrast_edge.sinks.trouble import Trouble
from recontrast_edge.uri import host_port, parse_options, whole_option

_log = logging.getLogger(__name__)

QUEUED_MESSAGES = 1000
"""Some hundred bytes each, a few kB with many regions."""

RESERVED_MESSAGES = 100
"""Room in the queue that judgements leave to states and status, without which these would be wrong for long."""

RECONNECT_S = 1
CONNECT_TIMEOUT_S = 1.5
KEEP_ALIVE_S = 5
"""A broker that is silent for one and a half times this is taken for gone."""

STOP_S = 1.0
FLUSH_S = 1.0
"""At the end, what is queued may still be delivered for so long."""


class MqttSink:
    """Publishes judgements and states; connects, and connects again, by itself.

    ``counters``: ``delivered`` messages the broker confirmed, ``dropped`` that found the queue full or were left at the
    end, ``reconnects``, ``connected`` (0 or 1).

    Args:
        topic: the part of the topics before ``/judgement``, ``/state`` and ``/status``.
        verdicts: the judgements to publish.
        login: user and password.
        tls: None for a connection without TLS.
        queued: judgements that wait at most.
    """

    needs_maps = False

    def __init__(
        self,
        host: str,
        port: int,
        topic: str,
        *,
        verdicts: frozenset[VerdictName] = VERDICTS["all"],
        login: Credentials | None = None,
        tls: ssl.SSLContext | None = None,
        queued: int = QUEUED_MESSAGES,
        client_id: str = "",
    ) -> None:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        self.uri = f"mqtt{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}/{topic}"
        self.counters = dict.fromkeys(("delivered", "dropped", "reconnects", "connected"), 0)
        self._topic = topic
        self._verdicts = verdicts
        self._queued = queued
        self._accepted = 0
        self._counting = threading.Lock()
        self._trouble = Trouble(_log, self.uri, well="connected")
        self._ever_connected = False
        self._closed = False
        self._client = client = Client(CallbackAPIVersion.VERSION2, client_id=client_id)
        client.max_queued_messages_set(queued + RESERVED_MESSAGES)
        client.reconnect_delay_set(RECONNECT_S, RECONNECT_S)
        client.connect_timeout = CONNECT_TIMEOUT_S
        if login is not None:
            client.username_pw_set(login.user, login.password or None)
        if tls is not None:
            client.tls_set_context(tls)
        client.will_set(f"{topic}/status", "offline", qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        client.connect_async(host, port, keepalive=KEEP_ALIVE_S)
        client.loop_start()

    def write(self, judgement: Judgement) -> None:
        """See ``Sink.write``; never waits."""
        if judgement.verdict not in self._verdicts:
            return
        if self._waiting >= self._queued:
            self.counters["dropped"] += 1
        else:
            self._publish("judgement", message(judgement.record()))

    def write_state(self, change: StateChange) -> None:
        """See ``Sink``."""
        level = "" if change.camera is None else "/" + re.sub(r"[/+#\x00]", "_", change.camera)
        self._publish(f"state{level}", message(change.record()), retain=True)

    def _publish(self, level: str, payload: bytes | str, *, retain: bool = False) -> None:
        from paho.mqtt.enums import MQTTErrorCode

        # The client's thread publishes, too.
        with self._counting:
            self._accepted += 1
        info = self._client.publish(f"{self._topic}/{level}", payload, qos=1, retain=retain)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            with self._counting:
                self._accepted -= 1
            self.counters["dropped"] += 1

    @property
    def _waiting(self) -> int:
        """Messages that the broker has not confirmed."""
        return self._accepted - self.counters["delivered"]

    def close(self) -> None:
        """See ``Sink.close``."""
        if self._closed:
            return
        self._closed = True
        if self.counters["connected"]:
            self._publish("status", "offline", retain=True)
            wait_until(
                lambda: not self._waiting or not self.counters["connected"],
                time.monotonic() + FLUSH_S,
            )
        self._client.disconnect()
        # The thread may be waiting for a name server.
        call_bounded(self._client.loop_stop, timeout_s=STOP_S, name=f"close {self.uri}")
        if self._waiting:
            self.counters["dropped"] += self._waiting
            _log.warning("%s: stopped before %d messages were delivered", self.uri, self._waiting)

    # In the client's thread.

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._trouble.say(f"the broker refuses the connection ({reason})")
            return
        self.counters["connected"] = 1
        self.counters["reconnects"] += self._ever_connected
        self._ever_connected = True
        self._trouble.say(None)
        self._publish("status", "online", retain=True)

    def _on_connect_fail(self, _client: Any, _data: Any) -> None:
        # Called while the exception is being handled.
        self._trouble.say(f"cannot connect ({sys.exc_info()[1]}); trying again")

    def _on_disconnect(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if self.counters["connected"] and not self._closed:
            self._trouble.say(f"the connection is lost ({reason}); trying again")
        self.counters["connected"] = 0

    def _on_publish(self, _client: Any, _data: Any, _message_id: int, _reason: Any, _properties: Any) -> None:
        self.counters["delivered"] += 1


def mqtt_opener(uri: str, target: str, query: str) -> Callable[[], MqttSink]:
    """``mqtt[s]://[USER:PASSWORD@]HOST[:PORT]/TOPIC?which=&queue=&client_id=&credentials=&ca=&cert=&key=``.

    Raises:
        UsageError: something else.
    """
    what = f"output {masked_uri(uri)!r}"
    with_tls = uri.startswith("mqtts:")
    known = ("which", "queue", "client_id", "credentials", *(TLS_OPTIONS if with_tls else ()))
    options = parse_options(what, query, known)
    if not target.startswith("//"):
        raise UsageError(f"{what}: expected mqtt://HOST/TOPIC")
    authority, _, topic = bare_uri(uri).partition("?")[0].partition("://")[2].partition("/")
    host, port = host_port(what, authority, default_port=8883 if with_tls else 1883)
    topic = unquote(topic).strip("/")
    if not topic or re.search(r"[+#\x00]", topic) or topic.startswith("$"):
        raise UsageError(f"{what}: expected mqtt://HOST/TOPIC, the topic without wildcards, such as plant/line1")
    verdicts = VERDICTS[choice_option(what, "which", options.get("which", "all"), VERDICTS)]
    queued = whole_option(what, "queue", options.get("queue", str(QUEUED_MESSAGES)), low=1, high=60_000)
    try:
        import paho.mqtt.client  # noqa: F401
    except ImportError as error:
        raise missing(what, error, "serve") from None
    login = credentials(uri)
    tls = tls_context(what, options) if with_tls else None
    return lambda: MqttSink(
        host,
        port,
        topic,
        verdicts=verdicts,
        login=login,
        tls=tls,
        queued=queued,
        client_id=options.get("client_id", ""),
    )
