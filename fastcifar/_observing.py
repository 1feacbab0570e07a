"""What :func:`fastcifar.accelerate` sees of a model: its outputs and times on a batch, without a trace in its state."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

MEMORIES = ("_memories", "_memories_rv", "v_seq")  # SpikingJelly's


@dataclass
class Observed:
    outputs: list[Tensor]
    seconds: float
    of_modules: dict[int, float]


def observe(model: nn.Module, modules: Sequence[nn.Module], batch: tuple, repeats: int = 3) -> Observed:
    """The outputs on a batch, and the least times of the model and of its modules; buffers, membranes and random
    generators are then as before."""
    times: dict[int, list[float]] = {id(m): [] for m in modules}
    began: dict[int, float] = {}
    wait = torch.cuda.synchronize if any(isinstance(t, Tensor) and t.is_cuda for t in batch) else lambda: None

    def start(module: nn.Module, _: Any) -> None:
        wait()
        began[id(module)] = time.perf_counter()

    def stop(module: nn.Module, _: Any, __: Any) -> None:
        wait()
        spent[id(module)] = spent.get(id(module), 0.0) + time.perf_counter() - began[id(module)]

    handles = [m.register_forward_pre_hook(start) for m in modules] + [m.register_forward_hook(stop) for m in modules]
    whole = []
    try:
        for _ in range(repeats):
            spent: dict[int, float] = {}
            state = _state(model)
            try:
                with torch.no_grad(), torch.random.fork_rng():
                    wait()
                    begin = time.perf_counter()
                    result = model(*batch)
                    wait()
                    whole.append(time.perf_counter() - begin)
                    outputs = [t.detach().clone() for t in tensors(result)]
            finally:
                _set_state(model, state)
            for key, seconds in spent.items():
                times[key].append(seconds)
    finally:
        for handle in handles:
            handle.remove()
    if not outputs:
        raise TypeError(f"accelerate: expected the model to return tensors, got {type(result).__name__}")
    return Observed(outputs, min(whole), {key: min(values) for key, values in times.items() if values})


def _state(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """What a forward pass may change in modules of the peers that we know, and in batch norms."""
    return [
        (m, {"_buffers": {name: (t, None if t is None else t.detach().clone()) for name, t in m._buffers.items()}}
         | {name: copy.copy(vars(m)[name]) for name in MEMORIES if name in vars(m)})
        for m in model.modules()
    ]  # fmt: skip


def _set_state(model: nn.Module, state: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, saved in state:
        for name, (tensor, value) in saved.pop("_buffers").items():
            if tensor is not None and not torch.equal(tensor, value):
                tensor.copy_(value)
            module._buffers[name] = tensor
        vars(module).update(saved)


def tensors(result: Any) -> list[Tensor]:
    """The tensors and numbers of a result: of trees, and of dataclasses."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, int | float):
            found.append(torch.tensor(float(leaf)))
        elif is_dataclass(leaf):
            found += tensors([getattr(leaf, f.name) for f in fields(leaf)])
    return found
