"""What is special about each neuron: its peers, and the traps that a fused loop over time can fall into."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar import _library
from fastcifar.spec import expect, identical, run
from fastcifar.spiking import functional, integrate_and_fire, lif, pack, reference, signed_if
from fastcifar.spiking.spec import SPECS

SPEC = {spec.name: spec for spec in SPECS}
by_neuron = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
needs_extension = pytest.mark.skipif(_library.WHY_NO_EXTENSION is not None, reason="the extension is not built")


def _currents(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5).to(dtype)


def _states(spec, *shape, seed=1):
    """A membrane for each state, around the threshold."""
    names = [n for n in ("v", "w") if n in spec.differentiable and not (n == "w" and spec.name == "plif")]
    return {name: _currents(*shape, seed=seed + i) * 0.3 for i, name in enumerate(names)}


def _call(spec, x, **arguments):
    required = {"w": torch.zeros(())} if spec.name == "plif" else {}
    return spec.function(x, **required | arguments)


# ---- against the peers -----------------------------------------------------------------------------------------------


def _over_time(step, x, *states):
    """(spikes, last states, v after every step) of a peer's single step."""
    spikes, v_seq = [], []
    for x_t in x:
        s, *states = step(x_t, *states)
        spikes.append(s)
        v_seq.append(states[0])
    return torch.stack(spikes), *states, torch.stack(v_seq)


def _spikingjelly(name, x, v, v_reset, detach, w=None, k=None):
    """SpikingJelly's own op with the arguments of ``OURS``, its outputs in our order."""
    f = pytest.importorskip("spikingjelly.activation_based.functional")
    peers = pytest.importorskip("spikingjelly.activation_based.surrogate")
    g = peers.ATan(alpha=2.0)
    if name == "integrate_and_fire":
        return f.if_multi_step(x, v, 0.8, v_reset, g, detach, True)
    if name == "plif":
        return f.plif_multi_step(x, v, w, False, 0.8, v_reset, g, detach, True)
    if name == "qif":
        return f.qif_multi_step(x, v, 3.0, 0.8, v_reset, -0.1, 0.7, 0.5, detach, g, True)
    if name == "eif":
        return f.eif_multi_step(x, v, 3.0, 0.8, v_reset, -0.1, 0.7, 1.5, detach, g, True)
    if name == "izhikevich":
        s, v, w, v_seq, _ = f.izhikevich_multi_step(
            x, v, w, 3.0, 0.8, v_reset, -0.1, 0.3, 0.2, 2.5, 0.7, 0.5, detach, g, True
        )
        return s, v, w, v_seq
    if name == "ilif":
        return f.ilif_multi_step(x, v, 1.7, 0.8, peers.MultiLevelSpikeCount(3), detach, True)
    if name == "klif":
        return _over_time(lambda x, v: f.klif_step(x, v, k, 3.0, True, True, 0.8, v_reset, g, detach), x, v)

    def cuba(x, v, w):
        s, w, v = f.cuba_lif_step(x, w, v, 0.6, 0.7, 0.8, v_reset, g, detach)
        return s, v, w

    return _over_time(cuba, x, v, w)


OURS = {
    "integrate_and_fire": {},
    "plif": {"decay_input": False},
    "qif": {"tau": 3.0, "a0": 0.5, "v_rest": -0.1, "v_c": 0.7},
    "eif": {"tau": 3.0, "delta_T": 1.5, "theta_rh": 0.7, "v_rest": -0.1},
    "izhikevich": {"tau": 3.0, "a0": 0.5, "v_rest": -0.1, "v_c": 0.7, "tau_w": 2.5, "a": 0.3, "b": 0.2},
    "ilif": {"tau": 1.7, "max_spikes": 3},
    "klif": {"tau": 3.0, "scale_reset": True},
    "cuba_lif": {"current_decay": 0.6, "voltage_decay": 0.7},
}


