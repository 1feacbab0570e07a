"""From a trained ordinary network (ANN) to a spiking one (SNN) with the same weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveMaxPoolNd, _MaxPoolNd
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from .quantize import LSQ, QCFS, BoundedNeuron, RateNeuron, SpikingActivation

_ACTIVATIONS = (QCFS, LSQ, nn.ReLU)
_MAX_POOLS = (_MaxPoolNd, _AdaptiveMaxPoolNd, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
# What a mean over time does not pass: by the module of torch that has it, and by name where forward calls it.
_NOT_LINEAR = tuple(f"torch.nn.modules.{name}" for name in ("activation", "normalization", "instancenorm", "rnn"))
_CALLS = (
    *("relu", "relu_", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus"),
    *("sigmoid", "tanh", "hardtanh", "hardsigmoid", "hardswish", "clamp", "clip", "softmax", "log_softmax"),
    *("layer_norm", "group_norm", "instance_norm", "max_pool1d", "max_pool2d", "max_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
)


class SpikingNetwork(nn.Module):
    """A converted network; made by :func:`convert`.

    ``forward(images, steps=None, *, every_step=False, chunk=None)`` shows the same images ``[B, ...]`` at each of
    ``steps`` steps and returns the mean of the outputs over time, ``[B, ...]`` in the outputs' dtype. Membranes start
    anew at every call and are let go at its end. Layers without memory take all steps of a chunk in one call, as part
    of the batch; the layers before the first neurons, which see the same at every step, run once.

    Args (of ``forward``):
        images: ``[B, ...]``, what the ordinary network takes.
        steps: T, above 0. Default: :attr:`steps`.
        every_step: whether to return ``[T, B, ...]``, the mean over the first 1, 2, .. T steps: accuracy over T from
            one run. Default False.
        chunk: steps in one pass; memory grows with it, and results do not depend on it beyond rounding. Default:
            :attr:`chunk`.

    Attributes:
        net: the network with neurons in place of its activations.
        steps, chunk: the defaults of a call.
        max_steps: the most that a call may take (networks with LSQ), or None.

    Raises:
        TypeError, ValueError: ``steps`` or ``chunk`` is not an integer above 0; more steps than ``max_steps``, or none
            given where there is no default; the network's output is no tensor ``[B, ...]``.
        RuntimeError: one activation runs twice in a pass.
    """

    def __init__(
        self, net: nn.Module, steps: int | None, max_steps: int | None, chunk: int | None, constant_input: bool
    ) -> None:
        super().__init__()
        self.net = net
        self.steps, self.max_steps, self.chunk = steps, max_steps, chunk
        self._constant_input = constant_input
        self.eval()

    def reset(self) -> None:
        """Lets the membranes go; every call does so by itself."""
        for neuron in self._neurons():
            neuron.reset()

    def forward(
        self, images: Tensor, steps: int | None = None, *, every_step: bool = False, chunk: int | None = None
    ) -> Tensor:
        steps = self.steps if steps is None else steps
        if steps is None:
            raise ValueError("SpikingNetwork: expected steps, as neither convert nor an activation says how many")
        _check_count("SpikingNetwork", "steps", steps)
        if self.max_steps is not None and steps > self.max_steps:
            raise ValueError(
                f"SpikingNetwork: expected at most {self.max_steps} steps, after which the sums of LSQ's spikes stand "
                f"still, got {steps}; convert(ann, steps={steps}) makes a network for as many"
            )
        chunk = (self.chunk or steps) if chunk is None else chunk
        _check_count("SpikingNetwork", "chunk", chunk)
        self.reset()
        try:
            return self._run(images, steps, chunk, every_step)
        finally:
            self.reset()

    def _run(self, images: Tensor, steps: int, chunk: int, every_step: bool) -> Tensor:
        batch = images.shape[0]
        total = torch.zeros((), dtype=torch.float64, device=images.device)
        means = []
        for first in range(0, steps, chunk):
            now = min(chunk, steps - first)
            for neuron in self._neurons():
                neuron.start(now, batch)
            x = images
            if not self._constant_input:
                x = images.expand(now, *images.shape).flatten(0, 1)
            y = self.net(x)
            if not isinstance(y, Tensor) or y.dim() == 0 or y.shape[0] != now * batch:
                got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(f"SpikingNetwork: expected the network to return [{now * batch}, ...], got {got}")
            # One step after the other and in float64, so that the chunks do not show.
            for t, y_t in enumerate(y.unflatten(0, (now, batch)).unbind(0), start=first + 1):
                total = total + y_t.double()
                if every_step or t == steps:
                    means.append((total / t).to(y.dtype))
        return torch.stack(means) if every_step else means[0]

    def _neurons(self) -> list[SpikingActivation]:
        return [m for m in self.net.modules() if isinstance(m, SpikingActivation)]

    def train(self, mode: bool = True) -> SpikingNetwork:
        """Stays in evaluation: batch statistics would mix the steps."""
        return super().train(False)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, max_steps={self.max_steps}, chunk={self.chunk}"


def convert(
    ann: nn.Module,
    steps: int | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    percentile: float = 99.9,
    chunk: int | None = None,
) -> SpikingNetwork:
    r"""The spiking network with the weights of a trained one. ``ann`` is copied and stays as it is.

    - **QCFS**: integrate-and-fire neurons with its threshold lambda, soft reset, membrane lambda / 2 at the start,
      spikes of height lambda. For a constant input the count after T = L steps is QCFS's, for every input.
    - **LSQ**: neurons with spikes of both signs whose sum stays between LSQ's bounds (ST-BIF, QFFS), for a fixed number
      of steps. For a constant input the sum after these is LSQ's (if the number is a power of two: for every input).
    - **nn.ReLU**: as QCFS, with the threshold taken from ``calibration`` (threshold balancing).
    - **Batch norm**: folded into the convolution or linear layer whose output it alone takes, where ``torch.fx`` can
      trace the network to see that; else it stays, in evaluation: an affine map at each step.
    - **Dropout**: removed. **Max pooling** (the largest of some spike trains is not the train of the largest), **other
      activations** and **norms** of single samples: refused.

    Deeper layers see spikes rather than a constant, and where these come unevenly a neuron fires a spike more or less
    than its activation says: at T = L the network comes close to the ordinary one. With more steps QCFS's neurons tend
    to ``clip(x, 0, lambda)`` at a rate of 1 / T, without the rounding that the ordinary network was trained with.
    LSQ's take back spikes that came too early: converted for more steps, they end where the rounding puts them.

    Args:
        ann: any module whose activations are modules, each used once in ``forward``. Calls of ``F.relu`` and the like
            are refused where ``torch.fx`` can trace the network, and cannot be seen elsewhere.
        steps: T of a call that does not say, an integer above 0; with LSQ also the most steps that a call may take.
            Default: the most levels of any QCFS; with LSQ at least the smallest power of two that holds its values;
            with ReLU alone none.
        calibration: batches of images, or tuples that start with one (a DataLoader); needed with ReLU.
        percentile: of a ReLU's activations (of all values of a batch; the largest over the batches): what becomes its
            threshold. 100: the maximum. Default 99.9.
        chunk: steps in one pass; None: all. Default None.

    Returns:
        A :class:`SpikingNetwork` on ``ann``'s device, in evaluation, whose weights ask for no gradient.

    Raises:
        TypeError: ``ann`` is not a module, or ``steps`` or ``chunk`` not an integer.
        ValueError: ``ann`` has no activation to replace or one that is refused, a threshold or step that is not above
            0, or a batch norm without running statistics; ``calibration`` is missing or empty; ``steps`` is too few for
            LSQ's values; ``percentile`` is not above 0 and at most 100.

    Source: Bu et al., "Optimal ANN-SNN Conversion for High-accuracy and Ultra-low-latency Spiking Neural Networks"
    (QCFS), ICLR 2022; Li, Ma and Furber, "Quantization Framework for Fast Spiking Neural Networks" (QFFS), Frontiers in
    Neuroscience 16 (2022); You et al., "SpikeZIP-TF" (ST-BIF), ICML 2024; Diehl et al., "Fast-classifying,
    high-accuracy spiking deep networks through weight and threshold balancing", IJCNN 2015; Rueckauer et al.,
    "Conversion of Continuous-Valued Deep Networks to Efficient Event-Driven Networks for Image Classification",
    Frontiers in Neuroscience 11 (2017) (the percentile).

    Example:
        >>> import torch
        >>> from fastcifar.spiking import QCFS, convert
        >>> ann = torch.nn.Sequential(torch.nn.Linear(8, 16), QCFS(levels=4), torch.nn.Linear(16, 10)).eval()
        >>> snn, images = convert(ann), torch.randn(5, 8)
        >>> torch.allclose(snn(images), ann(images), atol=1e-5)  # T = 4, and one layer of neurons
        True
        >>> snn(images, steps=32, every_step=True).shape
        torch.Size([32, 5, 10])
    """
    if not isinstance(ann, nn.Module):
        raise TypeError(f"convert: expected a module, got {type(ann).__name__}")
    for name, count in (("steps", steps), ("chunk", chunk)):
        if count is not None:
            _check_count("convert", name, count)
    if not 0 < percentile <= 100:
        raise ValueError(f"convert: expected percentile to be above 0 and at most 100, got {percentile}")
    net = copy.deepcopy(ann).eval()
    net.requires_grad_(False)
    graph = _trace(net)
    _check_network(net, graph)
    if graph is not None:
        _fold(net, graph)
    # Every place, also of a module that is registered at several: each has a membrane of its own.
    places = list(net.named_modules(remove_duplicate=False))
    activations = {name: m for name, m in places if isinstance(m, _ACTIVATIONS)}
    relus: dict[str, nn.Module] = {name: m for name, m in activations.items() if isinstance(m, nn.ReLU)}
    thresholds = _balance(net, relus, calibration, percentile) if relus else {}
    lsqs = [m for m in activations.values() if isinstance(m, LSQ)]
    needed = max((_power_of_two(m) for m in lsqs), default=0)
    default = max([needed, *(m.levels for m in activations.values() if isinstance(m, QCFS))]) or None
    steps = default if steps is None else steps
    replaced: dict[str, nn.Module] = {name: nn.Identity() for name, m in places if isinstance(m, _DropoutNd)}
    for name, m in activations.items():
        if isinstance(m, QCFS):
            replaced[name] = RateNeuron(_checked_positive(f"QCFS {name}", m.threshold))
        elif isinstance(m, LSQ):
            assert steps is not None
            if steps < max(m.high, -m.low):
                raise ValueError(
                    f"convert: expected at least {max(m.high, -m.low)} steps, as a neuron fires once a step and LSQ "
                    f"{name} has values from {m.low} to {m.high}; got {steps}"
                )
            replaced[name] = BoundedNeuron(_checked_positive(f"LSQ {name}", m.step), m.low, m.high, steps)
        else:
            replaced[name] = RateNeuron(thresholds[name])
    constant_input = graph is not None and _input_is_constant(graph, set(activations))
    net = _replace(net, replaced)
    return SpikingNetwork(net, steps, steps if lsqs else None, chunk, constant_input)


def _check_count(op: str, name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: expected {name} to be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{op}: expected {name} above 0, got {value}")


def _check_network(net: nn.Module, graph: fx.Graph | None) -> None:
    """Raises the ValueError of what cannot be converted."""
    for name, m in net.named_modules():
        kind = type(m).__name__
        if isinstance(m, _MAX_POOLS):
            raise ValueError(
                f"convert: expected no max pooling, got {kind} {name}: the largest of several spike trains is not the "
                "train of the largest activation; train with average pooling (nn.AvgPool2d)"
            )
        if type(m).__module__ in _NOT_LINEAR and not isinstance(m, _ACTIVATIONS):
            raise ValueError(
                f"convert: expected QCFS, LSQ or nn.ReLU as activations and batch norms as norms, got {kind} {name}"
            )
        if isinstance(m, _BatchNorm) and m.running_mean is None:
            raise ValueError(f"convert: expected running statistics, got {kind} {name} without: it would mix the steps")
    for node in graph.nodes if graph is not None else ():
        called = getattr(node.target, "__name__", node.target)
        if node.op in ("call_function", "call_method") and called in _CALLS:
            raise ValueError(
                "convert: expected activations to be modules (QCFS, LSQ or nn.ReLU) and pooling to be by average, got "
                f"a call of {called} in forward"
            )
    if not any(isinstance(m, _ACTIVATIONS) for m in net.modules()):
        raise ValueError("convert: expected activations to replace (modules QCFS, LSQ or nn.ReLU), got none")


def _checked_positive(what: str, value: Tensor) -> Tensor:
    if not bool((value > 0).all()):
        raise ValueError(f"convert: expected {what} to have a threshold above 0, got {value.min().item():g}")
    return value


def _power_of_two(m: LSQ) -> int:
    return 2 ** math.ceil(math.log2(max(m.high, -m.low)))


class _Tracer(fx.Tracer):
    """Sees our activations as one node each, as torch's own modules are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (QCFS, LSQ)) or super().is_leaf_module(m, module_qualified_name)


