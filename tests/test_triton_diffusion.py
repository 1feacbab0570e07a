"""The Triton kernels of solver steps equal the reference, in Triton's interpreter without a GPU.

tests/test_triton.py compiles them ahead of time with the rest of the catalogue, and sees that nothing is fused; tests
here see that they are in it.
"""

import inspect
import math
import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

pytest.importorskip("triton")

from fastcifar.kernels import catalogue, diffusion, diffusion_kernels, normal_kernels  # noqa: E402

from fastcifar import _library  # noqa: E402
from fastcifar.diffusion import reference  # noqa: E402
from fastcifar.diffusion.reference import CONVERT, CORRECT, HISTORY, PREDICT, TERMS  # noqa: E402

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COUNT = len(TERMS)
# Odd sizes reach the scalar accesses and partly filled programs, the others vector accesses.
LAYOUTS = {
    "odd": lambda randn: randn(3, 5, 37),
    "several_tiles": lambda randn: randn(3, 2096),
    "channels_last": lambda randn: randn(2, 4, 6, 3).permute(0, 3, 1, 2),
    "gaps": lambda randn: randn(4, 7, 16)[::2, 1:],
    "one_sample": lambda randn: randn(1, 40),
}
# Terms that have a coefficient, by row.
PROGRAMS = {
    "ddim": {PREDICT: ("x", "output")},
    "ddpm": {CONVERT: ("x", "output"), PREDICT: ("x", "converted", "noise")},
    "history": {CONVERT: ("output",), PREDICT: ("h1", "h3", "converted")},
    "corrector": {
        CONVERT: ("x", "output"),
        CORRECT: ("h2", "h6", "converted"),
        PREDICT: ("corrected", "h1", "converted"),
    },
    "all": {CONVERT: TERMS[:8], CORRECT: TERMS[:9], PREDICT: TERMS},
}


