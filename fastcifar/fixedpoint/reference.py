"""Fixed point in plain PyTorch: the executable specification of the family, ``ap_fixed<W, I, Q, O, N>`` to the bit.

With F = W - I and y = x 2^F, a number is first rounded to an integer v (Q, a mode of :data:`ROUNDINGS`), then v is
brought into the W bits of the type (O, a mode of :data:`OVERFLOWS`, with N saturated bits). Everything is computed in
float64, where scaling by a power of two, rounding, and reduction modulo 2^W are exact for every floating input.

NaN stays NaN as a value and is 0 as a stored integer. An infinity is what a large finite number is, a multiple of every
power of two: it saturates where numbers saturate, and its low bits are 0 where numbers wrap. -0 is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

# In the order of the C++ enumerations AP_RND ... AP_TRN_ZERO; "stochastic" is ours.
ROUNDINGS = ("rnd", "rnd_zero", "rnd_min_inf", "rnd_inf", "rnd_conv", "trn", "trn_zero", "stochastic")
OVERFLOWS = ("sat", "sat_zero", "sat_sym", "wrap", "wrap_sm")
INT_BITS = (-4, 40)  # the least and the largest


def quantize(
    x: Tensor,
    width: int,
    int_bits: int,
    *,
    signed: bool = True,
    rounding: str = "trn",
    overflow: str = "wrap",
    saturated_bits: int = 0,
    seed: Tensor | int | None = None,
    wrap_gradient: bool = True,
) -> Tensor:
    """The value on the grid, in ``x``'s dtype; with ``seed`` for stochastic rounding."""
    frac_bits = torch.full((), float(width - int_bits), dtype=torch.float64, device=x.device)
    return quantize_trainable(
        x,
        frac_bits,
        width,
        signed=signed,
        rounding=rounding,
        overflow=overflow,
        saturated_bits=saturated_bits,
        seed=seed,
        wrap_gradient=wrap_gradient,
    )


def quantize_trainable(
    x: Tensor,
    frac_bits: Tensor,
    width: int,
    *,
    signed: bool = True,
    rounding: str = "rnd_conv",
    overflow: str = "sat",
    saturated_bits: int = 0,
    seed: Tensor | int | None = None,
    wrap_gradient: bool = True,
) -> Tensor:
    """As :func:`quantize`, with the fractional bits F a tensor that is rounded to the nearest integer (ties to even).

    Both roundings pass the gradient on, and so does wrapping where ``wrap_gradient``; other overflow makes a constant.
    """
    wide = frac_bits.double()
    # F of the types with int_bits in range; the clamp passes the gradient on, so that F can come back.
    whole = wide.round().clamp(width - INT_BITS[1], width - INT_BITS[0])
    scale = _straight_through(power_of_two(whole.detach()), torch.exp2(_straight_through(whole, wide)))
    below, v = round_to_integer((x.double() * scale).detach(), x.detach(), rounding, seed)
    stored = overflowed(v, below, width, signed, overflow, saturated_bits)
    passes = in_range(v, width, signed, overflow)
    if overflow in ("wrap", "wrap_sm") and wrap_gradient:
        passes = torch.ones_like(passes)
    y = torch.where(passes, x.double(), 0.0) * scale  # an infinity that saturates must not meet its gradient of 0
    stored = torch.where(passes, _straight_through(stored, y), stored)
    return (stored / scale).to(x.dtype)


