"""What importing costs, and that the runtime imports without the training and export packages' dependencies.

python -m pytest tests/test_imports.py
"""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest

import recontrast_edge

HEAVY = {"av", "cv2", "numpy", "onnx", "onnxruntime", "PIL", "pydantic", "rich", "scipy", "torch"}
RUNTIME = sorted(module.name for module in pkgutil.walk_packages(recontrast_edge.__path__, "recontrast_edge."))


def modules_after(code: str) -> set[str]:
    """Top-level names in ``sys.modules`` of a fresh interpreter that ran ``code``."""
    code += "\nimport json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_imports_nothing_heavy() -> None:
    assert not modules_after("import recontrast_edge") & (HEAVY | {"typer"})


def test_the_command_line_imports_nothing_heavy() -> None:
    """Registering all commands is what every call pays for, before it knows which one is wanted."""
    assert not modules_after("import recontrast_edge.cli.commands") & HEAVY


def test_every_runtime_module_imports_without_torch_and_onnx() -> None:
    blocked = ["onnx", "onnxsim", "recontrast_export", "recontrast_train", "safetensors", "torch", "torchvision"]
    modules = [name for name in RUNTIME if not name.endswith(".__main__")]
    assert len(modules) > 10
    code = f"import sys, importlib\nfor name in {blocked}: sys.modules[name] = None\n"
    modules_after(code + f"for name in {modules}: importlib.import_module(name)")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], []])
def test_the_module_runs_as_the_command(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "recontrast_edge", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    # Without arguments it prints its help and ends as a wrong command line does.
    assert done.returncode == (0 if arguments else 2), done.stderr
    assert "recontrast" in done.stdout