def _agree(ours, theirs, truth, leaves, exact):
    """Spikes and membranes equal, gradients to 1e-6 of the largest or nearer to float64's than the peer's."""

    def run(function, dtype):
        given = {n: t.detach().to(dtype).requires_grad_() for n, t in leaves.items()}
        outputs = function(**given)
        weights = [_currents(*o.shape, seed=20 + i, dtype=dtype) for i, o in enumerate(outputs)]
        return outputs, torch.autograd.grad(outputs, list(given.values()), weights)

    mine, my_grads = run(ours, torch.float32)
    their, their_grads = run(theirs, torch.float32)
    assert identical(mine[0], their[0])
    for a, b in zip(mine, their, strict=True):
        assert identical(a, b) if exact else torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6) is None
    for name, a, b, t in zip(leaves, my_grads, their_grads, run(truth, torch.float64)[1], strict=True):
        if (a - b).abs().max() > 1e-6 * b.abs().max():
            assert (a - t).abs().max() <= (b - t).abs().max(), name


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("v_reset", [0.0, -0.2, None])
@pytest.mark.parametrize("detach", [False, True])
def test_equals_spikingjelly(name, v_reset, detach):
    spec, soft_only = SPEC[name], name == "ilif"
    if soft_only and v_reset is not None:
        pytest.skip("has a soft reset only")
    leaves = {"x": _currents(6, 5, 41) * 0.7} | _states(spec, 5, 41)
    leaves |= {"w": torch.tensor(0.3)} if name == "plif" else {"k": torch.tensor(1.2)} if name == "klif" else {}
    options = OURS[name] | {"v_threshold": 0.8, "detach_reset": detach, "store_v_seq": True}
    options |= {} if soft_only else {"v_reset": v_reset, "surrogate": "atan"}
    _agree(
        functools.partial(spec.function, **options),
        functools.partial(_spikingjelly, name, v_reset=v_reset, detach=detach),
        functools.partial(spec.reference, **options),
        leaves,
        # The peer's threshold over k is its product with the rounded 1 / k, as PyTorch divides a number by a tensor.
        spec.exact and (name, v_reset) != ("klif", None),
    )


def test_signed_if_equals_spikingjellys_stbif():
    peer = pytest.importorskip("spikingjelly.activation_based.functional")
    x, v = _currents(9, 5, 41), torch.full((5, 41), 0.5)
    for threshold, s_max, s_min in ((0.8, 3.0, 0.0), (1.0, 2.0, -2.0), (0.3, 7.0, 0.0)):
        bounds = [torch.tensor(b) for b in (threshold, s_max, s_min)]
        spikes, q, total, _ = peer.stbif_multi_step(x, v, torch.zeros(5, 41), *bounds)
        ours = signed_if(x, v_threshold=threshold, s_max=s_max, s_min=s_min)
        assert all(identical(a, b) for a, b in zip(ours, (spikes, q, total), strict=False))
        assert (spikes < 0).any()


@pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
@pytest.mark.parametrize("beta", [0.9, 1.2])
def test_leaky_equals_snntorchs(mechanism, beta):
    """With learnt beta and threshold; a beta above 1 is clamped there and here."""
    peer = pytest.importorskip("snntorch")
    gradient = pytest.importorskip("snntorch.surrogate").atan(alpha=2.0)

    def theirs(x, v, beta, v_threshold):
        node = peer.Leaky(beta=0.5, spike_grad=gradient, reset_mechanism=mechanism)
        del node.beta, node.threshold
        node.beta, node.threshold = beta, v_threshold
        return _over_time(lambda x, v: node(x, v), x, v)

    options = {"reset_mechanism": mechanism, "store_v_seq": True, "surrogate": "atan"}
    leaves = {"x": _currents(6, 5, 41), "v": _currents(5, 41, seed=1)}
    leaves |= {"beta": torch.full((41,), beta), "v_threshold": torch.full((41,), 0.8)}
    ours, truth = (functools.partial(m.leaky, **options) for m in (functional, reference))
    _agree(ours, theirs, truth, leaves, True)


def test_alif_is_its_papers_equations():
    """Bellec et al. 2020, eqs. 6 and 8 to 10, in this package's scaling of the input and with a soft reset."""
    x, alpha, rho, beta, threshold = _currents(9, 50), 0.6, 0.8, 0.4, 0.7
    v = a = torch.zeros(50)
    expected = []
    for x_t in x:
        h = alpha * v + x_t
        z = (h >= threshold + beta * a).float()
        v, a = h - z * threshold, rho * a + z
        expected.append(z)
    options = {"tau": 1 / (1 - alpha), "decay_input": False, "rho": rho, "beta": beta, "v_threshold": threshold}
    spikes, v_last, w_last, _ = functional.alif(x, v_reset=None, **options)
    assert identical(spikes, torch.stack(expected))
    assert 0.1 < spikes.mean() < 0.6
    torch.testing.assert_close((v_last, w_last), (v, a), rtol=1e-5, atol=1e-6)


