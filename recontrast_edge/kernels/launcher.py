"""The launch plans at work on a GPU: kernels loaded, constants uploaded, workspaces zeroed, then only launches.

    launcher = AnomalyMapLauncher(device, kernels, plan, features, map_pointer=m, score_pointer=s, stream=stream)
    launcher.launch(batch=1, stream=stream)

Nothing here allocates, waits or compiles after construction.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.resources import files

from recontrast_edge.cuda import CudaError, Device, Module, Stream
from recontrast_edge.cuda.compiler import compiled_kernels
from recontrast_edge.errors import ModelError
from recontrast_edge.kernels import FATBIN, KERNELS, AnomalyMapPlan, PreprocessPlan

_log = logging.getLogger(__name__)


def load_kernels(device: Device) -> Module:
    """The kernels, from the packaged fatbin where it has code for this GPU, else compiled for it.

    Raises:
        MissingError: they have to be compiled and no compiler is there.
        ModelError: they cannot be compiled for this GPU, or not be loaded; a CudaError where its memory is full.
    """
    fatbin = files("recontrast_edge.kernels") / FATBIN
    if fatbin.is_file():
        try:
            return _loaded(device, fatbin.read_bytes())
        except CudaError as error:
            # Without an image for this GPU, or its PTX newer than the driver: not every binding tells which.
            _log.info("the packaged kernels do not fit this GPU (%s); compiling them for it", error)
    image = compiled_kernels(device.compute_capability)
    try:
        return _loaded(device, image)
    except CudaError as error:
        if "out of memory" in str(error):
            raise
        raise ModelError(
            f"the kernels that were compiled for this GPU cannot be loaded: {error}; most likely NVRTC, or nvcc, is of "
            "a newer CUDA version than the driver, see `recontrast-edge doctor`: uninstall it, and install one of the "
            "driver's version or older"
        ) from None


def _loaded(device: Device, image: bytes) -> Module:
    """With all kernels: by default the driver loads each only when asked for it, and may find no code for it then."""
    module = device.load(image)
    try:
        for kernel in KERNELS:
            module.function(kernel)
    except CudaError:
        module.close()
        raise
    return module


class AnomalyMapLauncher:
    """Features to maps and scores, for one stream.

    Args:
        features: device pointer of each tensor; see ``AnomalyMapPlan.params``, as for the other pointers.
        stream: where the constants are uploaded; waits until they are there.

    Raises:
        CudaError: no memory.
    """

    def __init__(
        self,
        device: Device,
        kernels: Module,
        plan: AnomalyMapPlan,
        features: Mapping[str, int],
        *,
        map_pointer: int,
        score_pointer: int,
        stream: Stream,
    ) -> None:
        self._kernels = kernels
        self._constants = device.upload(plan.constants, stream)
        self._workspace = device.allocate(plan.workspace_bytes)
        self._params = plan.params(
            features,
            map_pointer=map_pointer,
            score_pointer=score_pointer,
            workspace_pointer=self._workspace.pointer,
            constants_pointer=self._constants.pointer,
        )
        self._launches = {batch: plan.launches(batch) for batch in range(1, plan.max_batch + 1)}
        self.reset(stream)

    def reset(self, stream: Stream) -> None:
        """Enqueue zeroing the workspace: before the first launch, and after one that failed half-way."""
        stream.zero(self._workspace.pointer, self._workspace.size_bytes)

    def launch(self, batch: int, stream: Stream) -> None:
        """Enqueue the kernels for the first ``batch`` images."""
        for launch in self._launches[batch]:
            stream.launch(self._kernels, launch, self._params)

    def close(self) -> None:
        """Free workspace and constants; may be called again."""
        self._workspace.close()
        self._constants.close()


class PreprocessLauncher:
    """Camera frames of one size to one image of the network's input, for one stream.

    Args:
        source_pointer, source_pitch, out_pointer: see ``PreprocessPlan.params``.
        constants_pointer: ``plan.constants`` on the GPU, which may serve several launchers.
        chroma_pointer, chroma_pitch: of NV12.
    """

    def __init__(
        self,
        kernels: Module,
        plan: PreprocessPlan,
        *,
        source_pointer: int,
        source_pitch: int,
        out_pointer: int,
        constants_pointer: int,
        chroma_pointer: int = 0,
        chroma_pitch: int = 0,
    ) -> None:
        self._kernels = kernels
        self._launches = plan.launches()
        self._params = plan.params(
            source_pointer=source_pointer,
            source_pitch=source_pitch,
            out_pointer=out_pointer,
            constants_pointer=constants_pointer,
            chroma_pointer=chroma_pointer,
            chroma_pitch=chroma_pitch,
        )

    def launch(self, stream: Stream) -> None:
        """Enqueue the kernel."""
        for launch in self._launches:
            stream.launch(self._kernels, launch, self._params)
