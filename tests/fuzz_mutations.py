"""What a hostile caller gives in place of an argument, for tests/fuzz.py."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

INTEGERS = (
    -(2**63),
    -(2**31),
    -7,
    -2,
    -1,
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    16,
    33,
    64,
    65,
    1000,
    2**20,
    2**31,
    2**32,
    2**62,
    2**63 - 1,
)
NUMBERS = (0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e-320, 1e-30, 1e30, 1e308, math.inf, -math.inf, math.nan)
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
)  # fmt: skip


def other_tensor(t: Tensor, rng: random.Random) -> Any:
    """What a tensor may be replaced by."""
    kind = rng.randrange(13) if t.numel() or rng.random() < 0.3 else 12
    if kind == 0:
        return t.to(rng.choice(DTYPES))
    if kind == 1:
        return t[:0] if t.dim() else t.reshape(1)[:0]
    if kind == 2:
        return t.unsqueeze(rng.randint(0, t.dim()))
    if kind == 3:
        return t.select(rng.randrange(t.dim()), 0) if t.dim() and min(t.shape) else t.new_zeros(())
    if kind == 4 and t.dim():
        return t.transpose(0, -1)
    if kind == 5 and t.dim():
        return t.narrow(rng.randrange(t.dim()), 0, 0 if min(t.shape) == 0 else 1)
    if kind == 6 and t.dim():
        return t[..., :1].expand_as(t) if t.shape[-1] else t
    if kind == 7 and t.dim() and t.numel():
        return torch.cat((t, t), rng.randrange(t.dim()))
    if kind == 8:
        return with_hostile_value(t, rng)
    if kind == 9 and t.dim() and t.numel():
        return torch.stack((t, t), -1)[..., 0]
    if kind == 10:
        generator = torch.Generator().manual_seed(rng.randrange(2**60))
        shape = tuple(rng.choice((0, 1, 2, 3, 5, 8)) for _ in range(rng.randrange(6)))
        return torch.randn(shape, generator=generator).to(t.dtype)
    if kind == 11:  # as many elements as fit nowhere: none
        return t.new_empty((0, rng.choice((3, 2**31, 2**62))))
    return None


def with_hostile_value(t: Tensor, rng: random.Random) -> Tensor:
    hostile = t.clone(memory_format=torch.contiguous_format)
    if hostile.numel():
        value = torch.tensor(rng.choice(NUMBERS), dtype=torch.float64)
        if not t.is_floating_point():
            value = torch.tensor(rng.choice((-(2**62), -1, 0, 1, 2, 100, 2**31, 2**62)))
        hostile.view(-1)[rng.randrange(hostile.numel())] = value.to(t.dtype)
    return hostile


def other(value: Any, rng: random.Random) -> Any:
    """What an argument may be replaced by."""
    if isinstance(value, Tensor):
        return other_tensor(value, rng)
    if value is None:
        return rng.choice((None, torch.zeros(1), torch.ones(3, 5), torch.zeros((), dtype=torch.int64), 0.0))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(INTEGERS)
    if isinstance(value, float):
        return rng.choice(NUMBERS)
    if isinstance(value, list | tuple):
        items = list(value)
        how = rng.randrange(3)
        if how == 0 and items:
            items.pop(rng.randrange(len(items)))
        elif how == 1 and items:
            items.append(items[-1])
        elif items:
            place = rng.randrange(len(items))
            items[place] = other(items[place], rng)
        return items
    return value


def relaid(t: Tensor, rng: random.Random) -> Tensor:
    """The same values in another layout."""
    kind = rng.randrange(4) if t.dim() else 3
    if kind == 0:
        return t.contiguous()
    if kind == 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 2:
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
        return wide[..., ::2].copy_(t)
    order = rng.sample(range(t.dim()), t.dim())
    back = [order.index(d) for d in range(t.dim())]
    return t.permute(order).contiguous().permute(back)
