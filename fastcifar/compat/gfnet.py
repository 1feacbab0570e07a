"""GFNet's classes over our kernels: change ``from gfnet import ...`` to ``from fastcifar.compat.gfnet import ...``.

Class names, arguments, parameter names and state_dict keys are those of ``gfnet.py`` in raoyongming/GFNet; its
checkpoints load strictly. As there, a :class:`GlobalFilter` casts its input to float32 and returns float32, whatever
came in (where the parameter was made float64, float64); ``out_dtype="input"`` returns the input's dtype instead. What
differs: tokens may be ``[B, H, W, C]`` or not contiguous, image and patch sizes may be pairs, the layer of
``representation_size`` is called, a wrong argument raises a ValueError or TypeError that says what was expected, and
nothing is printed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..spectral import layers, models, modules
from ..spectral.layers import Norm

__all__ = ["Block", "BlockLayerScale", "DownLayer", "GFNet", "GFNetPyramid", "GlobalFilter", "Mlp", "PatchEmbed"]


class GlobalFilter(modules.GlobalFilter):
    """:class:`fastcifar.spectral.GlobalFilter` with the official dtype rule.

    Example:
        >>> import torch
        >>> from fastcifar.compat.gfnet import GlobalFilter
        >>> GlobalFilter(32, h=8, w=5)(torch.randn(2, 64, 32, dtype=torch.bfloat16)).dtype
        torch.float32
    """

    def __init__(self, dim: int, h: int = 14, w: int = 8, **options: Any) -> None:
        super().__init__(dim, h, w, **({"out_dtype": "float32"} | options))


class Mlp(layers.Mlp):
    """Two linear layers with an activation between; dropout after both."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        hidden = hidden_features or in_features
        super().__init__(in_features, hidden, drop)
        self.act = act_layer()
        if out_features not in (None, in_features):
            self.fc2 = nn.Linear(hidden, out_features)  # type: ignore[arg-type]


class Block(layers.Block):
    """GFNet's block of one residual, with a :class:`GlobalFilter` of ``h`` by ``w``."""

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
        super().__init__(dim, mlp_ratio, drop, drop_path, norm_layer, GlobalFilter(dim, h, w))
        self.mlp.act = act_layer()


class BlockLayerScale(layers.BlockLayerScale):
    """:class:`Block` with a learnt scale ``gamma`` of the branch."""

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
        init_values: float = 1e-5,
    ) -> None:
        super().__init__(dim, mlp_ratio, drop, drop_path, norm_layer, GlobalFilter(dim, h, w), init_values)
        self.mlp.act = act_layer()


class PatchEmbed(layers.PatchEmbed):
    """Images to patches, with the official defaults."""

    def __init__(
        self, img_size: layers.Size = 224, patch_size: layers.Size = 16, in_chans: int = 3, embed_dim: int = 768
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim)


class DownLayer(layers.DownLayer):
    """Half the height and width, from a square grid of side ``img_size``."""

    def __init__(self, img_size: int = 56, dim_in: int = 64, dim_out: int = 128) -> None:
        super().__init__((img_size, img_size), dim_in, dim_out)
        self.img_size, self.dim_in, self.dim_out = img_size, dim_in, dim_out
        self.num_patches = (img_size // 2) ** 2

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.img_size**2:
            raise ValueError(f"DownLayer: expected {self.img_size**2} tokens, got {tuple(x.shape)}")
        return super().forward(x)


class GFNet(models.GFNet):
    """:class:`fastcifar.spectral.GFNet` with the official dtype rule.

    Example:
        >>> from fastcifar.compat.gfnet import GFNet
        >>> GFNet(img_size=32, patch_size=4, embed_dim=8, depth=1).blocks[0].filter.complex_weight.shape
        torch.Size([8, 5, 8, 2])
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **({"out_dtype": "float32"} | options))


class GFNetPyramid(models.GFNetPyramid):
    """:class:`fastcifar.spectral.GFNetPyramid` with the official dtype rule."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **({"out_dtype": "float32"} | options))
