"""Refusals that the families share."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def expect_type(op: str, kind: type | tuple[type, ...], article: str, **given: Any) -> None:
    """Raises the TypeError of what is not a ``kind``; ``article`` is the words for one."""
    for name, value in given.items():
        if not isinstance(value, kind):
            raise TypeError(f"{op}: expected {name} to be {article}, got {type(value).__name__}")


def expect_tensors(op: str, **given: Any) -> None:
    """Raises the TypeError of what is not a tensor."""
    expect_type(op, Tensor, "a tensor", **given)
