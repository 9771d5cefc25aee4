"""The documentation does what it says: its commands run, its generated pages and its tables are those of the code.

python -m pytest tests/test_docs.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from recontrast_edge.camera_plan import CameraPlan
from recontrast_edge.cli.reference import reference
from recontrast_edge.engines import open_engine
from recontrast_edge.frame import Frame, Judgement
from recontrast_edge.pipeline import Line
from recontrast_edge.plan import Comparison, Parity, PlanInfo
from recontrast_edge.proof import Calibration, Conversion, Flip, Proof, Quantisation, Rate
from recontrast_edge.sources import open_source
from recontrast_edge.spec import InputSpec, ModelSpec, Scoring, Threshold
from recontrast_edge.task import Product
from recontrast_edge.verdict import Fault

ROOT = Path(__file__).parent.parent
ARTIFACTS = ROOT / "docs" / "artifacts.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)(?P<target>[^)#\s]+)[^)]*\)")


def shell_blocks(page: Path) -> list[tuple[str, str]]:
    """(why it is not run, commands) of each ``sh`` block; the reason is empty for those that are."""
    blocks = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        language, _, note = match["info"].partition(" ")
        if language == "sh":
            blocks.append((note, match["body"]))
    return blocks


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_blocks_are_marked_so_that_they_are_checked(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(BLOCK.findall(text)), "a block is not closed, or not at the line's start"
    languages = {match["info"].split(" ")[0] for match in BLOCK.finditer(text)}
    assert languages <= {"sh", "text", "json", "python", "toml"}, "commands belong in a block marked sh"
    for note, _ in shell_blocks(page):
        assert not note or re.fullmatch(r"no-run: \S.+", note), f"expected ```sh or ```sh no-run: REASON, got {note!r}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(not note for note, _ in shell_blocks(page))], ids=page_id
)
def test_commands_run(page: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the commands train")
    commands = tmp_path / "bin"
    commands.mkdir()
    command = commands / "recontrast-edge"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m recontrast_edge "$@"\n')
    command.chmod(0o755)
    folder = tmp_path / "work"
    folder.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "train", "export")),
    }
    for note, body in shell_blocks(page):
        if note:
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", body],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"ended with {done.returncode}:\n{body}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    missing = [match["target"] for match in LINK.finditer(text) if not (page.parent / match["target"]).exists()]
    assert not missing


def test_command_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_exit_codes_are_up_to_date() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "recontrast_edge.errors"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8") == printed.stdout, "run `make docs`"


def test_fault_codes_are_up_to_date() -> None:
    rows = [f"| `{fault.value}` | {fault.meaning} |" for fault in Fault]
    assert "\n".join(rows) in ARTIFACTS.read_text(encoding="utf-8"), (
        "python -m recontrast_edge.verdict prints the table"
    )


def documented(section: str) -> set[str]:
    """Names in the first column of a section's tables."""
    text = re.split(r"^## ", ARTIFACTS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (body,) = (part for part in text if part.startswith(f"{section}\n"))
    return {
        name for line in re.findall(r"^\| (`[^|]+) \|", body, re.MULTILINE) for name in re.findall(r"`([^`]+)`", line)
    }


def spec_fields(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names of the leaves; provenance and the list of levels count as leaves."""
    nested = {"input": InputSpec, "scoring": Scoring, "threshold": Threshold}
    names = set()
    for name in model.model_fields:
        names |= spec_fields(nested[name], f"{name}.") if name in nested else {prefix + name}
    return names


def test_every_field_of_the_spec_is_documented() -> None:
    assert documented("The spec") == spec_fields(ModelSpec) | {"threshold"}


def test_every_field_of_a_plan_is_documented() -> None:
    parts = {*Calibration.model_fields, *Comparison.model_fields, *Conversion.model_fields, *Parity.model_fields}
    precisions = {"--precision", "fp32", "fp16", "int8"}
    assert documented("The plan") - precisions == set(PlanInfo.model_fields)
    text = ARTIFACTS.read_text(encoding="utf-8")
    assert not [name for name in parts if f"`{name}`" not in text]


def test_every_field_of_a_proof_is_documented() -> None:
    assert documented("Proofs") == set(Proof.model_fields)
    text = ARTIFACTS.read_text(encoding="utf-8")
    parts = {*Flip.model_fields, *Rate.model_fields, *Quantisation.model_fields}
    assert not [name for name in parts if f"`{name}`" not in text]


def test_every_field_of_a_record_is_documented() -> None:
    frame = Frame(frame_id=0, source="part.png", image=None, captured_s=0.0, fault="unreadable_image")
    record = Judgement(frame, "FAULT", None, 0.5).record()
    assert documented("Records") == set(record) | {fault.value for fault in Fault}


def test_every_field_of_a_summary_is_documented() -> None:
    uri = "synthetic://mixed?frames=1&fps=0"
    with open_engine("demo") as engine:
        line = Line([CameraPlan(uri, lambda: open_source(uri), Product(engine, 1.0))])
        line.run()
        summary = line.summary()
    (camera,) = summary["cameras"]
    (product,) = camera["products"]
    assert documented("Summary") == set(summary)
    text = ARTIFACTS.read_text(encoding="utf-8")
    assert not [name for name in (*camera, *product, *product["engine"]) if f"`{name}`" not in text]
