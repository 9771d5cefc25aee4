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
from recontrast_edge.spec import InputSpec, Level, ModelSpec, Threshold

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
    assert result.i_ap.value == pytest.approx((1 + 1 + 3 / 4 + 4 / 5) / 4)
    assert result.f1_max.value == pytest.approx(8 / 9)
    assert result.f1_max_threshold == pytest.approx(100 / 255)
    for metrics in (result.overall, *result.kinds.values()):
        assert 0.999 < (metrics.p_auroc.value or 0) <= 1.0
        assert 0.99 < (metrics.aupro.value or 0) <= 1.0
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
    assert content["metrics"].keys() == {"i_auroc", "p_auroc", "aupro", "i_ap", "f1_max"}
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
    assert only_good["metrics"] == dict.fromkeys(("i_auroc", "p_auroc", "aupro", "i_ap", "f1_max"))
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
