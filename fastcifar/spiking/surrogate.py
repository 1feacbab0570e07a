"""Surrogate gradients: what stands in for the derivative of the Heaviside step.

The forward pass of every spiking neuron is ``s = 1 if u >= 0 else 0`` with ``u = h - v_threshold``; the derivative of
that is zero almost everywhere, so training replaces it by ``g(u)``. Names, formulas and default widths are
SpikingJelly's where it has the function (``spikingjelly.activation_based.surrogate``), else snnTorch's. Forms are so
chosen that no intermediate overflows: far from the threshold ``g`` goes to its limit, not to NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, TypeGuard

import torch
from torch import Tensor

Numbers = tuple[float, float, float]
# Below every distance that float32 can hold: `u >= _STRICTLY_ABOVE` is `u > 0`.
_STRICTLY_ABOVE = 2.0**-149


@dataclass(frozen=True)
class Surrogate:
    """Base class of the surrogates that kernels know: a curve ``g(u)`` of a few numbers.

    Raises:
        ValueError: one of its numbers is not finite, or ``alpha`` (where it has one) is not positive.
    """

    name: ClassVar[str]
    kernel_id: ClassVar[int]  # the number by which kernels know the form (SurrogateId in csrc/cpu/spiking.h)

    def __init_subclass__(cls, *, name: str = "", kernel_id: int = -1) -> None:
        cls.name, cls.kernel_id = name, kernel_id

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            sign = "positive " if field.name in ("alpha", "slope", "width") else ""
            if not (isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or not sign)):
                raise ValueError(
                    f"{type(self).__name__}: expected {field.name} to be a {sign}finite number, got {value!r}"
                )

    def numbers(self) -> Numbers:
        """What the kernel of :attr:`kernel_id` computes with."""
        raise NotImplementedError

    def grad(self, u: Tensor) -> Tensor:
        """``g(u)``, elementwise, in plain PyTorch.

        Args:
            u: membrane potential above threshold, ``h - v_threshold``, any shape and floating dtype.
        """
        raise NotImplementedError

    def __call__(self, u: Tensor) -> Tensor:
        """Spikes of ``u`` (1 where ``u >= 0``), with :meth:`grad` as their derivative."""
        return _Heaviside.apply(u, self, False)

    def strict(self, u: Tensor) -> Tensor:
        """Spikes of ``u`` (1 where ``u > 0``, as snnTorch fires), with :meth:`grad` as their derivative."""
        return _Heaviside.apply(u, self, True)


@dataclass(frozen=True)
class ATan(Surrogate, name="atan", kernel_id=0):
    r"""``g(u) = (a / 2) / (1 + (pi / 2 * a * u)^2)``: SpikingJelly's ``ATan``, snnTorch's ``atan``."""

    alpha: float = 2.0

    def numbers(self) -> Numbers:
        return self.alpha / 2, math.pi / 2 * self.alpha, 0.0

    def grad(self, u: Tensor) -> Tensor:
        return (self.alpha / 2) / (1 + (math.pi / 2 * self.alpha * u).square())


@dataclass(frozen=True)
class Sigmoid(Surrogate, name="sigmoid", kernel_id=1):
    r"""``g(u) = a * sigmoid(a u) * (1 - sigmoid(a u))``: SpikingJelly's ``Sigmoid`` (4), snnTorch's ``sigmoid`` (25).

    Computed as ``a * e / (1 + e)^2`` with ``e = exp(-|a u|)``, which neither overflows nor cancels.
    """

    alpha: float = 4.0

    def numbers(self) -> Numbers:
        return self.alpha, self.alpha, 0.0

    def grad(self, u: Tensor) -> Tensor:
        return _bell(self.alpha, u)


@dataclass(frozen=True)
class PiecewiseQuadratic(Surrogate, name="piecewise_quadratic", kernel_id=2):
    r"""``g(u) = max(0, a - a^2 |u|)``, the triangle: SpikingJelly's ``PiecewiseQuadratic``; with ``a = 1 / gamma`` the
    ZIF of ANN_SNN_QCFS."""

    alpha: float = 1.0

    def numbers(self) -> Numbers:
        return self.alpha, self.alpha**2, 1 / self.alpha

    def grad(self, u: Tensor) -> Tensor:
        triangle = self.alpha - self.alpha**2 * u.abs()
        return triangle.masked_fill(u.abs() > 1 / self.alpha, 0)


@dataclass(frozen=True)
class Rectangular(Surrogate, name="rectangular", kernel_id=3):
    r"""``g(u) = a`` where ``|u| < 1 / (2 a)``, else 0: SpikingJelly's ``Rect``."""

    alpha: float = 1.0

    def numbers(self) -> Numbers:
        return self.alpha, 0.0, 0.5 / self.alpha

    def grad(self, u: Tensor) -> Tensor:
        return self.alpha * (u.abs() < 0.5 / self.alpha).to(u.dtype)


