"""Measured orders of convergence, in float64, on a mixture of Gaussians whose score is exact, are those of theory."""

import functools
import math

import pytest
import torch

from fastcifar.diffusion import LinearVP, sample

integrate = pytest.importorskip("scipy.integrate")

SCHEDULE = LinearVP(last=0.01)
SPREAD = 0.4
MEANS = 0.3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
START = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def noise_of(x, alpha, sigma):
    """E[eps | x], by Bayes' rule."""
    variance = alpha * alpha * SPREAD * SPREAD + sigma * sigma
    away = x[:, None] - alpha * MEANS
    share = torch.softmax(-away.square().sum(-1) / (2 * variance), 1)
    return sigma * (share[..., None] * away).sum(1) / variance


@functools.cache
def level(t):
    return float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))


def model(x, t):
    return noise_of(x, *level(float(t[0])))


@functools.cache
def truth():
    """The probability flow ODE ``dy / d rho = eps`` of ``y = x / alpha``, over ln rho."""
    points = SCHEDULE.points(1, "lambda")
    first, last = (-points.lam).tolist()

    def slope(u, y):
        rho = math.exp(u)
        alpha = 1 / math.hypot(1, rho)
        x = torch.from_numpy(y).view(START.shape) * alpha
        return (rho * noise_of(x, alpha, rho * alpha)).numpy().ravel()

    start = (START / points.alpha[0]).numpy().ravel()
    solved = integrate.solve_ivp(slope, (first, last), start, method="DOP853", rtol=1e-11, atol=1e-12)
    return torch.from_numpy(solved.y[:, -1]).view(START.shape) * points.alpha[1]


def error(solver, steps, options):
    found = sample(model, START, solver, points=SCHEDULE.points(steps, "lambda"), **options)
    return float((found - truth()).norm() / truth().norm())


FULL = {"lower_order_final": False}

ORDERS = [
    (1, "ddim", {}),
    (1, "euler", {}),
    (2, "heun", {}),
    (2, "dpm_solver", {}),
    (2, "dpm_solver", {"solver_type": "heun"}),
    (2, "dpm_solver", {"algorithm": "dpmsolver"}),
    (2, "dpm_solver", {"order": 3}),  # as published: trap 1
    (2, "dpm_solver", {"order": 3, "algorithm": "dpmsolver"}),
    (3, "dpm_solver", {"order": 3, "exact": True}),
    (4, "dpm_solver", {"order": 4, "exact": True}),
    (2, "dpm_solver_singlestep", FULL),
    (3, "dpm_solver_singlestep", {"order": 3, **FULL}),
    (3, "dpm_solver_singlestep", {"order": 3, "solver_type": "heun", **FULL}),
    (2, "unipc", {"order": 1, **FULL}),  # the corrector adds one
    (3, "unipc", {"order": 2, **FULL}),
    (3, "unipc", {"order": 2, "variant": "bh1", **FULL}),
    (4, "unipc", {"order": 3, **FULL}),
    (4, "unipc", {"order": 3, "expands": "noise", **FULL}),
    (5, "unipc", {"order": 4, **FULL}),
    (3, "unipc", {"order": 3, "corrector": False, **FULL}),
    (2, "deis", {"order": 2}),
    (3, "deis", {"order": 3}),
    (2, "lms", {"order": 2}),
    (3, "lms", {"order": 3}),
    (4, "lms", {"order": 4}),
    (2, "ipndm", {}),  # its weights are of even spacing, for an integral that is weighted
    (2, "pndm", {}),
]


@pytest.mark.parametrize(("order", "solver", "options"), ORDERS)
def test_order_of_convergence(order, solver, options):
    coarse, fine = 96, 192
    found = math.log2(error(solver, coarse, options) / error(solver, fine, options))
    assert abs(found - order) < 0.3, found


def test_the_published_third_order_is_not_worse_at_few_steps():
    """Spec of the drop-in default: at 6 calls the exact one gains nothing, at 60 it is an order ahead."""
    few = [error("dpm_solver", 6, {"order": 3, "exact": e}) for e in (False, True)]
    many = [error("dpm_solver", 60, {"order": 3, "exact": e}) for e in (False, True)]
    assert few[0] < 2 * few[1]
    assert many[1] < many[0] / 5
