"""GenICam cameras of any maker, through the GenTL producer (a ``.cti`` file) that the maker ships, and harvesters.

    open_source("genicam:/opt/maker/lib/maker.cti#40012345?fps=30").read(timeout_s=1.0)

A producer is native code: open only files that you trust. The binding does not let other threads run while the producer
works, so it is asked in short turns.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from recontrast_edge.errors import InputError, MissingError, SourceError, UsageError
from recontrast_edge.secrets import masked_uri
from recontrast_edge.sources.genicam import Buffer, Feature, Kind, Refused, Value, genicam_opener, parse_camera_uri
from recontrast_edge.sources.threaded import ThreadedSource

POLL_S = 0.002
"""How long other threads have between two looks at the producer."""

LOOK_S = 1e-5
"""One look: a wait in the producer would stop all other threads."""

_PATH_VARIABLE = "GENICAM_GENTL64_PATH"


def gentl_opener(uri: str) -> Callable[[], ThreadedSource]:
    """Check ``genicam:FILE.cti#ID?OPTIONS`` and return what opens it.

    FILE is a path, or a file's name in one of the folders of ``GENICAM_GENTL64_PATH``. ID is what the producer calls
    the camera, its serial number or its user-defined name, or empty where there is one camera.

    Raises:
        InputError: no such file.
        UsageError: see ``parse_camera_uri``.
        MissingError: harvesters is not installed.
    """
    place, options = parse_camera_uri(uri, "genicam")
    file, _, name = place.partition("#")
    what = masked_uri(uri)
    if not file:
        raise UsageError(f"{what}: expected genicam:FILE.cti#ID")
    producer = find_producer(file)
    import_harvesters()
    return genicam_opener(uri, options, partial(GenTLCamera, what, producer, name))


def find_producer(file: str) -> Path:
    """The path of a producer.

    Raises:
        InputError: no such file.
    """
    for path in (Path(file), *(folder / file for folder in producer_folders())):
        if path.is_file():
            return path.resolve()
    raise InputError(f"{file}: no such GenTL producer; expected a .cti file, or one in a folder of {_PATH_VARIABLE}")


def producer_folders() -> list[Path]:
    """The folders that makers' installers name for their producers."""
    return [Path(folder) for folder in os.environ.get(_PATH_VARIABLE, "").split(os.pathsep) if folder]


def import_harvesters() -> Any:
    """The library, ``harvesters.core``.

    Raises:
        MissingError: it is not installed.
    """
    try:
        from harvesters import core
    except ImportError as error:
        raise MissingError(
            f"GenTL producers need harvesters; run: pip install 'recontrast-edge[cameras]' ({error})"
        ) from None
    # It logs, with a traceback, what it then raises.
    logging.getLogger("harvesters.core").setLevel(logging.CRITICAL)
    return core


def _errors() -> tuple[type[Exception], ...]:
    from genicam import genapi, gentl

    # Harvesters itself raises the built-in ones.
    return (genapi.GenericException, gentl.GenericException, ValueError, OSError)


# Producers. A process can load one only once, so that its cameras share it.


@dataclass
class _Producer:
    harvester: Any
    users: int = 0


_producers: dict[Path, _Producer] = {}
_producers_lock = threading.Lock()


@contextmanager
def _loaded(path: Path) -> Iterator[Any]:
    """The harvester of a producer, which has looked for cameras if nobody uses one of them."""
    core = import_harvesters()
    with _producers_lock:
        producer = _producers.get(path)
        if producer is None:
            producer = _producers[path] = _Producer(core.Harvester())
        try:
            if not producer.harvester.files:
                try:
                    producer.harvester.add_file(str(path), check_existence=True, check_validity=True)
                except _errors() as error:
                    raise InputError(f"{path}: not a GenTL producer for this machine ({error})") from None
            # It makes the cameras in use unusable.
            if not producer.users:
                producer.harvester.update()
            producer.users += 1
            try:
                yield producer.harvester
            except BaseException:
                producer.users -= 1
                raise
        finally:
            _unload_unused(path)


