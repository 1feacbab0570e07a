"""Spiking neurons over all time steps in one pass over memory, with what surrounds them: surrogate gradients, batch
norms over time, packed spikes, and conversion from an ordinary network."""

from . import functional, reference, surrogate
from .functional import (
    alif,
    cuba_lif,
    eif,
    ilif,
    integrate_and_fire,
    izhikevich,
    klif,
    leaky,
    lif,
    plif,
    qif,
    signed_if,
)
from .modules import ALIF, CUBALIF, EIF, IF, ILIF, KLIF, LIF, PLIF, QIF, Izhikevich, Leaky, SignedIF
from .packed import PackedSpikes, pack

__all__ = [
    "ALIF",
    "CUBALIF",
    "EIF",
    "IF",
    "ILIF",
    "KLIF",
    "LIF",
    "PLIF",
    "QIF",
    "Izhikevich",
    "Leaky",
    "PackedSpikes",
    "SignedIF",
    "alif",
    "cuba_lif",
    "eif",
    "functional",
    "ilif",
    "integrate_and_fire",
    "izhikevich",
    "klif",
    "leaky",
    "lif",
    "pack",
    "plif",
    "qif",
    "reference",
    "signed_if",
    "surrogate",
]
