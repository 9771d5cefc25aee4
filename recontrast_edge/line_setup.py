"""From a configuration to a line that can run: its engines, cameras, outputs, and what merges their verdicts.

with ExitStack() as stack: products = open_products(config, stack); line = Line(camera_plans(config, products))
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from recontrast_edge.artifact import describe
from recontrast_edge.bounded import call_bounded
from recontrast_edge.camera_plan import CameraPlan
from recontrast_edge.config import CameraConfig, LineConfig, ProductConfig
from recontrast_edge.engines import Engine, open_engine
from recontrast_edge.errors import ModelError, SourceError
from recontrast_edge.frame import Frame, Sink, Source
from recontrast_edge.parts import PartMerger
from recontrast_edge.pipeline import warm_up
from recontrast_edge.secrets import masked_uri
from recontrast_edge.sinks import Opener, sink_opener
from recontrast_edge.sources import check_source, open_source
from recontrast_edge.spec import InputSpec
from recontrast_edge.task import Product
from recontrast_edge.uri_paths import changed_paths, confine, output_path
from recontrast_edge.verdict import check_threshold, resolve_threshold
from recontrast_edge.webmerge import open_merger

ENGINE_CLOSE_S = 0.5
"""How long is waited for an engine to close, in seconds."""


def check_line(config: LineConfig) -> None:
    """Check what can be checked without a camera: places, models with their thresholds, outputs' and sources' options.

    Raises:
        UsageError, InputError, SourceError, ModelError, MissingError: the line would not start.
    """
    check_places(config)
    output_openers(config)
    for name, product in config.products.items():
        artifact = describe(product.engine)
        if artifact.kind not in ("onnx", "plan"):
            raise ModelError(f"{product.engine}: expected an .onnx or .plan file as engine of product {name}")
        check_threshold(artifact.path, artifact.spec, artifact.details["engine_sha256"], product.threshold)
    for camera in config.cameras.values():
        try:
            check_source(camera.source)
        except SourceError:
            if not camera.wait_for_source:
                raise


def check_places(config: LineConfig) -> None:
    """Refuse what would be written, moved or deleted outside of the line's roots.

    Raises:
        UsageError: with the place.
    """
    for uri in config.outputs:
        confine(f"output {uri!r}", output_path(uri), config.roots)
    for camera in config.cameras.values():
        _confine_source(camera.source, config)
    if config.summary is not None:
        confine("summary", Path(config.summary), config.roots)


def open_products(config: LineConfig, stack: ExitStack) -> dict[str, Product]:
    """Open every engine once and let it judge an image; the stack closes them.

    Raises:
        ModelError, MissingError: see ``engines.open_engine`` and ``verdict.resolve_threshold``.
    """
    engines: dict[str, Engine] = {}
    products: dict[str, Product] = {}
    for name, product in config.products.items():
        engine = engines.get(product.engine)
        if engine is None:
            engine = engines[product.engine] = open_engine(product.engine, threads=config.threads)
            # One that hangs must not keep the process from ending.
            stack.callback(call_bounded, engine.close, timeout_s=ENGINE_CLOSE_S, name=f"close {product.engine}")
        products[name] = Product(engine, resolve_threshold(engine, product.threshold))
    for engine in engines.values():
        warm_up(engine)
    return products


def camera_plans(config: LineConfig, products: dict[str, Product]) -> list[CameraPlan]:
    """One plan for each camera. A single one has no name in the records."""
    return [
        _plan(config, name if len(config.cameras) > 1 else None, camera, config.products_of(name), products)
        for name, camera in config.cameras.items()
    ]


def _plan(
    config: LineConfig,
    name: str | None,
    camera: CameraConfig,
    chosen: dict[str, ProductConfig],
    products: dict[str, Product],
) -> CameraPlan:
    several = len(chosen) > 1
    return CameraPlan(
        masked_uri(camera.source),
        lambda: _open(camera.source, config),
        {product: products[product] for product in chosen} if several else products[next(iter(chosen))],
        product_of=_by_part_id(chosen) if several else None,
        name=name,
        mode=camera.mode,
        queue_frames=camera.queue_frames,
        gate_delay_s=camera.gate_delay_s,
        gate_reserve_s=camera.gate_reserve_s,
        watch=camera.watch,
        retry=camera.retry,
        fault_period_s=camera.fault_period_s,
        merger=open_merger(camera.source, gate_reserve_s=camera.gate_reserve_s),
    )


def _open(uri: str, config: LineConfig) -> Source:
    # Each time, because a link may have changed since.
    _confine_source(uri, config)
    return open_source(uri)


def _confine_source(uri: str, config: LineConfig) -> None:
    for path in changed_paths(uri):
        confine(f"source {uri!r}", path, config.roots)


def _by_part_id(products: dict[str, ProductConfig]) -> Callable[[Frame], str | None]:
    """Chooses the one product whose pattern matches a frame's part id; none where none or several do."""
    patterns = [(name, re.compile(product.part_ids or "")) for name, product in products.items()]

    def choose(frame: Frame) -> str | None:
        names = [name for name, pattern in patterns if pattern.fullmatch(frame.part_id or "")]
        return names[0] if len(names) == 1 and frame.part_id is not None else None

    return choose


def parts_merger(config: LineConfig) -> PartMerger | None:
    """What makes one verdict of a part's views; None where each has its own."""
    parts = config.parts
    if parts is None:
        return None
    reserve_s = parts.gate_reserve_s
    if reserve_s is None:
        reserve_s = max(config.cameras[name].gate_reserve_s for name in parts.cameras)
    return PartMerger(parts.cameras, window_s=parts.window_s, gate_reserve_s=reserve_s)


def output_openers(config: LineConfig) -> list[Opener]:
    """Check the outputs' options and load what they need; touches no file.

    Raises:
        UsageError, InputError, MissingError: see ``sinks.sink_opener``.
    """
    return [_confined(uri, config) for uri in config.outputs]


def _confined(uri: str, config: LineConfig) -> Opener:
    open_sink = sink_opener(uri)

    def open_inside(input_spec: InputSpec) -> Sink:
        confine(f"output {uri!r}", output_path(uri), config.roots)
        return open_sink(input_spec)

    return open_inside
