"""The raw kernels on numpy arrays (fastcifar._host): no torch between the test and the instructions."""

import math

import numpy as np
import pytest

host = pytest.importorskip("fastcifar._host", reason="fastcifar._host is not built (FASTCIFAR_HOST=1)")

ISAS = host.isas()
LIF = 1  # NeuronId in csrc/cpu/spiking.h
by_isa = pytest.mark.parametrize("isa", ISAS)


def _exp(isa, x):
    out = np.empty_like(x)
    host.exp(isa, x.dtype.name, x, out)
    return out


@by_isa
def test_exp_is_within_its_documented_bound_in_float32(isa):
    rng = np.random.default_rng(0)
    x = np.concatenate([np.linspace(0, 88.7, 400_001), rng.exponential(1, 400_000), 2.0 ** np.arange(-30, 6.4)])
    x = np.concatenate([x, -x, -np.linspace(88, 110, 100_001)]).astype(np.float32)
    truth = np.exp(x.astype(np.float64))
    ulp = np.spacing(truth.astype(np.float32)).astype(np.float64)
    assert (np.abs(_exp(isa, x).astype(np.float64) - truth) / ulp).max() <= 1.5


@by_isa
def test_exp_is_within_its_documented_bound_in_float64(isa):
    rng = np.random.default_rng(0)
    x = np.concatenate([np.linspace(-744, 709.7, 200_001), rng.exponential(1, 50_000), -rng.exponential(1, 50_000)])
    truth = np.exp(x.astype(np.longdouble))  # the x87 format has 64 bits of mantissa
    ulp = np.spacing(truth.astype(np.float64)).astype(np.longdouble)
    assert (np.abs(_exp(isa, x).astype(np.longdouble) - truth) / ulp).max() <= 1.5


@by_isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exp_at_the_ends(isa, dtype):
    x = np.array([0.0, -0.0, -math.inf, math.nan, -1e30, -800.0, math.inf, 1e30, 800.0], dtype)
    out = _exp(isa, x)
    assert out[0] == out[1] == 1
    assert (out[[2, 4, 5]] == 0).all()
    assert np.isnan(out[3])
    assert np.isposinf(out[6:]).all()


def _log(isa, x):
    out = np.empty_like(x)
    host.log(isa, x.dtype.name, x, out)
    return out


@by_isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_log_is_within_its_documented_bound(isa, dtype):
    rng = np.random.default_rng(0)
    near = np.exp(rng.uniform(-1, 1, 200_000)), 1 + rng.exponential(1e-3, 100_000), 1 - rng.uniform(0, 1e-6, 10_000)
    tiny = np.finfo(dtype).tiny
    x = np.concatenate([*near, np.linspace(1, 4096, 100_001), np.exp(rng.uniform(-80, 80, 100_000)), [tiny, 1 / tiny]])
    x = x.astype(dtype)
    truth = np.log(x.astype(np.longdouble))
    ulp = np.spacing(np.abs(truth).astype(dtype)).astype(np.longdouble)
    assert (np.abs(_log(isa, x).astype(np.longdouble) - truth) / ulp).max() <= 2
    assert np.isnan(_log(isa, np.array([math.nan], dtype))).all()
    assert (_log(isa, np.array([1.0], dtype)) == 0).all()


@by_isa
def test_every_float16_widens_exactly(isa):
    bits = np.arange(2**16, dtype=np.uint16)
    out = np.empty(bits.size, np.float32)
    host.convert(isa, "float16", True, bits, out)
    np.testing.assert_array_equal(out, bits.view(np.float16).astype(np.float32))


@by_isa
def test_every_bfloat16_widens_exactly(isa):
    bits = np.arange(2**16, dtype=np.uint16)
    out = np.empty(bits.size, np.float32)
    host.convert(isa, "bfloat16", True, bits, out)
    np.testing.assert_array_equal(out.view(np.uint32), bits.astype(np.uint32) << 16)


