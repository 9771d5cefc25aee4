"""OCT2017: retinal OCT images, as its archives unpack.

    dataset = find(Path("OCT2017"))

Kermany, Zhang, Goldbaum, https://data.mendeley.com/datasets/rscbjbr9sj: version 2 has the folder ``OCT2017``, version
3 ``ZhangLabData`` with ``CellData/OCT`` in it. Trained on NORMAL, tested on all four folders of ``test``, as in Guo et
al. (ReContrast, NeurIPS 2023).
"""

from __future__ import annotations

from pathlib import Path

from recontrast_edge.datasets.base import GOOD, Dataset, Sample, image_files, in_order, layout_error

TREE = """\
  DATA/train/NORMAL/*.jpeg                  healthy, to train on (CNV, DME, DRUSEN beside it are not used)
  DATA/test/{NORMAL,CNV,DME,DRUSEN}/*.jpeg  to test with
where DATA is OCT2017, or ZhangLabData with these under CellData/OCT"""

NORMAL = "NORMAL"
KINDS = ("CNV", "DME", "DRUSEN")
NESTED = (Path(), Path("OCT"), Path("CellData", "OCT"))


def find(root: Path) -> Dataset | None:
    """The archive's folder.

    Raises:
        InputError: another tree.
    """
    for folder in (root / nested for nested in NESTED):
        if any((folder / part / kind).is_dir() for part in ("train", "test") for kind in (NORMAL, *KINDS)):
            return _find(folder, root)
    return None


def _find(folder: Path, root: Path) -> Dataset:
    def samples(part: str, kind: str, name: str) -> list[Sample]:
        images = image_files(folder / part / kind) if (folder / part / kind).is_dir() else []
        if not images:
            raise layout_error(f"{folder / part / kind}: holds no images", TREE, folder)
        return [Sample(image, name) for image in images]

    train = samples("train", NORMAL, GOOD)
    test = samples("test", NORMAL, GOOD)
    for kind in KINDS:
        test += samples("test", kind, kind)
    return Dataset(root, root.resolve().name, tuple(train), in_order(test), expected=TREE)
