"""The fixed-point cast as functions: the arguments, what they mean, and what is refused; autograd lives here.

:mod:`fastcifar.fixedpoint.reference` spells the rules out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from . import reference
from .reference import INT_BITS, OVERFLOWS, ROUNDINGS

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
STOCHASTIC = ROUNDINGS.index("stochastic")
_WRAPPING = ("wrap", "wrap_sm")
_ROUNDING = {name: index for index, name in enumerate(ROUNDINGS)}
_OVERFLOW = {name: index for index, name in enumerate(OVERFLOWS)}

__all__ = ["OVERFLOWS", "ROUNDINGS", "from_raw", "quantize", "quantize_trainable", "to_raw"]


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
    r"""The value that ``x`` has as an ``ap_fixed<width, int_bits, rounding, overflow, saturated_bits>``, to the bit::

        quantize(x) = overflow(round(x * 2**F)) * 2**-F,    F = width - int_bits

    First the number is rounded to an integer, then the integer, which a carry may have made larger, is brought into
    ``width`` bits. The gradient to ``x`` is 1 in range and 0 where a number saturates (or, under sat_zero, became 0);
    where numbers wrap it is 1, or with ``wrap_gradient=False`` 0 out of range. There is no second derivative: asking
    for one raises.

    ======================  =====================================================================================
    rounding                to the nearest grid point, a tie ...
    ======================  =====================================================================================
    ``rnd``                 towards plus infinity
    ``rnd_zero``            towards zero
    ``rnd_min_inf``         towards minus infinity
    ``rnd_inf``             away from zero
    ``rnd_conv``            to the even one
    ``trn``                 (no tie) always down
    ``trn_zero``            (no tie) always towards zero
    ``stochastic``          (no tie) away from zero with a probability of the fraction of the magnitude
    ======================  =====================================================================================

    ======================  =====================================================================================
    overflow                a number out of range becomes
    ======================  =====================================================================================
    ``sat``                 the nearest bound
    ``sat_zero``            0
    ``sat_sym``             the nearest of plus and minus the largest number; so does the least number of a signed type
    ``wrap``                its low ``width`` bits; with N ``saturated_bits`` the upper N bits saturate
    ``wrap_sm``             the same in sign-magnitude style, where bits turn around at the end of the range
    ======================  =====================================================================================

    NaN stays NaN. An infinity is what a large finite number is, a multiple of every power of two: it saturates, or its
    low bits are 0. -0 gives 0. A value that ``x``'s dtype cannot hold (a width of 25 to 32 in float32, more than 8 in
    bfloat16, 11 in float16) is rounded to it once more, to nearest, as a conversion from float64 does.

    Args:
        x: any shape; float32, float64, bfloat16 or float16. A layout with gaps is copied once.
        width: W, bits in all, 1 to 32.
        int_bits: I, bits before the binary point, the sign included, -4 to 40 (it may be below 0 or above ``width``).
        signed: two's complement, else ``ap_ufixed``. Default True.
        rounding: one of the above. Default ``"trn"``.
        overflow: one of the above. Default ``"wrap"``.
        saturated_bits: N, 0 to ``width``; it means nothing unless numbers wrap. Default 0.
        seed: of stochastic rounding, an integer or an int64 tensor of one element on ``x``'s device; None draws one
            from torch's generator. The same seed gives the same bits for any number of threads.
        wrap_gradient: whether the gradient passes where numbers wrap. Default True.

    Returns:
        Tensor of ``x``'s shape and dtype.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: ``width``, ``int_bits`` or ``saturated_bits`` out of range, an unknown mode, ``wrap_sm`` without
            sign, or a seed without stochastic rounding.

    Source: the semantics of AMD's ``ap_fixed`` (UG1399, "Arbitrary Precision Fixed-Point Data Types").

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import quantize
        >>> quantize(torch.tensor([0.3, -0.3, 1.9, 2.0]), 4, 2).tolist()  # ap_fixed<4, 2>
        [0.25, -0.5, 1.75, -2.0]
        >>> quantize(torch.tensor([0.3, -0.3, 1.9, 2.0]), 4, 2, rounding="rnd", overflow="sat").tolist()
        [0.25, -0.25, 1.75, 1.75]
    """
    op = "quantize"
    check_x(op, x)
    check_type(op, width, signed, rounding, overflow, saturated_bits)
    check_int_bits(op, int_bits)
    if not _library.serves("fixed_quantize", x):
        return reference.quantize(
            x,
            width,
            int_bits,
            signed=signed,
            rounding=rounding,
            overflow=overflow,
            saturated_bits=saturated_bits,
            seed=_seed(op, seed, rounding, x),
            wrap_gradient=wrap_gradient,
        )
    modes = width, int_bits, signed, _ROUNDING[rounding], _OVERFLOW[overflow], saturated_bits
    given = _seed(op, seed, rounding, x)
    if x.requires_grad and torch.is_grad_enabled():
        return _cast(x, None, given, *modes, wrap_gradient)
    return torch.ops.fastcifar.fixed_quantize.default(x, None, given, *modes)


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
    r""":func:`quantize` with a binary point that is trained: F = round(``frac_bits``), ties to even, kept where
    ``int_bits`` = ``width`` - F is -4 to 40.

    Rounding (of the numbers and of F) passes the gradient on. The gradient to ``x`` is as in :func:`quantize`; that to
    ``frac_bits`` is the sum, over all elements that share it, of the incoming gradient times ::

        ln 2 * (x - out)    in range, and everywhere where numbers wrap and ``wrap_gradient``
        -ln 2 * out         out of range

    Its products are summed in float64 in an order that does not depend on threads or the instruction set. There is no
    second derivative: asking for one raises.

    Args:
        x: as in :func:`quantize`.
        frac_bits: f, a floating tensor that broadcasts against ``x`` and has at most one dimension above 1: a scalar
            for all of ``x``, or ``[C, 1, 1]`` for one a channel of ``[B, C, H, W]``. NaN makes NaN.
        width, signed, rounding, overflow, saturated_bits, seed, wrap_gradient: as in :func:`quantize`, with the
            defaults of training: ``rounding="rnd_conv"``, ``overflow="sat"``.

    Returns:
        Tensor of ``x``'s shape and dtype.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: as :func:`quantize`, or ``frac_bits`` does not broadcast like that or is on another device.

    Source: "Trainable Fixed-Point Quantization for Deep Learning Acceleration on FPGAs" (QFX), 2024, whose abstract has
    the cast and its trainable binary point; the gradient is that of the straight-through estimator.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import quantize_trainable
        >>> frac_bits = torch.tensor(2.3, requires_grad=True)
        >>> quantize_trainable(torch.tensor([0.3, 9.0]), frac_bits, 4).sum().backward()
        >>> round(frac_bits.grad.item(), 4)  # ln 2 (0.3 - 0.25) - ln 2 1.75
        -1.1784
    """
    op = "quantize_trainable"
    check_x(op, x)
    check_type(op, width, signed, rounding, overflow, saturated_bits)
    _check_frac_bits(op, frac_bits, x)
    given = _seed(op, seed, rounding, x)
    if not _library.serves("fixed_quantize", x):
        return reference.quantize_trainable(
            x,
            frac_bits,
            width,
            signed=signed,
            rounding=rounding,
            overflow=overflow,
            saturated_bits=saturated_bits,
            seed=given,
            wrap_gradient=wrap_gradient,
        )
    if frac_bits.dtype not in (torch.float32, torch.float64):
        frac_bits = frac_bits.float()
    modes = width, 0, signed, _ROUNDING[rounding], _OVERFLOW[overflow], saturated_bits
    if (x.requires_grad or frac_bits.requires_grad) and torch.is_grad_enabled():
        return _cast(x, frac_bits, given, *modes, wrap_gradient)
    return torch.ops.fastcifar.fixed_quantize.default(x, frac_bits, given, *modes)


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
    """The integer that is stored for :func:`quantize`'s value, ``quantize(x, ...) * 2**(width - int_bits)``, exact for
    every width. NaN gives 0. There is no gradient.

    Args:
        x, width, int_bits, signed, rounding, overflow, saturated_bits, seed: as in :func:`quantize`.

    Returns:
        int32 of ``x``'s shape; int64 for 32 bits without sign, which int32 does not hold.

    Raises:
        TypeError, ValueError: as :func:`quantize`.

    Source: as :func:`quantize`; ``ap_fixed``'s ``range()`` as a number.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import to_raw
        >>> to_raw(torch.tensor([0.3, -0.3, 1.9, 2.0]), 4, 2).tolist()
        [1, -2, 7, -8]
    """
    op = "to_raw"
    check_x(op, x)
    check_type(op, width, signed, rounding, overflow, saturated_bits)
    check_int_bits(op, int_bits)
    given = _seed(op, seed, rounding, x)
    x = x.detach()
    if not _library.serves("fixed_to_raw", x):
        return reference.to_raw(
            x,
            width,
            int_bits,
            signed=signed,
            rounding=rounding,
            overflow=overflow,
            saturated_bits=saturated_bits,
            seed=given,
        )
    return torch.ops.fastcifar.fixed_to_raw.default(
        x, given, width, int_bits, signed, _ROUNDING[rounding], _OVERFLOW[overflow], saturated_bits
    )


def from_raw(
    raw: Tensor, width: int, int_bits: int, *, signed: bool = True, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The value of stored integers, ``raw * 2**(int_bits - width)``, rounded to ``dtype`` once.

    Args:
        raw: an integer tensor of any shape. Its values are not looked at: one that does not fit in ``width`` bits
            gives the value that the formula gives.
        width, int_bits, signed: of the type, as in :func:`quantize`.
        dtype: float32 (default), float64, bfloat16 or float16.

    Returns:
        Tensor of ``raw``'s shape.

    Raises:
        TypeError: ``raw`` is not an integer tensor, or ``dtype`` not floating.
        ValueError: ``width`` or ``int_bits`` out of range.

    Source: as :func:`quantize`.

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import from_raw
        >>> from_raw(torch.tensor([1, -2, 7, -8]), 4, 2).tolist()
        [0.25, -0.5, 1.75, -2.0]
    """
    op = "from_raw"
    if not isinstance(raw, Tensor) or raw.dtype not in INTEGERS:
        got = raw.dtype if isinstance(raw, Tensor) else type(raw).__name__
        raise TypeError(f"{op}: expected raw to be an integer tensor, got {got}")
    if dtype not in FLOATING:
        raise TypeError(f"{op}: expected dtype float32, float64, bfloat16 or float16, got {dtype}")
    check_type(op, width, signed, "trn", "wrap", 0)
    check_int_bits(op, int_bits)
    return reference.from_raw(raw, width, int_bits, dtype=dtype)


