"""An evaluation as one HTML file for a quality engineer: self-contained, printable, without scripts.

    write_report(Path("report.html"), evaluation, provenance)

Nothing is fetched when it is opened: pictures are data URIs, and a content security policy in the page forbids all
else. Names of files and products come from outside; the template engine escapes every value.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from recontrast_edge import __version__
from recontrast_edge.calibration import evidence_in_words, promise_in_words
from recontrast_edge.evaluation import Evaluation, Metric, Rate, Scored
from recontrast_edge.frame import Frame, Judgement
from recontrast_edge.images import atomic_write, read_image
from recontrast_edge.metrics import roc_curve
from recontrast_edge.preprocess import Image
from recontrast_edge.render import draw_map
from recontrast_edge.spec import ModelSpec, Threshold

PICTURE_SIDE = 320
"""Longer side of a picture, in pixels."""

JPEG_QUALITY = 85

HISTOGRAM_BINS = 40

CHART_WH = (560, 300)
"""Inner size of a chart, without the axes' labels, in the units of its drawing."""

_MASK_BGR = (230, 200, 0)

METRIC_NAMES = {
    "i_auroc": "I-AUROC",
    "i_ap": "I-AP",
    "f1_max": "F1-max",
    "p_auroc": "P-AUROC",
    "p_ap": "P-AP",
    "aupro": "AUPRO 30 %",
    "aupro_5": "AUPRO 5 %",
    "aupro_per_image": "AUPRO per image",
}
"""For people, by the name in files."""


@dataclass(frozen=True)
class Provenance:
    """What was measured, and on what.

    Attributes:
        engine_file: file name of the model.
        engine_name: library, version and device that ran it.
        engine_sha256: ``Engine.sha256``.
        data_name: name of the test set.
        data_sha256: ``datasets.data_sha256`` of its images.
        foreign_threshold: whether the threshold was set for another model file.
    """

    engine_file: str
    engine_name: str
    engine_sha256: str
    data_name: str
    data_sha256: str
    foreign_threshold: bool = False

    def to_json(self) -> dict[str, Any]:
        """``engine`` and ``data`` of the metrics file (``docs/artifacts.md``)."""
        return {
            "engine": {"file": self.engine_file, "name": self.engine_name, "sha256": self.engine_sha256},
            "data": {"name": self.data_name, "sha256": self.data_sha256},
        }


@dataclass(frozen=True)
class _Axis:
    """A linear scale from values to a chart's pixels."""

    low: float
    high: float
    length: float
    rising: Literal["right", "up"] = "right"

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.length * (share if self.rising == "right" else 1 - share), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """(position, label) at round values, some five of them."""
        rough = (self.high - self.low) / 5
        magnitude = 10.0 ** np.floor(np.log10(rough))
        step = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= rough * 0.999)
        values = np.arange(np.ceil(self.low / step - 1e-9), np.floor(self.high / step + 1e-9) + 1) * step
        # Adding 0 makes a negative zero positive.
        return [(self(value), f"{value + 0.0:.6g}") for value in values]


def write_report(path: Path, evaluation: Evaluation, provenance: Provenance) -> None:
    """Write the report, complete or not at all; reads the images of the worst mistakes again.

    Raises:
        InputError: one of those images cannot be read any more.
        OutputError: the file cannot be written.
    """
    html = _template().render(_content(evaluation, provenance))
    with atomic_write(path) as file:
        # File names may hold bytes that are no text.
        file.write(html.encode("utf-8", "replace"))


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = (files("recontrast_edge") / "templates" / "report.html").read_text(encoding="utf-8")
    return environment.from_string(source)


def _content(evaluation: Evaluation, provenance: Provenance) -> dict[str, Any]:
    spec, overall = evaluation.spec, evaluation.overall
    rows = [*evaluation.kinds.items(), ("all defects", overall)]
    return {
        "title": f"{spec.class_name} on {provenance.data_name}",
        "n_good": evaluation.n_good,
        "n_defect": overall.n_defect,
        "key_figures": _key_figures(evaluation),
        "threshold": _threshold_in_words(spec.threshold),
        "has_threshold": spec.threshold is not None,
        "histogram": _histogram(evaluation),
        "roc": _roc(evaluation),
        "chart_wh": CHART_WH,
        "metric_names": METRIC_NAMES,
        "rows": [
            (kind, metrics.n_defect, [(name, _percent(metrics.named()[name])) for name in METRIC_NAMES])
            for kind, metrics in rows
        ],
        "false_rejects": [_example(scored, evaluation) for scored in evaluation.worst_good],
        "misses": [_example(scored, evaluation) for scored in evaluation.worst_defects],
        "notes": list(_notes(evaluation, provenance)),
        "provenance": _provenance(evaluation, provenance),
        "recipe": sorted(spec.training.recipe.items()),
    }


