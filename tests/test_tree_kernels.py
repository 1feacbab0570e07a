"""Kernels of tree search against the reference node by node, and what the sampler and its parts refuse."""

import builtins
import math

import pytest
import torch

from fastcifar import _library
from fastcifar.diffusion import DiscreteVP, SolverTable, TableStep, TreeSampler, ddpm, dpm_solver, tree_reference
from fastcifar.diffusion.reference import TERMS
from fastcifar.diffusion.tree_arrays import Forest

needs_kernel = pytest.mark.skipif(_library.WHY_NO_EXTENSION is not None, reason="the extension is not built")
INF, NAN = math.inf, math.nan
LAMBDAS = (0.0, 0.7, 40.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def grown(trees=3, levels=4, branches=60, lam=0.7, c_uct=0.5, seed=0, scale=1.0, wide=0):
    """A forest with branches from nodes at random, values that are not yet soft, and visits that fit."""
    forest = Forest(trees, levels, lam, c_uct, (1.0, 0.6), None, 1)
    draw = seeded(seed)
    for _ in range(branches):
        inner = (forest.depth < levels).nonzero().squeeze(1)
        leaves = inner[torch.randint(len(inner), (trees,), generator=draw)]
        leaves = torch.cat([torch.arange(trees), leaves]) if forest.nodes == trees else leaves
        forest.append(leaves, scale * torch.randn(len(leaves), generator=draw).double())
    if wide:  # more children than are gathered at once
        leaves = torch.zeros(wide, dtype=torch.int64)
        forest.append(leaves, scale * torch.randn(wide, generator=draw).double())
    forest.taken.copy_(forest.count)
    forest.visits[:] = torch.randint(1, 9, (forest.nodes,), generator=draw) * (1 + forest.count)
    return forest


def lists(forest):
    return forest.start, forest.count, forest.pool


def both_backups(forest, nodes):
    """Values after the kernel's backup and after the reference's."""
    results = []
    for op in (torch.ops.fastcifar.tree_backup, tree_reference.backup):
        value = forest.value.clone()
        op(value, forest.parent, forest.depth, *lists(forest), nodes, forest.lam)
        results.append(value)
    return results


def both_selections(forest, uniform, descents, width=1):
    """Ends, visits and children taken of the kernel and of the reference."""
    results = []
    allowed = forest.allowed(int(forest.visits.max()) + descents)
    for op in (torch.ops.fastcifar.tree_select, tree_reference.select):
        visits, taken = forest.visits.clone(), forest.taken.clone()
        roots = torch.arange(forest.trees)
        leaves = op(
            *(forest.value, visits, taken, *lists(forest), allowed, roots, uniform, descents, forest.levels, width),
            *(forest.lam, forest.c_uct),
        )
        results.append((leaves, visits, taken))
    return results


def with_special_values(forest):
    forest.value[5::7], forest.value[3::11], forest.value[4::13] = -INF, INF, NAN
    return forest


@needs_kernel
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("wide", [0, 255, 256, 257, 700])
def test_backup_equals_the_reference(lam, special, wide, each_isa):
    forest = grown(lam=lam, wide=wide)
    if special:
        with_special_values(forest)
    by_tree = [torch.arange(forest.trees)]  # roots, and for each tree some nodes of any depth
    top = torch.arange(forest.nodes)
    for _ in range(forest.levels):
        top = torch.where(forest.parent[top] >= 0, forest.parent[top], top)
    for k in range(12):
        own = [(top == t).nonzero().squeeze(1) for t in range(forest.trees)]
        by_tree.append(torch.stack([nodes[(7 * k + t) % len(nodes)] for t, nodes in enumerate(own)]))
    nodes = torch.stack(by_tree, 1)

    def check(_):
        ours, expected = both_backups(forest, nodes)
        torch.testing.assert_close(ours, expected, rtol=1e-14, atol=1e-14, equal_nan=True)
        assert not torch.equal(ours.nan_to_num(), forest.value.nan_to_num())

    each_isa(check)


@needs_kernel
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("wide", [0, 256, 700])
def test_descents_equal_the_reference(lam, special, wide, each_isa):
    forest = grown(lam=lam, wide=wide)
    if special:
        with_special_values(forest)
    draw = seeded(2)
    uniform = torch.rand(3, 20, forest.levels, dtype=torch.float64, generator=draw)
    uniform[0, 0], uniform[0, 1] = 0.0, 1 - 2.0**-53
    roots = torch.arange(400) % forest.trees
    draws = torch.rand(400, forest.levels, dtype=torch.float64, generator=draw)
    expected = tree_reference.sample(forest.value, *lists(forest), roots, draws, lam)
    cases = [
        (u, width, both_selections(forest, u, 20, width)[1]) for u, width in ((uniform, 1), (uniform, 3), (None, 1))
    ]

    def check(_):
        assert torch.equal(torch.ops.fastcifar.tree_sample(forest.value, *lists(forest), roots, draws, lam), expected)
        for u, width, reference in cases:
            ours, _ = both_selections(forest, u, 20, width)
            assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))

    each_isa(check)
    assert len(expected.unique()) > 3 or lam == LAMBDAS[-1]  # whose best leaf is all of a tree
    assert len(cases[0][-1][0].unique()) > 3


