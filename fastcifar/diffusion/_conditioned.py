"""The loop that DiffuseVAE, LowDiff and TrojDiff share: a table's steps on a sample that is a part of what the model
reads, with images in preloaded slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .reference import PREDICT, TERMS, Step, solver_step
from .table import SolverTable

Region = tuple[slice, slice]  # rows and columns of an image
Call = Callable[[Tensor, Tensor, float], "Tensor | tuple[Tensor, Tensor | None]"]  # x, t [B], input scale -> output


class Joined:
    """What a conditional model reads, ``[B, C + K, H, W]``: the sample, and the condition beside it.

    In place, it is one buffer: the condition is written once, and steps that write into ``x``, a slice of its channels,
    need neither a concatenation nor a copy. ``doubled`` adds as many rows whose condition is 0, for guidance. Where the
    table scales what the model reads, ``x`` is not in the buffer.
    """

    def __init__(
        self, x: Tensor, condition: Tensor, table: SolverTable, *, doubled: bool = False, in_place: bool = True
    ) -> None:
        self.x, self.condition, self.doubled, self.buffer = x, condition, doubled, None
        if in_place:
            x, condition = x.detach(), condition.detach()
            rows, channels = len(x), x.shape[1]
            self.buffer = x.new_zeros((1 + doubled) * rows, channels + condition.shape[1], *x.shape[2:])
            self.second_half = self.buffer[:rows, channels:].copy_(condition)
            self.first = self.buffer[:rows, :channels]
            self.unguided = self.buffer[rows:, :channels]
            if bool((table.scale == 1).all()):
                self.x = self.first.copy_(x)

    def __call__(self, x: Tensor, scale: float) -> Tensor:
        if self.buffer is None:
            scaled = x if scale == 1 else scale * x
            joined = torch.cat([scaled, self.condition], 1)
            if self.doubled:
                return torch.cat([joined, torch.cat([scaled, torch.zeros_like(self.condition)], 1)])
            return joined
        if self.x is not self.first:
            torch.mul(x, scale, out=self.first)
        if self.doubled:
            self.unguided.copy_(self.first)
        return self.buffer


def run(
    table: SolverTable,
    x: Tensor,
    call: Call,
    images: Sequence[Tensor] = (),
    *,
    guidance: float = 1.0,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    in_place: bool = True,
    inset: tuple[SolverTable, Sequence[Tensor], Region] | None = None,
) -> Tensor:
    """The last sample of the table's steps from x, which is overwritten if ``in_place``; else autograd may follow.

    ``images`` are for the preloaded slots, in their order; ``noise`` is ``[S, *x.shape]``, or drawn. ``inset`` is the
    table, the images and the region of a part of x that follows steps of its own, with the slots of ``table``.
    """
    history: list[Tensor | None] = [None] * table.slots
    for slot, image in zip(table.preloaded, images, strict=True):
        history[slot - 1] = image
    evaluates, noisy = table.evaluates.tolist(), table.noisy.tolist()
    scale, store = table.scale.tolist(), table.store.tolist()
    draws = x.new_empty(x.shape if noise is None and any(noisy) else 0)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not in_place):
        for i, time in enumerate(table.timesteps.tolist()):
            output, uncond, z = None, None, None
            if evaluates[i]:
                made = call(x, x.new_full((len(x),), time), scale[i])
                output, uncond = made if isinstance(made, tuple) else (made, None)
            if noisy[i]:
                z = draws.normal_(generator=generator) if noise is None else noise[i]
            step = solver_step(x, output, history, table.coefficients[i], z, uncond, guidance, table.limit)
            if inset is not None:
                step = _with_inset(step, inset, i, x, output, history, z)
            x = x.copy_(step.x_next) if in_place else step.x_next
            for slot, kept in zip(store[i], (step.converted, step.corrected), strict=True):
                if slot:
                    history[slot - 1] = kept
    return x


def _with_inset(
    step: Step,
    inset: tuple[SolverTable, Sequence[Tensor], Region],
    i: int,
    x: Tensor,
    output: Tensor | None,
    history: Sequence[Tensor | None],
    noise: Tensor | None,
) -> Step:
    """The step, with the region's own in its place. ``x`` is still what the step began with."""
    table, images, region = inset
    at = (..., *region)
    part: list[Tensor | None] = [None if h is None else h[at] for h in history]
    part += [None] * (table.slots - len(part))
    for slot, image in zip(table.preloaded, images, strict=True):
        part[slot - 1] = image
    within = solver_step(
        x[at],
        None if output is None else output[at],
        part,
        table.coefficients[i],
        None if noise is None else noise[at],
        limit=table.limit,
    )
    merged = []
    for whole, piece in zip(step, within, strict=True):
        whole = whole.clone() if whole.requires_grad else whole  # a backward may need what the step has made
        whole[at] = piece
        merged.append(whole)
    return Step(*merged)


def noisy(
    x0: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    image: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """``alpha x0 + sigma noise + shift image``, with numbers ``[B]`` of each sample, in one pass."""
    rows = torch.zeros(len(x0), 3, len(TERMS), dtype=torch.float64)
    rows[:, PREDICT, TERMS.index("x")] = alpha
    rows[:, PREDICT, TERMS.index("noise")] = sigma
    if shift is not None:
        rows[:, PREDICT, TERMS.index("h1")] = shift
    return solver_step(x0, None, () if image is None else (image,), rows, noise).x_next


def at_times(op: str, alphas_cumprod: Tensor, t: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """alpha and sigma ``[B]`` in float64, on the CPU."""
    if alphas_cumprod.dim() != 1 or not len(alphas_cumprod):
        raise ValueError(f"{op}: expected alphas_cumprod [T], got {tuple(alphas_cumprod.shape)}")
    if t.shape != (rows,) or t.dtype.is_floating_point or t.dtype.is_complex:
        raise ValueError(f"{op}: expected an integer t of each of {rows} samples, got {t.dtype} {tuple(t.shape)}")
    t, steps = t.cpu(), len(alphas_cumprod)
    if t.numel() and not 0 <= int(t.min()) <= int(t.max()) < steps:
        raise ValueError(f"{op}: expected t from 0 to {steps - 1}, got {int(t.min())} to {int(t.max())}")
    product = alphas_cumprod.cpu().double()[t]
    return product.sqrt(), (1 - product).sqrt()


def normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def same_shape(op: str, x: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.shape != x.shape:
            raise ValueError(f"{op}: expected {name} of {tuple(x.shape)}, as the images, got {tuple(other.shape)}")
