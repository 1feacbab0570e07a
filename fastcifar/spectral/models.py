"""GFNet and SpectFormer, from 32 x 32 images up; checkpoints of the official code load strictly.

Every model takes images ``[B, in_chans, H, W]`` and returns logits ``[B, num_classes]``. The constructors of the zoo
(:func:`gfnet_ti` and so on) give the published sizes, and take any argument of the class to change them:
``gfnet_xs(img_size=32, patch_size=4, num_classes=10)``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layers import (
    AttentionBlock,
    Block,
    BlockLayerScale,
    DownLayer,
    GridFilter,
    Norm,
    PatchEmbed,
    Size,
    initialise,
    layer_norm,
    rising,
)

__all__ = [
    "GFNet",
    "GFNetPyramid",
    "SpectFormer",
    "gfnet_b",
    "gfnet_h_b",
    "gfnet_h_s",
    "gfnet_h_ti",
    "gfnet_s",
    "gfnet_ti",
    "gfnet_xs",
    "spectformer_b",
    "spectformer_s",
    "spectformer_ti",
    "spectformer_xs",
]


class _Classifier(nn.Module):
    """The head and the ends of forward that the models share."""

    head: nn.Module
    num_features: int

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Parameters that training leaves without weight decay."""
        return {"pos_embed"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str = "") -> None:
        """A new head for ``num_classes`` classes; none for 0. ``global_pool`` is without effect."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()


class GFNet(_Classifier):
    """The Global Filter Network: patches, blocks of a spectral filter and an MLP, mean over tokens, a linear head.

    Args:
        img_size: side of the images, or ``(height, width)``. Default 224.
        patch_size: side of the patches, or ``(height, width)``; 4 suits 32 x 32 images. Default 16.
        in_chans, num_classes: channels of the images (3), classes (1000; 0 returns features).
        embed_dim, depth: channels (768) and blocks (12).
        mlp_ratio: hidden units of the MLPs over channels. Default 4.
        representation_size: units of a tanh layer before the head; None (default) for no such layer.
        uniform_drop: stochastic depth of ``drop_path_rate`` in all blocks, not rising from 0 to it. Default False.
        drop_rate, drop_path_rate: dropout and stochastic depth. Default 0.
        norm_layer: makes a norm from a number of channels. Default LayerNorm with eps 1e-6.
        dropcls: dropout before the head. Default 0.
        out_dtype, dft: of the filters, as in :class:`~fastcifar.spectral.GlobalFilter`.

    Raises:
        ValueError: a size does not fit; at a call, if the images are of another size.

    Source: Rao et al., NeurIPS 2021, and raoyongming/GFNet (class ``GFNet``), with its arguments and state_dict keys.
    In that code the layer of ``representation_size`` is made and never called; here it is.

    Example:
        >>> import torch
        >>> from fastcifar.spectral import GFNet
        >>> model = GFNet(img_size=32, patch_size=4, num_classes=10, embed_dim=64, depth=2)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        representation_size: int | None = None,
        uniform_drop: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Norm | None = None,
        dropcls: float = 0.0,
        *,
        out_dtype: str = "input",
        dft: str = "kernel",
    ) -> None:
        super().__init__()
        self.num_classes, self.embed_dim = num_classes, embed_dim
        self.num_features = representation_size or embed_dim
        norm = norm_layer or layer_norm
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = [drop_path_rate] * depth if uniform_drop else rising(drop_path_rate, depth)
        shared = {"mlp_ratio": mlp_ratio, "drop": drop_rate, "norm_layer": norm}
        options = {"out_dtype": out_dtype, "dft": dft}
        self.blocks = nn.ModuleList(
            [self._block(i, embed_dim, options, drop_path_rate=rate, **shared) for i, rate in enumerate(rates)]
        )
        self.norm = norm(embed_dim)
        if representation_size:
            layers = [("fc", nn.Linear(embed_dim, representation_size)), ("act", nn.Tanh())]
            self.pre_logits: nn.Module = nn.Sequential(OrderedDict(layers))
        else:
            self.pre_logits = nn.Identity()
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.final_dropout = nn.Dropout(dropcls) if dropcls > 0 else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(initialise)

    def _block(self, index: int, dim: int, options: dict[str, str], **shared: Any) -> nn.Module:
        return Block(dim, mixer=GridFilter(dim, self.patch_embed.grid, **options), **shared)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features ``[B, num_features]`` of images."""
        x = self.pos_drop(self.patch_embed(x) + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.pre_logits(self.norm(x).mean(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.final_dropout(self.forward_features(x)))


class SpectFormer(GFNet):
    """SpectFormer: a :class:`GFNet` whose blocks from ``alpha`` on are attention blocks with two residuals.

    Args:
        img_size ... dropcls, out_dtype, dft: as in :class:`GFNet`; ``drop_rate`` is also that of the attention.
        alpha: how many blocks are spectral. Default 4.
        num_heads: heads of the attention blocks; divides ``embed_dim``. Default 6.

    Raises:
        ValueError: as :class:`GFNet`, or ``num_heads`` does not divide ``embed_dim``.

    Source: Patro et al., 2023, and badripatro/SpectFormers, vanilla architecture (4 and 6 are constants there).

    Example:
        >>> import torch
        >>> from fastcifar.spectral import SpectFormer
        >>> model = SpectFormer(32, 4, num_classes=10, embed_dim=64, depth=3, alpha=2, num_heads=4)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, *args: Any, alpha: int = 4, num_heads: int = 6, **options: Any) -> None:
        if alpha < 0:
            raise ValueError(f"SpectFormer: expected alpha of 0 or more, got {alpha}")
        self.alpha, self.num_heads = alpha, num_heads
        super().__init__(*args, **options)

    def _block(self, index: int, dim: int, options: dict[str, str], **shared: Any) -> nn.Module:
        if index < self.alpha:
            return super()._block(index, dim, options, **shared)
        return AttentionBlock(dim, self.num_heads, **shared)


