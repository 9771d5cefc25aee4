"""How long a verdict takes on this machine, and how many come a second; checked for correctness before it is timed.

    report = bench(["demo"], "synthetic://mixed?fps=0", Settings(frames=500))

Latency is from a frame's capture to its verdict. A camera's frames are used as they come; those of any other source
are held in memory and, given a line rate, fall due at that rate: a frame that had to wait for a slow one counts its
waiting. Two engines take turns, in one run, so that a machine that warms up or has other work does the same to both.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast_edge import __version__
from recontrast_edge.doctor import published_facts
from recontrast_edge.engines import Engine, Inference, engine_path, open_engine
from recontrast_edge.errors import GateError, InputError, ModelError, SourceError, UsageError
from recontrast_edge.frame import EndOfStream, Frame, Source
from recontrast_edge.preprocess import Image
from recontrast_edge.sensors import Sensors, summarise
from recontrast_edge.sources import open_source
from recontrast_edge.verdict import judge, resolve_threshold

FORMAT = "recontrast-edge.bench"
VERSION = 1

POOL_FRAMES = 32
"""Frames of a source that are held in memory."""

CHECKED_FRAMES = 4
ALLOWED_MAP_ERROR = 0.05
"""Largest error of any pixel against the reference, as a share of the map's range: what INT8 may cost."""

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}
TURN_FRAMES = 20
"""Frames an engine gets before it is the other's turn."""
THROUGHPUT_S = 1.0
"""How long each batch size is run at least."""
READ_TIMEOUT_S = 5.0
"""A camera that delivers nothing for so long ends the measurement."""

EXCLUDED = (
    "exposure, transfer and decoding of a frame, which are over before its source stamps it; "
    "opening, building and warming up the engine; "
    "outputs, which run on threads of their own; "
    "the reading thread's hand-over, of which `recontrast-edge run` has the total"
)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        frames: measured verdicts of each engine.
        warmup: verdicts before, of each engine.
        batches: batch sizes whose throughput is measured; none for latency only.
        line_rate_hz: frames fall due at this rate, each before the next one; None: one after the other.
        threads: CPU threads of ONNX Runtime.
    """

    frames: int = 500
    warmup: int = 50
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    line_rate_hz: float | None = None
    threads: int | None = None


@dataclass(eq=False)
class Latencies:
    """Of one engine, a value a frame.

    Attributes:
        stages_ms: milliseconds of each stage and ``total``; 0 where a frame did without.
        at_s: when each frame was captured or due, in seconds from the first.
        verdicts: how many of each.
        turns_ms: median ``total`` of each turn.
    """

    stages_ms: dict[str, list[float]] = field(default_factory=dict)
    at_s: list[float] = field(default_factory=list)
    verdicts: dict[str, int] = field(default_factory=dict)
    turns_ms: list[float] = field(default_factory=list)

    def add(self, latency_ms: dict[str, float], at_s: float, verdict: str) -> None:
        """Count a frame."""
        for stage in latency_ms:
            self.stages_ms.setdefault(stage, [0.0] * len(self.at_s))
        for stage, values in self.stages_ms.items():
            values.append(latency_ms.get(stage, 0.0))
        self.at_s.append(at_s)
        self.verdicts[verdict] = self.verdicts.get(verdict, 0) + 1

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Percentiles, maximum and mean of each stage in milliseconds; ``total`` last."""
        order = sorted(self.stages_ms, key=lambda stage: (stage == "total", stage == "decide"))
        return {stage: percentiles(self.stages_ms[stage]) for stage in order}


def percentiles(values_ms: Sequence[float]) -> dict[str, float | None]:
    """Percentiles as values that occurred; None where there are too few values for one."""
    found: dict[str, float | None] = {}
    for name, percent in PERCENTILES.items():
        enough = len(values_ms) * (100.0 - percent) >= 100.0 - 1e-9
        found[name] = round(float(np.percentile(values_ms, percent, method="higher")), 4) if enough else None
    return found | {"max": round(max(values_ms), 4), "mean": round(float(np.mean(values_ms)), 4)}


