"""Diffusion with early exits: a U-ViT whose samples leave at the layer that is sure of its noise (DeeDiff)."""

from .deediff import DeeDiffLoss, UncertaintyHead, layer_loss, uncertainty_loss, uncertainty_target
from .diffusevae import diffusevae_loss, diffusevae_noise, diffusevae_sample, diffusevae_table, guidance_of_weight
from .found import FoundSchedule
from .functional import Step, solver_step
from .lowdiff import lowdiff_loss, lowdiff_pair, lowdiff_sample, upsample_into
from .mixture import GaussianMixture
from .noise import dynamic_threshold, normal_numbers
from .one_step import ddim, ddpm, euler, euler_ancestral, heun
from .predictor import SchedulePredictor
from .probing import from_diffusers
from .pseudo_numerical import ipndm, pndm
from .run import SolverRun
from .sampling import Thresholding, sample
from .schedule import CosineVP, DiscreteVP, EDMSchedule, FlowSchedule, LinearVP, Schedule, exploding
from .search import search_schedule
from .search_result import SearchResult, Trial
from .search_space import Candidate, SearchSpace
from .shifted import shifted_table
from .solvers import SOLVERS, deis, dpm_solver, dpm_solver_singlestep, lms, solver_table, unipc
from .table import Points, SolverTable
from .tree import TreeSampler, TreeSamples
from .tree_step import TableStep
from .trojan_audit import TrojanReport, detect_trojan, invert_trigger, trigger_score
from .trojdiff import Poisoned, Trigger, poison, trojan_loss, trojan_noise, trojan_sample, trojan_shift, trojan_table
from .usf import Corrector, Decision, load_decisions, save_decisions
from .usf import usf as usf_table
from .uvit import UViT, UViTOutputs, UViTResult
from .vae import DiffuseVAE, DiffuseVAEResult, ImageVAE

__all__ = [
    "SOLVERS",
    "Candidate",
    "Corrector",
    "CosineVP",
    "Decision",
    "DeeDiffLoss",
    "DiffuseVAE",
    "DiffuseVAEResult",
    "DiscreteVP",
    "EDMSchedule",
    "FlowSchedule",
    "FoundSchedule",
    "GaussianMixture",
    "ImageVAE",
    "LinearVP",
    "Points",
    "Poisoned",
    "Schedule",
    "SchedulePredictor",
    "SearchResult",
    "SearchSpace",
    "SolverRun",
    "SolverTable",
    "Step",
    "TableStep",
    "Thresholding",
    "TreeSampler",
    "TreeSamples",
    "Trial",
    "Trigger",
    "TrojanReport",
    "UViT",
    "UViTOutputs",
    "UViTResult",
    "UncertaintyHead",
    "ddim",
    "ddpm",
    "deis",
    "detect_trojan",
    "diffusevae_loss",
    "diffusevae_noise",
    "diffusevae_sample",
    "diffusevae_table",
    "dpm_solver",
    "dpm_solver_singlestep",
    "dynamic_threshold",
    "euler",
    "euler_ancestral",
    "exploding",
    "from_diffusers",
    "guidance_of_weight",
    "heun",
    "invert_trigger",
    "ipndm",
    "layer_loss",
    "lms",
    "load_decisions",
    "lowdiff_loss",
    "lowdiff_pair",
    "lowdiff_sample",
    "normal_numbers",
    "pndm",
    "poison",
    "sample",
    "save_decisions",
    "search_schedule",
    "shifted_table",
    "solver_step",
    "solver_table",
    "trigger_score",
    "trojan_loss",
    "trojan_noise",
    "trojan_sample",
    "trojan_shift",
    "trojan_table",
    "uncertainty_loss",
    "uncertainty_target",
    "unipc",
    "upsample_into",
    "usf_table",
]
