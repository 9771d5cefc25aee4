"""Results over several categories: each judged by itself, and the table with its mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pil

from recontrast_edge.categories import CategoryRow, CategoryTable, evaluate_categories
from recontrast_edge.datasets import find_dataset
from recontrast_edge.engines import Inference
from recontrast_edge.evaluation import evaluate
from recontrast_edge.preprocess import Image
from recontrast_edge.spec import InputSpec, Level, ModelSpec
from tests import archives

SPEC = ModelSpec(
    class_name="any",
    backbone="none",
    input=InputSpec(size_wh=(32, 32), resize_wh=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    levels=(Level(stride=4, channels=3),),
    weights_sha256="0" * 64,
)

ROWS = (
    CategoryRow("bottle", 20, 63, {"i_auroc": 1.0, "p_auroc": 0.9, "aupro": None}),
    CategoryRow("a|b", 2, 3, {"i_auroc": 0.5, "p_auroc": 0.8, "aupro": 0.7}),
    CategoryRow("tile", error="tile/train/good/1.png:\ncut off"),
)


def test_mean_is_over_what_is_done_and_only_of_what_all_have() -> None:
    table = CategoryTable("mvtec", ROWS, {"i_auroc": 0.9945, "f1_max": 0.98}, "log.txt")
    assert table.mean() == {"i_auroc": 0.75, "p_auroc": pytest.approx(0.85), "aupro": None}
    assert table.lines() == [
        ["category", "good", "defect", "I-AUROC", "F1-max", "P-AUROC", "AUPRO 30 %"],
        ["bottle", "20", "63", "100.00", "-", "90.00", "-"],
        ["a|b", "2", "3", "50.00", "-", "80.00", "70.00"],
        ["tile (failed)", "", "", "-", "-", "-", "-"],
        ["mean of 2 of 3", "", "", "75.00", "-", "85.00", "-"],
        ["published", "", "", "99.45", "98.00", "-", "-"],
    ]
    page = table.to_markdown()
    assert "| a\\|b | 2 |" in page
    assert page.endswith("\n- tile: tile/train/good/1.png: cut off\n- published: log.txt\n")
    assert table.to_json()["published"] == {"source": "log.txt", "i_auroc": 0.9945, "f1_max": 0.98}
    assert CategoryTable("x", ROWS[:1]).to_json()["published"] is None


def test_a_category_is_compared_with_its_own_good_images(tmp_path: Path) -> None:
    """Good bottles are brighter than defective screws: only judged by themselves are both told apart."""
    root = archives.mvtec(tmp_path / "mvtec")
    for path, value in (("bottle/test/good", 250), ("bottle/test/broken_large", 255)):
        for image in (root / path).iterdir():
            Pil.new("L", archives.SIZE_WH, value).save(image)
    dataset = find_dataset(root)

    def brightest(images: Sequence[Image]) -> Inference:
        scores = np.array([image.max() for image in images], np.float32)
        return Inference(np.broadcast_to(scores[:, None, None], (len(images), 32, 32)).copy(), scores, {})

    evaluations = evaluate_categories(brightest, dataset, SPEC)
    assert list(evaluations) == ["bottle", "screw"]
    assert [evaluation.overall.n_defect for evaluation in evaluations.values()] == [2, 2]
    assert [evaluation.overall.i_auroc.value for evaluation in evaluations.values()] == [1.0, 1.0]
    assert evaluate(brightest, dataset.test_samples(), SPEC).overall.i_auroc.value == 0.75
