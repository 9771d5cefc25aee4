"""What a graph ends with, in standard ONNX operators: anomaly map and score (``scoring`` as nodes), or the features.

    add_map_head(graph, pairs, spec)
    add_map_head(graph, pairs, spec, discriminate=lambda levels: add_discriminator(graph, discriminator, levels))
    add_feature_head(graph, pairs, spec)

Upsampling and blur are the folded matrices of ``resample.fold_matrix``, so the graph needs no Resize and no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from recontrast_edge.resample import fold_matrix
from recontrast_edge.scoring import EPS, MAP_NAME, SCORE_NAME, VIEWS, feature_shapes, level_weights, top_count
from recontrast_edge.spec import ModelSpec, Scoring
from recontrast_export.graph import Graph, Pairs

Discriminate = Callable[[Sequence[str]], str]
"""Names of the levels' agreements, (N, 2 * C_l, h_l, w_l) -> name of the probability of a defect, (N, 1, h_0, w_0)."""


def add_feature_head(graph: Graph, pairs: Pairs, spec: ModelSpec, discriminate: Discriminate | None = None) -> None:
    """Declare the feature pairs as outputs and, with a discriminator, ``defect_probability``.

    Args:
        graph, pairs, spec, discriminate: as for ``add_map_head``.
    """
    if discriminate is not None:
        discriminate([_Cosine(graph, pairs, index).summands(level.channels) for index, level in enumerate(spec.levels)])
    for name, shape in feature_shapes(spec).items():
        graph.output(name, ["N", *shape])


def add_map_head(graph: Graph, pairs: Pairs, spec: ModelSpec, discriminate: Discriminate | None = None) -> None:
    """Add distances, folding and score, and declare ``anomaly_map`` (N, 1, H, W) and ``anomaly_score`` (N,) outputs.

    Args:
        graph: to add to.
        pairs: names of the feature pairs.
        spec: input size, levels, weights, blur and score rule.
        discriminate: adds the discriminator's nodes, for a model that has one.
    """
    width, height = spec.input.size_wh
    scoring = spec.scoring
    rows, wide, summands = [], [], []

    def fold(distance: str, level: int, name: str, weight: float) -> None:
        level_width, level_height = spec.level_wh(level)
        columns = fold_matrix(level_width, width, scoring.blur_sigma).T.astype(np.float32)
        columns = graph.constant(f"map/columns{name}", columns)
        wide.append(graph.node("MatMul", [distance, columns], f"map/wide{name}"))
        rows.append(weight * fold_matrix(level_height, height, scoring.blur_sigma))

    for level, weight in enumerate(level_weights(scoring, len(spec.levels))):
        cosine = _Cosine(graph, pairs, level)
        if weight:
            fold(cosine.distance(), level, str(level), weight)
        if discriminate is not None:
            summands.append(cosine.summands(spec.levels[level].channels))
    if discriminate is not None and scoring.discriminator_weight:
        fold(discriminate(summands), 0, "/discriminator", scoring.discriminator_weight)
    # sum_l R_l W_l is one product: [R_0 R_1 R_2] with the W_l on top of each other.
    stacked = graph.node("Concat", wide, "map/wide", axis=2)
    folding = graph.constant("map/rows", np.concatenate(rows, axis=1).astype(np.float32))
    anomaly_map = graph.node("MatMul", [folding, stacked], MAP_NAME)
    graph.output(anomaly_map, ["N", 1, height, width])
    graph.output(_score(graph, anomaly_map, (width, height), spec.scoring), ["N"])


class _Cosine:
    """The cosine of one level's pairs, both views as one batch: (2 * N, 1, h, w)."""

    def __init__(self, graph: Graph, pairs: Pairs, level: int) -> None:
        # Both views as one batch. The sums over channels are the map's main cost on a CPU, and ONNX Runtime does them
        # five times faster with a batch of two than of one (and with Mul + ReduceSum than with ReduceSumSquare,
        # ReduceL2 or a convolution with ones). The last view first: that is the batch which the network itself makes
        # of the targets.
        views = [pairs[view][level] for view in reversed(range(VIEWS))]
        self._graph, self._at = graph, f"distance{level}"
        at = self._at
        targets = graph.node("Concat", [target for target, _ in views], f"{at}/targets", axis=0)
        reconstructions = graph.node("Concat", [rec for _, rec in views], f"{at}/recs", axis=0)
        self._product, self._dot = _channel_sum(graph, targets, reconstructions, f"{at}/dot")
        eps = graph.constant("distance/eps", np.float32(EPS))
        norms = []
        for features, name in ((targets, "target_norm"), (reconstructions, "rec_norm")):
            _, squares = _channel_sum(graph, features, features, f"{at}/{name}/squares")
            root = graph.node("Sqrt", [squares], f"{at}/{name}/root")
            norms.append(graph.node("Max", [root, eps], f"{at}/{name}"))
        self._norms = graph.node("Mul", norms, f"{at}/norms")

    def distance(self) -> str:
        """``1 - cos``, the views added: (N, 1, h, w)."""
        cosine = self._graph.node("Div", [self._dot, self._norms], f"{self._at}/cosine")
        one = self._graph.constant("distance/one", np.float32(1))
        distance = self._graph.node("Sub", [one, cosine], f"{self._at}/views")
        return self._graph.node("Add", self._split(distance, "view"), self._at)

    def summands(self, channels: int) -> str:
        """What each channel adds to the cosines, times ``sqrt(channels)``: (N, 2 * channels, h, w)."""
        graph, at = self._graph, self._at
        root = graph.constant(f"{at}/root", np.float32(channels**0.5))
        scale = graph.node("Div", [root, self._norms], f"{at}/scale")
        summands = graph.node("Mul", [self._product, scale], f"{at}/summands")
        views = self._split(summands, "summands")
        return graph.node("Concat", list(reversed(views)), f"{at}/agreement", axis=1)

    def _split(self, batch: str, name: str) -> list[str]:
        """The views, last first."""
        names = [f"{self._at}/{name}{view}" for view in reversed(range(VIEWS))]
        path = f"{self._at}/split" if name == "view" else f"{self._at}/{name}/split"
        self._graph.nodes("Split", [batch], path, names, axis=0, num_outputs=VIEWS)
        return names


def _channel_sum(graph: Graph, a: str, b: str, name: str) -> tuple[str, str]:
    """A product, (N, C, h, w), and its sum over the channels, (N, 1, h, w)."""
    product = graph.node("Mul", [a, b], f"{name}/product")
    channels = graph.constant("distance/channels", np.array([1], np.int64))
    return product, graph.node("ReduceSum", [product, channels], name, keepdims=1)


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
