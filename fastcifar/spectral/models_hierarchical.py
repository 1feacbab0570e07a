"""SpectFormer-H, the hierarchical SpectFormer: two spectral stages, two of attention, class attention at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import expect_tensors
from .layers import Norm, Size, drop_path, initialise, layer_norm, pair, rising
from .modules import SpectralGatingNetwork

__all__ = ["SpectFormerH", "spectformer_h_b", "spectformer_h_l", "spectformer_h_s"]


class _Attention(nn.Module):
    """Self-attention of tokens with a projection of its own for the queries."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.proj(_attend(self.q(x), self.kv(x), self.num_heads))


class _ClassAttention(nn.Module):
    """Attention of the first token to all."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.kv = nn.Linear(dim, 2 * dim)
        self.q = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(_attend(self.q(x[:, :1]), self.kv(x), self.num_heads))


def _check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"SpectFormerH: expected num_heads to divide {dim} channels, got {num_heads}")


def _attend(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _FFN(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _DWConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        images = x.transpose(1, 2).unflatten(2, (height, width))
        return self.dwconv(images).flatten(2).transpose(1, 2)


class _PVT2FFN(nn.Module):
    """An MLP with a depth-wise 3 x 3 convolution before its activation (PVT v2)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = _DWConv(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x), height, width)))


