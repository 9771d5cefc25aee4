"""Training on whole data sets: every archive, categories one by one and together, and what happens when one fails."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the train extra")

from recontrast_edge.cli import main
from recontrast_edge.errors import EXIT_UNFINISHED, InputError, UsageError
from recontrast_train import training
from recontrast_train.campaign import train_all
from recontrast_train.fit import TrainingStoppedError, fit
from recontrast_train.run import load_run
from recontrast_train.training import TrainOptions
from tests import archives

TINY = {"backbone": "resnet18", "size_wh": [64, 64], "resize_wh": None, "iterations": 3, "batch": 2}


def options(data: Path, out: Path, recipe: str = "default", **changes: Any) -> TrainOptions:
    overrides = {**TINY, **changes.pop("overrides", {})}
    return TrainOptions(data=data, out=out, recipe=recipe, overrides=overrides, weights="random", **changes)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("loco", "default"),
        ("mvtec_ad2", "mvtec-stable"),
        ("visa", "visa-multiclass"),
        ("aptos", "aptos"),
        ("oct2017", "oct2017"),
        ("isic2018", "isic2018"),
        ("magnetic_tile", "default"),
    ],
)
def test_every_archive_trains_and_is_evaluated(
    name: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = archives.ARCHIVES[name](tmp_path / name), tmp_path / "run"
    train_all(options(data, out, recipe))
    said = " ".join(capsys.readouterr().err.split())
    assert ("Published: I-AUROC 97.51 %, F1-max 95.27 % (log of" in said) == (name == "aptos")
    categories = {"loco": ["pushpins"], "mvtec_ad2": ["vial"], "visa": ["candle", "pcb1"]}.get(name, [])
    for folder in [out / category for category in categories] or [out]:
        metrics = read(folder / "metrics.json")
        assert metrics["n_good"] == 2 if name != "aptos" else 4
        assert 0 <= metrics["metrics"]["i_auroc"] <= 1
        assert (metrics["metrics"]["p_auroc"] is None) == (name in ("aptos", "oct2017", "isic2018"))
    if name in ("loco", "mvtec_ad2"):
        held_out = (out / categories[0] / "holdout.txt").read_text().splitlines()
        assert [Path(line).parent.parent.name for line in held_out[1:]] == ["validation", "validation"]


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    return archives.mvtec(tmp_path / "mvtec")


def test_categories_one_by_one(mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One category's image is damaged: the other is trained, and nothing that is done is done again."""

    def fit_and_stop(*arguments: Any, **options: Any) -> Any:
        def stop(done: int, loss: float | None) -> None:
            # The second signal would end the tests.
            if done == 1:
                signal.raise_signal(signal.SIGTERM)

        return fit(*arguments, **{**options, "on_iteration": stop})

    out = tmp_path / "runs"
    damaged = mvtec / "bottle" / "train" / "good" / "002.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:60])
    with pytest.raises(InputError, match=r"1 of 2 categories failed, first bottle: .*002\.png: .*cut off"):
        train_all(options(mvtec, out, "mvtec"))
    table = read(out / "categories.json")
    assert [(row["name"], row["error"] is None) for row in table["categories"]] == [("bottle", False), ("screw", True)]
    assert "mean of 1 of 2" in (out / "categories.md").read_text()

    damaged.write_bytes(whole)
    with pytest.raises(UsageError, match=r"screw: already holds a finished run; go on with --resume"):
        train_all(options(mvtec, out, "mvtec"))
    assert not (out / "bottle" / "model.safetensors").exists()
    trained = [(out / "screw" / name).stat().st_mtime_ns for name in ("model.safetensors", "metrics.json")]
    with monkeypatch.context() as patched:
        patched.setattr(training, "fit", fit_and_stop)
        with pytest.raises(TrainingStoppedError, match="stopped after 2 of 3"):
            train_all(options(mvtec, out, "mvtec", resume=True))
    assert (out / "bottle" / "checkpoint.safetensors").exists()
    train_all(options(mvtec, out, "mvtec", resume=True))
    assert [(out / "screw" / name).stat().st_mtime_ns for name in ("model.safetensors", "metrics.json")] == trained

    table = read(out / "categories.json")
    values = [row["metrics"]["i_auroc"] for row in table["categories"]]
    assert table["mean"]["i_auroc"] == pytest.approx(sum(values) / 2)
    assert table["published"]["i_auroc"] == 0.9945
    page = (out / "categories.md").read_text()
    assert "| mean |" in page
    assert "| published |  |  | 99.45 |" in page

    # The recipe's exception is the screw's; what was trained is in each run.
    modes = {name: load_run(out / name)[1].training.recipe["encoder_bn"] for name in ("bottle", "screw")}
    assert modes == {"bottle": "train", "screw": "eval"}
    with pytest.raises(UsageError, match="finished training with other batch"):
        train_all(options(mvtec, out, "mvtec", resume=True, overrides={"batch": 3}))
    archives.part(mvtec / "screw" / "train" / "good" / "9.png")
    with pytest.raises(UsageError, match="screw: holds a finished training with other images"):
        train_all(options(mvtec, out, "mvtec", resume=True))


