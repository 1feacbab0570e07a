"""The Triton kernels: equal to the reference (in Triton's interpreter without a GPU), and compiled ahead of time."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

pytest.importorskip("triton")

from fastcifar.kernels import catalogue, layout, neurons, signatures, spiking  # noqa: E402

from fastcifar.spiking import reference  # noqa: E402
from fastcifar.spiking.neurons import IDS, WIDE  # noqa: E402
from fastcifar.spiking.packed import PackedSpikes  # noqa: E402
from fastcifar.spiking.surrogate import BY_NAME  # noqa: E402

FLAGS = (True, False)

# Each makes an x of T steps with numbers from `randn`. Odd sizes reach the scalar kernels and partly filled programs,
# the others vector accesses; all but the last two are read in place.
LAYOUTS = {
    "odd": lambda T, randn: randn(T, 3, 43),
    "multiple_of_16": lambda T, randn: randn(T, 2, 8, 40),
    "channels_last": lambda T, randn: randn(T, 2, 3, 5, 8).movedim(-1, -3),
    "panels": lambda T, randn: randn(5, T, 112).transpose(0, 1),
    "odd_panels": lambda T, randn: randn(3, T, 43).transpose(0, 1),
    "time_last": lambda T, randn: randn(7, 19, T).movedim(-1, 0),
    "storage_offset": lambda T, randn: randn(T * 32 + 3)[3:].view(T, 32),
    "sliced": lambda T, randn: randn(T, 32, 6)[:, ::2],
    "expanded": lambda T, randn: randn(T, 16, 1).expand(T, 16, 3),
}


@dataclass(frozen=True)
class Neuron:
    """A neuron's function in the reference, and how the op takes its arguments."""

    function: Callable
    options: dict = field(default_factory=dict)  # of the function, the same in every test
    leak: str | None = None  # the option that is the op's leak
    gain: str | None = None
    constants: tuple = ()  # of the op
    to_leak: Callable = lambda leak: leak  # the op's leak of the function's option


def _decay(tau):
    return (1 - 1 / tau.double()).to(tau.dtype) if isinstance(tau, torch.Tensor) else 1 - 1 / tau


def _sigmoid(w):
    return w.sigmoid() if isinstance(w, torch.Tensor) else torch.tensor(w).double().sigmoid().item()


QUADRATIC = {"a0": 0.9, "v_rest": 0.05, "v_c": 0.7}
EXPONENTIAL = {"v_rest": 0.1, "theta_rh": 0.7, "delta_T": 0.6}
IZHIKEVICH = QUADRATIC | {"tau_w": 2.3, "a": 0.3, "b": 0.2}
INTEGER = {"max_spikes": 3, "grad_window": (-0.4, 3.3)}
DIRECT = {"decay_input": False}
ADAPTIVE = {"beta": 0.7, "rho": 0.9}
NEURONS = {
    "if": Neuron(reference.integrate_and_fire),
    "lif": Neuron(reference.lif, {}, "tau"),
    "lif_direct": Neuron(reference.lif, DIRECT, "tau"),
    "lif_times": Neuron(reference.plif, {}, "w", to_leak=_sigmoid),
    "lif_times_direct": Neuron(reference.plif, DIRECT, "w", to_leak=_sigmoid),
    "qif": Neuron(reference.qif, QUADRATIC, "tau", None, tuple(QUADRATIC.values())),
    "eif": Neuron(reference.eif, EXPONENTIAL, "tau", None, tuple(EXPONENTIAL.values())),
    "izhikevich": Neuron(reference.izhikevich, IZHIKEVICH, "tau", None, tuple(IZHIKEVICH.values())),
    "cuba_lif": Neuron(reference.cuba_lif, {}, "voltage_decay", "current_decay"),
    "klif": Neuron(reference.klif, {}, "tau", "k"),
    "klif_direct": Neuron(reference.klif, DIRECT, "tau", "k"),
    "ilif": Neuron(reference.ilif, INTEGER, "tau", None, (3.0, -0.4, 3.3), to_leak=_decay),
    "alif": Neuron(reference.alif, ADAPTIVE, "tau", None, tuple(ADAPTIVE.values())),
    "alif_direct": Neuron(reference.alif, DIRECT | ADAPTIVE, "tau", None, tuple(ADAPTIVE.values())),
    "signed_if": Neuron(reference.signed_if, {"s_max": 2.0, "s_min": -1.0}, None, None, (2.0, -1.0)),
    "leaky_subtract": Neuron(reference.leaky, {"reset_mechanism": "subtract"}, "beta"),
    "leaky_zero": Neuron(reference.leaky, {"reset_mechanism": "zero"}, "beta"),
    "leaky_none": Neuron(reference.leaky, {"reset_mechanism": "none"}, "beta"),
}
DECAYS = ("w", "beta", "voltage_decay", "current_decay")


