"""The whole test matrix of every op, from its one declaration in fastcifar/<family>/spec.py.

pytest collects this file (python_files in pyproject.toml); an op that is declared there needs nothing here.
"""

import copy
import io
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar import _library
from fastcifar.spec import all_specs, compare, expect, identical, run

SPECS = all_specs()
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

by_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
by_float_spec = pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.dtypes[0].is_floating_point], ids=lambda s: s.name
)
by_differentiable = pytest.mark.parametrize("spec", [s for s in SPECS if s.differentiable], ids=lambda s: s.name)
by_device = pytest.mark.parametrize("device", DEVICES)
# What is promised of the kernels and not of PyTorch itself, on which the references run.
needs_kernel = pytest.mark.skipif(_library.WHY_NO_EXTENSION is not None, reason="the extension is not built")


def _channels_last(t):
    return t.movedim(-3, -1).contiguous().movedim(-1, -3) if t.dim() >= 3 else t


def _with_offset(t):
    flat = torch.empty(t.numel() + 3, dtype=t.dtype, device=t.device)[3:]
    return flat.view(t.shape).copy_(t)


def _sliced(t):
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1]) if t.dim() else t
    return wide[..., ::2].copy_(t) if t.dim() else t


# Each gives a tensor with the same values (expanded: with the first column's) in another layout.
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t,
    "second_dimension_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t,
    "sliced": _sliced,
    "expanded": lambda t: t[..., :1].expand_as(t) if t.dim() and t.shape[-1] else t,
    "channels_last": _channels_last,
    "storage_offset": _with_offset,
}


def _named(parameter):
    return getattr(parameter, "name", None) or str(parameter)


by_spec_and_dtype = pytest.mark.parametrize(("spec", "dtype"), [(s, d) for s in SPECS for d in s.dtypes], ids=_named)
by_spec_and_layout = pytest.mark.parametrize(
    ("spec", "layout"), [(s, n) for s in SPECS for n in s.layouts or LAYOUTS], ids=_named
)
by_spec_dtype_and_layout = pytest.mark.parametrize(
    ("spec", "dtype", "layout"),
    [(s, d, n) for s in SPECS for d in s.dtypes for n in s.layouts or LAYOUTS],
    ids=_named,
)


def _inputs(spec, size, dtype, device, layout="contiguous"):
    return {name: LAYOUTS[layout](t) for name, t in spec.sample(size, dtype, device, 0).items()}


def _chosen(spec, options, *where):
    """The inputs that these options do not replace."""
    return {name: t for name, t in _inputs(spec, *where).items() if name not in options}


def _agree(spec, inputs, each_isa, device, options=None):
    problems = []
    cases = [(o, expect(spec, inputs, o)) for o in (spec.options if options is None else options)]

    def check(isa):
        for o, expected in cases:
            problems.extend(f"{isa}: {p}" for p in compare(spec, inputs, o, expected=expected))

    if device == "cpu" and _library.WHY_NO_EXTENSION is None:
        each_isa(check)
    else:
        check(device)
    assert not problems, "\n".join(problems)


@by_spec_dtype_and_layout
@by_device
def test_equals_reference_in_every_layout(spec, device, dtype, layout, each_isa):
    _agree(spec, _inputs(spec, "prime", dtype, device, layout), each_isa, device)


@by_spec_and_dtype
@by_device
@pytest.mark.parametrize("size", ["empty", "one"])
def test_equals_reference_in_small_sizes(spec, device, dtype, size, each_isa):
    _agree(spec, _inputs(spec, size, dtype, device), each_isa, device)


@by_spec
@by_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_equals_reference_where_threads_share_the_work(spec, device, dtype, layout, each_isa):
    _agree(spec, _inputs(spec, "large", dtype, device, layout), each_isa, device, options=spec.options[:2])


