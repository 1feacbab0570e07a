"""The spiking family's promises; see :mod:`fastcifar.spec`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..spec import BadInput, Inputs, OpSpec, Outputs, run
from . import functional, modules, reference
from .surrogate import ATan, Sigmoid, resolve

_SHAPES = {"empty": (3, 0, 5), "one": (1, 1), "prime": (5, 2, 3, 7, 11), "large": (4, 2, 33, 31, 29)}

# How a parameter broadcasts against [N...].
_KINDS: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "scalar": lambda n: (),
    "row": lambda n: n[-1:],
    "channel": lambda n: (n[-3:][0], *[1] * (len(n[-3:]) - 1)),
    "neuron": lambda n: n[-3:],  # shared by the samples of a batch
    "sample": lambda n: n,
}
Parameters = dict[str, tuple[str, float, float]]  # kind, lowest and highest value


def _shared_parameters(threshold: str, scale: str, shift: str) -> Parameters:
    return {"v_threshold": (threshold, 0.7, 1.3), "scale": (scale, 0.8, 1.2), "shift": (shift, -0.1, 0.1)}


def _sampler(states: tuple[str, ...], parameters: Parameters, currents: float) -> Callable[..., Inputs]:
    """Currents strong enough that about a third of the neurons fire, and a membrane around the threshold."""

    def sample(size: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        shape, state_dtype = _SHAPES[size], _library.state_dtype(dtype)

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        inputs = {"x": (normal(shape) * currents + 0.5).to(device, dtype)}
        for name in states:
            inputs[name] = (normal(shape[1:]) * 0.5).to(device, state_dtype)
        for name, (kind, low, high) in parameters.items():
            uniform = torch.rand(_KINDS[kind](shape[1:]), generator=generator, dtype=torch.float64)
            inputs[name] = (low + (high - low) * uniform).to(device, state_dtype)
        return inputs

    return sample


def _comparable(truth: Outputs, eager: Outputs) -> Tensor:
    """Neurons that spike alike; thresholds are above 0.7, and an output in half precision is rounded."""
    assert truth[0] is not None
    assert eager[0] is not None
    return ((truth[0] - eager[0]).abs() < 0.3).all(0)


def _sure(inputs: Inputs, options: dict[str, Any]) -> Tensor:
    """Steps up to the first one where the reference's ``h`` is so close to the threshold that an exponential that is
    1.5 ulp off, and the steps before it, may decide. A NaN and an infinity leave no doubt."""
    seen: list[Tensor] = []
    surrogate = resolve(options.get("surrogate", "atan"))

    def watched(u: Tensor) -> Tensor:
        seen.append(u)
        return surrogate(u)

    run(reference.eif, inputs, options | {"surrogate": watched}, ())
    u = torch.stack(seen)
    return (u.abs() <= 64 * torch.finfo(u.dtype).eps).logical_not().cumprod(0).bool()


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def _number(name: str, value: Any, error: type[Exception], says: str) -> BadInput:
    return BadInput(f"{name}={value}", lambda: {"x": _x(2, 3), name: value}, error, says)


_LIKE_TAU = (
    _number("tau", 1.0, ValueError, "tau above 1"),
    _number("tau", float("nan"), ValueError, "tau to be finite"),
    _number("tau", torch.ones(3, dtype=torch.int64), TypeError, "a number or a floating tensor, got torch.int64"),
    _number("tau", torch.ones(2), ValueError, r"tau to broadcast against \(3,\) .* got \(2,\)"),
    _number("tau", "2", TypeError, "tau to be a number or a tensor, got str"),
)
_SHARED_BAD_INPUTS = {
    "x": (
        BadInput("no tensor", lambda: {"x": [1.0]}, TypeError, "expected x to be a tensor"),
        BadInput("integers", lambda: {"x": _x(2, 3, dtype=torch.int64)}, TypeError, "got torch.int64"),
        BadInput("complex", lambda: {"x": _x(2, 3, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
        BadInput("sparse", lambda: {"x": _x(2, 3).to_sparse()}, TypeError, "sparse"),
        BadInput("a scalar", lambda: {"x": torch.tensor(1.0)}, ValueError, "got a scalar"),
    ),
    "v": (
        BadInput("state a number", lambda: {"x": _x(2, 3), "v": 0.0}, TypeError, "v to be a tensor"),
        BadInput("state's shape", lambda: {"x": _x(2, 3), "v": _x(2, 3)}, ValueError, r"v of shape \(3,\)"),
        BadInput("half state", lambda: {"x": _x(2, 3), "v": _x(3).half()}, TypeError, "got torch.float16"),
        BadInput("state's device", lambda: {"x": _x(2, 3), "v": _x(3).to("meta")}, ValueError, "got meta"),
    ),
    "v_threshold": (
        _number("v_threshold", float("inf"), ValueError, "v_threshold to be finite"),
        _number("v_threshold", torch.ones(4, 3), ValueError, r"v_threshold to broadcast against \(3,\)"),
        _number("v_threshold", torch.ones(3, device="meta"), ValueError, "v_threshold on x's device cpu, got meta"),
    ),
    "v_reset": (
        _number("v_reset", "soft", TypeError, "v_reset to be a number"),
        _number("v_reset", torch.tensor(0.0), TypeError, "v_reset to be a number, got Tensor"),
    ),
    "surrogate": (
        _number("surrogate", "arctan", ValueError, "got 'arctan'"),
        _number("surrogate", ATan, TypeError, r"surrogate to be .* got ATan \(the class\)"),
        _number("surrogate", 2.0, TypeError, "surrogate to be .* got float"),
    ),
    "scale": (
        _number("scale", 2.0, TypeError, "scale to be a tensor or None, got float"),
        _number("shift", torch.ones(2), ValueError, "shift to broadcast"),
    ),
    "spike_format": (
        _number("spike_format", "int8", ValueError, "spike_format to be one of"),
        BadInput(
            "a gradient of bytes",
            lambda: {"x": _x(2, 3).requires_grad_(), "spike_format": "uint8"},
            ValueError,
            "no gradient to be asked for|spikes have a sign",
        ),
    ),
}
_SECOND_STATE = (
    BadInput("second state a number", lambda: {"x": _x(2, 3), "w": 0.0}, TypeError, "w to be a tensor"),
    BadInput("second state's shape", lambda: {"x": _x(2, 3), "w": _x(4)}, ValueError, r"w of shape \(3,\)"),
)


def _neuron(
    function: Callable[..., Outputs],
    module: type[modules.Neuron],
    parameters: Parameters,
    *cases: tuple[str, dict[str, Any]],
    states: tuple[str, ...] = ("v",),
    bad_inputs: tuple[BadInput, ...] = (),
    currents: float = 1.5,
    exact: bool = True,
    layouts: tuple[str, ...] | None = ("contiguous", "second_dimension_first", "sliced"),
) -> OpSpec:
    """A neuron's promises.

    Args:
        cases: of each combination of options, the parameters that are tensors in it ("all" or names), and the other
            arguments; parameters in neither are as the function has them by default.
        currents: spread of x.
    """
    name, arguments = function.__name__, inspect.signature(function).parameters
    defaults = {p: arguments[p].default for p in parameters}
    options = []
    for tensors, given in cases:
        chosen = parameters if tensors == "all" else tensors.split()
        fixed = {p: d for p, d in defaults.items() if p not in chosen and d is not inspect.Parameter.empty}
        options.append(fixed | given)
    required = {p: torch.zeros(()) for p, d in defaults.items() if d is inspect.Parameter.empty}

    def with_required(bad: BadInput) -> BadInput:
        return BadInput(bad.what, lambda: {**required, **bad.arguments()}, bad.error, bad.says)

    shared = [bad for argument, several in _SHARED_BAD_INPUTS.items() if argument in arguments for bad in several]
    shared += _SECOND_STATE if "w" in states else ()
    outputs = len(states) + 2
    return OpSpec(
        name=name,
        family="spiking",
        function=function,
        reference=getattr(reference, name),
        sample=_sampler(states, parameters, currents),
        options=tuple(options),
        differentiable=("x", *states, *parameters),
        broadcast=tuple(parameters),
        exact=tuple(range(outputs)) if exact else (),
        comparable=_comparable,
        sure=None if exact else _sure,
        raw_ops=("neuron_forward", "neuron_backward"),
        module=lambda: module(store_v_seq=True, v_threshold=0.75),
        bad_inputs=tuple(with_required(bad) for bad in (*shared, *bad_inputs)),
        layouts=layouts,
    )


SPECS = [
    _neuron(
        functional.lif,
        modules.LIF,
        {"tau": ("channel", 1.5, 4.0)} | _shared_parameters("neuron", "channel", "scalar"),
        ("", {}),
        ("all", {"surrogate": "sigmoid", "detach_reset": True, "store_v_seq": True}),
        ("v_threshold", {"surrogate": "piecewise_quadratic", "v_reset": None, "tau": 3.0}),
        ("scale", {"surrogate": "rectangular", "decay_input": False, "tau": 1.7}),
        ("all", {"surrogate": ATan(alpha=0.7), "v_reset": None, "decay_input": False, "store_v_seq": True}),
        ("shift", {"surrogate": Sigmoid(alpha=25.0), "v_reset": -0.25, "v_threshold": 0.5, "tau": 10.0}),
        ("tau", {"v": None, "v_reset": 0.2, "detach_reset": True, "store_v_seq": True}),
        bad_inputs=(
            *_LIKE_TAU,
            BadInput("tau 0", lambda: {"x": _x(2, 3), "tau": 0.0, "decay_input": False}, ValueError, "tau above 0"),
            _number("v", _x(3).double(), TypeError, "v in torch.float32 .* got torch.float64"),
        ),
        layouts=None,
    ),
    _neuron(
        functional.integrate_and_fire,
        modules.IF,
        _shared_parameters("sample", "scalar", "row"),
        ("", {"v_reset": None}),
        ("all", {"surrogate": "fast_sigmoid", "detach_reset": True, "store_v_seq": True}),
        ("v_threshold", {"surrogate": "erf", "v_reset": -0.3, "v": None}),
    ),
    _neuron(
        functional.plif,
        modules.PLIF,
        {"w": ("scalar", -1.0, 1.0)} | _shared_parameters("channel", "neuron", "sample"),
        ("w", {}),
        ("all", {"surrogate": "sigmoid", "decay_input": False, "v_reset": None, "store_v_seq": True}),
        ("w v_threshold", {"surrogate": "soft_sign", "detach_reset": True, "v_reset": -0.25}),
        bad_inputs=(
            _number("w", 0.0, TypeError, "w to be a tensor, got float"),
            _number("w", torch.zeros(2), ValueError, "w to broadcast"),
        ),
    ),
    _neuron(
        functional.qif,
        modules.QIF,
        {"tau": ("neuron", 1.5, 4.0)} | _shared_parameters("row", "sample", "channel"),
        ("", {}),
        ("all", {"surrogate": "super_spike", "a0": 0.7, "v_rest": -0.2, "v_c": 0.6, "store_v_seq": True}),
        ("v_threshold", {"detach_reset": True, "v_reset": None, "a0": 0.5, "tau": 8.0}),
        bad_inputs=(
            *_LIKE_TAU,
            _number("a0", 0.0, ValueError, "a0 above 0"),
            _number("v_c", torch.ones(3), TypeError, "v_c to be a number, got Tensor"),
        ),
    ),
    _neuron(
        functional.eif,
        modules.EIF,
        {"tau": ("channel", 1.5, 4.0)} | _shared_parameters("scalar", "row", "neuron"),
        ("", {}),
        ("all", {"surrogate": "piecewise_exp", "delta_T": 0.8, "theta_rh": 0.6, "v_rest": -0.1, "store_v_seq": True}),
        ("v_threshold", {"detach_reset": True, "v_reset": None, "delta_T": 2.0, "tau": 8.0, "store_v_seq": True}),
        bad_inputs=(*_LIKE_TAU, _number("delta_T", -1.0, ValueError, "delta_T above 0")),
        exact=False,
    ),
    _neuron(
        functional.klif,
        modules.KLIF,
        {"k": ("scalar", 0.8, 1.5), "tau": ("sample", 1.5, 4.0)} | _shared_parameters("channel", "scalar", "row"),
        ("", {}),
        ("all", {"surrogate": "q_pseudo_spike", "scale_reset": True, "v_reset": -0.1, "store_v_seq": True}),
        ("k", {"scale_reset": True, "v_reset": None, "decay_input": False, "detach_reset": True}),
        ("k tau v_threshold", {"v_reset": None, "decay_input": False, "surrogate": "s2nn"}),
        bad_inputs=(*_LIKE_TAU, _number("k", "1", TypeError, "k to be a number or a tensor")),
    ),
    _neuron(
        functional.ilif,
        modules.ILIF,
        {"tau": ("row", 1.2, 3.0)} | _shared_parameters("neuron", "channel", "channel"),
        ("", {}),
        ("all", {"max_spikes": 2, "grad_window": (-0.5, 2.5), "store_v_seq": True}),
        ("tau v_threshold", {"max_spikes": 7, "detach_reset": True, "v": None}),
        bad_inputs=(
            *_LIKE_TAU,
            _number("max_spikes", 0, ValueError, "max_spikes to be an integer of 1 to 255, got 0"),
            _number("max_spikes", 2.0, ValueError, "max_spikes to be an integer"),
            _number("spike_format", "packed", ValueError, "a spike count is no bit"),
        ),
        currents=2.5,
    ),
    _neuron(
        functional.leaky,
        modules.Leaky,
        {"beta": ("channel", 0.5, 0.95)} | _shared_parameters("neuron", "scalar", "channel"),
        ("", {}),
        ("all", {"reset_mechanism": "zero", "surrogate": "fast_sigmoid", "store_v_seq": True}),
        ("beta", {"reset_mechanism": "none", "surrogate": "triangular"}),
        ("all", {"surrogate": "leaky_spike", "v": None}),
        bad_inputs=(
            _number("reset_mechanism", "add", ValueError, "reset_mechanism to be subtract, zero or none; got 'add'"),
            _number("beta", float("inf"), ValueError, "beta to be finite"),
            _number("beta", torch.ones(2), ValueError, "beta to broadcast"),
        ),
    ),
    _neuron(
        functional.izhikevich,
        modules.Izhikevich,
        {"tau": ("scalar", 1.5, 4.0)} | _shared_parameters("sample", "row", "neuron"),
        ("", {}),
        ("all", {"surrogate": "soft_sign", "a": 0.3, "b": 0.2, "tau_w": 3.0, "v_rest": -0.2, "store_v_seq": True}),
        ("", {"w": None, "w_rest": 0.4, "b": 0.3, "v_reset": None, "tau": 8.0, "a0": 0.5, "v_c": 0.6}),
        ("v_threshold", {"a": -0.2, "b": -0.1, "detach_reset": True, "v": None}),
        states=("v", "w"),
        bad_inputs=(*_LIKE_TAU, _number("tau_w", 0.0, ValueError, "tau_w above 0")),
    ),
    _neuron(
        functional.cuba_lif,
        modules.CUBALIF,
        {"current_decay": ("channel", 0.2, 0.8), "voltage_decay": ("neuron", 0.5, 0.95)}
        | _shared_parameters("scalar", "sample", "scalar"),
        ("", {}),
        ("all", {"surrogate": "sigmoid", "v_reset": None, "store_v_seq": True}),
        ("current_decay", {"detach_reset": True, "v_reset": 0.1, "w": None}),
        states=("v", "w"),
        bad_inputs=(
            _number("current_decay", torch.ones(2), ValueError, "current_decay to broadcast"),
            _number("voltage_decay", None, TypeError, "voltage_decay to be a number or a tensor"),
        ),
    ),
    _neuron(
        functional.alif,
        modules.ALIF,
        {"tau": ("neuron", 1.5, 4.0)} | _shared_parameters("channel", "row", "sample"),
        ("", {}),
        ("all", {"surrogate": "erf", "beta": 0.4, "rho": 0.7, "v_reset": None, "store_v_seq": True}),
        ("v_threshold", {"decay_input": False, "detach_reset": True, "v_reset": -0.2, "beta": -0.1}),
        ("tau", {"decay_input": False, "beta": 0.0, "w": None}),
        states=("v", "w"),
        bad_inputs=(*_LIKE_TAU, _number("rho", torch.tensor(0.9), TypeError, "rho to be a number, got Tensor")),
    ),
    _neuron(
        functional.signed_if,
        modules.SignedIF,
        _shared_parameters("channel", "neuron", "scalar"),
        ("", {"w": None}),
        ("all", {"s_max": 2.0, "s_min": 0.0, "store_v_seq": True}),
        ("v_threshold", {"s_max": 1.0, "s_min": -1.0, "surrogate": "piecewise_quadratic", "detach_reset": True}),
        states=("v", "w"),
        bad_inputs=(
            _number("v_threshold", 0.0, ValueError, "v_threshold above 0"),
            _number("s_max", float("nan"), ValueError, "s_max to be a number or infinite, got nan"),
            _number("spike_format", "uint8", ValueError, "spikes have a sign"),
            BadInput(
                "states of two dtypes",
                lambda: {"x": _x(2, 3), "v": _x(3).double(), "w": _x(3)},
                TypeError,
                "expected [vw] in torch.float32",
            ),
        ),
    ),
]
