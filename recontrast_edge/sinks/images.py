"""A folder with a picture, a map and a record of each reject, or of every frame.

    ImagesSink(Path("rejects"), engine.spec.input, every=False).write(judgement)

Frame 12 becomes ``00000012.png`` (annotated), ``00000012.map.png`` (16-bit grey: map value = pixel * ``map_step`` of
the record) and ``00000012.json`` (the record, written last: where it is, the others are complete).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from recontrast_edge.errors import OutputError
from recontrast_edge.frame import Judgement
from recontrast_edge.images import atomic_write, write_image
from recontrast_edge.render import annotate, panel_size
from recontrast_edge.spec import InputSpec

MAP_STEP = 5e-4
"""Map value of one grey step: 65535 steps hold two views of eight levels, each at its largest distance of 2."""


class ImagesSink:
    """Writes rejects, or every judgement, as files of a folder; an earlier run's frames with the same ids are replaced.

    Raises:
        OutputError: the folder cannot be made.
    """

    def __init__(self, folder: Path, input_spec: InputSpec, *, every: bool) -> None:
        self.uri = f"images:{folder}"
        self.needs_maps = every
        self._folder = folder
        self._input_spec = input_spec
        self._every = every
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot make this folder ({error.strerror or error})") from None

    def write(self, judgement: Judgement) -> None:
        """See ``Sink.write``."""
        if judgement.verdict != "REJECT" and not self._every:
            return
        stem = f"{judgement.frame.frame_id:08d}"
        record = judgement.record()
        picture = annotate(judgement, self._input_spec, panel_size(judgement.frame.image))
        write_image(self._folder / f"{stem}.png", picture)
        if judgement.map is not None:
            steps = np.clip(np.rint(judgement.map / MAP_STEP), 0, np.iinfo(np.uint16).max).astype(np.uint16)
            write_image(self._folder / f"{stem}.map.png", steps)
            record["map_step"] = MAP_STEP
        with atomic_write(self._folder / f"{stem}.json") as file:
            file.write(json.dumps(record, indent=2, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """See ``Sink.close``; every file is complete already."""
