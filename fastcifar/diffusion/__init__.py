"""Diffusion with early exits: a U-ViT whose samples leave at the layer that is sure of its noise (DeeDiff)."""

from .deediff import DeeDiffLoss, UncertaintyHead, layer_loss, uncertainty_loss, uncertainty_target
from .found import FoundSchedule
from .mixture import GaussianMixture, vp_linear
from .predictor import SchedulePredictor
from .search import search_schedule
from .search_result import SearchResult, Trial
from .search_space import Candidate, SearchSpace
from .table import Points, SolverTable
from .uvit import UViT, UViTOutputs, UViTResult

__all__ = [
    "Candidate",
    "DeeDiffLoss",
    "FoundSchedule",
    "GaussianMixture",
    "Points",
    "SchedulePredictor",
    "SearchResult",
    "SearchSpace",
    "SolverTable",
    "Trial",
    "UViT",
    "UViTOutputs",
    "UViTResult",
    "UncertaintyHead",
    "layer_loss",
    "search_schedule",
    "uncertainty_loss",
    "uncertainty_target",
    "vp_linear",
]
