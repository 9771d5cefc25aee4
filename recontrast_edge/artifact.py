"""What a file of ours is, read without ONNX Runtime or PyTorch.

artifact = describe("model.onnx")  # artifact.kind, artifact.spec, artifact.details
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from recontrast_edge.datasets import file_sha256
from recontrast_edge.engines import DEMO, engine_path
from recontrast_edge.errors import ModelError
from recontrast_edge.onnxfile import graph_sha256, output_names, read_spec
from recontrast_edge.plan import verify_plan
from recontrast_edge.proof import read_quantisation
from recontrast_edge.scoring import MAP_NAME, SCORE_NAME
from recontrast_edge.spec import ModelSpec

SPEC_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
METRICS_FILE = "metrics.json"

_MAX_HEADER_BYTES = 100_000_000
"""Largest header that the safetensors format allows."""


@dataclass(frozen=True)
class Artifact:
    """A recognised artifact.

    Attributes:
        kind: what it is.
        path: the file or run folder.
        spec: the model spec it carries or, for weights, the one beside it.
        details: facts about the file itself, by name; JSON-able.
    """

    kind: Literal["onnx", "plan", "spec", "weights", "run"]
    path: Path
    spec: ModelSpec
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "path": str(self.path),
            "details": self.details,
            "spec": self.spec.model_dump(mode="json"),
        }


def describe(name: str) -> Artifact:
    """Find out what an artifact is, and check that its parts belong together.

    Args:
        name: an ``.onnx`` or ``.plan`` file, ``demo``, a run folder, or its ``model.json`` or ``model.safetensors``.

    Raises:
        ModelError: missing, damaged, not ours, or parts that do not belong together.
    """
    path = engine_path(name) if name == DEMO else Path(name)
    if path.is_dir():
        return _run(path)
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder; expected an artifact of recontrast-edge, or `{DEMO}`")
    readers = {".onnx": _onnx, ".plan": _plan, ".json": _spec, ".safetensors": _weights}
    reader = readers.get(path.suffix)
    if reader is None:
        raise ModelError(
            f"{path}: expected an .onnx or .plan file, {SPEC_FILE}, {WEIGHTS_FILE} or a run folder, "
            f"got {path.suffix or 'a file without suffix'!r}"
        )
    try:
        return reader(path)
    except OSError as error:
        raise ModelError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None


def _onnx(path: Path) -> Artifact:
    spec = read_spec(path)
    head = "map" if set(output_names(path)) == {MAP_NAME, SCORE_NAME} else "features"
    sha256 = graph_sha256(path)
    details = {"bytes": path.stat().st_size, "head": head, "engine_sha256": sha256}
    if (quantisation := read_quantisation(path)) is not None:
        details |= quantisation.model_dump(mode="json", exclude={"format", "version"})
    if spec.threshold is not None:
        details["threshold_is_for_this_engine"] = spec.threshold.engine_sha256 == sha256
    return Artifact("onnx", path, spec, details)


def _plan(path: Path) -> Artifact:
    info, content = verify_plan(path)
    facts = info.model_dump(mode="json", exclude={"format", "version", "spec"})
    details = {"bytes": len(content), "engine_sha256": info.plan_sha256, **facts}
    if info.spec.threshold is not None:
        details["threshold_is_for_this_engine"] = info.spec.threshold.engine_sha256 == info.plan_sha256
    return Artifact("plan", path, info.spec, details)


def _spec(path: Path) -> Artifact:
    return Artifact("spec", path, ModelSpec.loads(path.read_bytes(), where=str(path)))


def _weights(path: Path) -> Artifact:
    spec_path = path.with_suffix(".json")
    if not spec_path.is_file():
        raise ModelError(f"{path}: {spec_path.name} is missing beside it; weights without their spec cannot be used")
    tensors, values = _tensors(path)
    spec = _spec(spec_path).spec
    if file_sha256(path) != spec.weights_sha256:
        raise ModelError(f"{path}: these are not the weights that {spec_path} describes (SHA-256 differs); train again")
    return Artifact("weights", path, spec, {"bytes": path.stat().st_size, "tensors": tensors, "values": values})


def _tensors(path: Path) -> tuple[int, int]:
    """Number of tensors and of values in all of them, from the file's JSON header."""
    broken = ModelError(f"{path}: not a complete safetensors file; it is damaged or cut off, train again")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise broken
        try:
            header = json.loads(file.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            values = 0
            for tensor in tensors:
                count = 1
                for size in tensor["shape"]:
                    count *= int(size)
                values += count
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise broken from None
    return len(tensors), values


def _run(path: Path) -> Artifact:
    missing = [name for name in (SPEC_FILE, WEIGHTS_FILE) if not (path / name).is_file()]
    if missing:
        raise ModelError(
            f"{path}: is a folder without {' and '.join(missing)}; expected the run folder of a finished "
            "`recontrast-edge train`"
        )
    weights = _weights(path / WEIGHTS_FILE)
    details = {**weights.details, "files": sorted(entry.name for entry in path.iterdir() if entry.is_file())}
    if (path / METRICS_FILE).is_file():
        try:
            details["metrics"] = dict(json.loads((path / METRICS_FILE).read_bytes())["metrics"])
        except (ValueError, RecursionError, KeyError, TypeError):
            raise ModelError(f"{path / METRICS_FILE}: damaged; run the evaluation again") from None
    return Artifact("run", path, weights.spec, details)
