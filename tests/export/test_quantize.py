"""``quantize``: budgets, proofs, refusals, and the search from end to end on a small network."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recontrast_edge import cli
from recontrast_edge.artifact import describe
from recontrast_edge.binomial import clopper_pearson
from recontrast_edge.engines import Inference, open_engine
from recontrast_edge.engines.onnx import OnnxEngine
from recontrast_edge.errors import (
    EXIT_FELL_BACK,
    CalibrationError,
    GateError,
    InputError,
    ModelError,
    UsageError,
)
from recontrast_edge.images import read_image, write_image
from recontrast_edge.metrics import auroc
from recontrast_edge.onnxfile import SPEC_KEY, graph_sha256, read_spec, replace_metadata
from recontrast_edge.plan import read_sidecar
from recontrast_edge.proof import QUANTISATION_KEY, Proof, read_quantisation
from recontrast_edge.spec import Roi, Threshold
from recontrast_edge.verdict import resolve_threshold
from tests.export.calibrated import with_threshold
from tests.programs import load_program

torch = pytest.importorskip("torch", reason="needs the train extra")
onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("onnxsim", reason="needs the export extra")
stats = pytest.importorskip("scipy.stats", reason="needs the dev extra")

from recontrast_export import quantize as quantize_module  # noqa: E402
from recontrast_export import sensitivity  # noqa: E402
from recontrast_export.budget import METRICS, Budget  # noqa: E402
from recontrast_export.defects import paste_defect  # noqa: E402
from recontrast_export.onnx_export import build_onnx  # noqa: E402
from recontrast_export.plausible import require_good_images  # noqa: E402
from recontrast_export.proving import GivenUp, Prover, ValidationImages, enforce, read_validation  # noqa: E402
from recontrast_export.quantize import Result, Trial, quantize  # noqa: E402
from recontrast_export.sensitivity import ladder  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def looked_at() -> Iterator[list[int]]:
    """A network with random weights knows no structure, so it cannot tell good parts from noise: here it is not asked.

    Collects how many images it would have been asked about.
    """
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize_module, "require_good_images", lambda engine, paths: asked.append(len(paths)))
        yield asked


LOOSE = Budget.parse("map_correlation>=0.5")
DECODER = ("decoder",)


@pytest.fixture(scope="module")
def good(data_folder: Path) -> Path:
    return data_folder / "test" / "good"


@pytest.fixture(scope="module")
def model(model_of: Any, spec_of: Any, good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, with a threshold that all good images of the test data hold to."""
    path: Path = tmp_path_factory.mktemp("models") / "lite0.onnx"
    network = model_of("efficientnet_lite0")
    onnx.save(build_onnx(network, spec_of("efficientnet_lite0", network.channels), head="map"), path)
    with_threshold(path, good)
    return path


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_a_budget_reads_as_people_write_it() -> None:
    budget = Budget.parse("verdict_flips<=0.5%, delta_i_auroc <= 3e-3,map_correlation>=99.9%")
    assert budget.limits == pytest.approx({"verdict_flips": 0.005, "delta_i_auroc": 0.003, "map_correlation": 0.999})
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected NAME<=NUMBER"),
        ("verdict_flips", "expected NAME<=NUMBER"),
        ("verdict_flips<=", "verdict_flips<="),
        ("verdict_flips<=1,", "expected NAME<=NUMBER"),
        ("flips<=1", "'flips' is unknown; expected one of verdict_flips"),
        ("verdict_flips>=1", "expected verdict_flips<="),
        ("map_correlation<=1", "expected map_correlation>="),
        ("verdict_flips<1", "expected verdict_flips<="),
        ("verdict_flips<=1,verdict_flips<=2", "given twice"),
        ("verdict_flips<=a", "expected a number"),
        ("verdict_flips<=nan", "expected a number"),
        ("verdict_flips<=inf", "expected a number"),
        ("verdict_flips<=-1", "expected a number >= 0"),
    ],
)
def test_what_is_no_budget_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Budget.parse(text)


