"""fastcifar.compat.diffusers against diffusers' own: trajectories, starts in the middle, noise, dtypes, devices."""

import contextlib
import copy
import inspect
import pickle

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

from fastcifar.compat import diffusers as compat
from fastcifar.diffusion.probing import _Float64

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

V, IMAGE, FLOW = ({"prediction_type": kind} for kind in ("v_prediction", "sample", "flow_prediction"))
LAST = {"final_sigmas_type": "sigma_min"}
THRESHOLD = {"thresholding": True, "sample_max_value": 1.7, "dynamic_thresholding_ratio": 0.9}
SPACINGS = [{"timestep_spacing": spacing} for spacing in ("linspace", "leading", "trailing")]
SIGMAS = [{f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")]
EXPLODING = {
    kind: [{}, V, *SIGMAS, *SPACINGS[1:], {"steps_offset": 1, "timestep_spacing": "leading"}]
    for kind in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler")
}
GRID = {
    "DDIMScheduler": [
        *({"clip_sample": False, **kind} for kind in ({}, V, IMAGE)),
        {},
        {"clip_sample_range": 2.0, **V},
        *({**THRESHOLD, **kind} for kind in ({}, V)),
        *SPACINGS,
        {"set_alpha_to_one": False, "steps_offset": 1},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **V},
        *({"beta_schedule": kind} for kind in ("scaled_linear", "squaredcos_cap_v2")),
    ],
    "DDPMScheduler": [
        *({"clip_sample": False, **kind} for kind in ({}, V, IMAGE)),
        *({"variance_type": kind} for kind in ("fixed_small", "fixed_small_log", "fixed_large")),
        THRESHOLD,
        *SPACINGS,
        *({"beta_schedule": kind} for kind in ("scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")),
    ],
    "DPMSolverMultistepScheduler": [
        *(
            {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind, **final}
            for algorithm, final in (
                ("dpmsolver++", {}),
                ("sde-dpmsolver++", {}),
                ("dpmsolver", LAST),
                ("sde-dpmsolver", LAST),
            )
            for order in (1, 2, 3)
            for kind in ("midpoint", "heun")
            if (algorithm, order) != ("sde-dpmsolver", 3)
        ),
        *({"solver_order": 3, **sigmas} for sigmas in (*SIGMAS, {"use_lu_lambdas": True})),
        *SPACINGS,
        {"use_flow_sigmas": True, "flow_shift": 3.0, **FLOW},
        {"use_flow_sigmas": True},
        V,
        IMAGE,
        THRESHOLD,
        {"algorithm_type": "dpmsolver", **LAST, **THRESHOLD},
        {"algorithm_type": "dpmsolver", **LAST, **V},
        {"algorithm_type": "dpmsolver", **LAST, **IMAGE},
        {"euler_at_final": True, "lower_order_final": False, **LAST},
        {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **V},
    ],
    "UniPCMultistepScheduler": [
        *({"solver_order": order, "solver_type": kind, **LAST} for order in (1, 2, 3, 4) for kind in ("bh1", "bh2")),
        *({"solver_order": order} for order in (1, 2, 3, 5)),
        *({"solver_order": order, "predict_x0": False, **LAST} for order in (1, 2, 3, 4)),
        *({"predict_x0": False, **LAST, **kind} for kind in (V, IMAGE)),
        *({"solver_order": 3, **sigmas} for sigmas in SIGMAS),
        {"disable_corrector": [0, 1, 5], "solver_order": 3},
        {"lower_order_final": False, **LAST},
        {"use_flow_sigmas": True, "flow_shift": 3.0, **FLOW},
        V,
        IMAGE,
        THRESHOLD,
        *SPACINGS[1:],
    ],
    "DEISMultistepScheduler": [
        *({"solver_order": order} for order in (1, 2, 3)),
        *({"solver_order": 3, **sigmas} for sigmas in SIGMAS),
        V,
        IMAGE,
        THRESHOLD,
        {"use_flow_sigmas": True, **FLOW},
        *SPACINGS[1:],
    ],
    **EXPLODING,
    "EulerAncestralDiscreteScheduler": [{}, V, *SPACINGS[1:]],
    "PNDMScheduler": [
        {},
        {"skip_prk_steps": True},
        V,
        {"skip_prk_steps": True, **V},
        {"set_alpha_to_one": True},
        *SPACINGS[1:],
    ],
}
GRID["EulerDiscreteScheduler"] = [
    *EXPLODING["EulerDiscreteScheduler"],
    IMAGE,
    LAST,
    {"interpolation_type": "log_linear"},
]
GRID["HeunDiscreteScheduler"] = [*EXPLODING["HeunDiscreteScheduler"], IMAGE, {"clip_sample": True}]
CASES = [(name, config) for name, configs in GRID.items() for config in configs]
NAMES = [f"{name[:-9]}-{'-'.join(f'{k}={v}' for k, v in config.items())}" for name, config in CASES]


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _model(x, t, kind):
    if kind == "sample":
        return (0.9 * x).tanh()
    return 0.8 * x + 0.1 * (3 * x).sin()


def _options(scheduler, seed=1):
    takes = inspect.signature(scheduler.step).parameters
    return {"generator": torch.Generator().manual_seed(seed)} if "generator" in takes else {}


def _loop(scheduler, steps=20, x=None, options=None):
    scheduler.set_timesteps(steps)
    x = _random(4, 3, 8, 8) * scheduler.init_noise_sigma if x is None else x
    options = _options(scheduler) if options is None else options
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(_model(scaled, t, scheduler.config.prediction_type), t, x, **options).prev_sample
    return x


class _Widened(_Float64):
    """As in from_diffusers, but noise is drawn in float32 and widened."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.randn, torch.randn_like):
            return func(*args, **{**(kwargs or {}), "dtype": torch.float32}).double()
        return super().__torch_function__(func, types, args, kwargs)


@contextlib.contextmanager
def _float64():
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def _exact(name, config, steps=20):
    """The peer's own trajectory with all arithmetic in float64, from the levels of noise that it has in float32."""
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps)
    for key, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and key != "timesteps":
            setattr(scheduler, key, value.double())
    x, options = _random(4, 3, 8, 8).double() * scheduler.init_noise_sigma, _options(scheduler)
    with _float64():
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            x = scheduler.step(_model(scaled, t, scheduler.config.prediction_type), t, x, **options).prev_sample
    return x


