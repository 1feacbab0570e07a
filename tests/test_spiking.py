"""What is special about the spiking family, shown on its most used neuron; the matrix that every op shares is in
conformance.py, what is special about each neuron in test_neurons.py."""

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar import _library
from fastcifar.spec import identical
from fastcifar.spiking import LIF, functional, lif, modules, neurons, pack, reference, surrogate

needs_extension = pytest.mark.skipif(_library.WHY_NO_EXTENSION is not None, reason="the extension is not built")
MODULES = [m for m in vars(modules).values() if isinstance(m, type) and "function" in vars(m)]
SURROGATES = [surrogate.ATan, surrogate.Sigmoid, surrogate.PiecewiseQuadratic, surrogate.Rectangular]


def _currents(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5).to(dtype)


# ---- against SpikingJelly --------------------------------------------------------------------------------------------


def _peer_surrogate(ours):
    peers = pytest.importorskip("spikingjelly.activation_based.surrogate")
    name = {"Rectangular": "Rect"}.get(type(ours).__name__, type(ours).__name__)
    return getattr(peers, name)(alpha=ours.alpha)


GRID = list(itertools.product((2.0, 3.0, 1.3, 16.0), (True, False), (0.0, None, -0.3, 0.25), (True, False)))


@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize("alpha", [None, 0.7, 5.0])
def test_spikes_and_gradients_equal_spikingjelly(kind, alpha):
    """Spikes and membranes to the bit, gradients to 1e-6 of the largest; or, where SpikingJelly's own rounding error is
    beyond that (its sigmoid gradient cancels in 1 - sigmoid), nearer to the float64 gradient than SpikingJelly's."""
    peer = pytest.importorskip("spikingjelly.activation_based.functional")
    ours = kind() if alpha is None else kind(alpha=alpha)
    theirs = _peer_surrogate(ours)

    def run(function, dtype, *args, **options):
        leaves = [_currents(6, 5, 41, seed=1).to(dtype), (_currents(5, 41, seed=2) * 0.3).to(dtype)]
        outputs = function(*[t.requires_grad_() for t in leaves], *args, **options, store_v_seq=True)
        weights = [_currents(*o.shape, seed=3 + i).to(dtype) for i, o in enumerate(outputs)]
        return [o.detach() for o in outputs], torch.autograd.grad(outputs, leaves, weights)

    for (tau, decay_input, v_reset, detach_reset), threshold in zip(GRID, itertools.cycle((1.0, 0.5)), strict=False):
        options = {"tau": tau, "decay_input": decay_input, "v_threshold": threshold, "v_reset": v_reset}
        more = {"surrogate": ours, "detach_reset": detach_reset}
        mine, my_grads = run(lif, torch.float32, **options, **more)
        their, their_grads = run(peer.lif_multi_step, torch.float32, *options.values(), theirs, detach_reset)
        assert all(identical(a, b) for a, b in zip(mine, their, strict=True))
        for i, (a, b) in enumerate(zip(my_grads, their_grads, strict=True)):
            if (a - b).abs().max() > 1e-6 * b.abs().max():
                truth = run(reference.lif, torch.float64, **options, **more)[1][i]
                assert (a - truth).abs().max() < (b - truth).abs().max(), options


def test_default_alphas_are_spikingjellys():
    peers = pytest.importorskip("spikingjelly.activation_based.surrogate")
    for kind, name in zip(SURROGATES, ("ATan", "Sigmoid", "PiecewiseQuadratic", "Rect"), strict=True):
        assert kind().alpha == getattr(peers, name)().alpha


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_of_time_equal_the_whole_with_gradients_through_the_state(dtype):
    x = _currents(9, 4, 7, dtype=dtype)
    v = torch.zeros(4, 7)
    weight = _currents(9, 4, 7, seed=1, dtype=dtype)

    def chunked(x, v):
        spikes = []
        for part in x.split([1, 3, 5]):
            s, v, _ = lif(part, v)
            spikes.append(s)
        return torch.cat(spikes), v

    results = []
    for run in (chunked, lambda x, v: lif(x, v)[:2]):
        leaves = x.clone().requires_grad_(), v.clone().requires_grad_()
        spikes, v_last = run(*leaves)
        loss = (spikes * weight).float().sum() + v_last.square().sum()
        results.append((spikes, v_last, *torch.autograd.grad(loss, leaves)))
    for part, whole in zip(*results, strict=True):
        assert identical(part, whole)


def test_gradient_that_is_expanded_over_time_or_everywhere():
    for reduce in (lambda s: s.sum(), lambda s: s.mean(0).square().sum(), lambda s: s[..., :1].sum()):
        grads = []
        for run in (lif, reference.lif):
            x = _currents(5, 2, 8, 8).requires_grad_()
            grads.append(torch.autograd.grad(reduce(run(x)[0]), x)[0])
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)


