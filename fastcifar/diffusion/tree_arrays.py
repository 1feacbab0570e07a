"""A growing forest as flat vectors, and its three operations: descents, values, and new branches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import _library
from . import tree_reference

FULL = 2**62
_OWN = ("value", "visits", "taken", "parent", "depth", "start", "count", "row")  # one element a node


def _power_above(n: Tensor) -> Tensor:
    """The smallest power of two that is at least n, and 0 of 0."""
    power = torch.ones_like(n) << torch.frexp((n - 1).clamp(min=0).double()).exponent
    return torch.where(n == 0, 0, power)


def _repeat(values: Tensor, counts: Tensor) -> Tensor:
    """Each value so many times. ``repeat_interleave`` wakes all threads for it, which takes longer than the work."""
    return torch.from_numpy(np.repeat(values.numpy(), counts.numpy()))


def _within(counts: Tensor) -> Tensor:
    """0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, and so on."""
    begin = _repeat(counts.cumsum(0) - counts, counts)
    return torch.arange(len(begin)) - begin


class Rows:
    """A tensor that grows row by row: the states of one depth, or the rewards at the end."""

    def __init__(self) -> None:
        self._all, self.rows = torch.empty(0), 0

    def append(self, x: Tensor) -> None:
        rows = self.rows + len(x)
        if self.rows == 0:
            self._all = x.clone()
        elif rows > len(self._all):
            room = x.new_empty((max(rows, 2 * len(self._all)), *x.shape[1:]))
            room[: self.rows] = self._all[: self.rows]
            self._all = room
        self._all[self.rows : rows] = x
        self.rows = rows

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self._all[: self.rows].index_select(0, rows.to(self._all.device))

    def all(self) -> Tensor:
        return self._all[: self.rows]


class Forest:
    """``trees`` trees of ``levels`` transitions from root to leaf, on the CPU.

    Every node is a number; the roots are the first ones. A node's element of each vector says: ``value`` (float64),
    ``visits``, ``taken`` (children, with those that a round under way has yet to make; ``FULL`` more at the depths
    ``single``, whose nodes are to have one child), ``parent`` (-1 of a root),
    ``depth`` (0 of a root), ``start`` and ``count`` (its children are ``pool[start : start + count]``, in the order in
    which they were made), ``row`` (its place among the states of its depth).
    """

    def __init__(
        self,
        trees: int,
        levels: int,
        lam: float,
        c_uct: float,
        widening: tuple[float, float],
        max_children: int | None,
        width: int,
        single: Sequence[int] = (),
    ) -> None:
        self.trees, self.levels, self.lam, self.c_uct, self.width = trees, levels, lam, c_uct, width
        self._widening, self._most = widening, max_children
        self._allowed = torch.zeros(0, dtype=torch.int64)
        self._full = torch.zeros(levels + 1, dtype=torch.int64)
        self._full[list(single)] = FULL
        self.nodes, self.slots = trees, 0
        self.at_depth = torch.zeros(levels + 1, dtype=torch.int64)  # how many nodes; of roots, which have no state, 0
        self._all = {name: torch.zeros(64, dtype=torch.int64) for name in _OWN}
        self._all["value"] = torch.full((64,), float("nan"), dtype=torch.float64)
        self._pool = torch.zeros(64, dtype=torch.int64)
        self._reserve(trees, 0)
        self._all["parent"][:trees] = -1

    def __getattr__(self, name: str) -> Tensor:
        if name in _OWN:
            return self._all[name][: self.nodes]
        raise AttributeError(name)

    @property
    def pool(self) -> Tensor:
        """The lists of children."""
        return self._pool[: self.slots]

    def _reserve(self, nodes: int, slots: int) -> None:
        """Room for so many, at least twice of what there was where it is more."""
        for name, have in self._all.items():
            if nodes > len(have):
                self._all[name] = torch.cat([have, have.new_zeros(max(nodes, 2 * len(have)) - len(have))])
        if slots > len(self._pool):
            more = max(slots, 2 * len(self._pool)) - len(self._pool)
            self._pool = torch.cat([self._pool, self._pool.new_zeros(more)])

    def allowed(self, visits: int) -> Tensor:
        """How many children a node of 0...visits (or more) visits may have: ``ceil(C N^alpha)``, at least 1."""
        if len(self._allowed) <= visits:
            c, alpha = self._widening
            # A power that rounding lifted above a whole number allows no child more.
            many = c * torch.arange(max(64, 2 * visits), dtype=torch.float64).pow(alpha) * (1 - 1e-12)
            self._allowed = many.ceil().clamp(1, min(self._most or 2**53, 2**53)).long()
        return self._allowed

    def select(self, descents: int, uniform: Tensor | None, lam: float) -> Tensor:
        """The ends of ``descents`` descents of each tree, ``[trees, descents]``, whose visits are counted and whose
        children are taken from now on, by Boltzmann choices with this ``lam`` or else UCT; see
        :func:`.tree_reference.select`."""
        op = torch.ops.fastcifar.tree_select if _library.owned("tree_select", "cpu") else tree_reference.select
        roots = torch.arange(self.trees)
        allowed = self.allowed(int(self.visits[: self.trees].max()) + descents)
        vectors = (self.value, self.visits, self.taken, self.start, self.count, self.pool, allowed, roots)
        return op(*vectors, uniform, descents, self.levels, self.width, lam, self.c_uct)

    def release(self, leaves: Tensor) -> None:
        """Takes back what :meth:`select` counted."""
        node = leaves.flatten()
        growing = node[self.depth[node] < self.levels]
        self.taken.index_add_(0, growing, torch.full_like(growing, -self.width))
        while len(node):
            self.visits.index_add_(0, node, torch.full_like(node, -1))
            node = self.parent[node]
            node = node[node >= 0]

    def sample(self, roots: Tensor, uniform: Tensor) -> Tensor:
        """The ends of Boltzmann descents that change nothing; see :func:`.tree_reference.sample`."""
        op = torch.ops.fastcifar.tree_sample if _library.owned("tree_sample", "cpu") else tree_reference.sample
        return op(self.value, self.start, self.count, self.pool, roots, uniform, self.lam)

    def backup(self, nodes: Tensor) -> None:
        """Soft values of nodes ``[trees, n]`` and of all above them; see :func:`.tree_reference.backup`."""
        op = torch.ops.fastcifar.tree_backup if _library.owned("tree_backup", "cpu") else tree_reference.backup
        op(self.value, self.parent, self.depth, self.start, self.count, self.pool, nodes, self.lam)

    def append(self, leaves: Tensor, rewards: Tensor) -> None:
        """A branch from each of ``leaves`` down to the last level, with a value that is the reward at its end (of one
        child the soft value is the child's). Nodes of a branch are numbered in turn, and the rows of a depth are in the
        order of the branches."""
        lengths = self.levels - self.depth[leaves]
        branch, down = _repeat(torch.arange(len(leaves)), lengths), _within(lengths)
        first = self.nodes + lengths.cumsum(0) - lengths
        ids = torch.arange(self.nodes, self.nodes + len(branch))
        depth = self.depth[leaves][branch] + 1 + down
        inner = (depth < self.levels).long()
        order = depth.argsort(stable=True)
        here = depth.bincount(minlength=self.levels + 1)
        row = torch.empty_like(ids)
        row[order] = _within(here) + _repeat(self.at_depth, here)
        new = {
            "value": rewards[branch],
            "visits": torch.ones_like(ids),
            "taken": inner + self._full[depth],
            "parent": torch.where(down == 0, leaves[branch], ids - 1),
            "depth": depth,
            "start": self.slots + inner.cumsum(0) - inner,
            "count": inner,
            "row": row,
        }
        slots = self.slots + int(inner.sum())
        self._reserve(self.nodes + len(ids), slots)
        for name, values in new.items():
            self._all[name][self.nodes : self.nodes + len(ids)] = values
        self._pool[self.slots : slots] = ids[inner.bool()] + 1
        self.nodes, self.slots = self.nodes + len(ids), slots
        self.at_depth += here
        self._attach(leaves, first)

    def _attach(self, parents: Tensor, children: Tensor) -> None:
        """Adds a child to each of ``parents``. A list has room up to the next power of two; one that is full moves."""
        parents, order = parents.sort(stable=True)
        nodes, added = parents.unique_consecutive(return_counts=True)
        had = self.count[nodes]
        full = had + added > _power_above(had)
        room = _power_above((had + added)[full])
        begin = self.slots + room.cumsum(0) - room
        self._reserve(0, self.slots + int(room.sum()))
        offset = _within(had[full])
        source = _repeat(self.start[nodes[full]], had[full]) + offset
        self._pool[_repeat(begin, had[full]) + offset] = self._pool[source]
        self.start[nodes[full]] = begin
        self.slots += int(room.sum())
        self._pool[_repeat(self.start[nodes] + had, added) + _within(added)] = children[order]
        self.count[nodes] += added