def _error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def _rough(name, config):
    """Where float32 itself loses the sixth digit: coefficients that are differences of close numbers in the peer's
    arithmetic (DEIS's integrals, high orders of UniPC in the noise, a beta from its cumulative product), and sigmas of
    the beta distribution, whose first and last steps are so short that slopes are of rounding."""
    order = config.get("solver_order", 2)
    return (
        ("use_beta_sigmas" in config and (order > 2 or name.startswith("LMS")))
        or (name.startswith("DEIS") and order > 1)
        or (name.startswith("UniPC") and order > 3 and not config.get("predict_x0", True))
        or (name.startswith("DDPM") and "beta_schedule" in config)
    )  # fmt: skip


@pytest.mark.parametrize(("name", "config"), CASES, ids=NAMES)
def test_trajectories_are_the_peers(name, config):
    """To 1e-6 in 20 steps of float32; and no further from float64 than twice as far as the peer's."""
    ours, theirs = (_loop(getattr(library, name)(**config)) for library in (compat, diffusers))
    exact = _exact(name, config)
    assert ours.dtype == theirs.dtype
    rounding = _error(theirs, exact)
    assert _error(ours, exact) <= 2 * rounding + 2e-7
    assert _error(ours, theirs) < 1e-6 or _rough(name, config)


PAIRS = [(name, getattr(compat, name), getattr(diffusers, name)) for name in GRID]
COUNTERS = [pair for pair in PAIRS if "Multistep" in pair[0] or "Discrete" in pair[0]]


