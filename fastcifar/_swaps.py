"""Which modules of which peers :func:`fastcifar.accelerate` knows, and how each becomes one of ours.

A rule is a function from a module (and the one that holds it) to what makes its replacement, a class of ours and its
arguments; or to a sentence that says why the module stays. State is carried over by ``swapping``, not here.

A peer that is a package is known by its class. Research code is copied into other files, so there a class is known by
its name and by what its ``forward`` does: the hash of its source without comments, docstrings and annotations.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[type[nn.Module], dict[str, Any]] | str


def _nothing(module: Any) -> None:
    """For rules with nothing to do beside."""


@dataclass(frozen=True)
class Rule:
    """How a class of a peer becomes ours.

    Attributes:
        family: ours.
        peer: the package or repository.
        make: see the module's docstring.
        signatures: hashes of ``forward``'s source that are known, for a class that is copied around; empty for a
            package's.
        leave, enter: what is to be done beside, to the module before it is swapped and after it is restored.
    """

    family: str
    peer: str
    make: Callable[[nn.Module, nn.Module | None], Made]
    signatures: tuple[str, ...] = ()
    leave: Callable[[Any], None] = _nothing
    enter: Callable[[Any], None] = _nothing


def signature(function: Callable) -> str | None:
    """A hash of what a function's source says, whatever its comments, docstring and annotations; None without source.

    Example:
        >>> from fastcifar._swaps import signature
        >>> signature(textwrap.dedent) == signature(textwrap.dedent)
        True
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return None
    definition.returns, definition.decorator_list = None, []
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:]
    return hashlib.sha256(ast.unparse(definition).encode()).hexdigest()[:16]


def rule_for(module: nn.Module) -> Rule | str | None:
    """The rule of a module's class; a sentence where it is nearly one that we know; None where it is none of them."""
    kind = type(module)
    package = kind.__module__.partition(".")[0]
    if package == __package__:
        return None
    for known in kind.__mro__:
        rule = _PACKAGES.get((known.__module__.partition(".")[0], known.__name__))
        if rule is None:
            continue
        if known is not kind:
            return f"a subclass of {rule.peer}'s {known.__name__}, which may do something else"
        if "forward" in vars(module):
            return "its forward was replaced on the object"
        return rule
    for base in kind.__mro__:
        rule = _COPIED.get(base.__name__)
        if rule is None:
            continue
        if base is not kind:
            return f"a subclass of a {base.__name__}, which may do something else"
        if "forward" in vars(module) or signature(kind.forward) not in rule.signatures:
            return f"its forward is not that of {rule.peer}'s {kind.__name__}"
        return rule
    return None


def _same_arguments(ours: type[nn.Module], module: Any, **given: Any) -> Made:
    """``ours`` with the arguments that ``module`` keeps as attributes."""
    options = dict(given)
    for name in inspect.signature(ours.__init__).parameters:
        if name != "self" and name not in options and hasattr(module, name):
            options[name] = getattr(module, name)
    return ours, options


# ---- spiking ---------------------------------------------------------------------------------------------------------


def _spikingjelly(module: Any, parent: nn.Module | None) -> Made:
    from .compat import spikingjelly

    ours = getattr(spikingjelly, type(module).__name__)
    given: dict[str, Any] = {}
    if "init_tau" in inspect.signature(ours.__init__).parameters:
        given["init_tau"] = 2.0  # w, which it sets, is carried over
    if type(module).__name__ == "ILIFNode" and type(module.surrogate_function).__name__ != "MultiLevelSpikeCount":
        return f"its surrogate {type(module.surrogate_function).__name__} has no counterpart"
    return _same_arguments(ours, module, **given)


def _leaky(module: Any, parent: nn.Module | None) -> Made:
    from .compat import snntorch

    given = {"learn_beta": isinstance(module.beta, nn.Parameter)}
    given["learn_threshold"] = isinstance(module.threshold, nn.Parameter)
    given["learn_graded_spikes_factor"] = isinstance(module.graded_spikes_factor, nn.Parameter)
    return _same_arguments(snntorch.Leaky, module, **given)


# ---- spectral --------------------------------------------------------------------------------------------------------


def _filter(module: Any, parent: nn.Module | None) -> Made:
    from .compat import gfnet, spectformer, spectformer_hierarchical

    h, w, dim, _ = module.complex_weight.shape
    name = type(module).__name__
    options = {"dim": dim, "h": h, "w": w, "dtype": module.complex_weight.dtype}
    if name == "GlobalFilter":
        return gfnet.GlobalFilter, options
    takes_grid = "H" in inspect.signature(type(module).forward).parameters
    source = spectformer_hierarchical if takes_grid else spectformer
    return source.SpectralGatingNetwork, options


def _afno(module: Any, parent: nn.Module | None) -> Made:
    from .compat import afno

    return _same_arguments(getattr(afno, type(module).__name__), module)


# ---- fixed point -----------------------------------------------------------------------------------------------------


