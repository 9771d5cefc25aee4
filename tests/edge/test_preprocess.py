"""From image to network input, and from map back to source pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as Pil

from recontrast_edge.errors import InputError
from recontrast_edge.preprocess import Geometry, check_image, preprocess
from recontrast_edge.spec import InputSpec, Roi

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def spec(**changes: object) -> InputSpec:
    values: dict[str, object] = {"size_wh": (64, 32), "resize_wh": (64, 32), "mean": MEAN, "std": STD, **changes}
    return InputSpec(**values)  # type: ignore[arg-type]


def by_pillow(image_bgr: np.ndarray, wh: tuple[int, int]) -> np.ndarray:
    """(3, H, W) RGB, 0..255, resized in float by Pillow."""
    planes = [
        np.asarray(
            Pil.fromarray(image_bgr[:, :, channel].astype(np.float32), mode="F").resize(wh, Pil.Resampling.BILINEAR)
        )
        for channel in (2, 1, 0)
    ]
    return np.stack(planes)


@pytest.mark.parametrize("size_hw", [(90, 200), (20, 31), (32, 64)])
def test_against_pillow(size_hw: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), np.uint8)
    expected = (by_pillow(image, (64, 32)) / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    found = preprocess(image, spec())
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_colour_order_and_mono() -> None:
    image = np.random.default_rng(1).integers(0, 256, (32, 64, 3), np.uint8)
    same = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    rgb, bgr = preprocess(image, spec(**same)), preprocess(image, spec(colour="bgr", **same))
    np.testing.assert_array_equal(rgb, bgr[::-1])
    mono = preprocess(image[:, :, 0], spec(**same))
    np.testing.assert_array_equal(mono, preprocess(np.repeat(image[:, :, :1], 3, axis=2), spec(**same)))


def test_roi_and_centre_crop() -> None:
    image = np.random.default_rng(2).integers(0, 256, (120, 150, 3), np.uint8)
    roi = Roi(x=10, y=20, width=100, height=80)
    whole = preprocess(image[20:100, 10:110], spec(size_wh=(96, 64), resize_wh=(96, 64)))
    found = preprocess(image, spec(size_wh=(64, 32), resize_wh=(96, 64), roi=roi))
    np.testing.assert_array_equal(found, whole[:, 16:48, 16:80])


def test_the_caller_s_image_is_left_alone() -> None:
    image = np.full((32, 64), 7, np.uint8)
    preprocess(image, spec())
    assert (image == 7).all()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint16),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4,), np.uint8),
        np.zeros((0, 1920), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
    ],
)
def test_what_no_camera_delivers_is_refused(image: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"expected a uint8|is empty"):
        check_image(image)


def test_a_roi_outside_the_image_is_refused() -> None:
    with pytest.raises(InputError, match="does not lie inside the 50x50"):
        preprocess(np.zeros((50, 50), np.uint8), spec(roi=Roi(x=0, y=0, width=51, height=10)))


class TestGeometry:
    def test_boxes_come_back_to_source_pixels(self) -> None:
        image = np.zeros((128, 256), np.uint8)
        assert Geometry.of(spec(), image).to_source(8, 4, 16, 8) == (32, 16, 64, 32)

    def test_with_roi_and_crop(self) -> None:
        geometry = Geometry.of(
            spec(size_wh=(32, 32), resize_wh=(64, 64), roi=Roi(x=100, y=50, width=128, height=192)),
            np.zeros((300, 300), np.uint8),
        )
        assert geometry.to_source(0, 0, 32, 32) == (132, 98, 64, 96)

    def test_boxes_stay_inside_and_are_never_empty(self) -> None:
        image = np.zeros((3, 5), np.uint8)
        geometry = Geometry.of(spec(), image)
        for x in range(64):
            left, top, width, height = geometry.to_source(x, x // 2, 1, 1)
            assert 0 <= left < left + width <= 5
            assert 0 <= top < top + height <= 3
