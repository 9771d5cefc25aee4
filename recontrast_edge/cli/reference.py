"""The command line's reference, from the commands themselves: ``docs/cli.md`` is what this prints.

python -m recontrast_edge.cli.reference > docs/cli.md
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from typer.models import ParameterInfo

from recontrast_edge.cli import app

_TYPE_NAMES = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH", bool: ""}


def reference() -> str:
    """All commands with their arguments and options, as one Markdown page."""
    # Importing registers them.
    from recontrast_edge.cli import commands  # noqa: F401

    page = [
        "<!-- Generated: make docs -->",
        "# Command line",
        "",
        f"`recontrast-edge [--version] COMMAND ...`: {app.info.help}",
        "",
        "Every command has `-h` and `--help`. How commands end: [exit codes](exit-codes.md).",
    ]
    callbacks = {info.name or _command_name(info.callback): info.callback for info in app.registered_commands}
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        page += ["", *_section(name, command, callbacks[name])]
    return "\n".join(page) + "\n"


def _command_name(callback: Any) -> str:
    return str(callback.__name__).replace("_", "-")


def _section(name: str, command: Any, callback: Any) -> Iterator[str]:
    hints, declared = _declarations(callback)
    parameters = [parameter for parameter in command.params if parameter.name in declared]
    arguments = [parameter for parameter in parameters if parameter.param_type_name == "argument"]
    options = [parameter for parameter in parameters if parameter.param_type_name == "option"]
    usage = ["recontrast-edge", name]
    usage += [_argument_name(argument) for argument in arguments]
    for option in options:
        if option.required:
            usage.append(f"{option.opts[0]} {_value(hints[option.name], declared[option.name])}")
    if any(not option.required for option in options):
        usage.append("[OPTIONS]")
    yield from (f"## {name}", "", inspect.cleandoc(command.help), "", f"    {' '.join(usage)}", "")
    yield from ("| option | value | default | meaning |", "| --- | --- | --- | --- |")
    for parameter in [*arguments, *options]:
        info = declared[parameter.name]
        names = [_argument_name(parameter)] if parameter in arguments else [*parameter.opts, *parameter.secondary_opts]
        value = _value(hints[parameter.name], info)
        if value:
            value = f"`{value}`{_range(info)}"
        # Where the command finds the default itself, the help text ends with it.
        text, _, default = " ".join(info.help.split()).removesuffix("]").partition(" [default: ")
        cells = (", ".join(f"`{name}`" for name in names), value, default or _default(parameter), text)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _declarations(callback: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Type and ``typer.Option`` or ``typer.Argument`` of each parameter, written as its default or in ``Annotated``."""
    declared = {}
    annotated = typing.get_type_hints(callback, include_extras=True)
    for parameter in inspect.signature(callback).parameters.values():
        candidates = [*getattr(annotated[parameter.name], "__metadata__", ()), parameter.default]
        declared[parameter.name] = next(info for info in candidates if isinstance(info, ParameterInfo))
    return typing.get_type_hints(callback), declared


def _argument_name(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _value(hint: Any, info: Any) -> str:
    """What stands for an option's value: its metavar, its choices, or its type; empty for a switch."""
    if info.metavar:
        return str(info.metavar)
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "|".join(members)
    if origin in (types.UnionType, typing.Union):
        return _value(next(member for member in members if member is not type(None)), info)
    if origin is list:
        return f"{_value(members[0], info)} ..."
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "|".join(str(member.value) for member in hint)
    return _TYPE_NAMES[hint]


def _range(info: Any) -> str:
    if info.min is None and info.max is None:
        return ""
    if info.max is None:
        return f", at least {info.min}"
    return f", at most {info.max}" if info.min is None else f", {info.min} to {info.max}"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    if default is None or default == [] or default == ():
        return ""
    if isinstance(default, Enum):
        return f"`{default.value}`"
    if isinstance(default, bool):
        names = parameter.opts if default else parameter.secondary_opts
        return f"`{names[0]}`" if names else ""
    return f"`{default}`"


if __name__ == "__main__":
    print(reference(), end="")