def _randn(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def _program(name, samples=None, seed=0):
    """Coefficients [3, 11], or [samples, 3, 11], float64 on the CPU."""
    rows = torch.zeros(*(() if samples is None else (samples,)), 3, COUNT, dtype=torch.float64)
    numbers = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for row, terms in PROGRAMS[name].items():
        for term in terms:
            rows[..., row, TERMS.index(term)] = numbers[..., row, TERMS.index(term)]
    return rows


def _tensors(layout, dtype, uncond=True):
    randn = _randn(0, dtype)
    x, output, base, noise, *history = (LAYOUTS[layout](randn) for _ in range(4 + HISTORY))
    return x, output, base if uncond else None, history, noise


def _given(coefficients, where):
    """As the op takes them: a tensor on the device, or numbers."""
    if where == "numbers":
        return None, coefficients.flatten().tolist()
    return coefficients.to(DEVICE), []


def _assert_same(ours, theirs):
    """To the bit; the interpreter truncates to bfloat16 where a GPU rounds."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    if ours.dtype == torch.bfloat16 and DEVICE == "cpu":
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0, equal_nan=True)
    else:
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def _check(layout, dtype, name, where, guidance=1.5, limit=None, uncond=True):
    tensors = x, output, base, history, noise = _tensors(layout, dtype, uncond)
    coefficients = _program(name, len(x) if where == "each" else None)
    expected = reference.solver_step(x, output, history, coefficients, noise, base, guidance, limit)
    bound = math.inf if limit is None else limit
    ours = diffusion.solver_step(*tensors, None, *_given(coefficients, where), guidance, bound, 0, 7)
    for mine, theirs in zip(ours, expected, strict=True):
        _assert_same(mine, theirs)
    like = diffusion._step_like(x)
    assert ours[0].stride() == like.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_step_equals_reference(name, dtype):
    for where in ("numbers", "one", "each"):
        _check("odd", dtype, name, where)
    _check("odd", dtype, name, "numbers", uncond=False)
    _check("odd", dtype, name, "numbers", limit=0.7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["numbers", "each"])
def test_layouts(layout, where):
    for dtype in (torch.float32, torch.float16):
        _check(layout, dtype, "corrector", where, limit=1.2)


def test_only_what_is_wanted_is_made():
    tensors = x, output, base, history, noise = _tensors("odd", torch.float32)
    coefficients = _program("corrector")
    expected = reference.solver_step(x, output, history, coefficients, noise, base, 1.5)
    for where in ("numbers", "one"):
        for wanted in range(8):
            ours = diffusion.solver_step(*tensors, None, *_given(coefficients, where), 1.5, math.inf, 0, wanted)
            for i, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
                assert torch.equal(mine, theirs) if wanted >> i & 1 else mine.shape == (0,)
    ours = diffusion.solver_step(*tensors, None, None, _program("ddpm").flatten().tolist(), 1.5, math.inf, 0, -1)
    assert [r.shape == x.shape for r in ours] == [True, True, False]


def test_what_has_no_coefficient_is_not_looked_at():
    """Whatever it holds, in the row where its coefficient is 0; and None where no coefficient asks."""
    x, output, _, history, _ = _tensors("odd", torch.float32)
    coefficients = _program("history")
    bad = [torch.full_like(h, math.nan) if i in (1, 3, 4, 5) else h for i, h in enumerate(history)]
    bad[2][0, 0, 0] = math.inf
    expected = reference.solver_step(x * math.nan, output, bad, coefficients)
    assert not expected.converted.isnan().any()
    for where in ("numbers", "one"):
        given = x * math.nan, output, None, bad, None, None, *_given(coefficients, where)
        for mine, theirs in zip(diffusion.solver_step(*given, 1.0, math.inf, 0, 7), expected, strict=True):
            _assert_same(mine, theirs)


def test_clamp_keeps_nan_and_bounds_infinity():
    x = torch.tensor([[math.nan, math.inf, -math.inf, 0.5, -2.0]], device=DEVICE)
    coefficients = torch.zeros(3, COUNT)
    coefficients[CONVERT, 0] = coefficients[PREDICT, TERMS.index("converted")] = 1
    made = diffusion.solver_step(x, None, None, [], None, None, None, coefficients.flatten().tolist(), 1.0, 1.0, 0, 7)
    _assert_same(made[1], reference.solver_step(x, None, (), coefficients, limit=1.0).converted)
    _assert_same(made[0], made[1])


def test_empty_tensors():
    for shape in ((0, 3), (2, 0)):
        x = torch.zeros(shape, device=DEVICE)
        numbers = _program("ddim").flatten().tolist()
        made = diffusion.solver_step(x, x, None, [], None, None, None, numbers, 1.0, math.inf, 0, 7)
        assert [r.shape for r in made] == [shape] * 3
        grads, rows = diffusion.solver_step_backward(
            *(x, None, None, x, x, None, [], None, None, None, numbers, 1.0, math.inf, 0, 0b10000000011)
        )
        assert grads.shape == (2, *shape)
        assert rows.shape == (1, 3, COUNT)


# ---- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, -5, 2**40 + 7])
@pytest.mark.parametrize("stream", [0, 3, 2**35 + 1])
def test_normal_numbers(seed, stream):
    for n in (1, 63, 1000, 2100):
        ours = diffusion.normal_numbers(torch.tensor(seed, device=DEVICE), stream, n).cpu()
        torch.testing.assert_close(ours, reference.normal_numbers(seed, stream, n), rtol=2e-6, atol=1e-6)
        if _library.WHY_NO_EXTENSION is None:  # the kernels for CPUs, to the bit
            assert torch.equal(ours, torch.ops.fastcifar.normal_numbers.default(torch.tensor(seed), stream, n))
    assert diffusion.normal_numbers(torch.tensor(seed, device=DEVICE), stream, 0).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["odd", "several_tiles", "one_sample"])
def test_drawn_noise_is_counted_over_the_tensor(layout, dtype):
    """As if it had been given, with a program for all or for each sample: samples of 185 numbers begin anywhere in a
    block of 64."""
    x, output, *_ = _tensors(layout, dtype)
    seed = torch.tensor(11, device=DEVICE)
    numbers = diffusion.normal_numbers(seed, 4, x.numel()).view(x.shape)
    for where in ("numbers", "one", "each"):
        coefficients = _program("ddpm", len(x) if where == "each" else None)
        given = x, output, None, [], None, seed, *_given(coefficients, where), 1.0, 0.9, 4, 7
        noise = numbers if dtype.itemsize >= 4 else numbers.float()
        wide = x.to(noise.dtype if dtype != torch.float64 else dtype)
        expected = reference.solver_step(wide, output.to(wide), (), coefficients, noise.to(wide), limit=0.9)
        for mine, theirs in zip(diffusion.solver_step(*given), expected, strict=True):
            _assert_same(mine, theirs.to(dtype))


# ---- in place --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [False, True])
def test_results_may_be_what_is_read(draws):
    x, output, _, history, noise = _tensors("odd", torch.float32)
    numbers = _program("all").flatten().tolist()
    seed = torch.tensor(3, device=DEVICE) if draws else None
    rest = None if draws else noise, seed, None, numbers, 1.0, 2.0, 9
    expected = diffusion.solver_step(x, output, None, history, *rest, 7)
    diffusion.solver_step_into(x, output, None, history, *rest, x, history[0], output)
    for mine, theirs in zip((x, history[0], output), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_results_with_gaps():
    x, output, _, history, noise = _tensors("odd", torch.float32)
    numbers = _program("all").flatten().tolist()
    rest = x, output, None, history, noise, None, None, numbers, 1.0, math.inf, 0
    wide = torch.zeros(6, *x.shape[1:], device=DEVICE)
    diffusion.solver_step_into(*rest, wide[::2], None, None)
    assert torch.equal(wide[::2], diffusion.solver_step(*rest, 1)[0])
    assert not wide[1::2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_steps_of_a_table(dtype):
    x, output, base, history, _ = _tensors("odd", dtype)
    ring = torch.stack([x, *history[:3]])
    steps = [("ddpm", (2, 0), math.inf), ("history", (1, 0), 0.8), ("ddim", (0, 3), math.inf)]
    rows = [[*_program(name).flatten().tolist(), *store, limit] for name, store, limit in steps]
    table = torch.tensor(rows, dtype=torch.float64)
    seed = torch.tensor(5, device=DEVICE)
    kept = [t.clone() for t in ring]
    for step, (name, store, limit) in enumerate(steps):
        drawn = diffusion.normal_numbers(seed, step, x.numel()).view(x.shape)
        wide = torch.float32 if step == 0 else dtype  # drawn noise is not rounded
        given = [t.to(wide) for t in (kept[0], output, *kept[1:])]
        bound = None if math.isinf(limit) else limit
        made = reference.solver_step(
            *(given[0], given[1], given[2:], _program(name), drawn.to(wide), base.to(wide), 1.5, bound)
        )
        for slot, value in zip((*store, 0), (made.converted, made.corrected, made.x_next), strict=True):
            if slot or value is made.x_next:
                kept[slot] = value.to(dtype)
        diffusion.solver_table_step(ring, output, table, step, base, None, seed, 1.5)
        for mine, theirs in zip(ring, kept, strict=True):
            assert torch.equal(mine, theirs)


# ---- backward --------------------------------------------------------------------------------------------------------


def _check_backward(layout, dtype, name, where, limit=None, draws=False, absent=(), uncond=True):
    x, output, base, history, noise = _tensors(layout, dtype, uncond)
    coefficients = _program(name, len(x) if where == "each" else None)
    seed = torch.tensor(7, device=DEVICE) if draws else None
    if draws:
        noise = diffusion.normal_numbers(seed, 2, x.numel()).view(x.shape).to(dtype)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, output, *history, base, noise)]
    rows = coefficients.clone().to(DEVICE).requires_grad_()
    made = reference.solver_step(leaves[0], leaves[1], leaves[2:8], rows, leaves[9], leaves[8], 1.5, limit)
    grads = [None if i in absent else t for i, t in enumerate(LAYOUTS[layout](_randn(5, dtype)) for _ in range(3))]
    loss = sum((g * r).sum() for g, r in zip(grads, made, strict=True) if g is not None)
    found = torch.autograd.grad(loss, [*[t for t in leaves if t is not None], rows], allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for g in found]
    wanted = [t is not None and not (draws and i == 9) for i, t in enumerate(leaves)]
    expected = dict(zip((i for i, t in enumerate(leaves) if t is not None), found, strict=False))
    tensors = x, output, base, history, None if draws else noise, seed, *_given(coefficients, where)
    bound = math.inf if limit is None else limit
    masks = [sum(1 << i for i, w in enumerate(wanted) if w), 1, 1 << 3, (1 << 0) | (1 << 1) | (1 << 10)]
    for mask in (masks[0] | 1 << 10, *masks):
        ours, of_rows = diffusion.solver_step_backward(*grads, *tensors, 1.5, bound, 2, mask)
        those = [i for i in range(10) if mask >> i & 1]
        assert len(ours) == len(those)
        for mine, i in zip(ours, those, strict=True):
            scale = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3}.get(dtype, 2e-2)
            torch.testing.assert_close(mine, expected[i], rtol=scale, atol=scale)
        if mask >> 10 & 1:
            theirs = found[-1].reshape(of_rows.shape)
            error = 1e-12 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(of_rows, theirs, rtol=error, atol=error * x[0].numel() ** 0.5)
        else:
            assert of_rows.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_equal_autograd_of_the_reference(name, dtype):
    for where in ("numbers", "each"):
        _check_backward("odd", dtype, name, where, limit=0.9)
    _check_backward("odd", dtype, name, "one")
    _check_backward("odd", dtype, name, "numbers", uncond=False, absent=(1,))


def test_gradients_in_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        x, output, base, history, noise = _tensors("odd", dtype)
        grads = [LAYOUTS["odd"](_randn(5, dtype)) for _ in range(3)]
        numbers = _program("all").flatten().tolist()
        arguments = None, None, numbers, 1.5, 0.9, 0, 0b11111111111
        ours, rows = diffusion.solver_step_backward(*grads, x, output, base, history, noise, *arguments)
        wide, exact = diffusion.solver_step_backward(
            *(g.float() for g in grads),
            *(t.float() for t in (x, output, base)),
            [h.float() for h in history],
            noise.float(),
            *arguments,
        )
        _assert_same(ours, wide.to(dtype))
        assert torch.equal(rows, exact)


@pytest.mark.parametrize("layout", ["several_tiles", "channels_last", "gaps"])
def test_gradients_in_other_layouts(layout):
    _check_backward(layout, torch.float32, "corrector", "each", limit=1.0)


def test_gradients_with_drawn_noise():
    for layout in ("odd", "several_tiles"):
        _check_backward(layout, torch.float64, "ddpm", "each", draws=True)


# ---- what ships ------------------------------------------------------------------------------------------------------


def test_every_kernel_is_in_the_catalogue():
    entries = catalogue.entries(["diffusion"])
    kernels = {n for module in (diffusion_kernels, normal_kernels) for n in vars(module) if n.endswith("_kernel")}
    assert {entry.name.split()[0] for entry in entries} == kernels
    for entry in entries:
        assert entry.exact
        assert set(entry.signature) | set(entry.constexprs) == set(entry.kernel.arg_names)
        assert not set(entry.signature) & set(entry.constexprs)


def test_ops_are_served():
    for op in ("solver_step", "solver_step_into", "solver_table_step", "solver_step_backward", "normal_numbers"):
        assert _library.owned(op, "cuda")
        schema = getattr(torch.ops.fastcifar, op).default._schema
        assert list(inspect.signature(getattr(diffusion, op)).parameters) == [a.name for a in schema.arguments]
