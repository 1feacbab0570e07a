"""What the nodes of :mod:`fastcifar.compat.spikingjelly` share: state that SpikingJelly's tools can see, steps and
sequences, and the methods through which a subclass may change a neuron."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..spiking import surrogate as surrogates
from ..spiking.surrogate import AnySurrogate, Surrogate

__all__ = ["MemoryModule", "SpikingNode", "StatefulNode", "States", "own_surrogate"]

try:
    from spikingjelly.activation_based.base import MemoryModule
except ImportError:

    class MemoryModule(nn.Module):  # type: ignore[no-redef]
        """The part of SpikingJelly's ``base.MemoryModule`` that neurons need, where SpikingJelly is not installed."""

        def __init__(self) -> None:
            super().__init__()
            self._memories: dict[str, object] = {}
            self._memories_rv: dict[str, object] = {}
            self._step_mode = "s"

        def __getattr__(self, name: str) -> Any:
            memories = self.__dict__.get("_memories", {})
            return memories[name] if name in memories else super().__getattr__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            memories = self.__dict__.get("_memories", {})
            if name in memories:
                memories[name] = value
            else:
                super().__setattr__(name, value)

        @property
        def step_mode(self) -> str:
            return self._step_mode

        @step_mode.setter
        def step_mode(self, value: str) -> None:
            if value not in ("s", "m"):
                raise ValueError(f"step_mode: expected 's' (single-step) or 'm' (multi-step), got {value!r}")
            self._step_mode = value

        def register_memory(self, name: str, value: object) -> None:
            self._memories[name] = value
            self.set_reset_value(name, value)

        def set_reset_value(self, name: str, value: object) -> None:
            self._memories_rv[name] = copy.deepcopy(value)

        def memories(self):
            yield from self._memories.values()

        def named_memories(self):
            yield from self._memories.items()

        def reset(self) -> None:
            for name, value in self._memories_rv.items():
                self._memories[name] = copy.deepcopy(value)

        def forward(self, *args, **kwargs):
            step = self.single_step_forward if self.step_mode == "s" else self.multi_step_forward
            return step(*args, **kwargs)

        def _apply(self, fn, recurse=True):
            super()._apply(fn, recurse)
            for name, value in self._memories.items():
                if isinstance(value, Tensor):
                    self._memories[name] = fn(value)
            return self


# ---- surrogates ------------------------------------------------------------------------------------------------------

# SpikingJelly's surrogate classes, by name: our class, and its attributes in the order of our class's numbers.
_SURROGATES: dict[str, tuple[type[Surrogate], tuple[str, ...]]] = {
    "ATan": (surrogates.ATan, ("alpha",)),
    "DeterministicPass": (surrogates.DeterministicPass, ()),
    "Erf": (surrogates.Erf, ("alpha",)),
    "FakeNumericalGradient": (surrogates.FakeNumericalGradient, ("alpha",)),
    "LeakyKReLU": (surrogates.LeakyKReLU, ("leak", "k")),
    "LogTailedReLU": (surrogates.LogTailedReLU, ("alpha",)),
    "NonzeroSignLogAbs": (surrogates.NonzeroSignLogAbs, ("alpha",)),
    "PiecewiseExp": (surrogates.PiecewiseExp, ("alpha",)),
    "PiecewiseLeakyReLU": (surrogates.PiecewiseLeakyReLU, ("w", "c")),
    "PiecewiseQuadratic": (surrogates.PiecewiseQuadratic, ("alpha",)),
    "QPseudoSpike": (surrogates.QPseudoSpike, ("alpha",)),
    "Rect": (surrogates.Rectangular, ("alpha",)),
    "S2NN": (surrogates.S2NN, ("alpha", "beta")),
    "Sigmoid": (surrogates.Sigmoid, ("alpha",)),
    "SoftSign": (surrogates.SoftSign, ("alpha",)),
    "SquarewaveFourierSeries": (surrogates.SquarewaveFourierSeries, ("n", "T_period")),
    "SuperSpike": (surrogates.SuperSpike, ("alpha",)),
}


