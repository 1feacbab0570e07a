"""diffusers' schedulers with every step as one pass over memory: change one import and nothing else. ::

    from fastcifar.compat.diffusers import DPMSolverMultistepScheduler  # was: from diffusers import ...

    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)

Each class is a subclass of diffusers' class of the same name, which must be installed (0.42.1 is what this is checked
against). Constructor, ``config``, ``from_pretrained``, ``save_pretrained``, time steps and sigmas, ``add_noise`` and
``get_velocity`` are diffusers' own; so are the arguments of ``step`` and what it returns. Ours are the coefficients,
which are computed in float64 by ``set_timesteps`` for all steps, and ``step``, which is one call of
:func:`fastcifar.diffusion.solver_step` with no other arithmetic on tensors (thresholding adds a quantile, churn a sum).

Two choices save more. ``scheduler.return_original = False`` leaves ``pred_original_sample`` out (None), one of four
tensors that DDIM's step reads and writes. ``scheduler.draw_in_kernel()`` has noise drawn where it is added, by
counters: other numbers than a generator's, whose drawing is most of the time of a DDPM or SDE step.

What differs:

- float64 samples are stepped in float64, where most of diffusers' classes go through float32.
- bfloat16 and float16 are rounded once a step, and ``pred_original_sample`` has the sample's dtype.
- A time step on a device that was taken from ``timesteps`` is never read back.
- What a multistep scheduler keeps (``model_outputs``, ``last_sample``) is overwritten in place once it was read for the
  last time, unless something else refers to the tensor.
- What diffusers computes as NaN raises a ``ValueError``: epsilon prediction from pure noise (DDIM and DDPM with
  ``rescale_betas_zero_snr``), orders above 1 to a sigma of 0, DDPM's ``fixed_large_log``. A last sigma that is doubled,
  where third orders give NaN, gives the sample back.
- Refused when given: UniPC's ``solver_p`` and orders above 5; ``sde-dpmsolver`` with order 3; LMS with an order above 7
  in ``step``; a ``prediction_type`` that is not one of the peer's.

Source: huggingface/diffusers 0.42.1, whose formulas are those of the papers named at each class.
"""

from __future__ import annotations

try:
    import diffusers
except ImportError as error:
    raise ImportError(
        "fastcifar.compat.diffusers: expected diffusers to be installed, whose schedulers these are; got none"
    ) from error
from diffusers import SchedulerMixin  # a saved pipeline that has one of ours looks for it here
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_heun_discrete,
    scheduling_lms_discrete,
)

from ._diffusers_base import compiling
from ._diffusers_multistep import DEISSteps, DPMSolverSteps, UniPCSteps
from ._diffusers_onestep import AncestralSteps, DDIMSteps, DDPMSteps, EulerSteps
from ._diffusers_runs import HeunSteps, LMSSteps, PNDMSteps

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SchedulerMixin",
    "UniPCMultistepScheduler",
]


class DDIMScheduler(DDIMSteps, diffusers.DDIMScheduler):
    """DDIM with any eta, which 1 makes DDPM of (Song et al. 2021, arXiv 2010.02502, equation 12).

    Example:
        >>> import torch
        >>> from fastcifar.compat.diffusers import DDIMScheduler
        >>> scheduler = DDIMScheduler(clip_sample=False)
        >>> scheduler.set_timesteps(10)
        >>> x = torch.zeros(1, 3, 8, 8)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(torch.ones_like(x), t, x).prev_sample
        >>> x.shape
        torch.Size([1, 3, 8, 8])
    """

    set_timesteps = compiling(diffusers.DDIMScheduler.set_timesteps)
    _output = scheduling_ddim.DDIMSchedulerOutput


class DDPMScheduler(DDPMSteps, diffusers.DDPMScheduler):
    """DDPM's ancestral steps with every kind of variance (Ho et al. 2020, arXiv 2006.11239, equation 7)."""

    set_timesteps = compiling(diffusers.DDPMScheduler.set_timesteps)
    _output = scheduling_ddpm.DDPMSchedulerOutput


class DPMSolverMultistepScheduler(DPMSolverSteps, diffusers.DPMSolverMultistepScheduler):
    """DPM-Solver and DPM-Solver++ of orders 1 to 3, and their SDE forms (Lu et al. 2022, arXiv 2211.01095).

    Order 3 is that of diffusers and of the authors' code, which takes half of the second derivative's term and is of
    second order.
    """

    set_timesteps = compiling(diffusers.DPMSolverMultistepScheduler.set_timesteps)


class UniPCMultistepScheduler(UniPCSteps, diffusers.UniPCMultistepScheduler):
    """UniPC: predictor and corrector in one pass, without a second call of the model (Zhao et al. 2023, arXiv
    2302.04867)."""

    set_timesteps = compiling(diffusers.UniPCMultistepScheduler.set_timesteps)


class DEISMultistepScheduler(DEISSteps, diffusers.DEISMultistepScheduler):
    """DEIS in ``ln rho`` (Zhang and Chen 2022, arXiv 2204.13902)."""

    set_timesteps = compiling(diffusers.DEISMultistepScheduler.set_timesteps)


class EulerDiscreteScheduler(EulerSteps, diffusers.EulerDiscreteScheduler):
    """Euler's method in sigma, with churn (Karras et al. 2022, arXiv 2206.00364, algorithm 2 without its correction).

    Churn (``s_churn`` above 0) adds its noise in a pass of its own.
    """

    set_timesteps = compiling(diffusers.EulerDiscreteScheduler.set_timesteps)
    _output = scheduling_euler_discrete.EulerDiscreteSchedulerOutput


class EulerAncestralDiscreteScheduler(AncestralSteps, diffusers.EulerAncestralDiscreteScheduler):
    """Euler's method with ancestral noise, as in k-diffusion."""

    set_timesteps = compiling(diffusers.EulerAncestralDiscreteScheduler.set_timesteps)
    _output = scheduling_euler_ancestral_discrete.EulerAncestralDiscreteSchedulerOutput


class HeunDiscreteScheduler(HeunSteps, diffusers.HeunDiscreteScheduler):
    """Heun's method in sigma, two calls of the model a step (Karras et al. 2022, arXiv 2206.00364, algorithm 1)."""

    set_timesteps = compiling(diffusers.HeunDiscreteScheduler.set_timesteps)
    _output = scheduling_heun_discrete.HeunDiscreteSchedulerOutput


class LMSDiscreteScheduler(LMSSteps, diffusers.LMSDiscreteScheduler):
    """Linear multistep in sigma, by exact integrals where diffusers uses quadrature at each step."""

    set_timesteps = compiling(diffusers.LMSDiscreteScheduler.set_timesteps)
    _output = scheduling_lms_discrete.LMSDiscreteSchedulerOutput


class PNDMScheduler(PNDMSteps, diffusers.PNDMScheduler):
    """PNDM: Runge-Kutta steps, then linear multistep ones (Liu et al. 2022, arXiv 2202.09778)."""

    set_timesteps = compiling(diffusers.PNDMScheduler.set_timesteps)
