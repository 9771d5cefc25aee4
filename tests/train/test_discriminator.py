"""The discriminator: its input, its loss, and how it is trained beside the reconstruction."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from torch.nn import functional  # noqa: E402

from recontrast_edge.errors import UsageError  # noqa: E402
from recontrast_train.discriminator import agreements, discriminator_loss  # noqa: E402
from recontrast_train.loss import recontrast_loss  # noqa: E402
from recontrast_train.model import ReContrast  # noqa: E402
from recontrast_train.recipe import load_recipe  # noqa: E402


@pytest.fixture
def model() -> ReContrast:
    torch.manual_seed(0)
    return ReContrast("resnet18", discriminator=True)


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 64, 96, generator=torch.Generator().manual_seed(seed))


def test_agreements_add_up_to_the_cosines(model: ReContrast) -> None:
    pairs = model(images(2, 0))
    for level, found in enumerate(agreements(pairs)):
        channels = pairs[0][level][0].shape[1]
        views = found.split(channels, dim=1)
        for view, summands in enumerate(views):
            wanted = functional.cosine_similarity(*pairs[view][level], dim=1)
            torch.testing.assert_close(summands.sum(1) / channels**0.5, wanted, rtol=1e-4, atol=1e-5)


def test_agreements_of_nothing_are_finite() -> None:
    zero = torch.zeros(1, 4, 2, 2)
    (found,) = agreements([[(zero, torch.ones(1, 4, 2, 2))], [(zero, zero)]])
    assert torch.equal(found, torch.zeros(1, 8, 2, 2))


def test_loss_against_float64() -> None:
    rng = np.random.default_rng(0)
    logits, masks = rng.normal(0, 3, (2, 1, 5, 4)), (rng.random((2, 1, 5, 4)) < 0.2).astype(float)
    probability = 1 / (1 + np.exp(-logits))
    likelihood = np.where(masks == 1, probability, 1 - probability)
    wanted = 10 * np.mean((1 - likelihood) ** 2 * -np.log(likelihood)) + np.mean(np.abs(probability - masks))
    got = discriminator_loss(torch.from_numpy(logits).float(), torch.from_numpy(masks).float())
    assert got.item() == pytest.approx(wanted, rel=1e-5)


def test_it_changes_nothing_of_what_the_network_begins_with(model: ReContrast) -> None:
    torch.manual_seed(0)
    for key, value in ReContrast("resnet18").state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_unaltered_images_are_reconstructed_as_ever(model: ReContrast) -> None:
    model.eval()
    clean = images(3, 1)
    denoised = model.denoise(clean, clean[:2])
    for pairs in (denoised.pairs, denoised.seen):
        for view, wanted_view in zip(pairs, model(clean), strict=True):
            for pair, wanted in zip(view, wanted_view, strict=True):
                for found, expected in zip(pair, wanted, strict=True):
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_clean_images_features_are_wanted_from_the_altered_ones(model: ReContrast) -> None:
    model.eval()
    clean, altered = images(2, 1), images(1, 2)
    denoised = model.denoise(clean, altered)
    seen, plain = model(torch.cat([altered, clean[1:]])), model(clean)
    for view in range(2):
        for level in range(3):
            torch.testing.assert_close(denoised.pairs[view][level][0], plain[view][level][0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(denoised.seen[view][level][0], seen[view][level][0], rtol=1e-4, atol=1e-5)
            assert denoised.pairs[view][level][1] is denoised.seen[view][level][1]


def test_mining_does_not_mask_the_discriminators_gradient(model: ReContrast) -> None:
    def gradient(alpha: float) -> torch.Tensor:
        model.zero_grad()
        pairs = model(images(2, 3))
        # At this alpha every position is easy, so the reconstruction alone would give no gradient.
        recontrast_loss(pairs, alpha).backward(retain_graph=True)
        assert not any(parameter.grad.any() for parameter in model.heads.parameters())
        loss = recontrast_loss(pairs, alpha) + discriminator_loss(model.discriminate(pairs), torch.ones(2, 1, 16, 24))
        loss.backward()
        return next(model.heads.parameters()).grad.clone()

    assert gradient(100.0).any()


def test_it_learns_to_see_an_altered_patch() -> None:
    torch.manual_seed(0)
    model = ReContrast("resnet18", encoder_bn="eval", discriminator=True)
    optimizer = torch.optim.AdamW(
        [*model.discriminator.parameters(), *model.decoder.parameters(), *model.bottleneck.parameters()], lr=2e-3
    )
    clean = 0.1 * images(2, 0)
    altered = clean.clone()
    altered[:, :, 16:40, 32:64] += 3.0
    masks = torch.zeros(2, 1, 16, 24)
    masks[:, :, 4:10, 8:16] = 1
    first = None
    for _ in range(20):
        denoised = model.denoise(clean, altered)
        logits = model.discriminate(denoised.seen)
        loss = discriminator_loss(logits, masks)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    assert logits[masks == 1].mean() > logits[masks == 0].mean() + 1


def test_a_discriminator_without_pseudo_defects_is_refused() -> None:
    with pytest.raises(UsageError, match="pseudo_defects"):
        load_recipe("mvtec", {"discriminator": True})
    with pytest.raises(ValueError, match="no discriminator"):
        ReContrast("resnet18").discriminate([])
