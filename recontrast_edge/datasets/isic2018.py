"""ISIC 2018 task 3: dermatoscopic images of seven kinds of lesion, as its four archives unpack beside each other.

    dataset = find(Path("ISIC2018"))

https://challenge.isic-archive.com/data/#2018. Trained on the nevi (NV) of the training set, tested on the validation
set, where every other kind is an anomaly, as in Guo et al. (ReContrast, NeurIPS 2023).
"""

from __future__ import annotations

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
  DATA/ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv
  DATA/ISIC2018_Task3_Training_Input/*.jpg
  DATA/ISIC2018_Task3_Validation_GroundTruth/ISIC2018_Task3_Validation_GroundTruth.csv
  DATA/ISIC2018_Task3_Validation_Input/*.jpg"""

PREFIX = "ISIC2018_Task3_"
NEVUS = "NV"
LESIONS = ("MEL", NEVUS, "BCC", "AKIEC", "BKL", "DF", "VASC")


def find(root: Path) -> Dataset | None:
    """The folder that the archives were unpacked in.

    Raises:
        InputError: another tree, a table with other columns or values, or an image that is not there.
    """
    if not any(entry.name.startswith(PREFIX) and entry.is_dir() for entry in root.iterdir()):
        return None
    training = in_order(sample for sample in _part(root, "Training") if sample.is_good)
    return Dataset(root, root.resolve().name, training, in_order(_part(root, "Validation")), expected=TREE)


def _part(root: Path, part: str) -> list[Sample]:
    name = f"{PREFIX}{part}_GroundTruth"
    table, images = root / name / f"{name}.csv", root / f"{PREFIX}{part}_Input"
    for needed in (table, images):
        if not needed.exists():
            raise layout_error(f"{needed}: not there", TREE, root)
    samples = []
    for number, row in read_table(table, ("image", *LESIONS)):
        where = f"{table}, line {number}"
        lesions = [lesion for lesion in LESIONS if row[lesion] in ("1", "1.0")]
        if len(lesions) != 1:
            raise InputError(f"{where}: expected a 1 for one of {', '.join(LESIONS)}, got {len(lesions)}")
        kind = GOOD if lesions[0] == NEVUS else lesions[0]
        samples.append(Sample(listed_file(images, f"{row['image']}.jpg", where=where), kind))
    return samples