class _PowerOfTwoIntQuant(nn.Module):
    """What brevitas's ``IntQuant`` does where the scale is a power of two: one pass forward and one back.

    Args:
        width: bits in all.
        signed: whether they are two's complement.
        narrow: whether the least number is given up.
        passes_clamped: whether numbers that were clamped keep their gradient (``TensorClampSte``).
    """

    def __init__(self, width: int, signed: bool, narrow: bool, passes_clamped: bool) -> None:
        super().__init__()
        self.width, self.signed, self.narrow_range, self.passes_clamped = width, signed, narrow, passes_clamped

    def forward(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        from .fixedpoint import quantize_trainable

        overflow = "sat_sym" if self.narrow_range else "sat"
        if self.passes_clamped:
            with torch.no_grad():
                out = quantize_trainable(x, -scale.log2(), self.width, signed=self.signed, overflow=overflow)
            if not torch.is_grad_enabled() or not (x.requires_grad or scale.requires_grad):
                return out
            # Straight through: 1 to x, and (out - x) / scale to the scale.
            slope = ((out - x) / scale).detach()
            return out + (x - x.detach()) + (scale - scale.detach()) * slope
        return quantize_trainable(x, -scale.log2(), self.width, signed=self.signed, overflow=overflow)

    def extra_repr(self) -> str:
        return f"width={self.width}, signed={self.signed}, narrow_range={self.narrow_range}"


def _brevitas(module: Any, parent: Any) -> Made:
    if type(parent).__name__ != "RescalingIntQuant":
        return "it is not held by brevitas's RescalingIntQuant, which says what its scale is"
    restrictions = {type(m).__name__ for name, m in parent.named_modules() if name.endswith("restrict_value_impl")}
    if (
        "PowerOfTwoRestrictValue" not in restrictions
        or type(parent.int_scaling_impl).__name__ != "PowerOfTwoIntScaling"
    ):
        return "its scale is not a power of two: not a fixed-point quantizer"
    if type(parent.msb_clamp_bit_width_impl).__name__ != "BitWidthConst":
        return "its bit width is trained"
    if type(parent.zero_point_impl).__name__ != "ZeroZeroPoint":
        return "it has a zero point"
    if type(module.float_to_int_impl).__name__ != "RoundSte":
        return f"it rounds by {type(module.float_to_int_impl).__name__}"
    clamp = type(module.tensor_clamp_impl).__name__
    if clamp not in ("TensorClamp", "TensorClampSte"):
        return f"it clamps by {clamp}"
    if type(module.delay_wrapper.delay_impl).__name__ != "_NoDelay":
        return "it waits for some steps of training"
    if type(module.input_view_impl).__name__ != "Identity":
        return "it quantises by groups"
    width = int(parent.msb_clamp_bit_width_impl())
    narrow, passes = module.narrow_range, clamp == "TensorClampSte"
    return _PowerOfTwoIntQuant, {"width": width, "signed": module.signed, "narrow": narrow, "passes_clamped": passes}


def _qtorch(module: Any, parent: nn.Module | None) -> Made:
    from .compat import qtorch

    # A closure holds what the constructor was told.
    rounding = module.quantize.__self__
    inside = dict(inspect.getclosurevars(rounding.forward).nonlocals)
    inside.update(inspect.getclosurevars(rounding.backward).nonlocals)
    numbers, modes = {}, {}
    for direction in ("forward", "backward"):
        numbers[direction] = number = inside.get(f"{direction}_number")
        if number is None:
            modes[direction] = "nearest"
            continue
        if type(number).__name__ != "FixedPoint":
            return f"its {direction} number is a {type(number).__name__}, not fixed point"
        names = inside[f"{direction}_quant"].__code__.co_names
        if any("stochastic" in name for name in names):
            return "it rounds at random, and our random numbers are others: use fastcifar.compat.qtorch"
        modes[direction] = "nearest"
    options = {f"{direction}_number": number for direction, number in numbers.items()}
    return qtorch.Quantizer, options | {f"{direction}_rounding": mode for direction, mode in modes.items()}


# ---- early exit ------------------------------------------------------------------------------------------------------


def _earlyon(module: Any, parent: nn.Module | None) -> Made:
    from .compat import earlyon

    return earlyon.EarlyExitWrapper, {
        "backbone": module.backbone,
        "exit_heads": dict(module.exit_heads.items()),
        "final_classifier": module._final_classifier,
        "config": module.config,
        "input_shape": module._input_shape,
        "feature_adapters": module._feature_adapters,
    }


def _unhook_earlyon(module: Any) -> None:
    for handle in module._hook_handles:
        handle.remove()
    module._hook_handles.clear()


def _rehook_earlyon(module: Any) -> None:
    for layer in module.backbone.modules():
        for key, hook in list(layer._forward_hooks.items()):
            if isinstance(hook, functools.partial) and getattr(hook.func, "__self__", None) is module:
                del layer._forward_hooks[key]
    module._register_hooks()


# ---- what is known ---------------------------------------------------------------------------------------------------

_SPIKINGJELLY = (
    *("IFNode", "LIFNode", "ParametricLIFNode", "QIFNode", "EIFNode", "IzhikevichNode", "KLIFNode", "CUBALIFNode"),
    *("ILIFNode", "STBIFNode"),
)
_PACKAGES: dict[tuple[str, str], Rule] = {
    **{("spikingjelly", name): Rule("spiking", "SpikingJelly", _spikingjelly) for name in _SPIKINGJELLY},
    ("snntorch", "Leaky"): Rule("spiking", "snnTorch", _leaky),
    ("brevitas", "IntQuant"): Rule("fixedpoint", "brevitas", _brevitas),
    ("qtorch", "Quantizer"): Rule("fixedpoint", "QPyTorch", _qtorch),
    ("earlyon", "EarlyExitWrapper"): Rule(
        "earlyexit", "earlyon", _earlyon, leave=_unhook_earlyon, enter=_rehook_earlyon
    ),
}
_COPIED: dict[str, Rule] = {
    "GlobalFilter": Rule("spectral", "GFNet", _filter, ("c89bb999d36379ff",)),
    "SpectralGatingNetwork": Rule("spectral", "SpectFormer", _filter, ("c89bb999d36379ff", "099e72097820577a")),
    "AFNO1D": Rule("spectral", "AFNO", _afno, ("63450306740f8e25",)),
    "AFNO2D": Rule("spectral", "AFNO", _afno, ("ee3872bbec982999",)),
    "BFNO2D": Rule("spectral", "AFNO", _afno, ("f566bebf5be2329f",)),
}