@by_spec
@by_device
def test_every_subset_of_gradients(spec, device):
    """Or, where that would be many: none, each alone, all but each, all."""
    inputs = _inputs(spec, "prime", torch.float32, device)
    for options in spec.options:
        names = spec.gradients(inputs, options)
        every = 2 ** len(names) - 1
        masks = (
            range(every + 1)
            if len(names) < 4
            else {0, every, *(m for i in range(len(names)) for m in (1 << i, every - (1 << i)))}
        )
        for mask in masks:
            wanted = tuple(n for i, n in enumerate(names) if mask >> i & 1)
            assert compare(spec, inputs, options, wanted) == []


@needs_kernel
@by_spec
@by_device
def test_same_bits_for_any_thread_count_instruction_set_and_repetition(spec, device, threads, each_isa):
    inputs, options = _inputs(spec, "large", torch.float32, device), spec.options[1]
    gradients, seen = spec.gradients(inputs, options), []

    def check(_):
        for count in (1, 2, 3):
            threads(count)
            outputs, grads, _ = run(spec.function, inputs, options, gradients)
            seen.append([*[o for o in outputs if o is not None], *grads.values()])

    if device == "cpu":
        each_isa(check)
    check(None)
    for other in seen[1:]:
        assert all(identical(a, b) for a, b in zip(seen[0], other, strict=True))


@by_float_spec
@by_device
def test_nan_and_infinity_propagate_as_in_the_reference(spec, device, each_isa):
    inputs = _inputs(spec, "prime", torch.float32, device)
    for t in inputs.values():
        if t.dim():  # one for all would leave nothing else
            flat = t.view(-1)
            flat[::11], flat[3::17], flat[5::19] = float("nan"), float("inf"), float("-inf")

    def check(_):
        for options in spec.options:
            assert compare(spec, inputs, options, ()) == []

    each_isa(check) if device == "cpu" and _library.WHY_NO_EXTENSION is None else check(None)


@pytest.mark.parametrize(
    ("spec", "bad"), [(s, b) for s in SPECS for b in s.bad_inputs], ids=lambda p: getattr(p, "name", None) or p.what
)
def test_bad_input_is_refused_in_a_sentence(spec, bad):
    with pytest.raises(bad.error, match=bad.says) as caught:
        spec.function(**bad.arguments())
    assert str(caught.value).startswith(f"{spec.name}: expected")


class _Calls(TorchDispatchMode):
    """Records the arguments of every raw op that a call of the public function reaches."""

    def __init__(self, names):
        super().__init__()
        self.of = {getattr(torch.ops.fastcifar, name).default: None for name in names}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.of:
            self.of[func] = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        return func(*args, **(kwargs or {}))


def _raw_calls(spec, inputs, options):
    calls = _Calls(spec.raw_ops)
    with calls:
        run(spec.function, inputs, options, spec.gradients(inputs, options))
    assert all(calls.of.values())
    return calls.of.items()


@needs_kernel
@by_spec_and_dtype
@by_device
def test_opcheck(spec, device, dtype):
    whole = spec.layouts is None  # the others have the same registrations
    for options in spec.options[0 if whole else 1 : 2]:
        for layout in ("contiguous", "channels_last")[0 if whole else 1 :]:
            for op, arguments in _raw_calls(spec, _inputs(spec, "prime", dtype, device, layout), options):
                torch.library.opcheck(op, arguments)


@needs_kernel
@by_spec_and_layout
@by_device
def test_fake_has_the_strides_of_the_real_result(spec, device, layout):
    inputs = _inputs(spec, "prime", torch.bfloat16, device, layout)
    for options in spec.options:
        for op, arguments in _raw_calls(spec, inputs, options):
            mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
            with mode:
                fake = op(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments])
            real = op(*arguments)
            pairs = [(fake, real)] if isinstance(real, torch.Tensor) else zip(fake, real, strict=True)
            for f, r in pairs:
                assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


