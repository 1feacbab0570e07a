"""Diffusion with early exits: a U-ViT whose samples leave at the layer that is sure of its noise (DeeDiff)."""

from .deediff import DeeDiffLoss, UncertaintyHead, layer_loss, uncertainty_loss, uncertainty_target
from .diffusevae import diffusevae_loss, diffusevae_noise, diffusevae_sample, diffusevae_table, guidance_of_weight
from .functional import SolverRun, Step, dynamic_threshold, normal_numbers, solver_step
from .lowdiff import lowdiff_loss, lowdiff_pair, lowdiff_sample, upsample_into
from .shifted import shifted_table
from .table import Points, SolverTable
from .tree import TableStep, TreeSampler, TreeSamples
from .trojan_audit import TrojanReport, detect_trojan, invert_trigger, trigger_score
from .trojdiff import Poisoned, Trigger, poison, trojan_loss, trojan_noise, trojan_sample, trojan_shift, trojan_table
from .uvit import UViT, UViTOutputs, UViTResult
from .vae import DiffuseVAE, DiffuseVAEResult, ImageVAE

__all__ = [
    "DeeDiffLoss",
    "DiffuseVAE",
    "DiffuseVAEResult",
    "ImageVAE",
    "Points",
    "Poisoned",
    "SolverRun",
    "SolverTable",
    "Step",
    "TableStep",
    "TreeSampler",
    "TreeSamples",
    "Trigger",
    "TrojanReport",
    "UViT",
    "UViTOutputs",
    "UViTResult",
    "UncertaintyHead",
    "detect_trojan",
    "diffusevae_loss",
    "diffusevae_noise",
    "diffusevae_sample",
    "diffusevae_table",
    "dynamic_threshold",
    "guidance_of_weight",
    "invert_trigger",
    "layer_loss",
    "lowdiff_loss",
    "lowdiff_pair",
    "lowdiff_sample",
    "normal_numbers",
    "poison",
    "shifted_table",
    "solver_step",
    "trigger_score",
    "trojan_loss",
    "trojan_noise",
    "trojan_sample",
    "trojan_shift",
    "trojan_table",
    "uncertainty_loss",
    "uncertainty_target",
    "upsample_into",
]
