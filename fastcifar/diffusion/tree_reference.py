"""Tree search over diffusion states, node by node in plain Python: what the kernels are measured against.

A tree is vectors with one element a node; the children of node i are ``pool[start[i] : start[i] + count[i]]``. Where a
function changes a tree it changes these vectors themselves.

Source: Jain et al., "Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models" (2025), arXiv
2506.20701.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NAN, INF = math.nan, math.inf


def weights(values: Sequence[float], lam: float) -> list[float]:
    """``exp(lam (v - top))`` with the largest of them as top: 1 of the largest even where it is infinite, 0 of a NaN,
    and 1 of all others where lam is 0."""
    top = max((v for v in values if not math.isnan(v)), default=-INF)
    return [0.0 if math.isnan(v) else 1.0 if v == top or lam == 0 else math.exp(lam * (v - top)) for v in values]


def soft_value(values: Sequence[float], lam: float) -> float:
    """The soft Bellman backup ``V = ln(mean(exp(lam v))) / lam`` of children that were sampled from p; their mean where
    lam is 0. A mean, not a sum: how often a node was expanded says nothing of its worth."""
    if any(math.isnan(v) for v in values):
        return NAN
    if lam == 0:
        return sum(v / len(values) for v in values)
    return max(values) + math.log(sum(weights(values, lam)) / len(values)) / lam


def boltzmann(values: Sequence[float], lam: float, uniform: float) -> int:
    """The child in whose share of ``exp(lam v)`` a number in [0, 1) falls."""
    w = weights(values, lam)
    threshold, running = uniform * sum(w), 0.0
    for i, share in enumerate(w):
        running += share
        if running > threshold:
            return i
    # A product that was rounded up to the whole leaves none: the last that has a share, the first where none has.
    return max((i for i, share in enumerate(w) if share > 0), default=0)


def uct(values: Sequence[float], visits: Sequence[int], parent_visits: int, c: float) -> int:
    """The first child of the largest upper bound ``v + c sqrt(ln N / n)``; a NaN is never the largest."""
    best, at = -INF, 0
    for i, (v, n) in enumerate(zip(values, visits, strict=True)):
        bound = v + c * math.sqrt(math.log(parent_visits) / n)
        if bound > best:
            best, at = bound, i
    return at


def _children(start: Tensor, count: Tensor, pool: Tensor, node: int) -> list[int]:
    return pool[start[node] : start[node] + count[node]].tolist()


def select(
    value: Tensor,
    visits: Tensor,
    taken: Tensor,
    start: Tensor,
    count: Tensor,
    pool: Tensor,
    allowed: Tensor,
    roots: Tensor,
    uniform: Tensor | None,
    descents: int,
    levels: int,
    width: int,
    lam: float,
    c_uct: float,
) -> Tensor:
    """The ends of descents, ``[trees, descents]``, each from its root to a node that may have more children or is
    ``levels`` deep. They follow one another: each counts as a visit of all that it passes, and takes its children."""
    leaves = torch.empty(len(roots), descents, dtype=torch.int64)
    for tree, root in enumerate(roots.tolist()):
        for descent in range(descents):
            node = root
            for level in range(levels + 1):
                visits[node] += 1
                allowance = int(allowed[min(int(visits[node]), len(allowed) - 1)])
                if level == levels:
                    break
                # Where all children are still to be made there is nothing to descend into.
                if taken[node] < allowance or count[node] == 0:
                    taken[node] += width
                    break
                children = _children(start, count, pool, node)
                values = value[children].tolist()
                if uniform is None:
                    chosen = uct(values, visits[children].tolist(), int(visits[node]), c_uct)
                else:
                    chosen = boltzmann(values, lam, float(uniform[tree, descent, level]))
                node = children[chosen]
            leaves[tree, descent] = node
    return leaves


def sample(
    value: Tensor, start: Tensor, count: Tensor, pool: Tensor, roots: Tensor, uniform: Tensor, lam: float
) -> Tensor:
    """The ends of Boltzmann descents that change nothing, ``[draws]``; uniform is ``[draws, levels]``."""
    leaves = roots.clone()
    for draw, node in enumerate(roots.tolist()):
        for level in range(uniform.shape[1]):
            children = _children(start, count, pool, node)
            if not children:
                break
            node = children[boltzmann(value[children].tolist(), lam, float(uniform[draw, level]))]
        leaves[draw] = node
    return leaves


def backup(
    value: Tensor, parent: Tensor, depth: Tensor, start: Tensor, count: Tensor, pool: Tensor, nodes: Tensor, lam: float
) -> None:
    """Soft values of ``nodes`` and of all above them; a node without children keeps its own."""
    touched: set[int] = set()
    for node in nodes.flatten().tolist():
        while node >= 0 and node not in touched:
            touched.add(node)
            node = int(parent[node])
    for node in sorted(touched, key=lambda i: -int(depth[i])):  # after all below it
        children = _children(start, count, pool, node)
        if children:
            value[node] = soft_value(value[children].tolist(), lam)
