"""What a training leaves for people to look at: its losses, and the report of its evaluation.

write_report(Path("runs/tiles"), evaluation)
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from recontrast_edge import report
from recontrast_edge.artifact import WEIGHTS_FILE
from recontrast_edge.datasets import data_sha256
from recontrast_edge.evaluation import Evaluation
from recontrast_edge.images import atomic_write

LOSS_FILE = "loss.csv"
LOSS_PICTURE = "loss.png"
REPORT_FILE = "report.html"

_COLOUR = "#2b7a78"


def write_losses(out: Path, losses: list[float]) -> None:
    """Write the loss of every iteration as a table, and draw it with its running mean over 20."""
    with atomic_write(out / LOSS_FILE) as file:
        file.write(b"iteration,loss\n")
        file.writelines(f"{iteration},{loss:.8f}\n".encode() for iteration, loss in enumerate(losses, 1))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(np.arange(1, len(losses) + 1), losses, color=_COLOUR, alpha=0.3, linewidth=0.8)
    window = min(20, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(np.arange(window, len(losses) + 1), smooth, color=_COLOUR, label=f"mean of {window}")
    axes.set(xlabel="iteration", ylabel="loss", title="Training loss", yscale="log")
    axes.legend()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    with atomic_write(out / LOSS_PICTURE) as file:
        file.write(buffer.getvalue())


def write_report(out: Path, evaluation: Evaluation, data_name: str | None = None) -> None:
    """Write ``report.html`` about the model as PyTorch runs it.

    Args:
        data_name: of the test set; None for the name of the data the model was trained on.

    Raises:
        InputError: an image cannot be read any more.
        OutputError: the file cannot be written.
    """
    spec = evaluation.spec
    provenance = report.Provenance(
        engine_file=WEIGHTS_FILE,
        engine_name=f"PyTorch {torch.__version__}",
        engine_sha256=spec.weights_sha256,
        data_name=data_name or spec.training.data,
        data_sha256=data_sha256(evaluation.samples),
    )
    report.write_report(out / REPORT_FILE, evaluation, provenance)
