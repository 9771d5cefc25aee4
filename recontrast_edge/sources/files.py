"""Images from disk as frames: one file, a folder in natural order, or those that a text file lists.

frame = open_images(Path("tiles/test")).read(timeout_s=1.0)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from recontrast_edge.datasets import GOOD, image_files
from recontrast_edge.datasets.plain import list_entries
from recontrast_edge.errors import InputError
from recontrast_edge.frame import EndOfStream, Frame, Truth
from recontrast_edge.images import read_image
from recontrast_edge.verdict import Fault


def open_images(path: Path) -> ImageSource:
    """An image file, or the images of a folder and its subfolders.

    Files that are no images by their suffix are ignored, and so are the masks of an MVTec layout in ``ground_truth``.

    Raises:
        InputError: no images, or a single file that cannot be read.
    """
    if not path.is_dir():
        # One image is all that was asked for: if it is broken, that is an error and not a stream with a fault.
        read_image(path)
        return ImageSource(str(path), [path])
    try:
        paths = [image for image in image_files(path) if not _is_mask(image.relative_to(path), path)]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not paths:
        raise InputError(f"{path}: holds no images")
    return ImageSource(str(path), paths)


def open_list(uri: str) -> ImageSource:
    """The images that a text file lists, in its order.

    One path a line, UTF-8, relative to the list's folder; empty lines and lines that begin with ``#`` are skipped.

    Args:
        uri: ``list:FILE``.

    Raises:
        InputError: no text file, or one without entries.
    """
    path = Path(uri.removeprefix("list:"))
    return ImageSource(uri, [path.parent / entry for _, entry, _ in list_entries(path)])


class ImageSource:
    """Image files, one after the other.

    One that is broken or missing does not end the stream: it becomes a frame without image, for a FAULT. In an MVTec
    layout (``test/KIND``, ``train/good``) the truth is known.

    Args:
        uri: what they are called together.
        paths: the images.
    """

    live = False

    def __init__(self, uri: str, paths: Sequence[Path]) -> None:
        self.uri = uri
        self._paths = paths
        self._closed = threading.Event()
        self._next = 0

    def read(self, timeout_s: float) -> Frame | None:
        """See ``Source.read``; never times out."""
        if self._closed.is_set() or self._next == len(self._paths):
            raise EndOfStream
        frame_id, path = self._next, self._paths[self._next]
        self._next += 1
        truth = truth_of(path)
        try:
            image = read_image(path)
        except (InputError, OSError) as error:
            code = Fault.UNREADABLE_IMAGE.value
            return Frame(frame_id, str(path), None, time.monotonic(), fault=code, detail=str(error), truth=truth)
        return Frame(frame_id, str(path), image, time.monotonic(), truth=truth)

    def close(self) -> None:
        """See ``Source.close``."""
        self._closed.set()


def truth_of(path: Path) -> Truth | None:
    """What the MVTec layout says: ``test/good`` and ``train/good`` are good, any other ``test/KIND`` is not.

    A folder called ``test`` makes no layout: only with a ``good`` beside its kinds, or in ``train``, are they believed.
    """
    folder = path.absolute().parent
    subset, root = folder.parent.name, folder.parent.parent
    if subset not in ("train", "test") or not any((root / part / GOOD).is_dir() for part in ("train", "test")):
        return None
    if folder.name == GOOD:
        return "good"
    return "defect" if subset == "test" else None


def _is_mask(relative: Path, root: Path) -> bool:
    """Whether an image of this folder lies under a ``ground_truth`` with a ``test`` beside it."""
    parts = relative.parts[:-1]
    if "ground_truth" not in parts:
        return False
    return root.joinpath(*parts[: parts.index("ground_truth")], "test").is_dir()
