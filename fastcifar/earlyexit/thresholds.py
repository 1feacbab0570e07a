"""Which thresholds: the budgeted search of MSDNet, and the exact accuracy/latency front of one shared threshold.

Confidences are ``[S, n]``, of S exits and n samples of a set that was kept apart; the larger, the surer. Of a criterion
that falls (entropy, energy), give its negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NEVER, ALWAYS = 1e8, -1e8  # MSDNet's thresholds of an exit that nobody takes, and of the last

__all__ = ["ParetoFront", "exit_shares", "find_thresholds", "first_exit", "pareto"]


def exit_shares(stages: int, q: float | Sequence[float] | None = None) -> Tensor:
    """The share of samples that each exit is to take, ``p_k ∝ q**k``: MSDNet's family of budgets.

    Args:
        stages: S, how many exits.
        q: positive numbers; below 1, most samples exit early. None gives the official ``i / 20``, i = 1 to 39.

    Returns:
        ``[S]`` of one number, ``[len(q), S]`` of several; float32, as in the official code, since the search rounds
        ``n p_k`` down.

    Raises:
        ValueError: ``stages`` is below 1, or q not positive.

    Source: Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification", ICLR 2018.

    Example:
        >>> from fastcifar.earlyexit import exit_shares
        >>> exit_shares(3, 1.0).tolist() == [exit_shares(3, 1.0)[0].item()] * 3
        True
    """
    if stages < 1:
        raise ValueError(f"exit_shares: expected at least one exit, got {stages}")
    numbers = torch.tensor([i / 20 for i in range(1, 40)] if q is None else q, dtype=torch.float32)
    if not bool((numbers > 0).all()):
        raise ValueError(f"exit_shares: expected q to be positive, got {q}")
    shares = torch.exp(numbers.log().unsqueeze(-1) * torch.arange(1, stages + 1))
    return shares / shares.sum(-1, keepdim=True)


def find_thresholds(
    confidence: Tensor, p: Tensor | Sequence | None = None, *, q: float | Sequence[float] | None = None
) -> Tensor:
    """MSDNet's budgeted-batch search: thresholds at which exit k takes a share ``p_k`` of all samples.

    Exit by exit, the samples that no earlier exit took are walked in the order of falling confidence; the threshold is
    the confidence of number ``floor(n p_k)`` among them, and all samples at or above it (the walked ones and those that
    tie with the last) leave. Where ``floor(n p_k)`` is 0, or that many are not left, it is 1e8; of the last exit it is
    -1e8. One sort an exit serves all budgets. A NaN never exits.

    Args:
        confidence: ``[S, n]``, floating.
        p: shares ``[S]``, or ``[Q, S]`` of Q budgets; ``floor(n p_k)`` is taken in its dtype (float64 of numbers).
        q: in place of ``p``: :func:`exit_shares` of these. Both None: of the official 39.

    Returns:
        ``[S]``, or ``[Q, S]``, in the dtype of ``confidence``; for :func:`first_exit` and
        :func:`~fastcifar.earlyexit.exit_decide` with ``>=``.

    Raises:
        TypeError: ``confidence`` is not a floating tensor.
        ValueError: a shape is not as described, a share is negative or not finite, or both p and q are given.

    Source: kalviny/MSDNet-PyTorch, ``adaptive_inference.py``, ``dynamic_eval_find_threshold``.

    Example:
        >>> import torch
        >>> from fastcifar.earlyexit import find_thresholds
        >>> find_thresholds(torch.tensor([[0.9, 0.6, 0.8, 0.7], [0.9, 0.9, 0.9, 0.9]]), [0.5, 0.5])[0].item()
        0.800000011920929
    """
    op = "find_thresholds"
    confidence = _confidence(op, confidence)
    exits, samples = confidence.shape
    if p is not None and q is not None:
        raise ValueError(f"{op}: expected p or q, got both")
    if p is None:
        shares = exit_shares(exits, q)
    else:
        shares = p if isinstance(p, Tensor) else torch.tensor(p, dtype=torch.float64)
    if shares.dim() not in (1, 2) or shares.shape[-1] != exits:
        raise ValueError(f"{op}: expected p [S] or [Q, S] of S = {exits} exits, got {tuple(shares.shape)}")
    if not bool((shares.isfinite() & (shares >= 0)).all()):
        raise ValueError(f"{op}: expected p to be finite and not negative")
    counts = (samples * shares).floor().long().reshape(-1, exits).to(confidence.device)
    thresholds = torch.full(counts.shape, NEVER, dtype=confidence.dtype, device=confidence.device)
    thresholds[:, -1] = ALWAYS
    if exits > 1 and samples:
        values, order = confidence[:-1].sort(1, descending=True)
        for budget, filled in zip(counts.tolist(), thresholds, strict=True):
            _search(confidence, values, order, budget, filled)
    return thresholds.reshape(shares.shape)


def _search(confidence: Tensor, values: Tensor, order: Tensor, budget: list[int], thresholds: Tensor) -> None:
    """Fills in the thresholds of one budget."""
    left: Tensor | None = None  # the first exit finds everyone
    for k, wanted in enumerate(budget[:-1]):
        places = None if left is None else left.index_select(0, order[k]).nonzero().squeeze(1)
        if not 0 < wanted <= (confidence.shape[1] if places is None else len(places)):
            continue
        thresholds[k] = values[k, wanted - 1 if places is None else places[wanted - 1]]
        stays = confidence[k] < thresholds[k]
        left = stays if left is None else left.logical_and_(stays)


def first_exit(confidence: Tensor, thresholds: float | Tensor | Sequence[float], strict: bool = False) -> Tensor:
    """The exit that each sample takes: the first whose confidence reaches its threshold, else the last.

    Args:
        confidence: ``[S, n]``, floating.
        thresholds: one number for all exits, or one for each; compared in the dtype of ``confidence``. That of the last
            exit changes nothing.
        strict: whether the confidence has to be above the threshold. Default False.

    Returns:
        int64 ``[n]``, 0 to S - 1.

    Raises:
        TypeError: ``confidence`` is not a floating tensor.
        ValueError: a shape is not as described, or a threshold is NaN.

    Source: MSDNet's ``dynamic_eval_with_threshold`` (``>=``), Dynamic Confidence (``>``).

    Example:
        >>> import torch
        >>> from fastcifar.earlyexit import first_exit
        >>> first_exit(torch.tensor([[0.9, 0.2, 0.2], [0.1, 0.9, 0.2], [0.3, 0.3, 0.3]]), 0.8).tolist()
        [0, 1, 2]
    """
    op = "first_exit"
    confidence = _confidence(op, confidence)
    exits = len(confidence)
    limit = torch.as_tensor(thresholds, dtype=confidence.dtype, device=confidence.device)
    if limit.dim() > 1 or limit.numel() not in (1, exits):
        raise ValueError(f"{op}: expected one threshold, or one for each of {exits} exits, got {tuple(limit.shape)}")
    if bool(limit.isnan().any()):
        raise ValueError(f"{op}: expected thresholds to be numbers, got nan")
    limit = limit.reshape(-1, 1)
    fires = confidence > limit if strict else confidence >= limit
    # Each exit before the first that fires counts 1.
    return (~fires[:-1]).cumprod(0, dtype=torch.int64).sum(0) if exits > 1 else fires[0].long() * 0


class ParetoFront(NamedTuple):
    """What :func:`pareto` returns: the best trade-offs, by rising cost.

    Attributes:
        threshold: that reach them, in the dtype of the confidences.
        cost: mean cost of a sample, float64.
        accuracy: share of correct samples, float64.
    """

    threshold: Tensor
    cost: Tensor
    accuracy: Tensor


def pareto(
    confidence: Tensor, correct: Tensor, costs: Tensor | Sequence[float] | None = None, strict: bool = False
) -> ParetoFront:
    """Every accuracy and cost that one threshold, shared by all exits, can reach without being beaten by another.

    A sample exits at the first exit whose confidence reaches the threshold. As the threshold falls, a sample moves
    forward at each new maximum of its confidences over the exits, and nowhere else: one sort of these maxima and two
    cumulative sums give the curve over all thresholds there are, of which the points remain that are more accurate
    than all that cost no more. Counts are exact; so are sums of whole costs.

    Args:
        confidence: ``[S, n]``, floating.
        correct: bool ``[S, n]``, whether the prediction of an exit is right.
        costs: of stopping at each exit, not falling. None: 1 to S.
        strict: whether a sample exits above the threshold only (Dynamic Confidence). Default False.

    Returns:
        :class:`ParetoFront`. An infinite threshold lets everyone pass to the last exit (or, strict, minus infinity
        takes the first confidence there is).

    Raises:
        TypeError: ``confidence`` is not a floating tensor, or ``correct`` is not boolean.
        ValueError: a shape is not as described, there are no samples, a confidence is plus infinity, or costs fall.

    Source: the latency/accuracy front of Li et al., "Unleashing the Potential of Spiking Neural Networks with Dynamic
    Confidence", ICCV 2023, section 3.4, over all thresholds in place of a grid.

    Example:
        >>> import torch
        >>> from fastcifar.earlyexit import pareto
        >>> confidence = torch.tensor([[0.9, 0.4], [0.95, 0.8]])
        >>> front = pareto(confidence, torch.tensor([[True, False], [True, True]]))
        >>> front.cost.tolist(), front.accuracy.tolist()
        ([1.0, 1.5], [0.5, 1.0])
    """
    op = "pareto"
    confidence = _confidence(op, confidence)
    exits, samples = confidence.shape
    if not isinstance(correct, Tensor) or correct.dtype != torch.bool:
        raise TypeError(f"{op}: expected correct to be a boolean tensor, got {getattr(correct, 'dtype', correct)}")
    if correct.shape != confidence.shape or not samples:
        raise ValueError(
            f"{op}: expected confidence and correct [S, n] of at least one sample, got {tuple(confidence.shape)} and "
            f"{tuple(correct.shape)}"
        )
    if costs is None:
        cost = torch.arange(1, exits + 1, dtype=torch.float64, device=confidence.device)
    else:
        cost = torch.as_tensor(costs, dtype=torch.float64, device=confidence.device)
    if cost.shape != (exits,) or not bool((cost.isfinite().all()) & (cost.diff() >= 0).all()):
        raise ValueError(f"{op}: expected {exits} finite costs that do not fall, got {cost.tolist()}")

    if bool((confidence == math.inf).any()):
        raise ValueError(f"{op}: expected no infinite confidence, which no threshold stops")

    # Where a sample's confidence is above all before it, the threshold that reaches it moves the sample there, from the
    # next such exit or, of the last one, from the last exit.
    peak = confidence[:-1].cummax(0).values
    before = torch.cat([peak.new_full((1, samples), -math.inf), peak[:-1]])[: exits - 1]
    rises = confidence[:-1] > before
    last = torch.full((samples,), exits - 1, device=confidence.device)
    source = torch.empty(exits - 1, samples, dtype=torch.int64, device=confidence.device)
    for k in range(exits - 2, -1, -1):
        source[k] = last
        last = torch.where(rises[k], k, last)
    exit_, sample = rises.nonzero(as_tuple=True)
    origin = source[exit_, sample]
    gain = correct[exit_, sample].long() - correct[origin, sample].long()
    values, order = confidence[exit_, sample].sort(descending=True)
    right = correct[-1].sum() + gain[order].cumsum(0)
    spent = cost[-1] * samples + (cost[exit_] - cost[origin])[order].cumsum(0)

    # All that share a confidence move together: the sums after the last of them count.
    ends = torch.ones_like(values, dtype=torch.bool)
    ends[:-1] = values[1:] < values[:-1]
    threshold = torch.cat([values.new_full((1,), math.inf), values[ends]])
    if strict:  # what is above a threshold is at or above the next confidence
        threshold = torch.cat([threshold[1:], values.new_full((1,), -math.inf)])
    right = torch.cat([correct[-1].sum().reshape(1), right[ends]])
    spent = torch.cat([(cost[-1] * samples).reshape(1), spent[ends]])

    # From the cheapest on (costs do not rise as the threshold falls), what is more accurate than all before it; of
    # equal costs, the most accurate.
    threshold, right, spent = threshold.flip(0), right.flip(0), spent.flip(0)
    best = right.cummax(0).values
    better = torch.ones_like(best, dtype=torch.bool)
    better[1:] = right[1:] > best[:-1]
    beaten = torch.zeros_like(better)
    cheap = spent[better]
    beaten[better.nonzero().squeeze(1)[:-1]] = cheap[1:] == cheap[:-1]
    keep = better & ~beaten
    return ParetoFront(threshold[keep], spent[keep] / samples, right[keep].double() / samples)


def _confidence(op: str, confidence: Tensor) -> Tensor:
    """Checked; a NaN, which never exits, as minus infinity."""
    if not isinstance(confidence, Tensor) or not confidence.is_floating_point():
        got = confidence.dtype if isinstance(confidence, Tensor) else type(confidence).__name__
        raise TypeError(f"{op}: expected confidence to be a floating tensor, got {got}")
    if confidence.dim() != 2 or len(confidence) == 0:
        raise ValueError(f"{op}: expected confidence [S, n] of at least one exit, got {tuple(confidence.shape)}")
    return confidence.detach().nan_to_num(-math.inf, math.inf, -math.inf)
