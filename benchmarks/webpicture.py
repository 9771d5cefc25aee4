"""Draws a synthetic web, put together from its tiles, with what the demo model found on it.

    python benchmarks/webpicture.py --out docs/line-scan.jpg

Each band is a stretch with one merged verdict; the web runs from left to right. Red boxes are defects that were found,
blue outlines those that are there. Some blocks of lines are lost on purpose; what no tile shows for that is orange.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from recontrast_edge.engines import DEMO, open_engine
from recontrast_edge.frame import EndOfStream, Frame, Judgement
from recontrast_edge.images import write_image
from recontrast_edge.linescan import LineScanSource, line_options
from recontrast_edge.preprocess import Image
from recontrast_edge.render import BACKGROUND, VERDICT_COLOURS, WHITE, draw_text
from recontrast_edge.sources import open_source
from recontrast_edge.verdict import fault, judge, resolve_threshold
from recontrast_edge.webmerge import TileMerger, open_merger

WIDTH, BLOCK = 256, 16
STRETCH = 1024
STRETCHES = 5
OPTIONS = f"lines=256&overlap=64&merge=length&merge_lines={STRETCH}&line_pitch_mm=0.1&pixel_pitch_mm=0.1"
URI = f"synthetic-web://brushed-metal?width={WIDTH}&block={BLOCK}&total={STRETCH * STRETCHES}&defect_rate=0.6&seed=5"
LOST_BLOCKS = range(140, 147)
TRUTH_BGR = (255, 120, 40)
TEXT_HEIGHT = 30


class Lossy:
    """The blocks of a source, but for those that get lost."""

    def __init__(self, uri: str) -> None:
        self.uri, self.live = uri, False
        self._source = open_source(uri)

    def read(self, timeout_s: float) -> Frame | None:
        """See ``Source.read``."""
        frame = self._source.read(timeout_s)
        return self.read(timeout_s) if frame is not None and frame.frame_id in LOST_BLOCKS else frame

    def close(self) -> None:
        """See ``Source.close``."""
        self._source.close()


class Web:
    """What the tiles show, put together again, and the verdicts on it.

    Attributes:
        image: (lines, WIDTH, 3) BGR; FAULT's colour where no tile shows it.
        mask: (lines, WIDTH) bool, where defects are.
    """

    def __init__(self) -> None:
        self.image = np.full((STRETCH * STRETCHES, WIDTH, 3), VERDICT_COLOURS["FAULT"], np.uint8)
        self.mask = np.zeros(self.image.shape[:2], np.bool_)

    def judge(self, source: LineScanSource, merger: TileMerger) -> Iterator[Judgement]:
        """Judge tile by tile; gives the merged verdicts."""
        with open_engine(DEMO) as engine:
            threshold = resolve_threshold(engine)
            while True:
                try:
                    frame = source.read(1.0)
                except EndOfStream:
                    yield from merger.flush()
                    return
                assert frame is not None
                if frame.image is None:
                    yield from merger.add(fault(frame, frame.fault or "", frame.detail, threshold))
                    continue
                self._show(frame)
                yield from merger.add(judge(frame, engine.infer([frame.image]), threshold, engine.spec.input))

    def _show(self, tile: Frame) -> None:
        assert tile.web is not None
        lines = slice(tile.web.first_line, tile.web.first_line + tile.web.lines)
        self.image[lines] = tile.image
        self.mask[lines] |= False if tile.truth_mask is None else tile.truth_mask


def draw(judgement: Judgement, web: Web) -> Image:
    """One stretch as a band, under a line of text."""
    span = judgement.frame.web
    assert span is not None
    lines = slice(span.first_line, span.first_line + span.lines)
    picture = web.image[lines].copy()
    outlines, _ = cv2.findContours(web.mask[lines].astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(picture, outlines, -1, TRUTH_BGR, 1, cv2.LINE_AA)
    for region in judgement.regions:
        corners = (region.x, region.y), (region.x + region.width - 1, region.y + region.height - 1)
        cv2.rectangle(picture, *corners, VERDICT_COLOURS["REJECT"], 2)
    band = np.full((TEXT_HEIGHT + WIDTH, STRETCH, 3), BACKGROUND, np.uint8)
    band[TEXT_HEIGHT:, : span.lines] = picture.transpose(1, 0, 2)
    colour = VERDICT_COLOURS[judgement.verdict]
    band[:TEXT_HEIGHT, :96] = colour
    draw_text(band, judgement.verdict, (10, 21), 0.6, WHITE, thickness=2)
    record = judgement.record()
    found = "; ".join(f"{region['line_mm']:g} mm along, {region['column_mm']:g} across" for region in record["regions"])
    where = f"lines {span.first_line} to {span.first_line + span.lines - 1}"
    draw_text(band, f"{where}: {judgement.detail or found or 'nothing found'}", (108, 20), 0.45, WHITE)
    return band


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="picture file (.jpg or .png)")
    arguments = parser.parse_args()
    options, merger, web = line_options(f"web:?{OPTIONS}"), open_merger(f"web:?{OPTIONS}"), Web()
    assert options is not None
    assert merger is not None
    judgements = list(web.judge(LineScanSource(Lossy(URI), options, URI), merger))
    bands = [draw(judgement, web) for judgement in judgements]
    gap = np.full((10, STRETCH, 3), BACKGROUND, np.uint8)
    write_image(arguments.out, np.concatenate([part for band in bands for part in (band, gap)]))
    for judgement in judgements:
        print(judgement.frame.web, judgement.verdict, judgement.detail or "", len(judgement.regions), "defects")


if __name__ == "__main__":
    main()