def test_only_the_membrane_in_the_loss():
    grads = []
    for run in (lif, reference.lif):
        x = _currents(5, 30).requires_grad_()
        _, v_last, _ = run(x)
        grads.append(torch.autograd.grad(v_last.square().sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3), (0,), (3,), (1, 0), (1000, 3), (33, 1), (2, 1, 1, 1, 1, 1, 2)])
def test_unusual_shapes(shape):
    grads = []
    for run in (lif, reference.lif):
        x, v = _currents(*shape).requires_grad_(), _currents(*shape[1:], seed=1).requires_grad_()
        spikes, v_last, v_seq = run(x, v, store_v_seq=True)
        loss = spikes.sum() + v_last.sum() + v_seq.square().sum()
        grads.append((spikes, v_last, v_seq, *torch.autograd.grad(loss, (x, v), materialize_grads=True)))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@needs_extension
def test_dense_layouts_are_kept_and_read_in_place():
    x = _currents(3, 2, 5, 4, 6)
    for layout in (
        x,
        x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (3, 2)),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.movedim(0, -1).contiguous().movedim(-1, 0),
    ):
        leaf, grad = layout.detach().requires_grad_(), torch.ones_like(layout)
        with torch.profiler.profile() as profile:
            spikes, _, v_seq = lif(leaf, store_v_seq=True)
            (grad_x,) = torch.autograd.grad(spikes, leaf, grad)
        assert spikes.stride() == v_seq.stride() == grad_x.stride() == layout.stride()
        assert not [event.key for event in profile.key_averages() if "copy" in event.key or "clone" in event.key]


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 3),
    tau=st.floats(1.01, 50),
    v_reset=st.one_of(st.none(), st.floats(-1, 0.9)),
    threshold=st.floats(0.1, 3),
    decay_input=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_any_strides_and_options_equal_the_reference(shape, order, step, tau, v_reset, threshold, decay_input, dtype):
    permutation = list(range(len(shape)))
    order.shuffle(permutation)
    x = _currents(*[n * step for n in shape], dtype=dtype).permute(permutation)
    x = x[tuple(slice(None, None, step) for _ in shape)]
    options = {"tau": tau, "v_reset": v_reset, "v_threshold": threshold, "decay_input": decay_input}
    for got, expected in zip(lif(x, **options)[:2], reference.lif(x, **options)[:2], strict=True):
        assert identical(got, expected)


# ---- dtypes, modes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_in_the_inputs_half_dtype_is_accepted_and_kept_in_float32(dtype):
    x, v = _currents(4, 33, dtype=dtype), _currents(33, dtype=dtype).requires_grad_()
    spikes, v_last, _ = lif(x, v)
    assert (spikes.dtype, v_last.dtype) == (dtype, torch.float32)
    assert identical(v_last.detach(), lif(x, v.detach().float())[1])
    assert torch.autograd.grad(v_last.sum(), v)[0].dtype == dtype


def test_no_grad_and_inference_mode():
    x = _currents(3, 4).requires_grad_()
    with torch.no_grad():
        assert not lif(x)[0].requires_grad
    with torch.inference_mode():
        assert lif(x.detach().clone())[0].is_inference()


def test_runs_behind_a_convolution_under_autocast():
    conv, lifs = torch.nn.Conv2d(3, 4, 3), LIF()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spikes = lifs(conv(torch.randn(4, 3, 8, 8)).unflatten(0, (2, 2)))
    assert spikes.dtype == torch.bfloat16
    assert lifs.v.dtype == torch.float32
    spikes.float().sum().backward()
    assert conv.weight.grad.isfinite().all()


def test_inductor_compiles_forward_and_backward():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: lif(x * 2, surrogate="sigmoid")[0] + 1, fullgraph=True)
    x = _currents(4, 3, 5).requires_grad_()
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad((lif(x * 2, surrogate="sigmoid")[0] + 1).square().sum(), x)
    torch.testing.assert_close(got, expected)


NUMBERS = [2.0, 1.0, 0.0]  # tau, threshold, gain
LIF_ID = neurons.IDS["lif"]


def _forward(x, v=None, parameters=(None,) * 5, neuron=LIF_ID, numbers=NUMBERS, spike_format=0):
    op = torch.ops.fastcifar.neuron_forward.default
    return op(x, v, None, *parameters, neuron, numbers, 0.0, spike_format, False)


