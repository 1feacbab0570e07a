"""What is special about spectral mixing: sizes, symmetries, accuracy, what is saved; conformance.py runs the rest."""

import math

import pytest
import torch

from fastcifar import _library
from fastcifar.spectral import reference
from fastcifar.spectral.functional import as_kernel, inverse_spectrum, spectral_gate, spectrum

needs_kernel = pytest.mark.skipif(_library.WHY_NO_EXTENSION is not None, reason="the extension is not built")

# Every plan that the kernel knows: one round, an even and an odd first round, butterflies of any odd size.
SIDES = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    11,
    12,
    14,
    15,
    16,
    18,
    21,
    22,
    24,
    25,
    27,
    28,
    32,
    36,
    45,
    49,
    50,
    54,
    56,
    61,
    64,
)


def _problem(height, width, channels, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, height, width, channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(height, width // 2 + 1, channels, 2, generator=generator, dtype=torch.float64)
    grad = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), weight.to(dtype), grad.to(dtype)


def _all(function, x, weight, grad):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


@pytest.mark.parametrize("height", SIDES)
def test_every_size_equals_the_reference(height, each_isa):
    """With a width that shares no plan, and 21 channels, which fill no number of registers."""
    for width in (SIDES[(SIDES.index(height) * 7 + 5) % len(SIDES)], height):
        x, weight, grad = _problem(height, width, 21)
        truth = _all(reference.spectral_gate, x, weight, grad)

        def check(isa, x=x, weight=weight, grad=grad, truth=truth):
            for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 3e-15)):
                ours = _all(spectral_gate, x.to(dtype), weight.to(dtype), grad.to(dtype))
                for o, t in zip(ours, truth, strict=True):
                    assert (o.double() - t).abs().max() <= bound * t.abs().max(), (isa, x.shape, dtype)

        each_isa(check)
        check(None)


@needs_kernel
@pytest.mark.parametrize("size", [(7, 7), (8, 8), (14, 14), (16, 16), (28, 28), (32, 32), (56, 56), (9, 31), (61, 3)])
def test_error_is_at_most_half_more_than_that_of_torch_fft(size, each_isa):
    """Root mean square error against float64, relative to torch.fft's in float32, output and both gradients."""
    problem = _problem(*size, 64, batch=8)
    truth = _all(reference.spectral_gate, *problem)
    single = [t.float() for t in problem]
    eager = _all(reference.spectral_gate, *single)

    def check(isa):
        for o, e, t in zip(_all(spectral_gate, *single), eager, truth, strict=True):
            ours, theirs = ((r.double() - t).square().mean().sqrt() for r in (o, e))
            assert ours <= 1.5 * theirs, isa

    each_isa(check)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (8, 8), (1, 5), (6, 1), (7, 2)])
def test_it_is_a_circular_convolution(size):
    x, weight, _ = _problem(*size, 3)
    kernel = as_kernel(weight, size)
    rows, columns = range(size[0]), range(size[1])
    convolved = sum(kernel[:, m, n] * x.roll((m, n), (1, 2)) for m in rows for n in columns)
    torch.testing.assert_close(spectral_gate(x, weight), convolved, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 5, 6])
