"""The kernels as machine code of one GPU: compiled where no packaged image fits, and kept on disk.

    image = compiled_kernels((8, 7))  # a cubin for sm_87

NVRTC compiles (it comes with the CUDA toolkit and as a package), or nvcc where there is no NVRTC. Images are kept in
the user's cache (see ``user_cache``), named after architecture, sources and compiler, so that nothing stale is ever
taken. Where no compiler is, one that another compiler made of the same sources will do.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Protocol

from recontrast_edge.errors import MissingError, ModelError
from recontrast_edge.kernels import SOURCE
from recontrast_edge.user_cache import cache_folder, read_cached, write_cached

CACHE_KIND = "kernels"


class Compiler(Protocol):
    """Compiles CUDA C++ to a cubin."""

    name: str
    """With its version."""

    def compile(self, source: Path, architecture: str) -> bytes:
        """Compile a file, which includes others of its folder, for e.g. ``sm_87``.

        Raises:
            ModelError: with the compiler's message.
        """
        ...


class Nvrtc:
    """NVRTC through cuda-bindings.

    Raises:
        MissingError: cuda-bindings or NVRTC is missing.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import nvrtc
        except ImportError as error:
            raise MissingError(f"cuda-bindings cannot be imported ({error})") from None
        self._nvrtc = nvrtc
        try:
            major, minor = self._call("nvrtcVersion")
        except RuntimeError as error:
            # The binding looks for the library at the first call.
            raise MissingError(f"NVRTC is missing ({str(error).strip().splitlines()[0]})") from None
        self.name = f"NVRTC {major}.{minor}"

    def _call(self, function: str, *arguments: Any) -> Any:
        code, *results = getattr(self._nvrtc, function)(*arguments)
        if code != self._nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise ModelError(f"{function} failed: {code.name}")
        return results[0] if len(results) == 1 else tuple(results)

    def compile(self, source: Path, architecture: str) -> bytes:
        """See ``Compiler.compile``."""
        options = [f"-arch={architecture}".encode(), b"-std=c++17", f"-I{source.parent}".encode()]
        program = self._call("nvrtcCreateProgram", source.read_bytes(), source.name.encode(), 0, None, None)
        try:
            code, *_ = self._nvrtc.nvrtcCompileProgram(program, len(options), options)
            if code != self._nvrtc.nvrtcResult.NVRTC_SUCCESS:
                log = b" " * self._call("nvrtcGetProgramLogSize", program)
                self._call("nvrtcGetProgramLog", program, log)
                raise _not_compiled(self.name, architecture, log.rstrip(b"\0 ").decode(errors="replace") or code.name)
            image: bytes = b" " * self._call("nvrtcGetCUBINSize", program)
            self._call("nvrtcGetCUBIN", program, image)
            return image
        finally:
            self._nvrtc.nvrtcDestroyProgram(program)


class Nvcc:
    """nvcc, as a program.

    Raises:
        MissingError: there is none.
    """

    def __init__(self) -> None:
        homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
        folders = [str(Path(home) / "bin") for home in (*homes, "/usr/local/cuda") if home]
        program = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))
        if program is None:
            raise MissingError("nvcc is missing")
        self._program = program
        version = re.search(r"V(\d+\.\d+\.\d+)", self._run("--version"))
        self.name = f"nvcc {version[1] if version else 'of unknown version'}"

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run([self._program, *arguments], capture_output=True, text=True)
        except OSError as error:
            raise MissingError(f"nvcc does not start ({error})") from None
        if done.returncode:
            raise ModelError((done.stderr or done.stdout).strip() or f"nvcc ended with {done.returncode}")
        return done.stdout

    def compile(self, source: Path, architecture: str) -> bytes:
        """See ``Compiler.compile``."""
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "kernels.cubin"
            try:
                self._run("-cubin", f"-arch={architecture}", "-std=c++17", "-o", str(output), str(source))
            except ModelError as error:
                raise _not_compiled(self.name, architecture, str(error)) from None
            return output.read_bytes()


def _not_compiled(compiler: str, architecture: str, log: str) -> ModelError:
    lines = [line for line in log.splitlines() if line.strip()]
    return ModelError(
        f"{compiler} cannot compile the CUDA kernels for {architecture}: {' / '.join(lines[:3])[:500]}; a GPU newer "
        "than the compiler needs a newer CUDA toolkit"
    )


def find_compiler() -> Compiler:
    """NVRTC, else nvcc.

    Raises:
        MissingError: neither is there.
    """
    try:
        return Nvrtc()
    except MissingError as no_nvrtc:
        try:
            return Nvcc()
        except MissingError as no_nvcc:
            raise MissingError(
                f"the CUDA kernels have to be compiled for this GPU, but there is no compiler: {no_nvrtc}; {no_nvcc}. "
                f"Install one: pip install {_nvrtc_package()} (of the driver's CUDA version or older), or a CUDA "
                "toolkit"
            ) from None


def _nvrtc_package() -> str:
    """The package that brings the NVRTC which cuda-bindings looks for: that of its own major version."""
    try:
        major = version("cuda-bindings").partition(".")[0]
    except PackageNotFoundError:
        return "cuda-bindings and nvidia-cuda-nvrtc, for CUDA 12 'cuda-bindings==12.*' and nvidia-cuda-nvrtc-cu12"
    return "nvidia-cuda-nvrtc-cu12" if major == "12" else f"'nvidia-cuda-nvrtc=={major}.*'"


def compiled_kernels(compute_capability: tuple[int, int]) -> bytes:
    """The kernels for a GPU, from the cache or compiled now.

    Raises:
        MissingError: they have to be compiled and no compiler is there.
        ModelError: they cannot be compiled for this GPU.
    """
    architecture = "sm_{}{}".format(*compute_capability)
    with as_file(files("recontrast_edge.kernels") / SOURCE) as source:
        digest = hashlib.sha256()
        for path in sorted([*source.parent.glob("*.cu"), *source.parent.glob("*.cuh")]):
            content = path.read_bytes()
            digest.update(f"\0{path.name}\0{len(content)}\0".encode())
            digest.update(content)
        of_sources = f"{architecture}-{digest.hexdigest()[:32]}"
        try:
            compiler = find_compiler()
        except MissingError:
            image = _of_any_compiler(of_sources)
            if image is None:
                raise
            return image
        name = f"{of_sources}-{hashlib.sha256(compiler.name.encode()).hexdigest()[:16]}.cubin"
        image = read_cached(CACHE_KIND, name)
        if image is None:
            image = compiler.compile(source, architecture)
            write_cached(CACHE_KIND, name, image)
    return image


def _of_any_compiler(of_sources: str) -> bytes | None:
    """A kept image of these sources and architecture."""
    try:
        names = sorted(path.name for path in cache_folder(CACHE_KIND).glob(f"{of_sources}-*.cubin"))
    except OSError:
        return None
    return next((image for name in names if (image := read_cached(CACHE_KIND, name)) is not None), None)
