"""Plans and their sidecars: whole and together, or refused before anything is deserialised."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from recontrast_edge.errors import ModelError
from recontrast_edge.plan import Parity, PlanInfo, read_sidecar, sidecar_path, verify_plan, write_spec
from recontrast_edge.spec import InputSpec, Level, ModelSpec, Threshold

PLAN = bytes(range(256)) * 8


@pytest.fixture
def info() -> PlanInfo:
    return PlanInfo(
        spec=ModelSpec(
            class_name="tile",
            backbone="resnet18",
            input=InputSpec(size_wh=(64, 32), resize_wh=(64, 32), mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3)),
            levels=(Level(stride=4, channels=64),),
            weights_sha256="1" * 64,
        ),
        flavor="tensorrt",
        library_version="10.3.0.26",
        compute_capability="8.7",
        gpu="Orin",
        precision="fp16",
        head="features",
        batch=(1, 1, 4),
        plan_sha256=hashlib.sha256(PLAN).hexdigest(),
        onnx="model.onnx",
        onnx_sha256="2" * 64,
        calibration=None,
        parity=Parity(graph=None, engine=None, note="a test"),
        software={"recontrast-edge": "0"},
    )


@pytest.fixture
def plan(tmp_path: Path, info: PlanInfo) -> Path:
    path = tmp_path / "model.plan"
    path.write_bytes(PLAN)
    sidecar_path(path).write_text(info.dumps())
    return path


def edit(plan: Path, **changes: Any) -> None:
    body = json.loads(sidecar_path(plan).read_text())
    sidecar_path(plan).write_text(json.dumps({**body, **changes}))


def test_a_whole_plan_is_read_with_its_sidecar(plan: Path, info: PlanInfo) -> None:
    assert sidecar_path(plan).name == "model.plan.json"
    assert verify_plan(plan) == (info, PLAN)


@pytest.mark.parametrize("version", ["10.3", "10.3.0.26", "10.13.3.9.post1", "1.7.1.116"])
def test_the_versions_that_libraries_have_are_taken(plan: Path, version: str) -> None:
    edit(plan, library_version=version)
    assert verify_plan(plan)[0].library_version == version


@pytest.mark.parametrize("at", [0, 1023, 2047])
def test_one_flipped_bit_is_refused(plan: Path, at: int) -> None:
    content = bytearray(PLAN)
    content[at] ^= 1
    plan.write_bytes(content)
    with pytest.raises(ModelError, match=r"SHA-256 differs.*recontrast-edge build .*model\.onnx"):
        verify_plan(plan)


@pytest.mark.parametrize("length", [0, 1, len(PLAN) - 1])
def test_a_truncated_plan_is_refused(plan: Path, length: int) -> None:
    plan.write_bytes(PLAN[:length])
    with pytest.raises(ModelError, match=f"{length} bytes"):
        verify_plan(plan)


def test_missing_files_are_refused(plan: Path) -> None:
    sidecar_path(plan).unlink()
    with pytest.raises(ModelError, match=r"model\.plan\.json: no such file"):
        verify_plan(plan)
    with pytest.raises(ModelError, match=r"other\.plan: no such file"):
        verify_plan(plan.with_name("other.plan"))
    with pytest.raises(ModelError, match="is a folder"):
        verify_plan(plan.parent)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"{}", b"[" * 100_000, b'{"format": 1}'])
def test_a_broken_sidecar_is_refused(plan: Path, content: bytes) -> None:
    sidecar_path(plan).write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.plan\.json: (not valid JSON|expected format)"):
        verify_plan(plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"version 2 is newer .* upgrade recontrast-edge"),
        ({"version": True}, "version True is not"),
        ({"version": None}, "version None is not"),
        ({"format": "recontrast-edge.spec"}, "not the sidecar of an engine"),
        ({"spec": None}, "not a recontrast-edge spec"),
        ({"plan_sha256": "2"}, "plan_sha256: "),
        ({"compute_capability": "sm87"}, "compute_capability: "),
        ({"compute_capability": None}, "bound to one compute capability"),
        ({"flavor": "tensorflow"}, "flavor: "),
        ({"library_version": "10.3.0.26.1"}, "library_version: "),
        ({"library_version": "10.3.post"}, "library_version: "),
        ({"precision": "fp8"}, "precision: "),
        ({"batch": [1, 4, 2]}, "smallest <= optimal <= largest"),
        ({"batch": [0, 1, 1]}, r"batch\.0: "),
        ({"batch": [1, 1]}, "batch"),
        ({"onnx_sha256": None}, "onnx_sha256: "),
        ({"colour": "red"}, "colour: "),
    ],
)
def test_other_versions_and_values_out_of_range_are_refused(plan: Path, changes: dict[str, Any], message: str) -> None:
    edit(plan, **changes)
    with pytest.raises(ModelError, match=message):
        verify_plan(plan)


def test_an_edited_spec_is_refused(plan: Path) -> None:
    envelope = json.loads(sidecar_path(plan).read_text())["spec"]
    envelope["spec"]["scoring"]["blur_sigma"] = 2.0
    edit(plan, spec=envelope)
    with pytest.raises(ModelError, match="changed after it was written"):
        verify_plan(plan)


def test_a_threshold_goes_into_the_sidecar_only(plan: Path, info: PlanInfo) -> None:
    spec = info.spec.with_threshold(Threshold(value=0.5, method="manual", engine_sha256=info.plan_sha256))
    write_spec(plan, spec)
    found, content = verify_plan(plan)
    assert found.spec == spec
    assert found.model_copy(update={"spec": info.spec}) == info
    assert content == PLAN
    assert sorted(entry.name for entry in plan.parent.iterdir()) == ["model.plan", "model.plan.json"]


def test_the_command_that_builds_it_again(plan: Path) -> None:
    folder = plan.parent / "line 1"
    command = shlex.split(read_sidecar(plan).build_command(folder / "a.plan", changes={"flavor": "tensorrt-rtx"}))
    assert command[:3] == ["recontrast-edge", "build", str(folder / "model.onnx")]
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options == {
        "--out": str(folder / "a.plan"),
        "--precision": "fp16",
        "--flavor": "tensorrt-rtx",
        "--batch": "1,1,4",
    }
