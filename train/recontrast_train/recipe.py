"""Recipes: every training option, with the paper's values as defaults.

    recipe = load_recipe("mvtec", overrides={"iterations": 500}).for_class("screw")

A recipe is a TOML file, packaged ones by name (``recipes/NAME.toml``), one's own by path. Unknown keys are refused. A
table ``[per_class.NAME]`` holds what differs for one class of a data set, ``[paper]`` what was published.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from recontrast_edge.errors import UsageError
from recontrast_edge.spec import Fraction, Roi
from recontrast_edge.tile_layout import check_tiles
from recontrast_train.backbones import BACKBONES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Rate = Annotated[float, Field(gt=0.0, le=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(gt=0, le=10_000_000)]
Weight = Annotated[float, Field(ge=0.0, le=1e6)]
Side = Annotated[int, Field(ge=32, le=8192)]
Model = TypeVar("Model", bound=BaseModel)


class Recipe(BaseModel):
    """Training options. Defaults: the paper's setting for MVTec AD."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    backbone: str = "wide_resnet50_2"
    size_wh: tuple[Side, Side] = (256, 256)
    """Network input in pixels, multiples of 32."""
    resize_wh: tuple[Side, Side] | None = None
    """Size before the centre crop to ``size_wh``, or of what is cut into tiles; None for neither."""
    tile_overlap: Annotated[int, Field(ge=0)] | None = None
    """Cut ``resize_wh`` into tiles of ``size_wh`` that share at least this many pixels with their neighbours, and learn
    and judge these; None for the centre crop."""
    roi: Roi | None = None
    iterations: Count = 2000
    batch: Annotated[int, Field(ge=2, le=4096)] = 16
    lr_decoder: Rate = 2e-3
    """Learning rate of bottleneck and decoder."""
    lr_encoder: Rate = 1e-5
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-5
    eps: Rate = 1e-8
    amsgrad: bool = False
    lr_drop_at: Fraction | None = None
    """Share of the iterations after which both learning rates are multiplied by ``lr_drop_factor``; None for never."""
    lr_drop_factor: Rate = 0.2
    encoder_bn: Literal["train", "eval"] = "train"
    alpha_start: float = -3.0
    alpha_end: float = 1.0
    alpha_ramp: Rate = 0.1
    """Share of the iterations over which the mining strength rises."""
    blur_sigma: Annotated[float, Field(ge=0.0, le=64.0)] = 4.0
    score_rule: Literal["max", "top"] = "max"
    top_fraction: Fraction = 0.01
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 111
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Keep an average of the weights in which each iteration's counts this much less than the next one's: 0.999
    averages over about 1000 iterations, 0 keeps the last one's."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of forward and backward pass; loss and weights stay float32. ``fp16`` needs a GPU."""
    channels_last: bool = True
    mirror_x: bool = False
    """Variations of the good images, for products that vary so: mirrored left to right, half of the time."""
    mirror_y: bool = False
    """Mirrored top to bottom."""
    shift: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Moved by up to this share of the image along each axis; what comes in is reflected."""
    stretch: Annotated[float, Field(ge=0.0, le=0.7)] = 0.0
    """Stretched along each axis by a factor of up to ``exp(stretch)``, or shrunk by as much."""
    exposure_stops: Annotated[float, Field(ge=0.0, le=4.0)] = 0.0
    """Brighter or darker by a factor of up to ``2 ** exposure_stops``."""
    pseudo_defects: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of a batch that is seen with pseudo-defects, while the good image's features are to be reconstructed."""
    discriminator: bool = False
    """Also learn to see pseudo-defects in the agreement of features and reconstruction; needs ``pseudo_defects``."""
    lr_discriminator: Rate = 1e-3
    level_weights: tuple[Weight, Weight, Weight] = (1.0, 1.0, 1.0)
    """What each level's distances count in the map, finest first."""
    standardise_levels: bool = False
    """Divide each level's distances by their standard deviation over the good training images first."""
    discriminator_weight: Weight = 12.0
    """What the discriminator's probability counts in the map; 1 is one standard deviation of a standardised level."""
    unified: bool = False
    """One model for all categories of a data set, instead of one model each."""
    class_balanced: bool = False
    """With ``unified``: each category is drawn equally often, however many images it has."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.backbone not in BACKBONES:
            raise ValueError(f"unknown backbone {self.backbone!r}; there are {', '.join(BACKBONES)}")
        if self.size_wh[0] % 32 or self.size_wh[1] % 32:
            raise ValueError(f"size_wh must be multiples of 32, got {self.size_wh}")
        resize = self.resize_wh
        if resize is not None and (resize[0] < self.size_wh[0] or resize[1] < self.size_wh[1]):
            raise ValueError(f"resize_wh {resize} is smaller than size_wh {self.size_wh}")
        if self.tile_overlap is not None:
            if resize is None:
                raise ValueError(
                    "tile_overlap cuts resize_wh into tiles of size_wh, so it needs resize_wh: the size of the images "
                    "(or of the ROI) keeps their scale"
                )
            check_tiles(resize, self.size_wh, self.tile_overlap)
        if self.discriminator and not self.pseudo_defects:
            raise ValueError("a discriminator learns from pseudo_defects; give a share of them, such as 0.5")
        if self.pseudo_defects and not round(self.pseudo_defects * self.batch):
            raise ValueError(f"pseudo_defects {self.pseudo_defects} is no image of a batch of {self.batch}")
        if not any((*self.level_weights, self.discriminator and self.discriminator_weight)):
            raise ValueError("level_weights are all 0, so the map would be empty")
        if self.class_balanced and not self.unified:
            raise ValueError("class_balanced is for unified training, where a batch mixes categories")
        return self


class Published(BaseModel):
    """What the authors report for a recipe: means over the classes, 0 to 1, of the last iteration."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source: Annotated[str, Field(min_length=1)]
    """The table or file that holds the figures."""
    i_auroc: Share | None = None
    f1_max: Share | None = None
    p_auroc: Share | None = None
    aupro_per_image: Share | None = None
    """Their AUPRO: the mean of one curve an image, with 200 thresholds; ``docs/metrics.md``."""

    def metrics(self) -> dict[str, float]:
        """The figures by their metric's name."""
        return self.model_dump(exclude={"source"}, exclude_none=True)


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as read: options for all classes, exceptions for some, and what was published.

    Attributes:
        name: as it was asked for.
        common: the options, those given on the command line included.
        exceptions: for each class that has any, its options; those on the command line win over them.
        published: None where nothing was.
    """

    name: str
    common: Recipe
    exceptions: dict[str, Recipe]
    published: Published | None

    def for_class(self, class_name: str) -> Recipe:
        """The options to train a class with; a unified training has no exceptions."""
        return self.common if self.common.unified else self.exceptions.get(class_name, self.common)


def packaged_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = files("recontrast_train") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str, overrides: dict[str, Any]) -> RecipeFile:
    """Read a recipe and lay options over it.

    Args:
        name: a packaged recipe's name, or a path that ends in ``.toml``.
        overrides: values that win over the file and its exceptions; None values are left out.

    Raises:
        UsageError: no such recipe, bad TOML, unknown key or value out of range.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"{path}: no such recipe file")
        text = path.read_bytes().decode(errors="replace")
    elif name in packaged_recipes():
        text = (files("recontrast_train") / "recipes" / f"{name}.toml").read_text()
    else:
        raise UsageError(
            f"unknown recipe {name!r}; there are {', '.join(packaged_recipes())}, or a path to a .toml file"
        )
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {name}: not valid TOML ({error})") from None
    per_class, paper = values.pop("per_class", {}), values.pop("paper", None)
    if not isinstance(per_class, dict) or not all(isinstance(options, dict) for options in per_class.values()):
        raise UsageError(f"recipe {name}: per_class: expected tables [per_class.NAME]")
    given = {key: value for key, value in overrides.items() if value is not None}
    return RecipeFile(
        name,
        _validated(Recipe, {**values, **given}, name),
        {
            class_name: _validated(Recipe, {**values, **options, **given}, f"{name}: per_class.{class_name}")
            for class_name, options in per_class.items()
        },
        None if paper is None else _validated(Published, paper, f"{name}: paper"),
    )


def _validated(model: type[Model], values: Any, where: str) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"recipe {where}: {field + ': ' * bool(field)}{first['msg']} (known keys: {', '.join(model.model_fields)})"
        ) from None


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` options as recipe values; a value is TOML, and a bare word a string.

    Raises:
        UsageError: no equals sign or no key.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {setting!r}: expected KEY=VALUE")
        try:
            values[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[key.strip()] = value
    return values
