"""VisA, as its archive unpacks, with the splits of its own CSV files.

    dataset = find(Path("VisA_20220922"))  # or one category, or one of its split files

Zou et al., "SPot-the-Difference Self-supervised Pre-training for Anomaly Detection and Segmentation", ECCV 2022. The
columns of ``split_csv/*.csv`` are object,split,label,image,mask; paths are relative to the archive's folder.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path, PurePosixPath

from recontrast_edge.datasets.base import (
    Dataset,
    Sample,
    in_order,
    layout_error,
    listed_file,
    natural_key,
    read_table,
    subfolders,
)
from recontrast_edge.errors import InputError

TREE = """\
  DATA/split_csv/1cls.csv                      the split (2cls_highshot.csv, 2cls_fewshot.csv: name one as DATA)
  DATA/CATEGORY/Data/Images/Normal/0000.JPG
  DATA/CATEGORY/Data/Images/Anomaly/000.JPG
  DATA/CATEGORY/Data/Masks/Anomaly/000.png"""

SPLITS = "split_csv"
DEFAULT_SPLIT = "1cls.csv"
COLUMNS = ("object", "split", "label", "image", "mask")
IMAGES = Path("Data", "Images")


def find(root: Path) -> Dataset | None:
    """The archive's folder, or one category in it, split by ``1cls.csv``.

    Raises:
        InputError: another tree, a split file with other columns or values, or an image that is not there.
    """
    if (root / IMAGES).is_dir():
        return _split(root.parent / SPLITS / DEFAULT_SPLIT, root.resolve().name)
    if (root / SPLITS).is_dir() or any((folder / IMAGES).is_dir() for folder in subfolders(root)):
        return _split(root / SPLITS / DEFAULT_SPLIT, None)
    return None


def find_split(path: Path) -> Dataset | None:
    """One of the archive's split files. Of the splits for two classes, the anomalies to train on are left out.

    Raises:
        InputError: as ``find``.
    """
    return _split(path, None) if path.parent.name == SPLITS and path.suffix == ".csv" else None


def _split(path: Path, category: str | None) -> Dataset:
    root = path.parent.parent
    if not path.is_file():
        raise layout_error(f"{path}: no such split file", TREE, root)
    training: dict[str, list[Sample]] = defaultdict(list)
    test: dict[str, list[Sample]] = defaultdict(list)
    for number, row in read_table(path, COLUMNS):
        name, split, label = row["object"], row["split"], row["label"]
        if category not in (None, name):
            continue
        where = f"{path}, line {number}"
        if PurePosixPath(row["image"]).parts[:1] != (name,):
            raise InputError(f"{where}: expected an image of {name!r}, got {row['image']!r}")
        if split not in ("train", "test") or label not in ("normal", "anomaly"):
            raise InputError(
                f"{where}: expected split train or test and label normal or anomaly, got {split!r} and {label!r}"
            )
        if label == "normal":
            (training if split == "train" else test)[name].append(Sample(listed_file(root, row["image"], where=where)))
        elif split == "test":
            image, mask = (listed_file(root, row[column], where=where) for column in ("image", "mask"))
            test[name].append(Sample(image, label, (mask,)))
    datasets = [
        Dataset(root / name, name, in_order(training[name]), in_order(test[name]), expected=TREE)
        for name in sorted({*training, *test}, key=natural_key)
    ]
    if not datasets:
        raise layout_error(f"{path}: lists no image{'' if category is None else f' of {category}'}", TREE, root)
    if category is not None:
        return datasets[0]
    suffix = "" if path.name == DEFAULT_SPLIT else f" {path.stem}"
    return Dataset.of_categories(root, f"{root.resolve().name}{suffix}", datasets)
