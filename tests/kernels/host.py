"""The kernels' own source on the host: build it, launch it as the plan says, get arrays back.

host = Host(build(folder))
maps, scores = host.anomaly_map(features, plan)
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast_edge.kernels import SOURCE, AnomalyMapPlan, Launch, PreprocessPlan

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
CONSTANTS = 30


def kernel_folder() -> Path:
    """The folder of the CUDA sources, as installed."""
    # By way of a file: where an editable install adds a fatbin, the package is two folders.
    with as_file(files("recontrast_edge.kernels") / SOURCE) as source:
        return source.parent


def build(folder: Path, *, sanitizer: str | None = None) -> Path:
    """Compile the kernels and their host launcher to a shared library in ``folder``."""
    assert COMPILER is not None
    library = folder / f"host_kernels_{sanitizer or 'plain'}.so"
    options = [f"-fsanitize={sanitizer}"] if sanitizer else []
    subprocess.run(
        [
            COMPILER,
            *("-std=c++17", "-O1", "-g", "-shared", "-fPIC", "-pthread", *options),
            *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"),
            f"-I{kernel_folder()}",
            *(str(HERE / "host_kernels.cpp"), "-o", str(library)),
        ],
        check=True,
    )
    return library


class Host:
    """The built kernels. ``teams`` blocks run at a time, in an order drawn from ``seed``."""

    def __init__(self, library: Path, *, teams: int = 1, seed: int = 0) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.host_constants.restype = ctypes.POINTER(ctypes.c_long)
        self._library.host_key_of.restype = ctypes.c_uint
        self._library.host_value_of.restype = ctypes.c_float
        self.teams = teams
        self.seed = seed

    def constants(self) -> list[int]:
        return list(self._library.host_constants()[:CONSTANTS])

    def key_of(self, value: np.float32) -> int:
        """The score's key of a map value."""
        return int(self._library.host_key_of(ctypes.c_uint(value.view(np.uint32))))

    def value_of(self, key: int) -> float:
        return float(self._library.host_value_of(ctypes.c_uint(key)))

    def leave_out(self, file: str, line: int) -> None:
        """Make the barrier or fence at this line do nothing from now on."""
        self._library.host_leave_out(file.encode(), line)

    def launch(self, launch: Launch, params: ctypes.Structure) -> None:
        assert launch.block[1:] == (1, 1)
        misaligned = self._library.host_launch(
            launch.kernel.encode(),
            ctypes.byref(params),
            (ctypes.c_uint * 3)(*launch.grid),
            ctypes.c_uint(launch.block[0]),
            ctypes.c_size_t(launch.shared_bytes),
            ctypes.c_uint(self.teams),
            ctypes.c_uint(self.seed),
        )
        assert misaligned >= 0, f"no kernel {launch.kernel}"
        assert misaligned == 0, f"{launch.kernel}: {misaligned} misaligned vector loads"

    def anomaly_map(
        self,
        features: Mapping[str, NDArray[Any]],
        plan: AnomalyMapPlan,
        *,
        before: Sequence[Mapping[str, NDArray[Any]]] = (),
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Maps (N, height, width) and scores (N,) of feature tensors named as in a ``features`` graph.

        The features of ``before`` are judged first, in the same workspace, as a stream of frames is.
        """
        batch = next(iter(features.values())).shape[0]
        width, height = plan.size_wh
        maps = np.full((batch, height, width), np.nan, np.float32)
        scores = np.full(batch, np.nan, np.float32)
        workspace = np.zeros(plan.workspace_bytes, np.uint8)
        constants = plan.constants.copy()
        for frame in (*before, features):
            maps[:], scores[:] = np.nan, np.nan
            params = plan.params(
                {name: tensor.ctypes.data for name, tensor in frame.items()},
                map_pointer=maps.ctypes.data,
                score_pointer=scores.ctypes.data,
                workspace_pointer=workspace.ctypes.data,
                constants_pointer=constants.ctypes.data,
            )
            for launch in plan.launches(batch):
                self.launch(launch, params)
        return maps, scores

    def preprocess(
        self,
        source: NDArray[np.uint8],
        plan: PreprocessPlan,
        *,
        chroma: NDArray[np.uint8] | None = None,
    ) -> NDArray[Any]:
        """The network's input (3, height, width) from a frame whose rows are ``strides[0]`` bytes apart."""
        width, height = plan.spec.size_wh
        out = np.full((3, height, width), np.nan, plan.dtype)
        constants = plan.constants.copy()
        params = plan.params(
            source_pointer=source.ctypes.data,
            source_pitch=source.strides[0],
            out_pointer=out.ctypes.data,
            constants_pointer=constants.ctypes.data,
            chroma_pointer=0 if chroma is None else chroma.ctypes.data,
            chroma_pitch=0 if chroma is None else chroma.strides[0],
        )
        for launch in plan.launches():
            self.launch(launch, params)
        return out
