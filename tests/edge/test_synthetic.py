"""The synthetic line: the same parts for the same numbers, honest masks, complete data sets."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from recontrast_edge.datasets import find_dataset, read_sample
from recontrast_edge.errors import OutputError, UsageError
from recontrast_edge.synthetic import LOT, SyntheticLine, write_dataset

PRODUCTS = ("brushed-metal", "woven-fabric")


def line(product: str, *, seed: int = 0, size: int = 128, defect_rate: float = 0.5) -> SyntheticLine:
    return SyntheticLine(product, seed=seed, size_wh=(size, size), defect_rate=defect_rate)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_part_depends_on_its_numbers_only(product: str) -> None:
    first = line(product)
    for index in (3, 0, 7):
        first.part(index)
    again = line(product).part(7)
    assert np.array_equal(first.part(7).image, again.image)
    assert np.array_equal(first.part(7).mask, again.mask)
    assert not np.array_equal(line(product, seed=1).part(7).image, again.image)
    assert not np.array_equal(first.part(8).image, again.image)


@pytest.mark.parametrize(
    ("product", "digest"),
    [
        ("brushed-metal", "d0f79d55a3e20b784e2b00d7a24c5949be74043a7ba8655101e382a9131818f4"),
        ("woven-fabric", "2a49a64c9e86427dcd6899a51c5b639c9a6670ec5218c36de1ad5f5e5f823e4c"),
    ],
)
def test_pixels_are_the_same_on_every_machine(product: str, digest: str) -> None:
    """Pinned: the packaged model was trained on these very pixels."""
    parts = [line(product, defect_rate=1.0).part(index) for index in range(4)]
    actual = hashlib.sha256(b"".join(part.image.tobytes() + part.mask.tobytes() for part in parts)).hexdigest()
    assert actual == digest


@pytest.mark.parametrize("product", PRODUCTS)
def test_defects_are_visible_where_the_mask_says(product: str) -> None:
    defective, good = line(product, defect_rate=1.0), line(product, defect_rate=0.0)
    kinds = set()
    for index in range(40):
        part, clean = defective.part(index), good.part(index)
        assert part.truth == "defect"
        assert clean.truth == "good"
        assert not clean.mask.any()
        kinds.add(part.kind)
        share = part.mask.mean()
        assert 0.0003 < share < 0.2, f"{part.kind} {index} covers {share:.2%}"
        change = np.abs(part.image.astype(int) - clean.image.astype(int)).max(axis=2)
        assert change[part.mask].mean() > 10
        assert change[~part.mask].max() <= 8
    assert len(kinds) == 3


def test_the_defect_rate_holds() -> None:
    rate = np.mean(
        [line("brushed-metal", size=32, defect_rate=0.1).part(index).truth == "defect" for index in range(300)]
    )
    assert 0.05 < rate < 0.16


def test_mixed_runs_in_lots() -> None:
    mixed = line("mixed", size=32)
    products = [mixed.part(index).product for index in range(3 * LOT)]
    assert products == [PRODUCTS[0]] * LOT + [PRODUCTS[1]] * LOT + [PRODUCTS[0]] * LOT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"product": "wood"}, "brushed-metal"),
        ({"seed": -1}, "seed"),
        ({"size_wh": (8, 128)}, "size"),
        ({"defect_rate": 1.5}, "defect rate"),
    ],
)
def test_values_out_of_range_are_named(changes: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"product": "mixed", "seed": 0, "size_wh": (64, 64), "defect_rate": 0.1, **changes}
    with pytest.raises(UsageError, match=message):
        SyntheticLine(values.pop("product"), **values)  # type: ignore[arg-type]


class TestDataset:
    def test_layout_masks_and_disjoint_parts(self, tmp_path: Path) -> None:
        write_dataset(tmp_path / "line", "mixed", n_train=6, n_test_good=4, n_test_defect=10, size_wh=(64, 64))
        dataset = find_dataset(tmp_path / "line")
        assert len(dataset.training_samples()) == 6
        kinds = {sample.kind for sample in dataset.test_samples()}
        assert kinds == {"good", "scratch", "dent", "stain", "missing-thread", "hole"}
        for sample in dataset.test_samples():
            image, mask = read_sample(sample)
            assert image.shape == (64, 64, 3)
            assert mask is not None
            assert mask.any() == (not sample.is_good)
        pictures = [cv2.imread(str(path)).tobytes() for path in (tmp_path / "line").rglob("*/good/*.png")]
        assert len(set(pictures)) == 10

    def test_nothing_is_overwritten_or_left_behind(self, tmp_path: Path) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine.txt").write_text("mine")
        with pytest.raises(OutputError, match="empty"):
            write_dataset(tmp_path / "full", "mixed", n_train=1, n_test_good=0, n_test_defect=0)
        with pytest.raises(UsageError, match="at least one"):
            write_dataset(tmp_path / "none", "mixed", n_train=0, n_test_good=0, n_test_defect=0)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]

    def test_a_full_disk_leaves_nothing_and_names_the_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(path: Path, image: object) -> None:
            raise OutputError(f"{path}: cannot write (No space left on device)")

        monkeypatch.setattr("recontrast_edge.synthetic.write_image", full)
        with pytest.raises(OutputError, match=re.escape(str(tmp_path / "line" / "train"))):
            write_dataset(tmp_path / "line", "mixed", n_train=1, n_test_good=0, n_test_defect=0)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_leaves_nothing(self, tmp_path: Path, number: signal.Signals) -> None:
        command = [sys.executable, "-m", "recontrast_edge", "synth", "--out", str(tmp_path / "line")]
        process = subprocess.Popen([*command, "--train", "100000", "--size", "32x32"], stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 60
        while not any(tmp_path.glob(".line.*/train/good/*.png")):
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(30) == 130
        assert not list(tmp_path.iterdir())
