"""Fixed-point arithmetic: the published vectors, and exact rational numbers as the truth everywhere else."""

import csv
import math
import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from fastcifar.fixedpoint import FixedTensor, FixedType
from fastcifar.fixedpoint.integer import divide, isqrt, recast

DATA = Path(__file__).parent / "data"
ROUNDINGS = ("rnd", "rnd_zero", "rnd_min_inf", "rnd_inf", "rnd_conv", "trn", "trn_zero")
OVERFLOWS = ("sat", "sat_zero", "sat_sym", "wrap", "wrap_sm")


def scalar(raw, type):
    return FixedTensor(torch.tensor(raw), type)


def value(raw, type):
    return Fraction(raw) * Fraction(2) ** -type.frac_bits


def values(fixed):
    return [value(raw, fixed.type) for raw in fixed.raw.flatten().tolist()]


# ---- the operators ---------------------------------------------------------------------------------------------------

with (DATA / "ap_fixed_arith.csv").open() as _file:
    ROWS = [[field if not field.lstrip("-").isdigit() else int(field) for field in row] for row in csv.reader(_file)]


def test_every_published_result_has_its_type_and_its_bits():
    operations = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a.divide(b, simulation_quirk=True),
    }
    checked = 0
    for row in ROWS:
        a, b = (
            scalar(raw, FixedType(width, int_bits, bool(signed)))
            for width, int_bits, signed, raw in (row[:4], row[4:8])
        )
        for at in range(8, len(row), 5):
            name, width, int_bits, signed, raw = row[at : at + 5]
            result = operations[name](a, b)
            assert result.type == FixedType(width, int_bits, bool(signed)), row
            assert result.raw.item() == raw, (row, name)
            checked += 1
    assert checked == 1628


def test_the_quotient_is_the_true_one_unless_the_quirk_is_asked_for():
    differ = 0
    for row in ROWS:
        if row[7] == 0:
            continue
        types = [FixedType(row[i], row[i + 1], bool(row[i + 2])) for i in (0, 4)]
        a, b = scalar(row[3], types[0]), scalar(row[7], types[1])
        exact = value(row[3], types[0]) / value(row[7], types[1])
        result = a / b
        assert result.raw.item() == math.trunc(exact * Fraction(2) ** result.type.frac_bits)
        differ += result.raw.item() != row[-1]
    assert differ == 12


@pytest.mark.parametrize("seed", range(4))
def test_operators_agree_with_rational_numbers(seed):
    chance = random.Random(seed)
    for _ in range(50):
        types = []
        for _ in range(2):
            width = chance.randint(1, 20)
            types.append(FixedType(width, chance.randint(-6, 12), chance.random() < 0.5))
        raws = [
            [chance.choice([t.lowest, t.highest, chance.randint(t.lowest, t.highest)]) for _ in range(9)] for t in types
        ]
        a, b = (FixedTensor(torch.tensor(raw), t) for raw, t in zip(raws, types, strict=True))
        x, y = values(a), values(b)
        assert values(a + b) == [p + q for p, q in zip(x, y, strict=True)]
        assert values(a - b) == [p - q for p, q in zip(x, y, strict=True)]
        assert values(a * b) == [p * q for p, q in zip(x, y, strict=True)]
        assert values(-a) == [-p for p in x]
        assert values(a.sum()) == [sum(x)]
        for fixed in (a + b, a - b, a * b, -a, a.sum()):  # in range: the constructor looks
            FixedTensor(fixed.raw, fixed.type)
        for name in ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"):
            assert getattr(a, name)(b).tolist() == [getattr(p, name)(q) for p, q in zip(x, y, strict=True)]


def test_comparison_is_exact_where_no_common_grid_would_fit():
    wide, fine = FixedType(60, 60), FixedType(60, -30)
    a = FixedTensor(torch.tensor([0, 0, 0, 1, -1, 2**58]), wide)
    b = FixedTensor(torch.tensor([0, 1, -1, 2**58, -(2**58), 5]), fine)
    assert (a == b).tolist() == [True, False, False, False, False, False]
    assert (a < b).tolist() == [False, True, False, False, True, False]
    assert (b < a).tolist() == [False, False, True, True, False, True]


