"""The commands eval, calibrate, info and doctor as a user runs them, with good and with bad input."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pil

from recontrast_edge import doctor
from recontrast_edge.cli import main
from recontrast_edge.datasets import file_sha256
from recontrast_edge.engines import open_engine
from recontrast_edge.onnxfile import SPEC_KEY, graph_sha256, output_names, read_spec, replace_metadata

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["recontrast-edge", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), captured.out, captured.err

    return run


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change; its score is the brightest pixel on the 0..1 scale."""
    return Path(shutil.copy(tiny_model, tmp_path / "model.onnx"))


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pil.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "parts"
    rng = np.random.default_rng(0)
    for index in range(6):
        write(root / "train" / "good" / f"{index}.png", rng.integers(0, 100, (32, 32)))
        write(root / "test" / "good" / f"{index}.png", rng.integers(0, 100, (32, 32)))
        spot, mask = rng.integers(0, 100, (32, 32)), np.zeros((32, 32))
        spot[5:9, 5:9], mask[5:9, 5:9] = 200, 255
        write(root / "test" / "[bold]spot" / f"{index}.png", spot)
        write(root / "ground_truth" / "[bold]spot" / f"{index}_mask.png", mask)
    return root


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    folder = tmp_path / "held out"
    rng = np.random.default_rng(1)
    for index in range(60):
        pixels = rng.integers(0, 50, (32, 32))
        pixels[0, 0] = 100 + index
        write(folder / f"{index}.png", pixels)
    return folder


def test_eval_prints_a_table_and_writes_json(command: Command, model: Path, data: Path, tmp_path: Path) -> None:
    code, out, _ = command("eval", "--engine", model, "--data", data, "--json", tmp_path / "out" / "m.json")
    assert code == 0
    assert "[bold]spot" in out
    assert "tiny on parts: 6 good, 6 with defects" in out
    assert "good parts rejected: 0 of 6 (0.00 %), 95 % interval 0.00 ... 45.93 %" in out
    content = json.loads((tmp_path / "out" / "m.json").read_text())
    assert content["metrics"]["i_auroc"] == 1.0
    assert content["engine"]["sha256"] == graph_sha256(model)
    assert content["data"]["name"] == "parts"
    assert len(content["images"]) == 12


