"""USF's rows against its formulas spelled out again: phi in 60 digits, the Taylor systems solved as they stand."""

import decimal
import json
import math
import random

import pytest
import torch

from fastcifar.diffusion import (
    Corrector,
    Decision,
    DiscreteVP,
    LinearVP,
    Points,
    SolverTable,
    load_decisions,
    save_decisions,
    solver_table,
    usf_table,
)
from fastcifar.diffusion.expansion import RELAXATIONS, phi, relaxation_factor
from fastcifar.diffusion.reference import solver_step

decimal.getcontext().prec = 60
DECIMAL = decimal.Decimal


def exact_phi(k, z):
    z = DECIMAL(z)
    value = z.exp()
    for i in range(k):
        value = (value - DECIMAL(1) / math.factorial(i)) / z
    return float(value)


def exact_relaxation(name, z):
    z = DECIMAL(z)
    grown = z.exp() - 1
    made = {
        "dpmsolver-2": lambda: z * grown / 2 / (grown - z),
        "unipc-bh2": lambda: z * grown / 2 / (grown - z),
        "unipc-bh1": lambda: z * z / 2 / (grown - z),
        "0.5exp": lambda: 1 + grown / 2,
        "-0.5exp": lambda: 1 - grown / 2,
    }
    return float(made[name]())


def run(table, x, outputs):
    """Every x after a step, by the reference."""
    history, result = [None] * 6, []
    for i in range(len(table)):
        made = solver_step(x, outputs[i], history, table.coefficients[i], limit=table.limit)
        for slot, value in zip(table.store[i].tolist(), (made.converted, made.corrected), strict=True):
            if slot:
                history[slot - 1] = value
        x = made.x_next
        result.append(x)
    return result


def restated(kind, xs, predictions, alpha, sigma, t, order, start, active, relaxation, k):
    """USF's update: lists end with the newest; t indexes alpha and sigma, and so does the place in a list."""
    place = sigma / (alpha + sigma) if kind == "flow" else torch.log(alpha / sigma)
    s = len(xs) + start if start < 0 else start
    h = float(place[t] - place[s])
    values = predictions[kind]
    if kind == "noise":
        x = alpha[t] / alpha[s] * xs[s] - sigma[t] * h * exact_phi(1, h) * values[s]
    elif kind == "data":
        x = sigma[t] / sigma[s] * xs[s] + alpha[t] * h * exact_phi(1, -h) * values[s]
    else:
        total = alpha + sigma
        x = total[t] / total[s] * xs[s] + total[t] * h * values[s]
    for d in range(1, order):
        points = [len(values) + j for j in active[d - 1]]
        distance = torch.stack([place[j] - place[s] for j in points])
        system = torch.stack([distance**i / math.factorial(i) for i in range(1, len(points) + 1)])
        unit = torch.zeros(len(points), dtype=torch.float64)
        unit[d - 1] = 1
        weights = torch.linalg.solve(system, unit)
        derivative = sum(w * (values[j] - values[s]) for w, j in zip(weights, points, strict=True))
        if d == 1 and relaxation == "linear":
            derivative = derivative * (1 + k * h)
        elif d == 1 and relaxation is not None:
            derivative = derivative * exact_relaxation(relaxation, -h if kind == "data" else h)
        if kind == "noise":
            x = x - sigma[t] * h ** (d + 1) * exact_phi(d + 1, h) * derivative
        elif kind == "data":
            x = x + alpha[t] * h ** (d + 1) * exact_phi(d + 1, -h) * derivative
        else:
            x = x + total[t] * h ** (d + 1) / math.factorial(d + 1) * derivative
    return x


def solved(prediction, x, output, a, s):
    """Data and noise of a sample, by solving x = a D + s e with what the output says."""
    row = {"epsilon": (0.0, 1.0), "x0": (1.0, 0.0), "v": (-s, a), "flow": (-1.0, 1.0)}[prediction]
    system = torch.tensor([[a, s], row], dtype=torch.float64)
    data, noise = torch.linalg.solve(system, torch.stack([x.flatten(), output.flatten()]))
    return data.view(x.shape), noise.view(x.shape)