class GFNetPyramid(_Classifier):
    """The hierarchical Global Filter Network: four stages, each on a grid half as high and wide as the one before.

    Args:
        img_size: side of the images, or ``(height, width)``, at least eight patches. Default 224.
        patch_size: side of the patches of the first stage. Default 4.
        num_classes: classes (1000).
        embed_dim, depth, mlp_ratio: channels, blocks and MLP ratio of each stage.
        drop_rate, drop_path_rate: dropout in the MLPs, stochastic depth rising over all blocks. Default 0.
        norm_layer: makes a norm from a number of channels. Default LayerNorm with eps 1e-6.
        init_values: layer scale at first. Default 0.001.
        no_layerscale: blocks without layer scale. Default False.
        dropcls: dropout before the head. Default 0.
        in_chans: channels of the images. Default 3.
        out_dtype, dft: of the filters, as in :class:`~fastcifar.spectral.GlobalFilter`.

    Raises:
        ValueError: a size does not fit; at a call, if the images are of another size.

    Source: Rao et al., NeurIPS 2021, table 2, and raoyongming/GFNet (class ``GFNetPyramid``). There is no dropout after
    the position embedding, as in that code's forward.

    Example:
        >>> import torch
        >>> from fastcifar.spectral import GFNetPyramid
        >>> model = GFNetPyramid(img_size=32, num_classes=10, embed_dim=[8, 16, 32, 64], depth=[1, 1, 1, 1])
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 4,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (64, 128, 256, 512),
        depth: Sequence[int] = (2, 2, 10, 4),
        mlp_ratio: Sequence[float] = (4, 4, 4, 4),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Norm | None = None,
        init_values: float = 0.001,
        no_layerscale: bool = False,
        dropcls: float = 0.0,
        *,
        in_chans: int = 3,
        out_dtype: str = "input",
        dft: str = "kernel",
    ) -> None:
        super().__init__()
        if {len(embed_dim), len(depth), len(mlp_ratio)} != {4}:
            raise ValueError(
                "GFNetPyramid: expected embed_dim, depth and mlp_ratio of four stages each, "
                f"got {len(embed_dim)}, {len(depth)} and {len(mlp_ratio)}"
            )
        if min(depth) < 0:
            raise ValueError(f"GFNetPyramid: expected depths of 0 or more, got {list(depth)}")
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim[-1]
        norm = norm_layer or layer_norm
        first = PatchEmbed(img_size, patch_size, in_chans, embed_dim[0])
        grids = [(first.grid[0] >> i, first.grid[1] >> i) for i in range(4)]
        if min(grids[-1]) < 1:
            raise ValueError(f"GFNetPyramid: expected a grid of at least 8 x 8 patches, got {first.grid}")
        self.pos_embed = nn.Parameter(torch.zeros(1, first.num_patches, embed_dim[0]))
        down = [DownLayer(grids[i], embed_dim[i], embed_dim[i + 1]) for i in range(3)]
        self.patch_embed = nn.ModuleList([first, *down])
        rates = iter(rising(drop_path_rate, sum(depth)))
        self.blocks = nn.ModuleList()
        for dim, count, ratio, grid in zip(embed_dim, depth, mlp_ratio, grids, strict=True):
            stage = []
            for rate in [next(rates) for _ in range(count)]:
                mixer = GridFilter(dim, grid, out_dtype=out_dtype, dft=dft)
                common = (dim, ratio, drop_rate, rate, norm, mixer)
                stage.append(Block(*common) if no_layerscale else BlockLayerScale(*common, init_values))
            self.blocks.append(nn.Sequential(*stage))
        self.norm = norm(embed_dim[-1])
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.final_dropout = nn.Dropout(dropcls) if dropcls > 0 else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(initialise)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features ``[B, num_features]`` of images."""
        for i, (embed, stage) in enumerate(zip(self.patch_embed, self.blocks, strict=True)):
            x = embed(x) + self.pos_embed if i == 0 else embed(x)
            x = stage(x)
        return self.norm(x).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.final_dropout(self.forward_features(x)))


