"""From a camera image to the network's input, and from map positions back to source pixels.

    tensor = preprocess(image, spec.input)  # (3, H, W) float32
    box = Geometry.of(spec.input, image).to_source(x, y, w, h)

This is the rule that training, the CPU engines and the CUDA kernel share; see ``InputSpec`` for its steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.errors import InputError
from recontrast_edge.resample import resizer
from recontrast_edge.spec import InputSpec

Image = NDArray[np.uint8]
"""(H, W) mono or (H, W, 3) in BGR order, 0..255."""


def check_image(image: Image) -> None:
    """Refuse what no camera of ours delivers.

    Raises:
        InputError: not uint8, not (H, W) or (H, W, 3), or an empty side (unplugged cameras give shape (0, W)).
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise InputError(f"expected a uint8 image of shape (H, W) or (H, W, 3), got {image.dtype} {image.shape}")
    if 0 in image.shape:
        raise InputError(f"the image is empty: shape {image.shape}")


@dataclass(frozen=True)
class Geometry:
    """Where the network's pixels lie in one source size."""

    x: int
    y: int
    width: int
    height: int
    """The judged rectangle of the source, in source pixels."""
    resize_wh: tuple[int, int]
    crop_x: int
    crop_y: int
    """Offset of the centre crop within the resized image; 0 with tiles."""

    @classmethod
    def of(cls, spec: InputSpec, image: Image) -> Geometry:
        """The geometry for this image's size.

        Raises:
            InputError: the ROI does not lie inside the image.
        """
        height, width = image.shape[:2]
        roi = spec.roi
        if roi is None:
            x, y, roi_width, roi_height = 0, 0, width, height
        else:
            x, y, roi_width, roi_height = roi.x, roi.y, roi.width, roi.height
            if x + roi_width > width or y + roi_height > height:
                raise InputError(
                    f"the model's ROI {roi_width}x{roi_height}+{x}+{y} does not lie inside the {width}x{height} image; "
                    "set the camera to the size the model was trained for"
                )
        crop_x = (spec.resize_wh[0] - spec.map_wh[0]) // 2
        crop_y = (spec.resize_wh[1] - spec.map_wh[1]) // 2
        return cls(x, y, roi_width, roi_height, spec.resize_wh, crop_x, crop_y)

    @property
    def scale_xy(self) -> tuple[float, float]:
        """Source pixels a network pixel spans."""
        return self.width / self.resize_wh[0], self.height / self.resize_wh[1]

    def to_source(self, x: float, y: float, width: float, height: float) -> tuple[int, int, int, int]:
        """A rectangle of the map, in source pixels, clipped to the judged rectangle: (x, y, width, height)."""
        scale_x, scale_y = self.scale_xy
        left = int(np.floor(self.x + (x + self.crop_x) * scale_x))
        top = int(np.floor(self.y + (y + self.crop_y) * scale_y))
        right = int(np.ceil(self.x + (x + self.crop_x + width) * scale_x))
        bottom = int(np.ceil(self.y + (y + self.crop_y + height) * scale_y))
        left, top = max(left, self.x), max(top, self.y)
        right, bottom = min(right, self.x + self.width), min(bottom, self.y + self.height)
        return left, top, max(right - left, 1), max(bottom - top, 1)


