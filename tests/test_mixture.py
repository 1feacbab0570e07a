"""The exact mixture: its predictions against their definitions, and its flow against an integrator of others'."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from fastcifar.diffusion import EDMSchedule, GaussianMixture, LinearVP


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uneven() -> GaussianMixture:
    std = torch.tensor([0.3, 0.5, 1.0], dtype=torch.float64)
    return GaussianMixture(normal(3, 2, 2), std, torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("t", [1.0, 0.3, 1e-3])
def test_predictions_are_one_another(t: float) -> None:
    mixture, x = uneven(), normal(5, 2, 2, seed=1)
    alpha, sigma = LinearVP().alpha(t), LinearVP().sigma(t)
    names = ("epsilon", "x0", "v", "flow", "score")
    eps, x0, v, flow, score = (mixture.predict(x, alpha, sigma, name) for name in names)
    torch.testing.assert_close(alpha * x0 + sigma * eps, x, rtol=0, atol=1e-14)
    torch.testing.assert_close(v, alpha * eps - sigma * x0)
    torch.testing.assert_close(flow, eps - x0)
    torch.testing.assert_close(score * sigma, -eps)
    torch.testing.assert_close(mixture.model("v")(x, t), v, rtol=1e-12, atol=1e-12)
    times = torch.full((5,), t, dtype=torch.float64)
    torch.testing.assert_close(mixture.model("v")(x, times), v, rtol=1e-12, atol=1e-12)
    single = mixture.predict(x.float(), alpha, sigma)
    assert single.dtype == torch.float32
    assert torch.equal(single, mixture.predict(x.float().double(), alpha, sigma).float())


def test_the_score_is_the_gradient_of_the_log_density() -> None:
    mixture, x = uneven(), normal(5, 2, 2, seed=1).requires_grad_()
    alpha, sigma = 0.8, 0.6
    density = torch.zeros(5, dtype=torch.float64)
    for mean, std, weight in zip(mixture.means, mixture.std, mixture.weights, strict=True):
        variance = alpha**2 * std**2 + sigma**2
        square = (x - alpha * mean).square().sum((1, 2))
        density = density + weight * (-square / (2 * variance)).exp() / (2 * math.pi * variance) ** 2
    (expected,) = torch.autograd.grad(density.log().sum(), x)
    torch.testing.assert_close(mixture.predict(x.detach(), alpha, sigma, "score"), expected, rtol=1e-12, atol=1e-12)


def test_without_noise_the_sample_is_its_own_prediction() -> None:
    mixture, x = uneven(), normal(5, 2, 2, seed=1)
    torch.testing.assert_close(mixture.predict(x, 1.0, 0.0, "x0"), x)
    assert not mixture.predict(x, 1.0, 0.0, "epsilon").any()


@pytest.mark.parametrize("name", ["smooth", "sharp"])
def test_the_flow_is_dop853s(name: str) -> None:
    mixture, x = getattr(GaussianMixture, name)(), normal(16, 16, seed=1)
    model = mixture.model()

    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        z, beta = torch.from_numpy(flat).view(16, 16), 0.1 + 19.9 * t
        return (0.5 * beta * (model(z, t) / LinearVP().sigma(t) - z)).flatten().numpy()

    truth = solve_ivp(slope, (1.0, 1e-3), x.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-11).y[:, -1]
    ours = mixture.solve(x, 1.0, 1e-3)
    assert np.abs(ours.flatten().numpy() - truth).max() < 1e-9
    # On to no noise at all, and back.
    back = mixture.solve(mixture.solve(ours, 1e-3, 0.0), 0.0, 1e-3)
    torch.testing.assert_close(back, ours, rtol=0, atol=1e-9)


def test_schedules_only_rename_the_flow() -> None:
    """Of one ratio of sigma to alpha, all have the same sample but for its scale."""
    mixture, edm = uneven(), EDMSchedule()
    x, alpha = normal(5, 2, 2, seed=1), LinearVP().alpha(0.5)
    start, end = (float(LinearVP().sigma(t) / LinearVP().alpha(t)) for t in (0.5, 0.1))
    exploding = mixture.solve(x / alpha, start, end, edm)
    torch.testing.assert_close(mixture.solve(x, 0.5, 0.1), exploding * LinearVP().alpha(0.1), rtol=1e-9, atol=1e-9)
    v = mixture.model("v", edm)(x, 2.0)
    eps, x0 = (mixture.model(name, edm)(x, 2.0) for name in ("epsilon", "x0"))
    torch.testing.assert_close(v, (eps - 2 * x0) / 5**0.5)


def test_samples_are_of_the_mixture() -> None:
    mixture = uneven()
    samples = mixture.sample(20_000, torch.Generator().manual_seed(0))
    mean = (mixture.weights.view(-1, 1, 1) * mixture.means).sum(0)
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMixture(torch.zeros(3)), r"expected means \[K, ...\]"),
        (lambda: GaussianMixture(torch.zeros(3, 2), weights=torch.ones(2)), r"weights \[K\]"),
        (lambda: GaussianMixture(torch.zeros(3, 2), 0.0), "above 0"),
        (lambda: GaussianMixture(torch.zeros(3, 2), math.nan), "finite"),
        (lambda: uneven().predict(torch.zeros(2, 3), 1.0, 0.0), r"expected x \[B, 2, 2\]"),
        (lambda: uneven().predict(torch.zeros(2, 2, 2), torch.ones(3), 0.0), "alpha"),
        (lambda: uneven().model("noise"), "prediction"),
        (lambda: uneven().transport(torch.zeros(2, 2, 2), (0.0, 1.0), (1.0, 0.0)), "alpha above 0"),
    ],
)
def test_bad_input(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
