"""Images of one part: told by their names, by a list or by the data set, guessed for a warning, and counted once.

python -m pytest tests/edge/test_part_names.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from recontrast_edge.calibration import calibrate, calibrate_engine, held_out, promise_in_words
from recontrast_edge.cli import app, commands  # noqa: F401 - registers the commands
from recontrast_edge.datasets import Sample, alike, file_sha256, find_dataset, parts_by_name, parts_of
from recontrast_edge.engines import Engine, open_engine
from recontrast_edge.errors import CalibrationError, UsageError
from recontrast_edge.evaluation import evaluate
from recontrast_edge.images import write_image
from recontrast_edge.onnxfile import read_spec
from recontrast_edge.recalibration import recalibrate
from recontrast_edge.sources import open_source
from recontrast_edge.spec import PartNames, Threshold, Training
from tests.conftest import TINY_SIZE

BY_NUMBER = PartNames(pattern=r"num_(\d+)", gap=100)


def write_parts(folder: Path, brightness: Sequence[Sequence[int]]) -> Path:
    """Of each part images of these brightnesses, which are their scores times 255; numbers of a part lie together."""
    for part, values in enumerate(brightness):
        for view, value in enumerate(values):
            image = np.zeros((TINY_SIZE, TINY_SIZE), np.uint8)
            image[part % TINY_SIZE, view] = value
            write_image(folder / f"exp{view}_num_{1000 * part + 40 * view}.png", image)
    return folder


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40), st.integers(0, 200))
def test_numbers_that_follow_each_other_closely_are_one_part(numbers: list[int], gap: int) -> None:
    parts = parts_by_name([f"num_{number}.png" for number in numbers], PartNames(pattern=r"num_(\d+)", gap=gap))
    for a, part_a in zip(numbers, parts, strict=True):
        # Everything that can be reached from here in steps of at most the gap, slowly.
        reached = {a}
        while more := {b for b in numbers if b not in reached and any(abs(b - c) <= gap for c in reached)}:
            reached |= more
        assert {b for b, part_b in zip(numbers, parts, strict=True) if part_b == part_a} == reached


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (PartNames(pattern="("), "not a regular expression"),
        (PartNames(pattern=r"part(\d+)"), "does not match 'num_7.png'"),
        (PartNames(pattern="num"), "does not match"),
        (PartNames(pattern=""), "does not match"),
        (PartNames(pattern="(x)?num"), "does not match"),
        (PartNames(pattern="(n)um", gap=3), "needs numbers"),
    ],
)
def test_names_that_tell_no_parts_are_refused(names: PartNames, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parts_by_name(["num_7.png"], names)


def test_names_that_look_alike_are_noticed_and_others_are_not() -> None:
    rng = np.random.default_rng(0)
    assert alike([f"part{part}_{view}.png" for part in range(30) for view in "abc"]) == ("part0_a.png", "part0_b.png")
    exposures = [f"exp{view}_num_{900 * part + 15 * view + part % 7}.jpg" for part in range(20) for view in range(1, 7)]
    assert alike([exposures[index] for index in rng.permutation(len(exposures))]) == tuple(exposures[:2])
    for innocent in (
        [],
        ["a.png"],
        [f"{index:03}.png" for index in range(200)],
        [f"lot{index // 100}_{index:05}.png" for index in range(300)],
        [f"lot{rng.integers(3)}_{index:05}.png" for index in range(300)],
        [
            f"2024-01-{day:02}_{hour:02}-{(7 * day + 13 * hour) % 60:02}.png"
            for day in range(1, 20)
            for hour in range(24)
        ],
    ):
        assert alike(innocent) is None


def test_a_list_tells_parts_after_a_tab(tmp_path: Path) -> None:
    write_parts(tmp_path / "good", [[10, 20], [30]])
    listed = tmp_path / "list.txt"
    listed.write_text(
        "# image\tpart\ngood/exp0_num_0.png\tleft one\n good/exp1_num_40.png\t left one\ngood/exp0_num_1000.png\n"
    )
    samples = find_dataset(listed).train_good
    assert [sample.part for sample in samples] == ["left one", None, "left one"]
    assert len(set(parts_of(samples, None))) == 2
    source = open_source(f"list:{listed}")
    try:
        assert source.read(1.0) is not None
    finally:
        source.close()


def test_the_highest_score_of_a_part_stands_for_it(engine: Engine, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    brightness = [rng.integers(20, 250, rng.integers(1, 5)).tolist() for _ in range(25)]
    samples = find_dataset(write_parts(tmp_path / "good", brightness)).train_good
    images = held_out(samples, engine.spec, BY_NUMBER)
    promise = {"max_false_reject_rate": 0.1, "confidence": 0.9}
    given_engine = {"engine_sha256": engine.sha256, "data_name": "good"}
    found = calibrate_engine(engine.infer, images, engine.spec, **given_engine, **promise)  # type: ignore[arg-type]
    highest = [max(values) / 255 for values in brightness]
    assert found.calibration.n_good == found.threshold.n_good == 25
    assert found.threshold.n_images == sum(map(len, brightness))
    assert found.threshold.value == pytest.approx(calibrate(highest, 0.1, 0.9).value, abs=1e-6)
    assert "Drawing 25 parts" in (promise_in_words(found.threshold) or ("",))[0]
    # As many images, each taken for a part of its own, promise more than they can keep.
    alone = calibrate_engine(engine.infer, held_out(samples, engine.spec), engine.spec, **given_engine, **promise)  # type: ignore[arg-type]
    assert alone.threshold.n_images is None
    assert alone.threshold.value < found.threshold.value
    with pytest.raises(CalibrationError, match="needs 45 good parts, got 25"):
        calibrate_engine(
            engine.infer,
            images,
            engine.spec,
            **given_engine,
            max_false_reject_rate=0.05,
            confidence=0.9,  # type: ignore[arg-type]
        )

    # Another precision of the model gets its threshold from the same parts, or none.
    spec = engine.spec.with_threshold(found.threshold)
    assert recalibrate(engine.infer, samples, spec, engine_sha256=engine.sha256) == found.threshold
    told = [Sample(sample.path, part=part) for sample, part in zip(samples, images.parts, strict=True)]
    by_list = held_out(told, engine.spec)
    found = calibrate_engine(engine.infer, by_list, engine.spec, **given_engine, **promise)  # type: ignore[arg-type]
    spec = engine.spec.with_threshold(found.threshold)
    assert recalibrate(engine.infer, told, spec, engine_sha256=engine.sha256) == found.threshold
    with pytest.raises(CalibrationError, match="here are"):
        recalibrate(engine.infer, samples, spec, engine_sha256=engine.sha256)


def test_a_part_that_was_trained_on_is_left_out_with_all_its_images(engine: Engine, tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "good", [[10, 20, 30], [40, 50], [60]])
    digest = file_sha256(folder / "exp1_num_40.png")[:16]
    spec = engine.spec.model_copy(update={"training": Training(image_digests=(digest,))})
    samples = find_dataset(folder).train_good
    images = held_out(samples, spec, BY_NUMBER)
    assert [sample.path.name for sample in images.samples] == [
        "exp0_num_1000.png",
        "exp0_num_2000.png",
        "exp1_num_1040.png",
    ]
    assert (images.n_parts, images.n_trained_on) == (2, 3)
    assert held_out(samples, spec).n_trained_on == 1


def test_an_evaluation_holds_the_promise_against_parts(engine: Engine, tmp_path: Path) -> None:
    # Of 12 parts 3 are rejected, with all six of their images: 18 of 72 images would be more than chance explains.
    brightness = [[200] * 6 if part < 3 else [20] * 6 for part in range(12)]
    samples = find_dataset(write_parts(tmp_path / "good", brightness)).train_good
    threshold = Threshold(value=0.5, max_false_reject_rate=0.1, confidence=0.9, n_good=40, n_images=240, data="good")
    for names, told in ((None, True), (BY_NUMBER, False), (PartNames(pattern="other(.)"), True)):
        spec = engine.spec.with_threshold(threshold.model_copy(update={"parts": names}))
        notes = evaluate(engine.infer, samples, spec).notes
        assert any("more than chance explains" in note for note in notes) is told


def test_calibrate_counts_parts_and_warns_where_nothing_tells_them(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(tiny_model.read_bytes())
    good = write_parts(tmp_path / "good", [[10 + 5 * part, 20 + 5 * part, 15 + 5 * part] for part in range(25)])

    def command(*arguments: object) -> tuple[int, str]:
        fixed = ("calibrate", "--engine", model, "--max-false-reject-rate", 0.1, "--confidence", 0.9, "--threads", 1)
        done = CliRunner().invoke(app, [str(argument) for argument in (*fixed, *arguments)])
        return (done.exit_code if not isinstance(done.exception, UsageError) else 2), f"{done.output}{done.exception}"

    code, text = command("--good", good, "--dry-run")
    assert code == 0
    assert "exp0_num_0.png and exp1_num_40.png may show the same one" in text
    code, text = command("--good", good, "--part", r"num_(\d+)", "--part-gap", 100, "--json", tmp_path / "c.json")
    assert code == 0, text
    assert "75 images show 25 parts" in text
    assert "warning" not in text
    assert '"part": "from 1000"' in (tmp_path / "c.json").read_text()
    threshold = read_spec(model).threshold
    assert threshold is not None
    assert (threshold.n_good, threshold.n_images, threshold.parts) == (25, 75, BY_NUMBER)
    info = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["info", str(model)])
    assert "25 good parts (75 images) of" in info.output
    for arguments, message in (
        (("--good", good, "--part-gap", 3), "needs --part"),
        (("--good", good, "--part", "(("), "not a regular expression"),
        (("--part", "(x)", "--value", 1), "--good"),
    ):
        code, text = command(*arguments)
        assert code != 0
        assert message in text
    with open_engine(model, threads=1) as opened:
        assert opened.spec.threshold == threshold
