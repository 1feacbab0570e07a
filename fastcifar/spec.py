"""What an op promises, in one declaration: tests/conformance.py turns it into the whole test matrix, and
``python -m fastcifar selftest`` checks a part of it on whatever machine it runs on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = ("spiking", "spectral", "fixedpoint", "earlyexit", "diffusion")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class BadInput:
    """A call that must be refused: what is wrong, the arguments, and the error with a part of its sentence."""

    what: str
    arguments: Callable[[], dict[str, Any]]
    error: type[Exception]
    says: str


@dataclass(frozen=True)
class OpSpec:
    """One public function and everything that is promised of it.

    Attributes:
        name, family: ``fastcifar.<family>.functional.<name>``, or in a module beside that one.
        function, reference: the function and its plain PyTorch twin, of one signature, returning a tuple.
        sample: ``(size, dtype, device, seed)`` to tensor arguments by name, the first one always among them; sizes are
            ``"empty"``, ``"one"``, ``"prime"`` and ``"large"``.
        options: combinations of the other arguments, so chosen that every value of each occurs. An option of a
            sampled argument's name takes its place (a number or None instead of a tensor).
        differentiable: tensor arguments that take a gradient; none of a decision.
        broadcast: those of them that broadcast against one step of the first argument, so that their gradient is a sum.
        exact: indices of the outputs that equal the reference's to the bit in every dtype; others are held to the error
            bound of :func:`compare`.
        comparable: given the outputs of the float64 truth and of the reference in the tested dtype, the elements (of
            one step, where the first argument has steps) whose gradients may be compared, or None for all: where a
            rounding decides an output, as with a threshold, the two follow different paths. The gradient of a broadcast
            argument is compared where all elements that share it are comparable.
        sure: where the first output is not in ``exact``: the elements of it that no rounding may change, given inputs
            and options. They are compared to the bit, and the outputs that are not exact where all steps are sure.
        raw_ops: names in ``torch.ops.fastcifar``.
        module: makes a module of the op, for round trips; its ``forward`` takes the first argument of ``sample``. None
            where the op has no module of its own.
        bad_inputs: calls that must be refused.
        smooth: the op has derivatives of any order, which gradcheck confirms; otherwise a second one is refused.
        dtypes: dtypes of the inputs; integers where the op takes no others, and then has no gradient.
        layouts: names of conformance.LAYOUTS that every dtype is run in, where the kernel shares its walk over memory
            with that of another op, which is run in all; None for all.
    """

    name: str
    family: str
    function: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    sample: Callable[[str, torch.dtype, str, int], Inputs]
    options: tuple[dict[str, Any], ...]
    differentiable: tuple[str, ...]
    exact: tuple[int, ...]
    raw_ops: tuple[str, ...]
    module: Callable[[], nn.Module] | None
    broadcast: tuple[str, ...] = ()
    comparable: Callable[[Outputs, Outputs], Tensor] | None = None
    sure: Callable[[Inputs, dict[str, Any]], Tensor] | None = None
    bad_inputs: tuple[BadInput, ...] = ()
    smooth: bool = False
    dtypes: tuple[torch.dtype, ...] = field(default=DTYPES)
    layouts: tuple[str, ...] | None = None

    def gradients(self, inputs: Inputs, options: dict[str, Any]) -> tuple[str, ...]:
        """The arguments that take a gradient in a call with these options."""
        return tuple(name for name in self.differentiable if name in inputs and name not in options)


def all_specs() -> list[OpSpec]:
    """Every op's declaration, from fastcifar/<family>/spec.py."""
    return [spec for family in FAMILIES for spec in importlib.import_module(f".{family}.spec", __package__).SPECS]


def run(
    function: Callable[..., Outputs],
    inputs: Inputs,
    options: dict[str, Any],
    gradients: tuple[str, ...],
    cotangents: list[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Outputs, dict[str, Tensor], list[Tensor]]:
    """Outputs, gradients by argument name, and the cotangents used (made here where none are given).

    Inputs that ``options`` replaces are left out. With ``dtype``, inputs and cotangents are converted first (the
    float64 truth of a float32 case).
    """

    def leaf(name: str, t: Tensor) -> Tensor:
        t = t.detach() if dtype is None else t.detach().to(dtype)
        return t.requires_grad_(name in gradients)

    leaves = {name: leaf(name, t) for name, t in inputs.items() if name not in options}
    outputs = function(**leaves, **options)
    if cotangents is None:
        generator = torch.Generator(device="cpu").manual_seed(1)
        like = [leaves[next(iter(leaves))] if o is None else o for o in outputs]
        cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in like]
    # An output that does not depend on what takes a gradient may require one in one implementation and not in another.
    pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if o is not None and o.requires_grad]
    found: dict[str, Tensor] = {}
    if pairs and gradients:
        wanted = [leaves[name] for name in gradients]
        reached, given = zip(*pairs, strict=True)
        found = dict(zip(gradients, torch.autograd.grad(reached, wanted, given, materialize_grads=True), strict=True))
    return tuple(o if o is None else o.detach() for o in outputs), found, cotangents