def _key_figures(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """(value, what it is, more about it)."""
    overall, at = evaluation.overall, evaluation.at_threshold
    interval = evaluation.i_auroc_interval
    more = ""
    if interval is not None:
        more = f"; of other parts {100 * interval.low:.1f} to {100 * interval.high:.1f} % (95 % confidence)"
    figures = [
        (_percent(overall.i_auroc), "I-AUROC", f"how often a defect scores higher than a good part{more}"),
        (_percent(overall.aupro), "AUPRO", "how well defects are outlined, up to 30 % false-positive pixels"),
    ]
    if at is not None:
        for rate, name in ((at.false_rejects, "good parts rejected"), (at.misses, "defects passed")):
            if rate is not None:
                figures.append((f"{rate.count} of {rate.of}", name, _share(rate)))
    return figures


def _threshold_in_words(threshold: Threshold | None) -> list[str]:
    if threshold is None:
        return ["This model has no threshold yet, so it rejects nothing; recontrast-edge calibrate sets one."]
    rule = f"A part is rejected where its score is greater than {threshold.value:.6g}."
    promise = promise_in_words(threshold)
    if promise is None:
        return [rule, "The threshold was set by hand: it promises nothing about how many good parts are rejected."]
    return [rule, f"It rests on {evidence_in_words(threshold)}.", *promise]


def _histogram(evaluation: Evaluation) -> dict[str, Any]:
    scores, defect = evaluation.scores.astype(np.float64), evaluation.is_defect
    threshold = evaluation.spec.threshold
    shown = scores if threshold is None else np.append(scores, threshold.value)
    low, high = float(shown.min()), float(shown.max())
    margin = 0.02 * (high - low) or max(abs(low), 1.0) * 0.05
    x = _Axis(low - margin, high + margin, CHART_WH[0])
    edges = np.linspace(x.low, x.high, HISTOGRAM_BINS + 1)
    counts = {"good": np.histogram(scores[~defect], edges)[0], "defect": np.histogram(scores[defect], edges)[0]}
    y = _Axis(0.0, float(max(counts["good"].max(), counts["defect"].max())), CHART_WH[1], "up")
    bars = [
        {
            "name": name,
            "x": x(edges[index]),
            "y": y(count),
            "width": x(edges[index + 1]) - x(edges[index]),
            "height": CHART_WH[1] - y(count),
            "tip": f"{count} {name}, score {edges[index]:.4g} to {edges[index + 1]:.4g}",
        }
        for name, of in counts.items()
        for index, count in enumerate(of.tolist())
        if count
    ]
    return {
        "bars": bars,
        "x_ticks": x.ticks(),
        "y_ticks": [tick for tick in y.ticks() if "." not in tick[1]],
        "threshold": None if threshold is None else (x(threshold.value), f"{threshold.value:.4g}"),
        "legend": [(name, int(of.sum())) for name, of in counts.items()],
    }


def _roc(evaluation: Evaluation) -> dict[str, Any] | None:
    """None where there are no defects, or no good parts."""
    defect = evaluation.is_defect
    if not 0 < np.count_nonzero(defect) < defect.size:
        return None
    x, y = _Axis(0.0, 1.0, CHART_WH[0]), _Axis(0.0, 1.0, CHART_WH[1], "up")
    false_rejects, found, _ = roc_curve(evaluation.scores, defect)
    # Points that fall on one place of the drawing are drawn once.
    points = dict.fromkeys((x(a), y(b)) for a, b in zip(false_rejects.tolist(), found.tolist(), strict=True))
    at = evaluation.at_threshold
    mark = None
    if at is not None and at.false_rejects is not None and at.misses is not None:
        mark = (x(at.false_rejects.count / at.false_rejects.of), y(1 - at.misses.count / at.misses.of))
    return {
        "points": " ".join(f"{a:g},{b:g}" for a, b in points),
        "mark": mark,
        "x_ticks": x.ticks(),
        "y_ticks": y.ticks(),
        "auroc": _percent(evaluation.overall.i_auroc),
    }


def _example(scored: Scored, evaluation: Evaluation) -> dict[str, Any]:
    """One picture pair: the part with its outlines, and its heat map."""
    spec, at = evaluation.spec, evaluation.at_threshold
    image = read_image(scored.sample.path)
    scale = PICTURE_SIDE / max(image.shape[:2])
    size_wh = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    resized = cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    if resized.ndim == 2:
        resized = cv2.cvtColor(resized, cv2.COLOR_GRAY2BGR)
    part: Image = np.asarray(resized, np.uint8)
    heat = part.copy()
    rejected = at is not None and float(scored.score) > at.value
    # Without a threshold the colours are anchored where they would be for the best one in hindsight.
    anchor = at.value if at is not None else evaluation.f1_max_threshold or float(evaluation.scores.max())
    frame = Frame(frame_id=0, source="", image=image, captured_s=0.0)
    verdict: Literal["REJECT", "PASS"] = "REJECT" if rejected else "PASS"
    draw_map(part, heat, Judgement(frame, verdict, float(scored.score), anchor, map=scored.map), spec.input)
    if scored.mask is not None and scored.mask.any():
        _draw_mask(part, scored.mask)
    return {
        "kind": scored.sample.kind,
        "name": scored.sample.path.name,
        "score": f"{scored.score:.5g}",
        "verdict": None if at is None else verdict,
        "size_wh": size_wh,
        "part": _data_uri(part),
        "heat": _data_uri(heat),
    }


def _draw_mask(part: Image, mask: NDArray[np.bool_]) -> None:
    height, width = part.shape[:2]
    # A pixel is marked where any of the source's pixels under it is, so that thin defects do not get lost.
    rows, columns = (np.arange(new) * old // new for new, old in zip((height, width), mask.shape, strict=True))
    marked = np.logical_or.reduceat(np.logical_or.reduceat(mask, rows, axis=0), columns, axis=1)
    outlines, _ = cv2.findContours(marked.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(part, outlines, -1, _MASK_BGR, 2, cv2.LINE_AA)


def _data_uri(image: Image) -> str:
    _, data = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")


def _notes(evaluation: Evaluation, provenance: Provenance) -> Iterator[str]:
    if provenance.foreign_threshold:
        yield "The threshold was set for another export of this model; calibrate again."
    for note in evaluation.notes:
        yield note[0].upper() + note[1:] + "."
    rows = [*evaluation.kinds.values(), evaluation.overall]
    for reason in sorted({metric.reason for row in rows for metric in row.named().values() if metric.reason}):
        yield f"A dash means that {reason}."


def _provenance(evaluation: Evaluation, provenance: Provenance) -> Sequence[tuple[str, str]]:
    spec: ModelSpec = evaluation.spec
    training, threshold = spec.training, spec.threshold
    at_size = {"map": "the anomaly map's size", "source": "the masks' own size"}[evaluation.resolution]
    width, height = spec.input.size_wh
    scoring = spec.scoring
    rule = "maximum" if scoring.rule == "max" else f"mean of the largest {100 * scoring.top_fraction:g} %"
    n_tiles = spec.input.n_tiles
    cut = f" for each of the {n_tiles} tiles of an image" if n_tiles > 1 else ""
    entries = [
        ("Report made", f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, recontrast-edge {__version__}"),
        ("Model file", provenance.engine_file),
        ("Model SHA-256", provenance.engine_sha256),
        ("Run by", provenance.engine_name),
        ("Network", f"{spec.backbone}, input {width}x{height} pixels{cut}, score: {rule} of the map"),
        (
            "Test images",
            f"{provenance.data_name}: {evaluation.n_good} good, {evaluation.overall.n_defect} with defects",
        ),
        ("Test images' SHA-256", provenance.data_sha256),
        ("Pixels compared at", at_size),
        ("Trained on", f"{training.data or '?'}: {training.n_images} good images, {training.iterations} iterations"),
        ("Training images' SHA-256", training.data_sha256 or "not recorded"),
        ("Weights' SHA-256", spec.weights_sha256),
        (
            "Trained with",
            ", ".join(f"{name} {version}" for name, version in training.software.items()) or "not recorded",
        ),
    ]
    if threshold is not None and threshold.max_false_reject_rate is not None:
        entries += [
            ("Threshold from", f"{evidence_in_words(threshold)}, {threshold.method}"),
            ("Those images' SHA-256", threshold.data_sha256 or "not recorded"),
        ]
    return entries


def _percent(metric: Metric) -> str:
    return "-" if metric.value is None else f"{100 * metric.value:.2f} %"


def _share(rate: Rate) -> str:
    return f"{100 * rate.count / rate.of:.2f} %; 95 % interval {100 * rate.low:.2f} to {100 * rate.high:.2f} %"
