"""Public data sets in miniature: each archive's folders, names and tables as they unpack, with tiny made-up images.

    mvtec(tmp_path / "mvtec_anomaly_detection")

Where the layouts are from: MVTec AD and LOCO, the archives' readme and defects_config.json; MVTec AD 2, anomalib's
reader of it; VisA, the readme of amazon-science/spot-diff and its split_csv; APTOS, the data page of the competition;
OCT2017, ISIC 2018, the readme of guojiajeremy/ReContrast; magnetic tiles, the repository of abin24.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE_WH = (24, 16)
BOX = (slice(4, 10), slice(6, 14))
"""Where the defect of every defective image is (rows, columns)."""


def part(path: Path, *, defect: bool = False, colour: bool = True) -> None:
    """A grey plate with noise; a defect is a bright box."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Fixed by the name, so that no two images of an archive are the same.
    rng = np.random.default_rng(list(str(path.relative_to(path.anchor)).encode()))
    pixels = rng.normal(110, 6, SIZE_WH[::-1])
    if defect:
        pixels[BOX] = 240
    grey = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    (grey.convert("RGB") if colour else grey).save(path)


def mask(path: Path, value: int = 255, box: tuple[slice, slice] = BOX) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(SIZE_WH[::-1], np.uint8)
    pixels[box] = value
    Image.fromarray(pixels).save(path)


def mvtec(root: Path) -> Path:
    """Two of the fifteen categories, with the archive's text files beside them."""
    for category, kind in (("bottle", "broken_large"), ("screw", "scratch_head")):
        folder = root / category
        for index in range(4):
            part(folder / "train" / "good" / f"{index:03}.png")
        for index in range(2):
            part(folder / "test" / "good" / f"{index:03}.png")
            part(folder / "test" / kind / f"{index:03}.png", defect=True)
            mask(folder / "ground_truth" / kind / f"{index:03}_mask.png")
        (folder / "readme.txt").write_text("readme")
        (folder / "license.txt").write_text("license")
    (root / "readme.txt").write_text("readme")
    return root


def loco(root: Path) -> Path:
    """One category; an image with two defects has two masks, with the grey values of ``defects_config.json``."""
    folder = root / "pushpins"
    for split, count in (("train", 4), ("validation", 2), ("test", 2)):
        for index in range(count):
            part(folder / split / "good" / f"{index:03}.png")
    for kind in ("logical_anomalies", "structural_anomalies"):
        for index in range(2):
            part(folder / "test" / kind / f"{index:03}.png", defect=True)
            mask(folder / "ground_truth" / kind / f"{index:03}" / "000.png", 254)
    mask(folder / "ground_truth" / "logical_anomalies" / "001" / "001.png", 240, (slice(12, 15), slice(0, 3)))
    (folder / "defects_config.json").write_text("[]")
    return root


def mvtec_ad2(root: Path) -> Path:
    """One category; the private test sets have images without any ground truth."""
    folder = root / "vial"
    for split, count in (("train", 4), ("validation", 2), ("test_public", 2)):
        for index in range(count):
            part(folder / split / "good" / f"{index:03}_regular.png")
    for index in range(2):
        part(folder / "test_public" / "bad" / f"{index:03}_overexposed.png", defect=True)
        mask(folder / "test_public" / "ground_truth" / "bad" / f"{index:03}_overexposed_mask.png")
    part(folder / "test_private" / "000_regular.png")
    part(folder / "test_private_mixed" / "000_mixed.png")
    return root


