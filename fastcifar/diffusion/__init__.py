"""Diffusion with early exits: a U-ViT whose samples leave at the layer that is sure of its noise (DeeDiff)."""

from .deediff import DeeDiffLoss, UncertaintyHead, layer_loss, uncertainty_loss, uncertainty_target
from .probing import from_diffusers
from .uvit import UViT, UViTOutputs, UViTResult

__all__ = [
    "DeeDiffLoss",
    "UViT",
    "UViTOutputs",
    "UViTResult",
    "UncertaintyHead",
    "from_diffusers",
    "layer_loss",
    "uncertainty_loss",
    "uncertainty_target",
]
