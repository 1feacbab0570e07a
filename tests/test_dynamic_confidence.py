"""Dynamic Confidence beside a loop over single samples, for every way in which neurons keep their state."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcifar.compat import spikingjelly
from fastcifar.earlyexit import CostModel
from fastcifar.spiking import (
    CUBALIF,
    IF,
    LIF,
    LSQ,
    QCFS,
    Calibration,
    DynamicConfidence,
    Izhikevich,
    convert,
)

MOVE, CARRY = CostModel(math.inf), CostModel(0.0)


class OneStep(nn.Module):
    """A network that is called once a step; its neurons see a sequence of one."""

    def __init__(self, neurons):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.readout = nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8 * 16, 5)
        self.neuron1, self.neuron2 = neurons

    def forward(self, images):
        x = self.neuron1(self.bn(self.conv1(images))[None])[0]
        x = self.neuron2(self.conv2(2 * x)[None])[0]
        return 6 * self.readout(F.avg_pool2d(x, 2).flatten(1))


class OneStepNodes(OneStep):
    """The same with SpikingJelly's nodes, which see a step as such."""

    def forward(self, images):
        x = self.neuron1(self.bn(self.conv1(images)))
        x = self.neuron2(self.conv2(2 * x))
        return 6 * self.readout(F.avg_pool2d(x, 2).flatten(1))


def ann(activation):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), activation()]
    layers += [nn.Conv2d(6, 8, 3, padding=1), activation(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 5)]
    net = nn.Sequential(*layers).double()
    net(images(64))
    net[-1].weight.data *= 12
    return net.eval()


def images(count=29):
    return 2 * torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


MODELS = {
    "if": lambda: OneStep([IF(v_threshold=0.5), IF(v_threshold=0.5, v_reset=None)]),
    "lif": lambda: OneStep([LIF(tau=1.5, v_threshold=0.4), LIF(tau=3.0, v_threshold=0.3)]),
    "two-states": lambda: OneStep([CUBALIF(v_threshold=0.4), Izhikevich(v_threshold=0.2)]),
    "spikingjelly": lambda: OneStepNodes([spikingjelly.LIFNode(v_threshold=0.4), spikingjelly.IFNode(v_threshold=0.4)]),
    "qcfs": lambda: convert(ann(lambda: QCFS(4, init_threshold=2.0))),
    "lsq": lambda: convert(ann(lambda: LSQ(bits=3)), steps=16),
}


def step_of(model, x):
    """What one step of any of these models gives for one batch."""
    if hasattr(model, "net"):
        for neuron in model._neurons():
            neuron.start(1, len(x))
        return model.net(x)
    return model(x)


def reset(model):
    for module in model.modules():
        if module is not model and hasattr(module, "reset"):
            module.reset()


@torch.no_grad()
def official_loop(model, x, steps, threshold, scale):
    """The demo's way, one sample alone: accumulated outputs, softmax, a strict comparison."""
    results = []
    for sample in x.split(1):
        reset(model)
        z = torch.zeros(1, 5)
        for t in range(1, steps + 1):
            z = z + step_of(model, sample).float() / scale
            confidence, exit_step = z.softmax(1).max(), t
            if confidence > threshold:
                break
        results.append((z[0], exit_step, confidence))
    reset(model)
    logits, exit_step, confidence = zip(*results, strict=True)
    return torch.stack(logits), torch.tensor(exit_step), torch.stack(confidence)


def network(name):
    return MODELS[name]().double().eval()


