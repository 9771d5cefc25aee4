"""Data sets on disk: found, checked for their layout and named, but not loaded.

    dataset = find_dataset(Path("magnetic_tile"))
    images = [read_image(sample.path) for sample in dataset.training_samples()]

Public archives are taken as they unpack (``docs/datasets.md``), anything else as a plain folder of good images or as a
text file that lists them. Each layout has a module here.
"""

from __future__ import annotations

from pathlib import Path

from recontrast_edge.datasets import aptos, isic2018, magnetic_tile, mvtec, oct2017, visa
from recontrast_edge.datasets.base import GOOD, Dataset, Sample, image_files, natural_key, subfolders
from recontrast_edge.datasets.part_names import alike, parts_by_name, parts_of
from recontrast_edge.datasets.plain import find_folder, find_list
from recontrast_edge.datasets.reading import combined_sha256, data_sha256, file_sha256, mask_to_map, read_sample
from recontrast_edge.errors import InputError

__all__ = [
    "GOOD",
    "Dataset",
    "Sample",
    "alike",
    "combined_sha256",
    "data_sha256",
    "file_sha256",
    "find_dataset",
    "image_files",
    "mask_to_map",
    "natural_key",
    "parts_by_name",
    "parts_of",
    "read_sample",
]

# Those with names of their own come first: OCT2017 and a folder of categories also have what MVTec's layout has.
_LAYOUTS = (visa.find, aptos.find, isic2018.find, oct2017.find, magnetic_tile.find, mvtec.find)


def find_dataset(path: Path) -> Dataset:
    """Find a data set without opening its images.

    What looks like a known layout must be it to the last file. Any other folder is taken as good images, subfolders
    included, unless one of these is a known layout, and any other file as a list of good images. Files that are no
    images by their suffix, and hidden ones, are ignored in folders.

    Raises:
        InputError: nothing there, another layout than it looks like, an image without a mask where others have one,
            a data set one folder further down, or a listed image that does not exist.
    """
    try:
        if path.is_dir():
            return _known_layout(path) or _plain_folder(path)
        if path.exists():
            return visa.find_split(path) or find_list(path)
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None
    raise InputError(f"{path}: no such data set; expected a folder or a text file that lists images")


def _known_layout(path: Path) -> Dataset | None:
    return next((dataset for find in _LAYOUTS if (dataset := find(path))), None)


def _plain_folder(path: Path) -> Dataset:
    # Archives often unpack into a folder of their own. As good images, its defects and masks would be trained on.
    for folder in subfolders(path):
        if _known_layout(folder) is not None:
            raise InputError(
                f"{path}: holds a data set in {folder.name}, but is none itself; expected {folder}, or a folder of "
                "good images alone"
            )
    return find_folder(path)
