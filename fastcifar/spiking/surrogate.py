"""Surrogate gradients: what stands in for the derivative of the Heaviside step.

The forward pass of every spiking neuron is ``s = 1 if h >= v_threshold else 0``; the derivative of that is zero almost
everywhere, so training replaces it by ``g(u)`` with ``u = h - v_threshold``. Names and default widths are
SpikingJelly's, so a network trained there trains the same here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """Base class: a named bell curve ``g(u)`` of width ``1 / alpha``.

    Args:
        alpha: steepness, a positive finite float (1 / membrane units).

    Raises:
        ValueError: ``alpha`` is not a positive finite number.
    """

    alpha: float = 1.0

    name: ClassVar[str]
    kernel_id: ClassVar[int]  # the number by which the kernels know it (csrc/cpu/spiking.h)

    def __post_init__(self) -> None:
        if not (isinstance(self.alpha, (int, float)) and math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(
                f"{type(self).__name__}: expected alpha to be a positive finite number, got {self.alpha!r}"
            )

    def grad(self, u: Tensor) -> Tensor:
        """``g(u)``, elementwise, in plain PyTorch.

        Args:
            u: membrane potential above threshold, ``h - v_threshold``, any shape and floating dtype.
        """
        raise NotImplementedError

    def __call__(self, u: Tensor) -> Tensor:
        """Spikes of ``u`` (1 where ``u >= 0``), with :meth:`grad` as their derivative."""
        return _Heaviside.apply(u, self)


@dataclass(frozen=True)
class ATan(Surrogate):
    r"""``g(u) = (a / 2) / (1 + (pi / 2 * a * u)^2)``, SpikingJelly's ``surrogate.ATan``."""

    alpha: float = 2.0
    name: ClassVar[str] = "atan"
    kernel_id: ClassVar[int] = 0

    def grad(self, u: Tensor) -> Tensor:
        return (self.alpha / 2) / (1 + (math.pi / 2 * self.alpha * u).square())


@dataclass(frozen=True)
class Sigmoid(Surrogate):
    r"""``g(u) = a * sigmoid(a u) * (1 - sigmoid(a u))``, SpikingJelly's ``surrogate.Sigmoid``.

    Computed as ``a * e / (1 + e)^2`` with ``e = exp(-|a u|)``, which neither overflows nor cancels.
    """

    alpha: float = 4.0
    name: ClassVar[str] = "sigmoid"
    kernel_id: ClassVar[int] = 1

    def grad(self, u: Tensor) -> Tensor:
        e = torch.exp(-(self.alpha * u).abs())
        return self.alpha * e / (1 + e).square()


@dataclass(frozen=True)
class PiecewiseQuadratic(Surrogate):
    r"""``g(u) = max(0, a - a^2 |u|)``, the triangle; SpikingJelly's ``surrogate.PiecewiseQuadratic``."""

    alpha: float = 1.0
    name: ClassVar[str] = "piecewise_quadratic"
    kernel_id: ClassVar[int] = 2

    def grad(self, u: Tensor) -> Tensor:
        triangle = self.alpha - self.alpha**2 * u.abs()
        return triangle.masked_fill(u.abs() > 1 / self.alpha, 0)


@dataclass(frozen=True)
class Rectangular(Surrogate):
    r"""``g(u) = a`` where ``|u| < 1 / (2 a)``, else 0; SpikingJelly's ``surrogate.Rect``."""

    alpha: float = 1.0
    name: ClassVar[str] = "rectangular"
    kernel_id: ClassVar[int] = 3

    def grad(self, u: Tensor) -> Tensor:
        return self.alpha * (u.abs() < 0.5 / self.alpha).to(u.dtype)


class _Heaviside(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(u, surrogate):
        return (u >= 0).to(u.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        u, ctx.surrogate = inputs
        ctx.save_for_backward(u)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad * ctx.surrogate.grad(u), None


BY_NAME: dict[str, Surrogate] = {cls.name: cls() for cls in (ATan, Sigmoid, PiecewiseQuadratic, Rectangular)}


def resolve(surrogate: str | Surrogate, op: str = "surrogate") -> Surrogate:
    """The surrogate that ``surrogate`` names, or ``surrogate`` itself.

    Args:
        surrogate: one of ``"atan"``, ``"sigmoid"``, ``"piecewise_quadratic"``, ``"rectangular"`` (each with
            SpikingJelly's default alpha), or a :class:`Surrogate` with an alpha of its own.
        op: the operation to name in an error.

    Raises:
        ValueError: the name is unknown.
        TypeError: it is neither a name nor a :class:`Surrogate`.
    """
    if isinstance(surrogate, str):
        try:
            return BY_NAME[surrogate]
        except KeyError:
            known = ", ".join(sorted(BY_NAME))
            raise ValueError(f"{op}: expected surrogate to be one of {known}; got {surrogate!r}") from None
    if type(surrogate) in _KERNEL_TYPES:
        return surrogate
    raise TypeError(
        f"{op}: expected surrogate to be a name or one of fastcifar.spiking.surrogate's classes; "
        f"got {type(surrogate).__name__}"
    )


_KERNEL_TYPES = frozenset(type(s) for s in BY_NAME.values())
