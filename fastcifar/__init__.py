"""fastcifar: custom kernels for CIFAR-scale research, exact and differentiable, on the CPU and on the GPU."""

from . import fixedpoint, spectral, spiking
from ._version import __version__
from .diagnosis import doctor
from .memory import keep_memory_mapped

__all__ = ["__version__", "doctor", "fixedpoint", "keep_memory_mapped", "spectral", "spiking"]