def test_one_model_for_all_categories(mvtec: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_all(options(mvtec, out, "mvtec-multiclass", overrides={"class_balanced": True}, holdout=0.25))
    _, spec = load_run(out)
    assert spec.class_name == "mvtec"
    assert spec.training.n_images == 6
    assert spec.training.recipe["unified"] is True
    held_out = (out / "holdout.txt").read_text().splitlines()[1:]
    assert [Path(line).parents[2].name for line in held_out] == ["bottle", "screw"]
    table = read(out / "categories.json")
    assert table["unified"] is True
    for row in table["categories"]:
        metrics = read(out / row["name"] / "metrics.json")
        assert row["metrics"] == metrics["metrics"]
        assert metrics["weights_sha256"] == spec.weights_sha256
        assert metrics["n_good"] == metrics["n_defect"] == 2
        assert not (out / row["name"] / "model.safetensors").exists()
    # New test images are evaluated, and the model is not trained again.
    archives.part(mvtec / "screw" / "test" / "good" / "9.png")
    again = {"overrides": {"class_balanced": True}, "holdout": 0.25, "resume": True}
    train_all(options(mvtec, out, "mvtec-multiclass", **again))
    assert [row["n_good"] for row in read(out / "categories.json")["categories"]] == [2, 3]
    assert load_run(out)[1] == spec


def test_names_that_are_in_no_category_or_no_text_are_told(
    mvtec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = mvtec.rename(tmp_path / "mvtec[\udcff")
    recipe = tmp_path / "own.toml"
    recipe.write_text('[per_class.bottel]\nencoder_bn = "eval"\n[per_class.screw]\nencoder_bn = "eval"\n')
    for stream in (sys.stdout, sys.stderr):
        # As the command does.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    train_all(options(data, tmp_path / "runs", str(recipe), overrides={"iterations": 1}))
    assert "exceptions for classes that mvtec[\\udcff has not: bottel\n" in capsys.readouterr().err
    assert (tmp_path / "runs" / "categories.md").read_text().startswith("# mvtec[?, metrics")


def test_a_class_name_is_for_one_product(mvtec: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names one product, but mvtec has 2 categories"):
        train_all(options(mvtec, tmp_path / "runs", class_name="bolt"))


def test_the_command(
    mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["recontrast-edge", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code, *capsys.readouterr())

    out = tmp_path / "runs"
    for data in ([], [mvtec, "--data", mvtec]):
        code, _, error = run(*data, "--out", out)
        assert code == 2
        assert "expected the data set once, as argument or as --data" in error
    model = ["--backbone", "resnet18", "--weights", "random", "--size", "64x64", "--iterations", "1", "--batch", "2"]
    (mvtec / "bottle" / "train" / "good" / "000.png").write_bytes(b"")
    # Where no folder is named, the data's name is the run's.
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs" / "mvtec"
    code, printed, error = run("--recipe", "mvtec", "--data", mvtec, *model)
    assert code == 3, error
    assert "1 of 2 categories failed, first bottle" in error
    table = printed[printed.index("mvtec, metrics in percent") :]
    first = [line.split()[0] for line in table.splitlines() if line.strip()]
    assert [word for word in first if word.isalpha()] == ["category", "bottle", "screw", "mean", "published"]
    assert (out / "screw" / "model.safetensors").exists()


def test_the_time_given_is_kept_and_what_is_left_goes_on(
    mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    command = [
        "recontrast-edge",
        "train",
        str(mvtec),
        "--out",
        str(out),
        "--backbone",
        "resnet18",
        "--weights",
        "random",
    ]
    command += ["--size", "64x64", "--iterations", "2", "--batch", "2"]

    def run(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    # In no time at all, one iteration is done all the same: trying again and again gets somewhere.
    code, error = run("--max-minutes", "0.0001")
    assert code == EXIT_UNFINISHED, error
    assert "time is up after 1 of 2 iterations; go on with the same command and --resume" in error
    assert (out / "bottle" / "checkpoint.safetensors").exists()
    code, error = run("--max-minutes", "0.0001", "--resume")
    assert code == EXIT_UNFINISHED, error
    assert "time is up before the evaluation of bottle" in error
    assert not (out / "screw").exists()
    code, error = run("--max-minutes", "1000", "--resume")
    assert code == 0, error
    assert [row["error"] for row in read(out / "categories.json")["categories"]] == [None, None]
