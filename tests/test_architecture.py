"""The rules of the design that the source text itself must keep, checked on the syntax tree.

python -m pytest tests/test_architecture.py
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "recontrast_edge": ROOT / "recontrast_edge",
    "recontrast_train": ROOT / "train" / "recontrast_train",
    "recontrast_export": ROOT / "export" / "recontrast_export",
}
FORBIDDEN = {
    "recontrast_edge": {"torch", "torchvision", "onnx", "onnxsim", "recontrast_train", "recontrast_export"},
    "recontrast_train": {"recontrast_export"},
    "recontrast_export": set[str](),
}
# The commands that hand over to the other packages, inside a function, once a command of theirs was asked for.
DISPATCHERS = [
    PACKAGES["recontrast_edge"] / "cli" / name for name in ("train.py", "export.py", "quantize.py", "build.py")
]
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

SOURCES = [
    (package, path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
    for package, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
]


def imports(nodes: Iterable[ast.AST]) -> Iterator[tuple[ast.stmt, str]]:
    """Every import statement among the nodes, with the dotted name of the module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node, "." * node.level + (node.module or "")


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the name of what is called, as written: ``torch.load``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def at(path: Path, node: ast.stmt | ast.expr) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"


def test_every_package_is_looked_at() -> None:
    assert {package for package, _, _ in SOURCES} == set(PACKAGES)


def test_imports_keep_the_one_direction() -> None:
    wrong = [
        at(path, node)
        for package, path, tree in SOURCES
        if path not in DISPATCHERS
        for node, module in imports(ast.walk(tree))
        if module.split(".")[0] in FORBIDDEN[package] or module.startswith(".")
    ]
    assert not wrong, "not even inside a function; write the package's name, no relative imports"


def test_imports_by_name_do_not_get_round_it() -> None:
    wrong = [
        at(path, call)
        for package, path, tree in SOURCES
        if path not in DISPATCHERS
        for call, name in calls(tree)
        if name.split(".")[-1] in {"import_module", "__import__"}
        and any(
            isinstance(argument, ast.Constant) and str(argument.value).split(".")[0] in FORBIDDEN[package]
            for argument in call.args
        )
    ]
    assert not wrong


def test_nothing_unpickles() -> None:
    wrong = [
        at(path, node)
        for _, path, tree in SOURCES
        for node, module in imports(ast.walk(tree))
        if module.split(".")[0] in PICKLERS
    ]
    for _, path, tree in SOURCES:
        for call, name in calls(tree):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            unsafe_load = name == "torch.load" and options.get("weights_only") != "True"
            if unsafe_load or options.get("allow_pickle") == "True":
                wrong.append(at(path, call))
    assert not wrong, "a pickle runs the code of whoever wrote it"


def test_package_data_comes_from_importlib_resources() -> None:
    wrong = [
        at(path, node)
        for _, path, tree in SOURCES
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "__file__"
    ]
    assert not wrong


def test_every_module_opens_with_its_purpose() -> None:
    wrong = [str(path.relative_to(ROOT)) for _, path, tree in SOURCES if not ast.get_docstring(tree)]
    assert not wrong


def test_command_modules_import_nothing_heavy() -> None:
    """Every command pays for these imports before it knows which one is wanted."""
    light = {*sys.stdlib_module_names, "typer"}
    wrong = [
        at(path, node)
        for _, path, tree in SOURCES
        if path.parent == PACKAGES["recontrast_edge"] / "cli"
        for node, module in imports(tree.body)
        if module.split(".")[0] not in light
        and module != "recontrast_edge.errors"
        and not module.startswith("recontrast_edge.cli")
    ]
    assert not wrong, "import it inside the command"