def own_surrogate(surrogate: Any) -> Surrogate | Callable[[Tensor], Tensor]:
    """Our counterpart of one of SpikingJelly's surrogates, or ``surrogate`` itself where only calling it will do: the
    user's own, one that does not spike, one whose numbers ours does not take."""
    kind = type(surrogate)
    if kind.__module__.partition(".")[0] != "spikingjelly" or not getattr(surrogate, "spiking", True):
        return surrogate
    ours, names = _SURROGATES.get(kind.__name__, (None, ()))
    numbers = [getattr(surrogate, name, None) for name in names]
    if ours is None or not all(isinstance(number, (int, float)) for number in numbers):
        return surrogate
    try:
        return ours(*numbers)
    except ValueError:
        return surrogate


# ---- state and steps -------------------------------------------------------------------------------------------------

# The methods that a subclass may override to change the neuron, SpikingJelly 0.0.0.0.14's and 2.0.0's.
_PHASES = ("neuronal_charge", "neuronal_adaptation", "neuronal_fire", "neuronal_reset")
_TRANSITIONS = ("single_step_functional_forward", "multi_step_functional_forward")

States = tuple[Any, ...]


class StatefulNode(MemoryModule):
    """A node whose memories go through one of our functions, a step or a sequence at a time.

    A concrete node says how to call its function (:meth:`_call`) and where its states start (:meth:`_start`), and lists
    the latter in the function's order in :attr:`states`.
    """

    states: ClassVar[tuple[str, ...]] = ("v",)
    own: ClassVar[tuple[str, ...]] = ()  # attributes that are arguments of the function, by its names
    overridden: ClassVar[frozenset[str]] = frozenset()  # which of the methods above the user's subclass has changed
    # Not a property, as 0.0.0.0.14's is, which would refuse the name of a library that is not installed.
    backend: str = "torch"
    supported_backends = ("torch", "cupy", "triton", "inductor")

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        ours = next(base for base in cls.__mro__ if base.__module__.rpartition(".")[0] == __package__)
        names = (*_PHASES, *_TRANSITIONS)
        cls.overridden = frozenset(n for n in names if getattr(cls, n, None) is not getattr(ours, n, None))

    def _call(self, x_seq: Tensor, states: States, store_v_seq: bool) -> tuple:
        """``(spikes, *states, v_seq)`` of the node's function."""
        raise NotImplementedError

    def _start(self, name: str) -> float:
        """What the function starts a state at where it is given none."""
        raise NotImplementedError

    def _check(self, like: Tensor) -> None:
        """Raises the function's errors in the node's name."""
        try:
            with torch.no_grad():
                self._call(like, (None,) * len(self.states), False)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{type(self).__name__}:{str(error).partition(':')[2]}") from None

    # ---- states ----

    def _state(self, name: str, value: Any, x: Tensor, shape: torch.Size, lazily: bool) -> Tensor | None:
        """A state for a step of ``shape`` and ``x``'s dtype; ``lazily``, None where the function would start there."""
        full = torch.float64 if x.dtype == torch.float64 else torch.float32
        if isinstance(value, Tensor) and value.shape == shape:
            return value.to(x.device, x.dtype if self.overridden or value.dtype == x.dtype else full)
        start = self._start(name)
        number = start if value is None or isinstance(value, Tensor) else float(value)
        if lazily and number == start:
            return None
        return torch.full(shape, number, dtype=x.dtype if self.overridden else full, device=x.device)

    def materialize_states(self, inputs: tuple[Tensor, ...], states: States, step_mode: str) -> States:
        """The states as tensors that fit ``inputs``, without changing the node: SpikingJelly 2.0.0's interface."""
        x = inputs[0]
        shape = x.shape if step_mode == "s" else x.shape[1:]
        return tuple(
            self._state(name, value, x, shape, False) if name in self.states else value
            for name, value in zip(self._memories, states, strict=True)
        )

    def _keep(self, states: States) -> None:
        for name, value in zip(self._memories, states, strict=True):
            self._memories[name] = value

    def _run(self, x_seq: Tensor, store_v_seq: bool) -> tuple[Tensor, Tensor | None]:
        """Spikes and membranes of a sequence, from and to the node's own states."""
        given = (self._state(name, self._memories[name], x_seq, x_seq.shape[1:], True) for name in self.states)
        spikes, *states, v_seq = self._call(x_seq, tuple(given), store_v_seq)
        for name, value in zip(self.states, states, strict=True):
            self._memories[name] = value
        return spikes, v_seq

    # ---- the explicit-state interface of SpikingJelly 2.0.0, for functional_forward and for subclasses ----

    def single_step_functional_forward(self, inputs, states, **kwargs):
        if self.overridden.isdisjoint(_PHASES):
            outputs, states = self._functional(inputs[0].unsqueeze(0), states)
            return (outputs[0].squeeze(0),), states
        before = tuple(self._memories.values())
        self._keep(states)
        try:
            self.neuronal_charge(inputs[0])
            self.neuronal_adaptation()
            spike = self.neuronal_fire()
            self.neuronal_reset(spike)
            return (spike,), tuple(self._memories.values())
        finally:
            self._keep(before)

    def multi_step_functional_forward(self, inputs, states, **kwargs):
        if not self.overridden:
            return self._functional(inputs[0], states)
        outputs, states, _ = self._unrolled(inputs, states, **kwargs)
        return outputs, states

    def _functional(self, x_seq: Tensor, states: States) -> tuple[tuple[Tensor], States]:
        named = dict(zip(self._memories, states, strict=True))
        spikes, *after, _ = self._call(x_seq, tuple(named[name] for name in self.states), False)
        named.update(zip(self.states, after, strict=True))
        return (spikes,), tuple(named.values())

    def _unrolled(self, inputs: tuple[Tensor, ...], states: States, **kwargs) -> tuple[tuple, States, Tensor]:
        """A sequence step by step, through the subclass's methods; also the first state after each step."""
        steps, first = [], []
        for step_inputs in zip(*inputs, strict=True):
            outputs, states = self.single_step_functional_forward(step_inputs, states, **kwargs)
            steps.append(outputs)
            first.append(states[0])
        return tuple(torch.stack(series) for series in zip(*steps, strict=True)), states, torch.stack(first)

    # ---- one step, many steps ----

    def _keeps_v_seq(self) -> bool:
        return False

    def _record(self, v_seq: Tensor | None) -> None:
        """Takes the membranes ``[T, N...]`` of a call."""

    def single_step_forward(self, x: Tensor, *args, **kwargs):
        if not self.overridden:
            spikes, _ = self._run(x.unsqueeze(0), False)
            outputs: tuple = (spikes.squeeze(0),)
        else:
            inputs = (x, *args)
            states = self.materialize_states(inputs, tuple(self._memories.values()), "s")
            outputs, states = self.single_step_functional_forward(inputs, states, **kwargs)
            self._keep(states)
        return outputs[0] if len(outputs) == 1 else outputs

    def multi_step_forward(self, x_seq: Tensor, *args, **kwargs):
        store_v_seq = self._keeps_v_seq()
        if not self.overridden:
            spikes, v_seq = self._run(x_seq, store_v_seq)
            self._record(v_seq)
            return spikes
        inputs = (x_seq, *args)
        states = self.materialize_states(inputs, tuple(self._memories.values()), "m")
        if store_v_seq:
            outputs, states, v_seq = self._unrolled(inputs, states, **kwargs)
            self._record(v_seq)
        else:
            outputs, states = self.multi_step_functional_forward(inputs, states, **kwargs)
        self._keep(states)
        return outputs[0] if len(outputs) == 1 else outputs

    def detach(self) -> None:
        """Keeps the states' values and cuts their gradient history."""
        for name, value in self._memories.items():
            if isinstance(value, Tensor):
                self._memories[name] = value.detach()

    def __getstate__(self) -> dict[str, Any]:
        """The states without their autograd history, which neither deepcopy nor pickle could carry."""
        state = self.__dict__.copy()
        state["_memories"] = {n: v.detach() if isinstance(v, Tensor) else v for n, v in self._memories.items()}
        return state

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in (*self.own, "step_mode"))


