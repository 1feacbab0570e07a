"""fastcifar: custom kernels for CIFAR-scale research, exact and differentiable, on the CPU and on the GPU."""

import importlib
from types import ModuleType

from . import earlyexit, spectral, spiking
from ._version import __version__
from .diagnosis import doctor
from .memory import keep_memory_mapped

__all__ = ["__version__", "diffusion", "doctor", "earlyexit", "fixedpoint", "keep_memory_mapped", "spectral", "spiking"]


def __getattr__(name: str) -> ModuleType:
    # Fixed point imports torch.fx, for its conversion: a third of the time that an import may take.
    if name in ("diffusion", "fixedpoint"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
