"""Tensors of fixed-point numbers: stored integers with a type, and operators whose results grow to hold every value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import functional, integer
from .reference import INT_BITS
from .types import FixedType

__all__ = ["FixedTensor"]


def storage_dtype(type: FixedType) -> torch.dtype:
    """The narrowest of int16, int32 and int64 that holds every stored integer of ``type``."""
    integer.check_storable("FixedTensor", type)
    bits = type.width + (not type.signed)
    return torch.int16 if bits <= 16 else torch.int32 if bits <= 32 else torch.int64


def cast_raw(raw: Tensor, from_frac_bits: int, type: FixedType, largest: int) -> Tensor:
    """:func:`integer.recast` of integers of at most ``largest`` in magnitude: the same bits, by the kernel of the cast
    from floats where float64 holds the integers (an integer is a float whose binary point is moved)."""
    int_bits = type.int_bits + from_frac_bits
    chance = type.rounding == "stochastic"
    if chance or largest > 1 << 53 or type.width > 32 or not INT_BITS[0] <= int_bits <= INT_BITS[1]:
        return integer.recast(raw, from_frac_bits, type)
    return _to_raw(raw.double(), type, int_bits)


def _to_raw(x: Tensor, type: FixedType, int_bits: int, seed: Tensor | int | None = None) -> Tensor:
    return functional.to_raw(
        x,
        type.width,
        int_bits,
        signed=type.signed,
        rounding=type.rounding,
        overflow=type.overflow,
        saturated_bits=type.saturated_bits,
        seed=seed,
    )


def _passed_on(name: str) -> Callable[..., FixedTensor]:
    def method(self: FixedTensor, *args: Any, **kwargs: Any) -> FixedTensor:
        return FixedTensor.trusted(getattr(self.raw, name)(*args, **kwargs), self.type)

    method.__name__, method.__qualname__ = name, f"FixedTensor.{name}"
    method.__doc__ = f"``torch.Tensor.{name}`` of the stored integers."
    return method


class FixedTensor:
    """Numbers ``raw * 2 ** -type.frac_bits``, as integers with a type.

    ``+ - * /`` and ``-x`` are exact and give the types of :class:`~fastcifar.fixedpoint.types.FixedType`'s table (a
    quotient is truncated toward zero); shapes broadcast. ``<<`` and ``>>`` keep the type: they move the bits within
    the width, so that what leaves it on the left is lost, and ``>>`` rounds toward minus infinity, whatever the type's
    modes are. Comparisons are exact across types. An operation whose result would not fit 64 bits raises: cast an
    operand first. An assignment such as ``a += b`` is an operation of full width; :meth:`cast` brings it back.

    Indexing, ``shape``, ``dim``, ``numel``, ``view``, ``reshape``, ``flatten``, ``permute``, ``transpose``,
    ``unsqueeze``, ``squeeze``, ``expand``, ``movedim``, ``contiguous`` and ``to`` (a device) are those of the integers.

    Args:
        raw: stored integers, int8 to int64, any shape, within the range of ``type``.
        type: their type, of at most 64 bits (63 unsigned).

    Raises:
        TypeError: ``raw`` holds no integers, or ``type`` is no :class:`FixedType`.
        ValueError: a stored integer is out of the range of ``type``, or ``type`` is too wide.

    Source: the operators of ``ap_fixed`` (UG1399).

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import FixedTensor, FixedType
        >>> a = FixedTensor(torch.tensor([24, -40]), FixedType(8, 4))
        >>> b = FixedTensor(torch.tensor([3, 3]), FixedType(4, 2, signed=False))
        >>> (a * b).float().tolist(), str((a * b).type)
        ([1.125, -1.875], 'ap_fixed<12, 6>')
        >>> (a / b).float().tolist(), (a < b).tolist()
        ([2.0, -3.3125], [False, True])
    """

    __slots__ = ("raw", "type")

    def __init__(self, raw: Tensor, type: FixedType) -> None:
        if not isinstance(type, FixedType):
            raise TypeError(f"FixedTensor: expected type to be a FixedType, got {type!r}")
        whole = integer.stored("FixedTensor", raw)
        dtype = storage_dtype(type)
        if whole.numel():
            least, most = (int(t) for t in whole.aminmax())
            if least < type.lowest or most > type.highest:
                raise ValueError(
                    f"FixedTensor: expected stored integers of {type}, {type.lowest} to {type.highest}; "
                    f"got {least if least < type.lowest else most}"
                )
        self.raw, self.type = raw.to(dtype), type

    @classmethod
    def trusted(cls, raw: Tensor, type: FixedType) -> FixedTensor:
        """``FixedTensor(raw, type)`` of integers that are known to be in range, without looking at them."""
        self = object.__new__(cls)
        self.raw, self.type = raw.to(storage_dtype(type)), type
        return self

    @classmethod
    def from_float(cls, x: Tensor, type: FixedType, *, seed: Tensor | int | None = None) -> FixedTensor:
        """The cast of floats to ``type``: :func:`~fastcifar.fixedpoint.to_raw` with its type.

        Args:
            x: any shape; float32, float64, bfloat16 or float16. NaN gives 0.
            type: of at most 32 bits, with int_bits of -4 to 40.
            seed: of stochastic rounding, as there.

        Raises:
            TypeError: ``x`` is not a dense floating tensor, or ``type`` no :class:`FixedType`.
            ValueError: ``type`` is of another size, or a seed without stochastic rounding.

        Example:
            >>> import torch
            >>> from fastcifar.fixedpoint import FixedTensor, FixedType
            >>> FixedTensor.from_float(torch.tensor([0.3, 9.0]), FixedType(4, 2, overflow="sat"))
            FixedTensor([0.25, 1.75], ap_fixed<4, 2, AP_TRN, AP_SAT>)
        """
        op = "from_float"
        functional.check_x(op, x)
        if not isinstance(type, FixedType):
            raise TypeError(f"{op}: expected type to be a FixedType, got {type!r}")
        if type.width > 32 or not INT_BITS[0] <= type.int_bits <= INT_BITS[1]:
            raise ValueError(f"{op}: expected a type of at most 32 bits with int_bits of -4 to 40, got {type}")
        return cls.trusted(_to_raw(x, type, type.int_bits, seed), type)

    def float(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values as floats; one that ``dtype`` cannot hold is rounded to the nearest, ties to even.

        A width of 24 bits is exact in float32, one of 53 in float64.
        """
        if self.type.width > 53 and dtype == torch.float64:
            return self.raw.to(dtype) * 2.0**-self.type.frac_bits
        return (self.raw.double() * 2.0**-self.type.frac_bits).to(dtype)

    def cast(self, type: FixedType) -> FixedTensor:
        """The numbers in another type, by its rounding and overflow modes (:func:`integer.recast`)."""
        return FixedTensor.trusted(cast_raw(self.raw, self.type.frac_bits, type, self.type.largest), type)

    # ---- arithmetic --------------------------------------------------------------------------------------------------

    def _other(self, other: object, what: str) -> FixedTensor:
        if not isinstance(other, FixedTensor):
            raise TypeError(f"FixedTensor: expected {what} with a FixedTensor, got {type(other).__name__}")
        return other

    def _aligned(self, other: FixedTensor, result: FixedType) -> tuple[Tensor, Tensor]:
        integer.check_storable("FixedTensor", result)
        return tuple(t.raw.long() << (result.frac_bits - t.type.frac_bits) for t in (self, other))  # type: ignore[return-value]

    def __add__(self, other: FixedTensor) -> FixedTensor:
        result = self.type + self._other(other, "a sum").type
        a, b = self._aligned(other, result)
        return FixedTensor.trusted(a + b, result)

    def __sub__(self, other: FixedTensor) -> FixedTensor:
        result = self.type - self._other(other, "a difference").type
        a, b = self._aligned(other, result)
        return FixedTensor.trusted(a - b, result)

    def __mul__(self, other: FixedTensor) -> FixedTensor:
        result = self.type * self._other(other, "a product").type
        integer.check_storable("FixedTensor", result)
        return FixedTensor.trusted(self.raw.long() * other.raw.long(), result)

    def __truediv__(self, other: FixedTensor) -> FixedTensor:
        return self.divide(other)

    def divide(self, other: FixedTensor, *, simulation_quirk: bool = False) -> FixedTensor:
        """``self / other``, truncated toward zero.

        Args:
            other: the divisor.
            simulation_quirk: where True, the lowest value of a signed type divided by minus one unit in the last place
                gives the negative of the quotient where the divisor is no wider than the dividend's ``W1 + max(F2, 0)``
                bits, as in the C simulation of ``ap_fixed``, where that quotient overflows.

        Raises:
            ZeroDivisionError: a divisor is 0.
        """
        result = self.type / self._other(other, "a quotient").type
        integer.check_storable("FixedTensor", result)
        a, b = self.raw.long(), other.raw.long()
        raw = integer.divide(a << max(other.type.frac_bits, 0), b)
        dividend = self.type.width + max(other.type.frac_bits, 0)
        if simulation_quirk and self.type.signed and other.type.signed and dividend >= other.type.width:
            raw = torch.where((a == self.type.lowest) & (b == -1), -raw, raw)
        return FixedTensor.trusted(raw, result)

    def __neg__(self) -> FixedTensor:
        result = -self.type
        integer.check_storable("FixedTensor", result)
        return FixedTensor.trusted(-self.raw.long(), result)

    def __lshift__(self, by: int) -> FixedTensor:
        if by < 0:
            return self >> -by
        return FixedTensor.trusted(integer.shift_left(self.raw.long(), by, self.type), self.type)

    def __rshift__(self, by: int) -> FixedTensor:
        if by < 0:
            return self << -by
        return FixedTensor.trusted(self.raw.long() >> min(by, 63), self.type)

    def sqrt(self, type: FixedType | None = None) -> FixedTensor:
        """The square root, rounded down to the grid of ``type``: ``floor(sqrt(raw * 2 ** (2 G - F)))``, G its
        fraction bits, an integer square root with no float in it; then the overflow mode of ``type``.

        Args:
            type: of the result. None: as many fraction bits as here, unsigned, as wide as the largest root needs.

        Raises:
            ValueError: a number is negative, or the integer under the root needs more than 63 bits.
        """
        if type is None:
            int_bits = -((self.type.signed - self.type.int_bits) // 2)
            type = FixedType(max(int_bits + self.type.frac_bits, 1), int_bits, signed=False)
        up = 2 * type.frac_bits - self.type.frac_bits
        if self.type.width - self.type.signed + up > 63:
            raise ValueError(f"sqrt: expected at most 63 bits under the root, got {self.type} on the grid of {type}")
        raw = self.raw.long()
        if bool((raw < 0).any()):
            raise ValueError(f"sqrt: expected numbers of at least 0, got {self.float().min().item()}")
        under = raw << up if up >= 0 else raw >> min(-up, 63)
        return FixedTensor.trusted(integer.recast(integer.isqrt(under), type.frac_bits, type), type)

    def reciprocal(self, type: FixedType | None = None) -> FixedTensor:
        """``1 / x``, truncated toward zero on the grid of ``type``: ``2 ** (F + G) / raw``; then its overflow mode.

        Args:
            type: of the result. None: fraction bits and integer bits exchanged, one integer bit more (and the sign's),
                which holds the reciprocal of every number but 0.

        Raises:
            ZeroDivisionError: a number is 0.
            ValueError: the dividend needs more than 63 bits.
        """
        if type is None:
            int_bits = self.type.frac_bits + 1 + self.type.signed
            type = FixedType(max(int_bits + self.type.int_bits, 1), int_bits, self.type.signed)
        power = self.type.frac_bits + type.frac_bits
        if power > 62:
            raise ValueError(f"reciprocal: expected a dividend of at most 63 bits, got {self.type} and {type}")
        raw = self.raw.long()
        one = torch.full_like(raw, 1 << power if power >= 0 else 0)
        return FixedTensor.trusted(integer.recast(integer.divide(one, raw), type.frac_bits, type), type)

    def sum(self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> FixedTensor:
        """The exact sum over ``dim`` (None: all), as many bits wider as that many terms can carry."""
        dims = tuple(range(self.raw.dim())) if dim is None else dim
        count = 1
        for d in (dims,) if isinstance(dims, int) else dims:
            count *= self.raw.shape[d]
        result = self.type.total(count)
        integer.check_storable("sum", result)
        return FixedTensor.trusted(self.raw.long().sum(dims, keepdim), result)

    def __matmul__(self, other: FixedTensor) -> FixedTensor:
        """The exact matrix product ``[..., M, K] @ [K, N]``, of the type of a sum of K products."""
        from .products import integer_matmul

        self._other(other, "a matrix product")
        if other.raw.dim() != 2 or self.raw.dim() < 2 or self.raw.shape[-1] != other.raw.shape[0]:
            raise ValueError(
                f"matmul: expected shapes [..., M, K] and [K, N], got {tuple(self.shape)} and {tuple(other.shape)}"
            )
        result = (self.type * other.type).total(self.raw.shape[-1])
        integer.check_storable("matmul", result)
        raw = integer_matmul(self.raw, other.raw.T, self.type.largest, other.type.largest)
        return FixedTensor.trusted(raw, result)

    # ---- comparisons -------------------------------------------------------------------------------------------------

    def _compare(self, other: FixedTensor) -> Tensor:
        """-1, 0 or 1, exact for any two types: floors on the coarser grid first, then what lies between its points."""
        a, b = self.raw.long(), self._other(other, "a comparison").raw.long()
        shift = self.type.frac_bits - other.type.frac_bits
        rest_a = rest_b = torch.zeros((), dtype=torch.bool, device=a.device)
        if shift > 0:
            floor = a >> min(shift, 63)
            rest_a, a = a != floor << shift if shift < 64 else a != 0, floor
        elif shift < 0:
            floor = b >> min(-shift, 63)
            rest_b, b = b != floor << -shift if shift > -64 else b != 0, floor
        by_rest = rest_a.long() - rest_b.long()
        return torch.where(a == b, by_rest, (a > b).long() - (a < b).long())

    def __lt__(self, other: FixedTensor) -> Tensor:
        return self._compare(other) < 0

    def __le__(self, other: FixedTensor) -> Tensor:
        return self._compare(other) <= 0

    def __gt__(self, other: FixedTensor) -> Tensor:
        return self._compare(other) > 0

    def __ge__(self, other: FixedTensor) -> Tensor:
        return self._compare(other) >= 0

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        return self._compare(self._other(other, "a comparison")) == 0

    def __ne__(self, other: object) -> Tensor:  # type: ignore[override]
        return self._compare(self._other(other, "a comparison")) != 0

    __hash__ = None  # type: ignore[assignment]

    # ---- shape -------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return self.raw.shape

    @property
    def device(self) -> torch.device:
        return self.raw.device

    view = _passed_on("view")
    reshape = _passed_on("reshape")
    flatten = _passed_on("flatten")
    permute = _passed_on("permute")
    transpose = _passed_on("transpose")
    unsqueeze = _passed_on("unsqueeze")
    squeeze = _passed_on("squeeze")
    expand = _passed_on("expand")
    movedim = _passed_on("movedim")
    contiguous = _passed_on("contiguous")

    def dim(self) -> int:
        return self.raw.dim()

    def numel(self) -> int:
        return self.raw.numel()

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: Any) -> FixedTensor:
        return FixedTensor.trusted(self.raw[index], self.type)

    def to(self, device: torch.device | str) -> FixedTensor:
        return FixedTensor.trusted(self.raw.to(torch.device(device)), self.type)

    def __repr__(self) -> str:
        return f"FixedTensor({self.float(torch.float64).tolist()}, {self.type})"
