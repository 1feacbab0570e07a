"""From a network of fixed-point layers to C++ for FPGA tools: :func:`to_hls`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import layers as fixed
from .casting import FixedInput
from .hls_code import Constants, Layer, Network, headers, write
from .tensor import FixedTensor
from .types import FixedType, common

__all__ = ["headers", "to_hls"]

# What a name must not be: keywords of C++, names that are taken, and namespaces of the project.
_KEYWORDS = re.findall(
    r"\w+",
    """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const constexpr
    const_cast continue decltype default delete do double dynamic_cast else enum explicit export extern false float
    for friend goto if inline int int64_t long main mutable namespace new noexcept not not_eq nullptr operator or
    or_eq private protected public register reinterpret_cast return short signed sizeof static static_assert
    static_cast struct switch template this thread_local throw true try typedef typeid typename union unsigned using
    virtual void volatile wchar_t while xor xor_eq net layers
    """,
)
_ENDINGS = ("_t", "_sum_t", "_shape", "_weight", "_bias", "_scale", "_shift", "_reciprocal", "_y")
_PASSED_ON = (nn.Flatten, nn.Identity)


def to_hls(
    model: nn.Module, folder: str | Path, example_input: Tensor | FixedTensor, *, name: str = "model"
) -> dict[str, FixedType]:
    """Writes a C++ project over ``ap_fixed`` types that computes what ``model`` does, to the bit.

    In ``folder``: ``<name>.cpp`` and ``<name>.h`` (a function for each layer, the top function
    ``void <name>(const net::input_t x[], net::output_t y[])`` of one example), ``weights.h``, ``layers.h`` (the layers
    as templates), ``test_bench.cpp`` with ``test_data.h`` (the examples and what PyTorch gave for them), ``README.md``
    and a ``Makefile``: ``make test`` compiles and runs it with the small ``ap_fixed.h`` that is written beside it, and
    ``make test AP_TYPES=folder`` with the FPGA tool's own; it fails where a bit differs.

    Args:
        model: of fixed-point layers in evaluation mode, with one input and one output, that ``torch.fx`` can trace:
            FixedInput (first, where examples are floats), FixedConv2d, FixedLinear, FixedBatchNorm2d, FixedReLU,
            FixedAdd, FixedAvgPool2d, FixedMaxPool2d, FixedFlatten; flatten and identity pass numbers on.
        folder: where to write; made if it is not there, else empty.
        example_input: examples ``[N, ...]``, N at least 1, which the test bench repeats.
        name: of the top function. Default ``"model"``.

    Returns:
        The type of each layer's output by its name in C++, ``"input"`` first.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the model is in training mode, has something else than these layers or a type that rounds at
            random, or cannot be traced; ``folder`` is not empty or cannot be written; ``name`` is no name in C++;
            there is no example.

    Source: QFX, 2024, whose layers are of ``ap_fixed`` types for that purpose.

    Example:
        >>> import tempfile, torch
        >>> from fastcifar.fixedpoint.hls import to_hls
        >>> from fastcifar.fixedpoint import FixedInput, FixedReLU
        >>> net = torch.nn.Sequential(FixedInput(8, frac_bits=4), FixedReLU(width=4, frac_bits=2)).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     types = to_hls(net, folder, torch.randn(2, 5))
        >>> {name: str(type) for name, type in types.items()}
        {'input': 'ap_fixed<8, 4, AP_RND_CONV, AP_SAT>', 'layer_1': 'ap_ufixed<4, 2, AP_RND_CONV, AP_SAT>'}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_hls: expected model to be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_input, (Tensor, FixedTensor)):
        raise TypeError(f"to_hls: expected example_input to be a tensor, got {type(example_input).__name__}")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or name in _KEYWORDS:
        raise ValueError(f"to_hls: expected name to be a name in C++, got {name!r}")
    if name in ("weights", "layers", "test_data", "ap_fixed"):
        raise ValueError(f"to_hls: expected a name other than those of the project's own files, got {name!r}")
    for part, module in model.named_modules():
        if module.training:
            raise ValueError(f"to_hls: expected a model in evaluation mode, got {part or 'it'} in training mode")
    if example_input.dim() < 2 or not len(example_input):
        raise ValueError(f"to_hls: expected examples [N, ...], N at least 1, got {tuple(example_input.shape)}")
    graph = _trace(model)
    with torch.no_grad():
        reader = _Reader(graph)
        result = reader.run(example_input)
    if not isinstance(result, FixedTensor) or not reader.layers:
        raise ValueError(
            "to_hls: expected a model that returns one fixed-point tensor of some layer, got another result"
        )
    first = reader.input
    assert first is not None
    network = Network(name, first.type, tuple(first.shape[1:]), reader.layers, reader.names[id(result)])
    for part, type_ in {"input": first.type, **{layer.name: layer.type for layer in network.layers}}.items():
        if type_.rounding == "stochastic":
            raise ValueError(f"to_hls: expected types that ap_fixed has, got stochastic rounding in {part}")
    path = _empty_folder(folder)
    try:
        write(path, network, first.raw.cpu(), result.raw.cpu())
    except OSError as error:
        raise ValueError(f"to_hls: expected a folder that can be written, got {folder}: {error.strerror}") from error
    return {"input": first.type, **{layer.name: layer.type for layer in network.layers}}