def _channel(shape, *inside):
    return shape[0], *[1] * (len(shape) - 1 - len(inside)), *inside


# Shapes of the parameters leak, threshold, gain, scale and shift, for a step of this shape.
PARAMETERS = {
    "numbers": lambda shape: (None, None, None, (), ()),
    "scalars": lambda shape: ((), (1,) * len(shape), (), (), ()),
    "channels": lambda shape: (_channel(shape),) * 5,
    "neurons": lambda shape: (shape,) * 5,
    # Some share a kernel's run and period and some do not; with three dimensions there is one that cannot fold.
    "mixed": lambda shape: (_channel(shape), shape[-1:], _channel(shape, *shape[1:][-1:]), None, shape[1:]),
}

# Every pair of these values occurs in some row, but for those of neurons and surrogates.
MATRIX = signatures.covering(
    {
        "neuron": tuple(NEURONS),
        "layout": tuple(LAYOUTS),
        "T": (1, 3, 5, 16, 33),
        "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16, "wide"),
        "surrogate": tuple(BY_NAME),
        "parameters": tuple(PARAMETERS),
        "affine": FLAGS,
        "wanted": (0, 0b01010, 0b11111),
        "v_reset": (0.0, -0.1, None),
        "spike_format": (0, 1, 2),
        "grad_spikes": ("dense", "expanded", "other_order"),
        **dict.fromkeys(("detach_reset", "scale_reset", "give_v", "give_w", "store_v_seq", "give_grad_last"), FLAGS),
    },
    rows=[],
    few={"neuron": ("T", "parameters", "v_reset"), "surrogate": ()},
)


def _state_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Call:
    """Arguments of one neuron, as the op and as the reference take them."""

    neuron: str
    x: torch.Tensor
    v: torch.Tensor | None = None
    w: torch.Tensor | None = None
    parameters: tuple = (2.0, 1.0, 1.0, None, None)  # of the reference
    v_reset: float | None = 0.0
    surrogate: str = "atan"
    detach_reset: bool = False
    scale_reset: bool = False

    @property
    def state(self):
        return _state_dtype(self.x.dtype) if self.v is None else self.v.dtype

    def _op_parameters(self):
        leak, *others = (p.detach() if isinstance(p, torch.Tensor) else p for p in self.parameters)
        tensors = [NEURONS[self.neuron].to_leak(leak), *others]
        given = [t if isinstance(t, torch.Tensor) else None for t in tensors]
        numbers = [0.0 if isinstance(t, torch.Tensor) else t for t in tensors[:3]]
        constants = (float(self.scale_reset),) if neurons.is_a(self.neuron, "klif") else NEURONS[self.neuron].constants
        return given, [IDS[self.neuron], [*numbers, *constants], self.v_reset]

    def forward(self, spike_format=0, store_v_seq=True):
        tensors, rest = self._op_parameters()
        return spiking.neuron_forward(self.x, self.v, self.w, *tensors, *rest, spike_format, store_v_seq)

    def backward(self, grads, wanted=0):
        tensors, rest = self._op_parameters()
        surrogate = BY_NAME[self.surrogate]
        rest += [surrogate.kernel_id, list(surrogate.numbers()), self.detach_reset, wanted]
        return spiking.neuron_backward(*grads, self.x, self.v, self.w, *tensors, *rest)

    def reference(self, dtype=None):
        """The inputs (x, v, w and the five parameters) as leaves in ``dtype``, and the outputs spikes, v, w, v_seq."""
        how = NEURONS[self.neuron]

        def leaf(t):
            if not isinstance(t, torch.Tensor):
                return t
            return t.detach().cpu().to(t.dtype if dtype is None else dtype).clone().requires_grad_()

        x, v, w = inputs = [leaf(t) for t in (self.x, self.v, self.w)]
        inputs += [leaf(p) for p in self.parameters]
        leak, threshold, gain, scale, shift = inputs[3:]
        second = neurons.has_second_state(self.neuron)
        options = {**how.options, "v_threshold": threshold, "scale": scale, "shift": shift, "store_v_seq": True}
        options |= {name: value for name, value in ((how.leak, leak), (how.gain, gain)) if name is not None}
        if not neurons.soft_reset_only(self.neuron):
            options["v_reset"] = self.v_reset
        if self.neuron != "ilif":
            options["surrogate"] = self.surrogate
        if not neurons.is_a(self.neuron, "leaky"):
            options["detach_reset"] = self.detach_reset
        if neurons.is_a(self.neuron, "klif"):
            options["scale_reset"] = self.scale_reset
        if how.function is reference.plif and not isinstance(leak, torch.Tensor):
            options["w"] = torch.tensor(leak, dtype=torch.float64 if dtype is None else dtype)
        outputs = how.function(x, v=v, **({"w": w} if second else {}), **options)
        return inputs, outputs if second else (*outputs[:2], None, outputs[2])