PROOF: dict[str, Any] = {
    "candidate": "int8 graph",
    "images": "200 images of parts",
    "n_good": 100,
    "n_defect": 100,
    "pasted_defects": False,
    "map_correlation": 0.999,
    "map_correlation_lowest": 0.99,
    "map_error": 0.1,
    "map_error_p999": 0.05,
    "score_shift": -0.02,
    "score_error": 0.1,
    "rank_correlation": 0.998,
    "delta_i_auroc": 0.002,
    "delta_aupro": None,
    "reference_threshold": 1.0,
    "candidate_threshold": 1.01,
    "verdict_flips": {"count": 2, "of": 200, "low": 0.001, "high": 0.03},
    "clear_flips": 1,
    "flipped": ({"image": "crack/3.png", "reference_score": 1.2, "candidate_score": 0.9},),
    "budget": "verdict_flips<=0.01",
}


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        ("verdict_flips<=1%", True),
        ("verdict_flips<=0.9%", False),
        ("clear_flips<=0.5%", True),
        ("clear_flips<=0", False),
        ("delta_i_auroc<=0.002", True),
        ("delta_i_auroc<=0.001", False),
        ("map_correlation>=0.999", True),
        ("map_correlation>=0.9991", False),
        ("map_error<=0.1", True),
        ("map_error<=0.09", False),
        ("map_error_p999<=0.04", False),
        ("score_shift<=0.02", True),
        ("score_shift<=0.01", False),
        ("rank_correlation>=0.999", False),
        # What is undefined cannot be kept.
        ("delta_aupro<=1", False),
    ],
)
def test_budgets_are_enforced(budget: str, kept: bool) -> None:
    proof = Proof(**PROOF)
    assert (Budget.parse(budget).violations(proof) == []) == kept
    if kept:
        enforce(proof, Budget.parse(budget))
    else:
        with pytest.raises(GateError, match=r"over its budget on 200 images of parts: .*crack/3\.png; nothing was"):
            enforce(proof, Budget.parse(budget))


def test_every_metric_is_in_the_help() -> None:
    from typer.main import get_command

    from recontrast_edge.cli import app, commands  # noqa: F401

    command = get_command(app).commands["quantize"]  # type: ignore[attr-defined]
    (text,) = (option.help for option in command.params if option.name == "budget")
    assert [name for name in METRICS if name not in text] == []


# --- proofs ----------------------------------------------------------------------------------------------------------


class Answers:
    """An engine that looks its answers up: ``change`` turns the reference's scores and maps into its own."""

    def __init__(self, spec: Any, change: Any = None) -> None:
        self.spec = spec
        self._change = change or (lambda maps: maps)

    def infer(self, images: Any) -> Inference:
        width, height = self.spec.input.size_wh
        maps = np.zeros((len(images), height, width), np.float32)
        for index, image in enumerate(images):
            # Its own grey level, and a gradient so that there is something to correlate.
            maps[index] = image.mean() / 255 + np.linspace(0, 0.01, width, dtype=np.float32)
        changed = self._change(maps)
        return Inference(changed, changed.max(axis=(1, 2)), {})


@pytest.fixture
def flat_images(tmp_path: Path) -> ValidationImages:
    """40 good images of rising grey level and 10 bright ones with masks."""
    root = tmp_path / "flat"
    for index in range(50):
        kind, grey = ("good", 50 + index) if index < 40 else ("bright", 180 + index)
        write_image(root / "test" / kind / f"{index:02}.png", np.full((32, 32), grey, np.uint8))
        if kind != "good":
            mask = np.zeros((32, 32), np.uint8)
            mask[8:16, 8:16] = 255
            write_image(root / "ground_truth" / kind / f"{index:02}_mask.png", mask)
    return read_validation(root, tmp_path)


@pytest.fixture
def spec(spec_of: Any) -> Any:
    return spec_of("none", (1, 1, 1))


def test_an_equal_candidate_has_no_flaw(flat_images: ValidationImages, spec: Any) -> None:
    proof = Prover(Answers(spec), flat_images).prove(Answers(spec).infer, "itself", LOOSE)
    correlations = (proof.map_correlation, proof.map_correlation_lowest, proof.rank_correlation)
    assert correlations == pytest.approx((1, 1, 1))
    assert (proof.map_error, proof.score_shift, proof.score_error) == (0, 0, 0)
    assert (proof.delta_i_auroc, proof.delta_aupro) == (0, 0)
    assert (proof.n_good, proof.n_defect, proof.pasted_defects) == (40, 10, False)
    assert proof.verdict_flips.count == proof.clear_flips == 0
    assert (proof.verdict_flips.low, proof.verdict_flips.high) == clopper_pearson(0, 50)
    assert proof.reference_threshold == proof.candidate_threshold == pytest.approx(89 / 255 + 0.01)


