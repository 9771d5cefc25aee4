"""Run folders: what training leaves behind and export reads.

    model, spec = load_run(Path("runs/tiles"))

``model.safetensors`` holds the weights, ``model.json`` the spec; see ``docs/artifacts.md``.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import safetensors
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from recontrast_edge.artifact import SPEC_FILE, WEIGHTS_FILE
from recontrast_edge.errors import ModelError
from recontrast_edge.images import atomic_write
from recontrast_edge.spec import ModelSpec
from recontrast_train.int8_model import SCALES, Int8ReContrast
from recontrast_train.model import ReContrast

HOLDOUT_FILE = "holdout.txt"
"""Lists the good images that training left out; paths are relative to the run folder."""


def copy_holdout(run: Path, folder: Path) -> None:
    """Give a folder the list of images that another run left out, if that has one; paths are made to lead there.

    Raises:
        OutputError: the folder cannot be written.
    """
    if not (run / HOLDOUT_FILE).is_file():
        return
    lines = []
    for line in (run / HOLDOUT_FILE).read_text(encoding="utf-8", errors="replace").splitlines():
        path, *rest = line.split("\t")
        if path and not path.startswith("#"):
            path = os.path.relpath((run / path).resolve(), folder.resolve())
        lines.append("\t".join([path, *rest]))
    with atomic_write(folder / HOLDOUT_FILE) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def weights_bytes(model: ReContrast) -> bytes:
    """The model's state as a safetensors file's bytes."""
    return save_tensors({key: value.contiguous().cpu() for key, value in model.state_dict().items()})


def save_run(folder: Path, weights: bytes, spec: ModelSpec) -> None:
    """Write weights, then spec; the spec names the weights' digest, so a kill between the two is noticed.

    Raises:
        OutputError: the folder cannot be written.
    """
    with atomic_write(folder / WEIGHTS_FILE) as file:
        file.write(weights)
    with atomic_write(folder / SPEC_FILE) as file:
        file.write(spec.dumps().encode())


def load_run(folder: Path) -> tuple[ReContrast, ModelSpec]:
    """The trained model, in eval mode on the CPU, and its spec; an ``Int8ReContrast`` if it was fine-tuned for INT8.

    Raises:
        ModelError: not a run folder, not finished, damaged, or weights and spec that do not belong together.
    """
    spec_path, weights_path = folder / SPEC_FILE, folder / WEIGHTS_FILE
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such run folder; `recontrast-edge train DATA --out {folder}` makes one")
    if not spec_path.is_file() or not weights_path.is_file():
        raise ModelError(
            f"{folder}: expected {SPEC_FILE} and {WEIGHTS_FILE} of a finished training; "
            "finish it with `recontrast-edge train ... --resume`"
        )
    spec = ModelSpec.loads(spec_path.read_bytes(), where=str(spec_path))
    weights = weights_path.read_bytes()
    if hashlib.sha256(weights).hexdigest() != spec.weights_sha256:
        raise ModelError(
            f"{weights_path}: these are not the weights that {spec_path} describes (SHA-256 differs); train again"
        )
    has_discriminator = spec.scoring.discriminator_weight is not None
    try:
        state = load_tensors(weights)
        kind = Int8ReContrast if any(name.startswith(SCALES) for name in state) else ReContrast
        model = kind(spec.backbone, discriminator=has_discriminator)
        model.load_state_dict(state)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"{weights_path}: not the weights of a {spec.backbone} model ({str(error).splitlines()[0]})"
        ) from None
    model.eval()
    return model, spec