# ---- the published sizes ---------------------------------------------------------------------------------------------


def _merge(options: dict[str, Any], **size: Any) -> dict[str, Any]:
    return size | options


def gfnet_ti(**options: Any) -> GFNet:
    """GFNet-Ti: 7 M parameters at 224 x 224; ``options`` are those of :class:`GFNet`."""
    return GFNet(**_merge(options, embed_dim=256, depth=12))


def gfnet_xs(**options: Any) -> GFNet:
    """GFNet-XS: 16 M parameters at 224 x 224; ``options`` are those of :class:`GFNet`."""
    return GFNet(**_merge(options, embed_dim=384, depth=12))


def gfnet_s(**options: Any) -> GFNet:
    """GFNet-S: 25 M parameters at 224 x 224; ``options`` are those of :class:`GFNet`."""
    return GFNet(**_merge(options, embed_dim=384, depth=19, drop_path_rate=0.15))


def gfnet_b(**options: Any) -> GFNet:
    """GFNet-B: 43 M parameters at 224 x 224; ``options`` are those of :class:`GFNet`."""
    return GFNet(**_merge(options, embed_dim=512, depth=19, drop_path_rate=0.25))


_H_TI: dict[str, Any] = {"embed_dim": (64, 128, 256, 512), "depth": (3, 3, 10, 3), "drop_path_rate": 0.1}
_H_S: dict[str, Any] = {
    "embed_dim": (96, 192, 384, 768),
    "depth": (3, 3, 10, 3),
    "drop_path_rate": 0.2,
    "init_values": 1e-5,
}
_H_B: dict[str, Any] = {
    "embed_dim": (96, 192, 384, 768),
    "depth": (3, 3, 27, 3),
    "drop_path_rate": 0.4,
    "init_values": 1e-6,
}


def gfnet_h_ti(**options: Any) -> GFNetPyramid:
    """GFNet-H-Ti: 15 M parameters at 224 x 224; ``options`` are those of :class:`GFNetPyramid`."""
    return GFNetPyramid(**(_H_TI | options))


def gfnet_h_s(**options: Any) -> GFNetPyramid:
    """GFNet-H-S: 32 M parameters at 224 x 224; ``options`` are those of :class:`GFNetPyramid`."""
    return GFNetPyramid(**(_H_S | options))


def gfnet_h_b(**options: Any) -> GFNetPyramid:
    """GFNet-H-B: 54 M parameters at 224 x 224; ``options`` are those of :class:`GFNetPyramid`."""
    return GFNetPyramid(**(_H_B | options))


def spectformer_ti(**options: Any) -> SpectFormer:
    """SpectFormer-T: 9 M parameters, 4 heads; ``options`` are those of :class:`SpectFormer`."""
    return SpectFormer(**_merge(options, embed_dim=256, depth=12, num_heads=4))


def spectformer_xs(**options: Any) -> SpectFormer:
    """SpectFormer-XS: 20 M parameters, 6 heads; ``options`` are those of :class:`SpectFormer`."""
    return SpectFormer(**_merge(options, embed_dim=384, depth=12, num_heads=6))


def spectformer_s(**options: Any) -> SpectFormer:
    """SpectFormer-S: 32 M parameters, 6 heads; ``options`` are those of :class:`SpectFormer`."""
    return SpectFormer(**_merge(options, embed_dim=384, depth=19, num_heads=6, drop_path_rate=0.15))


def spectformer_b(**options: Any) -> SpectFormer:
    """SpectFormer-B: 57 M parameters, 8 heads (the 12 that the official code's comment names do not divide its 512
    channels); ``options`` are those of :class:`SpectFormer`."""
    return SpectFormer(**_merge(options, embed_dim=512, depth=19, num_heads=8, drop_path_rate=0.25))
