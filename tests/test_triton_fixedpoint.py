"""The Triton kernels of the fixed-point cast equal the reference, in Triton's interpreter without a GPU.

tests/test_triton.py compiles them ahead of time with the rest of the catalogue, and sees that nothing is fused; tests
here see that they are in it.
"""

import inspect
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

pytest.importorskip("triton")

from fastcifar.kernels import catalogue, fixedpoint, fixedpoint_kernels  # noqa: E402

from fastcifar import _library  # noqa: E402
from fastcifar.fixedpoint import reference  # noqa: E402
from fastcifar.fixedpoint.reference import OVERFLOWS, ROUNDINGS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes in numpy
VECTORS = np.load(Path(__file__).parent / "data" / "ap_fixed.npz")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STOCHASTIC = ROUNDINGS.index("stochastic")
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 2.0**31, -(2.0**31) - 256]
SPECIAL += [0.49999997, -0.49999997, 5e-324, -5e-324, 1e308, -1e308]
# width, int_bits, signed, saturated_bits: one bit, points far to the left and right, float64 inside from 25 bits on.
TYPES = ((8, 3, True, 0), (8, 3, True, 3), (1, 1, True, 1), (5, 2, False, 2), (6, 2, False, 0), (7, -4, True, 1))
TYPES += (
    (4, 40, True, 1),
    (24, 6, True, 0),
    (28, 6, True, 4),
    (32, 20, False, 1),
    (32, 32, True, 0),
    (32, 31, False, 0),
)


def _modes(signed):
    return [(q, o) for q, o in itertools.product(range(8), range(5)) if signed or OVERFLOWS[o] != "wrap_sm"]


def _named(signed, rounding, overflow, saturated_bits, seed):
    names = {"rounding": ROUNDINGS[rounding], "overflow": OVERFLOWS[overflow]}
    return {"signed": signed, "saturated_bits": saturated_bits, "seed": seed, **names}


def _seed(rounding, seed=-7):
    return torch.tensor(seed, device=DEVICE) if rounding == STOCHASTIC else None


def _assert_same(ours, theirs):
    """To the bit, but for what NaN is made of; the interpreter truncates to bfloat16 where a GPU rounds."""
    assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert not (ours.signbit() & (ours == 0)).any()
    if ours.dtype == torch.bfloat16 and DEVICE == "cpu":
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0, equal_nan=True)
    else:
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("type_", TYPES, ids=str)
def test_every_mode_equals_the_reference(type_, dtype):
    width, int_bits, signed, n = type_
    numbers = torch.cat([torch.randn(200, generator=torch.Generator().manual_seed(0)) * 6, torch.arange(-80, 80) / 8])
    x = torch.cat([numbers.double(), torch.tensor(SPECIAL, dtype=torch.float64)]).to(DEVICE, dtype)
    for rounding, overflow in _modes(signed):
        seed = _seed(rounding)
        named = _named(signed, rounding, overflow, n, seed)
        if dtype.itemsize > 2:
            stored = fixedpoint.fixed_to_raw(x, seed, width, int_bits, signed, rounding, overflow, n)
            expected = reference.to_raw(x, width, int_bits, **named)
            assert stored.dtype == expected.dtype
            assert torch.equal(stored, expected), named
        value = fixedpoint.fixed_quantize(x, None, seed, width, int_bits, signed, rounding, overflow, n)
        expected = reference.quantize(x, width, int_bits, **named)
        _assert_same(value, expected)
        if dtype == torch.bfloat16 and width <= 8:
            assert torch.equal(value.nan_to_num(), expected.nan_to_num()), named


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_vector(dtype):
    inputs, is_float = torch.from_numpy(VECTORS["inputs"]), torch.from_numpy(VECTORS["input_is_f32"])
    every = slice(None) if dtype == torch.float32 else slice(0, None, 5)
    types, stored_by_headers = VECTORS["types"][every].tolist(), VECTORS["raw"][every]
    for (row, width, int_bits, *mode), raw in zip(types, stored_by_headers, strict=True):
        signed, q, o, n = mode
        rounding, overflow = (
            names.index(str(VECTORS[key][index]).removeprefix("AP_").lower())
            for names, key, index in ((ROUNDINGS, "Q", q), (OVERFLOWS, "O", o))
        )
        keep = is_float[row] if dtype == torch.float32 else torch.ones_like(is_float[row])
        x = inputs[row][keep].to(DEVICE, dtype)
        stored = fixedpoint.fixed_to_raw(x, None, width, int_bits, bool(signed), rounding, overflow, n)
        assert torch.equal(stored.cpu().long(), torch.from_numpy(raw)[keep]), (row, width, int_bits, mode)