@needs_kernel
def test_same_bits_for_any_number_of_threads_and_instruction_set(threads, each_isa):
    forest, seen = grown(trees=64, levels=8, branches=60), []
    uniform = torch.rand(64, 8, 8, dtype=torch.float64, generator=seeded(1))
    nodes = torch.stack([(torch.arange(forest.nodes) % 64 == t).nonzero()[0] for t in range(64)])
    roots, draws = torch.arange(4096) % 64, torch.rand(4096, 8, dtype=torch.float64, generator=seeded(2))

    def check(_):
        for count in (1, 2, 3):
            threads(count)
            value = forest.value.clone()
            arrays = (forest.parent, forest.depth, *lists(forest))
            torch.ops.fastcifar.tree_backup(value, *arrays, nodes, 0.7)
            drawn = torch.ops.fastcifar.tree_sample(value, *lists(forest), roots, draws, 0.7)
            seen.append([value, drawn, *both_selections(forest, uniform, 8)[0]])

    each_isa(check)
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            assert torch.equal(a.view(torch.int64), b.view(torch.int64))


@needs_kernel
def test_opcheck():
    forest = grown(trees=2, branches=5)
    ops, roots = torch.ops.fastcifar, torch.arange(2)
    uniform = torch.rand(2, 3, 4, dtype=torch.float64)
    given = (forest.value, forest.visits, forest.taken, *lists(forest), forest.allowed(99), roots)
    given = tuple(t.clone() for t in given)
    for u in (uniform, None):
        torch.library.opcheck(ops.tree_select.default, (*given, u, 3, 4, 1, 0.7, 1.0))
    torch.library.opcheck(
        ops.tree_sample.default, (forest.value.clone(), *given[3:6], roots, uniform[:, 0].clone(), 0.7)
    )
    nodes = torch.tensor([[0], [1]])
    arrays = (forest.value.clone(), forest.parent.clone(), forest.depth.clone(), *given[3:6])
    torch.library.opcheck(ops.tree_backup.default, (*arrays, nodes, 0.7))


@needs_kernel
@pytest.mark.parametrize("what", ["child", "list", "root", "pool", "dtype", "size", "uniform", "lam", "node", "cycle"])
def test_arrays_that_are_no_tree_are_refused_before_memory_is_touched(what):
    forest = grown(trees=2, branches=5)
    value, start, count, pool = (t.clone() for t in (forest.value, *lists(forest)))
    parent, depth, nodes = forest.parent.clone(), forest.depth.clone(), torch.tensor([[0], [1]])
    roots, uniform, lam = torch.tensor([0, 1]), torch.rand(2, 4, dtype=torch.float64), 0.7
    if what == "child":
        pool[int(start[0])] = 10**9
    elif what == "list":
        count[0] = 10**9
    elif what == "root":
        roots[1], nodes[1] = forest.nodes, -5
    elif what == "pool":
        pool = pool[:1]
    elif what == "dtype":
        value = value.float()
    elif what == "size":
        start = start[:-1]
    elif what == "uniform":
        uniform, parent = uniform.float(), parent[1:]
    elif what == "lam":
        lam = NAN
    elif what == "node":
        roots[0], nodes[0] = -1, forest.nodes
    else:
        parent[0], roots = 0, roots[:1]
    with pytest.raises(RuntimeError, match="tree_sample: expected"):
        torch.ops.fastcifar.tree_sample(value, start, count, pool, roots, uniform, lam)
    with pytest.raises(RuntimeError, match="tree_backup: expected"):
        torch.ops.fastcifar.tree_backup(value, parent, depth, start, count, pool, nodes, lam)


