"""AFNO, BFNO and FNet against the papers' formulas restated here, and what exporters and compilers make of them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from fastcifar.spectral import AFNO1D, AFNO2D, BFNO2D, FourierLayer, afno, bfno, export, fnet
from fastcifar.spectral import functional as spectral
from fastcifar.spectral import mixers_reference as reference
from fastcifar.spectral.mixers import kept_modes

GRIDS = [(4, 4), (7, 7), (8, 5), (1, 12), (14, 14), (9, 1)]


def _random(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def _weights(blocks, block, hidden, dtype=torch.float64):
    shapes = [(2, blocks, block, hidden), (2, blocks, hidden), (2, blocks, hidden, block), (2, blocks, block)]
    return [_random(*shape, seed=i + 1, dtype=dtype, scale=0.3) for i, shape in enumerate(shapes)]


def _fourier(n, dtype):
    """The orthonormal Fourier matrix."""
    k = torch.arange(n, dtype=torch.float64)
    return torch.polar(torch.full((n, n), n**-0.5, dtype=torch.float64), -2 * torch.pi * k[:, None] * k / n).to(dtype)


def _official(x, grid, weights, kept, threshold, linear=False):
    """The mixer with every sum written out, real and imaginary parts apart as the official code has them."""
    (height, width), (batch, tokens, channels) = grid, x.shape
    kind = torch.complex128 if x.dtype == torch.float64 else torch.complex64
    blocks = weights[0].shape[1]
    image = x.reshape(batch, height, width, channels).to(kind)
    rows, columns = _fourier(height, kind), _fourier(width, kind)
    z = torch.einsum("bhwc,hk,wl->bklc", image, rows, columns)[:, :, : width // 2 + 1]
    z = z.reshape(batch, height, -1, blocks, channels // blocks)

    def layer(re, im, w):
        r, i = w
        product = torch.einsum
        return (
            product("bklni,nio->bklno", re, r) - product("bklni,nio->bklno", im, i),
            product("bklni,nio->bklno", re, i) + product("bklni,nio->bklno", im, r),
        )

    re, im = layer(z.real, z.imag, weights[0])
    if not linear:
        re, im = F.relu(re + weights[1][0]), F.relu(im + weights[1][1])
        re, im = layer(re, im, weights[2])
        re, im = (F.softshrink(p + b, threshold) for p, b in ((re, weights[3][0]), (im, weights[3][1])))
    mixed = torch.complex(re, im).reshape(batch, height, -1, channels)
    keep = (torch.arange(mixed.shape[2]) < kept).to(kind)[:, None]
    counts = torch.tensor([1.0 if 2 * k in (0, width) else 2.0 for k in range(mixed.shape[2])]).to(kind)
    back = torch.einsum("bklc,hk,wl->bhwc", mixed * keep, rows.conj(), columns.conj()[:, : mixed.shape[2]] * counts)
    return x + back.real.reshape(batch, tokens, channels)


def _close(ours, theirs, dtype):
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1), (a - b).abs().max()


def _with_gradients(function, x, weights):
    leaves = [t.clone().requires_grad_() for t in (x, *weights)]
    y = function(*leaves)
    grads = torch.autograd.grad(y, leaves, _random(*y.shape, seed=99, dtype=y.dtype), allow_unused=True)
    return [y.detach(), *[torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kept", [None, 2, 0])
@pytest.mark.parametrize("grid", GRIDS)
def test_afno_is_the_official_formula(grid, kept, dtype):
    x, weights = _random(3, grid[0] * grid[1], 12, dtype=dtype), _weights(3, 4, 8, dtype)
    options = {"sparsity_threshold": 0.05, "kept_columns": kept}
    theirs = _with_gradients(lambda x, *w: _official(x, grid, w, 99 if kept is None else kept, 0.05), x, weights)
    ours = _with_gradients(lambda x, *w: afno(x, *w, grid, **options), x, weights)
    _close(ours, theirs, dtype)
    _close([afno(x, *weights, grid, **options)], theirs[:1], dtype)  # no graph: the chunked path
    _close([afno(x, *weights, grid, dft="matmul", **options)], theirs[:1], dtype)
    _close([reference.afno(x.view(3, *grid, 12), *weights, **options).view(x.shape)], theirs[:1], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kept", [None, 1])
@pytest.mark.parametrize("grid", GRIDS[:4])
def test_bfno_is_the_official_formula(grid, kept, dtype):
    x, weights = _random(2, grid[0] * grid[1], 12, dtype=dtype), _weights(3, 4, 4, dtype)[:1]
    theirs = _with_gradients(
        lambda x, w: _official(x, grid, [w], 99 if kept is None else kept, 0, linear=True), x, weights
    )
    _close(_with_gradients(lambda x, w: bfno(x, w, grid, kept_columns=kept), x, weights), theirs, dtype)
    _close([bfno(x, *weights, grid, kept_columns=kept, dft="matmul")], theirs[:1], dtype)
    _close([reference.bfno(x.view(2, *grid, 12), *weights, kept_columns=kept).view(x.shape)], theirs[:1], dtype)


def test_large_batches_in_chunks_equal_one_pass(monkeypatch):
    x, weights = _random(7, 36, 12, dtype=torch.float32), _weights(3, 4, 4, torch.float32)
    whole, whole_fnet = afno(x, *weights), fnet(x)
    monkeypatch.setattr("fastcifar.spectral.mixers._CHUNK", 1)
    _close([afno(x, *weights), fnet(x)], [whole, whole_fnet], torch.float32)
    _close([fnet(x.transpose(0, 1))], [reference.fnet(x.transpose(0, 1))], torch.float32)


def test_kept_modes_quirk():
    # 14 x 14 at a fraction of 0.1: int(99 * 0.1) = 9 modes of 8 columns, so nothing is dropped
    assert kept_modes(0.1, 14, 14) == 8
    assert kept_modes(0.1, 14, 14, "grid") == 0
    assert kept_modes(0.05, 14, 14) == 4
    assert kept_modes(3, 14, 14) == 8
    assert [kept_modes(0.5, 1, 17, rule) for rule in ("official", "grid")] == [4, 4]
    x = _random(2, 196, 16, dtype=torch.float32)
    torch.manual_seed(0)
    whole = AFNO2D(16)
    for fraction, kept in ((0.1, 8), (0.05, 4)):
        module = AFNO2D(16, hard_thresholding_fraction=fraction)
        module.load_state_dict(whole.state_dict())
        weights = [module.w1, module.b1, module.w2, module.b2]
        _close([module(x)], [_official(x, (14, 14), weights, kept, 0.01)], torch.float32)
        sane = AFNO2D(16, hard_thresholding_fraction=fraction, kept_modes="grid")
        assert torch.equal(sane(x), x)  # no column at all
    for rule, fraction in (("other", 1), ("grid", -1)):
        with pytest.raises(ValueError, match="kept_modes: expected"):
            kept_modes(fraction, 4, 4, rule)


def test_boundaries_of_relu_and_threshold():
    """At exactly 0 and exactly lambda: value 0 and gradient 0, on the real and on the imaginary part alike."""
    x = torch.zeros(1, 16, 2, dtype=torch.float64, requires_grad=True)
    zeros, eye = torch.zeros(2, 1, 2, dtype=torch.float64), torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    eye[0, 0] = torch.eye(2)
    for b2 in (0.25, -0.25):
        bias = torch.full_like(zeros, b2).requires_grad_()
        y = afno(x, eye, zeros, eye, bias, sparsity_threshold=0.25)
        assert not y.any()
        grad_x, grad_bias = torch.autograd.grad(y, (x, bias), torch.randn_like(y) * 0 + 1)
        assert torch.equal(grad_x, torch.ones_like(x))  # the residual's
        assert not grad_bias.any()
    y = afno(x, eye, zeros, eye, zeros.clone().requires_grad_(), sparsity_threshold=0.0)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))  # ReLU's gradient at 0 is 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 6), (3, 8, 7), (2, 3, 4, 1), (6, 2), (2, 1, 5), (0, 4, 4), (2, 56, 24)])
def test_fnet_is_the_formula(shape, dtype):
    x, wide = _random(*shape).to(dtype), _random(*shape).to(dtype).double()
    n, c = (_fourier(s, torch.complex128) * s**0.5 for s in shape[-2:])
    expected = (n @ wide.to(torch.complex128) @ c).real
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    scale = expected.abs().max().item() if x.numel() else 1
    for y in (
        fnet(x),
        reference.fnet(x) if x.numel() else x,
        export.fnet_matmul(x),
        FourierLayer()(x),
        FourierLayer(dft="matmul")(x),
    ):
        assert y.dtype == dtype
        assert y.shape == x.shape
        assert torch.allclose(y.double(), expected, rtol=0, atol=tolerance * scale)


def test_second_derivatives():
    x = _random(1, 6, 4).requires_grad_()
    weights = [w.requires_grad_() for w in _weights(2, 2, 1)]
    assert torch.autograd.gradcheck(fnet, x)
    assert torch.autograd.gradgradcheck(fnet, x)
    mixer = lambda x, *w: afno(x, *w, (2, 3), sparsity_threshold=0.02, kept_columns=1)  # noqa: E731
    assert torch.autograd.gradcheck(mixer, (x, *weights))
    assert torch.autograd.gradgradcheck(mixer, (x, *weights))


def test_functional_transforms():
    x = _random(3, 2, 12, 4)
    weights = _weights(2, 2, 3)
    loss = lambda x: afno(x, *weights, (3, 4)).square().sum() + fnet(x).square().sum()  # noqa: E731
    per_sample = torch.func.vmap(torch.func.grad(loss))(x)
    _close(per_sample, [torch.func.grad(loss)(t) for t in x], torch.float64)


def test_dtypes_and_autocast():
    weights = _weights(3, 4, 4, torch.float32)
    x = _random(2, 16, 12, dtype=torch.float32)
    exact = afno(x, *weights)
    assert afno(x.double(), *weights).dtype == torch.float64
    half = afno(x.bfloat16(), *weights)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), exact, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(afno(x, *weights), exact)
    module = AFNO2D(12, 3).bfloat16()
    assert module(x.bfloat16()).dtype == torch.bfloat16
    assert afno(x[:0], *weights).shape == (0, 16, 12)


def test_modules():
    for module, x in ((AFNO2D(16, 4, 0.02, 0.7, 2), 36), (AFNO1D(16), 13), (BFNO2D(16, 2), 36), (FourierLayer(), 5)):
        x = torch.randn(2, x, 16)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))
        assert torch.equal(twin(x), module(x))
        assert "(" in repr(module)
    assert repr(AFNO2D(16, 4, 0.02)) == "AFNO2D(16, num_blocks=4, sparsity_threshold=0.02)"
    assert {k: tuple(v.shape) for k, v in AFNO1D(16, 4, hidden_size_factor=3).state_dict().items()} == {
        "w1": (2, 4, 4, 12),
        "b1": (2, 4, 12),
        "w2": (2, 4, 12, 4),
        "b2": (2, 4, 4),
    }
    assert list(BFNO2D(16).state_dict()) == ["w1"]
    x, module = torch.randn(2, 6, 8, 16), AFNO2D(16)
    assert torch.equal(module(x).flatten(1, 2), module(x.flatten(1, 2), (6, 8)))


def test_export_and_compile():
    x = torch.randn(2, 36, 16)
    for module in (AFNO2D(16, dft="matmul"), BFNO2D(16, dft="matmul"), FourierLayer(dft="matmul")):
        program = torch.export.export(module, (x,))
        calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert not any("fft" in call or "complex" in call for call in calls)
        assert torch.allclose(program.module()(x), module(x), atol=1e-5)
    compiled = torch.compile(lambda t: AFNO2D.forward(module2d, fnet(t)), backend="aot_eager", fullgraph=True)
    module2d = AFNO2D(16)
    assert torch.allclose(compiled(x), module2d(fnet(x)), atol=1e-5)


def test_matmul_transforms_are_the_spectrum():
    for grid in GRIDS:
        x = _random(2, *grid, 6)
        planar = export.spectrum_matmul(x, blocks=2)
        assert torch.allclose(planar, spectral.spectrum(x, blocks=2), atol=1e-12)
        assert torch.allclose(export.inverse_spectrum_matmul(planar, grid[1]), x, atol=1e-12)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "afno: expected w1", lambda x, w: afno(x, w[0][:, :1], *w[1:])),
        (ValueError, "afno: expected b1", lambda x, w: afno(x, w[0], w[1][..., :1], *w[2:])),
        (ValueError, "afno: expected w2", lambda x, w: afno(x, *w[:2], w[2][..., :1], w[3])),
        (TypeError, "afno: expected b2 in w1's", lambda x, w: afno(x, *w[:3], w[3].float())),
        (TypeError, "afno: expected b2 to be a tensor", lambda x, w: afno(x, *w[:3], None)),
        (TypeError, "afno: expected w1 to be a tensor", lambda x, w: afno(x, None, *w[1:])),
        (TypeError, "afno: expected w1 in float32", lambda x, w: afno(x, w[0].long(), *w[1:])),
        (ValueError, "afno: expected a sparsity", lambda x, w: afno(x, *w, sparsity_threshold=-1)),
        (ValueError, "afno: expected kept_columns", lambda x, w: afno(x, *w, kept_columns=-1)),
        (ValueError, "afno: expected dft", lambda x, w: afno(x, *w, dft="fft")),
        (ValueError, "afno: expected spatial_size", lambda x, w: afno(x[:, :15], *w)),
        (ValueError, "bfno: expected w1", lambda x, w: bfno(x, w[0])),
        (TypeError, "fnet: expected x in", lambda x, w: fnet(x.long())),
        (TypeError, "fnet: expected x to be", lambda x, w: fnet(None)),
        (ValueError, "fnet: expected x", lambda x, w: fnet(x[0, 0])),
        (ValueError, "AFNO2D: expected hidden_size divisible", lambda x, w: AFNO2D(10)),
        (ValueError, "AFNO2D: expected sparsity", lambda x, w: AFNO2D(16, sparsity_threshold=-1)),
        (ValueError, "AFNO1D: expected hard", lambda x, w: AFNO1D(16, hard_thresholding_fraction=-1)),
        (ValueError, "BFNO2D: expected kept_modes", lambda x, w: BFNO2D(16, kept_modes="all")),
        (ValueError, "AFNO2D: expected hidden_size_factor", lambda x, w: AFNO2D(16, hidden_size_factor=1.5)),
        (ValueError, "AFNO2D: expected 16 channels", lambda x, w: AFNO2D(16)(x)),
        (ValueError, "AFNO1D: expected x", lambda x, w: AFNO1D(16)(x[0])),
        (ValueError, "spectrum_matmul: expected blocks", lambda x, w: export.spectrum_matmul(x, blocks=5)),
        (ValueError, "spectral_gate_matmul: expected weight", lambda x, w: export.spectral_gate_matmul(x, w[0])),
    ],
)
def test_bad_input(error, match, call):
    with pytest.raises(error, match=match):
        call(_random(2, 16, 12), _weights(3, 4, 8))
