"""The surrogate gradients: against SpikingJelly's and snnTorch's, at their corners, and kernel against reference."""

import math

import pytest
import torch

from fastcifar import _library
from fastcifar.spec import identical, worse_than_eager
from fastcifar.spiking import lif, reference, surrogate
from fastcifar.spiking.surrogate import BY_NAME, KERNEL_TYPES, resolve

S = surrogate
U = torch.linspace(-6, 6, 4001, dtype=torch.float64)  # 0 and many round numbers among them

# Ours beside the name and the arguments of SpikingJelly's; each once by default and once with numbers of its own.
SPIKINGJELLY = [
    *[(kind(), kind.__name__, ()) for kind in (S.ATan, S.Sigmoid, S.PiecewiseQuadratic, S.PiecewiseExp, S.SoftSign)],
    *[(kind(0.7), kind.__name__, (0.7,)) for kind in (S.ATan, S.Sigmoid, S.PiecewiseQuadratic, S.PiecewiseExp)],
    *[
        (kind(), kind.__name__, ())
        for kind in (S.SuperSpike, S.Erf, S.NonzeroSignLogAbs, S.LeakyKReLU, S.LogTailedReLU)
    ],
    *[(kind(5.0), kind.__name__, (5.0,)) for kind in (S.SoftSign, S.SuperSpike, S.Erf, S.NonzeroSignLogAbs)],
    *[(kind(), kind.__name__, ()) for kind in (S.DeterministicPass, S.S2NN, S.QPseudoSpike, S.FakeNumericalGradient)],
    *[(kind(), kind.__name__, ()) for kind in (S.PiecewiseLeakyReLU, S.SquarewaveFourierSeries)],
    (S.Rectangular(), "Rect", ()),
    (S.Rectangular(0.4), "Rect", (0.4,)),
    (S.PiecewiseLeakyReLU(0.5, 0.2), "PiecewiseLeakyReLU", (0.5, 0.2)),
    (S.LeakyKReLU(0.2, 1.5), "LeakyKReLU", (0.2, 1.5)),
    (S.S2NN(2.0, 0.5), "S2NN", (2.0, 0.5)),
    (S.QPseudoSpike(3.5), "QPseudoSpike", (3.5,)),
    (S.SquarewaveFourierSeries(5, 3.0), "SquarewaveFourierSeries", (5, 3.0)),
    (S.LogTailedReLU(0.1), "LogTailedReLU", (0.1,)),
    (S.FakeNumericalGradient(2.0), "FakeNumericalGradient", (2.0,)),
]
SNNTORCH = [
    (S.ATan(), "atan", ()),
    (S.ATan(3.0), "atan", (3.0,)),
    (S.FastSigmoid(), "fast_sigmoid", ()),
    (S.FastSigmoid(4.0), "fast_sigmoid", (4.0,)),
    (S.SparseFastSigmoid(), "SFS", ()),
    (S.SparseFastSigmoid(4.0, -0.5), "SFS", (4.0, -0.5)),
    (S.SpikeRateEscape(), "spike_rate_escape", ()),
    (S.SpikeRateEscape(2.0, 3.0), "spike_rate_escape", (2.0, 3.0)),
    (S.Triangular(), "triangular", ()),
    (S.Triangular(0.5), "triangular", (0.5,)),
    (S.DeterministicPass(), "straight_through_estimator", ()),
    (S.LeakySpike(0.0), "heaviside", ()),
]
OURS = [*{ours: None for ours, _, _ in (*SPIKINGJELLY, *SNNTORCH)}, S.LeakySpike(), S.LeakySpike(0.3)]
by_surrogate = pytest.mark.parametrize("ours", OURS, ids=repr)


def _gradient(function, u):
    leaf = u.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return grad


def test_every_surrogate_is_tested_here():
    assert {type(ours) for ours in OURS} == set(KERNEL_TYPES) == {type(s) for s in BY_NAME.values()}
    assert len({type(ours) for ours, _, _ in SPIKINGJELLY}) == 17
    assert len(KERNEL_TYPES) == len(BY_NAME) == 22


