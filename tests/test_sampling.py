"""sample(): what it calls, what it draws, what flows back through it, and what it refuses."""

import math
import sys

import pytest
import torch

from fastcifar.diffusion import (
    CosineVP,
    Decision,
    DiscreteVP,
    EDMSchedule,
    FlowSchedule,
    LinearVP,
    Points,
    SolverTable,
    Thresholding,
    ddim,
    ddpm,
    dpm_solver,
    exploding,
    heun,
    normal_numbers,
    sample,
    solver_table,
    usf_table,
)

SOLVERS = ["ddim", "dpm_solver", "dpm_solver_singlestep", "unipc", "deis", "pndm", "ipndm", "lms", "heun", "euler"]


def model(x, t):
    share = t.view(-1, *[1] * (x.dim() - 1)).to(x) / 1000
    return share * x + 0.3 * torch.tanh(x.roll(1, -1) + share)


def start(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*(shape or (3, 2, 4, 4)), generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("schedule", [DiscreteVP.linear(), DiscreteVP.cosine(), LinearVP(), CosineVP(), EDMSchedule()])
def test_inverses_of_schedules(schedule):
    t = torch.linspace(schedule.last, schedule.first, 37, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(schedule.time(schedule.lam(t)), t, rtol=1e-9, atol=1e-9)
    assert bool((schedule.lam(t).diff() < 0).all())
    if not isinstance(schedule, EDMSchedule):
        torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))


