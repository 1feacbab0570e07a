"""When it pays to move the rows that stay: by a rule of thumb, or by what this machine measured on this model."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from .._checks import expect_type
from .functional import compact

if TYPE_CHECKING:
    from .modules import EarlyExit

__all__ = ["CostModel", "Flops", "MeasuredCost", "count_flops"]


class CostModel:
    """Decides by a rule of thumb: a stage takes as long as ``passes`` copies of the state that it gets.

    Moving the rows that stay costs a copy of them, and saves the next stage the rows that have left. It pays where
    ``passes * left > stay``: a stage of a few convolutions or of a transformer block takes tens of copies, so it pays
    as soon as a few rows in a hundred have left. The same rows give the same decisions on every machine and at every
    call, as they would not by a clock.

    Args:
        passes: how many copies of its state a stage is worth. Default 16. 0 never moves, infinity always.

    Raises:
        ValueError: ``passes`` is negative or NaN.

    Example:
        >>> from fastcifar.earlyexit import CostModel
        >>> CostModel().pays(exit=0, rows=128, keep=127), CostModel().pays(exit=0, rows=128, keep=64)
        (False, True)
    """

    def __init__(self, passes: float = 16.0) -> None:
        if not passes >= 0:
            raise ValueError(f"CostModel: expected passes of 0 or more, got {passes}")
        self.passes = passes

    def pays(self, exit: int, rows: int, keep: int) -> bool:
        """Whether to move now.

        Args:
            exit: the exit that was just decided, 0 and up; stage ``exit + 1`` comes next.
            rows: rows of the state, those included that have left and were not yet dropped.
            keep: how many of them stay, above 0.
        """
        return keep < rows and self.passes * (rows - keep) > keep

    def __repr__(self) -> str:
        return f"{type(self).__name__}(passes={self.passes:g})"


class MeasuredCost(CostModel):
    """Decides by seconds, measured by :meth:`measure`: it moves where the next stage and head save more than it costs.

    Args:
        sizes: numbers of rows that were timed, ascending.
        stages: ``[S][len(sizes)]`` seconds of each stage with its head.
        moves: ``[S - 1][len(sizes)]`` seconds of moving so many rows of the state after each exit.

    Raises:
        ValueError: the lists do not fit each other.
    """

    def __init__(
        self, sizes: Sequence[int], stages: Sequence[Sequence[float]], moves: Sequence[Sequence[float]]
    ) -> None:
        if not sizes or sorted(set(sizes)) != list(sizes) or sizes[0] < 1:
            raise ValueError(f"MeasuredCost: expected ascending sizes above 0, got {list(sizes)}")
        if len(moves) != len(stages) - 1 or any(len(t) != len(sizes) for t in [*stages, *moves]):
            raise ValueError(
                f"MeasuredCost: expected {len(sizes)} times of each of {len(stages)} stages and of the moves between "
                f"them, got {[len(t) for t in stages]} and {[len(t) for t in moves]}"
            )
        self.sizes, self.stages, self.moves = list(sizes), [list(t) for t in stages], [list(t) for t in moves]

    def pays(self, exit: int, rows: int, keep: int) -> bool:
        if keep >= rows:
            return False
        saved = self._seconds(self.stages[exit + 1], rows) - self._seconds(self.stages[exit + 1], keep)
        return saved > self._seconds(self.moves[exit], keep)

    def _seconds(self, times: Sequence[float], rows: int) -> float:
        """Between the sizes that were timed, on a line; beyond the largest, in proportion."""
        place = bisect_left(self.sizes, rows)
        if place == len(self.sizes):
            return times[-1] * rows / self.sizes[-1]
        if place == 0:
            return times[0]
        low, high = self.sizes[place - 1], self.sizes[place]
        share = (rows - low) / (high - low)
        return times[place - 1] * (1 - share) + times[place] * share

    @classmethod
    @torch.no_grad()
    def measure(cls, model: EarlyExit, example: Any, repeats: int = 5) -> MeasuredCost:
        """Times the stages of ``model`` on ``example`` and on its first half, quarter, ... rows.

        Args:
            model: in evaluation.
            example: a batch as the model gets it, of the size it will be used with.
            repeats: calls of each, of which the median counts. Default 5.

        Raises:
            ValueError: the model is in training, or ``repeats`` is below 1.
        """
        if model.training:
            raise ValueError("MeasuredCost.measure: expected a model in evaluation, got one in training")
        if repeats < 1:
            raise ValueError(f"MeasuredCost.measure: expected at least one repeat, got {repeats}")
        rows = _rows("MeasuredCost.measure", example)
        sizes = sorted({max(1, rows >> shift) for shift in range(max(1, rows.bit_length()))})
        stages, moves = [], []
        state = example
        for k, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
            inputs = {n: compact(state, _first(state, n)) for n in sizes}
            stages.append([_time(lambda x: head(stage(x)), inputs[n], repeats) for n in sizes])  # noqa: B023
            state = stage(state)
            if k + 1 < len(model.stages):
                moves.append([_time(lambda n: compact(state, _first(state, n)), n, repeats) for n in sizes])  # noqa: B023
        return cls(sizes, stages, moves)

    def __repr__(self) -> str:
        return f"MeasuredCost(sizes={self.sizes})"


class Flops(NamedTuple):
    """Multiply-adds times two of one row, from :func:`count_flops`.

    Attributes:
        stages: of each stage.
        heads: of each head.
    """

    stages: list[float]
    heads: list[float]

    def up_to(self, exit: int) -> float:
        """What a row costs that leaves at this exit: all stages and heads up to it."""
        return sum(self.stages[: exit + 1]) + sum(self.heads[: exit + 1])

    @property
    def full(self) -> float:
        """The stages and the last head: the model without early exits."""
        return sum(self.stages) + self.heads[-1]


@torch.no_grad()
def count_flops(model: EarlyExit, example: Any) -> Flops:
    """What each stage and head of a model computes for one row, as torch's own counter counts it (matrix products,
    convolutions and attention; a kernel that it does not know counts nothing).

    Example:
        >>> import torch
        >>> from fastcifar.earlyexit import EarlyExit, count_flops
        >>> stages = [torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)]
        >>> model = EarlyExit(stages, [torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)], thresholds=0.9).eval()
        >>> count_flops(model, torch.randn(4, 8))
        Flops(stages=[128.0, 128.0], heads=[48.0, 48.0])
    """
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, and seldom needed

    from .modules import EarlyExit

    expect_type("count_flops", EarlyExit, "an EarlyExit", model=model)
    rows, state = _rows("count_flops", example), example
    stages, heads = [], []
    for stage, head in zip(model.stages, model.heads, strict=True):
        with FlopCounterMode(display=False) as counter:
            state = stage(state)
        stages.append(counter.get_total_flops() / rows)
        with FlopCounterMode(display=False) as counter:
            head(state)
        heads.append(counter.get_total_flops() / rows)
    return Flops(stages, heads)


def _rows(op: str, tree: Any) -> int:
    leaf = next((leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)), None)
    if leaf is None or leaf.dim() == 0 or len(leaf) == 0:
        raise ValueError(f"{op}: expected an example of tensors with at least one row")
    return len(leaf)


def _first(tree: Any, rows: int) -> torch.Tensor:
    device = next(leaf.device for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return torch.arange(rows, device=device)


def _time(call: Any, argument: Any, repeats: int) -> float:
    def once() -> float:
        begin = perf_counter()
        result = call(argument)
        if any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in pytree.tree_leaves(result)):
            torch.cuda.synchronize()
        return perf_counter() - begin

    once()
    return median(once() for _ in range(repeats))
