"""Activations with a trainable step, and the neurons that :func:`fastcifar.spiking.convert` puts in their place.

A neuron counts spikes, so what an activation computes is a count as well, and the two must agree for every input.
Counts are therefore decided as in real numbers: ``x`` and the step are exact in float64, and a quotient of two float32
numbers that is not halfway between two integers is further from there than float64 rounds.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import _library
from .._checks import expect_tensors
from .functional import integrate_and_fire, signed_if

_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALF)
_IN_CACHE = 2**16  # elements: half a mebibyte of float64


def qcfs(x: Tensor, threshold: Tensor, levels: int = 8) -> Tensor:
    r"""Quantisation, clip, floor and shift: the activation whose spiking form is an integrate-and-fire neuron::

        y = threshold / levels * floor(clip(x / threshold, 0, 1) * levels + 1/2)

    The floor passes the gradient on, so ``dy/dx`` is 1 where ``0 <= x <= threshold``, else 0, and ``dy/dthreshold`` is
    ``floor(...) / levels``, less ``x / threshold`` where ``0 <= x <= threshold``. It is summed in float64, in the same
    order at every call. The count is exact for float32 and half-precision inputs, ties included (they count up). There
    is no second derivative: asking for one raises.

    Args:
        x: any shape; float32, float64, bfloat16 or float16.
        threshold: lambda, above 0 (its values are not looked at: on a GPU that would wait for it); a floating tensor
            that broadcasts against ``x``.
        levels: L, an integer above 0. Default 8.

    Returns:
        Tensor of ``x``'s shape and dtype.

    Raises:
        TypeError: ``x`` or ``threshold`` is not a floating tensor, or ``levels`` not an integer.
        ValueError: ``threshold`` does not broadcast against ``x`` or is elsewhere, or ``levels`` is below 1.

    Source: Bu et al., "Optimal ANN-SNN Conversion for High-accuracy and Ultra-low-latency Spiking Neural Networks",
    ICLR 2022, the clip-floor-shift activation with a shift of 1/2; the gradient is that of its authors' code.

    Example:
        >>> import torch
        >>> from fastcifar.spiking import qcfs
        >>> qcfs(torch.tensor([-1.0, 0.49, 0.5, 1.7, 9.0]), torch.tensor(4.0), levels=4).tolist()
        [0.0, 0.0, 1.0, 2.0, 4.0]
    """
    _check("qcfs", x, "threshold", threshold)
    _check_levels("qcfs", levels)
    return _apply_qcfs(x, threshold, levels)


def lsq(x: Tensor, step: Tensor, low: int, high: int, grad_scale: float = 1.0) -> Tensor:
    r"""Quantisation with a learnt step size::

        y = round(clip(x / step, low, high)) * step

    The rounding passes the gradient on, so ``dy/dx`` is 1 where ``low < x / step < high``, else 0, and ``dy/dstep`` is
    ``round(...)``, less ``x / step`` in that range. It is summed in float64, in the same order at every call. Ties are
    rounded up, as a neuron fires at its threshold. There is no second derivative: asking for one raises.

    Args:
        x: any shape; float32, float64, bfloat16 or float16.
        step: s, above 0 (not looked at); a floating tensor that broadcasts against ``x``.
        low, high: the bounds -Q_N and Q_P, integers with ``low < high``.
        grad_scale: factor of the step's gradient; the paper's is ``1 / sqrt(x.numel() * high)``. Default 1.

    Returns:
        Tensor of ``x``'s shape and dtype.

    Raises:
        TypeError: ``x`` or ``step`` is not a floating tensor, or a bound not an integer.
        ValueError: ``step`` does not broadcast against ``x`` or is elsewhere, or ``low`` is not below ``high``.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, eqs. 1 to 3 and 5.

    Example:
        >>> import torch
        >>> from fastcifar.spiking import lsq
        >>> lsq(torch.tensor([-1.0, 0.2, 0.25, 1.7, 9.0]), torch.tensor(0.5), 0, 15).tolist()
        [0.0, 0.0, 0.5, 1.5, 7.5]
    """
    _check("lsq", x, "step", step)
    if not (isinstance(low, int) and isinstance(high, int)):
        raise TypeError(f"lsq: expected low and high to be integers, got {low!r} and {high!r}")
    if low >= high:
        raise ValueError(f"lsq: expected low below high, got {low} and {high}")
    return _apply_lsq(x, step, low, high, float(grad_scale))


class QCFS(nn.Module):
    """:func:`qcfs` with a learnt threshold, in place of a ReLU.

    Args:
        levels: L, an integer above 0: after L steps the converted neuron has fired as often as this counts. Default 8.
        init_threshold: the threshold before training, above 0. Default 8.
        shape: shape of the threshold, which broadcasts against ``x``: ``(C, 1, 1)`` for one a channel. Default ``()``.

    Attributes:
        threshold: the parameter lambda.

    Raises:
        TypeError, ValueError: as :func:`qcfs`; ``init_threshold`` is not above 0.

    Example:
        >>> import torch
        >>> from fastcifar.spiking import QCFS
        >>> QCFS(levels=4)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, levels: int = 8, init_threshold: float = 8.0, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        _check_levels("QCFS", levels)
        if not 0 < init_threshold < math.inf:
            raise ValueError(f"QCFS: expected init_threshold to be finite and above 0, got {init_threshold}")
        self.levels = levels
        self.threshold = nn.Parameter(torch.full(shape, float(init_threshold)))

    def forward(self, x: Tensor) -> Tensor:
        return qcfs(x, self.threshold, self.levels)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class LSQ(nn.Module):
    """:func:`lsq` with the paper's gradient scale and start, in place of a ReLU; the activation of QFFS networks.

    Args:
        bits: of the quantised activation, 1 or more (2 or more where it is signed). Default 4.
        signed: counts from ``-2^(bits-1)`` to ``2^(bits-1) - 1`` rather than from 0 to ``2^bits - 1``. Default False.
        init: the step before training, above 0. None: ``2 mean(|x|) / sqrt(Q_P)`` of the first batch in training.

    Attributes:
        step: the parameter s; 0 until the first batch where ``init`` is None.
        low, high: the bounds.

    Raises:
        ValueError: ``bits`` or ``init`` is not as described; the first batch is not in training, or is all zeros.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, section 2; Li, Ma and Furber, "Quantization
    Framework for Fast Spiking Neural Networks", Frontiers in Neuroscience 16 (2022).

    Example:
        >>> import torch
        >>> from fastcifar.spiking import LSQ
        >>> activation = LSQ(bits=2)
        >>> activation(torch.tensor([-1.0, 0.5, 1.5])).unique().numel(), round(activation.step.item(), 4)
        (2, 1.1547)
    """

    def __init__(self, bits: int = 4, signed: bool = False, init: float | None = None) -> None:
        super().__init__()
        fewest = 2 if signed else 1
        if not (isinstance(bits, int) and fewest <= bits <= 16):
            raise ValueError(
                f"LSQ: expected bits to be an integer of {fewest} to 16 with signed={signed}, got {bits!r}"
            )
        if init is not None and not 0 < init < math.inf:
            raise ValueError(f"LSQ: expected init to be finite and above 0, or None, got {init}")
        self.bits, self.signed = bits, signed
        self.low = -(2 ** (bits - 1)) if signed else 0
        self.high = self.low + 2**bits - 1
        self.step = nn.Parameter(torch.tensor(0.0 if init is None else float(init)))
        self._started = init is not None  # a Python bool: reading the step at every call would wait for a GPU

    def forward(self, x: Tensor) -> Tensor:
        if not self._started:
            self._start(x)
        # The step's gradient is a sum over all of x: without the scale it would be far larger than a weight's.
        return lsq(x, self.step, self.low, self.high, grad_scale=1 / math.sqrt(max(x.numel(), 1) * self.high))

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        expect_tensors("LSQ", x=x)
        if not self.training:
            raise ValueError("LSQ: expected a batch in training first, which sets the step, or the argument init")
        step = 2 * x.double().abs().mean() / math.sqrt(self.high)
        if not 0 < step < math.inf:
            raise ValueError(
                f"LSQ: expected a first batch with finite values other than 0 to set the step, got {step.item()}"
            )
        self.step.copy_(step)
        self._started = True

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._started = bool(self.step.detach() > 0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class SpikingActivation(nn.Module):
    """Base class of the neurons in the place of an activation.

    ``forward`` takes ``[T * B, ...]``, or ``[B, ...]`` where the input is the same at every step, and returns spikes
    times their height as ``[T * B, ...]``. :class:`~fastcifar.spiking.SpikingNetwork` says how many steps a call has,
    with :meth:`start`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forgets the state: the next call starts a new sequence."""
        self.state: tuple[Tensor, ...] | None = None
        self._call: tuple[int, int] | None = None

    def start(self, steps: int, batch: int) -> None:
        """Expects one call of ``steps`` steps of ``batch`` inputs."""
        self._call = steps, batch

    def forward(self, x: Tensor) -> Tensor:
        if self._call is None:
            raise RuntimeError(
                "SpikingNetwork: expected every activation to run once in a pass, and within the network; one ran a "
                "second time, where it would mix two membranes: give each place an activation of its own"
            )
        (steps, batch), self._call = self._call, None
        if x.shape[0] not in (batch, steps * batch):
            raise ValueError(
                f"SpikingNetwork: expected activations to see [{steps * batch}, ...], {steps} steps of {batch} images, "
                f"got {tuple(x.shape)}"
            )
        x = x.expand(steps, *x.shape) if x.shape[0] == batch else x.unflatten(0, (steps, batch))
        return self._fire(x).flatten(0, 1)

    def _fire(self, x: Tensor) -> Tensor:
        """Spikes times their height ``[T, B, ...]`` of currents ``[T, B, ...]``."""
        raise NotImplementedError


def _membrane(value: Tensor | float, like: Tensor) -> Tensor:
    """The membrane before the first step, in float64 where the kernels take it: sums of float32 currents are exact
    there, so that the count after L steps is decided as QCFS decides it."""
    dtype = torch.float32 if like.dtype.itemsize == 2 else torch.float64
    return torch.as_tensor(value, dtype=dtype, device=like.device).expand(like.shape).clone()


class RateNeuron(SpikingActivation):
    """Integrate-and-fire neurons with a soft reset, a membrane that starts at half the threshold, and spikes as high as
    the threshold: QCFS's counterpart, and a ReLU's with a threshold that its activations stay below.

    Attributes:
        threshold: lambda, a buffer that broadcasts against ``[B, ...]``.
    """

    threshold: Tensor

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold.detach().clone())

    def _fire(self, x: Tensor) -> Tensor:
        threshold = self.threshold
        # Not signed_if, which counts in thresholds: its quotient rounds, and ties at levels 3, 5, 6, 7 would miss.
        v = _membrane(threshold.double() / 2, x[0]) if self.state is None else self.state[0]
        spikes, v, _ = integrate_and_fire(x, v, v_threshold=threshold, v_reset=None)
        self.state = (v,)
        return spikes * threshold.to(x.dtype)


