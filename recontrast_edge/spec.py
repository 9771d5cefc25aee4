"""The model spec: everything needed to reproduce a verdict, frozen, versioned and checked.

    spec = ModelSpec.loads(Path("model.json").read_text(), where="model.json")

The spec travels as an envelope ``{"spec": {...}, "sha256": "..."}`` in ``model.json`` (beside the weights) and
in the ONNX file's ``metadata_props``. The digest is over the canonical JSON of the spec, so that a spec changed
by hand is noticed. It guards against mistakes, not against an attacker, who could recompute it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from recontrast_edge.errors import ModelError
from recontrast_edge.tile_layout import check_tiles, tile_starts

SPEC_FORMAT: Literal["recontrast-edge.spec"] = "recontrast-edge.spec"
SPEC_VERSION: Literal[2] = 2
"""Version 2 added tiles and parts. Version 1 is still read: what it does not know is absent."""

IMAGE_DIGEST_DIGITS = 16
"""Hex digits of an image's SHA-256 that ``Training.image_digests`` keeps: enough that no two images share them."""

ClassName = Annotated[str, Field(min_length=1, max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ImageDigest = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{IMAGE_DIGEST_DIGITS}}}$")]
Positive = Annotated[int, Field(gt=0, le=16384)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Weight = Annotated[float, Field(ge=0.0, le=1e6, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Roi(_Frozen):
    """A rectangle of the source image, in source pixels; only this part is judged."""

    x: Annotated[int, Field(ge=0)]
    y: Annotated[int, Field(ge=0)]
    width: Positive
    height: Positive


class InputSpec(_Frozen):
    """How a camera image becomes the network's input.

    source -> ROI -> resize (stretch, antialiased bilinear) to ``resize_wh`` -> centre crop to ``size_wh``, or tiles of
    ``size_wh`` -> channel order -> ``(value / 255 - mean) / std``.
    """

    size_wh: tuple[Positive, Positive]
    """Network input (width, height) in pixels; a multiple of the deepest stride."""
    resize_wh: tuple[Positive, Positive]
    """Size (width, height) before the centre crop, or of what is cut into tiles; equal to ``size_wh`` where neither is
    done."""
    resize_rule: Literal["antialiased-bilinear"] = "antialiased-bilinear"
    colour: Literal["rgb", "bgr"] = "rgb"
    """Channel order that the network expects. Mono images are repeated to three channels."""
    mean: tuple[Finite, Finite, Finite]
    """Per channel in ``colour`` order, on the 0..1 scale."""
    std: tuple[Finite, Finite, Finite]
    roi: Roi | None = None
    tile_overlap: Annotated[int, Field(ge=0)] | None = None
    """All of ``resize_wh`` is judged, in tiles of ``size_wh`` that share at least this many pixels with their
    neighbours; None: the centre alone is."""

    @model_validator(mode="after")
    def _consistent(self) -> InputSpec:
        if any(s <= 0 for s in self.std):
            raise ValueError(f"std must be positive, got {self.std}")
        if self.resize_wh[0] < self.size_wh[0] or self.resize_wh[1] < self.size_wh[1]:
            raise ValueError(f"resize_wh {self.resize_wh} is smaller than the crop size_wh {self.size_wh}")
        if self.tile_overlap is not None:
            check_tiles(self.resize_wh, self.size_wh, self.tile_overlap)
        return self

    @property
    def is_tiled(self) -> bool:
        """Whether an image is judged as several tiles."""
        return self.tile_overlap is not None and self.resize_wh != self.size_wh

    @property
    def map_wh(self) -> tuple[int, int]:
        """Size (width, height) of an image's anomaly map."""
        return self.size_wh if self.tile_overlap is None else self.resize_wh

    @property
    def tile_corners(self) -> tuple[tuple[int, int], ...]:
        """(x, y) of the first pixel of each tile within ``resize_wh``, row by row; needs ``tile_overlap``."""
        assert self.tile_overlap is not None
        columns, rows = (
            tile_starts(length, size, self.tile_overlap)
            for length, size in zip(self.resize_wh, self.size_wh, strict=True)
        )
        return tuple((x, y) for y in rows for x in columns)

    @property
    def n_tiles(self) -> int:
        """Inputs of the network that an image becomes."""
        return 1 if self.tile_overlap is None else len(self.tile_corners)

    @property
    def of_tile(self) -> InputSpec:
        """How a tile becomes the network's input; of an input without tiles, how an image does."""
        if not self.is_tiled:
            return self
        return self.model_copy(update={"resize_wh": self.size_wh, "roi": None, "tile_overlap": None})


class Level(_Frozen):
    """One of the feature levels that are compared, finest first."""

    stride: Positive
    channels: Positive


class Scoring(_Frozen):
    """From feature distances to map and score."""

    blur_sigma: Annotated[float, Field(ge=0.0, le=64.0)] = 4.0
    """Gaussian sigma in input pixels; radius ``int(4 * sigma + 0.5)``, reflected borders; 0 is no blur."""
    rule: Literal["max", "top"] = "max"
    """Image score: maximum of the map, or mean of its largest ``top_fraction``."""
    top_fraction: Fraction = 0.01
    level_weights: Annotated[tuple[Weight, ...], Field(min_length=1, max_length=8)] | None = None
    """Factor of each level's distances in the map, finest first; None for 1 each, as in the paper."""
    discriminator_weight: Weight | None = None
    """Factor of the discriminator's probability in the map; None for a model without a discriminator."""


class PartNames(_Frozen):
    """How the file names of images tell which part they show."""

    pattern: str
    """Regular expression whose first group names the part."""
    gap: Annotated[int, Field(ge=0)] | None = None
    """The groups are numbers, and those that follow each other by at most this much are one part; None: equal groups
    are."""


class Threshold(_Frozen):
    """Where REJECT begins (``score > value``), and what it promises."""

    value: Finite
    max_false_reject_rate: Fraction | None = None
    """Promised upper bound of the share of good parts rejected; None for a threshold set by hand."""
    confidence: Fraction | None = None
    """Probability, over the draw of the calibration images, that the promise holds."""
    n_good: Annotated[int, Field(ge=0)] = 0
    """Good parts the threshold was derived from; images, where each shows another part."""
    n_images: Annotated[int, Field(ge=0)] | None = None
    """Images of these parts; None where each shows another one."""
    parts: PartNames | None = None
    """What tells the images of a part, where the data itself does not."""
    data: str = ""
    """Name of the folder or list the images came from (no absolute path)."""
    data_sha256: Sha256 | None = None
    """Digest over the images' digests, in name order."""
    engine_sha256: Sha256 | None = None
    """``Engine.sha256`` of the engine that scored them; a threshold of another engine is refused."""
    method: Literal["order-statistic", "manual"] = "order-statistic"


class Training(_Frozen):
    """Where the weights come from."""

    recipe: dict[str, Any] = Field(default_factory=dict)
    """Every resolved training option."""
    data: str = ""
    n_images: Annotated[int, Field(ge=0)] = 0
    data_sha256: Sha256 | None = None
    image_digests: tuple[ImageDigest, ...] = ()
    """The beginning of each training image's SHA-256: a threshold must not rest on these images."""
    good_scores: Annotated[tuple[Finite, ...], Field(max_length=1000)] = ()
    """Scores of some training images by the trained model, to compare those of calibration images with."""
    iterations: Annotated[int, Field(ge=0)] = 0
    software: dict[str, str] = Field(default_factory=dict)


class ModelSpec(_Frozen):
    """The spec of one trained model."""

    format: Literal["recontrast-edge.spec"] = SPEC_FORMAT
    version: Literal[2] = SPEC_VERSION
    class_name: ClassName
    backbone: Annotated[str, Field(min_length=1, max_length=100)]
    input: InputSpec
    levels: Annotated[tuple[Level, ...], Field(min_length=1, max_length=8)]
    scoring: Scoring = Scoring()
    threshold: Threshold | None = None
    weights_sha256: Sha256
    """Digest of the ``model.safetensors`` this model was exported from."""
    training: Training = Training()

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        strides = [level.stride for level in self.levels]
        if strides != sorted(set(strides)):
            raise ValueError(f"level strides must rise, got {strides}")
        weights = self.scoring.level_weights
        if weights is not None and len(weights) != len(self.levels):
            raise ValueError(f"expected {len(self.levels)} level_weights, one a level, got {len(weights)}")
        if weights is not None and not any(weights) and self.scoring.discriminator_weight is None:
            raise ValueError("expected a level_weight above 0, or a discriminator: else nothing is in the map")
        width, height = self.input.size_wh
        # The bottleneck halves the deepest level once more.
        deepest = 2 * strides[-1]
        if width % deepest or height % deepest:
            raise ValueError(f"input {width}x{height} is not a multiple of {deepest}, twice the deepest stride")
        return self

    def level_wh(self, level: int) -> tuple[int, int]:
        """Feature width and height of a level."""
        stride = self.levels[level].stride
        return self.input.size_wh[0] // stride, self.input.size_wh[1] // stride

    def with_threshold(self, threshold: Threshold | None) -> ModelSpec:
        return self.model_copy(update={"threshold": threshold})

    def dumps(self) -> str:
        """The spec in its envelope, as JSON text."""
        body = self.model_dump(mode="json")
        return json.dumps({"spec": body, "sha256": _digest(body)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def loads(cls, text: str | bytes, *, where: str) -> ModelSpec:
        """Parse and check an envelope.

        Args:
            text: what ``dumps`` wrote.
            where: name of the file, for messages.

        Raises:
            ModelError: not JSON, no envelope, newer version, edited, or values out of range.
        """
        try:
            envelope = json.loads(text)
        except (ValueError, UnicodeDecodeError, RecursionError) as error:
            raise ModelError(f"{where}: the spec is not valid JSON ({error}); export or train again") from None
        body = envelope.get("spec") if isinstance(envelope, dict) and set(envelope) == {"spec", "sha256"} else None
        if not isinstance(body, dict):
            raise ModelError(f'{where}: expected {{"spec": {{...}}, "sha256": "..."}}; not a recontrast-edge spec')
        if body.get("format") != SPEC_FORMAT:
            raise ModelError(f"{where}: expected spec format {SPEC_FORMAT!r}, got {body.get('format')!r}")
        check_version(body, SPEC_VERSION, where=f"{where}: spec")
        if envelope["sha256"] != _digest(body):
            raise ModelError(
                f"{where}: the spec was changed after it was written (its sha256 does not match). Change a threshold "
                "with `recontrast-edge calibrate`, anything else by training or exporting again"
            )
        try:
            # JSON mode lets arrays stand for tuples; strictness of scalars stays.
            return cls.model_validate_json(json.dumps({**body, "version": SPEC_VERSION}))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "spec"
            raise ModelError(f"{where}: spec field {field}: {first['msg']}; export or train the model again") from None


def check_version(body: dict[str, Any], newest: int, *, where: str) -> None:
    """Refuse a document whose ``version`` is no positive whole number, or greater than ``newest``.

    Raises:
        ModelError: with ``where`` naming the document.
    """
    version = body.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ModelError(f"{where} version {version!r} is not a positive whole number; make the file again")
    if version > newest:
        raise ModelError(
            f"{where} version {version} is newer than this software reads ({newest}); upgrade recontrast-edge"
        )


def _digest(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
