"""Image files in and out, with every broken kind refused by name.

    image = read_image(Path("part.png"))  # (H, W) or (H, W, 3) BGR uint8

Pillow decodes, because it raises on truncated files where OpenCV returns half an image, and handles CMYK, palettes
and 16 bits by rule.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.errors import InputError, OutputError, UsageError
from recontrast_edge.preprocess import Image

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"})

MAX_PIXELS = 178_956_970
"""Larger files are refused before they are decoded, as they could fill the memory; it is also Pillow's own limit.
``RECONTRAST_MAX_PIXELS`` in the environment sets another one."""


def max_pixels() -> int:
    """The largest image that is decoded, in pixels.

    Raises:
        UsageError: the environment's value is no whole number above 0.
    """
    value = os.environ.get("RECONTRAST_MAX_PIXELS")
    if value is None:
        return MAX_PIXELS
    if not re.fullmatch(r"[1-9][0-9]{0,14}", value):
        raise UsageError(f"RECONTRAST_MAX_PIXELS={value!r}: expected a whole number of pixels above 0")
    return int(value)


def _decode(path: Path) -> Any:
    from PIL import Image as Pil
    from PIL import ImageOps, UnidentifiedImageError

    limit = max_pixels()
    if limit > MAX_PIXELS:
        # Pillow refuses twice its own limit, whatever ours is.
        Pil.MAX_IMAGE_PIXELS = limit
    if not path.exists():
        raise InputError(f"{path}: no such image")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected an image file")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty (0 bytes)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Pil.DecompressionBombWarning)
            with Pil.open(path) as picture:
                width, height = picture.size
                if width * height > limit:
                    raise InputError(f"{path}: {width}x{height} is {_too_large(limit)}")
                picture.load()
                return ImageOps.exif_transpose(picture)
    except InputError:
        raise
    except UnidentifiedImageError:
        formats = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"{path}: not an image that can be read (expected one of {formats})") from None
    except Pil.DecompressionBombError:
        raise InputError(f"{path}: is {_too_large(limit)}") from None
    except MemoryError:
        raise InputError(f"{path}: too large for the memory of this machine") from None
    # Pillow's decoders raise several types on damaged files; all of them mean the same to the user.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, ArithmeticError) as error:
        raise InputError(f"{path}: the image is damaged or cut off ({error})") from None


def _too_large(limit: int) -> str:
    return f"more than {limit} pixels; crop it first, or allow more by RECONTRAST_MAX_PIXELS in the environment"


def read_image(path: Path) -> Image:
    """Read an image as the pipeline expects it.

    Grey stays mono; colour, palette and CMYK become BGR; an alpha channel is dropped; 16-bit values keep their high
    byte, so 0..65535 maps to 0..255.

    Returns:
        (H, W) or (H, W, 3) BGR, uint8, C-contiguous.

    Raises:
        InputError: missing, empty, truncated, not an image, or too large.
    """
    picture = _decode(path)
    mode = picture.mode
    if mode in ("1", "L", "LA", "La"):
        return np.ascontiguousarray(picture.convert("L"), dtype=np.uint8)
    if mode.startswith("I;16"):
        return _high_byte(np.asarray(picture).astype(np.uint16), path)
    if mode == "I":
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"{path}: 32-bit values outside 0..65535; convert it to 8 or 16 bits")
        return _high_byte(values, path)
    if mode == "F":
        raise InputError(f"{path}: floating-point image; convert it to 8 or 16 bits")
    rgb = np.asarray(picture.convert("RGB"), dtype=np.uint8)
    return np.ascontiguousarray(rgb[:, :, ::-1])


def _high_byte(values: NDArray[Any], path: Path) -> Image:
    largest = int(values.max())
    if 255 < largest < 4096:
        _warn_of_low_values(path.parent)
    return np.ascontiguousarray(values >> 8, dtype=np.uint8)


@lru_cache(maxsize=1024)
def _warn_of_low_values(folder: Path) -> None:
    """Once for each folder: cameras of 10 or 12 bits often write them as they are."""
    _log.warning(
        "%s: a 16-bit image with no value above 4095 becomes nearly black, as its high byte is kept; if the camera has "
        "10 or 12 bits, let it put them into the high ones, or multiply the values by 64 or 16",
        folder,
    )


def read_mask(path: Path) -> NDArray[np.bool_]:
    """Read a ground-truth mask.

    Files with grey levels, which lossy compression and smooth edges put into masks, count as defect from half of full
    scale on, as in the published evaluations. Files whose values all stay below that, and palette files, hold class
    numbers: everything but 0 is defect.

    Returns:
        (H, W) bool.
    """
    picture = _decode(path)
    values = np.asarray(picture)
    if values.ndim == 3:
        # Alpha of an opaque mask says nothing.
        channels = values[:, :, :3] if values.shape[2] >= 3 else values[:, :, :1]
        values = channels.max(axis=2)
    half = 128 if values.max() <= 255 else 32768
    grey = picture.mode not in ("1", "P") and values.max() >= half
    mask: NDArray[np.bool_] = values >= half if grey else values != 0
    return mask


def write_image(path: Path, image: Image) -> None:
    """Write a PNG or JPEG, complete or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    import cv2

    ok, data = cv2.imencode(path.suffix, image)
    if not ok:
        raise OutputError(f"{path}: this image cannot be encoded as {path.suffix}")
    with atomic_write(path) as file:
        file.write(data.tobytes())


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when it is complete: temporary file beside it, fsync, rename.

    Raises:
        OutputError: it cannot be written (missing folder, permission, full disk); nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not by tempfile, whose files are private: the umask, which belongs to all threads, cannot be read without
        # changing it for a moment, but holds for what is created like this.
        temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise OutputError(f"{path}: cannot write here ({error.strerror or error})") from None
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot write ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)
