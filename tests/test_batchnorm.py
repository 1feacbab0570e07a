"""Batch norms over time beside SpikingJelly's, and a batch norm inside a neuron's kernel."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastcifar.spiking import IF, LIF, SignedIF
from fastcifar.spiking import batchnorm as ours
from fastcifar.spiking.batchnorm import affine_of, fuse

T, B, C = 4, 3, 5
SHAPES = {"1d": [(T, B, C), (T, B, C, 6)], "2d": [(T, B, C, 4, 4)]}
NORMS = {
    "ThresholdDependentBatchNorm": (0.7, 1.5, C),
    "TemporalEffectiveBatchNorm": (T, C),
    "BatchNormThroughTime": (T, C),
}
CASES = [(norm + dims, args, shape) for norm, args in NORMS.items() for dims in SHAPES for shape in SHAPES[dims]]


def randomise(module):
    for i, p in enumerate(module.parameters()):
        nn.init.normal_(p, 1.0, 0.2, generator=torch.Generator().manual_seed(i))


@pytest.mark.parametrize("options", [{}, {"eps": 1e-2, "momentum": 0.3}, {"track_running_stats": False}])
@pytest.mark.parametrize(("name", "args", "shape"), CASES)
def test_same_numbers_as_spikingjelly(name, args, shape, options):
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    more = {"step_mode": "m"} if "ThroughTime" in name else {}
    mine, theirs = getattr(ours, name)(*args, **options), getattr(layer, name)(*args, **options, **more)
    for (key, a), (other_key, b) in zip(mine.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert key == other_key
        assert torch.equal(a, b), key
    randomise(mine)
    theirs.load_state_dict(mine.state_dict())
    torch.manual_seed(0)
    for training in (True, True, False):
        mine.train(training)
        theirs.train(training)
        x = torch.randn(shape) * 2 + 1
        xs = [x.clone().requires_grad_() for _ in range(2)]
        ys = [module(x) for module, x in zip((mine, theirs), xs, strict=True)]
        if more:
            theirs.reset()
        assert torch.equal(*ys)
        g = torch.randn(shape)
        grads = [
            torch.autograd.grad(y, (x, *module.parameters()), g)
            for y, x, module in zip(ys, xs, (mine, theirs), strict=True)
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "args", "shape"), CASES)
def test_module_round_trips(name, args, shape):
    module = getattr(ours, name)(*args)
    randomise(module)
    module(torch.randn(shape))
    fresh = getattr(ours, name)(*args)
    fresh.load_state_dict(module.state_dict())
    x = torch.randn(shape)
    expected = module.eval()(x)
    for copied in (fresh.eval(), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), expected)


def test_a_shorter_sequence_uses_the_first_batch_norms():
    module, x = ours.BatchNormThroughTime2d(T, C).eval(), torch.randn(T, B, C, 4, 4)
    randomise(module)
    assert torch.equal(module(x[:2]), module(x)[:2])
    assert module(x[:0]).shape == (0, B, C, 4, 4)


def trained_norm(norm, shape):
    randomise(norm)
    for seed in range(3):
        torch.manual_seed(seed)
        norm(torch.randn(shape, dtype=norm.running_mean.dtype).flatten(0, 1) * 2 + 1)
    return norm.eval()


FUSED = [
    (lambda: nn.BatchNorm2d(C), (8, B, C, 8, 8)),
    (lambda: nn.BatchNorm2d(C, affine=False), (8, B, C, 8, 8)),
    (lambda: nn.BatchNorm1d(C), (8, B, C)),
    (lambda: nn.BatchNorm3d(C), (8, B, C, 2, 4, 4)),
    (lambda: nn.BatchNorm2d(C).double(), (8, B, C, 8, 8)),
]


@pytest.mark.parametrize("neuron", [LIF, lambda: IF(v_reset=None), SignedIF], ids=["LIF", "IF", "SignedIF"])
@pytest.mark.parametrize(("norm", "shape"), FUSED)
def test_fused_spikes_are_those_of_the_two_but_for_rounding(norm, shape, neuron):
    bn = trained_norm(norm(), shape)
    x = torch.randn(shape, dtype=bn.running_mean.dtype) * 2 + 1
    fused, apart = fuse(bn, neuron()).eval(), neuron()
    current = bn(x.flatten(0, 1)).unflatten(0, shape[:2])
    spikes, expected = fused(x), apart(current)

    # The same affine without the kernel: exact.
    scale, shift = affine_of(bn, x.dim() - 3)
    assert torch.equal(spikes, neuron()(x * scale + shift))
    # The batch norm itself rounds otherwise by a few units in the last place, which a spike shows where the membrane is
    # within that of the threshold: about one in 1e5.
    torch.testing.assert_close(x * scale + shift, current, rtol=1e-5, atol=1e-5)
    assert (spikes != expected).sum() <= 1 + 1e-4 * spikes.numel()
    assert fused.neuron.scale is None
    assert fused.neuron.shift is None


def test_fused_gradients_reach_the_batch_norm():
    shape = (8, B, C, 6, 6)
    bn = trained_norm(nn.BatchNorm2d(C).double(), shape)
    g = torch.randn(shape, dtype=torch.float64)
    results = []
    for run in (fuse(bn, LIF()).eval(), lambda x: LIF()(bn(x.flatten(0, 1)).unflatten(0, shape[:2]))):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        results.append(torch.autograd.grad(run(x), (x, bn.weight, bn.bias), g))
    for fused, apart in zip(*results, strict=True):
        torch.testing.assert_close(fused, apart, rtol=1e-9, atol=1e-9)


def test_fused_in_training_is_the_two_one_after_the_other():
    torch.manual_seed(0)
    x = torch.randn(T, B, C, 6, 6) + 1
    for bn in (nn.BatchNorm2d(C), ours.ThresholdDependentBatchNorm2d(1.0, 1.0, C)):
        other, neuron = copy.deepcopy(bn), LIF()
        fused = fuse(bn, LIF())
        y = other(x) if isinstance(bn, ours.ThresholdDependentBatchNorm2d) else other(x.flatten(0, 1)).view_as(x)
        assert torch.equal(fused(x), neuron(y))
        assert torch.equal(bn.running_mean, other.running_mean)
        # The state goes on from call to call, in training and in evaluation.
        fused.eval()
        other.eval()
        scale, shift = affine_of(bn, 2)
        assert torch.equal(fused(x), neuron(x * scale + shift))
        for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            copied.neuron.reset()
            assert torch.equal(copied(x), LIF()(x * scale + shift))


def test_affine_rounds_once():
    bn = trained_norm(nn.BatchNorm2d(64), (4, 8, 64, 4, 4))
    exact = [t.float() for t in affine_of(copy.deepcopy(bn).double(), 2)]
    for got, want in zip(affine_of(bn, 2), exact, strict=True):
        assert got.shape == (64, 1, 1)
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: ours.ThresholdDependentBatchNorm2d(1.0, 1.0, C, affine=False),
            ValueError,
            "ThresholdDependentBatchNorm2d: expected affine=True",
        ),
        (
            lambda: ours.ThresholdDependentBatchNorm2d(1.0, 1.0, C)(torch.randn(B, C, 4, 4)),
            ValueError,
            r"expected x of shape \[T, B, 5, H, W\], got \(3, 5, 4, 4\)",
        ),
        (
            lambda: ours.ThresholdDependentBatchNorm1d(1.0, 1.0, C)(torch.randn(T, B, 2)),
            ValueError,
            r"expected x of shape \[T, B, 5\] or \[T, B, 5, L\], got \(4, 3, 2\)",
        ),
        (lambda: ours.TemporalEffectiveBatchNorm2d(0, C), ValueError, "expected T to be an integer above 0, got 0"),
        (
            lambda: ours.TemporalEffectiveBatchNorm1d(T, C)(torch.randn(T + 1, B, C)),
            ValueError,
            "TemporalEffectiveBatchNorm1d: expected 4 steps, .* got 5",
        ),
        (
            lambda: ours.BatchNormThroughTime1d(T, C)(torch.randn(T + 1, B, C)),
            ValueError,
            "BatchNormThroughTime1d: expected at most 4 steps, .* got 5",
        ),
        (lambda: affine_of(nn.Linear(2, 2)), TypeError, "affine_of: expected a batch norm .* got Linear"),
        (
            lambda: fuse(ours.TemporalEffectiveBatchNorm2d(T, C), LIF()),
            TypeError,
            "fuse: expected a batch norm that is the same at every step, got TemporalEffectiveBatchNorm2d",
        ),
        (lambda: fuse(ours.BatchNormThroughTime2d(T, C), LIF()), TypeError, "fuse: expected .* BatchNormThroughTime2d"),
        (
            lambda: fuse(nn.BatchNorm2d(C, track_running_stats=False), LIF()),
            ValueError,
            "fuse: expected a batch norm with running statistics",
        ),
        (lambda: fuse(nn.BatchNorm2d(C), nn.ReLU()), TypeError, "fuse: expected a neuron .* got ReLU"),
        (
            lambda: fuse(nn.BatchNorm2d(C), LIF(shift=torch.zeros(C, 1, 1))),
            ValueError,
            "fuse: expected a neuron without scale and shift",
        ),
        (lambda: fuse(nn.BatchNorm1d(C), LIF())(torch.randn(B, C)), ValueError, r"fuse: expected x of shape \[T, B, C"),
    ],
)
def test_errors_are_sentences(call, error, words):
    with pytest.raises(error, match=words):
        call()
