"""A small U-ViT that predicts noise, with an exit after every block."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import expect_tensors
from ..earlyexit.cost import CostModel
from ..earlyexit.functional import compact
from ..earlyexit.modules import gathered
from .deediff import UncertaintyHead

__all__ = ["UViT", "UViTOutputs", "UViTResult"]


class UViTOutputs(NamedTuple):
    """Of :class:`UViT` in training; D blocks.

    Attributes:
        outputs: noise ``[B, C, H, W]`` after each block; the last is the model's.
        uncertainty: ``[B]`` of each block but the last.
    """

    outputs: list[Tensor]
    uncertainty: list[Tensor]


class UViTResult(NamedTuple):
    """Of :class:`UViT` in evaluation.

    Attributes:
        output: noise ``[B, C, H, W]``.
        exit_taken: the block after which each sample left, int64 ``[B]``, 0 to D - 1.
        uncertainty: there, float32 ``[B]``; NaN after the last, which has no such head.
    """

    output: Tensor
    exit_taken: Tensor
    uncertainty: Tensor


class _Block(nn.Module):
    """Attention and an MLP, each on a norm of what it adds to; before them, the skip from the block opposite."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, skip: bool) -> None:
        super().__init__()
        self.heads = heads
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, int(mlp_ratio * dim)), nn.Linear(int(mlp_ratio * dim), dim)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class _OutputHead(nn.Module):
    """Tokens to an image: a norm, a linear layer, the patches put together, a convolution."""

    def __init__(self, dim: int, channels: int, side: int, patch: int) -> None:
        super().__init__()
        self.channels, self.side, self.patch = channels, side, patch
        self.norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, patch * patch * channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.norm(x[:, 1:]))  # token 0 is the time's
        side, patch = self.side, self.patch
        x = x.view(-1, side, side, patch, patch, self.channels)  # row, column, row in the patch, column in it
        return self.conv(x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels, side * patch, side * patch))


