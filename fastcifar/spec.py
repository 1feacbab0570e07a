"""What an op promises, in one declaration: tests/conformance.py turns it into the whole test matrix, and
``python -m fastcifar selftest`` checks a part of it on whatever machine it runs on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = ("spiking",)
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
        name, family: ``fastcifar.<family>.functional.<name>``.
        function, reference: the function and its plain PyTorch twin, of one signature, returning a tuple.
        sample: ``(size, dtype, device, seed)`` to tensor arguments by name; sizes are ``"empty"``, ``"one"``,
            ``"prime"`` and ``"large"``.
        options: combinations of the other arguments, so chosen that every value of each occurs.
        differentiable: tensor arguments that take a gradient.
        exact: indices of the outputs that equal the reference's to the bit in every dtype; others are held to the error
            bound of :func:`compare`.
        comparable: given the outputs of the float64 truth and of the reference in the tested dtype, the elements of
            each argument whose gradients may be compared (where a rounding decides an output, as with a threshold, the
            two follow different paths), or None for all.
        raw_ops: names in ``torch.ops.fastcifar``.
        raw_calls: ``(inputs, options)`` to the arguments of each raw op, for torch.library.opcheck.
        module: makes a module of the op, for round trips; its ``forward`` takes the first argument of ``sample``.
        bad_inputs: calls that must be refused.
        dtypes: dtypes of the inputs.
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
    raw_calls: Callable[[Inputs, dict[str, Any]], dict[str, tuple[Any, ...]]]
    module: Callable[[], nn.Module]
    comparable: Callable[[Outputs, Outputs], dict[str, Tensor]] | None = None
    bad_inputs: tuple[BadInput, ...] = ()
    dtypes: tuple[torch.dtype, ...] = field(default=DTYPES)


def all_specs() -> list[OpSpec]:
    """Every op's declaration, from fastcifar/<family>/spec.py."""
    return [spec for family in FAMILIES for spec in importlib.import_module(f"fastcifar.{family}.spec").SPECS]


def run(
    function: Callable[..., Outputs],
    inputs: Inputs,
    options: dict[str, Any],
    gradients: tuple[str, ...],
    cotangents: list[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Outputs, dict[str, Tensor], list[Tensor]]:
    """Outputs, gradients by argument name, and the cotangents used (made here where none are given).

    With ``dtype``, inputs and cotangents are converted first (the float64 truth of a float32 case).
    """

    def leaf(name: str, t: Tensor) -> Tensor:
        t = t.detach() if dtype is None else t.detach().to(dtype)
        return t.requires_grad_(name in gradients)

    leaves = {name: leaf(name, t) for name, t in inputs.items()}
    outputs = function(**leaves, **options)
    reached = [o for o in outputs if o is not None and o.requires_grad]
    if cotangents is None:
        generator = torch.Generator(device="cpu").manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in reached]
    found: dict[str, Tensor] = {}
    if reached and gradients:
        given = [c.to(o.dtype) for c, o in zip(cotangents, reached, strict=True)]
        wanted = [leaves[name] for name in gradients]
        found = dict(zip(gradients, torch.autograd.grad(reached, wanted, given), strict=True))
    return tuple(o if o is None else o.detach() for o in outputs), found, cotangents


def identical(a: Tensor, b: Tensor) -> bool:
    """Same shape, dtype and values, NaN where NaN is."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _worse_than_eager(ours: Tensor, eager: Tensor, truth: Tensor, mask: Tensor | None) -> str | None:
    """The house's error bound: at most twice the error of the eager formulation in the same dtype, plus one ulp.

    In float64 the eager formulation is the truth, so the bound is 1e-13 of the largest value.
    """
    if ours.shape != truth.shape or ours.dtype != eager.dtype:
        return f"expected {tuple(truth.shape)} {eager.dtype}, got {tuple(ours.shape)} {ours.dtype}"
    truth = truth.double()
    keep = torch.ones_like(truth, dtype=torch.bool) if mask is None else mask.expand(truth.shape)
    keep = keep & truth.isfinite() & eager.isfinite()
    if bool((ours.isfinite() != eager.isfinite()).any()):
        return "infinities or NaNs where the reference has none, or the reverse"
    if not bool(keep.any()):
        return None
    error, eager_error = ((t.double() - truth)[keep].abs().max().item() for t in (ours, eager))
    ulp = torch.finfo(ours.dtype).eps * truth[keep].abs().max().item()
    if ours.dtype == torch.float64:
        ulp = 1e-13 * truth[keep].abs().max().item()
    return (
        None if error <= 2 * eager_error + ulp else f"error {error:.3g}, eager's {eager_error:.3g}, one ulp {ulp:.3g}"
    )


def compare(
    spec: OpSpec, inputs: Inputs, options: dict[str, Any], gradients: tuple[str, ...] | None = None
) -> list[str]:
    """What is wrong with the op on these inputs, outputs and gradients; an empty list where nothing is."""
    gradients = tuple(n for n in spec.differentiable if n in inputs) if gradients is None else gradients
    truth, truth_grads, cotangents = run(spec.reference, inputs, options, gradients, dtype=torch.float64)
    eager, eager_grads, _ = run(spec.reference, inputs, options, gradients, cotangents)
    ours, our_grads, _ = run(spec.function, inputs, options, gradients, cotangents)

    problems = []
    for i, (o, e, t) in enumerate(zip(ours, eager, truth, strict=True)):
        if o is None or e is None or t is None:
            problem = None if o is None and e is None else "expected None in both or in neither"
        elif i in spec.exact:
            problem = None if identical(o, e) else "not equal to the bit"
        else:
            problem = _worse_than_eager(o, e, t, None)
        problems += [f"output {i}: {problem}"] if problem else []
    masks = spec.comparable(truth, eager) if spec.comparable else {}
    for name in gradients:
        problem = _worse_than_eager(our_grads[name], eager_grads[name], truth_grads[name], masks.get(name))
        problems += [f"gradient to {name}: {problem}"] if problem else []
    return [f"{p} with {options}" for p in problems]