def test_a_forest_without_kernels_runs_the_reference(monkeypatch):
    def values():
        tree = TreeSampler(lambda x, t, g: x + torch.randn(x.shape, generator=g), lambda x: x.sum(1), (2,), 3,
                           descents=4, trees=2, generator=seeded())  # fmt: skip
        tree.run(12)
        return tree._forest.value.clone(), tree.sample(30).x

    ours = values()
    for name in ("tree_select", "tree_sample", "tree_backup"):
        monkeypatch.delitem(_library.OWNERS, (name, "cpu"), raising=False)
    for a, b in zip(ours, values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


# ---- what is refused -------------------------------------------------------------------------------------------------


def sampler(**given):
    arguments = {"step": lambda x, t, g: x.clone(), "reward": lambda x: x[:, 0], "shape": (1,), "steps": 2} | given
    return TreeSampler(**arguments)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"step": None}, TypeError, "expected step to be callable, got NoneType"),
        ({"reward": 3}, TypeError, "expected reward to be callable, got int"),
        ({"prior": 3}, TypeError, "expected prior to be callable, got int"),
        ({"steps": None}, TypeError, "expected steps to be an integer, got NoneType"),
        ({"steps": 0}, ValueError, "expected steps to be finite and at least 1, got 0"),
        ({"lam": -1.0}, ValueError, "expected lam to be finite and at least 0, got -1.0"),
        ({"lam": INF}, ValueError, "expected lam to be finite"),
        ({"lam": NAN}, ValueError, "expected lam to be finite"),
        ({"lam": "1"}, TypeError, "expected lam to be a number, got str"),
        ({"selection": "greedy"}, ValueError, "one of boltzmann, uct, uniform; got 'greedy'"),
        ({"c_uct": -1}, ValueError, "expected c_uct to be finite and at least 0"),
        ({"widening": (0, 0.5)}, ValueError, "C > 0 and alpha <= 1, got \\(0, 0.5\\)"),
        ({"widening": (1, 1.5)}, ValueError, "C > 0 and alpha <= 1"),
        ({"widening": (1, -1)}, ValueError, "expected alpha of widening to be finite and at least 0"),
        ({"widening": 1}, TypeError, r"expected widening to be a pair \(C, alpha\), got 1"),
        ({"shape": 3}, TypeError, "expected shape to be the sizes of one state, got 3"),
        ({"shape": (3, -1)}, TypeError, r"expected shape to be the sizes of one state, got \(3, -1\)"),
        ({"noiseless": (3,)}, ValueError, r"expected noiseless to be levels of 1 to 2, got \[3\]"),
        ({"max_children": 0}, ValueError, "expected max_children to be finite and at least 1"),
        ({"width": 1.5}, TypeError, "expected width to be an integer, got float"),
        ({"trees": 0}, ValueError, "expected trees"),
        ({"descents": True}, TypeError, "expected descents to be an integer, got bool"),
    ],
)
def test_arguments_are_refused_in_a_sentence(given, error, says):
    with pytest.raises(error, match=f"^TreeSampler: expected.*{says.removeprefix('expected')}"):
        sampler(**given)