class Supply:
    """Frames to measure with.

    Args:
        source: opened; stays open.

    Raises:
        InputError: it has no frame.
        SourceError: it broke off.
    """

    def __init__(self, source: Source) -> None:
        self.uri = source.uri
        self.live = source.live
        self._source = source
        self._pool: list[Frame] = []
        while len(self._pool) < (CHECKED_FRAMES if source.live else POOL_FRAMES):
            try:
                frame = self._read()
            except EndOfStream:
                break
            if frame.image is not None:
                self._pool.append(frame)
        if not self._pool:
            raise InputError(f"{source.uri}: expected frames to measure with, it has none")

    def _read(self) -> Frame:
        frame = self._source.read(READ_TIMEOUT_S)
        if frame is None:
            raise SourceError(f"{self.uri}: no frame came within {READ_TIMEOUT_S:g} s")
        return frame

    @property
    def images(self) -> list[Image]:
        """Some of its images."""
        return [frame.image for frame in self._pool if frame.image is not None]

    def frames(self, line_rate_hz: float | None) -> Iterator[Frame]:
        """Frames without end; the next one comes when it is due."""
        if self.live:
            yield from self._camera()
            return
        first_s = time.monotonic()
        index = 0
        while True:
            frame = self._pool[index % len(self._pool)]
            due_s = time.monotonic() if line_rate_hz is None else first_s + index / line_rate_hz
            delay_s = due_s - time.monotonic()
            if delay_s > 0:
                time.sleep(delay_s)
            yield dataclasses.replace(frame, frame_id=index, captured_s=due_s)
            index += 1

    def _camera(self) -> Iterator[Frame]:
        while True:
            try:
                frame = self._read()
            except EndOfStream:
                return
            if frame.image is not None:
                yield frame


def verdict_latency(engine: Engine, frame: Frame, threshold: float) -> tuple[dict[str, float], str]:
    """Judge a frame: milliseconds a stage, with the names that ``run`` has, and the verdict."""
    assert frame.image is not None
    started_s = time.monotonic()
    # As the pipeline asks where no output needs the maps of good parts.
    inference = engine.infer([frame.image], maps_above=threshold)
    inferred_s = time.monotonic()
    judgement = judge(frame, inference, threshold, engine.spec.input)
    decided_s = time.monotonic()
    latency_ms = {
        "wait": (started_s - frame.captured_s) * 1e3,
        **inference.stage_ms,
        "decide": (decided_s - inferred_s) * 1e3,
        "total": (decided_s - frame.captured_s) * 1e3,
    }
    return latency_ms, judgement.verdict


def measure(
    engines: Sequence[Engine],
    thresholds: Sequence[float],
    supply: Supply,
    settings: Settings,
    *,
    progress: Callable[[int], None] = lambda _frames: None,
) -> list[Latencies]:
    """Latencies of each engine. Several take turns of ``TURN_FRAMES``, and who begins changes every round.

    Raises:
        ModelError: an engine failed.
        SourceError: the source ended before every engine had its frames.
    """
    for engine, threshold in zip(engines, thresholds, strict=True):
        _take(supply, None, settings.warmup, partial(_warm_up_with, engine, threshold))
    latencies = [Latencies() for _ in engines]
    turn = settings.frames if len(engines) == 1 else TURN_FRAMES
    start_s: float | None = None
    for number, begin in enumerate(range(0, settings.frames, turn)):
        count = min(turn, settings.frames - begin)
        order = range(len(engines)) if number % 2 == 0 else reversed(range(len(engines)))
        for index in order:
            found = latencies[index]

            def judge_one(frame: Frame, index: int = index, found: Latencies = found) -> None:
                nonlocal start_s
                if start_s is None:
                    start_s = frame.captured_s
                latency_ms, verdict = verdict_latency(engines[index], frame, thresholds[index])
                found.add(latency_ms, frame.captured_s - start_s, verdict)
                progress(1)

            _take(supply, settings.line_rate_hz, count, judge_one)
            found.turns_ms.append(float(np.median(found.stages_ms["total"][-count:])))
    return latencies


def _take(supply: Supply, line_rate_hz: float | None, count: int, act: Callable[[Frame], Any]) -> None:
    taken = 0
    for frame in supply.frames(line_rate_hz) if count else ():
        act(frame)
        taken += 1
        if taken == count:
            return
    if taken < count:
        raise SourceError(
            f"{supply.uri}: ended after {taken} of {count} frames; measure fewer, or from a longer source"
        )


def _warm_up_with(engine: Engine, threshold: float, frame: Frame) -> None:
    verdict_latency(engine, frame, threshold)


