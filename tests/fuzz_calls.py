"""Valid calls of every schema, for tests/fuzz.py: those that the ops' declarations reach (fastcifar/<family>/spec.py)
are recorded, the others are made here, with what their answers must be.

A maker takes random numbers and gives arguments; a truth takes arguments and gives the expected results, and how far a
result may be from them (relative to the largest of them; 0: to the bit).
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastcifar
from fastcifar import _library
from fastcifar.diffusion import reference as diffusion_reference
from fastcifar.diffusion import tree_reference
from fastcifar.diffusion.spec import ANCESTRAL, DDIM, MULTISTEP, UNIPC
from fastcifar.fixedpoint import reference as fixed_reference
from fastcifar.spec import all_specs, run
from fastcifar.spectral import reference as spectral_reference

PROGRAMS = (DDIM, MULTISTEP, UNIPC, ANCESTRAL)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Recorder(TorchDispatchMode):
    """Keeps the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fastcifar":
            copies = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), args)
            self.calls.setdefault(op._schema.name.partition("::")[2], []).append(copies)
        return op(*args, **(kwargs or {}))


def schemas() -> list[str]:
    """Names of all ops."""
    text = (Path(fastcifar.__file__).parent / "_schemas.inc").read_text()
    lines = ast.literal_eval("[" + re.sub(r"^\s*//.*$", "", text, flags=re.M) + "]")
    return [line.partition("(")[0] for line in lines]


def recorded(op: str) -> list[tuple]:
    """Valid arguments of an op that a declaration reaches."""
    recorder = Recorder()
    for spec in (s for s in all_specs() if op in s.raw_ops):
        for options in spec.options:
            for dtype in spec.dtypes[:1] if len(spec.options) > 8 else spec.dtypes:
                inputs = spec.sample("prime", dtype, "cpu", 0)
                with recorder:
                    run(spec.function, inputs, options, spec.gradients(inputs, options))
    return recorder.calls[op]


def valid_calls(op: str, seed: int = 0, each: int = 24) -> list[tuple]:
    """Valid arguments of an op."""
    if op not in MAKERS:
        return recorded(op)
    return [tuple(MAKERS[op](random.Random(f"{seed} {op} {i}"))) for i in range(each)]


# ---- makers ----------------------------------------------------------------------------------------------------------


def randn(rng: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(rng.randrange(2**60))
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)


def integers(rng: random.Random, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(rng.randrange(2**60)), dtype=dtype)


def seed_of(rng: random.Random) -> Tensor:
    return torch.tensor(rng.randrange(-(2**63), 2**63))


