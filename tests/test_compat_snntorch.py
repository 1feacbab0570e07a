"""fastcifar.compat.snntorch against snnTorch itself, and without it."""

import copy
import gc
import io
import itertools
import subprocess
import sys
import weakref

import pytest
import torch

from fastcifar.compat import snntorch as compat
from fastcifar.compat._snntorch_surrogate import own_surrogate
from fastcifar.spec import identical
from fastcifar.spiking import surrogate as ours_surrogates

snn = pytest.importorskip("snntorch")
peer = pytest.importorskip("snntorch.surrogate")

CLOSURES = {
    "atan": {"alpha": 1.3},
    "fast_sigmoid": {"slope": 7},
    "sigmoid": {"slope": 5.0},
    "straight_through_estimator": {},
    "triangular": {"threshold": 0.7},
    "heaviside": {},
    "spike_rate_escape": {"beta": 0.8, "slope": 3.0},
    "SFS": {"slope": 7, "B": 0.3},
}


def _currents(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.3


def _custom():
    """A surrogate of the user's own, through snnTorch's custom_surrogate."""
    return peer.custom_surrogate(lambda u, grad, spikes: grad * torch.exp(-u.square()))


def _steps(node, x, mem=None):
    """Spikes and membranes of calling a neuron step by step."""
    spikes, membranes = [], []
    for x_t in x:
        spk, mem = (node(x_t), node.mem) if node.init_hidden else node(x_t, mem)
        spikes.append(spk)
        membranes.append(mem)
    return torch.stack(spikes), torch.stack(membranes)


def _train_step(run, node, x):
    x = x.clone().requires_grad_()
    spikes, membranes = run(node, x)
    weights = (_currents(*x.shape, seed=1).to(x.dtype), _currents(*x.shape, seed=2).to(x.dtype))
    loss = (spikes * weights[0]).sum() + (membranes * weights[1]).sum()
    leaves = [x, *node.parameters()]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return spikes.detach(), membranes.detach(), grads


def _assert_equal(x, **options):
    """Our Leaky against snnTorch's, step by step and over the sequence: spikes equal, membranes to 1e-6, gradients to
    1e-6 of the largest."""
    given = options.get("spike_grad")
    # Strictly above the threshold, a surrogate of ours is its method.
    theirs = snn.Leaky(**{**options, "spike_grad": getattr(given, "strict", given)})
    their_spikes, their_mem, their_grads = _train_step(_steps, theirs, x)
    bound = 1e-6 * max(g.abs().max() for g in their_grads)
    for run in (_steps, lambda node, x: node.multi_step(x)):
        ours = compat.Leaky(**copy.deepcopy(options))
        ours.load_state_dict(theirs.state_dict(), strict=True)
        spikes, mem, grads = _train_step(run, ours, x)
        assert identical(spikes, their_spikes)
        torch.testing.assert_close(mem, their_mem, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.mem, theirs.mem, rtol=1e-6, atol=1e-6)
        for a, b in zip(grads, their_grads, strict=True):
            assert (a - b).abs().max() <= bound, options
    theirs.load_state_dict(ours.state_dict(), strict=True)


MECHANISMS = ["subtract", "zero", "none"]
OPTIONS = {
    "plain": {},
    "hidden": {"init_hidden": True},
    "threshold": {"threshold": 0.6, "beta": 0.4},
    "beta above 1": {"beta": 1.2},
    "integers": {"beta": 1, "threshold": 1},
    "late": {"reset_delay": False},
    "inhibition": {"inhibition": True},
    "quantised": {"state_quant": lambda mem: (mem * 8).round() / 8},
    "no surrogate": {"surrogate_disable": True},
    "own surrogate": {"spike_grad": _custom()},
    "ours": {"spike_grad": ours_surrogates.FastSigmoid(9.0)},
    "graded": {"graded_spikes_factor": 0.7},
    "graded late": {"graded_spikes_factor": torch.tensor(0.7), "reset_delay": False},
    "learnt": {"learn_beta": True, "learn_threshold": True, "learn_graded_spikes_factor": True},
    "learnt late": {"learn_beta": True, "learn_threshold": True, "reset_delay": False},
    "learnt clamped": {"beta": 1.3, "learn_beta": True},
    "per neuron": {
        "beta": torch.linspace(-0.1, 1.1, 7),
        "threshold": torch.linspace(0.3, 1.2, 7),
        "learn_beta": True,
        "learn_threshold": True,
    },
    "learnt, own surrogate": {"spike_grad": _custom(), "learn_beta": True, "learn_threshold": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.filterwarnings("ignore:Leaky. inhibition:UserWarning", "ignore:Inhibition is:UserWarning")
def test_same_numbers_as_snntorch(name, mechanism):
    options = {"beta": 0.8, "reset_mechanism": mechanism, **OPTIONS[name]}
    _assert_equal(_currents(6, 5, 7), **options)


@pytest.mark.parametrize("name", CLOSURES)
def test_snntorchs_surrogates_are_recognised(name):
    theirs = getattr(peer, name)(**CLOSURES[name])
    ours = own_surrogate(theirs)
    assert ours_surrogates.in_kernel(ours)
    assert ours == getattr(compat.surrogate, name)(**CLOSURES[name])
    assert own_surrogate(getattr(peer, name)()) == getattr(compat.surrogate, name)()
    assert own_surrogate(ours) is ours
    u = torch.cat([torch.linspace(-2.03, 2.01, 301), torch.zeros(1)]).requires_grad_()
    results = [(fire(u), torch.autograd.grad(fire(u).sum(), u)[0]) for fire in (ours.strict, theirs)]
    assert identical(results[0][0].detach(), results[1][0].detach())
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)
    for mechanism in MECHANISMS:
        _assert_equal(_currents(5, 3, 7), beta=0.7, spike_grad=theirs, reset_mechanism=mechanism)


def test_other_callables_are_called():
    def imitation(slope):
        def inner(u):
            return torch.sigmoid(slope * u)

        return inner

    imitation.__qualname__ = "atan"
    for each in (_custom(), peer.SSO(), peer.LSO(), imitation(2.0), torch.sigmoid, peer.fast_sigmoid(-1.0)):
        assert own_surrogate(each) is None
    spk, _ = compat.Leaky(beta=0.5, spike_grad=imitation(2.0))(torch.tensor([0.3]))
    assert 0 < spk < 1
    assert compat.surrogate.LSO(0.2) == ours_surrogates.LeakySpike(0.2)


def test_the_sigmoids_gradient_is_finite_where_snntorchs_is_nan():
    x = torch.tensor([[-5.0, 0.9, 1.1]]).requires_grad_()
    grads = []
    for module in (compat, snn):
        spk, _ = module.Leaky(beta=0.5, spike_grad=peer.sigmoid())(x[0])
        grads.append(torch.autograd.grad(spk.sum(), x)[0][0])
    assert grads[0].isfinite().all()
    assert grads[1].isnan().tolist() == [True, False, False]
    torch.testing.assert_close(grads[0][1:], grads[1][1:], rtol=1e-5, atol=1e-6)


def test_a_tie_does_not_fire():
    for module in (compat, snn):
        node = module.Leaky(beta=1.0)
        spikes, mem = _steps(node, torch.tensor([[1.0], [0.0], [0.5], [0.0]]))
        assert spikes.flatten().tolist() == [0, 0, 1, 0]
        assert mem.flatten().tolist() == [1, 1, 1.5, 0.5]
    assert compat.Leaky(beta=1.0).multi_step(torch.tensor([[1.0], [0.0], [0.5], [0.0]]))[0].sum() == 1


# ---- calls and state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("init_hidden", "output"), list(itertools.product((False, True), repeat=2)))
def test_what_a_call_takes_and_returns(init_hidden, output):
    x = _currents(5, 3, 7)
    for module in (compat, snn):
        node = module.Leaky(beta=0.8, init_hidden=init_hidden, output=output)
        result = node(x[0])
        assert isinstance(result, torch.Tensor) == (init_hidden and not output)
        if init_hidden:
            with pytest.raises(TypeError, match="mem"):
                node(x[0], torch.zeros(3, 7))
        else:  # without mem the last one goes on
            node(x[1])
            torch.testing.assert_close(node.mem, _steps(module.Leaky(beta=0.8), x[:2])[1][-1])
        assert node(x[0, :2]) is not None  # another shape: starts at 0
        torch.testing.assert_close(node.mem, x[0, :2])
        assert node.reset_mem().abs().sum() == node.init_leaky().abs().sum() == node.mem.abs().sum() == 0


def test_sequences_go_on_from_each_other():
    x = _currents(6, 3, 7)
    for options in ({}, {"init_hidden": True}, {"reset_delay": False}):
        whole, mem_seq = compat.Leaky(beta=0.8, **options).multi_step(x)
        node = compat.Leaky(beta=0.8, **options)
        first, second = node.multi_step(x[:2]), node.multi_step(x[2:])
        assert identical(torch.cat([first[0], second[0]]), whole)
        assert identical(torch.cat([first[1], second[1]]), mem_seq)
        assert identical(node.mem, mem_seq[-1])
        assert node.multi_step(x[:0])[1].shape == (0, 3, 7)
        assert identical(node.mem, mem_seq[-1])
    start = torch.full((3, 7), 0.4)
    expected = _steps(snn.Leaky(beta=0.8), x, start)
    torch.testing.assert_close(compat.Leaky(beta=0.8).multi_step(x, start), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    x = _currents(4, 3, 7).to(dtype)
    for options in ({}, {"reset_delay": False}, {"threshold": 1}):
        node = compat.Leaky(beta=0.8, **options)
        spikes, mem = _steps(node, x)
        assert spikes.dtype == dtype
        assert mem.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert identical(spikes, compat.Leaky(beta=0.8, **options).multi_step(x)[0])


def test_the_reset_mechanism_can_be_changed():
    node = compat.Leaky(beta=0.8)
    node.reset_mechanism = "zero"
    assert node.reset_mechanism_val == 1
    x = _currents(6, 3, 7)
    expected = compat.Leaky(beta=0.8, reset_mechanism="zero").multi_step(x)
    assert identical(node.multi_step(x)[1], expected[1])
    other = compat.Leaky(beta=0.3)
    other.load_state_dict(node.state_dict(), strict=True)
    assert other.reset_mechanism == "zero"
    assert identical(other.multi_step(x)[1], expected[1])
    for act in (lambda: compat.Leaky(0.5, reset_mechanism="half"), lambda: setattr(node, "reset_mechanism", "half")):
        with pytest.raises(ValueError, match="reset_mechanism to be subtract, zero or none"):
            act()


def test_a_factor_that_is_written_to_counts():
    node, x = compat.Leaky(beta=0.8), torch.full((1, 3), 5.0)
    assert node.multi_step(x)[0].max() == 1
    node.graded_spikes_factor.fill_(2.0)
    assert node.multi_step(x)[0].max() == 2
    node.graded_spikes_factor = torch.tensor(3.0)
    assert node.multi_step(x)[0].max() == 3
    with torch.inference_mode():
        node.graded_spikes_factor = torch.tensor(4.0)
        assert node.multi_step(x)[0].max() == 4


def test_state_dict_has_snntorchs_keys_in_its_order():
    for options in ({}, {"learn_beta": True, "learn_threshold": True, "learn_graded_spikes_factor": True}):
        ours, theirs = compat.Leaky(beta=0.5, **options), snn.Leaky(beta=0.5, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        assert "mem" in dict(ours.named_buffers())


def test_hidden_states_are_reset_and_detached_together_and_not_kept_alive():
    class Other(compat.Leaky):
        pass

    first, second = compat.Leaky(beta=0.5, init_hidden=True), Other(beta=0.5, init_hidden=True)
    x = torch.ones(2, 3).requires_grad_()
    for node in (first, second):
        node(x)
        assert node.mem.requires_grad
    copied = copy.deepcopy(first)
    Other.detach_hidden()
    assert (first.mem.requires_grad, second.mem.requires_grad) == (True, False)
    compat.Leaky.detach_hidden()
    assert not first.mem.requires_grad
    Other.reset_hidden()
    assert (first.mem.sum(), second.mem.sum(), copied.mem.sum()) == (6, 0, 6)
    compat.Leaky.reset_hidden()
    assert first.mem.sum() == copied.mem.sum() == 0
    gone = weakref.ref(first)
    del first, node
    gc.collect()
    assert gone() is None


def test_copies_go_on_where_the_neuron_was():
    node = compat.Leaky(beta=0.8, init_hidden=True, learn_beta=True)
    node(_currents(3, 7).requires_grad_())
    buffer = io.BytesIO()
    torch.save(node, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(node), torch.load(buffer, weights_only=False)]
    expected = node(_currents(3, 7, seed=1))
    for each in copies:
        assert identical(each(_currents(3, 7, seed=1)), expected)
        assert each in compat.Leaky.instances


def test_works_where_snntorch_is_not_installed():
    code = """
import sys
sys.modules["snntorch"] = None
import torch
from fastcifar.compat import snntorch as snn
lif = snn.Leaky(beta=0.9, spike_grad=snn.surrogate.fast_sigmoid(slope=25), learn_beta=True)
mem = lif.init_leaky()
x = torch.full((4, 2, 3), 0.8)
spikes = []
for x_t in x:
    spk, mem = lif(x_t, mem)
    spikes.append(spk)
torch.stack(spikes).sum().backward()
assert lif.beta.grad is not None
lif.reset_mem()
assert torch.equal(lif.multi_step(x)[0], torch.stack(spikes))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