def ratio(turns_ms: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Second engine's latency as a multiple of the first's, paired turn by turn."""
    ratios = np.array(turns_ms[1]) / np.array(turns_ms[0])
    low, middle, high = np.percentile(ratios, [10, 50, 90])
    return {
        "median": round(float(middle), 4),
        "p10": round(float(low), 4),
        "p90": round(float(high), 4),
        "min": round(float(ratios.min()), 4),
        "max": round(float(ratios.max()), 4),
        "turns": len(ratios),
        "frames_a_turn": TURN_FRAMES,
    }


def throughput(engine: Engine, images: Sequence[Image], batch: int) -> dict[str, float]:
    """Images a second in batches of ``batch``, over at least ``THROUGHPUT_S`` and 3 batches."""
    chosen = [images[index % len(images)] for index in range(batch)]
    engine.infer(chosen, maps_above=math.inf)
    durations_ms: list[float] = []
    start_s = time.perf_counter()
    while len(durations_ms) < 3 or time.perf_counter() - start_s < THROUGHPUT_S:
        begin_s = time.perf_counter()
        engine.infer(chosen, maps_above=math.inf)
        durations_ms.append((time.perf_counter() - begin_s) * 1e3)
    images_a_second = batch * len(durations_ms) / (sum(durations_ms) / 1e3)
    return {
        "batch": batch,
        "images_per_s": round(images_a_second, 2),
        "batch_p50_ms": round(float(np.median(durations_ms)), 4),
        "batches": len(durations_ms),
    }


# --- correctness -------------------------------------------------------------------------------------------------


def check(engine: Engine, images: Sequence[Image]) -> dict[str, Any]:
    """Is the engine right? Some images and noise, against a reference, alone and together.

    The reference is the source ONNX model of a plan, if it lies beside it, or the model without ONNX Runtime's own
    rewriting.

    Raises:
        GateError: it is not.
    """
    some = [*images[:CHECKED_FRAMES], np.random.default_rng(0).integers(0, 256, images[0].shape, dtype=np.uint8)]
    together = engine.infer(some)
    if not (np.isfinite(together.maps).all() and np.isfinite(together.scores).all()):
        raise GateError(f"{engine.path}: the engine gives NaN or infinity; it is not measured")
    if len(some) > 1 and np.ptp(together.scores) == 0.0 and np.ptp(together.maps, axis=0).max() == 0.0:
        raise GateError(f"{engine.path}: the engine gives the same map for every image; it is not measured")
    alone = Inference(
        np.concatenate([engine.infer([image]).maps for image in some]),
        np.concatenate([engine.infer([image]).scores for image in some]),
        {},
    )
    checks: dict[str, Any] = {"images": len(some), "alone_and_together": map_error(alone.maps, together.maps)}
    reference = _reference(engine)
    if reference is not None:
        with reference:
            wanted = reference.infer(some)
        checks["reference"] = f"{reference.path.name}, {reference.name}, no node rewritten"
        checks["against_reference"] = map_error(together.maps, wanted.maps)
        checks["score_error"] = float(np.abs(together.scores - wanted.scores).max())
    for name in ("alone_and_together", "against_reference"):
        if checks.get(name, 0.0) > ALLOWED_MAP_ERROR:
            raise GateError(
                f"{engine.path}: maps differ by {checks[name]:.3f} of their range ({name.replace('_', ' ')}; allowed "
                f"{ALLOWED_MAP_ERROR:g}); a wrong engine is not measured. Build or export it again"
            )
    return checks


def map_error(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Largest error of any pixel, as a share of its map's range."""
    spans = np.ptp(wanted.reshape(len(wanted), -1), axis=1).astype(np.float64)
    errors = np.abs(found.astype(np.float64) - wanted).reshape(len(wanted), -1).max(axis=1)
    return round(float((errors / np.maximum(spans, np.finfo(np.float32).tiny)).max()), 6)


def _reference(engine: Engine) -> Engine | None:
    from recontrast_edge.engines.onnx import OnnxEngine

    path = engine.path
    if path.suffix == ".plan":
        from recontrast_edge.onnxfile import graph_sha256
        from recontrast_edge.plan import read_sidecar

        info = read_sidecar(path)
        path = path.with_name(info.onnx)
        if not path.is_file() or graph_sha256(path) != info.onnx_sha256:
            return None
    return OnnxEngine(path, optimise=False)


# --- the whole ---------------------------------------------------------------------------------------------------


def bench(
    names: Sequence[str],
    source: str,
    settings: Settings,
    *,
    progress: Callable[[str, int], None] = lambda _phase, _frames: None,
) -> tuple[dict[str, Any], list[Latencies]]:
    """Check and measure one engine, or two against each other.

    Args:
        names: engine files, or ``demo``.
        source: where frames come from.
        settings: what to measure.
        progress: called with what is being done and by how many frames it went on.

    Returns:
        The report, JSON-able, and the latencies of each engine.

    Raises:
        RecontrastError: an engine or the source cannot be opened or fails, or an engine is wrong.
    """
    report: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "recontrast_edge": __version__,
        "machine": published_facts(),
        "settings": {**dataclasses.asdict(settings), "source": source},
        "excluded": EXCLUDED,
    }
    with ExitStack() as stack:
        sensors = stack.enter_context(Sensors())
        engines = [stack.enter_context(open_engine(name, threads=settings.threads)) for name in names]
        supply = Supply(stack.enter_context(closing(open_source(source))))
        progress("checking", 0)
        entries = [_describe(engine) | {"correctness": check(engine, supply.images)} for engine in engines]
        thresholds = [_threshold(engine) for engine in engines]
        report["sensors_idle"] = sensors.read()
        latencies = measure(engines, thresholds, supply, settings, progress=lambda frames: progress("latency", frames))
        for entry, found in zip(entries, latencies, strict=True):
            entry |= {"latency_ms": found.summary(), "verdicts": found.verdicts}
            if settings.line_rate_hz is not None:
                missed = sum(total > 1e3 / settings.line_rate_hz for total in found.stages_ms["total"])
                entry["deadline"] = {"ms": 1e3 / settings.line_rate_hz, "missed": missed, "of": len(found.at_s)}
        if len(engines) == 2:
            first, second = (engine.infer(supply.images[:CHECKED_FRAMES]).maps for engine in engines)
            report["comparison"] = {
                "latency_ratio": ratio([found.turns_ms for found in latencies]),
                # Models may differ in their input's size.
                "map_error": map_error(second, first) if first.shape == second.shape else None,
            }
        with sensors.sampled() as readings:
            for engine, entry in zip(engines, entries, strict=True):
                entry["throughput"] = []
                for batch in settings.batches:
                    progress(f"batch {batch}", 0)
                    entry["throughput"].append(throughput(engine, supply.images, batch))
        report["sensors_under_load"] = summarise(readings)
        report["memory"] = _memory()
        for engine, entry in zip(engines, entries, strict=True):
            if engine.path.suffix == ".plan":
                progress("GPU stages", 0)
                try:
                    entry["gpu_stages_ms"] = _gpu_stages(engine, supply, settings)
                except ModelError as error:
                    # Profiling alone failed: what was measured without it is right, and may have taken long.
                    entry["gpu_stages_error"] = str(error)
    report["engines"] = entries
    return report, latencies


