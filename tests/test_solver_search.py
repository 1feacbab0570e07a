"""The search of schedules: what it finds, that its arguments alone decide it, and that it goes on where it stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcifar.diffusion import (
    Candidate,
    EDMSchedule,
    FoundSchedule,
    GaussianMixture,
    LinearVP,
    SchedulePredictor,
    SearchResult,
    SearchSpace,
    SolverTable,
    sample,
    search_schedule,
)
from fastcifar.diffusion.batched import run_tables
from fastcifar.diffusion.found import table_of
from fastcifar.diffusion.objective import Objective
from fastcifar.diffusion.refine import refine_candidate

START, END = 1.0, 1e-3
VP = LinearVP()
MIXTURE = GaussianMixture.smooth()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


NOISE = normal(24, 16, seed=1)
TARGETS = MIXTURE.solve(NOISE, START, END, tolerance=1e-9)


def search(budget: int = 120, steps: int = 4, **options) -> SearchResult:  # type: ignore[no-untyped-def]
    options = {"noise": NOISE, "targets": TARGETS, "population": 16, "workers": 0, "progress": False} | options
    return search_schedule(MIXTURE.model(), budget, steps, **options)


def trials(result: SearchResult) -> dict:
    return {steps: [trial.record() for trial in found] for steps, found in result.trials.items()}


def drawn(count: int, evaluations: int, seed: int = 0) -> list[Candidate]:
    rng, space = np.random.default_rng(seed), SearchSpace()
    found = [space.draw(evaluations, [[0.0, 1.0]], rng) for _ in range(count)]
    children = [space.child(c, found[int(rng.integers(count))], rng) for c in found]
    return [
        child if child.fits() else replace(child, back=(0,) * len(child), prediction=("data",) * len(child))
        for child in children
    ]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What is computed here is small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Programs


def by_hand(candidate: Candidate, x: Tensor) -> Tensor:
    """USF's update for one candidate, each sample, prediction and derivative a tensor."""
    ends = VP.lam(torch.tensor([START, END], dtype=torch.float64))
    table = table_of(candidate, VP, START, END)
    times = torch.cat([table.timesteps, torch.tensor([END], dtype=torch.float64)])
    alpha, sigma, lam = VP.alpha(times), VP.sigma(times), VP.lam(times)
    # The points are where the candidate says.
    position = torch.tensor(candidate.position, dtype=torch.float64)
    torch.testing.assert_close(lam[:-1], ends[0] + position * (ends[1] - ends[0]), rtol=0, atol=1e-9)
    samples, values = [x], {"data": [], "noise": []}  # type: ignore[var-annotated]

    def update(start: int, end: int, kind: str, others: list[int], relaxation: float) -> Tensor:
        h = lam[end] - lam[start]
        z = h if kind == "noise" else -h
        functions = [torch.expm1(z) / z]
        for k in range(1, len(others) + 1):
            functions.append((functions[-1] - 1 / math.factorial(k)) / z)
        value = values[kind]
        total = h * functions[0] * value[start]
        if others:
            distance = lam[others] - lam[start]
            system = torch.stack([distance**i / math.factorial(i) for i in range(1, len(others) + 1)])
            differences = torch.stack([value[j] - value[start] for j in others])
            for d in range(1, len(others) + 1):
                weights = torch.linalg.solve(system, torch.eye(len(others), dtype=torch.float64)[d - 1])
                derivative = torch.einsum("j,jnd->nd", weights, differences)
                factor = 1 + relaxation * h if d == 1 else 1
                total = total + factor * h ** (d + 1) * functions[d] * derivative
        if kind == "noise":
            return alpha[end] / alpha[start] * samples[start] - sigma[end] * total
        return sigma[end] / sigma[start] * samples[start] + alpha[end] * total

    c = candidate
    for i in range(len(c)):
        free = i == 0 and c.first_free
        data = torch.zeros_like(x) if free else MIXTURE.predict(samples[i], alpha[i], sigma[i], "x0")
        values["data"].append(data)
        values["noise"].append((samples[i] - alpha[i] * data) / sigma[i])
        if i and c.corrector[i - 1]:
            start = i - 1 - c.back[i - 1]
            others = [j for j in range(i - 1, -1, -1) if j != start][: c.order[i - 1] - 1]
            samples[i] = update(start, i, c.prediction[i - 1], [i, *others], c.corrector_relaxation[i - 1])
        start = i - c.back[i]
        others = [j for j in range(i, -1, -1) if j != start][: c.order[i] - 1]
        samples.append(update(start, i + 1, c.prediction[i], others, c.relaxation[i]))
    return samples[-1]


