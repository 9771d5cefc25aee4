"""Network streams: real servers that stall, die, come back, refuse, and change what they send."""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import cv2
import numpy as np
import pytest

from recontrast_edge.errors import EXIT_FAULTS, InputError, SourceError, UsageError
from recontrast_edge.frame import EndOfStream, Frame, Source
from recontrast_edge.sources import open_source
from recontrast_edge.sources.rtsp import _deliver
from recontrast_edge.sources.threaded import Picture, Slot
from tests.edge.leaks import assert_reopening_leaves_nothing
from tests.edge.rtsp_camera import RtspCamera, free_port, lag_ms, stop

CANARY = "c@nary:p/w%d"


@pytest.fixture(scope="module")
def camera() -> Iterator[RtspCamera]:
    with RtspCamera() as running:
        yield running


def next_frame(source: Source, timeout_s: float = 5.0) -> Frame:
    frame = source.read(timeout_s)
    assert frame is not None, f"no frame within {timeout_s} s"
    return frame


def error_after_frames(source: Source) -> tuple[list[Frame], str]:
    """All frames that still come, and the error after them."""
    frames = []
    while True:
        try:
            frames.append(next_frame(source))
        except SourceError as error:
            return frames, str(error)


def reopened(uri: str, timeout_s: float) -> Source:
    """As the supervisor does, but without its waiting."""
    give_up_s = time.monotonic() + timeout_s
    while True:
        try:
            return open_source(uri)
        except SourceError:
            assert time.monotonic() < give_up_s
            time.sleep(0.05)


def lags_ms(source: Source, *, seconds: float, pause_s: float) -> list[float]:
    lags = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        image = next_frame(source).image
        assert image is not None
        lags.append(lag_ms(image))
        time.sleep(pause_s)
    return lags


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_a_slow_reader_gets_the_newest_picture(camera: RtspCamera, transport: str) -> None:
    with closing(open_source(f"{camera.uri}?transport={transport}")) as source:
        assert source.live
        first = next_frame(source)
        assert first.frame_id == 0
        assert first.image is not None
        assert first.image.shape == (352, 640, 3)
        # Read in order, the last picture would be almost two seconds old.
        lags = lags_ms(source, seconds=2, pause_s=0.25)
        assert statistics.median(lags) < 250
        last = next_frame(source)
        assert last.frame_id > first.frame_id + 25
        assert time.monotonic() - last.captured_s < 1
        assert first.camera_time_ns is not None
        assert last.camera_time_ns is not None
        assert last.camera_time_ns - first.camera_time_ns == pytest.approx(
            (last.frame_id - first.frame_id) * 4e7, rel=0.3
        )


def test_where_decoding_cannot_keep_up_pictures_are_skipped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    put = Slot.put

    def slow_put(slot: Slot, picture: Picture) -> None:
        put(slot, picture)
        time.sleep(0.04)

    monkeypatch.setattr(Slot, "put", slow_put)
    with RtspCamera(fps=50) as camera, closing(open_source(camera.uri)) as source:
        next_frame(source)
        # Half of what comes can be decoded: a queue would be 2.5 s long in the end.
        lags = lags_ms(source, seconds=5, pause_s=0.0)
        assert max(lags) < 1600
        assert getattr(source, "counters")["lost"] > 50  # noqa: B009 - not part of the protocol
        assert next_frame(source).frame_id > 180


def test_a_stopped_server_is_noticed() -> None:
    with RtspCamera() as camera, closing(open_source(camera.uri)) as source:
        next_frame(source)
        stop(camera)
        started_s = time.monotonic()
        # What was on its way.
        while source.read(0.3) is not None:
            pass
        assert time.monotonic() - started_s < 1.0
        with pytest.raises(SourceError, match=r"no data for 1\.5 s"):
            source.read(3.0)
        assert time.monotonic() - started_s < 2.0


