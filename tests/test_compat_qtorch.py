"""fastcifar.compat.qtorch against its definition, and against qtorch itself, which compiles for a minute where it is
imported: with FASTCIFAR_BENCH_FULL set only."""

import itertools
import os
import sys
from pathlib import Path

import pytest
import torch

from fastcifar.compat.qtorch import FixedPoint, Quantizer, fixed_point_quantize, quantizer

FORMATS = [
    (wl, fl, symmetric)
    for wl, fl, symmetric in itertools.product((1, 2, 4, 8, 13, 24), (-3, 0, 1, 4, 20), (False, True))
    if -4 <= wl - fl <= 40 and not (wl == 1 and symmetric)
]


@pytest.fixture(scope="module")
def peer():
    if not os.environ.get("FASTCIFAR_BENCH_FULL"):
        pytest.skip("qtorch compiles where it is imported; set FASTCIFAR_BENCH_FULL")
    pytest.importorskip("qtorch")
    with pytest.MonkeyPatch.context() as patch:  # ninja lies beside this Python, which need not be on the path
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        import qtorch.quant
    return qtorch


def _numbers(wl, fl):
    """In range, out of range, ties, and what is special."""
    x = torch.randn(2000, generator=torch.Generator().manual_seed(wl * 100 + fl)) * 2.0 ** (wl - fl - 1)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 0.0, -0.0])
    return torch.cat([x, torch.arange(-300, 300) * 2.0 ** (-fl - 2), special])


def _expected(x, wl, fl, clamp, symmetric):
    units = (x.double() * 2.0**fl).round()
    if clamp:
        units = units.clamp(-(2.0 ** (wl - 1)) + symmetric, 2.0 ** (wl - 1) - 1)
    return (units * 2.0**-fl).to(x.dtype)


def _same(a, b):
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


@pytest.mark.parametrize(("wl", "fl", "symmetric"), FORMATS)
@pytest.mark.parametrize("clamp", [True, False])
def test_nearest_is_the_definition(wl, fl, symmetric, clamp):
    x = _numbers(wl, fl)
    x = torch.cat([x, torch.tensor([0.5 + 2.0**-24, 2.0**23 + 1, -(2.0**23) - 1]) * 2.0**-fl])
    got = fixed_point_quantize(x, wl, fl, clamp, symmetric, "nearest")
    assert got.dtype == x.dtype
    assert _same(got, _expected(x, wl, fl, clamp, symmetric))


@pytest.mark.parametrize("clamp", [True, False])
def test_nearest_is_qtorchs(peer, clamp):
    for wl, fl, symmetric in FORMATS:
        x = _numbers(wl, fl)
        if not clamp:  # its sum with 1/2 moves odd units of 2^23 and more
            x = x[~(x.abs() * 2.0**fl >= 2**23) | x.isinf()]
        theirs = peer.quant.fixed_point_quantize(x, wl, fl, clamp, symmetric, "nearest")
        ours = fixed_point_quantize(x, wl, fl, clamp, symmetric, "nearest")
        assert _same(ours, theirs), (wl, fl, symmetric)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clamp", [True, False])
def test_other_dtypes(dtype, clamp):
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)).to(dtype) * 8
    if dtype == torch.float64 and not clamp:
        with pytest.raises(TypeError, match="with clamp=False, got float64"):
            fixed_point_quantize(x, 6, 3, clamp)
    else:
        assert torch.equal(fixed_point_quantize(x, 6, 3, clamp, rounding="nearest"), _expected(x, 6, 3, clamp, False))


@pytest.mark.parametrize("value", [0.3, -0.3, 1.6, -1.1])
@pytest.mark.parametrize("clamp", [True, False])
def test_stochastic_has_the_number_as_its_mean(value, clamp):
    torch.manual_seed(0)
    got = fixed_point_quantize(torch.full((100_000,), value), 4, 2, clamp)
    units = torch.tensor(value) * 4
    assert set(got.unique().tolist()) == {(units.floor() / 4).item(), (units.ceil() / 4).item()}
    spread = 0.25 * ((units - units.floor()) * (units.ceil() - units) / got.numel()).sqrt()
    assert (got.double().mean() - value).abs() < 5 * spread
    assert not torch.equal(got, fixed_point_quantize(torch.full((100_000,), value), 4, 2, clamp))


def test_stochastic_has_the_means_of_qtorch(peer):
    torch.manual_seed(0)
    for value in (0.3, -0.3, 1.6, -1.1, 1.9):
        x = torch.full((200_000,), value)
        ours, theirs = (f(x, 4, 2) for f in (fixed_point_quantize, peer.quant.fixed_point_quantize))
        assert torch.equal(ours.unique(), theirs.unique())
        spread = (ours.double().var() / x.numel()).sqrt()
        assert (ours.double().mean() - theirs.double().mean()).abs() <= 5 * 2**0.5 * spread


def test_stochastic_saturates():
    assert fixed_point_quantize(torch.tensor([5.0, -5.0]), 4, 2).tolist() == [1.75, -2.0]
    assert fixed_point_quantize(torch.tensor([5.0, -5.0]), 4, 2, symmetric=True).tolist() == [1.75, -1.75]
    assert fixed_point_quantize(torch.tensor([5.0, -5.0]), 4, 2, clamp=False).tolist() == [5.0, -5.0]


def test_the_function_has_no_gradient():
    assert not fixed_point_quantize(torch.ones(3, requires_grad=True), 4, 2).requires_grad


# ---- quantizer -------------------------------------------------------------------------------------------------------

