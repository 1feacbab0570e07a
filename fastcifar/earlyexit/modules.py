"""Models with early exits: stages, a head after each, and the rows that leave on the way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .cost import CostModel
from .functional import CRITERIA, compact, exit_decide
from .reference import RISING

MODES = ("compact", "masked", "simulate")
FALLBACKS = ("last", "most_confident")

__all__ = ["EarlyExit", "EarlyExitResult"]


class EarlyExitResult(NamedTuple):
    """What :class:`EarlyExit` returns in evaluation; B rows, K classes, S heads.

    Attributes:
        logits: of the head that each row left at, ``[B, K]``.
        exit_taken: which head that was, int64 ``[B]``, 0 to S - 1.
        confidence: the criterion's score there (the largest probability, with patience), float32 ``[B]``.
        confidences: mode "simulate": the scores of all heads, ``[S, B]``, NaN at exits that are off; else None.
    """

    logits: Tensor
    exit_taken: Tensor
    confidence: Tensor
    confidences: Tensor | None = None


class EarlyExit(nn.Module):
    r"""Stages with a head after each; in evaluation every row leaves at the first head that is sure enough of it.

    In training, ``forward(x)`` returns the list of the logits of all heads (:class:`JointExitLoss` sums their losses).
    In evaluation it returns an :class:`EarlyExitResult`, and ``mode`` says how:

    - ``"compact"``: rows that leave are dropped from the state, later stages run on those that stay, and the results
      are written back in order. ``cost`` decides at each exit whether moving the rows pays; until it does, rows that
      have left are carried along unseen. A batch of which all have left stops. On a GPU each exit waits for the device.
    - ``"masked"``: shapes are fixed, every stage and head sees all rows, and a row keeps the logits it left with.
      Nothing waits for a device, and torch.compile and CUDA graphs take it whole.
    - ``"simulate"``: as masked, and returns all scores, to choose thresholds from.

    The decisions are :func:`exit_decide`'s in all three, so the answers are the same, up to the rounding of a stage
    that computes a smaller batch in another order.

    Args:
        stages: S modules; each takes the state and returns the next, the first takes ``x``. A state is a tensor or any
            tree of tensors, all with B rows.
        heads: S modules from the state after a stage to logits ``[B, K]``; the last is the final classifier.
        criterion: of :func:`exit_decide`, or ``"patience"``: a row leaves at the head that, with the ``patience`` heads
            before it, names the same class (PABEE).
        thresholds: one for all exits, or one for each head before the last; S of them are taken too, as
            :func:`find_thresholds` gives them, where that of the last changes nothing. None in a list turns an exit
            off: its head runs in training only. Can be assigned later; not in the state_dict. With patience: None.
        temperature: of the softmax, one for all heads or one each. Default 1.
        strict: whether a score equal to the threshold stays. Default False.
        mode: one of the above. Default ``"compact"``.
        fallback: which head speaks for the rows that no exit took. ``"last"`` (default; MSDNet), or
            ``"most_confident"``: the head that was surest of the row, the first in a tie (Shallow-Deep Networks).
        patience: how many heads on end must agree with the one before, 1 or more; with criterion "patience" only.
        cost: what decides when to move rows: a :class:`CostModel` (the default), :class:`MeasuredCost` or any object
            with their ``pays``.

    Attributes:
        thresholds: tuple of S - 1 numbers or None.

    Raises:
        TypeError: a threshold is not a number.
        ValueError: an argument is not as described, a threshold is not finite, or there are more or fewer than exits;
            at a call, in mode "compact", a batch norm computes its statistics from the batch (in training, or without
            running statistics), so that dropping rows would change the results of the others.

    Source: Teerapittayanon et al., "BranchyNet", ICPR 2016; Huang et al., "Multi-Scale Dense Networks for Resource
    Efficient Image Classification", ICLR 2018; Kaya et al., "Shallow-Deep Networks", ICML 2019; Zhou et al., "BERT
    Loses Patience" (PABEE), NeurIPS 2020. When to move rows: DREX, arXiv 2512.15705.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastcifar.earlyexit import EarlyExit
        >>> stages = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)]
        >>> model = EarlyExit(stages, [nn.Linear(8, 4) for _ in range(3)], thresholds=0.3)
        >>> [tuple(logits.shape) for logits in model(torch.randn(5, 8))]  # training
        [(5, 4), (5, 4), (5, 4)]
        >>> logits, exit_taken, confidence, _ = model.eval()(torch.randn(5, 8))
        >>> logits.shape, exit_taken.shape, confidence.shape
        (torch.Size([5, 4]), torch.Size([5]), torch.Size([5]))
    """

    def __init__(
        self,
        stages: Iterable[nn.Module],
        heads: Iterable[nn.Module],
        criterion: str = "confidence",
        thresholds: float | Sequence[float | None] | Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        strict: bool = False,
        mode: str = "compact",
        fallback: str = "last",
        patience: int | None = None,
        cost: CostModel | None = None,
    ) -> None:
        super().__init__()
        self.stages, self.heads = nn.ModuleList(stages), nn.ModuleList(heads)
        if len(self.stages) != len(self.heads) or not len(self.stages):
            raise ValueError(
                f"EarlyExit: expected a head after each stage and at least one stage, got {len(self.stages)} stages "
                f"and {len(self.heads)} heads"
            )
        _check_choice("criterion", criterion, (*CRITERIA, "patience"))
        _check_choice("mode", mode, MODES)
        _check_choice("fallback", fallback, FALLBACKS)
        if (criterion == "patience") != (patience is not None):
            raise ValueError(
                f"EarlyExit: expected patience with criterion 'patience' and only there, got {criterion!r}, {patience}"
            )
        if patience is not None and (not isinstance(patience, int) or isinstance(patience, bool) or patience < 1):
            raise ValueError(f"EarlyExit: expected patience to be an integer above 0, got {patience!r}")
        self.criterion, self.strict, self.mode, self.fallback = criterion, strict, mode, fallback
        self.patience, self.cost = patience, CostModel() if cost is None else cost
        self.temperatures = _temperatures(temperature, len(self.heads))
        self._thresholds: tuple[float | None, ...] = ()
        self.thresholds = thresholds  # type: ignore[assignment]  # the setter takes more than the getter gives

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        return self._thresholds

    @thresholds.setter
    def thresholds(self, values: float | Sequence[float | None] | Tensor | None) -> None:
        exits = len(self.heads) - 1
        if self.criterion == "patience":
            if values is not None:
                raise ValueError(f"EarlyExit: expected no thresholds with criterion 'patience', got {values}")
            self._thresholds = (math.inf,) * exits  # the score alone lets nobody leave
            return
        if values is None and exits:
            raise ValueError(f"EarlyExit: expected thresholds for {exits} exits, got None")
        if isinstance(values, Tensor):
            values = values.tolist()
        given = list(values) if isinstance(values, Iterable) else [values] * exits
        if len(given) not in (exits, exits + 1):
            raise ValueError(
                f"EarlyExit: expected one threshold, or one for each of {exits} exits before the last head, got "
                f"{len(given)}"
            )
        for value in given:
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"EarlyExit: expected thresholds to be numbers, got {type(value).__name__}")
            if value is not None and not math.isfinite(value):
                raise ValueError(f"EarlyExit: expected finite thresholds (None turns an exit off), got {value}")
        self._thresholds = tuple(given[:exits])

    def forward(self, x: Any) -> list[Tensor] | EarlyExitResult:
        if self.training:
            outputs = []
            for stage, head in zip(self.stages, self.heads, strict=True):
                x = stage(x)
                outputs.append(head(x))
            return outputs
        return self._compact(x) if self.mode == "compact" else self._masked(x)

    def _decide(self, exit: int, logits: Tensor, memory: _Memory, fixed_size: bool) -> tuple[Tensor, Any, Any]:
        """Score, and who leaves: with patience as a mask, else as a decision."""
        last = exit == len(self.heads) - 1
        criterion = "confidence" if self.criterion == "patience" else self.criterion
        limit = self._thresholds[exit] if not last else None
        decision = exit_decide(
            logits,
            self._never if limit is None else limit,
            criterion,
            self.temperatures[exit],
            self.strict,
            fixed_size=fixed_size,
        )
        if self.patience is not None:
            return decision.score, memory.agree(decision.score, decision.prediction, self.patience), None
        return decision.score, None, decision

    @property
    def _never(self) -> float:
        """A threshold that no score reaches: decisions at it only score."""
        return math.inf if self.criterion in (*RISING, "patience") else -math.inf

    def _sureness(self, score: Tensor) -> Tensor:
        return score if self.criterion in (*RISING, "patience") else -score

    def _compact(self, x: Any) -> EarlyExitResult:
        refuse_batch_statistics("EarlyExit", self, "use mode 'masked'")
        last = len(self.heads) - 1
        most_confident = self.fallback == "most_confident"
        state, memory = x, _Memory()
        rows: Tensor | None = None  # the sample of each row of the state; None while that is its own number
        alive: Tensor | None = None  # which rows of the state have not left; None: all
        parts: list[tuple[Any, Tensor, Tensor, Tensor]] = []  # samples, logits, scores, exits
        for k, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            state = stage(state)
            if k < last and self._thresholds[k] is None:
                continue
            logits = head(state)
            physical = len(logits)
            if alive is not None:
                logits = logits.index_select(0, alive)
            score, mask, decision = self._decide(k, logits, memory, fixed_size=False)
            here = torch.full_like(score, k, dtype=torch.int64)
            samples = _chosen(rows, alive)
            if k == last:
                if most_confident:
                    logits, here, score = memory.surest(self._sureness(score), logits, here, score)
                parts.append((samples, logits, score, here))
                break
            if most_confident:
                memory.keep_surest(self._sureness(score), logits, here, score)
            if decision is not None:
                leave, stay = decision.exit_index, decision.keep_index
            else:
                leave, stay = mask.nonzero().squeeze(1), (~mask).nonzero().squeeze(1)
            if len(stay) == len(logits) and len(logits):
                continue
            if samples is None:
                samples = torch.arange(len(logits), device=logits.device)
            parts.append((samples[leave], logits[leave], score[leave], here[leave]))
            if not len(stay):
                break
            memory.compact(stay)
            alive = stay if alive is None else alive[stay]
            if self.cost.pays(k, physical, len(alive)):
                state = compact(state, alive)
                rows = alive if rows is None else rows[alive]
                alive = None
        return gathered(parts)

    def _masked(self, x: Any) -> EarlyExitResult:
        last = len(self.heads) - 1
        most_confident = self.fallback == "most_confident"
        memory, state = _Memory(), x
        out: tuple[Tensor, Tensor, Tensor] | None = None
        gone: Tensor | None = None
        scores: list[Tensor | None] = []
        for k, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            state = stage(state)
            if k < last and self._thresholds[k] is None:
                scores.append(None)
                continue
            logits = head(state)
            score, mask, decision = self._decide(k, logits, memory, fixed_size=True)
            scores.append(score)
            here = torch.full_like(score, k, dtype=torch.int64)
            now = logits, here, score
            if most_confident:
                if k < last:
                    memory.keep_surest(self._sureness(score), *now)
                else:
                    now = memory.surest(self._sureness(score), *now)
            if out is None or gone is None:
                out, gone = now, torch.zeros_like(score, dtype=torch.bool)
            else:  # who has left keeps what it left with; the others take what this head says
                out = _where(gone, out, now)
            if k < last:
                gone = gone | (decision.exit_mask() if decision is not None else mask)
        assert out is not None
        confidences = None
        if self.mode == "simulate":
            off = torch.full_like(out[2], math.nan)
            confidences = torch.stack([off if score is None else score for score in scores])
        return EarlyExitResult(out[0], out[1], out[2], confidences)

    def extra_repr(self) -> str:
        what = f"patience={self.patience}" if self.patience is not None else f"thresholds={self._thresholds}"
        return f"criterion={self.criterion}, {what}, mode={self.mode}, fallback={self.fallback}, cost={self.cost!r}"


class _Memory:
    """What rows carry from head to head beside the state: the class last named and how often, and the surest head."""

    def __init__(self) -> None:
        self.named: Tensor | None = None
        self.streak: Tensor | None = None
        self.best: tuple[Tensor, ...] | None = None  # sureness, logits, head, score

    def agree(self, score: Tensor, prediction: Tensor, patience: int) -> Tensor:
        """Counts this head in; the mask of the rows whose streak has reached the patience. NaN agrees with nothing."""
        named = torch.where(score.isnan(), -1, prediction)
        if self.named is None or self.streak is None:
            self.streak = torch.zeros_like(named)
        else:
            same = (named == self.named) & (named >= 0)
            self.streak = torch.where(same, self.streak + 1, 0)
        self.named = named
        return self.streak >= patience

    def keep_surest(self, sureness: Tensor, *head: Tensor) -> None:
        now = (sureness, *head)
        self.best = now if self.best is None else _where(self._holds(sureness), self.best, now)

    def surest(self, sureness: Tensor, *head: Tensor) -> Any:
        """The surest of the heads so far and of the last."""
        return head if self.best is None else _where(self._holds(sureness), self.best[1:], head)

    def _holds(self, sureness: Tensor) -> Tensor:
        """Where the best so far stays the best: NaN never is."""
        assert self.best is not None
        best = self.best[0]
        return ~best.isnan() & ~(sureness > best)

    def compact(self, stay: Tensor) -> None:
        if self.named is not None and self.streak is not None:
            self.named, self.streak = self.named[stay], self.streak[stay]
        if self.best is not None:
            self.best = tuple(value.index_select(0, stay) for value in self.best)


def _where(mask: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Any:
    return tuple(torch.where(mask.view(-1, *(1,) * (x.dim() - 1)), x, y) for x, y in zip(a, b, strict=True))


def _chosen(rows: Tensor | None, alive: Tensor | None) -> Tensor | None:
    if rows is None or alive is None:
        return rows if alive is None else alive
    return rows[alive]


def refuse_batch_statistics(op: str, model: nn.Module, instead: str) -> None:
    """Raises where dropping rows would change what a batch norm makes of the others."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{op}: expected batch norms with running statistics, in evaluation, where rows are dropped, got "
                f"{type(module).__name__} {name} with batch statistics: the rows that stay would come out otherwise; "
                f"{instead}"
            )


def gathered(parts: list[tuple[Any, Tensor, Tensor, Tensor]]) -> EarlyExitResult:
    """The results in the order of the samples, of parts (samples, logits, scores, exits)."""
    if len(parts) == 1:  # all left together, in order
        _, logits, score, here = parts[0]
        return EarlyExitResult(logits, here, score)
    samples, logits, score, here = (torch.cat(values) for values in zip(*parts, strict=True))
    place = torch.empty_like(samples).scatter_(0, samples, torch.arange(len(samples), device=samples.device))
    return EarlyExitResult(logits.index_select(0, place), here[place], score[place])


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"EarlyExit: expected {name} to be one of {', '.join(choices)}; got {value!r}")


def _temperatures(values: float | Sequence[float], heads: int) -> tuple[float, ...]:
    given = [values] * heads if isinstance(values, int | float) else list(values)
    if len(given) != heads or not all(0 < value < math.inf for value in given):
        raise ValueError(f"EarlyExit: expected a positive temperature, or one for each of {heads} heads, got {values}")
    return tuple(float(value) for value in given)