def test_the_first_picture_may_take_longer_than_the_next() -> None:
    """A container whose first data come after two times FFmpeg's timeout, and which then falls silent."""
    picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="bgr24")
    asked = 0

    def demux(_stream: object) -> Iterator[object]:
        nonlocal asked
        asked += 1
        time.sleep(0.1)
        if asked == 3:
            yield SimpleNamespace(size=1, is_keyframe=True, is_corrupt=False)
            time.sleep(0.1)
        raise av.error.ExitError(1, "timeout")

    decoder = SimpleNamespace(flags=0, decode=lambda _packet: [picture])
    stream = SimpleNamespace(codec_context=decoder)
    container: Any = SimpleNamespace(streams=SimpleNamespace(video=[stream]), demux=demux)
    slot = Slot()
    with pytest.raises(av.error.ExitError):
        _deliver(container, slot, open_timeout_s=1.0, read_timeout_s=0.3)
    assert slot.take(0.0) is not None
    assert asked == 3


def test_close_is_prompt_although_the_server_is_silent() -> None:
    with RtspCamera() as camera:
        source = open_source(camera.uri)
        next_frame(source)
        outcomes: list[str] = []

        def read() -> None:
            try:
                while True:
                    source.read(5.0)
            except EndOfStream:
                outcomes.append("end")

        reader = threading.Thread(target=read)
        reader.start()
        stop(camera)
        time.sleep(0.2)
        started_s = time.monotonic()
        source.close()
        reader.join(0.5)
        assert outcomes == ["end"]
        assert time.monotonic() - started_s < 2.3
        source.close()


def run_line(tiny_model: Path, folder: Path, times: int) -> None:
    """`recontrast-edge run` on a camera that is stopped, killed and started again so many times."""
    camera = RtspCamera(user="admin", password=CANARY)
    records, summary = folder / "records.jsonl", folder / "summary.json"
    environment = {**os.environ, "CAMERA_LOGIN": f"admin:{CANARY}"}
    uri = f"{camera.uri}?credentials=env:CAMERA_LOGIN"
    command = [sys.executable, "-m", "recontrast_edge", "run", "--engine", str(tiny_model), "--source", uri]
    output = ["--output", f"jsonl:{records}", "--summary", str(summary), "--threads", "1"]
    camera.start()
    try:
        with (folder / "log").open("w") as log:
            line = subprocess.Popen([*command, *output], stdout=log, stderr=log, env=environment)
        wait_for(records, lambda record: record.get("verdict") in ("PASS", "REJECT"), 0, timeout_s=30)
        for _ in range(times):
            seen = len(records.read_bytes())
            stop(camera)
            stopped_s = time.monotonic()
            # Shortly after its first frame nobody knows its rate yet, and the source itself is the first to notice.
            wait_for(records, lambda record: record["fault"] in ("source_stale", "source_failed"), seen, timeout_s=10)
            assert time.monotonic() - stopped_s < 2.0
            camera.kill()
            camera.start()
            started_s = time.monotonic()
            seen = len(records.read_bytes())
            wait_for(records, lambda record: record.get("verdict") in ("PASS", "REJECT"), seen, timeout_s=10)
            assert time.monotonic() - started_s < 3.0
        line.terminate()
        assert line.wait(10) == EXIT_FAULTS
    finally:
        line.kill()
        line.wait()
        camera.kill()
    counts = json.loads(summary.read_text())
    assert counts["captured"] == counts["judged"] + counts["dropped"]
    assert counts["cameras"][0]["reconnects"] == times
    for path in folder.iterdir():
        TestRefusals().assert_hidden(path.read_text())