def test_eval_says_how_sure_it_is_by_part(command: Command, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "metrics.json"
    code, shown, err = command("eval", "--engine", model, "--data", data, "--json", out)
    assert code == 0, err
    assert "(6 good parts, 6 with defects)" in shown
    by_image = json.loads(out.read_text())["i_auroc_interval_95"]
    assert by_image["low"] <= json.loads(out.read_text())["metrics"]["i_auroc"] <= by_image["high"]
    grouped = ("--part", r"(\d+)", "--part-gap", 1)
    # 0.png to 5.png are one run of numbers, so one part: nothing can be said of others.
    code, shown, _ = command("eval", "--engine", model, "--data", data, "--json", out, *grouped)
    assert code == 0
    assert "I-AUROC of other parts" not in shown
    assert json.loads(out.read_text())["i_auroc_interval_95"] is None
    assert command("eval", "--engine", model, "--data", data, "--part-gap", 1)[0] == 2
    code, _, err = command("eval", "--engine", model, "--data", data, "--part", "(x)")
    assert code == 2
    assert "does not match" in err


def test_eval_of_several_categories(command: Command, model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("nuts", "bolts"):
        shutil.copytree(data, tmp_path / "set" / name)
    common = ("eval", "--engine", model, "--data", tmp_path / "set")
    code, out, _ = command(*common, "--json", tmp_path / "m.json")
    assert code == 0
    assert "set, metrics in percent" in out
    content = json.loads((tmp_path / "m.json").read_text())
    assert [(row["name"], row["n_good"], row["n_defect"]) for row in content["categories"]] == [
        ("bolts", 6, 6),
        ("nuts", 6, 6),
    ]
    assert content["mean"]["i_auroc"] == 1.0
    assert content["engine"]["sha256"] == graph_sha256(model)
    code, _, error = command(*common, "--report", tmp_path / "r.html")
    assert code == 2
    assert "has 2 categories; name one's folder" in error


def test_eval_writes_a_report(command: Command, model: Path, data: Path, tmp_path: Path) -> None:
    report = tmp_path / "out" / "report.html"
    code, _, _ = command("eval", "--engine", model, "--data", data, "--report", report, "--json", tmp_path / "m.json")
    assert code == 0
    text = report.read_text()
    assert "tiny on parts" in text
    assert "[bold]spot/0.png" in text
    assert graph_sha256(model) in text
    assert json.loads((tmp_path / "m.json").read_text())["data"]["sha256"] in text
    code, _, err = command("eval", "--engine", model, "--data", data, "--report", tmp_path / "report.pdf")
    assert (code, "ends in .html" in err) == (2, True)


def test_eval_at_full_resolution(command: Command, model: Path, data: Path, tmp_path: Path) -> None:
    for folder in ("test", "ground_truth"):
        for path in (data / folder).rglob("*.png"):
            Pil.open(path).resize((128, 96), Pil.Resampling.NEAREST).save(path)
    sizes = {}
    for options in ((), ("--full-resolution",)):
        code, _, _ = command("eval", "--engine", model, "--data", data, "--json", tmp_path / "m.json", *options)
        assert code == 0
        content = json.loads((tmp_path / "m.json").read_text())
        sizes[content["resolution"]] = content["metrics"]["p_ap"]
    # Enlarged, the map is smooth at the spot's edge: some of its pixels are no brighter than good ones.
    assert sizes["map"] == 1.0
    assert 0.9 < sizes["source"] < 1.0


def test_eval_with_bad_input(command: Command, model: Path, data: Path, tmp_path: Path) -> None:
    code, _, err = command("eval", "--engine", tmp_path / "none.onnx", "--data", data)
    assert (code, "no such model file" in err) == (4, True)
    code, _, err = command("eval", "--engine", model, "--data", tmp_path / "none")
    assert (code, "no such data set" in err) == (3, True)
    code, _, err = command("eval", "--engine", model, "--data", data / "train" / "good")
    assert (code, "has no test images" in err) == (3, True)
    code, _, err = command("eval", "--engine", model, "--data", data, "--json", data / "test" / "good" / "0.png" / "m")
    assert (code, "cannot write" in err) == (7, True)
    (data / "test" / "good" / "3.png").write_bytes(b"")
    code, _, err = command("eval", "--engine", model, "--data", data)
    assert (code, "good/3.png: the file is empty" in err) == (3, True)
    assert "Traceback" not in err


def test_calibrate_writes_a_threshold_that_run_accepts(command: Command, model: Path, held_out: Path) -> None:
    before = graph_sha256(model)
    arguments = ("calibrate", "--engine", model, "--good", held_out, "--max-false-reject-rate", 0.05)
    code, out, _ = command(*arguments, "--dry-run")
    assert code == 0
    assert "was not changed" in out
    assert read_spec(model).threshold.method == "manual"

    code, out, _ = command(*arguments)
    assert code == 0
    assert "score number 60 of 60" in out
    assert "at most 5 % will be rejected" in out
    assert "A promise ten times better (0.5 %) needs 598 images, 538 more than these." in out
    threshold = read_spec(model).threshold
    assert threshold.value == np.float32(159) * np.float32(1 / 255)
    assert (threshold.n_good, threshold.data, threshold.confidence) == (60, "held out", 0.95)
    assert threshold.engine_sha256 == graph_sha256(model) == before
    with open_engine(model) as engine:
        assert engine.spec.threshold == threshold


def remember_training(model: Path, images: Iterable[Path], scores: Iterable[float]) -> None:
    spec = read_spec(model)
    digests = tuple(file_sha256(path)[:16] for path in images)
    training = spec.training.model_copy(update={"image_digests": digests, "good_scores": tuple(scores)})
    replace_metadata(model, {SPEC_KEY: spec.model_copy(update={"training": training}).dumps()})


def test_calibrate_leaves_training_images_out(command: Command, model: Path, held_out: Path, tmp_path: Path) -> None:
    remember_training(model, [held_out / "7.png"], ())
    arguments = ("calibrate", "--engine", model, "--good", held_out, "--json", tmp_path / "out" / "c.json")
    code, out, err = command(*arguments, "--max-false-reject-rate", 0.05)
    assert code == 0
    assert "trained on 1 of these images. They are left out; 59 are left." in err
    assert "score number 59 of 59" in out
    assert "needs 598 images, 539 more than these" in out
    content = json.loads((tmp_path / "out" / "c.json").read_text())
    assert content["threshold"]["n_good"] == len(content["images"]) == 59
    wanted = {"image": "good/0.png", "kind": "good", "part": None, "score": pytest.approx(100 / 255)}
    assert wanted in content["images"]
    assert "good/7.png" not in [image["image"] for image in content["images"]]
    remember_training(model, [held_out / f"{index}.png" for index in range(2)], ())
    code, _, err = command(*arguments, "--max-false-reject-rate", 0.05)
    assert (code, "needs 59 good images, got 58" in err, "Collect 1 more" in err) == (9, True, True)


def test_calibrate_warns_of_images_that_look_like_training_images(
    command: Command, model: Path, held_out: Path, tmp_path: Path
) -> None:
    arguments = ("calibrate", "--engine", model, "--good", held_out, "--max-false-reject-rate", 0.05)
    # Held-out images score 100 ... 159 of 255.
    for scores, warned in ((np.arange(100, 160), True), (np.arange(80, 140), False), ((), False)):
        remember_training(model, [], (float(score) / 255 for score in scores))
        code, _, err = command(*arguments, "--json", tmp_path / "c.json")
        assert code == 0
        assert ("cannot be told from those the model was trained on" in err) is warned
        shift = json.loads((tmp_path / "c.json").read_text())["score_shift"]
        assert (shift is None) is (len(scores) == 0)


def test_calibrate_refuses_what_it_cannot_promise(command: Command, model: Path, held_out: Path) -> None:
    unchanged = model.read_bytes()
    arguments = ("calibrate", "--engine", model, "--good", held_out)
    code, _, err = command(*arguments, "--max-false-reject-rate", 0.001)
    assert (code, "needs 2995 good images, got 60" in err) == (9, True)
    # A copy is no evidence: with 59 different ones 5 % is just possible, with 58 no more.
    shutil.copy(held_out / "0.png", held_out / "59.png")
    code, out, _ = command(*arguments, "--max-false-reject-rate", 0.05, "--dry-run")
    assert (code, "1 image(s) are copies" in out) == (0, True)
    shutil.copy(held_out / "0.png", held_out / "58.png")
    code, _, err = command(*arguments, "--max-false-reject-rate", 0.05)
    assert (code, "got 58" in err) == (9, True)
    assert model.read_bytes() == unchanged


def test_calibrate_usage(command: Command, model: Path, data: Path, held_out: Path) -> None:
    for arguments, message in (
        ((), "give either --good"),
        (("--good", held_out, "--value", 1), "give either --good"),
        (("--good", held_out), "needs --max-false-reject-rate"),
        (("--good", data, "--max-false-reject-rate", 0.05), "whole data set"),
        (("--good", held_out, "--max-false-reject-rate", 5), "between 0 and 1"),
        (("--value", "nan"), "finite"),
        (("--value", 1, "--json", "c.json"), "with --value there are none"),
        (("--value", 1, "--max-false-reject-rate", 0.1), "promises nothing"),
    ):
        code, _, err = command("calibrate", "--engine", model, *arguments)
        assert (code, message in err) == (2, True), err
    code, _, err = command("calibrate", "--engine", "demo", "--value", 1)
    assert (code, "demo model is part of the installation" in err) == (2, True)


def test_calibrate_by_hand(command: Command, model: Path) -> None:
    code, out, _ = command("calibrate", "--engine", model, "--value", 0.75)
    assert (code, "set by hand" in out, "it was 0.5" in out) == (0, True, True)
    threshold = read_spec(model).threshold
    assert (threshold.value, threshold.method, threshold.max_false_reject_rate) == (0.75, "manual", None)


def safetensors_bytes() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(24)


@pytest.fixture
def run_folder(tmp_path: Path, model: Path) -> Path:
    import hashlib

    folder = tmp_path / "run"
    folder.mkdir()
    weights = safetensors_bytes()
    spec = read_spec(model).model_copy(update={"weights_sha256": hashlib.sha256(weights).hexdigest()})
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "model.json").write_text(spec.dumps())
    (folder / "metrics.json").write_text(json.dumps({"metrics": {"i_auroc": 0.5, "aupro": None}}))
    return folder


def test_info_of_every_kind(command: Command, model: Path, run_folder: Path) -> None:
    for artifact, kind, expected in (
        (model, "onnx", "map (anomaly map and score in the graph)"),
        (run_folder, "run", "i_auroc 0.5000, aupro -"),
        (run_folder / "model.json", "spec", "32x32 pixels RGB"),
        (run_folder / "model.safetensors", "weights", "1 tensors, 0.0 million values"),
    ):
        code, out, _ = command("info", artifact)
        assert (code, expected in out) == (0, True), out
        code, out, _ = command("info", artifact, "--json")
        content = json.loads(out)
        assert (code, content["kind"], content["spec"]["class_name"]) == (0, kind, "tiny")


def test_info_does_not_load_onnx_runtime(model: Path) -> None:
    import subprocess

    script = (
        "import sys; from recontrast_edge.artifact import describe; describe(sys.argv[1]); "
        "print(sorted({'onnxruntime', 'cv2', 'torch', 'onnx', 'av'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(model)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_info_with_bad_input(command: Command, model: Path, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "cut.onnx").write_bytes(model.read_bytes()[:-7])
    (tmp_path / "zero.onnx").write_bytes(b"")
    edited = (run_folder / "model.json").read_text().replace('"tiny"', '"Tiny"')
    (tmp_path / "edited.json").write_text(edited)
    (tmp_path / "alone.safetensors").write_bytes(safetensors_bytes())
    for artifact, message in (
        (tmp_path / "none", "no such file or folder"),
        (tmp_path / "empty", "is a folder without model.json and model.safetensors"),
        (tmp_path / "notes.txt", "expected an .onnx or .plan file"),
        (tmp_path / "cut.onnx", "damaged or cut off"),
        (tmp_path / "zero.onnx", "the file is empty"),
        (tmp_path / "edited.json", "was changed after it was written"),
        (tmp_path / "alone.safetensors", "alone.json is missing beside it"),
    ):
        code, _, err = command("info", artifact)
        assert (code, message in err) == (4, True), err
    for weights, message in (
        (safetensors_bytes()[:-1] + b"x", "SHA-256 differs"),
        (b"\xff" * 100, "not a complete safetensors file"),
        (b"", "not a complete safetensors file"),
        ((4).to_bytes(8, "little") + b"null", "not a complete safetensors file"),
    ):
        (run_folder / "model.safetensors").write_bytes(weights)
        code, _, err = command("info", run_folder)
        assert (code, message in err) == (4, True), err


def test_output_names_equal_onnx(model: Path) -> None:
    import onnx

    assert output_names(model) == [output.name for output in onnx.load(model).graph.output]


def missing_everything(name: str) -> doctor.Library:
    broken = name == "pypylon"
    return doctor.Library("broken" if broken else "missing", None, {}, "ImportError: libpylon" if broken else None)


def test_doctor_reports_and_exits_with_0(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(name: str) -> doctor.Library:
        return probe(name) if name in ("onnxruntime", "opencv", "pyav", "nvidia_driver") else missing_everything(name)

    probe = doctor._probe_apart
    monkeypatch.setattr(doctor, "_probe_apart", quick)
    code, out, _ = command("doctor", "--json")
    assert code == 0
    content = json.loads(out)
    assert content["libraries"]["onnxruntime"]["status"] == "ready"
    assert "CPUExecutionProvider" in content["libraries"]["onnxruntime"]["details"]["providers"]
    assert "h264" in content["libraries"]["pyav"]["details"]["decoders"]
    capabilities = {item["name"]: item for item in content["capabilities"]}
    assert capabilities["run on the CPU"] == {"name": "run on the CPU", "ready": True, "to_do": []}
    assert all(item["ready"] == (not item["to_do"]) for item in capabilities.values())


def test_doctor_says_what_to_install(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_probe_apart", missing_everything)
    code, out, _ = command("doctor")
    assert code == 0
    for advice in (
        '"recontrast-edge[train]"',
        '"recontrast-edge[export]"',
        '"recontrast-edge[tensorrt-rtx]"',
        "libpylon",
    ):
        assert advice in " ".join(out.split())


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("import os; os.abort()", "broken", "the probe ended with status -6"),
        ("import time; time.sleep(60)", "broken", "does not answer within 1 s"),
        ("raise RuntimeError('driver too old')", "broken", "RuntimeError: driver too old"),
        ("import module_that_nobody_has", "broken", "module_that_nobody_has"),
        ("raise SystemExit(3)", "broken", "SystemExit: 3"),
        ("print('noise'); __version__ = '1.2'", "ready", None),
    ],
)
def test_a_broken_library_breaks_nothing_but_its_own_line(
    code: str, status: str, error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    library = doctor._probe_apart("tensorrt", timeout_s=1.0 if "sleep" in code else 30.0)
    assert library.status == status
    assert (error or "") in (library.error or "")
    if status == "ready":
        assert library.version == "1.2"
