"""Images larger than the network's input: cut into overlapping tiles, judged tile by tile, merged into one map.

    inference = infer_tiles(infer, images, spec)  # where spec.input.is_tiled; infer judges by spec.input.of_tile

Engines, the PyTorch model and training share this, so that a tile is the same pixels everywhere. Where tiles overlap,
their maps are cross-faded: each counts in proportion to the distance to its border. The merged map therefore has no
seams, is never above the highest of the maps that it is made of, and follows the tile that sees a place in its middle.
A defect on the border of one tile lies inside another one, as far as the overlap is larger than the defect. The image
score is taken from the merged map, by the model's own rule.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from recontrast_edge.engines import Inference
from recontrast_edge.preprocess import Geometry, Image, check_image
from recontrast_edge.resample import resizer
from recontrast_edge.scoring import image_scores
from recontrast_edge.spec import InputSpec, ModelSpec
from recontrast_edge.tile_layout import blend_weights


def canvas(image: Image, spec: InputSpec) -> Image:
    """What is cut into tiles: the judged part of an image, at the scale the tiles have.

    Resized values are rounded to whole grey levels, as if the camera had delivered them, so that every engine gets the
    same bytes. A part that has the size already is not touched.

    Args:
        image: (H, W) mono or (H, W, 3) BGR, uint8.
        spec: the model's input rule.

    Returns:
        (height, width) or (height, width, 3) uint8 of ``spec.resize_wh``; a view of the image where possible.

    Raises:
        InputError: wrong dtype or shape, or an ROI outside the image.
    """
    check_image(image)
    geometry = Geometry.of(spec, image)
    part = image[geometry.y : geometry.y + geometry.height, geometry.x : geometry.x + geometry.width]
    if (geometry.width, geometry.height) == spec.resize_wh:
        return part
    resize = resizer((geometry.width, geometry.height), spec.resize_wh)
    planes = [part] if part.ndim == 2 else [part[:, :, channel] for channel in range(3)]
    rounded: list[Image] = [np.rint(resize(plane)).clip(0, 255).astype(np.uint8) for plane in planes]
    return rounded[0] if part.ndim == 2 else np.stack(rounded, axis=2)


def tiles(image: Image, spec: InputSpec) -> list[Image]:
    """The tiles of a ``canvas``, row by row; views, each of ``spec.size_wh``."""
    width, height = spec.size_wh
    return [image[y : y + height, x : x + width] for x, y in spec.tile_corners]


def infer_tiles(
    infer: Callable[[Sequence[Image]], Inference], images: Sequence[Image], spec: ModelSpec, *, batch: int | None = None
) -> Inference:
    """Judge images tile by tile.

    Args:
        infer: judges tiles, by ``spec.input.of_tile``.
        images: uint8, (H, W) mono or (H, W, 3) BGR; sizes may differ.
        spec: with a tiled input.
        batch: tiles that ``infer`` gets at once; None for all of an image.

    Returns:
        Maps of ``spec.input.map_wh`` and scores. Stages: those of ``infer``, ``tile`` (resizing) and ``merge``.

    Raises:
        InputError: an image of the wrong form, or an ROI outside of it.
    """
    (width, height), (tile_width, tile_height) = spec.input.map_wh, spec.input.size_wh
    overlap = spec.input.tile_overlap or 0
    columns = blend_weights(width, tile_width, overlap)
    rows = blend_weights(height, tile_height, overlap)
    weights = [(row[:, None], column) for row in rows for column in columns]
    maps = np.zeros((len(images), height, width), np.float32)
    scores = np.empty(len(images), np.float32)
    stage_ms: dict[str, float] = {}

    def spent(stage: str, since_s: float) -> None:
        stage_ms[stage] = stage_ms.get(stage, 0.0) + (time.perf_counter() - since_s) * 1e3

    for index, image in enumerate(images):
        started_s = time.perf_counter()
        cut = tiles(canvas(image, spec.input), spec.input)
        spent("tile", started_s)
        for first in range(0, len(cut), batch or len(cut)):
            found = infer(cut[first : first + (batch or len(cut))])
            for stage, duration_ms in found.stage_ms.items():
                stage_ms[stage] = stage_ms.get(stage, 0.0) + duration_ms
            started_s = time.perf_counter()
            for tile, tile_map in enumerate(found.maps, first):
                x, y = spec.input.tile_corners[tile]
                row, column = weights[tile]
                maps[index, y : y + tile_height, x : x + tile_width] += row * column * tile_map
            spent("merge", started_s)
        started_s = time.perf_counter()
        scores[index] = image_scores(maps[index : index + 1], spec.scoring)[0]
        spent("merge", started_s)
    return Inference(maps, scores, stage_ms)
