"""fastcifar.compat.spikingjelly against SpikingJelly itself, and without it."""

import copy
import io
import itertools
import subprocess
import sys

import pytest
import torch

from fastcifar.compat import spikingjelly as compat
from fastcifar.compat import spikingjelly_functional as compat_functional
from fastcifar.compat._memory import own_surrogate
from fastcifar.spec import identical
from fastcifar.spiking import surrogate as ours_surrogates

neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
functional = pytest.importorskip("spikingjelly.activation_based.functional")


class Unknown(surrogate.ATan):
    """A surrogate of the user's own, which no kernel knows."""


SURROGATES = [surrogate.Sigmoid, Unknown]
OPTIONS = {
    "IFNode": [{}, {"v_threshold": 0.5}],
    "LIFNode": [{"tau": 3.0}, {"tau": 1.7, "decay_input": False}],
    "ParametricLIFNode": [{"init_tau": 3.0}, {"init_tau": 1.7, "decay_input": False}],
    "QIFNode": [{}, {"tau": 2.5, "a0": 0.6, "v_rest": -0.05, "v_c": 0.4, "v_threshold": 0.9}],
    "EIFNode": [{}, {"tau": 2.5, "delta_T": 0.7, "theta_rh": 0.4, "v_rest": -0.05, "v_threshold": 0.9}],
    "IzhikevichNode": [{}, {"a": 0.2, "b": 0.1, "tau_w": 3.0, "w_rest": 0.05, "tau": 2.5}],
    "KLIFNode": [{"tau": 3.0}, {"scale_reset": True, "tau": 1.7, "decay_input": False}],
    "CUBALIFNode": [{}, {"c_decay": 0.3, "v_decay": 0.6, "v_threshold": 0.8}],
    "ILIFNode": [{}, {"tau": 2.5, "v_threshold": 0.7}],
}


