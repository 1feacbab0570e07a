"""What is special of solver_step: programs of many kinds, layouts, in-place forms, gradients to the coefficients,
counted noise, thresholding, tables. The matrix that all ops share is in conformance.py."""

from __future__ import annotations

import math

import pytest
import torch

from fastcifar import _library
from fastcifar.diffusion import (
    Step,
    dynamic_threshold,
    normal_numbers,
    reference,
    solver_step,
)
from fastcifar.diffusion.spec import ANCESTRAL, DDIM, MULTISTEP, UNIPC, program

needs_kernel = pytest.mark.skipif(_library.WHY_NO_EXTENSION is not None, reason="the extension is not built")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAN, INF = math.nan, math.inf
# Whole groups of registers, tails, one block and more.
SHAPES = ((1, 1), (2, 3, 5, 7), (3, 64), (2, 4097), (5, 3, 32, 32))


def _random(shape, dtype=torch.float32, seed=0, count=9):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def _rows(coefficients):
    return torch.as_tensor(coefficients, dtype=torch.float64)


def _random_program(seed, samples=None):
    """Every term that a row may have, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 11) if samples is None else (samples, 3, 11)
    rows = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows[torch.rand(shape, generator=generator) < 0.3] = 0.0
    rows[..., 0, 8:] = 0
    rows[..., 1, 9:] = 0
    return rows


def _isas(each_isa, check):
    each_isa(check) if _library.WHY_NO_EXTENSION is None else check(None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_terms_equal_the_reference_to_the_bit(shape, dtype, each_isa):
    x, output, uncond, noise, *history = _random(shape, dtype, count=10)
    problems = []
    for seed in range(6):
        for samples in (None, shape[0]):
            rows = _random_program(seed, samples)
            options = {"guidance": 1.0 + seed, "limit": None if seed % 2 else 0.7}
            given = uncond if seed % 3 else None
            expected = reference.solver_step(x, output, history, rows, noise, given, **options)

            def check(isa, rows=rows, given=given, options=options, expected=expected):
                made = solver_step(x, output, history, rows, noise, given, **options, wanted=Step._fields)
                for name, ours, theirs in zip(Step._fields, made, expected, strict=True):
                    if not torch.equal(ours, theirs):
                        problems.append((isa, name, rows.dim(), options))

            _isas(each_isa, check)
    assert not problems


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "channel slice": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "sliced": lambda t: torch.stack((t, t), -1)[..., 0],
    "batch innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_layouts(layout, per_sample):
    x, output, noise, *history = (LAYOUTS[layout](t) for t in _random((3, 4, 6, 5), count=9))
    rows = _random_program(1, 3 if per_sample else None)
    made = solver_step(x, output, history, rows, noise, wanted=Step._fields)
    for ours, theirs in zip(made, reference.solver_step(x, output, history, rows, noise), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    if layout in ("channels_last", "channel slice"):
        assert made.x_next.stride()[1:] == x.stride()[1:], "the order of dimensions is kept"
    mixed = solver_step(x, output.contiguous(), history, rows, noise.contiguous(), wanted=Step._fields)
    torch.testing.assert_close(mixed.x_next, made.x_next, rtol=0, atol=0)


def test_no_samples():
    x = torch.empty(0, 3)
    assert solver_step(x, None, (), torch.zeros(0, 3, 11)).x_next.shape == (0, 3)
    assert solver_step(torch.empty(0), None, (), program(predict={"x": 1.0})).converted is None


def test_what_has_no_coefficient_is_not_read():
    x, kept = _random((2, 3, 4), count=2)
    spoilt = torch.full_like(x, NAN)
    rows = program(predict={"x": 1.0, "h2": 0.5})
    expected = x + 0.5 * kept
    made = solver_step(x, spoilt, (spoilt, kept, None), rows, spoilt)
    torch.testing.assert_close(made.x_next, expected, rtol=0, atol=0)
    assert made.converted is None
    assert made.corrected is None
    each = torch.stack((_rows(rows), _rows(program(predict={"x": 1.0, "output": 1.0}))))
    made = solver_step(x, spoilt, (spoilt, kept), each)
    torch.testing.assert_close(made.x_next[0], expected[0], rtol=0, atol=0)
    assert made.x_next[1].isnan().all()


def test_nan_and_infinity_pass_as_in_torch():
    x = torch.tensor([[NAN, INF, -INF, 2.0, -0.0]])
    made = solver_step(x, None, (), program(convert={"x": 1.0}, predict={"converted": 1.0}), limit=1.0)
    expected = x.clamp(-1, 1)
    torch.testing.assert_close(made.converted, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(made.x_next, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [DDIM, MULTISTEP, UNIPC, ANCESTRAL], ids=["ddim", "multistep", "unipc", "ancestral"])
def test_out_may_be_what_is_read(rows):
    x, output, h1, h2, noise = _random((3, 5, 7), count=5)
    expected = solver_step(x, output, (h1, h2), rows, noise, limit=2.0)
    results = Step(x.clone(), None, None)
    kept = h1.clone(), h2.clone()
    if expected.converted is not None:
        results = results._replace(converted=kept[0])
    if expected.corrected is not None:
        results = results._replace(corrected=kept[1])
    # x and both kept tensors are overwritten in the pass that reads them.
    made = solver_step(results.x_next, output, kept, rows, noise, limit=2.0, out=results)
    assert made.x_next is results.x_next
    for ours, theirs in zip(made, expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_out_may_be_half_of_a_wider_buffer():
    x, output = _random((3, 2, 4, 4), count=2)
    rows = program(predict={"x": 0.5, "output": 2.0})
    wide = torch.zeros(3, 4, 4, 4)
    wide[:, :2] = x
    wide[:, 2:] = 7.0
    solver_step(wide[:, :2], output, (), rows, out=wide[:, :2])
    torch.testing.assert_close(wide[:, :2], 0.5 * x + 2 * output, rtol=0, atol=0)
    assert (wide[:, 2:] == 7).all()


def test_out_refuses_gradients_and_other_shapes():
    x = torch.ones(2, 3, requires_grad=True)
    rows = program(predict={"x": 2.0})
    with pytest.raises(RuntimeError, match="expected no gradient to be required with out"):
        solver_step(x, None, (), rows, out=torch.empty(2, 3))
    with torch.no_grad():
        assert (solver_step(x, None, (), rows, out=torch.empty(2, 3)).x_next == 2).all()
    with pytest.raises(ValueError, match=r"expected out like x \(2, 3\)"):
        solver_step(x.detach(), None, (), rows, out=torch.empty(3, 2))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("limit", [None, 0.8])
def test_gradients_of_all_tensors_and_coefficients(samples, limit):
    tensors = _random((2, 3, 5), torch.float64, count=10)
    x, output, uncond, noise, *history = (t.requires_grad_() for t in tensors)
    rows = _random_program(3, samples).requires_grad_()

    def function(rows, x, output, uncond, noise, *history):
        return tuple(solver_step(x, output, history, rows, noise, uncond, 2.5, limit, wanted=Step._fields))

    arguments = (rows, x, output, uncond, noise, *history)
    # The perturbed rows must stay triangular: mask what a row may not use.
    mask = torch.zeros(3, 11, dtype=torch.float64)
    mask[0, :8], mask[1, :9], mask[2] = 1, 1, 1
    assert torch.autograd.gradcheck(lambda rows, *rest: function(rows * mask, *rest), arguments, atol=1e-6)
    ours = torch.autograd.grad([r.square().sum() for r in function(*arguments)], arguments)
    theirs = reference.solver_step(x, output, history, rows, noise, uncond, 2.5, limit)
    theirs = torch.autograd.grad([r.square().sum() for r in theirs], arguments)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a * (mask if a is ours[0] else 1), b * (mask if b is theirs[0] else 1))


def test_a_coefficient_of_zero_has_a_derivative_too():
    x, output = _random((2, 3), torch.float64, count=2)
    rows = _rows(program(predict={"x": 1.0})).requires_grad_()
    solver_step(x, output, (), rows).x_next.sum().backward()
    torch.testing.assert_close(rows.grad[2, :2], torch.stack((x.sum(), output.sum())))


def test_gradients_in_the_layout_of_slices_and_channels_last():
    for layout in ("channels_last", "channel slice", "batch innermost"):
        x, output, noise, h1, h2 = (LAYOUTS[layout](t) for t in _random((3, 4, 6, 5), count=5))
        given = [t.detach().requires_grad_() for t in (x, output, noise, h1, h2)]
        rows = _random_program(5)
        rows[:, 4:8] = 0
        loss = solver_step(given[0], given[1], given[3:], rows, given[2]).x_next.square().sum()
        ours = torch.autograd.grad(loss, given)
        loss = reference.solver_step(given[0], given[1], given[3:], rows, given[2]).x_next.square().sum()
        for a, b in zip(ours, torch.autograd.grad(loss, given), strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_do_not_depend_on_threads(threads):
    x, output = _random((4, 3, 64, 64), count=2)
    rows = _rows(DDIM).requires_grad_()
    found = []
    for count in (1, 2):
        threads(count)
        found.append(torch.autograd.grad(solver_step(x, output, (), rows, limit=1.0).x_next.square().sum(), rows)[0])
    assert torch.equal(*found)


@needs_kernel
def test_second_derivatives_are_refused():
    x = torch.ones(2, 3, requires_grad=True)
    rows = _rows(program(predict={"x": 2.0})).requires_grad_()
    (grad,) = torch.autograd.grad(solver_step(x, None, (), rows).x_next.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_numbers_are_the_references(each_isa):
    for seed, stream, n in ((0, 0, 1), (1, 0, 64), (2**62 + 12345, 7, 1000), (-5, 2**40 + 3, 4097)):
        expected = reference.normal_numbers(seed, stream, n)

        def check(isa, seed=seed, stream=stream, n=n, expected=expected):
            numbers = normal_numbers(seed, n, stream=stream)
            torch.testing.assert_close(numbers, expected, rtol=3e-6, atol=3e-7, msg=lambda m: f"{isa}: {m}")

        _isas(each_isa, check)


@needs_kernel
def test_numbers_are_equal_to_the_bit_for_all_instruction_sets_and_threads(each_isa, threads):
    found = []
    for count in (1, 2):
        threads(count)
        each_isa(lambda isa: found.append(normal_numbers(3, 100_003, stream=5)))
    assert all(torch.equal(found[0], other) for other in found)


def test_numbers_are_standard_normal_and_independent():
    from scipy import stats

    n = 2**20
    z, other, next_step = (
        normal_numbers(11, n).double(),
        normal_numbers(12, n).double(),
        normal_numbers(11, n, stream=1),
    )
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4
    for lag in (1, 2, 16, 32, 48, 64):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(n), lag
    for stranger in (other, next_step):
        assert abs((z * stranger).mean()) < 5 / math.sqrt(n)
    tails = (z.abs() > 4).sum().item()
    assert abs(tails - 6.334e-5 * n) < 5 * math.sqrt(6.334e-5 * n)
    assert 4.5 < z.abs().max() < 5.78


@pytest.mark.parametrize("shape", [(2, 3), (3, 1000), (2, 3, 32, 33), (5, 7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_drawn_noise_is_the_numbers(shape, dtype, threads):
    (x,) = _random(shape, dtype, count=1)
    rows = program(predict={"x": 0.5, "noise": 0.25})
    z = normal_numbers(9, x.numel(), stream=4).view(shape).to(dtype)
    expected = solver_step(x, None, (), rows, z).x_next
    for count in (1, 2):
        threads(count)
        made = solver_step(x, None, (), rows, seed=9, stream=4).x_next
        if dtype == torch.bfloat16:  # given noise was rounded, drawn noise was not
            torch.testing.assert_close(made, expected, rtol=1e-2, atol=1e-2)
        else:
            torch.testing.assert_close(made, expected, rtol=0, atol=0)
    each = _rows(rows).expand(shape[0], 3, 11).contiguous()
    torch.testing.assert_close(solver_step(x, None, (), each, seed=9, stream=4).x_next, made, rtol=0, atol=0)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(solver_step(strided, None, (), rows, seed=9, stream=4).x_next, made, rtol=0, atol=0)
    tensor = torch.tensor(9)
    torch.testing.assert_close(solver_step(x, None, (), rows, seed=tensor, stream=4).x_next, made, rtol=0, atol=0)


def test_gradients_with_drawn_noise():
    x = torch.randn(2, 100, dtype=torch.float64, requires_grad=True)
    rows = _rows(program(predict={"x": 0.5, "noise": 0.25})).requires_grad_()
    solver_step(x, None, (), rows, seed=3).x_next.sum().backward()
    z = normal_numbers(3, 200).double()
    torch.testing.assert_close(rows.grad[2, [0, 10]], torch.stack((x.detach().sum(), z.sum())))
    assert (x.grad == 0.5).all()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((1.5, 3), TypeError, "expected seed to be an integer"),
        ((2**64, 3), ValueError, "expected a seed of 64 bits"),
        ((1, -1), ValueError, "expected n below"),
        ((torch.zeros(2, dtype=torch.int64), 3), TypeError, "one int64"),
        ((1, 2.0), TypeError, "expected n to be an integer"),
    ],
)
def test_bad_seeds(arguments, error, says):
    with pytest.raises(error, match=says):
        normal_numbers(*arguments)


# ---- dynamic thresholding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 201, 3072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dynamic_threshold_is_torchs_quantile(n, dtype):
    generator = torch.Generator().manual_seed(n)
    x = 3 * torch.randn(5, n, generator=generator, dtype=dtype)
    x[1] = 2.5  # all equal
    x[2, n // 2 :] = 1e4
    for ratio in (0.0, 0.3, 0.5, 0.995, 1.0):
        expected = torch.quantile(x.abs(), ratio, dim=1).clamp(1.0, 50.0)
        torch.testing.assert_close(dynamic_threshold(x, ratio, 50.0), expected, rtol=0, atol=0)


def test_dynamic_threshold_of_odd_values():
    x = torch.tensor([[NAN, 1.0, 2.0], [INF, 1.0, 2.0], [-0.0, 0.0, 0.0], [1e-40, 2e-40, 3.0]])
    ours = dynamic_threshold(x, 0.5, 10.0)
    torch.testing.assert_close(ours, torch.quantile(x.abs(), 0.5, dim=1).clamp(1, 10), equal_nan=True)
    assert dynamic_threshold(torch.empty(0, 3)).shape == (0,)
    half = torch.randn(2, 3, 8, 8).half()
    assert dynamic_threshold(half, 0.9, 5.0).dtype == torch.float32
    for arguments, says in (((torch.ones(2, 0),), "with elements"), ((torch.ones(2, 3), 1.5), "ratio of 0 to 1")):
        with pytest.raises(ValueError, match=says):
            dynamic_threshold(*arguments)


def test_a_thresholded_step():
    x, output = _random((4, 3, 8, 8), count=2)
    rows = _rows(program(convert={"x": 1.5, "output": -0.8}, predict={"x": 0.3, "converted": 0.7}))
    x0 = 1.5 * x - 0.8 * output
    s = dynamic_threshold(x0, 0.9, 3.0)
    each = rows.expand(4, 3, 11).clone()
    each[:, 0] /= s[:, None].double()
    made = solver_step(x, output, (), each, limit=1.0)
    bound = s.view(-1, 1, 1, 1)
    expected = x0.clamp(-bound, bound) / bound
    torch.testing.assert_close(made.converted, expected, rtol=1e-6, atol=1e-6)
