"""Tables against diffusers' own schedulers: 20 steps of float32 agree to 1e-6, with our points and theirs the same."""

import warnings

import pytest
import torch

from fastcifar.diffusion import DiscreteVP, Points, exploding, sample, solver_table
from fastcifar.diffusion.one_step import heun

diffusers = pytest.importorskip("diffusers")

STEPS = 20
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def scheduler(name, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(diffusers, f"{name}Scheduler")(**config)
    made.set_timesteps(STEPS)
    return made


def model(x, t):
    share = t.view(-1, 1, 1, 1) / 1000  # of noise in x, about: as a denoiser has it, so that samples keep their size
    return share * x + 0.3 * torch.tanh(x.roll(1, -1) + share)


def start(scale=1.0):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * scale


def noises(count=STEPS):
    return list(torch.randn(count, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def theirs(peer, noise=None, draws=None, scale=1.0):
    x = start(scale)
    for i, t in enumerate(peer.timesteps):
        seen = peer.scale_model_input(x, t) if hasattr(peer, "scale_model_input") else x
        output = model(seen, t.float().expand(len(x)))
        extra = {} if noise is None else {"variance_noise": noise[i]}
        extra |= {} if draws is None else {"generator": draws}
        x = peer.step(output, t, x, **extra).prev_sample
    return x


def assert_close(ours, peer):
    assert ours.dtype == peer.dtype == torch.float32
    assert bool(torch.isfinite(peer).all())
    error = (ours - peer).norm() / peer.norm()
    assert error < 1e-6, float(error)


def points_of(peer, spacing, dropped, **options):
    points = DiscreteVP.from_alphas_cumprod(peer.alphas_cumprod).points(STEPS, spacing, dropped=dropped, **options)
    assert points.timesteps[:-1].tolist() == peer.timesteps.double().tolist()
    return points


def levels_of(peer):
    """Its own sigmas, which float32 has rounded."""
    sigma = peer.sigmas.double()
    return Points(torch.cat([peer.timesteps.double(), torch.zeros(1)]), torch.ones_like(sigma), sigma)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim(prediction, clip, eta):
    peer = scheduler("DDIM", prediction_type=prediction, clip_sample=clip)
    points = points_of(peer, "leading", 0)
    noise = noises() if eta else None
    x = start()
    for i, t in enumerate(peer.timesteps):
        extra = {"variance_noise": noise[i]} if eta else {}
        x = peer.step(model(x, t.float().expand(4)), t, x, eta=eta, **extra).prev_sample
    limit = 1.0 if clip else None
    ours = sample(model, start(), "ddim", points=points, prediction=prediction, eta=eta, limit=limit, noise=noise)
    assert_close(ours, x)


def test_ddim_goes_to_the_next_point_where_diffusers_goes_a_stride_on():
    """Trap 8: the two differ for times that are not "leading"."""
    peer = scheduler("DDIM", clip_sample=False, timestep_spacing="linspace")
    ours = sample(model, start(), "ddim", points=points_of(peer, "linspace", 0))
    assert (ours - theirs(peer)).abs().max() > 1e-3


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm(variance, clip):
    peer = scheduler("DDPM", variance_type=variance, clip_sample=clip)
    peer_x = theirs(peer, draws=torch.Generator().manual_seed(5))
    points = points_of(peer, "leading", 0)
    ours = sample(
        model,
        start(),
        "ddpm",
        points=points,
        variance=variance,
        limit=1.0 if clip else None,
        generator=torch.Generator().manual_seed(5),
    )
    assert_close(ours, peer_x)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_ddpm_with_a_learned_variance_takes_noise_that_was_multiplied(variance):
    peer = scheduler("DDPM", variance_type=variance, clip_sample=False)
    points = points_of(peer, "leading", 0)
    x = start()
    predicted = [0.01 + 0.02 * z.abs() if variance == "learned" else z.tanh() for z in noises()[::-1]]
    source = torch.Generator().manual_seed(7)
    for t, v in zip(peer.timesteps, predicted, strict=True):
        x = peer.step(torch.cat([model(x, t.float().expand(4)), v], 1), t, x, generator=source).prev_sample
    source = torch.Generator().manual_seed(7)

    def noise(i, x):
        z = torch.randn(x.shape, generator=source)
        v = peer._get_variance(int(peer.timesteps[i]), predicted_variance=predicted[i], variance_type=variance)
        return (v.sqrt() if variance == "learned" else torch.exp(0.5 * v)) * z

    ours = sample(model, start(), "ddpm", points=points, variance=variance, noise=noise)
    assert_close(ours, x)


# diffusers refuses "dpmsolver" to a sigma of 0
@pytest.mark.parametrize(
    ("algorithm", "final"), [("dpmsolver++", "zero"), ("dpmsolver++", "min"), ("dpmsolver", "min")]
)
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver(algorithm, solver_type, order, final):
    # The jump from time 50 to sigma_min is three times as long as the step before. At order 3 its weights are so large
    # that either result is 1e-6 from float64's, so that the last step is taken at order 1.
    euler = order == 3 and final == "min"
    peer = scheduler(
        "DPMSolverMultistep",
        algorithm_type=algorithm,
        solver_type=solver_type,
        solver_order=order,
        euler_at_final=euler,
        final_sigmas_type="zero" if final == "zero" else "sigma_min",
    )
    points = points_of(peer, "linspace", 1, final=final)
    options = {"order": order, "algorithm": algorithm, "solver_type": solver_type, "euler_at_final": euler}
    assert_close(sample(model, start(), "dpm_solver", points=points, **options), theirs(peer))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_dpm_solver_of_other_predictions(prediction):
    peer = scheduler("DPMSolverMultistep", prediction_type=prediction)
    points = points_of(peer, "linspace", 1)
    assert_close(sample(model, start(), points=points, prediction=prediction), theirs(peer))


@pytest.mark.parametrize("algorithm", ["sde-dpmsolver++", "sde-dpmsolver"])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2])
def test_sde_dpm_solver(algorithm, solver_type, order):
    final = "zero" if algorithm.endswith("++") else "sigma_min"
    peer = scheduler(
        "DPMSolverMultistep",
        algorithm_type=algorithm,
        solver_type=solver_type,
        solver_order=order,
        final_sigmas_type=final,
    )
    points = points_of(peer, "linspace", 1, final=final.removeprefix("sigma_"))
    options = {"order": order, "algorithm": algorithm, "solver_type": solver_type}
    ours = sample(model, start(), "dpm_solver", points=points, noise=noises(), **options)
    assert_close(ours, theirs(peer, noises()))


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
# Without lower_order_final diffusers has no order for the last two of 20 steps in threes.
@pytest.mark.parametrize(("order", "lowered"), [(1, True), (2, True), (3, True), (1, False), (2, False)])
def test_singlestep_dpm_solver(solver_type, order, lowered):
    peer = scheduler("DPMSolverSinglestep", solver_type=solver_type, solver_order=order, lower_order_final=lowered)
    points = points_of(peer, "linspace", 1)
    options = {"order": order, "solver_type": solver_type, "lower_order_final": lowered}
    assert_close(sample(model, start(), "dpm_solver_singlestep", points=points, **options), theirs(peer))


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("disabled", [(), (0, 3)])
def test_unipc(variant, order, disabled):
    # A last sigma of 0 makes diffusers' B(h) of bh1 infinite and its sample NaN; ours is finite.
    final = "min" if variant == "bh1" else "zero"
    peer = scheduler(
        "UniPCMultistep",
        solver_type=variant,
        solver_order=order,
        disable_corrector=list(disabled),
        final_sigmas_type="sigma_min" if final == "min" else "zero",
    )
    points = points_of(peer, "linspace", 1, final=final)
    ours = sample(model, start(), "unipc", points=points, order=order, variant=variant, disable_corrector=disabled)
    assert_close(ours, theirs(peer))


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_of_noise(order):
    peer = scheduler("UniPCMultistep", predict_x0=False, solver_order=order, final_sigmas_type="sigma_min")
    points = points_of(peer, "linspace", 1, final="min")
    assert_close(sample(model, start(), "unipc", points=points, order=order, expands="noise"), theirs(peer))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order):
    peer = scheduler("DEISMultistep", solver_order=order)
    points = points_of(peer, "linspace", 1, final="min")
    peer.sigmas = peer.sigmas.double()  # in float32 its coefficients of order 3 cancel: 1.7e-6 from float64's
    assert_close(sample(model, start(), "deis", points=points, order=order), theirs(peer))


