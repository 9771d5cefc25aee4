"""The loss and its gradient against a slow float64 reference written from the paper's equations."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from recontrast_train.loss import mining_alpha, pair_loss, recontrast_loss  # noqa: E402


def reference(target: np.ndarray, reconstruction: np.ndarray, alpha: float) -> tuple[float, np.ndarray]:
    """Loss and gradient by the definition, position by position, in float64."""
    n, channels, height, width = target.shape
    distance = np.empty((n, height, width))
    for i in range(n):
        for y in range(height):
            for x in range(width):
                a, b = target[i, :, y, x], reconstruction[i, :, y, x]
                distance[i, y, x] = 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    threshold = distance.mean() + alpha * distance.std(ddof=1)
    loss, gradient = 0.0, np.zeros_like(reconstruction)
    for i in range(n):
        a, b = target[i].ravel(), reconstruction[i].ravel()
        norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
        cosine = a @ b / (norm_a * norm_b)
        loss += (1 - cosine) / n
        gradient[i] = (-(a / (norm_a * norm_b) - cosine * b / norm_b**2) / n).reshape(channels, height, width)
        gradient[i][:, distance[i] < threshold] = 0.0
    return loss, gradient


@pytest.mark.parametrize("alpha", [-3.0, -0.5, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (3, 8, 6, 6)])
def test_pair_loss_and_gradient_match_the_definition(alpha: float, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(7)
    target = rng.standard_normal(shape).astype(np.float32)
    reconstruction = (0.6 * target + rng.standard_normal(shape)).astype(np.float32)
    expected_loss, expected_gradient = reference(target.astype(np.float64), reconstruction.astype(np.float64), alpha)

    leaf = torch.from_numpy(reconstruction).requires_grad_()
    loss = pair_loss(torch.from_numpy(target), leaf * 1.0, alpha)
    loss.backward()

    assert loss.item() == pytest.approx(expected_loss, abs=1e-6)
    np.testing.assert_allclose(leaf.grad.numpy(), expected_gradient, atol=1e-6)
    if alpha >= 0:
        masked = (expected_gradient == 0).all(axis=1)
        assert 0 < masked.sum() < masked.size  # the case really mines


def test_no_gradient_reaches_the_target() -> None:
    target = torch.randn(2, 4, 3, 3, requires_grad=True)
    reconstruction = torch.randn(2, 4, 3, 3, requires_grad=True)
    pair_loss(target * 1.0, reconstruction * 1.0, -3.0).backward()
    assert target.grad is None
    assert reconstruction.grad is not None
    assert reconstruction.grad.abs().sum() > 0


def test_views_are_averaged_and_levels_added() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        [tuple(torch.randn(2, 3, size, size, generator=generator) for _ in range(2)) for size in (8, 4, 2)]
        for _ in range(2)
    ]
    expected = sum(0.5 * pair_loss(a, b, 0.0) for view in pairs for a, b in view)
    assert recontrast_loss(pairs, 0.0).item() == pytest.approx(expected.item(), rel=1e-6)


def test_low_precision_features_are_compared_in_float32() -> None:
    target = torch.randn(2, 16, 4, 4)
    reconstruction = torch.randn(2, 16, 4, 4)
    half = pair_loss(target.bfloat16(), reconstruction.bfloat16(), 0.0)
    assert half.dtype == torch.float32
    exact = pair_loss(target.bfloat16().float(), reconstruction.bfloat16().float(), 0.0)
    assert half.item() == exact.item()


@pytest.mark.parametrize(
    ("iteration", "expected"), [(0, -3.0), (50, -2.0), (100, -1.0), (200, 1.0), (201, 1.0), (1999, 1.0)]
)
def test_alpha_rises_over_the_first_tenth(iteration: int, expected: float) -> None:
    assert mining_alpha(iteration, 2000) == pytest.approx(expected)


@pytest.mark.parametrize(("iteration", "expected"), [(0, 1.0), (100, -1.0), (200, -3.0), (1999, -3.0)])
def test_alpha_may_fall(iteration: int, expected: float) -> None:
    assert mining_alpha(iteration, 2000, start=1.0, end=-3.0) == pytest.approx(expected)


def test_alpha_ramp_of_the_stable_variant() -> None:
    assert mining_alpha(200, 2000, ramp=0.2) == pytest.approx(-1.0)
    assert mining_alpha(400, 2000, ramp=0.2) == pytest.approx(1.0)
