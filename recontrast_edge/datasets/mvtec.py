"""MVTec AD, MVTec LOCO AD and MVTec AD 2: one category, or a folder of categories.

    dataset = find(Path("mvtec_anomaly_detection/bottle"))

Bergmann et al., "MVTec AD", CVPR 2019; "Beyond Dents and Scratches" (LOCO), IJCV 2022; Heckler-Kram et al., "The
MVTec AD 2 Dataset", 2025. All three have train/good; LOCO and AD 2 also keep good images for validation. LOCO has a
folder of masks for each image, one mask a defect. AD 2 has its test images and their masks in ``test_public``; its
private test sets come without ground truth and are left alone.
"""

from __future__ import annotations

from pathlib import Path

from recontrast_edge.datasets.base import (
    GOOD,
    Dataset,
    Sample,
    image_files,
    in_order,
    layout_error,
    listing,
    natural_key,
    subfolders,
)
from recontrast_edge.errors import InputError
from recontrast_edge.images import IMAGE_SUFFIXES

TREE = """\
  DATA/train/good/*.png                 good parts to train on
  DATA/test/good/*.png                  good parts to test with
  DATA/test/KIND/NAME.png               parts with a defect of that kind
  DATA/ground_truth/KIND/NAME_mask.png  their masks, white on black (optional: for pixel metrics)
                                        or a folder KIND/NAME/ with several masks (as MVTec LOCO has)
  DATA/validation/good/*.png            good parts for the threshold (optional)
or, for several categories, DATA/CATEGORY/train/good/*.png and so on; MVTec AD 2 has test_public/KIND and
test_public/ground_truth/KIND in place of test and ground_truth"""

TRUTH = "ground_truth"
PARTS = ("train", "test", "test_public", TRUTH)
"""A folder with one of these in it is a category, or meant to be one."""


def find(root: Path) -> Dataset | None:
    """A category, or all categories that a folder holds.

    Raises:
        InputError: another tree, or an image without a mask where others have one.
    """
    if _is_category(root):
        return _category(root)
    folders = subfolders(root)
    if not any(_is_category(folder) for folder in folders):
        return None
    categories = [_category(folder) for folder in folders if _is_category(folder) or image_files(folder)]
    return Dataset.of_categories(root, root.resolve().name, categories)


def _is_category(folder: Path) -> bool:
    return any((folder / part).is_dir() for part in PARTS)


def _category(root: Path) -> Dataset:
    train = root / "train"
    test = root / "test_public" if (root / "test_public").is_dir() else root / "test"
    train_good: tuple[Sample, ...] = ()
    if train.is_dir():
        others = [entry.name for entry in subfolders(train) if entry.name != GOOD and image_files(entry)]
        if others:
            raise layout_error(
                f"{train}: training uses good parts only, but found {', '.join(others)} (move those to {test})",
                TREE,
                root,
            )
        if not (train / GOOD).is_dir():
            raise layout_error(f"{train / GOOD}: no such folder (in train: {listing(train)})", TREE, root)
        train_good = _good(train)
        if not train_good:
            raise layout_error(f"{train / GOOD}: holds no images", TREE, train / GOOD)
    elif not test.is_dir():
        raise layout_error(f"{root}: neither train nor test", TREE, root)
    samples = _test(test, root) if test.is_dir() else ()
    return Dataset(root, root.resolve().name, train_good, samples, _good(root / "validation"), expected=TREE)


def _good(folder: Path) -> tuple[Sample, ...]:
    return tuple(Sample(image) for image in image_files(folder / GOOD)) if (folder / GOOD).is_dir() else ()


def _test(test: Path, root: Path) -> tuple[Sample, ...]:
    truth = test / TRUTH if (test / TRUTH).is_dir() else root / TRUTH
    loose = [entry.name for entry in test.iterdir() if entry.is_file() and entry.suffix.lower() in IMAGE_SUFFIXES]
    if loose:
        raise layout_error(f"{test}: holds images outside of a KIND folder ({min(loose, key=natural_key)})", TREE, test)
    samples: list[Sample] = []
    for folder in subfolders(test):
        if folder == truth:
            continue
        masked = folder.name != GOOD and truth.is_dir()
        masks = _masks(truth / folder.name) if masked else {}
        for image in image_files(folder):
            name = image.relative_to(folder).with_suffix("")
            found = masks.get(name.with_name(f"{name.name}_mask")) or masks.get(name) or ()
            if masked and not found:
                raise InputError(
                    f"{image}: its mask is missing; expected {truth / folder.name / name}_mask.png. "
                    f"Add it, or remove the whole {TRUTH} folder to go without pixel metrics"
                )
            samples.append(Sample(image, folder.name, found))
    if not samples:
        raise layout_error(f"{test}: no images in its folders", TREE, test)
    return in_order(samples)


def _masks(folder: Path) -> dict[Path, tuple[Path, ...]]:
    """Masks by the name, under the kind's folder, of the file or of the folder that they are in."""
    masks: dict[Path, tuple[Path, ...]] = {}
    for mask in image_files(folder) if folder.is_dir() else ():
        relative = mask.relative_to(folder)
        masks[relative.with_suffix("")] = (mask,)
        if len(relative.parts) > 1:
            masks[relative.parent] = (*masks.get(relative.parent, ()), mask)
    return masks