@dataclass(frozen=True)
class PiecewiseLeakyReLU(Surrogate, name="piecewise_leaky_relu", kernel_id=3):
    r"""``g(u) = 1 / (2 w)`` where ``|u| < w``, else ``c``: SpikingJelly's ``PiecewiseLeakyReLU``."""

    width: float = 1.0
    c: float = 0.01

    def numbers(self) -> Numbers:
        return 1 / (2 * self.width), self.c, self.width

    def grad(self, u: Tensor) -> Tensor:
        return _either(u.abs() < self.width, 1 / (2 * self.width), self.c, u)


@dataclass(frozen=True)
class PiecewiseExp(Surrogate, name="piecewise_exp", kernel_id=4):
    r"""``g(u) = a / 2 * exp(-a |u|)``: SpikingJelly's ``PiecewiseExp``."""

    alpha: float = 1.0

    def numbers(self) -> Numbers:
        return self.alpha / 2, self.alpha, 0.0

    def grad(self, u: Tensor) -> Tensor:
        return self.alpha / 2 * torch.exp(-(self.alpha * u.abs()))


@dataclass(frozen=True)
class SpikeRateEscape(Surrogate, name="spike_rate_escape", kernel_id=4):
    r"""``g(u) = slope * exp(-beta |u - 1|)``: snnTorch's ``spike_rate_escape``."""

    beta: float = 1.0
    slope: float = 25.0

    def numbers(self) -> Numbers:
        return self.slope, self.beta, 1.0

    def grad(self, u: Tensor) -> Tensor:
        return self.slope * torch.exp(-(self.beta * (u - 1).abs()))


@dataclass(frozen=True)
class SoftSign(Surrogate, name="soft_sign", kernel_id=5):
    r"""``g(u) = 1 / (2 a (1 / a + |u|)^2)``: SpikingJelly's ``SoftSign``."""

    alpha: float = 2.0

    def numbers(self) -> Numbers:
        return 1 / (2 * self.alpha), 1 / self.alpha, 1.0

    def grad(self, u: Tensor) -> Tensor:
        return 1 / (2 * self.alpha) / (1 / self.alpha + u.abs()).square()


@dataclass(frozen=True)
class SuperSpike(Surrogate, name="super_spike", kernel_id=5):
    r"""``g(u) = a / (1 + |u|)^2``: SpikingJelly's ``SuperSpike``."""

    alpha: float = 1.0

    def numbers(self) -> Numbers:
        return self.alpha, 1.0, 1.0

    def grad(self, u: Tensor) -> Tensor:
        return self.alpha / (1 + u.abs()).square()


@dataclass(frozen=True)
class FastSigmoid(Surrogate, name="fast_sigmoid", kernel_id=5):
    r"""``g(u) = 1 / (1 + k |u|)^2``: snnTorch's ``fast_sigmoid``."""

    slope: float = 25.0

    def numbers(self) -> Numbers:
        return 1.0, 1.0, self.slope

    def grad(self, u: Tensor) -> Tensor:
        return 1 / (1 + self.slope * u.abs()).square()


@dataclass(frozen=True)
class SparseFastSigmoid(Surrogate, name="sparse_fast_sigmoid", kernel_id=14):
    r"""``g(u) = 1 / (1 + k |u|)^2`` where ``u > B``, else 0: snnTorch's ``SFS``."""

    slope: float = 25.0
    B: float = 1.0

    def numbers(self) -> Numbers:
        return self.slope, self.B, 0.0

    def grad(self, u: Tensor) -> Tensor:
        return (1 / (1 + self.slope * u.abs()).square()).masked_fill(~(u > self.B), 0)