def drawn(chance, steps):
    """Random decisions: any start, any active points, any relaxation, with and without a corrector."""
    decisions = []
    kinds = chance.choice([["noise"], ["data"], ["flow"], ["noise", "data"], ["noise", "data", "flow"]])
    for i in range(steps):
        order = chance.randint(1, min(4, i + 1))
        start = chance.choice([-1, -1, -1, -chance.randint(1, i + 1)])
        others = [j for j in range(-i - 1, 0) if j != start]
        active = None
        if chance.random() < 0.5:
            active = []
            for d in range(1, order):
                active.append(tuple(chance.sample(others, chance.randint(d, min(len(others), 4)))))
        corrector = None
        if chance.random() < 0.4:
            corrector = Corrector(relaxation=chance.choice([None, *RELAXATIONS]), coefficient=chance.uniform(-0.5, 0.5))
        relaxation, k = chance.choice([None, *RELAXATIONS]), chance.uniform(-0.5, 0.5)
        decisions.append(Decision(order, chance.choice(kinds), start, active, relaxation, k, (), corrector))
    return decisions


def nearest(order, start, i):
    points = [*range(start + 1, 0), *range(start - 1, -i - 2, -1)]
    return [tuple(points[: order - 1])] * (order - 1)


def restated_run(decisions, prediction, alpha, sigma, x, outputs, free):
    xs, predictions, result = [], {"data": [], "noise": [], "flow": []}, []
    for i, decision in enumerate(decisions):
        if free and i == 0:
            data, noise = torch.zeros_like(x), x / sigma[0]
        else:
            data, noise = solved(prediction, x, outputs[i], alpha[i], sigma[i])
        for kind, value in (("data", data), ("noise", noise), ("flow", noise - data)):
            predictions[kind].append(value)
        if i and decisions[i - 1].corrector is not None:
            last = decisions[i - 1]
            near = last.active if last.active is not None else nearest(last.order, last.start, i - 1)
            active = [[j - 1 for j in points] + [-1] for points in near]
            active = [*active, active[-1]] if active else [[-1]]
            again = last.corrector
            xs.append(None)
            x = restated(
                last.prediction, xs, predictions, alpha, sigma, i, last.order + 1, last.start - 1, active,
                again.relaxation, again.coefficient,
            )  # fmt: skip
            xs.pop()
        xs.append(x)
        active = decision.active if decision.active is not None else nearest(decision.order, decision.start, i)
        x = restated(
            decision.prediction, xs, predictions, alpha, sigma, i + 1, decision.order, decision.start, active,
            decision.relaxation, decision.coefficient,
        )  # fmt: skip
        result.append(x)
    return result


def made(points, decisions, prediction, free):
    """The table, or None where a step would need more tensors than there are slots for."""
    try:
        return usf_table(points, decisions, prediction=prediction, first_free=free)
    except ValueError as error:
        if "expected to keep" not in str(error):
            raise
        return None


def test_rows_are_usfs_update():
    chance, generator = random.Random(0), torch.Generator().manual_seed(0)
    compared, worst = 0, 0.0
    while compared < 1500:
        steps = 5
        lam = torch.tensor(
            [chance.uniform(-3, -2) for _ in range(1)] + [chance.uniform(0.3, 1.2) for _ in range(steps)]
        )
        lam = lam.double().cumsum(0)
        alpha, sigma = torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()
        decisions, free = drawn(chance, steps), chance.random() < 0.3
        prediction = chance.choice(["epsilon", "x0", "v", "flow"])
        points = Points(torch.arange(steps + 1).double(), alpha, sigma)
        table = made(points, decisions, prediction, free)
        if table is None:
            continue
        values = torch.randn(steps + 1, 2, 8, dtype=torch.float64, generator=generator)
        ours = run(table, values[0], values[1:])
        theirs = restated_run(decisions, prediction, alpha, sigma, values[0], values[1:], free)
        size = 1.0
        for mine, other in zip(ours, theirs, strict=True):
            size = max(size, float(other.abs().max()))  # what later steps are computed from
            worst = max(worst, float((mine - other).abs().max()) / size)
            compared += 1
    assert worst < 1e-12


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_phi_is_exact_near_zero_and_far_from_it(k):
    """Trap 12."""
    assert phi(k, 0.0) == pytest.approx(1 / math.factorial(k), rel=1e-15)
    for exponent in range(-300, 2):
        for z in (10.0**exponent, -(10.0**exponent), 0.7 * 10.0**exponent):
            reference = exact_phi(k, z) if abs(z) > 1e-9 else 1 / math.factorial(k)
            assert phi(k, z) == pytest.approx(reference, rel=2e-14 if abs(z) > 1e-9 else 1e-8)


