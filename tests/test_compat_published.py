"""What SpikingJelly's and snnTorch's published unit tests check of the classes that fastcifar.compat has, restated.

Neither package's wheel holds its tests; these are the behaviours that the tests of their repositories check, in our own
words and with our own numbers, so that they hold without the peers as well. Each test names the peer's file and test.
SpikingJelly's are in ``test/activation_based``, snnTorch's in ``tests``.

What does not apply:

- ``test_functional_neuron.py``: the tests of LIAFNode, ActivationAwareIFNode, the PSNs, GatedLIFNode, FlexSN, Lava's
  CUBA neuron and save_v_LIFNode, which are not offered here; ``*_exports``, ``*_public_api_documentation`` and
  ``test_multi_step_names_*``, which are about SpikingJelly's own modules; ``test_stbif_module_derives_is_work``: 2.0.0
  has no ``is_work``.
- ``test_ilif_node.py``: the conversion layers (SpikeCountToBinary, TemporalBinSum, binary slots), which are not
  neurons; the Triton tests; ``test_ilif_reuses_lif_dynamics_*``'s ``supported_backends``, as ``backend`` has no effect;
  ``test_ilif_uses_spike_count_surrogate``: the default is our own MultiLevelSpikeCount, of the same attributes.
- ``test_memory.py``: what it checks of ``base`` with modules of its own. ``SimpleBaseNode``'s tests are restated for a
  subclass that overrides ``neuronal_charge``.
- ``test_functional.py``: what it checks of the cache of ``reset_net`` with modules of its own.
- ``test_neuron_kernel_surrogate_contract.py``: the CUDA source codes; the gradients are tested against SpikingJelly's
  in test_compat_spikingjelly.py and test_spiking.py.
- ``test_ann2snn_transformer.py``: all but the tests of ST-BIF itself; those of Triton.
- snnTorch's ``test_instances``: it counts other neurons in a list that is public there.
"""

import types

import pytest
import torch
from torch import nn

from fastcifar.compat import snntorch as snn
from fastcifar.compat import spikingjelly as neuron
from fastcifar.spiking.surrogate import Sigmoid


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _reset(h, spike, threshold, v_reset):
    return h - spike * threshold if v_reset is None else spike * v_reset + (1 - spike) * h


# ---- test_functional_neuron.py ---------------------------------------------------------------------------------------