def _trace(net: nn.Module) -> fx.Graph | None:
    """What ``net`` computes; None where its control flow depends on values, which no trace can show."""
    try:
        return _Tracer().trace(net)
    except Exception:  # fx raises whatever the user's code does with a stand-in for a tensor
        return None


def _fold(net: nn.Module, graph: fx.Graph) -> None:
    """Folds each batch norm into the layer before it, if both run once and nothing else takes what is between."""
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    folds: dict[str, nn.Module] = {}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        layer, bn = net.get_submodule(str(before.target)), net.get_submodule(node.target)
        if not isinstance(bn, _BatchNorm) or not calls[node.target] == calls[str(before.target)] == 1:
            continue
        folded: nn.Module
        if isinstance(layer, _ConvNd):
            folded = fuse_conv_bn_eval(layer, bn, transpose=isinstance(layer, _ConvTransposeNd))
        elif isinstance(layer, nn.Linear) and isinstance(bn, nn.BatchNorm1d):
            folded = fuse_linear_bn_eval(layer, bn)
            folded.register_forward_pre_hook(_check_flat)
        else:
            continue
        folds[str(before.target)], folds[node.target] = folded, nn.Identity()
    _replace(net, folds)


def _check_flat(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Of ``[B, L, C]`` the batch norm would have been one over L, which no weight of the linear layer can hold."""
    if inputs[0].dim() != 2:
        raise ValueError(
            "SpikingNetwork: expected [B, features] at a linear layer with a batch norm behind it, got "
            f"{tuple(inputs[0].shape)}"
        )


def _input_is_constant(graph: fx.Graph, neurons: set[str]) -> bool:
    """Whether what the images alone decide reaches the rest through neurons only, which then repeat it over time."""
    before: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            before.add(node)
        known = [n in before for n in node.all_input_nodes if n.op != "get_attr"]
        if node.op == "call_module" and node.target in neurons:
            continue
        if any(known):
            if not all(known) or node.op == "output":
                return False
            before.add(node)
    return True


@torch.no_grad()
def _balance(
    net: nn.Module, relus: dict[str, nn.Module], calibration: Iterable[Any] | None, percentile: float
) -> dict[str, Tensor]:
    """The threshold of each ReLU."""
    if calibration is None:
        raise ValueError("convert: expected calibration batches, from which a ReLU's threshold is taken; got none")
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            rank = max(1, math.ceil(percentile / 100 * output.numel()))
            value = output.flatten().kthvalue(rank).values  # torch.quantile takes 16 million values at most
            largest[name] = torch.maximum(largest[name], value) if name in largest else value

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in relus.items()]
    try:
        for batch in calibration:
            net(batch[0] if isinstance(batch, (tuple, list)) else batch)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in relus if name not in largest]:
        raise ValueError(f"convert: expected calibration batches that reach every ReLU, got none at {missing[0]}")
    return {name: _checked_positive(f"the percentile at ReLU {name}", value) for name, value in largest.items()}


def _replace(net: nn.Module, modules: dict[str, nn.Module]) -> nn.Module:
    """``net`` with other modules at some names; the module itself where it has no name."""
    for name, module in modules.items():
        if not name:
            return module
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, module)
    return net