class SpikingNode(StatefulNode):
    """A node with a membrane, a threshold, a reset and a surrogate: what SpikingJelly's ``BaseNode`` is.

    Args:
        options: the concrete node's own attributes and parameters.
        memories: its states beside the membrane, with their values at rest.
    """

    function: ClassVar[Callable[..., Any]]
    learnt: ClassVar[tuple[str, ...]] = ()  # parameters that the function takes between x and the states
    v: Any  # the membrane [N...]; a float while at rest
    surrogate_function: Any

    def __init__(
        self,
        v_threshold: float,
        v_reset: float | None,
        surrogate_function: AnySurrogate | None,
        detach_reset: bool,
        step_mode: str,
        backend: str | bool,
        store_v_seq: bool,
        memories: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(backend, bool):  # 2.0.0 has no backend: store_v_seq takes its place
            store_v_seq, backend = backend, "torch"
        self.register_memory("v", 0.0 if v_reset is None else v_reset)
        for name, rest in (memories or {}).items():
            self.register_memory(name, rest)
        self.v_threshold = v_threshold
        self.v_reset = v_reset
        if isinstance(surrogate_function, str):
            surrogate_function = surrogates.resolve(surrogate_function, type(self).__name__)
        self.surrogate_function = surrogates.Sigmoid() if surrogate_function is None else surrogate_function
        self.detach_reset = detach_reset
        self.step_mode = step_mode
        self.backend = backend
        self.store_v_seq = store_v_seq
        for name, value in options.items():
            setattr(self, name, value)
        shape = v_threshold.shape if isinstance(v_threshold, Tensor) else ()
        self._check(torch.empty(0, *shape, device=getattr(v_threshold, "device", None)))

    @property
    def store_v_seq(self) -> bool:
        return self._store_v_seq

    @store_v_seq.setter
    def store_v_seq(self, value: bool) -> None:
        self._store_v_seq = value
        self.v_seq: Tensor | None = None

    def _keeps_v_seq(self) -> bool:
        return self.store_v_seq

    def _record(self, v_seq: Tensor | None) -> None:
        self.v_seq = v_seq

    def _start(self, name: str) -> float:
        return 0.0 if name != "v" or self.v_reset is None else self.v_reset

    def _options(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in self.own},
            "v_threshold": self.v_threshold,
            "v_reset": self.v_reset,
            "surrogate": own_surrogate(self.surrogate_function),
            "detach_reset": self.detach_reset,
        }

    def _call(self, x_seq: Tensor, states: States, store_v_seq: bool) -> tuple:
        learnt = [getattr(self, name) for name in self.learnt]
        return type(self).function(x_seq, *learnt, *states, **self._options(), store_v_seq=store_v_seq)

    def single_step_forward(self, x: Tensor, *args, **kwargs):
        outputs = super().single_step_forward(x, *args, **kwargs)
        if self.store_v_seq:
            # As in 2.0.0: the steps since the last reset, or since x's shape, device or dtype changed.
            v, so_far = self.v.unsqueeze(0), self.v_seq
            if so_far is None or (so_far.shape[1:], so_far.device, so_far.dtype) != (v.shape[1:], v.device, v.dtype):
                self.v_seq = v.clone()
            else:
                self.v_seq = torch.cat((so_far, v))
        return outputs

    def reset(self) -> None:
        super().reset()
        self.v_seq = None

    def detach(self) -> None:
        super().detach()
        self.v_seq = None if self.v_seq is None else self.v_seq.detach()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["v_seq"] = None if self.v_seq is None else self.v_seq.detach()
        return state

    # ---- the phases of SpikingJelly 0.0.0.0.14, for subclasses that change one ----

    def neuronal_charge(self, x: Tensor) -> None:
        raise NotImplementedError

    def neuronal_adaptation(self) -> None:
        """What happens between charge and fire: nothing, but in neurons with a recovery."""

    def neuronal_fire(self) -> Tensor:
        return self.surrogate_function(self.v - self.v_threshold)

    def neuronal_reset(self, spike: Tensor) -> None:
        self.v = self._after(spike, self.v, self.v_threshold)

    def _after(self, spike: Tensor, v: Tensor, threshold: float | Tensor) -> Tensor:
        """The membrane after the reset."""
        spike = spike.detach() if self.detach_reset else spike
        return v - spike * threshold if self.v_reset is None else spike * self.v_reset + (1.0 - spike) * v

    def extra_repr(self) -> str:
        shared = ("v_threshold", "v_reset", "detach_reset")
        return ", ".join((*(f"{name}={getattr(self, name)}" for name in shared), super().extra_repr()))