def _reference_gradients(call, grads, wanted, dtype):
    """Gradients of x, v, w and, each spread over the neurons, of the wanted parameters, by autograd in ``dtype``."""
    spread = [torch.broadcast_to(p, call.x.shape[1:]) if wanted >> i & 1 else p for i, p in enumerate(call.parameters)]
    inputs, outputs = Call(**{**vars(call), "parameters": tuple(spread)}).reference(dtype)
    used = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad]
    chosen = [t for i, t in enumerate(inputs) if t is not None and (i < 3 or wanted >> (i - 3) & 1)]
    grads = [grad.cpu().to(out.dtype) for out, grad in used]
    found = torch.autograd.grad([out for out, _ in used], chosen, grads, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(chosen, found, strict=True)]


def _assert_lies_like(x, t, dtype):
    """Shape, strides and dtype of an output; without x it is empty."""
    like = torch.empty(0) if x is None else torch.empty_like(x)
    assert (t.shape, t.stride(), t.dtype) == (like.shape, like.stride(), dtype)


def _assert_as_accurate(ours, eager, truth, dtype, scale=None):
    """float64: equal but for the order of operations. float32: at most twice the error of eager PyTorch, and an ulp."""
    largest = torch.finfo(dtype).max  # float16 overflows
    ours, eager, truth = (t.double().clamp(-largest, largest) for t in (ours, eager, truth))
    scale = truth.abs().max().item() if scale is None else scale
    error = (ours - truth).abs().max().item()
    bound = 1e-12 * scale
    if dtype != torch.float64:
        bound = 2 * (eager - truth).abs().max().item() + torch.finfo(torch.float32).eps * scale
    if dtype in (torch.bfloat16, torch.float16):
        bound += torch.finfo(dtype).eps * scale  # one rounding; the interpreter truncates where a GPU rounds
    assert error <= bound


def _name(row):
    return "-".join(str(value).removeprefix("torch.") for value in row.values())