def visa(root: Path) -> Path:
    """Two of the twelve categories; masks hold class numbers. Split files for one class and for two."""
    rows = {"1cls": ["object,split,label,image,mask"], "2cls_fewshot": ["object,split,label,image,mask"]}
    for category in ("pcb1", "candle"):
        for index in range(6):
            name = f"{category}/Data/Images/Normal/{index:04}.JPG"
            part(root / name)
            rows["1cls"].append(f"{category},{'train' if index < 4 else 'test'},normal,{name},")
            rows["2cls_fewshot"].append(f"{category},{'train' if index < 3 else 'test'},normal,{name},")
        for index in range(2):
            name, truth = (f"{category}/Data/{part}/Anomaly/{index:03}" for part in ("Images", "Masks"))
            part(root / f"{name}.JPG", defect=True)
            mask(root / f"{truth}.png", 1 + index)
            rows["1cls"].append(f"{category},test,anomaly,{name}.JPG,{truth}.png")
            split = "train" if index == 0 else "test"
            rows["2cls_fewshot"].append(f"{category},{split},anomaly,{name}.JPG,{truth}.png")
        (root / category / "image_anno.csv").write_text("image,label,mask\n")
    for name, lines in rows.items():
        table = root / "split_csv" / f"{name}.csv"
        table.parent.mkdir(exist_ok=True)
        table.write_text("\n".join(lines) + "\n")
    return root


def aptos(root: Path, n_good: int = 1004) -> Path:
    """1004 healthy photographs, as the split wants more than 1000, and one of each grade. They share four files."""
    rows = ["id_code,diagnosis"]
    for index in range(n_good):
        image = root / "train_images" / f"{index:012x}.png"
        if index < 4:
            part(image)
        else:
            image.hardlink_to(root / "train_images" / f"{index % 4:012x}.png")
        rows.append(f"{image.stem},0")
    for grade in (4, 2, 1, 3):
        part(root / "train_images" / f"ff{grade:010x}.png", defect=True)
        rows.append(f"ff{grade:010x},{grade}")
    part(root / "test_images" / "0005cfc8afb6.png")
    (root / "train.csv").write_text("\r\n".join(rows) + "\r\n")
    (root / "test.csv").write_text("id_code\n0005cfc8afb6\n")
    (root / "sample_submission.csv").write_text("id_code,diagnosis\n0005cfc8afb6,0\n")
    return root


def oct2017(root: Path) -> Path:
    """Version 3 of the archive, which holds chest X-rays, too."""
    for split in ("train", "test"):
        for kind in ("CNV", "DME", "DRUSEN", "NORMAL"):
            for index in (1, 2):
                image = root / "CellData" / "OCT" / split / kind / f"{kind}-1016042-{index}.jpeg"
                part(image, defect=kind != "NORMAL", colour=False)
    part(root / "CellData" / "chest_xray" / "train" / "NORMAL" / "NORMAL-28501-0001.jpeg", colour=False)
    return root


def isic2018(root: Path) -> Path:
    """Training and validation data of task 3; licence and attribution lie beside the images."""
    lesions = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
    for split, present in (("Training", ["NV", "MEL", "NV", "NV"]), ("Validation", ["NV", "BKL", "NV", "VASC"])):
        name = f"ISIC2018_Task3_{split}"
        rows = [",".join(("image", *lesions))]
        for index, lesion in enumerate(present):
            image = f"ISIC_{24306 + index:07}"
            part(root / f"{name}_Input" / f"{image}.jpg", defect=lesion != "NV")
            rows.append(",".join([image, *(f"{float(lesion == other)}" for other in lesions)]))
        (root / f"{name}_Input" / "LICENSE.txt").write_text("CC-BY-NC")
        table = root / f"{name}_GroundTruth" / f"{name}_GroundTruth.csv"
        table.parent.mkdir()
        table.write_text("\n".join(rows) + "\n")
    return root


def magnetic_tile(root: Path) -> Path:
    """Six tiles without defect under two exposures each, one tile of each kind of defect; masks beside the images."""
    for tile in range(6):
        for exposure in (1, 2):
            image = root / "MT_Free" / "Imgs" / f"exp{exposure}_num_{1000 * tile + 20 * exposure}.jpg"
            part(image, colour=False)
            mask(image.with_suffix(".png"), 0)
    for kind in ("Blowhole", "Break", "Crack", "Fray", "Uneven"):
        image = root / f"MT_{kind}" / "Imgs" / "exp1_num_3667.jpg"
        part(image, defect=True, colour=False)
        mask(image.with_suffix(".png"))
    (root / "README.md").write_text("readme")
    return root


ARCHIVES: dict[str, Callable[[Path], Path]] = {
    build.__name__: build for build in (mvtec, loco, mvtec_ad2, visa, aptos, oct2017, isic2018, magnetic_tile)
}
