"""The unified solver step: decisions, one record a step, and the table that they make of points."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .._checks import expect_type
from .draft import Draft, Level, Row, combined, compiled, conversion, levels, scales, start_scale
from .expansion import KINDS, RELAXATIONS, update
from .table import Points, SolverTable

Active = tuple[tuple[int, ...], ...]

__all__ = ["Corrector", "Decision", "load_decisions", "save_decisions", "usf"]


def _as_active(value: Any) -> Active | None:
    return None if value is None else tuple(tuple(int(j) for j in points) for points in value)


@dataclass(frozen=True)
class Corrector:
    """The step taken again with the prediction made at its end ("pseudo": the model is not called again there).

    Points count back from the step's end, which is -1. Attributes are as :class:`Decision`'s; ``order`` None is one
    more than the step's, ``active`` None the step's points and the new one.
    """

    order: int | None = None
    active: Active | None = None
    relaxation: str | None = None
    coefficient: float = 0.0
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "active", _as_active(self.active))
        object.__setattr__(self, "factors", tuple(self.factors))


@dataclass(frozen=True)
class Decision:
    """One step of USF.

    Attributes:
        order: terms of the Taylor expansion, 1 (DDIM) and up. Default 1.
        prediction: what is expanded: "noise", "data" or "flow"; also "rho" (noise in sigma / alpha, EDM's ODE),
            "sde_data" and "sde_noise". Default "data".
        start: the point from which the step goes, counted back from its end: -1, the default, is where the model was
            called last (multistep); -p starts where a singlestep solver of order p does.
        active: of each derivative 1 to order - 1 the points that it is estimated from, counted likewise; as many as it
            is high, at least. None: the order - 1 points next to the start, later ones first.
        relaxation: of the first derivative's term, see :func:`fastcifar.diffusion.expansion.relaxation_factor`.
        coefficient: k of the relaxation "linear".
        factors: what the terms of derivatives 1, 2... are multiplied by besides. Default all 1; (1, 0.5) is the
            published third-order multistep DPM-Solver.
        corrector: a :class:`Corrector`, or None. It takes effect where the model is called at the step's end, so never
            at the last one's.

    Source: Liu et al., "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models" (ICLR
    2024). Its third type, DPM-Solver-v3's, weighs each element by statistics of a data set, so it is no row of numbers.
    """

    order: int = 1
    prediction: str = "data"
    start: int = -1
    active: Active | None = None
    relaxation: str | None = None
    coefficient: float = 0.0
    factors: tuple[float, ...] = ()
    corrector: Corrector | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "active", _as_active(self.active))
        object.__setattr__(self, "factors", tuple(self.factors))
        if isinstance(self.corrector, Mapping):
            object.__setattr__(self, "corrector", Corrector(**self.corrector))


def save_decisions(decisions: Sequence[Decision], path: str | Path) -> None:
    """As JSON: a list of records with the names of :class:`Decision`."""
    Path(path).write_text(json.dumps([asdict(d) for d in decisions], indent=1))


def load_decisions(path: str | Path) -> list[Decision]:
    """What :func:`save_decisions` wrote."""
    return [Decision(**record) for record in json.loads(Path(path).read_text())]


class _Formula(NamedTuple):
    """An update with points counted from the first one."""

    kind: str
    start: int
    target: int
    active: Active
    relaxation: str | None
    coefficient: float
    factors: tuple[float, ...]

    def reads(self) -> set[tuple[str, int]]:
        points = {self.start}.union(*self.active)
        return {("x", self.start), *((KINDS[self.kind], j) for j in points)}

    def row(self, found: Sequence[Level], forms: Mapping[tuple[str, int], Row], where: str) -> Row:
        made = update(
            self.kind,
            found,
            self.start,
            self.target,
            self.active,
            self.relaxation,
            self.coefficient,
            self.factors,
            where,
        )
        kind = KINDS[self.kind]
        terms = [(made.carry, forms["x", self.start])]
        terms += [(weight, forms[kind, j]) for j, weight in made.weights.items() if weight != 0]
        return combined([*terms, (made.noise, {"noise": 1.0})])


def _formula(step: Decision | Corrector, of: Decision, i: int, where: str) -> _Formula:
    """Of step i (to point i + 1), or of its corrector, whose points count from one further on."""
    expect_type(where, (Decision, Corrector), "a Decision", decision=step)
    again = isinstance(step, Corrector)
    end = i + 2 if again else i + 1
    order = step.order if step.order is not None else of.order + 1
    start = of.start - 1 if again else of.start
    active = step.active
    if of.prediction not in KINDS:
        raise ValueError(f"{where}: expected prediction to be one of {', '.join(KINDS)}; got {of.prediction!r}")
    if again and of.prediction.startswith("sde"):
        raise ValueError(f"{where}: expected a step without noise where there is a corrector, got {of.prediction!r}")
    if step.relaxation is not None and step.relaxation not in RELAXATIONS:
        raise ValueError(f"{where}: expected relaxation of {', '.join(RELAXATIONS)}; got {step.relaxation!r}")
    if order < 1 or start > -1 or end + start < 0:
        raise ValueError(
            f"{where}: expected order of 1 or more and start of {-i - 1} to -1, got {order} and {of.start}"
        )
    if active is None:
        if again:
            near = _near(of.start, of.order, i, where) if of.active is None else ()
            before = tuple(near for _ in range(of.order - 1)) if of.active is None else of.active
            shifted = [(*(j - 1 for j in points), -1) for points in before]
            active = tuple((shifted + [shifted[-1] if shifted else (-1,)] * order)[: order - 1])
        else:
            active = (_near(start, order, i, where),) * (order - 1)
    if len(active) != order - 1:
        raise ValueError(f"{where}: expected active points of {order - 1} derivatives, got {len(active)}")
    for d, points in enumerate(active, 1):
        if len(points) < d or len(set(points)) < len(points) or start in points:
            raise ValueError(
                f"{where}: expected {d} or more points for derivative {d}, each once and not the start, got {points}"
            )
        if not all(-end <= j <= -1 for j in points):
            raise ValueError(f"{where}: expected active points of {-end} to -1, the history there is, got {points}")
    absolute = tuple(tuple(end + j for j in points) for points in active)
    return _Formula(of.prediction, end + start, i + 1, absolute, step.relaxation, step.coefficient, step.factors)


def _near(start: int, order: int, i: int, where: str) -> tuple[int, ...]:
    later, earlier = range(start + 1, 0), range(start - 1, -i - 2, -1)
    points = (*later, *earlier)[: order - 1]
    if len(points) < order - 1:
        raise ValueError(f"{where}: expected an order of at most {1 + len(points)}, the history there is, got {order}")
    return points


class _Kept(NamedTuple):
    """What stands in the rows "converted" and "corrected" of a point: "data", "noise", "flow", "x" or None."""

    main: str
    second: str | None


_BASIS = {"data": (1.0, 0.0), "noise": (0.0, 1.0), "flow": (-1.0, 1.0)}


def _later_forms(i: int, kept: _Kept, level: Level, free: bool, corrected: bool) -> dict[tuple[str, int], Row]:
    """What is known of point i once its step is over, by what was kept of it."""
    if free:  # the data are taken for 0: all follows from x / sigma, which is kept as "corrected"
        noise: Row = {("corrected", i): 1.0}
        return {("noise", i): noise, ("flow", i): noise, ("data", i): {}, ("x", i): combined([(level.sigma, noise)])}
    names = {kept.main: ("converted", i)}
    if kept.second is not None:
        names[kept.second] = ("corrected", i)
    forms: dict[tuple[str, int], Row] = {(what, i): {name: 1.0} for what, name in names.items()}
    basis = dict(_BASIS)
    if not corrected:  # else x and the predictions are not of one sample
        basis["x"] = (level.alpha, level.sigma)
    pair = [what for what in names if what in basis]
    if len(pair) == 2:
        (a, b), (c, d) = (basis[what] for what in pair)
        determinant = a * d - b * c
        for what, (p, q) in basis.items():
            weights = ((p * d - q * c) / determinant, (q * a - p * b) / determinant)
            terms: Row = {names[pair[0]]: weights[0], names[pair[1]]: weights[1]}
            forms.setdefault((what, i), terms)
    return forms


def _plan(formulas: Sequence[_Formula], again: Mapping[int, _Formula], free: bool, name: str) -> list[_Kept]:
    """What to keep of each point. ``again`` holds correctors by the point that they correct."""
    needs: list[set[str]] = [set() for _ in formulas]
    for i, formula in enumerate(formulas):
        for f in (formula, again.get(i)):
            for what, j in f.reads() if f is not None else ():
                if j < i:
                    needs[j].add(what)
    plans = []
    for i, formula in enumerate(formulas):
        own = KINDS[formula.kind]
        predictions = sorted(needs[i] - {"x"}, key=lambda what: (what != own, what))
        if i in again and "x" in needs[i] and len(predictions) > 1:
            raise ValueError(
                f"{name}: expected to keep two tensors of a corrected point, got steps that need its sample and "
                f"{' and '.join(predictions)} at point {i}"
            )
        main = predictions[0] if predictions else own
        second = predictions[1] if len(predictions) > 1 else "x" if "x" in needs[i] or i in again else None
        plans.append(_Kept(main, second))
        if free and i == 0:
            plans[-1] = _Kept(main, "noise")
    return plans


def usf(
    points: Points,
    decisions: Sequence[Decision],
    *,
    prediction: str = "epsilon",
    first_free: bool = False,
    limit: float | None = None,
    scaled: bool = False,
    name: str = "usf",
) -> SolverTable:
    r"""The table of S decisions on S + 1 points: any solver that expands what the model predicts at points it has seen.

    Step i goes to point i + 1 by ``x_t = carry x_s + sum_k M_k R_k F^(k)``, whose numbers
    :mod:`fastcifar.diffusion.expansion` has; ``F^(d) = sum_j w_j (F_j - F_s)`` with w from the active points.

    Args:
        points: S + 1 of them; sigma of the last may be 0. A doubled point makes a step that changes nothing.
        decisions: one a step.
        prediction: what the model says: "epsilon", "x0" ("sample"), "v" or "flow". Default "epsilon".
        first_free: the first step takes ``x / sigma`` for the noise, 0 for the data, and calls no model (USF's AFS
            "zero_x0"; its "average_x0" needs the mean of a data set). Default False.
        limit: the predicted data are clamped to -limit...limit; only where all steps expand data. Default None.
        scaled: the model sees ``x / sqrt(alpha^2 + sigma^2)``. Default False.
        name: of the table.

    Raises:
        TypeError, ValueError: a decision cannot be taken where it stands (an order above the history, a point that is
            not there, a limit on noise...), or needs more than the six slots.

    Source: Liu et al. (ICLR 2024), equations 8 to 10 and the official code's decisions.

    Example:
        >>> import torch
        >>> from fastcifar.diffusion import Decision, Points, usf_table
        >>> sigma = torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64)
        >>> points = Points(torch.tensor([900.0, 500.0, 100.0]), (1 - sigma**2).sqrt(), sigma)
        >>> table = usf_table(points, [Decision(), Decision(order=2, relaxation="dpmsolver-2")])
        >>> len(table), table.slots
        (2, 1)
    """
    found = levels(points, name)
    count = len(decisions)
    if count != len(found) - 1:
        raise ValueError(f"{name}: expected a decision for each of {len(found) - 1} steps, got {count}")
    formulas = [_formula(d, d, i, f"{name}, step {i}") for i, d in enumerate(decisions)]
    again = {
        i + 1: _formula(d.corrector, d, i, f"{name}, corrector of step {i}")
        for i, d in enumerate(decisions[:-1])
        if d.corrector is not None
    }
    plans = _plan(formulas, again, first_free, name)
    if limit is not None and (any(KINDS[f.kind] != "data" for f in formulas) or any(p.main != "data" for p in plans)):
        raise ValueError(f"{name}: expected steps that expand data where there is a limit, got others")
    size = scales(found, scaled)
    forms: dict[tuple[str, int], Row] = {}
    drafts = []
    for i, (formula, kept) in enumerate(zip(formulas, plans, strict=True)):
        where, free = f"{name}, step {i}", first_free and i == 0
        now: dict[tuple[str, int], Row] = {("x", i): {"x": 1.0}}
        convert: Row = {}
        correct: Row = {}
        if free:
            correct = {"x": 1 / found[i].sigma}
            now |= {("noise", i): correct, ("flow", i): correct, ("data", i): {}}
        else:
            wanted = {kept.main, kept.second or kept.main, KINDS[formula.kind]}
            wanted |= {KINDS[again[i].kind]} if i in again else set()
            for what in wanted - {"x"}:
                now[what, i] = conversion(prediction, found[i], what, where)
            convert = now[kept.main, i]
            now[kept.main, i] = {"converted": 1.0}
            if i in again:
                now["x", i] = again[i].row(found, {**forms, **now}, f"{name}, corrector of step {i - 1}")
            if kept.second is not None:
                correct = now[kept.second, i]
                now[kept.second, i] = {"corrected": 1.0}
        predict = formula.row(found, {**forms, **now}, where)
        timestep = float(points.timesteps[i])
        drafts.append(Draft(convert, predict, correct, timestep, size[i]))
        forms |= _later_forms(i, kept, found[i], free, i in again)
    return compiled(drafts, limit=limit, init_scale=start_scale(found[0]), name=name)
