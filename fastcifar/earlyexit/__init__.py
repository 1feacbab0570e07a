"""Early exit: who leaves a batch, and how the rest moves together."""

from . import functional, reference, thresholds
from .functional import CRITERIA, ExitDecision, compact, exit_decide, scatter_results
from .thresholds import ParetoFront, exit_shares, find_thresholds, first_exit, pareto

__all__ = [
    "CRITERIA",
    "ExitDecision",
    "ParetoFront",
    "compact",
    "exit_decide",
    "exit_shares",
    "find_thresholds",
    "first_exit",
    "functional",
    "pareto",
    "reference",
    "scatter_results",
    "thresholds",
]
