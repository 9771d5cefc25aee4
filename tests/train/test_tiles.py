"""Training on tiles, and the whole chain with a model that has them.

python -m pytest tests/train/test_tiles.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("onnx", reason="needs the export extra")

from recontrast_edge.cli import app, commands  # noqa: E402, F401 - registers the commands
from recontrast_edge.datasets import find_dataset  # noqa: E402
from recontrast_edge.engines import open_engine  # noqa: E402
from recontrast_edge.errors import UsageError  # noqa: E402
from recontrast_edge.images import read_image  # noqa: E402
from recontrast_edge.preprocess import preprocess  # noqa: E402
from recontrast_edge.spec import InputSpec, ModelSpec, Roi  # noqa: E402
from recontrast_edge.synthetic import write_dataset  # noqa: E402
from recontrast_edge.tiling import canvas, tiles  # noqa: E402
from recontrast_export.precision import read_calibration_images  # noqa: E402
from recontrast_train import data as data_module  # noqa: E402
from recontrast_train.backbones import backbone  # noqa: E402
from recontrast_train.data import GoodImages  # noqa: E402
from recontrast_train.recipe import load_recipe  # noqa: E402
from recontrast_train.run import load_run  # noqa: E402
from recontrast_train.score import TorchScorer  # noqa: E402
from recontrast_train.suspects import rank_suspects  # noqa: E402

SIZE_WH = (144, 96)
TILED = InputSpec(
    size_wh=(64, 64), resize_wh=SIZE_WH, tile_overlap=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)
)  # 3 tiles by 2


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts") / "metal"
    write_dataset(root, "brushed-metal", n_train=6, n_test_good=8, n_test_defect=4, size_wh=SIZE_WH, seed=0)
    return root


@pytest.mark.parametrize("cached", [True, False])
def test_what_is_trained_on_are_the_tiles_of_each_image(
    parts: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cached:
        monkeypatch.setattr(data_module, "CACHE_BYTES", 0)
    paths = sorted((parts / "train" / "good").iterdir())[:2]
    for spec in (TILED, TILED.model_copy(update={"roi": Roi(x=4, y=2, width=100, height=90)})):
        images = GoodImages(paths, spec, categories=["a", "b"])
        images.load(2)
        assert len(images) == 12
        assert images.categories == ["a"] * 6 + ["b"] * 6
        assert images.path(5) == paths[0]
        assert images.path(6) == paths[1]
        for index in (0, 5, 6, 10):
            image, tile = paths[index // 6], index % 6
            expected = preprocess(tiles(canvas(read_image(image), spec), spec)[tile], spec.of_tile)
            np.testing.assert_array_equal(images[index].numpy(), expected)


def test_int8_ranges_are_taken_from_the_tile_with_the_defect(parts: Path) -> None:
    images = read_calibration_images(parts / "test" / "good", TILED)
    tensors = list(images.tensors())
    assert len(tensors) == 16
    for good, pasted in zip(tensors[::2], tensors[1::2], strict=True):
        assert good.shape == pasted.shape == (1, 3, 64, 64)
        assert not np.array_equal(good, pasted)


def test_suspects_are_images_by_their_most_suspicious_tile(parts: Path) -> None:
    paths = sorted((parts / "train" / "good").iterdir())[:3]
    torch.manual_seed(0)
    images = GoodImages(paths, TILED)
    ranked = rank_suspects(backbone("efficientnet_lite0").build().eval(), images)
    assert sorted(suspect.path for suspect in ranked) == paths
    assert all(images.path(suspect.index) == suspect.path for suspect in ranked)
    assert [suspect.score for suspect in ranked] == sorted((suspect.score for suspect in ranked), reverse=True)


def test_tiles_need_a_size_to_be_cut_from() -> None:
    with pytest.raises(UsageError, match="tile_overlap cuts resize_wh"):
        load_recipe("default", {"tile_overlap": 16})
    with pytest.raises(UsageError, match="more than half"):
        load_recipe("default", {"tile_overlap": 129, "resize_wh": (512, 512)})


def test_train_export_calibrate_eval_run_info_with_tiles(parts: Path, tmp_path: Path) -> None:
    run, engine, records = tmp_path / "run", tmp_path / "metal.onnx", tmp_path / "records.jsonl"

    def command(*arguments: object) -> str:
        done = CliRunner(env={"COLUMNS": "200"}).invoke(
            app, [str(argument) for argument in arguments], catch_exceptions=False
        )
        assert done.exit_code == 0, done.output
        return done.output

    command(
        *("train", parts, "--out", run, "--backbone", "efficientnet_lite0", "--weights", "random", "--size", "64x64"),
        *("--set", "resize_wh=[144,96]", "--set", "tile_overlap=16", "--iterations", 2, "--batch", 4),
    )
    spec = ModelSpec.loads((run / "model.json").read_bytes(), where="model.json")
    assert (spec.input.size_wh, spec.input.map_wh, spec.input.n_tiles) == ((64, 64), SIZE_WH, 6)
    assert spec.training.n_images == len(spec.training.good_scores) == 6
    command("export", run, "--out", engine, "--images", parts)
    good = parts / "test" / "good"
    command("calibrate", "--engine", engine, "--good", good, "--max-false-reject-rate", 0.3, "--confidence", 0.9)
    command("eval", "--engine", engine, "--data", parts, "--full-resolution", "--json", tmp_path / "m.json")
    command("run", "--engine", engine, "--source", parts / "test", "--output", f"jsonl:{records}", "--quiet")
    assert "6 tiles of 144x96 that overlap by 16 or more" in command("info", engine)

    model, _ = load_run(run)
    samples = find_dataset(parts).test[-3:]
    images = [read_image(sample.path) for sample in samples]
    wanted = TorchScorer(model, spec)(images)
    with open_engine(engine, threads=1) as opened:
        found = opened.infer(images)
    assert found.maps.shape == (3, 96, 144)
    np.testing.assert_allclose(found.maps, wanted.maps, atol=1e-3 * np.ptp(wanted.maps))
    judged = {Path(record["source"]): record for record in map(json.loads, records.read_text().splitlines())}
    assert len(judged) == 12
    for sample, score in zip(samples, found.scores, strict=True):
        assert judged[sample.path]["score"] == pytest.approx(float(score), rel=1e-6)
    for record in judged.values():
        assert {"tile", "infer", "merge"} < record["latency_ms"].keys()
