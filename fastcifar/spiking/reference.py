"""The spiking neurons in plain PyTorch: the executable specification that every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from .surrogate import Surrogate, resolve


def lif(
    x: Tensor,
    v: Tensor | None = None,
    *,
    tau: float = 2.0,
    decay_input: bool = True,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate: str | Surrogate = "atan",
    detach_reset: bool = False,
    store_v_seq: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Leaky integrate-and-fire over ``x[T, N...]``; see :func:`fastcifar.spiking.functional.lif`.

    Each step charges, fires and resets (Fang et al., "SpikingJelly", Science Advances 2023, eqs. 1 to 4)::

        H[t] = V[t-1] + (X[t] - (V[t-1] - V_reset)) / tau      decay_input
        H[t] = V[t-1] - (V[t-1] - V_reset) / tau + X[t]        otherwise
        S[t] = 1 if H[t] >= V_threshold else 0
        V[t] = S[t] V_reset + (1 - S[t]) H[t]                  hard reset
        V[t] = H[t] - S[t] V_threshold                         soft reset (v_reset is None)
    """
    surrogate = resolve(surrogate, "lif")
    state_dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    rest = 0.0 if v_reset is None else v_reset
    # A tensor, not a Python number: CUDA divides by a Python number as a product with its rounded reciprocal.
    tau_ = torch.full((), tau, dtype=state_dtype, device=x.device)
    v = torch.full(x.shape[1:], rest, dtype=state_dtype, device=x.device) if v is None else v.to(state_dtype)

    spikes, v_seq = [], []
    for x_t in x.to(state_dtype).unbind(0):
        h = v + (x_t - (v - rest)) / tau_ if decay_input else v - (v - rest) / tau_ + x_t
        s = surrogate(h - v_threshold)
        s_reset = s.detach() if detach_reset else s
        v = h - s_reset * v_threshold if v_reset is None else s_reset * v_reset + (1 - s_reset) * h
        spikes.append(s)
        v_seq.append(v)

    def stack(steps: list[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.stack(steps).to(dtype) if steps else x.new_empty(x.shape, dtype=dtype)

    return stack(spikes, x.dtype), v, stack(v_seq, state_dtype) if store_v_seq else None
