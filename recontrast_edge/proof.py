"""What is on record about a model in reduced precision: how it was made, and the proof that its verdicts held.

    record = read_quantisation(Path("model.int8.onnx"))  # None for a model that was not quantised

The record travels in the ONNX file's metadata and, once an engine was built, in its sidecar.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recontrast_edge.errors import ModelError
from recontrast_edge.onnxfile import graph_sha256, read_metadata
from recontrast_edge.spec import Sha256, check_version

QUANTISATION_KEY = "recontrast_edge.quantisation"
"""Of the record in an ONNX file's ``metadata_props``."""

QUANTISATION_FORMAT: Literal["recontrast-edge.quantisation"] = "recontrast-edge.quantisation"
QUANTISATION_VERSION: Literal[1] = 1

MAX_FLIPPED = 100
"""Flipped images that a proof lists; all are counted."""

Share = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """Base of what is on record: frozen, strict, nothing unknown, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Calibration(Record):
    """The good images that the INT8 scales come from."""

    data: Text
    """Name of the folder or list (no absolute path)."""
    n_images: Annotated[int, Field(ge=1)]
    data_sha256: Sha256
    """Digest over the images' digests, in the order they were used."""


class Conversion(Record):
    """What a graph in reduced precision computes in."""

    int8_macs: Fraction = 0.0
    """Share of the convolutions' multiply-accumulates that are INT8."""
    method: Literal["minmax", "percentile", "entropy", "mse"] | None = None
    """How INT8 ranges were chosen; null where nothing is INT8."""
    fp16_blocks: tuple[Text, ...] = ()
    """Blocks that could be INT8 and are not; empty where nothing is INT8."""
    fp32_nodes: tuple[Text, ...] = ()
    """Nodes that stay float32 because float16 might not hold their values."""
    largest_activation: Share | None = None
    """Largest magnitude inside of the network over ``n_images`` images, in float32; null where it was not measured."""
    largest_activation_of: Text | None = None
    """The value that it belongs to."""
    n_images: Count = 0


class Flip(Record):
    """An image whose verdict changed."""

    image: Text
    """``KIND/NAME``."""
    reference_score: float
    candidate_score: float


class Rate(Record):
    """A counted share with its exact (Clopper-Pearson) 95 % confidence interval."""

    count: Count
    of: Annotated[int, Field(ge=1)]
    low: Fraction
    high: Fraction


class Proof(Record):
    """How far a candidate is from its FP32 reference, on validation images; it kept the budget."""

    candidate: Text
    """What was run, and on what."""
    images: Text
    """Which images, for people."""
    n_good: Count
    n_defect: Count
    pasted_defects: bool
    """The defects were pasted into good images, because the data has none."""
    map_correlation: float
    """Pearson correlation of the two maps, mean over the images."""
    map_correlation_lowest: float
    """Of the worst image."""
    map_error: Share
    """Largest error of any pixel, as a share of the range of its image's reference map."""
    map_error_p999: Share
    """The same, but for the worst 0.1 % of all pixels."""
    score_shift: float
    """Mean of candidate - reference over the good images, in standard deviations of their reference scores."""
    score_error: Share
    """Largest absolute difference of two scores."""
    rank_correlation: float
    """Spearman's, of the scores of all images."""
    delta_i_auroc: float | None
    """Reference - candidate: positive is a loss. Null where undefined."""
    delta_aupro: float | None
    reference_threshold: float
    candidate_threshold: float
    """Both the same order statistic of the scores of the same good images."""
    verdict_flips: Rate
    """Images that one of the two rejects and the other one passes, each at its own threshold."""
    clear_flips: Count
    """Those whose reference score is more than 0.5 % of the threshold away from it."""
    flipped: Annotated[tuple[Flip, ...], Field(max_length=MAX_FLIPPED)]
    budget: Text
    """What was allowed."""


class Quantisation(Record):
    """How ``recontrast-edge quantize`` made an ONNX file."""

    format: Literal["recontrast-edge.quantisation"] = QUANTISATION_FORMAT
    version: Literal[1] = QUANTISATION_VERSION
    precision: Literal["fp16", "int8"]
    """``fp16`` where no INT8 graph kept the budget."""
    graph_sha256: Sha256
    """``onnxfile.graph_sha256`` of the graph that was validated, which is the one in the file."""
    source: Text
    """File name of the FP32 model."""
    source_sha256: Sha256
    """``onnxfile.graph_sha256`` of the FP32 model."""
    calibration: Calibration | None
    """Null with ``fp16``, and where fine-tuning found the scales."""
    conversion: Conversion
    proof: Proof

    def dumps(self) -> str:
        """The record as JSON text."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True)


def read_quantisation(path: Path) -> Quantisation | None:
    """The record of an ONNX file, checked against its graph; None for a file without one.

    Raises:
        ModelError: the file is missing or damaged, the record is damaged or from a newer version, or the graph is not
            the one that was validated.
    """
    text = read_metadata(path).get(QUANTISATION_KEY)
    if text is None:
        return None
    where = f"{path}: the record of its quantisation"
    try:
        body = json.loads(text)
        if isinstance(body, dict):
            check_version(body, QUANTISATION_VERSION, where=where)
        record = Quantisation.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "record"
        raise ModelError(f"{where}: {field}: {first['msg']}; run `recontrast-edge quantize` again") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{where} is damaged; run `recontrast-edge quantize` again") from None
    if record.graph_sha256 != graph_sha256(path):
        raise ModelError(
            f"{path}: its graph is not the one that was validated (SHA-256 differs); run `recontrast-edge quantize` "
            "again"
        )
    return record
