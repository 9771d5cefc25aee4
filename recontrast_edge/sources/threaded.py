"""A camera's driver on a thread of its own: whatever it does, a reader waits no longer than it wants.

    ThreadedSource("usb:0", run, open_timeout_s=5.0).read(timeout_s=0.1)  # the newest picture

Drivers block: in an open that hangs, in a wait for a picture that never comes, in a close. Everything that a driver
is asked to do happens in one function on one thread, so that no call meets another one from elsewhere, and the thread
that reads only ever waits for a picture.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from recontrast_edge.errors import InputError, RecontrastError, SourceError
from recontrast_edge.frame import EndOfStream, Frame
from recontrast_edge.preprocess import Image
from recontrast_edge.secrets import mask, masked_uri
from recontrast_edge.verdict import Fault

CLOSE_TIMEOUT_S = 2.0
"""A driver that has not let go by then is left to itself; its thread ends, and frees everything, when it does."""


@dataclass(frozen=True)
class Picture:
    """What a driver delivers.

    Attributes:
        convert: makes (H, W) mono or (H, W, 3) BGR uint8 of it, on the reader's thread and only if somebody wants it;
            raises InputError where it cannot be decoded. Must not refer to memory that the driver takes back.
        captured_s: when it was there, on ``time.monotonic()``'s clock.
        time_ns: the device's own timestamp, in nanoseconds.
        incomplete: a sentence on what of it was lost on the way; then it is never converted.
        lost: pictures that were made before this one, but never arrived.
        camera_frame_id: the device's own id, unwrapped to a number that only rises.
        part_id: trigger or part number, where the device tells it.
    """

    convert: Callable[[], Image]
    captured_s: float
    time_ns: int | None = None
    incomplete: str | None = None
    lost: int = 0
    camera_frame_id: int | None = None
    part_id: str | None = None


class Slot:
    """Where a driver's thread puts pictures, and learns that it should end.

    Args:
        capacity: pictures it holds for a reader who is late.
    """

    def __init__(self, capacity: int = 1) -> None:
        self._changed = threading.Condition()
        self._opened = False
        self._live = True
        self._capacity = capacity
        self._pictures: deque[tuple[int, Picture]] = deque()
        self._next_id = 0
        self._counters = {"incomplete": 0, "lost": 0}
        self._closing = False
        self._ended = False
        self._error: RecontrastError | None = None

    # For the driver's thread.

    @property
    def closing(self) -> bool:
        """The driver should let go of the device and return. Where it waits, it asks at least every 100 ms."""
        return self._closing

    def expect(self, *, live: bool) -> None:
        """What the pictures will be, where another thread may put some before this one calls ``opened``."""
        with self._changed:
            self._live = live

    def opened(self, *, live: bool = True) -> None:
        """The device is open; ``live``: pictures come by themselves, and whoever comes late gets the newest."""
        with self._changed:
            self._opened, self._live = True, live
            self._changed.notify_all()

    def put(self, picture: Picture) -> None:
        """Add a picture. When it is full, the oldest makes room for a live one; any other waits for its turn."""
        with self._changed:
            if not self._live:
                self._changed.wait_for(lambda: self._closing or len(self._pictures) < self._capacity)
            if self._closing:
                return
            if len(self._pictures) == self._capacity:
                self._pictures.popleft()
            self._pictures.append((self._next_id + picture.lost, picture))
            self._next_id += 1 + picture.lost
            self._counters["lost"] += picture.lost
            self._counters["incomplete"] += picture.incomplete is not None
            self._changed.notify_all()

    def end(self, error: RecontrastError | None) -> None:
        """There will be no more pictures, because of an error or because the stream is over."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    # For everybody else.

    @property
    def counters(self) -> dict[str, int]:
        """So far: pictures that came incomplete, and those that never came."""
        with self._changed:
            return dict(self._counters)

    def wait_opened(self, timeout_s: float) -> bool | None:
        """Whether the source is live; None where the device was not open in time.

        Raises:
            RecontrastError: it could not be opened.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._opened or self._ended, timeout_s)
            if self._error is not None and not self._opened:
                raise _again(self._error)
            return self._live if self._opened else None

    def take(self, timeout_s: float) -> tuple[int, Picture] | None:
        """The oldest picture it holds, with its id, or None if there is none in time; after the last one what ended it.

        Raises:
            EndOfStream: the stream is over, or the source was closed.
            RecontrastError: the driver failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._ended or bool(self._pictures), timeout_s)
            if self._closing:
                raise EndOfStream
            if self._pictures:
                taken = self._pictures.popleft()
                self._changed.notify_all()
                return taken
            if self._error is not None:
                raise _again(self._error)
            if self._ended:
                raise EndOfStream
            return None

    def close(self) -> None:
        """Nobody wants pictures any more."""
        with self._changed:
            self._closing = True
            self._pictures.clear()
            self._changed.notify_all()


