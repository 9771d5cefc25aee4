"""The anomaly-map kernels on this GPU: time, bytes and share of the copy bandwidth, beside other ways to do the same.

    python benchmarks/kernel.py --json kernel.json

Needs an NVIDIA GPU and PyTorch; CuPy and SciPy join if they are there. Every way is compared with the float64 oracle
before it is timed. The time is that of the map stage alone, features on the GPU to map and score on the GPU; the
paper's way ends on the CPU, because its blur runs there. Our kernels replay a CUDA graph, the others are called in a
row, over so many different feature sets that next to nothing is still in the L2 cache ("cold"); "warm" is one set again
and again. The GPU is kept busy before each measurement, so that its clocks have risen. "frame" is everything but the
network for one camera frame as one CUDA graph: copy in, preprocessing, map, score back. What is not right is not timed;
it is reported, the rest goes on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from recontrast_edge.cuda import Device, Stream, open_device
from recontrast_edge.doctor import machine_facts
from recontrast_edge.errors import MissingError
from recontrast_edge.images import atomic_write
from recontrast_edge.kernels import AnomalyMapPlan, PreprocessPlan
from recontrast_edge.kernels.launcher import AnomalyMapLauncher, PreprocessLauncher, load_kernels
from recontrast_edge.preprocess import preprocess
from recontrast_edge.resample import fold_matrix
from recontrast_edge.scoring import VIEWS, fold_maps, image_scores, level_distances, reconstruction_name, target_name
from recontrast_edge.sensors import Sensors
from recontrast_edge.spec import InputSpec, Scoring

EXIT_SKIPPED = 77

SIZE_WH = (256, 256)
LEVELS_CHW = {
    "wide_resnet50_2": [(256, 64, 64), (512, 32, 32), (1024, 16, 16)],
    "resnet18": [(64, 64, 64), (128, 32, 32), (256, 16, 16)],
}
BOUNDS = {"float16": 2e-3, "float32": 1e-5}
L2_TIMES = 16
"""So many times the bytes of the L2 cache are gone through, cold: of a sweep in a circle a cache may keep as much as it
holds, whatever it evicts first."""
MOST_SETS = 512
MOST_SETS_OF_OTHERS = 64
"""The other ways take long; what they still find in the cache is to their advantage."""
WARM_UP_S = 0.3
REPEATS = 15
GRAPH_LAUNCHES = 100
"""In one graph: so many that the graph's own launch does not count."""
HOST_REPEATS = 1000
FRAMES_WH = ((640, 480), (1920, 1200))
DEVICE = "cuda"

Features = dict[str, Any]
"""Tensor name -> torch tensor on the GPU."""


class NotRightError(Exception):
    """Results differ from the oracle's."""


def make_features(
    torch: Any, levels_chw: Sequence[tuple[int, int, int]], batch: int, dtype: Any, seed: int
) -> Features:
    """Reconstructions that resemble their targets more or less, as a trained model's do."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, device=DEVICE)

    features = {}
    for view in range(VIEWS):
        for index, chw in enumerate(levels_chw):
            target = normal(batch, *chw)
            features[target_name(view, index)] = target.to(dtype).contiguous()
            mixed = target + normal(batch, *chw) * normal(batch, 1, *chw[1:]).abs()
            features[reconstruction_name(view, index)] = mixed.to(dtype).contiguous()
    return features


def with_equal_pairs(features: Features, levels: int) -> Features:
    """Reconstructions that are their targets' copies, so that the map is flat."""
    copies = {
        reconstruction_name(view, index): features[target_name(view, index)].clone()
        for view in range(VIEWS)
        for index in range(levels)
    }
    return features | copies


def pairs_of(features: Features, levels: int) -> list[list[tuple[Any, Any]]]:
    return [
        [(features[target_name(view, index)], features[reconstruction_name(view, index)]) for index in range(levels)]
        for view in range(VIEWS)
    ]


def oracle_maps(features: Features, levels: int) -> np.ndarray:
    """(N, H, W) float64."""
    pairs = [
        [(t.double().cpu().numpy(), r.double().cpu().numpy()) for t, r in view] for view in pairs_of(features, levels)
    ]
    return fold_maps(level_distances(pairs), SIZE_WH, Scoring().blur_sigma)


# --- the ways: each takes features and gives (maps, scores) ------------------------------------------------------


