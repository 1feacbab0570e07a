"""The tree sampler: what it draws, finds and refuses, and that it is the search that the paper describes."""

import itertools
import math

import pytest
import torch

from fastcifar.diffusion import TreeSampler, tree_reference
from fastcifar.diffusion.tree_arrays import Forest

INF, NAN = math.inf, math.nan
# Three states at each level, whose number counts the path: a leaf is one of 27.
FIRST = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
NEXT = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]], dtype=torch.float64)
REWARDS = torch.randn(27, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
LEAVES = torch.tensor([FIRST[a] * NEXT[a, b] * NEXT[b, c] for a, b, c in itertools.product(range(3), repeat=3)])


def prior(n, generator):
    return torch.multinomial(FIRST, n, replacement=True, generator=generator).double().unsqueeze(1)


def step(x, t, generator):
    return 3 * x + torch.multinomial(NEXT[x[:, 0].long() % 3], 1, generator=generator)


def reward(x):
    return REWARDS[x[:, 0].long()]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(**given):
    arguments = {"lam": 1.5, "prior": prior, "generator": seeded()} | given
    return TreeSampler(*(arguments.pop(n, d) for n, d in (("step", step), ("reward", reward))), (1,), 2, **arguments)


def vectors(tree):
    """All that a tree holds."""
    f = tree._forest
    return [getattr(f, n).clone() for n in ("value", "visits", "taken", "parent", "depth", "start", "count", "row")]


def same(a, b):
    return all(torch.equal(x.nan_to_num(nan=7.0), y.nan_to_num(nan=7.0)) for x, y in zip(a, b, strict=True))


def distance(x, target):
    """Total variation between where samples fall and what they should be."""
    return 0.5 * float((x[:, 0].long().bincount(minlength=27) / len(x) - target).abs().sum())


def target(lam, rewards=REWARDS):
    weights = LEAVES * (lam * rewards).exp()
    return weights / weights.sum()


def summed(self, nodes):
    """The backup without the 1/n, as one reads it at times."""
    touched = nodes.flatten()
    for depth in reversed(range(self.levels)):
        at = touched[self.depth[touched] == depth].unique()
        at = at[self.count[at] > 0]
        for node in at.tolist():
            children = self.pool[self.start[node] : self.start[node] + self.count[node]]
            self.value[node] = torch.logsumexp(self.lam * self.value[children], 0) / self.lam
        touched = torch.cat([touched, self.parent[at].clamp(min=0)])


# ---- what it draws ---------------------------------------------------------------------------------------------------


def test_samples_approach_p_exp_lam_r_and_a_sum_in_place_of_the_mean_does_not(monkeypatch):
    """In trees that were grown by the search itself, whose branches so differ in how often they were expanded."""

    def error(n, **how):
        return distance(make(descents=1, **how).run(n).sample(20_000).x, target(1.5))

    of_p = 0.5 * float((LEAVES - target(1.5)).abs().sum())
    assert of_p > 0.3  # what no search would give
    # Where nodes keep four children, what a first glance said of a node is soon corrected, and 256 trees have p.
    four = {"trees": 256, "widening": (4.0, 0.0)}
    errors = [error(n, **four) for n in (10, 40, 200)]
    assert errors[-1] < 0.045
    assert errors == sorted(errors, reverse=True)
    many = {"trees": 24, "widening": (8.0, 0.2)}
    assert error(300, **many) < 0.14
    monkeypatch.setattr(Forest, "backup", summed)
    assert error(300, **many) > 0.19


def test_uniform_selection_is_unbiased_where_a_search_still_leans_toward_p():
    def error(selection):
        tree = make(selection=selection, trees=256, widening=(2.0, 0.5)).run(30)
        return distance(tree.sample(20_000).x, target(1.5))

    assert error("uniform") < 0.045
    assert error("boltzmann") > 0.07


@pytest.mark.parametrize("wrong", [False, True])
def test_uneven_branches_drawn_from_p_give_p_exp_lam_r(wrong):
    """Branches whose number has nothing to do with the rewards: then the estimate is unbiased, and its error is that of
    the many draws. Of a sum it is not: a state with more children counts for more."""
    forest, draw = Forest(1, 3, 1.5, 1.0, (1.0, 0.5), None, 1), seeded(5)
    state = torch.full((1, 1), -1.0, dtype=torch.float64)

    def branch(leaves):
        nonlocal state
        x, new = state[leaves], []
        for depth in range(int(forest.depth[leaves[0]]) + 1, 4):
            x = prior(len(x), draw) if depth == 1 else step(x, 4 - depth, draw)
            new.append(x)
        forest.append(leaves, reward(x))
        state = torch.cat([state, torch.stack(new, 1).flatten(0, 1)])  # a branch's nodes are numbered in turn

    branch(torch.zeros(4000, dtype=torch.int64))
    for depth in (1, 2):  # the first of the three states is expanded ten times as often
        at = (forest.depth == depth).nonzero().squeeze(1)
        branch(at.repeat_interleave(torch.where(state[at, 0] % 3 == 0, 10, 1)))
    inner = (forest.count > 0).nonzero().squeeze(1).unsqueeze(0)
    (summed if wrong else Forest.backup)(forest, inner)
    ends = forest.sample(torch.zeros(40_000, dtype=torch.int64), torch.rand(40_000, 3, generator=draw).double())
    error = distance(state[ends], target(1.5))
    assert error > 0.2 if wrong else error < 0.04


def test_lam_0_draws_from_p_whatever_the_reward():
    tree = make(lam=0.0, trees=24, descents=8, reward=lambda x: 1e3 * reward(x)).run(200)
    assert distance(tree.sample(20_000).x, LEAVES) < 0.08
    children = tree._forest.value[1:][tree._forest.parent[1:] == 3]
    assert float(tree.root_value[3]) == pytest.approx(float(children.mean()))


def test_values_are_the_exact_soft_values_where_all_children_are_there():
    """Of a step that goes through the three children of a state in turn, and no more are allowed."""
    seen: dict = {}

    def next_of(key):
        seen[key] = seen.get(key, -1) + 1
        return seen[key] % 3

    tree = make(
        prior=lambda n, g: torch.tensor([[float(next_of("root"))] for _ in range(n)], dtype=torch.float64),
        step=lambda x, t, g: 3 * x + torch.tensor([[float(next_of((t, int(v))))] for v in x[:, 0]]),
        widening=(3.0, 0.0),
        descents=3,  # no more than there may be children, or the first round would make more
    )
    tree.run(400)
    assert tree.nodes == 1 + 3 + 9 + 27
    assert tree.evaluations == 9 + 27
    assert sorted(tree.samples().x[:, 0].tolist()) == list(range(27))
    lam, v = 1.5, REWARDS
    for depth in (2, 1, 0):
        v = (lam * v).view(-1, 3).exp().mean(1).log() / lam
        at = tree._forest.depth == depth
        states = tree._states[depth].all()[:, 0].long()[tree._forest.row[at]] if depth else torch.tensor([0])
        torch.testing.assert_close(tree._forest.value[at], v[states], rtol=1e-14, atol=1e-14)
    shares = (lam * REWARDS).softmax(0)
    x = tree.sample(100_000).x[:, 0].long()
    expected = 100_000 * shares
    chi_square = float(((x.bincount(minlength=27) - expected).square() / expected).sum())
    assert chi_square < 54  # 26 degrees of freedom: once in a thousand


@pytest.mark.parametrize("selection", ["uct", "boltzmann"])
def test_finds_the_best_of_many_leaves(selection):
    """4096 leaves, one best, and a reward that says at each level how near one is."""
    best = torch.tensor([1, 3, 0, 2, 2, 1])

    def digits(x):
        return torch.stack([(x[:, 0].long() // 4**k) % 4 for k in reversed(range(6))], 1)

    def close(x):
        return (digits(x) == best).double().cumprod(1).sum(1)

    tree = TreeSampler(
        lambda x, t, g: 4 * x + torch.randint(4, x.shape, generator=g),
        close,
        (1,),
        5,
        lam=4.0,
        selection=selection,
        c_uct=0.5,
        prior=lambda n, g: torch.randint(4, (n, 1), generator=g).double(),
        generator=seeded(1),
    )
    assert float(tree.run(1).best().reward[0]) < 6
    tree.run(599)
    assert len(tree.samples().reward) <= 600
    found = tree.best()
    assert digits(found.x)[0].tolist() == best.tolist()
    assert float(found.reward[0]) == 6


# ---- it is the search that it says -----------------------------------------------------------------------------------


class Textbook:
    """The same search for one descent at a time, with nodes that are objects."""

    def __init__(self, lam, c, alpha, generator):
        self.lam, self.c, self.alpha = lam, c, alpha
        seed = int(torch.randint(2**62, (), generator=generator))
        self.generator, self.choices = generator, torch.Generator().manual_seed(seed)
        self.root = {"x": None, "t": 3, "v": NAN, "n": 0, "children": []}

    def descend(self):
        uniform = torch.rand(1, 1, 3, dtype=torch.float64, generator=self.choices)[0, 0].tolist()
        node, path = self.root, []
        while True:
            node["n"] += 1
            path.append(node)
            if node["t"] == 0:
                return
            if len(node["children"]) < self.c * node["n"] ** self.alpha:
                break
            shares = torch.tensor([self.lam * child["v"] for child in node["children"]]).double().softmax(0).cumsum(0)
            node = node["children"][int((shares <= uniform[3 - node["t"]]).sum())]
        while node["t"] > 0:
            x = prior(1, self.generator) if node["t"] == 3 else step(node["x"], node["t"], self.generator)
            child = {"x": x, "t": node["t"] - 1, "v": NAN, "n": 1, "children": []}
            node["children"].append(child)
            path.append(child)
            node = child
        node["v"] = float(reward(node["x"]))
        for above in reversed(path[:-1]):
            v = torch.tensor([child["v"] for child in above["children"]], dtype=torch.float64)
            above["v"] = float((self.lam * v).exp().mean().log() / self.lam)


def test_one_descent_at_a_time_is_the_textbook_search():
    ours = make(widening=(1.3, 0.6), generator=seeded(4))
    book = Textbook(1.5, 1.3, 0.6, seeded(4))
    ours.run(150)
    for _ in range(150):
        book.descend()
    forest, pairs = ours._forest, [(0, book.root)]
    for node, expected in pairs:
        assert int(forest.visits[node]) == expected["n"]
        assert float(forest.value[node]) == pytest.approx(expected["v"], rel=1e-12, abs=1e-12)
        children = forest.pool[forest.start[node] : forest.start[node] + forest.count[node]].tolist()
        pairs.extend(zip(children, expected["children"], strict=True))
        if expected["x"] is not None:
            depth = int(forest.depth[node])
            assert torch.equal(ours._states[depth][forest.row[node : node + 1]], expected["x"])
    assert len(pairs) == ours.nodes > 150


def test_a_round_counts_its_own_descents_and_calls_step_once_a_level():
    calls = []

    def counted(x, t, generator):
        calls.append((t, len(x)))
        return step(x, t, generator)

    tree = make(step=counted, descents=16, widening=(1.0, 0.5))
    tree.run(16)
    forest = tree._forest
    assert int(forest.visits[0]) == 16
    # Four children are allowed after sixteen visits; the descents for whom there is no child yet make one each.
    assert calls == [(2, 16), (1, 16)]
    assert tree.calls == 2
    assert tree.evaluations == 32
    calls.clear()
    tree.run(16)
    assert int(forest.visits[0]) == 32
    assert [t for t, _ in calls] == [1] or [t for t, _ in calls] == [2, 1]  # the root may have no child more
    assert all(n <= 16 for _, n in calls)
    assert torch.equal(forest.taken, forest.count)
    of_root = forest.pool[forest.start[0] : forest.start[0] + forest.count[0]]
    assert int(forest.visits[of_root].sum()) == 32  # every visit of the root went on to a child


def test_trees_are_each_what_they_would_be_alone():
    tree = make(trees=5, widening=(1.0, 0.7)).run(40)
    forest = tree._forest
    assert forest.visits[:5].tolist() == [40] * 5
    of = torch.arange(5).tolist() + [-1] * (tree.nodes - 5)
    for node in range(5, tree.nodes):
        of[node] = of[int(forest.parent[node])]
    for k in range(5):
        drawn = tree.sample(50, tree=k).reward
        own = [float(forest.value[n]) for n in range(5, tree.nodes) if of[n] == k and int(forest.depth[n]) == 3]
        assert set(drawn.tolist()) <= set(own)
        assert float(tree.best().reward[k]) == max(own)
    assert len(set(tree.root_value.tolist())) > 1


def test_width_and_the_most_children():
    tree = make(width=3, max_children=4, widening=(1.0, 1.0), descents=2).run(200)
    forest = tree._forest
    inner = forest.depth < 3
    assert int(forest.count[inner].max()) <= 6  # the last expansion, of three, may begin at three
    assert bool((forest.count[inner] >= 1).all())
    assert torch.equal(forest.taken, forest.count)
    assert int(make(max_children=2, widening=(9.0, 1.0)).run(100)._forest.count.max()) == 2


# ---- anytime, reuse, seeds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["uct", "boltzmann"])
def test_a_run_goes_on_from_where_the_tree_is(selection):
    whole = make(selection=selection, descents=4).run(60)
    parts, best = make(selection=selection, descents=4), []
    for _ in range(5):
        parts.run(12)
        parts.sample(7)  # drawing leaves the search as it is
        best.append(float(parts.best().reward[0]))
    assert same(vectors(whole), vectors(parts))
    assert torch.equal(whole.samples().x, parts.samples().x)
    assert best == sorted(best)
    assert best[-1] == float(whole.samples().reward.max())
    before = vectors(whole)
    assert same(before, vectors(whole.run(0)))


def test_seeds():
    one, again, other = (make(generator=seeded(s)).run(50) for s in (1, 1, 2))
    assert same(vectors(one), vectors(again))
    assert torch.equal(one.sample(20).x, again.sample(20).x)
    assert not same(vectors(one), vectors(other))
    torch.manual_seed(8)
    first = make(generator=None).run(20)
    torch.manual_seed(8)
    assert same(vectors(first), vectors(make(generator=None).run(20)))
    assert not same(vectors(first), vectors(make(generator=None).run(20)))


@pytest.mark.parametrize("fault", ["step", "reward", "nan", "interrupt"])
def test_a_round_that_fails_leaves_the_tree_as_it_was(fault):
    broken = False

    def careful_step(x, t, generator):
        if broken and t == 1 and fault in ("step", "interrupt"):
            raise RuntimeError("step") if fault == "step" else KeyboardInterrupt
        return step(x, t, generator)

    def careful_reward(x):
        if broken and fault == "reward":
            raise RuntimeError("reward")
        return torch.where(torch.tensor(broken), NAN, reward(x))

    tree = make(step=careful_step, reward=careful_reward, descents=5, trees=2, width=2).run(25)
    before, drawn = vectors(tree), tree.samples()
    broken = True
    with pytest.raises((RuntimeError, ValueError, KeyboardInterrupt)):
        tree.run(25)
    assert same(before, vectors(tree))
    assert torch.equal(tree.samples().x, drawn.x)
    broken = False
    tree.run(25)
    assert tree._forest.visits[:2].tolist() == [50, 50]


# ---- rewards at the border -------------------------------------------------------------------------------------------


def test_what_a_reward_of_minus_infinity_forbids_is_never_drawn():
    def allows(x):
        return torch.where(x[:, 0].long() % 2 == 0, reward(x), -INF)

    tree = make(reward=allows, trees=4, descents=3).run(150)
    assert bool((tree.samples().reward == -INF).any())
    drawn = tree.sample(5000)
    assert bool(drawn.reward.isfinite().all())
    assert bool(tree.root_value.isfinite().all())
    assert bool(tree.best().reward.isfinite().all())
    nothing = make(reward=lambda x: torch.full((len(x),), -INF)).run(40)
    assert float(nothing.root_value) == -INF
    with pytest.raises(ValueError, match="expected a sample that is allowed, got rewards of -inf only"):
        nothing.sample(1)


@pytest.mark.parametrize("scale", [1e30, 1e308, -1e308])
@pytest.mark.parametrize("selection", ["uct", "boltzmann"])
def test_large_rewards_do_not_overflow(scale, selection):
    tree = make(reward=lambda x: scale * (x[:, 0] / 26), selection=selection, descents=2).run(100)
    assert bool(tree._forest.value.isfinite().all())
    top = tree.samples().reward.max()
    assert bool((tree.sample(100).reward == top).all())  # any other is less by more than exp can tell
    assert float(tree.root_value) == pytest.approx(float(top), rel=1e-12, abs=10)
    mean = make(reward=lambda x: torch.full((len(x),), scale, dtype=torch.float64), lam=0.0).run(60)
    assert float(mean.root_value) == pytest.approx(scale, rel=1e-12)


def test_soft_value_by_hand():
    soft = tree_reference.soft_value
    assert soft([0.0, math.log(3)], 1.0) == pytest.approx(math.log(2))
    assert soft([1.0, 3.0], 0.0) == 2
    assert soft([1.0, 3.0], 1e-9) == pytest.approx(2, abs=1e-6)
    assert soft([1.0, 3.0], 1e9) == pytest.approx(3)
    assert soft([-INF, 0.0], 1.0) == pytest.approx(-math.log(2))
    assert soft([-INF, -INF], 1.0) == -INF
    assert soft([1e308, 1e308], 0.0) == 1e308
    assert math.isnan(soft([NAN, 0.0], 1.0))
    assert soft([-5.25], 3.0) == -5.25
    assert tree_reference.boltzmann([0.0, -INF, 0.0], 1.0, 0.5) == 2
    assert tree_reference.boltzmann([-INF, -INF], 1.0, 0.75) == 1
    assert tree_reference.boltzmann([NAN, NAN], 1.0, 0.75) == 0
    assert tree_reference.uct([1.0, 1.0, NAN], [5, 2, 1], 8, 1.0) == 1
