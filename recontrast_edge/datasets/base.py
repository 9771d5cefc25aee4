"""What every layout is brought to, and what their modules share.

    dataset = Dataset(Path("tiles"), "tiles", train_good=(Sample(Path("tiles/good/1.png")),), test=())

A layout is a module with ``TREE``, the tree it expects, and ``find``, which returns None for what is plainly something
else and raises for what is meant to be this layout but is not.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from recontrast_edge.errors import InputError
from recontrast_edge.images import IMAGE_SUFFIXES

GOOD = "good"
"""Kind of a sample without defect."""


@dataclass(frozen=True)
class Sample:
    """One image and what is known about it.

    Attributes:
        path: the image file.
        kind: ``good`` or the kind of defect.
        mask_paths: the defect's masks, all of which count; empty for good images and where there is no ground truth.
        part: names the part that the image shows, where the data set says so.
    """

    path: Path
    kind: str = GOOD
    mask_paths: tuple[Path, ...] = ()
    part: str | None = None

    @property
    def is_good(self) -> bool:
        return self.kind == GOOD


@dataclass(frozen=True)
class Dataset:
    """What was found: one product, or the categories of a data set together.

    Attributes:
        root: the folder, or the file.
        name: for people and provenance; no absolute path.
        train_good: good images in natural order of their paths; all images of a plain folder or list.
        test: good images first, then the kinds in natural order; empty for a plain folder or list.
        validation_good: good images that the data set itself keeps from training (MVTec LOCO, MVTec AD 2).
        categories: one data set each, in natural order; empty for a single product. The images above are theirs,
            category by category.
        expected: the tree that this layout has, for messages.
    """

    root: Path
    name: str
    train_good: tuple[Sample, ...]
    test: tuple[Sample, ...]
    validation_good: tuple[Sample, ...] = ()
    categories: tuple[Dataset, ...] = ()
    expected: str = ""

    @classmethod
    def of_categories(cls, root: Path, name: str, categories: Sequence[Dataset]) -> Dataset:
        """All categories as one data set."""
        return cls(
            root,
            name,
            tuple(sample for category in categories for sample in category.train_good),
            tuple(sample for category in categories for sample in category.test),
            tuple(sample for category in categories for sample in category.validation_good),
            tuple(categories),
            categories[0].expected,
        )

    def training_samples(self) -> tuple[Sample, ...]:
        """``train_good``.

        Raises:
            InputError: there is none.
        """
        if not self.train_good:
            raise InputError(
                f"{self.root}: has no training images; expected\n{self.expected}\nor a plain folder of good images"
            )
        return self.train_good

    def test_samples(self) -> tuple[Sample, ...]:
        """``test``.

        Raises:
            InputError: there is none.
        """
        if not self.test:
            raise InputError(f"{self.root}: has no test images; expected\n{self.expected}")
        return self.test


def layout_error(problem: str, tree: str, folder: Path) -> InputError:
    """What is wrong, the tree that was expected, and what the folder holds instead."""
    return InputError(f"{problem}; expected\n{tree}\nfound in {folder}: {listing(folder)}")


def listing(folder: Path) -> str:
    """The first entries of a folder, for messages."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted((entry.name + "/" * entry.is_dir() for entry in folder.iterdir()), key=natural_key)
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return shown or "nothing"


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, in natural order, without hidden ones."""
    found = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(found, key=lambda entry: natural_key(entry.name))


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


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key under which ``part2`` comes before ``part10``."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    # The name itself decides between 7 and 07, so that the order is the same on every machine.
    return (*((0, int(part)) if part.isdecimal() else (1, part.casefold()) for part in parts), (2, name))


def in_order(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """Good images first, then the kinds in natural order; within a kind, natural order of the paths."""
    return tuple(
        sorted(
            samples, key=lambda sample: (not sample.is_good, natural_key(sample.kind), natural_key(str(sample.path)))
        )
    )


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with a header line.

    Args:
        path: the file, UTF-8.
        columns: names the header must have.

    Yields:
        (line number, values by column).

    Raises:
        InputError: no UTF-8 text, another header, or a row of another length.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            if missing := [column for column in columns if column not in header]:
                raise InputError(
                    f"{path}: expected the columns {','.join(columns)}, but {missing[0]} is missing from the first "
                    f"line ({','.join(header)[:200]!r})"
                )
            for row in reader:
                # DictReader files what is over under None, and fills up with None.
                if None in row or None in row.values():
                    raise InputError(f"{path}, line {reader.line_num}: expected {len(header)} values a line")
                yield reader.line_num, row
    except UnicodeDecodeError:
        raise InputError(f"{path}: is no UTF-8 text; expected a CSV file") from None
    except csv.Error as error:
        raise InputError(f"{path}: is no CSV file ({error})") from None


def listed_file(folder: Path, entry: str, *, where: str) -> Path:
    """A file that a table names by its path under the table's folder.

    Raises:
        InputError: it leads elsewhere, or is not there.
    """
    relative = PurePosixPath(entry)
    path = folder / relative
    inside = bool(relative.parts) and not relative.is_absolute() and ".." not in relative.parts
    if not inside or "\0" in entry or not path.is_file():
        raise InputError(f"{where}: no such image {entry!r} under {folder}")
    return path
