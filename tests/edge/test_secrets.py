from __future__ import annotations

import base64
import json
import logging
import os
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recontrast_edge import secrets
from recontrast_edge.errors import InputError, UsageError
from recontrast_edge.secrets import bare_uri, credentials, mask, mask_logs, masked_uri, register

CANARY = "k4nari en/vogel@ü\"'%25\\"


@pytest.fixture(autouse=True)
def _forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_secrets", set())
    monkeypatch.setattr(secrets, "_pattern", None)


class TestCredentials:
    def test_from_userinfo(self) -> None:
        found = credentials(f"mqtt://line%201:{quote(CANARY, safe='')}@broker:1883/a?qos=1")
        assert found == ("line 1", CANARY)
        assert "k4nari" not in repr(found)
        assert CANARY not in mask(f"refused {CANARY}")

    def test_a_user_alone_has_an_empty_password(self) -> None:
        assert credentials("mqtt://line1@broker/a") == ("line1", "")

    @pytest.mark.parametrize("uri", ["mqtt://broker/a@b", "gpio:7", "/dev/video0", "synthetic://mixed?seed=1", ""])
    def test_none(self, uri: str) -> None:
        assert credentials(uri) is None

    def test_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOGIN", f"line1:{CANARY}")
        assert credentials("mqtt://broker/a?credentials=env:LOGIN&qos=1") == ("line1", CANARY)
        assert "k4nari" not in mask(f"x{CANARY}y")

    def test_from_a_private_file(self, tmp_path: Path) -> None:
        path = tmp_path / "login file"
        path.write_text(f"line1:{CANARY}\n")
        path.chmod(0o600)
        assert credentials(f"mqtt://broker/a?credentials=file:{quote(str(path))}") == ("line1", CANARY)

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
    def test_a_file_others_may_open(self, mode: int, tmp_path: Path) -> None:
        path = tmp_path / "login"
        path.write_text("line1:canary")
        path.chmod(mode)
        with pytest.raises(InputError, match=r"chmod 600") as caught:
            credentials(f"mqtt://broker/a?credentials=file:{path}")
        assert "canary" not in str(caught.value)

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        fifo, large = tmp_path / "fifo", tmp_path / "large"
        os.mkfifo(fifo, 0o600)
        large.write_text("a:" + "b" * 5000)
        large.chmod(0o600)
        for path in (tmp_path, tmp_path / "absent", fifo, large):
            with pytest.raises(InputError):
                credentials(f"mqtt://broker/a?credentials=file:{path}")

    @pytest.mark.parametrize("text", ["canary", "line1:", "line1:canary\nsecond:line"])
    def test_of_another_form(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOGIN", text)
        with pytest.raises(UsageError, match="expected user:password") as caught:
            credentials("mqtt://broker/a?credentials=env:LOGIN")
        assert "canary" not in str(caught.value)

    @pytest.mark.parametrize(
        ("uri", "message"),
        [
            ("mqtt://broker/a?credentials=env:NO_SUCH_VARIABLE", "NO_SUCH_VARIABLE is not set"),
            ("mqtt://broker/a?credentials=line1:canary", "expected credentials=env:NAME"),
            ("mqtt://u:canary@broker/a?credentials=env:HOME", "twice"),
        ],
    )
    def test_refused(self, uri: str, message: str) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            credentials(uri)
        assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "mqtt://u:ca/nary@host/t",
        "mqtt://u:12/canary@host/t",
        "mqtt://u:ca?nary@host/t",
        "mqtt://u:ca#nary@host/t",
        "webhook:https://u:ca?nary@host/t",
    ],
)
def test_passwords_that_would_be_taken_for_something_else(uri: str) -> None:
    with pytest.raises(UsageError, match="percent-encode") as caught:
        credentials(uri)
    assert "nary" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "bare"),
    [
        ("mqtt://u:p@host:1/t?qos=1&credentials=env:X", "mqtt://host:1/t?qos=1"),
        ("rtsp://u@host/t?credentials=env:X", "rtsp://host/t"),
        ("rtsp://host/t@2?a=1", "rtsp://host/t@2?a=1"),
        ("gpio:7?pulse_ms=5", "gpio:7?pulse_ms=5"),
    ],
)
def test_bare_uri(uri: str, bare: str) -> None:
    assert bare_uri(uri) == bare


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("rtsp://admin:canary@10.0.0.5:554/ch1", "rtsp://admin:***@10.0.0.5:554/ch1"),
        ("https://canary@host/x", "https://***@host/x"),
        ("webhook:https://a:canary@host/x", "webhook:https://a:***@host/x"),
        # Characters that should have been percent-encoded.
        ("rtsp://admin:can@ary/x y?z@host/ch1", "rtsp://admin:***@host/ch1"),
        ("rtsp://admin:12/canary@host/ch1", "rtsp://admin:***@host/ch1"),
        ("rtsp://admin:ca?nary@host/ch1", "rtsp://admin:***@host/ch1"),
        ("https://host/x?token=canary&y=1", "https://host/x?token=***&y=1"),
        ("http://cam/v.cgi?loginuse=a&loginpas=canary", "http://cam/v.cgi?loginuse=a&loginpas=***"),
        ("rtsp://cam/s?user=a&Pass=canary&channel=1", "rtsp://cam/s?user=a&Pass=***&channel=1"),
        ("webhook:https://host/x?sv=1&sig=canary%3D&auth=bearer", "webhook:https://host/x?sv=1&sig=***&auth=bearer"),
        ("rtsp://cam/user=a_password=canary_channel=1", "rtsp://cam/user=a_password=***"),
        ("gst:rtspsrc user-pw=canary location=rtsp://h", "gst:rtspsrc user-pw=*** location=rtsp://h"),
        # Nothing to hide.
        ("rtsp://[fe80::1]:554/ch1?name=a@b", "rtsp://[fe80::1]:554/ch1?name=a@b"),
        ("rtsp://host:554/ch1?name=a@b", "rtsp://host:554/ch1?name=a@b"),
        ("synthetic://mixed?defect_rate=0.1", "synthetic://mixed?defect_rate=0.1"),
        ("/data/belt@noon.mp4", "/data/belt@noon.mp4"),
    ],
)
def test_masked_uri(uri: str, shown: str) -> None:
    assert masked_uri(uri) == shown