def test_a_constant_shift_flips_nothing_because_the_threshold_moves_along(
    flat_images: ValidationImages, spec: Any
) -> None:
    proof = Prover(Answers(spec), flat_images).prove(Answers(spec, lambda maps: maps + 1).infer, "shifted", LOOSE)
    assert proof.verdict_flips.count == 0
    assert proof.candidate_threshold == pytest.approx(proof.reference_threshold + 1)
    assert proof.score_error == pytest.approx(1, rel=1e-5)
    grey = np.arange(50, 90) / 255
    assert proof.score_shift == pytest.approx(1 / grey.std(), rel=1e-4)
    assert proof.map_error == pytest.approx(100, rel=1e-3)


def test_flips_are_counted_named_and_told_apart(flat_images: ValidationImages, spec: Any) -> None:
    """Two bright images become dark; the verdicts of all others stay."""

    def lose(maps: Any) -> Any:
        changed = maps.copy()
        changed[(maps.max(axis=(1, 2)) > 0.89)] -= 0.8
        return changed

    proof = Prover(Answers(spec), flat_images).prove(Answers(spec, lose).infer, "broken", LOOSE)
    lost = [index for index in range(40, 50) if (180 + index) / 255 + 0.01 > 0.89]
    assert 0 < len(lost) < 10
    assert proof.verdict_flips.count == proof.clear_flips == len(lost)
    assert [flip.image for flip in proof.flipped] == [f"bright/{index}.png" for index in lost]
    assert all(flip.candidate_score < proof.candidate_threshold < flip.reference_score for flip in proof.flipped)
    assert proof.verdict_flips.of == 50
    assert (proof.verdict_flips.low, proof.verdict_flips.high) == clopper_pearson(len(lost), 50)
    defect = np.arange(50) >= 40
    scores = [float(lose(Answers(spec).infer([read_image(sample.path)]).maps).max()) for sample in flat_images.samples]
    assert proof.delta_i_auroc == pytest.approx(1 - auroc(np.array(scores), defect))
    reference = [float(Answers(spec).infer([read_image(sample.path)]).scores[0]) for sample in flat_images.samples]
    assert proof.rank_correlation == pytest.approx(stats.spearmanr(reference, scores).statistic)


def test_a_flip_at_the_threshold_is_not_a_clear_one(flat_images: ValidationImages, spec: Any) -> None:
    """The two good images next to the threshold change places."""
    order = np.sort(np.arange(50, 90) / 255)

    def swap(maps: Any) -> Any:
        changed = maps.copy()
        level = maps[:, 0, 0]
        changed[np.abs(level - order[-1]) < 1e-4] -= 1.5 / 255
        return changed

    proof = Prover(Answers(spec), flat_images).prove(Answers(spec, swap).infer, "swapped", LOOSE)
    assert proof.verdict_flips.count == 0
    assert proof.candidate_threshold == pytest.approx(proof.reference_threshold - 1 / 255, abs=1e-5)


def test_maps_that_are_not_finite_are_refused(flat_images: ValidationImages, spec: Any) -> None:
    prover = Prover(Answers(spec), flat_images)
    with pytest.raises(ModelError, match="not finite"):
        prover.prove(Answers(spec, lambda maps: maps * np.float32(np.nan)).infer, "broken", LOOSE)


def test_good_images_get_pasted_defects(good: Path, tmp_path: Path) -> None:
    images = read_validation(good, tmp_path)
    assert images.pasted
    assert images.source == "12 good images of good, 12 of them again with a pasted defect"
    pasted = [sample for sample in images.samples if not sample.is_good]
    assert len(pasted) == 12
    for sample, original in zip(pasted, images.samples, strict=False):
        (mask_path,) = sample.mask_paths
        changed = np.abs(read_image(sample.path).astype(int) - read_image(original.path)).max(axis=2) > 0
        mask = read_image(mask_path) > 0
        assert mask.any()
        assert changed.any()
        # An antialiased rim may be changed and not marked.
        assert (changed & mask).sum() >= 0.5 * changed.sum()


