"""The Triton kernels of spectral mixing equal the reference, in Triton's interpreter without a GPU.

tests/test_triton.py compiles them ahead of time with the rest of the catalogue; a test here sees that they are in it.
"""

import inspect
import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

pytest.importorskip("triton")

from fastcifar.kernels import (  # noqa: E402
    catalogue,
    spectral,
    spectral_cuda,
    spectral_kernels,
    spectral_large_kernels,
)

from fastcifar import _library  # noqa: E402
from fastcifar.spectral import reference  # noqa: E402

# One product, one kernel, and three: odd and even, prime, oblong, and sides of one; channels fill no tile, or just one.
GRIDS = ((1, 1, 3), (1, 7, 5), (4, 4, 33), (2, 13, 8), (7, 7, 17), (8, 8, 16), (14, 14, 20), (16, 16, 9), (9, 16, 3))
GRIDS += ((16, 5, 17), (13, 11, 2), (17, 3, 4), (2, 31, 9), (32, 32, 3), (3, 64, 2), (64, 64, 1))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(params=["triton", "cuda"] if DEVICE == "cuda" else ["triton"])
def backend(request, monkeypatch):
    """Both owners of the gate; the CUDA C++ kernels only where they were built and can run."""
    if request.param == "triton":
        monkeypatch.setattr(spectral_cuda, "library", lambda: None)
    elif spectral_cuda.library() is None:
        pytest.skip("no fastcifar/_cuda.so (make cuda)")
    return request.param


@pytest.fixture
def triton_only(monkeypatch):
    monkeypatch.setattr(spectral_cuda, "library", lambda: None)