STEPS = {
    "if": (lambda: neuron.IFNode(0.8, 0.0), lambda x, v: v + x),
    "if, soft": (lambda: neuron.IFNode(0.8, None), lambda x, v: v + x),
    "lif": (lambda: neuron.LIFNode(2.5, True, 0.8, -0.2), lambda x, v: v + (x - (v + 0.2)) / 2.5),
    "lif, undecayed": (lambda: neuron.LIFNode(2.5, False, 0.8, -0.2), lambda x, v: v - (v + 0.2) / 2.5 + x),
    "plif": (lambda: neuron.ParametricLIFNode(2.5, True, 0.8, 0.0), lambda x, v: v + (x - v) / 2.5),
    "qif": (
        lambda: neuron.QIFNode(2.5, 0.4, 0.6, 0.9, -0.2, -0.3),
        lambda x, v: v + (x + 0.6 * (v + 0.2) * (v - 0.4)) / 2.5,
    ),
    "eif": (
        lambda: neuron.EIFNode(2.5, 0.7, 0.4, 0.9, -0.2, -0.3),
        lambda x, v: v + (x - 0.2 - v + 0.7 * ((v - 0.4) / 0.7).exp()) / 2.5,
    ),
    "klif": (lambda: neuron.KLIFNode(False, 2.5, True, 0.8, 0.0), lambda x, v: (v + (x - v) / 2.5).relu()),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_a_step_is_the_equation(name, step_mode):
    """test_{if,lif,plif,klif}_step_matches_module, test_lif_step_is_composed_from_charge_and_voltage_reset,
    test_nonlinear_if_steps_match_modules."""
    make, charge = STEPS[name]
    x, v, node = _random(2, 3), _random(2, 3, seed=1) * 0.2, make()
    node.v, node.step_mode = v.clone(), step_mode
    spike = node(x) if step_mode == "s" else node(x.unsqueeze(0)).squeeze(0)
    h = charge(x, v)
    expected = (h >= node.v_threshold).float()
    assert torch.equal(spike, expected)
    torch.testing.assert_close(node.v, _reset(h, expected, node.v_threshold, node.v_reset))


def test_a_step_of_two_states_is_the_equation():
    """test_izhikevich_step_matches_module, test_cuba_lif_step_matches_module."""
    x, v, w = _random(2, 3), _random(2, 3, seed=1) * 0.2, _random(2, 3, seed=2) * 0.1
    node = neuron.IzhikevichNode(2.5, 0.4, 0.6, 0.9, -0.3, -0.2, 0.0, 3.0, 0.1, 0.2)
    node.v, node.w = v, w
    spike, h = node(x), v + (x + 0.6 * (v + 0.2) * (v - 0.4) - w) / 2.5
    torch.testing.assert_close(spike, (h >= 0.9).float())
    torch.testing.assert_close(node.v, _reset(h, spike, 0.9, -0.3))
    torch.testing.assert_close(node.w, w + (0.1 * (h + 0.2) - w) / 3.0 + 0.2 * spike)

    node = neuron.CUBALIFNode(0.4, 0.7, 0.8, None)
    node.v, node.c = v, w
    spike, c = node(x), 0.4 * w + x
    torch.testing.assert_close(spike, (0.7 * v + c >= 0.8).float())
    torch.testing.assert_close(node.v, _reset(0.7 * v + c, spike, 0.8, None))
    torch.testing.assert_close(node.c, c)


@pytest.mark.parametrize("scale_reset", [False, True])
def test_klif_resets_the_membrane_over_k_where_asked(scale_reset):
    """test_klif_step_matches_module."""
    node = neuron.KLIFNode(scale_reset, 2.0, True, 0.8, None)
    node.k.data.fill_(2.0)
    node(torch.tensor([1.0, 0.4]))  # charges 0.5 and 0.2, times k 1 and 0.4
    torch.testing.assert_close(node.v.detach(), torch.tensor([0.1, 0.2] if scale_reset else [0.2, 0.4]))


def test_plif_learns_its_time_constant():
    """test_plif_step_matches_module_and_parameter_gradient."""
    node = neuron.ParametricLIFNode(2.5, True, 0.8, 0.0, Sigmoid(), detach_reset=True)
    x, v = _random(2, 3), _random(2, 3, seed=1) * 0.2
    node.v = v
    (node(x).sum() + node.v.sum()).backward()
    k = torch.tensor(1 / 2.5)
    h = v + (x - v) * k
    slope = Sigmoid().grad(h - 0.8) + (h < 0.8)  # of the spike, and of the membrane that is not reset
    torch.testing.assert_close(node.w.grad, (slope * (x - v) * k * (1 - k)).sum())


def test_materialize_states_changes_nothing():
    """test_materialize_states_is_pure."""
    node, x = neuron.IFNode(v_reset=-0.5), _random(2, 3)
    (v,) = node.materialize_states((x,), (node.v,), "s")
    assert node.v == -0.5
    assert torch.equal(v, torch.full_like(x, -0.5))
    assert node.materialize_states((x,), (node.v,), "m")[0].shape == (3,)


class Doubled(neuron.IFNode):
    """A subclass that changes a phase."""

    def neuronal_charge(self, x):
        super().neuronal_charge(2 * x)


NODES = [neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode, neuron.IzhikevichNode, neuron.ILIFNode, Doubled]


@pytest.mark.parametrize("kind", NODES)
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_the_functional_forward_leaves_the_node_alone_and_is_what_a_call_does(kind, step_mode):
    """test_neuron_functional_forward_is_pure_and_backs_regular_forward,
    test_ilif_functional_forward_is_pure_and_backs_regular_forward."""
    pytest.importorskip("spikingjelly.activation_based.base")  # functional_forward is its MemoryModule's
    node = kind(step_mode=step_mode, store_v_seq=step_mode == "m")
    x = _random(4, 2, 3) if step_mode == "m" else _random(2, 3)
    node.v = _random(2, 3, seed=1).requires_grad_()
    before = list(node.memories())
    (outputs,), states = node.functional_forward((x,), tuple(before))
    assert all(a is b for a, b in zip(node.memories(), before, strict=True))
    torch.testing.assert_close(node(x), outputs)
    for now, expected in zip(node.memories(), states, strict=True):
        torch.testing.assert_close(now, expected)
    assert torch.autograd.grad(outputs.sum() + states[0].sum(), before[0])[0].abs().sum() > 0


@pytest.mark.parametrize("kind", [neuron.IFNode, neuron.LIFNode])
def test_observed_membranes_are_no_state(kind):
    """test_store_v_seq_does_not_change_functional_state_layout."""
    node, x = kind(step_mode="m", store_v_seq=True), _random(3, 2)
    assert [name for name, _ in node.named_memories()] == ["v"]
    node(x)
    assert node.v_seq.shape == x.shape
    node.store_v_seq = False
    assert node.v_seq is None
    node.step_mode, node.store_v_seq = "s", True
    for _ in range(2):
        node(x[0])
    assert node.v_seq.shape == (2, 2)
    node.detach()
    assert torch.equal(node.v_seq[-1], node.v)


# ---- test_ilif_node.py -----------------------------------------------------------------------------------------------


def test_ilif_counts_carries_and_windows():
    """test_ilif_training_outputs_integer_counts_and_updates_voltage, test_ilif_tau_is_applied_during_charge,
    test_ilif_eval_returns_integer_counts, test_ilif_training_straight_through_gradient_is_windowed."""
    for node in (neuron.ILIFNode(), neuron.ILIFNode().eval()):
        assert node(torch.tensor([2.3, 0.4, 6.1, -1.0])).tolist() == [2, 0, 4, 0]
        torch.testing.assert_close(node.v, torch.tensor([0.3, 0.4, 2.1, -1.0]))
        node(torch.zeros(4))  # a quarter of the membrane is left
        torch.testing.assert_close(node.v, torch.tensor([0.075, 0.1, 0.525 - 1, -0.25]))
    x = torch.tensor([-0.3, 0.3, 4.2]).requires_grad_()
    neuron.ILIFNode()(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 0]


def test_ilif_takes_another_window():
    """test_ilif_supports_custom_gradient_window, test_multi_level_spike_count_*."""
    x = torch.tensor([-0.3, 4.2, 4.8]).requires_grad_()
    counts = neuron.MultiLevelSpikeCount(4, grad_window=(-0.5, 4.5))
    for function in (counts, neuron.ILIFNode(surrogate_function=counts)):
        spikes = function(x)
        assert spikes.tolist() == [0, 4, 4]
        assert torch.autograd.grad(spikes.sum(), x)[0].tolist() == [1, 1, 0]
    for wrong in ((0,), (-1,), (4, True, (1.0, 0.0))):
        with pytest.raises(ValueError, match="from 1 on"):
            neuron.MultiLevelSpikeCount(*wrong)
    for wrong in (1.5, False):
        with pytest.raises(TypeError, match="integer"):
            neuron.MultiLevelSpikeCount(wrong)


def test_ilif_refuses_other_surrogates():
    """test_ilif_rejects_incompatible_surrogate."""
    for wrong in (Sigmoid(), neuron.MultiLevelSpikeCount(4, spiking=False)):
        with pytest.raises(ValueError, match="spiking MultiLevelSpikeCount"):
            neuron.ILIFNode(surrogate_function=wrong)


def test_ilif_is_the_same_in_training_and_evaluation_and_keeps_the_length():
    """test_ilif_train_and_eval_have_identical_forward_semantics, test_ilif_multistep_eval_preserves_sequence_length."""
    x, results = _random(6, 2, 3) * 2, []
    for train in (True, False):
        node = neuron.ILIFNode(v_threshold=0.5, step_mode="m", store_v_seq=True).train(train)
        node.v = torch.full((2, 3), 0.2)
        results.append((node(x), node.v, node.v_seq))
    assert results[0][0].shape == results[0][2].shape == x.shape
    assert results[0][0].max() > 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert isinstance(node, neuron.LIFNode)
    assert (node.decay_input, node.v_reset) == (False, None)


# ---- test_memory.py --------------------------------------------------------------------------------------------------


def test_memories_are_found_named_taken_out_and_put_back():
    """test_named_memories*, test_memories, test_extract_memories, test_load_memories*."""
    base = pytest.importorskip("spikingjelly.activation_based.base")
    net = nn.Sequential(neuron.IFNode(), nn.Sequential(neuron.LIFNode(), neuron.CUBALIFNode()))
    names = [name for name, _ in base.named_memories(net, prefix="net")]
    assert names == ["net.0.v", "net.1.0.v", "net.1.1.v", "net.1.1.c"]
    assert list(base.memories(net)) == base.extract_memories(net) == [0.0] * 4
    base.load_memories(net, [torch.tensor([float(i)]) for i in range(4)])
    assert net[1][1].c == 3
    with pytest.raises(ValueError, match="mismatch"):
        base.load_memories(net, [0.0])


def test_a_network_as_a_function_of_its_states():
    """test_to_functional_forward_stateful, *_nested_stateful, *_state_restoration."""
    base = pytest.importorskip("spikingjelly.activation_based.base")
    net = nn.Sequential(nn.Linear(4, 3), neuron.IFNode(step_mode="m"), neuron.CUBALIFNode())
    net[2].step_mode = "m"
    x, states = _random(5, 2, 4), base.extract_memories(net)
    (outputs,), after = base.to_functional_forward(net)((x,), tuple(states))
    assert base.extract_memories(net) == states
    torch.testing.assert_close(net(x), outputs)
    for now, expected in zip(base.extract_memories(net), after, strict=True):
        torch.testing.assert_close(now, expected)


def test_a_neuron_of_the_users_own_charge():
    """test_simple_base_node_forward_uses_charge_fire_reset_hooks, test_simple_nodes_match_production_nodes."""

    class Cubed(neuron.IFNode):
        def neuronal_charge(self, x):
            self.v = self.v + x**3

    x = torch.tensor([[1.0], [2.0], [1.0], [2.0]])
    for step_mode in ("s", "m"):
        node = Cubed(v_threshold=15.0, v_reset=None, step_mode=step_mode)
        spikes = node(x) if step_mode == "m" else torch.stack([node(x_t) for x_t in x])
        assert spikes.flatten().tolist() == [0, 0, 0, 1]
        assert node.v.tolist() == [3]


# ---- test_functional.py ----------------------------------------------------------------------------------------------


def test_reset_net_resets_wherever_the_neuron_is():
    """test_reset_net_with_{ifnode_actually_resets,lifnode,deeply_nested_modules,module_list},
    test_reset_net_cached_produces_same_result_as_fresh, *_preserves_parameters."""
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    blocks = [nn.Sequential(nn.Linear(4, 4), kind()) for kind in (neuron.IFNode, neuron.LIFNode)]
    net = nn.Sequential(blocks[0], nn.ModuleDict({"inner": blocks[1]})["inner"])
    weights = [p.clone() for p in net.parameters()]
    for _ in range(2):
        net(_random(2, 4))
        assert torch.is_tensor(blocks[0][1].v)
        functional.reset_net(net)
        assert blocks[0][1].v == blocks[1][1].v == 0.0
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), weights, strict=True))


