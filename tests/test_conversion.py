"""Quantised activations, and what becomes of them in a converted network."""

import copy
import pickle
import subprocess
import sys
from fractions import Fraction
from math import floor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcifar.data import SAMPLE, cifar10, normalize
from fastcifar.spiking.conversion import SpikingNetwork, convert
from fastcifar.spiking.quantize import LSQ, QCFS, lsq, qcfs

ROOT = Path(__file__).parent.parent
THRESHOLDS = (0.3, 1.7, 3.0, 105.0)  # no powers of two; 3 and 105 have ties with levels that are none either
LEVELS = (2, 3, 4, 5, 6, 8, 16)


def hard_inputs(step, halves):
    """What is as near to ``step * halves`` as float32 comes, and its neighbours, for a float32 ``step``."""
    ties = (step.double() * halves).float()
    return torch.cat([ties.nextafter(torch.tensor(-torch.inf)), ties, ties.nextafter(torch.tensor(torch.inf))])


def halves(levels, low, high):
    return (torch.arange(low - 1, high + 3, dtype=torch.float64) - 0.5) / levels


# ---- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "low", "high"), [*((n, 0, n) for n in LEVELS), (1, 0, 1), (1, 0, 15), (1, -4, 3)])
def test_counts_are_those_of_real_numbers(levels, low, high):
    for step in map(torch.tensor, THRESHOLDS):
        x = hard_inputs(step, halves(levels, low, high))
        y = lsq(x, step, low, high) if levels == 1 else qcfs(x, step, levels)
        counts = (y.double() * levels / step.double()).round()
        for value, count in zip(x.tolist(), counts.tolist(), strict=True):
            clipped = min(max(levels * Fraction(value) / Fraction(step.item()), low), high)
            assert count == floor(clipped + Fraction(1, 2)), (value, step)


def straight_floor(z):
    return z + (z.floor() - z).detach()


def plain_qcfs(x, threshold, levels):
    return threshold / levels * straight_floor((x / threshold).clamp(0, 1) * levels + 0.5)


def plain_lsq(x, step, low, high):
    return straight_floor((x / step).clamp(low, high) + 0.5) * step


@pytest.mark.parametrize("shape", [(), (5, 1, 1), (1, 5, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("ours", "plain", "bounds"), [(qcfs, plain_qcfs, (4,)), (lsq, plain_lsq, (0, 15)), (lsq, plain_lsq, (-4, 3))]
)
def test_gradients_are_those_of_the_formula(ours, plain, bounds, dtype, shape):
    torch.manual_seed(0)
    x = torch.randn(30, 5, 4, 4).to(dtype).requires_grad_()
    step = (torch.rand(shape) / 2 + 0.2).requires_grad_()
    g = torch.randn_like(x)
    y = ours(x, step, *bounds)
    grads = torch.autograd.grad(y, (x, step), g)
    exact_x, exact_step = (t.detach().double().requires_grad_() for t in (x, step))
    exact = plain(exact_x, exact_step, *bounds)
    exact_grads = torch.autograd.grad(exact, (exact_x, exact_step), g.double())
    rounding = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0.0}
    torch.testing.assert_close(y, exact.to(dtype), **rounding)
    torch.testing.assert_close(grads[0], exact_grads[0].to(dtype), **rounding)
    # A term is g (y - x) / step with y rounded to float32 (float64 for such an x), the sum exact, and rounded once.
    weights = g.double().abs() * ((exact.detach() / step.detach().double()).abs() + 1)
    limit = 2**-23 * (weights.sum_to_size(shape) + exact_grads[1].abs())
    assert ((grads[1] - exact_grads[1]).abs() <= limit).all()


def test_gradient_of_the_step_scales_and_repeats():
    torch.manual_seed(0)
    x, step = torch.randn(64, 64), torch.tensor(0.3, requires_grad=True)
    once, again = (torch.autograd.grad(lsq(x, step, 0, 3).sum(), step)[0] for _ in range(2))
    assert torch.equal(once, again)
    layer = LSQ(bits=2, init=0.3)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.step.grad, once / (64 * 64 * 3) ** 0.5)


