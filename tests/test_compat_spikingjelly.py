"""fastcifar.compat.spikingjelly against SpikingJelly itself, and without it."""

import copy
import io
import subprocess
import sys

import pytest
import torch

from fastcifar.compat import spikingjelly as compat
from fastcifar.spec import identical

neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
functional = pytest.importorskip("spikingjelly.activation_based.functional")

SURROGATES = [surrogate.ATan, surrogate.Sigmoid, surrogate.PiecewiseQuadratic, surrogate.Rect, surrogate.SoftSign]


def _currents(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.5


def _train_step(node, x, single_step):
    x = x.clone().requires_grad_()
    spikes = torch.stack([node(x_t) for x_t in x]) if single_step else node(x)
    (grad,) = torch.autograd.grad((spikes * _currents(*spikes.shape, seed=1)).sum(), x)
    return spikes.detach(), node.v.detach(), grad


@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("detach_reset", [False, True])
def test_same_numbers_as_spikingjelly(kind, step_mode, v_reset, detach_reset):
    x = _currents(5, 3, 17)
    results = []
    for module in (compat, neuron):
        node = module.LIFNode(
            tau=3.0,
            v_reset=v_reset,
            surrogate_function=kind(),
            detach_reset=detach_reset,
            step_mode=step_mode,
            store_v_seq=True,
        )
        first = _train_step(node, x, step_mode == "s")
        if step_mode == "m":
            first = (*first, node.v_seq.detach())
        functional.reset_net(node)
        assert node.v == (0.0 if v_reset is None else v_reset)
        results.append((*first, *_train_step(node, x * 0.5, step_mode == "s")))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_spikingjelly_treats_it_as_its_own(capsys):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), compat.LIFNode(), compat.LIFNode())
    functional.set_step_mode(net, "m")
    assert net[1].step_mode == net[2].step_mode == "m"
    net[1](torch.zeros(2, 3, 4).requires_grad_())
    functional.detach_net(net)
    assert not net[1].v.requires_grad
    functional.reset_net(net)
    assert net[1].v == 0.0
    assert "WARNING" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="x"):
        net[1].step_mode = "x"


def test_arguments_of_both_generations():
    old = compat.LIFNode(2.0, True, 1.0, 0.0, surrogate.ATan(), True, "m", "cupy", True)
    new = compat.LIFNode(2.0, True, 1.0, 0.0, surrogate.ATan(), True, "m", True)
    assert old.store_v_seq is new.store_v_seq is True
    assert (old.backend, new.backend) == ("cupy", "torch")
    assert identical(old(_currents(3, 4)), new(_currents(3, 4)))
    assert compat.LIFNode(backend="triton").step_mode == "s"
    with pytest.raises(ValueError, match="LIFNode: expected tau above 1"):
        compat.LIFNode(tau=1.0)


def test_state_dict_is_empty_and_copies_work():
    node = compat.LIFNode(step_mode="m")
    node(_currents(3, 4))
    assert not node.state_dict()
    assert not neuron.LIFNode().state_dict()
    buffer = io.BytesIO()
    torch.save(node, buffer)
    buffer.seek(0)
    expected = node(_currents(3, 4, seed=1))
    node.reset()
    node(_currents(3, 4))
    assert identical(copy.deepcopy(node)(_currents(3, 4, seed=1)), expected)
    assert identical(torch.load(buffer, weights_only=False)(_currents(3, 4, seed=1)), expected)


def test_a_change_of_shape_starts_at_rest_again():
    for module in (compat, neuron):
        node = module.LIFNode(step_mode="m", v_reset=-0.5)
        node(_currents(3, 8))
        assert identical(node(_currents(3, 5)), module.LIFNode(step_mode="m", v_reset=-0.5)(_currents(3, 5)))


def test_a_subclass_that_overrides_the_charge_is_run_through_it():
    class Perfect(compat.LIFNode):
        def neuronal_charge(self, x):
            self.v = self.v + x

    for step_mode in ("s", "m"):
        node = Perfect(step_mode=step_mode, store_v_seq=True)
        x = _currents(4, 7)
        spikes, v, _ = _train_step(node, x, step_mode == "s")
        expected = neuron.IFNode(step_mode=step_mode, store_v_seq=True)
        their_spikes, their_v, _ = _train_step(expected, x, step_mode == "s")
        assert identical(spikes, their_spikes)
        assert identical(v, their_v)


def test_any_callable_is_a_surrogate():
    node = compat.LIFNode(surrogate_function=lambda u: torch.sigmoid(10 * u), step_mode="m")
    spikes = node(_currents(3, 4))
    assert 0 < spikes.min() < spikes.max() < 1


def test_works_where_spikingjelly_is_not_installed():
    code = """
import sys
sys.modules["spikingjelly"] = None
import torch
from fastcifar.compat.spikingjelly import LIFNode
node = LIFNode(step_mode="m", store_v_seq=True)
a = node(torch.ones(4, 3) * 1.5)
node.detach(); node.reset()
assert node.v == 0.0 and node.v_seq is None
node.step_mode = "s"
b = torch.stack([node(torch.ones(3) * 1.5) for _ in range(4)])
assert torch.equal(a, b)
try:
    node.step_mode = "x"
except ValueError as error:
    assert "expected 's'" in str(error)
else:
    raise AssertionError("a step mode of 'x' was accepted")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