def packed_conv(rng: random.Random) -> list:
    kernel = [rng.randint(1, 3) for _ in range(2)]
    height, width = (k + rng.randint(0, 5) for k in kernel)
    channels, outputs = 8 * rng.randint(1, 12), 16 * rng.randint(1, 6)
    bits = integers(rng, 0, 256, rng.randint(0, 3), height * width * channels // 8, dtype=torch.uint8)
    weight = integers(rng, -9, 10, kernel[0] * kernel[1] * channels, outputs).float()
    bias = rng.choice((None, integers(rng, -9, 10, outputs).float()))
    pairs = [[rng.randint(low, 2) for _ in range(2)] for low in (1, 0)]
    return [bits, weight, bias, height, width, kernel, *pairs, [1, 1]]


def fixed_to_raw(rng: random.Random) -> list:
    width, rounding = rng.randint(1, 32), rng.randrange(len(fixed_reference.ROUNDINGS))
    overflow = rng.randrange(len(fixed_reference.OVERFLOWS))
    signed = rng.random() < 0.5 or fixed_reference.OVERFLOWS[overflow] == "wrap_sm"
    x = randn(rng, *(rng.randint(1, 9) for _ in range(rng.randint(0, 4))), dtype=rng.choice(FLOATS))
    x = x * 2.0 ** rng.randint(-3, 9)
    saturated = rng.randint(0, width) if fixed_reference.OVERFLOWS[overflow].startswith("wrap") else 0
    return [x, seed_of(rng), width, rng.randint(-4, 12), signed, rounding, overflow, saturated]


def _step(rng: random.Random) -> tuple[list[Tensor], list[list[float]], float, float]:
    """x, output, uncond, two kept tensors and noise; a program, guidance, and a limit."""
    shape = [rng.randint(1, 4), *(rng.randint(1, 9) for _ in range(rng.randint(0, 3)))]
    dtype = rng.choice(FLOATS)
    program, limit = rng.choice(PROGRAMS), rng.choice((float("inf"), 0.7))
    return [randn(rng, *shape, dtype=dtype) for _ in range(6)], program, rng.choice((1.0, 3.5)), limit


def solver_step_into(rng: random.Random) -> list:
    (x, output, uncond, *history, noise), program, guidance, limit = _step(rng)
    uncond, drawn = rng.choice((uncond, None)), rng.random() < 0.5
    rows = torch.tensor(program, dtype=torch.float64)
    coefficients = rng.choice((None, rows, rows.expand(len(x), 3, 11).clone()))
    results = [torch.empty_like(x), *(rng.choice((None, torch.empty_like(x))) for _ in range(2))]
    noise, seed = (None, seed_of(rng)) if drawn else (noise, None)
    return [x, output, uncond, history, noise, seed, coefficients, rows.flatten().tolist(), guidance, limit,
            rng.randrange(2**62), *results]  # fmt: skip


def solver_table_step(rng: random.Random) -> list:
    (x, output, uncond, h1, h2, noise), program, guidance, limit = _step(rng)
    slots = [0.0, rng.choice((0.0, 2.0))] if program is UNIPC else [1.0, 0.0]
    row = torch.tensor([*program[0], *program[1], *program[2], *slots, limit], dtype=torch.float64)
    table = torch.stack([row] * rng.randint(1, 3))
    noise, seed = rng.choice(((noise, None), (None, seed_of(rng))))
    return [torch.stack([x, h1, h2]), output, table, rng.randrange(len(table)), rng.choice((uncond, None)), noise,
            seed, guidance]  # fmt: skip


def normal_numbers(rng: random.Random) -> list:
    return [seed_of(rng), rng.randrange(2**62), rng.choice((0, 1, 63, 64, 65, 1000, rng.randint(2, 500)))]


def magnitude_quantile(rng: random.Random) -> list:
    x = randn(rng, rng.randint(0, 4), rng.randint(1, 400), dtype=rng.choice(FLOATS[:2]))
    return [x, rng.choice((0.0, 1.0, 0.5, rng.random()))]


def _tree(rng: random.Random) -> dict[str, Tensor]:
    """A forest whose first nodes are its roots, of up to 40 nodes in 1 to 3 trees."""
    trees, nodes = rng.randint(1, 3), rng.randint(3, 40)
    parent, depth, root = [-1] * trees, [0] * trees, list(range(trees))
    for _ in range(trees, max(nodes, trees)):
        at = rng.randrange(len(parent))
        parent.append(at)
        depth.append(depth[at] + 1)
        root.append(root[at])
    children: list[list[int]] = [[i for i, p in enumerate(parent) if p == node] for node in range(len(parent))]
    pool = [child for own in children for child in own]
    count = [len(own) for own in children]
    start = [sum(count[:i]) for i in range(len(count))]
    vectors = {"parent": parent, "depth": depth, "root": root, "start": start, "count": count, "pool": pool}
    tree = {name: torch.tensor(values, dtype=torch.int64) for name, values in vectors.items()}
    return tree | {"value": randn(rng, len(parent), dtype=torch.float64), "roots": torch.arange(trees)}


def tree_select(rng: random.Random) -> list:
    t = _tree(rng)
    visits = integers(rng, 1, 9, len(t["value"])) * (1 + t["count"])
    descents, levels = rng.randint(0, 6), int(t["depth"].max()) + rng.randint(0, 2)
    uniform = torch.rand(len(t["roots"]), descents, levels, dtype=torch.float64) if rng.random() < 0.5 else None
    allowed = torch.arange(200).sqrt().long()
    return [t["value"], visits, t["count"].clone(), t["start"], t["count"], t["pool"], allowed, t["roots"], uniform,
            descents, levels, rng.randint(1, 3), rng.choice((0.0, 0.7, 40.0)), 0.5]  # fmt: skip


def tree_sample(rng: random.Random) -> list:
    t, draws = _tree(rng), rng.randint(0, 20)
    roots = t["roots"][integers(rng, 0, len(t["roots"]), draws)]
    uniform = torch.rand(draws, int(t["depth"].max()) + rng.randint(0, 2), dtype=torch.float64)
    return [t["value"], t["start"], t["count"], t["pool"], roots, uniform, rng.choice((0.0, 0.7, 40.0))]


def tree_backup(rng: random.Random) -> list:
    t, descents = _tree(rng), rng.randint(0, 5)
    own = [(t["root"] == root).nonzero().squeeze(1) for root in t["roots"]]
    nodes = torch.stack([nodes[integers(rng, 0, len(nodes), descents)] for nodes in own])
    arrays = [t[name] for name in ("value", "parent", "depth", "start", "count", "pool")]
    return [*arrays, nodes, rng.choice((0.0, 0.7, 40.0))]


def stream_copy(rng: random.Random) -> list:
    x = randn(rng, rng.choice((0, 1, 3, 1024, rng.randint(2, 5000))), dtype=rng.choice(FLOATS))
    return [torch.empty_like(x), x]


MAKERS: dict[str, Callable[[random.Random], list]] = {
    "_cpu_isa": lambda rng: [-1],
    "_stream_copy": stream_copy,
    "packed_conv": packed_conv,
    "fixed_to_raw": fixed_to_raw,
    "solver_step_into": solver_step_into,
    "solver_table_step": solver_table_step,
    "normal_numbers": normal_numbers,
    "magnitude_quantile": magnitude_quantile,
    "tree_select": tree_select,
    "tree_sample": tree_sample,
    "tree_backup": tree_backup,
}

# ---- truths ----------------------------------------------------------------------------------------------------------

Truth = tuple[list[Tensor], float]


class UnsureError(Exception):
    """The truth of these arguments is not known well enough."""


def _sure(*numbers: Tensor | float) -> None:
    """Refuses what a tolerance relative to the largest result does not fit: infinities, NaN, overflow on the way."""
    for n in numbers:
        if not bool((torch.as_tensor(n).double().abs() < 1e15).all()):
            raise UnsureError


def _true_stream_copy(dst, src) -> Truth:
    raw = src.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
    return [raw.view(dst.dtype).view(dst.shape)], 0.0


def _true_packed_conv(bits, weight, bias, height, width, kernel, stride, padding, dilation) -> Truth:
    _sure(weight, 0.0 if bias is None else bias)
    channels = weight.shape[0] // (kernel[0] * kernel[1])
    spikes = (bits[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).view(-1, height, width, channels)
    filters = weight.view(*kernel, channels, -1).permute(3, 2, 0, 1).double()
    bias = None if bias is None else bias.double()
    out = torch.nn.functional.conv2d(spikes.double().movedim(-1, 1), filters, bias, stride, padding, dilation)
    return [out.movedim(1, -1).float()], 1e-5


def _true_integer_conv(x, weight, stride, padding, dilation, groups, wide) -> Truth:
    x, weight = (t.double().movedim(-1, 1) for t in (x, weight))
    out = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups).movedim(1, -1)
    return [out.to(torch.int64 if wide else torch.int32)], 0.0


def _modes(rounding: int, overflow: int) -> dict[str, str]:
    return {"rounding": fixed_reference.ROUNDINGS[rounding], "overflow": fixed_reference.OVERFLOWS[overflow]}


def _true_fixed_to_raw(x, seed, width, int_bits, signed, rounding, overflow, saturated_bits) -> Truth:
    modes = _modes(rounding, overflow)
    saturated = saturated_bits if modes["overflow"].startswith("wrap") else 0
    raw = fixed_reference.to_raw(x, width, int_bits, signed=signed, saturated_bits=saturated, seed=seed, **modes)
    return [raw], 0.0


def _true_fixed_quantize(x, frac_bits, seed, width, int_bits, signed, rounding, overflow, saturated_bits) -> Truth:
    if frac_bits is not None:  # fixedpoint/spec.py has it
        raise UnsureError
    modes = _modes(rounding, overflow)
    saturated = saturated_bits if modes["overflow"].startswith("wrap") else 0
    out = fixed_reference.quantize(x, width, int_bits, signed=signed, saturated_bits=saturated, seed=seed, **modes)
    return [out], 0.0


def _true_solver(x, output, uncond, history, noise, seed, rows, guidance, limit, stream) -> list[Tensor]:
    if seed is not None:
        # Whose last bits are not the reference's; they have a truth of their own.
        noise = torch.ops.fastcifar.normal_numbers(seed, stream, x.numel()).view(x.shape)
        noise = noise.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    made = diffusion_reference.solver_step(x, output, history, rows, noise, uncond, guidance, limit)
    return [made.x_next, made.converted, made.corrected]


def _true_solver_step_into(x, output, uncond, history, noise, seed, coefficients, numbers, guidance, limit, stream,
                           *results) -> Truth:  # fmt: skip
    rows = torch.tensor(numbers, dtype=torch.float64).view(3, 11) if coefficients is None else coefficients.double()
    made = _true_solver(x, output, uncond, history, noise, seed, rows, guidance, limit, stream)
    return [m for m, r in zip(made, results, strict=True) if r is not None], 0.0


def _true_solver_table_step(ring, output, table, step, uncond=None, noise=None, seed=None, guidance=1.0) -> Truth:
    row, ring = table[step], ring.clone()
    x, *history = ring
    output, uncond, noise = (None if t is None else t.reshape(x.shape) for t in (output, uncond, noise))
    made = _true_solver(x, output, uncond, history, noise, seed, row[:33].view(3, 11), guidance, float(row[35]), step)
    for slot, value in zip(row[33:35].long().tolist(), made[1:], strict=True):
        if slot:
            ring[slot] = value
    ring[0] = made[0]
    return [ring], 0.0


def _true_normal_numbers(seed, stream, n) -> Truth:
    if n > 10_000:  # which the reference takes seconds for
        raise UnsureError
    return [diffusion_reference.normal_numbers(int(seed), stream, n)], 1e-6


def _true_magnitude_quantile(x, q) -> Truth:
    _sure(x)
    return [diffusion_reference.magnitude_quantile(x, q)], torch.finfo(x.dtype).eps


def _true_tree_select(*arguments) -> Truth:
    value, visits, taken, *rest = arguments
    visits, taken = visits.clone(), taken.clone()
    leaves = tree_reference.select(value, visits, taken, *rest)
    return [leaves, visits, taken], 0.0


def _true_tree_backup(value, *rest) -> Truth:
    value = value.clone()
    tree_reference.backup(value, *rest)
    return [value], 1e-13


def _true_spectrum_forward(x, blocks, inner) -> Truth:
    _sure(x, inner)
    z = spectral_reference.spectrum(x.double(), blocks=blocks)
    return [_weighed(z, x.shape[2], 3, inner).to(_library.state_dtype(x.dtype))], _ulps(x)


def _true_spectrum_inverse(spectrum, width, inner) -> Truth:
    _sure(spectrum, inner)
    z = _weighed(spectrum.double(), width, 3, inner)
    return [spectral_reference.inverse_spectrum(z, width=width).to(spectrum.dtype)], _ulps(spectrum)


def _weighed(z: Tensor, width: int, dim: int, inner: float) -> Tensor:
    factors = torch.full((width // 2 + 1,), inner, dtype=torch.float64)
    factors[0] = 1
    if width % 2 == 0:
        factors[-1] = 1
    return z * factors.view([-1 if d == dim else 1 for d in range(z.dim())])


def _ulps(x: Tensor) -> float:
    return 1e-12 if x.dtype == torch.float64 else 1e-5


TRUTHS: dict[str, Callable[..., Truth]] = {
    "_stream_copy": _true_stream_copy,
    "packed_conv": _true_packed_conv,
    "integer_conv": _true_integer_conv,
    "fixed_to_raw": _true_fixed_to_raw,
    "fixed_quantize": _true_fixed_quantize,
    "solver_step_into": _true_solver_step_into,
    "solver_table_step": _true_solver_table_step,
    "normal_numbers": _true_normal_numbers,
    "magnitude_quantile": _true_magnitude_quantile,
    "tree_select": _true_tree_select,
    "tree_sample": lambda *arguments: ([tree_reference.sample(*arguments)], 0.0),
    "tree_backup": _true_tree_backup,
    "spectrum_forward": _true_spectrum_forward,
    "spectrum_inverse": _true_spectrum_inverse,
}
# Of the rest the declarations' references speak: see tests/fuzz_specs.py.
TREES = ("tree_select", "tree_sample", "tree_backup")  # whose truth wants a tree, not any vectors