def _release(path: Path) -> None:
    with _producers_lock:
        _producers[path].users -= 1
        _unload_unused(path)


def _unload_unused(path: Path) -> None:
    if not _producers[path].users:
        with suppress(*_errors()):
            _producers[path].harvester.reset()
        del _producers[path]


@dataclass(frozen=True)
class GenTLDevice:
    """A camera that a producer sees."""

    id: str
    names: tuple[str, ...] = field(repr=False)
    description: str

    @classmethod
    def of(cls, info: Any) -> GenTLDevice:
        """From the producer's answers; those that it does not give are left out."""

        def asked(name: str) -> str:
            with suppress(*_errors()):
                return str(getattr(info, name, None) or "")
            return ""

        names = (asked("id_"), asked("serial_number"), asked("user_defined_name"))
        return cls(names[0], names, f"{asked('vendor')} {asked('model')}".strip())


def find_devices(path: Path) -> list[GenTLDevice]:
    """The cameras that a producer sees.

    Raises:
        SourceError: the producer failed.
        MissingError: harvesters is not installed.
    """
    import_harvesters()
    try:
        with _loaded(path) as harvester:
            found = [GenTLDevice.of(info) for info in harvester.device_info_list]
        _release(path)
    except _errors() as error:
        raise SourceError(f"{path}: the producer failed ({error})") from None
    return found


class GenTLCamera:
    """An opened camera; see ``Camera``.

    Args:
        what: the source, for messages.
        path: the producer.
        name: the camera's id, serial number or user-defined name; empty for the only one.

    Raises:
        UsageError: several cameras, and no name.
        SourceError: the producer failed, or the camera is not there or in use.
    """

    def __init__(self, what: str, path: Path, name: str) -> None:
        core = import_harvesters()
        self._what = what
        self._path = path
        self._errors = _errors()
        self._incomplete = 0
        try:
            with _loaded(path) as harvester:
                self._acquirer = harvester.create(self._choose(harvester.device_info_list, name))
        except self._errors as error:
            raise SourceError(f"{what}: cannot be opened; is it in use by another program? ({error})") from None
        self._nodes = self._acquirer.remote_device.node_map
        # Harvesters drops them without a word.
        self._acquirer.add_callback(
            core.ImageAcquirer.Events.INCOMPLETE_BUFFER, _counting(core, self._count_incomplete)
        )

    def _choose(self, found: Sequence[Any], name: str) -> int:
        devices = [GenTLDevice.of(info) for info in found]
        matching = [index for index, device in enumerate(devices) if not name or name in device.names]
        there = ", ".join(device.id for device in devices) or "none"
        if not matching:
            raise SourceError(f"{self._what}: no such camera; the producer sees {there}")
        if len(matching) > 1:
            raise UsageError(f"{self._what}: there are several cameras; expected #ID with one of {there}")
        return matching[0]

    def _count_incomplete(self) -> None:
        self._incomplete += 1

    def feature(self, name: str) -> Feature | None:
        """See ``Camera``."""
        if not self._nodes.has_node(name):
            return None
        node = self._nodes.get_node(name)
        kind = _kinds().get(node.node.principal_interface_type)
        return None if kind is None else GenTLFeature(node, kind)

    def feature_names(self) -> Sequence[str]:
        """See ``Camera``."""
        return [node.node.name for node in self._nodes.nodes if node.node.is_feature()]

    def start(self, buffers: int) -> None:
        """See ``Camera``."""
        try:
            self._acquirer.num_buffers = max(buffers, self._acquirer.min_num_buffers)
            self._acquirer.timeout_period_on_update_event_data_call = 0
            self._acquirer.start()
        except self._errors as error:
            raise SourceError(f"{self._what}: the camera cannot start ({error})") from None

    def grab(self, timeout_s: float) -> Buffer | None:
        """See ``Camera``."""
        until_s = time.monotonic() + timeout_s
        try:
            while True:
                fetched = self._acquirer.try_fetch(timeout=LOOK_S)
                if fetched is not None:
                    with fetched:
                        return self._buffer(fetched)
                if self._incomplete:
                    self._incomplete -= 1
                    return Buffer(None, incomplete="the producer says that data are missing")
                if time.monotonic() > until_s:
                    return None
                time.sleep(POLL_S)
        except self._errors as error:
            raise SourceError(f"{self._what}: the camera broke off ({error})") from None

    def _buffer(self, fetched: Any) -> Buffer:
        time_ns = None
        with suppress(*self._errors):
            time_ns = int(fetched.timestamp_ns) or None
        frame_id = int(fetched.module.frame_id)
        components = getattr(fetched.payload, "components", None)
        if not components:
            return Buffer(frame_id, time_ns, incomplete="the buffer holds no picture")
        picture = components[0]
        return Buffer(
            frame_id,
            time_ns,
            data=np.array(picture.data).reshape(-1).view(np.uint8),
            width=picture.width,
            height=picture.height,
            pixel_format=picture.data_format_value,
            padding_x=picture.x_padding,
        )

    def close(self) -> None:
        """See ``Camera``."""
        forget_adapter = getattr(getattr(self._acquirer, "_chunk_adapter", None), "_finalizer", None)
        with suppress(*self._errors), self._acquirer:
            # Leaving it is more than `destroy`, after which it would stay in memory for ever.
            pass
        if forget_adapter is not None:
            # So would this one, with all nodes of the camera, as of genicam 1.6.
            with suppress(*self._errors):
                forget_adapter()
        del self._acquirer, self._nodes
        _release(self._path)
        # What is left refers to itself; dozens of MB of buffers would wait for Python to look for such.
        gc.collect()


