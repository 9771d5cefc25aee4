"""Tiles: where they lie, how their maps are merged, and verdicts that do not depend on where a tile ends.

python -m pytest tests/edge/test_tiling.py
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from recontrast_edge.datasets import mask_to_map
from recontrast_edge.engines import DEMO, Inference, engine_path, open_engine
from recontrast_edge.errors import InputError, ModelError
from recontrast_edge.frame import Frame
from recontrast_edge.onnxfile import SPEC_KEY, read_spec, replace_metadata
from recontrast_edge.preprocess import Geometry, Image, preprocess
from recontrast_edge.resample import antialias_matrix
from recontrast_edge.scoring import image_scores
from recontrast_edge.spec import InputSpec, ModelSpec, Roi, Scoring
from recontrast_edge.synthetic import SyntheticLine
from recontrast_edge.tile_layout import blend_weights, tile_starts
from recontrast_edge.tiling import canvas, infer_tiles, tiles
from recontrast_edge.verdict import judge
from tests.conftest import TINY_SIZE
from tests.edge.test_spec import spec as spec_of


def tiled(model: Path, folder: Path, **changes: object) -> Path:
    """A copy of the model whose spec has another input."""
    path = folder / "tiled.onnx"
    path.write_bytes(model.read_bytes())
    spec = read_spec(path)
    values = {**spec.input.model_dump(), **changes}
    replace_metadata(path, {SPEC_KEY: spec.model_copy(update={"input": InputSpec.model_validate(values)}).dumps()})
    return path


def noise(height: int, width: int, *channels: int) -> Image:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, *channels), dtype=np.uint8)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_pixel_is_covered_and_no_tile_lies_outside(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 300))
    length = data.draw(st.integers(size, 3000))
    overlap = data.draw(st.integers(0, size // 2))
    starts = tile_starts(length, size, overlap)
    assert starts[0] == 0
    assert starts[-1] + size == length
    assert all(0 < after - before <= size - overlap for before, after in itertools.pairwise(starts))
    # One tile less could not do it.
    assert (len(starts) - 1) * (size - overlap) + overlap < length
    total = np.zeros(length)
    for start, weight in zip(starts, blend_weights(length, size, overlap), strict=True):
        assert weight.shape == (size,)
        assert (weight > 0).all()
        total[start : start + size] += weight
    np.testing.assert_allclose(total, 1.0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(32, 90), st.integers(32, 90), st.integers(0, 16), st.booleans())
def test_a_map_that_is_cut_and_merged_is_the_map(width: int, height: int, overlap: int, colour: bool) -> None:
    input_spec = InputSpec(
        size_wh=(32, 32), resize_wh=(width, height), tile_overlap=overlap, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    spec = spec_of(input=input_spec, scoring=Scoring())
    image = noise(height, width, *((3,) if colour else ()))

    def brightest(cut: Sequence[Image]) -> Inference:
        maps = np.stack([preprocess(tile, input_spec.of_tile).max(axis=0) for tile in cut])
        return Inference(maps, maps.max(axis=(1, 2)), {"infer": 1.0})

    found = infer_tiles(brightest, [image, image], spec, batch=3)
    expected = (image.max(axis=2) if colour else image) / 255
    np.testing.assert_allclose(found.maps[1], expected, atol=1e-6)
    assert found.scores[0] == found.scores[1] == found.maps[0].max()
    assert found.stage_ms.keys() == {"tile", "infer", "merge"}
    assert found.stage_ms["infer"] == 2 * -(-input_spec.n_tiles // 3)


def test_neighbours_that_disagree_leave_no_seam() -> None:
    spec = spec_of(
        input=InputSpec(size_wh=(32, 32), resize_wh=(96, 80), tile_overlap=8, mean=(0.0,) * 3, std=(1.0,) * 3),
        scoring=Scoring(rule="top", top_fraction=0.3),
    )
    rng = np.random.default_rng(0)

    def disagreeing(cut: Sequence[Image]) -> Inference:
        levels = rng.random(len(cut), dtype=np.float32)
        return Inference(np.broadcast_to(levels[:, None, None], (len(cut), 32, 32)), levels, {})

    found = infer_tiles(disagreeing, [noise(80, 96)], spec)
    for axis in (1, 2):
        steps = np.abs(np.diff(found.maps, axis=axis))
        assert 0 < steps.max() <= 1 / 8 + 1e-6, "at most the whole difference, spread over the overlap"
    assert found.maps.min() >= 0
    assert found.maps.max() <= 1
    assert found.scores[0] == image_scores(found.maps, spec.scoring)[0]


def test_one_tile_is_no_tile_to_the_last_bit(tiny_model: Path, tmp_path: Path) -> None:
    roi = Roi(x=3, y=5, width=70, height=41)
    images = [noise(60, 80, 3), noise(60, 80)]
    for changes in ({}, {"roi": roi}):
        found = []
        for overlap in (None, 0, 16):
            with open_engine(tiled(tiny_model, tmp_path, tile_overlap=overlap, **changes)) as engine:
                found.append(engine.infer(images))
        for other in found[1:]:
            np.testing.assert_array_equal(other.maps, found[0].maps)
            np.testing.assert_array_equal(other.scores, found[0].scores)


def test_verdict_boxes_and_masks_are_in_source_pixels(tiny_model: Path, tmp_path: Path) -> None:
    # 200x160 source pixels of a larger frame, at half their size, in 4 x 3 tiles.
    roi = Roi(x=40, y=20, width=200, height=160)
    path = tiled(tiny_model, tmp_path, resize_wh=(100, 80), tile_overlap=8, roi=roi)
    mask = np.zeros((200, 300), np.bool_)
    mask[110:130, 90:150] = True
    frame = np.where(mask, np.uint8(200), np.uint8(20))
    with open_engine(path) as engine:
        assert engine.spec.input.n_tiles == 12
        found = engine.infer([frame])
        assert found.maps.shape == (1, 80, 100)
        verdict = judge(Frame(0, "", frame, 0.0), found, 0.5, engine.spec.input)
        aligned = mask_to_map(mask, engine.spec.input)
    assert verdict.verdict == "REJECT"
    (region,) = verdict.regions
    assert (region.x, region.y, region.width, region.height) == (90, 110, 60, 20)
    np.testing.assert_array_equal(found.maps[0] > 0.5, aligned)
    assert Geometry.of(engine.spec.input, frame).to_source(0, 0, 100, 80) == (40, 20, 200, 160)


def test_the_scaled_image_is_the_resampling_rounded() -> None:
    spec = InputSpec(size_wh=(32, 32), resize_wh=(64, 48), tile_overlap=4, mean=(0.0,) * 3, std=(1.0,) * 3)
    image = noise(100, 130, 3)
    found = canvas(image, spec)
    expected = np.einsum("ay,yxc,bx->abc", antialias_matrix(100, 48), image.astype(float), antialias_matrix(130, 64))
    assert np.abs(found - expected).max() <= 0.5 + 1e-3
    native = noise(48, 64)
    assert np.shares_memory(canvas(native, spec), native), "at its own scale an image is not copied"
    assert [tile.shape for tile in tiles(native, spec)] == [(32, 32)] * spec.n_tiles


def test_nan_in_one_tile_is_a_fault(tiny_model: Path, tmp_path: Path) -> None:
    with open_engine(tiled(tiny_model, tmp_path, resize_wh=(64, 64), tile_overlap=8)) as engine:

        def broken(cut: Sequence[Image]) -> Inference:
            maps = np.zeros((len(cut), TINY_SIZE, TINY_SIZE), np.float32)
            maps[-1, 20, 20] = np.nan
            return Inference(maps, maps.max(axis=(1, 2)), {})

        frame = Frame(0, "", noise(64, 64), 0.0)
        verdict = judge(frame, infer_tiles(broken, [frame.image], engine.spec), 0.5, engine.spec.input)
        assert (verdict.verdict, verdict.fault) == ("FAULT", "non_finite_score")
        with pytest.raises(InputError, match="empty"):
            engine.infer([np.zeros((0, 64), np.uint8)])
    with pytest.raises(ModelError, match="closed"):
        engine.infer([frame.image])


def test_a_defect_on_the_border_of_a_tile_is_found_like_one_in_the_middle(tmp_path: Path) -> None:
    # The model that ships, on a view of brushed metal as wide as two of its inputs, at the scale it was trained for.
    part = SyntheticLine("brushed-metal", seed=3, size_wh=(256, 256), defect_rate=0.0).part(0)
    wide = np.concatenate([part.image, part.image[:, ::-1]], axis=1)[:, :480]
    path = tiled(engine_path(DEMO), tmp_path, resize_wh=(480, 256), tile_overlap=32)

    def with_defect(x: int) -> Image:
        image = wide.copy()
        image[120:136, x - 8 : x + 8] //= 3
        return image

    with open_engine(path, threads=1) as engine:
        assert [x for x, _ in engine.spec.input.tile_corners] == [0, 224]
        good, middle, first_end, overlap, second_start = engine.infer(
            [wide, with_defect(112), with_defect(224), with_defect(240), with_defect(256)]
        ).scores
        threshold = engine.spec.threshold.value
        assert good < threshold < min(middle, first_end, overlap, second_start)
        assert min(first_end, overlap, second_start) > 0.85 * middle


def test_inputs_that_cannot_be_are_refused() -> None:
    values = {"size_wh": (32, 32), "resize_wh": (64, 64), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    for changes, message in (
        ({"tile_overlap": 17}, "more than half"),
        ({"tile_overlap": -1}, "greater than or equal"),
        ({"tile_overlap": 0, "resize_wh": (16384, 16384)}, "512 x 512 tiles an image"),
    ):
        with pytest.raises(ValidationError, match=message):
            InputSpec(**{**values, **changes})
    with pytest.raises(ValueError, match="no single input"):
        preprocess(noise(64, 64), InputSpec(**values, tile_overlap=4))


def test_specs_of_before_tiles_are_read_and_written_as_they_are_now() -> None:
    body = json.loads(spec_of().dumps())["spec"]
    body["version"] = 1
    del body["input"]["tile_overlap"]
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    text = json.dumps({"spec": body, "sha256": hashlib.sha256(canonical.encode()).hexdigest()})
    read = ModelSpec.loads(text, where="old")
    assert read == spec_of()
    assert json.loads(read.dumps())["spec"]["version"] == 2
