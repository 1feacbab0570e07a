"""Early exit: who leaves a batch, and how the rest moves together."""

from . import cost, functional, losses, modules, reference, thresholds
from .cost import CostModel, Flops, MeasuredCost, count_flops
from .functional import CRITERIA, ExitDecision, compact, exit_decide, scatter_results
from .losses import JointExitLoss
from .modules import EarlyExit, EarlyExitResult
from .thresholds import ParetoFront, exit_shares, find_thresholds, first_exit, pareto

__all__ = [
    "CRITERIA",
    "CostModel",
    "EarlyExit",
    "EarlyExitResult",
    "ExitDecision",
    "Flops",
    "JointExitLoss",
    "MeasuredCost",
    "ParetoFront",
    "compact",
    "cost",
    "count_flops",
    "exit_decide",
    "exit_shares",
    "find_thresholds",
    "first_exit",
    "functional",
    "losses",
    "modules",
    "pareto",
    "reference",
    "scatter_results",
    "thresholds",
]
