"""Every kind of image file that people have, whole and broken."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pil

from recontrast_edge.errors import InputError, OutputError, UsageError
from recontrast_edge.images import atomic_write, read_image, read_mask, write_image
from recontrast_edge.synthetic import write_dataset

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (20, 30, 3), np.uint8)


def save(path: Path, picture: Pil.Image, **options: object) -> Path:
    picture.save(path, **options)
    return path


class TestRead:
    @pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".ppm"])
    def test_colour_is_bgr(self, tmp_path: Path, suffix: str) -> None:
        options = {"lossless": True} if suffix == ".webp" else {}
        image = read_image(save(tmp_path / f"i{suffix}", Pil.fromarray(COLOUR), **options))
        np.testing.assert_array_equal(image, COLOUR[:, :, ::-1])
        assert image.flags.c_contiguous

    def test_grey_stays_mono(self, tmp_path: Path) -> None:
        image = read_image(save(tmp_path / "i.png", Pil.fromarray(COLOUR[:, :, 0])))
        np.testing.assert_array_equal(image, COLOUR[:, :, 0])

    def test_bilevel_is_black_and_white(self, tmp_path: Path) -> None:
        image = read_image(save(tmp_path / "i.png", Pil.fromarray(COLOUR[:, :, 0] > 127)))
        assert set(np.unique(image)) == {0, 255}

    def test_alpha_is_dropped(self, tmp_path: Path) -> None:
        with_alpha = np.dstack([COLOUR, RNG.integers(0, 256, (20, 30, 1), np.uint8)])
        np.testing.assert_array_equal(
            read_image(save(tmp_path / "i.png", Pil.fromarray(with_alpha))), COLOUR[:, :, ::-1]
        )
        grey = Pil.fromarray(np.dstack([COLOUR[:, :, 0], with_alpha[:, :, 3]]), mode="LA")
        np.testing.assert_array_equal(read_image(save(tmp_path / "g.png", grey)), COLOUR[:, :, 0])

    @pytest.mark.parametrize(("largest", "warned"), [(255, False), (1023, True), (4095, True), (4096, False)])
    def test_bits_that_lie_low_are_told_once_a_folder(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, largest: int, warned: bool
    ) -> None:
        values = np.linspace(0, largest, 600).astype(np.uint16).reshape(20, 30)
        for name in ("a.png", "b.png"):
            Pil.fromarray(values).save(tmp_path / name)
            assert np.array_equal(read_image(tmp_path / name), values >> 8)
        told = [record.message.startswith(f"{tmp_path}: a 16-bit image") for record in caplog.records]
        assert told == [True] * warned

    @pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
    def test_16_bits_keep_their_high_byte(self, tmp_path: Path, suffix: str) -> None:
        values = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)
        image = read_image(save(tmp_path / f"i{suffix}", Pil.fromarray(values)))
        np.testing.assert_array_equal(image, values >> 8)

    def test_palette_becomes_colour(self, tmp_path: Path) -> None:
        picture = Pil.fromarray(COLOUR).quantize(16)
        expected = np.asarray(picture.convert("RGB"))[:, :, ::-1]
        np.testing.assert_array_equal(read_image(save(tmp_path / "i.png", picture)), expected)

    def test_cmyk_becomes_colour(self, tmp_path: Path) -> None:
        flat = np.empty((20, 30, 3), np.uint8)
        flat[:] = (200, 40, 90)
        image = read_image(save(tmp_path / "i.jpg", Pil.fromarray(flat).convert("CMYK"), quality=95))
        assert image.shape == (20, 30, 3)
        np.testing.assert_allclose(image.reshape(-1, 3).mean(axis=0), (90, 40, 200), atol=4)

    def test_the_orientation_of_a_phone_is_applied(self, tmp_path: Path) -> None:
        exif = Pil.Exif()
        exif[0x0112] = 6
        image = read_image(save(tmp_path / "i.png", Pil.fromarray(COLOUR), exif=exif))
        np.testing.assert_array_equal(image, np.rot90(COLOUR, -1)[:, :, ::-1])

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
    @pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
    def test_a_file_that_was_cut_off_is_refused(self, tmp_path: Path, suffix: str, share: float) -> None:
        path = save(tmp_path / f"i{suffix}", Pil.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)))
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(InputError, match=f"i{suffix}"):
            read_image(path)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_flipped_bits_never_escape_as_another_error(self, tmp_path: Path) -> None:
        for suffix in (".png", ".jpg", ".tif", ".bmp"):
            path = save(tmp_path / f"i{suffix}", Pil.fromarray(COLOUR))
            data = path.read_bytes()
            for at in range(0, len(data), max(1, len(data) // 60)):
                path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
                try:
                    image = read_image(path)
                except InputError:
                    continue
                assert image.dtype == np.uint8
                assert image.ndim in (2, 3)

    def test_what_is_missing_empty_or_something_else_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no such image"):
            read_image(tmp_path / "none.png")
        with pytest.raises(InputError, match="is a folder"):
            read_image(tmp_path)
        (tmp_path / "empty.png").write_bytes(b"")
        with pytest.raises(InputError, match="empty"):
            read_image(tmp_path / "empty.png")
        (tmp_path / "text.png").write_text("no image")
        with pytest.raises(InputError, match="not an image"):
            read_image(tmp_path / "text.png")

    def test_floating_point_and_huge_values_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="floating-point"):
            read_image(save(tmp_path / "f.tif", Pil.fromarray(np.zeros((4, 4), np.float32))))
        with pytest.raises(InputError, match="32-bit"):
            read_image(save(tmp_path / "i.tif", Pil.fromarray(np.full((4, 4), 1 << 20, np.int32))))

    def test_more_pixels_than_any_camera_has_are_refused_before_decoding(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("recontrast_edge.images.MAX_PIXELS", 100)
        with pytest.raises(InputError, match="more than 100 pixels"):
            read_image(save(tmp_path / "i.png", Pil.fromarray(COLOUR)))

    def test_the_limit_can_be_set(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = save(tmp_path / "i.png", Pil.new("1", (20_000, 9_000)))
        with pytest.raises(InputError, match=r"more than 178956970 pixels; .*RECONTRAST_MAX_PIXELS"):
            read_image(path)
        monkeypatch.setattr(Pil, "MAX_IMAGE_PIXELS", Pil.MAX_IMAGE_PIXELS)
        monkeypatch.setenv("RECONTRAST_MAX_PIXELS", "180000000")
        assert read_image(path).shape == (9_000, 20_000)
        monkeypatch.setenv("RECONTRAST_MAX_PIXELS", "100")
        with pytest.raises(InputError, match="more than 100 pixels"):
            read_image(path)
        for wrong in ("", "0", "-1", "4e8", "lots", "9" * 5000):
            monkeypatch.setenv("RECONTRAST_MAX_PIXELS", wrong)
            with pytest.raises(UsageError, match="expected a whole number of pixels"):
                read_image(path)


class TestMask:
    def test_palette_index_0_is_background(self, tmp_path: Path) -> None:
        indices = np.zeros((6, 6), np.uint8)
        indices[2:4, 1:5] = 3
        picture = Pil.fromarray(indices, mode="P")
        picture.putpalette([255, 255, 255] + [10, 10, 10] * 255)
        np.testing.assert_array_equal(read_mask(save(tmp_path / "m.png", picture)), indices == 3)

    @pytest.mark.parametrize("value", [1, 255])
    def test_grey_and_colour(self, tmp_path: Path, value: int) -> None:
        mask = np.zeros((6, 6), np.uint8)
        mask[2:4, 1:5] = value
        np.testing.assert_array_equal(read_mask(save(tmp_path / "g.png", Pil.fromarray(mask))), mask > 0)
        coloured = np.dstack([mask, mask, mask])
        np.testing.assert_array_equal(read_mask(save(tmp_path / "c.png", Pil.fromarray(coloured))), mask > 0)


class TestWrite:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        write_image(tmp_path / "new" / "i.png", COLOUR)
        np.testing.assert_array_equal(read_image(tmp_path / "new" / "i.png"), COLOUR)
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["i.png"]

    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "f.txt"
        path.write_text("old")

        def write_half() -> None:
            with atomic_write(path) as file:
                file.write(b"new")
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            write_half()
        assert path.read_text() == "old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["f.txt"]

    def test_a_full_disk_and_a_file_in_the_way_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="No space left"), atomic_write(tmp_path / "f") as file:
            raise OSError(28, "No space left on device")
        assert file.closed
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot write"), atomic_write(tmp_path / "file" / "f"):
            pass


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_written_files_have_the_mode_of_others_and_no_thread_ever_has_another_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", None)
            with atomic_write(tmp_path / "file") as file:
                file.write(b"whole")
            write_dataset(
                tmp_path / "set", "brushed-metal", n_train=1, n_test_good=0, n_test_defect=0, size_wh=(32, 32), seed=0
            )
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "set").stat().st_mode) == mode | 0o100 | (0o011 if umask == 0o022 else 0)
