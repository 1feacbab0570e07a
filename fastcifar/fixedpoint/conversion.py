"""A float CNN turned into one of fixed-point layers, every element-wise layer included."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .._checks import expect_type
from .casting import FixedInput
from .layers import (
    FixedAdd,
    FixedAvgPool2d,
    FixedBatchNorm2d,
    FixedConv2d,
    FixedFlatten,
    FixedLinear,
    FixedMaxPool2d,
    FixedReLU,
)

__all__ = ["FixedConfig", "convert"]


@dataclass(frozen=True)
class FixedConfig:
    """The widths of a converted network.

    Attributes:
        width: bits of weights and of every layer's output. Default 8.
        weight_width: bits of the weights; None: ``width``.
        per_channel: whether the weights of each output channel have a binary point of their own. Default False.
        input_width: bits of the network's input. Default 8.
        output_width: bits of the last layer's output, where a tie between classes costs accuracy. Default 12.
        rounding, overflow: modes of every cast. Defaults ``"rnd_conv"``, ``"sat"``.
        trainable: whether the binary points of outputs are parameters. Default True.
    """

    width: int = 8
    weight_width: int | None = None
    input_width: int = 8
    output_width: int = 12
    rounding: str = "rnd_conv"
    overflow: str = "sat"
    trainable: bool = True
    per_channel: bool = False

    def options(self, width: int | None = None) -> dict[str, Any]:
        modes = {"rounding": self.rounding, "overflow": self.overflow, "trainable": self.trainable}
        return {"width": width or self.width, **modes}

    def weights(self) -> dict[str, Any]:
        return {"weight_width": self.weight_width or self.width, "per_channel": self.per_channel}


def convert(
    model: nn.Module, config: FixedConfig | None = None, data: Tensor | Iterable[Tensor] | None = None
) -> fx.GraphModule:
    """A copy of ``model`` made of fixed-point layers, ready to train (``train()``) or to run in integers (``eval()``).

    Known are Conv2d, Linear, BatchNorm2d, ReLU, additions of two tensors, AvgPool2d (windows that do not overlap),
    AdaptiveAvgPool2d (to 1 x 1), MaxPool2d, Flatten, Identity and Dropout (which is left out), as modules and, but for
    those with weights, as functions and methods. The copy takes floats. It returns floats in training mode and a
    :class:`FixedTensor` in evaluation mode.

    Args:
        model: a network that ``torch.fx`` can trace, of one input and one output. It is not changed.
        config: widths and modes; None: :class:`FixedConfig()`.
        data: a batch of inputs, or an iterable of batches, of which the first is taken. Every binary point is set to
            what is best on it (:meth:`FixedCast.calibrate`), layer by layer, each on what the layers before it give.
            None: the first batch that the network is trained on decides.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a layer or an operation is not known; the sentence names it.

    Source: QFX, 2024: layers between convolutions are in fixed point as well.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastcifar.fixedpoint.conversion import FixedConfig, convert
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> images = torch.rand(4, 3, 8, 8)
        >>> fixed = convert(net, FixedConfig(width=6), images).eval()
        >>> fixed(images).type.width
        12
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: expected a module, got {type(model).__name__}")
    config = FixedConfig() if config is None else config
    expect_type("convert", FixedConfig, "a FixedConfig", config=config)
    was_training = model.training
    traced = fx.symbolic_trace(model)
    graph = traced.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ValueError(f"convert: expected a model of one input, got {len(inputs)}")
    last = _last_layer(graph)
    made: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        if node.op in ("placeholder", "output"):
            continue
        layer, arguments = _layer_of(
            node, traced, config.options(config.output_width if node is last else None), config
        )
        # A module that is used twice is used with two types: each use has a layer, and a binary point, of its own.
        name = f"{node.name}_fixed"
        made[name] = layer
        traced.add_submodule(name, layer)
        with graph.inserting_after(node):
            new = graph.call_module(name, arguments)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    options = config.options(config.input_width)
    made["input_fixed"] = FixedInput(**options)
    traced.add_submodule("input_fixed", made["input_fixed"])
    with graph.inserting_after(inputs[0]):
        start = graph.call_module("input_fixed", (inputs[0],))
    inputs[0].replace_all_uses_with(start, delete_user_cb=lambda user: user is not start)
    root = nn.Module()
    for name, layer in made.items():
        root.add_module(name, layer)
    fixed = fx.GraphModule(root, graph, f"Fixed{type(model).__name__}")
    fixed.train(was_training)
    if data is not None:
        _calibrate(fixed, data)
    return fixed


def _last_layer(graph: fx.Graph) -> fx.Node:
    (output,) = (node for node in graph.nodes if node.op == "output")
    result = output.args[0]
    if not isinstance(result, fx.Node):
        raise ValueError("convert: expected a model of one output")
    return result


def _calibrate(fixed: fx.GraphModule, data: Tensor | Iterable[Tensor]) -> None:
    """One pass of the float emulation with running statistics: each cast that has no binary point yet takes one."""
    start = fixed.get_submodule("input_fixed")
    training = fixed.training
    fixed.eval()
    start.train()
    with torch.no_grad():
        batch = data if isinstance(data, Tensor) else next(iter(data), None)
        if not isinstance(batch, Tensor):
            raise TypeError(f"convert: expected data to be a batch, or batches, got {type(batch).__name__} from it")
        fixed(batch)
    fixed.train(training)