def _again(error: RecontrastError) -> RecontrastError:
    """A fresh one to raise: the traceback of one that is raised again and again grows."""
    return type(error)(str(error))


_hanging: dict[str, threading.Thread] = {}
"""URI -> thread of a driver that did not let go."""


class ThreadedSource:
    """A source whose driver is ``run``, on a thread of its own.

    Args:
        uri: as given.
        run: opens the device, says so with ``Slot.opened``, puts pictures until ``Slot.closing``, and lets go of the
            device whatever happens. It returns at the end of the stream and raises where something is wrong.
        open_timeout_s: how long opening may take, in seconds.
        buffers: pictures it holds for a reader who is late; beyond them the oldest live one makes room, which its
            reader sees as a jump of the frame ids.
        triggered: a part or an encoder makes the pictures come, so that none for a while is no fault.

    Raises:
        SourceError: the device could not be opened in time, or a driver still hangs in it.
        RecontrastError: whatever ``run`` raised before the device was open.
    """

    def __init__(
        self,
        uri: str,
        run: Callable[[Slot], None],
        *,
        open_timeout_s: float,
        buffers: int = 1,
        triggered: bool = False,
    ) -> None:
        self.uri = masked_uri(uri)
        if uri in _hanging and _hanging[uri].is_alive():
            # One more thread for every try would fill the memory.
            raise SourceError(
                f"{self.uri}: the driver still hangs in its last use; if this stays, reconnect the camera or restart"
            )
        self._key = uri
        self.triggered = triggered
        self._slot = Slot(buffers)
        self._thread = threading.Thread(
            target=_drive, args=(self.uri, run, self._slot), name=f"driver {self.uri}", daemon=True
        )
        self._thread.start()
        try:
            live = self._slot.wait_opened(open_timeout_s)
            if live is None:
                raise SourceError(f"{self.uri}: could not be opened within {open_timeout_s:g} s")
        except BaseException:
            self.close()
            raise
        self.live = live

    @property
    def counters(self) -> dict[str, int]:
        """Pictures so far that came incomplete, and those that were lost on the way."""
        return self._slot.counters

    def read(self, timeout_s: float) -> Frame | None:
        """See ``Source.read``."""
        taken = self._slot.take(timeout_s)
        if taken is None:
            return None
        frame_id, picture = taken
        image: Image | None = None
        code, detail = None, picture.incomplete
        if detail is not None:
            code = Fault.INCOMPLETE_FRAME.value
        else:
            try:
                image = picture.convert()
            except InputError as error:
                code, detail = Fault.UNREADABLE_IMAGE.value, str(error)
        return Frame(
            frame_id,
            self.uri,
            image,
            picture.captured_s,
            fault=code,
            detail=detail,
            part_id=picture.part_id,
            camera_frame_id=picture.camera_frame_id,
            camera_time_ns=picture.time_ns,
        )

    def close(self) -> None:
        """See ``Source.close``; returns within ``CLOSE_TIMEOUT_S``, even where the driver does not."""
        self._slot.close()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            _hanging[self._key] = self._thread
        else:
            _hanging.pop(self._key, None)


def _drive(uri: str, run: Callable[[Slot], None], slot: Slot) -> None:
    failure: RecontrastError | None = None
    try:
        run(slot)
    except RecontrastError as error:
        failure = type(error)(mask(str(error)))
    except BaseException as error:
        # Nobody else would tell the reader that nothing comes any more.
        failure = SourceError(f"{uri}: the driver failed ({type(error).__name__}: {mask(str(error))})")
    # Outside of the handlers, so that it drags along neither their tracebacks nor a message with a password.
    slot.end(failure)


def captured_at(device_time_s: float) -> float:
    """When a picture was taken, from a driver that claims to stamp on ``time.monotonic()``'s clock.

    Some stamp on another clock or not at all: only what lies within the last second is believed.
    """
    now_s = time.monotonic()
    return device_time_s if now_s - 1.0 <= device_time_s <= now_s else now_s
