"""Diffusion with early exits: a U-ViT whose samples leave at the layer that is sure of its noise (DeeDiff)."""

from .deediff import DeeDiffLoss, UncertaintyHead, layer_loss, uncertainty_loss, uncertainty_target
from .table import Points, SolverTable
from .usf import Corrector, Decision, load_decisions, save_decisions, usf
from .uvit import UViT, UViTOutputs, UViTResult

__all__ = [
    "Corrector",
    "Decision",
    "DeeDiffLoss",
    "Points",
    "SolverTable",
    "UViT",
    "UViTOutputs",
    "UViTResult",
    "UncertaintyHead",
    "layer_loss",
    "load_decisions",
    "save_decisions",
    "uncertainty_loss",
    "uncertainty_target",
    "usf",
]