X = torch.tensor([0.3, 1.76, 9.0, -9.0, -2.0, 0.125])
GRADIENT = torch.tensor([0.7, -0.6, 0.7, 9.0, 0.3, -0.25])


def _trained(cast):
    x = X.clone().requires_grad_()
    out = cast(x)
    out.backward(GRADIENT)
    return out.detach(), x.grad


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_gradient_passes_straight_through_and_is_quantised(symmetric, masked, quantised):
    cast = quantizer(
        FixedPoint(4, 2, symmetric=symmetric), FixedPoint(4, 1) if quantised else None, "nearest", "nearest", masked
    )
    out, grad = _trained(cast)
    assert torch.equal(out, _expected(X, 4, 2, True, symmetric))
    expected = _expected(GRADIENT, 4, 1, True, False) if quantised else GRADIENT.clone()
    if masked:
        expected[2:4] = 0  # 1.76 rounds into the range
        if symmetric:
            expected[4] = 0
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_quantizer_is_qtorchs(peer, symmetric, masked):
    def built(number, quantizer):
        return quantizer(number(4, 2, symmetric=symmetric), number(4, 1), "nearest", "nearest", masked)

    ours = _trained(built(FixedPoint, quantizer))
    theirs = _trained(built(peer.FixedPoint, peer.quant.quantizer))
    assert all(map(torch.equal, ours, theirs))
    assert all(map(torch.equal, ours, _trained(built(peer.FixedPoint, quantizer))))


def test_hooks_come_before_the_gradient_is_quantised():
    cast = quantizer(
        FixedPoint(4, 2), FixedPoint(4, 1), "nearest", "nearest", backward_hooks=[lambda g: g * 2, lambda g: g + 1]
    )
    assert torch.equal(_trained(cast)[1], _expected(GRADIENT * 2 + 1, 4, 1, True, False))
    assert torch.equal(_trained(quantizer(FixedPoint(4, 2), backward_hooks=[torch.neg]))[1], -GRADIENT)


def test_without_numbers_nothing_changes():
    assert all(map(torch.equal, _trained(quantizer()), (X, GRADIENT)))
    assert all(map(torch.equal, _trained(quantizer(clamping_grad_zero=True)), (X, GRADIENT)))


def test_stochastic_mask_is_that_of_the_forward_pass():
    """A number between the largest and the next unit is clamped where it was rounded up, and only there."""
    x = torch.full((1000,), 1.9, requires_grad=True)  # 7.6 units
    torch.manual_seed(0)
    quantizer(FixedPoint(4, 2), clamping_grad_zero=True)(x).sum().backward()
    torch.manual_seed(0)
    rounded_up = fixed_point_quantize(x, 8, 2) == 2.0
    assert 500 < rounded_up.sum() < 700
    assert torch.equal(x.grad == 0, rounded_up)


def test_gradients_of_gradients_raise_or_are_right():
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad((quantizer(FixedPoint(4, 2))(x) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)  # straight through twice
    assert torch.equal(second, torch.full_like(x, 2.0))
    cast = quantizer(FixedPoint(4, 2), FixedPoint(8, 4))
    (first,) = torch.autograd.grad((cast(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="quantizer"):
        torch.autograd.grad(first.sum(), x)


def test_module():
    layer = Quantizer(FixedPoint(4, 2), FixedPoint(4, 1), "nearest", "nearest")
    assert torch.equal(_trained(layer)[1], _expected(GRADIENT, 4, 1, True, False))
    assert not layer.state_dict()
    assert "wl=4, fl=2" in repr(layer)


class _BlockFloatingPoint:
    wl, dim = 8, -1


@pytest.mark.parametrize(
    ("error", "call", "words"),
    [
        (TypeError, lambda: quantizer(_BlockFloatingPoint()), "expected a FixedPoint or None, as block and floating"),
        (TypeError, lambda: quantizer(None, 3), "expected a FixedPoint or None"),
        (ValueError, lambda: quantizer(forward_rounding="up"), "nearest or stochastic, got 'up'"),
        (ValueError, lambda: quantizer(FixedPoint(4, 2, False), clamping_grad_zero=True), "got clamp=False"),
        (ValueError, lambda: FixedPoint(33, 2), "wl of 1 to 32, got 33"),
        (ValueError, lambda: FixedPoint(0, 2), "wl of 1 to 32, got 0"),
        (ValueError, lambda: FixedPoint(8, 13), "fl of -32 to 12 with wl = 8, got 13"),
        (ValueError, lambda: FixedPoint(8, 37, clamp=False), "fl of -8 to 36 with clamp=False, got 37"),
        (ValueError, lambda: FixedPoint(1, 0, symmetric=True), "wl above 1 with symmetric"),
        (TypeError, lambda: FixedPoint(8, 2.0), "fl to be an integer, got 2.0"),
        (TypeError, lambda: FixedPoint(8, 2, symmetric=1), "symmetric to be True or False, got 1"),
        (TypeError, lambda: fixed_point_quantize([1.0], 8, 4), "expected x to be a tensor, got list"),
        (TypeError, lambda: fixed_point_quantize(torch.ones(1).long(), 8, 4), "got torch.int64"),
        (TypeError, lambda: quantizer(FixedPoint(8, 4))(3.0), "expected x to be a tensor, got float"),
        (ValueError, lambda: fixed_point_quantize(torch.ones(1), 8, 4, rounding="down"), "got 'down'"),
    ],
)
def test_refuses_in_a_sentence(error, call, words):
    with pytest.raises(error, match=words):
        call()
