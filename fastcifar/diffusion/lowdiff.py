"""LowDiff: a cascade of resolutions in which each takes the result of the one before as its condition, by one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import expect_tensors, expect_type
from ._conditioned import Joined, at_times, noisy, normal, run, some_times
from .schedule import DiscreteVP
from .table import SolverTable

MODES = ("nearest", "bilinear", "bicubic")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
Model = Callable[[Tensor, Tensor, int], Tensor]  # [B, 2 C, h, w], t [B] and the level to an output [B, C, h, w]
Size = tuple[int, int]

__all__ = ["lowdiff_loss", "lowdiff_pair", "lowdiff_sample", "upsample_into"]


def upsample_into(out: Tensor, x: Tensor, mode: str = "bilinear") -> Tensor:
    """Writes x ``[B, C, h, w]``, resized, into ``out`` ``[B, C, H, W]``, which may be a slice of a larger tensor.

    Args:
        mode: ``"bilinear"`` (default), ``"bicubic"`` (both with corners not aligned) or ``"nearest"``, which, where h
            and w divide H and W, is written straight into ``out`` without a tensor between.

    Raises:
        ValueError: ``mode`` is unknown, or batch or channels differ.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import upsample_into
        >>> upsample_into(torch.empty(1, 1, 2, 4), torch.tensor([[[[1.0, 2.0]]]]), "nearest")[0, 0].tolist()
        [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]]
    """
    if mode not in MODES:
        raise ValueError(f"upsample_into: expected mode to be one of {', '.join(MODES)}; got {mode!r}")
    expect_tensors("upsample_into", out=out, x=x)
    if out.dim() != 4 or x.dim() != 4 or out.shape[:2] != x.shape[:2]:
        raise ValueError(f"upsample_into: expected images of one batch, got {tuple(x.shape)} into {tuple(out.shape)}")
    (h, w), (height, width) = x.shape[2:], out.shape[2:]
    if mode == "nearest" and height % h == 0 and width % w == 0:
        blocks = out.unflatten(3, (w, width // w)).unflatten(2, (h, height // h))
        blocks.copy_(x[:, :, :, None, :, None].expand(blocks.shape))
        return out
    corners = {} if mode == "nearest" else {"align_corners": False}
    return out.copy_(F.interpolate(x, (height, width), mode=mode, **corners))


def lowdiff_sample(
    model: Model,
    batch: int,
    tables: Sequence[SolverTable],
    sizes: Sequence[Size],
    channels: int = 3,
    *,
    mode: str = "bilinear",
    condition_noise: float = 0.0,
    start: Sequence[Tensor] | None = None,
    noise: Sequence[Tensor | None] | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Images of every resolution, ``[B, C, *sizes[k]]`` each, the last being the result.

    At each level the model's input is one buffer ``[B, 2 C, h, w]``: the upsampled result of the level before is
    written once into its second half (0 at the first level), and each step writes the sample into its first. So a step
    moves what its solver must, and the concatenation and the interpolation that a plain loop repeats are gone.

    Args:
        model: one for all levels; takes the input, t ``[B]`` and the level (0 to L - 1), gives ``[B, C, h, w]``.
        batch: images.
        tables: a solver of each level; few steps where images are large is the point of the cascade.
        sizes: height and width of each level, none smaller than the one before.
        channels: of the images, or of latents. Default 3.
        mode: of :func:`upsample_into`. Default ``"bilinear"``; ours.
        condition_noise: deviation of noise on each condition, against what a level gets wrong. Default 0; ours.
        start: standard normal noise of each level; drawn if None.
        noise: of the steps of each level, ``[S, B, C, h, w]``; drawn if None.
        generator: for whatever is drawn; without one, the noise of steps is drawn in the kernel.
        dtype, device: of the images.

    Raises:
        ValueError: there is not one table a size, the sizes shrink, an option is not as described, a table has
            preloaded slots, or a start is of another shape.

    Source: Xu et al., "LowDiff: Efficient Diffusion Sampling with Low-Resolution Condition", arXiv 2509.15342. Known to
    us are its cascade, its one model and its condition, from the abstract; how it upsamples, what it starts from and
    what its tables are, are not, and are arguments here.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import DiscreteVP, ddim, dpm_solver, lowdiff_sample
        >>> tables = [dpm_solver(DiscreteVP.linear().points(10)), ddim(DiscreteVP.linear().points(4))]
        >>> [x.shape[-1] for x in lowdiff_sample(lambda x, t, level: x[:, 3:], 2, tables, [(4, 4), (8, 8)])]
        [4, 8]
    """
    op = "lowdiff_sample"
    _check(op, sizes, mode, condition_noise)
    if len(tables) != len(sizes):
        raise ValueError(f"{op}: expected a table of each of {len(sizes)} sizes, got {len(tables)}")
    for table in tables:
        expect_type(op, SolverTable, "a SolverTable", table=table)
    if any(table.preloaded for table in tables):
        raise ValueError(f"{op}: expected tables without preloaded slots: the condition is the model's alone")
    for name, given_ones in (("start", start), ("noise", noise)):
        if given_ones is not None and (not isinstance(given_ones, list | tuple) or len(given_ones) != len(sizes)):
            raise TypeError(f"{op}: expected {name} to be a list of {len(sizes)}, got {given_ones!r:.80}")
    if start is not None:
        expect_tensors(op, **{f"start of level {level}": x for level, x in enumerate(start)})
    images: list[Tensor] = []
    for level, (table, size) in enumerate(zip(tables, sizes, strict=True)):
        shape = (batch, channels, *size)
        like = torch.empty((), dtype=dtype, device=device).expand(shape)
        x = normal(like, generator) if start is None else start[level]
        if x.shape != shape:
            raise ValueError(f"{op}: expected the start of level {level} to be {list(shape)}, got {list(x.shape)}")
        joined = Joined(table.init_scale * x, torch.zeros_like(x), table)
        if images:
            upsample_into(joined.second_half, images[-1], mode)
            if condition_noise:
                joined.second_half.add_(normal(x, generator), alpha=condition_noise)

        def call(x: Tensor, t: Tensor, scale: float, joined: Joined = joined, level: int = level) -> Tensor:
            return model(joined(x, scale), t, level)

        given = None if noise is None else noise[level]
        images.append(run(table, joined.x, call, noise=given, generator=generator).contiguous())
    return images


