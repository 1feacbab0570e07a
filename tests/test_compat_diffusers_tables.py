"""fastcifar.diffusion.from_diffusers: by formulas and by trying out, against each other and against the schedulers."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

from fastcifar.compat import diffusers as compat
from fastcifar.diffusion import from_diffusers, probing
from fastcifar.diffusion.reference import HISTORY, solver_step
from fastcifar.diffusion.table import SolverTable

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LAST, V, IMAGE = {"final_sigmas_type": "sigma_min"}, {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
CASES = [
    ("DDIMScheduler", {"clip_sample": False}, {}, 0),
    ("DDIMScheduler", {"clip_sample": False, **V}, {"eta": 0.6}, 0),
    ("DDPMScheduler", {"clip_sample": False, **IMAGE}, {}, 0),
    *(
        ("DPMSolverMultistepScheduler", {"algorithm_type": kind, "solver_order": order, **LAST}, {}, order - 1)
        for kind in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
        for order in (1, 2, 3)
        if (kind, order) != ("sde-dpmsolver", 3)
    ),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_type": "heun"}, {}, 1),
    *(("UniPCMultistepScheduler", {"solver_order": order}, {}, order + 1) for order in (1, 2, 3, 4)),
    ("UniPCMultistepScheduler", {"solver_order": 3, "predict_x0": False, "solver_type": "bh1", **LAST, **V}, {}, 4),
    ("UniPCMultistepScheduler", {"disable_corrector": [0, 2], **IMAGE}, {}, 3),
    *(("DEISMultistepScheduler", {"solver_order": order}, {}, order - 1) for order in (1, 2, 3)),
    *(("EulerDiscreteScheduler", kind, {}, 0) for kind in ({}, V, IMAGE)),
    ("EulerAncestralDiscreteScheduler", V, {}, 0),
    *(("HeunDiscreteScheduler", kind, {}, 1) for kind in ({}, V, IMAGE)),
    *(("LMSDiscreteScheduler", V, {"order": order}, order - 1) for order in (1, 2, 4)),
    ("PNDMScheduler", {}, {}, 5),
    ("PNDMScheduler", {"skip_prk_steps": True, **V}, {}, 3),
]
OTHERS = {
    "DPMSolverSinglestepScheduler": {"solver_order": 3},
    "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "EDMEulerScheduler": {},
    "EDMDPMSolverMultistepScheduler": {"solver_order": 3},
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "IPNDMScheduler": {},
    "TCDScheduler": {"clip_sample": False},
    "LCMScheduler": {"clip_sample": False},
    "DDIMInverseScheduler": {"clip_sample": False},
    "DPMSolverMultistepInverseScheduler": {},
}


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _run(table, inputs=None):
    """From random samples by random outputs and noise."""
    slots, x = [None] * HISTORY, _random(2, 3, 4, 4) * table.init_scale
    for step in range(len(table)):
        output, noise = _random(2, 3, 4, 4, seed=2 * step + 1), _random(2, 3, 4, 4, seed=2 * step + 2)
        made = solver_step(x, output, slots, table.coefficients[step], noise, limit=table.limit)
        for slot, tensor in zip(table.store[step].tolist(), (made.converted, made.corrected), strict=True):
            if slot:
                slots[slot - 1] = tensor
        x = made.x_next
    return x


def _error(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("name", "config", "options", "slots"), CASES)
def test_formulas_are_what_trying_out_finds(name, config, options, slots):
    """The peer's own arithmetic in float64 gives the coefficients that ours has by formula. (UniPC's
    phi functions cancel in the peer's recurrence.)"""
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(12)
    table = from_diffusers(scheduler, **options)
    tried = probing._realised(probing._Response(scheduler, options), 1e-10)
    assert _error(_run(tried), _run(table)) < (1e-10 if name.startswith("Uni") else 1e-12)
    assert table.slots == slots
    assert tried.slots <= slots + 1  # the least that spans what is needed is not always the least to store
    assert torch.equal(table.timesteps, scheduler.timesteps.double())
    torch.testing.assert_close(tried.scale, table.scale, rtol=1e-12, atol=0)
    ours = getattr(compat, name)(**config)
    ours.set_timesteps(12)
    again = from_diffusers(ours, **options)
    assert torch.equal(again.coefficients, table.coefficients)
    assert torch.equal(again.store, table.store)