def _currents(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.5


def _node(module, name, step_mode="m", detach_reset=False, store_v_seq=True, **options):
    """A node of ours or theirs; CUBALIFNode has some options only as attributes there."""
    if name == "CUBALIFNode":
        node = getattr(module, name)(**options)
        node.detach_reset, node.step_mode, node.store_v_seq = detach_reset, step_mode, store_v_seq
        return node
    shared = {"detach_reset": detach_reset, "step_mode": step_mode, "store_v_seq": store_v_seq}
    return getattr(module, name)(**options, **shared)


def _train_step(node, x):
    """Spikes, memories and v_seq of a call, and the gradients of x and of the node's parameters."""
    x = x.clone().requires_grad_()
    spikes = torch.stack([node(x_t) for x_t in x]) if node.step_mode == "s" else node(x)
    loss = (spikes * _currents(*spikes.shape, seed=1).to(x.dtype)).sum()
    loss = loss + (node.v * _currents(*node.v.shape, seed=2).to(x.dtype)).sum()
    values = [spikes.detach(), *(m.detach().clone() for m in node._memories.values()), node.v_seq.detach()]
    return values, torch.autograd.grad(loss, [x, *node.parameters()])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("kind", SURROGATES)
def test_same_numbers_as_spikingjelly(name, step_mode, kind):
    """Spikes equal, membranes to 1e-6 (EIF's exponential to 1e-5), gradients to 1e-6 of the largest; or, where
    SpikingJelly's own rounding is beyond that, nearer to the float64 gradient than its."""
    x = _currents(5, 3, 17) * (0.5 if name in ("QIFNode", "EIFNode", "IzhikevichNode") else 1.0)
    tolerance = 1e-5 if name == "EIFNode" else 1e-6
    for options, soft, detach_reset in itertools.product(OPTIONS[name], (False, True), (False, True)):
        if name == "ILIFNode":
            window = (-0.5, 3.5) if kind is Unknown else None
            more = {"surrogate_function": surrogate.MultiLevelSpikeCount(3, grad_window=window)}
        else:
            more = {"surrogate_function": kind(), **({"v_reset": None} if soft else {})}
        make = {**options, **more, "step_mode": step_mode, "detach_reset": detach_reset}
        ours, theirs = (_node(module, name, **make) for module in (compat, neuron))
        for parameter in theirs.parameters():
            parameter.data += 0.3
        ours.load_state_dict(theirs.state_dict(), strict=True)
        exact = copy.deepcopy(ours).double()
        for scale in (1.0, 0.7):  # the second call goes on from the first one's state
            for node in (ours, theirs, exact):
                functional.detach_net(node)
                if step_mode == "s":
                    node.store_v_seq = True  # forgets the last call's
            (mine, my_grads), (their, their_grads) = (_train_step(node, x * scale) for node in (ours, theirs))
            true_grads = _train_step(exact, (x * scale).double())[1]
            if name == "EIFNode":
                _assert_no_tie(theirs, mine[-1], x * scale)
            assert identical(mine[0], their[0])
            for a, b in zip(mine[1:], their[1:], strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
            bound = tolerance * max(g.abs().max() for g in their_grads)
            for a, b, true in zip(my_grads, their_grads, true_grads, strict=True):
                if (a - b).abs().max() > bound:
                    assert (a - true).abs().max() <= (b - true).abs().max(), make
        functional.reset_net(ours)
        assert dict(ours.named_memories()) == dict(_node(neuron, name, **make).named_memories())
        assert ours.v_seq is None


def _assert_no_tie(node, v_seq, x):
    """No charge so near to the threshold that the last bit of an exponential could decide."""
    v = v_seq[:-1]
    spread = node.delta_T * torch.exp((v - node.theta_rh) / node.delta_T)
    h = v + (x[1:] + node.v_rest - v + spread) / node.tau
    assert (h - node.v_threshold).abs().min() > 1e-5


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("sym", [False, True])
def test_stbif_equals_spikingjelly(step_mode, sym):
    x = _currents(12, 3, 17) * 0.3
    ours, theirs = (module.STBIFNode(0.25, 8, sym, step_mode=step_mode) for module in (compat, neuron))
    with pytest.raises(RuntimeError, match="forward"):
        _ = ours.accumulated
    assert ours.state_dict().keys() == theirs.state_dict().keys() == {"q_threshold", "pos_max", "neg_min"}
    theirs.q_threshold.fill_(0.3)
    theirs.pos_max.fill_(3.0)
    for _ in range(2):
        ours.load_state_dict(theirs.state_dict(), strict=True)
        for part in (x[:5], x[5:]):
            outputs = [torch.stack([n(x_t) for x_t in part]) if step_mode == "s" else n(part) for n in (ours, theirs)]
            assert identical(*outputs)
            for name, value in theirs.named_memories():
                torch.testing.assert_close(getattr(ours, name), value, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(ours.accumulated, theirs.accumulated)
        functional.reset_net(ours)
        functional.reset_net(theirs)
        assert ours.q is ours.acc_q is ours.cur_output is None
        theirs.load_state_dict(ours.state_dict(), strict=True)
        theirs.pos_max.fill_(5.0)  # written in place: read again


def test_stbif_has_a_gradient_and_refuses_one_level():
    node, x = compat.STBIFNode(0.5, 4, step_mode="m"), _currents(4, 6).requires_grad_()
    node(x).sum().backward()
    assert x.grad.abs().sum() > 0
    for level in (0, 1, True):
        with pytest.raises(ValueError, match="STBIFNode: expected level >= 2"):
            compat.STBIFNode(0.5, level)


# ---- surrogates ------------------------------------------------------------------------------------------------------

NUMBERS = {
    "PiecewiseLeakyReLU": {"w": 0.7, "c": 0.05},
    "LeakyKReLU": {"leak": 0.1, "k": 0.8},
    "S2NN": {"alpha": 3.0, "beta": 0.7},
    "SquarewaveFourierSeries": {"n": 3, "T_period": 5.0},
    "DeterministicPass": {},
    "QPseudoSpike": {"alpha": 2.5},
}
KNOWN = (
    *("ATan", "DeterministicPass", "Erf", "FakeNumericalGradient", "LeakyKReLU", "LogTailedReLU", "NonzeroSignLogAbs"),
    *("PiecewiseExp", "PiecewiseLeakyReLU", "PiecewiseQuadratic", "QPseudoSpike", "Rect", "S2NN", "Sigmoid"),
    *("SoftSign", "SquarewaveFourierSeries", "SuperSpike"),
)


@pytest.mark.parametrize("name", KNOWN)
def test_every_surrogate_is_mapped_with_its_numbers(name):
    theirs = getattr(surrogate, name)(**NUMBERS.get(name, {"alpha": 0.7}))
    ours = own_surrogate(theirs)
    assert ours_surrogates.in_kernel(ours)
    u = torch.linspace(-3.03, 3.01, 501, dtype=torch.float64).requires_grad_()
    results = [(s(u), torch.autograd.grad(s(u).sum(), u)[0]) for s in (ours, theirs)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert ours_surrogates.in_kernel(own_surrogate(getattr(surrogate, name)()))


def test_surrogates_that_no_kernel_has_are_called():
    class ATan(torch.nn.Module):
        def forward(self, u):
            return torch.sigmoid(u)

    odd = surrogate.Sigmoid(alpha=-1.0), surrogate.ATan(alpha=torch.tensor(2.0)), surrogate.PoissonPass(), ATan()
    for each in (*odd, surrogate.ATan(spiking=False), Unknown(), torch.sigmoid):
        assert own_surrogate(each) is each
    node = compat.LIFNode(surrogate_function=lambda u: torch.sigmoid(10 * u), step_mode="m")
    spikes = node(_currents(3, 4))
    assert 0 < spikes.min() < spikes.max() < 1
    soft = [m.LIFNode(surrogate_function=surrogate.ATan(spiking=False), step_mode="m") for m in (compat, neuron)]
    torch.testing.assert_close(*(node(_currents(3, 4)) for node in soft))
    assert compat.LIFNode(surrogate_function="soft_sign").surrogate_function == ours_surrogates.SoftSign()


# ---- SpikingJelly's tools --------------------------------------------------------------------------------------------


def test_spikingjelly_treats_it_as_its_own(capsys):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), compat.LIFNode(), compat.CUBALIFNode())
    functional.set_step_mode(net, "m")
    assert net[1].step_mode == net[2].step_mode == "m"
    net(torch.zeros(2, 3, 4).requires_grad_())
    functional.detach_net(net)
    assert not net[1].v.requires_grad
    assert not net[2].c.requires_grad
    functional.reset_net(net)
    assert net[1].v == net[2].c == 0.0
    assert "WARNING" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="x"):
        net[1].step_mode = "x"


ARGUMENTS = {  # of 2.0.0 before surrogate_function
    "IFNode": (1.0, 0.0),
    "LIFNode": (2.0, True, 1.0, 0.0),
    "ParametricLIFNode": (2.0, True, 1.0, 0.0),
    "QIFNode": (2.0, 0.8, 1.0, 1.0, 0.0, -0.1),
    "EIFNode": (2.0, 1.0, 0.8, 1.0, 0.0, -0.1),
    "IzhikevichNode": (2.0, 0.8, 1.0, 1.0, 0.0, -0.1, 0.0, 2.0, 0.1, 0.2),
    "KLIFNode": (False, 2.0, True, 1.0, 0.0),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_both_generations(name):
    leading = (*ARGUMENTS[name], surrogate.ATan(), True, "m")
    old, new = getattr(compat, name)(*leading, "cupy", True), getattr(compat, name)(*leading, True)
    theirs = getattr(neuron, name)(*leading, True)
    assert old.store_v_seq is new.store_v_seq is True
    assert (old.backend, new.backend) == ("cupy", "torch")
    x = _currents(3, 4) * 0.5
    assert identical(old(x), new(x))
    assert identical(new.v_seq, old.v_seq)
    functional.reset_net(old)
    assert identical(theirs(x), old(x))
    named = getattr(compat, name)(backend="triton", step_mode="m")
    assert (named.backend, named.step_mode, named.store_v_seq) == ("triton", "m", False)
    assert compat.ILIFNode(4 / 3, 1.0, None, False, "m", "torch", True).store_v_seq
    assert compat.STBIFNode(0.5, 4, backend="triton").backend == "triton"


def test_errors_name_the_node():
    cases = [
        (compat.LIFNode, {"tau": 1.0}, "LIFNode: expected tau above 1"),
        (compat.ParametricLIFNode, {"init_tau": 1.0}, "ParametricLIFNode: expected init_tau above 1"),
        (compat.KLIFNode, {"tau": 0.5}, "KLIFNode: expected tau above 1"),
        (compat.QIFNode, {"a0": 0.0}, "QIFNode: expected a0 above 0"),
        (compat.EIFNode, {"delta_T": -1.0}, "EIFNode: expected delta_T above 0"),
        (compat.IFNode, {"surrogate_function": "none such"}, "IFNode: expected surrogate"),
        (compat.ILIFNode, {"surrogate_function": surrogate.ATan()}, "spiking MultiLevelSpikeCount"),
    ]
    for kind, options, message in cases:
        with pytest.raises(ValueError, match=message):
            kind(**options)


@pytest.mark.parametrize("name", OPTIONS)
def test_state_dicts_are_exchanged_and_copies_go_on(name):
    node, theirs = _node(compat, name), _node(neuron, name)
    assert {k: v.shape for k, v in node.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(node.state_dict(), strict=True)
    node.load_state_dict(theirs.state_dict(), strict=True)
    node(_currents(3, 4).requires_grad_())
    buffer = io.BytesIO()
    torch.save(node, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(node), torch.load(buffer, weights_only=False)]
    expected = node(_currents(3, 4, seed=1))
    for each in copies:
        assert identical(each(_currents(3, 4, seed=1)), expected)


def test_a_change_of_shape_starts_at_rest_again():
    for module in (compat, neuron):
        node = module.IzhikevichNode(step_mode="m", v_reset=-0.5, w_rest=0.2)
        node(_currents(3, 8))
        fresh = module.IzhikevichNode(step_mode="m", v_reset=-0.5, w_rest=0.2)
        assert identical(node(_currents(3, 5)), fresh(_currents(3, 5)))


def test_a_state_that_was_set_by_hand_is_the_start():
    x = _currents(4, 6)
    for value in (0.4, torch.full((6,), 0.4)):
        nodes = [module.LIFNode(step_mode="m", store_v_seq=True) for module in (compat, neuron)]
        for node in nodes:
            node.v = value
            node(x)
        torch.testing.assert_close(*(node.v_seq for node in nodes), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_membranes_of_half_precision_are_float32(dtype):
    node = compat.LIFNode(step_mode="m")
    assert node(_currents(3, 4).to(dtype)).dtype == dtype
    assert node.v.dtype == torch.float32
    assert node(_currents(3, 4).double()).dtype == node.v.dtype == torch.float64


@pytest.mark.parametrize("name", ["IFNode", "LIFNode", "KLIFNode", "ILIFNode", "CUBALIFNode"])
def test_fires_at_equality(name):
    ours, theirs = (_node(module, name, v_threshold=1.0) for module in (compat, neuron))
    x = torch.tensor([[0.5, 1.0, 1.5, 2.0, 2.5]]).repeat(3, 1)
    assert identical(ours(x), theirs(x))
    assert compat.IFNode()(torch.ones(1)) == 1


# ---- subclasses ------------------------------------------------------------------------------------------------------


def test_a_subclass_that_overrides_the_charge_is_run_through_it():
    class Perfect(compat.LIFNode):
        def neuronal_charge(self, x):
            self.v = self.v + x

    for step_mode in ("s", "m"):
        options = {"step_mode": step_mode, "store_v_seq": True, "surrogate_function": surrogate.ATan()}
        results = [_train_step(kind(**options), _currents(4, 7)) for kind in (Perfect, neuron.IFNode)]
        for ours, theirs in zip(*(values + list(grads) for values, grads in results), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_phases_together_are_the_node(name):
    """What a subclass that changes one phase gets from the others."""

    class Same(getattr(compat, name)):
        def neuronal_fire(self):
            return super().neuronal_fire()

    assert Same.overridden == {"neuronal_fire"}
    for options in OPTIONS[name]:
        nodes = [kind(**options, step_mode="m", store_v_seq=True) for kind in (Same, getattr(compat, name))]
        results = [_train_step(node, _currents(4, 7) * 0.5) for node in nodes]
        for a, b in zip(*(values + list(grads) for values, grads in results), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("store_v_seq", [False, True])
def test_a_subclass_that_overrides_the_transition_is_run_through_it(step_mode, store_v_seq):
    def twice(base):
        class Twice(base):
            def single_step_functional_forward(self, inputs, states, **kwargs):
                return super().single_step_functional_forward((2 * inputs[0],), states, **kwargs)

        return Twice(step_mode=step_mode, store_v_seq=store_v_seq, tau=3.0)

    x = _currents(4, 7)
    ours, theirs = (twice(module.LIFNode) for module in (compat, neuron))
    spikes = torch.stack([ours(x_t) for x_t in x]) if step_mode == "s" else ours(x)
    theirs.step_mode = "s"  # over sequences SpikingJelly 2.0.0 passes the override by, without store_v_seq
    assert identical(spikes, torch.stack([theirs(x_t) for x_t in x]))
    torch.testing.assert_close(ours.v, theirs.v, rtol=1e-6, atol=1e-6)
    if store_v_seq:
        torch.testing.assert_close(ours.v_seq, theirs.v_seq, rtol=1e-6, atol=1e-6)


def test_a_subclass_with_a_sequence_of_its_own():
    class Silent(compat.IFNode):
        def multi_step_functional_forward(self, inputs, states, **kwargs):
            return (torch.zeros_like(inputs[0]),), states

    node = Silent(step_mode="m")
    assert node(torch.ones(3, 2)).sum() == 0
    node.step_mode = "s"
    assert node(torch.ones(2)).sum() == 2


# ---- functions -------------------------------------------------------------------------------------------------------


def test_functions_equal_spikingjellys():
    x, v, w = _currents(5, 3, 7) * 0.6, _currents(3, 7, seed=1) * 0.2, _currents(3, 7, seed=2) * 0.1
    bounds = (torch.tensor(0.3), torch.tensor(3.0), torch.tensor(-2.0))
    calls = [
        ("if_multi_step", (v, 0.8, None, surrogate.ATan(), True, True)),
        ("lif_multi_step", (v, 3.0, False, 0.8, -0.1, None, True, True)),
        ("plif_multi_step", (v, torch.tensor(0.3), True, 0.8)),
        ("qif_multi_step", (v, 2.5, 0.9, -0.2, -0.1, 0.7, 0.8, True, None, True)),
        ("eif_multi_step", (v, 2.5, 0.9, -0.2, -0.1, 0.7, 0.8)),
        ("izhikevich_multi_step", (v, w, 2.5, 0.9, -0.2)),
        ("izhikevich_multi_step", (v, w, 2.5, 0.9, -0.2, -0.1, 0.2, 0.1, 3.0, 0.7, 0.8, True, None, True)),
        ("ilif_multi_step", (v, 2.5, 0.6, surrogate.MultiLevelSpikeCount(3), False, True)),
        ("ilif_multi_step", (v,)),
        ("stbif_multi_step", (v + 0.5, torch.zeros_like(v), *bounds)),
    ]
    for name, arguments in calls:
        ours, theirs = (getattr(module, name)(x, *arguments) for module in (compat_functional, functional))
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="neuron_storage"):
        compat_functional.if_multi_step(x, v, neuron_storage="fp16")


# ---- without SpikingJelly --------------------------------------------------------------------------------------------


def test_works_where_spikingjelly_is_not_installed():
    code = """
import sys
sys.modules["spikingjelly"] = None
import copy
import torch
from fastcifar.compat import spikingjelly as neuron
for name in neuron.__all__:
    if not name.endswith("Node"):
        continue
    node = getattr(neuron, name)(*((0.5, 4) if name == "STBIFNode" else ()))
    node.step_mode = "m"
    node.store_v_seq = True
    a = node(torch.ones(4, 3) * 1.5)
    node.detach()
    assert isinstance(copy.deepcopy(node).double().state_dict(), dict)
    node.reset()
    assert not any(isinstance(m, torch.Tensor) for _, m in node.named_memories())
    node.step_mode = "s"
    b = torch.stack([node(torch.ones(3) * 1.5) for _ in range(4)])
    assert torch.equal(a, b), name
    memories = node.double().memories()
    assert all(m.dtype == torch.float64 for m in memories)
    try:
        node.step_mode = "x"
    except ValueError as error:
        assert "expected 's'" in str(error)
    else:
        raise AssertionError("a step mode of 'x' was accepted")
node = neuron.ILIFNode(surrogate_function=neuron.MultiLevelSpikeCount(2))
assert node(torch.tensor([0.2, 1.2, 7.0])).tolist() == [0, 1, 2]
assert neuron.MultiLevelSpikeCount(2, spiking=False)(torch.tensor([0.5, 7.0])).tolist() == [0.5, 2]
for count, window in ((0, None), (2, (1.0, 0.0)), (1.5, None)):
    try:
        neuron.MultiLevelSpikeCount(count, True, window)
    except (TypeError, ValueError) as error:
        assert "MultiLevelSpikeCount: expected" in str(error)
    else:
        raise AssertionError("accepted")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
