"""DiffuseVAE: a diffusion model that refines what a VAE decodes, in both formulations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import expect_tensors, expect_type
from ._conditioned import Joined, at_times, noisy, normal, run, same_shape, some_times
from .one_step import ddim, ddpm
from .schedule import DiscreteVP
from .shifted import shifted_table
from .table import Points, SolverTable

METHODS = ("ddpm", "ddim")
LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss}
Denoiser = Callable[[Tensor, Tensor], Tensor]  # [B, 2 C, H, W] and t [B] to the noise [B, C, H, W]

__all__ = [
    "diffusevae_loss",
    "diffusevae_noise",
    "diffusevae_sample",
    "diffusevae_table",
    "guidance_of_weight",
]


def guidance_of_weight(weight: float) -> float:
    """The scale g of ``u + g (c - u)`` that equals ``(1 + w) c - w u``: ``1 + w``. The first is diffusers' convention,
    the second that of DiffuseVAE and of Ho and Salimans, where 0 is no guidance.

    Example:
        >>> from fastcifar.diffusion import guidance_of_weight
        >>> guidance_of_weight(0.5)
        1.5
    """
    return 1.0 + weight


def diffusevae_noise(
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    schedule: DiscreteVP,
    reconstruction: Tensor | None = None,
) -> Tensor:
    r"""``x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise``, and in formulation 2 ``+ reconstruction``; one pass.

    Args:
        x0: images ``[B, C, H, W]``.
        noise: of their shape.
        t: int64 ``[B]``, 0 to T - 1.
        schedule: of T times; ab is its alpha squared. The paper's is ``DiscreteVP.linear()``.
        reconstruction: what the VAE makes of the images, of their shape; None in formulation 1.

    Returns:
        Images like x0, differentiable in all three.

    Raises:
        ValueError: shapes do not fit, or a t is out of range.

    Source: Pandey et al., "DiffuseVAE: Efficient, Controllable and High-Fidelity Generation from Low-Dimensional
    Latents", arXiv 2201.00308; ``compute_noisy_input`` of its official code.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import DiscreteVP, diffusevae_noise
        >>> one = torch.ones(1, 1, 1, 1)
        >>> diffusevae_noise(one, 2 * one, torch.tensor([0]), DiscreteVP([0.64, 0.9]), 3 * one)
        tensor([[[[5.2000]]]])
    """
    op = "diffusevae_noise"
    same_shape(op, x0, noise=noise, **({} if reconstruction is None else {"reconstruction": reconstruction}))
    alpha, sigma = at_times(op, schedule, t, len(x0))
    return noisy(x0, noise, alpha, sigma, reconstruction, None if reconstruction is None else torch.ones_like(alpha))


def diffusevae_table(
    points: Points,
    formulation: int = 1,
    method: str = "ddpm",
    *,
    variance: str = "fixed_large",
    eta: float = 0.0,
    clip: bool = True,
) -> SolverTable:
    r"""Reverse steps of either formulation. In formulation 2, with the reconstruction xh::

        x0   = clamp((x - xh) / sqrt(ab) - sqrt(1 / ab - 1) e, -1, 1)
        DDPM = c1 x0 + c2 x + (1 - c2) xh + sqrt(variance) z
        DDIM = sqrt(ab') x0 + sqrt(1 - ab' - s^2) e + xh + s z

    and xh is subtracted from the last. It is a preloaded slot of the table, so a step is one pass. Formulation 1 has no
    xh here: the model alone sees it.

    Args:
        points: where to evaluate, such as ``DiscreteVP.linear().points(20)``; sigma of the last is 0.
        formulation: 1 or 2.
        method: ``"ddpm"`` (default) or ``"ddim"``. For any other solver, give its table to :func:`shifted_table`.
        variance: of :func:`ddpm`: ``"fixed_large"`` (beta, default), ``"fixed_small"`` (the posterior's), ...
        eta: of DDIM. Default 0.
        clip: x0 to -1...1. Default True.

    Raises:
        ValueError: an option is not as described, or what :func:`ddpm` or :func:`ddim` raise.

    Source: arXiv 2201.00308, section 3 and the official ``ddpm_form2.py`` and ``spaced_diff_form2.py``.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import DiscreteVP, diffusevae_table
        >>> table = diffusevae_table(DiscreteVP.linear().points(20), 2)
        >>> table.preloaded, table.limit
        ((1,), 1.0)
    """
    if formulation not in (1, 2):
        raise ValueError(f"diffusevae_table: expected formulation 1 or 2, got {formulation!r}")
    if method not in METHODS:
        raise ValueError(f"diffusevae_table: expected method to be one of {', '.join(METHODS)}; got {method!r}")
    limit = 1.0 if clip else None
    table = ddpm(points, variance=variance, limit=limit) if method == "ddpm" else ddim(points, eta=eta, limit=limit)
    if formulation == 1:
        return table
    shift = torch.ones(len(points.sigma), dtype=torch.float64)
    shift[-1] = 0  # the bias of the reconstruction is taken from the result
    return shifted_table(table, shift)


def diffusevae_loss(
    denoiser: Denoiser,
    x0: Tensor,
    reconstruction: Tensor,
    schedule: DiscreteVP,
    formulation: int = 1,
    *,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    drop: float = 0.0,
    loss: str = "l2",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean of ``|noise - denoiser([x_t, reconstruction], t)|^2`` ("l2") or of its modulus ("l1").

    Args:
        denoiser: takes ``[B, 2 C, H, W]`` and t ``[B]``, gives the noise.
        x0, reconstruction: ``[B, C, H, W]``, -1 to 1.
        schedule: of T times.
        formulation: 1 or 2.
        t, noise: drawn if None.
        drop: probability that a sample's condition is 0 in what the model reads, for guidance. Default 0. The official
            code drops it of a whole batch, and formulation 2's shift with it; ours keeps the shift, since sampling
            asks the unconditional model about shifted samples.
        loss: ``"l2"`` (default) or ``"l1"``.
        generator: for whatever is drawn, on the device of x0.

    Raises:
        ValueError: shapes do not fit, or an option is not as described.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import DiscreteVP, diffusevae_loss
        >>> x, schedule = torch.zeros(2, 3, 4, 4), DiscreteVP.linear()
        >>> diffusevae_loss(lambda x, t: 0 * x[:, :3], x, x, schedule, noise=torch.ones_like(x)).item()
        1.0
    """
    op = "diffusevae_loss"
    if formulation not in (1, 2):
        raise ValueError(f"{op}: expected formulation 1 or 2, got {formulation!r}")
    if loss not in LOSSES:
        raise ValueError(f"{op}: expected loss to be one of {', '.join(LOSSES)}; got {loss!r}")
    if not 0 <= drop <= 1:
        raise ValueError(f"{op}: expected drop from 0 to 1, got {drop}")
    same_shape(op, x0, reconstruction=reconstruction)
    if t is None:
        t = some_times(schedule, x0, generator)
    if noise is None:
        noise = normal(x0, generator)
    x_t = diffusevae_noise(x0, noise, t, schedule, reconstruction if formulation == 2 else None)
    condition = reconstruction
    if drop:
        kept = torch.rand(len(x0), device=x0.device, generator=generator) >= drop
        condition = torch.where(kept.view(-1, *[1] * (x0.dim() - 1)), condition, 0)
    return LOSSES[loss](denoiser(torch.cat([x_t, condition], 1), t), noise)


def diffusevae_sample(
    denoiser: Denoiser,
    reconstruction: Tensor,
    table: SolverTable,
    *,
    guidance_weight: float | None = None,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    start: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    in_place: bool = True,
) -> Tensor:
    """Images refined from reconstructions.

    The model's input is one buffer, whose second half is written once; each step writes the sample into its first.

    Args:
        denoiser: takes ``[B, 2 C, H, W]`` and t ``[B]``, gives the noise; ``[2 B, ...]`` with guidance, the second half
            with a condition of 0.
        reconstruction: ``[B, C, H, W]``, -1 to 1.
        table: of :func:`diffusevae_table`, or any solver's, for formulation 2 through :func:`shifted_table`.
        guidance_weight: w of ``(1 + w) c - w u``, the paper's convention.
        guidance_scale: g of ``u + g (c - u)``, diffusers'. Give one of the two, or neither.
        temperature: of the noise to start from. Default 1.
        start: that noise, of the reconstruction's shape; drawn if None. In formulation 2 the reconstruction is added.
        noise: of the steps, ``[S, B, C, H, W]``; drawn if None.
        generator: for whatever is drawn; without one, the noise of steps is drawn in the kernel.
        in_place: False where autograd must follow the steps. Default True.

    Raises:
        ValueError: shapes do not fit, both guidances are given, or the table has preloaded slots of another kind.

    Source: arXiv 2201.00308. The official script starts formulation 2 from a reconstruction of 0 to 1 that it scales to
    -1...1 only afterwards; ours has one scale throughout.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import DiscreteVP, diffusevae_sample, diffusevae_table
        >>> table = diffusevae_table(DiscreteVP.linear().points(20), 2)
        >>> diffusevae_sample(lambda x, t: x[:, :3], torch.zeros(2, 3, 4, 4), table).shape
        torch.Size([2, 3, 4, 4])
    """
    op = "diffusevae_sample"
    if guidance_weight is not None and guidance_scale is not None:
        raise ValueError(f"{op}: expected a guidance_weight or a guidance_scale, got both")
    expect_type(op, SolverTable, "a SolverTable", table=table)
    if len(table.preloaded) > 1:
        raise ValueError(f"{op}: expected a table with at most one preloaded slot, got {table.preloaded}")
    scale = guidance_scale if guidance_weight is None else guidance_of_weight(guidance_weight)
    guided = scale is not None and scale != 1
    expect_tensors(op, reconstruction=reconstruction)
    if reconstruction.dim() < 2:
        raise ValueError(f"{op}: expected a reconstruction [B, C, ...], got {tuple(reconstruction.shape)}")
    if start is None:
        start = normal(reconstruction, generator)
    same_shape(op, reconstruction, start=start)
    x = temperature * table.init_scale * start
    images = [reconstruction] if table.preloaded else []
    joined = Joined(x + reconstruction if images else x, reconstruction, table, doubled=guided, in_place=in_place)

    def call(x: Tensor, t: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        output = denoiser(joined(x, scale), torch.cat([t, t]) if guided else t)
        return (output[: len(x)], output[len(x) :]) if guided else (output, None)

    guidance = 1.0 if scale is None else scale
    options: dict[str, Any] = {"noise": noise, "generator": generator, "in_place": in_place}
    return run(table, joined.x, call, images, guidance=guidance, **options).contiguous()