def test_points_of_schedules():
    edm = EDMSchedule().points(18)
    assert len(edm.sigma) == 19
    assert edm.sigma[-1] == 0
    assert float(edm.sigma[0]) == pytest.approx(80)
    assert float(edm.sigma[17]) == pytest.approx(0.002)
    u = 5 / 17  # equation 5 of EDM
    expected = (80 ** (1 / 7) + u * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert float(edm.sigma[5]) == pytest.approx(expected)
    for spacing in ("linspace", "quadratic", "lambda", "karras", "trailing"):
        points = LinearVP().points(10, spacing)
        assert len(points.sigma) == 11
        assert bool((points.lam.diff() > 0).all())
    assert DiscreteVP.linear().points(4, times=[999, 500, 100, 3]).timesteps.tolist() == [999, 500, 100, 3, 0]
    flow = FlowSchedule(shift=3.0).points(4)
    assert flow.timesteps[0] == 1
    assert flow.sigma[-1] == 0
    assert float(flow.timesteps[1]) > 0.75


def test_flow_matching_is_eulers_method():
    points = FlowSchedule().points(8)
    table = usf_table(points, [Decision(prediction="flow")] * 8, prediction="flow")
    x = start(dtype=torch.float64)
    expected = x
    for s, t in zip(points.sigma[:-1], points.sigma[1:], strict=True):
        expected = expected + (t - s) * model(expected, s.expand(3))
    torch.testing.assert_close(sample(model, x, table), expected, rtol=1e-12, atol=1e-12)
    by_name = sample(model, x, "ddim", 8, schedule=FlowSchedule(), prediction="flow")
    torch.testing.assert_close(by_name, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("churn", [0.0, 12.0, 1000.0])
def test_edm_is_its_algorithm_2(churn):
    schedule, count = EDMSchedule(), 9
    noise = [start(3, 5, dtype=torch.float64, seed=i) for i in range(2 * count)]

    def denoiser(x, t):
        return x / (1 + t.view(-1, 1) ** 2) + 0.1 * torch.tanh(x.roll(1, -1))

    sigma = schedule.points(count).sigma.tolist()
    drawn = iter(noise)
    x = start(3, 5, dtype=torch.float64) * 80
    for i in range(count):
        gamma = min(churn / count, math.sqrt(2) - 1) if 0.05 <= sigma[i] <= 50 else 0.0
        raised = sigma[i] * (1 + gamma)
        if gamma:
            x = x + math.sqrt(raised**2 - sigma[i] ** 2) * 1.003 * next(drawn)
        slope = (x - denoiser(x, torch.full((3,), raised, dtype=torch.float64))) / raised
        following = x + (sigma[i + 1] - raised) * slope
        if sigma[i + 1] > 0:
            end = (following - denoiser(following, torch.full((3,), sigma[i + 1], dtype=torch.float64))) / sigma[i + 1]
            following = x + (sigma[i + 1] - raised) * (slope + end) / 2
        x = following
    again = iter(noise)
    ours = sample(
        denoiser,
        start(3, 5, dtype=torch.float64),
        "edm",
        count,
        schedule=schedule,
        prediction="x0",
        churn=churn,
        churn_min=0.05,
        churn_max=50.0,
        churn_noise=1.003,
        noise=lambda i, x: next(again),
    )
    torch.testing.assert_close(ours, x, rtol=1e-11, atol=1e-11)


def test_heun_evaluates_twice_a_step_and_once_in_the_last():
    assert len(heun(EDMSchedule().points(7))) == 13
    assert len(heun(LinearVP().points(7))) == 14
    assert len(heun(EDMSchedule().points(7), churn=10.0)) == 14  # noise comes first


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "flow"])
def test_what_the_model_predicts_does_not_matter(solver, prediction):
    """The same denoiser, told in each way, gives the same samples."""
    schedule = DiscreteVP.linear()

    def said(x, t):
        a, s = (f(t[0]) for f in (schedule.alpha, schedule.sigma))
        noise = model(x, t)
        data = (x - s * noise) / a
        return {"epsilon": noise, "x0": data, "v": a * noise - s * data, "flow": noise - data}[prediction]

    x, options = start(dtype=torch.float64), {"schedule": schedule, "spacing": "trailing", "final": "min"}
    expected = sample(model, x, solver, 10, **options)
    found = sample(said, x, solver, 10, prediction=prediction, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_variance_exploding_or_not_is_the_same_ode():
    """Trap 10: x / alpha on exploded points, the model seeing x / sqrt(1 + sigma^2), is DDIM on the others."""
    points = DiscreteVP.linear().points(10, "trailing")
    x = start(dtype=torch.float64)
    expected = sample(model, x, "ddim", points=points)
    other = exploding(points)
    scale = float(1 / points.alpha[0])
    for solver in ("euler", "ddim"):
        found = sample(model, x, solver, points=other, scaled=True, start_scale=scale)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_guidance_is_diffusers_convention():
    """Trap 11: u + g (c - u), so DiffuseVAE's w is g - 1."""
    calls = []

    def pair(x, t):
        calls.append(x.shape)
        return model(x, t), 0.5 * model(x, t)

    x, g = start(dtype=torch.float64), 3.0
    found = sample(pair, x, "dpm_solver", 8, guidance=g)
    combined = sample(lambda x, t: (g * 1.0 + (1 - g) * 0.5) * model(x, t), x, "dpm_solver", 8)
    torch.testing.assert_close(found, combined, rtol=1e-11, atol=1e-11)
    assert len(calls) == 8


def test_a_table_says_all():
    points = DiscreteVP.linear().points(6, "trailing")
    x = start()
    assert torch.equal(sample(model, x, dpm_solver(points)), sample(model, x, points=points))
    assert torch.equal(sample(model, x, dpm_solver(points)), sample(model, x, "dpm_solver", 6, spacing="trailing"))
    with pytest.raises(ValueError, match="a table to come alone, got steps, order with it"):
        sample(model, x, dpm_solver(points), 6, order=2)
    with pytest.raises(ValueError, match="got none of them"):
        sample(model, x)
    with pytest.raises(ValueError, match="points or steps of a schedule, got both"):
        sample(model, x, steps=6, points=points)
    with pytest.raises(TypeError, match="a name or a SolverTable, got int"):
        sample(model, x, 3)


def test_noise_comes_from_where_it_is_asked_for():
    """Trap 14."""
    x = start()
    table = ddpm(DiscreteVP.linear().points(5))
    first, second = (sample(model, x, table, seed=7) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sample(model, x, table, seed=8))
    counted = [normal_numbers(7, x.numel(), stream=i).view(x.shape) for i in range(5)]
    torch.testing.assert_close(sample(model, x, table, noise=counted), first)
    source = torch.Generator().manual_seed(3)
    given = [torch.randn(x.shape, generator=source) for _ in range(4)]
    assert torch.equal(
        sample(model, x, table, generator=torch.Generator().manual_seed(3)), sample(model, x, table, noise=given)
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        one = sample(model, x, table)
        torch.manual_seed(5)
        assert torch.equal(one, sample(model, x, table))
    with pytest.raises(ValueError, match="one of noise, generator and seed"):
        sample(model, x, table, seed=1, noise=given)


def test_thresholding_is_imagens():
    """Traps 3 and 4: s = max(quantile, 1), and a max_value of 1 is just a clamp."""
    x, points = 2 * start(dtype=torch.float64), DiscreteVP.linear().points(6, "trailing")
    ratio, most = 0.9, 4.0
    found = sample(model, x, "ddim", points=points, clipped_noise=True, thresholding=Thresholding(ratio, most))
    expected = x
    for i in range(6):
        a, s = points.alpha[i], points.sigma[i]
        data = (expected - s * model(expected, points.timesteps[i].expand(3))) / a
        size = data.flatten(1).abs().quantile(ratio, 1).clamp(1, most).view(-1, 1, 1, 1)
        data = data.clamp(-size, size) / size
        expected = points.alpha[i + 1] * data + points.sigma[i + 1] * (expected - a * data) / s
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    clamp = sample(model, x, "ddim", points=points, clipped_noise=True, limit=1.0)
    torch.testing.assert_close(
        sample(model, x, "ddim", points=points, clipped_noise=True, thresholding=Thresholding(ratio)), clamp
    )


@pytest.mark.parametrize(("solver", "options"), [("deis", {}), ("lms", {}), ("ddim", {"limit": 1.0}), ("heun", {})])
def test_thresholding_needs_data_to_threshold(solver, options):
    with pytest.raises(ValueError, match="for thresholding"):
        sample(model, start(), solver, 6, thresholding=Thresholding(), **options)


def test_thresholding_of_a_table_is_refused():
    with pytest.raises(ValueError, match="which is not linear"):
        sample(model, start(), ddim(DiscreteVP.linear().points(6)), thresholding=Thresholding())


@pytest.mark.parametrize("solver", ["dpm_solver", "unipc", "ddim", "heun"])
def test_gradients_flow_to_x_coefficients_and_the_model(solver):
    """Trap 15: nothing that a backward pass reads is overwritten."""
    points = LinearVP().points(3, "lambda")
    table = solver_table(solver, points)
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = start(2, 3, dtype=torch.float64).requires_grad_()
    rows = table.coefficients.clone().requires_grad_()

    def run(x, rows, weight):
        return sample(lambda x, t: weight * torch.tanh(x), x, table, coefficients=rows)

    mask = table.coefficients != 0
    assert torch.autograd.gradcheck(lambda x, r, w: run(x, torch.where(mask, r, 0.0), w), (x, rows, weight))
    kept = sample(lambda x, t: weight * torch.tanh(x), x.detach(), table, grad=True)
    assert kept.requires_grad
    assert not sample(lambda x, t: weight * torch.tanh(x), x.detach(), table).requires_grad
    torch.testing.assert_close(kept, run(x, rows, weight))


def test_in_place_and_differentiable_runs_agree():
    for solver in SOLVERS:
        x = start()
        table = solver_table(solver, LinearVP().points(7, "lambda"))
        torch.testing.assert_close(sample(model, x, table), sample(model, x, table, grad=True))


def test_callback_trajectory_and_x_as_it_was():
    x = start()
    before, seen = x.clone(), []
    final, trajectory = sample(
        model, x, "unipc", 5, return_trajectory=True, callback=lambda i, now: seen.append((i, float(now.sum())))
    )
    assert torch.equal(x, before)
    assert len(trajectory) == 6
    assert torch.equal(trajectory[0], x)
    assert torch.equal(trajectory[-1], final)
    assert seen == [(i, float(state.sum())) for i, state in enumerate(trajectory[1:])]


def test_progress_needs_tqdm(monkeypatch):
    assert sample(model, start(), "ddim", 3, progress=True).shape == start().shape
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"fastcifar\[progress\]"):
        sample(model, start(), "ddim", 3, progress=True)


def test_half_precision_and_an_empty_batch():
    x = start().bfloat16()
    found = sample(lambda x, t: model(x.float(), t).bfloat16(), x, "unipc", 6)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), sample(model, x.float(), "unipc", 6), rtol=0.1, atol=0.1)
    assert sample(model, start()[:0], "unipc", 6).shape == (0, 2, 4, 4)


def test_wrong_coefficients_are_a_sentence():
    with pytest.raises(ValueError, match=r"expected coefficients \[6, 3, 11\]"):
        sample(model, start(), "ddim", 6, coefficients=torch.zeros(5, 3, 11))


def test_points_that_are_none_are_sentences():
    good = DiscreteVP.linear().points(3)
    with pytest.raises(TypeError, match="expected Points, got list"):
        dpm_solver([1, 2])
    with pytest.raises(ValueError, match=r"S \+ 1 points"):
        ddim(Points(good.timesteps, good.alpha[:2], good.sigma))
    with pytest.raises(ValueError, match="finite alpha and sigma"):
        ddim(Points(good.timesteps, good.alpha * math.nan, good.sigma))
    with pytest.raises(ValueError, match="sigma above 0 but at the last"):
        ddim(Points(good.timesteps, good.alpha, good.sigma * 0))
    assert isinstance(ddim(good), SolverTable)
