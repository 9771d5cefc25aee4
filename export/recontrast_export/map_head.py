"""The anomaly map and score of a ``map`` graph, in standard ONNX operators: ``scoring`` written as nodes.

    add_map_head(graph, pairs, spec)

Upsampling and blur are the folded matrices of ``resample.fold_matrix``, so the graph needs no Resize and no padding.
"""

from __future__ import annotations

import numpy as np

from recontrast_edge.resample import fold_matrix
from recontrast_edge.scoring import EPS, MAP_NAME, SCORE_NAME, VIEWS, top_count
from recontrast_edge.spec import ModelSpec, Scoring
from recontrast_export.graph import Graph, Pairs


def add_map_head(graph: Graph, pairs: Pairs, spec: ModelSpec) -> None:
    """Add distances, folding and score, and declare ``anomaly_map`` (N, 1, H, W) and ``anomaly_score`` (N,) outputs.

    Args:
        graph: to add to.
        pairs: names of the feature pairs.
        spec: input size, levels, blur and score rule.
    """
    width, height = spec.input.size_wh
    rows, wide = [], []
    for level in range(len(spec.levels)):
        level_width, level_height = spec.level_wh(level)
        distance = _level_distance(graph, pairs, level)
        columns = fold_matrix(level_width, width, spec.scoring.blur_sigma).T.astype(np.float32)
        columns = graph.constant(f"map/columns{level}", columns)
        wide.append(graph.node("MatMul", [distance, columns], f"map/wide{level}"))
        rows.append(fold_matrix(level_height, height, spec.scoring.blur_sigma))
    # sum_l R_l W_l is one product: [R_0 R_1 R_2] with the W_l on top of each other.
    stacked = graph.node("Concat", wide, "map/wide", axis=2)
    folding = graph.constant("map/rows", np.concatenate(rows, axis=1).astype(np.float32))
    anomaly_map = graph.node("MatMul", [folding, stacked], MAP_NAME)
    graph.output(anomaly_map, ["N", 1, height, width])
    graph.output(_score(graph, anomaly_map, (width, height), spec.scoring), ["N"])


def _level_distance(graph: Graph, pairs: Pairs, level: int) -> str:
    """``1 - cos`` of one level, the views added: (N, 1, h, w)."""
    # Both views as one batch. The sums over channels are the map's main cost on a CPU, and ONNX Runtime does them five
    # times faster with a batch of two than of one (and with Mul + ReduceSum than with ReduceSumSquare, ReduceL2 or a
    # convolution with ones). The last view first: that is the batch which the network itself makes of the targets.
    views = [pairs[view][level] for view in reversed(range(VIEWS))]
    at = f"distance{level}"
    targets = graph.node("Concat", [target for target, _ in views], f"{at}/targets", axis=0)
    reconstructions = graph.node("Concat", [reconstruction for _, reconstruction in views], f"{at}/recs", axis=0)
    dot = _channel_sum(graph, targets, reconstructions, f"{at}/dot")
    eps = graph.constant("distance/eps", np.float32(EPS))
    norms = []
    for features, name in ((targets, "target_norm"), (reconstructions, "rec_norm")):
        squares = _channel_sum(graph, features, features, f"{at}/{name}/squares")
        root = graph.node("Sqrt", [squares], f"{at}/{name}/root")
        norms.append(graph.node("Max", [root, eps], f"{at}/{name}"))
    cosine = graph.node("Div", [dot, graph.node("Mul", norms, f"{at}/norms")], f"{at}/cosine")
    distance = graph.node("Sub", [graph.constant("distance/one", np.float32(1)), cosine], f"{at}/views")
    split = [f"{at}/view{view}" for view in reversed(range(VIEWS))]
    graph.nodes("Split", [distance], f"{at}/split", split, axis=0, num_outputs=VIEWS)
    return graph.node("Add", split, at)


def _channel_sum(graph: Graph, a: str, b: str, name: str) -> str:
    """Sum over the channels of a product: (N, 1, h, w)."""
    product = graph.node("Mul", [a, b], f"{name}/product")
    channels = graph.constant("distance/channels", np.array([1], np.int64))
    return graph.node("ReduceSum", [product, channels], name, keepdims=1)


def _score(graph: Graph, anomaly_map: str, size_wh: tuple[int, int], scoring: Scoring) -> str:
    """Image score of each map: (N,)."""
    if scoring.rule == "max":
        axes = graph.constant("score/axes", np.array([1, 2, 3], np.int64))
        return graph.node("ReduceMax", [anomaly_map, axes], SCORE_NAME, keepdims=0)
    pixels = size_wh[0] * size_wh[1]
    flat_shape = graph.constant("score/flat_shape", np.array([-1, pixels], np.int64))
    flat = graph.node("Reshape", [anomaly_map, flat_shape], "score/flat")
    count = graph.constant("score/count", np.array([top_count(pixels, scoring)], np.int64))
    top, _ = graph.nodes("TopK", [flat, count], "score/top", ["score/top", "score/top_pixels"], axis=1)
    pixel_axis = graph.constant("score/axes", np.array([1], np.int64))
    return graph.node("ReduceMean", [top, pixel_axis], SCORE_NAME, keepdims=0)
