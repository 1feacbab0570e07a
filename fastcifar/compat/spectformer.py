"""SpectFormer's classes over our kernels, vanilla architecture: change ``from spectformer import ...`` to
``from fastcifar.compat.spectformer import ...``.

Class names, arguments, parameter names and state_dict keys are those of ``vanilla_architecture/spectformer.py`` in
badripatro/SpectFormers; its checkpoints load strictly. The dtype rule and what differs: :mod:`fastcifar.compat.gfnet`.
The hierarchical architecture has classes of the same names: :mod:`fastcifar.compat.spectformer_hierarchical`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..spectral import layers, models, modules
from .gfnet import Block as _GFNetBlock
from .gfnet import DownLayer, Mlp, Norm, PatchEmbed

__all__ = ["Attention", "Block", "Block_attention", "DownLayer", "Mlp", "PatchEmbed", "SpectFormer"]
__all__ += ["SpectralGatingNetwork"]


def _heads(dim: int) -> int:
    """6, as written in the official code, and heads of 64 channels where 6 does not divide ``dim`` (it fails there)."""
    return dim // 64 if dim % 6 and dim % 64 == 0 else 6


class SpectralGatingNetwork(modules.SpectralGatingNetwork):
    """:class:`fastcifar.spectral.SpectralGatingNetwork` with the official dtype rule.

    Example:
        >>> import torch
        >>> from fastcifar.compat.spectformer import SpectralGatingNetwork
        >>> SpectralGatingNetwork(32, h=8, w=5)(torch.randn(2, 64, 32, dtype=torch.bfloat16)).dtype
        torch.float32
    """

    def __init__(self, dim: int, h: int = 14, w: int = 8, **options: Any) -> None:
        super().__init__(dim, h, w, **({"out_dtype": "float32"} | options))


class Block(_GFNetBlock):
    """SpectFormer's spectral block, GFNet's of one residual."""


class Attention(layers.Attention):
    """Multi-head self-attention with the official arguments; ``qk_scale`` None or False means ``head_dim ** -0.5``."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, attn_drop, proj_drop, qkv_bias=qkv_bias, scale=qk_scale or None)


class Block_attention(layers.AttentionBlock):
    """SpectFormer's attention block of two residuals; ``h`` and ``w`` are without effect."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Norm = nn.LayerNorm,
        h: int = 14,
        w: int = 8,
    ) -> None:
        super().__init__(dim, _heads(dim), mlp_ratio, drop, drop_path, norm_layer)
        self.mlp.act = act_layer()


class SpectFormer(models.SpectFormer):
    """:class:`fastcifar.spectral.SpectFormer` with the official dtype rule, and 6 heads or heads of 64 channels.

    Example:
        >>> from fastcifar.compat.spectformer import SpectFormer
        >>> SpectFormer(img_size=32, patch_size=4, embed_dim=256, depth=5).blocks[4].attn.num_heads
        4
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        dim = options.get("embed_dim", args[4] if len(args) > 4 else 768)
        super().__init__(*args, **models._merge(options, out_dtype="float32", num_heads=_heads(dim)))