# ---- the neuron itself -----------------------------------------------------------------------------------------------


@by_neuron
def test_exactly_at_the_threshold(spec):
    """All fire there, but for snnTorch's, which fires above; no spike is negative at zero."""
    if spec.name == "signed_if":
        assert signed_if(torch.tensor([[0.5, -0.5, 0.75]]), s_max=2.0, s_min=-2.0)[0].tolist() == [[1, 0, 1]]
        return
    x = _currents(1, 501).abs() + 0.1
    h = _call(spec, x, v_threshold=1e30)[1]
    spikes = _call(spec, x, v_threshold=h)[0]
    assert (spikes == (0 if spec.name == "leaky" else 1)).all()
    above = _call(spec, x, v_threshold=h.nextafter(torch.tensor(10.0)))[0]
    assert (above == 0).all() or spec.name == "ilif"  # rounds


def test_the_current_is_divided_by_tau():
    """Its product with the rounded 1 / tau differs in the last place, and so may a spike."""
    x = _currents(1, 1001)
    assert not identical(x / 3, x * (1 / 3))
    assert identical(lif(x, tau=3.0, v_threshold=1e30)[1], x[0] / 3)
    assert identical(lif(x, tau=torch.full((1001,), 3.0), v_threshold=1e30)[1], x[0] / 3)


@pytest.mark.parametrize("function", [integrate_and_fire, signed_if])
def test_a_float64_state_makes_sums_of_float32_currents_exact(function, each_isa):
    x = _currents(1000, 37)
    start = torch.full((37,), 0.5, dtype=torch.float64)
    never = {"v_reset": None, "v_threshold": 1e30} if function is integrate_and_fire else {"s_max": -1.0}
    exact = 0.5 + x.double().sum(0)

    def check(isa):
        leaves = x.clone().requires_grad_(), start.clone().requires_grad_()
        v_last = function(*leaves, **never)[1]
        torch.testing.assert_close(v_last.detach(), exact, rtol=1e-13, atol=1e-13)
        assert (function(x, start.float(), **never)[1] - exact).abs().max() > 1e-6
        grads = torch.autograd.grad(v_last.sum(), leaves)
        assert [g.dtype for g in grads] == [torch.float32, torch.float64]
        options = {"store_v_seq": True, "surrogate": "sigmoid"}
        twins = []
        for twin in (function, getattr(reference, function.__name__)):
            outputs = twin(*leaves, **options)
            loss = outputs[0].sum() + outputs[-1].square().sum()
            twins.append((outputs, torch.autograd.grad(loss, leaves)))
        assert all(identical(a, b) for a, b in zip(twins[0][0], twins[1][0], strict=True)), isa
        torch.testing.assert_close(twins[0][1], twins[1][1], rtol=1e-5, atol=1e-4)

    each_isa(check) if _library.WHY_NO_EXTENSION is None else check("reference")


# ---- gradients -------------------------------------------------------------------------------------------------------


@by_neuron
def test_chunks_of_time_equal_the_whole(spec):
    """Outputs and the gradients to x and the initial state to the bit; those to parameters are sums."""
    inputs = spec.sample("prime", torch.float32, "cpu", 0)
    states = [n for n in ("v", "w") if n in inputs and not (n == "w" and spec.name == "plif")]
    options = dict(spec.options[1])

    def chunked(x, **given):
        state = {n: given.pop(n) for n in states}
        parts = []
        for part in x.split([1, 2, 2]):
            spikes, *last, v_seq = spec.function(part, **state, **given)
            state = dict(zip(states, last, strict=True))
            parts.append((spikes, v_seq))
        return torch.cat([s for s, _ in parts]), *state.values(), torch.cat([v for _, v in parts])

    names = spec.gradients(inputs, options)
    whole, whole_grads, cotangents = run(spec.function, inputs, options, names)
    parts, part_grads, _ = run(chunked, inputs, options, names, cotangents)
    assert all(identical(a, b) for a, b in zip(parts, whole, strict=True))
    for name in names:
        if name in ("x", *states) and _library.WHY_NO_EXTENSION is None:
            assert identical(part_grads[name], whole_grads[name]), name
        torch.testing.assert_close(part_grads[name], whole_grads[name], rtol=1e-5, atol=1e-4)


