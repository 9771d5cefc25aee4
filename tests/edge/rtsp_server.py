"""An RTSP camera for the tests, on GStreamer's server: every picture carries the time at which it was made.

    /usr/bin/python3 tests/edge/rtsp_server.py --port 8554 --user admin --password secret  # rtsp://127.0.0.1:8554/cam

Needs `gi`, which only Debian's Python has, and nothing else. A picture is `BITS` vertical bars, black for 0 and white
for 1, most significant first: milliseconds of CLOCK_MONOTONIC, which all processes share.
"""

import argparse
import time

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import Gio, GLib, Gst, GstRtsp, GstRtspServer  # noqa: E402

BITS = 32


def picture(width, height):
    """Grey bars over grey chroma, as I420 bytes."""
    now_ms = int(time.monotonic() * 1e3) & (1 << BITS) - 1
    bar = width // BITS
    row = b"".join((b"\xf0" if now_ms >> bit & 1 else b"\x10") * bar for bit in reversed(range(BITS)))
    return row * height + b"\x80" * (width * height // 2)


class Camera(GstRtspServer.RTSPMediaFactory):
    """One stream for all clients; after `change_after` pictures they come in another size."""

    def __init__(self, fps, change_after):
        super().__init__()
        self.fps, self.change_after = fps, change_after
        self.set_shared(True)
        self.set_launch(
            "( appsrc name=camera is-live=true format=time do-timestamp=true ! videoconvert "
            "! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=5 bitrate=500 threads=1 "
            "! rtph264pay name=pay0 pt=96 config-interval=-1 )"
        )

    def do_configure(self, media):
        appsrc = media.get_element().get_child_by_name("camera")
        count, gone = 0, False

        def push():
            nonlocal count
            width, height = (320, 192) if self.change_after and count >= self.change_after else (640, 352)
            if count in (0, self.change_after):
                caps = f"video/x-raw,format=I420,width={width},height={height},framerate={self.fps}/1"
                appsrc.set_property("caps", Gst.Caps.from_string(caps))
            # Refused before the pipeline has been started.
            if appsrc.emit("push-buffer", Gst.Buffer.new_wrapped(picture(width, height))) == Gst.FlowReturn.OK:
                count += 1
            return not gone

        def end(_media):
            nonlocal gone
            gone = True

        media.connect("unprepared", end)
        GLib.timeout_add(1000 // self.fps, push)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", default="8554")
    parser.add_argument("--fps", type=int, default=25)
    parser.add_argument("--change-after", type=int, default=0)
    parser.add_argument("--user")
    parser.add_argument("--password")
    parser.add_argument("--certificate", help="PEM with certificate and key: rtsps")
    options = parser.parse_args()
    Gst.init(None)
    server = GstRtspServer.RTSPServer(service=options.port, address="127.0.0.1")
    camera = Camera(options.fps, options.change_after)
    auth = GstRtspServer.RTSPAuth()
    token = GstRtspServer.RTSPToken()
    token.set_string("media.factory.role", "user")
    permissions = GstRtspServer.RTSPPermissions()
    permissions.add_permission_for_role("user", "media.factory.access", True)
    permissions.add_permission_for_role("user", "media.factory.construct", True)
    camera.set_permissions(permissions)
    if options.user:
        auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
        auth.add_digest(options.user, options.password, token)
    else:
        auth.set_default_token(token)
    if options.certificate:
        auth.set_tls_certificate(Gio.TlsCertificate.new_from_file(options.certificate))
    server.set_auth(auth)
    server.get_mount_points().add_factory("/cam", camera)
    if not server.attach(None):
        raise SystemExit(f"port {options.port} is taken")
    print("ready", flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
