"""The table of what lower precision changed, from the proofs that files of ``quantize`` and ``build`` carry.

    python benchmarks/precision.py tiles.int8.onnx tiles.plan --json precision.json

Nothing runs here: each row is the proof of one file, of the engine itself where ``build`` could run it. That the proof
belongs to the file is checked as when the file is used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recontrast_edge.doctor import published_facts
from recontrast_edge.errors import ModelError, RecontrastError
from recontrast_edge.images import atomic_write
from recontrast_edge.onnxfile import read_spec
from recontrast_edge.plan import verify_plan
from recontrast_edge.proof import Conversion, Proof, read_quantisation

HEADINGS = [
    "file",
    "precision",
    "work in INT8",
    "verdicts changed",
    "I-AUROC loss",
    "AUPRO loss",
    "map correlation (worst image)",
]


@dataclass(frozen=True)
class Row:
    """What one file says about itself."""

    file: str
    backbone: str
    size_wh: tuple[int, int]
    precision: str
    conversion: Conversion
    proof: Proof

    @classmethod
    def read(cls, path: Path) -> Row:
        """Of an ``.onnx`` file or a plan.

        Raises:
            ModelError: missing or damaged, or without a proof.
        """
        if path.suffix == ".onnx":
            record, spec = read_quantisation(path), read_spec(path)
            if record is None:
                raise ModelError(f"{path}: carries no proof; expected what `recontrast-edge quantize` wrote")
            tuned = record.precision == "int8" and record.calibration is None
            precision = record.precision.upper() + ", fine-tuned" * tuned
            return cls(path.name, spec.backbone, spec.input.size_wh, precision, record.conversion, record.proof)
        plan, _ = verify_plan(path)
        proof = plan.parity.engine_proof or plan.parity.graph_proof
        if proof is None:
            raise ModelError(f"{path}: carries no proof; build it with --validation")
        return cls(
            path.name, plan.spec.backbone, plan.spec.input.size_wh, plan.precision.upper(), plan.conversion, proof
        )

    def cells(self) -> list[str]:
        proof, flips = self.proof, self.proof.verdict_flips
        return [
            f"`{self.file}`: {self.backbone}, {self.size_wh[0]}x{self.size_wh[1]}, {proof.images}",
            self.precision,
            f"{100 * self.conversion.int8_macs:.1f} %",
            f"{flips.count} of {flips.of}, {proof.clear_flips} of them clear",
            *(f"{loss:+.4f}" if loss is not None else "-" for loss in (proof.delta_i_auroc, proof.delta_aupro)),
            f"{proof.map_correlation:.5f} ({proof.map_correlation_lowest:.5f})",
        ]

    def body(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "backbone": self.backbone,
            "size_wh": self.size_wh,
            "precision": self.precision,
            "conversion": self.conversion.model_dump(mode="json"),
            "proof": self.proof.model_dump(mode="json"),
        }


def table(rows: Sequence[Row]) -> str:
    rule = ["---", "---", "---:", "---:", "---:", "---:", "---:"]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [HEADINGS, rule, *(row.cells() for row in rows)])


def show(files: Sequence[Path], out: Path | None) -> None:
    rows = [Row.read(path) for path in files]
    print(table(rows))
    if out is not None:
        body = {"machine": published_facts(), "rows": [row.body() for row in rows]}
        with atomic_write(out) as file:
            file.write((json.dumps(body, indent=2) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help=".onnx files of quantize, plans of build --validation")
    parser.add_argument("--json", type=Path, help="also write the proofs themselves")
    options = parser.parse_args()
    try:
        show(options.files, options.json)
    except RecontrastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