@dataclass(frozen=True)
class Erf(Surrogate, name="erf", kernel_id=6):
    r"""``g(u) = a / sqrt(pi) * exp(-(a u)^2)``: SpikingJelly's ``Erf``."""

    alpha: float = 2.0

    def numbers(self) -> Numbers:
        return self.alpha / math.sqrt(math.pi), self.alpha, 0.0

    def grad(self, u: Tensor) -> Tensor:
        return self.alpha / math.sqrt(math.pi) * torch.exp(-(self.alpha * u).square())


@dataclass(frozen=True)
class NonzeroSignLogAbs(Surrogate, name="nonzero_sign_log_abs", kernel_id=7):
    r"""``g(u) = 1 / (1 / a + |u|)``: SpikingJelly's ``NonzeroSignLogAbs``."""

    alpha: float = 1.0

    def numbers(self) -> Numbers:
        return 1.0, 1 / self.alpha, 0.0

    def grad(self, u: Tensor) -> Tensor:
        return 1 / (1 / self.alpha + u.abs())


@dataclass(frozen=True)
class LeakyKReLU(Surrogate, name="leaky_k_relu", kernel_id=8):
    r"""``g(u) = k`` where ``u >= 0``, else ``leak``: SpikingJelly's ``LeakyKReLU``."""

    leak: float = 0.0
    k: float = 1.0

    def numbers(self) -> Numbers:
        return self.k, self.leak, 0.0

    def grad(self, u: Tensor) -> Tensor:
        return _either(u >= 0, self.k, self.leak, u)


@dataclass(frozen=True)
class DeterministicPass(Surrogate, name="deterministic_pass", kernel_id=8):
    r"""``g(u) = 1``: SpikingJelly's ``DeterministicPass``, snnTorch's ``straight_through_estimator``."""

    def numbers(self) -> Numbers:
        return 1.0, 1.0, 0.0

    def grad(self, u: Tensor) -> Tensor:
        return torch.ones_like(u)


@dataclass(frozen=True)
class LeakySpike(Surrogate, name="leaky_spike", kernel_id=8):
    r"""``g(u) = 1`` where ``u > 0``, else ``slope``: snnTorch's ``LSO`` as documented (snnTorch 1.0.0's own raises);
    with slope 0 its ``heaviside``."""

    leak: float = 0.1

    def numbers(self) -> Numbers:
        return 1.0, self.leak, _STRICTLY_ABOVE

    def grad(self, u: Tensor) -> Tensor:
        return _either(u > 0, 1.0, self.leak, u)


@dataclass(frozen=True)
class Triangular(Surrogate, name="triangular", kernel_id=8):
    r"""``g(u) = -threshold`` where ``u >= 0``, else ``threshold``: snnTorch's ``triangular``, wrong sign included."""

    threshold: float = 1.0

    def numbers(self) -> Numbers:
        return -self.threshold, self.threshold, 0.0

    def grad(self, u: Tensor) -> Tensor:
        return _either(u >= 0, -self.threshold, self.threshold, u)


@dataclass(frozen=True)
class S2NN(Surrogate, name="s2nn", kernel_id=9):
    r"""``g(u) = a * sigmoid(a u) * (1 - sigmoid(a u))`` where ``u < 0``, else ``b / (u + 1)``: SpikingJelly's
    ``S2NN``."""

    alpha: float = 4.0
    beta: float = 1.0

    def numbers(self) -> Numbers:
        return self.alpha, self.beta, 0.0

    def grad(self, u: Tensor) -> Tensor:
        return torch.where(u < 0, _bell(self.alpha, u), self.beta / (u + 1))


@dataclass(frozen=True)
class QPseudoSpike(Surrogate, name="q_pseudo_spike", kernel_id=10):
    r"""``g(u) = (1 + 2 |u| / (a - 1))^-a``, ``a > 1``: SpikingJelly's ``QPseudoSpike``."""

    alpha: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha <= 1:
            raise ValueError(f"QPseudoSpike: expected alpha above 1, got {self.alpha!r}")

    def numbers(self) -> Numbers:
        return 2 / (self.alpha - 1), -self.alpha, 0.0

    def grad(self, u: Tensor) -> Tensor:
        return (1 + 2 / (self.alpha - 1) * u.abs()).pow(-self.alpha)