both = pytest.mark.parametrize("function", [lambda x, s: qcfs(x, s, 4), lambda x, s: lsq(x, s, -4, 3)])


@both
def test_transforms(function):
    torch.manual_seed(0)
    x, steps = torch.randn(6, 7), torch.rand(6) + 0.2
    each = torch.stack([function(a, s) for a, s in zip(x, steps, strict=True)])
    assert torch.equal(torch.vmap(function)(x, steps), each)
    per_sample = torch.vmap(torch.func.grad(lambda x, s: function(x, s).square().sum(), argnums=(0, 1)))(x, steps)
    for i, (a, s) in enumerate(zip(x, steps, strict=True)):
        a, s = a.clone().requires_grad_(), s.clone().requires_grad_()
        for got, want in zip(per_sample, torch.autograd.grad(function(a, s).square().sum(), (a, s)), strict=True):
            torch.testing.assert_close(got[i], want)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, steps[0]), function(x, steps[0]))


@pytest.mark.parametrize("shape", [(64, 5, 32, 32), (3, 100_000), (200_000, 1)])
def test_large_inputs_count_as_their_parts(shape):
    torch.manual_seed(0)
    x, threshold = torch.randn(shape), torch.rand(shape[1:2] + (1,) * (len(shape) - 2)) + 0.2
    parts = torch.cat([qcfs(part, threshold, 4) for part in x.split(len(x) // 3 or 1)])
    assert torch.equal(qcfs(x, threshold, 4), parts)
    if len(shape) == 4:
        strided = x.to(memory_format=torch.channels_last)
        assert torch.equal(qcfs(strided, threshold, 4), parts)
        assert qcfs(strided, threshold, 4).stride() == strided.stride()


@both
def test_second_derivative_raises(function):
    x, step = torch.randn(8, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    for grad in torch.autograd.grad(function(x, step).sum(), (x, step), create_graph=True):
        with pytest.raises(RuntimeError, match="the second derivative is not offered"):
            grad.sum().backward(retain_graph=True)


def test_lsq_starts_with_the_first_batch():
    x = torch.randn(8, 16)
    layer = LSQ(bits=3)
    with pytest.raises(ValueError, match="a batch in training first"):
        layer.eval()(x)
    layer.train()(x)
    layer(10 * x)
    torch.testing.assert_close(layer.step.item(), 2 * x.abs().mean().item() / 7**0.5)
    other = LSQ(bits=3)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x), layer(x))
    other.load_state_dict(LSQ(bits=3).state_dict())  # saved before its first batch
    with pytest.raises(ValueError, match="a batch in training first"):
        other(x)


@pytest.mark.parametrize("layer", [QCFS(4, 2.0, (3, 1, 1)), LSQ(2, signed=True, init=0.5)], ids=["QCFS", "LSQ"])
def test_activations_survive_copies(layer):
    x = torch.randn(2, 3, 4, 4)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))
    assert set(layer.state_dict()) == {"threshold" if isinstance(layer, QCFS) else "step"}


# ---- conversion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", LEVELS)
def test_the_neuron_counts_as_qcfs_for_every_constant_input(levels):
    torch.manual_seed(levels)
    for value in THRESHOLDS:
        ann = nn.Sequential(QCFS(levels, value))
        threshold = ann[0].threshold.detach()
        x = torch.cat([hard_inputs(threshold, halves(levels, 0, levels)), value * (torch.rand(250_000) * 1.4 - 0.2)])
        assert torch.equal(convert(ann)(x), ann(x)), value


@pytest.mark.parametrize(("bits", "signed"), [(1, False), (2, False), (4, False), (3, True)])
def test_the_bounded_neuron_sums_as_lsq_for_every_constant_input(bits, signed):
    torch.manual_seed(bits)
    for value in THRESHOLDS:
        ann = nn.Sequential(LSQ(bits, signed, init=value))
        low, high, step = ann[0].low, ann[0].high, ann[0].step.detach()
        hard = hard_inputs(step, halves(1, low, high))
        x = torch.cat([hard, value * torch.empty(50_000).uniform_(low - 2, high + 2)])
        for steps in (None, 32):
            assert torch.equal(convert(ann, steps)(x), ann(x)), (value, steps)


