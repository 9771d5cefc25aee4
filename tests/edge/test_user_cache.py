"""What is kept between runs is believed only if it is whole and this user's own.

python -m pytest tests/edge/test_user_cache.py
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from recontrast_edge import user_cache
from recontrast_edge.user_cache import KEPT_FILES, cache_folder, read_cached, write_cached


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_what_was_written_is_read(caplog: pytest.LogCaptureFixture) -> None:
    assert read_cached("things", "one") is None
    for content in (b"", b"first", b"second" * 1000):
        write_cached("things", "one", content)
        assert read_cached("things", "one") == content
    assert read_cached("others", "one") is None
    assert caplog.text == ""


@pytest.mark.parametrize("spoil", [lambda whole: whole[:-1], lambda whole: b"x" + whole[1:], lambda whole: b""])
def test_what_is_damaged_is_not_read(spoil, caplog: pytest.LogCaptureFixture) -> None:
    write_cached("things", "one", b"content")
    path = cache_folder("things") / "one"
    path.write_bytes(spoil(path.read_bytes()))
    assert read_cached("things", "one") is None
    assert "is damaged and not used" in caplog.text


def test_the_folder_is_out_of_others_reach() -> None:
    before = os.umask(0)
    try:
        write_cached("things", "one", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache_folder("things").stat().st_mode) == 0o700
    cache_folder("things").chmod(0o777)
    assert read_cached("things", "one") == b"content"
    assert stat.S_IMODE(cache_folder("things").stat().st_mode) == 0o700


def test_another_users_files_are_not_read(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    write_cached("things", "one", b"content")
    monkeypatch.setattr(user_cache.os, "geteuid", lambda: os.getuid() + 1)
    assert read_cached("things", "one") is None
    assert "belongs to another user" in caplog.text
    write_cached("things", "two", b"content")
    assert not (cache_folder("things") / "two").exists()


def test_another_users_file_in_ones_own_folder(caplog: pytest.LogCaptureFixture) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    write_cached("things", "one", b"content")
    os.chown(cache_folder("things") / "one", 12345, -1)
    assert read_cached("things", "one") is None
    assert "expected a file of this user" in caplog.text


def test_what_was_used_longest_ago_makes_room() -> None:
    for index in range(KEPT_FILES + 2):
        if index == KEPT_FILES:
            # The oldest is used once more; file times may be too coarse to tell one write from the next.
            os.utime(cache_folder("things") / "0", (1e9, 1e9))
            assert read_cached("things", "0") == b"content"
        write_cached("things", str(index), b"content")
        os.utime(cache_folder("things") / str(index), (1e9 + index, 1e9 + index))
    assert sorted(path.name for path in cache_folder("things").iterdir()) == sorted(
        ["0", *map(str, range(3, KEPT_FILES + 2))]
    )


def test_what_is_too_large_is_not_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    write_cached("things", "one", bytes(100))
    monkeypatch.setattr(user_cache, "MAX_BYTES", 100)
    assert read_cached("things", "one") is None
    write_cached("things", "two", bytes(100))
    assert [path.name for path in cache_folder("things").iterdir()] == ["one"]
    assert "100 bytes are too many" in caplog.text


def test_a_file_in_the_folders_place(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    (home / "cache").write_text("")
    assert read_cached("things", "one") is None
    write_cached("things", "one", b"content")
    assert "cannot be kept" in caplog.text


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert read_cached("things", "one") is None
    write_cached("things", "one", b"content")
    assert "Could not determine home directory" in caplog.text


def test_a_relative_cache_home_is_ignored_as_the_rule_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert cache_folder("things") == Path.home() / ".cache" / "recontrast-edge" / "things"