class UViT(nn.Module):
    r"""Predicts the noise in images; in evaluation each sample leaves after the first block that is sure of it.

    Tokens are the patches and one of the time step. The blocks of the second half get the output of the block opposite
    as well. After every block but the last, an :class:`UncertaintyHead` gives ``u``; where ``u <= threshold``, the
    sample leaves, with the noise that this block's output head makes of its tokens. The samples that leave are dropped
    from the tokens and from every skip that is still to be used; where all leave or none does, as DeeDiff's often do
    (the step of time says most), nothing is moved.

    Args:
        img_size, patch_size, in_chans: side of the images (32), of the patches (2), channels (3).
        embed_dim: features of a token. Default 512.
        depth: blocks, odd: as many before the middle as behind it. Default 13.
        num_heads: of attention; divides ``embed_dim``. Default 8.
        mlp_ratio: hidden units of the MLPs over ``embed_dim``. Default 4.
        threshold: of the uncertainty, 0 to 1; negative: nobody leaves. Default 0.075.
        cost: decides when moving the rows pays; see :class:`~fastcifar.earlyexit.EarlyExit`.

    ``forward(x, t)`` takes images ``[B, C, H, W]`` and time steps ``[B]``. In training it returns
    :class:`UViTOutputs`, for :class:`DeeDiffLoss`; in evaluation :class:`UViTResult`.

    Raises:
        ValueError: a size does not fit, ``depth`` is even, or ``threshold`` is not finite; at a call, images or steps
            of another shape.

    Source: Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023 (defaults: its small model
    for CIFAR-10); exits: DeeDiff, arXiv 2309.17074, on the output of each block. The threshold is duodiff's.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import UViT
        >>> model = UViT(16, 4, embed_dim=32, depth=3, num_heads=4, threshold=0.5)
        >>> outputs, uncertainty = model(torch.randn(2, 3, 16, 16), torch.tensor([10, 500]))
        >>> len(outputs), len(uncertainty)
        (3, 2)
        >>> output, exit_taken, _ = model.eval()(torch.randn(2, 3, 16, 16), torch.tensor([10, 500]))
        >>> output.shape, exit_taken.shape
        (torch.Size([2, 3, 16, 16]), torch.Size([2]))
    """

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 2,
        in_chans: int = 3,
        embed_dim: int = 512,
        depth: int = 13,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        threshold: float = 0.075,
        cost: CostModel | None = None,
    ) -> None:
        super().__init__()
        if min(patch_size, num_heads) < 1 or img_size % patch_size or embed_dim % num_heads or embed_dim % 2:
            raise ValueError(
                f"UViT: expected patches that divide the images, heads that divide the features, and these even; got "
                f"{img_size} by {patch_size} and {embed_dim} by {num_heads}"
            )
        if depth < 1 or depth % 2 == 0:
            raise ValueError(f"UViT: expected an odd number of blocks, got {depth}")
        if not math.isfinite(threshold):
            raise ValueError(f"UViT: expected a finite threshold, got {threshold}")
        self.img_size, self.in_chans, self.embed_dim, self.threshold = img_size, in_chans, embed_dim, threshold
        self.cost = CostModel() if cost is None else cost
        side = img_size // patch_size
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side + 1, embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.middle = depth // 2
        self.blocks = nn.ModuleList([_Block(embed_dim, num_heads, mlp_ratio, k > self.middle) for k in range(depth)])
        self.heads = nn.ModuleList([_OutputHead(embed_dim, in_chans, side, patch_size) for _ in range(depth)])
        self.uncertainty = nn.ModuleList([UncertaintyHead(embed_dim) for _ in range(depth - 1)])

    def forward(self, x: Tensor, t: Tensor) -> UViTOutputs | UViTResult:
        expect_tensors("UViT", x=x, t=t)
        if x.dim() != 4 or tuple(x.shape[1:]) != (self.in_chans, self.img_size, self.img_size):
            raise ValueError(
                f"UViT: expected images [B, {self.in_chans}, {self.img_size}, {self.img_size}], got {tuple(x.shape)}"
            )
        if t.shape != (len(x),):
            raise ValueError(f"UViT: expected a time step of each of {len(x)} images, got {tuple(t.shape)}")
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self._time(t, x.dtype).unsqueeze(1), patches], 1) + self.pos_embed
        return self._all(x) if self.training else self._leaving(x)

    def _time(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.embed_dim // 2
        # In float64: an angle of 1,000 has lost four of float32's seven digits.
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64, device=t.device) / half)
        angles = t.double().unsqueeze(1) * rates
        return torch.cat([angles.cos(), angles.sin()], 1).to(dtype)

    def _block(self, k: int, x: Tensor, skips: list[Tensor]) -> Tensor:
        x = self.blocks[k](x, skips.pop() if k > self.middle else None)
        if k < self.middle:
            skips.append(x)
        return x

    def _all(self, x: Tensor) -> UViTOutputs:
        outputs, uncertainty, skips = [], [], []  # type: ignore[var-annotated]
        for k, head in enumerate(self.heads):
            x = self._block(k, x, skips)
            outputs.append(head(x))
            if k < len(self.uncertainty):
                uncertainty.append(self.uncertainty[k](x))
        return UViTOutputs(outputs, uncertainty)

    def _leaving(self, x: Tensor) -> UViTResult:
        skips: list[Tensor] = []
        samples = torch.arange(len(x), device=x.device)  # of the rows that have not left
        alive: Tensor | None = None  # where they are among the tokens' rows; None: in order, and no others
        parts: list[tuple[Any, Tensor, Tensor, Tensor]] = []
        last = len(self.blocks) - 1
        for k, head in enumerate(self.heads):
            x = self._block(k, x, skips)
            if k == last:
                leave, u = torch.arange(len(samples), device=x.device), x.new_full((len(samples),), math.nan)
            else:
                u = self.uncertainty[k](x)
                u = u if alive is None else u[alive]
                exits = u.float() <= self.threshold
                leave, stay = exits.nonzero().squeeze(1), (~exits).nonzero().squeeze(1)
                if not len(leave) and len(exits):
                    continue
            everybody = alive is None and len(leave) == len(x)
            rows = x if everybody else x[leave if alive is None else alive[leave]]
            parts.append((samples[leave], head(rows), u[leave].float(), torch.full_like(leave, k)))
            if k == last or not len(stay):
                break
            samples, alive = samples[stay], stay if alive is None else alive[stay]
            if self.cost.pays(k, len(x), len(alive)):
                x, skips = compact((x, skips), alive)
                alive = None
        output, exit_taken, uncertainty, _ = gathered(parts)
        return UViTResult(output, exit_taken, uncertainty)
