"""The whole chain on photographs of real parts: train, export, calibrate, evaluate, judge. A sample of the images, a
few iterations: that it works, not how well (``docs/accuracy.md`` has that)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("onnx", reason="needs the export extra")


@pytest.fixture
def sample(magnetic_tile: Path, tmp_path: Path) -> Path:
    """32 good images to train on, 6 of each kind to test with."""
    root = tmp_path / "tiles"
    for folder in sorted(path for path in magnetic_tile.glob("t*/*") if path.is_dir()):
        (root / folder.relative_to(magnetic_tile)).mkdir(parents=True)
        for image in sorted(folder.iterdir())[: 32 if folder.parent.name == "train" else 6]:
            (root / image.relative_to(magnetic_tile)).symlink_to(image)
    (root / "ground_truth").symlink_to(magnetic_tile / "ground_truth")
    return root


def test_train_export_calibrate_eval_run(sample: Path, tmp_path: Path) -> None:
    run, engine, records = tmp_path / "run", tmp_path / "tiles.onnx", tmp_path / "records.jsonl"

    def command(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "recontrast_edge", *map(str, arguments)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    command(
        *("train", sample, "--out", run, "--backbone", "efficientnet_lite0", "--size", "96x96", "--iterations", 4),
        *("--batch", 4, "--holdout", 0.3, "--holdout-group", r"num_(\d+)", "--holdout-gap", 100),
    )
    command("export", run, "--out", engine, "--images", sample)
    command(
        *("calibrate", "--engine", engine, "--good", run / "holdout.txt"),
        *("--max-false-reject-rate", 0.3, "--confidence", 0.9),
    )
    command("eval", "--engine", engine, "--data", sample, "--json", tmp_path / "metrics.json")
    command("run", "--engine", engine, "--source", sample / "test", "--output", f"jsonl:{records}", "--quiet")

    trained = json.loads((run / "metrics.json").read_text())
    evaluated = json.loads((tmp_path / "metrics.json").read_text())
    assert trained["n_good"] == 6
    for name, value in trained["metrics"].items():
        assert evaluated["metrics"][name] == pytest.approx(value, abs=2e-3), name
    judged = {Path(record["source"]).name: record for record in map(json.loads, records.read_text().splitlines())}
    assert len(judged) == 36
    for image in evaluated["images"]:
        record = judged[Path(image["image"]).name]
        assert record["score"] == pytest.approx(image["score"], rel=1e-6)
        assert record["verdict"] == ("REJECT" if record["score"] > record["threshold"] else "PASS")
        assert record["truth"] == ("good" if image["kind"] == "good" else "defect")
