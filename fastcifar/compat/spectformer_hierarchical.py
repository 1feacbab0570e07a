"""SpectFormer's classes over our kernels, hierarchical architecture.

Class and constructor names, arguments, parameter names and state_dict keys are those of
``hierarchical_architecture/spectformer.py`` in badripatro/SpectFormers; its checkpoints load strictly. That file needs
packages that it does not use (``pytorch_wavelets``) and an alias that NumPy removed (``np.int``); this one does not.
The dtype rule is that of :mod:`fastcifar.compat.gfnet`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..spectral import models_hierarchical, modules

__all__ = ["SpectFormer", "SpectralGatingNetwork", "spectformer_b", "spectformer_l", "spectformer_s"]


class SpectralGatingNetwork(modules.SpectralGatingNetwork):
    """The gate of the hierarchical architecture: ``(dim)`` fixes the grid, and ``forward`` takes ``(x, H, W)``.

    Channels without a grid in the official code need ``h`` and ``w``.

    Example:
        >>> import torch
        >>> from fastcifar.compat.spectformer_hierarchical import SpectralGatingNetwork
        >>> SpectralGatingNetwork(192)(torch.randn(1, 784, 192), 28, 28).shape
        torch.Size([1, 784, 192])
    """

    def __init__(self, dim: int, h: int | None = None, w: int | None = None, **options: Any) -> None:
        h, w = self.stage(dim, h, w)
        super().__init__(dim, h, w, **({"out_dtype": "float32"} | options))

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:  # type: ignore[override]
        return super().forward(x, H, W)


class SpectFormer(models_hierarchical.SpectFormerH):
    """:class:`fastcifar.spectral.SpectFormerH` with the official dtype rule; other keyword arguments are ignored."""

    _known = frozenset(models_hierarchical.SpectFormerH.__init__.__code__.co_varnames)

    def __init__(self, *args: Any, **options: Any) -> None:
        known = {name: value for name, value in options.items() if name in self._known}
        super().__init__(*args, **({"out_dtype": "float32"} | known))


def spectformer_s(pretrained: bool = False, **kwargs: Any) -> SpectFormer:
    """SpectFormer-H-S; ``pretrained`` is without effect, as in the official code."""
    return SpectFormer(**(models_hierarchical.SIZES["s"] | kwargs))


def spectformer_b(pretrained: bool = False, **kwargs: Any) -> SpectFormer:
    """SpectFormer-H-B; ``pretrained`` is without effect, as in the official code."""
    return SpectFormer(**(models_hierarchical.SIZES["b"] | kwargs))


def spectformer_l(pretrained: bool = False, **kwargs: Any) -> SpectFormer:
    """SpectFormer-H-L; ``pretrained`` is without effect, as in the official code."""
    return SpectFormer(**(models_hierarchical.SIZES["l"] | kwargs))
