"""The report: what it says, that nothing in it can be taken for markup, and how a browser shows it."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as Pil

from recontrast_edge.datasets import find_dataset
from recontrast_edge.engines import Inference
from recontrast_edge.errors import InputError, OutputError
from recontrast_edge.evaluation import Evaluation, evaluate
from recontrast_edge.preprocess import Image
from recontrast_edge.report import Provenance, write_report
from recontrast_edge.spec import InputSpec, Level, ModelSpec, Threshold, Training
from tests.browser import Browser, find_chromium

HOSTILE = '<img src=x onerror="alert(1)">&amp;'
SPEC = ModelSpec(
    class_name=f"plates {HOSTILE}",
    backbone="none",
    input=InputSpec(size_wh=(32, 32), resize_wh=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    levels=(Level(stride=4, channels=3),),
    threshold=Threshold(
        value=0.5, max_false_reject_rate=0.05, confidence=0.95, n_good=60, data="spring", data_sha256="a" * 64
    ),
    weights_sha256="0" * 64,
    training=Training(recipe={"lr_encoder": 1e-5, "note": HOSTILE}, data="plates", n_images=40, iterations=250),
)
PROVENANCE = Provenance("plates.onnx", "ONNX Runtime (CPU)", "b" * 64, "plates", "c" * 64)


def brightness(images: Sequence[Image]) -> Inference:
    """The map is the image itself, on the 0..1 scale, at 32x32; the score its maximum."""
    maps = np.stack([cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA) for image in images])
    maps = maps.astype(np.float32) / 255
    return Inference(maps, maps.max(axis=(1, 2)), {})


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pil.fromarray(pixels.astype(np.uint8)).save(path, format="PNG")


@pytest.fixture
def plates(tmp_path: Path) -> Path:
    """12 good plates, 3 kinds of defects with 5 each; names as bad as a file system allows, pictures of odd shapes."""
    root = tmp_path / "plates"
    rng = np.random.default_rng(0)
    for index in range(12):
        write(root / "test" / "good" / f"{index}.png", rng.integers(0, 90 + 5 * index, (96, 96)))
    shapes = {"scratch": (64, 640), "<b>stain": (300, 40), "a_very_long_kind_of_defect" * 3: (50, 50)}
    for kind, shape in shapes.items():
        for index in range(5):
            pixels, mask = rng.integers(0, 90, shape), np.zeros(shape)
            region = (slice(5, 25), slice(10, 30))
            pixels[region], mask[region] = 100 + 35 * index, 255
            name = f"{'very_long_name_' * 12}{index}" if index else "<script>alert(2)<"
            write(root / "test" / kind / f"{name}.png", pixels)
            write(root / "ground_truth" / kind / f"{name}_mask.png", mask)
    return root


@pytest.fixture
def evaluation(plates: Path) -> Evaluation:
    return evaluate(brightness, find_dataset(plates).test_samples(), SPEC, n_worst=4)


class Text(HTMLParser):
    """Visible text, and every tag with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data


def report_of(evaluation: Evaluation, folder: Path) -> Text:
    path = folder / "out" / "report.html"
    write_report(path, evaluation, PROVENANCE)
    return Text(path.read_text(encoding="utf-8"))


def test_it_says_what_was_measured(evaluation: Evaluation, tmp_path: Path) -> None:
    page = report_of(evaluation, tmp_path)
    text = " ".join(page.text.split())
    at = evaluation.at_threshold
    assert at is not None
    assert at.misses is not None
    for expected in (
        f"plates {HOSTILE} on plates",
        "12 good parts and 15 with defects",
        f"{100 * evaluation.overall.i_auroc.value:.2f} %",
        f"{at.misses.count} of 15 defects passed",
        "A part is rejected where its score is greater than 0.5.",
        "at most 5 % will be rejected",
        "60 good images of spring",
        "b" * 64,
        "c" * 64,
        "a" * 64,
        "plates: 40 good images, 250 iterations",
        "lr_encoder 1e-05",
        f"scratch 5 {100 * evaluation.kinds['scratch'].i_auroc.value:.2f} %",
    ):
        assert expected in text
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 2 * (4 + 4)
    for attributes in pictures:
        content = base64.b64decode((attributes["src"] or "").removeprefix("data:image/jpeg;base64,"))
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        assert (str(picture.shape[1]), str(picture.shape[0])) == (attributes["width"], attributes["height"])
        assert max(picture.shape) == 320


def test_the_curve_and_the_bars_are_those_of_the_scores(evaluation: Evaluation, tmp_path: Path) -> None:
    page = report_of(evaluation, tmp_path)
    (curve,) = (attributes["points"] for tag, attributes in page.tags if tag == "polyline")
    points = np.array([[float(number) for number in point.split(",")] for point in (curve or "").split()])
    area = np.sum(np.diff(points[:, 0]) * (600 - points[1:, 1] - points[:-1, 1]) / 2) / (560 * 300)
    assert area == pytest.approx(evaluation.overall.i_auroc.value, abs=1e-3)
    bars = [attributes["class"] for tag, attributes in page.tags if tag == "rect"]
    assert {"good", "defect"} == set(bars)
    counted = {"good": 0, "defect": 0}
    for count, name in re.findall(r"(\d+) (good|defect), score", page.text):
        counted[name] += int(count)
    assert counted == {"good": 12, "defect": 15}