@pytest.mark.parametrize("name", [r for r in RELAXATIONS if r != "linear"])
def test_relaxations_are_1_at_0_and_exact_near_it(name):
    assert relaxation_factor(name, 0.0, 0.0) == pytest.approx(1, rel=1e-15)
    for z in (1e-12, -1e-6, 1e-3, 0.04, -0.3, 1.5, -4.0):
        assert relaxation_factor(name, z, abs(z)) == pytest.approx(exact_relaxation(name, z), rel=1e-13)


def test_decisions_save_and_load(tmp_path):
    decisions = [
        Decision(corrector=Corrector(relaxation="unipc-bh2")),
        Decision(2, "noise", -2, ((-1,),), "linear", 0.1),
    ]
    save_decisions(decisions, tmp_path / "found.json")
    assert load_decisions(tmp_path / "found.json") == decisions
    assert isinstance(json.loads((tmp_path / "found.json").read_text()), list)


POINTS = LinearVP().points(6)


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ([Decision(2), *[Decision()] * 5], "order of at most 1, the history there is, got 2"),
        ([Decision(), Decision(3), *[Decision()] * 4], "order of at most 2"),
        ([Decision(start=-2), *[Decision()] * 5], "start of -1 to -1"),
        ([Decision(), Decision(2, active=((-3,),)), *[Decision()] * 4], "active points of -2 to -1"),
        ([Decision(), Decision(2, active=((-1,),)), *[Decision()] * 4], "not the start"),
        ([Decision(), Decision(2, active=()), *[Decision()] * 4], "active points of 1 derivatives, got 0"),
        ([Decision(relaxation="half"), *[Decision()] * 5], "relaxation"),
        ([Decision(prediction="score"), *[Decision()] * 5], "prediction"),
        ([Decision(prediction="sde_data", corrector=Corrector()), *[Decision()] * 5], "without noise"),
        ([Decision()] * 5, "a decision for each of 6 steps"),
        ([Decision(0), *[Decision()] * 5], "order of 1 or more"),
    ],
)
def test_impossible_decisions_are_sentences(decisions, message):
    with pytest.raises(ValueError, match=message):
        usf_table(POINTS, decisions)


def test_more_than_six_slots_is_a_sentence():
    points = LinearVP().points(9)
    far = [Decision(min(i + 1, 9), corrector=Corrector()) for i in range(9)]
    with pytest.raises(ValueError, match="at most 6 tensors"):
        usf_table(points, far)


def test_a_free_first_step_calls_no_model():
    table = usf_table(POINTS, [Decision(order=min(i + 1, 2)) for i in range(6)], first_free=True)
    assert table.evaluates.tolist() == [False] + [True] * 5


def doubled():
    """sigma_min twice at the end, as final_sigmas_type="sigma_min" makes it with sigmas that end there (trap 2)."""
    points = DiscreteVP.linear().points(12, "karras")
    twice = [torch.cat([t[:-1], t[-2:-1]]) for t in points]
    return Points(*twice)


