"""Data sets: what is found, what is refused and how it says so, and masks that follow their image's geometry."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as Pil

from recontrast_edge.datasets import data_sha256, find_dataset, mask_to_map, natural_key, read_sample
from recontrast_edge.errors import InputError
from recontrast_edge.images import read_mask
from recontrast_edge.preprocess import preprocess
from recontrast_edge.spec import InputSpec, Roi


def save(path: Path, pixels: np.ndarray | int = 60, size_wh: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(pixels, int):
        pixels = np.full((size_wh[1], size_wh[0]), pixels, np.uint8)
    Pil.fromarray(pixels).save(path)
    return path


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    root = tmp_path / "tiles"
    for index in (10, 2, 1):
        save(root / "train" / "good" / f"part{index}.png", index)
    save(root / "test" / "good" / "a.png")
    save(root / "test" / "crack" / "b.JPG")
    save(root / "test" / "blob" / "c.png")
    save(root / "ground_truth" / "crack" / "b_mask.png", 255)
    save(root / "ground_truth" / "blob" / "c.png", 255)
    return root


def test_mvtec_layout(tiles: Path) -> None:
    save(tiles / "train" / "good" / ".hidden.png")
    (tiles / "train" / "good" / "notes.txt").write_text("not an image")
    dataset = find_dataset(tiles)
    assert dataset.name == "tiles"
    assert [sample.path.name for sample in dataset.training_samples()] == ["part1.png", "part2.png", "part10.png"]
    found = [(sample.kind, sample.path.name, [mask.name for mask in sample.mask_paths]) for sample in dataset.test]
    assert found == [("good", "a.png", []), ("blob", "c.png", ["c.png"]), ("crack", "b.JPG", ["b_mask.png"])]


def test_a_data_set_without_any_masks_is_fine_but_one_missing_mask_is_not(tiles: Path) -> None:
    (tiles / "ground_truth" / "crack" / "b_mask.png").unlink()
    with pytest.raises(InputError, match=r"b\.JPG: its mask is missing; expected .*crack/b_mask\.png"):
        find_dataset(tiles)
    (tiles / "ground_truth").rename(tiles.parent / "elsewhere")
    assert not any(sample.mask_paths for sample in find_dataset(tiles).test_samples())


def test_plain_folder_is_recursive_and_in_natural_order(tmp_path: Path) -> None:
    for name in ("lot2/x.png", "lot10/x.png", "lot1/10.png", "lot1/9.png"):
        save(tmp_path / "good" / name)
    dataset = find_dataset(tmp_path / "good")
    names = [str(sample.path.relative_to(tmp_path / "good")) for sample in dataset.train_good]
    assert names == ["lot1/9.png", "lot1/10.png", "lot2/x.png", "lot10/x.png"]
    assert dataset.test == ()
    with pytest.raises(InputError, match="no test images"):
        dataset.test_samples()


def test_list_file(tmp_path: Path) -> None:
    save(tmp_path / "images" / "b2.png")
    save(tmp_path / "images" / "b10.png")
    listing = tmp_path / "good parts.txt"
    listing.write_text("\ufeff# held out\n\nimages/b10.png\n  images/b2.png\r\n", encoding="utf-8")
    dataset = find_dataset(listing)
    assert [sample.path.name for sample in dataset.train_good] == ["b2.png", "b10.png"]
    assert dataset.name == "good parts"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"images/none.png\n", "line 1: no such image 'images/none.png'"),
        (b"# nothing\n", "lists no images"),
        (b"\xff\xfe\x00", "no UTF-8 text"),
        (b"a\x00b.png\n", "line 1: no such image"),
        (b"x" * 5000, "cannot be read|no such image"),
    ],
)
def test_list_files_that_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    listing = tmp_path / "list.txt"
    listing.write_bytes(content)
    with pytest.raises(InputError, match=message):
        find_dataset(listing)


def test_wrong_layouts_show_the_expected_tree_and_what_was_found(tiles: Path) -> None:
    with pytest.raises(InputError, match="no such data set"):
        find_dataset(tiles / "nowhere")
    with pytest.raises(InputError, match="is an image"):
        find_dataset(tiles / "test" / "good" / "a.png")
    (tiles / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no images \(nothing\)"):
        find_dataset(tiles / "empty")
    save(tiles / "test" / "loose.png")
    with pytest.raises(InputError, match=r"outside of a KIND folder \(loose\.png\)"):
        find_dataset(tiles)
    (tiles / "test" / "loose.png").unlink()
    save(tiles / "train" / "bad" / "x.png")
    with pytest.raises(InputError, match="training uses good parts only, but found bad"):
        find_dataset(tiles)
    (tiles / "train" / "good").rename(tiles / "train" / "OK")
    (tiles / "train" / "bad").rename(tiles / "bad")
    with pytest.raises(InputError, match="found OK"):
        find_dataset(tiles)
    (tiles / "train" / "OK").rename(tiles / "OK")
    with pytest.raises(InputError, match=r"(?s)in train: nothing.*DATA/train/good/.*found in .*: bad/, .*OK/"):
        find_dataset(tiles)


def test_a_test_set_alone_can_be_evaluated_but_not_trained_on(tiles: Path) -> None:
    (tiles / "train").rename(tiles.parent / "train elsewhere")
    dataset = find_dataset(tiles)
    assert len(dataset.test_samples()) == 3
    with pytest.raises(InputError, match="no training images"):
        dataset.training_samples()


def test_digest_is_of_content_and_order(tiles: Path) -> None:
    before = data_sha256(find_dataset(tiles).train_good)
    (tiles / "train" / "good" / "part1.png").rename(tiles / "train" / "good" / "part0.png")
    assert data_sha256(find_dataset(tiles).train_good) == before
    save(tiles / "train" / "good" / "part2.png", 99)
    assert data_sha256(find_dataset(tiles).train_good) != before


def test_mask_of_another_size_is_refused(tiles: Path) -> None:
    save(tiles / "ground_truth" / "blob" / "c.png", 255, (8, 12))
    sample = next(sample for sample in find_dataset(tiles).test if sample.kind == "blob")
    with pytest.raises(InputError, match=r"mask is 8x12 but its image c\.png is 12x8"):
        read_sample(sample)


def test_grey_levels_of_a_mask_count_from_half_and_class_numbers_from_one(tmp_path: Path) -> None:
    compressed = np.array([[0, 3, 127, 128, 255]], np.uint8)
    assert read_mask(save(tmp_path / "grey.png", compressed)).tolist() == [[False, False, False, True, True]]
    classes = np.array([[0, 1, 2, 0, 7]], np.uint8)
    assert read_mask(save(tmp_path / "classes.png", classes)).tolist() == [[False, True, True, False, True]]
    assert not read_mask(save(tmp_path / "empty.png", 0)).any()
    deep = np.array([[0, 300, 32767, 32768, 65535]], np.uint16)
    assert read_mask(save(tmp_path / "deep.png", deep)).tolist() == [[False, False, False, True, True]]
    palette = Pil.fromarray(np.array([[0, 1, 200]], np.uint8), "P")
    palette.putpalette([0] * 768)
    palette.save(tmp_path / "palette.png")
    assert read_mask(tmp_path / "palette.png").tolist() == [[False, True, True]]


def test_mask_lands_where_the_image_puts_the_defect() -> None:
    """The mask, brought to the map's size, covers what preprocessing makes of the same rectangle in an image."""
    spec = InputSpec(
        size_wh=(64, 32),
        resize_wh=(80, 48),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        roi=Roi(x=30, y=20, width=400, height=240),
    )
    mask = np.zeros((300, 500), bool)
    mask[110:190, 150:290] = True
    resized = mask_to_map(mask, spec)
    bright = preprocess((mask * np.uint8(255)), spec)[0] > 0.5
    assert resized.shape == (32, 64)
    np.testing.assert_array_equal(resized, bright)
    with pytest.raises(InputError, match="ROI"):
        mask_to_map(mask[:100], spec)


def test_natural_key_is_total() -> None:
    assert sorted(["b10", "B2", "b2", "a", "07", "7"], key=natural_key) == ["07", "7", "a", "B2", "b2", "b10"]


def test_magnetic_tiles(magnetic_tile: Path) -> None:
    dataset = find_dataset(magnetic_tile)
    assert len(dataset.training_samples()) == 767
    kinds = [sample.kind for sample in dataset.test_samples()]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    assert counts == {"good": 185, "blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103}
    # These masks were compressed with loss: taken as "not 0" the 85 images would fall into 349 regions.
    regions = 0
    for sample in dataset.test:
        if sample.kind == "break":
            _, mask = read_sample(sample)
            assert mask is not None
            regions += cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0] - 1
    assert regions == 126
