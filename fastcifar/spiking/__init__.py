"""Spiking neurons: leaky integrate-and-fire over all time steps in one pass over memory."""

from . import functional, reference, surrogate
from .functional import lif
from .modules import LIF

__all__ = ["LIF", "functional", "lif", "reference", "surrogate"]