def test_the_true_defect_is_outlined(evaluation: Evaluation, tmp_path: Path) -> None:
    page = report_of(evaluation, tmp_path)
    pictures = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]

    def cyan(uri: str) -> int:
        content = np.frombuffer(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")), np.uint8)
        blue, green, red = np.moveaxis(cv2.imdecode(content, cv2.IMREAD_COLOR).astype(int), 2, 0)
        return int(np.count_nonzero((blue - red > 100) & (green - red > 60)))

    assert [cyan(uri) > 50 for uri in pictures[::2]] == [False] * 4 + [True] * 4


def test_nothing_in_it_is_fetched_or_run(evaluation: Evaluation, tmp_path: Path) -> None:
    page = report_of(evaluation, tmp_path)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "b"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("src") or "data:").startswith("data:")
        assert "href" not in attributes


@pytest.mark.parametrize("keep", ["good", "defects", "one", "maskless", "no threshold", "by hand"])
def test_what_is_missing_is_left_out(plates: Path, tmp_path: Path, keep: str) -> None:
    samples = find_dataset(plates).test_samples()
    spec = SPEC
    if keep in ("good", "defects"):
        samples = tuple(sample for sample in samples if sample.is_good == (keep == "good"))
    elif keep == "one":
        samples = samples[:1]
    elif keep == "maskless":
        (plates / "ground_truth").rename(tmp_path / "elsewhere")
        samples = find_dataset(plates).test_samples()
    elif keep == "no threshold":
        spec = SPEC.with_threshold(None)
    else:
        spec = SPEC.with_threshold(Threshold(value=0.5, method="manual"))
    page = report_of(evaluate(brightness, samples, spec), tmp_path)
    expected = {
        "good": "there is no defect in the ground truth",
        "defects": "No ROC curve",
        "one": "1 good parts and 0 with defects",
        "maskless": "A dash means that the data set has no ground-truth masks.",
        "no threshold": "This model has no threshold yet",
        "by hand": "it promises nothing",
    }
    assert expected[keep] in page.text
    # Without a threshold nothing was rejected or missed.
    assert ("The worst" in page.text) == (spec.threshold is not None)
    assert "nan" not in page.text.lower().split()


def test_a_report_that_cannot_be_made(evaluation: Evaluation, plates: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        write_report(tmp_path / "file" / "report.html", evaluation, PROVENANCE)
    evaluation.worst_good[0].sample.path.unlink()
    with pytest.raises(InputError, match="no such image"):
        write_report(tmp_path / "report.html", evaluation, PROVENANCE)
    assert not (tmp_path / "report.html").exists()


def test_names_that_are_no_text(plates: Path, tmp_path: Path) -> None:
    raw = bytes(plates / "test" / "good" / "0.png").replace(b"0.png", b"\xff\xfe.png")
    (plates / "test" / "good" / "0.png").rename(raw.decode("utf-8", "surrogateescape"))
    page = report_of(evaluate(brightness, find_dataset(plates).test_samples(), SPEC, n_worst=12), tmp_path)
    assert "good/??.png" in page.text


def test_in_a_browser(evaluation: Evaluation, tmp_path: Path) -> None:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium here; Debian's package is called chromium")
    path = tmp_path / "report.html"
    write_report(path, evaluation, PROVENANCE)
    with Browser(program) as browser:
        # The last one is a sheet of A4 inside its margins.
        for width, media in ((1280, "screen"), (390, "screen"), (688, "print")):
            page = browser.visit(path.as_uri(), width=width, media=media)
            assert page.requests == [path.as_uri()]
            assert page.problems == []
            assert page.width <= width
            assert page.outside == []
            picture = cv2.imdecode(np.frombuffer(page.screenshot_png, np.uint8), cv2.IMREAD_COLOR)
            assert picture.shape[1] == width
            # Loosely: light, dark text at the top, and the bars in their two colours.
            assert np.median(picture) > 240
            assert picture[:200].min() < 80
            for colour_bgr in ((175, 174, 128), (152, 152, 222)):
                near = np.abs(picture.astype(int) - colour_bgr).max(axis=2) < 12
                assert np.count_nonzero(near) > 20
        # The test can fail: what would be wrong is noticed.
        path.write_text('<body><img src="http://127.0.0.1:9/x.png"><p style="width: 3000px">wide</p>')
        page = browser.visit(path.as_uri(), width=390)
        assert len(page.requests) == 2
        assert page.problems
        assert page.width > 390
        assert page.outside