def paper_way(torch: Any, levels: int) -> Callable[[Features], tuple[Any, Any]] | None:
    """Cosine and upsampling in PyTorch, map by map, then SciPy's blur on the CPU."""
    try:
        from scipy.ndimage import gaussian_filter
    except ImportError:
        return None
    functional = torch.nn.functional

    def run(features: Features) -> tuple[Any, Any]:
        total: Any = 0.0
        for view in pairs_of(features, levels):
            for target, reconstruction in view:
                distance = 1 - functional.cosine_similarity(target.float(), reconstruction.float())
                total = total + functional.interpolate(
                    distance[:, None], size=SIZE_WH[::-1], mode="bilinear", align_corners=True
                )
        maps = np.stack([gaussian_filter(item, sigma=Scoring().blur_sigma) for item in total[:, 0].cpu().numpy()])
        return maps, maps.max(axis=(1, 2))

    return run


def eager_way(torch: Any, levels: int) -> Callable[[Features], tuple[Any, Any]]:
    """All on the GPU, upsampling and blur folded into matrices: the best that plain PyTorch does."""
    width, height = SIZE_WH
    sigma = Scoring().blur_sigma
    folds: dict[int, tuple[Any, Any]] = {}

    def fold(side_h: int, side_w: int) -> tuple[Any, Any]:
        if side_h not in folds:
            rows = torch.tensor(fold_matrix(side_h, height, sigma), dtype=torch.float32, device=DEVICE)
            columns = torch.tensor(fold_matrix(side_w, width, sigma).T.copy(), dtype=torch.float32, device=DEVICE)
            folds[side_h] = rows, columns
        return folds[side_h]

    def distance(target: Any, reconstruction: Any) -> Any:
        target, reconstruction = target.float(), reconstruction.float()
        dot = (target * reconstruction).sum(1)
        norms = target.square().sum(1).sqrt().clamp_min(1e-8) * reconstruction.square().sum(1).sqrt().clamp_min(1e-8)
        return 1 - dot / norms

    def run(features: Features) -> tuple[Any, Any]:
        total: Any = 0.0
        views = pairs_of(features, levels)
        for index in range(levels):
            both = sum(distance(*view[index]) for view in views)
            rows, columns = fold(both.shape[1], both.shape[2])
            total = total + rows @ both @ columns
        return total, total.amax((1, 2))

    # Made before anything is compiled or captured.
    for stride in (4, 8, 16):
        fold(height // stride, width // stride)
    return run


def cupy_way(levels: int) -> Callable[[Features], tuple[Any, Any]] | None:
    """The same in CuPy."""
    try:
        import cupy
    except ImportError:
        return None
    width, height = SIZE_WH
    sigma = Scoring().blur_sigma
    sides = [(height // stride, width // stride) for stride in (4, 8, 16)]
    folds = [
        (
            cupy.asarray(fold_matrix(side_h, height, sigma), cupy.float32),
            cupy.asarray(fold_matrix(side_w, width, sigma).T, cupy.float32),
        )
        for side_h, side_w in sides
    ]

    def distance(target: Any, reconstruction: Any) -> Any:
        target, reconstruction = target.astype(cupy.float32), reconstruction.astype(cupy.float32)
        norms = cupy.maximum(cupy.sqrt((target * target).sum(1)), 1e-8)
        norms = norms * cupy.maximum(cupy.sqrt((reconstruction * reconstruction).sum(1)), 1e-8)
        return 1 - (target * reconstruction).sum(1) / norms

    def run(features: Features) -> tuple[Any, Any]:
        arrays = {name: cupy.from_dlpack(tensor) for name, tensor in features.items()}
        total: Any = 0.0
        views = pairs_of(arrays, levels)
        for index in range(levels):
            rows, columns = folds[index]
            total = total + rows @ sum(distance(*view[index]) for view in views) @ columns
        return total, total.max(axis=(1, 2))

    return run


# --- timing ------------------------------------------------------------------------------------------------------


def summary_us(times_ms: Sequence[float], launches: int) -> dict[str, float]:
    each = np.array(times_ms) * 1e3 / launches
    return {"median_us": round(float(np.median(each)), 3), "min_us": round(float(each.min()), 3)}


def time_torch(
    torch: Any, run: Callable[[Features], Any], sets: Sequence[Features], budget_s: float
) -> dict[str, float]:
    """Calls in a row over the feature sets, between two events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once() -> float:
        start.record()
        for features in sets:
            run(features)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    # The first call prepares whatever there is to prepare.
    once()
    until_s = time.perf_counter() + WARM_UP_S
    first_ms = once()
    while time.perf_counter() < until_s:
        first_ms = once()
    repeats = int(min(REPEATS, max(3, budget_s * 1e3 / max(first_ms, 1e-3))))
    return summary_us([once() for _ in range(repeats)], len(sets))


class TimedGraph:
    """A CUDA graph that takes its own time: from its first node to its last, whenever the host has launched it.

    Args:
        enqueue: what it holds.
        launches: that ``time`` counts it as.
    """

    def __init__(self, device: Device, stream: Stream, enqueue: Callable[[], None], launches: int) -> None:
        self._stream, self._launches = stream, launches
        self._start, self._end = device.event(), device.event()
        with stream.capture() as capture:
            stream.record(self._start)
            enqueue()
            stream.record(self._end)
        self._graph = capture.graph()

    def run(self) -> None:
        """Launch it and wait for it."""
        self._graph.launch(self._stream)
        self._stream.synchronize()

    def time(self) -> dict[str, float]:
        """Microseconds a launch."""
        until_s = time.perf_counter() + WARM_UP_S
        while time.perf_counter() < until_s:
            self.run()
        times_ms = []
        for _ in range(REPEATS):
            self.run()
            times_ms.append(self._end.ms_since(self._start))
        return summary_us(times_ms, self._launches)

    def __enter__(self) -> TimedGraph:
        return self

    def __exit__(self, *_error: object) -> None:
        for resource in (self._graph, self._start, self._end):
            resource.close()


class Kernels:
    """Our kernels over several feature sets, as one CUDA graph each for cold and warm."""

    def __init__(self, torch: Any, device: Device, sets: Sequence[Features], levels: int, scoring: Scoring) -> None:
        self._device = device
        first = sets[0][target_name(0, 0)]
        batch = first.shape[0]
        self._stream = device.stream()
        dtype = np.float16 if first.dtype == torch.float16 else np.float32
        levels_chw = [tuple(sets[0][target_name(0, index)].shape[1:]) for index in range(levels)]
        plan = AnomalyMapPlan(
            levels_chw, SIZE_WH, scoring, dtype=dtype, max_batch=batch, multiprocessors=device.multiprocessors
        )
        self.maps = torch.full((batch, *SIZE_WH[::-1]), float("nan"), device=DEVICE)
        self.scores = torch.full((batch,), float("nan"), device=DEVICE)
        torch.cuda.synchronize()
        modules = load_kernels(device)
        self._launchers = [
            AnomalyMapLauncher(
                device,
                modules,
                plan,
                {name: tensor.data_ptr() for name, tensor in features.items()},
                map_pointer=self.maps.data_ptr(),
                score_pointer=self.scores.data_ptr(),
                stream=self._stream,
            )
            for features in sets
        ]
        self._batch = batch

    def run_first(self) -> None:
        """The first feature set, waited for."""
        self._launchers[0].launch(self._batch, self._stream)
        self._stream.synchronize()

    def time(self, *, cold: bool) -> dict[str, float]:
        """Microseconds a launch of the whole map stage."""
        chosen = self._launchers if cold else self._launchers[:1]
        rounds = max(1, GRAPH_LAUNCHES // len(chosen))

        def enqueue() -> None:
            for _ in range(rounds):
                for launcher in chosen:
                    launcher.launch(self._batch, self._stream)

        with TimedGraph(self._device, self._stream, enqueue, rounds * len(chosen)) as graph:
            return graph.time()

    def close(self) -> None:
        for launcher in self._launchers:
            launcher.close()


def l2_bytes(torch: Any) -> int:
    """Size of the GPU's L2 cache."""
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def copy_bandwidth(torch: Any) -> float:
    """Bytes read plus bytes written a second, of a device-to-device copy of 1 GiB."""
    # Of zeros, some GPUs copy more.
    source = torch.randint(256, (1 << 30,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    best_ms = min(time_torch(torch, lambda _: target.copy_(source), [{}], 1.0)["min_us"] for _ in range(3)) / 1e3
    return 2 * source.numel() / (best_ms / 1e3)


# --- the whole ---------------------------------------------------------------------------------------------------


def measure(torch: Any, device: Device, name: str, batch: int, dtype_name: str, bandwidth: float) -> dict[str, Any]:
    """One model's geometry, batch and type: all ways."""
    levels_chw = LEVELS_CHW[name]
    levels = len(levels_chw)
    dtype = getattr(torch, dtype_name)
    feature_bytes = batch * 2 * VIEWS * sum(c * h * w for c, h, w in levels_chw) * torch.finfo(dtype).bits // 8
    count = min(MOST_SETS, max(2, -(-L2_TIMES * l2_bytes(torch) // feature_bytes)))
    sets = [make_features(torch, levels_chw, batch, dtype, seed) for seed in range(count)]
    torch.cuda.synchronize()
    # First and last image: the oracle takes seconds for a large batch.
    checked = sorted({0, batch - 1})
    wanted = oracle_maps({key: tensor[checked] for key, tensor in sets[0].items()}, levels)
    entry: dict[str, Any] = {
        "model": name,
        "batch": batch,
        "dtype": dtype_name,
        "feature_bytes": feature_bytes,
        "feature_sets": count,
        "floor_us": round(feature_bytes / bandwidth * 1e6, 3),
        "ways": {},
    }

    flat = [with_equal_pairs(features, levels) for features in sets]
    no_map = np.zeros_like(wanted)
    for what, rule, chosen, maps in (
        ("kernels, max", "max", sets, wanted),
        ("kernels, top", "top", sets, wanted),
        # As a good part's: the rule has to look at every pixel again.
        ("kernels, top of a flat map", "top", flat, no_map),
    ):
        scoring = Scoring(rule=rule)  # type: ignore[arg-type]
        kernels = Kernels(torch, device, chosen, levels, scoring)
        kernels.run_first()
        error = float(np.abs(kernels.maps[checked].cpu().numpy() - maps).max())
        scores = image_scores(kernels.maps.double().cpu().numpy(), scoring)
        score_error = float(np.abs(kernels.scores.cpu().numpy() - scores).max())
        if not (error <= BOUNDS[dtype_name] and score_error <= 1e-5):
            raise NotRightError(f"{what}: map error {error:g}, score error {score_error:g}")
        cold, warm = kernels.time(cold=True), kernels.time(cold=False)
        entry["ways"][what] = {
            "map_error": error,
            "cold": cold,
            "warm": warm,
            "bytes_per_s": round(feature_bytes / (cold["median_us"] / 1e6)),
            "share_of_copy_bandwidth": round(feature_bytes / (cold["median_us"] / 1e6) / bandwidth, 4),
        }
        kernels.close()
    with Sensors() as sensors:
        entry["sensors"] = sensors.read()

    # Else the shapes of earlier measurements count against the number of recompilations that are allowed.
    torch.compiler.reset()
    ways: dict[str, Callable[[Features], Any] | None] = {
        "PyTorch eager, folded": eager_way(torch, levels),
        "torch.compile, folded": torch.compile(eager_way(torch, levels), dynamic=False),
        "CuPy, folded": cupy_way(levels),
        "paper: PyTorch + SciPy": paper_way(torch, levels),
    }
    for way, run in ways.items():
        others = sets[:MOST_SETS_OF_OTHERS]
        found = "not installed" if run is None else measure_other(torch, run, others, checked, wanted)
        if isinstance(found, dict) and "cold" in found:
            ours_us = entry["ways"]["kernels, max"]["cold"]["median_us"]
            found["kernels_are_faster_by"] = round(found["cold"]["median_us"] / ours_us, 2)
        entry["ways"][way] = found
    return entry


def measure_other(
    torch: Any, run: Callable[[Features], Any], sets: Sequence[Features], checked: list[int], wanted: np.ndarray
) -> dict[str, Any]:
    """Error and time of another way, or why it did not run: that is a result too."""
    try:
        maps, _ = run(sets[0])
        maps = maps.get() if hasattr(maps, "get") else maps.cpu().numpy() if hasattr(maps, "cpu") else maps
        error = float(np.abs(maps[checked] - wanted).max())
        found = {
            "map_error": error,
            "cold": time_torch(torch, run, sets, 1.0),
            "warm": time_torch(torch, run, sets[:1], 0.5),
        }
    # Compilers and other libraries have errors of their own, and none of them may cost the other measurements.
    except Exception as failure:
        return {"failed": f"{type(failure).__name__}: {str(failure).splitlines()[0][:300]}"}
    # TF32 and FP16 products are allowed to them; the error says what it costs.
    return found if error <= 0.05 else {"failed": f"map error {error:g}"}


def measure_preprocess(device: Device, frame_wh: tuple[int, int]) -> dict[str, Any]:
    """A BGR frame to the network's FP16 input: error against the oracle, and the time of the kernel."""
    width, height = frame_wh
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    spec = InputSpec(size_wh=SIZE_WH, resize_wh=SIZE_WH, mean=mean, std=std)
    plan = PreprocessPlan(spec, frame_wh, "bgr8", dtype=np.float16)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    with ExitStack() as stack:
        stream = stack.enter_context(closing(device.stream()))
        frame = stack.enter_context(closing(device.upload(image, stream)))
        constants = stack.enter_context(closing(device.upload(plan.constants, stream)))
        out = stack.enter_context(closing(device.allocate(2 * 3 * SIZE_WH[0] * SIZE_WH[1])))
        pinned = stack.enter_context(closing(device.allocate_pinned(out.size_bytes)))
        launcher = PreprocessLauncher(
            load_kernels(device),
            plan,
            source_pointer=frame.pointer,
            source_pitch=3 * width,
            out_pointer=out.pointer,
            constants_pointer=constants.pointer,
        )
        launcher.launch(stream)
        stream.copy_to_host(pinned.array, out.pointer)
        stream.synchronize()
        found = pinned.array.view(np.float16).reshape(3, *SIZE_WH[::-1])
        error = float(np.abs(found - preprocess(image, spec)).max())
        if not error <= 2e-3:
            raise NotRightError(f"error {error:g}")

        def enqueue() -> None:
            for _ in range(GRAPH_LAUNCHES):
                launcher.launch(stream)

        graph = stack.enter_context(TimedGraph(device, stream, enqueue, GRAPH_LAUNCHES))
        return {
            "frame_wh": list(frame_wh),
            "frame_bytes": image.nbytes,
            "error": error,
            "warm": graph.time(),
        }


def measure_frame(torch: Any, device: Device, model: str, frame_wh: tuple[int, int]) -> dict[str, Any]:
    """One frame from page-locked memory to its score, without the network: on the GPU, and until the host has it."""
    width, height = frame_wh
    spec = InputSpec(size_wh=SIZE_WH, resize_wh=SIZE_WH, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    plan = PreprocessPlan(spec, frame_wh, "bgr8", dtype=np.float16)
    features = make_features(torch, LEVELS_CHW[model], 1, torch.float16, 0)
    torch.cuda.synchronize()
    map_plan = AnomalyMapPlan(
        LEVELS_CHW[model], SIZE_WH, Scoring(), dtype=np.float16, max_batch=1, multiprocessors=device.multiprocessors
    )
    with ExitStack() as stack:
        stream = stack.enter_context(closing(device.stream()))
        kernels = stack.enter_context(closing(load_kernels(device)))
        host = stack.enter_context(closing(device.allocate_pinned(3 * width * height)))
        host.array[:] = np.random.default_rng(0).integers(0, 256, host.array.size, dtype=np.uint8)
        frame = stack.enter_context(closing(device.allocate(host.size_bytes)))
        network_input = stack.enter_context(closing(device.allocate(2 * 3 * SIZE_WH[0] * SIZE_WH[1])))
        anomaly_map = stack.enter_context(closing(device.allocate(4 * SIZE_WH[0] * SIZE_WH[1])))
        score = stack.enter_context(closing(device.allocate(4)))
        score_host = stack.enter_context(closing(device.allocate_pinned(4)))
        constants = stack.enter_context(closing(device.upload(plan.constants, stream)))
        preprocessing = PreprocessLauncher(
            kernels,
            plan,
            source_pointer=frame.pointer,
            source_pitch=3 * width,
            out_pointer=network_input.pointer,
            constants_pointer=constants.pointer,
        )
        mapping = stack.enter_context(
            closing(
                AnomalyMapLauncher(
                    device,
                    kernels,
                    map_plan,
                    {name: tensor.data_ptr() for name, tensor in features.items()},
                    map_pointer=anomaly_map.pointer,
                    score_pointer=score.pointer,
                    stream=stream,
                )
            )
        )

        def enqueue() -> None:
            stream.copy_to_device(frame.pointer, host.array)
            preprocessing.launch(stream)
            mapping.launch(1, stream)
            stream.copy_to_host(score_host.array, score.pointer)

        # A kernel is loaded when it is launched for the first time, which must not be captured.
        enqueue()
        stream.synchronize()
        graph = stack.enter_context(TimedGraph(device, stream, enqueue, 1))
        on_gpu = graph.time()
        wanted = oracle_maps(features, len(LEVELS_CHW[model])).max()
        error = abs(float(score_host.array.view(np.float32)[0]) - wanted)
        if not error <= BOUNDS["float16"]:
            raise NotRightError(f"score error {error:g}")
        host_us = []
        for _ in range(HOST_REPEATS):
            started_s = time.perf_counter()
            graph.run()
            host_us.append((time.perf_counter() - started_s) * 1e6)
        return {
            "model": model,
            "frame_wh": list(frame_wh),
            "gpu": on_gpu,
            "host_us": {name: round(float(np.percentile(host_us, q)), 2) for name, q in (("p50", 50), ("p99", 99))},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--batches", default="1,8,32", help="batch sizes, default 1,8,32")
    parser.add_argument("--models", default=",".join(LEVELS_CHW), help="default all")
    parser.add_argument("--dtypes", default="float16,float32", help="default both")
    options = parser.parse_args()
    try:
        import torch

        if not torch.cuda.is_available():
            raise MissingError("PyTorch sees no GPU")
        device = open_device()
    except (ImportError, MissingError) as reason:
        print(f"skipped: {reason}", file=sys.stderr)
        sys.exit(EXIT_SKIPPED)
    torch.cuda.init()
    with ExitStack() as stack:
        stack.enter_context(device)
        stack.enter_context(device.current())
        bandwidth = copy_bandwidth(torch)
        report: dict[str, Any] = {
            "format": "recontrast-edge.kernel-benchmark",
            "version": 1,
            "machine": {name: fact for name, fact in machine_facts().items() if name in ("os", "cpu", "jetson")},
            "gpu": device.name,
            "compute_capability": list(device.compute_capability),
            "multiprocessors": device.multiprocessors,
            "binding": device.binding,
            "torch": torch.__version__,
            "copy_bytes_per_s": round(bandwidth),
            "excluded": "the network; the features are on the GPU already and the result stays there",
            "results": [],
            "frame": [],
            "preprocess": [],
            "failed": [],
        }
        print(f"{device.name}: copies {bandwidth / 1e9:.0f} GB/s (read + written)")
        jobs: list[tuple[str, str, Callable[[], dict[str, Any]], Callable[[dict[str, Any]], None]]] = []
        for model in options.models.split(","):
            for dtype in options.dtypes.split(","):
                for batch in map(int, options.batches.split(",")):
                    run = partial(measure, torch, device, model, batch, dtype, bandwidth)
                    jobs.append(("results", f"{model}, batch {batch}, {dtype}", run, show))
            for frame_wh in FRAMES_WH:
                run = partial(measure_frame, torch, device, model, frame_wh)
                jobs.append(("frame", f"a frame of {frame_wh}, {model}", run, show_frame))
        for frame_wh in FRAMES_WH:
            jobs.append(
                ("preprocess", f"preprocessing {frame_wh}", partial(measure_preprocess, device, frame_wh), print)
            )
        for key, what, job, tell in jobs:
            try:
                entry = job()
            # Libraries have errors of their own, and none of them may cost the other measurements.
            except Exception as error:
                report["failed"].append({"what": what, "why": f"{type(error).__name__}: {str(error)[:500]}"})
                print(f"\nerror: {what}: {error}")
            else:
                report[key].append(entry)
                tell(entry)
            torch.cuda.empty_cache()
            if options.json is not None:
                # After every entry, so that a run that is cut off leaves what it has.
                with atomic_write(options.json) as file:
                    file.write(json.dumps(report, indent=2).encode() + b"\n")
    sys.exit(1 if report["failed"] else 0)


def show_frame(entry: dict[str, Any]) -> None:
    print(
        f"  a frame of {entry['frame_wh']} without the network: {entry['gpu']['median_us']:.1f} us on the GPU, "
        f"{entry['host_us']['p50']:.1f} us until the host has its score (p99 {entry['host_us']['p99']:.1f})"
    )


def show(entry: dict[str, Any]) -> None:
    what = f"{entry['model']}, batch {entry['batch']}, {entry['dtype']}"
    print(f"\n{what}: {entry['feature_bytes'] / 1e6:.1f} MB of features, floor {entry['floor_us']:.1f} us")
    for way, found in entry["ways"].items():
        if isinstance(found, str) or "failed" in found:
            print(f"  {way:26} {found if isinstance(found, str) else found['failed']}")
            continue
        share = found.get("share_of_copy_bandwidth")
        faster = found.get("kernels_are_faster_by")
        more = f", {share:.0%} of the copy bandwidth" if share is not None else f", the kernels are {faster}x faster"
        print(
            f"  {way:26} {found['cold']['median_us']:10.1f} us cold, {found['warm']['median_us']:10.1f} us warm, "
            f"error {found['map_error']:.1e}{more}"
        )


if __name__ == "__main__":
    main()
