"""How a benchmark is declared: a :class:`Workload`, some :class:`Candidate`, and :func:`compare` does the rest."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import machine
import pytest
import torch
from measure import DEVICE, FULL, peak_memory, saved_for_backward, synchronize
from paired import Paired
from torch import Tensor

FLOOR = "floor"  # a copy of as many bytes as the workload must move, timed in turn with the candidates
MODES = ("forward", "forward+backward")
SMALL = 2**18  # elements; a workload of fewer is called on end within a round until it has seen as many
Role = Literal["reference", "compiled", "peer", "ours"]


@dataclass(frozen=True)
class Workload:
    """One problem: what goes in, what it must cost, and how closely the outputs must agree.

    Args:
        family, op, title: where it stands in the report.
        make: returns the differentiable inputs, on the CPU, from real images.
        elements: count that the costs below are per, e.g. the element-steps of a sequence.
        forward_bytes, backward_bytes: least memory traffic an element, bytes: each tensor that an exact method must
            read or write, once. The floor is a copy of as many bytes, timed in turn with the candidates.
        forward_flops, backward_flops: least floating-point operations an element.
        output_tolerance: largest difference to the reference, relative to its largest magnitude; 0 asks for equal bits.
        gradient_tolerance: the same for the gradients of the inputs.
        gradient_scales: what the difference of an input's gradient is relative to, by the input's place, where that is
            not its largest magnitude: of a sum whose terms cancel, the root of the sum of their squares.
        full: only in the full run.
        keep_mapped: runs again, last of all, after ``fastcifar.keep_memory_mapped()``.
        note: a remark for the report.
    """

    family: str
    op: str
    title: str
    make: Callable[[], tuple[Tensor, ...]]
    elements: int
    forward_bytes: float
    backward_bytes: float
    forward_flops: float
    backward_flops: float
    output_tolerance: float = 0.0
    gradient_tolerance: float = 1e-6
    gradient_scales: tuple[tuple[int, float], ...] = ()
    full: bool = False
    keep_mapped: bool = False
    note: str = ""

    def cost(self, mode: str) -> dict[str, float]:
        """Bytes and operations of the whole workload."""
        both = mode == "forward+backward"
        return {
            "bytes": self.elements * (self.forward_bytes + both * self.backward_bytes),
            "flops": self.elements * (self.forward_flops + both * self.backward_flops),
        }


@dataclass(frozen=True)
class Candidate:
    """One way to do the work.

    Args:
        name: how the report calls it.
        role: what it is; the first "reference" is what all others are checked against.
        build: returns the function from the inputs to the output. An ImportError says that it is not installed.
        checked: False where it computes something else by convention, so that only its cost can be compared.
        missing: places of the inputs that it has no gradient for; all else is checked. It is no baseline then.
        full: only in the full run.
        note: a remark for the report, e.g. why it is not checked.
    """

    name: str
    role: Role
    build: Callable[[], Callable[..., Tensor]]
    checked: bool = True
    missing: tuple[int, ...] = ()
    full: bool = False
    note: str = ""


def cases(workloads: Iterable[Workload]) -> pytest.MarkDecorator:
    """Parametrizes a test over ``workload``, ``mode`` and ``mapped``."""
    parameters = []
    for workload in workloads:
        if workload.full and not FULL:
            continue
        for mapped in (False, True) if workload.keep_mapped else (False,):
            for mode in MODES:
                name = f"{workload.title} {mode}{' mapped' if mapped else ''}".replace("=", "")
                name = re.sub(r"\W+", "-", name)  # what -k can match: "T4 and backward"
                marks = [pytest.mark.keep_mapped] if mapped else []
                parameters.append(pytest.param(workload, mode, mapped, id=name, marks=marks))
    return pytest.mark.parametrize(("workload", "mode", "mapped"), parameters)


def compare(paired: Paired, workload: Workload, mode: str, mapped: bool, candidates: Sequence[Candidate]) -> None:
    """Checks every candidate against the reference on the workload, measures its memory, and times all in turn."""
    backward = mode == "forward+backward"
    inputs = [tensor.to(DEVICE).requires_grad_(backward) for tensor in workload.make()]
    paired.describe(
        workload.family,
        op=workload.op,
        workload=workload.title,
        mode=mode,
        mapped=mapped,
        elements=workload.elements,
        note=workload.note,
        **workload.cost(mode),
    )
    chosen = [candidate for candidate in candidates if FULL or not candidate.full]
    expected: list[Tensor] = []
    gradient: Tensor | None = None
    calls = {}
    for done, candidate in enumerate(chosen):
        paired.progress(f"checking {candidate.name}", done, len(chosen))
        comparable = candidate.checked and not candidate.missing
        paired.record(candidate.name, role=candidate.role, note=candidate.note, checked=comparable)
        try:
            function = candidate.build()
        except ImportError as error:
            paired.record(candidate.name, skipped=f"not installed ({error.name or error})")
            continue
        results, gradient, first = _first_call(function, inputs, gradient, backward)
        if candidate.role == "reference" and not expected:
            expected = results
        elif candidate.checked:
            _check(candidate, workload, results, expected)
        del results

        call = calls[candidate.name] = _work(function, inputs, gradient, backward)
        facts: dict[str, Any] = {"first_call": first, "peak_bytes": peak_memory(call)}
        if backward:
            _, facts["saved_others"] = saved_for_backward(lambda f=function: f(*inputs), inputs)
            facts["saved_inputs"], _ = saved_for_backward(lambda f=function: f(*inputs), inputs[:1])  # of x alone
        paired.record(candidate.name, **facts)
    expected.clear()
    paired.record(FLOOR, role="floor")
    calls[FLOOR] = machine.copier(int(workload.cost(mode)["bytes"]))
    # What takes microseconds is called on end, so that its own code is what the processor has at hand, for all alike.
    paired.time(calls, repeats=max(1, SMALL // workload.elements))


def _work(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    gradient: Tensor,
    backward: bool,
) -> Callable[[], None]:
    """What is timed: all of forward (and backward), and the release of what it allocated."""

    def forward_only() -> None:
        with torch.no_grad():
            function(*inputs)

    def forward_and_backward() -> None:
        function(*inputs).backward(gradient)
        for tensor in inputs:
            tensor.grad = None

    return forward_and_backward if backward else forward_only


def _first_call(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    gradient: Tensor | None,
    backward: bool,
) -> tuple[list[Tensor], Tensor, float]:
    """The output and, with ``backward``, the inputs' gradients; the output's gradient, made here if None; seconds."""
    begin = perf_counter()
    with torch.set_grad_enabled(backward):
        out = function(*inputs)
    synchronize()
    elapsed = perf_counter() - begin
    if gradient is None:
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, out.dtype)
    begin = perf_counter()
    gradients = torch.autograd.grad(out, inputs, gradient, materialize_grads=True) if backward else ()
    synchronize()
    return [out.detach(), *gradients], gradient, elapsed + perf_counter() - begin


def _check(candidate: Candidate, workload: Workload, results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Fails the benchmark where a candidate does not agree with the reference."""
    name = candidate.name
    for index, (result, right) in enumerate(zip(results, expected, strict=True)):
        if index - 1 in candidate.missing:
            continue
        what = f"gradient of input {index - 1}" if index else "output"
        got, wanted = ((tensor.dtype, tuple(tensor.shape)) for tensor in (result, right))
        if got != wanted:
            pytest.fail(f"{name}: the {what} is {got}, not {wanted}")
        tolerance = workload.gradient_tolerance if index else workload.output_tolerance
        if tolerance == 0:
            wrong = int((result != right).sum())
            if wrong:
                pytest.fail(f"{name}: {wrong} of {result.numel()} values of the {what} differ from the reference")
            continue
        scale = dict(workload.gradient_scales).get(index - 1) or right.double().abs().max().item()
        difference = (result.double() - right.double()).abs().max().item() / scale
        if not difference <= tolerance:
            pytest.fail(f"{name}: the {what} differs from the reference by {difference:.2e} of its magnitude")