def _describe(engine: Engine) -> dict[str, Any]:
    return {
        "file": engine.path.name,
        "name": engine.name,
        "sha256": engine.sha256,
        "backbone": engine.spec.backbone,
        "input_wh": list(engine.spec.input.size_wh),
        "tiles": engine.spec.input.n_tiles,
    }


def _threshold(engine: Engine) -> float:
    try:
        return resolve_threshold(engine)
    except ModelError:
        # Without one every finite score passes; only the regions of rejects are not measured then.
        return math.inf


def _gpu_stages(engine: Engine, supply: Supply, settings: Settings) -> dict[str, dict[str, float | None]]:
    """The stages on the GPU, by a second opening of the same plan that records events between them."""
    with open_engine(engine.path, profile=True) as profiled:
        threshold = _threshold(profiled)
        found = Latencies()

        def judge_one(frame: Frame) -> None:
            latency_ms, verdict = verdict_latency(profiled, frame, threshold)
            found.add(latency_ms, 0.0, verdict)

        _take(supply, None, settings.warmup, partial(_warm_up_with, profiled, threshold))
        _take(supply, None, settings.frames, judge_one)
        return found.summary()


def _memory() -> dict[str, float]:
    """Of this process, in MiB; with both engines where there are two."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE))
    return {
        "resident_mib": round(int(fields["VmRSS"]) / 1024, 1),
        "peak_mib": round(int(fields["VmHWM"]) / 1024, 1),
    }


def parse_batches(text: str) -> tuple[int, ...]:
    """``1,2,4`` -> (1, 2, 4); empty for none.

    Raises:
        UsageError: not whole numbers from 1 to 256.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and 1 <= int(part) <= 256 for part in parts):
        raise UsageError(f"--batch: expected whole numbers from 1 to 256, such as 1,2,4, got {text!r}")
    return tuple(dict.fromkeys(int(part) for part in parts))


def check_engines(engine: str | None, compare: tuple[str, str] | None) -> tuple[str, ...]:
    """The engines that the command line asks for.

    Raises:
        UsageError: none, or both options.
        ModelError: a file is missing.
    """
    if (engine is None) == (compare is None):
        raise UsageError("expected either --engine FILE or --compare FILE FILE")
    names = compare if compare is not None else (str(engine),)
    for name in names:
        engine_path(name)
    return names
