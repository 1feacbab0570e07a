"""Numbers with few binary digits, with which products are shifts and additions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from . import reference
from .functional import check_x


def limit_digits(x: Tensor, k: int, *, signed_digits: bool = False) -> Tensor:
    """``x`` with at most ``k`` digits, so that a product with it is ``k`` shifts and additions. The gradient passes.

    Without ``signed_digits`` the k highest set bits of the magnitude stay and the others become 0. With it the result
    is a sum of k powers of two with signs of their own, each the nearest to what the earlier ones have left (3 2^n goes
    up). A power of two scales both, so it makes no difference whether ``x`` is a value or a stored integer. Exact; a
    subnormal number counts as 0, NaN and infinity stay.

    Args:
        x: any shape; float32, float64, bfloat16 or float16.
        k: digits, above 0.
        signed_digits: digits of -1, 0 and 1. Default False.

    Returns:
        Tensor of ``x``'s shape and dtype.

    Raises:
        TypeError: ``x`` is not a floating tensor, or ``k`` not an integer.
        ValueError: ``k`` is below 1.

    Source: "Trainable Fixed-Point Quantization for Deep Learning Acceleration on FPGAs" (QFX), 2024, whose
    multiplier-free quantization limits the number of ones; the greedy signed digits are our reading of "K-hot".

    Example:
        >>> import torch
        >>> from fastcifar.fixedpoint import limit_digits
        >>> x = torch.tensor([7.0, -5.0, 11.0])
        >>> limit_digits(x, 2).tolist(), limit_digits(x, 2, signed_digits=True).tolist()
        ([6.0, -5.0, 10.0], [7.0, -5.0, 12.0])
    """
    check_x("limit_digits", x)
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"limit_digits: expected k to be an integer, got {k!r}")
    if k < 1:
        raise ValueError(f"limit_digits: expected k above 0, got {k}")
    if not _library.serves("limit_digits", x):
        return reference.limit_digits(x, k, signed_digits)
    k = min(k, reference.MOST_DIGITS)
    if x.requires_grad and torch.is_grad_enabled():
        return _apply(x, k, signed_digits)
    return torch.ops.fastcifar.limit_digits.default(x, k, signed_digits)


class _Digits(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, k, signed_digits):
        return torch.ops.fastcifar.limit_digits.default(x, k, signed_digits)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        return _library.differentiable_once("limit_digits", grad, *ctx.saved_tensors), None, None


_apply = _library.direct_apply(_Digits)
