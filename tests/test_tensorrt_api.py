"""Every TensorRT function that the project calls exists, and takes such arguments, in each version that it is for.

python -m pytest tests/test_tensorrt_api.py

The Python packages are the real ones, of the oldest and newest versions (``tests/install_gpu_packages.sh`` fetches
them); only the libraries below are missing, so nothing is computed.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recontrast_export.trt import OLDEST
from tests.kernels.host import COMPILER

ROOT = Path(__file__).parent.parent
PACKAGES = Path(sys.prefix) / "gpu-packages"
SOURCES = [
    ROOT / "recontrast_edge/engines/tensorrt.py",
    ROOT / "recontrast_edge/engines/tensorrt_context.py",
    ROOT / "recontrast_edge/engines/tensorrt_slot.py",
    ROOT / "export/recontrast_export/trt.py",
]

# What is called, and with what: names of Python or of the package's classes; None is for a property.
CALLS: dict[str, tuple[str, ...] | None] = {
    "Runtime.__init__": ("ILogger",),
    "Runtime.deserialize_cuda_engine": ("bytes",),
    "ICudaEngine.num_io_tensors": None,
    "ICudaEngine.get_tensor_name": ("int",),
    "ICudaEngine.get_tensor_mode": ("str",),
    "ICudaEngine.get_tensor_shape": ("str",),
    "ICudaEngine.get_tensor_format": ("str",),
    "ICudaEngine.get_tensor_dtype": ("str",),
    "ICudaEngine.get_tensor_profile_shape": ("str", "int"),
    "ICudaEngine.device_memory_size_v2": None,
    "ICudaEngine.create_engine_inspector": (),
    "EngineInspector.get_engine_information": ("LayerInformationFormat",),
    "IExecutionContext.set_device_memory": ("int", "int"),
    "IExecutionContext.set_tensor_address": ("str", "int"),
    "IExecutionContext.set_input_shape": ("str", "tuple"),
    "IExecutionContext.execute_async_v3": ("int",),
    "Builder.__init__": ("ILogger",),
    "Builder.create_network": ("int",),
    "Builder.create_builder_config": (),
    "Builder.create_optimization_profile": (),
    "Builder.build_serialized_network": ("INetworkDefinition", "IBuilderConfig"),
    "IOptimizationProfile.set_shape": ("str", "tuple", "tuple", "tuple"),
    "OnnxParser.__init__": ("INetworkDefinition", "ILogger"),
    "OnnxParser.parse": ("bytes",),
    "OnnxParser.num_errors": None,
    "OnnxParser.get_error": ("int",),
    "ParserError.node_name": (),
    "ParserError.node_operator": (),
    "ParserError.desc": (),
    "INetworkDefinition.num_layers": None,
    "INetworkDefinition.get_layer": ("int",),
    "INetworkDefinition.num_inputs": None,
    "INetworkDefinition.get_input": ("int",),
    "INetworkDefinition.num_outputs": None,
    "INetworkDefinition.get_output": ("int",),
    "ILayer.name": None,
    "ILayer.type": None,
    "ILayer.num_inputs": None,
    "ILayer.get_input": ("int",),
    "ILayer.num_outputs": None,
    "ILayer.get_output": ("int",),
    "ITensor.name": None,
    "ITensor.dtype": None,
    "ITensor.shape": None,
    "ITensor.allowed_formats": None,
    "IBuilderConfig.add_optimization_profile": ("IOptimizationProfile",),
    "IBuilderConfig.set_memory_pool_limit": ("MemoryPoolType", "int"),
    "IBuilderConfig.profiling_verbosity": None,
    "IBuilderConfig.progress_monitor": None,
    "IBuilderConfig.set_flag": ("BuilderFlag",),
    "IBuilderConfig.clear_flag": ("BuilderFlag",),
}
OF_TENSORRT: dict[str, tuple[str, ...] | None] = {
    "ICudaEngine.create_execution_context": ("ExecutionContextAllocationStrategy",),
    "IBuilderConfig.create_timing_cache": ("bytes",),
    "IBuilderConfig.set_timing_cache": ("ITimingCache", "bool"),
    "IBuilderConfig.get_timing_cache": (),
    "ITimingCache.serialize": (),
}
OF_RTX: dict[str, tuple[str, ...] | None] = {
    "ICudaEngine.create_execution_context": ("IRuntimeConfig",),
    "ICudaEngine.create_runtime_config": (),
    "IRuntimeConfig.set_execution_context_allocation_strategy": ("ExecutionContextAllocationStrategy",),
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy": None,
    "IRuntimeConfig.create_runtime_cache": (),
    "IRuntimeConfig.set_runtime_cache": ("IRuntimeCache",),
    "IRuntimeCache.serialize": (),
    "IRuntimeCache.deserialize": ("bytes",),
    "IBuilderConfig.num_compute_capabilities": None,
    "IBuilderConfig.set_compute_capability": ("ComputeCapability", "int"),
}
"""TensorRT lacks these."""

MEMBERS = {
    "ExecutionContextAllocationStrategy": {"USER_MANAGED"},
    "TensorIOMode": {"INPUT"},
    "TensorFormat": {"LINEAR"},
    "DataType": {"FLOAT", "HALF", "INT8"},
    "BuilderFlag": {"TF32"},
    "MemoryPoolType": {"WORKSPACE"},
    "ProfilingVerbosity": {"DETAILED"},
    "LayerInformationFormat": {"JSON"},
    "NetworkDefinitionCreationFlag": {"STRONGLY_TYPED"},
}
MEMBERS_OF_RTX = {
    "DynamicShapesKernelSpecializationStrategy": {"EAGER"},
    "BuilderFlag": {"REQUIRE_USER_ALLOCATION"},
    "ComputeCapability": {"SM86", "SM120"},
}

# What documentation of other generations calls the same; a tuple becomes a Dims by itself.
SPELLINGS = {"int": {"int", "SupportsInt"}, "bytes": {"buffer", "Buffer"}, "tuple": {"tuple", "Dims"}}


@pytest.fixture(scope="module")
def apis() -> dict[str, dict[str, Any]]:
    """What each package holds, by the folder's name."""
    if COMPILER is None:
        pytest.skip("g++ builds what stands in for TensorRT's libraries")
    folders = sorted(PACKAGES.glob("*/tensorrt*_bindings")) if PACKAGES.is_dir() else []
    if not folders:
        pytest.skip(f"no Python packages of TensorRT in {PACKAGES}; tests/install_gpu_packages.sh fetches them")
    found = {}
    for folder in folders:
        arguments = ["-m", "tests.tensorrt_api", str(folder.parent), folder.name]
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[folder.parent.name] = json.loads(done.stdout)
    return found


