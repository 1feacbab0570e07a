"""Diffusion with early exits: a U-ViT whose samples leave at the layer that is sure of its noise (DeeDiff)."""

from .deediff import DeeDiffLoss, UncertaintyHead, layer_loss, uncertainty_loss, uncertainty_target
from .tree import TableStep, TreeSampler, TreeSamples
from .uvit import UViT, UViTOutputs, UViTResult

__all__ = [
    "DeeDiffLoss",
    "TableStep",
    "TreeSampler",
    "TreeSamples",
    "UViT",
    "UViTOutputs",
    "UViTResult",
    "UncertaintyHead",
    "layer_loss",
    "uncertainty_loss",
    "uncertainty_target",
]
