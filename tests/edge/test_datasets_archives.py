"""Public data sets as their archives unpack: what is found in each, and what is said where something is amiss."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recontrast_edge.datasets import Dataset, Sample, aptos, find_dataset, read_sample
from recontrast_edge.datasets.crop_fundus import crop_fundus, main
from recontrast_edge.errors import InputError
from tests import archives


def kinds(dataset: Dataset) -> dict[str, int]:
    found = [sample.kind for sample in dataset.test]
    return {kind: found.count(kind) for kind in dict.fromkeys(found)}


def names(samples: tuple[Sample, ...]) -> list[str]:
    return [sample.path.name for sample in samples]


@pytest.mark.parametrize("name", archives.ARCHIVES)
def test_an_archive_one_folder_further_down_is_no_folder_of_good_images(name: str, tmp_path: Path) -> None:
    root = archives.ARCHIVES[name](tmp_path / "unpacked" / name)
    with pytest.raises(InputError, match=r"holds a data set in .*, but is none itself"):
        find_dataset(root.parent)


@pytest.mark.parametrize("name", archives.ARCHIVES)
def test_every_defect_with_ground_truth_is_where_its_mask_says(name: str, tmp_path: Path) -> None:
    dataset = find_dataset(archives.ARCHIVES[name](tmp_path / name))
    assert dataset.name == name
    assert len(dataset.training_samples()) >= 2
    for sample in dataset.test_samples():
        image, mask = read_sample(sample)
        if mask is None:
            assert name in ("aptos", "oct2017", "isic2018")
        else:
            assert mask[archives.BOX].all() != sample.is_good
            assert (image[archives.BOX].mean() > 200) != sample.is_good
            assert mask.any() != sample.is_good


class TestMvtec:
    def test_a_folder_of_categories(self, tmp_path: Path) -> None:
        root = archives.mvtec(tmp_path / "mvtec")
        dataset = find_dataset(root)
        assert [category.name for category in dataset.categories] == ["bottle", "screw"]
        assert len(dataset.train_good) == 8
        assert [kinds(category) for category in dataset.categories] == [
            {"good": 2, "broken_large": 2},
            {"good": 2, "scratch_head": 2},
        ]
        bottle = find_dataset(root / "bottle")
        assert not bottle.categories
        assert bottle == dataset.categories[0]

    def test_one_bad_category_is_named_with_its_tree(self, tmp_path: Path) -> None:
        root = archives.mvtec(tmp_path / "mvtec")
        (root / "screw" / "train").rename(root / "screw" / "training")
        (root / "screw" / "test").rename(root / "screw" / "testing")
        with pytest.raises(
            InputError, match=r"(?s)screw: neither train nor test; expected\n.*DATA/train/good/.*found in"
        ):
            find_dataset(root)
        (root / "screw" / "ground_truth").rename(root / "screw" / "truth")
        with pytest.raises(InputError, match=r"screw: neither train nor test"):
            find_dataset(root)

    def test_folders_without_images_are_no_categories(self, tmp_path: Path) -> None:
        root = archives.mvtec(tmp_path / "mvtec")
        (root / "papers").mkdir()
        (root / "papers" / "ad.pdf").write_text("paper")
        assert len(find_dataset(root).categories) == 2


class TestLoco:
    def test_several_masks_of_an_image_count_together(self, tmp_path: Path) -> None:
        dataset = find_dataset(archives.loco(tmp_path / "loco") / "pushpins")
        assert kinds(dataset) == {"good": 2, "logical_anomalies": 2, "structural_anomalies": 2}
        assert names(dataset.validation_good) == ["000.png", "001.png"]
        assert [len(sample.mask_paths) for sample in dataset.test] == [0, 0, 1, 2, 1, 1]
        _, mask = read_sample(dataset.test[3])
        expected = np.zeros(archives.SIZE_WH[::-1], bool)
        expected[archives.BOX] = expected[12:15, 0:3] = True
        np.testing.assert_array_equal(mask, expected)

    def test_an_image_without_its_folder_of_masks(self, tmp_path: Path) -> None:
        root = archives.loco(tmp_path / "loco")
        truth = root / "pushpins" / "ground_truth" / "structural_anomalies" / "001"
        (truth / "000.png").unlink()
        with pytest.raises(InputError, match=r"structural_anomalies/001\.png: its mask is missing"):
            find_dataset(root)


def test_mvtec_ad2_tests_on_its_public_part(tmp_path: Path) -> None:
    dataset = find_dataset(archives.mvtec_ad2(tmp_path / "ad2") / "vial")
    assert kinds(dataset) == {"good": 2, "bad": 2}
    assert names(dataset.validation_good) == ["000_regular.png", "001_regular.png"]
    assert dataset.test[3].mask_paths[0].name == "001_overexposed_mask.png"


class TestVisa:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return archives.visa(tmp_path / "VisA")

    def test_splits(self, root: Path) -> None:
        dataset = find_dataset(root)
        assert [category.name for category in dataset.categories] == ["candle", "pcb1"]
        candle = find_dataset(root / "candle")
        assert candle == dataset.categories[0]
        assert names(candle.train_good) == [f"{index:04}.JPG" for index in range(4)]
        assert kinds(candle) == {"good": 2, "anomaly": 2}
        few = find_dataset(root / "split_csv" / "2cls_fewshot.csv")
        assert few.name == "VisA 2cls_fewshot"
        assert names(few.categories[1].train_good) == [f"{index:04}.JPG" for index in range(3)]
        assert kinds(few.categories[1]) == {"good": 3, "anomaly": 1}

    def test_as_converted_by_the_authors_script(self, root: Path, tmp_path: Path) -> None:
        """Their script makes MVTec's layout of it, with kind ``bad``."""
        for folder in ("train/good", "test/good", "test/bad", "ground_truth/bad"):
            (tmp_path / "1cls" / "candle" / folder).mkdir(parents=True)
        archives.part(tmp_path / "1cls" / "candle" / "train" / "good" / "0000.JPG")
        archives.part(tmp_path / "1cls" / "candle" / "test" / "bad" / "000.JPG", defect=True)
        archives.mask(tmp_path / "1cls" / "candle" / "ground_truth" / "bad" / "000.png")
        assert kinds(find_dataset(tmp_path / "1cls").categories[0]) == {"bad": 1}

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("object,split", "object,part", "expected the columns object,split,label,image,mask, but split is missing"),
            ("pcb1,train,normal", "pcb1,training,normal", "line 2: expected split train or test and label normal or"),
            ("pcb1,train,normal", "pcb1,train,good", "line 2: expected split train or test and label normal or"),
            ("Normal/0000.JPG,", "Normal/0000.JPG", "line 2: expected 5 values"),
            ("Normal/0000.JPG,", "Normal/9999.JPG,", "line 2: no such image 'pcb1/Data/Images/Normal/9999.JPG'"),
            ("pcb1/Data/Images/Normal/0000.JPG", "/etc/passwd", "line 2: expected an image of 'pcb1'"),
            (
                "pcb1/Data/Images/Normal/0000.JPG",
                "pcb1/../candle/Data/Images/Normal/0000.JPG",
                r"line 2: no such image 'pcb1/\.\./candle",
            ),
            ("Masks/Anomaly/001.png", "Masks/Anomaly/002.png", "line 9: no such image"),
            ("pcb1", "\xff", "no UTF-8"),
        ],
    )
    def test_damaged_split_files(self, root: Path, old: str, new: str, message: str) -> None:
        table = root / "split_csv" / "1cls.csv"
        table.write_bytes(table.read_text().replace(old, new, 1).encode("latin-1"))
        with pytest.raises(InputError, match=message):
            find_dataset(root)

    def test_without_split_files_the_tree_is_shown(self, root: Path) -> None:
        (root / "split_csv" / "1cls.csv").unlink()
        for data in (root, root / "candle"):
            with pytest.raises(InputError, match=r"(?s)1cls\.csv: no such split file; expected\n.*DATA/split_csv/1cls"):
                find_dataset(data)


