"""The raw kernels of diffusion and of tree search on numpy arrays (fastcifar._host)."""

import math

import numpy as np
import pytest

host = pytest.importorskip("fastcifar._host", reason="fastcifar._host is not built (FASTCIFAR_HOST=1)")

ISAS = host.isas()
by_isa = pytest.mark.parametrize("isa", ISAS)


# Terms as TERMS of fastcifar/diffusion/reference.py: x, output, six kept ones, converted, corrected, noise.
STEP = np.array(
    [
        [1.25, -0.75, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0.3, 0.8, 0, 0, 0, 0.1, -0.1, 0, 0],
        [0.05, 0, -0.2, 0.7, 0, 0, 0.15, 0.1, 0.5, 0.7, 0.25],
    ]
)


def _step_inputs(dtype, n, seed=0):
    """x, output and six kept ones, and noise."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((9, n))
    if dtype == "bfloat16":
        values = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        values = values.astype(dtype)
    return list(values[:8]), values[8]


def _solver_step(isa, dtype, n, **options):
    inputs, noise = _step_inputs(dtype, n)
    results = [np.empty_like(noise) for _ in range(3)]
    if "seed" not in options:
        options["noise"] = noise
    host.solver_step(isa, dtype, STEP, inputs, results, **options)
    return results


@by_isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 17, 1024, 2501])
def test_a_solver_step_equals_numpy_to_the_bit(isa, dtype, n):
    inputs, noise = _step_inputs(dtype, n)
    rows = STEP.astype(dtype)

    def total(row, *made):
        terms = [*inputs, *made]
        sums = [c * t for c, t in zip(rows[row], [*terms, *[None] * (10 - len(terms)), noise], strict=True) if c]
        return sum(sums[1:], sums[0])

    converted = np.clip(total(0), rows.dtype.type(-1), rows.dtype.type(1))
    corrected = total(1, converted)
    expected = converted, corrected, total(2, converted, corrected)
    for ours, right in zip(_solver_step(isa, dtype, n, limit=1.0), expected, strict=True):
        np.testing.assert_array_equal(ours, right)


@by_isa
def test_a_solver_step_in_place_equals_one_beside(isa):
    for dtype in ("float32", "float64", "bfloat16"):
        inputs, noise = _step_inputs(dtype, 1030)
        expected = _solver_step(isa, dtype, 1030)
        given = [t.copy() for t in inputs]
        host.solver_step(isa, dtype, STEP, given, [given[2], given[7], given[0]], noise=noise)
        for i, right in zip((2, 7, 0), expected, strict=True):
            np.testing.assert_array_equal(given[i], right)
        for i in (1, 3, 4, 5, 6):
            np.testing.assert_array_equal(given[i], inputs[i])


def test_solver_steps_have_the_same_bits_for_every_instruction_set():
    for dtype in ("float32", "float64", "bfloat16"):
        for options in ({}, {"limit": 0.5}, {"seed": 3, "stream": 9}):
            first, *others = [_solver_step(isa, dtype, 2501, **options) for isa in ISAS]
            for other in others:
                for a, b in zip(first, other, strict=True):
                    np.testing.assert_array_equal(a, b)


def _solver_backward(isa, dtype, n):
    inputs, noise = _step_inputs(dtype, n)
    grads, *_ = _step_inputs(dtype, n, seed=1)
    to_inputs = [np.empty_like(noise) for _ in range(8)]
    sums = host.solver_backward(isa, dtype, STEP, inputs, grads[:3], to_inputs, noise=noise, limit=1.0)
    return sums, *to_inputs


def test_solver_gradients_have_the_same_bits_for_every_instruction_set():
    for dtype in ("float32", "float64", "bfloat16"):
        first, *others = [_solver_backward(isa, dtype, 2501) for isa in ISAS]
        for other in others:
            for a, b in zip(first, other, strict=True):
                np.testing.assert_array_equal(a, b)


@by_isa
def test_solver_gradients_are_the_chain_rules(isa):
    n = 1500
    inputs, noise = _step_inputs("float64", n)
    (to_converted, to_corrected, to_next, *_), _ = _step_inputs("float64", n, seed=1)
    sums, *to_inputs = _solver_backward(isa, "float64", n)
    unclamped = STEP[0, 0] * inputs[0] + STEP[0, 1] * inputs[1]
    converted = np.clip(unclamped, -1, 1)
    corrected = sum(c * t for c, t in zip(STEP[1], [*inputs, converted], strict=False))
    to_corrected = to_corrected + STEP[2, 9] * to_next
    to_converted = to_converted + STEP[2, 8] * to_next + STEP[1, 8] * to_corrected
    to_converted = np.where(np.abs(unclamped) <= 1, to_converted, 0)
    rows = to_converted, to_corrected, to_next
    for t, ours in enumerate(to_inputs):
        np.testing.assert_allclose(ours, sum(STEP[r, t] * rows[r] for r in range(3)), rtol=1e-12, atol=1e-12)
    terms = [*inputs, converted, corrected, noise]
    for r, given in enumerate(rows):
        for t in range(11):
            exists = t < 8 + r or (r, t) == (2, 10)
            np.testing.assert_allclose(sums[r, t], given @ terms[t] if exists else 0, rtol=1e-10, atol=1e-10)


@by_isa
@pytest.mark.parametrize(("seed", "stream", "first"), [(0, 0, 0), (2**64 - 5, 2**40 + 3, 64), (1, 2, 2**34 + 2**33)])
def test_normal_numbers_are_philox_and_box_muller(isa, seed, stream, first):
    """The words by whole numbers of Python, the transform in float64."""
    out = np.empty(128, np.float32)
    host.normal_numbers(isa, seed, stream, first, out)
    truth = np.empty(128)
    for c in range(32):
        counter = first // 4 + c
        w0, w1, w2, w3 = counter & 0xFFFFFFFF, counter >> 32, stream & 0xFFFFFFFF, stream >> 32
        for turn in range(7):
            k0, k1 = (seed + turn * 0x9E3779B9) & 0xFFFFFFFF, ((seed >> 32) + turn * 0xBB67AE85) & 0xFFFFFFFF
            p0, p1 = w0 * 0xD2511F53, w2 * 0xCD9E8D57
            w0, w1, w2, w3 = p1 >> 32 ^ w1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ w3 ^ k1, p0 & 0xFFFFFFFF
        for j, (a, b) in enumerate(((w0, w1), (w2, w3))):
            radius = math.sqrt(-2 * math.log(((a >> 9) + 0.5) * 2.0**-23))
            angle = ((b >> 8) - 0x200000) * 2.0**-24 * 2 * math.pi
            place = c // 16 * 64 + 32 * j + c % 16
            truth[[place, place + 16]] = radius * math.cos(angle), radius * math.sin(angle)
    np.testing.assert_allclose(out, truth, rtol=3e-6, atol=3e-7)


def test_normal_numbers_have_the_same_bits_for_every_instruction_set_and_start():
    whole = [np.empty(64 * 40, np.float32) for _ in ISAS]
    for isa, out in zip(ISAS, whole, strict=True):
        host.normal_numbers(isa, 7, 1, 0, out)
        np.testing.assert_array_equal(out, whole[0])
        later = np.empty(64 * 3, np.float32)
        host.normal_numbers(isa, 7, 1, 64 * 5, later)
        np.testing.assert_array_equal(later, out[64 * 5 : 64 * 8])


def test_solver_steps_refuse_what_does_not_fit():
    x, out = np.zeros(8, np.float32), np.empty(8, np.float32)
    with pytest.raises(ValueError, match="expected what has a coefficient"):
        host.solver_step("baseline", "float32", STEP, [x], [None, None, out], noise=x)
    with pytest.raises(ValueError, match="expected results to be C-contiguous with 8 elements"):
        host.solver_step("baseline", "float32", STEP, [x] * 8, [None, None, out[:4]], noise=x)
    with pytest.raises(ValueError, match="expected coefficients to be C-contiguous with 33 elements"):
        host.solver_step("baseline", "float32", STEP[:2], [x] * 8, [None, None, out], noise=x)
    with pytest.raises(ValueError, match="expected whole blocks of 64"):
        host.normal_numbers("baseline", 0, 0, 3, out)


def _two_levels(widths):
    """A root with a child for each of ``widths``, which has so many: value, start, count, pool."""
    rng, n = np.random.default_rng(len(widths)), 1 + len(widths) + sum(widths)
    count = np.zeros(n, np.int64)
    count[: 1 + len(widths)] = len(widths), *widths
    return rng.standard_normal(n), np.cumsum(count) - count, count, np.arange(1, n)


@by_isa
@pytest.mark.parametrize("lam", [0.0, 0.5, 30.0])
def test_soft_values_equal_the_formula_in_numpy(isa, lam):
    widths = [1, 2, 7, 8, 9, 255, 256, 257, 600]
    value, start, count, pool = _two_levels(widths)
    expected = value.copy()
    for node in reversed(range(1 + len(widths))):
        v = expected[start[node] + 1 :][: count[node]]  # the children of all nodes follow one another
        expected[node] = v.mean() if lam == 0 else v.max() + np.log(np.exp(lam * (v - v.max())).mean()) / lam
    assert host.tree_soften(isa, value, start, count, pool, lam, np.arange(len(widths), -1, -1))
    np.testing.assert_allclose(value, expected, rtol=1e-13, atol=1e-13)
    assert not host.tree_soften(isa, value, start, count, pool[:5], lam, np.arange(1))


@by_isa
def test_draws_of_children_fall_as_their_weights(isa):
    value, start, count, pool = _two_levels([0] * 300)
    uniform, leaves = (np.arange(100_000) + 0.5)[:, None] / 100_000, np.empty(100_000, np.int64)
    host.tree_sample(isa, value, start, count, pool, 1.5, np.zeros(100_000, np.int64), uniform, leaves)
    shares = np.exp(1.5 * value[1:]) / np.exp(1.5 * value[1:]).sum()
    np.testing.assert_allclose(np.bincount(leaves - 1, minlength=300) / 100_000, shares, atol=1.01e-5)
    assert (np.diff(leaves) >= 0).all()