@needs_kernel
@by_spec
@by_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(spec, device, dynamic):
    if dynamic and torch.__version__ < (2, 11) and spec.name in ("klif", "cuba_lif"):
        pytest.skip("torch 2.10 mixes up numbers that are symbols in the backward of an autograd.Function")
    torch._dynamo.reset()
    options = spec.options[1]
    compiled = torch.compile(
        lambda **t: spec.function(**t, **options), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for size in ("prime", "large"):
        inputs = _chosen(spec, options, size, torch.float32, device)
        names = spec.gradients(inputs, options)
        ours, our_grads, cotangents = run(lambda **t: compiled(**t), inputs, {}, names)
        plain, plain_grads, _ = run(spec.function, inputs, options, names, cotangents)
        assert all(identical(a, b) for a, b in zip(ours, plain, strict=True) if a is not None)
        assert all(identical(our_grads[n], plain_grads[n]) for n in names)


@needs_kernel
@by_spec
@by_device
def test_exports(spec, device):
    inputs = _chosen(spec, spec.options[1], "prime", torch.float32, device)

    class Program(torch.nn.Module):
        def forward(self, **tensors):
            return tuple(o for o in spec.function(**tensors, **spec.options[1]) if o is not None)

    exported = torch.export.export(Program(), (), inputs)
    called = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert f"fastcifar.{spec.raw_ops[0]}.default" in called
    expected = [o for o in spec.function(**inputs, **spec.options[1]) if o is not None]
    assert all(identical(a, b) for a, b in zip(exported.module()(**inputs), expected, strict=True))


@by_spec
@by_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_to_the_same_answer(spec, device, dtype):
    if device == "cuda" and dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bfloat16")
    inputs = _chosen(spec, spec.options[0], "prime", dtype, device)
    outside = spec.function(**inputs, **spec.options[0])
    with torch.autocast(device, dtype=dtype):
        inside = spec.function(**inputs, **spec.options[0])
    assert all(identical(a, b) for a, b in zip(inside, outside, strict=True) if a is not None)


def _first_loss(spec, inputs, options):
    """A scalar function of the first argument alone, for torch.func."""
    first, *_ = inputs
    rest = {n: t for n, t in inputs.items() if n != first and n not in options}
    weight = torch.linspace(0.5, 1.5, 97, device=inputs[first].device)

    def loss(t):
        out = spec.function(**{first: t}, **rest, **options)[0]
        return (out.float().flatten() * weight.repeat(out.numel() // 97 + 1)[: out.numel()]).sum()

    return loss, inputs[first]


@by_differentiable
@by_device
def test_torch_func_grad(spec, device):
    for options in spec.options:
        loss, t = _first_loss(spec, _inputs(spec, "prime", torch.float32, device), options)
        leaf = t.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        assert identical(torch.func.grad(loss)(t), expected)


@by_spec
@by_device
@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap_equals_a_loop(spec, device, in_dim):
    inputs = _inputs(spec, "prime", torch.float32, device)
    first = next(iter(inputs))
    batch = torch.stack([(inputs[first] * scale).to(inputs[first]) for scale in (0.5, 1.0, 1.5)]).movedim(0, in_dim)
    for options in spec.options:
        rest = {n: t for n, t in inputs.items() if n != first and n not in options}

        def outputs(t, options=options, rest=rest):
            return tuple(o for o in spec.function(**{first: t}, **rest, **options) if o is not None)

        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns where it falls back to a loop
            mapped = torch.func.vmap(outputs, in_dims=in_dim)(batch)
        looped = [outputs(t) for t in batch.unbind(in_dim)]
        for i, m in enumerate(mapped):
            assert identical(m, torch.stack([out[i] for out in looped]))


@by_differentiable
@by_device
def test_vmap_of_grad_equals_a_loop(spec, device):
    inputs = _inputs(spec, "prime", torch.float32, device)
    loss, t = _first_loss(spec, inputs, spec.options[1])
    batch = torch.stack([t * scale for scale in (0.5, 1.0, 1.5)])
    mapped = torch.func.vmap(torch.func.grad(loss))(batch)
    assert identical(mapped, torch.stack([torch.func.grad(loss)(b) for b in batch]))


@by_differentiable
@by_device
def test_torch_func_jvp(spec, device):
    """The reference's, which raises where a surrogate or a straight-through gradient has no forward mode."""
    dtype = torch.float64 if torch.float64 in spec.dtypes else spec.dtypes[0]
    inputs = _inputs(spec, "prime", dtype, device)
    for options in spec.options:
        first, *others = [n for n in inputs if n not in options]
        rest = {n: inputs[n] for n in others}
        tangent = torch.linspace(-1, 1, inputs[first].numel(), dtype=dtype, device=device).view(inputs[first].shape)

        def of(function, first=first, rest=rest, options=options):
            def one(t):
                return function(**{first: t}, **rest, **options)[0]

            return torch.func.jvp(one, (inputs[first],), (tangent,))  # noqa: B023

        try:
            expected = of(spec.reference)
        except NotImplementedError:
            with pytest.raises(NotImplementedError, match="jvp"):
                of(spec.function)
            continue
        for a, b in zip(of(spec.function), expected, strict=True):
            torch.testing.assert_close(a, b)
        assert expected[1].abs().sum() > 0


@pytest.mark.parametrize("spec", [s for s in SPECS if s.smooth], ids=lambda s: s.name)
@by_device
def test_derivatives_of_first_and_second_order(spec, device):
    inputs = _inputs(spec, "prime", torch.float64, device)
    for options in spec.options:
        if torch.float32 in options.values():
            continue  # a result that is rounded has no numerical derivative
        names = spec.gradients(inputs, options)

        def function(*leaves, names=names, options=options):
            return spec.function(**dict(zip(names, leaves, strict=True)), **options)[0]

        leaves = tuple(inputs[n].requires_grad_() for n in names)
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@needs_kernel
@pytest.mark.parametrize("spec", [s for s in SPECS if s.differentiable and not s.smooth], ids=lambda s: s.name)
@by_device
@pytest.mark.parametrize("incoming", ["constant", "dependent"])
def test_second_derivative_is_refused(spec, device, incoming):
    """Also where the incoming gradient is a constant, and where the penalty is only a part of the loss."""
    inputs = _chosen(spec, spec.options[0], "prime", torch.float64, device)
    inputs = {n: t.requires_grad_() for n, t in inputs.items()}
    first = inputs[spec.differentiable[0]]
    out = spec.function(**inputs, **spec.options[0])[0]
    loss = (out * (first.cos() if incoming == "dependent" else 1.0)).sum()
    (grad,) = torch.autograd.grad(loss, first, create_graph=True)
    with pytest.raises(RuntimeError, match="the second derivative is not offered"):
        (grad.square().sum() + first.sum()).backward()


@pytest.mark.parametrize("spec", [s for s in SPECS if s.module], ids=lambda s: s.name)
@by_device
def test_module_survives_copy_pickle_and_state_dict(spec, device):
    module = spec.module().to(device)
    t = next(iter(_inputs(spec, "prime", torch.float32, device).values()))
    module(t.clone().requires_grad_())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(module), torch.load(buffer, weights_only=False)]
    expected = module(t)
    for twin in twins:
        assert identical(twin(t), expected)
    fresh = spec.module().to(device)
    assert fresh.load_state_dict(module.state_dict(), strict=True)
    assert repr(fresh) == repr(module)


@by_spec
def test_without_a_kernel_the_reference_runs(spec, monkeypatch):
    inputs = _inputs(spec, "prime", torch.float32, "cpu")
    monkeypatch.setattr(_library, "OWNERS", {})
    with torch.profiler.profile() as profile:
        assert compare(spec, inputs, spec.options[0]) == []
    assert not any("fastcifar" in event.key for event in profile.key_averages())
