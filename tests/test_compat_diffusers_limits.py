"""fastcifar.compat.diffusers in a pipeline, at the traps of its peer, and where it refuses."""

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

from fastcifar.compat import diffusers as compat

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

NAMES = [name for name in compat.__all__ if name != "SchedulerMixin"]
FLOW, LAST = {"prediction_type": "flow_prediction"}, {"final_sigmas_type": "sigma_min"}


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _model(x):
    return 0.8 * x + 0.1 * (3 * x).sin()


def _loop(scheduler, steps=20):
    scheduler.set_timesteps(steps)
    x = _random(2, 3, 8, 8)
    for t in scheduler.timesteps:
        x = scheduler.step(_model(x), t, x).prev_sample
    return x


# ---- pipelines -------------------------------------------------------------------------------------------------------


def test_a_pipeline_takes_a_scheduler_of_ours(tmp_path):
    """Builds a pipeline, runs it beside the peer's, saves it and loads it again."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    images = []
    for library in (compat, diffusers):
        pipeline = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
        pipeline.scheduler = library.DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline(batch_size=2, num_inference_steps=4, eta=0.5, output_type="np", generator=torch.manual_seed(1))
        images.append(torch.from_numpy(made.images))
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-5)
    pipeline = diffusers.DDPMPipeline(unet, compat.DDPMScheduler(steps_offset=1))
    pipeline.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is compat.DDPMScheduler
    assert loaded.scheduler.config.steps_offset == 1


# ---- traps, and what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
@pytest.mark.parametrize("few", [True, False])
def test_a_last_sigma_that_is_doubled_gives_the_sample_back(name, few):
    """The peer's third order steps are NaN there, of length 0."""
    final = {} if name.startswith("DEIS") else LAST
    scheduler = getattr(compat, name)(solver_order=3, use_karras_sigmas=True, lower_order_final=few, **final)
    scheduler.set_timesteps(20)
    assert scheduler.sigmas[-1] == scheduler.sigmas[-2]
    x = _random(2, 3, 8, 8)
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(_model(x), t, x).prev_sample
    last = scheduler.step(_model(x), scheduler.timesteps[-1], x).prev_sample
    assert torch.isfinite(last).all()
    if not name.startswith("UniPC"):  # whose corrector changes the sample that the step gives back
        torch.testing.assert_close(last, x)


def test_unipc_of_bh1_reaches_a_sigma_of_zero():
    """The peer multiplies an infinite B by 0."""
    assert torch.isfinite(_loop(compat.UniPCMultistepScheduler(solver_type="bh1"))).all()
    assert not torch.isfinite(_loop(diffusers.UniPCMultistepScheduler(solver_type="bh1"))).all()


def test_the_default_threshold_is_a_clamp():
    """sample_max_value is 1 where it is not given."""
    a, b = _loop(compat.DDIMScheduler(thresholding=True)), _loop(compat.DDIMScheduler(clip_sample=True))
    assert torch.equal(a, b)


def test_ddim_goes_by_a_stride_and_ddpm_by_its_table():
    for library in (compat, diffusers):
        ddim = library.DDIMScheduler(timestep_spacing="linspace", clip_sample=False)
        ddim.set_timesteps(3)  # 999, 500 (rounded), 0: from 999 it goes to 666, which is none of them
        assert ddim.timesteps.tolist() == [999, 500, 0]
        x = _random(1, 3, 4, 4)
        made = ddim.step(0.3 * x, 999, x).prev_sample
        a, target = ddim.alphas_cumprod[999], ddim.alphas_cumprod[666]
        expected = target.sqrt() * (x - (1 - a).sqrt() * 0.3 * x) / a.sqrt() + (1 - target).sqrt() * 0.3 * x
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


REFUSED = [
    (
        "DDIMScheduler",
        {"prediction_type": "flow"},
        "to be one of epsilon, sample, v_prediction, got 'flow'",
    ),
    ("PNDMScheduler", {"prediction_type": "sample"}, "to be one of epsilon, v_prediction"),
    ("DDPMScheduler", {"variance_type": "fixed_large_log"}, "another variance_type than fixed_large_log"),
    ("UniPCMultistepScheduler", {"solver_order": 6}, "solver_order of 1 to 5, got 6"),
    ("UniPCMultistepScheduler", {"predict_x0": False, **FLOW}, "predict_x0 with flow_prediction"),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver", "solver_order": 3, **LAST},
        "solver_order 1 or 2",
    ),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", **LAST, **FLOW}, "flow_prediction with dpmsolver"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "is not supported for"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "Only one of"),
]


@pytest.mark.parametrize(("name", "config", "message"), REFUSED)
def test_options_are_refused_when_they_are_given(name, config, message):
    with pytest.raises(ValueError, match=message):
        getattr(compat, name)(**config)


def test_unipc_has_no_other_predictor():
    with pytest.raises(NotImplementedError, match="expected no solver_p"):
        compat.UniPCMultistepScheduler(solver_p=diffusers.DDIMScheduler())


def test_steps_that_cannot_be_taken():
    x = torch.zeros(1, 3, 4, 4)
    for name in NAMES:
        scheduler = getattr(compat, name)()
        if name != "DDPMScheduler":
            with pytest.raises((ValueError, IndexError)):
                scheduler.step(x, torch.tensor(3.5), x)
        scheduler.set_timesteps(5)
        t = scheduler.timesteps[0]
        with pytest.raises(ValueError, match=r"expected an output like the sample, \[1, 3, 4, 4\]"):
            scheduler.step(x[:, :2], t, x)
    ddim = compat.DDIMScheduler()
    ddim.set_timesteps(3)
    with pytest.raises(ValueError, match="generator or variance_noise"):
        ddim.step(x, 0, x, eta=1.0, generator=torch.Generator(), variance_noise=x)
    with pytest.raises(ValueError, match="time step of 0 to 999, got 1000"):
        ddim.step(x, 1000, x)
    ddpm = compat.DDPMScheduler()
    ddpm.set_timesteps(3)
    with pytest.raises(ValueError, match="one of the 3 time steps that were set"):
        ddpm.step(x, 5, x)
    with pytest.raises(ValueError, match="got the whole number 1"):
        compat.EulerDiscreteScheduler().step(x, 1, x)
    with pytest.raises(ValueError, match="order of 1 to 7, got 8"):
        compat.LMSDiscreteScheduler().step(x, torch.tensor(999.0), x, order=8)
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        scheduler = getattr(compat, name)()
        scheduler.set_timesteps(1)
        scheduler.step(x, scheduler.timesteps[0], x)
        with pytest.raises(ValueError, match="at most 1 steps after set_timesteps"):
            scheduler.step(x, scheduler.timesteps[0], x)


def test_pure_noise_says_nothing_of_the_image():
    """rescale_betas_zero_snr with epsilon, which the peer divides by 0."""
    x = torch.ones(1, 3, 4, 4)
    for kind in (compat.DDIMScheduler, compat.DDPMScheduler):
        scheduler = kind(rescale_betas_zero_snr=True, timestep_spacing="trailing")
        scheduler.set_timesteps(5)
        with pytest.raises(ValueError, match="pure noise"):
            scheduler.step(x, scheduler.timesteps[0], x)
    scheduler = compat.UniPCMultistepScheduler(lower_order_final=False)
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(x, t, x).prev_sample
    with pytest.raises(ValueError, match="order 2 and more, got a sigma of 0"):
        scheduler.step(x, scheduler.timesteps[-1], x)