@pytest.fixture(scope="module")
def images():
    pixels, labels = cifar10(SAMPLE, "test")
    return normalize(pixels), labels


@torch.enable_grad()
def trained(activation, images):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), activation(), nn.AvgPool2d(4), nn.Dropout(0.2)),
        *(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), activation(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(72, 16), nn.BatchNorm1d(16), activation(), nn.Linear(16, 10)),
    )
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for batch in torch.randperm(1000)[:800].split(32):
        sgd.zero_grad()
        F.cross_entropy(net(images[0][batch]), images[1][batch]).backward()
        sgd.step()
    return net.eval()


ACTIVATIONS = {"qcfs": lambda: QCFS(4, 2.0), "lsq": lambda: LSQ(2), "relu": nn.ReLU}


@pytest.fixture(scope="module", params=ACTIVATIONS)
def ann(request, images):
    return trained(ACTIVATIONS[request.param], images)


@torch.no_grad()
def test_first_layer_fires_as_often_as_the_trained_activation_counts(images):
    # In float64 folding the batch norm rounds too little for a count to change.
    ann, x = trained(ACTIVATIONS["qcfs"], images).double(), images[0][:64].double()
    snn, seen = convert(ann), []
    snn.net[2].register_forward_hook(lambda _, inputs, output: seen.append(output))
    logits = snn(x)
    rates = seen[0].unflatten(0, (4, 64)).mean(0)
    activations = ann[:3](x)
    assert activations.unique().numel() == 5
    torch.testing.assert_close(rates, activations, rtol=1e-12, atol=1e-12)
    # Deeper layers see spikes, which come unevenly: near, not equal.
    assert (logits.argmax(1) == ann(x).argmax(1)).double().mean() > 0.7


def bound(net, x):
    """How far the sums over any number t of steps may be from t times the activations, by induction over the layers.

    Let a neuron's summed input stay within D of t x. If it last did not fire at s, V(t) <= V(s) + (t - s)(x - lambda) +
    2 D <= lambda + 2 D for x <= lambda; if it last fired at s, V(t) >= (t - s) x - 2 D >= -2 D for x >= 0. Its output
    sums to lambda / 2 + input - V, so to within lambda / 2 + 3 D of t clip(x, 0, lambda); for x < 0 and x > lambda the
    same two steps give lambda / 2 + D. A layer with weights passes errors on with the absolute values of its weights.
    """
    error = torch.zeros_like(x)
    for layer in net:
        if hasattr(layer, "threshold"):
            error = layer.threshold / 2 + 3 * error
            continue
        layer = copy.deepcopy(layer)
        if hasattr(layer, "weight"):
            layer.weight.data.abs_()
            layer.bias = None
        error = layer(error)
    return error


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lsq", "relu", "qcfs"])
def test_logits_converge(images, kind):
    ann, x = trained(ACTIVATIONS[kind], images).double(), images[0][:8].double()
    if kind == "lsq":  # spikes that came too early are taken back, so sums end where the rounding of the ANN puts them
        torch.testing.assert_close(convert(ann, 64)(x), ann(x))
        return
    snn = convert(ann, calibration=[x], percentile=100)
    unrounded = nn.Sequential(*(nn.Hardtanh(0, m.threshold.item()) if hasattr(m, "threshold") else m for m in snn.net))
    exact, limit = unrounded(x), bound(snn.net, x)
    if kind == "relu":  # calibrated on these images, so nothing is clipped
        torch.testing.assert_close(exact, ann(x))
    for steps in (8, 64, 512):
        error = (snn(x, steps, chunk=64) - exact).abs()
        assert (error <= limit / steps + 1e-9).all(), steps
    assert error.max() < 0.05


@torch.no_grad()
def test_convert_leaves_the_ann_untouched(ann, images):
    x, before = images[0][:16], copy.deepcopy(ann.state_dict())
    ann.train()
    convert(ann, 16, calibration=[(x, None)])(x)
    assert all(m.training for m in ann.modules())
    assert all(p.requires_grad for p in ann.parameters())
    ann.eval()
    assert list(before) == list(ann.state_dict())
    assert all(torch.equal(before[key], value) for key, value in ann.state_dict().items())


