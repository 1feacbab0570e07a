"""snnTorch's ``Leaky`` over our kernels: change ``import snntorch as snn`` to ``from fastcifar.compat import snntorch
as snn`` where ``snn.Leaky`` and ``snn.surrogate`` are used.

snnTorch takes one time step a call. So does this, and beside it :meth:`Leaky.multi_step` takes the whole sequence in
one pass over memory, which is where the kernel's speed is.

What differs from snnTorch 1.0.0, on purpose:

- Spikes have the input's dtype, not always float32. For bfloat16 and float16 the membrane is float32.
- ``sigmoid``'s gradient is finite everywhere; snnTorch's is NaN where ``exp(-slope u)`` overflows, with the default
  slope from 3.6 below the threshold on.
- Setting ``reset_mechanism``, or loading a state_dict with another one, changes what the neuron does; snnTorch changes
  the buffer only.
- ``Leaky.instances`` holds its neurons weakly and knows copied and unpickled ones, too. ``snntorch.utils.reset`` does
  not look there: call :meth:`Leaky.reset_hidden`.
- Where the input's shape is another than the membrane's, the latter starts at 0 on the input's device.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..spiking import functional
from ..spiking.surrogate import ATan, Surrogate
from . import _snntorch_surrogate as surrogate
from ._cached import CachedRead

__all__ = ["Leaky", "surrogate"]

_MECHANISMS = ("subtract", "zero", "none")  # in the order of reset_mechanism_val


def _is_one(tensor: Tensor) -> bool:
    return bool((tensor == 1).all())


def _floating(parameter: Tensor, x: Tensor) -> Tensor:
    """A buffer made of an integer, such as ``threshold=1``, as our functions take it."""
    return parameter if parameter.is_floating_point() else parameter.to(x.dtype)


class Leaky(nn.Module):
    """snnTorch's ``Leaky``: :func:`fastcifar.spiking.functional.leaky`, a step at a time.

    Args:
        beta: decay of the membrane a step, a number or a tensor that broadcasts against the input; clamped to 0 .. 1 at
            each call.
        threshold: the neuron fires strictly above it; a number or a tensor. Default 1.
        spike_grad: a surrogate of :mod:`fastcifar.spiking.surrogate`, of ``snntorch.surrogate``, or any callable that
            maps ``mem - threshold`` to spikes. Default ``atan()``. SSO, custom_surrogate and callables of one's own run
            step by step in PyTorch.
        surrogate_disable: whether spikes have no gradient. Default False.
        init_hidden: whether the membrane is kept between calls, which then return spikes only. Default False.
        inhibition: whether only the neuron with the highest membrane of each sample may fire. Default False.
        learn_beta, learn_threshold, learn_graded_spikes_factor: whether they are parameters. Default False.
        reset_mechanism: ``"subtract"``, ``"zero"`` or ``"none"``. Default ``"subtract"``.
        state_quant: a function that quantises the membrane, or False. Default False.
        output: whether the membrane is returned also with ``init_hidden``. Default False.
        graded_spikes_factor: spikes are multiplied by it. Default 1.
        reset_delay: whether the reset comes one step after the spike. Default True.

    ``surrogate_disable``, ``inhibition``, ``state_quant`` and ``reset_delay=False`` run step by step in PyTorch.

    Attributes:
        mem: the membrane of the last step, before the reset; a buffer that is not in the state_dict.

    Raises:
        ValueError: reset_mechanism is another.
        TypeError: ``mem`` is passed to a neuron with ``init_hidden``.

    Example:
        >>> import torch
        >>> from fastcifar.compat import snntorch as snn
        >>> lif = snn.Leaky(beta=0.9, spike_grad=snn.surrogate.atan())
        >>> spk, mem = lif(torch.full((2, 3), 1.5), lif.reset_mem())
        >>> lif.multi_step(torch.full((4, 2, 3), 1.5))[0].shape
        torch.Size([4, 2, 3])
    """

    instances: ClassVar[weakref.WeakSet[Leaky]] = weakref.WeakSet()
    mem: Tensor
    beta: Tensor
    threshold: Tensor
    graded_spikes_factor: Tensor
    reset_mechanism_val: Tensor

    def __init__(
        self,
        beta: float | Tensor,
        threshold: float | Tensor = 1.0,
        spike_grad: Surrogate | Callable[[Tensor], Tensor] | None = None,
        surrogate_disable: bool = False,
        init_hidden: bool = False,
        inhibition: bool = False,
        learn_beta: bool = False,
        learn_threshold: bool = False,
        reset_mechanism: str = "subtract",
        state_quant: Any = False,
        output: bool = False,
        graded_spikes_factor: float | Tensor = 1.0,
        learn_graded_spikes_factor: bool = False,
        reset_delay: bool = True,
    ) -> None:
        super().__init__()
        self.spike_grad = ATan() if spike_grad is None else spike_grad
        self.surrogate_disable = surrogate_disable
        self.init_hidden = init_hidden
        self.inhibition = inhibition
        self.state_quant = state_quant
        self.output = output
        self.reset_delay = reset_delay
        if inhibition:
            warnings.warn("Leaky: inhibition expects dense layers, inputs [batch, neurons]", UserWarning, stacklevel=2)
        self._add("threshold", threshold, learn_threshold)
        self._add("graded_spikes_factor", graded_spikes_factor, learn_graded_spikes_factor)
        self.register_buffer("reset_mechanism_val", torch.as_tensor(0))
        self.reset_mechanism = reset_mechanism
        self._add("beta", beta, learn_beta)
        self.register_buffer("mem", torch.zeros(0), persistent=False)
        self._factor_is_one = CachedRead(_is_one)
        self.instances.add(self)

    def _add(self, name: str, value: float | Tensor, learnt: bool) -> None:
        value = torch.as_tensor(value)
        if learnt:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def reset_mechanism(self) -> str:
        """``"subtract"``, ``"zero"`` or ``"none"``; setting it sets ``reset_mechanism_val``, its place in that list."""
        return self._reset_mechanism

    @reset_mechanism.setter
    def reset_mechanism(self, value: str) -> None:
        if value not in _MECHANISMS:
            raise ValueError(f"Leaky: expected reset_mechanism to be subtract, zero or none; got {value!r}")
        self._reset_mechanism = value
        self.reset_mechanism_val = torch.as_tensor(_MECHANISMS.index(value), device=self.reset_mechanism_val.device)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._reset_mechanism = _MECHANISMS[int(self.reset_mechanism_val)]

    # ---- calls ----

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        """One step.

        Args:
            input_: currents ``[N...]``.
            mem: the membrane before the step; without it, the last call's. Where its shape is another than the input's,
                it is read as zeros.

        Returns:
            ``(spikes, mem)``, or with ``init_hidden`` and not ``output`` only spikes.
        """
        self.mem = self._membrane(input_, input_.shape, mem)
        if (kernel := self._kernel_surrogate()) is None:
            spk = self._step(input_)
        else:
            spikes, self.mem, _ = self._kernel(input_.unsqueeze(0), kernel, False)
            spk = self._graded(spikes.squeeze(0))
        return spk if self.init_hidden and not self.output else (spk, self.mem)

    def multi_step(self, x_seq: Tensor, mem: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All steps at once: what calling the neuron step by step and stacking would give.

        Args:
            x_seq: currents ``[T, N...]``, time first.
            mem: the membrane before the first step, as in a call of a step.

        Returns:
            ``(spikes, mem_seq)``, both ``[T, N...]``, whatever ``init_hidden`` and ``output`` are; :attr:`mem` is the
            last step's membrane.
        """
        self.mem = self._membrane(x_seq, x_seq.shape[1:], mem)
        if (kernel := self._kernel_surrogate()) is not None:
            spikes, self.mem, mem_seq = self._kernel(x_seq, kernel, True)
            return self._graded(spikes), mem_seq
        steps = [(self._step(x), self.mem) for x in x_seq]
        if not steps:
            return torch.empty_like(x_seq), torch.empty_like(x_seq, dtype=self.mem.dtype)
        spk_seq, mem_seq = zip(*steps, strict=True)
        return torch.stack(spk_seq), torch.stack(mem_seq)

    def _membrane(self, x: Tensor, shape: torch.Size, given: Tensor | None) -> Tensor:
        if given is not None and self.init_hidden:
            raise TypeError("Leaky: expected no mem with init_hidden=True, which keeps its own")
        mem = self.mem if given is None else given
        full = torch.float64 if x.dtype == torch.float64 else torch.float32
        if mem.shape != shape:
            return torch.zeros(shape, dtype=full, device=x.device)
        return mem if mem.dtype in (full, x.dtype) else mem.to(full)

    def _kernel_surrogate(self) -> Surrogate | None:
        """The surrogate for the kernel, or None where the step must be taken in PyTorch."""
        if self.surrogate_disable or self.inhibition or self.state_quant or not self.reset_delay:
            return None
        return surrogate.own_surrogate(self.spike_grad)

    def _kernel(self, x_seq: Tensor, kernel: Surrogate, store: bool) -> Any:
        options: dict[str, Any] = {"reset_mechanism": self.reset_mechanism, "surrogate": kernel, "store_v_seq": store}
        beta, threshold = _floating(self.beta, x_seq), _floating(self.threshold, x_seq)
        return functional.leaky(x_seq, self.mem, beta=beta, v_threshold=threshold, **options)

    def _graded(self, spikes: Tensor) -> Tensor:
        """Spikes times their factor; a factor of 1 that is not learnt costs no pass over memory."""
        factor = self.graded_spikes_factor
        known = not (factor.requires_grad or torch.compiler.is_compiling() or factor.is_meta)
        return spikes if known and self._factor_is_one(factor) else spikes * factor

    # ---- snnTorch's step in PyTorch ----

    def _spikes(self, above: Tensor) -> Tensor:
        if self.surrogate_disable:
            return (above > 0).to(above.dtype)
        known = surrogate.own_surrogate(self.spike_grad)
        return self.spike_grad(above) if known is None else known.strict(above)

    def fire(self, mem: Tensor) -> Tensor:
        """Spikes of a membrane, times their factor."""
        mem = self.state_quant(mem) if self.state_quant else mem
        return self._spikes(mem - self.threshold) * self.graded_spikes_factor

    def fire_inhibition(self, batch_size: int, mem: Tensor) -> Tensor:
        """Spikes of the neuron with the highest membrane of each of ``batch_size`` samples, without their factor."""
        above = mem - self.threshold
        highest = above.argmax(1)
        winners = torch.zeros_like(above)
        winners[torch.arange(batch_size, device=above.device), highest] = 1
        return self._spikes(above) * winners

    def mem_reset(self, mem: Tensor) -> Tensor:
        """1 where a membrane is to be reset; no part of the gradient."""
        return self._spikes(mem - self.threshold).detach()

    def _step(self, x: Tensor) -> Tensor:
        mechanism, reset = self.reset_mechanism, self.mem_reset(self.mem)
        mem = (1 - reset) * self.mem if mechanism == "zero" else self.mem
        mem = self.beta.clamp(0, 1) * mem + x
        if mechanism == "subtract":
            mem = mem - reset * self.threshold
        if self.state_quant:
            mem = self.state_quant(mem)
        spk = self.fire_inhibition(len(mem), mem) if self.inhibition else self.fire(mem)
        if not self.reset_delay:
            now = spk / self.graded_spikes_factor - reset  # what the delayed reset has not done yet
            if mechanism == "subtract":
                mem = mem - now * self.threshold
            elif mechanism == "zero":
                mem = mem - now * mem
        self.mem = mem
        return spk.to(x.dtype)

    # ---- hidden state ----

    def reset_mem(self) -> Tensor:
        """Sets the membrane to 0 and returns it."""
        self.mem = torch.zeros_like(self.mem)
        return self.mem

    def init_leaky(self) -> Tensor:
        """snnTorch's old name of :meth:`reset_mem`."""
        return self.reset_mem()

    @classmethod
    def reset_hidden(cls) -> None:
        """Sets the membranes of all neurons of this class to 0."""
        for neuron in cls.instances:
            if isinstance(neuron, cls):
                neuron.reset_mem()

    @classmethod
    def detach_hidden(cls) -> None:
        """Cuts the gradient history of the membranes of all neurons of this class."""
        for neuron in cls.instances:
            if isinstance(neuron, cls):
                neuron.mem = neuron.mem.detach()

    def __getstate__(self) -> dict[str, Any]:
        """The membrane without its autograd history, which neither deepcopy nor pickle could carry."""
        return {**self.__dict__, "_buffers": {**self._buffers, "mem": self.mem.detach()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.instances.add(self)

    def extra_repr(self) -> str:
        return f"reset_mechanism={self.reset_mechanism}, reset_delay={self.reset_delay}, init_hidden={self.init_hidden}"