def _randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def _state(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _assert_as_accurate(ours, eager, truth):
    """At most twice the error of the reference in the same dtype, and a rounding of the result's own dtype."""
    assert (ours.shape, ours.dtype) == (eager.shape, eager.dtype)
    assert ours.is_contiguous()
    if not truth.numel():
        return
    error, of_eager = ((t.double() - truth).abs().max().item() for t in (ours, eager))
    state = 2e-7 if _state(ours.dtype) == torch.float32 else 4e-15  # in float64 the reference is the truth
    # The interpreter truncates to 16 bits where a GPU rounds.
    least = state if ours.dtype.itemsize > 2 else torch.finfo(ours.dtype).eps
    assert error <= 2 * of_eager + least * truth.abs().max().item()


def _gradients(x, weight, grad, dtype=None):
    x, weight = ((t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in (x, weight))
    y = reference.spectral_gate(x, weight, out_dtype=dtype or grad.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad.to(y.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gate_equals_reference(grid, dtype, backend):
    torch.manual_seed(0)
    H, W, C = grid
    wide = H % 2 == 1 and dtype.itemsize == 2
    B = 1 if H * W > 1000 else 2
    x, weight = _randn(B, H, W, C, dtype=dtype), _randn(H, W // 2 + 1, C, 2, dtype=_state(dtype))
    grad = _randn(B, H, W, C, dtype=_state(dtype) if wide else dtype)
    ours = [spectral.spectral_gate_forward(x, weight, wide)]
    ours += spectral.spectral_gate_backward(grad, x, weight, True, True)
    eager, truth = (_gradients(x, weight, grad, dtype) for dtype in (None, torch.float64))
    for mine, theirs, true in zip(ours, eager, truth, strict=True):
        _assert_as_accurate(mine, theirs, true)
    grad_x, none = spectral.spectral_gate_backward(grad, x, weight, True, False)
    _assert_as_accurate(grad_x, eager[1], truth[1])
    assert none.shape == (0,)
    none, grad_weight = spectral.spectral_gate_backward(grad, x, weight, False, True)
    assert none.shape == (0,)
    assert torch.equal(grad_weight, ours[2])
    assert [t.shape for t in spectral.spectral_gate_backward(grad, x, weight, False, False)] == [(0,), (0,)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_spectrum_equals_reference(grid, dtype):
    torch.manual_seed(1)
    H, W, C = grid
    blocks, inner = (2 if C % 2 == 0 else 1), 0.3
    scale = torch.full((W // 2 + 1, 1, 1), inner, dtype=torch.float64, device=DEVICE)
    scale[0] = 1
    if W % 2 == 0:
        scale[-1] = 1
    x = _randn(2, H, W, C, dtype=dtype)
    ours = spectral.spectrum_forward(x, blocks, inner)
    eager, truth = (reference.spectrum(t, blocks=blocks) * scale for t in (x, x.double()))
    _assert_as_accurate(ours, eager.to(_state(dtype)), truth)
    ours = _randn(*ours.shape, dtype=ours.dtype)  # a spectrum of no real tokens
    back = spectral.spectrum_inverse(ours, W, inner)
    eager = reference.inverse_spectrum((ours * scale).to(ours.dtype), width=W)
    _assert_as_accurate(back, eager, reference.inverse_spectrum(ours.double() * scale, width=W))


LAYOUTS = {
    "sliced": lambda H, W, C: _randn(6, H + 2, W + 1, 2 * C)[::2, 1:-1, :-1, C:],
    "grid_transposed": lambda H, W, C: _randn(3, W, H, C).transpose(1, 2),
    "batch_last": lambda H, W, C: _randn(H, W, 3, C).permute(2, 0, 1, 3),
    "channels_first": lambda H, W, C: _randn(3, C, H, W).permute(0, 2, 3, 1),
    "expanded": lambda H, W, C: _randn(1).expand(3, H, W, C),
    "expanded_images": lambda H, W, C: _randn(1, H, W, C).expand(3, H, W, C),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", [(4, 4, 5), (8, 8, 7), (18, 5, 9)], ids=str)
def test_layouts(grid, layout, backend):
    torch.manual_seed(2)
    H, W, C = grid
    x, grad, weight = LAYOUTS[layout](*grid), LAYOUTS[layout](*grid), _randn(C, H, W // 2 + 1, 2).movedim(0, 2)
    copies = [t.contiguous() for t in (grad, x, weight)]
    forward = spectral.spectral_gate_forward(x, weight, False)
    assert torch.equal(forward, spectral.spectral_gate_forward(*copies[1:], False))
    backward = spectral.spectral_gate_backward(grad, x, weight, True, True)
    for ours, theirs in zip(backward, spectral.spectral_gate_backward(*copies, True, True), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous()
    there = spectral.spectrum_forward(x, C, 1.0)
    assert torch.equal(there, spectral.spectrum_forward(copies[1], C, 1.0))
    swapped = there.transpose(2, 4).contiguous().transpose(2, 4)
    assert torch.equal(spectral.spectrum_inverse(swapped, W, 1.0), spectral.spectrum_inverse(there, W, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(0, 8, 8, 4), (2, 8, 8, 0), (0, 20, 20, 4), (0, 3, 3, 0)])
def test_empty(shape, dtype, backend):
    B, H, W, C = shape
    x = torch.empty(shape, dtype=dtype, device=DEVICE)
    weight = _randn(H, W // 2 + 1, C, 2, dtype=dtype)
    assert spectral.spectral_gate_forward(x, weight, False).shape == shape
    grad_x, grad_weight = spectral.spectral_gate_backward(x, x, weight, True, True)
    assert grad_x.shape == shape
    assert torch.equal(grad_weight, torch.zeros_like(weight))
    there = spectral.spectrum_forward(x, 1, 1.0)
    assert there.shape == (1, B, H, W // 2 + 1, 2, C)
    assert spectral.spectrum_inverse(there, W, 1.0).shape == shape


@pytest.mark.parametrize("grid", [(4, 4, 40), (14, 14, 20), (20, 6, 9)], ids=str)
def test_runs_of_images(grid, triton_only, monkeypatch):
    """Programs with several images, the last with fewer, give the same output, and the same sums up to their order."""
    torch.manual_seed(3)
    H, W, C = grid
    x, grad, weight = _randn(5, H, W, C), _randn(5, H, W, C), _randn(H, W // 2 + 1, C, 2)
    before = spectral.spectral_gate_forward(x, weight, False), spectral.spectrum_forward(x, 1, 1.0)
    grads = spectral.spectral_gate_backward(grad, x, weight, True, True)
    monkeypatch.setattr(spectral, "PROGRAMS", 1)
    monkeypatch.setattr(spectral, "runs", lambda B, tiles: (2, 3))
    assert torch.equal(before[0], spectral.spectral_gate_forward(x, weight, False))
    assert torch.equal(before[1], spectral.spectrum_forward(x, 1, 1.0))
    again = spectral.spectral_gate_backward(grad, x, weight, True, True)
    assert torch.equal(again[0], grads[0])
    torch.testing.assert_close(again[1], grads[1])
    assert torch.equal(again[1], spectral.spectral_gate_backward(grad, x, weight, True, True)[1])


def test_runs_cover_the_batch():
    for B in (1, 2, 63, 64, 1000):
        for tiles in (1, 3, 500, 513, 4000):
            per, chunks = spectral.runs(B, tiles)
            assert (chunks - 1) * per < B <= chunks * per


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes in numpy
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("grid", [(4, 4, 3), (8, 8, 3), (14, 14, 3), (20, 6, 3)], ids=str)
def test_what_is_not_finite_stays_in_its_channel_and_image(grid, value, backend):
    torch.manual_seed(4)
    H, W, C = grid
    x, weight = _randn(2, H, W, C), _randn(H, W // 2 + 1, C, 2)
    clean = spectral.spectral_gate_forward(x, weight, False)
    x[1, 1, 1, 1] = value
    y = spectral.spectral_gate_forward(x, weight, False)
    assert not y[1, :, :, 1].isfinite().any()
    y[1, :, :, 1] = clean[1, :, :, 1]
    assert torch.equal(y, clean)


def test_every_kernel_is_in_the_catalogue():
    entries = catalogue.entries(["spectral"])
    names = {name for name in vars(spectral_kernels) | vars(spectral_large_kernels) if name.endswith("_kernel")}
    assert {entry.name.split()[0] for entry in entries} == names
    for entry in entries:
        assert set(entry.signature) | set(entry.constexprs) == set(entry.kernel.arg_names)
        assert not set(entry.signature) & set(entry.constexprs)


def test_ops_are_served():
    for op in ("spectral_gate_forward", "spectral_gate_backward", "spectrum_forward", "spectrum_inverse"):
        schema = getattr(torch.ops.fastcifar, op).default._schema
        assert list(inspect.signature(getattr(spectral, op)).parameters) == [a.name for a in schema.arguments]


def test_library_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    find = spectral_cuda.library.__wrapped__
    assert find() is None
    (tmp_path / "_cuda.so").write_bytes(b"fastcifar-build-stamp:0.0.0;")
    with pytest.raises(ImportError, match=r"built for fastcifar 0\.0\.0"):
        find()


def test_owner(monkeypatch):
    monkeypatch.setattr(spectral_cuda, "library", lambda: None)
    assert spectral_cuda.owner() == "Triton, kernels/spectral.py"
    monkeypatch.setattr(spectral_cuda, "library", object)
    assert "csrc/cuda/spectral.cu" in spectral_cuda.owner()
