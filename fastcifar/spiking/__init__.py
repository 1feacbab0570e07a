"""Spiking neurons over all time steps in one pass over memory, with what surrounds them: surrogate gradients, batch
norms over time, packed spikes, and conversion from an ordinary network."""

from . import functional, reference, surrogate
from .batchnorm import (
    BatchNormThroughTime1d,
    BatchNormThroughTime2d,
    FusedNeuron,
    TemporalEffectiveBatchNorm1d,
    TemporalEffectiveBatchNorm2d,
    ThresholdDependentBatchNorm1d,
    ThresholdDependentBatchNorm2d,
    affine_of,
    fuse,
)
from .calibration import Calibration
from .conversion import SpikingNetwork, convert
from .dynamic_confidence import DynamicConfidence, DynamicConfidenceResult
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
from .packed import PackedSpikes, pack, packed_conv2d, packed_linear
from .quantize import LSQ, QCFS, lsq, qcfs

__all__ = [
    "ALIF",
    "CUBALIF",
    "EIF",
    "IF",
    "ILIF",
    "KLIF",
    "LIF",
    "LSQ",
    "PLIF",
    "QCFS",
    "QIF",
    "BatchNormThroughTime1d",
    "BatchNormThroughTime2d",
    "Calibration",
    "DynamicConfidence",
    "DynamicConfidenceResult",
    "FusedNeuron",
    "Izhikevich",
    "Leaky",
    "PackedSpikes",
    "SignedIF",
    "SpikingNetwork",
    "TemporalEffectiveBatchNorm1d",
    "TemporalEffectiveBatchNorm2d",
    "ThresholdDependentBatchNorm1d",
    "ThresholdDependentBatchNorm2d",
    "affine_of",
    "alif",
    "convert",
    "cuba_lif",
    "eif",
    "functional",
    "fuse",
    "ilif",
    "integrate_and_fire",
    "izhikevich",
    "klif",
    "leaky",
    "lif",
    "lsq",
    "pack",
    "packed_conv2d",
    "packed_linear",
    "plif",
    "qcfs",
    "qif",
    "reference",
    "signed_if",
    "surrogate",
]