# ---- what stands for what --------------------------------------------------------------------------------------------


def _copied(layer: Any, plain: Any) -> Any:
    """``layer`` with the parameters and statistics of ``plain``, its weights' binary point on them."""
    state = {name: t.detach().clone() for name, t in plain.state_dict().items()}
    layer.load_state_dict(state, strict=False)
    if hasattr(layer, "weight_cast"):
        layer.weight_cast.calibrate(layer.weight)
    return layer


def _conv(m: nn.Conv2d, options: dict[str, Any], config: FixedConfig) -> nn.Module:
    if m.padding_mode != "zeros":
        raise ValueError(f"convert: expected zeros as padding, got {m.padding_mode!r}")
    geometry = m.kernel_size, m.stride, m.padding, m.dilation, m.groups
    options |= {"bias": m.bias is not None, **config.weights()}
    return _copied(FixedConv2d(m.in_channels, m.out_channels, *geometry, **options), m)


def _linear(m: nn.Linear, options: dict[str, Any], config: FixedConfig) -> nn.Module:
    return _copied(FixedLinear(m.in_features, m.out_features, m.bias is not None, **config.weights(), **options), m)


def _batch_norm(m: nn.BatchNorm2d, options: dict[str, Any], config: FixedConfig) -> nn.Module:
    if not m.affine or not m.track_running_stats or m.momentum is None:
        raise ValueError("convert: expected a batch norm with weights, running statistics and a momentum")
    return _copied(FixedBatchNorm2d(m.num_features, m.eps, m.momentum, **options), m)


def _avg_pool(m: nn.AvgPool2d, options: dict[str, Any], config: FixedConfig) -> nn.Module:
    return _windows(m.kernel_size, m.stride, m.padding, m.ceil_mode, m.divisor_override, options)


def _windows(kernel, stride, padding, ceil_mode, divisor, options) -> nn.Module:
    sizes = {
        *(kernel if isinstance(kernel, tuple) else (kernel,)),
        *(stride if isinstance(stride, tuple) else (stride,)),
    }
    sizes.discard(None)
    if len(sizes) != 1 or padding not in (0, (0, 0)) or ceil_mode or divisor is not None:
        raise ValueError("convert: expected an average over square windows side by side, without padding")
    return FixedAvgPool2d(sizes.pop(), **options)


def _adaptive(output_size: Any, options: dict[str, Any]) -> nn.Module:
    if output_size not in (1, (1, 1), [1, 1]):
        raise ValueError(f"convert: expected an adaptive average to 1 x 1, got {output_size}")
    return FixedAvgPool2d(**options)


def _max_pool(m: nn.MaxPool2d, options: dict[str, Any], config: FixedConfig) -> nn.Module:
    return FixedMaxPool2d(m.kernel_size, m.stride, m.padding, m.dilation, ceil_mode=m.ceil_mode)


_MODULES: dict[type, Callable[[Any, dict[str, Any], FixedConfig], nn.Module]] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: lambda m, options, config: FixedReLU(**options),
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: lambda m, options, config: _adaptive(m.output_size, options),
    nn.MaxPool2d: _max_pool,
    nn.Flatten: lambda m, options, config: FixedFlatten(m.start_dim, m.end_dim),
    nn.Identity: lambda m, options, config: nn.Identity(),
    nn.Dropout: lambda m, options, config: nn.Identity(),
    nn.Dropout2d: lambda m, options, config: nn.Identity(),
}


def _flatten(x, start_dim=0, end_dim=-1):
    return nn.Flatten(start_dim, end_dim)


def _max(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    return nn.MaxPool2d(kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)


def _average(x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None):
    return nn.AvgPool2d(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


# Functions and methods as the module that does the same.
_FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys([F.relu, torch.relu, "relu", "relu_"], lambda x, inplace=False: nn.ReLU()),
    **dict.fromkeys([torch.flatten, "flatten"], _flatten),
    **dict.fromkeys([F.max_pool2d, torch.max_pool2d], _max),
    F.avg_pool2d: _average,
    F.adaptive_avg_pool2d: lambda x, output_size: nn.AdaptiveAvgPool2d(output_size),
    F.dropout: lambda x, p=0.5, training=True, inplace=False: nn.Identity(),
}
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def _layer_of(node: fx.Node, model: fx.GraphModule, options: dict[str, Any], config: FixedConfig) -> tuple[Any, Any]:
    """The fixed-point layer in place of a node, and its arguments."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
    elif node.target in _ADDITIONS:
        if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
            raise ValueError(f"convert: expected an addition of two tensors, got {node.format_node()}")
        return FixedAdd(**options), node.args
    elif node.target in _FUNCTIONS:
        module = _FUNCTIONS[node.target](*node.args, **node.kwargs)
    else:
        raise ValueError(f"convert: expected a layer or an operation that is known, got {node.format_node()}")
    make = _MODULES.get(type(module))
    if make is None:
        raise ValueError(f"convert: expected a layer that is known, got {node.target}, a {type(module).__name__}")
    return make(module, options, config), node.args[:1]
