"""What the spectral models are made of; attribute names are those of the official code, as they are state_dict keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import expect_tensors
from .modules import GlobalFilter

Norm = Callable[[int], nn.Module]
Size = int | tuple[int, int]

layer_norm = partial(nn.LayerNorm, eps=1e-6)


def pair(size: Size) -> tuple[int, int]:
    """``(height, width)`` of a size given as one or two integers."""
    if isinstance(size, int):
        return size, size
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(n, int) for n in size):
        raise TypeError(f"expected a size to be one or two integers, got {size!r:.80}")
    return size[0], size[1]


class DropPath(nn.Module):
    """Stochastic depth: in training, drops whole samples of a residual branch and scales up those that stay.

    Args:
        drop_prob: probability of a drop, in [0, 1).

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016, as in timm.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"DropPath: expected drop_prob in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"{self.drop_prob:.3g}"


def drop_path(rate: float) -> nn.Module:
    """A :class:`DropPath`, or the identity for rate 0."""
    return DropPath(rate) if rate > 0 else nn.Identity()


def rising(rate: float, count: int) -> list[float]:
    """``count`` rates of stochastic depth, from 0 to ``rate`` in equal steps."""
    return [rate * i / max(count - 1, 1) for i in range(count)]


class Mlp(nn.Module):
    """Two linear layers with a GELU between; dropout after both."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act: nn.Module = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """GFNet's block: ``x + mlp(norm2(filter(norm1(x))))``, ONE residual around both.

    Args:
        dim: channels.
        mlp_ratio: hidden units of the MLP over channels.
        drop, drop_path_rate: dropout and stochastic depth.
        norm_layer: makes a norm from a number of channels.
        mixer: the token mixer.

    Source: Rao et al., NeurIPS 2021, figure 2.
    """

    def __init__(
        self, dim: int, mlp_ratio: float, drop: float, drop_path_rate: float, norm_layer: Norm, mixer: nn.Module
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.filter = mixer
        self.drop_path = drop_path(drop_path_rate)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def branch(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(self.filter(self.norm1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.branch(x))


class BlockLayerScale(Block):
    """:class:`Block` with a learnt scale ``gamma`` of every channel on the branch, ``init_values`` at first."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        drop: float,
        drop_path_rate: float,
        norm_layer: Norm,
        mixer: nn.Module,
        init_values: float = 1e-5,
    ) -> None:
        super().__init__(dim, mlp_ratio, drop, drop_path_rate, norm_layer, mixer)
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def branch(self, x: Tensor) -> Tensor:
        return self.gamma * super().branch(x)


class Attention(nn.Module):
    """Multi-head self-attention of tokens ``[B, N, C]``, through ``F.scaled_dot_product_attention``.

    Args:
        dim: channels, divisible by ``num_heads``.
        num_heads: heads.
        attn_drop, proj_drop: dropout of the attention weights and of the result.
        qkv_bias: whether queries, keys and values have a bias. Default True.
        scale: of the scores; None (default) for one over the root of the channels of a head.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"Attention: expected num_heads to divide {dim} channels, got {num_heads}")
        self.num_heads, self.attn_drop, self.scale = num_heads, attn_drop, scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class AttentionBlock(nn.Module):
    """A transformer block of two residuals: ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop: float, drop_path_rate: float, norm_layer: Norm
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.drop_path = drop_path(drop_path_rate)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.attn = Attention(dim, num_heads, attn_drop=drop, proj_drop=drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Images ``[B, in_chans, H, W]`` to tokens ``[B, N, embed_dim]``, one for each patch.

    Raises:
        ValueError: at a call, if the images are of another size; at construction, if a patch is larger than an image.
    """

    def __init__(self, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size, self.patch_size = pair(img_size), pair(patch_size)
        if min(self.patch_size) < 1:
            raise ValueError(f"PatchEmbed: expected patches of 1 pixel or more, got {self.patch_size}")
        height, width = (i // p for i, p in zip(self.img_size, self.patch_size, strict=True))
        if min(height, width) < 1:
            raise ValueError(f"PatchEmbed: expected patches within {self.img_size}, got {self.patch_size}")
        self.grid, self.num_patches = (height, width), height * width
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        expected = (self.proj.in_channels, *self.img_size)
        expect_tensors("PatchEmbed", x=x)
        if x.shape[1:] != expected:
            raise ValueError(f"PatchEmbed: expected images [B, {', '.join(map(str, expected))}], got {tuple(x.shape)}")
        return self.proj(x).flatten(2).transpose(1, 2)


class DownLayer(nn.Module):
    """Tokens of a grid ``(H, W)`` to those of a grid half as high and wide, with other channels."""

    def __init__(self, grid: tuple[int, int], dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.grid = grid
        self.proj = nn.Conv2d(dim_in, dim_out, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        images = x.unflatten(1, self.grid).permute(0, 3, 1, 2)
        return self.proj(images).flatten(2).transpose(1, 2)


def initialise(module: nn.Module) -> None:
    """The models' initialisation: truncated normal linear layers, norms of 1 and 0; for ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class GridFilter(GlobalFilter):
    """A :class:`~fastcifar.spectral.GlobalFilter` that knows its grid, whose width ``w`` alone does not tell."""

    def __init__(self, dim: int, grid: tuple[int, int], **options) -> None:
        super().__init__(dim, grid[0], grid[1] // 2 + 1, **options)
        self.grid = grid

    def forward(self, x: Tensor, spatial_size=None) -> Tensor:
        return super().forward(x, self.grid if spatial_size is None and x.dim() == 3 else spatial_size)