def to_raw(
    x: Tensor,
    width: int,
    int_bits: int,
    *,
    signed: bool = True,
    rounding: str = "trn",
    overflow: str = "wrap",
    saturated_bits: int = 0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """The stored integer: int32, or int64 where 32 unsigned bits ask for it."""
    below, v = round_to_integer(x.double() * 2.0 ** (width - int_bits), x, rounding, seed)
    stored = overflowed(v, below, width, signed, overflow, saturated_bits)
    return stored.nan_to_num(nan=0.0).to(raw_dtype(width, signed))


def from_raw(raw: Tensor, width: int, int_bits: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """``raw * 2**(int_bits - width)``, rounded to ``dtype`` once."""
    return (raw.double() * 2.0 ** (int_bits - width)).to(dtype)


def raw_dtype(width: int, signed: bool) -> torch.dtype:
    return torch.int64 if width == 32 and not signed else torch.int32


def bounds(width: int, signed: bool) -> tuple[int, int]:
    """The least and the largest stored integer."""
    return (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)


def round_to_integer(y: Tensor, x: Tensor, rounding: str, seed: Tensor | int | None) -> tuple[Tensor, Tensor]:
    """``floor(y)``, and ``y`` rounded; ``x`` has the sign of a ``y`` that has underflowed to 0."""
    y = y.clamp(-(2.0**1000), 2.0**1000)
    below = y.floor()
    below = torch.where((x < 0) & (y == 0), -1.0, below)
    # r = y - floor(y) itself may round to 1/2 where y is just above -1/2; the fraction of |y| is exact.
    part = y.abs() - y.abs().floor()
    tie = part == 0.5
    above = torch.where(y > 0, part > 0.5, (part > 0) & (part < 0.5))  # r > 1/2
    if rounding == "trn":
        up = torch.zeros_like(tie)
    elif rounding == "trn_zero":
        up = (below < y) & (x < 0) | (x < 0) & (y == 0)
    elif rounding == "rnd":
        up = above | tie
    elif rounding == "rnd_zero":
        up = above | (tie & (y < 0))
    elif rounding == "rnd_min_inf":
        up = above
    elif rounding == "rnd_inf":
        up = above | (tie & (y > 0))
    elif rounding == "rnd_conv":
        up = above | (tie & (modulo(below, 1) == 1))
    else:  # away from 0 with a probability of the fraction of |y|
        away = torch.copysign((uniform(y, seed) < part).double(), y)
        return below, torch.where(y < 0, -(-y).floor(), y.floor()) + away + 0.0
    # An underflowed y of at most 0 is just below 0: nearer to 0 than to -1.
    if rounding.startswith("rnd"):
        up = up | ((x < 0) & (y == 0))
    return below, below + up + 0.0


def modulo(v: Tensor, bits: int) -> Tensor:
    """``v`` modulo 2^bits, in [0, 2^bits): exact for every whole number ``v``."""
    return v - 2.0**bits * (v * 2.0**-bits).floor()


def in_range(v: Tensor, width: int, signed: bool, overflow: str) -> Tensor:
    """Where overflow leaves ``v`` as it is; sat_sym also replaces the least integer of a signed type."""
    low, high = bounds(width, signed)
    if overflow == "sat_sym" and signed and width > 1:
        low = -high
    return (v >= low) & (v <= high)


def overflowed(v: Tensor, below: Tensor, width: int, signed: bool, overflow: str, saturated_bits: int) -> Tensor:
    """The stored integer of the rounded ``v``; ``below`` is the number before it was rounded, without its fraction."""
    low, high = bounds(width, signed)
    inside = in_range(v, width, signed, overflow) | v.isnan()
    negative = v < 0
    if overflow == "sat" or (overflow == "sat_sym" and (not signed or width == 1)):
        return v.clamp(low, high)
    if overflow == "sat_sym":
        return v.clamp(-high, high)
    if overflow == "sat_zero":
        return torch.where(inside, v, 0.0)

    # What is left works on bits: w of the rounded number, of which all that lies in range is kept.
    w = modulo(v, width).nan_to_num(nan=0.0).to(torch.int64)
    sign = negative.to(torch.int64)
    top = 1 << (width - 1)
    n = saturated_bits
    ones = (1 << width) - (1 << (width - n))  # the upper n bits
    if overflow == "wrap" and n > 0:
        # Signed: the sign is kept, the n - 1 bits below it are its opposite.
        bits = (w & ~ones) | torch.where(negative, top, ones & ~top) if signed else w | ones
    elif overflow == "wrap":
        bits = w
    elif n == 0:  # the sign is the bit above the type's, before rounding; where that changes it, all bits change
        above = (modulo(below, width + 1) >= 2.0**width).to(torch.int64)
        bits = torch.where(above != w // top, ~w, w) & (top - 1) | above * top
    elif n == 1:
        bits = torch.where(sign != w // top, ~w, w) & (top - 1) | sign * top
    else:
        lowest_saturated = (w >> (width - n)) & 1
        bits = torch.where(lowest_saturated == sign, ~w, w) & ~ones & (2 * top - 1)
        bits = bits | torch.where(negative, top, ones & ~top)
    wrapped = torch.where((bits >= top) & signed, bits - 2 * top, bits).double()
    return torch.where(inside, v, wrapped)


def power_of_two(n: Tensor) -> Tensor:
    """2^n in float64 of whole numbers ``n`` (NaN of NaN), from its bits: exp2 and pow need not be exact."""
    bits = (n.nan_to_num().to(torch.int64) + 1023) << 52
    return torch.where(n.isnan(), torch.nan, bits.view(torch.float64))


def uniform(like: Tensor, seed: Tensor | int | None) -> Tensor:
    """For each element a number in (0, 1), (2 k + 1) / 2^24, from ``seed`` (64 bits) and the element's index."""
    if seed is None:
        raise ValueError("uniform: expected a seed")
    state = torch.as_tensor(seed, dtype=torch.int64, device=like.device).reshape(())
    state = _split(state)
    key, gamma = state & _LOW, _right(state, 32) | 1
    index = torch.arange(like.numel(), device=like.device).view(like.shape)
    mixed = _mix(((index & _LOW) * gamma + key + (index >> 32) * 0x9E3779B9) & _LOW)
    return (((mixed >> 9) * 2 + 1).double()) * 2.0**-24


_LOW = (1 << 32) - 1


def _right(z: Tensor, bits: int) -> Tensor:
    """A shift to the right of 64 unsigned bits."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def _split(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., 2014)."""
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _right(z, 31)


def _mix(z: Tensor) -> Tensor:
    """A bijection of 32 bits, each of which depends on all (constants found by search, C. Wellons and others)."""
    z = ((z ^ (z >> 16)) * 0x21F0AAAD) & _LOW
    z = ((z ^ (z >> 15)) * 0x735A2D97) & _LOW
    return z ^ (z >> 15)


def integer_matmul(a: Tensor, b: Tensor, a_largest: int, b_largest: int) -> Tensor:
    """``a @ b.T`` of integers in int64, returned as int32 where the bounds say that every sum fits."""
    sums = (a.long().unsqueeze(-2) * b.long()).sum(-1)
    return sums.to(_sum_dtype(b.shape[1] * a_largest * b_largest))


def integer_conv2d(
    x: Tensor, weight: Tensor, x_largest: int, weight_largest: int, stride=1, padding=0, dilation=1, groups=1
) -> Tensor:
    """``conv2d`` of integers in int64, tap by tap; its dtype as that of :func:`integer_matmul`."""
    (down, right), (top, left), (dy, dx) = ((p, p) if isinstance(p, int) else p for p in (stride, padding, dilation))
    x = torch.nn.functional.pad(x.long(), (left, left, top, top)).unflatten(1, (groups, 1, -1))
    weight = weight.long().unflatten(0, (groups, -1))
    height, width = weight.shape[-2:]
    last_y, last_x = x.shape[-2] - dy * (height - 1), x.shape[-1] - dx * (width - 1)
    sums = torch.zeros((), dtype=torch.int64, device=x.device)
    for u in range(height):
        rows = x[..., u * dy : u * dy + last_y : down, :]
        for v in range(width):
            sums = sums + (rows[..., v * dx : v * dx + last_x : right] * weight[..., u, v, None, None]).sum(3)
    return sums.flatten(1, 2).to(_sum_dtype(weight[0, 0].numel() * x_largest * weight_largest))


def _sum_dtype(bound: int) -> torch.dtype:
    return torch.int32 if bound < 1 << 31 else torch.int64


class _StraightThrough(torch.autograd.Function):
    """``value``, with the gradient going to ``through``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value, through):
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def _straight_through(value: Tensor, through: Tensor) -> Tensor:
    return _StraightThrough.apply(value, through)


MOST_DIGITS = 54  # that a float64 has, signed ones included


def limit_digits(x: Tensor, k: int, signed_digits: bool = False) -> Tensor:
    """``x`` with its ``k`` highest binary digits, or the ``k`` signed digits that come nearest one after the other."""
    rest = x.detach().double()
    digits = torch.zeros_like(rest)
    for _ in range(min(k, MOST_DIGITS)):
        digit = ((rest.view(torch.int64) >> 52) << 52).view(torch.float64)  # sign and exponent: a power of two
        digit = torch.where(rest.abs() < torch.finfo(torch.float64).tiny, 0.0, digit)
        if signed_digits:
            digit = torch.where(rest.abs() >= 1.5 * digit.abs(), 2 * digit, digit)
        digits = digits + digit
        rest = rest - digit
    value = torch.where(x.detach().isfinite(), digits, x.detach().double()).to(x.dtype)
    return _straight_through(value, x)
