"""A TensorRT plan and the sidecar that says what it is: ``model.plan`` and ``model.plan.json``.

    info, plan_bytes = verify_plan(Path("model.plan"))  # ModelError unless both are whole and belong together

Deserialising a plan runs what is in it, and the library's own checks are no tamper checks. So nothing is handed to
TensorRT before the sidecar was read and the plan's SHA-256 compared. That guards against damage and mix-ups; whoever
can write both files can make them agree.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from recontrast_edge.errors import ModelError
from recontrast_edge.images import atomic_write
from recontrast_edge.proof import Calibration, Conversion, Proof, Record, Share, Text
from recontrast_edge.spec import ModelSpec, Sha256, check_version

PLAN_FORMAT: Literal["recontrast-edge.plan"] = "recontrast-edge.plan"
PLAN_VERSION: Literal[1] = 1

Flavor = Literal["tensorrt", "tensorrt-rtx"]
FLAVOR_MODULES: dict[Flavor, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Python module of each library."""

Precision = Literal["fp32", "fp16", "int8"]
Head = Literal["map", "features"]

MAX_BATCH = 1024

BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH)]


class Comparison(Record):
    """How close a candidate came to its reference; it passed, or there would be no plan."""

    images: Text
    """Which images, for people."""
    n_images: Annotated[int, Field(ge=1)]
    map_error: Share
    """Largest error of any pixel of a map, as a share of that map's range."""
    score_error: Share
    """Largest absolute difference of two scores."""
    allowed_map_error: Share


class Parity(Record):
    """What was compared with the source ONNX model on ONNX Runtime."""

    graph: Comparison | None
    """The converted graph, as the builder was given it, on ONNX Runtime; null where nothing was converted."""
    engine: Comparison | None
    """The engine itself, on the GPU; null where it was not run."""
    graph_proof: Proof | None = None
    """The verdicts of the converted graph on validation images; null where none were given and none came with the
    model."""
    engine_proof: Proof | None = None
    """The verdicts of the engine itself; null where none were given or it was not run."""
    note: Text
    """What was compared, and why something was not."""