def _gradients(x, frac_bits, grad, width, modes, wrap_gradient, seed):
    x, frac_bits = x.detach().requires_grad_(), frac_bits.detach().requires_grad_()
    named = _named(*modes, seed)
    out = reference.quantize_trainable(x, frac_bits, width, wrap_gradient=wrap_gradient, **named)
    return out.detach(), *torch.autograd.grad(out, (x, frac_bits), grad)


def _check_backward(x, frac_bits, grad, width, modes, wrap_gradient=True, alone=True):
    """Values and both gradients against the reference; and again, each alone, with equal bits."""
    seed = _seed(modes[1])
    value = fixedpoint.fixed_quantize(x, frac_bits, seed, width, 0, *modes)
    out, grad_x, grad_f = _gradients(x, frac_bits, grad, width, modes, wrap_gradient, seed)
    assert torch.equal(value.nan_to_num(), out.nan_to_num())
    assert torch.equal(value.isnan(), out.isnan())
    arguments = grad, x, frac_bits, seed, width, 0, *modes, wrap_gradient
    both = fixedpoint.fixed_quantize_backward(*arguments, True, True)
    assert both[0].stride() == value.stride()
    assert both[1].dtype == torch.float64
    assert torch.equal(both[0], grad_x)
    terms = (x.double().abs() + out.double().abs()) * grad.double().abs()
    terms = terms.sum_to_size(frac_bits.shape).flatten()
    finite = terms.isfinite()
    error = (both[1] - grad_f.double().flatten()).abs()
    assert (error[finite] <= 1e-6 * terms[finite]).all()
    for wants in ((True, False), (False, True)) if alone else ():
        found = fixedpoint.fixed_quantize_backward(*arguments, *wants)
        for wanted, ours, again in zip(wants, both, found, strict=True):
            assert torch.equal(ours.nan_to_num(), again.nan_to_num()) if wanted else again.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("type_", [*TYPES[:6], TYPES[8]], ids=str)
def test_gradients_equal_the_reference(type_, dtype):
    width, int_bits, signed, n = type_
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(1500, generator=generator, dtype=torch.float64) * 6).to(DEVICE, dtype)
    grad = torch.randn(1500, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    frac_bits = torch.tensor(width - int_bits + 0.3, dtype=torch.float64, device=DEVICE)
    if dtype == torch.bfloat16 and width > 8:
        dtype = torch.float32  # the interpreter truncates where a GPU rounds
        x, grad = x.to(dtype), grad.to(dtype)
    for rounding, overflow in _modes(signed)[:: 1 if dtype == torch.float32 else 7]:
        modes = signed, rounding, overflow, n
        _check_backward(x, frac_bits, grad, width, modes, wrap_gradient=rounding % 2 == 0, alone=False)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "second_dimension_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 1],
    "expanded": lambda t: t[:, :, :, :1].expand(t.shape),
    "storage_offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(3, 5, 9, 11), (2, 70, 3, 3), (1, 2, 12, 40), (2, 300, 1, 1), (5, 1, 2, 3), (300, 3, 1, 1)], ids=str
)
@pytest.mark.parametrize("rounding", [ROUNDINGS.index("rnd_conv"), STOCHASTIC])
def test_a_binary_point_for_each_channel(shape, layout, rounding):
    generator = torch.Generator().manual_seed(2)
    x, grad = (LAYOUTS[layout](torch.randn(shape, generator=generator).to(DEVICE)) for _ in range(2))
    frac_bits = torch.linspace(-2.0, 6.0, shape[1], device=DEVICE).view(-1, 1, 1)
    _check_backward(x, frac_bits, grad, 6, (True, rounding, 0, 0))
    frac_bits = torch.linspace(1.0, 4.0, shape[3], device=DEVICE)
    other_order = grad.transpose(2, 3).contiguous().transpose(2, 3)
    _check_backward(x, frac_bits, other_order, 6, (True, rounding, 3, 2), False, alone=False)


