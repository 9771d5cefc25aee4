"""Recipes: what they hold, what they refuse, and the paper's figures, one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the train extra")

from recontrast_edge.cli.train import train_command
from recontrast_edge.errors import UsageError
from recontrast_train.recipe import Recipe, load_recipe, packaged_recipes, parse_settings

PAPER = {"backbone": "wide_resnet50_2", "lr_decoder": 2e-3, "lr_encoder": 1e-5, "betas": (0.9, 0.999), "seed": 111}
STABLE = {"eps": 1e-10, "alpha_ramp": 0.2, "score_rule": "top", "top_fraction": 0.01, "encoder_bn": "train"}
MULTICLASS = {
    "unified": True,
    "iterations": 5000,
    "amsgrad": True,
    "eps": 1e-10,
    "lr_drop_at": 0.8,
    "lr_drop_factor": 0.2,
    "encoder_bn": "eval",
    "class_balanced": False,
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mvtec", {"iterations": 2000, "batch": 16, "alpha_ramp": 0.1, "score_rule": "max"}),
        ("visa", {"iterations": 3000, "batch": 16, "encoder_bn": "train"}),
        ("mvtec-stable", {**STABLE, "iterations": 2000}),
        ("visa-stable", {**STABLE, "iterations": 3000}),
        ("mvtec-multiclass", MULTICLASS),
        ("visa-multiclass", MULTICLASS),
        ("aptos", {"iterations": 1000, "batch": 32, "encoder_bn": "train"}),
        ("oct2017", {"iterations": 1000, "batch": 32, "encoder_bn": "eval"}),
        ("isic2018", {"iterations": 2000, "batch": 32, "resize_wh": (256, 256), "size_wh": (224, 224)}),
    ],
)
def test_the_papers_settings(name: str, expected: dict[str, object]) -> None:
    recipe = load_recipe(name, {}).common
    size = {} if "size_wh" in expected else {"size_wh": (256, 256), "resize_wh": None}
    for key, value in {**PAPER, **size, **expected}.items():
        assert getattr(recipe, key) == value, key


def test_defaults_are_the_papers_for_mvtec() -> None:
    assert load_recipe("mvtec", {}).common == load_recipe("default", {}).common == Recipe()


def test_the_papers_exceptions_are_written_in_the_recipe() -> None:
    mvtec, visa = load_recipe("mvtec", {}), load_recipe("visa", {})
    assert set(mvtec.exceptions) == {"toothbrush", "leather", "grid", "tile", "wood", "screw"}
    assert set(visa.exceptions) == {"cashew", "pcb1"}
    for name in ("screw", "bottle"):
        eval_mode = name == "screw"
        assert mvtec.for_class(name) == Recipe(encoder_bn="eval" if eval_mode else "train")
    assert not load_recipe("default", {}).exceptions, "a product of one's own may be called screw"


def test_the_command_line_wins_over_exceptions() -> None:
    given = load_recipe("mvtec", {"encoder_bn": "train", "iterations": 7})
    assert given.for_class("screw").encoder_bn == "train"
    assert given.for_class("screw").iterations == 7


def test_published_figures() -> None:
    published = load_recipe("mvtec", {}).published
    assert published is not None
    assert published.metrics() == {"i_auroc": 0.9945, "p_auroc": 0.9837, "aupro_per_image": 0.952}
    assert published.source.endswith(", WideResNet50-2, last iteration, mean over the 15 classes of MVTec AD")
    assert load_recipe("mvtec-stable", {}).published is None
    for name in ("visa", "mvtec-multiclass", "visa-multiclass", "aptos", "oct2017", "isic2018"):
        assert load_recipe(name, {}).published is not None, name


def test_the_commands_help_names_every_packaged_recipe() -> None:
    import inspect

    option = inspect.signature(train_command).parameters["recipe"].default
    assert {name.strip() for name in option.help.split(",")} >= set(packaged_recipes())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"iteration": 5}, "iteration"),
        ({"iterations": -1}, "iterations"),
        ({"size_wh": [250, 256]}, "multiples of 32"),
        ({"resize_wh": [128, 128]}, "smaller"),
        ({"lr_encoder": "fast"}, "lr_encoder"),
        ({"backbone": "resnet19"}, "resnet18"),
        ({"class_balanced": True}, "unified"),
    ],
)
def test_bad_values_are_named(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe("mvtec", overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch = [", "not valid TOML"),
        ("per_class = 3", "expected tables"),
        ("per_class.screw = 3", "expected tables"),
        ("[per_class.screw]\nencoder = 1", "per_class.screw: encoder: Extra inputs"),
        ("[paper]\ni_auroc = 0.9", "paper: source: Field required"),
        ("[paper]\nsource = 'x'\ni_auroc = 99.4", "paper: i_auroc"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_recipe(str(path), {})


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="there are aptos, default, demo"):
        load_recipe("mvtek", {})
    with pytest.raises(UsageError, match="no such recipe file"):
        load_recipe("mvtek.toml", {})


def test_settings() -> None:
    assert parse_settings(["lr_encoder=1e-4", "encoder_bn=eval", "size_wh=[64, 64]"]) == {
        "lr_encoder": 1e-4,
        "encoder_bn": "eval",
        "size_wh": [64, 64],
    }
    with pytest.raises(UsageError, match="KEY=VALUE"):
        parse_settings(["batch"])