class PlanInfo(Record):
    """The sidecar of a plan."""

    format: Literal["recontrast-edge.plan"] = PLAN_FORMAT
    version: Literal[1] = PLAN_VERSION
    spec: ModelSpec
    """Of the model, with the threshold of this engine once it was calibrated."""
    flavor: Flavor
    """The library that built the plan, and the only one that can run it."""
    library_version: Annotated[str, Field(pattern=r"^\d+(\.\d+){1,3}(\.post\d+)?$")]
    """For example 10.3.0.26 or 10.13.3.9.post1."""
    compute_capability: Annotated[str, Field(pattern=r"^\d{1,2}\.\d$")] | None
    """Of the GPU architecture that the plan is bound to, for example 8.7; null: portable, TensorRT for RTX only."""
    gpu: Text | None
    """Name of the GPU it was built on; null: built without one."""
    precision: Precision
    head: Head
    """``map``: the engine gives map and score. ``features``: it gives the feature pairs, float16 unless ``fp32``, and a
    discriminator's probability."""
    batch: tuple[BatchSize, BatchSize, BatchSize]
    """Smallest, optimal and largest batch."""
    plan_sha256: Sha256
    onnx: Text
    """File name of the source model."""
    onnx_sha256: Sha256
    """``onnxfile.graph_sha256`` of the source model."""
    calibration: Calibration | None
    """Of INT8 plans; null for all others."""
    conversion: Conversion = Conversion()
    """What the graph computes in."""
    parity: Parity
    software: dict[str, str]
    """Versions of what converted and built."""

    @model_validator(mode="after")
    def _consistent(self) -> PlanInfo:
        if list(self.batch) != sorted(self.batch):
            raise ValueError(f"expected smallest <= optimal <= largest batch, got {self.batch}")
        if self.flavor == "tensorrt" and self.compute_capability is None:
            raise ValueError("a tensorrt plan is bound to one compute capability, got none")
        return self

    def dumps(self) -> str:
        """The sidecar as JSON text; the spec is in its envelope."""
        body = {**self.model_dump(mode="json"), "spec": json.loads(self.spec.dumps())}
        return json.dumps(body, indent=2, sort_keys=True) + "\n"

    @classmethod
    def loads(cls, text: str | bytes, *, where: str) -> PlanInfo:
        """Parse and check a sidecar.

        Args:
            text: what ``dumps`` wrote.
            where: name of the file, for messages.

        Raises:
            ModelError: not JSON, not ours, newer version, edited spec, unknown fields or values out of range.
        """
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{where}: not valid JSON ({error}); build the engine again") from None
        if not isinstance(body, dict) or body.get("format") != PLAN_FORMAT:
            found = body.get("format") if isinstance(body, dict) else type(body).__name__
            raise ModelError(f"{where}: expected format {PLAN_FORMAT!r}, got {found!r}; not the sidecar of an engine")
        check_version(body, PLAN_VERSION, where=f"{where}: sidecar")
        spec = ModelSpec.loads(json.dumps(body.get("spec")), where=where)
        try:
            return cls.model_validate_json(json.dumps({**body, "spec": spec.model_dump(mode="json")}))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "file"
            raise ModelError(f"{where}: {field}: {first['msg']}; build the engine again") from None

    def build_command(self, plan: Path, *, changes: dict[str, Any] | None = None) -> str:
        """The command that builds this plan again, for messages; the source model is expected beside the plan.

        Args:
            plan: the file to write.
            changes: options other than those the plan was built with, such as ``{"flavor": "tensorrt"}``.
        """
        options = {
            "out": plan,
            "precision": self.precision,
            "flavor": self.flavor,
            "batch": ",".join(map(str, self.batch)),
            **({"calibration": self.calibration.data} if self.calibration else {}),
            **(changes or {}),
        }
        words = ["recontrast-edge", "build", str(plan.with_name(self.onnx))]
        for name, value in options.items():
            words += [f"--{name}", str(value)]
        return shlex.join(words)


def sidecar_path(plan: Path) -> Path:
    """``model.plan`` -> ``model.plan.json``."""
    return plan.with_name(f"{plan.name}.json")


def read_sidecar(plan: Path) -> PlanInfo:
    """The sidecar of a plan, which itself is not read.

    Raises:
        ModelError: missing, damaged, edited or of a newer version.
    """
    path = sidecar_path(plan)
    return PlanInfo.loads(
        _read(path, "without it the engine is not run; copy both files, or build again"), where=str(path)
    )


def verify_plan(plan: Path) -> tuple[PlanInfo, bytes]:
    """Read a plan and its sidecar, and check that they belong together, before anything is deserialised.

    Returns:
        The sidecar, and the bytes that were checked; these are what to deserialise, not the file once more.

    Raises:
        ModelError: either is missing or damaged, or the plan's SHA-256 is not the sidecar's.
    """
    content = _read(plan, "expected an engine that `recontrast-edge build` wrote")
    info = read_sidecar(plan)
    if hashlib.sha256(content).hexdigest() != info.plan_sha256:
        raise ModelError(
            f"{plan}: damaged, cut off, or not the engine that {sidecar_path(plan).name} describes (SHA-256 differs; "
            f"{len(content)} bytes); copy both files again, or run: {info.build_command(plan)}"
        )
    return info, content


def write_spec(plan: Path, spec: ModelSpec) -> None:
    """Replace the spec in a plan's sidecar, atomically; this is how an engine gets its threshold.

    Raises:
        ModelError: sidecar missing or damaged.
        OutputError: it cannot be written.
    """
    info = read_sidecar(plan).model_copy(update={"spec": spec})
    with atomic_write(sidecar_path(plan)) as file:
        file.write(info.dumps().encode())


def _read(path: Path, advice: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; {advice}") from None
    except IsADirectoryError:
        raise ModelError(f"{path}: is a folder; {advice}") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
