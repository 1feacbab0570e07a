"""Diffusion Tree Sampling: a search tree over reverse-diffusion states that draws from ``p(x) exp(lam r(x))``."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import expect_type
from .table import SolverTable
from .tree_arrays import Forest, Rows
from .tree_step import TableStep

SELECTIONS = ("boltzmann", "uct", "uniform")


class TreeSamples(NamedTuple):
    """Samples and what the reward says of them.

    Attributes:
        x: ``[n, *shape]``, on the device of the states.
        reward: float64 ``[n]``, on the CPU.
    """

    x: Tensor
    reward: Tensor


class TreeSampler:
    r"""Diffusion Tree Sampling (DTS, and DTS* for search): draws from ``p(x_0) exp(lam r(x_0))`` and looks for large r,
    by a tree over the states of reverse diffusion. It needs samples of p and values of r, and no gradient.

    A node is a state ``x_t`` with a value v and a count N of visits; the root is a node of its own whose children are
    draws of ``x_T ~ N(0, I)``. One descent:

    1. *Selection.* From the root down, while a node has all the children that it may have: ``ceil(C N^alpha)``, at most
       ``max_children``. The next child is drawn with probability proportional to ``exp(lam v)`` (``"boltzmann"``, DTS),
       or is that of the largest ``v + c_uct sqrt(ln N(parent) / N(child))`` (``"uct"``, DTS*).
    2. *Expansion and roll-out.* Where it stops it makes ``width`` children ``x_{t-1} ~ p(. | x_t)`` and goes on from
       each to ``x_0``. All states join the tree; ``v(x_0) = r(x_0)``.
    3. *Backup.* From there up to the root ``V(x_t) = ln(mean(exp(lam V(x_{t-1})))) / lam`` over the children: a mean,
       since children are draws of p. With lam = 0 it is the mean of V.

    :meth:`sample` then goes from the root to an ``x_0`` by Boltzmann choices alone. Over the x_0 of the tree its
    probabilities are exactly ``p exp(lam r)`` with p as the tree has sampled it. A search corrects the values of what
    looked good and leaves others, so that at a finite budget its draws lean toward p; ``"uniform"`` does not search.

    *Batches.* A round is ``descents`` descents of each of ``trees`` trees, and one call of ``step`` serves all branches
    of a round that pass its level. The descents of one tree in one round see the values from before the round, but the
    visits, and the children to come, of the descents before them: these virtual visits spread them, by widening and by
    the bound of UCT. With ``descents = 1`` nothing is approximated and each tree is what it would be alone. Trees are
    independent; :meth:`sample` draws the tree too, in proportion to ``exp(lam V(root))``.

    *Devices.* States stay on the device where ``step`` makes them. Values, visits and lists of children stay on the CPU
    (descents are chains of dependent small reads), so a round moves the rewards to the CPU and waits for them.

    A reward of minus infinity forbids a sample: it is never drawn while others have a finite one. With lam = 0 rewards
    are ignored by Boltzmann choices. NaN and plus infinity are refused. Where ``step``, ``prior`` or ``reward`` raises
    or is interrupted, the tree is as it was before the round. All states stay in memory.

    Source: Jain et al., "Diffusion Tree Sampling" (2025), arXiv 2506.20701. The paper's widening and UCT constants are
    not known to us: the defaults of ``widening``, ``c_uct``, ``width``, ``descents`` and ``trees`` are ours.

    Args:
        step: ``step(x, t, generator) -> x_prev``, one transition of a batch from level t (T...1, an int) to t - 1, with
            randomness from ``generator`` alone, such as a :class:`TableStep`; or, where ``table`` is given, a model as
            :class:`TableStep` takes it.
        reward: ``reward(x_0) -> [B]``, floating.
        shape: of one state, without the batch.
        steps: T, the number of transitions. Default: the table's.
        lam: inverse temperature, at least 0. Default 1.
        table: a solver's table without history; ``step`` is then a model.
        selection: ``"boltzmann"`` (default), ``"uct"``, or ``"uniform"`` (ours): any child alike, so that how often a
            node is expanded does not depend on values, and draws do not lean toward p at any budget.
        c_uct: weight of the bound of UCT, at least 0. Default 1.
        widening: (C, alpha), C > 0 and 0 <= alpha <= 1. Default (1, 0.5).
        max_children: of one node. Default None, no limit.
        width: how many children an expansion makes. Default 1.
        noiseless: the levels t (T...1) whose transition is deterministic, so that a second child would be the first
            again and none is made. Default none; a table knows its own.
        trees: how many trees. Default 1.
        descents: how many descents of a tree share a round. Default 1.
        prior: ``prior(n, generator) -> x_T``, ``[n, *shape]``. Default: standard normal in ``dtype`` on ``device``,
            times the table's ``init_scale``.
        dtype, device: of the default prior. Defaults float32 and the CPU.
        generator: the source of all randomness, on ``device``. Default: one with a seed from torch's own generator.

    Raises:
        TypeError: step, reward or prior cannot be called, or a number is of another type.
        ValueError: a number is outside its range, or the table has a history.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import TreeSampler
        >>> def step(x, t, generator):  # a random walk
        ...     return x + torch.randn(x.shape, generator=generator)
        >>> def reward(x):
        ...     return -(x[:, 0] - 3).square()
        >>> tree = TreeSampler(step, reward, (1,), 2, generator=torch.Generator().manual_seed(0))
        >>> drawn = tree.run(300).sample(100)
        >>> drawn.x.shape, bool(1 < drawn.x.mean() < 4), bool(tree.best().reward[0] > -0.1)
        (torch.Size([100, 1]), True, True)
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        reward: Callable[[Tensor], Tensor],
        shape: Sequence[int],
        steps: int | None = None,
        *,
        lam: float = 1.0,
        table: SolverTable | None = None,
        selection: str = "boltzmann",
        c_uct: float = 1.0,
        widening: tuple[float, float] = (1.0, 0.5),
        max_children: int | None = None,
        width: int = 1,
        noiseless: Collection[int] = (),
        trees: int = 1,
        descents: int = 1,
        prior: Callable[[int, torch.Generator], Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> None:
        for name, function in (("step", step), ("reward", reward), ("prior", prior or reward)):
            if not callable(function):
                raise TypeError(f"TreeSampler: expected {name} to be callable, got {type(function).__name__}")
        if not isinstance(shape, Sequence) or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise TypeError(f"TreeSampler: expected shape to be the sizes of one state, got {shape!r}")
        if not isinstance(widening, Sequence) or len(widening) != 2:
            raise TypeError(f"TreeSampler: expected widening to be a pair (C, alpha), got {widening!r}")
        if table is not None:
            step = TableStep(step, table)
        scale = 1.0
        if isinstance(step, TableStep):
            if steps not in (None, len(step.table)):
                raise ValueError(f"TreeSampler: expected steps to be the table's {len(step.table)}, got {steps}")
            steps, scale = len(step.table), step.table.init_scale
            noiseless = {*noiseless, *(steps - i for i, noisy in enumerate(step.table.noisy.tolist()) if not noisy)}
        if selection not in SELECTIONS:
            raise ValueError(f"TreeSampler: expected selection to be one of {', '.join(SELECTIONS)}; got {selection!r}")
        counts = {"steps": steps, "width": width, "trees": trees, "descents": descents}
        for name, count in (counts | ({} if max_children is None else {"max_children": max_children})).items():
            _at_least("TreeSampler", name, count, 1, integer=True)
        c, alpha = widening
        for name, number in (("lam", lam), ("c_uct", c_uct), ("C of widening", c), ("alpha of widening", alpha)):
            _at_least("TreeSampler", name, number, 0)
        if c == 0 or alpha > 1:
            raise ValueError(f"TreeSampler: expected widening (C, alpha) with C > 0 and alpha <= 1, got {widening}")
        assert steps is not None
        if not all(isinstance(t, int) and 1 <= t <= steps for t in noiseless):
            raise ValueError(f"TreeSampler: expected noiseless to be levels of 1 to {steps}, got {list(noiseless)}")
        self.shape, self.steps, self.descents, self.selection = tuple(shape), steps, descents, selection
        self._step, self._reward = step, reward
        self._prior = prior or self._normal
        self._dtype, self._device = dtype, torch.device(device)
        self._scale = scale
        self._forest = Forest(
            trees,
            steps + 1,
            float(lam),
            float(c_uct),
            (c, alpha),
            max_children,
            width,
            [steps + 1 - t for t in noiseless],
        )
        self._states = [Rows() for _ in range(steps + 2)]  # by depth; of a root there is none
        self._rewards, self._tree_of = Rows(), Rows()  # of each x_0
        self.evaluations = self.calls = 0
        if generator is None:
            generator = torch.Generator(self._device).manual_seed(int(torch.randint(2**62, ())))
        expect_type("TreeSampler", torch.Generator, "a torch.Generator or None", generator=generator)
        self._generator = generator
        # Descents and draws have streams of their own, so that drawing, or another device, does not change the search.
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        self._choices, self._draws = (torch.Generator().manual_seed(seed + i) for i in range(2))

    def __repr__(self) -> str:
        f = self._forest
        return (
            f"TreeSampler(shape={self.shape}, steps={self.steps}, lam={f.lam}, selection={self.selection!r}, "
            f"trees={f.trees}, descents={self.descents}, nodes={f.nodes})"
        )

    @property
    def lam(self) -> float:
        """The inverse temperature."""
        return self._forest.lam

    @property
    def nodes(self) -> int:
        """How many nodes there are, roots included."""
        return self._forest.nodes

    @property
    def root_value(self) -> Tensor:
        """V of each tree's root, float64 ``[trees]``: an estimate of ``ln(E_p exp(lam r)) / lam``; NaN before
        :meth:`run`."""
        return self._forest.value[: self._forest.trees].clone()

    @torch.no_grad()
    def run(self, n: int, progress: bool = False) -> TreeSampler:
        """``n`` more descents of each tree, in rounds of ``descents``; the tree goes on from where it is.

        Args:
            n: how many; 0 changes nothing. A descent costs T calls' worth of ``step`` for one sample at most, and
                nothing where it ends at an x_0 that there is (see :attr:`evaluations`).
            progress: whether to show a bar (with tqdm) with the best reward so far. Default False.

        Returns:
            This sampler.

        Raises:
            ImportError: ``progress`` without tqdm.
            TypeError: what step, prior or reward returns is no tensor.
            ValueError: n is negative, a shape is not as described, or a reward is NaN or plus infinity.
        """
        _at_least("TreeSampler.run", "n", n, 0, integer=True)
        bar = _bar(n) if progress else None
        try:
            for begin in range(0, n, self.descents):
                now = min(self.descents, n - begin)
                self._round(now)
                if bar is not None:
                    bar.set_postfix(best=float(self._rewards.all().max()), nodes=self.nodes, refresh=False)
                    bar.update(now)
        finally:
            if bar is not None:
                bar.close()
        return self

    @torch.no_grad()
    def sample(self, n: int, tree: int | None = None) -> TreeSamples:
        """``n`` independent Boltzmann descents to samples that the trees hold, as ``p exp(lam r)`` has them; at any
        time after the first round. The search that goes on is not changed by it.

        Args:
            n: how many.
            tree: draw from this tree alone. Default None, from all.

        Raises:
            ValueError: there is no sample yet, or none with a reward above minus infinity (unless lam is 0).
        """
        _at_least("TreeSampler.sample", "n", n, 0, integer=True)
        f, roots = self._forest, self.root_value
        if not self._rewards.rows:
            raise ValueError("TreeSampler.sample: expected a tree with samples, got one before its first run")
        if tree is not None and not 0 <= tree < f.trees:
            raise ValueError(f"TreeSampler.sample: expected tree to be below {f.trees}, got {tree}")
        among = torch.arange(f.trees) if tree is None else torch.tensor([tree])
        top = roots[among].max()
        if top == -math.inf and f.lam > 0:
            raise ValueError("TreeSampler.sample: expected a sample that is allowed, got rewards of -inf only")
        shares = torch.ones(len(among)) if f.lam == 0 else (f.lam * (roots[among] - top)).exp()
        chosen = among[:1]
        if len(among) > 1 and n:
            chosen = among[torch.multinomial(shares.double(), n, replacement=True, generator=self._draws)]
        uniform = torch.rand(n, f.levels, dtype=torch.float64, generator=self._draws)
        rows = f.row[f.sample(chosen.expand(n).contiguous(), uniform)]
        return TreeSamples(self._states[-1][rows], self._rewards[rows])

    def samples(self) -> TreeSamples:
        """Every x_0 so far, in the order in which they were made."""
        return TreeSamples(self._states[-1].all().clone(), self._rewards.all().clone())

    def best(self) -> TreeSamples:
        """The x_0 of the largest reward of each tree so far, ``[trees, *shape]``: what DTS* looks for.

        Raises:
            ValueError: there is no sample yet.
        """
        if not self._rewards.rows:
            raise ValueError("TreeSampler.best: expected a tree with samples, got one before its first run")
        each = [(self._tree_of.all() == tree).nonzero().squeeze(1) for tree in range(self._forest.trees)]
        rows = torch.stack([own[self._rewards[own].argmax()] for own in each])
        return TreeSamples(self._states[-1][rows], self._rewards[rows])

    def _round(self, descents: int) -> None:
        f, uniform = self._forest, None
        if self.selection != "uct":
            uniform = torch.rand(f.trees, descents, f.levels, dtype=torch.float64, generator=self._choices)
        leaves = f.select(descents, uniform, 0.0 if self.selection == "uniform" else f.lam)
        try:
            growing = f.depth[leaves] < f.levels
            ends = leaves[growing].repeat_interleave(f.width)
            states, rewards = self._roll_out(ends)
        except BaseException:
            f.release(leaves)
            raise
        if not len(ends):
            return
        for own, new in zip(self._states, states, strict=True):
            if new is not None:
                own.append(new)
        trees = torch.arange(f.trees).unsqueeze(1).expand_as(leaves)[growing].repeat_interleave(f.width)
        self._rewards.append(rewards)
        self._tree_of.append(trees)
        f.append(ends, rewards)
        f.backup(leaves)

    def _roll_out(self, ends: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """The new states of each depth, a row for each branch that has one there, and the branches' rewards."""
        f = self._forest
        states: list[Tensor | None] = [None] * (self.steps + 2)
        if not len(ends):
            return states, torch.empty(0, dtype=torch.float64)
        depth, row = f.depth[ends], f.row[ends]
        begins = set(depth.tolist())
        x = torch.empty(0)  # the state of each branch under way, in the order of the branches
        for at in range(min(begins) + 1, f.levels + 1):
            if at == 1:
                n = int((depth == 0).sum())
                x = self._checked(self._prior(n, self._generator), n, None, "prior")
            else:
                if at - 1 in begins:
                    under_way = depth[depth < at] < at - 1
                    x = self._joined(x, self._states[at - 1][row[depth == at - 1]], under_way)
                x = self._transition(x, f.levels + 1 - at)
            states[at] = x
        return states, self._checked_rewards(self._reward(x), len(ends))

    def _transition(self, x: Tensor, t: int) -> Tensor:
        before = None if x.is_inference() else x._version
        prev = self._step(x, t, self._generator)
        if before is not None and x._version != before:  # x is a state of the tree
            raise ValueError("TreeSampler: expected step to leave x as it is, got one that changes it in place")
        self.evaluations += len(x)
        self.calls += 1
        return self._checked(prev, len(x), x.dtype, "step")

    @staticmethod
    def _joined(x: Tensor, beginning: Tensor, under_way: Tensor) -> Tensor:
        """The branches under way and those that begin here, each in its place."""
        if len(beginning) == len(under_way):
            return beginning
        out = beginning.new_empty((len(under_way), *beginning.shape[1:]))
        under_way = under_way.to(out.device)
        out[under_way], out[~under_way] = x, beginning
        return out

    def _normal(self, n: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(n, *self.shape, generator=generator, dtype=self._dtype, device=self._device)
        return x if self._scale == 1 else x * self._scale

    def _checked(self, x: Any, n: int, dtype: torch.dtype | None, what: str) -> Tensor:
        expected = (n, *self.shape)
        if not isinstance(x, Tensor):
            raise TypeError(f"TreeSampler: expected {what} to return a tensor, got {type(x).__name__}")
        if x.shape != expected or (dtype is not None and x.dtype != dtype):
            want = f"{list(expected)}" + ("" if dtype is None else f" in {dtype}")
            raise ValueError(f"TreeSampler: expected {what} to return {want}, got {list(x.shape)} in {x.dtype}")
        return x.detach()

    def _checked_rewards(self, rewards: Any, n: int) -> Tensor:
        if not isinstance(rewards, Tensor) or not rewards.is_floating_point():
            kind = rewards.dtype if isinstance(rewards, Tensor) else type(rewards).__name__
            raise TypeError(f"TreeSampler: expected reward to return a floating tensor, got {kind}")
        if rewards.shape != (n,):
            raise ValueError(f"TreeSampler: expected reward to return [{n}], got {list(rewards.shape)}")
        rewards = rewards.detach().to("cpu", torch.float64)
        wrong = rewards.isnan() | (rewards == math.inf)
        if bool(wrong.any()):
            first = float(rewards[wrong][0])
            raise ValueError(f"TreeSampler: expected rewards that are finite or -inf, got {int(wrong.sum())} of {n} "
                             f"that are not, the first {first}")  # fmt: skip
        return rewards


def _at_least(op: str, name: str, number: Any, least: int, integer: bool = False) -> None:
    if isinstance(number, bool) or not isinstance(number, int if integer else (int, float)):
        kind = "an integer" if integer else "a number"
        raise TypeError(f"{op}: expected {name} to be {kind}, got {type(number).__name__}")
    if not least <= number < math.inf:
        raise ValueError(f"{op}: expected {name} to be finite and at least {least}, got {number}")


def _bar(total: int) -> Any:
    try:
        tqdm = importlib.import_module("tqdm.auto")
    except ImportError as error:
        raise ImportError(
            "TreeSampler.run: expected tqdm for progress=True (pip install 'fastcifar[progress]')"
        ) from error
    return tqdm.tqdm(total=total, desc="tree", unit="descent")