@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
def test_programs_are_the_update_by_hand(prediction: str) -> None:
    x = NOISE[:4]
    for evaluations in (1, 3, 6):
        for candidate in drawn(6, evaluations, seed=evaluations):
            table = table_of(candidate, VP, START, END, prediction)
            assert int(table.evaluates.sum()) == evaluations
            got = run_tables(MIXTURE.model(prediction), [table], x)[0]
            torch.testing.assert_close(got, by_hand(candidate, x), rtol=1e-9, atol=1e-9)


def test_solvers_of_one_build_are_made_and_run_as_one() -> None:
    first = replace(drawn(1, 5)[0], first_free=False)
    space = SearchSpace()
    alike = [space.valid(replace(first, position=tuple(p * s for p in first.position))) for s in (1.0, 0.9, 0.8)]
    others = drawn(3, 4)
    candidates = [alike[0], *others, *alike[1:]]
    calls = 0

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        assert t.shape == (len(x),)
        return MIXTURE.model()(x, t)

    tables = [table_of(c, VP, START, END) for c in candidates]
    together = run_tables(model, tables, NOISE)
    assert calls == 5 + 3 * 4
    alone = torch.stack([sample(MIXTURE.model(), NOISE, table) for table in tables])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_a_candidate_of_too_many_values_does_not_fit_and_is_not_tried() -> None:
    none = (0.0,) * 6
    candidate = Candidate(
        tuple(i / 6 for i in range(6)),
        (1, 2, 3, 4, 4, 4),
        ("noise", "data") * 3,
        none,
        (True,) * 5 + (False,),
        none,
        (0, 1, 2, 2, 2, 2),
    )
    assert not candidate.fits()
    with pytest.raises(ValueError, match="two tensors"):
        table_of(candidate, VP, START, END)
    assert all(trial.candidate.fits() for trial in search(64, steps=6, refine=0.0).trials[6])


# The search


def test_the_search_beats_random_candidates_with_as_many_evaluations() -> None:
    found = search(160)[4]
    objective = Objective(MIXTURE.model(), "epsilon", VP, START, END, NOISE, TARGETS)
    rng, space = np.random.default_rng(0), SearchSpace()
    random = [space.draw(4, objective.bases(), rng) for _ in range(160)]
    random = [candidate for candidate in random if candidate.fits()]
    errors = objective.errors(random)
    assert found.error < 0.5 * min(errors)
    # On noise that it has not seen, too.
    noise = normal(64, 16, seed=2)
    targets = MIXTURE.solve(noise, START, END, tolerance=1e-8)
    unseen = Objective(MIXTURE.model(), "epsilon", VP, START, END, noise, targets)
    best = min(zip(errors, random, strict=True), key=lambda pair: pair[0])[1]
    assert unseen.errors([found.candidate])[0] < 0.5 * unseen.errors([best])[0]


def test_evolution_and_the_predictor_bring_something() -> None:
    """Median over seeds, of equal budgets and without refinement."""
    options = {"random": {"population": 96}, "evolution": {"predictor": None}, "predicted": {}}
    errors = {
        name: sorted(search(96, refine=0.0, seed=seed, **given)[4].error for seed in range(3))[1]
        for name, given in options.items()
    }
    assert errors["predicted"] < errors["random"]
    assert errors["evolution"] < errors["random"]


def test_the_seed_decides() -> None:
    first, again, other = search(seed=3), search(seed=3), search(seed=4)
    assert trials(first) == trials(again)
    assert trials(first) != trials(other)


