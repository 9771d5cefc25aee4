"""Variations and pseudo-defects: where they are, and that they follow from the seed alone."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from recontrast_edge.spec import InputSpec  # noqa: E402
from recontrast_train.augmentation import VISIBLE, Augmentation  # noqa: E402
from recontrast_train.data import Draw, GoodImages, batches, make_loader  # noqa: E402
from recontrast_train.recipe import Recipe  # noqa: E402

WIDTH, HEIGHT = 96, 64
INPUT = InputSpec(size_wh=(WIDTH, HEIGHT), resize_wh=(WIDTH, HEIGHT), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
DRAW = Draw(5, (2, 0, 1, 3))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> GoodImages:
    folder = tmp_path_factory.mktemp("good")
    rng = np.random.default_rng(0)
    paths: list[Path] = []
    for index in range(4):
        ramp = np.linspace(60 + 20 * index, 160, WIDTH)[None, :] + np.linspace(0, 30, HEIGHT)[:, None]
        paths.append(folder / f"{index}.png")
        cv2.imwrite(str(paths[-1]), (ramp + rng.normal(0, 4, ramp.shape)).clip(0, 255).astype(np.uint8))
    return GoodImages(paths, INPUT)


def batch_of(images: GoodImages, draw: Draw = DRAW, **options: object):
    recipe = Recipe(backbone="resnet18", size_wh=(WIDTH, HEIGHT), **options)  # type: ignore[arg-type]
    return Augmentation(images, recipe)[draw]


def test_without_options_the_images_stay_as_they_are(images: GoodImages) -> None:
    batch = batch_of(images)
    assert batch.altered is None
    assert batch.masks is None
    torch.testing.assert_close(batch.clean, torch.stack([images[index] for index in DRAW.indices]), rtol=0, atol=0)


def test_pseudo_defects_are_where_the_masks_say(images: GoodImages) -> None:
    marked = 0
    for iteration in range(30):
        batch = batch_of(images, Draw(iteration, DRAW.indices), pseudo_defects=0.5)
        assert batch.altered is not None
        assert batch.masks is not None
        assert batch.altered.shape == (2, 3, HEIGHT, WIDTH)
        assert batch.masks.shape == (4, 1, HEIGHT // 4, WIDTH // 4)
        assert set(batch.masks.unique().tolist()) <= {0.0, 1.0}
        assert not batch.masks[2:].any()
        changed = (batch.altered - batch.clean[:2]).abs()[:, :1]
        for image, mask in zip(changed, batch.masks[:2, 0], strict=True):
            cells = torch.nn.functional.max_pool2d(image * 255 * INPUT.std[0], 4)[0]
            assert (cells[mask == 1] > 0.9 * VISIBLE).all()
            assert (cells[mask == 0] < 1.5 * VISIBLE).all()
        marked += int(batch.masks[:2].flatten(1).any(1).sum())
        # Grey stays grey, and within what a camera gives.
        pixels = batch.altered * torch.tensor(INPUT.std)[:, None, None] + torch.tensor(INPUT.mean)[:, None, None]
        torch.testing.assert_close(pixels[:, 0], pixels[:, 2], rtol=0, atol=1e-3)
        assert pixels.min() > -1e-4
        assert pixels.max() < 1 + 1e-4
    assert marked >= 50


@pytest.mark.parametrize(
    "options",
    [
        {"pseudo_defects": 1.0},
        {"mirror_x": True, "mirror_y": True},
        {"shift": 0.1, "stretch": 0.1},
        {"exposure_stops": 1.0},
    ],
)
def test_a_draw_gives_the_same_batch_again_and_another_draw_another(images: GoodImages, options: dict) -> None:
    first, again = batch_of(images, **options), batch_of(images, **options)
    other = batch_of(images, Draw(6, DRAW.indices), **options)
    seen = "altered" if "pseudo_defects" in options else "clean"
    assert torch.equal(getattr(first, seen), getattr(again, seen))
    assert not torch.equal(getattr(first, seen), getattr(other, seen))


def test_mirroring_mirrors(images: GoodImages) -> None:
    found = set()
    for iteration in range(12):
        batch = batch_of(images, Draw(iteration, (1,)), mirror_x=True)
        plain = images[1]
        (name,) = [
            name
            for name, wanted in (("plain", plain), ("mirrored", plain.flip(2)))
            if torch.allclose(batch.clean[0], wanted, atol=1e-4)
        ]
        found.add(name)
    assert found == {"plain", "mirrored"}


def test_exposure_is_a_factor_within_the_stops(images: GoodImages) -> None:
    std, mean = (torch.tensor(values)[:, None, None] for values in (INPUT.std, INPUT.mean))
    plain = images[0] * std + mean
    for iteration in range(8):
        got = batch_of(images, Draw(iteration, (0,)), exposure_stops=0.5).clean[0] * std + mean
        unclipped = (got > 0.01) & (got < 0.99)
        ratio = (got / plain)[unclipped]
        assert ratio.std() < 1e-4
        assert 2**-0.5 - 1e-4 <= ratio.mean() <= 2**0.5 + 1e-4


def test_worker_processes_make_the_same_batches(images: GoodImages) -> None:
    recipe = Recipe(backbone="resnet18", size_wh=(WIDTH, HEIGHT), pseudo_defects=0.5, mirror_x=True)

    def altered(workers: int) -> list:
        order = batches(4, 2, seed=0, start=3, stop=6)
        loader = make_loader(Augmentation(images, recipe), order, start=3, workers=workers, pin=False)
        return [batch.altered for batch in loader]

    for here, there in zip(altered(0), altered(1), strict=True):
        assert torch.equal(here, there)
