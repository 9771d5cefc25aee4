"""Fitting and resuming, and the command on a tiny data set."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from recontrast_edge.datasets import Sample, file_sha256, find_dataset, parts_of  # noqa: E402
from recontrast_edge.errors import InputError, MissingError, ModelError, OutputError, UsageError  # noqa: E402
from recontrast_edge.spec import InputSpec, ModelSpec, PartNames  # noqa: E402
from recontrast_train import data as data_module  # noqa: E402
from recontrast_train import fit as training_loop  # noqa: E402
from recontrast_train.data import GoodImages, balanced_batches, batches, split_holdout  # noqa: E402
from recontrast_train.fit import OutOfTimeError, TrainingStoppedError, fit  # noqa: E402
from recontrast_train.model import ReContrast  # noqa: E402
from recontrast_train.recipe import Recipe, load_recipe  # noqa: E402
from recontrast_train.run import load_run  # noqa: E402
from recontrast_train.suspects import Suspect, sheet_path, write_suspects  # noqa: E402
from recontrast_train.training import TrainOptions, train  # noqa: E402

SIZE = 64
INPUT = InputSpec(size_wh=(SIZE, SIZE), resize_wh=(SIZE, SIZE), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
RECIPE = Recipe(backbone="efficientnet_lite0", size_wh=(SIZE, SIZE), iterations=5, batch=2, seed=3)


def write_images(folder: Path, count: int, *, spot: bool = False, seed: int = 0) -> list[Path]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    paths = []
    for index in range(count):
        image = np.clip(rng.normal(120, 8, (80, 72)), 0, 255).astype(np.uint8)
        if spot:
            cv2.circle(image, (30, 40), 8, 255, -1)
        paths.append(folder / f"part{index // 2}_{index}.png")
        cv2.imwrite(str(paths[-1]), image)
    return paths


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "washers"
    write_images(root / "train" / "good", 6)
    write_images(root / "test" / "good", 3, seed=1)
    write_images(root / "test" / "spot", 3, spot=True, seed=2)
    for index in range(3):
        mask = np.zeros((80, 72), np.uint8)
        cv2.circle(mask, (30, 40), 8, 255, -1)
        (root / "ground_truth" / "spot").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / "ground_truth" / "spot" / f"part{index // 2}_{index}_mask.png"), mask)
    return root


def run_fit(
    paths: list[Path],
    checkpoint: Path,
    *,
    stop_after: int | None = None,
    resume: bool = False,
    recipe: Recipe = RECIPE,
    workers: int = 0,
):  # type: ignore[no-untyped-def]
    torch.manual_seed(recipe.seed)
    model = ReContrast(recipe.backbone, discriminator=recipe.discriminator)
    done = 0

    def on_iteration(iteration: int, loss: float | None) -> None:
        nonlocal done
        done = iteration

    fitted = fit(
        model,
        GoodImages(paths, INPUT),
        recipe,
        checkpoint=checkpoint,
        fingerprint="same",
        resume=resume,
        workers=workers,
        on_iteration=on_iteration,
        should_stop=lambda: stop_after is not None and done + 1 >= stop_after,
    )
    return model, fitted.losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_training_is_bitwise_the_unbroken_one(tmp_path: Path, precision: str) -> None:
    recipe = RECIPE.model_copy(update={"precision": precision, "amsgrad": True, "lr_drop_at": 0.5})
    paths = write_images(tmp_path / "good", 5)
    whole, whole_losses = run_fit(paths, tmp_path / "a.safetensors", recipe=recipe)
    with pytest.raises(TrainingStoppedError):
        run_fit(paths, tmp_path / "b.safetensors", stop_after=2, recipe=recipe)
    broken, broken_losses = run_fit(paths, tmp_path / "b.safetensors", resume=True, recipe=recipe)
    assert len(whole_losses) == 5
    assert whole_losses == broken_losses
    for key, value in whole.state_dict().items():
        assert torch.equal(value, broken.state_dict()[key]), key


def test_every_option_of_the_recipe_edge_resumes_bitwise(tmp_path: Path) -> None:
    small = {"size_wh": [SIZE, SIZE], "iterations": 5, "batch": 4, "ema": 0.9, "lr_drop_at": 0.5}
    recipe = load_recipe("edge", small).common
    assert recipe.discriminator
    assert recipe.precision == "bf16"
    paths = write_images(tmp_path / "good", 5)
    whole, whole_losses = run_fit(paths, tmp_path / "a.safetensors", recipe=recipe)
    with pytest.raises(TrainingStoppedError):
        run_fit(paths, tmp_path / "b.safetensors", stop_after=2, recipe=recipe)
    # Nor does it matter who prepares the images.
    broken, broken_losses = run_fit(paths, tmp_path / "b.safetensors", resume=True, recipe=recipe, workers=2)
    assert whole_losses == broken_losses
    for key, value in whole.state_dict().items():
        assert torch.equal(value, broken.state_dict()[key]), key


def test_training_ends_before_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    save = training_loop.save_checkpoint

    def slow_save(*arguments: object) -> None:
        nonlocal now_s
        now_s += 5.0
        save(*arguments)  # type: ignore[arg-type]

    def slow_iteration(iteration: int, loss: float | None) -> None:
        nonlocal now_s
        now_s += 10.0

    monkeypatch.setattr(training_loop, "save_checkpoint", slow_save)
    monkeypatch.setattr(training_loop, "time", SimpleNamespace(monotonic=lambda: now_s))
    paths = write_images(tmp_path / "good", 3)
    recipe = RECIPE.model_copy(update={"iterations": 1000})
    checkpoint = tmp_path / "c.safetensors"
    images = GoodImages(paths, INPUT)
    given = {"checkpoint": checkpoint, "fingerprint": "x", "on_iteration": slow_iteration, "deadline_s": 100.0}
    with pytest.raises(OutOfTimeError, match=r"time is up after \d of 1000"):
        fit(ReContrast(RECIPE.backbone), images, recipe, **given)  # type: ignore[arg-type]
    assert checkpoint.exists()
    assert 70.0 <= now_s <= 100.0


def test_images_are_read_before_training_where_workers_share_them(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "good", 4)
    images = GoodImages(paths, INPUT)
    images.load(2)
    for path in paths:
        path.unlink()
    assert images[3].shape == (3, SIZE, SIZE)
    paths[0].write_bytes(b"no image")
    with pytest.raises(InputError, match="part0_0"):
        GoodImages(paths[:1], INPUT).load(2)


def test_what_a_worker_cannot_read_is_told_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "CACHE_BYTES", 0)
    paths = write_images(tmp_path / "good", 2)
    paths[0].write_bytes(b"no image")
    with pytest.raises(InputError, match="part0_0") as raised:
        run_fit(paths, tmp_path / "c", workers=1)
    assert "Traceback" not in str(raised.value)
    assert "Error: " not in str(raised.value)


def test_the_loss_falls(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "good", 4)
    _, losses = run_fit(paths, tmp_path / "c.safetensors", recipe=RECIPE.model_copy(update={"iterations": 25}))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


def test_learning_rates_drop_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []
    make = training_loop.make_optimizers

    def recorded(*arguments: object) -> list[torch.optim.AdamW]:
        optimizers = make(*arguments)  # type: ignore[arg-type]
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(lambda stepping, *_: rates.append([stepping.param_groups[0]["lr"]]))
        return optimizers

    monkeypatch.setattr(training_loop, "make_optimizers", recorded)
    recipe = RECIPE.model_copy(
        update={"lr_decoder": 2e-3, "lr_encoder": 1e-5, "lr_drop_at": 0.8, "lr_drop_factor": 0.2}
    )
    run_fit(write_images(tmp_path / "good", 4), tmp_path / "c", recipe=recipe)
    decoder, encoder = np.array(rates).reshape(5, 2).T
    np.testing.assert_allclose(decoder, [2e-3] * 4 + [4e-4])
    np.testing.assert_allclose(encoder, [1e-5] * 4 + [2e-6])


def test_checkpoints_of_another_training_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "good", 4)
    checkpoint = tmp_path / "c.safetensors"
    with pytest.raises(TrainingStoppedError):
        run_fit(paths, checkpoint, stop_after=1)
    model = ReContrast(RECIPE.backbone)
    with pytest.raises(UsageError, match="another recipe"):
        fit(model, GoodImages(paths, INPUT), RECIPE, checkpoint=checkpoint, fingerprint="other", resume=True)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged checkpoint"):
        fit(model, GoodImages(paths, INPUT), RECIPE, checkpoint=checkpoint, fingerprint="same", resume=True)


def test_divergence_is_an_error(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "good", 4)
    torch.manual_seed(0)
    model = ReContrast(RECIPE.backbone)
    with torch.no_grad():
        model.heads[0][0].weight.fill_(float("nan"))
    with pytest.raises(
        ModelError, match="diverged: the loss is nan at iteration 1; lower lr_decoder and lr_encoder, set"
    ):
        fit(model, GoodImages(paths, INPUT), RECIPE, checkpoint=tmp_path / "c", fingerprint="x")


def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "good", 2)
    recipe = RECIPE.model_copy(update={"precision": "fp16"})
    with pytest.raises(MissingError, match="fp16"):
        run_fit(paths, tmp_path / "c", recipe=recipe)


class TestData:
    def test_batches_cover_each_epoch_once_and_do_not_depend_on_the_start(self) -> None:
        whole = list(batches(7, 3, seed=5, start=0, stop=14))
        assert whole[4:] == list(batches(7, 3, seed=5, start=4, stop=14))
        flat = [index for batch in whole for index in batch]
        for epoch in range(6):
            assert sorted(flat[7 * epoch : 7 * epoch + 7]) == list(range(7))
        assert flat[:7] != flat[7:14]
        assert whole != list(batches(7, 3, seed=6, start=0, stop=14))

    def test_balanced_batches_draw_each_category_once_a_round(self) -> None:
        categories = ["a"] * 5 + ["b"] * 2 + ["c"] * 3
        whole = list(balanced_batches(categories, 4, seed=5, start=0, stop=15))
        assert whole[6:] == list(balanced_batches(categories, 4, seed=5, start=6, stop=15))
        flat = [index for batch in whole for index in batch]
        assert all({categories[index] for index in flat[3 * n : 3 * n + 3]} == {"a", "b", "c"} for n in range(20))
        # A category's images are used up before one comes again.
        of_a = [index for index in flat if index < 5]
        assert all(sorted(of_a[5 * n : 5 * n + 5]) == list(range(5)) for n in range(4))
        assert len({tuple(categories[index] for index in flat[3 * n : 3 * n + 3]) for n in range(20)}) > 1
        assert whole != list(balanced_batches(categories, 4, seed=6, start=0, stop=15))

    def test_a_part_is_held_out_as_a_whole(self) -> None:
        samples = [Sample(Path(f"part{part}_{picture}.png")) for part in range(10) for picture in range(6)]
        parts = parts_of(samples, PartNames(pattern=r"part(\d+)"))
        training, held = split_holdout(samples, 0.2, seed=0, parts=parts)
        assert len(held) == 12
        assert len(training) == 48
        assert not {each.path.name.split("_")[0] for each in training} & {each.path.name.split("_")[0] for each in held}

    def test_holdout_refuses_what_cannot_be(self) -> None:
        samples = [Sample(Path(f"{index}.png")) for index in range(3)]
        with pytest.raises(InputError, match="leaves none"):
            split_holdout(samples, 0.9, seed=0, parts=["0", "1", "2"])


OVERRIDES = {"backbone": "efficientnet_lite0", "size_wh": [SIZE, SIZE], "iterations": 3, "batch": 2}


def options(data: Path, out: Path, **changes: object) -> TrainOptions:
    return TrainOptions(data=data, out=out, overrides=OVERRIDES, weights="random", **changes)  # type: ignore[arg-type]


def test_a_whole_run(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    spec = train(options(data, out, holdout=0.34, part_names=PartNames(pattern=r"(part\d+)")))
    _, loaded = load_run(out)
    assert loaded == spec
    assert spec.class_name == "washers"
    assert spec.training.n_images == 4
    known = {file_sha256(path)[:16] for path in (data / "train" / "good").iterdir()}
    assert len(set(spec.training.image_digests) & known) == 4
    assert len(spec.training.good_scores) == 4
    assert list(spec.training.good_scores) == sorted(spec.training.good_scores)
    assert spec.threshold is None
    assert str(tmp_path) not in (out / "model.json").read_text()
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 <= metrics["metrics"]["i_auroc"] <= 1
    assert metrics["kinds"]["spot"]["n_defect"] == 3
    assert len((out / "loss.csv").read_text().splitlines()) == 4
    image = cv2.imread(str(out / "loss.png"))
    assert image is not None
    assert image.std() > 1
    report = (out / "report.html").read_text()
    assert "washers" in report
    assert spec.weights_sha256 in report
    listed = [line for line in (out / "holdout.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(listed) == 2
    # Both of one part, which the list tells to whoever calibrates on it.
    (part,) = {sample.part for sample in find_dataset(out / "holdout.txt").train_good}
    assert part is not None
    assert all(line.endswith(f"\t{part}") and f"{part}_" in line for line in listed)
    assert not (out / "checkpoint.safetensors").exists()

    with pytest.raises(UsageError, match="already holds a finished run"):
        train(options(data, out))
    (out / "metrics.json").unlink()
    same = {"holdout": 0.34, "part_names": PartNames(pattern=r"(part\d+)"), "resume": True}
    train(options(data, out, **same))
    assert (out / "metrics.json").exists()
    with pytest.raises(UsageError, match="finished training with other images"):
        train(options(data, out, resume=True))
    with pytest.raises(UsageError, match="finished training with other seed"):
        train(dataclasses.replace(options(data, out, **same), overrides={**OVERRIDES, "seed": 5}))

    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ModelError, match="SHA-256 differs"):
        load_run(out)
    (out / "model.json").unlink()
    with pytest.raises(ModelError, match="finished training"):
        load_run(out)


def test_the_same_seed_gives_the_same_weights(data: Path, tmp_path: Path) -> None:
    first = train(options(data, tmp_path / "a"))
    second = train(options(data, tmp_path / "b"))
    assert first.weights_sha256 == second.weights_sha256


def test_names_that_look_like_markup(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = data.rename(tmp_path / "washers[bold] [")
    train(options(odd, tmp_path / "[" / "red]run", holdout=0.2))
    printed = capsys.readouterr().err
    assert "washers[bold] [: " in printed
    assert str(tmp_path / "[" / "red]run") in printed.replace("\n", "")


def test_names_that_are_no_text(data: Path, tmp_path: Path) -> None:
    paths = sorted((data / "train" / "good").iterdir())
    odd = [path.rename(path.with_name(f"\udcff{path.name}")) for path in paths]
    with pytest.raises(InputError, match=r"'.*\\udcffpart.*' a name that is no text|is no text"):
        train(options(data, tmp_path / "run", holdout=0.2))
    images = GoodImages(odd[:2], INPUT)
    suspects = [Suspect(index, path, 1.0, 1.0, np.eye(8, dtype=np.float32)) for index, path in enumerate(odd[:2])]
    write_suspects(tmp_path / "suspects.csv", suspects, images)
    assert sheet_path(tmp_path / "suspects.csv").stat().st_size > 0


@pytest.mark.parametrize("name", ["washers\udcff", "w" * 201])
def test_a_name_that_the_spec_cannot_hold_is_refused_before_training(name: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be a product's name"):
        train(options(data.rename(tmp_path / name), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_made_is_told(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"holdout\.txt: cannot write here"):
        train(options(data, tmp_path / "file" / "run", holdout=0.2))


def test_one_image_is_no_training_set(tmp_path: Path) -> None:
    write_images(tmp_path / "one", 1)
    with pytest.raises(InputError, match="at least 2"):
        train(options(tmp_path / "one", tmp_path / "run"))


def train_command(data: Path, out: Path) -> list[str]:
    """A training that writes a checkpoint every second."""
    model = ("--backbone", "efficientnet_lite0", "--weights", "random", "--size", "64x64", "--batch", "2")
    command = (sys.executable, "-m", "recontrast_edge", "train", str(data), "--out", str(out))
    return [*command, *model, "--checkpoint-seconds", "1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_stops_on_a_signal_and_resumes(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    command = train_command(data, out)
    with subprocess.Popen([*command, "--iterations", "100000"], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (out / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "--resume" in error
    assert "Traceback" not in error
    again = subprocess.run([*command, "--iterations", "9", "--resume"], capture_output=True, text=True)
    assert again.returncode == 2  # another number of iterations is another training
    assert "another recipe" in again.stderr


def test_a_killed_training_leaves_a_whole_checkpoint(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*train_command(data, out), "--iterations", "60"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (out / "checkpoint.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    assert not (out / "model.json").exists()
    finished = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    spec = ModelSpec.loads((out / "model.json").read_bytes(), where="model.json")
    assert spec.training.iterations == 60
