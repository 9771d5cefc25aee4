"""The demo: a synthetic production line judged by the packaged model, with everything it found on file.

    result = run_demo(Path("demo-output"), frames=300, seed=1, fps=30.0, show=True, stop=threading.Event())

Writes ``demo.mp4`` (annotated video), ``rejects.png`` (contact sheet of rejects and mistakes) and ``report.json``.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from recontrast_edge.camera_plan import CameraPlan
from recontrast_edge.engines import DEMO, open_engine
from recontrast_edge.frame import Frame, Judgement, Sink, Source
from recontrast_edge.images import write_image
from recontrast_edge.metrics import auroc
from recontrast_edge.pipeline import Line, warm_up
from recontrast_edge.preprocess import Image
from recontrast_edge.render import BACKGROUND, VERDICT_COLOURS, WHITE, Colour, annotate, draw_text
from recontrast_edge.sinks import open_sink
from recontrast_edge.spec import InputSpec
from recontrast_edge.statistics import Statistics
from recontrast_edge.task import Product
from recontrast_edge.verdict import resolve_threshold

DEFECT_RATE = 0.1
VIDEO_NAME, SHEET_NAME, REPORT_NAME = "demo.mp4", "rejects.png", "report.json"

MAX_TILES = 40
TILE_COLUMNS = 4
TILE_PANEL_WH = (200, 200)
CAPTION_HEIGHT = 26
MARGIN = 10
HEADING_HEIGHT = 52

REJECTED, FALSE_REJECT, MISSED_DEFECT = "rejected", "false reject", "missed defect"
MISTAKE_COLOUR: Colour = (200, 60, 200)


class PacedSource:
    """A source that can wait, read at a steady rate: watchable, and yet nothing is skipped.

    Args:
        source: not live.
        fps: frames a second; 0 is as fast as it is read.
    """

    live = False

    def __init__(self, source: Source, *, fps: float) -> None:
        self.uri = source.uri
        self._source = source
        self._interval_s = 1 / fps if fps > 0 else 0.0
        self._due_s = 0.0

    def read(self, timeout_s: float) -> Frame | None:
        """See ``Source.read``; a frame counts as captured when its time has come."""
        frame = self._source.read(timeout_s)
        if frame is None:
            return None
        time.sleep(max(0.0, self._due_s - time.monotonic()))
        now_s = time.monotonic()
        self._due_s = max(self._due_s + self._interval_s, now_s)
        return dataclasses.replace(frame, captured_s=now_s)

    def close(self) -> None:
        """See ``Source.close``."""
        self._source.close()


def outcome(judgement: Judgement) -> tuple[str, Colour] | None:
    """How a verdict compares with the known truth, for those that belong on the contact sheet."""
    truth = judgement.frame.truth
    if judgement.verdict == "REJECT":
        return (FALSE_REJECT, MISTAKE_COLOUR) if truth == "good" else (REJECTED, VERDICT_COLOURS["REJECT"])
    if truth == "defect":
        return MISSED_DEFECT, MISTAKE_COLOUR
    return None


class ContactSheet:
    """A sink that draws rejects and mistakes as tiles of one picture, mistakes first.

    Keeps the scores with their truth as well, for the AUROC over the whole run.
    """

    def __init__(self, path: Path, input_spec: InputSpec) -> None:
        self.uri = f"contact sheet {path}"
        self.scores: list[float] = []
        self.defective: list[bool] = []
        self._path = path
        self._input_spec = input_spec
        self._rejects: list[Image] = []
        self._mistakes: list[Image] = []
        self._captions: Counter[str] = Counter()
        self._closed = False

    def write(self, judgement: Judgement) -> None:
        """See ``Sink.write``."""
        if judgement.score is not None and judgement.frame.truth is not None:
            self.scores.append(judgement.score)
            self.defective.append(judgement.frame.truth == "defect")
        compared = outcome(judgement)
        if compared is None:
            return
        caption, colour = compared
        self._captions[caption] += 1
        tiles = self._mistakes if colour == MISTAKE_COLOUR else self._rejects
        if len(tiles) < MAX_TILES:
            picture = annotate(judgement, self._input_spec, TILE_PANEL_WH)
            tiles.append(_captioned(picture, caption, colour))

    def close(self) -> None:
        """Write the sheet; a run without rejects and mistakes has one that says so."""
        if self._closed:
            return
        self._closed = True
        tiles = [*self._mistakes, *self._rejects][:MAX_TILES]
        counts = ", ".join(
            f"{self._captions[caption]} {caption}" for caption in (REJECTED, FALSE_REJECT, MISSED_DEFECT)
        )
        heading = f"{len(self.scores)} parts: {counts}"
        if len(tiles) < self._captions.total():
            heading += f" ({len(tiles)} shown)"
        write_image(self._path, contact_sheet(tiles, heading))


def _captioned(picture: Image, caption: str, colour: Colour) -> Image:
    tile = np.full((picture.shape[0] + CAPTION_HEIGHT, picture.shape[1], 3), colour, np.uint8)
    tile[: picture.shape[0]] = picture
    draw_text(tile, caption, (10, picture.shape[0] + 18), 0.5, WHITE)
    return tile


def contact_sheet(tiles: list[Image], heading: str) -> Image:
    """Tiles of one size (h, w, 3) in rows of ``TILE_COLUMNS`` under a heading, BGR uint8."""
    height, width = tiles[0].shape[:2] if tiles else (0, 2 * TILE_PANEL_WH[0])
    columns = min(max(len(tiles), 2), TILE_COLUMNS)
    rows = -(-len(tiles) // columns)
    sheet_wh = MARGIN + columns * (width + MARGIN), HEADING_HEIGHT + rows * (height + MARGIN)
    sheet: NDArray[np.uint8] = np.full((sheet_wh[1], sheet_wh[0], 3), BACKGROUND, np.uint8)
    draw_text(sheet, heading, (MARGIN, 34), 0.7, WHITE)
    for index, tile in enumerate(tiles):
        x = MARGIN + index % columns * (width + MARGIN)
        y = HEADING_HEIGHT + index // columns * (height + MARGIN)
        sheet[y : y + height, x : x + width] = tile
    return sheet


def machine() -> dict[str, Any]:
    """What the latencies were measured on."""
    import onnxruntime

    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What a demo run left behind.

    Attributes:
        line: with its statistics and errors.
        auroc: of the scores against the known truth, 0..1; None where the run saw only good or only defective parts.
        folder: holds the files.
    """

    line: Line
    auroc: float | None
    folder: Path


