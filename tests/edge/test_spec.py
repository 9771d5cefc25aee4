"""The spec and its place in ONNX files: what is wrong is refused, what is right survives the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from recontrast_edge.engines import open_engine
from recontrast_edge.errors import ModelError
from recontrast_edge.onnxfile import SPEC_KEY, graph_sha256, read_metadata, replace_metadata
from recontrast_edge.spec import InputSpec, Level, ModelSpec, Roi, Scoring, Threshold, Training


def spec(**changes: object) -> ModelSpec:
    values: dict[str, object] = {
        "class_name": "washers",
        "backbone": "resnet18",
        "input": InputSpec(
            size_wh=(64, 96),
            resize_wh=(80, 96),
            mean=(0.1, 0.2, 0.3),
            std=(0.4, 0.5, 0.6),
            roi=Roi(x=1, y=2, width=3, height=4),
        ),
        "levels": (Level(stride=4, channels=64), Level(stride=8, channels=128), Level(stride=16, channels=256)),
        "scoring": Scoring(rule="top", top_fraction=0.02),
        "threshold": Threshold(value=1.5, max_false_reject_rate=0.01, confidence=0.95, n_good=299),
        "weights_sha256": "a" * 64,
        "training": Training(recipe={"lr": 2e-3, "nested": [1, None, "x"]}, n_images=3),
        **changes,
    }
    return ModelSpec(**values)  # type: ignore[arg-type]


def test_the_way_to_text_and_back_changes_nothing() -> None:
    before = spec()
    after = ModelSpec.loads(before.dumps(), where="test")
    assert after == before
    assert after.dumps() == before.dumps()
    assert after.level_wh(1) == (8, 12)


def envelope(**changes: object) -> dict[str, object]:
    """A whole envelope whose digest fits its changed body."""
    import hashlib

    body = {**json.loads(spec().dumps())["spec"], **changes}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return {"spec": body, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a recontrast-edge spec"),
        ('{"spec": 1, "sha256": ""}', "not a recontrast-edge spec"),
        (json.dumps(envelope(format="other")), "expected spec format"),
        (json.dumps(envelope(version=3)), "newer than this software"),
        (json.dumps(envelope(version=0)), "not a positive"),
        (json.dumps(envelope(version=True)), "not a positive"),
        (spec().dumps().replace("washers", "washer"), "changed after it was written"),
        (json.dumps(envelope(extra=1)), "extra"),
        (json.dumps(envelope(backbone=3)), "backbone"),
        (json.dumps(envelope(weights_sha256="abc")), "weights_sha256"),
        (json.dumps(envelope(threshold={"value": "high"})), "threshold.value"),
        (json.dumps(envelope(levels=[])), "levels"),
        (json.dumps(envelope(levels=[{"stride": 8, "channels": 1}, {"stride": 4, "channels": 1}])), "must rise"),
    ],
)
def test_what_is_wrong_is_refused_by_name(text: str | bytes, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelSpec.loads(text, where="model.json")


def test_numbers_that_are_none_are_refused() -> None:
    text = spec().dumps().replace("1.5", "NaN")
    with pytest.raises(ModelError):
        ModelSpec.loads(text, where="model.json")
    with pytest.raises(ValidationError):
        Threshold(value=float("inf"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size_wh": (100, 96)}, "multiple of 32"),
        ({"resize_wh": (32, 32)}, "smaller"),
        ({"std": (0.1, 0.0, 0.1)}, "std"),
    ],
)
def test_inputs_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    values = {**spec().input.model_dump(), "resize_wh": (100, 96), **changes}
    with pytest.raises(ValidationError, match=message):
        spec(input=InputSpec(**values))


def test_something_must_count_in_the_map() -> None:
    with pytest.raises(ValidationError, match="one a level, got 2"):
        spec(scoring=Scoring(level_weights=(1.0, 2.0)))
    with pytest.raises(ValidationError, match="level_weight above 0"):
        spec(scoring=Scoring(level_weights=(0.0, 0.0, 0.0)))
    spec(scoring=Scoring(level_weights=(0.0, 0.0, 0.0), discriminator_weight=1.0))


def test_a_spec_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError):
        spec().class_name = "other"  # type: ignore[misc]


class TestOnnxFile:
    def test_metadata_is_what_onnx_reads_and_the_graph_stays(self, tiny_model: Path, tmp_path: Path) -> None:
        onnx = pytest.importorskip("onnx", reason="the reference is the onnx package")
        path = tmp_path / "m.onnx"
        path.write_bytes(tiny_model.read_bytes())
        before, graph = graph_sha256(path), onnx.load(path).graph
        for value in ("first", "second " * 100, "third ä"):
            replace_metadata(path, {"note": value})
            model = onnx.load(path)
            properties = {entry.key: entry.value for entry in model.metadata_props}
            assert properties == read_metadata(path)
            assert properties["note"] == value
            assert len(model.metadata_props) == len(properties)
            assert model.graph == graph
            assert graph_sha256(path) == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]

    def test_other_weights_have_another_digest(self, tiny_model: Path, tmp_path: Path) -> None:
        onnx = pytest.importorskip("onnx", reason="changes the graph")
        model = onnx.load(tiny_model)
        model.graph.node[0].attribute[0].ints[0] = 2
        onnx.save(model, tmp_path / "m.onnx")
        assert graph_sha256(tmp_path / "m.onnx") != graph_sha256(tiny_model)

    def test_every_cut_is_refused(self, tiny_model: Path, tmp_path: Path) -> None:
        data = tiny_model.read_bytes()
        path = tmp_path / "m.onnx"
        for end in range(len(data) - 1):
            path.write_bytes(data[:end])
            with pytest.raises(ModelError), open_engine(path):
                pass

    def test_a_spec_of_another_graph_is_refused(self, tiny_model: Path, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        path.write_bytes(tiny_model.read_bytes())
        own = ModelSpec.loads(read_metadata(path)[SPEC_KEY], where="m.onnx")
        other = own.input.model_copy(update={"size_wh": (64, 64), "resize_wh": (64, 64)})
        replace_metadata(path, {SPEC_KEY: own.model_copy(update={"input": other}).dumps()})
        with pytest.raises(ModelError, match="expected one input"):
            open_engine(path)

    def test_a_closed_engine_says_so(self, tiny_model: Path) -> None:
        engine = open_engine(tiny_model)
        engine.close()
        engine.close()
        with pytest.raises(ModelError, match="closed"):
            engine.infer([])