def test_the_antihermitian_part_of_the_edge_columns_is_dropped(width):
    """Of columns 0 and, for an even width, width / 2: a gate's part that no real signal can have changes nothing."""
    x, weight, _ = _problem(6, width, 4)
    for column in {0, *([width // 2] if width % 2 == 0 else [])}:
        mirrored = weight[:, column].roll(-1, 0).flip(0) * torch.tensor([1.0, -1.0])  # conj(w[-h])
        symmetric = weight.clone()
        symmetric[:, column] = (weight[:, column] + mirrored) / 2
        torch.testing.assert_close(spectral_gate(x, weight), spectral_gate(x, symmetric), rtol=1e-12, atol=1e-12)


def test_odd_and_even_widths_have_weights_of_one_shape():
    """Four columns belong to widths 6 and 7, and the answer differs."""
    _, weight, _ = _problem(4, 6, 2)
    assert as_kernel(weight, (4, 6)).shape != as_kernel(weight, (4, 7)).shape
    with pytest.raises(ValueError, match=r"as_kernel: expected weight \[4, 5, C, 2\]"):
        as_kernel(weight, (4, 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_channels_and_images_do_not_touch_each_other(bad, each_isa):
    """A NaN, an infinity or a huge number stays in its channel of its image: to the bit elsewhere."""
    for channels in (3, 19):  # few channels share a register with other images
        x, weight, _ = _problem(8, 14, channels, batch=5, dtype=torch.float32)
        spoilt = x.clone()
        spoilt[3, 2, 5, 1] = bad

        def check(isa, x=x, weight=weight, spoilt=spoilt):
            clean, dirty = spectral_gate(x, weight), spectral_gate(spoilt, weight)
            touched = torch.zeros_like(clean, dtype=torch.bool)
            touched[3, :, :, 1] = True
            assert torch.equal(clean[~touched], dirty[~touched]), isa
            assert not torch.equal(clean[touched], dirty[touched])

        each_isa(check)
        check(None)


@needs_kernel
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [2, 5, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_few_channels(channels, batch, dtype, each_isa):
    x, weight, grad = _problem(6, 9, channels, batch=batch)
    truth, bound = _all(reference.spectral_gate, x, weight, grad), 8 * torch.finfo(dtype).eps
    state, seen = _library.state_dtype(dtype), []

    def check(isa):
        ours = _all(spectral_gate, x.to(dtype), weight.to(state), grad.to(dtype))
        for o, t in zip(ours, truth, strict=True):
            assert (o.double() - t).abs().max() <= bound * t.abs().max(), isa
        seen.append(ours)

    each_isa(check)
    assert all(torch.equal(a, b) for other in seen for a, b in zip(seen[0], other, strict=True))


@needs_kernel
@pytest.mark.parametrize("shape", [(33, 8, 8, 40), (33, 5, 9, 3), (5, 28, 28, 17)])
def test_weight_gradient_has_the_same_bits_for_any_threads(shape, threads, each_isa):
    batch, height, width, channels = shape
    problem = _problem(height, width, channels, batch=batch, dtype=torch.float32)
    seen = []

    def check(isa):
        for count in (1, 2, 3):
            threads(count)
            seen.append(_all(spectral_gate, *problem))

    each_isa(check)
    assert all(torch.equal(a, b) for other in seen for a, b in zip(seen[0], other, strict=True))


@needs_kernel
def test_only_the_inputs_are_saved_for_backward():
    x, weight, _ = _problem(14, 14, 8, dtype=torch.float32)
    x.requires_grad_()
    weight.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        spectral_gate(x, weight)
    assert set(saved) == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("size", [(65, 4), (4, 65), (80, 80)])
def test_larger_grids_run_the_reference(size):
    x, weight, grad = _problem(*size, 2)
    for ours, theirs in zip(
        _all(spectral_gate, x, weight, grad), _all(reference.spectral_gate, x, weight, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inverse_spectrum(spectrum(x), size[1]), x, rtol=1e-12, atol=1e-12)


def test_tokens_in_a_row_are_the_grid():
    x, weight, _ = _problem(4, 6, 5)
    flat = spectral_gate(x.flatten(1, 2), weight, (4, 6))
    assert torch.equal(flat, spectral_gate(x, weight).flatten(1, 2))
    square, weight, _ = _problem(6, 6, 5)
    assert torch.equal(spectral_gate(square.flatten(1, 2), weight).view_as(square), spectral_gate(square, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_output_dtypes(dtype):
    x, weight, _ = _problem(8, 8, 16, dtype=torch.float32)
    half = spectral_gate(x.to(dtype), weight)
    wide = spectral_gate(x.to(dtype), weight, out_dtype=torch.float32)
    assert (half.dtype, wide.dtype) == (dtype, torch.float32)
    assert torch.equal(half, wide.to(dtype))  # one rounding, at the end
    assert torch.equal(
        spectral_gate(x.to(dtype), weight.to(dtype)), spectral_gate(x.to(dtype), weight.to(dtype).float())
    )


def test_gradients_where_only_one_is_wanted():
    x, weight, grad = _problem(8, 6, 20)
    both = _all(spectral_gate, x, weight, grad)
    (to_x,) = torch.autograd.grad(spectral_gate(x.requires_grad_(), weight), x, grad)
    (to_weight,) = torch.autograd.grad(spectral_gate(x.detach(), weight.requires_grad_()), weight, grad)
    torch.testing.assert_close(to_x, both[1], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(to_weight, both[2], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_expanded_gradients(reduction):
    x, weight, _ = _problem(5, 8, 6)
    results = []
    for function in (spectral_gate, reference.spectral_gate):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        results.append(torch.autograd.grad(getattr(function(*leaves), reduction)(), leaves))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_gradient_penalty_trains():
    """The second derivative with respect to x and the weight, through a loss that squares the first."""
    x, weight, _ = _problem(4, 5, 3)
    results = []
    for function in (spectral_gate, reference.spectral_gate):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        (to_x,) = torch.autograd.grad(function(*leaves).square().sum(), leaves[0], create_graph=True)
        results.append(torch.autograd.grad(to_x.square().sum(), leaves))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_third_derivatives():
    x, weight, _ = _problem(3, 4, 2, batch=1)
    values = []
    for function in (spectral_gate, reference.spectral_gate):
        leaf = x.clone().requires_grad_()
        out = function(leaf, weight * leaf.mean()).pow(4).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(out, leaf, create_graph=True)
            out = grad.square().sum()
        values.append(out.item())
    assert math.isclose(*values, rel_tol=1e-9)


def test_vmap_over_weights_equals_a_loop():
    x, _, grad = _problem(4, 6, 5, dtype=torch.float32)
    weights = torch.randn(3, 4, 4, 5, 2, generator=torch.Generator().manual_seed(1))
    mapped = torch.func.vmap(spectral_gate, in_dims=(None, 0))(x, weights)
    torch.testing.assert_close(mapped, torch.stack([spectral_gate(x, w) for w in weights]), rtol=0, atol=1e-6)

    def to_weight(weight, x):
        return torch.func.grad(lambda w: (spectral_gate(x, w) * grad).sum())(weight)

    per_image = torch.func.vmap(to_weight, in_dims=(None, 0))(weights[0], x[:, None])
    looped = torch.stack([to_weight(weights[0], image[None]) for image in x])
    torch.testing.assert_close(per_image, looped, rtol=0, atol=1e-5)


@needs_kernel
def test_raw_ops_refuse_what_they_cannot_read():
    ops = torch.ops.fastcifar
    x, weight, _ = _problem(4, 6, 5, dtype=torch.float32)
    for call in (
        lambda: ops.spectral_gate_forward(x[0], weight, False),
        lambda: ops.spectral_gate_forward(x, weight[:, :3], False),
        lambda: ops.spectral_gate_forward(x, weight.double(), False),
        lambda: ops.spectral_gate_forward(torch.zeros(1, 65, 4, 1), torch.zeros(65, 3, 1, 2), False),
        lambda: ops.spectral_gate_backward(x[:1], x, weight, True, True),
        lambda: ops.spectral_gate_backward(x.double(), x, weight, True, True),
        lambda: ops.spectrum_forward(x, 2, 1.0),
        lambda: ops.spectrum_forward(x, 0, 1.0),
        lambda: ops.spectrum_inverse(torch.zeros(1, 1, 4, 4, 2, 5), 8, 1.0),
        lambda: ops.spectrum_inverse(torch.zeros(1, 1, 4, 4, 2, 5).half(), 6, 1.0),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            call()
