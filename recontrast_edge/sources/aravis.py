"""GigE Vision and USB3 Vision cameras of any maker, through Aravis.

    open_source("aravis:192.168.1.20?exposure_us=2000&trigger=hardware").read(timeout_s=1.0)

Aravis is a C library of the distribution. Its Python bindings (PyGObject) belong to the system's Python, so that an
environment must be made with ``--system-site-packages``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from recontrast_edge.errors import MissingError, SourceError, UsageError
from recontrast_edge.secrets import masked_uri
from recontrast_edge.sources.genicam import Buffer, Feature, Kind, Refused, Value, genicam_opener, parse_camera_uri
from recontrast_edge.sources.threaded import ThreadedSource

INSTALL = (
    "sudo apt-get install gir1.2-aravis-0.8 python3-gi, in an environment made with "
    "python3 -m venv --system-site-packages"
)

_FEATURE_ELEMENTS = {"Boolean", "Command", "Enumeration", "Float", "Integer", "String", "StringReg"}

_ids: dict[str, str] = {}
"""What a camera was called -> how it was found: a search takes a second, which counts when a camera comes back."""


def aravis_opener(uri: str) -> Callable[[], ThreadedSource]:
    """Check ``aravis:NAME?OPTIONS`` and return what opens it.

    NAME is an address, a serial number or Aravis' own id, empty for the only camera.

    Raises:
        UsageError: see ``parse_camera_uri``.
        MissingError: Aravis is not installed.
    """
    name, options = parse_camera_uri(uri, "aravis")
    import_aravis()
    return genicam_opener(uri, options, partial(AravisCamera, masked_uri(uri), name))


def import_aravis() -> Any:
    """The library, as PyGObject presents it.

    Raises:
        MissingError: it is not installed.
    """
    try:
        import gi

        gi.require_version("Aravis", "0.8")
        from gi.repository import Aravis
    except (ImportError, ValueError) as error:
        raise MissingError(f"Aravis cameras need Aravis 0.8 and PyGObject; run: {INSTALL} ({error})") from None
    return Aravis


def _error() -> Any:
    from gi.repository import GLib

    return GLib.Error


@dataclass(frozen=True)
class AravisDevice:
    """A camera that Aravis sees."""

    id: str
    serial: str
    address: str
    description: str


def find_devices() -> list[AravisDevice]:
    """The cameras that Aravis sees; takes a second.

    Raises:
        MissingError: it is not installed.
    """
    aravis = import_aravis()
    aravis.update_device_list()
    return [
        AravisDevice(
            id=aravis.get_device_id(index) or "",
            serial=aravis.get_device_serial_nbr(index) or "",
            address=aravis.get_device_address(index) or "",
            description=f"{aravis.get_device_vendor(index) or ''} {aravis.get_device_model(index) or ''}".strip(),
        )
        for index in range(aravis.get_n_devices())
    ]


class AravisCamera:
    """An opened camera; see ``Camera``.

    Args:
        what: the source, for messages.
        name: id, address or serial number; empty for the only one.

    Raises:
        UsageError: several cameras, and no name.
        SourceError: not there, or in use.
    """

    def __init__(self, what: str, name: str) -> None:
        self._what = what
        self._aravis = import_aravis()
        self._error = _error()
        self._stream: Any = None
        self._lost = False
        self._camera = self._opened(name or self._only())
        self._device = self._camera.get_device()
        self._on_lost = self._device.connect("control-lost", self._set_lost)

    def _only(self) -> str:
        found = find_devices()
        if len(found) > 1:
            there = ", ".join(f"aravis:{device.id}" for device in found)
            raise UsageError(f"{self._what}: there are several cameras; expected one of {there}")
        if not found:
            raise SourceError(f"{self._what}: no such camera; Aravis sees none")
        return found[0].id

    def _opened(self, name: str) -> Any:
        known = _ids.get(name)
        try:
            camera = self._aravis.Camera.new(known or name)
            _ids.setdefault(name, name)
            return camera
        except self._error as error:
            if not error.matches(self._aravis.device_error_quark(), self._aravis.DeviceError.NOT_FOUND):
                trouble = f"cannot be opened; is it in use by another program? ({error.message})"
                raise SourceError(f"{self._what}: {trouble}") from None
        if known is not None:
            raise SourceError(f"{self._what}: the camera is not there")
        # Aravis knows ids and addresses, but no serial numbers.
        found = find_devices()
        same = next((device.id for device in found if name == device.serial and name != device.id), None)
        if same is None:
            there = ", ".join(device.id for device in found) or "none"
            raise SourceError(f"{self._what}: no such camera; Aravis sees {there}")
        _ids[name] = same
        return self._opened(name)

    def _set_lost(self, _device: Any) -> None:
        self._lost = True

    def feature(self, name: str) -> Feature | None:
        """See ``Camera``."""
        node = self._device.get_feature(name)
        kind = None if node is None else _kind(self._aravis, node)
        return None if kind is None else AravisFeature(self._aravis, self._device, name, kind)

    def feature_names(self) -> Sequence[str]:
        """See ``Camera``."""
        # Not by way of the categories: cameras have features that no category lists. Nor from the text, which the
        # bindings read beyond its end.
        names: list[str] = []
        pending = [self._device.get_genicam().get_document_element()]
        while pending:
            node = pending.pop(0)
            if isinstance(node, self._aravis.GcFeatureNode) and node.get_node_name() in _FEATURE_ELEMENTS:
                names.append(node.get_name())
            child = node.get_first_child()
            while child is not None:
                pending.append(child)
                child = child.get_next_sibling()
        return names

    def start(self, buffers: int) -> None:
        """See ``Camera``."""
        try:
            self._stream = self._camera.create_stream(None, None)
            size = self._camera.get_payload()
            for _ in range(buffers):
                self._stream.push_buffer(self._aravis.Buffer.new_allocate(size))
            self._camera.start_acquisition()
        except self._error as error:
            raise SourceError(f"{self._what}: the camera cannot start ({error.message})") from None

    def grab(self, timeout_s: float) -> Buffer | None:
        """See ``Camera``."""
        buffer = self._stream.timeout_pop_buffer(round(timeout_s * 1e6))
        if buffer is None:
            if self._lost:
                raise SourceError(f"{self._what}: the camera is gone; was it unplugged?")
            return None
        try:
            return self._taken(buffer)
        finally:
            self._stream.push_buffer(buffer)

    def _taken(self, buffer: Any) -> Buffer:
        status, kinds = buffer.get_status(), self._aravis.BufferPayloadType
        frame_id, time_ns = buffer.get_frame_id(), buffer.get_timestamp() or None
        if status != self._aravis.BufferStatus.SUCCESS:
            return Buffer(frame_id, time_ns, incomplete=f"Aravis says {status.value_nick}")
        if buffer.get_payload_type() not in (kinds.IMAGE, kinds.EXTENDED_CHUNK_DATA):
            return Buffer(frame_id, time_ns, incomplete="the buffer holds no picture")
        padding_x, _ = buffer.get_image_padding()
        return Buffer(
            frame_id,
            time_ns,
            data=np.frombuffer(bytearray(buffer.get_data()), np.uint8),
            width=buffer.get_image_width(),
            height=buffer.get_image_height(),
            pixel_format=buffer.get_image_pixel_format(),
            padding_x=padding_x,
        )

    def close(self) -> None:
        """See ``Camera``."""
        try:
            # A camera that is gone would be asked five times, for half a second each.
            if self._stream is not None and not self._lost:
                self._camera.stop_acquisition()
        except self._error:
            pass
        finally:
            self._device.disconnect(self._on_lost)
            # Aravis lets go of a camera when nothing refers to it any more.
            del self._stream, self._device, self._camera


class AravisFeature:
    """See ``Feature``."""

    def __init__(self, aravis: Any, device: Any, name: str, kind: Kind) -> None:
        self.kind = kind
        self._aravis = aravis
        self._device = device
        self._name = name

    def writable(self) -> bool:
        """See ``Feature``."""
        device, name = self._device, self._name
        # Aravis 0.8.26 says WO of what can be read as well, so that only RO is believed.
        read_only = device.get_feature_access_mode(name) == self._aravis.GcAccessMode.RO
        return not read_only and bool(self._call(partial(device.is_feature_available, name)))

    def get(self) -> Value:
        """See ``Feature``."""
        device = self._device
        getters: dict[Kind, Callable[[str], Value]] = {
            "integer": device.get_integer_feature_value,
            "float": device.get_float_feature_value,
            "boolean": device.get_boolean_feature_value,
        }
        value: Value = self._call(partial(getters.get(self.kind, device.get_string_feature_value), self._name))
        return value

    def set(self, value: Value) -> None:
        """See ``Feature``."""
        device = self._device
        if self.kind == "command":
            self._call(partial(device.execute_command, self._name))
            return
        setters: dict[Kind, Callable[[str, Any], None]] = {
            "integer": device.set_integer_feature_value,
            "float": device.set_float_feature_value,
            "boolean": device.set_boolean_feature_value,
        }
        self._call(partial(setters.get(self.kind, device.set_string_feature_value), self._name, value))

    def limits(self) -> tuple[float, float, float]:
        """See ``Feature``."""
        device, name = self._device, self._name
        if self.kind == "float":
            low, high = self._call(partial(device.get_float_feature_bounds, name))
            return low, high, 0.0
        low, high = self._call(partial(device.get_integer_feature_bounds, name))
        return low, high, self._call(partial(device.get_integer_feature_increment, name))

    def entries(self) -> Sequence[str]:
        """See ``Feature``."""
        return list(self._call(partial(self._device.dup_available_enumeration_feature_values_as_strings, self._name)))

    def _call(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except _error() as error:
            codes = self._aravis.DeviceError
            gone = (codes.NOT_CONNECTED, codes.TIMEOUT, codes.TRANSFER_ERROR)
            if any(error.matches(self._aravis.device_error_quark(), code) for code in gone):
                raise SourceError(f"the camera does not answer ({error.message})") from None
            raise Refused(error.message) from None


def _kind(aravis: Any, node: Any) -> Kind | None:
    # An enumeration is an integer and a string as well, a boolean an integer: the order matters.
    kinds: tuple[tuple[Any, Kind], ...] = (
        (aravis.GcEnumeration, "enumeration"),
        (aravis.GcBoolean, "boolean"),
        (aravis.GcCommand, "command"),
        (aravis.GcInteger, "integer"),
        (aravis.GcFloat, "float"),
        (aravis.GcString, "string"),
    )
    return next((kind for of, kind in kinds if isinstance(node, of)), None)
