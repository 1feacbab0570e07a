"""Spectral mixing: FFT, gate and inverse FFT of token grids in one kernel (GFNet, SpectFormer, AFNO, FNet)."""

from . import export, functional, mixers, mixers_reference, models, reference
from .functional import as_kernel, inverse_spectrum, spectral_gate, spectrum
from .mixers import afno, bfno, fnet
from .models import GFNet, GFNetPyramid, SpectFormer
from .models_hierarchical import SpectFormerH
from .modules import AFNO1D, AFNO2D, BFNO2D, FourierLayer, GlobalFilter, SpectralGatingNetwork

__all__ = [
    "AFNO1D",
    "AFNO2D",
    "BFNO2D",
    "FourierLayer",
    "GFNet",
    "GFNetPyramid",
    "GlobalFilter",
    "SpectFormer",
    "SpectFormerH",
    "SpectralGatingNetwork",
    "afno",
    "as_kernel",
    "bfno",
    "export",
    "fnet",
    "functional",
    "inverse_spectrum",
    "mixers",
    "mixers_reference",
    "models",
    "reference",
    "spectral_gate",
    "spectrum",
]
