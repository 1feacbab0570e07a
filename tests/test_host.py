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
