"""fastcifar: custom kernels for CIFAR-scale research, exact and differentiable, on the CPU and on the GPU."""

import importlib
from types import ModuleType

from . import _library as _library  # registers the ops with torch
from ._version import __version__
from .diagnosis import doctor
from .memory import keep_memory_mapped
from .swapping import accelerate, restore

FAMILIES = ("diffusion", "earlyexit", "fixedpoint", "spectral", "spiking")

__all__ = ["__version__", "accelerate", "doctor", "keep_memory_mapped", "restore", *FAMILIES]


def __getattr__(name: str) -> ModuleType:
    """A family is imported when it is asked for: together they take several times as long as what all of them need."""
    if name in FAMILIES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *FAMILIES})
