"""What an answered call must have done, for tests/fuzz.py: the same bits for contiguous copies of its arguments, and
for another instruction set or number of threads; no byte written but where the schema says so; and the truth."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastcifar import _library

REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)
M_PERTURB = -6
CANARY, PAD = 0xA5, 64
LARGE = 2**20  # elements of an answer: more come of a mutation, say of a padding of 1000, and are not made again
# Results (by their index) that depend on the layout in their last bits: sums in float64 over elements as they lie in
# memory. Their values are held to the references by tests/fuzz_specs.py.
SUMS = {("neuron_backward", 3), ("fixed_quantize_backward", 1), ("solver_step_backward", 1)}
ISAS = range(1 + _library.ISAS.index(_library.cpu_isa()) if _library.WHY_NO_EXTENSION is None else 0)


def perturb_fresh_memory(byte: int) -> None:
    """Has glibc fill what is allocated: results that are not written in full then differ from call to call."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_PERTURB, byte)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Same shape, dtype and values, NaN where NaN is, and zeros of one sign."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool((((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())).all())


class Guard:
    """A copy of a tensor among canaries, and what its storage held before the call."""

    def __init__(self, t: Tensor, writable: bool, offset: int) -> None:
        extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        item = t.element_size()
        self.first, self.extent = (PAD + offset) * item, extent * item
        self.bytes = torch.full(((extent + 2 * PAD + offset) * item,), CANARY, dtype=torch.uint8)
        base = self.bytes.view(t.dtype)
        base[PAD + offset : PAD + offset + extent] = t.as_strided((extent,), (1,))
        self.tensor = base.as_strided(t.shape, t.stride(), PAD + offset)
        self.before, self.writable = self.bytes.clone(), writable

    def problem(self) -> str | None:
        if torch.equal(self.bytes, self.before):
            return None
        if not self.writable:
            return "an argument that is only read has changed"
        inside = slice(self.first, self.first + self.extent)
        expected = self.before.clone()
        view = expected.view(self.tensor.dtype).as_strided(
            self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()
        )
        if self.extent == self.tensor.numel() * self.tensor.element_size():
            expected[inside] = self.bytes[inside]
        else:
            view.copy_(self.tensor)
        return None if torch.equal(expected, self.bytes) else "a byte beside an argument was written"


class Op:
    """An op, and which of its arguments it writes to."""

    def __init__(self, name: str) -> None:
        self.name, self.function = name, getattr(torch.ops.fastcifar, name).default
        arguments = self.function._schema.arguments
        self.writes = tuple(a.alias_info is not None and a.alias_info.is_write for a in arguments)

    def placed(self, arguments: Iterable[Any], rng: random.Random) -> tuple[list[Any], list[Guard]]:
        """Copies of the arguments among canaries."""
        guards: list[Guard] = []

        def place(t: Tensor, writable: bool) -> Tensor:
            guards.append(Guard(t, writable, rng.choice((0, 0, 1, 3))))
            return guards[-1].tensor

        placed = [
            pytree.tree_map_only(Tensor, lambda t, w=w: place(t, w), a)
            for a, w in zip(arguments, self._writes(arguments), strict=True)
        ]
        return placed, guards

    def _writes(self, arguments: Any) -> tuple[bool, ...]:
        return self.writes[: len(arguments)]

    def answer(self, arguments: list[Any]) -> list[Tensor]:
        """Results, and the arguments that were written to, as they are then."""
        results = pytree.tree_leaves(self.function(*arguments))
        written = [a for a, w in zip(arguments, self._writes(arguments), strict=True) if w and isinstance(a, Tensor)]
        return [*(r if isinstance(r, Tensor) else torch.tensor(r) for r in results if r is not None), *written]

    def dense(self, arguments: Iterable[Any]) -> list[Any]:
        return [
            pytree.tree_map_only(Tensor, lambda t: t.clone(memory_format=torch.contiguous_format), a) for a in arguments
        ]

    def checked(self, arguments: list[Any], rng: random.Random) -> list[Tensor]:
        """The answer to a call; AssertionError where it is not the same another time, or memory was spoilt.

        Raises what the op raises where it refuses.
        """
        perturb_fresh_memory(rng.randrange(1, 128))
        placed, guards = self.placed(arguments, rng)
        try:
            first = self.answer(placed)
        finally:
            problems = [p for p in (g.problem() for g in guards) if p]
            if problems:
                raise AssertionError(f"{self.name}: {problems[0]}")
        if sum(t.numel() for t in first) > LARGE:
            return first
        perturb_fresh_memory(rng.randrange(128, 256))
        self._compare("contiguous copies of its arguments", first, self.dense(arguments))
        if self.name == "_cpu_isa":
            return first
        # One of them a call: there are many calls.
        way = rng.choice([*(("isa", isa) for isa in ISAS[:-1]), ("threads", 2), ("threads", 3)])
        try:
            if way[0] == "isa":
                torch.ops.fastcifar._cpu_isa(way[1])
                what = f"the instruction set {_library.ISAS[way[1]]}"
            else:
                torch.set_num_threads(way[1])
                what = f"{way[1]} threads"
            self._compare(what, first, self.placed(arguments, rng)[0])
        finally:
            torch.ops.fastcifar._cpu_isa(ISAS[-1])
            torch.set_num_threads(1)
        return first

    def _compare(self, what: str, first: list[Tensor], arguments: list[Any]) -> None:
        try:
            again = self.answer(arguments)
        except REFUSALS as error:
            raise AssertionError(f"{self.name}: with {what}, what was answered is refused: {error}") from error
        for i, (a, b) in enumerate(zip(first, again, strict=True)):
            # Spikes as bits lie as x does.
            bits = self.name == "neuron_forward" and i == 0 and arguments[11] == 2
            if what.startswith("contiguous") and (bits or (self.name, i) in SUMS):
                continue
            if not same_bits(a, b):
                raise AssertionError(f"{self.name}: with {what}, result {i} has other bits")


def differs(found: list[Tensor], expected: list[Tensor], tolerance: float) -> str | None:
    """How an answer differs from the truth: to the bit (but for the sign of zeros), or relative to the largest."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i}: expected {tuple(b.shape)} {b.dtype}, got {tuple(a.shape)} {a.dtype}"
        equal = (a == b) | (a.isnan() & b.isnan())
        if bool(equal.all()):
            continue
        if tolerance == 0:
            return f"result {i} is not equal to the bit"
        a, b, finite = a.double(), b.double(), b.isfinite() & a.isfinite()
        if not bool((equal | finite).all()):
            return f"result {i} has infinities or NaN where the truth has none, or the reverse"
        error, largest = (a - b)[finite].abs().max().item(), b[finite].abs().max().item()
        if error > tolerance * largest:
            return f"result {i} is {error:.3g} off, of {largest:.3g}"
    return None
