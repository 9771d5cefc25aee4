"""Magnetic tiles, as the authors' archive unpacks.

    dataset = find(Path("Magnetic-tile-defect-datasets"))

Huang, Qiu, Yuan, "Surface defect saliency of magnetic tile", The Visual Computer 2020;
https://github.com/abin24/Magnetic-tile-defect-datasets. Beside each photograph lies its mask, of the same name. The
authors give no split. Each tile was photographed under up to six exposures, so images are split by tile: the numbers in
the names of one tile's photographs lie close together. Those without defect tell their tile as their part.
"""

from __future__ import annotations

import re
from pathlib import Path

from recontrast_edge.datasets.base import Dataset, Sample, in_order, layout_error
from recontrast_edge.datasets.part_names import first_of_run
from recontrast_edge.errors import InputError

TREE = """\
  DATA/MT_Free/Imgs/exp1_num_743.jpg       without defect
  DATA/MT_Blowhole/Imgs/exp1_num_3667.jpg  with a defect (also MT_Break, MT_Crack, MT_Fray, MT_Uneven)
  DATA/MT_Blowhole/Imgs/exp1_num_3667.png  its mask"""

KINDS = ("Blowhole", "Break", "Crack", "Fray", "Uneven")
NUMBER = re.compile(r"exp\d+_num_(\d+)")

TILE_GAP = 100
"""Numbers of one tile's photographs follow each other more closely; those of another tile may, too, and then stay with
it. Of the 952 photographs without defect this makes 160 groups, 130 of them of six."""

TEST_EVERY = 5
"""Every fifth group of tiles without defect is tested with."""


def find(root: Path) -> Dataset | None:
    """The archive's folder.

    Raises:
        InputError: another tree, a photograph without mask, or a name without its number.
    """
    folders = {kind: root / f"MT_{kind}" / "Imgs" for kind in ("Free", *KINDS)}
    if not any(folder.parent.is_dir() for folder in folders.values()):
        return None
    for folder in folders.values():
        if not folder.is_dir():
            raise layout_error(f"{folder}: no such folder", TREE, root)
    test = []
    for kind in KINDS:
        for image in _photographs(folders[kind]):
            mask = image.with_suffix(".png")
            if not mask.is_file():
                raise InputError(f"{image}: its mask is missing; expected {mask}")
            test.append(Sample(image, kind.lower(), (mask,)))
    training: list[Sample] = []
    photographs = _photographs(folders["Free"])
    first_numbers = first_of_run([_number(image) for image in photographs], TILE_GAP)
    tile_of = {first: tile for tile, first in enumerate(sorted(set(first_numbers)))}
    for image, first in zip(photographs, first_numbers, strict=True):
        is_test = tile_of[first] % TEST_EVERY == TEST_EVERY - 1
        (test if is_test else training).append(Sample(image, part=f"tile {first}"))
    return Dataset(root, root.resolve().name, in_order(training), in_order(test), expected=TREE)


def _photographs(folder: Path) -> list[Path]:
    images = [entry for entry in folder.iterdir() if entry.suffix == ".jpg" and not entry.name.startswith(".")]
    if not images:
        raise layout_error(f"{folder}: holds no .jpg files", TREE, folder)
    return images


def _number(image: Path) -> int:
    match = NUMBER.match(image.name)
    if match is None:
        raise InputError(f"{image}: expected a name like exp1_num_743.jpg, whose number tells tiles apart")
    return int(match.group(1))
