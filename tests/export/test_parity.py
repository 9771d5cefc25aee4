"""The gate itself: what it measures, what it refuses, which images it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recontrast_edge.engines import Inference
from recontrast_edge.errors import GateError, InputError
from recontrast_edge.spec import InputSpec, Roi

pytest.importorskip("onnx", reason="needs the export extra")

from recontrast_export.parity import (
    FP32_TOLERANCE,
    GPU_FP32_TOLERANCE,
    MAX_IMAGES,
    MIN_IMAGES,
    ParityImage,
    ParityReport,
    ParitySet,
    Tolerance,
    compare,
    read_images,
    synthetic_images,
)

TOLERANCE = Tolerance(map_error=1e-3, tie=1e-5)


def report(reference: list[float], candidate: list[float], map_errors: list[float] | None = None) -> ParityReport:
    """Maps of range 2."""
    count = len(reference)
    images = tuple(ParityImage(f"part{index}", "good", np.zeros((1, 1), np.uint8)) for index in range(count))
    return ParityReport(
        ParitySet(images, "a test"),
        np.full(count, 2.0),
        np.array(map_errors or [0.0] * count),
        np.array(reference),
        np.array(candidate),
    )


def test_compare_measures_maps_and_scores() -> None:
    maps = np.array([[[0.0, 4.0], [1.0, 2.0]], [[1.0, 1.0], [1.0, 3.0]]], np.float32)
    images = tuple(ParityImage(name, "good", np.full((2, 2), index, np.uint8)) for index, name in enumerate("ab"))

    def infer(offset: float):
        def run(batch):
            chosen = maps[[int(image[0, 0]) for image in batch]].copy()
            chosen[:, 1, 0] += offset
            return Inference(chosen, chosen.max(axis=(1, 2)), {})

        return run

    result = compare(infer(0.0), infer(-0.5), ParitySet(images, "a test"))
    assert result.map_ranges.tolist() == [4.0, 2.0]
    assert result.map_errors.tolist() == [0.5, 0.5]
    assert result.relative_map_errors.tolist() == [0.125, 0.25]
    assert result.score_errors.tolist() == [0.0, 0.0]


def test_passes_within_tolerance() -> None:
    report([1.0, 2.0, 3.0], [1.001, 1.999, 3.0], [0.0019, 0.0, 0.001]).enforce(TOLERANCE)


def test_refuses_a_map_error_over_the_tolerance_and_names_the_worst_image() -> None:
    with pytest.raises(GateError, match=r"part1 .* 1\.50e-03 .* 1e-03; nothing was written"):
        report([1.0, 2.0], [1.0, 2.0], [0.0021, 0.003]).enforce(TOLERANCE)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(broken: float) -> None:
    with pytest.raises(GateError):
        report([1.0, 2.0], [1.0, 2.0], [0.0, broken]).enforce(TOLERANCE)
    with pytest.raises(GateError):
        report([1.0, 2.0], [1.0, broken]).enforce(TOLERANCE)


def test_refuses_another_order_of_scores_but_not_of_ties() -> None:
    swapped = report([1.0, 1.0001, 1.0002], [1.0, 1.00015, 1.00014])
    assert swapped.swapped(TOLERANCE) == [(2, 1)]
    with pytest.raises(GateError, match=r"1 pair.*part2 over part1"):
        swapped.enforce(TOLERANCE)
    # A tie is 1e-5 of the map's range of 2.
    report([1.0, 1.000015], [1.00001, 1.0]).enforce(TOLERANCE)


def test_refuses_scores_that_have_become_equal() -> None:
    with pytest.raises(GateError):
        report([1.0, 1.5], [1.25, 1.25]).enforce(TOLERANCE)


def test_a_flat_reference_map_passes_only_unchanged() -> None:
    flat = report([1.0], [1.0])
    flat = ParityReport(flat.on, np.zeros(1), np.zeros(1), flat.reference_scores, flat.candidate_scores)
    flat.enforce(TOLERANCE)
    off = ParityReport(flat.on, np.zeros(1), np.full(1, 1e-6), flat.reference_scores, flat.candidate_scores)
    with pytest.raises(GateError):
        off.enforce(TOLERANCE)


def test_the_sample_holds_both_kinds(data_folder: Path) -> None:
    chosen = read_images([data_folder])
    assert chosen.source.startswith("16 of 18 images in ")
    kinds = [image.kind for image in chosen.images]
    assert (kinds.count("good"), kinds.count("scratch")) == (10, 6)
    names = [image.name for image in chosen.images if image.kind == "good"]
    assert names[0] == "00.png"
    assert names[-1] == "11.png"
    assert len(set(names)) == 10


def test_single_files_add_up(data_folder: Path) -> None:
    files = sorted((data_folder / "test" / "good").iterdir())
    assert len(read_images(files[:MIN_IMAGES]).images) == MIN_IMAGES
    with pytest.raises(InputError, match="at least 8 images, got 7"):
        read_images(files[: MIN_IMAGES - 1])


def test_missing_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_images([tmp_path / "nothing"])
    with pytest.raises(InputError):
        read_images([tmp_path / f"{index}.png" for index in range(MIN_IMAGES)])


def test_synthetic_images_cover_the_roi_and_say_what_they_are() -> None:
    spec = InputSpec(
        size_wh=(64, 64), resize_wh=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, roi=Roi(x=30, y=10, width=70, height=80)
    )
    chosen = synthetic_images(spec)
    assert "SYNTHETIC" in chosen.source
    assert len(chosen.images) == MAX_IMAGES
    assert {image.image.shape for image in chosen.images} == {(90, 100, 3)}
    assert len({image.kind == "good" for image in chosen.images}) == 2


def test_the_gate_needs_no_torch() -> None:
    code = (
        "import sys; import recontrast_export.parity, recontrast_export.graph, recontrast_export.heads; "
        "sys.exit(bool({'torch', 'recontrast_train'} & set(sys.modules)))"
    )
    env = {"PYTHONPATH": ":".join(entry for entry in sys.path if entry)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


def test_the_fp32_tolerance_is_the_promised_one() -> None:
    assert FP32_TOLERANCE.map_error == GPU_FP32_TOLERANCE.map_error <= 1e-3


def test_on_a_gpu_scores_that_only_its_order_of_sums_swaps_are_equal() -> None:
    """Maps have range 2: these scores are 0.00005 of it apart, and the last ones 0.0002."""
    swapped = report([1.0001, 1.0], [1.0, 1.0001])
    with pytest.raises(GateError, match="1 pair"):
        swapped.enforce(FP32_TOLERANCE)
    swapped.enforce(GPU_FP32_TOLERANCE)
    with pytest.raises(GateError, match="1 pair"):
        report([1.0004, 1.0], [1.0, 1.0004]).enforce(GPU_FP32_TOLERANCE)