def identical(a: Tensor, b: Tensor) -> bool:
    """Same shape, dtype and values, NaN where NaN is."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def worse_than_eager(
    ours: Tensor,
    eager: Tensor,
    truth: Tensor,
    mask: Tensor | None = None,
    incoming: float = 0.0,
    spread: Tensor | None = None,
) -> str | None:
    """The house's error bound: at most twice the error of the eager formulation in the same dtype, plus one ulp.

    In float64 the eager formulation is the truth, so the bound is 1e-13 of the largest value.

    Args:
        mask: the elements to compare.
        incoming: the largest gradient that a gradient is made of; the ulp is that of the largest number, in or out.
        spread: of sums, the root of the sum of the squares of the terms' errors in the eager formulation. The error of
            a single sum is one draw, often near zero by luck; what to expect of it is twice its spread.
    """
    if ours.shape != truth.shape or ours.dtype != eager.dtype:
        return f"expected {tuple(truth.shape)} {eager.dtype}, got {tuple(ours.shape)} {ours.dtype}"
    truth = truth.double()
    keep = torch.ones_like(truth, dtype=torch.bool) if mask is None else mask
    if bool((ours.isfinite() != eager.isfinite())[keep].any()):
        return "infinities or NaNs where the reference has none, or the reverse"
    keep = keep & truth.isfinite() & eager.isfinite()
    if not bool(keep.any()):
        return None
    error, eager_error = ((t.double() - truth)[keep].abs().max().item() for t in (ours, eager))
    if spread is not None:
        eager_error = max(eager_error, 2 * spread[keep].max().item())
    ulp = 1e-13 if ours.dtype == torch.float64 else torch.finfo(ours.dtype).eps
    ulp *= max(truth[keep].abs().max().item(), incoming)
    return (
        None if error <= 2 * eager_error + ulp else f"error {error:.3g}, eager's {eager_error:.3g}, one ulp {ulp:.3g}"
    )


def _fit(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """A mask of ``[N...]`` for ``shape``: ``[T, N...]``, or one that broadcasts against ``[N...]``, where an element is
    kept if all that share it are."""
    if mask is None or len(shape) > mask.dim():
        return mask if mask is None else mask.expand(shape)
    mask = mask.flatten(0, mask.dim() - len(shape) - 1).all(0) if len(shape) < mask.dim() else mask
    for d, size in enumerate(shape):
        if size == 1:
            mask = mask.all(d, keepdim=True)
    return mask


@dataclass(frozen=True)
class Expected:
    """What the reference says of a case: outputs and gradients in float64 and in the dtype of the case."""

    truth: Outputs
    eager: Outputs
    truth_grads: dict[str, Tensor]
    eager_grads: dict[str, Tensor]
    cotangents: list[Tensor]
    spreads: dict[str, Tensor]  # of the gradients that are sums, see worse_than_eager
    sure: Tensor | None
    mask: Tensor | None  # what may be compared, [N...]


def expect(spec: OpSpec, inputs: Inputs, options: dict[str, Any], gradients: tuple[str, ...] | None = None) -> Expected:
    """Runs the reference on these inputs, with an element of its own for each element that shares a broadcast one."""
    gradients = spec.gradients(inputs, options) if gradients is None else gradients
    step = next(iter(inputs.values())).shape[1:]
    each = {name: t.expand(step) if name in spec.broadcast else t for name, t in inputs.items()}
    truth, truth_grads, cotangents = run(spec.reference, each, options, gradients, dtype=torch.float64)
    eager, eager_grads, _ = run(spec.reference, each, options, gradients, cotangents)
    spreads = {}
    for name in (n for n in gradients if n in spec.broadcast):
        shape = inputs[name].shape
        squares = (eager_grads[name].double() - truth_grads[name]).square()
        spreads[name] = squares.sum_to_size(shape).sqrt()
        truth_grads[name], eager_grads[name] = (g[name].sum_to_size(shape) for g in (truth_grads, eager_grads))
    mask = spec.comparable(truth, eager) if spec.comparable else None
    sure = spec.sure(inputs, options) if spec.sure else None
    if sure is not None:
        mask = sure.all(0) if mask is None else mask & sure.all(0)
    return Expected(truth, eager, truth_grads, eager_grads, cotangents, spreads, sure, mask)


def compare(
    spec: OpSpec,
    inputs: Inputs,
    options: dict[str, Any],
    gradients: tuple[str, ...] | None = None,
    expected: Expected | None = None,
) -> list[str]:
    """What is wrong with the op on these inputs, outputs and gradients; an empty list where nothing is."""
    gradients = spec.gradients(inputs, options) if gradients is None else gradients
    want = expect(spec, inputs, options, gradients) if expected is None else expected
    ours, our_grads, _ = run(spec.function, inputs, options, gradients, want.cotangents)

    incoming = max((c.abs().max().item() for c in want.cotangents if c.numel()), default=0.0)
    problems = []
    for i, (o, e, t) in enumerate(zip(ours, want.eager, want.truth, strict=True)):
        if o is None or e is None or t is None:
            problem = None if o is None and e is None else "expected None in both or in neither"
        elif i in spec.exact:
            problem = None if identical(o, e) else "not equal to the bit"
        elif i == 0 and want.sure is not None:
            same = identical(o.where(want.sure, 0), e.where(want.sure, 0))
            problem = None if same else "not equal to the bit where no rounding decides"
        else:
            problem = worse_than_eager(o, e, t, _fit(want.mask, o.shape))
        problems += [f"output {i}: {problem}"] if problem else []
    for name in gradients:
        o, e, t = our_grads[name], want.eager_grads[name], want.truth_grads[name]
        problem = worse_than_eager(o, e, t, _fit(want.mask, o.shape), incoming, want.spreads.get(name))
        problems += [f"gradient to {name}: {problem}"] if problem else []
    return [f"{p} with {options}" for p in problems]
