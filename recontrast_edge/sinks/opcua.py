"""An OPC UA server whose nodes show the last judgement.

    sink = OpcuaSink("127.0.0.1", 4840); sink.write(judgement)

The nodes are variables of the object ``Inspection``, in the namespace ``NAMESPACE``, and only the server writes them;
``docs/outputs.md`` lists them. When judgements come faster than ``UPDATE_S``, the newest wins.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from recontrast_edge import __version__
from recontrast_edge.errors import InputError, OutputError, RecontrastError, UsageError
from recontrast_edge.frame import Judgement, StateChange
from recontrast_edge.secrets import Credentials, bare_uri, credentials, masked_uri
from recontrast_edge.sinks.loop import LoopThread
from recontrast_edge.sinks.message import message, missing
from recontrast_edge.sinks.progress import Progress
from recontrast_edge.uri import host_port, parse_options

_log = logging.getLogger(__name__)

APPLICATION = "urn:recontrast-edge"
"""A certificate must name it, as a URI among its alternative names, or clients refuse it."""

NAMESPACE = f"{APPLICATION}:inspection"
OBJECT = "Inspection"
UPDATE_S = 0.02

START_TIMEOUT_S = 60.0
"""The standard's thousands of nodes are made first: 2 s on a desktop computer, more on a small board."""


def values(progress: Progress) -> dict[str, tuple[Any, str]]:
    """Node -> its value and the name of its type; a name that ends in ``[]`` is an array."""
    last = progress.last
    frame = None if last is None else last.frame
    found = () if last is None else last.regions
    places = [] if last is None else [region.record(last.frame.web) for region in found]
    gate_in_ms = None if last is None else last.gate_in_ms
    return {
        "State": (progress.state.value, "String"),
        "Verdict": ("" if last is None else last.verdict, "String"),
        "Score": (math.nan if last is None or last.score is None else last.score, "Double"),
        "Threshold": (math.nan if last is None else last.threshold, "Double"),
        "Fault": ("" if last is None else last.fault or "", "String"),
        "Detail": ("" if last is None else last.detail or "", "String"),
        "Judged": (progress.judged, "UInt64"),
        "Passed": (progress.counts["PASS"], "UInt64"),
        "Rejected": (progress.counts["REJECT"], "UInt64"),
        "Faults": (progress.counts["FAULT"], "UInt64"),
        "FrameId": (0 if frame is None else frame.frame_id, "UInt64"),
        "Camera": ("" if frame is None else frame.camera or "", "String"),
        "PartId": ("" if frame is None else frame.part_id or "", "String"),
        "GateInMs": (math.nan if gate_in_ms is None else gate_in_ms, "Double"),
        "DefectX": ([region.x for region in found], "Int32[]"),
        "DefectY": ([region.y for region in found], "Int32[]"),
        "DefectWidth": ([region.width for region in found], "Int32[]"),
        "DefectHeight": ([region.height for region in found], "Int32[]"),
        "DefectPeak": ([region.peak for region in found], "Double[]"),
        "DefectLine": ([place["line"] for place in places if "line" in place], "Int64[]"),
        "Record": ("" if last is None else message(last.record()).decode(), "String"),
    }


