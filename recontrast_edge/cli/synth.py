"""``recontrast-edge synth``: a synthetic data set to try everything with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recontrast_edge.cli import app


@app.command("synth")
def synth_command(
    out: Annotated[Path, typer.Option(help="New or empty folder to write.")],
    product: Annotated[str, typer.Option(help="`brushed-metal`, `woven-fabric` or `mixed`.")] = "brushed-metal",
    train: Annotated[int, typer.Option(min=0, max=100_000, help="Good images in train/good.")] = 200,
    test_good: Annotated[int, typer.Option(min=0, max=100_000, help="Good images in test/good.")] = 50,
    test_defect: Annotated[
        int, typer.Option(min=0, max=100_000, help="Images with a defect, spread over the kinds in test/KIND.")
    ] = 50,
    size: Annotated[str, typer.Option(metavar="WxH", help="Image size in pixels.")] = "256x256",
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other parts.")] = 0,
) -> None:
    """Write a synthetic data set in MVTec layout, with masks."""
    from recontrast_edge.synthetic import write_dataset
    from recontrast_edge.uri import size_option

    write_dataset(
        out,
        product,
        n_train=train,
        n_test_good=test_good,
        n_test_defect=test_defect,
        size_wh=size_option("synth", "--size", size),
        seed=seed,
    )
    typer.echo(f"{out}: {train} training, {test_good} good and {test_defect} defective test images of {product}")
