"""Magnetic tiles, as the authors' archive unpacks.

    dataset = find(Path("Magnetic-tile-defect-datasets"))

Huang, Qiu, Yuan, "Surface defect saliency of magnetic tile", The Visual Computer 2020;
https://github.com/abin24/Magnetic-tile-defect-datasets. Beside each photograph lies its mask, of the same name. The
authors give no split. Each tile was photographed under up to six exposures, one after the other, so images are split by
tile: in the order of the numbers in their names, another tile begins where the exposure does not rise. Those without
defect tell their tile as their part.
"""

from __future__ import annotations

import re
from pathlib import Path

from recontrast_edge.datasets.base import Dataset, Sample, in_order, layout_error
from recontrast_edge.errors import InputError

TREE = """\
  DATA/MT_Free/Imgs/exp1_num_743.jpg       without defect
  DATA/MT_Blowhole/Imgs/exp1_num_3667.jpg  with a defect (also MT_Break, MT_Crack, MT_Fray, MT_Uneven)
  DATA/MT_Blowhole/Imgs/exp1_num_3667.png  its mask"""

KINDS = ("Blowhole", "Break", "Crack", "Fray", "Uneven")
NAME = re.compile(r"exp(\d+)_num_(\d+)")
"""Exposure, and the number in the order of taking. The 952 photographs without defect make 170 tiles, 148 of them with
exposures 1 to 6."""

TEST_EVERY = 5
"""Every fifth tile without defect is tested with."""


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
    in_order_of_taking = sorted((*_number_and_exposure(image), image) for image in _photographs(folders["Free"]))
    tile, first, previous = -1, 0, None
    for number, exposure, image in in_order_of_taking:
        if previous is None or exposure <= previous:
            tile, first = tile + 1, number
        previous = exposure
        is_test = tile % TEST_EVERY == TEST_EVERY - 1
        (test if is_test else training).append(Sample(image, part=f"tile {first}"))
    return Dataset(root, root.resolve().name, in_order(training), in_order(test), expected=TREE)


def _photographs(folder: Path) -> list[Path]:
    images = [entry for entry in folder.iterdir() if entry.suffix == ".jpg" and not entry.name.startswith(".")]
    if not images:
        raise layout_error(f"{folder}: holds no .jpg files", TREE, folder)
    return images


def _number_and_exposure(image: Path) -> tuple[int, int]:
    match = NAME.match(image.name)
    if match is None:
        raise InputError(f"{image}: expected a name like exp1_num_743.jpg, whose numbers tell tiles apart")
    return int(match[2]), int(match[1])
