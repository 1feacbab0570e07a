"""SpikingJelly's neurons over our kernels: change ``from spikingjelly.activation_based import neuron`` to
``from fastcifar.compat import spikingjelly as neuron`` and nothing else.

Arguments, memories and state_dict keys are those of SpikingJelly 2.0.0; those of 0.0.0.0.14, which has ``backend=``
before ``store_v_seq``, are taken as well, by position or by name. What all nodes share:

- ``surrogate_function`` is a surrogate of SpikingJelly, one of :mod:`fastcifar.spiking.surrogate` or its name, or any
  callable that maps ``h - v_threshold`` to spikes and has a derivative. Default ``Sigmoid(alpha=4)``, as there. Its
  spiking surrogates run in the kernel, all but PoissonPass; other callables run step by step in PyTorch.
- ``step_mode``: ``"s"`` takes ``[N...]`` at each call, ``"m"`` takes ``[T, N...]``. Default ``"s"``.
- ``backend`` is accepted and without effect: torch's dispatcher picks the kernel.
- ``store_v_seq``: whether to keep the membrane of every step in ``v_seq``; in single-step mode of those since the last
  reset.
- States start at rest, also again after a change of the input's shape. For bfloat16 and float16 they are float32.
- A subclass that overrides ``neuronal_charge``, ``neuronal_adaptation``, ``neuronal_fire`` or ``neuronal_reset``
  (0.0.0.0.14), ``single_step_functional_forward`` or ``multi_step_functional_forward`` (2.0.0) is run through its own
  methods, with states in the input's dtype.
- A wrong argument raises the TypeError or ValueError of the node's function, in the node's name.

Where SpikingJelly is installed the nodes derive from its ``MemoryModule``, so that ``functional.reset_net``,
``detach_net`` and ``set_step_mode`` treat them as its own; elsewhere from a small class of the same interface.
"""

from __future__ import annotations

from ._integer_nodes import ILIFNode, MultiLevelSpikeCount, STBIFNode
from ._memory import MemoryModule
from ._nodes import CUBALIFNode, EIFNode, IFNode, IzhikevichNode, KLIFNode, LIFNode, ParametricLIFNode, QIFNode

__all__ = [
    "CUBALIFNode",
    "EIFNode",
    "IFNode",
    "ILIFNode",
    "IzhikevichNode",
    "KLIFNode",
    "LIFNode",
    "MemoryModule",
    "MultiLevelSpikeCount",
    "ParametricLIFNode",
    "QIFNode",
    "STBIFNode",
]
