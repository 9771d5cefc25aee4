"""Give a model a threshold, as `recontrast-edge calibrate` does.

with_threshold(Path("model.onnx"), Path("good"))
"""

from __future__ import annotations

from pathlib import Path

from recontrast_edge.calibration import calibrate_engine, held_out, write_threshold
from recontrast_edge.datasets import find_dataset
from recontrast_edge.engines.onnx import OnnxEngine


def with_threshold(path: Path, good: Path) -> None:
    """Write the threshold into the model that its own scores of the good images give."""
    with OnnxEngine(path, threads=1) as engine:
        found = calibrate_engine(
            engine.infer,
            held_out(find_dataset(good).training_samples(), engine.spec),
            engine.spec,
            engine_sha256=engine.sha256,
            data_name="good",
            max_false_reject_rate=0.3,
            confidence=0.8,
        )
        write_threshold(path, engine.spec, found.threshold)