def lowdiff_pair(
    x0: Tensor,
    sizes: Sequence[Size],
    level: int,
    *,
    mode: str = "bilinear",
    condition_noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """What a level is trained on: the images at its size, and the size before, upsampled; ``[B, C, h, w]`` each.

    Args:
        x0: images ``[B, C, H, W]``, of the last size; smaller ones are means over areas, ours.
        sizes, mode, condition_noise: as in :func:`lowdiff_sample`.
        level: 0 to L - 1; at 0 the condition is 0.
        generator: for the noise.

    Raises:
        ValueError: a level that is not there, images not of the last size, or an option is not as described.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import lowdiff_pair
        >>> image, condition = lowdiff_pair(torch.randn(2, 3, 32, 32), [(8, 8), (16, 16), (32, 32)], 1)
        >>> image.shape, condition.shape
        (torch.Size([2, 3, 16, 16]), torch.Size([2, 3, 16, 16]))
    """
    op = "lowdiff_pair"
    _check(op, sizes, mode, condition_noise)
    if not 0 <= level < len(sizes):
        raise ValueError(f"{op}: expected a level from 0 to {len(sizes) - 1}, got {level}")
    expect_tensors(op, x0=x0)
    if x0.dim() != 4 or tuple(x0.shape[2:]) != tuple(sizes[-1]):
        raise ValueError(f"{op}: expected images of {sizes[-1]}, the last size, got {tuple(x0.shape)}")

    def at(size: Size) -> Tensor:
        return x0 if tuple(size) == tuple(x0.shape[2:]) else F.interpolate(x0, size, mode="area")

    image = at(sizes[level])
    condition = torch.zeros_like(image)
    if level:
        upsample_into(condition, at(sizes[level - 1]), mode)
        if condition_noise:
            condition.add_(normal(image, generator), alpha=condition_noise)
    return image, condition


def lowdiff_loss(
    model: Model,
    x0: Tensor,
    schedule: DiscreteVP,
    sizes: Sequence[Size],
    level: int,
    *,
    prediction: str = "epsilon",
    mode: str = "bilinear",
    condition_noise: float = 0.0,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean of ``(target - model([x_t, condition], t, level))^2`` at one level; draw the level for each batch.

    Args:
        model, x0, sizes, level, mode, condition_noise: see :func:`lowdiff_sample` and :func:`lowdiff_pair`.
        schedule: the same for all levels; ours.
        prediction: ``"epsilon"`` (default: the noise), ``"sample"`` (x0) or ``"v_prediction"``
            (``sqrt(ab) noise - sqrt(1 - ab) x0``).
        t, noise: ``[B]`` and ``[B, C, h, w]``; drawn if None.
        generator: for whatever is drawn, on the device of x0.

    Raises:
        ValueError: an option is not as described, or shapes do not fit.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import DiscreteVP, lowdiff_loss
        >>> x0, sizes = torch.zeros(2, 3, 8, 8), [(4, 4), (8, 8)]
        >>> model = lambda x, t, level: 0 * x[:, :3]
        >>> lowdiff_loss(model, x0, DiscreteVP.linear(), sizes, level=1, prediction="sample").item()
        0.0
    """
    op = "lowdiff_loss"
    if prediction not in PREDICTIONS:
        raise ValueError(f"{op}: expected prediction to be one of {', '.join(PREDICTIONS)}; got {prediction!r}")
    image, condition = lowdiff_pair(x0, sizes, level, mode=mode, condition_noise=condition_noise, generator=generator)
    if t is None:
        t = some_times(schedule, x0, generator)
    if noise is None:
        noise = normal(image, generator)
    expect_tensors(op, noise=noise)
    if noise.shape != image.shape:
        raise ValueError(f"{op}: expected noise of {list(image.shape)} at level {level}, got {list(noise.shape)}")
    alpha, sigma = at_times(op, schedule, t, len(x0))
    output = model(torch.cat([noisy(image, noise, alpha, sigma), condition], 1), t, level)
    target = noise if prediction == "epsilon" else image
    if prediction == "v_prediction":
        target = noisy(image, noise, -sigma, alpha)
    return F.mse_loss(output, target)


def _check(op: str, sizes: Sequence[Size], mode: str, condition_noise: float) -> None:
    if mode not in MODES:
        raise ValueError(f"{op}: expected mode to be one of {', '.join(MODES)}; got {mode!r}")
    if not 0 <= condition_noise < float("inf"):
        raise ValueError(f"{op}: expected a finite condition_noise of 0 or more, got {condition_noise}")
    if not isinstance(sizes, list | tuple) or not all(
        isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int) for side in size)
        for size in sizes
    ):
        raise TypeError(f"{op}: expected sizes to be pairs of integers, got {sizes!r:.80}")
    rising = all(before[i] <= after[i] for before, after in pairwise(sizes) for i in (0, 1))
    if not sizes or min(map(min, sizes)) < 1 or not rising:
        raise ValueError(f"{op}: expected sizes of 1 or more, none smaller than the one before, got {list(sizes)}")