def wait_for(records: Path, wanted: Callable[[dict[str, Any]], bool], offset: int, *, timeout_s: float) -> None:
    """Until a record behind an offset in the file is as wanted."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        written = records.read_bytes()[offset:] if records.exists() else b""
        complete = written[: written.rfind(b"\n") + 1].splitlines()
        if any(wanted(json.loads(record)) for record in complete):
            return
        time.sleep(0.02)
    raise AssertionError(f"no such record within {timeout_s} s; the last one is {complete[-1:]}")


def test_a_line_goes_stale_and_runs_again(tiny_model: Path, tmp_path: Path) -> None:
    run_line(tiny_model, tmp_path, 1)


@pytest.mark.soak
def test_a_line_goes_stale_and_runs_again_twenty_times(tiny_model: Path, tmp_path: Path) -> None:
    """About two minutes."""
    run_line(tiny_model, tmp_path, 20)


def restart(times: int) -> None:
    camera = RtspCamera()
    camera.start()
    try:
        source = open_source(camera.uri)
        next_frame(source)
        for _ in range(times):
            camera.kill()
            assert "127.0.0.1" in error_after_frames(source)[1]
            source.close()
            camera.start()
            started_s = time.monotonic()
            source = reopened(camera.uri, 3.0)
            next_frame(source)
            assert time.monotonic() - started_s < 3.0
        source.close()
    finally:
        camera.kill()


def test_frames_come_again_after_a_restart() -> None:
    restart(3)


@pytest.mark.soak
def test_frames_come_again_after_twenty_restarts() -> None:
    """About a minute."""
    restart(20)


def test_a_stream_may_change_its_size() -> None:
    with RtspCamera(change_after=40) as camera, closing(open_source(camera.uri)) as source:
        shapes: list[tuple[int, ...]] = []
        end_s = time.monotonic() + 10
        while len(shapes) < 2 and time.monotonic() < end_s:
            frame = next_frame(source)
            if frame.image is not None and frame.image.shape not in shapes:
                shapes.append(frame.image.shape)
        assert shapes == [(352, 640, 3), (192, 320, 3)]


class TestRefusals:
    def assert_hidden(self, text: str) -> None:
        for secret in ("c@nary", "c%40nary", "p/w%d", "p%2Fw%25d"):
            assert secret not in text

    def test_a_password_with_all_kinds_of_characters_is_taken_and_a_wrong_one_is_not_shown(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with RtspCamera(user="admin", password=CANARY) as camera:
            monkeypatch.setenv("CAMERA_LOGIN", f"admin:{CANARY}")
            with closing(open_source(f"{camera.uri}?credentials=env:CAMERA_LOGIN")) as source:
                next_frame(source)
                self.assert_hidden(source.uri)
            right = camera.uri.replace("://", "://admin:c%40nary%3Ap%2Fw%25d@")
            with closing(open_source(right)) as source:
                next_frame(source)
                self.assert_hidden(source.uri + "".join(thread.name for thread in threading.enumerate()))
            wrong = camera.uri.replace("://", "://admin:c%40nary%3Ap%2Fw%25d2@")
            with pytest.raises(UsageError, match="refuses the user or the password") as caught:
                open_source(wrong)
            self.assert_hidden("".join(traceback.format_exception(caught.value)) + repr(caught.value))
            error: BaseException | None = caught.value
            while error is not None:
                self.assert_hidden(str(error))
                error = error.__cause__ or error.__context__
            camera.kill()
            with pytest.raises(SourceError) as refused:
                open_source(right)
            self.assert_hidden("".join(traceback.format_exception(refused.value)))
        self.assert_hidden("".join(capfd.readouterr()))

    def test_no_such_stream(self, camera: RtspCamera) -> None:
        with pytest.raises(SourceError, match="no such stream"):
            open_source(camera.uri.replace("/cam", "/none"))

    def test_nobody_there(self) -> None:
        with pytest.raises(SourceError, match="refused"):
            open_source(f"rtsp://127.0.0.1:{free_port()}/cam")

    @pytest.mark.parametrize("banner", [b"", b"SSH-2.0-OpenSSH_9.2\r\n"])
    def test_another_kind_of_server(self, banner: bytes) -> None:
        done = threading.Event()
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def answer() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(banner)
                    done.wait(5)

            thread = threading.Thread(target=answer)
            thread.start()
            started_s = time.monotonic()
            port = listener.getsockname()[1]
            with pytest.raises(SourceError, match=f"127.0.0.1:{port}"):
                open_source(f"rtsp://127.0.0.1:{port}/cam?open_timeout_s=0.5")
            assert time.monotonic() - started_s < 2
            done.set()
            thread.join()

    @pytest.mark.parametrize(
        ("uri", "message"),
        [
            ("rtsp://camera/cam?trasport=udp", "did you mean 'transport'"),
            ("rtsp://camera/cam?transport=sctp", "tcp or udp"),
            ("rtsp://camera/cam?timeout_s=0", "timeout_s must be"),
            ("rtsp://camera/cam?ca_file=ca.pem", "rtsps and https only"),
            ("rtsps://camera/cam?ca_file=none.pem", "no such file"),
            ("rtsps://camera/cam?tls_verify=no", "0 or 1"),
            ("http://camera/cam?transport=tcp", "rtsp only"),
            ("rtsp://", "rtsp://HOST/PATH"),
            ("rtsp://admin:canary@camera/cam?transport=x", r"admin:\*\*\*@camera"),
            ("rtsp://camera/cam?credentials=env:NOBODY_SET_THIS", "NOBODY_SET_THIS is not set"),
        ],
    )
    def test_bad_options(self, uri: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            open_source(uri)

    def test_a_file_of_credentials_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="credentials"):
            open_source(f"rtsp://camera/cam?credentials=file:{tmp_path / 'none'}")


def test_options_of_the_camera_reach_it() -> None:
    """Its own query is passed on, ours is not."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(4096))
                connection.sendall(b"RTSP/1.0 404 Not Found\r\nCSeq: 1\r\n\r\n")
                connection.recv(4096)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(SourceError, match="no such stream"):
            open_source(
                f"rtsp://127.0.0.1:{listener.getsockname()[1]}/real?channel=1&transport=tcp&subtype=0&timeout_s=1"
            )
        thread.join()
    assert re.match(rb"OPTIONS rtsp://127.0.0.1:[0-9]+/real\?channel=1&subtype=0 ", asked[0])


