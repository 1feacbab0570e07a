"""Diffusion with early exits: a U-ViT whose samples leave at the layer that is sure of its noise (DeeDiff)."""

from .deediff import DeeDiffLoss, UncertaintyHead, layer_loss, uncertainty_loss, uncertainty_target
from .functional import SolverRun, Step, dynamic_threshold, normal_numbers, solver_step
from .table import Points, SolverTable
from .tree import TableStep, TreeSampler, TreeSamples
from .uvit import UViT, UViTOutputs, UViTResult

__all__ = [
    "DeeDiffLoss",
    "Points",
    "SolverRun",
    "SolverTable",
    "Step",
    "TableStep",
    "TreeSampler",
    "TreeSamples",
    "UViT",
    "UViTOutputs",
    "UViTResult",
    "UncertaintyHead",
    "dynamic_threshold",
    "layer_loss",
    "normal_numbers",
    "solver_step",
    "uncertainty_loss",
    "uncertainty_target",
]