def preprocess(image: Image, spec: InputSpec) -> NDArray[np.float32]:
    """One image as the network's input.

    Args:
        image: (H, W) mono or (H, W, 3) BGR, uint8.
        spec: the model's input rule; of one tile, ``spec.of_tile``, where images are cut into tiles.

    Returns:
        (3, height, width) float32, C-contiguous.

    Raises:
        InputError: wrong dtype or shape, or an ROI outside the image.
    """
    if spec.is_tiled:
        raise ValueError("an image that is cut into tiles is no single input; see tiling.tiles")
    check_image(image)
    geometry = Geometry.of(spec, image)
    part = image[geometry.y : geometry.y + geometry.height, geometry.x : geometry.x + geometry.width]
    resize = resizer((geometry.width, geometry.height), spec.resize_wh)
    width, height = spec.size_wh
    crop = (slice(geometry.crop_y, geometry.crop_y + height), slice(geometry.crop_x, geometry.crop_x + width))
    out = np.empty((3, height, width), np.float32)
    if part.ndim == 2:
        plane = resize(part)[crop]
        planes = [plane, plane, plane]
    else:
        order = (2, 1, 0) if spec.colour == "rgb" else (0, 1, 2)
        planes = [resize(part[:, :, channel])[crop] for channel in order]
    for channel, plane in enumerate(planes):
        scale = np.float32(1.0 / (255.0 * spec.std[channel]))
        offset = np.float32(-spec.mean[channel] / spec.std[channel])
        np.multiply(plane, scale, out=out[channel])
        out[channel] += offset
    return out


@dataclass(frozen=True)
class YuvMatrix:
    """Limited-range YUV to BGR in units of 2^-16, whole numbers, so that CPU and GPU agree to the last bit.

    With ``l = luma_gain * (y - 16)`` and 128 subtracted from ``u`` and ``v``: ``b = l + blue_u * u``,
    ``g = l + green_u * u + green_v * v``, ``r = l + red_v * v``; then rounded to the nearest and clipped to 0..255.
    """

    luma_gain: int
    red_v: int
    green_u: int
    green_v: int
    blue_u: int

    @classmethod
    def of(cls, red: float, blue: float) -> YuvMatrix:
        """From a standard's luma weights of red and blue."""
        luma, chroma = 255 / 219, 2 * 255 / 224
        green = 1 - red - blue
        coefficients = (
            luma,
            chroma * (1 - red),
            -chroma * (1 - blue) * blue / green,
            -chroma * (1 - red) * red / green,
            chroma * (1 - blue),
        )
        return cls(*(round(65536 * coefficient) for coefficient in coefficients))


YuvStandard = Literal["bt601", "bt709"]
YUV_MATRICES: dict[YuvStandard, YuvMatrix] = {
    "bt601": YuvMatrix.of(0.299, 0.114),
    "bt709": YuvMatrix.of(0.2126, 0.0722),
}


def nv12_to_bgr(nv12: NDArray[np.uint8], standard: YuvStandard = "bt601") -> Image:
    """Limited-range NV12 to BGR; the four pixels of a 2x2 block share its U and V.

    Args:
        nv12: (3 * height / 2, width) uint8: the luma's rows, then rows of interleaved U and V; height and width even.
        standard: ``bt601``, what USB and GigE cameras mean, or ``bt709``, what HD video means.

    Returns:
        (height, width, 3) uint8 in BGR order.

    Raises:
        InputError: wrong dtype or shape.
    """
    if nv12.dtype != np.uint8 or nv12.ndim != 2 or 0 in nv12.shape or nv12.shape[0] % 3 or nv12.shape[1] % 2:
        raise InputError(
            f"expected NV12 as uint8 of shape (3 * height / 2, width) with height and width even, got {nv12.dtype} "
            f"{nv12.shape}"
        )
    height = nv12.shape[0] // 3 * 2
    matrix = YUV_MATRICES[standard]
    luma = matrix.luma_gain * (nv12[:height].astype(np.int32) - 16)
    chroma = nv12[height:].reshape(height // 2, -1, 2).astype(np.int32) - 128
    u, v = np.moveaxis(chroma.repeat(2, axis=0).repeat(2, axis=1), 2, 0)
    bgr = np.stack(
        [luma + matrix.blue_u * u, luma + matrix.green_u * u + matrix.green_v * v, luma + matrix.red_v * v], axis=2
    )
    rounded: Image = np.clip((bgr + 32768) >> 16, 0, 255).astype(np.uint8)
    return rounded