@pytest.mark.parametrize(("ours", "name", "arguments"), SPIKINGJELLY, ids=lambda p: repr(p))
def test_equal_spikingjellys(ours, name, arguments):
    peers = pytest.importorskip("spikingjelly.activation_based.surrogate")
    expected = _gradient(getattr(peers, name)(*arguments), U)
    torch.testing.assert_close(ours.grad(U), expected, rtol=1e-12, atol=1e-15)
    assert identical(_gradient(ours, U), ours.grad(U))


@pytest.mark.parametrize(("ours", "name", "arguments"), SNNTORCH, ids=lambda p: repr(p))
def test_equal_snntorchs(ours, name, arguments):
    peers = pytest.importorskip("snntorch.surrogate")
    closure = getattr(peers, name)(*arguments)
    torch.testing.assert_close(ours.grad(U), _gradient(closure, U), rtol=1e-12, atol=1e-15)
    assert identical(ours.strict(U), closure(U).double())


def test_where_snntorch_deviates():
    """Its LSO applies another function than the one that it documents, with too few arguments; its sigmoid overflows in
    exp(-slope u), where the gradient is zero."""
    peers = pytest.importorskip("snntorch.surrogate")
    with pytest.raises((TypeError, RuntimeError)):
        _gradient(peers.LSO(0.1), U)
    far = torch.tensor([-10.0, 0.1])
    theirs, ours = _gradient(peers.sigmoid(25), far), S.Sigmoid(25.0).grad(far)
    assert theirs[0].isnan()
    assert ours[0] == pytest.approx(0, abs=1e-30)
    assert ours[1].item() == pytest.approx(theirs[1].item(), rel=1e-5)


# ---- corners ---------------------------------------------------------------------------------------------------------


@by_surrogate
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_finite_everywhere(ours, dtype):
    u = torch.tensor([-1e30, -1e4, -88.0, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 88.0, 1e4, 1e30], dtype=dtype)
    assert ours.grad(u).isfinite().all()
    x = (u + 1).unsqueeze(0).requires_grad_()
    spikes, _, _ = lif(x, tau=2.0, decay_input=False, surrogate=ours, detach_reset=True)
    (grad,) = torch.autograd.grad(spikes.sum(), x)
    assert grad.isfinite().all()


@by_surrogate
def test_ties_fire_unless_strict(ours):
    u = torch.tensor([-1e-45, -0.0, 0.0, 1e-45, 1.0])
    assert ours(u).tolist() == [0, 1, 1, 1, 1]
    assert ours.strict(u).tolist() == [0, 0, 0, 1, 1]
    assert identical(_gradient(ours.strict, u), ours.grad(u))


@pytest.mark.parametrize("kind", [S.ATan, S.Sigmoid, S.Erf, S.QPseudoSpike, S.FakeNumericalGradient])
@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan, "2", None, 1j])
def test_a_wrong_alpha_is_refused(kind, alpha):
    with pytest.raises(ValueError, match=f"{kind.__name__}: expected alpha to be a positive finite number, got"):
        kind(alpha=alpha)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: S.QPseudoSpike(1.0), "QPseudoSpike: expected alpha above 1, got 1.0"),
        (lambda: S.SquarewaveFourierSeries(0), "an integer n of 1 to 1000"),
        (lambda: S.SquarewaveFourierSeries(2.0), "an integer n of 1 to 1000"),
        (lambda: S.SquarewaveFourierSeries(2, 0.0), "a positive period"),
        (lambda: S.FastSigmoid(0.0), "FastSigmoid: expected slope to be a positive finite number"),
        (lambda: S.SparseFastSigmoid(B=math.nan), "SparseFastSigmoid: expected B to be a finite number, got nan"),
        (lambda: S.PiecewiseLeakyReLU(-1.0), "PiecewiseLeakyReLU: expected width to be a positive finite number"),
        (lambda: S.LeakyKReLU(leak=math.inf), "LeakyKReLU: expected leak to be a finite number, got inf"),
    ],
)
def test_a_wrong_number_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_names_lead_to_the_defaults():
    for name, ours in BY_NAME.items():
        assert resolve(name) is ours
        assert ours == type(ours)()
        assert type(ours).name == name
    own = S.ATan(alpha=3.0)
    assert resolve(own) is own
    with pytest.raises(ValueError, match=r"lif: expected surrogate to be one of atan, .*; got 'arctan'"):
        resolve("arctan", "lif")
    with pytest.raises(TypeError, match=r"lif: expected surrogate to be .* got ATan \(the class\)"):
        resolve(S.ATan, "lif")


