"""Tables of steps, and runs of them in place."""

from __future__ import annotations

import math

import pytest
import torch

from fastcifar import _library
from fastcifar.diffusion import (
    SolverRun,
    SolverTable,
    normal_numbers,
    solver_step,
)
from fastcifar.diffusion.spec import MULTISTEP, program

needs_kernel = pytest.mark.skipif(_library.WHY_NO_EXTENSION is not None, reason="the extension is not built")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _random(shape, dtype=torch.float32, seed=0, count=9):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def _rows(coefficients):
    return torch.as_tensor(coefficients, dtype=torch.float64)


def _table(*rows, store=None, **options):
    steps = len(rows)
    slots = torch.zeros(steps, 2, dtype=torch.int64) if store is None else torch.tensor(store)
    numbers = torch.zeros(steps, dtype=torch.float64), torch.ones(steps, dtype=torch.float64)
    return SolverTable(torch.stack([_rows(r) for r in rows]), slots, *numbers, **options)


FIRST = program(convert={"x": 1.25, "output": -0.75}, predict={"x": 0.7, "converted": 0.3})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (4, 3, 32, 33)])
def test_a_run_equals_the_steps(shape, dtype):
    x, *outputs, z = _random(shape, dtype, count=5)
    second = program(
        convert={"x": 1.2, "output": -0.6}, correct={"x": 1.0}, predict={"x": 0.6, "converted": 0.5, "h1": -0.1}
    )
    third = program(convert={"x": 1.0}, predict={"h1": 0.5, "h2": 0.2, "converted": 0.4, "noise": 0.3})
    table = _table(FIRST, second, third, store=[[1, 0], [1, 2], [0, 0]], limit=1.5)
    run = SolverRun(table, x)
    one = solver_step(x, outputs[0], (), FIRST, limit=1.5)
    two = solver_step(one.x_next, outputs[1], (one.converted,), second, limit=1.5)
    kept = (two.converted, two.corrected)
    expected = [one, two, solver_step(two.x_next, None, kept, third, z, limit=1.5)]
    view = run.x
    for i, step in enumerate(expected):
        run.step(outputs[i] if i < 2 else None, noise=z if i == 2 else None)
        torch.testing.assert_close(run.x, step.x_next, rtol=0, atol=0)
    assert run.x is view
    torch.testing.assert_close(run.kept(2), two.corrected, rtol=0, atol=0)
    with pytest.raises(IndexError, match="no more than 3 steps"):
        run.step()


def test_a_run_draws_its_noise_by_seed():
    x = torch.randn(2, 3, 40, 40)
    noisy = program(predict={"x": 1.0, "noise": 0.5})
    table = _table(noisy, noisy)
    runs = [SolverRun(table, x, seed=seed) for seed in (5, 5, 6)]
    for run in runs:
        run.step()
        run.step()
    assert torch.equal(runs[0].x, runs[1].x)
    assert not torch.equal(runs[0].x, runs[2].x)
    drawn = [normal_numbers(5, x.numel(), stream=s).view(x.shape) for s in (0, 1)]
    torch.testing.assert_close(runs[0].x, x + 0.5 * drawn[0] + 0.5 * drawn[1], rtol=0, atol=1e-6)
    torch.manual_seed(0)
    first = SolverRun(table, x)
    torch.manual_seed(0)
    again = SolverRun(table, x)
    first.step(), again.step()
    assert torch.equal(first.x, again.x)


def test_guidance_in_a_run():
    x, output, uncond = _random((2, 9), count=3)
    run = SolverRun(_table(FIRST), x, guidance=7.5)
    run.step(output, uncond=uncond)
    expected = solver_step(x, output, (), FIRST, None, uncond, 7.5)
    torch.testing.assert_close(run.x, expected.x_next, rtol=0, atol=0)


def test_bad_runs():
    table = _table(FIRST)
    with pytest.raises(TypeError, match="expected table to be a SolverTable"):
        SolverRun(FIRST, torch.ones(2, 3))
    with pytest.raises(TypeError, match="expected x to be a tensor in float32"):
        SolverRun(table, torch.ones(2, 3).long())
    with pytest.raises(RuntimeError, match="requires no gradient"):
        SolverRun(table, torch.ones(2, 3)).step(torch.ones(2, 3, requires_grad=True))
    with pytest.raises(ValueError, match=r"expected tensors for the slots \[\], got \[1\]"):
        SolverRun(table, torch.ones(2, 3), preload={1: torch.ones(2, 3)})


@needs_kernel
@pytest.mark.parametrize("output", [None, torch.ones(3), torch.ones(2, 3).double()], ids=["none", "size", "dtype"])
def test_a_run_refuses_what_does_not_fit(output):
    with pytest.raises(RuntimeError, match="solver_table_step: expected"):
        SolverRun(_table(FIRST), torch.ones(2, 3)).step(output)


def test_tables_refuse_what_is_no_program():
    good = _table(FIRST, FIRST)
    with pytest.raises(ValueError, match="reads slot 1, which no step before it has written"):
        _table(MULTISTEP)
    with pytest.raises(ValueError, match="expected finite coefficients, got 'solver' with others in step 1"):
        _table(FIRST, program(predict={"x": math.nan}))
    with pytest.raises(ValueError, match="expected converted to use inputs only"):
        _table(program(convert={"noise": 1.0}))
    with pytest.raises(ValueError, match="expected slots of 1 to 6"):
        _table(FIRST, store=[[7, 0]])
    with pytest.raises(ValueError, match=r"expected store \[1, 2\]"):
        _table(FIRST, store=[[1, 0], [0, 0]])
    assert good.slots == 0
    assert good.evaluates.all()
    assert not good.noisy.any()


def test_tables_are_saved_in_full(tmp_path):
    table = _table(program(predict={"x": 1 / 3, "output": math.pi}), limit=1.0, name="mine", init_scale=2.5)
    table.save(tmp_path / "table.json")
    loaded = SolverTable.load(tmp_path / "table.json")
    for name in ("coefficients", "store", "timesteps", "scale"):
        assert torch.equal(getattr(loaded, name), getattr(table, name))
    assert (loaded.limit, loaded.init_scale, loaded.name) == (1.0, 2.5, "mine")