class OpcuaSink:
    """Serves the last judgement. ``counters``: ``updates`` of the nodes.

    Args:
        login: the one user who may connect; None: anyone may.
        certificate: the server's certificate and private key; with it, clients must sign and encrypt.

    Raises:
        InputError: certificate or key cannot be used.
        OutputError: the address cannot be listened on.
    """

    needs_maps = False

    def __init__(
        self,
        host: str,
        port: int,
        *,
        login: Credentials | None = None,
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        self.uri = f"opcua://{f'[{host}]' if ':' in host else host}:{port}"
        self.counters = {"updates": 0}
        self._closed = False
        self._progress = Progress()
        self._changed = asyncio.Event()
        self._nodes: dict[str, Any] = {}
        self._shown: dict[str, Any] = {}
        self._loop = LoopThread(self.uri)
        try:
            self._server = self._loop.run(self._listen(host, port, login, certificate), timeout_s=START_TIMEOUT_S)
        except RecontrastError:
            self._loop.close()
            raise
        except (OSError, RuntimeError, TimeoutError) as error:
            self._loop.close()
            raise OutputError(f"{self.uri}: cannot listen here ({error})") from None
        self._loop.start(self._keep_up())

    def write(self, judgement: Judgement) -> None:
        """See ``Sink.write``; never waits."""
        self._loop.post(lambda: self._take(lambda: self._progress.add(judgement)))

    def write_state(self, change: StateChange) -> None:
        """See ``Sink``."""
        self._loop.post(lambda: self._take(lambda: self._progress.change(change)))

    def close(self) -> None:
        """See ``Sink.close``: the last thing that clients see is the state ENDED."""
        if self._closed:
            return
        self._closed = True
        try:
            self._loop.run(self._finish(), timeout_s=2.0)
        except TimeoutError as error:
            _log.warning("%s: its clients were cut off (%s)", self.uri, error)
        finally:
            self._loop.close()

    # In the loop.

    def _take(self, update: Callable[[], None]) -> None:
        update()
        self._changed.set()

    async def _listen(
        self, host: str, port: int, login: Credentials | None, certificate: tuple[Path, Path] | None
    ) -> Any:
        from asyncua import ua
        from asyncua.server.server import Server

        server = Server(user_manager=_users(login))
        if certificate is not None:
            await _load(server, certificate)
        await server.init()
        # Whoever says to be `admin` is one, otherwise.
        server.allow_remote_admin(False)
        server.set_endpoint(f"opc.tcp://{f'[{host}]' if ':' in host else host}:{port}/")
        server.set_server_name("recontrast-edge")
        await server.set_application_uri(APPLICATION)
        server.set_identity_tokens([ua.AnonymousIdentityToken if login is None else ua.UserNameIdentityToken])
        if certificate is None:
            server.set_security_policy([ua.SecurityPolicyType.NoSecurity])
        else:
            server.set_security_policy(
                [
                    ua.SecurityPolicyType.Basic256Sha256_SignAndEncrypt,
                    ua.SecurityPolicyType.Aes256Sha256RsaPss_SignAndEncrypt,
                ]
            )
        index = await server.register_namespace(NAMESPACE)
        inspection = await server.nodes.objects.add_object(f"ns={index};s={OBJECT}", f"{index}:{OBJECT}")
        for name, (value, type_name) in values(self._progress).items():
            node_id, variant = f"ns={index};s={OBJECT}.{name}", _variant(value, type_name)
            self._nodes[name] = await inspection.add_variable(node_id, f"{index}:{name}", variant)
            self._shown[name] = value
        await inspection.add_variable(f"ns={index};s={OBJECT}.Version", f"{index}:Version", __version__)
        await server.start()
        return server

    async def _keep_up(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._show()
            await asyncio.sleep(UPDATE_S)

    async def _show(self) -> None:
        for name, (value, type_name) in values(self._progress).items():
            # NaN differs from itself, and is written again.
            if value != self._shown[name]:
                self._shown[name] = value
                await self._nodes[name].write_value(_variant(value, type_name))
        self.counters["updates"] += 1

    async def _finish(self) -> None:
        self._progress.end()
        await self._show()
        await self._server.stop()


def _variant(value: Any, type_name: str) -> Any:
    from asyncua import ua

    variant_type = ua.VariantType[type_name.removesuffix("[]")]
    return ua.Variant(value, variant_type, is_array=type_name.endswith("[]"))


def _users(login: Credentials | None) -> Any:
    from asyncua.crypto.permission_rules import User, UserRole

    class Users:
        """Who may connect: all of them only to read."""

        def get_user(
            self, _server: Any, username: str | None = None, password: str | None = None, certificate: Any = None
        ) -> User | None:
            if login is not None:
                given = f"{username}:{password}".encode()
                if not hmac.compare_digest(given, f"{login.user}:{login.password}".encode()):
                    return None
            return User(role=UserRole.User, name=username)

    return Users()


async def _load(server: Any, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    try:
        for path, load in ((cert, server.load_certificate), (key, server.load_private_key)):
            data = path.read_bytes()
            await load(data, format="pem" if data.startswith(b"-----BEGIN") else "der")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"opcua: expected a certificate in {cert} and its key, not encrypted, in {key}, as PEM or DER ({error})"
        ) from None


def opcua_opener(uri: str, target: str, query: str) -> Callable[[], OpcuaSink]:
    """``opcua://[USER:PASSWORD@]HOST[:PORT]?credentials=&cert=&key=``; without a host ``127.0.0.1``.

    Raises:
        UsageError: something else, or a password that would cross the network in plain text.
    """
    what = f"output {masked_uri(uri)!r}"
    options = parse_options(what, query, ("credentials", "cert", "key"))
    authority = bare_uri(uri).partition("?")[0].partition("://")[2].removesuffix("/")
    host, port = host_port(what, authority or "127.0.0.1", default_port=4840)
    if ("cert" in options) != ("key" in options):
        raise UsageError(f"{what}: cert and key belong together; give both or neither")
    certificate = (Path(unquote(options["cert"])), Path(unquote(options["key"]))) if "cert" in options else None
    try:
        import asyncua
    except ImportError as error:
        raise missing(what, error, "serve") from None
    # It logs every session; what matters we say ourselves.
    logging.getLogger(asyncua.__name__).setLevel(logging.CRITICAL)
    login = credentials(uri)
    if login is not None and certificate is None and not _is_loopback(host):
        raise UsageError(f"{what}: a password needs encryption; give cert and key, or listen on 127.0.0.1")
    return lambda: OpcuaSink(host, port, login=login, certificate=certificate)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