@pytest.mark.parametrize("shape", [(64, 96), (64, 96, 3)])
def test_pasted_defects_are_the_same_each_time_and_of_all_strengths(shape: tuple[int, ...]) -> None:
    image = np.full(shape, 100, np.uint8)
    strengths = set()
    for index in range(24):
        pasted, mask = paste_defect(image, index=index)
        again, _ = paste_defect(image, index=index)
        assert np.array_equal(pasted, again)
        assert mask.shape == shape[:2]
        assert mask.any()
        strengths.add(int(np.abs(pasted.astype(int) - image).max()))
    # A displaced piece of a flat image is flat.
    assert min(strengths - {0}) < 20
    assert max(strengths) > 100


def test_defects_are_pasted_where_the_model_looks() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    roi = Roi(x=30, y=5, width=40, height=20)
    for index in range(12):
        pasted, mask = paste_defect(image, index=index, roi=roi)
        expected, expected_mask = paste_defect(image[5:25, 30:70], index=index)
        assert np.array_equal(pasted[5:25, 30:70], expected)
        assert np.array_equal(mask[5:25, 30:70], expected_mask)
        pasted[5:25, 30:70] = image[5:25, 30:70]
        assert np.array_equal(pasted, image)
        assert mask.sum() == expected_mask.sum() > 0


def test_validation_needs_good_images(data_folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(str(path) for path in sorted((data_folder / "test" / "good").iterdir())[:7]))
    with pytest.raises(InputError, match="at least 8 good images, got 7"):
        read_validation(listed, tmp_path)


class Counting:
    """Counts the images that it passes on."""

    def __init__(self, infer: Any) -> None:
        self.n_images = 0
        self._infer = infer

    def __call__(self, images: Any) -> Inference:
        self.n_images += len(images)
        result: Inference = self._infer(images)
        return result


def lose_brightest(maps: Any) -> Any:
    """The three brightest images become dark."""
    changed = maps.copy()
    changed[maps.max(axis=(1, 2)) > 226.5 / 255 + 0.01] -= 0.8
    return changed


def test_a_candidate_is_given_up_when_its_flips_cannot_be_allowed_any_more(
    flat_images: ValidationImages, spec: Any
) -> None:
    """40 good images first, then the 10 bright ones by how near they are to the threshold: the last three change."""
    prover = Prover(Answers(spec), flat_images)
    candidate = Counting(Answers(spec, lose_brightest).infer)
    given_up = prover.attempt(candidate, "broken", Budget.parse("verdict_flips<=2%"))
    assert given_up == GivenUp(n_flips=2, n_judged=49)
    assert candidate.n_images == 49
    assert prover.attempt(candidate, "broken", Budget.parse("clear_flips<=0")) == GivenUp(n_flips=1, n_judged=48)


@pytest.mark.parametrize("budget", ["verdict_flips<=6%", "map_correlation>=0.5", "delta_i_auroc<=0"])
def test_a_candidate_with_a_chance_is_judged_to_the_end(budget: str, flat_images: ValidationImages, spec: Any) -> None:
    """Only verdicts are final before the end; what is attempted is what is proved."""
    prover, limits = Prover(Answers(spec), flat_images), Budget.parse(budget)
    candidate = Answers(spec, lose_brightest).infer
    proof = prover.attempt(candidate, "broken", limits)
    assert isinstance(proof, Proof)
    assert proof.verdict_flips.count == 3
    assert proof == prover.prove(candidate, "broken", limits)


def test_good_images_that_change_count_as_well(flat_images: ValidationImages, spec: Any) -> None:
    """Reversed, the good images' own threshold rejects none of them, and the bright images pass."""
    prover = Prover(Answers(spec), flat_images)
    given_up = prover.attempt(Answers(spec, lambda maps: 1 - maps).infer, "reversed", Budget.parse("verdict_flips<=9%"))
    assert given_up == GivenUp(n_flips=5, n_judged=45)


