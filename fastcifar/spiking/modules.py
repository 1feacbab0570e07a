"""Spiking neurons as modules: thin, stateful, nothing in their state_dict."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional
from .surrogate import Surrogate, resolve


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons that keep their membrane from call to call.

    ``forward`` takes currents ``[T, N...]`` and returns spikes ``[T, N...]``; see
    :func:`fastcifar.spiking.functional.lif` for the formula, the arguments and the errors. The membrane after the last
    step stays in :attr:`v`, and the next call goes on from it: call :meth:`reset` between unrelated sequences and
    :meth:`detach` to cut the gradient (truncated backpropagation through time). State is not part of the state_dict,
    and copying or pickling the module copies the state's values without their history.

    Args:
        tau, decay_input, v_threshold, v_reset, surrogate, detach_reset, store_v_seq: as in
            :func:`~fastcifar.spiking.functional.lif`, with the same defaults.

    Attributes:
        v: membrane ``[N...]`` after the last step, None before the first.
        v_seq: membrane ``[T, N...]`` of the last call where ``store_v_seq`` is set, else None.

    Example:
        >>> import torch
        >>> from fastcifar.spiking import LIF
        >>> neurons = LIF(tau=2.0)
        >>> neurons(torch.full((4, 2, 3), 1.5)).shape
        torch.Size([4, 2, 3])
    """

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate: str | Surrogate = "atan",
        detach_reset: bool = False,
        store_v_seq: bool = False,
    ) -> None:
        super().__init__()
        functional.check_options("LIF", tau, decay_input, v_threshold, v_reset)
        self.tau = tau
        self.decay_input = decay_input
        self.v_threshold = v_threshold
        self.v_reset = v_reset
        self.surrogate = resolve(surrogate, "LIF")
        self.detach_reset = detach_reset
        self.store_v_seq = store_v_seq
        self.reset()

    v: Tensor | None
    v_seq: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        spikes, self.v, self.v_seq = functional.lif(
            x,
            self.v,
            tau=self.tau,
            decay_input=self.decay_input,
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            surrogate=self.surrogate,
            detach_reset=self.detach_reset,
            store_v_seq=self.store_v_seq,
        )
        return spikes

    def reset(self) -> None:
        """Forgets the state: the next call starts at rest."""
        self.v = self.v_seq = None

    def detach(self) -> None:
        """Keeps the state's values and cuts their gradient history."""
        self.v = None if self.v is None else self.v.detach()
        self.v_seq = None if self.v_seq is None else self.v_seq.detach()

    def _apply(self, fn, recurse=True):
        """Moves the state along with the module (``.to``, ``.cuda``, ``.double``)."""
        super()._apply(fn, recurse)
        self.v = None if self.v is None else fn(self.v)
        return self

    def __getstate__(self):
        """The state without its autograd history, which neither deepcopy nor pickle could carry."""
        state = self.__dict__.copy()
        for name in ("v", "v_seq"):
            state[name] = None if state[name] is None else state[name].detach()
        return state

    def extra_repr(self) -> str:
        return (
            f"tau={self.tau}, decay_input={self.decay_input}, v_threshold={self.v_threshold}, v_reset={self.v_reset}, "
            f"surrogate={self.surrogate}, detach_reset={self.detach_reset}, store_v_seq={self.store_v_seq}"
        )