TWICE = [
    ("dpm_solver", {"order": 3}),
    ("dpm_solver", {"order": 3, "exact": True}),
    ("dpm_solver", {"order": 3, "algorithm": "dpmsolver"}),
    ("dpm_solver", {"order": 2, "algorithm": "sde-dpmsolver++"}),
    ("dpm_solver_singlestep", {"order": 3, "lower_order_final": False}),
    ("unipc", {"order": 3}),
    ("unipc", {"order": 3, "lower_order_final": False, "expands": "noise"}),
    ("deis", {"order": 3}),
    ("lms", {"order": 4}),
    ("pndm", {}),
    ("ipndm", {}),
    ("heun", {}),
    ("ddim", {"eta": 1.0}),
    ("ddpm", {}),
    ("euler_ancestral", {}),
]


@pytest.mark.parametrize(("solver", "options"), TWICE)
def test_a_doubled_last_sigma_changes_nothing(solver, options):
    """Trap 2: where diffusers' order 3 gives NaN."""
    points = doubled()
    table = solver_table(solver, points, **options)
    assert isinstance(table, SolverTable)
    assert bool(torch.isfinite(table.coefficients).all())
    lower = {"lower_order_final": False} if solver in ("dpm_solver", "deis") else {}
    if solver in ("dpm_solver", "deis", "lms", "ipndm", "ddim"):  # others' steps differ where there is one more
        whole = solver_table(solver, points, **{**options, **lower})
        short = solver_table(solver, Points(*(t[:-1] for t in points)), **{**options, **lower})
        values = torch.randn(14, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        *_, before, after = run_quiet(whole, values)
        torch.testing.assert_close(after, before, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(run_quiet(short, values)[-1], before, rtol=1e-12, atol=1e-12)


def run_quiet(table, values):
    silent = table.coefficients.clone()
    silent[:, 2, -1] = 0
    quiet = SolverTable(silent, table.store, table.timesteps, table.scale)
    return run(quiet, values[0], values[1:])


def test_a_point_that_comes_twice_in_the_middle_lends_no_slope():
    sigma = torch.tensor([0.98, 0.9, 0.7, 0.7, 0.5, 0.3, 0.1], dtype=torch.float64)
    points = Points(torch.arange(7).double(), (1 - sigma**2).sqrt(), sigma)
    for solver in ("dpm_solver", "unipc", "deis", "lms"):
        table = solver_table(solver, points, order=3)
        assert bool(torch.isfinite(table.coefficients).all())
        assert float(table.coefficients.abs().max()) < 100


@pytest.mark.parametrize("solver", ["dpm_solver", "dpm_solver_singlestep", "unipc"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lowered", [True, False])
def test_a_last_sigma_of_0_ends_with_the_data(solver, order, lowered):
    """Trap 5: the last step is of order 1 in any case, and gives the predicted data."""
    points = DiscreteVP.linear().points(20, "trailing")
    options = {"variant": "bh1"} if solver == "unipc" else {}
    table = solver_table(solver, points, order=order, lower_order_final=lowered, **options)
    last = table.coefficients[-1, 2]
    assert last[8] == 1
    assert int((last != 0).sum()) == 1


def test_data_of_order_2_to_sigma_0_are_a_sentence():
    points = DiscreteVP.linear().points(3, "trailing")
    with pytest.raises(ValueError, match="step 2: expected some noise after a step of order 2"):
        usf_table(points, [Decision(), Decision(2), Decision(2)])


def test_orders_are_lowered_below_15_steps_only():
    """Trap 5: as published; UniPC lowers them always."""
    for steps, expected in ((14, True), (15, False)):
        points = DiscreteVP.linear().points(steps, "linspace", final="min")
        default = solver_table("dpm_solver", points, order=3)
        always = solver_table("dpm_solver", points, order=3, lower_order_final=True)
        assert bool((default.coefficients == always.coefficients).all()) == expected
        unipc = solver_table("unipc", points, order=3)
        assert bool(
            (unipc.coefficients == solver_table("unipc", points, order=3, lower_order_final=True).coefficients).all()
        )


def test_unipc_keeps_data_of_the_predicted_sample_and_starts_from_the_corrected():
    """Trap 9: the row "converted" takes x as it came, "corrected" starts from what the step before corrected."""
    table = solver_table("unipc", DiscreteVP.linear().points(10, "trailing"), order=2)
    convert, correct, predict = table.coefficients[4]
    assert convert[0] != 0
    assert correct[0] == 0
    assert predict[0] == 0
    assert predict[9] != 0
    assert table.store[4].tolist().count(0) == 0


def test_the_published_third_order_halves_the_second_derivative():
    """Trap 1."""
    points = LinearVP().points(20, "lambda")
    published, exact = (solver_table("dpm_solver", points, order=3, exact=e) for e in (False, True))
    row = 10  # evenly spaced: h^2 f'' = F - 2 F_1 + F_2, and M_2 = alpha h phi_3(-h) of it
    difference = exact.coefficients[row, 2] - published.coefficients[row, 2]
    weights = sorted(difference[difference.abs() > 1e-12].tolist(), key=abs)
    assert weights[0] == pytest.approx(weights[1], rel=1e-6)
    assert weights[2] == pytest.approx(-2 * weights[0], rel=1e-6)
    h = float(points.lam[1] - points.lam[0])
    assert weights[0] == pytest.approx(0.5 * float(points.alpha[row + 1]) * h * phi(3, -h), rel=1e-6)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("dpm_solver", {"order": 4}, "order of 1 to 3, got 4"),
        ("dpm_solver", {"order": 3, "algorithm": "sde-dpmsolver++"}, "order of 1 to 2"),
        ("dpm_solver", {"solver_type": "bh1"}, "midpoint, heun"),
        ("dpm_solver", {"algorithm": "ddim"}, "algorithm"),
        ("dpm_solver", {"algorithm": "dpmsolver", "limit": 1.0}, "where there is a limit"),
        ("dpm_solver", {"prediction": "noise"}, "prediction to be one of"),
        ("unipc", {"order": 6}, "order of 1 to 5"),
        ("unipc", {"variant": "bh3"}, "bh1, bh2"),
        ("ipndm", {"order": 5}, "order of 1 to 4"),
        ("ddim", {"eta": -1.0}, "eta"),
        ("ddim", {"eta": 9.0}, "eta of at most"),
        ("ddpm", {"variance": "large"}, "variance of fixed_small"),
        ("heun", {"churn": 5.0}, "alpha is 1"),
        ("lms", {"order": 0}, "order of 1 or more"),
        ("rk45", {}, "solver to be one of"),
        ("deis", {"eta": 1.0}, "options of deis"),
    ],
)
def test_wrong_options_are_sentences(solver, options, message):
    with pytest.raises(ValueError, match=message):
        solver_table(solver, LinearVP().points(8), **options)


def test_pure_noise_needs_another_prediction_than_epsilon():
    points = Points(
        torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.0, 0.6, 1.0]).double(), torch.tensor([1, 0.8, 0]).double()
    )
    with pytest.raises(ValueError, match="predict v or x0"):
        solver_table("ddim", points)
    for solver in ("ddim", "dpm_solver", "unipc"):
        table = solver_table(solver, points, prediction="v")
        assert table.coefficients[0, 2, 8] != 0
    with pytest.raises(ValueError, match="alpha 0"):
        solver_table("deis", points, prediction="v")


def test_unknown_times_are_sentences():
    schedule = DiscreteVP.linear()
    with pytest.raises(ValueError, match="decreasing times"):
        schedule.points(3, times=[1000, 500, 0])
    with pytest.raises(ValueError, match="decreasing times"):
        schedule.points(3, times=[500, 600, 0])
    with pytest.raises(ValueError, match="expected 3 times for 3 steps"):
        schedule.points(3, times=[500, 0])
    with pytest.raises(ValueError, match="at most 1000 steps"):
        schedule.points(1001)
    with pytest.raises(ValueError, match="spacing of linspace"):
        schedule.points(10, "evenly")