@torch.no_grad()
def test_calls_do_not_depend_on_each_other_nor_on_the_chunk(ann, images):
    # In float64, as convolutions round otherwise for another batch, and in float32 that may flip a spike.
    ann, many = copy.deepcopy(ann).double(), images[0][:100].double()
    snn, x = convert(ann, 16, calibration=[many]), many[:16]
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d, nn.Dropout)) for m in snn.modules())
    logits = snn(x)
    snn(many[16:19], 3)
    assert torch.equal(snn(x), logits)
    curve = snn(x, every_step=True)
    assert torch.equal(curve[15], logits)
    torch.testing.assert_close(curve[4], snn(x, 5))
    torch.testing.assert_close(snn(x, chunk=5), logits)
    assert snn.train().training is False
    for copied in (copy.deepcopy(snn), pickle.loads(pickle.dumps(snn))):
        assert torch.equal(copied(x), logits)
    other = convert(ann, 16, calibration=[many[:1]])
    other.load_state_dict(snn.state_dict())
    assert torch.equal(other(x), logits)


class Skipping(nn.Module):
    """The images reach the sum past the first neurons, so they must be repeated."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), QCFS(4, 2.0)
        self.block, self.last, self.head = nn.Conv2d(4, 4, 3, padding=1), QCFS(4, 2.0), nn.Linear(4, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.block(self.act(self.bn(x)))
        return self.head(self.last(x).mean((2, 3)))


class Untraceable(Skipping):
    def forward(self, x):
        return super().forward(x) if x.abs().sum() > 0 else x


@torch.no_grad()
def test_other_networks_than_sequences():
    torch.manual_seed(0)
    traced, untraced, x = Skipping().eval(), Untraceable().eval(), torch.randn(5, 3, 8, 8)
    untraced.load_state_dict(traced.state_dict())
    results = [convert(net.double())(x.double(), 64) for net in (traced, untraced)]
    torch.testing.assert_close(*results)
    assert (results[0] - traced(x.double())).abs().max() < 0.1
    # The batch norm is not alone in taking the stem's output, so it stays.
    assert isinstance(convert(traced).net.bn, nn.BatchNorm2d)


@torch.no_grad()
def test_one_activation_at_two_places_becomes_two_neurons():
    act, first, second, x = QCFS(8, 2.0), nn.Linear(6, 9), nn.Linear(9, 9), torch.randn(7, 6)
    separate = nn.Sequential(first, act, second, copy.deepcopy(act))
    assert torch.equal(convert(nn.Sequential(first, act, second, act))(x), convert(separate)(x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), QCFS()

    def forward(self, x):
        return self.act(self.linear(self.act(x)))


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.act, self.function = QCFS(), function

    def forward(self, x):
        return self.function(self.act(x))


def net(*layers):
    return nn.Sequential(*layers)


def relu(**options):
    return convert(net(nn.ReLU()), **options)


def lsq_net(*call, **options):
    return convert(net(LSQ(4, init=1.0)))(torch.ones(1, 2), *call, **options)


NEGATIVE = net(QCFS())
NEGATIVE[0].threshold.data.neg_()
STATELESS = nn.BatchNorm1d(2, track_running_stats=False)
FLAT = net(nn.Linear(2, 3), nn.BatchNorm1d(3), QCFS())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: qcfs(torch.ones(2), 1.0), TypeError, "qcfs: expected threshold to be a floating tensor, got float"),
        (lambda: qcfs(torch.ones(2), torch.ones(3)), ValueError, r"to broadcast against \(2,\), got \(3,\)"),
        (lambda: qcfs(torch.ones(2), torch.ones(()), 0), ValueError, "qcfs: expected levels above 0, got 0"),
        (lambda: lsq(torch.ones(2).int(), torch.ones(()), 0, 3), TypeError, "lsq: expected x .* got torch.int32"),
        (lambda: lsq(torch.ones(2), torch.ones(()), 3, 3), ValueError, "lsq: expected low below high, got 3 and 3"),
        (lambda: QCFS(init_threshold=0.0), ValueError, "QCFS: expected init_threshold .* above 0, got 0.0"),
        (lambda: LSQ(bits=1, signed=True), ValueError, "LSQ: expected bits to be an integer of 2 to 16"),
        (lambda: LSQ()(torch.zeros(3)), ValueError, "LSQ: expected a first batch with finite values other than 0"),
        (lambda: convert("net"), TypeError, "convert: expected a module, got str"),
        (lambda: convert(nn.Linear(2, 2)), ValueError, "convert: expected activations to replace"),
        (lambda: convert(net(QCFS(), nn.MaxPool2d(2))), ValueError, "MaxPool2d 1: .* average pooling"),
        (lambda: convert(net(QCFS(), nn.GELU())), ValueError, "QCFS, LSQ or nn.ReLU as activations .* got GELU 1"),
        (lambda: convert(Calls(F.relu)), ValueError, "got a call of relu in forward"),
        (lambda: convert(Calls(lambda x: F.max_pool2d(x, 2))), ValueError, "got a call of max_pool2d in forward"),
        (lambda: relu(), ValueError, "convert: expected calibration batches, .* got none"),
        (lambda: relu(calibration=[]), ValueError, "that reach every ReLU, got none at 0"),
        (lambda: relu(calibration=[-torch.ones(3)]), ValueError, "at ReLU 0 to have a threshold above 0, got 0"),
        (lambda: relu(calibration=[torch.ones(3)])(torch.ones(1, 3)), ValueError, "SpikingNetwork: expected steps, as"),
        (lambda: relu(percentile=0), ValueError, "convert: expected percentile to be above 0"),
        (lambda: convert(NEGATIVE), ValueError, "QCFS 0 to have a threshold above 0, got -8"),
        (
            lambda: convert(net(STATELESS, QCFS())),
            ValueError,
            "convert: expected running statistics, got BatchNorm1d 0",
        ),
        (lambda: convert(net(QCFS()), 0), ValueError, "convert: expected steps above 0, got 0"),
        (lambda: convert(net(LSQ(4, init=1.0)), 14), ValueError, "at least 15 steps, .* got 14"),
        (lambda: lsq_net(17), ValueError, r"at most 16 steps, .* got 17; convert\(ann, steps=17\)"),
        (lambda: lsq_net(4, chunk=0), ValueError, "SpikingNetwork: expected chunk above 0, got 0"),
        (lambda: convert(Twice())(torch.ones(2, 4)), RuntimeError, "one ran a second time"),
        (lambda: convert(Calls(torch.mean))(torch.ones(2, 4)), ValueError, r"the network to return \[16, ...\], got"),
        (
            lambda: convert(FLAT)(torch.ones(2, 3, 2)),
            ValueError,
            r"SpikingNetwork: expected \[B, features\] at a linear",
        ),
    ],
)
def test_errors_are_sentences(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_network_is_a_module_like_others():
    snn = convert(nn.Sequential(nn.Linear(3, 4), QCFS(4), nn.Linear(4, 2)))
    assert isinstance(snn, SpikingNetwork)
    assert not any(p.requires_grad for p in snn.parameters())
    assert snn.double()(torch.randn(5, 3, dtype=torch.float64)).dtype == torch.float64
    assert snn.bfloat16()(torch.randn(5, 3).bfloat16()).dtype == torch.bfloat16
    assert snn.float()(torch.randn(0, 3)).shape == (0, 2)


@pytest.mark.parametrize(
    ("name", "words"), [("ann_to_snn", "whose count at T = L"), ("plif_cifar10", "time constants")]
)
def test_examples_run(name, words, tmp_path):
    plot = ROOT / "examples" / "output" / f"{name}.png"
    plot.unlink(missing_ok=True)
    command = [sys.executable, ROOT / "examples" / f"{name}.py", "--quick", "--epochs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert words in done.stdout
    assert plot.stat().st_size > 10_000