class BoundedNeuron(SpikingActivation):
    """Integrate-and-fire neurons with spikes of both signs, whose sum stays between LSQ's bounds.

    Attributes:
        step: LSQ's step, a buffer.
        low, high: the bounds of the sum of the spikes.
        steps: how many there are; a spike is ``step * steps`` high, for the mean to be ``step`` times the sum.
    """

    step: Tensor

    def __init__(self, step: Tensor, low: int, high: int, steps: int) -> None:
        super().__init__()
        self.register_buffer("step", step.detach().clone())
        self.low, self.high, self.steps = low, high, steps

    def _fire(self, x: Tensor) -> Tensor:
        v, w = (_membrane(0.5, x[0]), _membrane(0.0, x[0])) if self.state is None else self.state
        # The bound below is never infinite, so there are negative spikes: they take back what came too early.
        output, v, w, _ = signed_if(
            x, v, w, v_threshold=self.step.double() * self.steps, s_max=self.high, s_min=self.low
        )
        self.state = v, w
        return output

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}, steps={self.steps}"


def _check(op: str, x: Tensor, name: str, step: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: expected x to be a float32, float64, bfloat16 or float16 tensor, got {got}")
    if not isinstance(step, Tensor) or not step.is_floating_point():
        got = step.dtype if isinstance(step, Tensor) else type(step).__name__
        raise TypeError(f"{op}: expected {name} to be a floating tensor, got {got}")
    if step.device != x.device:
        raise ValueError(f"{op}: expected {name} on x's device {x.device}, got {step.device}")
    pairs = zip(reversed(step.shape), reversed(x.shape), strict=False)
    if step.dim() > x.dim() or any(size != 1 and size != n for size, n in pairs):
        raise ValueError(f"{op}: expected {name} to broadcast against {tuple(x.shape)}, got {tuple(step.shape)}")


def _check_levels(op: str, levels: int) -> None:
    if not isinstance(levels, int) or isinstance(levels, bool):
        raise TypeError(f"{op}: expected levels to be an integer, got {levels!r}")
    if levels < 1:
        raise ValueError(f"{op}: expected levels above 0, got {levels}")


def _quantised(x: Tensor, step: Tensor, levels: int, low: int, high: int) -> Tensor:
    """``step / levels * floor(clip(x levels / step, low, high) + 1/2)``, decided and computed in float64."""
    size = x[0].numel() if x.dim() and len(x) else 0
    over_rows = step.dim() == x.dim() and step.dim() > 0 and step.shape[0] > 1
    whole = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if whole or over_rows or x.numel() <= 2 * _IN_CACHE or size == 0:
        return _quantised_at_once(x, step, levels, low, high)
    # A pass over float64 costs twice one over x, and there are six: they stay in the second-level cache.
    y, rows = torch.empty_like(x), max(1, _IN_CACHE // size)
    for part, out in zip(x.split(rows), y.split(rows), strict=True):
        out.copy_(_quantised_at_once(part, step, levels, low, high))
    return y


def _quantised_at_once(x: Tensor, step: Tensor, levels: int, low: int, high: int) -> Tensor:
    """The product is exact and the division rounds correctly, so that a quotient that is halfway between two integers
    comes out as that. Dividing the step by a power of two is exact as well, and costs no pass over memory."""
    wide, unit = x.double(), step.double()
    if levels & (levels - 1):
        count = (wide * levels).div_(unit).clamp(low, high).add_(0.5).floor_()
        return count.mul_(unit).div_(levels).to(x.dtype)
    unit = unit / levels
    return (wide / unit).clamp(low, high).add_(0.5).floor_().mul_(unit).to(x.dtype)


def _gradients(op: str, grad: Tensor, x: Tensor, step: Tensor, y: Tensor, inside: Tensor, ctx: Any) -> list:
    """Of ``y = step q(x / step)``, whose rounding passes the gradient on ``inside``: ``dy/dstep = q - (x / step where
    inside) = (y - (x where inside)) / step``."""
    wants_x, wants_step, *_ = ctx.needs_input_grad
    grads: list[Tensor | None] = [None, None]
    with torch.no_grad():
        if wants_x:
            grads[0] = torch.where(inside, grad, 0)
        if wants_step:
            terms = (y - torch.where(inside, x.to(y.dtype), 0)).mul_(grad)
            extra = x.dim() - step.dim()
            dims = [d for d in range(x.dim()) if d < extra or step.shape[d - extra] == 1]
            summed = terms.sum(dims, dtype=torch.float64) if dims else terms.double()
            grads[1] = summed.reshape(step.shape).div(step.double()).to(step.dtype)
    return [None if g is None else _library.differentiable_once(op, g, grad, x, step) for g in grads]


class _QCFS(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, threshold, levels):
        return _quantised(x, threshold, levels, 0, levels)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, threshold, ctx.levels = inputs
        ctx.save_for_backward(x, threshold, output)

    @staticmethod
    def backward(ctx, grad):
        x, threshold, y = ctx.saved_tensors
        with torch.no_grad():
            if x.dtype in _HALF:  # there y is too coarse to subtract x from
                y = _quantised(x.float(), threshold, ctx.levels, 0, ctx.levels)
            inside = (x >= 0) & (x <= threshold)
        return *_gradients("qcfs", grad, x, threshold, y, inside, ctx), None


class _LSQ(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, step, low, high, grad_scale):
        return _quantised(x, step, 1, low, high)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, step, ctx.low, ctx.high, ctx.grad_scale = inputs
        ctx.save_for_backward(x, step, output)

    @staticmethod
    def backward(ctx, grad):
        x, step, y = ctx.saved_tensors
        with torch.no_grad():
            if x.dtype in _HALF:
                y = _quantised(x.float(), step, 1, ctx.low, ctx.high)
            # Bounds in float64, where they are exact; with x's dimensions, as a scalar would be rounded to x's dtype.
            wide = step.double().reshape((1,) * (x.dim() - step.dim()) + step.shape)
            inside = (x > wide * ctx.low) & (x < wide * ctx.high)
        grad_x, grad_step = _gradients("lsq", grad, x, step, y, inside, ctx)
        return grad_x, None if grad_step is None else grad_step * ctx.grad_scale, None, None, None


_apply_qcfs = _library.direct_apply(_QCFS)
_apply_lsq = _library.direct_apply(_LSQ)
