"""What is special about the fixed-point cast: the vectors, the traps, random formats; conformance.py runs the rest."""

import math
import random
from pathlib import Path

import apytypes
import numpy as np
import pytest
import torch

from fastcifar import _library
from fastcifar.fixedpoint import (
    OVERFLOWS,
    ROUNDINGS,
    FixedPoint,
    PowerOfTwo,
    from_raw,
    limit_digits,
    quantize,
    quantize_trainable,
    reference,
    to_raw,
)
from fastcifar.spec import identical

needs_kernel = pytest.mark.skipif(_library.WHY_NO_EXTENSION is not None, reason="the extension is not built")
VECTORS = np.load(Path(__file__).parent / "data" / "ap_fixed.npz")
INPUTS, IS_FLOAT = torch.from_numpy(VECTORS["inputs"]), torch.from_numpy(VECTORS["input_is_f32"])
TYPES = [tuple(map(int, row)) for row in VECTORS["types"]]


def modes(signed, rounding, overflow, saturated_bits):
    names = [str(VECTORS[key][index]).removeprefix("AP_").lower() for key, index in (("Q", rounding), ("O", overflow))]
    return {"signed": bool(signed), "rounding": names[0], "overflow": names[1], "saturated_bits": saturated_bits}


def cast(values, width, int_bits, dtype=torch.float32, **options):
    """Stored integers, by the kernel and by the reference, which must agree."""
    x = torch.tensor(values, dtype=dtype)
    ours = to_raw(x, width, int_bits, **options)
    assert torch.equal(ours, reference.to_raw(x, width, int_bits, **options))
    value = quantize(x, width, int_bits, **options)
    assert torch.equal(value, from_raw(ours, width, int_bits, dtype=dtype))
    assert not (value.signbit() & (value == 0)).any()
    return ours.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_vector_on_every_instruction_set(dtype, each_isa):
    def check(isa):
        for (row, width, int_bits, *mode), raw in zip(TYPES, torch.from_numpy(VECTORS["raw"]), strict=True):
            options = modes(*mode)
            keep = IS_FLOAT[row] if dtype == torch.float32 else torch.ones_like(IS_FLOAT[row])
            x = INPUTS[row].to(dtype)
            stored = to_raw(x, width, int_bits, **options)
            assert torch.equal(stored[keep].long(), raw[keep]), (isa, width, int_bits, options)
            value = quantize(x, width, int_bits, **options)
            exact = (raw.double() * 2.0 ** (int_bits - width)).to(dtype)
            assert torch.equal(value[keep], exact[keep]), (isa, width, int_bits, options)
            assert not (value.signbit() & (value == 0)).any()

    each_isa(check) if _library.WHY_NO_EXTENSION is None else check("reference")


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_equal_the_reference_in_the_formats_of_the_vectors(dtype, each_isa):
    def check(isa):
        for row, width, int_bits, *mode in TYPES[::7]:
            grad = torch.randn(256, generator=torch.Generator().manual_seed(row)).to(dtype)
            results = []
            for function in (quantize_trainable, reference.quantize_trainable):
                x = INPUTS[row].clamp(-1e4, 1e4).to(dtype).requires_grad_()
                frac_bits = torch.tensor(float(width - int_bits), dtype=torch.float64, requires_grad=True)
                out = function(x, frac_bits, width, **modes(*mode))
                results.append((out.detach(), *torch.autograd.grad(out, (x, frac_bits), grad)))
            (out, grad_x, grad_f), (out_r, grad_x_r, grad_f_r) = results
            terms = (x.detach().double().abs() + out_r.double().abs()) * grad.double().abs()
            assert torch.equal(out.nan_to_num(), out_r.nan_to_num()), (isa, width, int_bits, mode)
            assert torch.equal(grad_x, grad_x_r), (isa, width, int_bits, mode)
            if terms.isfinite().all():
                assert abs(grad_f - grad_f_r) <= 1e-6 * terms.sum(), (isa, width, int_bits, mode)

    each_isa(check)