def threshold_between(model, x, quantile, steps=16, scale=8.0):
    """One that some reach at every stage, with no confidence near it."""
    trace = DynamicConfidence(model, steps, 0.5, scale).trace(x)
    values = trace.confidence[:-1].cummax(0).values.flatten().sort().values
    at = int(quantile * len(values))
    gap = at + int(values[at : at + 20].diff().argmax())
    return ((values[gap] + values[gap + 1]) / 2).item()


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_loop_over_single_samples(name, quantile):
    model, x = network(name), images()
    threshold = threshold_between(model, x, quantile)
    logits, exit_step, confidence = official_loop(model, x, 16, threshold, 8.0)
    assert len(exit_step.unique()) > 3
    for cost in (MOVE, CARRY, CostModel()):
        result = DynamicConfidence(model, 16, threshold, 8.0, cost)(x)
        assert result.exit_step.equal(exit_step)
        assert result.logits.argmax(1).equal(logits.argmax(1))
        torch.testing.assert_close(result.logits, logits, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.confidence, confidence)


@pytest.mark.parametrize("name", MODELS)
def test_every_state_is_compacted(name):
    """A membrane that was left behind would meet images of another number of rows, and be refused or reset."""
    model, x = network(name), images()
    dynamic = DynamicConfidence(model, 16, threshold_between(model, x, 0.5), 8.0, MOVE)
    rows = []
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    exit_step = dynamic(x).exit_step
    last = int(exit_step.max())
    assert rows == [int((exit_step > t).sum()) for t in range(last)]


def test_batches_do_not_see_each_other():
    model = DynamicConfidence(network("lif"), 8, 0.4, 8.0)
    first = model(images())
    model(images(7))
    again = model(images())
    assert again.logits.equal(first.logits)
    assert again.exit_step.equal(first.exit_step)
    assert model.model.neuron1.v is None
    with pytest.raises(ValueError, match="expected the model to return"):
        DynamicConfidence(nn.Sequential(nn.Identity(), LIF()), 2)(torch.randn(2, 3, 4))
    assert first.logits.dtype == torch.float32
    assert not first.logits.requires_grad


def test_strict_at_the_threshold_and_forced_at_the_end():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.neuron = IF()

        def forward(self, x):
            return 0 * (self.neuron(x[None])[0] + x)

    tied = DynamicConfidence(Tied(), 3, 0.5)  # two classes of zeros: a confidence of exactly 0.5
    assert tied(torch.zeros(2, 2)).exit_step.tolist() == [3, 3]
    tied.threshold = math.nextafter(0.5, 0)
    assert tied(torch.zeros(2, 2)).exit_step.tolist() == [3, 3]  # the same in float32
    tied.threshold = 0.499
    assert tied(torch.zeros(2, 2)).exit_step.tolist() == [1, 1]
    empty = tied(torch.zeros(0, 2))
    assert empty.logits.shape == (0, 2)
    tied.threshold = 0.1
    spoilt = tied(torch.tensor([[math.nan, 0.0], [0.0, 0.0]]))
    assert spoilt.exit_step.tolist() == [3, 1]


def test_trace_counts_spikes():
    model, x = network("if"), images(5)
    trace = DynamicConfidence(model, 6, 0.5, 8.0).trace(x)
    assert trace.neurons == 6 * 64 + 8 * 64
    total, z = torch.zeros(5, dtype=torch.int64), torch.zeros(5, 5)
    outputs = []
    for neuron in (model.neuron1, model.neuron2):
        neuron.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        for t in range(6):
            z = z + model(x).float() / 8
            total = total + sum(output[0].sum((1, 2, 3)).long() for output in outputs)
            outputs.clear()
            assert trace.spikes[t].equal(total)
            torch.testing.assert_close(trace.confidence[t], z.softmax(1).amax(1))
            assert trace.prediction[t].equal(z.argmax(1))
    assert total.min() > 0


