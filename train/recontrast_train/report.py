"""Pictures of a run: loss curve, score histogram and ROC, and the worst misses and false alarms with their maps.

write_report(Path("runs/tiles"), evaluation)
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recontrast_edge.evaluation import Evaluation
from recontrast_edge.images import atomic_write, read_image
from recontrast_edge.metrics import roc_curve
from recontrast_edge.preprocess import Geometry

LOSS_PICTURE = "loss.png"
REPORT_PICTURE = "report.png"
WORST_PICTURE = "worst.png"

_GOOD_COLOUR = "#2b7a78"
_DEFECT_COLOUR = "#c8553d"
_WORST = 6


def write_loss_curve(out: Path, losses: list[float]) -> None:
    """Draw the loss of every iteration, and its running mean over 20."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(np.arange(1, len(losses) + 1), losses, color=_GOOD_COLOUR, alpha=0.3, linewidth=0.8)
    window = min(20, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(np.arange(window, len(losses) + 1), smooth, color=_GOOD_COLOUR, label=f"mean of {window}")
    axes.set(xlabel="iteration", ylabel="loss", title="Training loss", yscale="log")
    axes.legend()
    _save(figure, out / LOSS_PICTURE)


def write_report(out: Path, evaluation: Evaluation) -> None:
    """Draw ``report.png`` (score histogram, ROC) and ``worst.png`` (worst misses and false alarms with maps)."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _histogram(left, evaluation)
    _roc(right, evaluation)
    _save(figure, out / REPORT_PICTURE)
    _save(_worst(evaluation), out / WORST_PICTURE)


def _histogram(axes: Axes, evaluation: Evaluation) -> None:
    good = np.array([sample.is_good for sample in evaluation.samples])
    edges = np.histogram_bin_edges(evaluation.scores, bins=40)
    for chosen, label, colour in ((good, "good", _GOOD_COLOUR), (~good, "defect", _DEFECT_COLOUR)):
        axes.hist(
            evaluation.scores[chosen], edges.tolist(), alpha=0.65, color=colour, label=f"{label} ({int(chosen.sum())})"
        )
    threshold = evaluation.spec.threshold
    if threshold is not None:
        axes.axvline(threshold.value, color="black", linestyle="--", label=f"threshold {threshold.value:.4g}")
    axes.set(xlabel="anomaly score", ylabel="images", title=f"{evaluation.spec.class_name}: scores")
    axes.legend()


def _roc(axes: Axes, evaluation: Evaluation) -> None:
    defect = np.array([not sample.is_good for sample in evaluation.samples])
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    if 0 < defect.sum() < defect.size:
        fpr, tpr, _ = roc_curve(evaluation.scores, defect)
        value = evaluation.overall.i_auroc.value
        axes.plot(fpr, tpr, color=_DEFECT_COLOUR, label=f"all defects, I-AUROC {value:.4f}")
        for kind, metrics in evaluation.kinds.items():
            rows = np.array([sample.is_good or sample.kind == kind for sample in evaluation.samples])
            fpr, tpr, _ = roc_curve(evaluation.scores[rows], defect[rows])
            axes.plot(fpr, tpr, linewidth=0.8, alpha=0.8, label=f"{kind} {metrics.i_auroc.value:.4f}")
        axes.legend(fontsize=8)
    axes.set(xlabel="false reject rate", ylabel="detection rate", title="ROC of the image score", aspect="equal")


def _worst(evaluation: Evaluation) -> Figure:
    """The lowest-scoring defects above, the highest-scoring good parts below; maps on one common scale."""
    good = np.array([sample.is_good for sample in evaluation.samples])
    order = np.argsort(evaluation.scores)
    misses = [index for index in order if not good[index]][:_WORST]
    alarms = [index for index in order[::-1] if good[index]][:_WORST]
    figure = Figure(figsize=(2.2 * _WORST, 10.5), layout="constrained")
    high = float(np.quantile(evaluation.scores, 0.95))
    low = float(np.quantile(evaluation.maps, 0.02))
    titles = ("Lowest-scoring defects (contour: ground truth)", "Highest-scoring good parts")
    parts = figure.subfigures(2, 1, squeeze=False)[:, 0]
    for part, chosen, title in zip(parts, (misses, alarms), titles, strict=True):
        part.suptitle(title, weight="bold")
        axes = part.subplots(2, _WORST)
        for column in range(_WORST):
            picture, heat = axes[0, column], axes[1, column]
            picture.set_axis_off()
            heat.set_axis_off()
            if column < len(chosen):
                _draw(picture, heat, evaluation, int(chosen[column]), low, high)
    return figure


def _draw(picture: Axes, heat: Axes, evaluation: Evaluation, index: int, low: float, high: float) -> None:
    sample = evaluation.samples[index]
    image = read_image(sample.path)
    geometry = Geometry.of(evaluation.spec.input, image)
    # The judged part, with the map's own extent laid over it in source pixels.
    part: Any = image[geometry.y : geometry.y + geometry.height, geometry.x : geometry.x + geometry.width]
    part = part if part.ndim == 2 else part[:, :, ::-1]
    width, height = evaluation.spec.input.size_wh
    left, top, across, down = geometry.to_source(0, 0, width, height)
    extent = (left - geometry.x, left - geometry.x + across, top - geometry.y + down, top - geometry.y)
    picture.imshow(part, cmap="gray", vmin=0, vmax=255)
    if evaluation.masks[index].any():
        # Contours do not flip with origin="upper" extents, so their coordinates are given.
        xs = extent[0] + (np.arange(width) + 0.5) * across / width
        ys = extent[3] + (np.arange(height) + 0.5) * down / height
        picture.contour(xs, ys, evaluation.masks[index], levels=[0.5], colors=_DEFECT_COLOUR, linewidths=1)
    picture.set_title(f"{sample.kind}\n{sample.path.name}\nscore {evaluation.scores[index]:.4g}", fontsize=7)
    heat.imshow(part, cmap="gray", vmin=0, vmax=255)
    heat.imshow(evaluation.maps[index], cmap="inferno", vmin=low, vmax=high, alpha=0.6, extent=extent)


def _save(figure: Figure, path: Path) -> None:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