def test_urls_inside_a_text() -> None:
    text = "cannot open 'rtsp://a:canary@h1/x', then mqtt://b:canary@h2 failed"
    assert mask(text) == "cannot open 'rtsp://a:***@h1/x', then mqtt://b:***@h2 failed"


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=4, max_size=40))
@example("000%")
def test_every_spelling_of_a_secret_is_hidden(secret: str) -> None:
    secrets._secrets.clear()
    register(secret)
    lower = quote(secret, safe="").lower()
    everything = "".join(f"%{byte:02X}" for byte in secret.encode())
    spellings = [secret, quote(secret), quote(secret, safe=""), quote_plus(secret), everything]
    spellings += [json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]]
    if secret == secret.lower():
        spellings.append(lower)
    for spelling in spellings:
        assert mask(f"<{spelling}>") == "<***>", spelling


def test_basic_authentication_is_hidden() -> None:
    credentials("https://line1:canary@host")
    header = base64.b64encode(b"line1:canary").decode()
    assert mask(f"Authorization: Basic {header}") == "Authorization: Basic ***"


def test_the_longer_of_two_secrets_is_hidden_whole() -> None:
    register("abc")
    register("abcdef")
    assert mask("abcdef") == "***"


def test_logs(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    register("canary")
    try:
        mask_logs()
        try:
            raise ValueError("wrong password canary")
        except ValueError:
            logging.getLogger("some.library").exception("login %s failed", "canary")
    finally:
        logging.setLogRecordFactory(before)
    assert "login *** failed" in caplog.text
    assert "wrong password ***" in caplog.text
    assert "canary" not in caplog.text