def test_shifts_keep_the_type_and_move_the_bits():
    a = FixedTensor(torch.tensor([5, -5, 100, -128]), FixedType(8, 4))
    assert (a << 1).raw.tolist() == [10, -10, -56, 0]
    assert (a >> 1).raw.tolist() == [2, -3, 50, -64]
    assert (a << 1).type == (a >> 1).type == a.type
    assert (a << 70).raw.tolist() == [0] * 4
    assert (a >> 70).raw.tolist() == [0, -1, 0, -1]
    assert torch.equal((a << -1).raw, (a >> 1).raw)
    assert torch.equal((a >> -1).raw, (a << 1).raw)
    rounding = FixedTensor(a.raw, FixedType(8, 4, rounding="rnd", overflow="sat"))
    assert (rounding << 1).raw.tolist() == [10, -10, -56, 0]


def test_a_result_beyond_64_bits_is_refused():
    a, b = scalar(1, FixedType(40, 20)), scalar(1, FixedType(30, 2))
    for operation in (lambda: a * b, lambda: a / b, lambda: (a * scalar(1, FixedType(24, 3))).sum() + b * b * b):
        with pytest.raises(ValueError, match="expected a result of at most 64 bits"):
            operation()
    assert (a * scalar(1, FixedType(24, 3))).type.width == 64
    with pytest.raises(ValueError, match="expected a result of at most 64 bits"):
        scalar(1, FixedType(32, 3, False)) * scalar(1, FixedType(32, 3, False))


@pytest.mark.parametrize("lengths", [(1, 1, 1), (3, 7, 5), (2, 64, 9)])
def test_matrix_product_has_the_type_of_a_sum_of_products(lengths):
    rows, inner, columns = lengths
    a_type, b_type = FixedType(8, 3), FixedType(7, 0, signed=False)
    a = FixedTensor(torch.full((rows, inner), -128), a_type)
    b = FixedTensor(torch.full((inner, columns), 127), b_type)
    product = a @ b
    assert product.type == FixedType(15 + max(inner - 1, 0).bit_length(), 3 + max(inner - 1, 0).bit_length())
    assert product.raw.unique().tolist() == [-128 * 127 * inner]
    FixedTensor(product.raw, product.type)
    with pytest.raises(ValueError, match=r"matmul: expected shapes \[..., M, K\] and \[K, N\]"):
        a @ a.reshape(-1)


# ---- square root and reciprocal --------------------------------------------------------------------------------------


def test_integer_square_root_is_exact_at_every_edge():
    roots = torch.tensor([0, 1, 2, 3, 2**26 + 1, 2**31 - 1, 94906267, 3037000498, 3037000499])
    squares = roots * roots
    assert torch.equal(isqrt(squares), roots)
    assert torch.equal(isqrt((squares - 1).clamp_min(0)), (roots - 1).clamp_min(0))
    assert torch.equal(isqrt(squares[:-1] + 2 * roots[:-1]), roots[:-1])
    generator = torch.Generator().manual_seed(0)
    for bits in (20, 40, 53, 54, 62, 63):
        raw = torch.randint(2**bits - 1, (2000,), generator=generator)
        assert isqrt(raw).tolist() == [math.isqrt(r) for r in raw.tolist()]
    assert isqrt(torch.tensor(2**63 - 1)).item() == math.isqrt(2**63 - 1)
    with pytest.raises(ValueError, match="isqrt: expected integers of at least 0, got -3"):
        isqrt(torch.tensor([4, -3]))