@by_neuron
def test_the_last_membrane_counts_once_in_each_output_that_shows_it(spec):
    x = _currents(4, 3, 17).requires_grad_()
    _, v_last, *_, v_seq = _call(spec, x, store_v_seq=True)
    assert identical(v_last, v_seq[-1])
    assert v_last.data_ptr() != v_seq[-1].data_ptr()
    (once,) = torch.autograd.grad(v_last.sum(), x, retain_graph=True)
    (also_once,) = torch.autograd.grad(v_seq[-1].sum(), x, retain_graph=True)
    (twice,) = torch.autograd.grad(v_last.sum() + v_seq[-1].sum(), x)
    assert identical(once, also_once)
    assert identical(2 * once, twice)


@by_neuron
def test_a_gradient_expanded_in_memory_equals_its_copy(spec):
    x = _currents(5, 2, 8, 8).requires_grad_()
    spikes, _, *_, v_seq = _call(spec, x, store_v_seq=True)
    for small in (torch.ones(()), _currents(2, 8, 8), _currents(5, 1, 1, 8)):
        g = small.expand(x.shape)
        for output in (spikes, v_seq):
            assert identical(*[torch.autograd.grad(output, x, g, retain_graph=True)[0] for g in (g, g.contiguous())])


@needs_extension
@by_neuron
def test_changing_an_argument_in_place_before_backward_raises(spec):
    inputs = spec.sample("prime", torch.float32, "cpu", 0)
    for name in spec.gradients(inputs, spec.options[1]):
        given = {n: t.clone().requires_grad_() * 1 for n, t in inputs.items() if n not in spec.options[1]}
        outputs = spec.function(**given, **spec.options[1])
        given[name].mul_(2)
        if (spec.name, name) in (("plif", "w"), ("ilif", "tau")):
            continue  # what is saved is sigmoid(w) and 1 - 1 / tau
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (outputs[0].sum() + outputs[1].sum()).backward()


@needs_extension
@by_neuron
def test_nothing_is_saved_but_the_arguments(spec):
    """And, where a parameter is made of one (sigmoid(w), 1 - 1 / tau), a number."""
    x, states = _currents(4, 3, 5).requires_grad_(), _states(spec, 3, 5)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _call(spec, x, **states, store_v_seq=True, shift=torch.zeros(5))
    arguments = {t.data_ptr() for t in (x, *states.values())}
    large = {t.data_ptr() for t in saved if t.numel() > 5}
    assert large == arguments
    assert len(saved) <= 6


def test_a_gradient_to_a_parameter_alone():
    for name, parameter in (("lif", "tau"), ("leaky", "beta"), ("lif", "scale"), ("cuba_lif", "current_decay")):
        value, x = torch.full((7,), 1.5 if parameter == "tau" else 0.8), _currents(4, 3, 7)
        both = []
        for needs in (False, True):
            leaf = value.clone().requires_grad_()
            spikes = SPEC[name].function(x.clone().requires_grad_(needs), **{parameter: leaf})[0]
            both.append(torch.autograd.grad(spikes.sum(), leaf)[0])
        assert identical(*both)
        assert both[0].abs().min() > 0


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(-3, -1).contiguous().movedim(-1, -3),
    "batch_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "time_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
}
SHAPES = {"scalar": (), "row": (29,), "column": (13, 1), "channel": (11, 1, 1), "neuron": (11, 13, 29)}
SHAPES |= {"batch": (6, 1, 1, 1), "ones": (1, 1, 1, 1), "sample_row": (6, 1, 1, 29), "all": (6, 11, 13, 29)}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["lif", "cuba_lif"])
def test_parameter_gradients_in_every_shape_and_layout(name, layout, kind, each_isa, threads):
    """Equal bits for each number of threads and instruction set, and float64's sums to 1e-6 of the largest."""
    spec, leak = SPEC[name], "tau" if name == "lif" else "current_decay"
    x = LAYOUTS[layout](_currents(4, 6, 11, 13, 29))
    jitter = torch.rand(SHAPES[kind], generator=torch.Generator().manual_seed(3)) * 0.2
    inputs = {"x": x, leak: (2.0 if name == "lif" else 0.5) + jitter, "v_threshold": 0.9 + jitter}
    inputs |= {"scale": 1 + jitter, "shift": jitter * 0.5}
    options, names = {"detach_reset": True, "surrogate": "sigmoid"}, ("x", *list(inputs)[1:])
    ones = [torch.ones(x.shape), torch.ones(x.shape[1:]), *[torch.ones(x.shape[1:])] * (name == "cuba_lif"), x]
    _, truth, _ = run(spec.reference, inputs, options, names, ones, dtype=torch.float64)
    seen = []

    def check(_):
        for count in (1, 2, 3):
            threads(count)
            seen.append(run(spec.function, inputs, options, names, ones)[1])

    each_isa(check) if _library.WHY_NO_EXTENSION is None else check(None)
    for n in names[1:]:
        assert seen[0][n].shape == inputs[n].shape
        assert (seen[0][n].double() - truth[n]).abs().max() <= 1e-6 * truth[n].abs().max(), n
        if _library.WHY_NO_EXTENSION is None:
            assert all(identical(other[n], seen[0][n]) for other in seen), n


