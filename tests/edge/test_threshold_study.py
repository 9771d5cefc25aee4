"""The threshold study: its exact expectation, and that it tells independent parts from photographs of the same part."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.programs import BENCHMARKS, load_program


@pytest.fixture(scope="module")
def threshold() -> ModuleType:
    return load_program("threshold")


@pytest.mark.parametrize(("n", "rank", "m"), [(4, 4, 3), (5, 3, 4), (1, 1, 6), (6, 1, 2)])
def test_the_expectation_counts_all_arrangements(threshold: ModuleType, n: int, rank: int, m: int) -> None:
    counts = np.zeros(m + 1)
    for old in combinations(range(n + m), n):
        counts[sum(place > old[rank - 1] for place in range(n + m) if place not in old)] += 1
    np.testing.assert_allclose(threshold.rejected_distribution(n, rank, m), counts / counts.sum(), atol=1e-12)


def scores_file(path: Path, n_parts: int, images_a_part: int, between_parts: float) -> Path:
    """Scores of which ``between_parts`` is the part's share of the spread; image numbers of a part lie together."""
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = [{"image": "scratch/num_7.png", "kind": "scratch", "score": 99.0}]
    for part in range(n_parts):
        of_part = between_parts * rng.normal()
        for index in range(images_a_part):
            score = of_part + (1 - between_parts) * rng.normal()
            images.append({"image": f"good/num_{1000 * part + 7 * index}.png", "kind": "good", "score": score})
    path.write_text(json.dumps({"format": "recontrast-edge.evaluation", "version": 1, "images": images}))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "threshold.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_photographs_of_one_part_break_the_promise(tmp_path: Path) -> None:
    scores, out = scores_file(tmp_path / "scores.json", 60, 6, 0.9), tmp_path / "out" / "rows.json"
    done = run(
        *(scores, "--part", r"num_(\d+)", "--gap", 100, "--splits", 400),
        *("--max-false-reject-rate", 0.1, "--confidence", 0.9, "--json", out),
    )
    assert done.returncode == 0, done.stderr
    assert "360 good images of 60 parts" in done.stdout
    assert "| one image a part | 30 | 10 % | 90 % |" in done.stdout
    content = json.loads(out.read_text())
    assert (content["images"], content["parts"]) == (360, 60)
    highest, one, every, by_image = content["rows"]
    assert (highest["n_calibration"], highest["n_unseen"]) == (30, 30)
    assert highest["broken"] == pytest.approx(highest["broken_if_independent"], abs=0.08)
    # Independent: as expected. Six photographs counted as six parts: the promise is broken far more often than that.
    assert one["broken"] == pytest.approx(one["broken_if_independent"], abs=0.08)
    assert every["broken"] > every["broken_if_independent"] + 0.1
    # Split by image, both halves show the same parts: the damage is not even seen.
    assert by_image["broken"] == pytest.approx(by_image["broken_if_independent"], abs=0.08)


def test_what_was_observed_on_independent_images_is_what_was_computed(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = run(scores_file(tmp_path / "scores.json", 400, 1, 0.5), "--splits", 300, "--json", out)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["n_calibration"], row["n_unseen"], row["splits"]) == (200, 200, 300)
    assert row["rate"] == pytest.approx(row["rate_if_independent"], abs=0.005)
    assert row["broken"] == pytest.approx(row["broken_if_independent"], abs=0.06)


def test_bad_input_is_told(
    threshold: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = scores_file(tmp_path / "scores.json", 10, 1, 0.5)
    other = tmp_path / "other.json"
    other.write_text("[1, 2]")
    for arguments, message in (
        ((scores,), "too few to promise 5 %, which needs 59"),
        ((other,), "expected a file of `eval --json`"),
        ((tmp_path / "none.json",), "cannot be read"),
        ((scores, "--part", "tile(.)"), "does not match"),
        ((scores, "--part", "(n)um", "--gap", 3), "needs numbers"),
        ((scores, "--max-false-reject-rate", 7), "between 0 and 1"),
        ((scores, "--splits", 0), "at least 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["threshold.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            threshold.main()
        assert ended.value.code not in (None, 0)
        captured = capsys.readouterr()
        assert message in captured.out + captured.err