def floor_sqrt(x, frac_bits):
    """floor(sqrt(x) * 2 ** frac_bits) of a rational number."""
    scaled = x * Fraction(4) ** frac_bits
    return math.isqrt(scaled.numerator // scaled.denominator)


@pytest.mark.parametrize(
    "type", [FixedType(12, 5), FixedType(9, -2, signed=False), FixedType(10, 14), FixedType(16, 1)]
)
def test_square_root_and_reciprocal_are_those_of_rational_numbers(type):
    raw = torch.arange(0, type.highest + 1, max(1, type.highest // 500))
    x = FixedTensor(raw, type)
    for result in (None, FixedType(30, 12, signed=False), FixedType(20, 18)):
        root = x.sqrt(result)
        assert root.raw.tolist() == [floor_sqrt(v, root.type.frac_bits) for v in values(x)]
    x = FixedTensor(raw[1:] if not type.signed else torch.cat([raw[1:], -raw[1:], raw.new_tensor([type.lowest])]), type)
    for result in (None, FixedType(40, 20)):
        inverse = x.reciprocal(result)
        power = Fraction(2) ** inverse.type.frac_bits
        assert inverse.raw.tolist() == [math.trunc(power / v) for v in values(x)]


def test_natural_types_of_root_and_reciprocal_hold_every_result():
    for width in range(1, 9):
        for int_bits in range(-3, 11):
            for signed in (False, True):
                type = FixedType(width, int_bits, signed)
                positive = FixedTensor(torch.arange(0, type.highest + 1), type)
                root = positive.sqrt()
                assert root.raw.tolist() == [floor_sqrt(v, root.type.frac_bits) for v in values(positive)]
                raw = torch.arange(type.lowest, type.highest + 1)
                other = FixedTensor(raw[raw != 0], type)
                inverse = other.reciprocal()
                power = Fraction(2) ** inverse.type.frac_bits
                assert inverse.raw.tolist() == [math.trunc(power / v) for v in values(other)]


def test_root_and_reciprocal_refuse_what_has_none():
    a = FixedTensor(torch.tensor([0, -4]), FixedType(8, 4))
    with pytest.raises(ValueError, match=r"sqrt: expected numbers of at least 0, got -0\.25"):
        a.sqrt()
    with pytest.raises(ZeroDivisionError, match="divide: expected divisors other than 0"):
        a.reciprocal()
    with pytest.raises(ZeroDivisionError):
        divide(torch.tensor(3), torch.tensor(0))
    with pytest.raises(ValueError, match="sqrt: expected at most 63 bits"):
        a.sqrt(FixedType(60, 4))
    with pytest.raises(ValueError, match="reciprocal: expected a dividend of at most 63 bits"):
        a.reciprocal(FixedType(64, 4))


# ---- the cast between grids ------------------------------------------------------------------------------------------


def rounded(y, rounding):
    floor, rest = math.floor(y), y - math.floor(y)
    half = Fraction(1, 2)
    if rounding == "trn":
        return floor
    if rounding == "trn_zero":
        return math.trunc(y)
    if rest != half:
        return floor + (rest > half)
    up = {"rnd": True, "rnd_zero": y < 0, "rnd_min_inf": False, "rnd_inf": y > 0, "rnd_conv": floor % 2 == 1}[rounding]
    return floor + up


def brought_in(v, floor, type):
    """The overflow mode on a Python integer, bit by bit, as the published definition reads."""
    width, n = type.width, type.saturated_bits
    low, high = type.lowest, type.highest
    outside = not low <= v <= high
    if type.overflow == "sat_sym" and type.signed and width > 1:
        return max(-high, min(high, v))
    if type.overflow in ("sat", "sat_sym"):
        return max(low, min(high, v))
    if type.overflow == "sat_zero":
        return 0 if outside else v
    bits = [(v >> i) & 1 for i in range(width)]
    sign = int(v < 0)
    if outside and type.overflow == "wrap" and n:
        bits[width - n :] = [1] * n if not type.signed else [1 - sign] * (n - 1) + [sign]
    if outside and type.overflow == "wrap_sm":
        if n == 0:
            flip = (floor >> width) & 1 != bits[-1]
        elif n == 1:
            flip = sign != bits[-1]
        else:
            flip = bits[width - n] == sign
        bits = [1 - b for b in bits] if flip else bits
        if n:
            bits[width - n :] = [1 - sign] * (n - 1) + [sign]
    unsigned = sum(b << i for i, b in enumerate(bits))
    return unsigned - (1 << width) if type.signed and bits[-1] else unsigned


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_cast_between_grids_is_the_definition_on_rational_numbers(rounding, overflow):
    chance = random.Random(ROUNDINGS.index(rounding) * 5 + OVERFLOWS.index(overflow))
    edges = [0, 1, -1, 2**62, -(2**62), 2**63 - 1, -(2**63), 2**31, -(2**31)]
    for _ in range(120):
        signed = overflow == "wrap_sm" or chance.random() < 0.5
        width = chance.choice([1, 2, 3, 8, 16, 31, 32, 33, 62, 63, *([64] if signed else [])])
        type = FixedType(
            width, chance.randint(-20, 60), signed, rounding, overflow, chance.choice([0, 0, 1, 2, width]) % (width + 1)
        )
        from_frac = type.frac_bits + chance.choice([0, 1, 2, 5, 20, 62, 63, 64, 65, 90, -1, -3, -30, -63, -64, -80])
        raw = edges + [chance.getrandbits(chance.randint(1, 63)) * chance.choice([1, -1]) for _ in range(16)]
        if 0 < from_frac - type.frac_bits < 62:  # ties
            raw += [(2 * k + 1) << (from_frac - type.frac_bits - 1) for k in (-2, -1, 0, 1)]
        expected = []
        for r in raw:
            y = Fraction(r) * Fraction(2) ** (type.frac_bits - from_frac)
            expected.append(brought_in(rounded(y, rounding), math.floor(y), type))
        assert recast(torch.tensor(raw), from_frac, type).tolist() == expected, (type, from_frac)


def test_cast_of_a_tensor_is_the_cast_of_its_integers():
    a = FixedTensor(torch.arange(-128, 128), FixedType(8, 2))
    narrow = FixedType(4, 1, rounding="rnd_conv", overflow="sat")
    assert a.cast(narrow).type == narrow
    assert torch.equal(a.cast(narrow).raw.long(), recast(a.raw, 6, narrow))
    assert torch.equal(a.cast(FixedType(16, 5)).cast(a.type).raw, a.raw)


# ---- the tensor ------------------------------------------------------------------------------------------------------


def test_storage_is_as_narrow_as_the_type_allows():
    for width, signed, dtype in (
        (16, True, torch.int16),
        (15, False, torch.int16),
        (16, False, torch.int32),
        (32, True, torch.int32),
        (32, False, torch.int64),
        (64, True, torch.int64),
    ):
        type = FixedType(width, 3, signed)
        for raw in (type.lowest, type.highest):
            stored = scalar(raw, type)
            assert stored.raw.dtype == dtype
            assert stored.raw.item() == raw


def test_values_as_floats():
    assert scalar(-3, FixedType(8, 4)).float().item() == -0.1875
    wide = scalar(2**53 + 1, FixedType(60, 60))
    assert wide.float(torch.float64).item() == 2.0**53
    assert scalar(2**24 + 1, FixedType(30, 30)).float().item() == 2.0**24
    assert scalar(5, FixedType(4, 8)).float().item() == 80.0


def test_shapes_pass_through():
    a = FixedTensor(torch.arange(24).view(2, 3, 4), FixedType(8, 4))
    assert a.permute(2, 0, 1).shape == (4, 2, 3)
    assert a.flatten(1).shape == (2, 12)
    assert a[1, :, 2].raw.tolist() == [14, 18, 22]
    assert a.unsqueeze(0).expand(5, 2, 3, 4).shape == (5, 2, 3, 4)
    assert (a[0] + a[0, 0]).shape == (3, 4)
    assert a.sum(1).raw.tolist() == [[12, 15, 18, 21], [48, 51, 54, 57]]
    assert a.sum((0, 2), keepdim=True).shape == (1, 3, 1)
    assert len(a) == 2
    assert a.dim() == 3
    assert a.numel() == 24


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: FixedType(0, 1), ValueError, "expected a width of at least 1 bit, got 0"),
        (lambda: FixedType(8.0, 1), TypeError, r"expected width to be an integer, got 8\.0"),
        (lambda: FixedType(8, True), TypeError, "expected int_bits to be an integer, got True"),
        (lambda: FixedType(8, 4, 1), TypeError, "expected signed to be True or False, got 1"),
        (lambda: FixedType(8, 4, True, "round"), ValueError, "expected rounding to be one of rnd, .*; got 'round'"),
        (
            lambda: FixedType(8, 4, True, "trn", "clip"),
            ValueError,
            "expected overflow to be one of sat, .*; got 'clip'",
        ),
        (
            lambda: FixedType(8, 4, False, "trn", "wrap_sm"),
            ValueError,
            "expected a signed type with overflow 'wrap_sm'",
        ),
        (lambda: FixedType(8, 4, saturated_bits=9), ValueError, "expected saturated_bits of 0 to 8, got 9"),
        (lambda: scalar(128, FixedType(8, 4)), ValueError, r"expected stored integers of ap_fixed<8, 4>, .* got 128"),
        (lambda: scalar(-1, FixedType(8, 4, False)), ValueError, "expected stored integers of ap_ufixed<8, 4>"),
        (
            lambda: FixedTensor(torch.ones(2), FixedType(8, 4)),
            TypeError,
            "expected stored integers .* got torch.float32",
        ),
        (lambda: FixedTensor([1], FixedType(8, 4)), TypeError, "expected raw to be a tensor, got list"),
        (lambda: FixedTensor(torch.ones(1).int(), 8), TypeError, "expected type to be a FixedType, got 8"),
        (lambda: scalar(1, FixedType(8, 4)) + 1, TypeError, "expected a sum with a FixedTensor, got int"),
        (lambda: recast(torch.tensor(1), 0, FixedType(65, 1)), ValueError, "at most 64 bits"),
        (lambda: recast(torch.tensor(1), 0, FixedType(64, 1, False)), ValueError, "at most 64 bits"),
        (
            lambda: recast(torch.tensor(1), 2, FixedType(8, 8, rounding="stochastic")),
            ValueError,
            "expected a rounding that is no chance",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_types_print_as_in_the_tool():
    assert str(FixedType(8, 4)) == "ap_fixed<8, 4>"
    assert str(FixedType(8, 4, False, "rnd", "wrap")) == "ap_ufixed<8, 4, AP_RND>"
    assert str(FixedType(8, 4, True, "trn", "sat")) == "ap_fixed<8, 4, AP_TRN, AP_SAT>"
    assert str(FixedType(8, 4, True, "trn", "wrap_sm", 2)) == "ap_fixed<8, 4, AP_TRN, AP_WRAP_SM, 2>"


@pytest.mark.parametrize(
    "type",
    [
        FixedType(8, 3, rounding="rnd_conv", overflow="sat"),
        FixedType(5, 7, signed=False, rounding="trn_zero", overflow="sat_zero"),
        FixedType(32, -4, signed=False),
        FixedType(9, 2, rounding="rnd", overflow="wrap_sm", saturated_bits=2),
    ],
    ids=str,
)
def test_a_cast_from_floats_is_that_of_a_finer_type(type):
    """Floats with 20 bits after the binary point are integers on that grid, which :func:`recast` casts."""
    raw = torch.randint(-(1 << 24), 1 << 24, (1000,), generator=torch.Generator().manual_seed(0))
    x = raw.double() * 2.0**-20
    out = FixedTensor.from_float(x, type)
    assert out.type == type
    assert torch.equal(out.raw, FixedTensor(raw, FixedType(26, 6)).cast(type).raw)
    FixedTensor(out.raw, type)  # in range
    assert torch.equal(FixedTensor.from_float(out.float(torch.float64), type).raw, out.raw)


def test_a_cast_from_floats_at_random_and_what_it_refuses():
    chance = FixedType(8, 4, rounding="stochastic", overflow="sat")
    x = torch.full((1000,), 0.03125)
    out = FixedTensor.from_float(x, chance, seed=3)
    assert torch.equal(out.raw, FixedTensor.from_float(x, chance, seed=3).raw)
    assert 0.4 < out.raw.double().mean() < 0.6
    with pytest.raises(TypeError, match="from_float: expected x in float32, float64"):
        FixedTensor.from_float(torch.ones(2).int(), chance)
    with pytest.raises(TypeError, match="from_float: expected type to be a FixedType, got 8"):
        FixedTensor.from_float(x, 8)
    for type in (FixedType(33, 3), FixedType(8, 41), FixedType(8, -5)):
        with pytest.raises(
            ValueError, match="from_float: expected a type of at most 32 bits with int_bits of -4 to 40"
        ):
            FixedTensor.from_float(x, type)


@pytest.mark.parametrize("saturated_bits", [0, 1, 3])
@pytest.mark.parametrize("overflow", ["sat", "sat_zero", "sat_sym", "wrap", "wrap_sm"])
@pytest.mark.parametrize("rounding", ["rnd", "rnd_zero", "rnd_min_inf", "rnd_inf", "rnd_conv", "trn", "trn_zero"])
def test_a_cast_of_integers_has_the_bits_of_recast_by_every_way(rounding, overflow, saturated_bits):
    """Up to 2^53 the kernel of the cast from floats serves it; wider integers and types keep to int64."""
    generator = torch.Generator().manual_seed(0)
    for width, int_bits, signed in ((8, 3, True), (1, 1, True), (32, 12, False), (24, -4, True), (40, 20, True)):
        if overflow == "wrap_sm" and not signed:
            continue
        modes = {"rounding": rounding, "overflow": overflow, "saturated_bits": min(saturated_bits, width)}
        to = FixedType(width, int_bits, signed, **modes)
        for bits, from_frac in ((12, 5), (12, -3), (31, 20), (54, 30), (54, 50), (62, 30), (20, 0)):
            raw = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (500,), generator=generator)
            raw[:4] = torch.tensor([-(1 << (bits - 1)), (1 << (bits - 1)) - 1, 0, -1])
            raw[4:200] = (raw[4:200] >> bits // 2) << max(bits // 2 - 1, 0)  # ties
            x = FixedTensor(raw, FixedType(bits, bits - from_frac))
            assert torch.equal(x.cast(to).raw.long(), recast(raw, from_frac, to))
