"""Data sets on disk: found, checked for their layout and named, but not loaded.

    dataset = find_dataset(Path("magnetic_tile"))
    images = [read_image(sample.path) for sample in dataset.training_samples()]

Three forms are accepted: MVTec layout, a plain folder of good images, and a text file that lists good images.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.errors import InputError
from recontrast_edge.images import IMAGE_SUFFIXES, read_image, read_mask
from recontrast_edge.preprocess import Geometry, Image
from recontrast_edge.spec import InputSpec

GOOD = "good"
"""Kind of a sample without defect."""

LAYOUT = """\
  DATA/train/good/*.png                 good parts to train on
  DATA/test/good/*.png                  good parts to test with
  DATA/test/KIND/NAME.png               parts with a defect of that kind
  DATA/ground_truth/KIND/NAME_mask.png  their masks, white on black (optional: for pixel metrics)"""


@dataclass(frozen=True)
class Sample:
    """One image and what is known about it.

    Attributes:
        path: the image file.
        kind: ``good`` or the kind of defect.
        mask_path: the defect's mask; None for good images and for data sets without any mask.
    """

    path: Path
    kind: str = GOOD
    mask_path: Path | None = None

    @property
    def is_good(self) -> bool:
        return self.kind == GOOD


@dataclass(frozen=True)
class Dataset:
    """What was found.

    Attributes:
        root: the folder, or the list file.
        name: for people and provenance; no absolute path.
        train_good: good images in natural order of their paths; all images of a plain folder or list.
        test: good images first, then the kinds in natural order; empty for a plain folder or list.
    """

    root: Path
    name: str
    train_good: tuple[Sample, ...]
    test: tuple[Sample, ...]

    def training_samples(self) -> tuple[Sample, ...]:
        """``train_good``.

        Raises:
            InputError: there is none.
        """
        if not self.train_good:
            raise InputError(
                f"{self.root}: has no training images; expected\n{LAYOUT}\nor a plain folder of good images"
            )
        return self.train_good

    def test_samples(self) -> tuple[Sample, ...]:
        """``test``.

        Raises:
            InputError: there is none.
        """
        if not self.test:
            raise InputError(f"{self.root}: has no test images; expected\n{LAYOUT}")
        return self.test


def find_dataset(path: Path) -> Dataset:
    """Find a data set without opening its images.

    A folder with ``train``, ``test`` or ``ground_truth`` in it must have MVTec layout (``LAYOUT``; either of train and
    test may be missing). Any other folder is taken as good images, subfolders included. A file is read as UTF-8 text
    with one image path a line, relative to the file; empty lines and lines that begin with ``#`` are skipped. Files
    that are no images by their suffix, and hidden ones, are ignored in folders.

    Raises:
        InputError: nothing there, another layout, an image without a mask where others have one, or a listed
            image that does not exist.
    """
    try:
        if path.is_dir():
            if any((path / part).is_dir() for part in ("train", "test", "ground_truth")):
                return _mvtec(path)
            samples = tuple(Sample(image) for image in image_files(path))
            if not samples:
                raise InputError(
                    f"{path}: holds no images ({_found(path)}); expected a folder of good images, or\n{LAYOUT}"
                )
            return Dataset(path, path.resolve().name, samples, ())
        if path.exists():
            return Dataset(path, path.stem, _listed(path), ())
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None
    raise InputError(f"{path}: no such data set; expected a folder or a text file that lists images")


def _mvtec(root: Path) -> Dataset:
    train, test, truth = root / "train", root / "test", root / "ground_truth"
    if train.is_dir():
        others = [entry.name for entry in _folders(train) if entry.name != GOOD and image_files(entry)]
        if others:
            raise InputError(
                f"{train}: training uses good parts only, but found {', '.join(others)}; move those to {test}. "
                f"Expected\n{LAYOUT}"
            )
        if not (train / GOOD).is_dir():
            raise InputError(
                f"{train / GOOD}: no such folder; expected\n{LAYOUT}\nfound: {_found(root)}; in train: {_found(train)}"
            )
        if not image_files(train / GOOD):
            raise InputError(f"{train / GOOD}: holds no images ({_found(train / GOOD)}); expected\n{LAYOUT}")
    elif not test.is_dir():
        raise InputError(f"{root}: neither train nor test; expected\n{LAYOUT}\nfound: {_found(root)}")
    train_good = tuple(Sample(image) for image in image_files(train / GOOD)) if train.is_dir() else ()
    if not test.is_dir():
        return Dataset(root, root.resolve().name, train_good, ())

    if loose := [entry.name for entry in test.iterdir() if entry.is_file() and entry.suffix.lower() in IMAGE_SUFFIXES]:
        raise InputError(f"{test}: holds images outside of a KIND folder ({loose[0]}); expected\n{LAYOUT}")
    kinds = sorted(_folders(test), key=lambda folder: (folder.name != GOOD, natural_key(folder.name)))
    samples: list[Sample] = []
    for folder in kinds:
        masks = _masks(truth / folder.name) if folder.name != GOOD else {}
        for image in image_files(folder):
            mask = None
            if folder.name != GOOD and truth.is_dir():
                relative = image.relative_to(folder).with_suffix("")
                mask = masks.get(relative.with_name(f"{relative.name}_mask")) or masks.get(relative)
                if mask is None:
                    raise InputError(
                        f"{image}: its mask is missing; expected {truth / folder.name / relative}_mask.png. "
                        "Add it, or remove the whole ground_truth folder to go without pixel metrics"
                    )
            samples.append(Sample(image, folder.name, mask))
    if not samples:
        raise InputError(f"{test}: no images in its folders ({_found(test)}); expected\n{LAYOUT}")
    return Dataset(root, root.resolve().name, train_good, tuple(samples))


def _masks(folder: Path) -> dict[Path, Path]:
    if not folder.is_dir():
        return {}
    return {mask.relative_to(folder).with_suffix(""): mask for mask in image_files(folder)}


def _listed(path: Path) -> tuple[Sample, ...]:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f"{path}: is an image; expected a folder of images or a text file that lists them")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: is no UTF-8 text; expected one image path a line") from None
    images: list[Path] = []
    for number, line in enumerate(lines, start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        image = path.parent / entry
        if "\0" in entry or not image.is_file():
            raise InputError(
                f"{path}, line {number}: no such image {entry!r} (paths are relative to the list's folder)"
            )
        images.append(image)
    if not images:
        raise InputError(f"{path}: lists no images; expected one image path a line")
    return tuple(Sample(image) for image in sorted(images, key=lambda image: natural_key(str(image))))


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def image_files(folder: Path) -> list[Path]:
    """Image files under a folder, by suffix, in natural order; hidden files and folders are skipped."""
    found = [
        entry
        for entry in folder.rglob("*")
        if entry.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in entry.relative_to(folder).parts)
        and entry.is_file()
    ]
    return sorted(found, key=lambda image: natural_key(str(image.relative_to(folder))))


def _found(folder: Path) -> str:
    names = sorted((entry.name + "/" * entry.is_dir() for entry in folder.iterdir()), key=natural_key)
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return shown or "nothing"


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key under which ``part2`` comes before ``part10``."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    # The name itself decides between 7 and 07, so that the order is the same on every machine.
    return (*((0, int(part)) if part.isdecimal() else (1, part.casefold()) for part in parts), (2, name))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()


def combined_sha256(digests: Iterable[str]) -> str:
    """One digest over several, in their order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def data_sha256(samples: Sequence[Sample]) -> str:
    """Identity of a set of images: the digest over their files' digests, in the samples' (natural) order.

    Raises:
        InputError: a file cannot be read.
    """
    return combined_sha256(file_sha256(sample.path) for sample in samples)


def read_sample(sample: Sample) -> tuple[Image, NDArray[np.bool_] | None]:
    """Load an image and, where it has one, its mask.

    Returns:
        image as ``images.read_image`` gives it, and the (H, W) bool mask; None for defects without mask. Good images
        have a mask that is False everywhere.

    Raises:
        InputError: a file is missing or damaged, or the mask has another size than the image.
    """
    image = read_image(sample.path)
    height, width = image.shape[:2]
    if sample.is_good:
        return image, np.zeros((height, width), np.bool_)
    if sample.mask_path is None:
        return image, None
    mask = read_mask(sample.mask_path)
    if mask.shape != (height, width):
        raise InputError(
            f"{sample.mask_path}: the mask is {mask.shape[1]}x{mask.shape[0]} but its image {sample.path.name} is "
            f"{width}x{height}; masks must have their image's size"
        )
    return image, mask


def mask_to_map(mask: NDArray[np.bool_], spec: InputSpec) -> NDArray[np.bool_]:
    """A mask at the anomaly map's size, through the image's own geometry: ROI, resize (nearest pixel centre), crop.

    Args:
        mask: (H, W) bool at the source's size.

    Returns:
        (height, width) bool, the size of ``spec.size_wh``.

    Raises:
        InputError: the ROI does not lie inside the mask.
    """
    geometry = Geometry.of(spec, mask.view(np.uint8))
    scale_x, scale_y = geometry.scale_xy
    width, height = spec.size_wh
    columns = geometry.x + ((np.arange(width) + geometry.crop_x + 0.5) * scale_x).astype(np.intp)
    rows = geometry.y + ((np.arange(height) + geometry.crop_y + 0.5) * scale_y).astype(np.intp)
    resized: NDArray[np.bool_] = mask[np.ix_(rows, columns)]
    return resized
