"""Exact arithmetic on stored integers, in int64: the cast from one grid to another, square root and division.

This is the definition of what the family computes between integers; kernels and generated C++ are held to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .types import FixedType

__all__ = ["divide", "isqrt", "recast", "shift_left"]

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def stored(op: str, raw: Tensor) -> Tensor:
    """``raw`` as int64, refused in the name of ``op`` where it holds no integers."""
    if not isinstance(raw, Tensor):
        raise TypeError(f"{op}: expected raw to be a tensor, got {type(raw).__name__}")
    if raw.dtype not in INTEGERS:
        raise TypeError(f"{op}: expected stored integers (int8 to int64), got {raw.dtype}")
    return raw.long()


def check_storable(op: str, type: FixedType) -> None:
    if not type.storable:
        raise ValueError(f"{op}: expected a result of at most 64 bits (63 unsigned), got {type}; cast an operand first")


def recast(raw: Tensor, from_frac_bits: int, type: FixedType) -> Tensor:
    """The cast of ``raw * 2 ** -from_frac_bits`` to ``type``: rounded to its grid, then brought into its range.

    With ``y = raw * 2 ** (type.frac_bits - from_frac_bits)``, v = round(y) is taken as an unbounded integer, and the
    overflow mode acts on it, so that a carry out of the rounding overflows too. Every bit is exact: no shift,
    however far, loses what decides the result.

    Args:
        raw: stored integers, int8 to int64, any shape.
        from_frac_bits: their bits after the binary point; any integer.
        type: the type to cast to, of at most 64 bits (63 unsigned), in any mode but stochastic rounding.

    Returns:
        Stored integers of ``type``, int64.

    Raises:
        TypeError: ``raw`` holds no integers.
        ValueError: ``type`` is wider than int64, or rounds at random.

    Source: the modes of ``ap_fixed`` (UG1399), in the order round, then overflow.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint.integer import recast
        >>> from fastcifar.fixedpoint.types import FixedType
        >>> recast(torch.tensor([3, -3, 127]), 4, FixedType(4, 1, rounding="rnd", overflow="sat")).tolist()
        [2, -1, 7]
    """
    op = "recast"
    raw = stored(op, raw)
    check_storable(op, type)
    drop = from_frac_bits - type.frac_bits
    if drop > 0:
        floor = raw >> min(drop, 63)
        value, up_shift = floor + _carry(raw, floor, drop, type.rounding), 0
    else:
        floor = value = raw
        up_shift = -drop
    return _into_range(value, floor, up_shift, type)


def _carry(raw: Tensor, floor: Tensor, drop: int, rounding: str) -> Tensor:
    """1 where the value lies on or above what the mode rounds up, from the bits below the grid."""
    if drop <= 63:
        rest, half = raw & ((1 << drop) - 1), 1 << (drop - 1)
        inexact, above, tie = rest != 0, rest > half, rest == half
    else:  # raw / 2 ** drop lies in [-1/2, 1/2): floor is 0 or -1
        inexact = raw != 0
        tie = raw == -(1 << 63) if drop == 64 else torch.zeros_like(inexact)
        above = (raw < 0) & ~tie
    negative = raw < 0
    if rounding == "trn":
        up = torch.zeros_like(inexact)
    elif rounding == "trn_zero":
        up = negative & inexact
    elif rounding == "rnd":
        up = above | tie
    elif rounding == "rnd_zero":
        up = above | (tie & negative)
    elif rounding == "rnd_min_inf":
        up = above
    elif rounding == "rnd_inf":
        up = above | (tie & ~negative)
    elif rounding == "rnd_conv":
        up = above | (tie & (floor & 1).bool())
    else:
        raise ValueError(f"recast: expected a rounding that is no chance, got {rounding!r}")
    return up.long()


def shift_left(raw: Tensor, by: int, type: FixedType) -> Tensor:
    """``raw * 2 ** by`` modulo 2 ** width, as the stored integer of ``type``; ``by`` is at least 0."""
    shifted = raw << by if by < 64 else torch.zeros_like(raw)
    return _low_bits(shifted, type)


def _low_bits(value: Tensor, type: FixedType) -> Tensor:
    if type.signed:
        return (value << (64 - type.width)) >> (64 - type.width)
    return value & type.highest


def _into_range(value: Tensor, floor: Tensor, by: int, type: FixedType) -> Tensor:
    """The overflow mode, applied to ``value * 2 ** by``, which need not fit into 64 bits."""
    width, n = type.width, type.saturated_bits
    low, high = type.lowest, type.highest
    over, under = value > (high >> by), value < -(-low >> by)
    bits = shift_left(value, by, type)
    if type.overflow in ("sat", "sat_sym", "sat_zero"):
        if type.overflow == "sat_zero":
            return bits.masked_fill(over | under, 0)
        symmetric = type.overflow == "sat_sym" and type.signed and width > 1
        least = -high if symmetric else low
        bits = bits.masked_fill(over, high).masked_fill(under, least)
        return bits.clamp_min(least) if symmetric else bits
    if type.overflow == "wrap" and n == 0:
        return bits
    negative = value < 0
    if type.overflow == "wrap":
        keep = bits & ((1 << (width - n)) - 1)
        if not type.signed:
            return torch.where(over | under, keep | (high + 1 - (1 << (width - n))), bits)
        ones = (1 << (width - 1)) - (1 << (width - n))  # bits W-N to W-2
        return torch.where(over | under, torch.where(negative, keep + low, keep | ones), bits)
    top = bits < 0
    if n == 0:
        # The simulation looks at bit W of the value as it was before rounding.
        above = floor >> min(width - by, 63) if width >= by else torch.zeros_like(floor)
        return torch.where((over | under) & ((above & 1).bool() != top), ~bits, bits)
    if n == 1:
        flipped = torch.where(negative != top, ~bits, bits)
    else:
        flipped = torch.where(((bits >> (width - n)) & 1).bool() == negative, ~bits, bits)
    keep = flipped & ((1 << (width - n)) - 1)
    ones = (1 << (width - 1)) - (1 << (width - n))
    return torch.where(over | under, torch.where(negative, keep + low, keep | ones), bits)


def isqrt(raw: Tensor) -> Tensor:
    """``floor(sqrt(raw))`` of integers of at least 0, exact over all of int64.

    Raises:
        TypeError: ``raw`` holds no integers.
        ValueError: a value is negative.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint.integer import isqrt
        >>> isqrt(torch.tensor([0, 8, 9, 2**63 - 1])).tolist()
        [0, 2, 3, 3037000499]
    """
    raw = stored("isqrt", raw)
    if bool((raw < 0).any()):
        raise ValueError(f"isqrt: expected integers of at least 0, got {int(raw.min())}")
    root = raw.double().sqrt().long().clamp_max(3037000499)  # off by one at most; larger roots would not fit squared
    root = root - (root * root > raw).long()
    up = root + 1
    return root + (up <= raw.div(up, rounding_mode="floor")).long()


def divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b`` of integers, truncated toward zero.

    Raises:
        TypeError: an operand holds no integers.
        ZeroDivisionError: a divisor is 0.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint.integer import divide
        >>> divide(torch.tensor([7, -7]), torch.tensor([2, 2])).tolist()
        [3, -3]
    """
    a, b = stored("divide", a), stored("divide", b)
    if bool((b == 0).any()):
        raise ZeroDivisionError("divide: expected divisors other than 0")
    return a.div(b, rounding_mode="trunc")