def _make(row):
    """The call of a row of MATRIX."""
    neuron = row["neuron"]
    wide = row["dtype"] == "wide"
    dtype = (torch.float32 if neuron in WIDE else torch.float64) if wide else row["dtype"]
    state = torch.float64 if wide else _state_dtype(dtype)

    # Nothing holds back the neurons whose charge is curved and whose reset is soft.
    spread = 0.5 if neuron in ("qif", "eif", "izhikevich") and row["v_reset"] is None else 2

    def randn(*shape, dtype=dtype):
        return torch.randn(shape).mul(spread).to(DEVICE, dtype)

    def around(low, high, shape):
        if shape is None:
            return (low + high) / 2
        return (low + (high - low) * torch.rand(shape)).to(DEVICE, state)

    x = LAYOUTS[row["layout"]](row["T"], randn)
    shapes = PARAMETERS[row["parameters"]](x.shape[1:])
    leak_range = (
        (-1.0, 1.0) if NEURONS[neuron].leak == "w" else (0.3, 0.9) if NEURONS[neuron].leak in DECAYS else (1.5, 3)
    )
    gain_range = (0.3, 0.9) if NEURONS[neuron].gain in DECAYS else (0.8, 1.4)
    ranges = (leak_range, (0.6, 1.1), gain_range, (0.7, 1.3), (-0.2, 0.2))
    parameters = [around(*r, shape) for r, shape in zip(ranges, shapes, strict=True)]
    for i in (3, 4):
        if shapes[i] is None or not row["affine"]:
            parameters[i] = None
    second = neurons.has_second_state(neuron)
    v = randn(*x.shape[1:], dtype=state) if row["give_v"] or (wide and state != _state_dtype(x.dtype)) else None
    w = randn(*x.shape[1:], dtype=state).round() if row["give_w"] and second else None  # signed_if counts spikes
    v_reset = None if neurons.soft_reset_only(neuron) else row["v_reset"]
    more = {name: row[name] for name in ("surrogate", "detach_reset", "scale_reset")}
    return Call(neuron, x, v, w, tuple(parameters), v_reset, **more), randn


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes in numpy
@pytest.mark.parametrize("row", MATRIX, ids=_name)
def test_neuron_equals_reference(row):
    torch.manual_seed(0)
    call, randn = _make(row)
    x, state, second = call.x, call.state, neurons.has_second_state(call.neuron)
    assert (layout.dense(x)[0] is x) == (row["layout"] not in ("sliced", "expanded"))
    spike_format = min(row["spike_format"], {"signed_if": 0, "ilif": 1}.get(call.neuron, 2))

    spikes, *states, v_seq = call.forward(spike_format, row["store_v_seq"])
    expected, true = (call.reference(dtype)[1] for dtype in (None, torch.float64))
    if spike_format == 2:
        assert (spikes.dtype, spikes.shape) == (torch.uint8, (x.shape[0], (x[0].numel() + 7) // 8))
        spikes = PackedSpikes.of_kernel(spikes, x).unpack(x.dtype)
        assert spikes[0].stride() == torch.empty_like(x[0]).stride()
    else:
        _assert_lies_like(x, spikes, torch.uint8 if spike_format else x.dtype)
    _assert_lies_like(x[0], states[0], state)
    _assert_lies_like(x[0] if second else None, states[1], state)
    _assert_lies_like(x if row["store_v_seq"] else None, v_seq, state)
    spikes, expected_spikes = spikes.cpu().to(x.dtype), expected[0]
    if call.neuron == "signed_if" and x.dtype.itemsize == 2 and DEVICE == "cpu":
        # Thresholds in 16 bits: the interpreter truncates where a GPU rounds. Their signs are what has to be equal.
        torch.testing.assert_close(spikes, expected_spikes, rtol=torch.finfo(x.dtype).eps, atol=0)
        spikes, expected_spikes = spikes.sign(), expected_spikes.sign()
    # Soft resets of a curved charge may run away to infinity.
    same = torch.stack([t.isfinite() for t in (*true, *expected) if t is not None and t.shape == x.shape]).all(0).all(0)
    close = {"rtol": 0, "atol": 0}
    if call.neuron == "eif":  # its exponential is not the reference's to the bit, which may decide a spike
        same &= (spikes == expected_spikes).all(0)
        close = {"rtol": 1e-3, "atol": 1e-4} if state == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    assert torch.equal(spikes[:, same], expected_spikes[:, same])
    for ours, theirs in zip((*states, v_seq), expected[1:], strict=True):
        if ours.numel():
            torch.testing.assert_close(ours.cpu()[..., same], theirs[..., same], **close)
    assert spikes.float().amin() < spikes.float().amax()
    # Where rounding decides a spike all else differs: no gradient goes there.
    same &= (true[0].to(x.dtype) == expected[0]).all(0)
    assert same.double().mean() > 0.95
    grad_spikes = {
        "dense": lambda: torch.empty_like(x).copy_(randn(*x.shape)),
        "expanded": lambda: randn(1).expand(x.shape),
        "other_order": lambda: randn(*x.shape[::-1]).permute(*range(x.dim())[::-1]),
    }[row["grad_spikes"]]()
    grads = [
        grad_spikes,
        randn(*x.shape[1:], dtype=state) if row["give_grad_last"] else None,
        randn(*x.shape[1:], dtype=state) if row["give_grad_last"] and second else None,
        randn(*x.shape, dtype=state) if row["store_v_seq"] else None,
    ]
    if not same.all():
        grads = [None if g is None else g * same.to(DEVICE, g.dtype) for g in grads]
    wanted = sum(
        1 << i for i, p in enumerate(call.parameters) if isinstance(p, torch.Tensor) and row["wanted"] >> i & 1
    )
    grad_x, grad_v, grad_w, flat = call.backward(grads, wanted)
    eager = _reference_gradients(call, grads, wanted, state)
    truth = _reference_gradients(call, grads, wanted, torch.float64)

    _assert_lies_like(x, grad_x, x.dtype)
    _assert_as_accurate(*(t[:, same] for t in (grad_x.cpu(), eager.pop(0), truth.pop(0))), x.dtype)
    for ours, first in ((grad_v, call.v), (grad_w, call.w)):
        _assert_lies_like(None if first is None else x[0], ours, state)
        if first is not None:
            _assert_as_accurate(*(t[same] for t in (ours.cpu(), eager.pop(0), truth.pop(0))), state)

    chosen = [(i, p) for i, p in enumerate(call.parameters) if wanted >> i & 1]
    assert (flat.dtype, flat.shape) == (torch.float64, (sum(p.numel() for _, p in chosen),))
    parts = flat.split([p.numel() for _, p in chosen]) if chosen else ()
    for (slot, p), ours in zip(chosen, parts, strict=True):
        ours = ours.reshape(p.shape)
        if slot == 0:  # of the kernel's leak, to that of the reference's
            leaf = p.detach().double().requires_grad_()
            ours = torch.autograd.grad(NEURONS[call.neuron].to_leak(leaf), leaf, ours)[0]
        each_eager, each = eager.pop(0), truth.pop(0)
        magnitude = each.abs().sum_to_size(p.shape).max().item()
        _assert_as_accurate(ours.cpu(), each_eager.sum_to_size(p.shape), each.sum_to_size(p.shape), state, magnitude)


@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 0), (4, 3, 0), (0, 0)])
@pytest.mark.parametrize("give", FLAGS)
@pytest.mark.parametrize("neuron", ["lif", "alif", "signed_if"])
def test_without_steps_or_neurons(shape, give, neuron):
    x = torch.randn(shape, device=DEVICE)
    v, w = (torch.randn(shape[1:], device=DEVICE) if give else None for _ in range(2))
    second = neurons.has_second_state(neuron)
    w = w if second else None
    call = Call(neuron, x, v, w, (2.0, torch.ones(shape[-1:], device=DEVICE), 0.0, None, None), 0.25)
    rest = 0.5 if neuron == "signed_if" else 0.25
    for spike_format in (0, 1, *([] if neuron == "signed_if" else [2])):
        spikes, v_last, w_last, v_seq = call.forward(spike_format)
        assert spikes.shape == (shape if spike_format < 2 else (shape[0], (x.shape[1:].numel() + 7) // 8))
        assert v_seq.shape == shape
        assert torch.equal(v_last, v if give else torch.full(shape[1:], rest, device=DEVICE))
        assert v_last is not v
        none = torch.zeros(shape[1:] if second else 0, device=DEVICE)
        assert torch.equal(w_last, w if give and second else none)

    last = torch.randn(shape[1:], device=DEVICE)
    for given, expected in ((last, last), (None, torch.zeros_like(last))):
        grad_x, grad_v, grad_w, flat = call.backward((x, given, given if second else None, None), 2)
        assert grad_x.shape == shape
        assert torch.equal(grad_v, expected) if give else grad_v.shape == (0,)
        assert torch.equal(grad_w, expected) if give and second else grad_w.shape == (0,)
        assert torch.equal(flat, torch.zeros(shape[-1], dtype=torch.float64, device=DEVICE))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes in numpy
@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("tau", [2.0, 3.0, 98.0, 1.1])
@pytest.mark.parametrize("tensor", FLAGS)
def test_extreme_inputs(v_reset, tau, tensor):
    """Infinity, NaN, the largest numbers and subnormal ones, whose quotients can lie half-way between two numbers."""
    tiny = torch.arange(1, 400) * 49 * 2.0**-149  # a 98th of it: multiples of half the smallest number
    special = [float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 1e-45, -1e-45, 0.0, -0.0, 1.0]
    x = torch.cat([tiny, -tiny, torch.tensor(special)]).repeat(3, 1).to(DEVICE)
    leak = torch.full((x.shape[1],), tau, device=DEVICE) if tensor else tau
    call = Call("lif", x, parameters=(leak, 1.0, 0.0, None, None), v_reset=v_reset)
    spikes, v_last, _, v_seq = call.forward()
    for ours, expected in zip((spikes, v_last, None, v_seq), call.reference()[1], strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.cpu(), expected.detach(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", BY_NAME)
def test_surrogates_far_from_threshold(name):
    largest = 300.0 if name == "squarewave_fourier_series" else 1e30  # float32 has no phase that far out
    x = torch.tensor([[-largest, -300.0, -25.0, 0.75, 1.0, 1.5, 25.0, 300.0, largest]])
    call = Call("lif_times_direct", x.to(DEVICE), parameters=(0.0, 1.0, 0.0, None, None), v_reset=None, surrogate=name)
    grad = call.backward((torch.ones_like(call.x), None, None, None))[0].cpu()
    assert grad.isfinite().all()
    atol = 1e-6 if name == "squarewave_fourier_series" else 1e-37
    torch.testing.assert_close(grad, BY_NAME[name].grad(x.double() - 1.0).float(), rtol=1e-4, atol=atol)


@pytest.mark.parametrize("strides", [(60, 20, 5, 1), (60, 1, 15, 3), (1, 2, 6, 24)])
def test_parameters_fold_in_the_order_of_the_walk(strides):
    shape = (2, 3, 4, 5)
    for choice in range(16):
        sizes = [size if choice >> d & 1 else 1 for d, size in enumerate(shape)]
        parameter = torch.randn(sizes).squeeze(0) if sizes[0] == 1 else torch.randn(sizes)
        values, run, period = layout.fold(parameter, shape, strides)
        place = torch.empty_strided(shape, strides).copy_(parameter).as_strided((120,), (1,))
        assert values.shape == (period,)
        assert torch.equal(values[torch.arange(120) // run % period], place)


def test_catalogue_compiles_without_spills():
    """Every kernel for sm_80, sm_90 and sm_100, which takes no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastcifar.kernels.catalogue", "--jobs", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for arch in catalogue.ARCHS:
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"sm_{arch} ")]
        assert all(" 0 spilled" in line for line in lines)
        for neuron in IDS:
            for kernel in ("forward", "backward"):
                assert any(f"_{kernel}_kernel" in line and f"NEURON={neuron} " in line for line in lines)


def test_covering_meets_every_pair():
    factors, always = {"a": (1, 2, 3), "b": "xy", "c": FLAGS}, {"a": 3, "b": "y", "c": True}
    rows = signatures.covering(factors, [always])
    assert rows[0] == always
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        assert {(r[one], r[other]) for r in rows} == {(p, q) for p in factors[one] for q in factors[other]}


def test_importing_the_package_does_not_import_triton():
    script = "import sys, fastcifar.kernels, fastcifar.kernels.catalogue; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