@pytest.mark.parametrize("name", OTHERS)
def test_any_linear_scheduler_is_a_table(name, tmp_path):
    scheduler = getattr(diffusers, name)(**OTHERS[name])
    scheduler.set_timesteps(8)
    table = from_diffusers(scheduler)
    assert len(table) == len(scheduler.timesteps)
    fresh, x, y, slots = copy.deepcopy(scheduler), _random(1, 3, 4, 4).float(), None, [None] * HISTORY
    y = x
    noise = {"s_noise": 0.0} if name == "FlowMatchEulerDiscreteScheduler" else {}
    for step, t in enumerate(fresh.timesteps):
        if hasattr(fresh, "scale_model_input"):
            scaled = fresh.scale_model_input(x, t)
            torch.testing.assert_close(scaled, (x * table.scale[step]).float(), rtol=1e-5, atol=1e-6)
        output = _random(1, 3, 4, 4, seed=step + 1).float()
        torch.manual_seed(step)
        x = fresh.step(output, t, x, **noise).prev_sample
        torch.manual_seed(step)
        drawn = torch.randn(1, 3, 4, 4)
        made = solver_step(y, output, slots, table.coefficients[step], drawn)
        for slot, tensor in zip(table.store[step].tolist(), (made.converted, made.corrected), strict=True):
            if slot:
                slots[slot - 1] = tensor
        y = made.x_next
    assert _error(y.double(), x.double()) < 2e-5
    table.save(tmp_path / "table.json")
    assert torch.equal(SolverTable.load(tmp_path / "table.json").coefficients, table.coefficients)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler"])
def test_a_clip_is_a_limit(name):
    scheduler = getattr(diffusers, name)(clip_sample=True, clip_sample_range=1.5)
    scheduler.set_timesteps(10)
    assert from_diffusers(scheduler).limit == 1.5


def test_a_step_without_the_model_needs_no_call():
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    assert from_diffusers(scheduler).evaluates.all()
    assert not from_diffusers(scheduler).noisy.any()
    assert from_diffusers(scheduler, eta=1.0).noisy.tolist() == [True] * 4 + [False]


def test_the_scheduler_is_not_changed():
    scheduler = diffusers.DPMSolverSinglestepScheduler(solver_order=3)
    scheduler.set_timesteps(6)
    before = copy.deepcopy(vars(scheduler))
    from_diffusers(scheduler)
    assert before.keys() == vars(scheduler).keys()
    assert scheduler.sigmas.dtype == torch.float32
    assert scheduler.step_index is None
    assert torch.get_default_dtype() == torch.float32


def _set(name, **config):
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(10)
    return scheduler


def _begun():
    scheduler, x = _set("EulerDiscreteScheduler"), torch.zeros(1, 3, 4, 4)
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    scheduler.step(x, scheduler.timesteps[0], x)
    return scheduler


class _Square(diffusers.DDIMScheduler):
    def step(self, model_output, timestep, sample, return_dict=True):
        return (sample * model_output.abs(),)


REFUSED = [
    (lambda: diffusers.DDIMScheduler(), "DDIMScheduler.set_timesteps to be called before"),
    (lambda: _set("DDIMScheduler", thresholding=True), "DDIMScheduler with thresholding"),
    (lambda: _set("DPMSolverSinglestepScheduler", thresholding=True), "DPMSolverSinglestepScheduler with thresholding"),
    (lambda: _set("TCDScheduler", clip_sample=True), "TCDScheduler with clip_sample"),
    (lambda: _set("DDPMScheduler", variance_type="learned_range"), "a variance that is no output of the model"),
    (lambda: _set("SASolverScheduler"), "noise of the step itself only"),
    (lambda: _set("UniPCMultistepScheduler", solver_type="bh1"), "finite samples, got others"),
    (_begun, "to have taken no step"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_is_no_table_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers(make())


def test_churn_is_refused():
    with pytest.raises(ValueError, match="one program a step, got EulerDiscreteScheduler with churn"):
        from_diffusers(_set("EulerDiscreteScheduler"), s_churn=1.0)


def test_a_step_that_is_not_linear_is_refused():
    scheduler = _Square(clip_sample=False)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="expected a linear scheduler, got _Square which differs"):
        from_diffusers(scheduler)
