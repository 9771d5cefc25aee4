"""Evaluation of a scorer whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pil

from recontrast_edge.datasets import find_dataset
from recontrast_edge.engines import Inference
from recontrast_edge.errors import InputError, ModelError
from recontrast_edge.evaluation import evaluate
from recontrast_edge.preprocess import Image
from recontrast_edge.spec import InputSpec, Level, ModelSpec, Roi, Threshold

METRICS = {"i_auroc", "i_ap", "f1_max", "p_auroc", "p_ap", "aupro", "aupro_5", "aupro_per_image"}

SPEC = ModelSpec(
    class_name="plates",
    backbone="none",
    input=InputSpec(size_wh=(32, 32), resize_wh=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    levels=(Level(stride=4, channels=3),),
    threshold=Threshold(value=0.5, method="manual"),
    weights_sha256="0" * 64,
)


def brightness(images: Sequence[Image]) -> Inference:
    """The map is the image itself, on the 0..1 scale; the score its maximum."""
    maps = np.stack([image.astype(np.float32) / 255 for image in images])
    return Inference(maps, maps.max(axis=(1, 2)), {})


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pil.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def plates(tmp_path: Path) -> Path:
    """4 good plates, of which one has a glint; 2 clear scratches; 2 stains, one darker than the threshold."""
    root = tmp_path / "plates"
    for index, peak in enumerate((50, 60, 70, 140)):
        pixels = np.full((32, 32), 20)
        pixels[3, 3] = peak
        write(root / "test" / "good" / f"{index}.png", pixels)
    for kind, peaks in (("scratch", (250, 240)), ("stain", (130, 100))):
        for index, peak in enumerate(peaks):
            pixels, mask = np.full((32, 32), 20), np.zeros((32, 32))
            pixels[10:14, 10:20], mask[10:14, 10:20] = peak, 255
            write(root / "test" / kind / f"{index}.png", pixels)
            write(root / "ground_truth" / kind / f"{index}_mask.png", mask)
    return root


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_number(plates: Path, batch_size: int) -> None:
    result = evaluate(brightness, find_dataset(plates).test_samples(), SPEC, batch_size=batch_size)
    assert (result.n_good, result.overall.n_defect) == (4, 4)
    assert list(result.kinds) == ["scratch", "stain"]
    assert result.kinds["scratch"].i_auroc.value == 1.0
    # Of the pairs (good, stain) 6 of 8 are in order: the glint beats both stains.
    assert result.kinds["stain"].i_auroc.value == pytest.approx(6 / 8)
    assert result.overall.i_auroc.value == pytest.approx(14 / 16)
    # Ranking: scratch, scratch, glint, stain, stain, ...
    assert result.overall.i_ap.value == pytest.approx((1 + 1 + 3 / 4 + 4 / 5) / 4)
    assert result.overall.f1_max.value == pytest.approx(8 / 9)
    assert result.f1_max_threshold == pytest.approx(100 / 255)
    for metrics in (result.overall, *result.kinds.values()):
        assert 0.999 < (metrics.p_auroc.value or 0) <= 1.0
        assert 0.99 < (metrics.aupro.value or 0) <= 1.0
        assert 0.97 < (metrics.aupro_5.value or 0) <= 1.0
        assert metrics.aupro_per_image.value == 1.0
    # Of good pixels only the glint is brighter than a defect: than both stains, of 40 pixels like the scratches.
    assert result.overall.p_ap.value == pytest.approx((80 + 40 * 120 / 121 + 40 * 160 / 161) / 160)
    assert result.kinds["scratch"].p_ap.value == 1.0
    at = result.at_threshold
    assert at is not None
    assert at.false_rejects is not None
    assert at.misses is not None
    assert (at.false_rejects.count, at.false_rejects.of) == (1, 4)
    assert (at.misses.count, at.misses.of) == (1, 4)
    assert at.misses.low < 0.25 < at.misses.high
    assert result.scores.tolist() == [np.float32(v) / np.float32(255) for v in (50, 60, 70, 140, 250, 240, 130, 100)]


def test_json_is_complete_and_plain(plates: Path) -> None:
    result = evaluate(brightness, find_dataset(plates).test_samples(), SPEC)
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content["metrics"].keys() == METRICS
    assert content["resolution"] == "map"
    assert content["undefined"] == {}
    assert content["kinds"]["stain"]["metrics"]["i_auroc"] == pytest.approx(0.75)
    assert content["at_threshold"]["misses"]["rate"] == 0.25
    assert content["images"][0] == {"image": "good/0.png", "kind": "good", "score": pytest.approx(50 / 255)}
    assert len(content["images"]) == 8


def test_what_cannot_be_computed_is_null_with_a_reason(plates: Path) -> None:
    samples = find_dataset(plates).test_samples()
    only_defects = evaluate(brightness, [s for s in samples if not s.is_good], SPEC).to_json()
    assert only_defects["metrics"]["i_auroc"] is None
    assert "nothing good" in only_defects["undefined"]["i_auroc"]
    assert only_defects["at_threshold"]["false_rejects"] is None
    assert only_defects["metrics"]["p_auroc"] is not None
    only_good = evaluate(brightness, [s for s in samples if s.is_good], SPEC).to_json()
    assert only_good["metrics"] == dict.fromkeys(METRICS)
    assert only_good["kinds"] == {}
    (plates / "ground_truth").rename(plates.parent / "elsewhere")
    maskless = evaluate(brightness, find_dataset(plates).test_samples(), SPEC).to_json()
    assert maskless["metrics"]["i_auroc"] == pytest.approx(14 / 16)
    assert "no ground-truth masks" in maskless["undefined"]["aupro"]


def test_empty_and_lost_masks_are_told(plates: Path) -> None:
    write(plates / "ground_truth" / "stain" / "0_mask.png", np.zeros((32, 32)))
    big, dot = np.full((320, 320), 20), np.zeros((320, 320))
    dot[0, 0] = 255
    write(plates / "test" / "stain" / "1.png", big)
    write(plates / "ground_truth" / "stain" / "1_mask.png", dot)

    def resized(images: Sequence[Image]) -> Inference:
        return brightness([image[:: image.shape[0] // 32, :: image.shape[1] // 32] for image in images])

    result = evaluate(resized, find_dataset(plates).test_samples(), SPEC)
    assert len(result.notes) == 2
    assert "1 defect image(s) have an empty mask" in result.notes[0]
    assert "too small" in result.notes[1]
    assert result.kinds["stain"].i_auroc.value is not None
    assert result.kinds["stain"].aupro.reason == "there is no defect in the ground truth"


def test_no_threshold_no_errors_at_it(plates: Path) -> None:
    result = evaluate(brightness, find_dataset(plates).test_samples(), SPEC.with_threshold(None))
    assert result.at_threshold is None
    assert result.to_json()["at_threshold"] is None


def test_a_model_that_misbehaves_is_named(plates: Path) -> None:
    samples = find_dataset(plates).test_samples()

    def broken(images: Sequence[Image]) -> Inference:
        result = brightness(images)
        result.maps[:, 5, 5] = np.nan
        return result

    with pytest.raises(ModelError, match=r"good/0\.png: the model's score or map is not finite"):
        evaluate(broken, samples, SPEC)

    def small(images: Sequence[Image]) -> Inference:
        result = brightness(images)
        return Inference(result.maps[:, ::2, ::2], result.scores, {})

    with pytest.raises(ModelError, match="maps of 32x32"):
        evaluate(small, samples, SPEC)
    with pytest.raises(InputError, match="no images"):
        evaluate(brightness, [], SPEC)


def test_a_broken_image_is_named(plates: Path) -> None:
    path = plates / "test" / "stain" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"stain/1\.png"):
        evaluate(brightness, find_dataset(plates).test_samples(), SPEC)


def test_the_worst_mistakes_are_kept_with_their_maps(plates: Path) -> None:
    result = evaluate(brightness, find_dataset(plates).test_samples(), SPEC, n_worst=3, batch_size=3)
    assert [scored.sample.path.name for scored in result.worst_good] == ["3.png", "2.png", "1.png"]
    worst = [f"{scored.sample.kind}/{scored.sample.path.name}" for scored in result.worst_defects]
    assert worst == ["stain/1.png", "stain/0.png", "scratch/1.png"]
    for scored in (*result.worst_good, *result.worst_defects):
        assert scored.map.max() == scored.score
        assert scored.mask is not None
        assert scored.map.base is None, "the map must not keep its batch alive"


def test_full_resolution_compares_at_the_masks_own_size(plates: Path) -> None:
    """A defect of one source pixel is lost at the map's size, and found at its own, inside the ROI alone."""
    roi = Roi(x=16, y=0, width=64, height=64)
    spec = SPEC.model_copy(update={"input": SPEC.input.model_copy(update={"roi": roi})})
    pixels, mask = np.full((64, 96), 20), np.zeros((64, 96))
    pixels[20, 40], mask[20, 40] = 200, 255
    mask[0, 0] = 255  # outside of the ROI
    for kind in ("scratch", "stain"):
        for index in range(2):
            write(plates / "test" / kind / f"{index}.png", pixels)
            write(plates / "ground_truth" / kind / f"{index}_mask.png", mask)
    for index in range(4):
        write(plates / "test" / "good" / f"{index}.png", np.full((64, 96), 20))

    def judge(images: Sequence[Image]) -> Inference:
        return brightness([image[::2, 16:80:2] for image in images])

    samples = find_dataset(plates).test_samples()
    lost = evaluate(judge, samples, spec)
    assert lost.overall.p_auroc.reason == "there is no defect in the ground truth"
    assert "too small for the 32x32 map" in lost.notes[0]
    result = evaluate(judge, samples, spec, resolution="source")
    assert result.to_json()["resolution"] == "source"
    # Enlarged bilinearly, the peak of the map lies over the four source pixels of its own, alike.
    assert result.overall.p_ap.value == pytest.approx(1 / 4)
    assert result.overall.p_auroc.value == pytest.approx(1 - 1.5 / (64 * 64 * 2 - 1), abs=1e-9)
    assert result.notes == ()


def test_a_broken_promise_is_told(plates: Path) -> None:
    samples = find_dataset(plates).test_samples()

    def promise(value: float, rate: float) -> ModelSpec:
        return SPEC.with_threshold(
            Threshold(value=value, max_false_reject_rate=rate, confidence=0.95, n_good=60, data="spring")
        )

    (note,) = evaluate(brightness, samples, promise(0.1, 0.05)).notes
    assert "promises that at most 5 %" in note
    assert "4 of 4 were, more than chance explains" in note
    assert "spring" in note
    # One of four is not beyond chance, and a threshold set by hand promises nothing.
    assert evaluate(brightness, samples, promise(0.5, 0.05)).notes == ()
    assert evaluate(brightness, samples, SPEC.with_threshold(Threshold(value=0.1, method="manual"))).notes == ()