# ---- kernel against reference ----------------------------------------------------------------------------------------


def _through_lif(function, u, ours):
    """The gradient to x of one step from rest, which is g(x - 1)."""
    return _gradient(lambda x: function(x, tau=2.0, decay_input=False, surrogate=ours)[0], u + 1).squeeze(0)


@by_surrogate
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_kernel_equals_the_reference(ours, dtype, each_isa):
    """To the house's bound, and elementwise to twice the eager formulation's largest relative error and four units of
    the last place, so that the tails count too."""
    spread = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    corners = torch.tensor([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1e-6, -1e-6, 0.125, -0.25], dtype=torch.float64)
    u = torch.cat([spread, spread * 8, spread**3 * 90, corners]).unsqueeze(0).to(dtype)
    state = (u + 1).to(_library.state_dtype(dtype)) - 1
    truth = ours.grad(state.double().squeeze(0))
    eager = _through_lif(reference.lif, u, ours)

    def check(isa):
        got = _through_lif(lif, u, ours)
        assert worse_than_eager(got, eager, truth) is None, isa
        counts = truth.abs() > 1e-4 if dtype is torch.float16 else truth.abs() > 1e-30  # half precision's own grid
        if isinstance(ours, S.SquarewaveFourierSeries):  # crosses zero, where any rounding is relatively large
            return
        error, eager_error = (((g.double() - truth) / truth)[counts].abs().max().item() for g in (got, eager))
        assert error <= 2 * eager_error + 4 * torch.finfo(dtype).eps, isa

    each_isa(check) if _library.WHY_NO_EXTENSION is None else check("reference")


# ---- any callable ----------------------------------------------------------------------------------------------------


def _callables():
    yield "a lambda", lambda u: torch.sigmoid(5 * u)
    peers = pytest.importorskip("spikingjelly.activation_based.surrogate")
    yield "SpikingJelly's ATan", peers.ATan(alpha=3.0)
    closures = pytest.importorskip("snntorch.surrogate")
    yield "snnTorch's fast_sigmoid", closures.fast_sigmoid(slope=10)


def test_any_callable_is_a_surrogate():
    """Run step by step, with the membranes and gradients of the reference."""
    x = torch.randn(5, 3, 17, generator=torch.Generator().manual_seed(0)) * 1.5 + 0.5
    for what, function in _callables():
        results = []
        for run in (lif, reference.lif):
            leaf = x.clone().requires_grad_()
            spikes, v, v_seq = run(leaf, surrogate=function, store_v_seq=True, v_reset=None)
            loss = spikes.square().sum() + v.sum() + v_seq.square().sum()
            results.append((spikes, v, v_seq, *torch.autograd.grad(loss, leaf)))
        assert all(identical(a, b) for a, b in zip(*results, strict=True)), what


def test_a_peers_surrogate_gives_the_gradients_of_ours():
    peers = pytest.importorskip("spikingjelly.activation_based.surrogate")
    x = torch.randn(5, 3, 17, generator=torch.Generator().manual_seed(0)) * 1.5 + 0.5
    theirs, ours = (
        _gradient(lambda x, s=s: lif(x, surrogate=s)[0].square(), x) for s in (peers.ATan(alpha=3.0), S.ATan(alpha=3.0))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_subclass_of_ours_is_run_by_its_own_gradient():
    """A kernel knows the curve by its class, so a subclass must not be taken for it."""

    class Steeper(S.ATan):
        def grad(self, u):
            return 2 * super().grad(u)

    u = torch.linspace(-1, 1, 11).unsqueeze(0)
    assert identical(_through_lif(lif, u, Steeper()), 2 * _through_lif(reference.lif, u, S.ATan()))