class LastFirst(Executor):
    """Runs what it was given in reverse, when the first result is asked for."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future, Callable, tuple]] = []

    def submit(self, call, /, *arguments):  # type: ignore[no-untyped-def]
        executor, future = self, Future()  # type: ignore[var-annotated]

        class Late(Future):
            def result(self, timeout=None):  # type: ignore[no-untyped-def]
                while executor.waiting:
                    inner, function, values = executor.waiting.pop()
                    inner.set_result(function(*values))
                return future.result(timeout)

        self.waiting.append((future, call, arguments))
        return Late()


@pytest.mark.parametrize("make", [LastFirst, lambda: ThreadPoolExecutor(2)], ids=["last first", "threads"])
def test_the_executor_does_not_decide(make: Callable[[], Executor]) -> None:
    assert trials(search(executor=make())) == trials(search())


def test_neither_does_a_pool_of_processes() -> None:
    assert trials(search(80, workers=2)) == trials(search(80))


@pytest.mark.filterwarnings("ignore")  # of the cluster's own shutdown
def test_nor_a_cluster() -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        found = search(40, executor=client.get_executor())
    assert trials(found) == trials(search(40))


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = search(160, [2, 3], state=tmp_path / "whole.json")
    saved = json.loads((tmp_path / "whole.json").read_text())
    assert [trial["stage"] for trial in saved["trials"]["3"][-4:]] == ["child", *["refined"] * 3]
    path = tmp_path / "part.json"
    for steps, kept in (("2", 16), ("3", 48), ("3", -1)):
        part = json.loads(json.dumps(saved))
        part["trials"][steps] = part["trials"][steps][:kept]
        if steps == "2":
            del part["trials"]["3"]
        path.write_text(json.dumps(part))
        assert trials(search(160, [2, 3], state=path)) == trials(whole)
        assert json.loads(path.read_text()) == saved


def test_an_interruption_leaves_the_last_generation(tmp_path: Path) -> None:
    calls, path = 0, tmp_path / "state.json"

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 100:
            raise KeyboardInterrupt
        return MIXTURE.model()(x, t)

    options = {"noise": NOISE, "targets": TARGETS, "population": 16, "workers": 0, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        search_schedule(model, 120, 4, state=path, **options)  # type: ignore[arg-type]
    assert len(json.loads(path.read_text())["trials"]["4"]) % 16 == 0
    calls = 101
    resumed = search_schedule(model, 120, 4, state=path, **options)  # type: ignore[arg-type]
    assert trials(resumed) == trials(search())


def test_a_state_of_another_search_is_refused(tmp_path: Path) -> None:
    search(20, state=tmp_path / "state.json")
    with pytest.raises(ValueError, match="with seed 0 and not 1"):
        search(20, state=tmp_path / "state.json", seed=1)


def test_the_budget_is_kept_and_the_bar_counts(capsys: pytest.CaptureFixture) -> None:
    for budget in (1, 7, 100, 333):
        result = search(budget, progress=budget == 100)
        found = result.trials[4]
        assert found[-1].used <= budget
        assert sum(trial.stage != "refined" for trial in found) == budget - budget // 2
        assert found[-1].used > 0.8 * budget or budget < 100
    assert "4 evaluations" in capsys.readouterr().err


def test_many_steps_are_the_target_where_none_is_given() -> None:
    noise = NOISE[:8]
    options = {"noise": noise, "population": 16, "workers": 0, "progress": False}
    by_steps = search_schedule(MIXTURE.model(), 32, 4, refine=0.0, **options)  # type: ignore[arg-type]
    exact = search_schedule(MIXTURE.model(), 32, 4, refine=0.0, targets=TARGETS[:8], **options)  # type: ignore[arg-type]
    assert by_steps[4].error == pytest.approx(exact[4].error, rel=0.02)


def test_other_schedules_will_do() -> None:
    """Noise of standard deviation 80, and a model that is called with sigma."""
    edm = EDMSchedule()
    targets = MIXTURE.solve(80 * NOISE, edm.first, edm.last, edm, tolerance=1e-9)
    found = search_schedule(
        MIXTURE.model("x0", edm),
        120,
        6,
        noise=NOISE,
        targets=targets,
        schedule=edm,
        prediction="x0",
        population=16,
        workers=0,
        progress=False,
    )[6]
    assert found.error < 0.1
    samples = sample(MIXTURE.model("x0", edm), NOISE, found.table(edm, "x0"))
    assert float((samples - targets).square().mean(1).sqrt().mean()) == pytest.approx(found.error, rel=1e-6)


def test_any_fitness_will_do() -> None:
    def spread(samples: Tensor) -> float:
        assert samples.shape == NOISE.shape
        return float((samples.std() - 0.5).abs())

    result = search(64, targets=None, fitness=spread)
    assert {trial.stage for trial in result.trials[4]} == {"drawn", "child"}
    samples = sample(MIXTURE.model(), NOISE, result[4].table())
    assert spread(samples) == pytest.approx(result[4].error, rel=1e-6)


def test_a_score_and_single_precision_will_do() -> None:
    options = {"targets": TARGETS.float(), "population": 16, "workers": 0, "progress": False}
    found = search_schedule(
        MIXTURE.model("score"),
        120,
        4,
        noise=NOISE.float(),
        prediction="score",
        **options,  # type: ignore[arg-type]
    )[4]
    double = Objective(MIXTURE.model(), "epsilon", VP, START, END, NOISE, TARGETS)
    assert double.errors([found.candidate])[0] == pytest.approx(found.error, rel=1e-2)


def test_the_space_is_kept() -> None:
    space = SearchSpace({1: 0.5, 2: 0.5}, ["data"], correctors=False, singlesteps=False, free_first=False)
    for trial in search(96, space=space).trials[4]:
        c = trial.candidate
        assert max(c.order) <= 2
        assert set(c.prediction) == {"data"}
        assert not any(c.corrector)
        assert not any(c.back)
        assert not c.first_free
        assert all(np.diff([*c.position, 1.0]) > 0)


def test_refinement_counts_and_lowers() -> None:
    objective = Objective(MIXTURE.model(), "epsilon", VP, START, END, NOISE, TARGETS)
    candidate = replace(drawn(1, 4)[0], first_free=False)
    before = objective.errors([candidate])[0]
    few, many = (refine_candidate(objective.residuals, candidate, n) for n in (2, 12))
    assert before > few.error > many.error
    assert objective.errors([many.candidate])[0] == pytest.approx(many.error, rel=1e-9)
    assert many.candidate.build == candidate.build
    with pytest.raises(ValueError, match="finite"):
        refine_candidate(lambda c: torch.full((len(c), 2, 3), math.nan), candidate, 1)


def test_schedules_and_results_survive_a_file(tmp_path: Path) -> None:
    result = search(64, steps=[2, 4])
    assert result.pareto() == [(2, result[2].error), (4, result[4].error)]
    found = result.best
    assert found == result[4]
    found.save(tmp_path / "found.json")
    again = FoundSchedule.load(tmp_path / "found.json")
    assert again == found
    table = again.table()
    assert torch.equal(table.coefficients, found.table().coefficients)
    table.save(tmp_path / "table.json")
    assert torch.equal(SolverTable.load(tmp_path / "table.json").coefficients, table.coefficients)
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "plot.png", {"other": {2: 1.0, 4: 0.5}})
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_candidate_that_diverges_is_infinitely_bad() -> None:
    objective = Objective(lambda x, t: x * math.inf, "epsilon", VP, START, END, NOISE, TARGETS)
    assert objective.errors(drawn(2, 3)) == [math.inf, math.inf]
    result = search_schedule(
        lambda x, t: x * math.nan, 40, 3, noise=NOISE, targets=TARGETS, population=16, workers=0, progress=False
    )
    assert result[3].error == math.inf


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps of 1 or more"),
        ({"steps": [4, 4]}, ValueError, "different steps"),
        ({"budget": 0}, ValueError, "budget"),
        ({"population": 1}, ValueError, "population of 2"),
        ({"noise": NOISE.half()}, ValueError, "float32 or float64"),
        ({"noise": NOISE[:0]}, ValueError, r"noise \[N"),
        ({"targets": TARGETS[:3]}, ValueError, "targets like noise"),
        ({"prediction": "eps"}, ValueError, "prediction"),
        ({"refine": 1.0}, ValueError, "refine"),
        ({"fitness": float}, ValueError, "beside a fitness"),
        ({"start": 1e-3, "end": 1.0}, ValueError, "alpha / sigma grows"),
        ({"end": 0.0}, ValueError, "is finite"),
        ({"schedule": 3}, TypeError, "Schedule"),
        ({"executor": LastFirst(), "targets": None, "fitness": lambda samples: 0.0}, TypeError, "pickled"),
        ({"space": 3}, TypeError, "SearchSpace"),
    ],
)
def test_bad_input(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        search(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SearchSpace({5: 1.0}), "orders of 1 to 4"),
        (lambda: SearchSpace(predictions=["v"]), "noise, data"),
        (lambda: SearchSpace(mutation=1.5), "probabilities"),
        (lambda: SearchSpace(position_sigma=-1.0), "sigmas"),
        (lambda: SchedulePredictor().score(torch.zeros(1, 1)), "before score"),
        (lambda: SchedulePredictor().fit(torch.zeros(1, 1), torch.zeros(1), 0), "at least two"),
        (lambda: FoundSchedule.load("nowhere"), "expected a file, or one of"),
        (lambda: search(20)[9], "steps of"),
    ],
)
def test_bad_parts(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