# --- calibration images that are none --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["noise", "black", "grey"])
def test_noise_and_empty_frames_are_no_calibration_images(what: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(3):
        image = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
        if what != "noise":
            image[:] = 0 if what == "black" else 128
        write_image(tmp_path / f"{index}.png", image)
    with open_engine("demo", threads=1) as engine, pytest.raises(InputError, match="look like noise or empty frames"):
        require_good_images(engine, sorted(tmp_path.iterdir()))


def test_parts_that_the_model_rejects_are_no_calibration_images(tmp_path: Path) -> None:
    from recontrast_edge.synthetic import write_dataset

    write_dataset(tmp_path / "line", "mixed", n_train=4, n_test_good=0, n_test_defect=4, seed=77)
    with open_engine("demo", threads=1) as engine:
        require_good_images(engine, sorted((tmp_path / "line" / "train" / "good").iterdir()))
        with pytest.raises(InputError, match=r"rejects 4 of 4 calibration images at its threshold"):
            require_good_images(engine, sorted((tmp_path / "line" / "test").rglob("*.png")))


# --- the search ------------------------------------------------------------------------------------------------------


class Costs:
    """Blocks with known cost, for the ladder."""

    macs = 100

    def macs_of(self, blocks: Any) -> int:
        return sum({"large": 80, "small": 1, "harmful": 9, "middle": 10}[block] for block in blocks)


def test_the_ladder_leaves_the_most_harm_for_the_least_work_first() -> None:
    harms = {"large": 0.002, "small": 0.0001, "harmful": 1.0, "middle": 0.1}
    rungs = ladder(Costs(), harms)  # type: ignore[arg-type]
    assert [set(rung.blocks) for rung in rungs] == [
        {"large", "small", "harmful", "middle"},
        {"large", "small", "middle"},
        {"large", "small"},
    ]
    assert [rung.int8_macs for rung in rungs] == [1.0, 0.91, 0.81]
    assert rungs[0].predicted_error == pytest.approx(1.1021**0.5)


@pytest.fixture(scope="module")
def quantised(model: Path, good: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(result, path) of a search over the decoder that any graph passes."""
    out = tmp_path_factory.mktemp("quantised") / "lite0.int8.onnx"
    said: list[str] = []
    result = quantize(
        model, out, calibration=good, validation=data_folder, budget=LOOSE, parts=DECODER, good=good, say=said.append
    )
    return result, out, said


def test_the_first_rung_is_written_where_the_budget_allows_it(
    quantised: Any, model: Path, looked_at: list[int]
) -> None:
    result, out, said = quantised
    assert looked_at[0] == 12
    record = read_quantisation(out)
    assert record == result.record
    assert record is not None
    assert record.precision == "int8"
    assert (record.source, record.source_sha256) == (model.name, graph_sha256(model))
    assert record.calibration is not None
    assert (record.calibration.data, record.calibration.n_images) == ("good", 12)
    assert len(result.method_errors) == 4
    assert record.conversion.method == min(result.method_errors, key=lambda method: result.method_errors[method])
    assert record.conversion.int8_macs == pytest.approx(result.trials[0].rung.int8_macs)
    assert set(record.conversion.fp16_blocks).isdisjoint(result.trials[0].rung.blocks)
    assert record.proof == result.trials[0].outcome
    assert all(trial.outcome is None for trial in result.trials[1:])
    assert record.proof.budget == str(LOOSE)
    assert record.proof.map_correlation > 0.9
    assert all(rung.blocks[0].startswith("decoder") for rung in (trial.rung for trial in result.trials))
    assert any("12 good images of good" in sentence for sentence in said)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.parent.iterdir()) == ["lite0.int8.onnx", "lite0.int8.png"]


def test_only_what_changes_verdicts_stays_out_of_int8(
    model: Path, good: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block breaks the budget, and others leave before it: they are put back."""
    attempt = quantize_module._Search._attempt
    leaving: list[str] = []

    def breaks(search: Any, prover: Any, trial: Trial) -> Any:
        left = [block for block in search._blocks if block not in trial.rung.blocks]
        if not leaving and len(left) >= 2:
            # The last of those that left so far.
            leaving.extend(sorted(left, key=lambda block: search._harms[block] / search._network.macs_of([block]))[:1])
        if not leaving or leaving[0] in trial.rung.blocks:
            return replace(trial, outcome=GivenUp(n_flips=1, n_judged=2)), None
        return attempt(search, prover, trial)

    monkeypatch.setattr(quantize_module._Search, "_attempt", breaks)
    result = quantize(
        model,
        tmp_path / "a.onnx",
        calibration=good,
        validation=data_folder,
        budget=LOOSE,
        parts=["bottleneck", "decoder"],
    )
    (culprit,) = leaving
    (written,) = (trial for trial in result.trials if trial.outcome is result.record.proof)
    everything = set(result.trials[0].rung.blocks)
    assert set(written.rung.blocks) == everything - {culprit}
    shares = [trial.rung.int8_macs for trial in result.trials]
    assert shares == sorted(shares, reverse=True)
    assert result.record.conversion.int8_macs == pytest.approx(written.rung.int8_macs)


def test_the_graph_that_was_proved_is_the_one_in_the_file(quantised: Any, model: Path, tmp_path: Path) -> None:
    _, out, _ = quantised
    record = read_quantisation(out)
    assert record is not None
    assert record.graph_sha256 == graph_sha256(out) != graph_sha256(model)
    changed = onnx.load(out)
    entry = next(entry for entry in changed.graph.initializer if entry.name.endswith("/scale"))
    entry.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(entry) * np.float16(1.25), entry.name))
    path = tmp_path / "changed.onnx"
    onnx.save(changed, path)
    with pytest.raises(ModelError, match="not the one that was validated"):
        read_quantisation(path)
    with pytest.raises(ModelError, match="not the one that was validated"):
        describe(str(path))


