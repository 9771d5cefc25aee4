"""Execution contexts of a TensorRT engine: what a network needs to run batches of one size.

    contexts = ExecutionContexts(library, engine, reason, key="...")
    context = contexts.make(scratch)

A captured CUDA graph is bound to the context that it was captured from, with its shapes and addresses, so every batch
size has a context of its own. What they compute in, by far the most memory, is lent to them: contexts that never run at
the same time share it. TensorRT for RTX compiles kernels for the GPU at hand when an engine is opened; they are kept on
disk for the next time.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any

from recontrast_edge.cuda import DeviceMemory
from recontrast_edge.errors import GpuError
from recontrast_edge.user_cache import read_cached, write_cached

_log = logging.getLogger(__name__)

CACHE_KIND = "tensorrt-rtx"


class ExecutionContexts:
    """Makes the execution contexts of one engine. To be closed before the engine is given up.

    Args:
        library: the module ``tensorrt`` or ``tensorrt_rtx``.
        engine: its ``ICudaEngine``.
        reason: the library's last error, for messages.
        key: what compiled kernels are kept for: engine, GPU and library version. Only TensorRT for RTX has any.
    """

    def __init__(self, library: Any, engine: Any, reason: Callable[[], str], *, key: tuple[str, ...]) -> None:
        self._engine = engine
        self._reason = reason
        self._kernels: CompiledKernels | None = None
        managed = library.ExecutionContextAllocationStrategy.USER_MANAGED
        # What `create_execution_context` takes: RTX has a configuration, TensorRT the strategy alone.
        self._setup: Any = managed
        strategies = getattr(library, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is not None:
            self._setup = engine.create_runtime_config()
            self._setup.set_execution_context_allocation_strategy(managed)
            # By default better kernels are swapped in while frames run: then a frame's score could change from one
            # minute to the next, and a captured graph would keep the slow ones for ever.
            self._setup.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            self._kernels = CompiledKernels(self._setup, key)

    @property
    def scratch_bytes(self) -> int:
        """What any context computes in, for the largest batch."""
        return int(self._engine.device_memory_size_v2)

    def make(self, scratch: DeviceMemory) -> Any:
        """A new ``IExecutionContext``, for one batch size, that computes in ``scratch``.

        Contexts with the same ``scratch`` must run on the same stream.

        Raises:
            GpuError: the library gives none.
        """
        context = self._engine.create_execution_context(self._setup)
        if context is None:
            raise GpuError(f"no execution context{self._reason()}; most likely the GPU's memory is full")
        context.set_device_memory(scratch.pointer, scratch.size_bytes)
        return context

    def keep_kernels(self) -> None:
        """Write what was compiled for the contexts so far, unless it is on disk already."""
        if self._kernels is not None:
            self._kernels.keep()

    def close(self) -> None:
        """Let go of the engine; may be called again. Contexts must be gone before."""
        # The configuration refers to the cache.
        self._setup = None
        self._kernels = self._engine = None


class CompiledKernels:
    """TensorRT for RTX's runtime cache, kept in a file.

    The library itself refuses what another version, GPU or driver wrote.

    Args:
        config: the ``IRuntimeConfig`` that the contexts are made with.
        key: see ``ExecutionContexts``.
    """

    def __init__(self, config: Any, key: tuple[str, ...]) -> None:
        self._name = f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.cache"
        self._cache = config.create_runtime_cache()
        content = read_cached(CACHE_KIND, self._name)
        if content is not None and not self._cache.deserialize(content):
            _log.warning("%s cache: %s is of another driver, or damaged, and not used", CACHE_KIND, self._name)
            content = None
        self._kept_sha256 = _sha256(content or b"")
        self._used = bool(config.set_runtime_cache(self._cache))
        if not self._used:
            _log.warning("%s takes no cache; kernels are compiled whenever the engine is opened", CACHE_KIND)

    def keep(self) -> None:
        """Write the cache, unless the file holds the same."""
        serialized = self._cache.serialize() if self._used else None
        content = b"" if serialized is None else bytes(serialized)
        if _sha256(content) != self._kept_sha256:
            write_cached(CACHE_KIND, self._name, content)
            self._kept_sha256 = _sha256(content)


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