@needs_extension
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, "expected"),
        ({"x": torch.tensor(1.0)}, "expected"),
        ({"v": torch.zeros(4)}, "expected v"),
        ({"v": torch.zeros(3, dtype=torch.float64)}, "expected"),
        ({"parameters": (torch.ones(2), *[None] * 4)}, "expected"),
        ({"parameters": (torch.ones(3).double(), *[None] * 4)}, "expected"),
        ({"parameters": (torch.ones(1, 1, 3), *[None] * 4)}, "expected"),
        ({"neuron": 99}, "unknown neuron"),
        ({"neuron": -1}, "unknown neuron"),
        ({"numbers": [2.0]}, "expected 3 to 9 numbers"),
        ({"numbers": [2.0] * 10}, "expected 3 to 9 numbers"),
        ({"spike_format": 3}, "unknown format"),
        (
            {"spike_format": 2, "neuron": neurons.IDS["ilif"], "numbers": [0.5, 1, 0, 4, 0, 4]},
            "expected a neuron whose spikes are bits",
        ),
    ],
)
def test_direct_op_refuses_what_it_cannot_read(wrong, says):
    with pytest.raises(RuntimeError, match=f"neuron_forward: {says}"):
        _forward(**{"x": torch.zeros(2, 3)} | wrong)


@needs_extension
@pytest.mark.parametrize(
    ("grads", "surrogate", "widths", "says"),
    [
        ((torch.zeros(2, 4), None, None, None), 0, [1.0, 1.0, 0.0], "expected grad_spikes like x"),
        ((torch.zeros(2, 3).double(), None, None, None), 0, [1.0, 1.0, 0.0], "expected grad_spikes like x"),
        ((torch.zeros(2, 3), torch.zeros(2), None, None), 0, [1.0, 1.0, 0.0], "expected grad_v_last"),
        ((torch.zeros(2, 3), None, None, torch.zeros(2, 4)), 0, [1.0, 1.0, 0.0], "expected grad_v_seq"),
        ((torch.zeros(2, 3), None, None, None), 99, [1.0, 1.0, 0.0], "unknown surrogate"),
        ((torch.zeros(2, 3), None, None, None), 0, [1.0], "unknown surrogate"),
    ],
)
def test_direct_backward_refuses_what_it_cannot_read(grads, surrogate, widths, says):
    op = torch.ops.fastcifar.neuron_backward.default
    with pytest.raises(RuntimeError, match=f"neuron_backward: {says}"):
        op(*grads, torch.zeros(2, 3), *[None] * 7, LIF_ID, NUMBERS, 0.0, surrogate, widths, False, 0)


# ---- spikes as bytes and bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (2,), (4, 1), (2, 3, 8), (5, 7, 3)])
def test_packing_round_trip(shape):
    spikes = (_currents(*shape) > 0.5).float()
    assert identical(pack(spikes).unpack(), spikes)
    assert pack(spikes).count() == spikes.sum()
    swapped = spikes.movedim(1, -1) if spikes.dim() > 2 else spikes
    assert identical(pack(swapped).unpack(torch.bool), swapped.bool())
    with pytest.raises(TypeError, match="pack: expected spikes to be a tensor"):
        pack([1.0])


@pytest.mark.parametrize("spike_format", ["uint8", "packed"])
def test_spikes_without_a_gradient_refuse_to_be_asked_for_one(spike_format):
    x = _currents(3, 5)
    for asked in ({"x": x.clone().requires_grad_()}, {"x": x, "v_threshold": torch.ones((), requires_grad=True)}):
        with pytest.raises(ValueError, match="lif: expected no gradient to be asked for with spike_format="):
            lif(**asked, spike_format=spike_format)
        with torch.no_grad():
            lif(**asked, spike_format=spike_format)


# ---- module ----------------------------------------------------------------------------------------------------------


def test_module_keeps_resets_and_detaches_its_state():
    x = _currents(6, 4, 5)
    neurons = LIF(tau=3.0, store_v_seq=True)
    assert neurons.v is None
    first, second = neurons(x[:2]), neurons(x[2:])
    assert identical(torch.cat([first, second]), lif(x, tau=3.0)[0])
    assert identical(neurons.v_seq[-1], neurons.v)
    neurons.reset()
    assert neurons.v is None
    assert neurons.v_seq is None
    assert identical(neurons(x[:2]), first)
    neurons(x.clone().requires_grad_())
    neurons.detach()
    assert not neurons.v.requires_grad
    assert not neurons.state_dict()


def test_module_refuses_a_batch_of_another_shape_until_reset():
    neurons = LIF()
    neurons(torch.zeros(2, 8, 3))
    with pytest.raises(ValueError, match=r"expected v of shape \(5, 3\)"):
        neurons(torch.zeros(2, 5, 3))
    neurons.reset()
    assert neurons(torch.zeros(2, 5, 3)).shape == (2, 5, 3)