def _walk(scheduler, times, options=None, prepare=None):
    """Steps along some of the time steps, as image-to-image pipelines do."""
    scheduler.set_timesteps(12)
    if prepare is not None:
        prepare(scheduler)
    x, options = _random(2, 3, 8, 8), _options(scheduler) if options is None else options
    for t in scheduler.timesteps[times]:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(_model(scaled, t, "epsilon"), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS)
@pytest.mark.parametrize("begin", [None, 4])
def test_a_run_may_begin_in_the_middle(name, ours, theirs, begin):
    """By the time step or by set_begin_index; with the orders that the peer has there."""
    if name == "PNDMScheduler":
        pytest.skip("its steps are counted from the first")
    start = 6 if name.startswith("Heun") else 4  # its time steps come twice, and the second is found
    config = {"solver_order": 3} if "Multistep" in name else {}
    prepare = None
    if begin is not None and (name, ours, theirs) in COUNTERS:
        prepare = lambda scheduler: scheduler.set_begin_index(start)  # noqa: E731
    a, b = (_walk(kind(**config), slice(start, None), prepare=prepare) for kind in (ours, theirs))
    assert _error(a, b) < 2e-6


@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS)
def test_a_scheduler_is_as_new_after_set_timesteps(name, ours, theirs):
    scheduler = ours()
    first = _loop(scheduler, 13)
    assert torch.equal(_loop(scheduler, 13), first)
    if hasattr(scheduler, "step_index"):
        assert scheduler.step_index == len(scheduler.timesteps)
        scheduler.set_timesteps(3)
        assert scheduler.step_index is None
        assert scheduler.begin_index is None


@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS)
def test_copies_go_on_from_where_they_were_made(name, ours, theirs):
    scheduler, x = ours(), _random(2, 3, 8, 8)
    scheduler.set_timesteps(16)
    for t in scheduler.timesteps[:5]:
        x = scheduler.step(0.5 * scheduler.scale_model_input(x, t), t, x).prev_sample
    for copied in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        a, b = x, x
        for t in scheduler.timesteps[5:7]:
            b = copied.step(0.5 * copied.scale_model_input(b, t), t, b, **_options(copied)).prev_sample
        twin = copy.deepcopy(scheduler)
        for t in scheduler.timesteps[5:7]:
            a = twin.step(0.5 * twin.scale_model_input(a, t), t, a, **_options(twin)).prev_sample
        assert torch.equal(a, b)


# ---- noise -----------------------------------------------------------------------------------------------------------

NOISY = [
    ("DDIMScheduler", {}, {"eta": 0.7}),
    ("DDIMScheduler", {}, {"eta": 1.0, "use_clipped_model_output": True}),
    ("DDPMScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("EulerDiscreteScheduler", {}, {"s_churn": 4.0, "s_noise": 1.01}),
    ("EulerDiscreteScheduler", V, {"s_churn": 40.0, "s_tmin": 0.5, "s_tmax": 10.0}),
]


@pytest.mark.parametrize(("name", "config", "options"), NOISY)
def test_generators_draw_what_they_draw_for_the_peer(name, config, options):
    ends = []
    for generators in (
        lambda: torch.Generator().manual_seed(3),
        lambda: [torch.Generator().manual_seed(i) for i in range(4)],
        lambda: None,
    ):
        pair = []
        for library in (compat, diffusers):
            torch.manual_seed(5)
            made = {**options, "generator": generators()}
            pair.append(_loop(getattr(library, name)(**config), options=made))
        assert _error(*pair) < 1e-6
        ends.append(pair[0])
    assert not torch.allclose(ends[0], ends[1])


@pytest.mark.parametrize(("name", "config", "options"), [NOISY[0], NOISY[3]])
def test_noise_may_be_given(name, config, options):
    noise = _random(4, 3, 8, 8, seed=9)
    pair = [
        _loop(getattr(lib, name)(**config), options={**options, "variance_noise": noise}) for lib in (compat, diffusers)
    ]
    assert _error(*pair) < 1e-6


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_ddpm_takes_a_variance_from_the_model(kind):
    pair = []
    for library in (compat, diffusers):
        scheduler, generator = library.DDPMScheduler(variance_type=kind), torch.Generator().manual_seed(3)
        scheduler.set_timesteps(20)
        x = _random(2, 3, 8, 8)
        for t in scheduler.timesteps:
            output = torch.cat([0.8 * x, (x.abs() * 1e-3 if kind == "learned" else x.tanh())], 1)
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        pair.append(x)
    assert _error(*pair) < 1e-6
    scheduler = compat.DDPMScheduler(variance_type=kind)
    with pytest.raises(ValueError, match="twice the sample's channels"):
        scheduler.step(x, 5, x)


def test_dpm_solver_leaves_a_learned_variance_alone():
    pair = []
    for library in (compat, diffusers):
        scheduler, x = library.DPMSolverMultistepScheduler(variance_type="learned_range"), _random(2, 3, 8, 8)
        scheduler.set_timesteps(10)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.cat([0.8 * x, x], 1), t, x).prev_sample
        pair.append(x)
    assert _error(*pair) < 1e-6


