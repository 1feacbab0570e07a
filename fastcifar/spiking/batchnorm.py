"""Batch norms over time, on ``[T, B, C, ...]``, and a batch norm inside a neuron's kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._checks import expect_tensors
from .modules import Neuron


class _OverTime(_BatchNorm):
    """A batch norm whose statistics run over time and batch together."""

    dims: tuple[int, ...] = ()  # how many dimensions [T, B, C, ...] may have

    def _check_input_dim(self, input: Tensor) -> None:
        """Of ``[T * B, C, ...]``: :meth:`forward` has checked ``[T, B, C, ...]`` already."""

    def forward(self, x: Tensor) -> Tensor:
        _check_sequence(type(self).__name__, x, self.dims, self.num_features)
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class ThresholdDependentBatchNorm2d(_OverTime):
    r"""tdBN: a batch norm over time and batch whose weight starts at ``alpha * v_th``, so that currents start with the
    spread of the threshold.

    Takes ``[T, B, C, H, W]`` in any floating dtype that ``nn.BatchNorm2d`` takes and returns the same shape. Numbers,
    defaults and state_dict are those of SpikingJelly's ``layer.ThresholdDependentBatchNorm2d``. To run it inside the
    neuron's kernel in evaluation, see :func:`fuse`.

    Args:
        alpha: 1; 1 / sqrt(2) where two branches are added.
        v_th: threshold of the neurons that follow.
        args, options: of ``nn.BatchNorm2d``: num_features, eps=1e-5, momentum=0.1, affine=True,
            track_running_stats=True.

    Raises:
        ValueError: ``affine`` is False, or the input has another shape.

    Source: Zheng et al., "Going Deeper With Directly-Trained Larger Spiking Neural Networks", AAAI 2021.

    Example:
        >>> import torch
        >>> from fastcifar.spiking import ThresholdDependentBatchNorm2d
        >>> ThresholdDependentBatchNorm2d(1.0, 0.5, 3)(torch.randn(4, 2, 3, 8, 8)).shape
        torch.Size([4, 2, 3, 8, 8])
    """

    dims: tuple[int, ...] = (5,)

    def __init__(self, alpha: float, v_th: float, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if not self.affine:
            raise ValueError(f"{type(self).__name__}: expected affine=True, as alpha and v_th start its weight")
        self.alpha, self.v_th = alpha, v_th
        nn.init.constant_(self.weight, alpha * v_th)


class ThresholdDependentBatchNorm1d(ThresholdDependentBatchNorm2d):
    """:class:`ThresholdDependentBatchNorm2d` for ``[T, B, C]`` and ``[T, B, C, L]``."""

    dims = (3, 4)


class TemporalEffectiveBatchNorm2d(_OverTime):
    r"""TEBN: a batch norm over time and batch, times a learnt number for each step, ``y[t] = scale[t] BN(x)[t]``.

    Takes ``[T, B, C, H, W]`` and returns the same shape. Numbers, defaults and state_dict are those of SpikingJelly's
    ``layer.TemporalEffectiveBatchNorm2d``.

    Args:
        T: number of steps.
        args, options: of ``nn.BatchNorm2d``: num_features, eps=1e-5, momentum=0.1, affine=True,
            track_running_stats=True.

    Attributes:
        scale: the learnt numbers ``[T]``, 1 before training.

    Raises:
        ValueError: ``T`` is not an integer above 0, or the input has another shape or number of steps.

    Source: Duan et al., "Temporal Effective Batch Normalization in Spiking Neural Networks", NeurIPS 2022.

    Example:
        >>> import torch
        >>> from fastcifar.spiking import TemporalEffectiveBatchNorm2d
        >>> TemporalEffectiveBatchNorm2d(4, 3)(torch.randn(4, 2, 3, 8, 8)).shape
        torch.Size([4, 2, 3, 8, 8])
    """

    dims: tuple[int, ...] = (5,)

    def __init__(self, T: int, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.T = _checked_steps(type(self).__name__, T)
        self.scale = nn.Parameter(torch.ones(T))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if len(x) != self.T:
            raise ValueError(f"{type(self).__name__}: expected {self.T} steps, one for each scale, got {len(x)}")
        return y * self.scale.view(-1, *[1] * (x.dim() - 1))


class TemporalEffectiveBatchNorm1d(TemporalEffectiveBatchNorm2d):
    """:class:`TemporalEffectiveBatchNorm2d` for ``[T, B, C]`` and ``[T, B, C, L]``."""

    dims = (3, 4)


class BatchNormThroughTime2d(nn.Module):
    r"""BNTT: a batch norm of its own for each step, with a weight and without a bias.

    Takes ``[T, B, C, H, W]`` and returns the same shape; a shorter sequence uses the first batch norms. Numbers,
    defaults and state_dict are those of SpikingJelly's ``layer.BatchNormThroughTime2d`` in multi-step mode; there is no
    state to reset, a call starts at the first step.

    Args:
        T: number of steps.
        args, options: of ``nn.BatchNorm2d``: num_features, eps=1e-5, momentum=0.1, affine=True,
            track_running_stats=True.

    Attributes:
        bn_list: the batch norms.

    Raises:
        ValueError: ``T`` is not an integer above 0, or the input has another shape or more steps.

    Source: Kim and Panda, "Revisiting Batch Normalization for Training Low-Latency Deep Spiking Neural Networks From
    Scratch", Frontiers in Neuroscience 15 (2021).

    Example:
        >>> import torch
        >>> from fastcifar.spiking import BatchNormThroughTime2d
        >>> BatchNormThroughTime2d(4, 3)(torch.randn(4, 2, 3, 8, 8)).shape
        torch.Size([4, 2, 3, 8, 8])
    """

    dims: tuple[int, ...] = (5,)
    norm: type[_BatchNorm] = nn.BatchNorm2d

    def __init__(self, T: int, *args: Any, **options: Any) -> None:
        super().__init__()
        self.T = _checked_steps(type(self).__name__, T)
        norms = [self.norm(*args, **options) for _ in range(T)]
        for bn in norms:
            bn.register_parameter("bias", None)
        self.bn_list, self.num_features = nn.ModuleList(norms), norms[0].num_features

    def forward(self, x: Tensor) -> Tensor:
        name = type(self).__name__
        _check_sequence(name, x, self.dims, self.num_features)
        if len(x) > self.T:
            raise ValueError(f"{name}: expected at most {self.T} steps, one for each batch norm, got {len(x)}")
        return torch.stack([bn(x_t) for bn, x_t in zip(self.bn_list, x, strict=False)]) if len(x) else x.clone()


class BatchNormThroughTime1d(BatchNormThroughTime2d):
    """:class:`BatchNormThroughTime2d` for ``[T, B, C]`` and ``[T, B, C, L]``."""

    dims = (3, 4)
    norm = nn.BatchNorm1d


def affine_of(bn: _BatchNorm, dims: int = 0) -> tuple[Tensor, Tensor]:
    """What a batch norm computes in evaluation, ``scale * x + shift``.

    Computed in float64 and rounded once, with gradients to ``bn.weight`` and ``bn.bias``.

    Args:
        bn: a batch norm with running statistics, ours or torch's.
        dims: how many dimensions follow the channel. Default 0.

    Returns:
        ``(scale, shift)``, each ``[C]`` followed by ``dims`` ones: what ``scale=`` and ``shift=`` of the neuron
        functions take, for ``x`` of ``[T, B, C, ...]``.

    Raises:
        TypeError: it is no batch norm, or its affine differs from step to step (TEBN, BNTT).
        ValueError: it has no running statistics.

    Example:
        >>> import torch
        >>> from fastcifar.spiking import affine_of, lif
        >>> scale, shift = affine_of(torch.nn.BatchNorm2d(3).eval(), dims=2)
        >>> lif(torch.randn(4, 2, 3, 8, 8), scale=scale, shift=shift)[0].shape
        torch.Size([4, 2, 3, 8, 8])
    """
    if not isinstance(bn, _BatchNorm) or isinstance(bn, TemporalEffectiveBatchNorm2d):
        raise TypeError(f"affine_of: expected a batch norm that is the same at every step, got {type(bn).__name__}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("affine_of: expected a batch norm with running statistics (track_running_stats=True)")
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    shift = -bn.running_mean.double() * scale
    if bn.bias is not None:
        shift = shift + bn.bias.double()
    shape, dtype = (-1, *[1] * dims), bn.running_mean.dtype
    return scale.to(dtype).view(shape), shift.to(dtype).view(shape)


class FusedNeuron(nn.Module):
    """A batch norm and the neuron behind it; see :func:`fuse`.

    Attributes:
        bn, neuron: the two modules.
    """

    def __init__(self, bn: _BatchNorm, neuron: Neuron) -> None:
        super().__init__()
        self.bn, self.neuron = bn, neuron

    def forward(self, x: Tensor) -> Any:
        if x.dim() < 3:
            raise ValueError(f"fuse: expected x of shape [T, B, C, ...], got {tuple(x.shape)}")
        if self.bn.training:
            y = self.bn(x) if isinstance(self.bn, _OverTime) else self.bn(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return self.neuron(y)
        neuron = self.neuron
        affine: tuple[Any, Any] = affine_of(self.bn, x.dim() - 3)
        neuron.scale, neuron.shift = affine
        try:
            return neuron(x)
        finally:
            self._clear()

    def _clear(self) -> None:
        """The affine is a function of bn's parameters and none of the neuron's own."""
        for name in ("scale", "shift"):
            setattr(self.neuron, name, None)


def fuse(bn: _BatchNorm, neuron: Neuron) -> FusedNeuron:
    """``neuron`` behind ``bn`` as one module over ``[T, B, C, ...]``.

    In evaluation the batch norm is an affine map, which the neuron's kernel applies as it reads its input: a pass of
    reading and a pass of writing the whole sequence are saved. Spikes are those of ``bn`` followed by ``neuron`` but
    where the membrane comes as close to the threshold as the affine rounds; gradients reach ``bn.weight`` and
    ``bn.bias``. In training ``bn`` runs by itself, with statistics over time and batch.

    Args:
        bn: tdBN or one of torch's batch norms, with running statistics; kept, not copied.
        neuron: a neuron of :mod:`fastcifar.spiking` without ``scale`` and ``shift`` of its own; kept, not copied.

    Returns:
        A module with the two as ``bn`` and ``neuron``.

    Raises:
        TypeError: ``bn`` or ``neuron`` is something else, TEBN and BNTT included (they differ from step to step).
        ValueError: ``bn`` has no running statistics, or ``neuron`` a ``scale`` or ``shift``.

    Example:
        >>> import torch
        >>> from fastcifar.spiking import LIF, fuse
        >>> layer = fuse(torch.nn.BatchNorm2d(3), LIF()).eval()
        >>> layer(torch.randn(4, 2, 3, 8, 8)).shape
        torch.Size([4, 2, 3, 8, 8])
    """
    try:
        affine_of(bn)
    except (TypeError, ValueError) as error:
        raise type(error)(f"fuse:{str(error).partition(':')[2]}") from None
    if not isinstance(neuron, Neuron):
        raise TypeError(f"fuse: expected a neuron of fastcifar.spiking, got {type(neuron).__name__}")
    if neuron.scale is not None or neuron.shift is not None:
        raise ValueError("fuse: expected a neuron without scale and shift, which are where the batch norm goes")
    return FusedNeuron(bn, neuron)


def _check_sequence(name: str, x: Tensor, dims: tuple[int, ...], channels: int) -> None:
    expect_tensors(name, x=x)
    if x.dim() not in dims or x.shape[2] != channels:
        tails = " or ".join(f"[T, B, {channels}{', L' if d == 4 else ', H, W' if d == 5 else ''}]" for d in dims)
        raise ValueError(f"{name}: expected x of shape {tails}, got {tuple(x.shape)}")


def _checked_steps(name: str, T: int) -> int:
    if not isinstance(T, int) or T < 1:
        raise ValueError(f"{name}: expected T to be an integer above 0, got {T!r}")
    return T