class TestAptos:
    def test_the_papers_split(self, tmp_path: Path) -> None:
        dataset = find_dataset(archives.aptos(tmp_path / "aptos"))
        assert kinds(dataset) == {"good": 4, "mild": 1, "moderate": 1, "proliferative": 1, "severe": 1}
        # As the authors draw it: the table's order, shuffled by the module's generator after seed(1).
        codes = [f"{index:012x}.png" for index in range(1004)]
        random.seed(1)
        random.shuffle(codes)
        assert sorted(names(dataset.train_good)) == sorted(codes[:1000])

    def test_what_is_refused(self, tmp_path: Path) -> None:
        root = archives.aptos(tmp_path / "aptos", n_good=8)
        with pytest.raises(InputError, match="8 images of grade 0, expected more than 1000"):
            find_dataset(root)
        table = (root / "train.csv").read_text()
        (root / "train.csv").write_text(table.replace(",4", ",5"))
        with pytest.raises(InputError, match="line 10: expected a diagnosis from 0 to 4, got '5'"):
            find_dataset(root)
        (root / "train.csv").unlink()
        with pytest.raises(InputError, match=r"(?s)train\.csv: no such file; expected\n.*id_code,diagnosis"):
            find_dataset(root)
        (root / "train.csv").write_text(table)
        (root / "train_images").rename(tmp_path / "elsewhere")
        with pytest.raises(InputError, match=r"(?s)train_images: no such folder; expected\n.*found in .*test_images/"):
            find_dataset(root)

    def test_the_fundus_is_cropped_to_a_centred_square(self) -> None:
        photograph = np.zeros((300, 500, 3), np.uint8)
        rows, columns = np.mgrid[:300, :500]
        fundus = (rows - 130) ** 2 + (columns - 400) ** 2 <= 140**2
        photograph[fundus] = (10, 90, 200)
        photograph[5, 5] = 255
        cropped = crop_fundus(photograph)
        assert cropped.shape == (512, 512, 3)
        # The fundus is cut off above and on the right, so the square is filled up with black there. Expected from
        # the definition: 281 pixels wide or, where cut, up to the edge; centred on the centroid of what is visible.
        centre_y, centre_x = rows[fundus].mean(), columns[fundus].mean()
        height, width = np.ptp(rows[fundus]) + 1, np.ptp(columns[fundus]) + 1
        side = 2 * 5 + max(height, width)
        scale = 512 / side
        bright = cropped[:, :, 2] > 100
        assert bright.mean() == pytest.approx(fundus.sum() * scale**2 / 512**2, rel=0.02)
        found_y, found_x = (indices.mean() for indices in np.nonzero(bright))
        assert (found_y, found_x) == pytest.approx((256, 256), abs=2 * scale)
        assert abs(centre_y - 130) > 1
        assert abs(centre_x - 400) > 1
        assert tuple(cropped[256, 256]) == (10, 90, 200)
        with pytest.raises(InputError, match="it is black"):
            crop_fundus(np.zeros((40, 60, 3), np.uint8))

    def test_the_cropped_archive_is_the_same_data_set(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(aptos, "N_TRAIN", 3)
        root, out = archives.aptos(tmp_path / "aptos", n_good=5), tmp_path / "cropped"
        assert main([str(root), str(out)]) == 0
        assert "9 photographs cropped" in capsys.readouterr().out
        before, after = find_dataset(root), find_dataset(out)
        assert names(after.train_good) == names(before.train_good)
        assert names(after.test) == names(before.test)
        assert main([str(tmp_path), str(out)]) == 3
        assert main([]) == 2
        (root / "train_images" / "ff0000000001.png").write_bytes(b"")
        assert main([str(root), str(tmp_path / "again")]) == 3
        assert not (tmp_path / "again" / "train.csv").exists()


def test_oct2017(tmp_path: Path) -> None:
    root = archives.oct2017(tmp_path / "ZhangLabData")
    dataset = find_dataset(root)
    assert names(dataset.train_good) == ["NORMAL-1016042-1.jpeg", "NORMAL-1016042-2.jpeg"]
    assert kinds(dataset) == {"good": 2, "CNV": 2, "DME": 2, "DRUSEN": 2}
    older = root / "CellData" / "OCT"
    assert kinds(find_dataset(older)) == kinds(dataset)
    for image in (older / "test" / "DME").iterdir():
        image.unlink()
    with pytest.raises(InputError, match=r"(?s)test/DME: holds no images; expected\n.*train/NORMAL/\*\.jpeg"):
        find_dataset(root)


class TestIsic2018:
    def test_split(self, tmp_path: Path) -> None:
        dataset = find_dataset(archives.isic2018(tmp_path / "isic"))
        assert names(dataset.train_good) == ["ISIC_0024306.jpg", "ISIC_0024308.jpg", "ISIC_0024309.jpg"]
        assert kinds(dataset) == {"good": 2, "BKL": 1, "VASC": 1}

    def test_what_is_refused(self, tmp_path: Path) -> None:
        root = archives.isic2018(tmp_path / "isic")
        table = root / "ISIC2018_Task3_Validation_GroundTruth" / "ISIC2018_Task3_Validation_GroundTruth.csv"
        table.write_text(table.read_text().replace("ISIC_0024307,0.0", "ISIC_0024307,1.0"))
        with pytest.raises(InputError, match="line 3: expected a 1 for one of MEL, NV, BCC"):
            find_dataset(root)
        table.parent.rename(root / "elsewhere")
        with pytest.raises(InputError, match=r"(?s)Validation_GroundTruth\.csv: not there; expected\n.*Training_Input"):
            find_dataset(root)


class TestMagneticTile:
    def test_photographs_of_a_tile_stay_together(self, tmp_path: Path) -> None:
        dataset = find_dataset(archives.magnetic_tile(tmp_path / "tiles"))
        assert kinds(dataset) == {"good": 2, "blowhole": 1, "break": 1, "crack": 1, "fray": 1, "uneven": 1}
        assert names(dataset.test[:2]) == ["exp1_num_4020.jpg", "exp2_num_4040.jpg"]
        assert len(dataset.train_good) == 10
        tiles = {sample.path.name: sample.part for sample in (*dataset.train_good, *dataset.test[:2])}
        assert len(set(tiles.values())) == 6
        assert tiles["exp1_num_4020.jpg"] == tiles["exp2_num_4040.jpg"]

    def test_tiles_are_told_by_their_exposures_however_far_the_numbers_are_apart(self, tmp_path: Path) -> None:
        root = archives.magnetic_tile(tmp_path / "tiles")
        (root / "MT_Free" / "Imgs" / "exp2_num_40.jpg").rename(root / "MT_Free" / "Imgs" / "exp2_num_1019.jpg")
        (root / "MT_Free" / "Imgs" / "exp2_num_40.png").rename(root / "MT_Free" / "Imgs" / "exp2_num_1019.png")
        tiles = {sample.path.name: sample.part for sample in find_dataset(root).train_good}
        assert tiles["exp1_num_20.jpg"] == tiles["exp2_num_1019.jpg"] != tiles["exp1_num_1020.jpg"]

    def test_what_is_refused(self, tmp_path: Path) -> None:
        root = archives.magnetic_tile(tmp_path / "tiles")
        images = root / "MT_Free" / "Imgs"
        (images / "exp1_num_20.jpg").rename(images / "tile.jpg")
        with pytest.raises(InputError, match=r"tile\.jpg: expected a name like exp1_num_743\.jpg"):
            find_dataset(root)
        (root / "MT_Fray" / "Imgs" / "exp1_num_3667.png").unlink()
        with pytest.raises(InputError, match=r"its mask is missing; expected .*MT_Fray"):
            find_dataset(root)
        (root / "MT_Crack").rename(root / "Crack")
        with pytest.raises(InputError, match=r"(?s)MT_Crack/Imgs: no such folder; expected\n.*MT_Blowhole"):
            find_dataset(root)


class TestMasksOfAnotherSize:
    def sample(self, tmp_path: Path, mask: Image.Image) -> Sample:
        archives.part(tmp_path / "part.png", defect=True)
        mask.save(tmp_path / "mask.png")
        return Sample(tmp_path / "part.png", "dent", (tmp_path / "mask.png",))

    @pytest.mark.parametrize("size_wh", [(48, 32), (12, 8), (24, 16), (100, 67), (7, 5)])
    def test_of_the_images_proportions_are_scaled(self, size_wh: tuple[int, int], tmp_path: Path) -> None:
        pixels = np.zeros(size_wh[::-1], np.uint8)
        pixels[:, size_wh[0] // 2 :] = 255
        image, mask = read_sample(self.sample(tmp_path, Image.fromarray(pixels)))
        assert mask is not None
        assert mask.shape == image.shape[:2] == (16, 24)
        middle = 12 if size_wh[0] % 2 == 0 else 11
        assert mask[:, middle:].all()
        assert not mask[:, :10].any()

    @pytest.mark.parametrize("size_wh", [(16, 24), (24, 18), (48, 30)])
    def test_of_other_proportions_are_refused(self, size_wh: tuple[int, int], tmp_path: Path) -> None:
        sample = self.sample(tmp_path, Image.new("L", size_wh, 255))
        with pytest.raises(InputError, match="must have its image's size or proportions"):
            read_sample(sample)

    def test_palette_and_deep_masks(self, tmp_path: Path) -> None:
        indices = np.zeros((16, 24), np.uint8)
        indices[archives.BOX] = 7
        palette = Image.fromarray(indices, "P")
        palette.putpalette([0, 0, 0] * 256)
        deep = Image.fromarray(indices.astype(np.uint16) * 9000)
        for mask in (palette, deep):
            np.testing.assert_array_equal(read_sample(self.sample(tmp_path, mask))[1], indices > 0)