def test_tls_checks_the_certificate(tmp_path: Path) -> None:
    certificate, key, both = (tmp_path / name for name in ("cert.pem", "key.pem", "both.pem"))
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    try:
        subprocess.run(
            [*request, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("openssl makes the certificate")
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    with RtspCamera(certificate=both) as camera:
        with pytest.raises(SourceError, match="certificate"):
            open_source(camera.uri)
        for options in (f"ca_file={certificate}", "tls_verify=0"):
            with closing(open_source(f"{camera.uri}?{options}")) as source:
                next_frame(source)


@contextmanager
def mjpeg_camera(pictures: int) -> Iterator[str]:
    """An HTTP server that sends so many pictures, 25 a second, and then hangs up."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=picture")
            self.end_headers()
            for index in range(pictures):
                image = np.full((48, 64, 3), (5 * index, 0, 0), np.uint8)
                jpeg = cv2.imencode(".jpg", image)[1].tobytes()
                head = f"--picture\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                try:
                    self.wfile.write(head.encode() + jpeg + b"\r\n")
                except OSError:
                    return
                time.sleep(0.04)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/mjpeg"
    finally:
        server.shutdown()
        server.server_close()


def test_mjpeg_over_http_and_its_end() -> None:
    with mjpeg_camera(30) as uri, closing(open_source(uri)) as source:
        frames, error = error_after_frames(source)
        assert "the server ended the stream" in error
        # FFmpeg keeps the first to learn what it is, and holds the last one back for what might follow.
        assert frames[-1].frame_id in (28, 29)
        image = frames[-1].image
        assert image is not None
        assert image.shape == (48, 64, 3)
        assert abs(int(image[20, 20, 0]) - 5 * frames[-1].frame_id) < 8


def reopen(camera: RtspCamera, times: int) -> None:
    # Another client keeps the server's pipeline running, so that opening takes no time of its own.
    with closing(open_source(camera.uri)) as other:
        next_frame(other)

        def use() -> None:
            with closing(open_source(camera.uri)) as source:
                next_frame(source)

        assert_reopening_leaves_nothing(use, times=times)


def test_reopening_leaves_nothing_behind(camera: RtspCamera) -> None:
    reopen(camera, 10)


@pytest.mark.soak
def test_reopening_a_hundred_times_leaves_nothing_behind(camera: RtspCamera) -> None:
    """About a minute."""
    reopen(camera, 100)