def _empty_folder(folder: str | Path) -> Path:
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        inside = next(path.iterdir(), None)
    except OSError as error:
        raise ValueError(f"to_hls: expected a folder that can be written, got {folder}: {error.strerror}") from error
    if inside is not None:
        raise ValueError(f"to_hls: expected an empty folder, got {folder} with {inside.name} in it")
    return path


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return (
            type(m) in _READERS or isinstance(m, (*_PASSED_ON, FixedInput)) or super().is_leaf_module(m, qualified_name)
        )


def _trace(model: nn.Module) -> fx.GraphModule:
    root = nn.Sequential(model) if type(model) in _READERS else model  # a layer alone is a network of one
    try:
        return fx.GraphModule(root, _Tracer().trace(root))
    except Exception as error:  # whatever the model's forward raises when it is traced
        raise ValueError(f"to_hls: expected a model that torch.fx can trace, got {error}") from error


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[return-value]


class _Reader(fx.Interpreter):
    """Runs the network on stored integers and writes down every layer on the way."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.input: FixedTensor | None = None
        self.layers: list[Layer] = []
        self.names: dict[int, str] = {}  # of the values that layers gave, by id; `kept` keeps the ids from being reused
        self.kept: list[FixedTensor] = []
        self.taken: set[str] = {"input", "output"}

    def placeholder(self, target, args, kwargs):
        value = super().placeholder(target, args, kwargs)
        if isinstance(value, FixedTensor):
            self._start(value)
        return value

    def _start(self, value: FixedTensor) -> FixedTensor:
        if self.input is not None:
            raise ValueError("to_hls: expected one FixedInput, or none and a FixedTensor, got a second one")
        self.input = value
        return self._named(value, "input")

    def _named(self, value: FixedTensor, name: str) -> FixedTensor:
        self.names[id(value)] = name
        self.kept.append(value)
        return value

    def call_module(self, target, args, kwargs):
        module = self.fetch_attr(target)
        where = f"{target}, a {type(module).__name__}"
        if isinstance(module, FixedInput) and len(args) == 1 and isinstance(args[0], Tensor):
            return self._start(module(*args))
        if not args or kwargs or not all(isinstance(arg, FixedTensor) for arg in args):
            raise ValueError(f"to_hls: expected fixed-point tensors for {where}; start the network with a FixedInput")
        if isinstance(module, nn.Flatten):
            return self._flat(module(*args), args[0], where)
        if isinstance(module, nn.Identity):
            return args[0]
        read = _READERS.get(type(module))
        if read is None:
            raise ValueError(f"to_hls: expected fixed-point layers, got {where}")
        result = module(*args)
        function, constants, parameters, sum_type = read(module, result, *args)
        name = self._unique(target)
        inputs = tuple(self.names[id(arg)] for arg in args)
        shape = tuple(result.shape[1:])
        description = type(module).__name__
        layer = Layer(name, function, inputs, shape, result.type, description, constants, parameters, sum_type)
        self.layers.append(layer)
        return self._named(result, name)

    def call_method(self, target, args, kwargs):
        if target == "flatten" and isinstance(args[0], FixedTensor):
            return self._flat(super().call_method(target, args, kwargs), args[0], "flatten")
        raise ValueError(f"to_hls: expected fixed-point layers, got the method {target}")

    def call_function(self, target, args, kwargs):
        if target is torch.flatten and isinstance(args[0], FixedTensor):
            return self._flat(args[0].flatten(*args[1:], **kwargs), args[0], "flatten")
        called = getattr(target, "__name__", str(target))
        hint = "; a sum of two is FixedAdd" if called == "add" else ""
        raise ValueError(f"to_hls: expected fixed-point layers, got a call of {called}{hint}")

    def _flat(self, flat: FixedTensor, x: FixedTensor, where: str) -> FixedTensor:
        if flat.dim() != 2 or len(flat) != len(x):
            raise ValueError(f"to_hls: expected {where} to give [N, features], got {tuple(flat.shape)}")
        return self._named(flat, self.names[id(x)])

    def _unique(self, target: str) -> str:
        base = re.sub(r"\W", "_", target, flags=re.ASCII).strip("_")
        base = re.sub("__+", "_", base)
        if not base[:1].isalpha() or base in _KEYWORDS:
            base = f"layer_{base}"
        name, count = base, 1
        while self.taken & {name, *(name + ending for ending in _ENDINGS)}:
            count += 1
            name = f"{base}_{count}"
        self.taken |= {name, *(name + ending for ending in _ENDINGS)}
        return name


Read = tuple[str, dict[str, int], dict[str, Constants | None], FixedType | None]


def _image(x: FixedTensor, result: FixedTensor, op: str) -> dict[str, int]:
    if x.dim() != 4:
        raise ValueError(f"to_hls: expected images [N, C, H, W] for {op}, got {tuple(x.shape)}")
    shapes = zip(("channels", "height", "width", "out_channels", "out_height", "out_width"),
                 (*x.shape[1:], *result.shape[1:]), strict=True)  # fmt: skip
    return dict(shapes)


def _windows(**sizes: Any) -> dict[str, int]:
    return {f"{key}_{side}": n for key, value in sizes.items()
            for side, n in zip(("height", "width"), _pair(value), strict=True)}  # fmt: skip


def _product(module: Any, x: FixedTensor) -> tuple[dict[str, Constants | None], FixedType]:
    """Weight and bias as stored, and a type for their sums: of the products and the bias together."""
    weight = module.raw_weight()
    sum_type = (x.type * weight.type).total(weight.raw[0].numel())
    parameters: dict[str, Constants | None] = {"weight": Constants(weight.raw.cpu(), weight.type), "bias": None}
    bias = module.raw_bias(x.type)
    if bias is not None:
        raw, frac_bits = bias
        bits = max(int(raw.abs().max()).bit_length() + 1, 2)
        type_ = FixedType(bits, bits - frac_bits)
        parameters["bias"] = Constants(raw.cpu(), type_)
        sum_type = common([sum_type, type_]).total(2)
    return parameters, sum_type


def _conv2d(module: fixed.FixedConv2d, result: FixedTensor, x: FixedTensor) -> Read:
    constants = _image(x, result, "FixedConv2d") | _windows(
        kernel=module.weight.shape[2:], stride=module.stride, padding=module.padding, dilation=module.dilation
    )
    return "conv2d", constants | {"groups": module.groups}, *_product(module, x)


def _linear(module: fixed.FixedLinear, result: FixedTensor, x: FixedTensor) -> Read:
    if x.dim() != 2:
        raise ValueError(f"to_hls: expected features [N, K] for FixedLinear, got {tuple(x.shape)}; flatten them first")
    outputs, inputs = module.weight.shape
    return "linear", {"inputs": inputs, "outputs": outputs}, *_product(module, x)


def _batch_norm(module: fixed.FixedBatchNorm2d, result: FixedTensor, x: FixedTensor) -> Read:
    scale, shift = module.raw_scale_and_shift(x.type)
    constants = {"channels": x.shape[1], "size": x.shape[2] * x.shape[3]}
    parameters = {"scale": Constants(scale.raw.cpu(), scale.type), "shift": Constants(shift.raw.cpu(), shift.type)}
    return "batch_norm", constants, {**parameters}, None


def _relu(module: fixed.FixedReLU, result: FixedTensor, x: FixedTensor) -> Read:
    return "relu", {"size": x[0].numel()}, {}, None


def _add(module: fixed.FixedAdd, result: FixedTensor, a: FixedTensor, b: FixedTensor) -> Read:
    if a.shape != b.shape:
        raise ValueError(f"to_hls: expected equal shapes for FixedAdd, got {tuple(a.shape)} and {tuple(b.shape)}")
    return "add", {"size": a[0].numel()}, {}, None


def _avg_pool2d(module: fixed.FixedAvgPool2d, result: FixedTensor, x: FixedTensor) -> Read:
    window = _pair(module.kernel_size or tuple(x.shape[2:]))
    count = window[0] * window[1]
    frac_bits = fixed.RECIPROCAL_BITS - 1 + (count - 1).bit_length()
    raw = round(2**frac_bits / count)
    bits = raw.bit_length()
    reciprocal = Constants(torch.tensor([raw]), FixedType(bits, bits - frac_bits, signed=False))
    constants = _image(x, result, "FixedAvgPool2d") | _windows(kernel=window)
    return "avg_pool2d", constants, {"reciprocal": reciprocal}, x.type.total(count)


def _max_pool2d(module: fixed.FixedMaxPool2d, result: FixedTensor, x: FixedTensor) -> Read:
    if module.return_indices:
        raise ValueError("to_hls: expected FixedMaxPool2d without return_indices, got it with them")
    sizes = {"kernel": module.kernel_size, "stride": module.stride, "padding": module.padding}
    constants = _image(x, result, "FixedMaxPool2d") | _windows(**sizes, dilation=module.dilation)
    return "max_pool2d", constants, {}, None


_READERS: dict[type, Callable[..., Read]] = {
    fixed.FixedConv2d: _conv2d,
    fixed.FixedLinear: _linear,
    fixed.FixedBatchNorm2d: _batch_norm,
    fixed.FixedReLU: _relu,
    fixed.FixedAdd: _add,
    fixed.FixedAvgPool2d: _avg_pool2d,
    fixed.FixedMaxPool2d: _max_pool2d,
}
