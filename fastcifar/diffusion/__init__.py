"""Diffusion with early exits: a U-ViT whose samples leave at the layer that is sure of its noise (DeeDiff)."""

from .deediff import DeeDiffLoss, UncertaintyHead, layer_loss, uncertainty_loss, uncertainty_target
from .mixture import GaussianMixture, vp_linear
from .uvit import UViT, UViTOutputs, UViTResult

__all__ = [
    "DeeDiffLoss",
    "GaussianMixture",
    "UViT",
    "UViTOutputs",
    "UViTResult",
    "UncertaintyHead",
    "layer_loss",
    "uncertainty_loss",
    "uncertainty_target",
    "vp_linear",
]