def parameters(signature: str) -> list[tuple[str, bool]]:
    """Of a method as the package documents it, without ``self``: each type's short name, and whether it may be left."""
    inside = signature[signature.index("(") + 1 : signature.rindex(") -> ")]
    parts = re.split(r", (?=\w+: )", inside)
    types = [re.match(r"\w+: ([\w.:\[\]]+)( = )?", part) for part in parts]
    # As C++ names what was not yet known to Python then.
    return [(re.split(r"\.(?=[A-Z])|::", match[1])[-1], bool(match[2])) for match in types if match][1:]


def takes(signature: str, arguments: tuple[str, ...]) -> bool:
    expected = parameters(signature)
    required = [kind for kind, optional in expected if not optional]
    return len(required) <= len(arguments) <= len(expected) and all(
        kind in SPELLINGS.get(argument, {argument}) for argument, (kind, _) in zip(arguments, expected, strict=False)
    )


def test_signatures_are_read_rightly() -> None:
    shape = "2. set_shape(self: a.b.Profile, input: str, min: a.b.Dims, max: a.b.Dims = <Dims.X: 0>) -> None"
    assert parameters(shape) == [("str", False), ("Dims", False), ("Dims", True)]
    assert takes(shape, ("str", "tuple"))
    assert takes(shape, ("str", "tuple", "tuple"))
    assert not takes(shape, ("str",))
    assert not takes(shape, ("int", "tuple"))
    assert not takes(shape, ("str", "tuple", "tuple", "tuple"))
    cache = "set_cache(self: a.Config, cache: nvinfer1::IRuntimeCache = None, size: typing.SupportsInt = 1) -> bool"
    assert takes(cache, ("IRuntimeCache", "int"))
    assert takes("now(self: a.Config) -> nvinfer1::Cache", ())


def test_the_oldest_and_a_newer_generation_are_here(apis: dict[str, dict[str, Any]]) -> None:
    versions = {tuple(int(number) for number in api["version"].split(".")[:2]) for api in apis.values()}
    assert set(OLDEST.values()) <= versions
    assert (11, 4) in versions


def test_every_call_exists_with_such_arguments(apis: dict[str, dict[str, Any]]) -> None:
    for version, found in apis.items():
        own = OF_RTX if "IRuntimeCache" in found["api"] else OF_TENSORRT
        for name, arguments in {**CALLS, **own}.items():
            kind, member = name.split(".")
            signatures = found["api"][kind]["signatures"]
            assert member in signatures, f"{version}: {name} is missing"
            if arguments is None:
                assert all(line.startswith("(") for line in signatures[member]), f"{version}: {name} is no property"
            else:
                assert any(takes(line, arguments) for line in signatures[member]), (version, name, signatures[member])


def test_every_value_exists(apis: dict[str, dict[str, Any]]) -> None:
    for version, found in apis.items():
        is_rtx = "IRuntimeCache" in found["api"]
        for name, members in [*MEMBERS.items(), *(MEMBERS_OF_RTX.items() if is_rtx else ())]:
            assert members <= set(found["api"][name]["members"]), (version, name)
        assert {"ERROR", "INTERNAL_ERROR", "WARNING", "Severity"} <= set(found["api"]["ILogger"]["signatures"]), version
        # What is used where it is there; were it renamed, nothing else would say so.
        has_strict_nans = "STRICT_NANS" in found["api"]["BuilderFlag"]["members"]
        assert has_strict_nans is not found["version"].startswith("10.3."), version
        if not is_rtx:
            # By these the project tells the two apart.
            assert "DynamicShapesKernelSpecializationStrategy" not in found["api"], version
            assert "REQUIRE_USER_ALLOCATION" not in found["api"]["BuilderFlag"]["members"], version


def test_no_call_is_forgotten_here(apis: dict[str, dict[str, Any]]) -> None:
    """Of all names that TensorRT's classes have, those that our sources use are among the calls above."""
    used = {
        node.attr
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr.islower()
    }
    calls = {**CALLS, **OF_TENSORRT, **OF_RTX}
    kinds = {name.split(".")[0] for name in calls}
    checked = {name.split(".")[1] for name in calls}
    # Our own.
    others = {"builder", "logger", "precision", "reset"}
    for version, found in apis.items():
        known = {key for kind in kinds & found["api"].keys() for key in found["api"][kind]["signatures"]}
        left = (used & known) - checked - others
        assert not left, (version, sorted(left))


def test_without_a_driver_the_library_does_not_start(apis: dict[str, dict[str, Any]]) -> None:
    for version, found in apis.items():
        assert re.search(r"does not start.*driver is missing or too old", found["refusals"]["build"]), version
        # Which the engine makes a message of.
        assert "nullptr" in found["refusals"]["runtime"], version