@pytest.mark.parametrize("solver", ["euler", "euler_ancestral", "lms"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_solvers_of_exploding_variance(solver, prediction):
    name = {"euler": "EulerDiscrete", "euler_ancestral": "EulerAncestralDiscrete", "lms": "LMSDiscrete"}[solver]
    peer = scheduler(name, prediction_type=prediction)
    points = levels_of(peer)
    schedule = DiscreteVP.from_alphas_cumprod(peer.alphas_cumprod)
    laid_out = exploding(schedule.points(STEPS, "linspace", rounded=False))
    # Theirs interpolate sigma between whole times, ours lambda.
    torch.testing.assert_close(laid_out.sigma, points.sigma, rtol=1e-3, atol=1e-6)
    scale = float(peer.init_noise_sigma)
    draws = torch.Generator().manual_seed(3)
    x = theirs(peer, draws=draws if solver == "euler_ancestral" else None, scale=scale)
    options = {"generator": torch.Generator().manual_seed(3)} if solver == "euler_ancestral" else {}
    ours = sample(
        model, start(), solver, points=points, prediction=prediction, scaled=True, start_scale=scale, **options
    )
    assert_close(ours, x)


@pytest.mark.parametrize("clip", [False, True])
def test_heun(clip):
    peer = scheduler("HeunDiscrete", clip_sample=clip)
    sigma = torch.cat([peer.sigmas[:1], peer.sigmas[1::2]]).double()
    times = torch.cat([peer.timesteps[:1], peer.timesteps[1::2], torch.zeros(1)]).double()
    points = Points(times, torch.ones_like(sigma), sigma)
    table = heun(points, scaled=True, limit=1.0 if clip else None)
    assert table.timesteps.tolist() == peer.timesteps.tolist()
    scale = float(peer.init_noise_sigma)
    assert_close(sample(model, start(), table, start_scale=scale), theirs(peer, scale=scale))


@pytest.mark.parametrize("plms", [True, False])
def test_pndm(plms):
    peer = scheduler("PNDM", skip_prk_steps=plms)
    schedule = DiscreteVP.from_alphas_cumprod(peer.alphas_cumprod)
    points = schedule.points(STEPS, "leading", final="min")
    middle = None
    if not plms:
        whole = schedule.points(3, times=points.timesteps[:3] - 1000 // STEPS // 2)
        middle = Points(*(t[:3] for t in whole))
    table = solver_table("pndm", points, middle=middle)
    assert table.timesteps.tolist() == peer.timesteps.tolist()
    assert_close(sample(model, start(), table), theirs(peer))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules(spacing, betas):
    peer = scheduler("DDIM", beta_schedule=betas, timestep_spacing=spacing)
    made = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}[betas]
    arguments = (1000, 1e-4, 0.02) if "linear" in betas else ()
    ours = getattr(DiscreteVP, made)(*arguments)
    times = torch.arange(1000)
    torch.testing.assert_close(ours.alpha(times) ** 2, peer.alphas_cumprod.double(), rtol=2e-4, atol=1e-7)
    assert ours.points(STEPS, spacing).timesteps[:-1].tolist() == peer.timesteps.tolist()
    peer = scheduler("DPMSolverMultistep", beta_schedule=betas, timestep_spacing=spacing)
    assert ours.points(STEPS, spacing, dropped=1).timesteps[:-1].tolist() == peer.timesteps.tolist()


@pytest.mark.parametrize(("spacing", "flag"), [("karras", "use_karras_sigmas"), ("lambda", "use_lu_lambdas")])
def test_sigmas_are_not_rounded_where_times_are(spacing, flag):
    """Trap 7."""
    peer = scheduler("DPMSolverMultistep", **{flag: True})
    schedule = DiscreteVP.from_alphas_cumprod(peer.alphas_cumprod)
    points = schedule.points(STEPS, spacing)
    assert points.timesteps[:-1].tolist() == peer.timesteps.tolist()
    torch.testing.assert_close(points.sigma / points.alpha, peer.sigmas.double(), rtol=1e-5, atol=0)
    assert not torch.allclose(points.sigma[:-1], schedule.sigma(points.timesteps[:-1]), rtol=1e-6)
