"""One small run of each kernel, for a sanitizer to watch; run as a program with the sanitizer's runtime preloaded.

    LD_PRELOAD=$(g++ -print-file-name=libtsan.so) python -m tests.kernels.sanitized LIBRARY FILE LINE CASE...

``FILE`` and ``LINE`` name a barrier or fence to leave out, line 0 none. Cases: ``max``, ``top``, ``packed``, ``nv12``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from recontrast_edge.kernels import AnomalyMapPlan, PreprocessPlan
from recontrast_edge.scoring import PROBABILITY_NAME, VIEWS, reconstruction_name, target_name
from recontrast_edge.spec import InputSpec, Roi, Scoring
from tests.kernels.host import Host

INPUT = InputSpec(
    size_wh=(37, 10),
    resize_wh=(40, 11),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.2, 0.2),
    roi=Roi(x=3, y=1, width=51, height=20),
)


def anomaly_map(host: Host, scoring: Scoring) -> None:
    # Four blocks share each of 13 tiles: in some, the last two to arrive are of different teams.
    levels_chw = [(40, 9, 41), (300, 4, 4)]
    plan = AnomalyMapPlan(levels_chw, (35, 9), scoring, dtype=np.float16, max_batch=1, multiprocessors=64)
    rng = np.random.default_rng(0)
    features = {
        name(view, index): rng.standard_normal((1, *chw)).astype(np.float16)
        for view in range(VIEWS)
        for index, chw in enumerate(levels_chw)
        for name in (target_name, reconstruction_name)
    }
    features[PROBABILITY_NAME] = rng.uniform(size=(1, 1, *levels_chw[0][1:])).astype(np.float32)
    _, scores = host.anomaly_map(features, plan)
    assert np.isfinite(scores).all()


def packed(host: Host) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (21, 56 * 3), dtype=np.uint8)
    for pitch in (56 * 3, 55 * 3):
        source = np.ascontiguousarray(frame[:, :pitch])
        plan = PreprocessPlan(INPUT, (pitch // 3, 21), "bgr8", dtype=np.float16)
        assert np.isfinite(host.preprocess(source, plan)).all()


def nv12(host: Host) -> None:
    rng = np.random.default_rng(0)
    luma, chroma = rng.integers(0, 256, (22, 54), dtype=np.uint8), rng.integers(0, 256, (11, 54), dtype=np.uint8)
    plan = PreprocessPlan(INPUT, (54, 22), "nv12", dtype=np.float32)
    assert np.isfinite(host.preprocess(luma, plan, chroma=chroma)).all()


CASES: dict[str, Callable[[Host], None]] = {
    "max": lambda host: anomaly_map(host, Scoring(blur_sigma=1.0, discriminator_weight=2.0)),
    "top": lambda host: anomaly_map(
        host, Scoring(blur_sigma=1.0, discriminator_weight=2.0, rule="top", top_fraction=0.1)
    ),
    "packed": packed,
    "nv12": nv12,
}

if __name__ == "__main__":
    library, file, line, *cases = sys.argv[1:]
    watched = Host(Path(library), teams=2)
    watched.leave_out(file, int(line))
    for case in cases:
        CASES[case](watched)
    print("done")