def run_demo(
    folder: Path,
    *,
    frames: int,
    seed: int,
    fps: float,
    stop: threading.Event,
    threads: int | None = None,
    view: Callable[[Statistics, str], Sink] | None = None,
) -> DemoResult:
    """Judge a synthetic line with the packaged model.

    Args:
        folder: for the files; made if it is not there.
        frames: length of the run.
        seed: of the line.
        fps: frames a second; 0 is as fast as possible.
        stop: set it to end early with complete files.
        threads: CPU threads of the engine.
        view: makes the sink that shows the run, from its statistics and a title.

    Raises:
        ModelError: the packaged model is damaged.
        OutputError: the files cannot be written.
    """
    from recontrast_edge.sources import open_source

    statistics = Statistics()
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine(DEMO, threads=threads))
        threshold = resolve_threshold(engine)
        warm_up(engine)
        input_spec = engine.spec.input
        width, height = input_spec.size_wh
        uri = f"synthetic://mixed?defect_rate={DEFECT_RATE}&seed={seed}&fps=0&size={width}x{height}&frames={frames}"
        plan = CameraPlan(uri, lambda: PacedSource(open_source(uri), fps=fps), Product(engine, threshold), mode="every")
        line = stack.enter_context(Line([plan], stop=stop, statistics=statistics))
        rate = fps if fps > 0 else 30.0
        sheet = ContactSheet(folder / SHEET_NAME, input_spec)
        sinks: list[Sink] = [
            stack.enter_context(closing(open_sink(f"video:{folder / VIDEO_NAME}?fps={rate:g}", input_spec=input_spec))),
            sheet,
        ]
        if view is not None:
            title = f"{engine.spec.class_name} · {engine.name} · {uri}"
            sinks.append(stack.enter_context(closing(view(statistics, title))))
        line.run(sinks)
        area = auroc(sheet.scores, sheet.defective) if len(set(sheet.defective)) == 2 else None
        line.write_summary(folder / REPORT_NAME, auroc=area, machine=machine())
    return DemoResult(line, area, folder)