def test_random_formats_agree_with_apytypes():
    rounding = {"rnd": "RND", "rnd_zero": "RND_ZERO", "rnd_min_inf": "RND_MIN_INF", "rnd_inf": "RND_INF"}
    rounding |= {"rnd_conv": "RND_CONV", "trn": "TRN", "trn_zero": "TRN_ZERO"}
    rng = random.Random(0)
    for _ in range(400):
        width, int_bits, signed = rng.randint(1, 32), rng.randint(-4, 40), rng.random() < 0.5
        name, overflow = rng.choice(list(rounding)), rng.choice(["wrap", "sat"])
        raw = [rng.randint(-(2**60), 2**60) >> rng.randint(0, 60) for _ in range(32)]
        frac = width - int_bits + rng.randint(0, 3)  # ties, and bits that fall off
        x = torch.tensor([float(r) for r in raw], dtype=torch.float64) * 2.0**-frac
        wide = apytypes.APyFixedArray([int(v) for v in x.double() * 2.0**frac], int_bits=130, frac_bits=frac)
        kind = getattr(apytypes.QuantizationMode, rounding[name])
        limit = getattr(apytypes.OverflowMode, overflow.upper())
        stored = to_raw(x, width, int_bits, signed=signed, rounding=name, overflow=overflow)
        if not signed and overflow == "sat":
            continue  # the type below is signed: the bits that wrap are the same, the bounds are not
        expected = wide.cast(int_bits, width - int_bits, kind, limit).to_bits()
        assert [int(s) % 2**width for s in stored] == [int(b) % 2**width for b in expected]


def test_rounds_before_it_overflows_and_a_carry_overflows():
    assert cast([1.875], 4, 2, rounding="rnd", overflow="wrap") == [-8]  # up to 2.0, which does not fit
    assert cast([1.875], 4, 2, rounding="rnd", overflow="sat") == [7]
    assert cast([1.875], 4, 2, rounding="rnd", overflow="sat_zero") == [0]
    assert cast([1.875], 4, 2, rounding="trn", overflow="sat_zero") == [7]
    assert cast([-2.125], 4, 2, rounding="rnd", overflow="sat_zero") == [-8]  # comes back into range


def test_ties():
    halves = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]
    expected = {
        "rnd": [-2, -1, 0, 1, 2, 3],
        "rnd_zero": [-2, -1, 0, 0, 1, 2],
        "rnd_min_inf": [-3, -2, -1, 0, 1, 2],
        "rnd_inf": [-3, -2, -1, 1, 2, 3],
        "rnd_conv": [-2, -2, 0, 0, 2, 2],
        "trn": [-3, -2, -1, 0, 1, 2],
        "trn_zero": [-2, -1, 0, 0, 1, 2],
    }
    for rounding, stored in expected.items():
        for width in (8, 28):
            assert cast(halves, width, width, rounding=rounding, overflow="sat") == stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_just_below_half_is_not_half(dtype):
    below = math.nextafter(0.5, 0.0) if dtype == torch.float64 else 0.49999997
    for rounding in ("rnd", "rnd_zero", "rnd_min_inf", "rnd_inf", "rnd_conv"):
        assert cast([below, -below], 8, 8, dtype, rounding=rounding, overflow="sat") == [0, 0]
        assert cast([below, -below], 30, 30, dtype, rounding=rounding, overflow="sat") == [0, 0]


def test_large_numbers_wrap():
    large = [2.0**31, 2.0**31 + 256, -(2.0**31) - 256, 2.0**63, -(2.0**80), 3e38, float(2**24 + 2)]
    assert cast(large, 10, 10) == [0, 256, -256, 0, 0, 0, 2]
    assert cast(large, 32, 32, signed=False)[:2] == [2**31, 2**31 + 256]
    assert cast([2.0**31], 32, 32) == [-(2**31)]


def test_symmetric_saturation_changes_the_least_number():
    assert cast([-8.0, -7.0, -99.0, 99.0], 4, 4, overflow="sat_sym") == [-7, -7, -7, 7]
    assert cast([-0.5, -3.0, 3.0], 1, 1, overflow="sat_sym") == [-1, -1, 0]
    assert cast([-8.0, 99.0], 4, 4, signed=False, overflow="sat_sym") == [0, 15]


def test_unsigned_wrap_sets_the_saturated_bits_for_negative_numbers_too():
    assert cast([-1.0, 18.0, 5.0], 4, 4, signed=False, saturated_bits=2) == [15, 14, 5]
    assert cast([9.0, -9.0, 5.0], 4, 4, saturated_bits=1) == [1, -1, 5]


def test_sign_magnitude_wrap_looks_at_the_number_before_rounding():
    """7.5 rounds up to 8, which overflows; the bit above the type is that of 7, so the number stays positive."""
    assert cast([7.5], 4, 4, rounding="rnd", overflow="wrap_sm") == [7]
    assert cast([8.0], 4, 4, rounding="rnd", overflow="wrap_sm") == [7]
    assert (
        cast([9.0, 17.0], 4, 4, overflow="wrap_sm")
        == reference.to_raw(torch.tensor([9.0, 17.0]), 4, 4, overflow="wrap_sm").tolist()
    )


