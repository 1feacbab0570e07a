"""Matrix products and convolutions of stored integers, exact whatever their size."""

from __future__ import annotations

from torch import Tensor

FLOAT64_EXACT = 1 << 53  # sums of products up to here are exact in float64, in any order

__all__ = ["integer_matmul"]


def integer_matmul(a: Tensor, b: Tensor, a_largest: int, b_largest: int) -> Tensor:
    """``a @ b.T`` for integers ``a`` ``[..., K]`` and ``b`` ``[N, K]``, int64."""
    shape = (*a.shape[:-1], b.shape[0])
    a = a.reshape(-1, a.shape[-1])
    if a.shape[-1] * a_largest * b_largest <= FLOAT64_EXACT:
        return (a.double() @ b.double().T).long().view(shape)
    return (a.long() @ b.long().T).view(shape)
