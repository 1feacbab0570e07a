"""fastcifar.compat.diffusers: what is kept and overwritten, what is left out, and noise that the kernel draws."""

import pytest
import torch

pytest.importorskip("diffusers")

from fastcifar import _library
from fastcifar.compat import diffusers as compat
from fastcifar.diffusion import normal_numbers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

MULTISTEP = {
    "DPMSolverMultistepScheduler": ("model_outputs", {"solver_order": 3}),
    "UniPCMultistepScheduler": ("model_outputs", {"solver_order": 3}),
    "DEISMultistepScheduler": ("model_outputs", {"solver_order": 2}),
}


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _walk(scheduler, watch=None, steps=12):
    scheduler.set_timesteps(steps)
    x, samples = _random(2, 3, 8, 8), []
    for t in scheduler.timesteps:
        x = scheduler.step((0.7 * x).sin(), t, x).prev_sample
        samples.append(x)
        if watch is not None:
            watch(scheduler)
    return samples


@pytest.mark.parametrize("name", MULTISTEP)
def test_what_is_held_elsewhere_is_not_overwritten(name):
    attribute, config = MULTISTEP[name]
    held = []

    def hold(scheduler):
        kept = [*getattr(scheduler, attribute), getattr(scheduler, "last_sample", None)]
        held.extend((tensor, tensor.clone()) for tensor in kept if tensor is not None)

    alone, watched = _walk(getattr(compat, name)(**config)), _walk(getattr(compat, name)(**config), hold)
    assert len(held) > 12
    for tensor, copy in held:
        assert torch.equal(tensor, copy)
    for a, b in zip(alone, watched, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MULTISTEP)
@pytest.mark.skipif(not _library.owned("solver_step", "cpu"), reason="references allocate")
def test_what_is_not_held_is_written_where_it_lay(name):
    attribute, config = MULTISTEP[name]
    places = []

    def note(scheduler):
        places.append(getattr(scheduler, attribute)[-1].data_ptr())

    _walk(getattr(compat, name)(**config), note)
    assert len(set(places[5:])) <= config["solver_order"]


@pytest.mark.parametrize("name", MULTISTEP)
def test_tensors_of_others_are_never_overwritten(name):
    """Set from outside, as the peer's tests do, or the caller's own samples and outputs."""
    _, config = MULTISTEP[name]
    scheduler, order = getattr(compat, name)(**config), config["solver_order"]
    scheduler.set_timesteps(8)
    mine = [_random(2, 3, 8, 8, seed=i) for i in range(order)]
    copies = [tensor.clone() for tensor in mine]
    x = _random(2, 3, 8, 8, seed=9)
    for t in scheduler.timesteps[:order]:
        x = scheduler.step(0.5 * x, t, x).prev_sample
    scheduler.model_outputs = mine[:]
    given = []
    for t in scheduler.timesteps[order:]:
        given.append((x, x.clone()))
        x = scheduler.step(0.5 * x, t, x).prev_sample
    for tensor, copy in [*zip(mine, copies, strict=True), *given]:
        assert torch.equal(tensor, copy)


def test_gradients_are_not_overwritten():
    """Steps without gradients after steps that have some."""
    scheduler, start = compat.UniPCMultistepScheduler(solver_order=3), _random(2, 3, 8, 8).requires_grad_()
    scheduler.set_timesteps(10)
    x = start
    for t in scheduler.timesteps[:5]:
        x = scheduler.step(0.5 * x, t, x).prev_sample
    with torch.no_grad():
        y = x.detach()
        for t in scheduler.timesteps[5:]:
            y = scheduler.step(0.5 * y, t, y).prev_sample
    x.sum().backward()
    assert torch.isfinite(start.grad).all()


WITH_IMAGES = [
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
]


@pytest.mark.parametrize("name", [*WITH_IMAGES, "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("config", [{}, {"clip_sample": False}, {"thresholding": True, "sample_max_value": 2.0}])
def test_the_image_may_be_left_out(name, config):
    if not (config.keys() <= {"clip_sample"} and name.startswith("Heun")) and "Discrete" in name:
        config = {}
    pair = []
    for wanted in (True, False):
        scheduler, x = getattr(compat, name)(**config), _random(2, 3, 8, 8)
        scheduler.return_original = wanted
        scheduler.set_timesteps(6)
        torch.manual_seed(0)
        for t in scheduler.timesteps:
            made = scheduler.step(0.5 * scheduler.scale_model_input(x, t), t, x)
            assert (made.pred_original_sample is not None) == wanted
            x = made.prev_sample
        pair.append(x)
        fresh = getattr(compat, name)(**config)
        fresh.return_original = wanted
        fresh.set_timesteps(6)
        t = fresh.timesteps[0]
        assert (fresh.step(x, t, x, return_dict=False)[1] is not None) == wanted
    torch.testing.assert_close(*pair)


NOISY = [
    ("DDIMScheduler", {}, {"eta": 1.0}),
    ("DDPMScheduler", {}, {}),
    ("DDPMScheduler", {"variance_type": "learned_range"}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}, {}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("EulerDiscreteScheduler", {}, {"s_churn": 5.0}),
]


def _drawn(name, config, options, seed=None, **more):
    scheduler, x = getattr(compat, name)(**config), _random(2, 3, 8, 8)
    scheduler.draw_in_kernel(seed)
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps:
        output = 0.5 * scheduler.scale_model_input(x, t)
        output = torch.cat([output, output], 1) if config.get("variance_type") == "learned_range" else output
        x = scheduler.step(output, t, x, **options, **more).prev_sample
    return x


@pytest.mark.parametrize(("name", "config", "options"), NOISY)
def test_noise_that_the_kernel_draws_is_counted(name, config, options):
    a, b, c = (_drawn(name, config, options, seed) for seed in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)
    torch.manual_seed(1)
    d = _drawn(name, config, options)
    torch.manual_seed(1)
    assert torch.equal(_drawn(name, config, options), d)
    generator = torch.Generator().manual_seed(3)
    plain = getattr(compat, name)(**config)
    plain.set_timesteps(6)
    with_generator = _drawn(name, config, options, 5, generator=generator)
    assert not torch.allclose(with_generator, a)


def test_a_step_draws_the_stream_of_its_number():
    scheduler, x = compat.DDPMScheduler(clip_sample=False), _random(2, 3, 8, 8)
    scheduler.draw_in_kernel(7)
    scheduler.set_timesteps(4)
    known = compat.DDPMScheduler(clip_sample=False)
    known.set_timesteps(4)
    y = x
    for step, t in enumerate(scheduler.timesteps):
        x = scheduler.step(0.5 * x, t, x).prev_sample
        mean = _mean(known, t, y)
        noise = normal_numbers(7, y.numel(), stream=step).view(y.shape)
        deviation = float(known._get_variance(int(t))) ** 0.5 if t > 0 else 0.0
        y = mean + deviation * noise
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def _mean(scheduler, t, x):
    program = scheduler._ddpm(int(t))
    image = program.coefficients[0, 0] * x + program.coefficients[0, 1] * 0.5 * x
    return (program.coefficients[2, 0] * x + program.coefficients[2, 8] * image).float()