def test_programs_with_several_tiles(monkeypatch):
    """The last with fewer rows, and with the same sums up to their order."""
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(234, 70, generator=generator).to(DEVICE) for _ in range(2))
    frac_bits = torch.linspace(-1.0, 5.0, 70, device=DEVICE)
    for programs in (1, 5):
        monkeypatch.setattr(fixedpoint, "PROGRAMS", programs)
        walk = fixedpoint.plan(frac_bits, x.shape, x.stride(), 4, fixedpoint.compute_type(x.dtype, 6))
        assert walk.tiles() > 1
        _check_backward(x, frac_bits, grad, 6, (True, 4, 0, 0))


@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
def test_binary_points_are_rounded_and_kept_in_range(state):
    """To the nearest, ties to even, with an int_bits of -4 to 40."""
    points = [0.5, 1.5, 2.5, -0.5, -1.5, 100.0, -100.0, math.inf, -math.inf, math.nan, 0.49999997, -1e-45]
    whole = [0.0, 2.0, 2.0, 0.0, -2.0, 12.0, -32.0, 12.0, -32.0, math.nan, 0.0, 0.0]
    x = torch.randn(4, len(points), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    given, expected = (torch.tensor(p, dtype=state, device=DEVICE) for p in (points, whole))
    ours = fixedpoint.fixed_quantize(x, given, None, 8, 0, True, 4, 0, 0)
    _assert_same(ours, fixedpoint.fixed_quantize(x, expected, None, 8, 0, True, 4, 0, 0))
    _assert_same(ours, reference.quantize_trainable(x, given, 8))
    for i in (0, 5, 9):
        one = fixedpoint.fixed_quantize(x, given[i : i + 1], None, 8, 0, True, 4, 0, 0)
        _assert_same(one, reference.quantize_trainable(x, given[i], 8))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_random_numbers_are_those_of_the_reference(seed):
    x = torch.full((3, 1111), 0.3, device=DEVICE)
    index = torch.tensor(seed, device=DEVICE)
    ours = fixedpoint.fixed_quantize(x, None, index, 8, 8, True, STOCHASTIC, 0, 0)
    assert torch.equal(ours, reference.quantize(x, 8, 8, rounding="stochastic", overflow="sat", seed=index))
    assert 0.2 < ours.mean() < 0.4


def test_gradients_where_x_is_not_finite():
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -300.0], device=DEVICE)
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], device=DEVICE)
    frac_bits = torch.tensor(3.0, device=DEVICE)
    for overflow in range(5):
        modes = True, 4, overflow, 0
        ours = fixedpoint.fixed_quantize_backward(grad, x, frac_bits, None, 8, 0, *modes, False, True, True)
        _, grad_x, grad_f = _gradients(x, frac_bits, grad, 8, modes, False, None)
        assert torch.equal(ours[0], grad_x)
        assert ours[1].isnan()
        assert grad_f.isnan()
        ours = fixedpoint.fixed_quantize_backward(grad[1:], x[1:], frac_bits, None, 8, 0, *modes, False, True, True)
        _, grad_x, grad_f = _gradients(x[1:], frac_bits, grad[1:], 8, modes, False, None)
        assert torch.equal(ours[0], grad_x)
        torch.testing.assert_close(ours[1].view(()), grad_f.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (0, 4, 2)])
