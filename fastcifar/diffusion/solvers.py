"""Published solvers as tables: those that expand what the model predicted at points seen before, and the registry.

Each builder takes :class:`Points` first. :mod:`fastcifar.diffusion.one_step` has DDPM, DDIM, Euler, Heun and EDM,
:mod:`fastcifar.diffusion.pseudo_numerical` PNDM and iPNDM.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from . import one_step, pseudo_numerical
from .draft import levels
from .expansion import KINDS
from .table import Points, SolverTable
from .usf import Corrector, Decision, usf

FEW_STEPS = 15  # below it the published code's lower_order_final acts
ALGORITHMS = {
    "dpmsolver++": "data",
    "dpmsolver": "noise",
    "sde-dpmsolver++": "sde_data",
    "sde-dpmsolver": "sde_noise",
}

__all__ = ["SOLVERS", "deis", "dpm_solver", "dpm_solver_singlestep", "lms", "solver_table", "unipc"]


def _orders(points: Points, order: int, lowered: bool | None, kind: str, name: str) -> list[int]:
    """Of each step: what there is history for, lower at the end where asked (None: below 15 steps, as published), and 1
    where data reach sigma 0."""
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"{name}: expected order of 1 or more, got {order!r}")
    found = levels(points, name)
    steps = len(found) - 1
    lowered = steps < FEW_STEPS if lowered is None else lowered
    orders = [min(order, i + 1, steps - i if lowered else order) for i in range(steps)]
    if KINDS[kind] == "data" and found[-1].sigma == 0:
        orders[-1] = 1
    return orders


def _choice(name: str, argument: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected {argument} of {', '.join(choices)}; got {value!r}")


def dpm_solver(
    points: Points,
    order: int = 2,
    *,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    exact: bool = False,
    lower_order_final: bool | None = None,
    euler_at_final: bool = False,
    prediction: str = "epsilon",
    limit: float | None = None,
    scaled: bool = False,
) -> SolverTable:
    r"""DPM-Solver and DPM-Solver++, multistep, of the ODE and of the SDE.

    Order 2 of "dpmsolver++" with ``h = lambda_t - lambda_s``, ``r = (lambda_s - lambda_s') / h`` and D of s and s':
    ``x_t = (sigma_t / sigma_s) x - alpha_t (e^-h - 1) D - c (D - D') / r``, c of "midpoint"
    ``alpha_t (e^-h - 1) / 2`` and of "heun" ``-alpha_t ((e^-h - 1) / h + 1)``.

    Args:
        points: S + 1 points.
        order: 1 to 3; with ``exact`` up to 6. The SDE's: 1 and 2. Default 2.
        algorithm: "dpmsolver++" (the default), "dpmsolver", "sde-dpmsolver++" or "sde-dpmsolver".
        solver_type: "midpoint" (the default) or "heun" (Taylor's series), which differ at order 2.
        exact: the third order solver as published takes half of the second derivative's term and is of second order.
            True takes all of it: third order. Default False.
        lower_order_final: whether orders fall to 1 at the end. Default: below 15 steps, as published. Where data are
            expanded, a last sigma of 0 makes the last order 1 in any case.
        euler_at_final: the last step is of order 1. Default False.
        prediction, limit, scaled: see :func:`fastcifar.diffusion.usf.usf`.

    Raises:
        ValueError: an argument is not as described, or a step cannot be taken.

    Source: Lu et al. 2022, arXiv 2206.00927 and 2211.01095 (algorithm 2, appendix B).

    Example:
        >>> from fastcifar.diffusion import DiscreteVP, dpm_solver
        >>> dpm_solver(DiscreteVP.linear().points(20, "trailing"), order=3).name
        'dpmsolver++3m'
    """
    name = f"{algorithm}{order}m{' exact' if exact else ''}"
    _choice(name, "algorithm", algorithm, tuple(ALGORITHMS))
    _choice(name, "solver_type", solver_type, ("midpoint", "heun"))
    kind = ALGORITHMS[algorithm]
    most = 2 if kind.startswith("sde") else 6 if exact else 3
    if not isinstance(order, int) or not 1 <= order <= most:
        raise ValueError(f"{name}: expected order of 1 to {most}, got {order!r}")
    orders = _orders(points, order, lower_order_final, kind, name)
    if euler_at_final:
        orders[-1] = 1
    made = {
        o: Decision(
            order=o,
            prediction=kind,
            relaxation="dpmsolver-2" if o == 2 and solver_type == "midpoint" else None,
            factors=(1.0, 0.5) if o == 3 and not exact else (),
        )
        for o in set(orders)
    }
    return usf(points, [made[o] for o in orders], prediction=prediction, limit=limit, scaled=scaled, name=name)


def _singlestep_orders(steps: int, order: int, lowered: bool) -> list[int]:
    whole, left = divmod(steps, order)
    block = list(range(1, order + 1))
    if not lowered or order == 1:
        return block * whole + block[:left]
    if left == 0:  # the last block gives way, so that the last step is of order 1
        return block * (whole - 1) + block[: order - 1] + [1]
    return block * whole + block[:left]


def dpm_solver_singlestep(
    points: Points,
    order: int = 2,
    *,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    prediction: str = "epsilon",
    limit: float | None = None,
    scaled: bool = False,
) -> SolverTable:
    """DPM-Solver and ++, singlestep: blocks of ``order`` steps, all of which start from the first point of the block.

    Arguments are as those of :func:`dpm_solver`; order 1 to 3, "dpmsolver" or "dpmsolver++"; "midpoint" takes at order
    3 the slope to the last point alone. ``lower_order_final`` (default True) ends with a step of order 1 where steps
    divide by the order. The last step is of order 1 where data are expanded to sigma 0.

    Source: Lu et al. 2022, arXiv 2206.00927, algorithms 1 and 2, and 2211.01095, appendix B.

    Raises:
        ValueError: an argument is not as described, or a step cannot be taken.

    Example:
        >>> from fastcifar.diffusion import DiscreteVP, dpm_solver_singlestep
        >>> len(dpm_solver_singlestep(DiscreteVP.linear().points(12, "trailing"), order=3))
        12
    """
    name = f"{algorithm}{order}s"
    _choice(name, "algorithm", algorithm, ("dpmsolver++", "dpmsolver"))
    _choice(name, "solver_type", solver_type, ("midpoint", "heun"))
    if not isinstance(order, int) or not 1 <= order <= 3:
        raise ValueError(f"{name}: expected order of 1 to 3, got {order!r}")
    kind = ALGORITHMS[algorithm]
    found = levels(points, name)
    orders = _singlestep_orders(len(found) - 1, order, lower_order_final)
    if found[-1].sigma == 0:
        orders[-1] = 1
    made = {1: Decision(prediction=kind), 2: Decision(2, kind, -2), 3: Decision(3, kind, -3)}
    if solver_type == "midpoint":
        made[2] = Decision(2, kind, -2, relaxation="dpmsolver-2")
        made[3] = Decision(2, kind, -3, active=((-1,),))
    return usf(points, [made[o] for o in orders], prediction=prediction, limit=limit, scaled=scaled, name=name)


def unipc(
    points: Points,
    order: int = 2,
    *,
    variant: str = "bh2",
    expands: str = "data",
    corrector: bool = True,
    disable_corrector: Sequence[int] = (),
    lower_order_final: bool = True,
    prediction: str = "epsilon",
    limit: float | None = None,
    scaled: bool = False,
) -> SolverTable:
    """UniPC: a multistep predictor, and a corrector that takes each step again with the prediction made at its end.

    The sample that a step starts from is the corrected one, the predictions are those of the predicted one.

    Args:
        points: S + 1 points.
        order: of the predictor, 1 to 5 (the corrector's is one more). Default 2.
        variant: "bh1" (``B = h``) or "bh2" (``B = e^h - 1``, the default). B cancels but in the predictor of order 2
            and the corrector of a step of order 1.
        expands: "data" (the default, predict_x0) or "noise".
        corrector: whether there is one. Default True.
        disable_corrector: steps that are not corrected.
        lower_order_final: whether orders fall to 1 at the end. Default True.
        prediction, limit, scaled: see :func:`fastcifar.diffusion.usf.usf`.

    Raises:
        ValueError: an argument is not as described, or a step cannot be taken.

    Source: Zhao et al. 2023, arXiv 2302.04867, algorithms 5 to 8.

    Example:
        >>> from fastcifar.diffusion import DiscreteVP, unipc
        >>> unipc(DiscreteVP.linear().points(10, "trailing"), order=3).slots
        4
    """
    name = f"unipc{order} {variant}"
    _choice(name, "variant", variant, ("bh1", "bh2"))
    _choice(name, "expands", expands, ("data", "noise"))
    if not isinstance(order, int) or not 1 <= order <= 5:
        raise ValueError(f"{name}: expected order of 1 to 5, got {order!r}")
    relaxation = f"unipc-{variant}"
    decisions = []
    for i, o in enumerate(_orders(points, order, lower_order_final, expands, name)):
        again = None
        if corrector and i not in disable_corrector:
            again = Corrector(relaxation=relaxation if o == 1 else None)
        decisions.append(Decision(o, expands, relaxation=relaxation if o == 2 else None, corrector=again))
    return usf(points, decisions, prediction=prediction, limit=limit, scaled=scaled, name=name)


def deis(
    points: Points,
    order: int = 2,
    *,
    lower_order_final: bool | None = None,
    prediction: str = "epsilon",
    scaled: bool = False,
) -> SolverTable:
    """DEIS: exact integrals of the polynomial through the noise predicted at this and ``order - 1`` points before, in
    ``ln(sigma / alpha)`` ("tAB", "log rho"), which are those of an expansion of the noise in lambda.

    Args:
        points: S + 1 points.
        order: 1 to 6; published up to 3 (4 terms in the paper). Default 2.
        lower_order_final: default below 15 steps.
        prediction, scaled: see :func:`fastcifar.diffusion.usf.usf`.

    Source: Zhang and Chen, "Fast Sampling of Diffusion Models with Exponential Integrator" (ICLR 2023), section 3.

    Raises:
        ValueError: an argument is not as described, or a step cannot be taken.

    Example:
        >>> from fastcifar.diffusion import EDMSchedule, deis
        >>> deis(EDMSchedule().points(10), order=3).slots
        2
    """
    name = f"deis{order}"
    orders = _orders(points, order, lower_order_final, "noise", name)
    decisions = [Decision(o, "noise") for o in orders]
    return usf(points, decisions, prediction=prediction, scaled=scaled, name=name)


def lms(points: Points, order: int = 4, *, prediction: str = "epsilon", scaled: bool = False) -> SolverTable:
    """Linear multistep (Adams and Bashforth at the points as they lie): exact integrals of the polynomial through the
    noise predicted at this and ``order - 1`` points before, in ``sigma / alpha``.

    Args:
        points: S + 1 points; usually :func:`fastcifar.diffusion.exploding`.
        order: 1 to 6. Default 4.
        prediction, scaled: see :func:`fastcifar.diffusion.usf.usf`.

    Raises:
        ValueError: an argument is not as described, or a step cannot be taken.

    Source: crowsonkb/k-diffusion, ``sample_lms``, whose quadrature these integrals replace.

    Example:
        >>> from fastcifar.diffusion import EDMSchedule, lms
        >>> lms(EDMSchedule().points(10)).slots
        3
    """
    name = f"lms{order}"
    decisions = [Decision(o, "rho") for o in _orders(points, order, False, "rho", name)]
    return usf(points, decisions, prediction=prediction, scaled=scaled, name=name)


SOLVERS: dict[str, Callable[..., SolverTable]] = {
    "ddim": one_step.ddim,
    "ddpm": one_step.ddpm,
    "deis": deis,
    "dpm_solver": dpm_solver,
    "dpm_solver_singlestep": dpm_solver_singlestep,
    "edm": one_step.heun,
    "euler": one_step.euler,
    "euler_ancestral": one_step.euler_ancestral,
    "heun": one_step.heun,
    "ipndm": pseudo_numerical.ipndm,
    "lms": lms,
    "pndm": pseudo_numerical.pndm,
    "unipc": unipc,
    "usf": usf,
}


def solver_table(solver: str, points: Points, **options: Any) -> SolverTable:
    """The table of a solver by its name in ``SOLVERS``; ``options`` are its builder's arguments.

    Raises:
        ValueError: an unknown solver, or an option that it does not have.

    Example:
        >>> from fastcifar.diffusion import DiscreteVP, solver_table
        >>> solver_table("ddim", DiscreteVP.linear().points(10)).slots
        0
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver_table: expected solver to be one of {', '.join(SOLVERS)}; got {solver!r}")
    known = list(inspect.signature(SOLVERS[solver]).parameters)[1:]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"solver_table: expected options of {solver} to be of {', '.join(known)}; got {unknown[0]!r}")
    return SOLVERS[solver](points, **options)