def _counting(core: Any, count: Callable[[], None]) -> Any:
    """Harvesters takes objects of a class of its own for callbacks."""

    class Counting(core.Callback):  # type: ignore[misc]
        def emit(self, context: object = None) -> None:
            count()

    return Counting()


class GenTLFeature:
    """See ``Feature``."""

    def __init__(self, node: Any, kind: Kind) -> None:
        self.kind = kind
        self._node = node

    def writable(self) -> bool:
        """See ``Feature``."""
        from genicam.genapi import EAccessMode

        return self._call(self._node.get_access_mode) in (EAccessMode.WO, EAccessMode.RW)

    def get(self) -> Value:
        """See ``Feature``."""
        value: Value = self._call(lambda: self._node.value)
        return value

    def set(self, value: Value) -> None:
        """See ``Feature``."""
        if self.kind == "command":
            self._call(self._node.execute)
        else:
            self._call(partial(setattr, self._node, "value", value))

    def limits(self) -> tuple[float, float, float]:
        """See ``Feature``."""
        step = self._call(lambda: self._node.inc) if self.kind == "integer" else 0
        return self._call(lambda: self._node.min), self._call(lambda: self._node.max), step

    def entries(self) -> Sequence[str]:
        """See ``Feature``."""
        from genicam.genapi import EAccessMode

        usable = (EAccessMode.WO, EAccessMode.RW, EAccessMode.RO)
        entries = self._call(lambda: self._node.entries)
        return [entry.symbolic for entry in entries if self._call(entry.get_access_mode) in usable]

    def _call(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except _errors() as error:
            raise Refused(str(error).partition(" : ")[0]) from None


def _kinds() -> dict[int, Kind]:
    from genicam.genapi import EInterfaceType

    return {
        EInterfaceType.intfIInteger: "integer",
        EInterfaceType.intfIFloat: "float",
        EInterfaceType.intfIBoolean: "boolean",
        EInterfaceType.intfIEnumeration: "enumeration",
        EInterfaceType.intfIString: "string",
        EInterfaceType.intfICommand: "command",
    }