def test_empty(shape):
    x = torch.empty(shape, device=DEVICE)
    points = torch.zeros(shape[1] if len(shape) > 1 else 1, 1, device=DEVICE).expand(-1, 1)
    assert fixedpoint.fixed_quantize(x, None, None, 8, 3, True, 4, 0, 0).shape == shape
    assert fixedpoint.fixed_to_raw(x, None, 32, 3, False, 4, 0, 0).dtype == torch.int64
    grad_x, grad_f = fixedpoint.fixed_quantize_backward(x, x, points, None, 8, 0, True, 4, 0, 0, True, True, True)
    assert grad_x.shape == shape
    assert torch.equal(grad_f, torch.zeros(points.numel(), dtype=torch.float64, device=DEVICE))


def test_walks_cover_every_number_once():
    """And give each the binary point of its channel."""
    for shape, strides in (
        ((7,), (1,)),
        ((2, 5, 9, 11), (495, 99, 11, 1)),
        ((2, 3, 5, 5), (75, 1, 15, 3)),
        ((4, 300, 1, 1), (300, 1, 1, 1)),
        ((300, 3, 1, 1), (3, 1, 1, 1)),
    ):
        for compute, itemsize in ((fixedpoint.compute_type(torch.float32, 8), 4), (fixedpoint.tl.float64, 2)):
            frac_bits = torch.zeros([shape[1], *[1] * (len(shape) - 2)] if len(shape) > 1 else ())
            walk = fixedpoint.plan(frac_bits, torch.Size(shape), strides, itemsize, compute)
            assert (walk.rows - 1) * walk.length < math.prod(shape) <= walk.rows * walk.length
            tile = walk.ROWS * walk.COLUMNS
            assert tile <= 4096 // itemsize
            index = torch.arange(math.prod(shape))
            row, column = index // walk.length, index % walk.length
            channel = {"one": row * 0, "rows": row % walk.channels, "columns": column // walk.inner % walk.channels}
            expected = index // strides[1] % shape[1] if len(shape) > 1 else row
            assert torch.equal(channel[walk.AXIS], expected)


def test_every_kernel_and_mode_is_in_the_catalogue():
    entries = [e for e in catalogue.entries(["fixedpoint"]) if "digits" not in e.name]
    kernels = {name for name in vars(fixedpoint_kernels) if name.endswith("_kernel")}
    assert {entry.name.split()[0] for entry in entries} == kernels
    for name in kernels:
        those = [entry.constexprs for entry in entries if entry.name.startswith(name + " ")]
        for key, values in (("ROUNDING", ROUNDINGS), ("OVERFLOW", OVERFLOWS), ("AXIS", ("one", "rows", "columns"))):
            assert {constexprs[key] for constexprs in those} == set(values)
    for entry in entries:
        assert entry.exact
        assert set(entry.signature) | set(entry.constexprs) == set(entry.kernel.arg_names)
        assert not set(entry.signature) & set(entry.constexprs)


def test_ops_are_served():
    for op in ("fixed_quantize", "fixed_to_raw", "fixed_quantize_backward", "limit_digits"):
        assert _library.owned(op, "cuda")
        schema = getattr(torch.ops.fastcifar, op).default._schema
        assert list(inspect.signature(getattr(fixedpoint, op)).parameters) == [a.name for a in schema.arguments]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 80])
@pytest.mark.parametrize("signed", [False, True])
def test_limit_digits_equals_the_reference(dtype, k, signed):
    x = torch.cat([torch.tensor(SPECIAL, dtype=torch.float64), torch.linspace(-300, 300, 1201).double()]).to(dtype)
    for each in (x, x.view(-1, 2)[:, :1], x[:0], x[: x.numel() // 6 * 6].view(2, 3, -1).transpose(0, 2)):
        ours = fixedpoint.limit_digits(each.to(DEVICE), k, signed)
        expected = reference.limit_digits(each, k, signed)
        assert ours.dtype == dtype
        assert torch.equal(ours.cpu().nan_to_num(), expected.nan_to_num())
        assert torch.equal(ours.cpu().isnan(), expected.isnan())
