"""The type of a fixed-point number, ``ap_fixed<W, I, Q, O, N>`` or ``ap_ufixed``, and the types of results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ROUNDINGS = ("rnd", "rnd_zero", "rnd_min_inf", "rnd_inf", "rnd_conv", "trn", "trn_zero", "stochastic")
OVERFLOWS = ("sat", "sat_zero", "sat_sym", "wrap", "wrap_sm")

__all__ = ["FixedType"]


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"FixedType: expected {name} to be an integer, got {value!r}")
    return value


@dataclass(frozen=True)
class FixedType:
    """A fixed-point type: the stored integer ``raw`` of ``width`` bits stands for ``raw * 2 ** -frac_bits``.

    Results of arithmetic have types that hold every possible result, with the default modes:

    ========= ================================ ===================== ==========================================
    operation width                            int_bits              signed
    ========= ================================ ===================== ==========================================
    a + b     i + 1 + max(F1, F2)              i + 1                 S1 or S2; i = max(I1 + (S2 and not S1),
                                                                     I2 + (S1 and not S2))
    a - b     as a + b                         as a + b              always
    a * b     W1 + W2                          I1 + I2               S1 or S2
    a / b     S2 + W1 + max(F2, 0)             S2 + I1 + F2          S1 or S2; the quotient is truncated
                                                                     toward zero
    -a        W1 + 1                           I1 + 1                always
    ========= ================================ ===================== ==========================================

    Args:
        width: bits in all, W; at least 1. What is stored has at most 64 bits (63 unsigned), a cast from floats at most
            32; wider types only say what a result would need.
        int_bits: bits before the binary point, I, the sign's among them; it may be negative or above ``width``.
        signed: two's complement where True, which is the default.
        rounding: what a cast to this type does with lower bits: rnd, rnd_zero, rnd_min_inf, rnd_inf, rnd_conv, trn
            (default), trn_zero or stochastic.
        overflow: what it then does with higher bits: sat, sat_zero, sat_sym, wrap (default) or wrap_sm.
        saturated_bits: N of wrap and wrap_sm, 0 to ``width``. Default 0.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a value is not as described, or wrap_sm is asked of an unsigned type.

    Source: AMD's ``ap_fixed`` (Vitis HLS User Guide UG1399, "Arbitrary Precision Fixed-Point Data Types").

    Example:
        >>> from fastcifar.fixedpoint.types import FixedType
        >>> a, b = FixedType(8, 4), FixedType(6, 1, signed=False)
        >>> a * b
        FixedType(width=14, int_bits=5, signed=True, rounding='trn', overflow='wrap', saturated_bits=0)
        >>> str(a + b), a.frac_bits, a.lowest, a.highest
        ('ap_fixed<10, 5>', 4, -128, 127)
    """

    width: int
    int_bits: int
    signed: bool = True
    rounding: str = "trn"
    overflow: str = "wrap"
    saturated_bits: int = 0

    def __post_init__(self) -> None:
        if _integer("width", self.width) < 1:
            raise ValueError(f"FixedType: expected a width of at least 1 bit, got {self.width}")
        _integer("int_bits", self.int_bits)
        if not isinstance(self.signed, bool):
            raise TypeError(f"FixedType: expected signed to be True or False, got {self.signed!r}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"FixedType: expected rounding to be one of {', '.join(ROUNDINGS)}; got {self.rounding!r}")
        if self.overflow not in OVERFLOWS:
            raise ValueError(f"FixedType: expected overflow to be one of {', '.join(OVERFLOWS)}; got {self.overflow!r}")
        if self.overflow == "wrap_sm" and not self.signed:
            raise ValueError("FixedType: expected a signed type with overflow 'wrap_sm', got an unsigned one")
        if not 0 <= _integer("saturated_bits", self.saturated_bits) <= self.width:
            raise ValueError(f"FixedType: expected saturated_bits of 0 to {self.width}, got {self.saturated_bits}")

    @property
    def frac_bits(self) -> int:
        """Bits after the binary point, F = W - I."""
        return self.width - self.int_bits

    @property
    def lowest(self) -> int:
        """The least stored integer."""
        return -(1 << (self.width - 1)) if self.signed else 0

    @property
    def highest(self) -> int:
        """The greatest stored integer."""
        return (1 << (self.width - 1)) - 1 if self.signed else (1 << self.width) - 1

    @property
    def largest(self) -> int:
        """The greatest magnitude of a stored integer."""
        return max(-self.lowest, self.highest)

    @property
    def storable(self) -> bool:
        """Whether every value fits the int64 that stores it."""
        return self.width <= (64 if self.signed else 63)

    def modes(self, rounding: str, overflow: str, saturated_bits: int = 0) -> FixedType:
        """The same grid and range with other modes."""
        return FixedType(self.width, self.int_bits, self.signed, rounding, overflow, saturated_bits)

    def __add__(self, other: FixedType) -> FixedType:
        return self._sum(other, self.signed or other.signed)

    def __sub__(self, other: FixedType) -> FixedType:
        return self._sum(other, True)

    def _sum(self, other: FixedType, signed: bool) -> FixedType:
        int_bits = 1 + max(
            self.int_bits + (other.signed and not self.signed), other.int_bits + (self.signed and not other.signed)
        )
        return FixedType(int_bits + max(self.frac_bits, other.frac_bits), int_bits, signed)

    def __mul__(self, other: FixedType) -> FixedType:
        return FixedType(self.width + other.width, self.int_bits + other.int_bits, self.signed or other.signed)

    def __truediv__(self, other: FixedType) -> FixedType:
        return FixedType(
            other.signed + self.width + max(other.frac_bits, 0),
            other.signed + self.int_bits + other.frac_bits,
            self.signed or other.signed,
        )

    def __neg__(self) -> FixedType:
        return FixedType(self.width + 1, self.int_bits + 1, True)

    def total(self, count: int) -> FixedType:
        """The type of a sum of ``count`` values: as many bits more as ``count`` terms can carry."""
        carry = max(count - 1, 0).bit_length()
        return FixedType(self.width + carry, self.int_bits + carry, self.signed)

    def __str__(self) -> str:
        modes = [f"AP_{self.rounding.upper()}", f"AP_{self.overflow.upper()}", str(self.saturated_bits)]
        default = ["AP_TRN", "AP_WRAP", "0"]
        while modes and modes[-1] == default[len(modes) - 1]:
            modes.pop()
        return f"ap_{'' if self.signed else 'u'}fixed<{', '.join([str(self.width), str(self.int_bits), *modes])}>"


def common(types: Iterable[FixedType]) -> FixedType:
    """The narrowest type that holds every value of each of these, with default modes."""
    types = list(types)
    signed = any(t.signed for t in types)
    int_bits = max(t.int_bits + (signed and not t.signed) for t in types)
    return FixedType(int_bits + max(t.frac_bits for t in types), int_bits, signed)