# ---- dtypes, layouts, devices, gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(name, ours, theirs, dtype):
    a, b = (_walk_in(kind(), dtype) for kind in (ours, theirs))
    exact = _walk_in(ours(), torch.float32)
    assert a.dtype == b.dtype == dtype
    # Half precision is rounded once a step, the peer's several times.
    assert _error(a, exact) <= (1e-6 if dtype == torch.float64 else 1.2 * _error(b, exact) + 1e-3)


def _walk_in(scheduler, dtype):
    scheduler.set_timesteps(8)
    x, options = _random(2, 3, 8, 8).to(dtype), _options(scheduler)
    if scheduler.init_noise_sigma > 1:
        x = x * float(scheduler.init_noise_sigma)
    outputs = [_random(2, 3, 8, 8, seed=i).to(dtype) for i in range(len(scheduler.timesteps))]
    noise = _random(2, 3, 8, 8, seed=77)
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        with _SameNoise(noise):  # a generator draws other numbers in other dtypes
            x = scheduler.step(output, t, x, **options).prev_sample
    return x


class _SameNoise(torch.overrides.TorchFunctionMode):
    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.noise.to(kwargs["dtype"]) if func is torch.randn else func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS)
def test_samples_of_another_layout(name, ours, theirs):
    x = _random(2, 3, 8, 8)
    for other in (x.to(memory_format=torch.channels_last), torch.cat([x, x], 3)[..., :8]):
        first, second = ours(), ours()
        for scheduler in (first, second):
            scheduler.set_timesteps(9)
        a = b = x
        b = other
        for t in first.timesteps[:4]:
            a = first.step(0.5 * a, t, a, **_options(first)).prev_sample
            b = second.step(0.5 * b, t, b, **_options(second)).prev_sample
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS)
def test_time_steps_on_a_device_are_not_read(name, ours, theirs):
    """The meta device has nothing to read: what needs a value raises there."""
    scheduler, known, x = ours(), ours(), _random(2, 3, 8, 8)
    scheduler.set_timesteps(8, device="meta")
    known.set_timesteps(8)
    a = b = x
    assert scheduler.timesteps.is_meta
    for t, value in zip(scheduler.timesteps, known.timesteps, strict=True):
        a = scheduler.step(0.5 * scheduler.scale_model_input(a, t), t, a, **_options(scheduler)).prev_sample
        b = known.step(0.5 * known.scale_model_input(b, value), value, b, **_options(known)).prev_sample
    assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "ours", "theirs"), PAIRS)
def test_gradients_go_through_a_run(name, ours, theirs):
    grads = []
    for kind in (ours, theirs):
        x = _random(2, 3, 8, 8).requires_grad_()
        scheduler = kind(clip_sample=False) if name in ("DDIMScheduler", "DDPMScheduler") else kind()
        scheduler.set_timesteps(6)
        y, options = x, _options(scheduler)
        for t in scheduler.timesteps:
            y = scheduler.step(_model(scheduler.scale_model_input(y, t), t, "epsilon"), t, y, **options).prev_sample
        (y * _random(2, 3, 8, 8, seed=4)).sum().backward()
        grads.append(x.grad)
    assert _error(*grads) < 3e-6