def in_place(x, t, generator):
    return x.add_(1)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"step": lambda x, t, g: x[:, 0]}, ValueError, r"step to return \[1, 1\] in torch.float32, got \[1\]"),
        ({"step": lambda x, t, g: x.double()}, ValueError, "step to return .* torch.float32, got .*torch.float64"),
        ({"step": lambda x, t, g: 3}, TypeError, "step to return a tensor, got int"),
        ({"step": in_place}, ValueError, "step to leave x as it is, got one that changes it in place"),
        ({"prior": lambda n, g: torch.zeros(n, 2)}, ValueError, r"prior to return \[1, 1\], got \[1, 2\]"),
        ({"reward": lambda x: x}, ValueError, r"reward to return \[1\], got \[1, 1\]"),
        ({"reward": lambda x: x[:, 0].long()}, TypeError, "reward to return a floating tensor, got torch.int64"),
        ({"reward": lambda x: 1.0}, TypeError, "reward to return a floating tensor, got float"),
        ({"reward": lambda x: x[:, 0] * NAN}, ValueError, "finite or -inf, got 1 of 1 that are not, the first nan"),
        ({"reward": lambda x: x[:, 0].abs() * INF}, ValueError, "finite or -inf, got 1 of 1 .* first inf"),
    ],
)
def test_what_step_prior_and_reward_return_is_checked(given, error, says):
    with pytest.raises(error, match=f"^TreeSampler: expected.*{says}"):
        sampler(**given).run(1)


def test_calls_out_of_order_are_refused():
    tree = sampler()
    for call in (lambda: tree.sample(1), tree.best):
        with pytest.raises(ValueError, match="expected a tree with samples, got one before its first run"):
            call()
    with pytest.raises(ValueError, match=r"TreeSampler.run: expected n to be finite and at least 0, got -1"):
        tree.run(-1)
    assert math.isnan(float(tree.root_value))
    with pytest.raises(ValueError, match="expected tree to be below 1, got 1"):
        tree.run(1).sample(1, tree=1)
    assert tree.sample(0).x.shape == sampler(trees=2).run(1).sample(0).x.shape == (0, 1)
    assert tree.samples().x.shape == (1, 1)


def test_progress(monkeypatch, capsys):
    assert sampler().run(3, progress=True).nodes > 1
    assert "3/3" in capsys.readouterr().err
    real = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", without_tqdm)
    with pytest.raises(ImportError, match="expected tqdm for progress=True"):
        sampler().run(3, progress=True)


# ---- a model and a table in place of a step --------------------------------------------------------------------------


def table(noise=(0.5, 0.0), limit=None, history=False):
    """x' = 0.9 x - 0.1 converted + noise z, converted = x - 0.5 output, in two steps."""
    program = torch.zeros(2, 3, len(TERMS), dtype=torch.float64)
    program[:, 0, 0], program[:, 0, 1] = 1.0, -0.5
    program[:, 2, 0], program[:, 2, 8], program[:, 2, 10] = 0.9, -0.1, torch.tensor(noise).double()
    store = torch.zeros(2, 2, dtype=torch.int64)
    if history:
        store[0, 0], program[1, 2, 2] = 1, 0.2
    return SolverTable(
        program, store, torch.tensor([700.0, 30.0]).double(), torch.tensor([1.0, 2.0]).double(), limit, 3.0
    )


def test_a_table_is_a_step():
    calls = []

    def model(x, timestep):
        calls.append((x.clone(), timestep))
        return x.square()

    tree = TreeSampler(
        model, lambda x: x.flatten(1).sum(1), (2, 3), table=table(limit=0.8), trees=4, generator=seeded(3)
    )
    tree.run(1)
    assert (tree.steps, tree.evaluations) == (2, 8)
    assert [t.tolist() for _, t in calls] == [[700.0] * 4, [30.0] * 4]
    again = seeded(3)
    torch.randint(2**62, (), generator=again)  # the seed of the descents
    x = 3.0 * torch.randn(4, 2, 3, generator=again)
    assert torch.equal(calls[0][0], x)
    x1 = 0.9 * x - 0.1 * (x - 0.5 * x.square()).clamp(-0.8, 0.8) + 0.5 * torch.randn(4, 2, 3, generator=again)
    torch.testing.assert_close(calls[1][0], 2 * x1)  # scaled as the table asks
    x0 = 0.9 * x1 - 0.1 * (x1 - 0.5 * (2 * x1).square()).clamp(-0.8, 0.8)
    torch.testing.assert_close(tree.samples().x, x0)
    torch.testing.assert_close(tree.samples().reward, x0.flatten(1).sum(1).double())


