r"""Which images show the same part: its photographs are one piece of evidence, however many there are.

parts = parts_of(dataset.train_good, PartNames(pattern=r"num_(\d+)", gap=100))
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence

from recontrast_edge.datasets.base import Sample
from recontrast_edge.errors import UsageError
from recontrast_edge.spec import PartNames

MAX_VIEWS = 12
"""What counts the photographs of a part takes at most so many values; what counts parts takes more."""

ALIKE_SHARE = 0.5
"""From this share of the names on, it is no chance that they can be grouped."""


def parts_of(samples: Sequence[Sample], names: PartNames | None) -> list[str]:
    """The part that each image shows: by its name, else as the data set says, else a part of its own.

    Raises:
        UsageError: as ``parts_by_name``.
    """
    if names is not None:
        return parts_by_name([sample.path.name for sample in samples], names)
    return [str(sample.path) if sample.part is None else sample.part for sample in samples]


def parts_by_name(image_names: Sequence[str], names: PartNames) -> list[str]:
    """The part that each image shows, by its file's name.

    Raises:
        UsageError: no regular expression, one that does not match a name, or no numbers where a gap is given.
    """
    try:
        pattern = re.compile(names.pattern)
    except re.error as error:
        raise UsageError(
            f"{names.pattern!r} is not a regular expression ({error}); expected one whose first group names the part"
        ) from None
    parts = []
    for name in image_names:
        match = pattern.search(name)
        if match is None or not match.groups() or match[1] is None:
            raise UsageError(f"{names.pattern!r} does not match {name!r} with a group that names the part")
        parts.append(match[1])
    if names.gap is None:
        return parts
    if other := [part for part in parts if not part.isdecimal()]:
        raise UsageError(f"a gap between parts needs numbers, but {names.pattern!r} finds {other[0]!r}")
    return [f"from {first}" for first in first_of_run([int(part) for part in parts], names.gap)]


def first_of_run(numbers: Sequence[int], gap: int) -> list[int]:
    """For each number, where its run begins: the run goes on as long as the next number is not more than ``gap`` on."""
    starts: dict[int, int] = {}
    previous: int | None = None
    for number in sorted(set(numbers)):
        starts[number] = number if previous is None or number - previous > gap else starts[previous]
        previous = number
    return [starts[number] for number in numbers]


def alike(image_names: Sequence[str]) -> tuple[str, str] | None:
    """Two names that look like photographs of one part, where most names have such a partner; None elsewhere.

    A guess, for a warning. Names are taken apart into numbers, words and what is between. One of these may count
    photographs: it takes few values, often. Then either many names are the same but for it, or in the order of the one
    other number it changes from name to name, as it does when parts are photographed one after the other.
    """
    fields = [re.findall(r"[0-9]+|[^\W0-9_]+|[\W_]+", name.rsplit(".", 1)[0]) for name in image_names]
    length = Counter(map(len, fields)).most_common(1)[0][0] if fields else 0
    rows = [(name, row) for name, row in zip(image_names, fields, strict=True) if len(row) == length]
    varying = [place for place in range(length) if len({row[place] for _, row in rows}) > 1]
    for place in varying:
        views = Counter(row[place] for _, row in rows)
        if len(views) > MAX_VIEWS or len(rows) < 2 * len(views):
            continue
        pair = _same_but_for(place, rows) or _in_turn(place, [other for other in varying if other != place], rows)
        if pair is not None:
            return pair
    return None


_Rows = Sequence[tuple[str, list[str]]]


def _same_but_for(place: int, rows: _Rows) -> tuple[str, str] | None:
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, row in rows:
        groups.setdefault((*row[:place], *row[place + 1 :]), []).append(name)
    together = [names for names in groups.values() if len(names) > 1]
    if sum(map(len, together)) < ALIKE_SHARE * len(rows):
        return None
    return together[0][0], together[0][1]


def _in_turn(place: int, others: Sequence[int], rows: _Rows) -> tuple[str, str] | None:
    if len(others) != 1 or not all(row[others[0]].isdecimal() for _, row in rows):
        return None
    ordered = sorted(rows, key=lambda entry: int(entry[1][others[0]]))
    views = Counter(row[place] for _, row in rows)
    # In an order that has nothing to do with it, neighbours agree this often.
    by_chance = sum((count / len(rows)) ** 2 for count in views.values()) * (len(rows) - 1)
    agreeing = sum(a[place] == b[place] for (_, a), (_, b) in itertools.pairwise(ordered))
    if by_chance < 5 or agreeing > by_chance / 4:
        return None
    return ordered[0][0], ordered[1][0]