def _hard_to_round():
    """Every float16 and bfloat16, the midpoints between neighbours, their neighbours in float32, and random bits."""
    half = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    half = np.sort(half[np.isfinite(half)])
    middle = ((half[1:].astype(np.float64) + half[:-1]) / 2).astype(np.float32)
    brain = ((np.arange(2**16, dtype=np.uint32) << 16) | 0x8000).view(np.float32)
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    near = np.concatenate([half, middle, brain])
    with np.errstate(invalid="ignore", over="ignore"):
        up, down = np.nextafter(near, np.float32(math.inf)), np.nextafter(near, np.float32(-math.inf))
    return np.concatenate([near, up, down, random]).astype(np.float32)


@by_isa
def test_float32_narrows_to_float16_with_one_rounding(isa):
    x = _hard_to_round()
    out = np.empty(x.size, np.uint16)
    host.convert(isa, "float16", False, x, out)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16)
    nan = np.isnan(x)
    np.testing.assert_array_equal(out[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(out.view(np.float16)[nan]).all()


@by_isa
def test_float32_narrows_to_bfloat16_with_one_rounding(isa):
    torch = pytest.importorskip("torch")
    x = _hard_to_round()
    out = np.empty(x.size, np.uint16)
    host.convert(isa, "bfloat16", False, x, out)
    expected = torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()
    nan = np.isnan(x)
    np.testing.assert_array_equal(out[~nan], expected[~nan])
    assert (out[nan] & 0x7FFF > 0x7F80).all()


def _lif(isa, dtype, x, v, stream=False, v_reset=0.0):
    """The forward kernel; x in the storage type."""
    steps, neurons = x.shape
    spikes, v_last = np.empty_like(x), np.empty(neurons, np.float64 if dtype == "float64" else np.float32)
    host.neuron_forward(isa, dtype, LIF, steps, neurons, x, v, spikes, v_last, v_reset=v_reset, stream=stream)
    return spikes, v_last


@by_isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("neurons", [1, 3, 16, 17, 1000, 1025])
def test_lif_equals_the_equations_in_numpy(isa, dtype, neurons):
    rng = np.random.default_rng(neurons)
    x = (rng.standard_normal((6, neurons)) * 2).astype(dtype)
    v = v0 = rng.standard_normal(neurons).astype(dtype)
    expected = []
    for x_t in x:
        h = v + (x_t - v) / np.asarray(2, dtype)
        s = (h >= 1).astype(dtype)
        v = (1 - s) * h
        expected.append(s)
    spikes, v_last = _lif(isa, dtype, x, v0)
    np.testing.assert_array_equal(spikes, expected)
    np.testing.assert_array_equal(v_last, v)


@by_isa
def test_streaming_stores_write_the_same_bits(isa):
    rng = np.random.default_rng(0)
    steps, neurons = 3, 4096
    room = np.empty(steps * neurons + 64, np.float32)
    start = -room.ctypes.data % 64 // 4
    aligned = room[start : start + steps * neurons].reshape(steps, neurons)
    x = rng.standard_normal((steps, neurons)).astype(np.float32) * 2
    v_last = np.empty(neurons, np.float32)
    host.neuron_forward(isa, "float32", LIF, steps, neurons, x, None, aligned, v_last, stream=True)
    plain, plain_v = _lif(isa, "float32", x, None)
    np.testing.assert_array_equal(aligned, plain)
    np.testing.assert_array_equal(v_last, plain_v)


def test_every_instruction_set_gives_the_same_bits():
    rng = np.random.default_rng(0)
    steps, neurons = 5, 777
    for dtype, storage in (("float32", np.float32), ("float64", np.float64), ("float16", np.float16)):
        x = (rng.standard_normal((steps, neurons)) * 2).astype(storage)
        g = rng.standard_normal((steps, neurons)).astype(storage)
        state = np.float64 if dtype == "float64" else np.float32
        cases = [(neuron, 0) for neuron in range(18)] + [(LIF, surrogate) for surrogate in range(1, 15)]
        for neuron, surrogate in cases:
            results = []
            for isa in ISAS:
                out, v_last, grad_x = np.empty_like(x), np.empty(neurons, state), np.empty_like(x)
                numbers = [3.0, 1.0, 0.8, 1.0, 0.5, 0.5, 2.0, 0.1, 0.2]
                host.neuron_forward(isa, dtype, neuron, steps, neurons, x, None, out, v_last, numbers=numbers)
                host.neuron_backward(
                    *(isa, dtype, neuron, steps, neurons, g, None, None, x, None, grad_x, None),
                    numbers=numbers,
                    surrogate=surrogate,
                    widths=[1.0, 2.0, 3.0],
                )
                results.append((out.tobytes(), v_last.tobytes(), grad_x.tobytes()))
            assert len(set(results)) == 1, (dtype, neuron, surrogate)


def test_wrong_buffers_are_refused():
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="expected x"):
        _lif(ISAS[0], "float32", x[:, ::2], None)
    with pytest.raises(ValueError, match="instruction set"):
        _lif("sse9", "float32", x, None)


@by_isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [(8, 8), (7, 6), (14, 14), (32, 5), (11, 22), (1, 1), (64, 63)])
def test_spectral_gate_is_numpys(isa, dtype, size):
    rng = np.random.default_rng(0)
    (height, width), channels = size, 21
    x, grad = (rng.standard_normal((3, height, width, channels)).astype(dtype) for _ in range(2))
    weight = rng.standard_normal((height, width // 2 + 1, channels, 2)).astype(dtype)
    out, grad_x, grad_weight = np.empty_like(x), np.empty_like(x), np.empty_like(weight)
    host.spectral_gate(isa, dtype, x, weight, out)
    host.spectral_backward(isa, dtype, grad, x, weight, grad_x, grad_weight)

    def spectrum(t):
        return np.fft.rfft2(t.astype(np.float64), axes=(1, 2), norm="ortho")

    gate = weight[..., 0].astype(np.float64) + 1j * weight[..., 1]
    twice = np.where((np.arange(width // 2 + 1) == 0) | (2 * np.arange(width // 2 + 1) == width), 1, 2)[:, None]
    product = (np.conj(spectrum(x)) * spectrum(grad)).sum(0) * twice
    for ours, truth in (
        (out, np.fft.irfft2(spectrum(x) * gate, s=size, axes=(1, 2), norm="ortho")),
        (grad_x, np.fft.irfft2(spectrum(grad) * np.conj(gate), s=size, axes=(1, 2), norm="ortho")),
        (grad_weight, np.stack([product.real, product.imag], -1)),
    ):
        assert np.abs(ours - truth).max() <= 8 * np.finfo(dtype).eps * np.abs(truth).max()


@by_isa
@pytest.mark.parametrize("wide", [np.int32, np.int64])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_integer_products_equal_numpy(isa, groups, wide):
    """Six groups: each channel has an output of its own, and the weight its channels last."""
    rng = np.random.default_rng(groups)
    x = rng.integers(-300, 300, (2, 7, 9, 6), dtype=np.int16)
    outputs, inputs = 6 if groups == 6 else 34, 6 // groups
    weight = rng.integers(-300, 300, (outputs, 3, 2, inputs), dtype=np.int16)
    padded = np.pad(x.astype(np.int64), ((0, 0), (1, 1), (0, 0), (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 2), (1, 2))[:, :, ::2]  # [N, y, x, C, kH, kW]
    patches = patches.reshape(*patches.shape[:3], groups, inputs, 3, 2)
    grouped = weight.astype(np.int64).reshape(groups, outputs // groups, 3, 2, inputs)
    expected = np.einsum("nyxgcuv,gouvc->nyxgo", patches, grouped).reshape(2, 7, 4, outputs)
    out = np.empty(expected.shape, wide)
    given = np.ascontiguousarray(weight[..., 0].transpose(1, 2, 0)) if groups == 6 else weight
    host.integer_conv(isa, x, given, out, stride=[1, 2], padding=[1, 0], groups=groups)
    np.testing.assert_array_equal(out, expected)


@by_isa
def test_integer_products_of_the_lowest_numbers_are_exact(isa):
    x = np.full((1, 1, 1, 4609), -(2**15), np.int16)
    out = np.empty((1, 1, 1, 1), np.int64)
    host.integer_conv(isa, x, x, out)
    assert out.item() == 4609 * 2**30


@by_isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 1000, 10007])
def test_cast_to_nearest_even_and_its_gradient_equal_numpy(isa, dtype, size):
    rng = np.random.default_rng(size)
    x, grad = (rng.standard_normal(size).astype(dtype) for _ in range(2))
    mode = {"width": 6, "frac_bits": 4, "rounding": 4, "overflow": 0}
    out = np.empty_like(x)
    assert host.fixed_cast(isa, dtype, x, None, out, **mode) == 0
    whole = np.rint(x * 16)
    expected, inside = np.clip(whole, -32, 31) / 16, (whole >= -32) & (whole <= 31)
    np.testing.assert_array_equal(out, expected)
    total = host.fixed_cast(isa, dtype, x, grad, out, **mode)
    np.testing.assert_array_equal(out, grad * inside)
    terms = grad.astype(np.float64) * np.where(inside, x.astype(np.float64) - expected, -expected)
    assert abs(total - terms.sum()) <= 1e-6 * np.abs(terms).sum()


@by_isa
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"stride": [0, 1]}, "expected sizes"),
        ({"dilation": [4, 1]}, "no larger than the padded image"),
        ({"groups": 4}, "bad groups"),
        ({"padding": [1]}, "expected pairs"),
        ({"padding": [1, 0]}, "expected out to be C-contiguous with 48 elements"),
    ],
)
def test_integer_products_refuse_what_does_not_fit(isa, arguments, says):
    x, weight, out = (
        np.zeros((1, 4, 4, 6), np.int16),
        np.zeros((4, 3, 2, 6), np.int16),
        np.zeros((1, 2, 3, 4), np.int32),
    )
    with pytest.raises(ValueError, match=says):
        host.integer_conv(isa, x, weight, out, **arguments)


def _decide(isa, logits, criterion, threshold=0.5):
    rows = len(logits)
    score, lists = np.empty(rows, np.float32), [np.full(rows, -1, np.int64) for _ in range(3)]
    dtype = {2: "bfloat16", 4: "float32", 8: "float64"}[logits.dtype.itemsize]
    kept = host.exit_decide(isa, dtype, logits, threshold, criterion, score, *lists)
    return score, *lists, kept


@by_isa
@pytest.mark.parametrize("classes", [1, 7, 32, 33, 100])
@pytest.mark.parametrize("rows", [1, 16, 33])
def test_exit_decision_equals_the_formulas_in_numpy(isa, rows, classes):
    z = np.random.default_rng(classes).standard_normal((rows, classes)).astype(np.float32) * 3
    d = z.astype(np.float64) - z.max(1, keepdims=True)
    total, weighted, second = np.exp(d).sum(1), (np.exp(d) * d).sum(1), np.full(rows, -np.inf)
    if classes > 1:
        second = np.sort(d, 1)[:, -2]
    expected = (1 / total, np.log(total) - weighted / total, (1 - np.exp(second)) / total, -np.log(total) - z.max(1))
    for criterion, truth in enumerate(expected):
        score, prediction, exits, keeps, kept = _decide(isa, z, criterion)
        np.testing.assert_allclose(score, truth, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(prediction, z.argmax(1))
        leaves = score <= np.float32(0.5) if criterion in (1, 3) else score >= np.float32(0.5)
        np.testing.assert_array_equal(keeps[:kept], np.flatnonzero(~leaves))
        np.testing.assert_array_equal(exits[: rows - kept], np.flatnonzero(leaves))


def test_exit_scores_have_the_same_bits_for_every_instruction_set():
    rng = np.random.default_rng(0)
    for classes in (10, 100):
        logits = [(rng.standard_normal((999, classes)) * 5).astype(t) for t in (np.float32, np.float64)]
        logits.append((logits[0].view(np.uint32) >> 16).astype(np.uint16))
        for z in logits:
            for criterion in range(4):
                first, *others = [_decide(isa, z, criterion) for isa in ISAS]
                for other in others:
                    np.testing.assert_array_equal(first[0], other[0])
                    np.testing.assert_array_equal(first[1], other[1])


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