def test_training_steps_with_a_reset_between_them():
    """test_reset_net_in_training_loop."""
    net = nn.Sequential(nn.Linear(4, 8), neuron.IFNode(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    before = net[0].weight.detach().clone()
    for seed in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(_random(6, 4, seed=seed)), _random(6, 2, seed=seed + 9)).backward()
        optimizer.step()
        net[1].reset()
    assert not torch.equal(net[0].weight, before)


# ---- test_ann2snn_transformer.py: ST-BIF -----------------------------------------------------------------------------


def _quantizer(**more):
    """What STBIFNode reads of a quantiser: values -4 .. 3 times 0.25."""
    return types.SimpleNamespace(
        s=torch.tensor(0.25), sym=True, pos_max=torch.tensor(3), neg_min=torch.tensor(-4), **more
    )


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_stbif_sums_up_to_the_quantised_value(step_mode):
    """test_spikezip_stbif_matches_quantizer_accumulation, *_step_matches_multi_step,
    *_optimized_torch_matches_single_step_reference."""
    node = neuron.STBIFNode.from_quantizer(_quantizer())
    node.step_mode = step_mode
    value = torch.tensor([-2.0, -0.7, -0.2, 0.0, 0.3, 0.9])
    x = torch.cat([value.unsqueeze(0), torch.zeros(15, 6)])
    outputs = node(x) if step_mode == "m" else torch.stack([node(x_t) for x_t in x])
    quantised = (value / 0.25).round().clamp(-4, 3) * 0.25
    torch.testing.assert_close(outputs.sum(0), quantised)
    torch.testing.assert_close(node.accumulated, quantised)
    assert set(node.cur_output.tolist()) <= {-1.0, 0.0, 1.0}


def test_stbif_infers_its_level_and_follows_the_dtype():
    """test_spikezip_stbif_infers_level_from_quantizer_bounds, *_state_follows_module_dtype, *_rejects_invalid_level."""
    assert neuron.STBIFNode.from_quantizer(_quantizer()).level == 8
    node = neuron.STBIFNode.from_quantizer(_quantizer(level=16))
    assert node.level == 16
    node(_random(2, 3))
    node.double()
    assert node(_random(2, 3).double()).dtype == torch.float64
    assert all(state.dtype == torch.float64 for state in node.memories())
    for level in (0, 1, True):
        with pytest.raises(ValueError, match="level must be >= 2"):
            neuron.STBIFNode(0.25, level, sym=True)


# ---- snnTorch: test_snntorch/test_leaky.py and test_snntorch.py ------------------------------------------------------


def test_leaky_decays():
    """test_leaky."""
    node, x = snn.Leaky(beta=0.5), torch.tensor([[0.4], [0.1]])
    spk, mem = node(x[0], node.init_leaky())
    later, decayed = node(x[1], mem)
    assert decayed == 0.5 * mem + x[1]
    assert spk == later == 0


def test_leaky_numbers_its_reset_mechanisms():
    """test_leaky_reset."""
    for number, mechanism in enumerate(("subtract", "zero", "none")):
        node = snn.Leaky(beta=0.5, reset_mechanism=mechanism)
        assert node.reset_mechanism_val == number
        node.reset_mechanism = "zero"
        assert node.reset_mechanism_val == 1


@pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
def test_leaky_with_a_hidden_state(mechanism):
    """test_leaky_init_hidden*, test_leaky_cases."""
    node, x = snn.Leaky(beta=0.5, init_hidden=True, reset_mechanism=mechanism), torch.tensor([[0.4], [0.1]])
    assert node(x[0]) == node(x[1]) == 0
    with pytest.raises(TypeError, match="mem"):
        node(x[0], x[1])


def test_leaky_learns_the_factor_of_its_spikes():
    """test_leaky_hidden_learn_graded_instance."""
    node = snn.Leaky(beta=0.5, init_hidden=True, learn_graded_spikes_factor=True)
    node(torch.tensor([3.0, 0.1])).sum().backward()
    assert node.graded_spikes_factor.grad == 1


def test_leaky_compiles_in_one_graph():
    """test_leaky_compile_fullgraph, and the path of the kernel."""
    for options in ({"surrogate_disable": True}, {}, {"init_hidden": True}):
        explanation = torch._dynamo.explain(snn.Leaky(beta=0.5, **options))(torch.tensor([0.25]))
        assert explanation.graph_break_count == 0


def test_leaky_fires_far_above_its_threshold():
    """test_fire."""
    node = snn.Leaky(beta=0.5)
    assert node.fire(10 * node.threshold) == 1
    assert node.fire(node.threshold) == 0
