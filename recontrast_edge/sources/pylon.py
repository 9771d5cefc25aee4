"""Basler cameras, through pylon.

    open_source("pylon:40012345?exposure_us=2000&fps=30").read(timeout_s=1.0)

``PYLON_CAMEMU=1`` in the environment adds a simulated camera, ``pylon:0815-0000``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np

from recontrast_edge.errors import MissingError, SourceError, UsageError
from recontrast_edge.secrets import masked_uri
from recontrast_edge.sources.genicam import Buffer, Feature, Kind, Refused, Value, genicam_opener, parse_camera_uri
from recontrast_edge.sources.threaded import ThreadedSource

NO_ID = 2**64 - 1
"""What pylon says where a transport has no frame ids."""

_closed: dict[str, Any] = {}
"""Full name -> camera that was closed and may be opened again: each new one takes 46 KB that pylon never gives back."""


def pylon_opener(uri: str) -> Callable[[], ThreadedSource]:
    """Check ``pylon:SERIAL?OPTIONS`` and return what opens it.

    SERIAL may be the camera's user-defined name, or empty where there is one camera.

    Raises:
        UsageError: see ``parse_camera_uri``.
        MissingError: pylon is not installed.
    """
    name, options = parse_camera_uri(uri, "pylon")
    import_pylon()
    return genicam_opener(uri, options, partial(PylonCamera, masked_uri(uri), name))


def import_pylon() -> Any:
    """The library.

    Raises:
        MissingError: it is not installed.
    """
    try:
        from pypylon import pylon
    except ImportError as error:
        raise MissingError(
            f"pylon cameras need pypylon; run: pip install 'recontrast-edge[cameras]' ({error})"
        ) from None
    return pylon


def find_devices() -> list[Any]:
    """What pylon sees: its ``DeviceInfo`` objects."""
    pylon = import_pylon()
    try:
        return list(pylon.TlFactory.GetInstance().EnumerateDevices())
    except _errors() as error:
        raise SourceError(f"pylon cannot look for cameras: {error}") from None


def _errors() -> type[Exception]:
    from pypylon import genicam

    base: type[Exception] = genicam.GenericException
    return base


class PylonCamera:
    """An opened Basler camera; see ``Camera``.

    Args:
        what: the source, for messages.
        name: serial number or user-defined name; empty for the only one.

    Raises:
        UsageError: several cameras, and no name.
        SourceError: not there, or in use.
    """

    def __init__(self, what: str, name: str) -> None:
        self._what = what
        self._pylon = import_pylon()
        self._errors = _errors()
        found = find_devices()
        matching = [info for info in found if not name or name in (info.GetSerialNumber(), info.GetUserDefinedName())]
        if not matching:
            there = ", ".join(info.GetSerialNumber() for info in found) or "none"
            raise SourceError(f"{what}: no such camera; pylon sees {there}")
        if len(matching) > 1:
            there = ", ".join(f"pylon:{info.GetSerialNumber()}" for info in matching)
            raise UsageError(f"{what}: there are several cameras; expected one of {there}")
        self._full_name = matching[0].GetFullName()
        with self._failing("cannot be opened; is it in use by another program?"):
            self._camera = _closed.pop(self._full_name, None)
            if self._camera is None:
                device = self._pylon.TlFactory.GetInstance().CreateDevice(matching[0])
                self._camera = self._pylon.InstantCamera(device)
            try:
                self._camera.Open()
            except self._errors:
                self._camera.DestroyDevice()
                raise
        self._nodes = self._camera.GetNodeMap()
        self._tick_ns = 1.0

    def feature(self, name: str) -> Feature | None:
        """See ``Camera``."""
        with self._failing("does not answer"):
            node = self._nodes.GetNode(name)
            kind = None if not node.IsValid() else _kinds().get(node.GetNode().GetPrincipalInterfaceType())
            return None if kind is None else PylonFeature(node, kind, self._errors, self._is_lost)

    def feature_names(self) -> Sequence[str]:
        """See ``Camera``."""
        with self._failing("does not answer"):
            nodes = [node.GetNode() for node in self._nodes.GetNodes()]
            return [node.GetName() for node in nodes if node.IsFeature()]

    def start(self, buffers: int) -> None:
        """See ``Camera``."""
        frequency = self.feature("GevTimestampTickFrequency")
        if frequency is not None:
            with suppress(Refused):
                self._tick_ns = 1e9 / float(frequency.get())
        with self._failing("cannot start"):
            self._camera.MaxNumBuffer.SetValue(buffers)
            self._camera.StartGrabbing(self._pylon.GrabStrategy_OneByOne)

    def grab(self, timeout_s: float) -> Buffer | None:
        """See ``Camera``."""
        with self._failing("broke off"):
            result = self._camera.RetrieveResult(round(timeout_s * 1e3), self._pylon.TimeoutHandling_Return)
            if not result.IsValid():
                self._check_there()
                return None
            try:
                return self._buffer(result)
            finally:
                result.Release()

    def _buffer(self, result: Any) -> Buffer:
        frame_id = None if result.BlockID == NO_ID else int(result.BlockID)
        # Failed buffers have been seen with error code 0.
        if not result.GrabSucceeded():
            self._check_there()
            return Buffer(frame_id, incomplete=f"{result.ErrorDescription} (0x{result.ErrorCode:08X})")
        return Buffer(
            frame_id,
            round(result.TimeStamp * self._tick_ns) or None,
            data=np.frombuffer(result.GetBuffer(), np.uint8),
            width=result.Width,
            height=result.Height,
            pixel_format=result.PixelType,
            padding_x=result.PaddingX,
        )

    def _is_lost(self) -> bool:
        return bool(self._camera.IsCameraDeviceRemoved())

    def _check_there(self) -> None:
        if self._is_lost():
            raise SourceError(f"{self._what}: the camera is gone; was it unplugged?")

    @contextmanager
    def _failing(self, trouble: str) -> Any:
        try:
            yield
        except self._errors as error:
            raise SourceError(f"{self._what}: the camera {trouble} ({_first_line(error)})") from None

    def close(self) -> None:
        """See ``Camera``."""
        try:
            self._camera.StopGrabbing()
            self._camera.Close()
            gone = self._is_lost()
        except self._errors:
            gone = True
        if not gone:
            _closed[self._full_name] = self._camera
            return
        with suppress(self._errors):
            self._camera.DestroyDevice()


class PylonFeature:
    """See ``Feature``."""

    def __init__(self, node: Any, kind: Kind, errors: type[Exception], is_lost: Callable[[], bool]) -> None:
        self.kind = kind
        self._node = node
        self._errors = errors
        self._is_lost = is_lost

    def writable(self) -> bool:
        """See ``Feature``."""
        return bool(self._call(self._node.IsWritable))

    def get(self) -> Value:
        """See ``Feature``."""
        value: Value = self._call(self._node.GetValue)
        return value

    def set(self, value: Value) -> None:
        """See ``Feature``."""
        if self.kind == "command":
            self._call(self._node.Execute)
        else:
            self._call(partial(self._node.SetValue, value))

    def limits(self) -> tuple[float, float, float]:
        """See ``Feature``."""
        step = self._call(self._node.GetInc) if self.kind == "integer" else 0
        return self._call(self._node.GetMin), self._call(self._node.GetMax), step

    def entries(self) -> Sequence[str]:
        """See ``Feature``."""
        return list(self._call(self._node.GetSettableValues))

    def _call(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except self._errors as error:
            if self._is_lost():
                raise SourceError("the camera is gone; was it unplugged?") from None
            raise Refused(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _kinds() -> dict[int, Kind]:
    from pypylon import genicam

    return {
        genicam.intfIInteger: "integer",
        genicam.intfIFloat: "float",
        genicam.intfIBoolean: "boolean",
        genicam.intfIEnumeration: "enumeration",
        genicam.intfIString: "string",
        genicam.intfICommand: "command",
    }