def test_calibration_is_what_the_network_does():
    model, x = network("qcfs"), images(60)
    dynamic = DynamicConfidence(model, 12, 0.5, 8.0)
    labels = dynamic.trace(x).prediction[-1].clone()
    labels[::5] = (labels[::5] + 1) % 5  # some that the network never learns
    calibration = dynamic.calibrate([(x[:40], labels[:40]), (x[40:], labels[40:])])
    assert dynamic.threshold == calibration.threshold
    result = dynamic(x)
    assert result.exit_step.equal(calibration.exit_step())
    curve = calibration.curve()
    right = (result.logits.argmax(1) == labels).double().mean()
    assert curve.accuracy[-1] == right
    assert curve.latency[-1] == result.exit_step.double().mean()
    assert right >= calibration.correct[-1].double().mean()
    assert curve.latency[-1] < 12
    # No other threshold is as accurate and faster.
    for threshold in calibration.confidence.unique().tolist():
        other = calibration.curve(threshold)
        assert other.accuracy[-1] < right or other.latency[-1] >= curve.latency[-1]
    lenient = dynamic.calibrate([(x, labels)], max_loss=0.2)
    assert lenient.curve().latency[-1] < curve.latency[-1]


def _calibration(**options):
    confidence = torch.tensor([[0.3, 0.7, 0.2], [0.8, 0.9, 0.3], [0.9, 0.9, 0.4]])
    correct = torch.tensor([[False, True, False], [True, False, False], [True, True, False]])
    spikes = torch.tensor([[1, 2, 3], [2, 4, 6], [3, 6, 9]])
    return Calibration(confidence, correct, spikes, neurons=10, **options)


def test_curves_and_oracle():
    calibration = _calibration()
    fixed = calibration.curve(math.inf)
    assert fixed.latency.tolist() == [1, 2, 3]
    torch.testing.assert_close(fixed.accuracy, torch.tensor([1, 1, 2]).double() / 3)
    torch.testing.assert_close(fixed.spikes, torch.tensor([2.0, 4.0, 6.0]).double() / 10)
    dynamic = calibration.curve(0.6)
    torch.testing.assert_close(dynamic.latency, torch.tensor([3, 5, 6]).double() / 3)
    torch.testing.assert_close(dynamic.accuracy, torch.tensor([1, 2, 2]).double() / 3)
    torch.testing.assert_close(dynamic.spikes, torch.tensor([6, 10, 13]).double() / 30)
    latency, accuracy = calibration.oracle()
    assert latency == pytest.approx((2 + 1 + 3) / 3)
    assert accuracy == pytest.approx(2 / 3)
    assert calibration.oracle(miss=1)[0] == pytest.approx((2 + 1 + 1) / 3)
    assert calibration.curve().accuracy[-1] == fixed.accuracy[-1]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    _calibration().plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_stays_in_evaluation():
    model = DynamicConfidence(network("lif").train(), 4)
    model.train()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps above 0, got 0"),
        ({"steps": 2.0}, TypeError, "steps to be an integer"),
        ({"threshold": math.nan}, ValueError, "threshold to be a number, got nan"),
        ({"scale": 0.0}, ValueError, "scale to be finite and above 0"),
        ({"scale": math.inf}, ValueError, "scale to be finite and above 0"),
        ({"model": nn.Linear(2, 2)}, ValueError, "neurons of fastcifar.spiking"),
        ({"model": abs}, TypeError, "expected a module"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        DynamicConfidence(**({"model": nn.Sequential(LIF())} | options))


def test_bad_models_and_loaders():
    with pytest.raises(ValueError, match="running statistics"):
        DynamicConfidence(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), LIF()))
    lsq = convert(ann(lambda: LSQ(bits=3)), steps=8)
    with pytest.raises(ValueError, match="at most the network's 8 steps, got 9"):
        DynamicConfidence(lsq, steps=9)
    dynamic = DynamicConfidence(network("lif"), 4)
    with pytest.raises(ValueError, match="batches of images and labels, got none"):
        dynamic.calibrate([])
    with pytest.raises(ValueError, match="max_loss of 0 or more"):
        dynamic.calibrate([], max_loss=-0.1)
    with pytest.raises(ValueError, match="expected spikes"):
        Calibration(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 2), 1)
