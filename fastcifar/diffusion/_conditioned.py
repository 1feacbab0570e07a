"""The loop that DiffuseVAE, LowDiff and TrojDiff share: a table's steps on a sample that is a part of what the model
reads, with images in preloaded slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import expect_tensors, expect_type
from .functional import solver_step
from .reference import PREDICT, TERMS, Step
from .schedule import DiscreteVP
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
    noise: Sequence[Tensor] | Tensor | None = None,
    generator: torch.Generator | None = None,
    in_place: bool = True,
    inset: tuple[SolverTable, Sequence[Tensor], Region] | None = None,
) -> Tensor:
    """The last sample of the table's steps from x, which is overwritten if ``in_place``; else autograd may follow.

    ``images`` are for the preloaded slots, in their order. ``noise`` has one tensor a step; without it and without a
    generator, the kernel draws by a seed from torch's. ``inset`` is the table, the images and the region of a part of x
    that follows steps of its own, with the slots of ``table``.
    """
    history: list[Tensor | None] = [None] * table.slots
    for slot, image in zip(table.preloaded, images, strict=True):
        history[slot - 1] = image
    steps, draws = len(table), _Draws(table, noise, generator)
    rows, store = table.coefficients.tolist(), table.store.tolist()
    evaluates, scale = table.evaluates.tolist(), table.scale.tolist()
    kept = {slot: torch.empty_like(x) for slot in {s for pair in store for s in pair if s}} if in_place else {}
    with torch.set_grad_enabled(torch.is_grad_enabled() and not in_place):
        for i, time in enumerate(table.timesteps.tolist()):
            output, uncond = None, None
            if evaluates[i]:
                made = call(x, x.new_full((len(x),), time), scale[i])
                output, uncond = made if isinstance(made, tuple) else (made, None)
            z = draws(i, x)
            given = {"uncond": uncond, "guidance": guidance, "limit": table.limit, **z}
            within = None if inset is None else _within(inset, i, x, output, history, z, steps)
            if in_place:
                given["out"] = Step(x, *(kept.get(slot) for slot in store[i]))  # type: ignore[arg-type]
            step = solver_step(x, output, history, rows[i], **given)
            if within is not None and inset is not None:
                step = _merged(step, within, inset[2], in_place)
            x = step.x_next
            for slot, value in zip(store[i], (step.converted, step.corrected), strict=True):
                if slot:
                    history[slot - 1] = value
    return x


class _Draws:
    """The noise of each step, as arguments of :func:`solver_step`."""

    def __init__(self, table: SolverTable, noise: Any, generator: torch.Generator | None) -> None:
        if noise is not None and (not isinstance(noise, Tensor | list | tuple) or len(noise) != len(table)):
            raise TypeError(f"expected noise of each of {len(table)} steps, in a tensor or a list, got {noise!r:.80}")
        self.noisy, self.noise, self.generator = table.noisy.tolist(), noise, generator
        self.seed = int(torch.randint(2**63 - 1, ())) if noise is None and generator is None and any(self.noisy) else 0

    def __call__(self, i: int, x: Tensor) -> dict[str, Any]:
        if not self.noisy[i]:
            return {}
        if self.noise is not None:
            return {"noise": self.noise[i]}
        if self.generator is not None:
            return {"noise": normal(x, self.generator)}
        return {"seed": self.seed, "stream": i}


def _within(
    inset: tuple[SolverTable, Sequence[Tensor], Region],
    i: int,
    x: Tensor,
    output: Tensor | None,
    history: Sequence[Tensor | None],
    z: dict[str, Any],
    steps: int,
) -> Step:
    """The region's own step."""
    table, images, region = inset
    at = (..., *region)
    part: list[Tensor | None] = [None if h is None else h[at] for h in history]
    part += [None] * (table.slots - len(part))
    for slot, image in zip(table.preloaded, images, strict=True):
        part[slot - 1] = image
    # Of noise that is given, its part; of what the kernel draws, a stream that no step has.
    own = {"noise": z["noise"][at]} if "noise" in z else z | {"stream": steps + i} if z else {}
    rows = table.coefficients[i].tolist()
    return solver_step(x[at], None if output is None else output[at], part, rows, limit=table.limit, **own)


def _merged(whole: Step, part: Step, region: Region, in_place: bool) -> Step:
    """The step with the region's own in its place."""
    results = []
    for tensor, piece in zip(whole, part, strict=True):
        if tensor is not None and piece is not None:
            tensor = tensor if in_place else tensor.clone()  # a backward may need what the step has made
            tensor[(..., *region)] = piece
        results.append(tensor)
    return Step(*results)


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
    images = () if image is None else (image,)
    return solver_step(x0, None, images, rows, noise.to(x0), wanted=("x_next",)).x_next  # of an empty batch, too


def at_times(op: str, schedule: DiscreteVP, t: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """alpha and sigma ``[B]`` in float64, on the CPU."""
    expect_type(op, DiscreteVP, "a DiscreteVP", schedule=schedule)
    expect_tensors(op, t=t)
    if t.shape != (rows,) or t.dtype.is_floating_point or t.dtype.is_complex:
        raise ValueError(f"{op}: expected an integer t of each of {rows} samples, got {t.dtype} {tuple(t.shape)}")
    t, steps = t.cpu(), len(schedule)
    if t.numel() and not 0 <= int(t.min()) <= int(t.max()) < steps:
        raise ValueError(f"{op}: expected t from 0 to {steps - 1}, got {int(t.min())} to {int(t.max())}")
    return schedule.alpha(t), schedule.sigma(t)


def some_times(schedule: DiscreteVP, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """int64 t ``[B]`` for the samples x."""
    return torch.randint(len(schedule), (len(x),), device=x.device, generator=generator)


def normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def same_shape(op: str, x: Tensor, **others: Tensor) -> None:
    expect_tensors(op, images=x, **others)
    for name, other in others.items():
        if other.shape != x.shape:
            raise ValueError(f"{op}: expected {name} of {tuple(x.shape)}, as the images, got {tuple(other.shape)}")