def test_subnormal_numbers_and_zeros():
    tiny = [1e-45, -1e-45, 0.0, -0.0]
    for width, int_bits in ((8, 3), (8, 40), (30, 40)):  # far to the left of the point: the product underflows
        assert cast(tiny, width, int_bits) == [0, -1, 0, 0]
        assert cast(tiny, width, int_bits, rounding="rnd_inf", overflow="sat") == [0, 0, 0, 0]
    assert cast([5e-324, -5e-324], 8, 40, torch.float64) == [0, -1]


@pytest.mark.parametrize("width", [8, 30])
def test_nan_and_infinity(width):
    special = torch.tensor([math.nan, math.inf, -math.inf])
    high = 2 ** (width - 1) - 1
    for overflow, stored in (("sat", [0, high, -high - 1]), ("sat_zero", [0, 0, 0]), ("wrap", [0, 0, 0])):
        assert to_raw(special, width, 4, overflow=overflow).tolist() == stored
        value = quantize(special, width, 4, overflow=overflow)
        assert value[0].isnan()
        assert torch.equal(value[1:], from_raw(torch.tensor(stored[1:]), width, 4))
    for overflow in ("wrap", "wrap_sm"):
        for n in (0, 1, 3):
            stored = to_raw(special, width, 4, overflow=overflow, saturated_bits=n)
            finite = to_raw(torch.tensor([0.0, 3e38, -3e38]), width, 4, overflow=overflow, saturated_bits=n)
            assert torch.equal(stored, finite)


def test_wide_types_in_float32():
    assert cast([0.1], 32, 1) == [int(torch.tensor(0.1).item() * 2**31)]
    assert quantize(torch.tensor([9.0]), 32, 1, overflow="sat").item() == 1.0  # 1 - 2^-31, to nearest
    assert to_raw(torch.tensor([-1.0]), 32, 32, signed=False).tolist() == [2**32 - 1]
    assert to_raw(torch.tensor([-1.0]), 32, 32, signed=False).dtype == torch.int64
    assert to_raw(torch.tensor([-1.0]), 31, 31, signed=False).dtype == torch.int32


def test_stochastic_rounding_is_unbiased_and_keeps_what_is_on_the_grid():
    x = torch.full((200_000,), 0.3)
    options = {"rounding": "stochastic", "overflow": "sat"}
    for sign in (1, -1):
        assert abs(quantize(sign * x, 8, 8, seed=3, **options).mean() - sign * 0.3) < 0.006
    assert torch.equal(quantize(x, 8, 8, seed=3, **options), quantize(x, 8, 8, seed=3, **options))
    assert not torch.equal(quantize(x, 8, 8, seed=3, **options), quantize(x, 8, 8, seed=4, **options))
    grid = torch.arange(-64, 64) / 16
    assert torch.equal(quantize(grid, 8, 4, **options), grid)
    torch.manual_seed(0)
    first = quantize(x, 8, 8, **options)
    assert not torch.equal(first, quantize(x, 8, 8, **options))
    torch.manual_seed(0)
    assert torch.equal(first, quantize(x, 8, 8, **options))


def test_random_numbers_are_uniform_and_independent_of_each_other_and_of_other_seeds():
    n = 1 << 18
    draws = [reference.uniform(torch.empty(n), seed) - 0.5 for seed in (0, 1, 2, -1, 1 << 32, 12345678901234567)]
    for k, draw in enumerate(draws):
        counts = torch.histc(draw, 256, -0.5, 0.5)
        chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
        assert 255 - 6 * (2 * 255) ** 0.5 < chi_square < 255 + 6 * (2 * 255) ** 0.5
        others = [draw.roll(lag) for lag in (1, 2, 3, 8, 16, 256, 4096)] + draws[:k]
        for other in others:  # a correlation's standard deviation is 1 / sqrt(n)
            assert abs((draw * other).mean().item()) * 12 < 6 / n**0.5


def test_gradients():
    x = torch.tensor([0.3, 9.0, -9.0], requires_grad=True)
    quantize(x, 4, 2, rounding="rnd", overflow="sat").sum().backward()
    assert x.grad.tolist() == [1, 0, 0]
    for passes, expected in ((True, [1, 1, 1]), (False, [1, 0, 0])):
        x.grad = None
        quantize(x, 4, 2, wrap_gradient=passes).sum().backward()
        assert x.grad.tolist() == expected
    for overflow, d in (("sat", [0.3 - 0.25, -1.75, 2.0]), ("sat_zero", [0.3 - 0.25, 0, 0])):
        frac_bits = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        quantize_trainable(x.detach(), frac_bits, 4, overflow=overflow).sum().backward()
        assert abs(frac_bits.grad.item() - math.log(2) * sum(d)) < 1e-6


