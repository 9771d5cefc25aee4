"""APTOS 2019 Blindness Detection: fundus photographs graded for diabetic retinopathy, as the archive unpacks.

    dataset = find(Path("aptos2019-blindness-detection"))

https://www.kaggle.com/competitions/aptos2019-blindness-detection/data: ``train.csv`` has id_code,diagnosis; the
competition's test set has no published grades and is not used. The split is that of Guo et al. (ReContrast, NeurIPS
2023): of the images without retinopathy 1000, drawn by Python's generator with seed 1, to train on, the others and all
graded 1 to 4 to test with. They also cropped each photograph beforehand: ``crop_fundus``.
"""

from __future__ import annotations

import random
from pathlib import Path

from recontrast_edge.datasets.base import (
    GOOD,
    Dataset,
    Sample,
    in_order,
    layout_error,
    listed_file,
    read_table,
)
from recontrast_edge.errors import InputError

TREE = """\
  DATA/train.csv                 id_code,diagnosis
  DATA/train_images/ID_CODE.png"""

KINDS = {"0": GOOD, "1": "mild", "2": "moderate", "3": "severe", "4": "proliferative"}
"""Names of the grades."""

N_TRAIN = 1000
SPLIT_SEED = 1


def find(root: Path) -> Dataset | None:
    """The archive's folder.

    Raises:
        InputError: another tree, a table with other columns or values, an image that is not there, or too few
            images for the split.
    """
    images, table = root / "train_images", root / "train.csv"
    # With the table, the test images are the competition's: diseased ones among them, and not one graded.
    if not images.is_dir() and not (table.is_file() and (root / "test_images").is_dir()):
        return None
    for needed, what in ((images, "folder"), (table, "file")):
        if not needed.exists():
            raise layout_error(f"{needed}: no such {what}", TREE, root)
    good: list[Sample] = []
    graded: list[Sample] = []
    for number, row in read_table(table, ("id_code", "diagnosis")):
        where = f"{table}, line {number}"
        kind = KINDS.get(row["diagnosis"])
        if kind is None:
            raise InputError(f"{where}: expected a diagnosis from 0 to 4, got {row['diagnosis']!r}")
        sample = Sample(listed_file(images, f"{row['id_code']}.png", where=where), kind)
        (good if sample.is_good else graded).append(sample)
    if len(good) <= N_TRAIN:
        raise InputError(
            f"{table}: lists {len(good)} images of grade 0, expected more than {N_TRAIN}, which the split trains on; "
            "is the archive complete?"
        )
    random.Random(SPLIT_SEED).shuffle(good)
    training, test = in_order(good[:N_TRAIN]), in_order([*good[N_TRAIN:], *graded])
    return Dataset(root, root.resolve().name, training, test, expected=TREE)
