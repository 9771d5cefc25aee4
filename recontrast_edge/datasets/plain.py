"""Any folder of good images, and text files that list some.

dataset = find_folder(Path("good_parts"))
"""

from __future__ import annotations

from pathlib import Path

from recontrast_edge.datasets.base import Dataset, Sample, image_files, listing, natural_key
from recontrast_edge.datasets.mvtec import TREE
from recontrast_edge.errors import InputError
from recontrast_edge.images import IMAGE_SUFFIXES


def find_folder(root: Path) -> Dataset:
    """All images of a folder, subfolders included, taken as good.

    Raises:
        InputError: there are none.
    """
    samples = tuple(Sample(image) for image in image_files(root))
    if not samples:
        raise InputError(f"{root}: holds no images ({listing(root)}); expected a folder of good images, or\n{TREE}")
    return Dataset(root, root.resolve().name, samples, (), expected=TREE)


def find_list(path: Path) -> Dataset:
    """The good images that a text file lists.

    One path a line, UTF-8, relative to the file, and, after a tab, the part that the image shows, if that is known;
    empty lines and lines that begin with ``#`` are skipped.

    Raises:
        InputError: no text, no images, or one that does not exist.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f"{path}: is an image; expected a folder of images or a text file that lists them")
    samples: list[Sample] = []
    for number, entry, part in list_entries(path):
        image = path.parent / entry
        if "\0" in entry or not image.is_file():
            raise InputError(
                f"{path}, line {number}: no such image {entry!r} (paths are relative to the list's folder)"
            )
        samples.append(Sample(image, part=part))
    samples.sort(key=lambda sample: natural_key(str(sample.path)))
    return Dataset(path, path.stem, tuple(samples), (), expected=TREE)


def list_entries(path: Path) -> list[tuple[int, str, str | None]]:
    """Line number, path and part of each entry of a list: one a line, UTF-8, without empty lines and ``#`` comments.

    Raises:
        InputError: it cannot be read, is no text, or has no entry.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: is no UTF-8 text; expected one image path a line") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    stripped = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    entries = []
    for number, line in stripped:
        if line and not line.startswith("#"):
            entry, _, part = (text.strip() for text in line.partition("\t"))
            entries.append((number, entry, part or None))
    if not entries:
        raise InputError(f"{path}: lists no images; expected one image path a line")
    return entries