@pytest.mark.parametrize("shape", [(3, 5, 9, 11), (2, 70, 3, 3), (4, 3, 64, 80), (2, 2000, 1, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_binary_point_for_each_channel(shape, channels_last):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    results = []
    for function in (quantize_trainable, reference.quantize_trainable):
        frac_bits = torch.linspace(-2.0, 6.0, shape[1]).view(-1, 1, 1).requires_grad_()
        leaf = x.clone().requires_grad_()
        out = function(leaf, frac_bits, 6)
        results.append((out, *torch.autograd.grad(out, (leaf, frac_bits), torch.ones_like(out))))
    for ours, theirs in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("method", ["range", "mse"])
def test_calibration(method):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1, 30]).view(3, 1, 1)
    module = FixedPoint(6, 3, rounding="rnd_conv", overflow="sat", per_channel=3, calibration=method, trainable=True)
    out = module(x)
    assert module.calibrated
    error = (out - x).square().mean((0, 2, 3))
    for more in (-1, 1):
        other = quantize_trainable(x, module.frac_bits.detach() + more, 6)
        if method == "mse":
            assert ((other - x).square().mean((0, 2, 3)) >= error).all()
    largest = x.abs().amax((0, 2, 3))
    if method == "range":
        assert (
            (2.0 ** (5 - module.frac_bits.flatten()) > largest) & (2.0 ** (4 - module.frac_bits.flatten()) <= largest)
        ).all()
    before = module.frac_bits.detach().clone()
    module(100 * x)  # the first batch alone
    assert torch.equal(module.frac_bits, before)
    twin = FixedPoint(6, 3, rounding="rnd_conv", overflow="sat", per_channel=3, calibration=method, trainable=True)
    twin.load_state_dict(module.state_dict())
    assert twin.calibrated


def test_calibration_refuses_what_has_no_range():
    for x in (torch.tensor([math.inf]), torch.zeros(0)):
        with pytest.raises(ValueError, match="FixedPoint: expected finite data"):
            FixedPoint(8, 3).calibrate(x)
    with pytest.raises(ValueError, match="method range or mse, got 'max'"):
        FixedPoint(8, 3).calibrate(torch.ones(1), "max")


def test_digits_are_limited():
    raw = torch.arange(-300.0, 301.0)
    for k in (1, 2, 3):
        limited = limit_digits(raw, k)
        for value, whole in zip(limited.tolist(), raw.tolist(), strict=True):
            bits = [b for b in range(9, -1, -1) if int(abs(whole)) >> b & 1][:k]
            assert value == math.copysign(sum(2**b for b in bits), whole) or value == whole == 0
        signed = limit_digits(raw, k, signed_digits=True)
        assert ((signed - raw).abs() <= (limited - raw).abs()).all()
    assert limit_digits(torch.tensor([math.nan, math.inf]), 1).isfinite().sum() == 0
    leaf = torch.tensor([7.0], requires_grad=True)
    PowerOfTwo(1)(leaf).backward()
    assert leaf.grad.item() == 1
    with pytest.raises(ValueError, match="limit_digits: expected k above 0"):
        PowerOfTwo(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 2, 3, 9, 80])
@pytest.mark.parametrize("signed", [False, True])
def test_digits_of_numbers_at_the_edges_of_their_range(dtype, k, signed, each_isa):
    info = torch.finfo(dtype)
    edges = torch.tensor([0.0, -0.0, info.max, info.tiny, info.smallest_normal, info.eps, math.nan, math.inf, 1.5])
    least = torch.tensor([info.smallest_normal], dtype=torch.float64) * info.eps
    scattered = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(40).exp2()
    every = torch.cat([edges.double(), 3 * least, least, 0.75 * edges.double(), 1.75 * info.max / 2 * scattered.sign()])
    x = torch.cat([every, -every, scattered, -scattered]).to(dtype)
    expected = reference.limit_digits(x, k, signed)

    def check(_):
        assert identical(limit_digits(x, k, signed_digits=signed), expected)

    each_isa(check)


def test_every_mode_has_a_name():
    assert len(ROUNDINGS) == 8
    assert len(OVERFLOWS) == 5


@pytest.mark.parametrize(("raw", "says"), [(1.0, "got float"), (torch.zeros(1), "got torch.float32")])
def test_from_raw_refuses_what_is_no_integer(raw, says):
    with pytest.raises(TypeError, match=f"from_raw: expected raw to be an integer tensor, {says}"):
        from_raw(raw, 8, 3)