def test_module_moves_its_state_to_another_dtype():
    neurons = LIF()
    neurons(torch.zeros(2, 3))
    assert neurons.double().v.dtype == torch.float64
    assert neurons(torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_module_names_itself_in_errors():
    with pytest.raises(ValueError, match=r"LIF: expected tau above 1 with decay_input=True, got 0\.5"):
        LIF(tau=0.5)
    with pytest.raises(ValueError, match="expected alpha to be a positive"):
        surrogate.ATan(alpha=0.0)


@pytest.mark.parametrize("make", MODULES)
def test_every_module_carries_resets_moves_and_detaches_its_state(make):
    x = _currents(6, 4, 5)
    node = make(store_v_seq=True)
    whole = node(x)
    assert identical(node.v_seq[-1], node.v)
    node.reset()
    assert node.v is node.v_seq is None
    assert identical(torch.cat([node(x[:2]), node(x[2:].clone().requires_grad_())]), whole)
    twin = copy.deepcopy(node)
    node.detach()
    assert not any(getattr(node, s).requires_grad for s in node.states)
    assert identical(node(x), twin(x))
    assert all(getattr(node.double(), s).dtype == torch.float64 for s in node.states)
    assert node(x.double()).dtype == torch.float64
    assert node.extra_repr() == twin.extra_repr()
    with pytest.raises(TypeError, match=f"{make.__name__}: expected options .* got nonsense"):
        make(nonsense=1)


def test_learnt_parameters_are_in_the_state_dict_and_learn():
    threshold = torch.nn.Parameter(torch.full((5,), 0.9))
    for node, names in (
        (modules.PLIF(init_tau=3.0), {"w"}),
        (modules.PLIF(shape=(5,), v_threshold=threshold), {"w", "v_threshold"}),
        (modules.KLIF(init_k=1.2), {"k"}),
        (modules.LIF(v_threshold=threshold, tau=torch.full((5,), 3.0)), {"v_threshold", "tau"}),
        (modules.SignedIF(v_threshold=threshold), {"v_threshold"}),
    ):
        node(_currents(4, 3, 5)).square().sum().backward()
        assert set(node.state_dict()) == names
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in node.parameters())
        assert len(list(node.parameters())) == len(names - {"tau"})
        node.zero_grad()
    assert modules.PLIF(init_tau=3.0).w.sigmoid().item() == pytest.approx(1 / 3)
    assert "v_threshold=tensor[5]" in repr(modules.LIF(v_threshold=threshold))
    with pytest.raises(ValueError, match="PLIF: expected init_tau above 1, got 1"):
        modules.PLIF(init_tau=1.0)


# ---- instruction sets ------------------------------------------------------------------------------------------------


@needs_extension
def test_environment_forces_an_instruction_set():
    def run(isa, code):
        env = os.environ | {"FASTCIFAR_CPU_ISA": isa}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    shown = run("baseline", "import fastcifar; print(fastcifar.doctor())").stdout
    assert "baseline (FASTCIFAR_CPU_ISA names it)" in shown
    failed = run("sse9", "import torch; from fastcifar.spiking import lif; lif(torch.zeros(2, 3))")
    assert failed.returncode != 0
    assert "FASTCIFAR_CPU_ISA names an instruction set that this machine does not execute" in failed.stderr
    with pytest.raises(ValueError, match="expected one of baseline, avx2, avx512"):
        _library.cpu_isa("sse9")


# ---- found by the mutation drill ------------------------------------------------------------------------------------


def test_ilif_passes_its_gradient_at_both_ends_of_the_window(each_isa):
    x = torch.tensor([[0.0, -0.0, 4.0, 2.0, -1e-6, 4.000001]])

    def check(_):
        leaf = x.clone().requires_grad_()
        functional.ilif(leaf, max_spikes=4)[0].sum().backward()
        assert leaf.grad.tolist() == [[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]

    each_isa(check)


@pytest.mark.parametrize("bounds", [(0.0, 2.0), (-1.0, 1.0), (-2.0, 0.0)])
def test_signed_spikes_stop_at_both_bounds_of_their_sum(bounds, each_isa):
    low, high = bounds
    currents = torch.randn(60, 7, 3, generator=torch.Generator().manual_seed(0)) * 2

    def check(_):
        spikes, _, last, _ = functional.signed_if(currents, s_min=low, s_max=high)
        sums = spikes.cumsum(0)
        assert (sums.amin(), sums.amax()) == bounds
        assert torch.equal(sums[-1], last)
        assert torch.equal(spikes, reference.signed_if(currents, s_min=low, s_max=high)[0])

    each_isa(check)


@pytest.mark.skipif(_library.WHY_NO_EXTENSION is not None, reason="the extension is not built")
@pytest.mark.parametrize("neurons_of_a_step", [1, 7, 8, 9])
def test_fake_of_packed_spikes(neurons_of_a_step):
    x = torch.randn(3, neurons_of_a_step)
    arguments = (x, *[None] * 7, neurons.IDS["if"], [0.0, 1.0, 0.0], 0.0, 2, False)
    torch.library.opcheck(torch.ops.fastcifar.neuron_forward.default, arguments)