@dataclass(frozen=True)
class SquarewaveFourierSeries(Surrogate, name="squarewave_fourier_series", kernel_id=11):
    r"""``g(u) = 4 / T * sum of cos((2 i - 1) 2 pi u / T) for i in 1 .. n - 1``: SpikingJelly's
    ``SquarewaveFourierSeries``."""

    n: int = 2
    period: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.n, int) and 1 <= self.n <= 1000 and self.period > 0):
            raise ValueError(
                f"SquarewaveFourierSeries: expected an integer n of 1 to 1000 and a positive period, got {self}"
            )

    def numbers(self) -> Numbers:
        return 4 / self.period, 2 * math.pi / self.period, float(self.n)

    def grad(self, u: Tensor) -> Tensor:
        total = torch.zeros_like(u)
        for i in range(1, self.n):
            total = total + torch.cos((2 * i - 1) * (2 * math.pi / self.period) * u)
        return 4 / self.period * total


@dataclass(frozen=True)
class LogTailedReLU(Surrogate, name="log_tailed_relu", kernel_id=12):
    r"""``g(u) = leak`` where ``u <= 0``, 1 up to 1, and ``1 / u`` beyond: SpikingJelly's ``LogTailedReLU``."""

    leak: float = 0.0

    def numbers(self) -> Numbers:
        return self.leak, 0.0, 0.0

    def grad(self, u: Tensor) -> Tensor:
        return torch.where(u > 1, 1 / u, _either(u <= 0, self.leak, 1.0, u))


@dataclass(frozen=True)
class FakeNumericalGradient(Surrogate, name="fake_numerical_gradient", kernel_id=13):
    r"""``g(u) = min(1 / |u|, a)``: SpikingJelly's ``FakeNumericalGradient``."""

    alpha: float = 0.3

    def numbers(self) -> Numbers:
        return self.alpha, 0.0, 0.0

    def grad(self, u: Tensor) -> Tensor:
        return (1 / u.abs()).clamp_max(self.alpha)


def _either(mask: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """Two numbers in the dtype of ``like``; torch.where alone would round them to float32."""
    return torch.full_like(like, no).masked_fill(mask, yes)


def _bell(alpha: float, u: Tensor) -> Tensor:
    e = torch.exp(-(alpha * u).abs())
    return alpha * e / (1 + e).square()


class _Heaviside(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(u, surrogate, strict):
        return ((u > 0) if strict else (u >= 0)).to(u.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        u, ctx.surrogate, _ = inputs
        ctx.save_for_backward(u)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad * ctx.surrogate.grad(u), None, None


KERNEL_TYPES: tuple[type[Surrogate], ...] = (
    *(ATan, Sigmoid, PiecewiseQuadratic, Rectangular, PiecewiseLeakyReLU, PiecewiseExp, SpikeRateEscape, SoftSign),
    *(SuperSpike, FastSigmoid, SparseFastSigmoid, Erf, NonzeroSignLogAbs, LeakyKReLU, DeterministicPass, LeakySpike),
    *(Triangular, S2NN, QPseudoSpike, SquarewaveFourierSeries, LogTailedReLU, FakeNumericalGradient),
)
BY_NAME: dict[str, Surrogate] = {cls.name: cls() for cls in KERNEL_TYPES}

_IN_KERNEL = frozenset(KERNEL_TYPES)

AnySurrogate = str | Surrogate | Callable[[Tensor], Tensor]


def resolve(surrogate: AnySurrogate, op: str = "surrogate") -> Surrogate | Callable[[Tensor], Tensor]:
    """The surrogate that ``surrogate`` names, or ``surrogate`` itself.

    Args:
        surrogate: a name in :data:`BY_NAME` (each with the default numbers of its class), a :class:`Surrogate`, or any
            callable that maps ``u`` to spikes and has a derivative of its own.
        op: the operation to name in an error.

    Raises:
        ValueError: the name is unknown.
        TypeError: it is neither a name nor callable.
    """
    if isinstance(surrogate, str):
        try:
            return BY_NAME[surrogate]
        except KeyError:
            known = ", ".join(sorted(BY_NAME))
            raise ValueError(f"{op}: expected surrogate to be one of {known}; got {surrogate!r}") from None
    if callable(surrogate) and not isinstance(surrogate, type):
        return surrogate
    raise TypeError(
        f"{op}: expected surrogate to be a name, an object of fastcifar.spiking.surrogate or a callable; "
        f"got {type(surrogate).__name__ if not isinstance(surrogate, type) else surrogate.__name__ + ' (the class)'}"
    )


def in_kernel(surrogate: object) -> TypeGuard[Surrogate]:
    """Whether kernels know this surrogate; others run step by step in PyTorch."""
    return type(surrogate) in _IN_KERNEL