def test_a_parameter_shared_by_a_million_neurons_has_an_exact_gradient(each_isa):
    """A running sum in float32 would be off in the fifth place."""
    x = _currents(1, 1 << 20) * 0.1
    terms = SPEC["lif"].reference(x.requires_grad_(), surrogate="atan")[0]
    (terms,) = torch.autograd.grad(terms.sum(), x)
    exact = terms.double().sum().item()
    assert abs(np.add.accumulate(terms.numpy().ravel())[-1] - exact) > 1e-6 * exact
    x = x.detach()

    def check(isa):
        for shift in (torch.zeros(()), torch.zeros(1)):
            (grad,) = torch.autograd.grad(lif(x, shift=shift.requires_grad_())[0].sum(), shift)
            assert abs(grad.item() - exact) <= 1e-7 * exact, isa

    if _library.WHY_NO_EXTENSION is None:
        each_isa(check)


# ---- what goes in and out --------------------------------------------------------------------------------------------


@by_neuron
def test_scale_and_shift_equal_the_formula_that_they_replace(spec):
    x, states = _currents(5, 2, 3, 7), _states(spec, 2, 3, 7)
    scale, shift = _currents(3, 1, seed=8), _currents(7, seed=9) * 0.2
    for affine in ({"scale": scale, "shift": shift}, {"scale": scale}, {"shift": shift}):
        current = x * affine.get("scale", 1.0) + affine.get("shift", 0.0)
        fused, plain = (_call(spec, x, **states, **more) for x, more in ((x, affine), (current, {})))
        assert all(a is b is None or identical(a, b) for a, b in zip(fused, plain, strict=True))


@by_neuron
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_equal_the_float_spikes(spec, layout):
    if spec.name == "signed_if":
        pytest.skip("its spikes have a sign")
    x = LAYOUTS[layout](_currents(3, 2, 5, 7, 9))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        expected, got = (_call(spec, x.to(dtype), store_v_seq=True, spike_format=f) for f in ("float", "uint8"))
        assert got[0].dtype == torch.uint8
        assert got[0].stride() == expected[0].stride()
        assert identical(got[0].to(dtype), expected[0])
        assert all(identical(a, b) for a, b in zip(got[1:], expected[1:], strict=True))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    name=st.sampled_from(sorted(SPEC.keys() - {"ilif", "signed_if"})),
    shape=st.lists(st.integers(1, 11), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    store=st.booleans(),
)
def test_bits_equal_the_float_spikes_in_any_layout_and_size(name, shape, order, dtype, store):
    permutation = list(range(len(shape)))
    order.shuffle(permutation)
    x = _currents(*shape, dtype=dtype).permute(permutation)
    expected, got = (_call(SPEC[name], x, store_v_seq=store, spike_format=f) for f in ("float", "packed"))
    packed = got[0]
    assert identical(packed.unpack(dtype), expected[0])
    assert packed.bits.shape == (x.shape[0], (x[0].numel() + 7) // 8)
    assert packed.count() == int(expected[0].double().sum())
    assert identical(packed.bits, pack(expected[0]).bits) or expected[0].stride() != x.stride()
    assert all(a is b is None or identical(a, b) for a, b in zip(got[1:], expected[1:], strict=True))


@by_neuron
def test_samples_leave_no_doubt_which_neurons_spike(spec):
    """Else the conformance matrix would compare fewer gradients than it says."""
    for dtype in spec.dtypes:
        for options in spec.options:
            inputs = spec.sample("prime", dtype, "cpu", 0)
            expected = expect(spec, inputs, options, ())
            assert expected.mask.all()
            assert 0.02 < (expected.truth[0] != 0).double().mean() < 0.9
