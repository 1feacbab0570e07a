"""What is beside a step: counted normal numbers, and what dynamic thresholding clamps at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import reference

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

__all__ = ["dynamic_threshold", "normal_numbers"]


def normal_numbers(seed: int | Tensor, n: int, *, stream: int = 0) -> Tensor:
    """Numbers 0 to n - 1 of a stream of standard normal numbers: Philox 4x32-7 and Box and Muller's transform.

    Any number is a function of its place, of ``seed`` and of ``stream`` alone: 64 n' + 16 j + c is made of word j of
    the counter 16 n' + c under the key ``seed``. The radius has 23 bits, so the largest magnitude is 5.77.

    Args:
        seed: a 64-bit integer, or an int64 tensor of one element, on whose device the numbers are made.
        n: how many.
        stream: which of 2^63 independent streams of the seed. Default 0.

    Returns:
        float32 ``[n]``.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); Box and Muller (1958).

    Example:
        >>> from fastcifar.diffusion import normal_numbers
        >>> bool((normal_numbers(1, 100)[:10] == normal_numbers(1, 10)).all())
        True
    """
    op = "normal_numbers"
    for name, value in (("n", n), ("stream", stream)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{op}: expected {name} to be an integer, got {type(value).__name__}")
    if not 0 <= n < 2**40 or not 0 <= stream < 2**63:
        raise ValueError(f"{op}: expected n below 2^40 and stream of 0 to 2^63 - 1, got {n} and {stream}")
    like = seed if isinstance(seed, Tensor) else torch.empty(0)
    key = seed_tensor(op, seed, like)
    if _library.serves(op, key):
        return torch.ops.fastcifar.normal_numbers.default(key, stream, n)
    return reference.normal_numbers(int(key), stream, n).to(key.device)


def dynamic_threshold(x0: Tensor, ratio: float = 0.995, max_value: float = 1.0) -> Tensor:
    """Per sample, what dynamic thresholding clamps at: ``s = min(max(quantile(|x0|, ratio), 1), max_value)``.

    The quantile is interpolated as ``torch.quantile`` does. Clamping to -s...s and dividing by s is the step whose row
    ``converted`` is divided by s and whose limit is 1.

    Args:
        x0: ``[B, ...]``, the predicted image; float32 or float64 (half precision is read as float32).
        ratio: the quantile, 0 to 1. Default 0.995.
        max_value: the largest s, at least 1. The default 1, diffusers' ``sample_max_value``, makes it a plain clamp.

    Returns:
        ``[B]`` in float32 or float64; NaN where a sample has one.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, or out of range.

    Source: Saharia et al., Imagen (NeurIPS 2022), section 2.3.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import dynamic_threshold
        >>> dynamic_threshold(torch.tensor([[0.5, -3.0], [0.1, 0.2]]), 1.0, max_value=2.0).tolist()
        [2.0, 1.0]
    """
    op = "dynamic_threshold"
    if not isinstance(x0, Tensor) or x0.dtype not in FLOATING:
        got = x0.dtype if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(f"{op}: expected x0 to be a tensor in float32, float64, bfloat16 or float16, got {got}")
    if x0.dim() == 0 or (x0.shape[0] and x0[0].numel() == 0):
        raise ValueError(f"{op}: expected x0 [B, ...] with elements, got {tuple(x0.shape)}")
    ratio, max_value = checked_number(op, "ratio", ratio), checked_number(op, "max_value", max_value)
    if not 0 <= ratio <= 1 or not max_value >= 1:
        raise ValueError(f"{op}: expected ratio of 0 to 1 and max_value of at least 1, got {ratio} and {max_value}")
    rows = x0.detach().reshape(x0.shape[0], -1) if x0.shape[0] else x0.detach().reshape(0, 1)
    rows = rows.to(_library.state_dtype(x0.dtype))
    if _library.serves("magnitude_quantile", rows):
        quantile = torch.ops.fastcifar.magnitude_quantile.default(rows, ratio)
    else:
        quantile = reference.magnitude_quantile(rows, ratio)
    return quantile.clamp(1.0, max_value)


# ---- what is refused -------------------------------------------------------------------------------------------------


def checked_number(op: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: expected {name} to be a number, got {type(value).__name__}")
    if value != value:
        raise ValueError(f"{op}: expected {name} to be a number, got nan")
    return float(value)


def seed_tensor(op: str, seed: Any, x: Tensor) -> Tensor:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            raise TypeError(f"{op}: expected a seed of one int64 on x's device, got {seed.dtype} {tuple(seed.shape)}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}: expected seed to be an integer or a tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: expected a seed of 64 bits, got {seed}")
    return torch.tensor(seed, device=x.device)
