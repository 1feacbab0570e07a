"""earlyon's classes over our decisions: replace ``from earlyon import`` by ``from fastcifar.compat.earlyon import``.

Names, arguments, defaults, result types and state_dict keys are those of earlyon 0.3.0, and so are the results of one
sample and of ``forward_inference_batched``. What differs: ``forward`` takes a batch of any size (there it raises), and
every row leaves at its own exit, the others going on through the backbone without it; the share of the operations is
counted by torch's counter in the order of execution, on the first sample that comes where ``input_shape`` is not given;
models can be copied and pickled; a temperature spoilt after validation raises instead of counting as 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..earlyexit.cost import CostModel
from ..earlyexit.functional import compact, exit_decide
from ..earlyexit.modules import gathered, refuse_batch_statistics

FINAL_HEAD = "final"
POLICIES = ("confidence", "entropy")

__all__ = [
    "BatchedInferenceResult",
    "EarlyExitConfig",
    "EarlyExitHead",
    "EarlyExitWrapper",
    "ExitPoint",
    "InferenceResult",
    "weighted_multi_exit_loss",
]


@dataclass(frozen=True)
class ExitPoint:
    """An exit called ``name`` behind the backbone's submodule ``layer_name``, whose features have ``in_channels``."""

    name: str
    layer_name: str
    in_channels: int


@dataclass
class EarlyExitConfig:
    """Exits and their thresholds.

    Args:
        backbone, num_classes, exit_points: what it is of.
        loss_weights: of each exit and the final classifier. Default: all ``1 / (exits + 1)``.
        confidence_thresholds: an exit takes what has at least this largest probability. Default 0.8.
        entropy_thresholds: or at most this entropy, in nats. Default ``log(num_classes) / 2``.
        enabled_exits: whether an exit may be taken. Default True.
        routing_policy: ``"confidence"`` (default) or ``"entropy"``.
        temperature: of all heads, at construction only. Default 1.
        temperatures: of each head by its name, ``"final"`` the last.

    Raises:
        ValueError: a list is of another length or a value out of range; :meth:`validate` checks again.
    """

    backbone: str
    num_classes: int
    exit_points: list[ExitPoint]
    loss_weights: list[float] = field(default_factory=list)
    confidence_thresholds: list[float] = field(default_factory=list)
    entropy_thresholds: list[float] = field(default_factory=list)
    enabled_exits: list[bool] = field(default_factory=list)
    routing_policy: str = "confidence"
    temperature: float = 1.0
    temperatures: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        exits = len(self.exit_points)
        self.loss_weights = self.loss_weights or [1 / (exits + 1)] * (exits + 1)
        self.confidence_thresholds = self.confidence_thresholds or [0.8] * exits
        self.entropy_thresholds = self.entropy_thresholds or [0.5 * math.log(max(self.num_classes, 2))] * exits
        self.enabled_exits = self.enabled_exits or [True] * exits
        if self.temperatures and self.temperature != 1:
            raise ValueError("EarlyExitConfig: expected temperature or temperatures, got both")
        self.temperatures = self.temperatures or dict.fromkeys(self.head_names, self.temperature)
        self.validate()

    @property
    def head_names(self) -> list[str]:
        return [point.name for point in self.exit_points] + [FINAL_HEAD]

    def temperature_for(self, head_name: str) -> float:
        return self.temperatures[head_name]

    def validate(self) -> None:
        """Raises the ValueError of what is wrong."""
        exits = len(self.exit_points)
        _expect(self.num_classes >= 2, "num_classes of 2 or more", self.num_classes)
        for what in ("name", "layer_name"):
            values = [getattr(point, what) for point in self.exit_points]
            _expect(all(values) and len(set(values)) == exits, f"exit points of different {what}", values)
        _expect(FINAL_HEAD not in self.head_names[:-1], f"exits not to be called {FINAL_HEAD!r}", self.head_names[:-1])
        _expect(self.routing_policy in POLICIES, f"routing_policy to be one of {POLICIES}", self.routing_policy)
        _check_list("loss_weights", self.loss_weights, exits + 1, 0, math.inf)
        _expect(sum(self.loss_weights) > 0, "loss_weights not all 0", self.loss_weights)
        _check_list("confidence_thresholds", self.confidence_thresholds, exits, 0, 1)
        _check_list("entropy_thresholds", self.entropy_thresholds, exits, 0, math.inf)
        _check_list("enabled_exits", self.enabled_exits, exits, 0, 1)
        _expect(all(isinstance(on, bool) for on in self.enabled_exits), "booleans enabled_exits", self.enabled_exits)
        _expect(
            set(self.temperatures) == set(self.head_names),
            f"temperatures of {', '.join(self.head_names)}",
            list(self.temperatures),
        )
        for name, value in self.temperatures.items():
            _expect(0 < value < math.inf, f"the temperature of {name} to be finite and above 0", value)


