"""The packaged model: really trained by the committed recipe, small, and good on parts it has never seen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from recontrast_edge.camera_plan import CameraPlan
from recontrast_edge.engines import Engine, engine_path, open_engine
from recontrast_edge.metrics import auroc
from recontrast_edge.pipeline import Line
from recontrast_edge.sinks import open_sink
from recontrast_edge.sources import open_source
from recontrast_edge.synthetic import SyntheticLine
from recontrast_edge.task import Product

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

UNSEEN_SEED = 20_261_122


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine("demo") as opened:
        yield opened


def test_it_is_small_and_says_where_it_comes_from(engine: Engine) -> None:
    assert engine_path("demo").stat().st_size <= 8_000_000
    recipe = tomllib.loads((files("recontrast_train") / "recipes" / "demo.toml").read_text())
    trained = engine.spec.training.recipe
    assert {key: trained[key] for key in recipe} == recipe
    assert engine.spec.training.iterations == recipe["iterations"]
    threshold = engine.spec.threshold
    assert threshold is not None
    assert threshold.engine_sha256 == engine.sha256
    assert threshold.max_false_reject_rate is not None


def test_it_separates_an_unseen_line(engine: Engine) -> None:
    scores, defective = [], []
    for product in ("brushed-metal", "woven-fabric"):
        line = SyntheticLine(product, seed=UNSEEN_SEED, size_wh=(256, 256), defect_rate=0.5)
        for index in range(60):
            part = line.part(index)
            scores.append(float(engine.infer([part.image]).scores[0]))
            defective.append(part.truth == "defect")
    assert auroc(scores, defective) >= 0.99


def test_a_frame_has_one_score_whatever_batch_mode_and_output(engine: Engine, tmp_path: Path) -> None:
    uri = "synthetic://mixed?fps=0&frames=9&seed=5&defect_rate=0.4"
    images = []
    source = open_source(uri)
    for _ in range(9):
        frame = source.read(1.0)
        assert frame is not None
        assert frame.image is not None
        images.append(frame.image)
    alone = [float(engine.infer([image]).scores[0]) for image in images]
    for batch in (2, 4, 9):
        together = np.concatenate([engine.infer(images[at : at + batch]).scores for at in range(0, 9, batch)])
        assert together.tolist() == alone

    class Scores:
        uri = "scores"

        def __init__(self) -> None:
            self.scores: dict[int, float | None] = {}

        def write(self, judgement) -> None:  # type: ignore[no-untyped-def]
            self.scores[judgement.frame.frame_id] = judgement.score

        def close(self) -> None:
            pass

    for mode in ("live", "every"):
        for outputs in (
            [],
            [f"jsonl:{tmp_path / mode}.jsonl", f"video:{tmp_path / mode}.mp4", f"images:{tmp_path / mode}?which=all"],
        ):
            collected = Scores()
            sinks = [collected, *(open_sink(output, input_spec=engine.spec.input) for output in outputs)]
            Line([CameraPlan(uri, lambda: open_source(uri), Product(engine, 1.0), mode=mode)]).run(sinks)
            assert collected.scores
            assert mode == "live" or len(collected.scores) == 9
            assert all(score == alone[frame_id] for frame_id, score in collected.scores.items())