# ---- what is refused -------------------------------------------------------------------------------------------------


def check_x(op: str, x: Tensor) -> None:
    """Raises in the name of ``op`` unless ``x`` is a dense floating tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected x to be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: expected x in float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: expected a dense x, got {str(x.layout).removeprefix('torch.')}")


def check_type(op: str, width: int, signed: bool, rounding: str, overflow: str, saturated_bits: int) -> None:
    """Raises in the name of ``op`` unless these make a type."""
    for name, value in (("width", width), ("saturated_bits", saturated_bits)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{op}: expected {name} to be an integer, got {value!r}")
    if not isinstance(signed, bool):
        raise TypeError(f"{op}: expected signed to be True or False, got {signed!r}")
    if not 1 <= width <= 32:
        raise ValueError(f"{op}: expected width of 1 to 32, got {width}")
    if rounding not in _ROUNDING:
        raise ValueError(f"{op}: expected rounding to be one of {', '.join(ROUNDINGS)}; got {rounding!r}")
    if overflow not in _OVERFLOW:
        raise ValueError(f"{op}: expected overflow to be one of {', '.join(OVERFLOWS)}; got {overflow!r}")
    if overflow == "wrap_sm" and not signed:
        raise ValueError(f"{op}: expected a signed type under wrap_sm, as ap_ufixed has no such mode; got signed=False")
    if not 0 <= saturated_bits <= width:
        raise ValueError(f"{op}: expected saturated_bits of 0 to width = {width}, got {saturated_bits}")


def check_int_bits(op: str, int_bits: int) -> None:
    if not isinstance(int_bits, int) or isinstance(int_bits, bool):
        raise TypeError(f"{op}: expected int_bits to be an integer, got {int_bits!r}")
    if not INT_BITS[0] <= int_bits <= INT_BITS[1]:
        raise ValueError(f"{op}: expected int_bits of {INT_BITS[0]} to {INT_BITS[1]}, got {int_bits}")


def _check_frac_bits(op: str, frac_bits: Tensor, x: Tensor) -> None:
    if not isinstance(frac_bits, Tensor) or frac_bits.dtype not in FLOATING:
        got = frac_bits.dtype if isinstance(frac_bits, Tensor) else type(frac_bits).__name__
        raise TypeError(f"{op}: expected frac_bits to be a floating tensor, got {got}")
    if frac_bits.device != x.device:
        raise ValueError(f"{op}: expected frac_bits on x's device {x.device}, got {frac_bits.device}")
    shape = frac_bits.shape
    if not shape:
        return
    pairs = zip(reversed(shape), reversed(x.shape), strict=False)
    fits = len(shape) <= x.dim() and all(a == 1 or a == b for a, b in pairs)
    if not fits or len([size for size in shape if size != 1]) > 1:
        raise ValueError(
            f"{op}: expected frac_bits to broadcast against x {tuple(x.shape)} with at most one dimension above 1, "
            f"got {tuple(shape)}"
        )


def _seed(op: str, seed: Tensor | int | None, rounding: str, x: Tensor) -> Tensor | None:
    """The seed as the op takes it: a tensor, so that a GPU is not waited for; drawn where none is given."""
    if rounding != "stochastic":
        if seed is not None:
            raise ValueError(f"{op}: expected no seed unless rounding is stochastic, got one with {rounding}")
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=x.device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            raise ValueError(
                f"{op}: expected seed to be one int64 on {x.device}, got {tuple(seed.shape)} {seed.dtype} on "
                f"{seed.device}"
            )
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"{op}: expected seed to be an integer or a tensor, got {seed!r}")
    return torch.full((), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=x.device)


# ---- autograd --------------------------------------------------------------------------------------------------------


class _Cast(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, frac_bits, seed, width, int_bits, signed, rounding, overflow, saturated_bits, wrap_gradient):
        modes = width, int_bits, signed, rounding, overflow, saturated_bits
        return torch.ops.fastcifar.fixed_quantize.default(x, frac_bits, seed, *modes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, frac_bits, seed, *ctx.modes = inputs
        ctx.passes = frac_bits is None and OVERFLOWS[ctx.modes[4]] in _WRAPPING and ctx.modes[-1]
        if not ctx.passes:
            ctx.save_for_backward(x, frac_bits, seed)

    @staticmethod
    def backward(ctx, grad):
        rest = (None,) * 8
        if ctx.passes:
            return grad, None, *rest
        x, frac_bits, seed = ctx.saved_tensors
        wants = ctx.needs_input_grad[:2]
        grad_x, grad_frac_bits = torch.ops.fastcifar.fixed_quantize_backward.default(
            grad, x, frac_bits, seed, *ctx.modes, *wants
        )
        to_x = _library.differentiable_once("quantize", grad_x, grad, x, frac_bits) if wants[0] else None
        if not wants[1]:
            return to_x, None, *rest
        to_frac_bits = grad_frac_bits.view(frac_bits.shape).to(frac_bits.dtype)
        return to_x, _library.differentiable_once("quantize_trainable", to_frac_bits, grad, x, frac_bits), *rest


_cast = _library.direct_apply(_Cast)
