"""``accelerate`` and ``restore`` are all or nothing: each step fails at each module in turn."""

from __future__ import annotations

import pytest
import torch
from test_accelerate import X, _spiking, needs
from torch import nn

from fastcifar import accelerate, restore, swapping


def _is(model: nn.Module) -> list[tuple]:
    """Classes and the very parameters, buffers and hooks of every module, and where calls go."""
    return [
        (type(m), sorted(vars(m)), *(list(map(id, d.values())) for d in (m._parameters, m._buffers, m._forward_hooks)))
        for m in model.modules()
    ]


def _failing(monkeypatch, name: str, nth: int) -> None:
    """The ``nth`` call of a step of :mod:`fastcifar.swapping` raises, once; the others do what they did."""
    works, calls = getattr(swapping, name), iter(range(10**6))

    def step(*args):
        if next(calls) == nth:
            raise OSError(f"{name} {nth}")
        return works(*args)

    monkeypatch.setattr(swapping, name, step)


@needs["spikingjelly"]
@pytest.mark.parametrize("nth", [0, 1])
@pytest.mark.parametrize("step", ["_swap", "_become", "_carry", "_turn_back"])
def test_a_failure_at_any_module_changes_nothing(monkeypatch, step, nth):
    model = _spiking()
    model[2].register_forward_hook(lambda module, _, out: None)
    model(X)  # with membranes
    peers = _is(model)
    if step != "_turn_back":
        with monkeypatch.context() as patch:
            _failing(patch, step, nth)
            with pytest.raises(OSError, match=f"{step} {nth}"):
                accelerate(model)
        assert _is(model) == peers
    accelerate(model)
    swapped = _is(model)
    if step in ("_carry", "_turn_back"):
        with monkeypatch.context() as patch:
            _failing(patch, step, nth)
            with pytest.raises(OSError, match=f"{step} {nth}"):
                restore(model)
        assert _is(model) == swapped
    assert restore(model) == 2
    assert _is(model) == peers


@needs["spikingjelly"]
def test_what_cannot_be_restored_leaves_all_swapped():
    model = _spiking()
    accelerate(model)
    model[4].register_buffer("mine", torch.zeros(1))  # SpikingJelly's node would lose it
    swapped = _is(model)
    with pytest.raises(ValueError, match="buffers are"):
        restore(model)
    assert _is(model) == swapped
    del model[4].mine
    assert restore(model) == 2


@needs["diffusers"]
@needs["spikingjelly"]
def test_an_error_in_a_pipeline_keeps_what_was_swapped_before(monkeypatch):
    from diffusers import DDIMScheduler

    class Pipeline:  # modules of two families and a scheduler, as far as accelerate looks
        def __init__(self):
            self.components = {"first": _spiking(), "scheduler": DDIMScheduler(), "second": _spiking()}

    pipeline = Pipeline()
    first, scheduler, second = pipeline.components.values()
    peers = _is(first), _is(second)
    accelerate(pipeline, families=["diffusion"])
    ours_by_now = type(scheduler)
    with monkeypatch.context() as patch:
        _failing(patch, "_become", 2)
        with pytest.raises(OSError, match="_become 2"):
            accelerate(pipeline)
    assert type(scheduler) is ours_by_now is not DDIMScheduler
    assert (_is(first), _is(second)) == peers
    assert restore(pipeline) == 1
    assert type(scheduler) is DDIMScheduler
