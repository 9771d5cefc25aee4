"""All commands, in the order that ``--help`` lists them; importing one registers it."""

from __future__ import annotations

from importlib import import_module

# One module a command, by name; a plain list keeps the order of `--help`.
MODULES = (
    "train",
    "export",
    "quantize",
    "build",
    "evaluate",
    "calibrate",
    "run",
    "cameras",
    "demo",
    "bench",
    "synth",
    "info",
    "doctor",
)

for _module in MODULES:
    import_module(f"recontrast_edge.cli.{_module}")
