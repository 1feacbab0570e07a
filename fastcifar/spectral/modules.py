"""Spectral mixing as modules: thin, with the names, defaults and state_dict keys of the official code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import functional, mixers
from .export import fnet_matmul, spectral_gate_matmul

__all__ = ["AFNO1D", "AFNO2D", "BFNO2D", "FourierLayer", "GlobalFilter", "SpectralGatingNetwork"]


def _choice(module: nn.Module, name: str, value: str, *choices: str) -> str:
    if value not in choices:
        raise ValueError(f"{type(module).__name__}: expected {name} {' or '.join(map(repr, choices))}, got {value!r}")
    return value


class GlobalFilter(nn.Module):
    """GFNet's token mixer, a learnt filter in the frequency domain: :func:`~fastcifar.spectral.spectral_gate`.

    ``forward(x, spatial_size=None)`` takes tokens ``[B, N, C]`` or ``[B, H, W, C]`` and returns their shape.

    Args:
        dim: channels C.
        h: rows H of the grid. Default 14.
        w: columns of its half spectrum, ``W // 2 + 1``. Default 8.
        out_dtype: ``"input"`` (default) returns the dtype of ``x``; ``"float32"`` is the official rule: ``x`` is
            cast to float32, also float64, and not cast back.
        dft: ``"kernel"`` (default); ``"matmul"`` is the formulation that exporters accept
            (:func:`~fastcifar.spectral.export.spectral_gate_matmul`), and may be set as an attribute before export.
        device, dtype: of the parameter. Default dtype float32.

    Attributes:
        complex_weight: the parameter ``[h, w, dim, 2]``, pairs of real and imaginary part; initialised with
            0.02 * randn.

    Raises:
        ValueError: at a call, if the grid is not of ``h`` by ``w`` (also where broadcasting would accept it) or ``x``
            has other channels; at construction, if a size is below 1 or an option unknown.
        TypeError: as :func:`~fastcifar.spectral.spectral_gate`.

    Source: Rao et al., NeurIPS 2021 (raoyongming/GFNet).

    Example:
        >>> import torch
        >>> from fastcifar.spectral import GlobalFilter
        >>> mixer = GlobalFilter(96, h=8, w=5)
        >>> mixer(torch.randn(2, 64, 96)).shape, mixer(torch.randn(2, 8, 9, 96)).shape
        (torch.Size([2, 64, 96]), torch.Size([2, 8, 9, 96]))
    """

    def __init__(
        self,
        dim: int,
        h: int = 14,
        w: int = 8,
        *,
        out_dtype: str = "input",
        dft: str = "kernel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(dim, h, w) < 1:
            raise ValueError(f"{type(self).__name__}: expected dim, h and w of at least 1, got {dim}, {h} and {w}")
        self.dim, self.h, self.w = dim, h, w
        self.out_dtype = _choice(self, "out_dtype", out_dtype, "input", "float32")
        self.dft = _choice(self, "dft", dft, "kernel", "matmul")
        self.complex_weight = nn.Parameter(torch.empty(h, w, dim, 2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.complex_weight, std=0.02)

    def forward(self, x: Tensor, spatial_size: Sequence[int] | None = None) -> Tensor:
        name = type(self).__name__
        weight: Tensor = self.complex_weight
        height, width = functional.check_tokens(name, x, spatial_size)
        if (height, width // 2 + 1) != weight.shape[:2]:
            raise ValueError(
                f"{name}: expected a grid H x W with H = {self.h} and W // 2 + 1 = {self.w}, got {height} x {width}"
            )
        if x.shape[-1] != weight.shape[2]:
            raise ValueError(f"{name}: expected {weight.shape[2]} channels, got {tuple(x.shape)}")
        out_dtype = None
        if self.out_dtype == "float32":
            if x.dtype == torch.float64:
                x = x.float()
            # as the official code: a weight of another width makes the result wider, never the rounding of x
            out_dtype = torch.float32
            if weight.dtype == torch.float64:
                x, out_dtype = x.float().double(), None
        if weight.dtype in (torch.bfloat16, torch.float16):
            weight = weight.float()
        if x.dtype == torch.float64:
            weight = weight.double()
        gate = functional.spectral_gate if self.dft == "kernel" else spectral_gate_matmul
        return gate(x, weight, (height, width), out_dtype=out_dtype)

    def as_kernel(self, spatial_size: Sequence[int] | None = None) -> Tensor:
        """The filter as a kernel ``[dim, H, W]`` of a circular convolution, differentiable.

        Args:
            spatial_size: ``(H, W)``; None means W = H if ``w`` fits that, else the even W.

        Raises:
            ValueError: the parameter is not of that grid.
        """
        if spatial_size is None:
            spatial_size = (self.h, self.h if self.h // 2 + 1 == self.w else 2 * (self.w - 1))
        return functional.as_kernel(self.complex_weight, spatial_size)

    def extra_repr(self) -> str:
        options = "".join(
            f", {name}={getattr(self, name)!r}"
            for name, default in (("out_dtype", "input"), ("dft", "kernel"))
            if getattr(self, name) != default
        )
        return f"{self.dim}, h={self.h}, w={self.w}{options}"


_STAGES = {64: (56, 29), 96: (56, 29), 128: (28, 15), 192: (28, 15)}


class SpectralGatingNetwork(GlobalFilter):
    """SpectFormer's token mixer: :class:`GlobalFilter` under another name, with both signatures of the official code.

    ``forward(x, spatial_size=None)`` is that of the vanilla architecture, ``forward(x, H, W)`` that of the hierarchical
    one, whose constructor ``(dim)`` is :meth:`for_stage` here. Arguments, attributes and errors: :class:`GlobalFilter`.

    Source: Patro et al., "SpectFormer", 2023 (badripatro/SpectFormers).

    Example:
        >>> import torch
        >>> from fastcifar.spectral import SpectralGatingNetwork
        >>> SpectralGatingNetwork.for_stage(128)(torch.randn(1, 784, 128), 28, 28).shape
        torch.Size([1, 784, 128])
    """

    @classmethod
    def stage(cls, dim: int, h: int | None = None, w: int | None = None) -> tuple[int, int]:
        """``(h, w)`` of :meth:`for_stage`."""
        if h is None or w is None:
            if dim not in _STAGES:
                raise ValueError(f"{cls.__name__}: expected h and w, as no stage has {dim} channels")
            h, w = _STAGES[dim]
        return h, w

    @classmethod
    def for_stage(cls, dim: int, h: int | None = None, w: int | None = None, **options) -> SpectralGatingNetwork:
        """The grid by the channels, as in the hierarchical architecture: 56 x 56 for 64, 96; 28 x 28 for 128, 192.

        Other channels need ``h`` and ``w`` (the official class fails at its first call); ``options`` are those of the
        constructor.
        """
        return cls(dim, *cls.stage(dim, h, w), **options)

    def forward(self, x: Tensor, spatial_size: Sequence[int] | int | None = None, W: int | None = None) -> Tensor:
        size = spatial_size if W is None else (spatial_size, W)
        return super().forward(x, size)  # type: ignore[arg-type]


class _Blocks(nn.Module):
    """What AFNO and BFNO share: the arguments, and how many columns are kept."""

    def __init__(self, hidden_size: int, num_blocks: int, fraction: float, factor: int, kept_modes: str, dft: str):
        super().__init__()
        name = type(self).__name__
        if num_blocks < 1 or hidden_size < 1 or hidden_size % num_blocks:
            raise ValueError(
                f"{name}: expected hidden_size divisible by num_blocks, got {hidden_size} and {num_blocks}"
            )
        if not fraction >= 0:
            raise ValueError(f"{name}: expected hard_thresholding_fraction of 0 or more, got {fraction}")
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"{name}: expected hidden_size_factor to be an integer of at least 1, got {factor}")
        self.hidden_size, self.num_blocks, self.block_size = hidden_size, num_blocks, hidden_size // num_blocks
        self.hard_thresholding_fraction, self.hidden_size_factor, self.scale = fraction, factor, 0.02
        self.kept_modes = _choice(self, "kept_modes", kept_modes, "official", "grid")
        self.dft = _choice(self, "dft", dft, "kernel", "matmul")

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=self.scale)

    def _grid(self, x: Tensor, spatial_size: Sequence[int] | None) -> tuple[tuple[int, int], int]:
        """The grid, and how many of its columns are kept."""
        name = type(self).__name__
        height, width = functional.check_tokens(name, x, spatial_size)
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"{name}: expected {self.hidden_size} channels, got {tuple(x.shape)}")
        return (height, width), mixers.kept_modes(self.hard_thresholding_fraction, height, width, self.kept_modes)

    def extra_repr(self) -> str:
        shown = [f"{self.hidden_size}, num_blocks={self.num_blocks}"]
        for name, default in (
            ("sparsity_threshold", 0.01),
            ("hard_thresholding_fraction", 1),
            ("hidden_size_factor", 1),
            ("kept_modes", "official"),
            ("dft", "kernel"),
        ):
            if (value := getattr(self, name, default)) != default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


class AFNO2D(_Blocks):
    """The adaptive Fourier neural operator on a grid, residual included: :func:`~fastcifar.spectral.mixers.afno`.

    ``forward(x, spatial_size=None)`` takes tokens ``[B, N, C]`` or ``[B, H, W, C]`` and returns their shape and dtype.

    Args:
        hidden_size: channels C.
        num_blocks: blocks of the block-diagonal weights; divides C. Default 8.
        sparsity_threshold: lambda of the soft threshold. Default 0.01.
        hard_thresholding_fraction: fraction of modes that is mixed. Default 1.
        hidden_size_factor: width of the hidden layer over that of a block, an integer. Default 1.
        kept_modes: what the fraction is of (:func:`~fastcifar.spectral.mixers.kept_modes`): ``"official"`` (default,
            the rule of the official code, which seldom drops anything) or ``"grid"`` (of the columns).
        dft: ``"kernel"`` (default) or ``"matmul"``, which exporters accept.
        device, dtype: of the parameters. Default dtype float32.

    Attributes:
        w1, b1, w2, b2: ``[2, nb, bs, bs f]``, ``[2, nb, bs f]``, ``[2, nb, bs f, bs]`` and ``[2, nb, bs]``, all
            initialised with 0.02 * randn.

    Raises:
        TypeError, ValueError: as :func:`~fastcifar.spectral.mixers.afno`.

    Source: Guibas et al., ICLR 2022 (NVlabs/AFNO-transformer). Where the official class computes in float32 always,
    this one computes in its parameters' dtype: after ``.double()`` in float64.

    Example:
        >>> import torch
        >>> from fastcifar.spectral import AFNO2D
        >>> AFNO2D(64, num_blocks=4)(torch.randn(2, 8 * 6, 64), (8, 6)).shape
        torch.Size([2, 48, 64])
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_blocks: int = 8,
        sparsity_threshold: float = 0.01,
        hard_thresholding_fraction: float = 1,
        hidden_size_factor: int = 1,
        *,
        kept_modes: str = "official",
        dft: str = "kernel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_blocks, hard_thresholding_fraction, hidden_size_factor, kept_modes, dft)
        if not sparsity_threshold >= 0:
            raise ValueError(
                f"{type(self).__name__}: expected sparsity_threshold of 0 or more, got {sparsity_threshold}"
            )
        self.sparsity_threshold = sparsity_threshold
        block, hidden = self.block_size, self.block_size * hidden_size_factor
        for name, shape in (("w1", (block, hidden)), ("b1", (hidden,)), ("w2", (hidden, block)), ("b2", (block,))):
            self.register_parameter(name, nn.Parameter(torch.empty(2, num_blocks, *shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def forward(self, x: Tensor, spatial_size: Sequence[int] | None = None) -> Tensor:
        grid, kept = self._grid(x, spatial_size)
        return mixers.afno(
            x,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            grid,
            sparsity_threshold=self.sparsity_threshold,
            kept_columns=kept,
            dft=self.dft,
        )


class AFNO1D(AFNO2D):
    """:class:`AFNO2D` on a sequence: ``forward(x)`` takes ``[B, N, C]``, which is a grid of one row.

    Example:
        >>> import torch
        >>> from fastcifar.spectral import AFNO1D
        >>> AFNO1D(64)(torch.randn(2, 50, 64)).shape
        torch.Size([2, 50, 64])
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if not isinstance(x, Tensor) or x.dim() != 3:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{type(self).__name__}: expected x [B, N, C], got {got}")
        return super().forward(x, (1, x.shape[1]))


class BFNO2D(_Blocks):
    """The block-diagonal Fourier neural operator, residual included: :func:`~fastcifar.spectral.mixers.bfno`.

    Args:
        hidden_size, num_blocks, hard_thresholding_fraction, kept_modes, dft, device, dtype: as in :class:`AFNO2D`.

    Attributes:
        w1: ``[2, nb, bs, bs]``, initialised with 0.02 * randn.

    Source: NVlabs/AFNO-transformer.

    Example:
        >>> import torch
        >>> from fastcifar.spectral import BFNO2D
        >>> BFNO2D(64)(torch.randn(2, 49, 64)).shape
        torch.Size([2, 49, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_blocks: int = 8,
        hard_thresholding_fraction: float = 1,
        *,
        kept_modes: str = "official",
        dft: str = "kernel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_blocks, hard_thresholding_fraction, 1, kept_modes, dft)
        block = self.block_size
        self.w1 = nn.Parameter(torch.empty(2, num_blocks, block, block, device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, x: Tensor, spatial_size: Sequence[int] | None = None) -> Tensor:
        grid, kept = self._grid(x, spatial_size)
        return mixers.bfno(x, self.w1, grid, kept_columns=kept, dft=self.dft)


class FourierLayer(nn.Module):
    """FNet's mixer, without parameters: :func:`~fastcifar.spectral.fnet` of ``[..., N, C]``.

    Args:
        dft: ``"kernel"`` (default) or ``"matmul"``, which exporters accept.

    Raises:
        TypeError, ValueError: as :func:`~fastcifar.spectral.fnet`.

    Source: Lee-Thorp et al., NAACL 2022; the name is that of erksch/fnet-pytorch.

    Example:
        >>> import torch
        >>> from fastcifar.spectral import FourierLayer
        >>> FourierLayer()(torch.randn(2, 64, 48)).shape
        torch.Size([2, 64, 48])
    """

    def __init__(self, *, dft: str = "kernel") -> None:
        super().__init__()
        self.dft = _choice(self, "dft", dft, "kernel", "matmul")

    def forward(self, x: Tensor) -> Tensor:
        return mixers.fnet(x) if self.dft == "kernel" else fnet_matmul(x)

    def extra_repr(self) -> str:
        return "" if self.dft == "kernel" else f"dft={self.dft!r}"
