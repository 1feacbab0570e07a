"""Tree search: descents and backups of a grown forest, node by node in Python, by levels in PyTorch, by the kernels.

No images: a tree's kernels see values and lists of children only. What a model call costs beside them is in
docs/diffusion_tree.md.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from paired import Paired
from torch import Tensor

from fastcifar import _library
from fastcifar.diffusion import TreeSampler, tree_reference
from fastcifar.diffusion.tree_arrays import Forest

pytestmark = pytest.mark.skipif(not _library.owned("tree_select", "cpu"), reason="the extension is not built")
TREES, STEPS, LAM = 64, 20, 2.0
# At most this many times the time of the form by levels in PyTorch.
TARGETS = {"descents": 1 / 10, "draws": 1 / 4, "backup": 1 / 5}
Work = Callable[[], Tensor]


def forest(descents: int = 200) -> Forest:
    """64 trees of 21 levels after so many descents each, of a random walk toward a quadratic reward."""
    sampler = TreeSampler(
        lambda x, t, g: x + torch.randn(x.shape, generator=g),
        lambda x: -0.02 * (x[:, 0] - 6).square(),
        (1,),
        STEPS,
        lam=LAM,
        trees=TREES,
        generator=torch.Generator().manual_seed(0),
    )
    return sampler.run(descents)._forest


def child_table(f: Forest, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """The children of each node side by side, and which places are none."""
    count = f.count[nodes].unsqueeze(1)
    place = torch.arange(int(count.max()))
    none = place >= count
    return f.pool[(f.start[nodes].unsqueeze(1) + place).masked_fill(none, 0)], none


def choose(f: Forest, nodes: Tensor, uniform: Tensor) -> Tensor:
    children, none = child_table(f, nodes)
    shares = (LAM * f.value[children]).masked_fill(none, float("-inf")).softmax(1).cumsum(1)
    chosen = (shares <= uniform.unsqueeze(1) * shares[:, -1:]).sum(1)
    return children.gather(1, torch.minimum(chosen, f.count[nodes] - 1).unsqueeze(1)).squeeze(1)


def select_by_levels(f: Forest, visits: Tensor, taken: Tensor, allowed: Tensor, uniform: Tensor) -> Tensor:
    """One descent of each tree at a time, all trees together."""
    trees, descents, levels = uniform.shape
    leaves = torch.empty(trees, descents, dtype=torch.int64)
    for descent in range(descents):
        node, going = torch.arange(trees), torch.arange(trees)
        for level in range(levels + 1):
            visits[node] += 1
            if level == levels:
                leaves[going, descent] = node
                break
            ends = (taken[node] < allowed[visits[node].clamp(max=len(allowed) - 1)]) | (f.count[node] == 0)
            if bool(ends.any()):
                leaves[going[ends], descent] = node[ends]
                taken[node[ends]] += 1
                node, going = node[~ends], going[~ends]
                if not len(node):
                    break
            node = choose(f, node, uniform[going, descent, level])
    return leaves


def sample_by_levels(f: Forest, roots: Tensor, uniform: Tensor) -> Tensor:
    node = roots
    for level in range(uniform.shape[1]):
        node = choose(f, node, uniform[:, level])
    return node


def backup_by_levels(f: Forest, value: Tensor, nodes: Tensor) -> Tensor:
    """All trees together, from the deepest level up."""
    waiting, depth = nodes.flatten(), f.depth[nodes.flatten()]
    for at in range(int(depth.max()), -1, -1):
        level = waiting[depth == at].unique()
        count = f.count[level]
        inner, count = level[count > 0], count[count > 0]
        if len(inner):
            group = torch.arange(len(inner)).repeat_interleave(count)
            offset = torch.arange(len(group)) - (count.cumsum(0) - count)[group]
            values = value[f.pool[f.start[inner][group] + offset]]
            top = torch.full((len(inner),), float("-inf")).double().scatter_reduce_(0, group, values, "amax")
            total = torch.zeros_like(top).index_add_(0, group, (LAM * (values - top[group])).exp())
            value[inner] = top + (total / count).log() / LAM
        above = f.parent[level]
        above = above[above >= 0]
        waiting, depth = torch.cat([waiting[depth < at], above]), torch.cat([depth[depth < at], f.depth[above]])
    return value


def compare(paired: Paired, op: str, workload: str, calls: dict[str, Work], repeats: int) -> None:
    paired.describe("diffusion", op=f"tree search: {op}", workload=workload, mode="call")
    roles = {"node by node in Python": "reference", "by levels in PyTorch": "peer", "fastcifar": "ours"}
    expected = calls["node by node in Python"]()
    for name, call in calls.items():
        got = call()
        close = torch.equal(got, expected)
        if got.is_floating_point():
            close = torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
        if not close:
            pytest.fail(f"{name}: the result differs from the reference's")
        target = TARGETS[op] if name == "fastcifar" else None
        paired.record(name, role=roles[name], target=target)
    paired.time(calls, repeats=repeats)


def test_descents(paired: Paired) -> None:
    """Through nodes that may have no child more, so that each goes to the end and every call does the same."""
    f, ones = forest(), torch.ones(2, dtype=torch.int64)
    uniform = torch.rand(TREES, 4, STEPS + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def kernel(select: Callable[..., Tensor]) -> Work:
        visits, taken = f.visits.clone(), f.taken.clone()
        vectors = (f.value, visits, taken, f.start, f.count, f.pool, ones, torch.arange(TREES))
        return lambda: select(*vectors, uniform, 4, f.levels, 1, LAM, 1.0)

    visits, taken = f.visits.clone(), f.taken.clone()
    calls = {
        "node by node in Python": kernel(tree_reference.select),
        "by levels in PyTorch": lambda: select_by_levels(f, visits, taken, ones, uniform),
        "fastcifar": kernel(torch.ops.fastcifar.tree_select.default),
    }
    compare(paired, "descents", f"{TREES} trees x 4, {f.nodes} nodes", calls, 1)


def test_draws(paired: Paired) -> None:
    f, draws = forest(), 1024
    roots = torch.arange(draws) % TREES
    uniform = torch.rand(draws, STEPS + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    vectors = (f.value, f.start, f.count, f.pool, roots, uniform, LAM)
    calls = {
        "node by node in Python": lambda: tree_reference.sample(*vectors),
        "by levels in PyTorch": lambda: sample_by_levels(f, roots, uniform),
        "fastcifar": lambda: torch.ops.fastcifar.tree_sample.default(*vectors),
    }
    compare(paired, "draws", f"{draws} of {TREES} trees, {f.nodes} nodes", calls, 1)


def test_backup(paired: Paired) -> None:
    """From four of the deepest inner nodes of each tree."""
    f = forest()
    ends = f.sample(
        torch.arange(4 * TREES) // 4,
        torch.rand(4 * TREES, STEPS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    )
    nodes = ends.view(TREES, 4)

    def into(backup: Callable[..., None]) -> Work:
        value = f.value.clone()

        def work() -> Tensor:
            backup(value, f.parent, f.depth, f.start, f.count, f.pool, nodes, LAM)
            return value

        return work

    value = f.value.clone()
    calls = {
        "node by node in Python": into(tree_reference.backup),
        "by levels in PyTorch": lambda: backup_by_levels(f, value, nodes),
        "fastcifar": into(torch.ops.fastcifar.tree_backup.default),
    }
    compare(paired, "backup", f"{TREES} trees x 4 paths of {STEPS} nodes, {f.nodes} nodes", calls, 1)