class _Block(nn.Module):
    """Two residuals: ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``; ``attn`` is spectral or attention."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, rate: float, norm_layer: Norm) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.norm2 = norm_layer(dim)
        self.attn = attn
        self.mlp = _PVT2FFN(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path(rate)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        return x + self.drop_path(self.mlp(self.norm2(x), height, width))


class _ClassBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm_layer: Norm) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.norm2 = norm_layer(dim)
        self.attn = _ClassAttention(dim, num_heads)
        self.mlp = _FFN(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1] + self.attn(self.norm1(x))
        return torch.cat([first + self.mlp(self.norm2(first)), x[:, 1:]], 1)


class _Embed(nn.Module):
    """A convolution that halves height and width, then tokens and a norm; the stem has three more before it."""

    def __init__(self, dim_in: int, dim_out: int, stem_hidden: int | None = None) -> None:
        super().__init__()
        if stem_hidden is not None:
            layers: list[nn.Module] = []
            for i in range(3):
                source, kernel, stride = (stem_hidden, 3, 1) if i else (dim_in, 7, 2)
                conv = nn.Conv2d(source, stem_hidden, kernel, stride, kernel // 2, bias=False)
                layers += [conv, nn.BatchNorm2d(stem_hidden), nn.ReLU(inplace=True)]
            self.conv = nn.Sequential(*layers)
            dim_in = stem_hidden
        self.proj = nn.Conv2d(dim_in, dim_out, 3, 2, 1)
        self.norm = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(self.conv(x) if hasattr(self, "conv") else x)
        height, width = x.shape[2:]
        return self.norm(x.flatten(2).transpose(1, 2)), height, width


def _initialise(module: nn.Module) -> None:
    initialise(module)
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class SpectFormerH(nn.Module):
    """The hierarchical SpectFormer, with token labelling as the official code trains it.

    ``forward`` takes images ``[B, in_chans, H, W]`` and returns logits ``[B, num_classes]``. With ``token_label`` and
    in training it returns what the token-labelling loss wants: logits of the class token, logits ``[B, N,
    num_classes]`` of the N tokens of the last stage, and the box ``(top, left, bottom, right)`` in which samples were
    exchanged with those of the reversed batch; in evaluation, the logits of the class token plus half the largest of
    the tokens'.

    Args:
        in_chans, num_classes: channels of the images (3), classes (1000; 0 returns features).
        stem_hidden_dim: channels inside the stem. Default 32.
        embed_dims, num_heads, mlp_ratios, depths: of each stage; the heads of spectral stages are not used.
        drop_path_rate: stochastic depth, rising from 0 over the blocks. Default 0.
        norm_layer: makes a norm from a number of channels. Default LayerNorm with eps 1e-5.
        sr_ratios: without effect, as in the official code.
        num_stages: stages (4), of which the first two are spectral.
        token_label: see above. Default True.
        img_size: side of the images, or ``(height, width)``, which fixes the grids of the filters, 8 x 8 and 4 x 4 at
            32. Default 224.
        out_dtype, dft: of the filters, as in :class:`~fastcifar.spectral.GlobalFilter`.

    Raises:
        ValueError: the stages' arguments differ in number, heads do not divide channels; at a call, images of another
            size, or (training with token labels) of a side that 32 does not divide.

    Source: Patro et al., 2023, and badripatro/SpectFormers, hierarchical architecture (there ``SpectFormer``), with its
    state_dict keys. That code needs two packages that it does not use, and has grids for 224 x 224 and six numbers of
    channels alone. The exchanged box is drawn with torch's generator here, with NumPy's there.

    Example:
        >>> import torch
        >>> from fastcifar.spectral import SpectFormerH
        >>> small = {"embed_dims": [8, 16, 24, 32], "num_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1]}
        >>> model = SpectFormerH(num_classes=10, token_label=False, img_size=32, **small)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    pooling_scale = 8  # side of the first grid over that of the last

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        stem_hidden_dim: int = 32,
        embed_dims: Sequence[int] = (64, 128, 320, 448),
        num_heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        drop_path_rate: float = 0.0,
        norm_layer: Norm = nn.LayerNorm,
        depths: Sequence[int] = (3, 4, 6, 3),
        sr_ratios: Sequence[int] = (4, 2, 1, 1),
        num_stages: int = 4,
        token_label: bool = True,
        *,
        img_size: Size = 224,
        out_dtype: str = "input",
        dft: str = "kernel",
    ) -> None:
        super().__init__()
        counts = [len(a) for a in (embed_dims, num_heads, mlp_ratios, depths)]
        if set(counts) != {num_stages}:
            raise ValueError(
                "SpectFormerH: expected embed_dims, num_heads, mlp_ratios and depths of "
                f"{num_stages} stages each, got {', '.join(map(str, counts))}"
            )
        self.num_classes, self.depths, self.num_stages = num_classes, list(depths), num_stages
        self.img_size = pair(img_size)
        self.return_dense = self.mix_token = token_label
        self.beta = 1.0
        if min(depths, default=0) < 0:
            raise ValueError(f"SpectFormerH: expected depths of 0 or more, got {list(depths)}")
        rates = iter(rising(drop_path_rate, sum(depths)))
        height, width = ((side + 1) // 2 for side in self.img_size)  # the stem's first convolution
        for i, dim in enumerate(embed_dims):
            height, width = (height + 1) // 2, (width + 1) // 2
            stem = (in_chans, dim, stem_hidden_dim) if i == 0 else (embed_dims[i - 1], dim)
            blocks = []
            for _ in range(depths[i]):
                if i < 2:
                    options = {"out_dtype": out_dtype, "dft": dft}
                    attn: nn.Module = SpectralGatingNetwork(dim, height, width // 2 + 1, **options)  # type: ignore
                else:
                    attn = _Attention(dim, num_heads[i])
                blocks.append(_Block(dim, attn, mlp_ratios[i], next(rates), norm_layer))
            setattr(self, f"patch_embed{i + 1}", _Embed(*stem))
            setattr(self, f"block{i + 1}", nn.ModuleList(blocks))
            setattr(self, f"norm{i + 1}", norm_layer(dim))
        last = embed_dims[-1]
        self.post_network = nn.ModuleList([_ClassBlock(last, num_heads[-1], mlp_ratios[-1], norm_layer)])
        self.num_features = last
        self.head = nn.Linear(last, num_classes) if num_classes > 0 else nn.Identity()
        if token_label:
            self.aux_head = nn.Linear(last, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_initialise)

    def get_classifier(self) -> nn.Module:
        return self.head

    def _tokens(self, x: Tensor, box: tuple[int, int, int, int] | None = None) -> tuple[Tensor, int, int]:
        """Class token and tokens of the last stage, normed, and their grid; ``box`` is exchanged after the stem."""
        expect_tensors("SpectFormerH", x=x)
        if x.shape[2:] != self.img_size:
            height, width = self.img_size
            raise ValueError(f"SpectFormerH: expected images [B, C, {height}, {width}], got {tuple(x.shape)}")
        height = width = 0
        for i in range(1, self.num_stages + 1):
            x, height, width = getattr(self, f"patch_embed{i}")(x)
            if i == 1 and box is not None:
                x = _exchange(x.unflatten(1, (height, width)), [side * self.pooling_scale for side in box]).flatten(
                    1, 2
                )
            for block in getattr(self, f"block{i}"):
                x = block(x, height, width)
            if i < self.num_stages:
                x = getattr(self, f"norm{i}")(x).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        for block in self.post_network:
            x = block(x)
        return getattr(self, f"norm{self.num_stages}")(x), height, width

    def forward_features(self, x: Tensor) -> Tensor:
        """Features ``[B, embed_dims[-1]]`` of images: the class token."""
        return self._tokens(x)[0][:, 0]

    def forward(self, x: Tensor) -> Any:
        if not self.return_dense:
            return self.head(self.forward_features(x))
        box = self._draw_box() if self.mix_token and self.training else None
        tokens, height, width = self._tokens(x, box)
        logits, dense = self.head(tokens[:, 0]), self.aux_head(tokens[:, 1:])
        if not self.training:
            return logits + 0.5 * dense.max(1).values
        if box is None:
            return logits, dense, (0, 0, 0, 0)
        return logits, _exchange(dense.unflatten(1, (height, width)), box).flatten(1, 2), box

    def _draw_box(self) -> tuple[int, int, int, int]:
        """A box ``(top, left, bottom, right)`` in the last stage's grid, of an area drawn from a beta distribution."""
        stride = 4 * self.pooling_scale
        if any(side % stride for side in self.img_size):
            raise ValueError(
                f"SpectFormerH: expected images of a multiple of {stride} to mix tokens, got {self.img_size}"
            )
        share = 1 - torch.distributions.Beta(self.beta, self.beta).sample().item()
        ends = []
        for side in (side // stride for side in self.img_size):
            half, centre = int(side * math.sqrt(share)) // 2, int(torch.randint(side, ()))
            ends.append((max(centre - half, 0), min(centre + half, side)))
        (top, bottom), (left, right) = ends
        return top, left, bottom, right


def _exchange(x: Tensor, box: Sequence[int]) -> Tensor:
    """``x[B, H, W, C]`` with a box taken from the reversed batch."""
    top, left, bottom, right = box
    out = x.clone()
    out[:, top:bottom, left:right] = x.flip(0)[:, top:bottom, left:right]
    return out


_SHARED: dict[str, Any] = {"norm_layer": layer_norm, "mlp_ratios": (8, 8, 4, 4)}
SIZES: dict[str, dict[str, Any]] = {
    "s": _SHARED
    | {"stem_hidden_dim": 32, "embed_dims": (64, 128, 320, 448), "num_heads": (2, 4, 10, 14), "depths": (3, 4, 6, 3)},
    "b": _SHARED
    | {"stem_hidden_dim": 64, "embed_dims": (64, 128, 320, 512), "num_heads": (2, 4, 10, 16), "depths": (3, 4, 12, 3)},
    "l": _SHARED
    | {"stem_hidden_dim": 64, "embed_dims": (96, 192, 384, 512), "num_heads": (3, 6, 12, 16), "depths": (3, 6, 18, 3)},
}


def spectformer_h_s(**options: Any) -> SpectFormerH:
    """SpectFormer-H-S: 22 M parameters at 224 x 224; ``options`` are those of :class:`SpectFormerH`."""
    return SpectFormerH(**(SIZES["s"] | options))


def spectformer_h_b(**options: Any) -> SpectFormerH:
    """SpectFormer-H-B: 33 M parameters at 224 x 224; ``options`` are those of :class:`SpectFormerH`."""
    return SpectFormerH(**(SIZES["b"] | options))


def spectformer_h_l(**options: Any) -> SpectFormerH:
    """SpectFormer-H-L: 55 M parameters at 224 x 224; ``options`` are those of :class:`SpectFormerH`."""
    return SpectFormerH(**(SIZES["l"] | options))