@dataclass
class InferenceResult:
    """Of one sample: logits ``[1, K]``, the exit (-1: the final classifier), the largest probability there, and the
    share of the backbone's operations up to it."""

    prediction: Tensor
    exit_taken: int
    confidence: float
    estimated_backbone_flops_fraction: float

    @property
    def computation_used(self) -> float:
        return self.estimated_backbone_flops_fraction


@dataclass
class BatchedInferenceResult:
    """Of a batch: logits ``[B, K]``, the exit, each row's largest probability there, and the share of the operations.

    From ``forward_inference_batched`` the exit is one int for all. From ``forward`` it is int64 ``[B]`` with -1 for the
    final classifier, and the share is the mean over the rows.
    """

    predictions: Tensor
    exit_taken: int | Tensor
    per_sample_confidence: Tensor
    estimated_backbone_flops_fraction: float

    @property
    def computation_used(self) -> float:
        return self.estimated_backbone_flops_fraction


class EarlyExitHead(nn.Module):
    """Pooling, a linear layer, ReLU, dropout, a linear layer.

    Takes ``[B, C, H, W]`` (mean over the pixels), ``[B, N, D]`` (token 0, or the mean with ``pool_tokens="mean"``) or
    ``[B, D]``, and returns logits ``[B, num_classes]``.
    """

    def __init__(
        self, in_channels: int, num_classes: int, hidden_dim: int = 128, dropout: float = 0.2, pool_tokens: str = "cls"
    ) -> None:
        super().__init__()
        if pool_tokens not in ("cls", "mean"):
            raise ValueError(f"EarlyExitHead: expected pool_tokens to be 'cls' or 'mean', got {pool_tokens!r}")
        self.pool_tokens = pool_tokens
        self.classifier = nn.Sequential(
            nn.Linear(in_channels, hidden_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            x = x.mean((2, 3))
        elif x.dim() == 3:
            x = x[:, 0] if self.pool_tokens == "cls" else x.mean(1)
        elif x.dim() != 2:
            raise ValueError(f"EarlyExitHead: expected features of 2, 3 or 4 dimensions, got {tuple(x.shape)}")
        return self.classifier(x)


class EarlyExitWrapper(nn.Module):
    """Exits on any backbone, whose layers are watched by hooks.

    Args:
        backbone: its layers at the exits return tensors (or trees of them) with a row for each sample, and nothing from
            before an exit reaches what comes after it by another way; checked by the number of rows.
        exit_heads: by the exits' names, each from its layer's features to logits ``[B, K]``.
        final_classifier: from what the backbone returns to logits; where it is a module, it is part of the state_dict.
        config: the exits; may be changed afterwards.
        input_shape: of zeros on which operations are counted. Default: a sample as it comes first.
        feature_adapters: by the exits' names, what makes a head's features of a layer's output.
        cost: decides when to drop the rows that left; see :class:`~fastcifar.earlyexit.EarlyExit`.

    Raises:
        ValueError: heads or adapters that do not fit the exits; at a call, an unknown mode, an empty batch, or a batch
            norm with batch statistics.
        RuntimeError: at a call, a tensor from before an exit with more rows meets what is behind it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastcifar.compat.earlyon import EarlyExitConfig, EarlyExitHead, EarlyExitWrapper, ExitPoint
        >>> config = EarlyExitConfig("mlp", 4, [ExitPoint("first", "0", 8)], confidence_thresholds=[0.3])
        >>> backbone = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = EarlyExitWrapper(backbone, {"first": EarlyExitHead(8, 4)}, nn.Identity(), config).eval()
        >>> len(model(torch.randn(5, 8), mode="training"))
        2
        >>> model(torch.randn(5, 8)).exit_taken.shape  # each its own
        torch.Size([5])
    """

    def __init__(
        self,
        backbone: nn.Module,
        exit_heads: Mapping[str, nn.Module],
        final_classifier: Callable[[Tensor], Tensor],
        config: EarlyExitConfig,
        input_shape: tuple[int, ...] | None = None,
        feature_adapters: Mapping[str, Callable[[Any], Tensor]] | None = None,
        cost: CostModel | None = None,
    ) -> None:
        super().__init__()
        config.validate()
        names = [point.name for point in config.exit_points]
        _expect(sorted(exit_heads) == sorted(names), f"exit_heads {names}", list(exit_heads), "EarlyExitWrapper")
        unknown = sorted(set(feature_adapters or {}) - set(names))
        _expect(not unknown, f"feature_adapters of {names}", unknown, "EarlyExitWrapper")
        self.backbone, self.exit_heads = backbone, nn.ModuleDict(exit_heads)
        self._final_classifier = final_classifier
        self.config, self.cost = config, cost or CostModel()
        self._adapters = dict(feature_adapters or {})
        self._input_shape = input_shape
        self._fractions: list[float] | None = None
        for index, point in enumerate(config.exit_points):
            # A partial of a method, not a closure: a copy of the model then has hooks of its own.
            backbone.get_submodule(point.layer_name).register_forward_hook(functools.partial(self._at_exit, index))

    def forward(self, x: Tensor, mode: str = "inference") -> Any:
        """``"training"``: the logits of all exits and of the final classifier. ``"inference"``: an
        :class:`InferenceResult` of one sample, else a :class:`BatchedInferenceResult`."""
        if mode == "training":
            call = _Call(self, "training", len(x))
            final = self._run(call, x)
            return [*call.outputs, final]
        if mode != "inference":
            raise ValueError(f"EarlyExitWrapper: expected mode to be 'training' or 'inference', got {mode!r}")
        if not len(x):
            raise ValueError("EarlyExitWrapper: expected at least one sample, got an empty batch")
        fractions = self._flops(x)
        refuse_batch_statistics("EarlyExitWrapper", self, "call eval() first")
        with torch.inference_mode():
            call = _Call(self, "each", len(x))
            try:
                logits = self._run(call, x)
            except _AllLeft:
                pass
            else:
                call.finish(logits, self.config.temperatures[FINAL_HEAD])
            result = gathered(call.parts)
        if len(x) == 1:
            taken = int(result.exit_taken)
            return InferenceResult(result.logits, taken, result.confidence.item(), fractions[taken])
        share = sum(fractions[k] for k in result.exit_taken.tolist()) / len(x)
        return BatchedInferenceResult(result.logits, result.exit_taken, result.confidence, share)

    def forward_inference_batched(self, x: Tensor) -> BatchedInferenceResult:
        """All rows leave together, at the first exit that is sure of every one of them."""
        if not len(x):
            raise ValueError("EarlyExitWrapper: expected at least one sample, got an empty batch")
        fractions = self._flops(x)
        with torch.inference_mode():
            call = _Call(self, "together", len(x))
            try:
                logits, taken = self._run(call, x), -1
                score = exit_decide(logits, math.inf, temperature=self.config.temperatures[FINAL_HEAD]).score
            except _AllLeft:
                _, logits, score, exits = call.parts[0]
                taken = int(exits[0])
        return BatchedInferenceResult(logits, taken, score, fractions[taken])

    def exit_parameters(self) -> Iterator[nn.Parameter]:
        for head in self.exit_heads.values():
            yield from head.parameters()

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.backbone.parameters()

    def _run(self, call: _Call, x: Tensor) -> Tensor:
        token = _CALL.set(call)
        try:
            features = self.backbone(x)
        finally:
            _CALL.reset(token)
        logits = self._final_classifier(features)
        call.check(logits)
        return logits

    def _at_exit(self, index: int, module: nn.Module, inputs: Any, output: Any) -> Any:
        call = _CALL.get()
        if call is None or call.owner is not self:  # the backbone alone, or within another wrapper
            return output
        if call.kind == "count":
            call.operations.append((index, call.counter()))
            return output
        if call.kind != "training" and not self.config.enabled_exits[index]:
            return output
        name = self.config.exit_points[index].name
        adapter = self._adapters.get(name)
        logits = self.exit_heads[name](output if adapter is None else adapter(output))
        if call.kind == "training":
            call.outputs.append(logits)
            return output
        call.check(logits)
        policy = self.config.routing_policy
        thresholds = self.config.confidence_thresholds if policy == "confidence" else self.config.entropy_thresholds
        return call.decide(index, output, logits, thresholds[index], policy, self.config.temperatures[name])

    def _flops(self, x: Tensor) -> list[float]:
        """The share of the operations up to each exit, and 1 at the end, where -1 finds it."""
        if self._fractions is None:
            from torch.utils.flop_counter import FlopCounterMode

            sample = x[:1] if self._input_shape is None else x.new_zeros(self._input_shape)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                call = _Call(self, "count", len(sample), counter.get_total_flops)
                token = _CALL.set(call)
                try:
                    self.backbone(sample)
                finally:
                    _CALL.reset(token)
            total = max(counter.get_total_flops(), 1)
            shares = dict(call.operations)
            self._fractions = [shares[k] / total for k in range(len(self.config.exit_points))] + [1.0]
        return self._fractions


class _AllLeft(Exception):
    """Stops a backbone that has no rows left: an opaque forward cannot be left in another way."""


class _Call:
    """One pass through the backbone, and what its hooks found."""

    def __init__(self, owner: EarlyExitWrapper, kind: str, rows: int, counter: Callable[[], int] = int) -> None:
        self.owner, self.kind, self.counter = owner, kind, counter
        self.outputs: list[Tensor] = []
        self.operations: list[tuple[int, int]] = []
        self.parts: list[tuple[Any, Tensor, Tensor, Tensor]] = []
        self.physical = rows  # rows of the features
        self.samples: Tensor | None = None  # of each row of the features; None: in order
        self.alive: Tensor | None = None  # rows that have not left; None: all

    def check(self, logits: Tensor) -> None:
        if self.kind == "each" and len(logits) != self.physical:
            raise RuntimeError(
                f"EarlyExitWrapper: expected {self.physical} rows behind an exit that dropped the others, got "
                f"{len(logits)}: something from before the exit reaches the layers behind it; take cost=CostModel(0)"
            )

    def decide(self, index: int, output: Any, logits: Tensor, limit: float, policy: str, temperature: float) -> Any:
        if self.alive is not None:
            logits = logits[self.alive]
        decision = exit_decide(logits, limit, policy, temperature, fixed_size=False)
        score = (
            decision.score if policy == "confidence" else exit_decide(logits, math.inf, temperature=temperature).score
        )
        here = torch.full_like(decision.prediction, index)
        if self.kind == "together":
            if decision.n_keep:
                return output
            self.parts.append((None, logits, score, here))
            raise _AllLeft
        if decision.n_keep == len(logits):
            return output
        leave, stay = decision.exit_index, decision.keep_index
        samples = self._samples(len(logits), logits.device)
        self.parts.append((samples[leave], logits[leave], score[leave], here[leave]))
        if not decision.n_keep:
            raise _AllLeft
        self.alive = stay if self.alive is None else self.alive[stay]
        if not self.owner.cost.pays(index, self.physical, len(self.alive)):
            return output
        self.samples = self.alive if self.samples is None else self.samples[self.alive]
        output, self.physical, self.alive = compact(output, self.alive), len(self.alive), None
        return output

    def finish(self, logits: Tensor, temperature: float) -> None:
        """The final classifier takes the rest."""
        if self.alive is not None:
            logits = logits[self.alive]
        decision = exit_decide(logits, math.inf, temperature=temperature, fixed_size=False)
        samples = self._samples(len(logits), logits.device)
        self.parts.append((samples, logits, decision.score, torch.full_like(decision.prediction, -1)))

    def _samples(self, rows: int, device: torch.device) -> Tensor:
        if self.samples is None:
            return torch.arange(rows, device=device) if self.alive is None else self.alive
        return self.samples if self.alive is None else self.samples[self.alive]


_CALL: ContextVar[_Call | None] = ContextVar("fastcifar_earlyon_call", default=None)


def weighted_multi_exit_loss(predictions: Sequence[Tensor], targets: Tensor, weights: Sequence[float]) -> Tensor:
    """``sum_k weights[k] * cross_entropy(predictions[k], targets)``; the weights are not normalised."""
    if len(predictions) != len(weights):
        raise ValueError(
            f"weighted_multi_exit_loss: expected {len(predictions)} weights, as many as predictions, got {len(weights)}"
        )
    losses = [weight * F.cross_entropy(p, targets) for p, weight in zip(predictions, weights, strict=True)]
    return torch.stack(losses).sum()


def _expect(right: bool, what: str, got: Any, op: str = "EarlyExitConfig") -> None:
    if not right:
        raise ValueError(f"{op}: expected {what}, got {got}")


def _check_list(name: str, values: Sequence[float], count: int, low: float, high: float) -> None:
    right = len(values) == count and all(math.isfinite(value) and low <= value <= high for value in values)
    _expect(right, f"{count} finite {name} from {low} to {high}", values)