def test_the_threshold_is_derived_again(quantised: Any, model: Path, good: Path) -> None:
    result, out, _ = quantised
    before, after = read_spec(model).threshold, read_spec(out).threshold
    assert before is not None
    assert after == result.threshold
    assert after is not None
    assert (after.max_false_reject_rate, after.confidence, after.data_sha256) == (0.3, 0.8, before.data_sha256)
    assert after.engine_sha256 == graph_sha256(out)
    with OnnxEngine(out, threads=1) as engine:
        assert resolve_threshold(engine) == after.value
        scores = [engine.infer([read_image(path)]).scores[0] for path in sorted(good.iterdir())]
        assert any(after.value == pytest.approx(score, rel=1e-5) for score in scores)


@pytest.mark.parametrize("origin", ["another model", "unknown"])
def test_a_threshold_of_another_precision_is_refused(origin: str, quantised: Any, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "copied.onnx"
    path.write_bytes(quantised[1].read_bytes())
    foreign = read_spec(model).threshold
    assert foreign is not None
    if origin == "unknown":
        foreign = Threshold(value=foreign.value)
    replace_metadata(path, {SPEC_KEY: read_spec(path).with_threshold(foreign).dumps()})
    with OnnxEngine(path, threads=1) as engine, pytest.raises(ModelError, match="derived from another engine"):
        resolve_threshold(engine)
    assert describe(str(path)).details["threshold_is_for_this_engine"] is False


@pytest.mark.parametrize("record", ["{", "[]", '{"version": 2}', '{"version": 1}', '{"version": "1"}'])
def test_a_damaged_record_is_refused(record: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model.read_bytes())
    replace_metadata(path, {QUANTISATION_KEY: record})
    with pytest.raises(ModelError, match="record of its quantisation"):
        read_quantisation(path)


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["recontrast-edge", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_where_no_int8_graph_keeps_the_budget_fp16_is_written(
    model: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only good images: their defects are pasted."""
    monkeypatch.setattr(sensitivity, "_MAX_RUNGS", 2)
    out = tmp_path / "fallback.onnx"
    arguments = ["quantize", model, "--out", out, "--calibration", good, "--validation", good, "--parts", "decoder"]
    assert run_cli(monkeypatch, *arguments, "--budget", "map_correlation>=0.99995") == EXIT_FELL_BACK
    printed = capsys.readouterr().out
    assert "No INT8 graph keeps the budget; falling back to FP16." in printed
    assert "fp16, 0.0 % of the multiply-accumulates in INT8" in printed
    record = read_quantisation(out)
    assert record is not None
    assert record.precision == "fp16"
    assert record.calibration is None
    assert record.proof.pasted_defects
    assert record.proof.delta_i_auroc is not None
    assert run_cli(monkeypatch, "info", out) == 0
    assert "fp16, made from lite0.onnx" in capsys.readouterr().out
    assert run_cli(monkeypatch, "info", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["details"]["proof"] == json.loads(record.dumps())["proof"]


def test_nothing_is_written_where_not_even_fp16_keeps_the_budget(
    model: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "_MAX_RUNGS", 2)
    out = tmp_path / "out" / "a.onnx"
    with pytest.raises(GateError, match=r"FP16 graph, ONNX Runtime is over its budget .*map_error is"):
        quantize(
            model, out, calibration=good, validation=good, budget=Budget.parse("map_error<=0"), parts=["bottleneck"]
        )
    assert list(out.parent.iterdir()) == []


def test_a_broken_engine_is_caught(model: Path, data_folder: Path, tmp_path: Path) -> None:
    """One tensor of weights, scaled by 1.5."""
    changed = onnx.load(model)
    entry = next(entry for entry in changed.graph.initializer if entry.name == "decoder/stages/1/1/conv2/weight")
    entry.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(entry) * np.float32(1.5), entry.name))
    broken = tmp_path / "broken.onnx"
    onnx.save(changed, broken)
    budget = Budget.parse("map_correlation>=0.9999,clear_flips<=0")
    with OnnxEngine(model, threads=1) as reference, OnnxEngine(broken, threads=1) as engine:
        prover = Prover(reference, read_validation(data_folder, tmp_path))
        enforce(prover.prove(reference.infer, "the same", budget), budget)
        with pytest.raises(GateError, match="map_correlation is"):
            enforce(prover.prove(engine.infer, "broken", budget), budget)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": "a.plan"}, UsageError, "ends in .onnx"),
        ({"out": "model.onnx"}, UsageError, "is the model itself"),
        ({"parts": ["heads"]}, UsageError, "expected some of encoders, bottleneck, decoder, discriminator"),
        ({"parts": []}, UsageError, "got none"),
        ({"parts": ["discriminator"]}, UsageError, "has no discriminator"),
        ({"calibration": "nothing"}, InputError, "no such data set"),
        ({"validation": "nothing"}, InputError, "no such data set"),
        ({"good": "other"}, CalibrationError, "not the 12 good images of good"),
    ],
)
def test_bad_arguments_are_refused_before_anything_takes_time(
    change: dict[str, Any], error: type[Exception], message: str, model: Path, good: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(model.read_bytes())
    for index in range(8):
        write_image(tmp_path / "other" / f"{index}.png", np.full((70, 100), index, np.uint8))
    options: dict[str, Any] = {"out": "a.onnx", "calibration": good, "validation": good, "budget": LOOSE, **change}
    for name in ("out", "calibration", "validation", "good"):
        if name in options:
            options[name] = tmp_path / options[name]
    with pytest.raises(error, match=message):
        quantize(tmp_path / "model.onnx", options.pop("out"), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "other"]


def test_a_quantised_model_is_not_quantised_again(quantised: Any, good: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is int8 already"):
        quantize(quantised[1], tmp_path / "a.onnx", calibration=good, validation=good, budget=LOOSE)


def test_a_plan_carries_the_record_of_its_graph(quantised: Any, data_folder: Path, tmp_path: Path) -> None:
    """TensorRT for RTX takes the very graph, and its sidecar says what was proved of it."""
    pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx extra")
    from recontrast_export.build import build_engine

    result: Result = quantised[0]
    out = tmp_path / "lite0.plan"
    build_engine(quantised[1], out, precision="int8", images=[data_folder])
    info = read_sidecar(out)
    assert info.onnx_sha256 == result.record.graph_sha256
    assert info.conversion == result.record.conversion
    assert info.calibration == result.record.calibration
    assert info.parity.graph_proof == result.record.proof


def test_the_table_of_proofs(
    quantised: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``benchmarks/precision.py``: what it shows is what the file carries."""
    program = load_program("precision")
    record = quantised[0].record
    monkeypatch.setattr(sys, "argv", ["precision.py", str(quantised[1]), "--json", str(tmp_path / "rows.json")])
    program.main()
    (row,) = capsys.readouterr().out.splitlines()[2:]
    share, proof = f"{100 * record.conversion.int8_macs:.1f} %", record.proof
    changed = f"{proof.verdict_flips.count} of {proof.verdict_flips.of}, {proof.clear_flips} of them clear"
    assert row.split(" | ")[1:4] == ["INT8", share, changed]
    (written,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert written["proof"] == json.loads(record.dumps())["proof"]
    monkeypatch.setattr(sys, "argv", ["precision.py", str(model)])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == ModelError.exit_code
    assert "carries no proof" in capsys.readouterr().err
