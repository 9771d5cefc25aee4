"""Cameras through GStreamer: any pipeline, and the CSI cameras of a Jetson.

    pipeline_opener("gst:v4l2src device=/dev/video0 ! video/x-raw,width=1280,height=720")().read(timeout_s=1.0)

The pipeline's text goes to GStreamer's own parser. At its end comes an appsink that takes BGR, GRAY8 or NV12.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cv2
import numpy as np

from recontrast_edge.errors import InputError, MissingError, SourceError, UsageError
from recontrast_edge.preprocess import Image
from recontrast_edge.secrets import masked_uri
from recontrast_edge.sources.threaded import Picture, Slot, ThreadedSource, captured_at
from recontrast_edge.uri import number_option, parse_options, size_option, whole_option

OPEN_TIMEOUT_S = 10.0
"""A camera needs seconds until its first picture when its service has just been started."""

POLL_NS = 100_000_000

CAPS = "video/x-raw,format={BGR,GRAY8,NV12}"

SINK = "recontrast_sink"


def pipeline_opener(uri: str) -> Callable[[], ThreadedSource]:
    """Check a GStreamer pipeline and return what runs it; that raises SourceError where the pipeline fails.

    Args:
        uri: ``gst:`` and a pipeline as ``gst-launch-1.0`` takes it, without a sink. Its last element must be able to
            make BGR, GRAY8 or NV12; ``! videoconvert`` at the end always can.

    Raises:
        UsageError: GStreamer cannot parse it, or what it makes cannot be taken.
        MissingError: GStreamer, its Python bindings or an element are not there.
    """
    text = uri.removeprefix("gst:").strip()
    if not text or text.endswith("!"):
        raise UsageError(f"source {masked_uri(uri)!r}: expected gst:PIPELINE, e.g. gst:videotestsrc ! videoconvert")
    return _opener(uri, text, endless=False)


def csi_opener(uri: str) -> Callable[[], ThreadedSource]:
    """Check the URI of a CSI camera of a Jetson and return what opens it, through nvarguscamerasrc.

    That raises SourceError where there is no such camera, or it failed.

    Args:
        uri: ``csi:N``, N counting the sensors, with ``size=WxH`` (default 1920x1080), ``fps`` (default 30),
            ``sensor_mode=N``, ``flip=N`` (nvvidconv's flip-method, 0..7), ``exposure_us`` and ``gain`` (a factor); the
            latter two turn the automatics off.

    Raises:
        UsageError: a bad option.
        MissingError: GStreamer, its Python bindings or NVIDIA's elements are not there.
    """
    return _opener(uri, csi_pipeline(uri), endless=True)


def csi_pipeline(uri: str) -> str:
    """The pipeline of a CSI camera; see ``csi_opener``.

    The picture leaves NVIDIA's memory as NV12, half the bytes of BGR, which the ISP makes anyway.
    """
    what = f"source {uri!r}"
    sensor, _, query = uri.removeprefix("csi:").partition("?")
    options = parse_options(what, query, ("size", "fps", "sensor_mode", "flip", "exposure_us", "gain"))
    width, height = size_option(what, "size", options.get("size", "1920x1080"))
    fps = number_option(what, "fps", options.get("fps", "30"), low=1, high=1000)
    camera = f"nvarguscamerasrc sensor-id={whole_option(what, 'the sensor', sensor, low=0, high=15)}"
    if "sensor_mode" in options:
        camera += f" sensor-mode={whole_option(what, 'sensor_mode', options['sensor_mode'], low=0, high=31)}"
    if "exposure_us" in options:
        exposure_ns = round(1e3 * number_option(what, "exposure_us", options["exposure_us"], low=1, high=1e7))
        camera += f' exposuretimerange="{exposure_ns} {exposure_ns}" aelock=true'
    if "gain" in options:
        gain = number_option(what, "gain", options["gain"], low=1, high=256)
        camera += f' gainrange="{gain:g} {gain:g}" ispdigitalgainrange="1 1"'
    flip = whole_option(what, "flip", options.get("flip", "0"), low=0, high=7)
    rate = f"{round(fps * 1000)}/1000"
    return (
        f"{camera} ! video/x-raw(memory:NVMM),width={width},height={height},framerate={rate} "
        f"! nvvidconv flip-method={flip} ! video/x-raw,format=NV12"
    )


def _opener(uri: str, text: str, *, endless: bool) -> Callable[[], ThreadedSource]:
    gst, video = _bindings()
    # Elements open nothing as long as nobody changes their state.
    _parse(gst, uri, text)
    run = partial(_run, gst, video, uri, text, endless)
    return partial(ThreadedSource, uri, run, open_timeout_s=OPEN_TIMEOUT_S)


def _bindings() -> tuple[Any, Any]:
    """The modules Gst and GstVideo.

    Raises:
        MissingError: they are not there.
    """
    # GStreamer brings libunwind, whose functions would from then on unwind C++ exceptions of any library that is loaded
    # later, such as a camera's GenTL producer: the process would end there. Who is loaded for all first is found first.
    with contextlib.suppress(OSError):
        ctypes.CDLL("libgcc_s.so.1", mode=ctypes.RTLD_GLOBAL)
    try:
        import gi

        for module in ("Gst", "GstApp", "GstVideo"):
            gi.require_version(module, "1.0")
        # GstApp gives appsink its methods.
        from gi.repository import Gst, GstApp, GstVideo  # noqa: F401
    except (ImportError, ValueError) as error:
        raise MissingError(
            f"GStreamer's Python bindings are missing ({error}). Only the system's Python can have them: `sudo apt-get "
            "install python3-gi gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good`, then "
            "make the environment with `/usr/bin/python3 -m venv --system-site-packages`"
        ) from None
    Gst.init(None)
    return Gst, GstVideo


def _run(gst: Any, video: Any, uri: str, text: str, endless: bool, slot: Slot) -> None:
    pipeline = _parse(gst, uri, text)
    sink = pipeline.get_by_name(SINK)
    live = any_picture = False

    def take(_sink: Any) -> Any:
        """On GStreamer's thread, for every picture."""
        nonlocal any_picture
        if slot.closing:
            return gst.FlowReturn.EOS
        any_picture = True
        slot.put(_picture(gst, video, pipeline, sink.try_pull_sample(0), live=live))
        return gst.FlowReturn.OK

    handler = sink.connect("new-sample", take)
    try:
        # A live pipeline makes pictures only when it plays, and says so; any other shows its first one to be asked.
        live = pipeline.set_state(gst.State.PAUSED) == gst.StateChangeReturn.NO_PREROLL
        sink.set_property("drop", live)
        _settle(gst, uri, pipeline, slot)
        # The first pictures come on GStreamer's thread, and none of a file's may be lost.
        slot.expect(live=live)
        pipeline.set_state(gst.State.PLAYING)
        _settle(gst, uri, pipeline, slot)
        slot.opened(live=live)
        ended = False
        while not (slot.closing or ended):
            ended = _ended(gst, uri, pipeline, POLL_NS)
        if ended and (endless or not any_picture):
            raise SourceError(f"{masked_uri(uri)}: the stream ended{'' if any_picture else ' without a picture'}")
    finally:
        pipeline.set_state(gst.State.NULL)
        # The pipeline would keep itself alive.
        sink.disconnect(handler)


def _parse(gst: Any, uri: str, text: str) -> Any:
    from gi.repository import GLib

    try:
        return gst.parse_launch(f"{text} ! appsink name={SINK} caps={CAPS} sync=false max-buffers=1 emit-signals=true")
    except GLib.Error as error:
        missing, reason = error.matches(gst.ParseError.quark(), gst.ParseError.NO_SUCH_ELEMENT), error.message
    if missing:
        raise MissingError(
            f"{masked_uri(uri)}: {reason}; `gst-inspect-1.0 ELEMENT` tells whether this machine has one, and NVIDIA's "
            "come with JetPack"
        )
    raise UsageError(f"{masked_uri(uri)}: the pipeline is refused: {reason}")


def _settle(gst: Any, uri: str, pipeline: Any, slot: Slot) -> None:
    """Wait until a change of state is done."""
    while not slot.closing and pipeline.get_state(POLL_NS)[0] == gst.StateChangeReturn.ASYNC:
        _raise_error(uri, pipeline.get_bus().pop_filtered(gst.MessageType.ERROR))
    if pipeline.get_state(0)[0] == gst.StateChangeReturn.FAILURE:
        _raise_error(uri, pipeline.get_bus().timed_pop_filtered(POLL_NS, gst.MessageType.ERROR))
        raise SourceError(f"{masked_uri(uri)}: the pipeline cannot be started")


def _ended(gst: Any, uri: str, pipeline: Any, timeout_ns: int) -> bool:
    """Whether the stream is over.

    Raises:
        SourceError: an element failed.
    """
    message = pipeline.get_bus().timed_pop_filtered(timeout_ns, gst.MessageType.ERROR | gst.MessageType.EOS)
    if message is not None and message.type == gst.MessageType.EOS:
        return True
    _raise_error(uri, message)
    return False


def _raise_error(uri: str, message: Any | None) -> None:
    if message is None:
        return
    error, debug = message.parse_error()
    # The last line of what is meant for developers often has the cause.
    detail = f" ({debug.splitlines()[-1]})" if debug else ""
    raise SourceError(f"{masked_uri(uri)}: {message.src.get_name()}: {error.message}{detail}")


def _picture(gst: Any, video: Any, pipeline: Any, sample: Any, *, live: bool) -> Picture:
    buffer = sample.get_buffer()
    info = video.VideoInfo.new_from_caps(sample.get_caps())
    # Where the lines lie: what the buffer says counts more than what its format would imply.
    layout = video.buffer_get_video_meta(buffer) or info
    planes = tuple(zip(layout.offset, layout.stride, strict=True))
    captured_s, time_ns = time.monotonic(), None
    if buffer.pts != gst.CLOCK_TIME_NONE:
        time_ns = buffer.pts
        if live:
            captured_s = captured_at((pipeline.get_base_time() + buffer.pts) / 1e9)
    damaged = buffer.has_flags(gst.BufferFlags.CORRUPTED)
    # A copy: cameras have few buffers, and wait for each.
    data = buffer.extract_dup(0, buffer.get_size())
    return Picture(
        partial(_image, data, info.finfo.name, (info.width, info.height), planes),
        captured_s,
        time_ns,
        "GStreamer marks the picture as damaged" if damaged else None,
    )


def _image(data: bytes, pixel_format: str, size_wh: tuple[int, int], planes: Sequence[tuple[int, int]]) -> Image:
    """A BGR, GRAY8 or NV12 buffer as (H, W) or (H, W, 3) BGR uint8.

    Args:
        planes: offset and stride of each plane in bytes.
    """
    width, height = size_wh
    flat = np.frombuffer(data, np.uint8)

    def plane(index: int, rows: int, shape: tuple[int, ...]) -> Image:
        """(rows, *shape) pixels of a plane whose lines may be longer."""
        offset, stride = planes[index]
        if len(flat) < offset + (rows - 1) * stride + math.prod(shape):
            raise InputError(f"a buffer of {len(flat)} bytes is too small for {width}x{height} {pixel_format}")
        strides = (stride, *(math.prod(shape[axis + 1 :]) for axis in range(len(shape))))
        return np.lib.stride_tricks.as_strided(flat[offset:], (rows, *shape), strides, writeable=False)

    if pixel_format == "GRAY8":
        return np.ascontiguousarray(plane(0, height, (width,)))
    if pixel_format == "BGR":
        return np.ascontiguousarray(plane(0, height, (width, 3)))
    if width % 2 or height % 2:
        raise InputError(f"NV12 of {width}x{height}; expected even sides, add ! videoconvert to the pipeline")
    luma, chroma = plane(0, height, (width,)), plane(1, height // 2, (width // 2, 2))
    return np.asarray(cv2.cvtColorTwoPlane(luma, chroma, cv2.COLOR_YUV2BGR_NV12), np.uint8)