def test_a_transition_without_noise_has_one_child():
    model = {
        "step": lambda x, t: x,
        "reward": lambda x: x[:, 0],
        "widening": (1.0, 1.0),
        "selection": "uct",
        "c_uct": 9.0,
    }
    tree = sampler(**model, steps=None, table=table(), descents=3, max_children=4).run(60)
    forest = tree._forest
    assert forest.count[forest.depth == 1].tolist() == [4] * 4
    assert forest.count[forest.depth == 2].tolist() == [1] * 16
    assert len(tree.samples().x.unique()) == 16
    still = sampler(noiseless=(2, 1), descents=2).run(30)
    assert still._forest.count[still._forest.depth > 0].max() == 1
    assert still.evaluations == 2 * int(still._forest.count[0]) < 30


def test_a_table_with_guidance():
    def both(x, timestep):
        return x.square(), x

    def reward(x):
        return x.flatten(1).sum(1)

    guided = TableStep(both, table(), guidance=3.0)
    tree = TreeSampler(guided, reward, (2,), trees=4, generator=seeded(3)).run(1)
    assert tree.steps == 2
    plain = TreeSampler(
        lambda x, t: x + 3 * (x.square() - x), reward, (2,), table=table(), trees=4, generator=seeded(3)
    )
    torch.testing.assert_close(tree.samples().x, plain.run(1).samples().x)


def test_ddpm_tilted_by_a_linear_reward():
    """Of a Gaussian, whose noise is known: as the weights of independent samples have it."""
    points = DiscreteVP.linear().points(10)
    levels = {float(t): (float(a), float(s)) for t, a, s in zip(*(p[:-1] for p in points), strict=True)}

    def noise(x, t):
        alpha, sigma = levels[float(t[0])]
        return sigma * (x - 0.3 * alpha) / (0.25 * alpha**2 + sigma**2)

    def mean(lam, selection, trees, n):
        how = {"lam": lam, "selection": selection, "trees": trees, "dtype": torch.float64, "generator": seeded()}
        tree = TreeSampler(noise, lambda x: x[:, 0], (1,), table=ddpm(points), **how).run(n)
        return tree, float(tree.sample(20_000).x.mean())

    independent, of_p = mean(0.0, "uniform", 20_000, 1)
    x = independent.samples().x[:, 0]
    expected = float(((2 * x).softmax(0) * x).sum())
    tree, found = mean(2.0, "uniform", 128, 30)
    assert expected - of_p > 0.2
    assert found == pytest.approx(expected, abs=0.03)
    assert of_p + 0.1 < mean(2.0, "boltzmann", 128, 30)[1] < expected  # a search leans toward p
    depths = tree._forest.depth
    assert tree._forest.count[depths == 10].max() == 1  # the last step has no noise
    assert tree._forest.count[depths == 2].max() > 1


def test_a_table_that_does_not_fit_is_refused():
    for other in (table(history=True), dpm_solver(DiscreteVP.linear().points(4))):
        with pytest.raises(ValueError, match="TableStep: expected a table without history"):
            TableStep(lambda x, t: x, other)
    with pytest.raises(TypeError, match="TableStep: expected table to be a SolverTable, got int"):
        sampler(table=3)
    with pytest.raises(ValueError, match="TreeSampler: expected steps to be the table's 2, got 3"):
        sampler(table=table(), steps=3)


def test_a_draw_of_the_whole_takes_the_last_child_with_a_share(each_isa):
    """Found by the mutation drill: only a number that was rounded up to 1 gets there."""
    values = torch.tensor([0.0, 0.0, 0.0, -torch.inf], dtype=torch.float64)
    start, count = torch.tensor([0, 3, 3, 3]), torch.tensor([3, 0, 0, 0])
    arguments = (values, start, count, torch.tensor([1, 2, 3]), torch.tensor([0]), torch.ones(1, 1).double(), 1.0)
    assert tree_reference.sample(*arguments).tolist() == [2]

    def check(_):
        assert torch.ops.fastcifar.tree_sample(*arguments).tolist() == [2]

    each_isa(check)
