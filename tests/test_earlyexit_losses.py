"""The joint losses of all heads beside their formulas."""

import pytest
import torch
import torch.nn.functional as F

from fastcifar.earlyexit import JointExitLoss


def test_joint_loss_of_fixed_weights():
    outputs, target = [torch.randn(6, 4, requires_grad=True) for _ in range(3)], torch.arange(6) % 4
    losses = [F.cross_entropy(output, target) for output in outputs]
    torch.testing.assert_close(JointExitLoss()(outputs, target), sum(losses))
    weighted = JointExitLoss(weights=[0.25, 0.5])(outputs, target)
    torch.testing.assert_close(weighted, 0.25 * losses[0] + 0.5 * losses[1] + losses[2])
    every = JointExitLoss(weights=[0.25, 0.5, 2.0])(outputs, target)
    torch.testing.assert_close(every, 0.25 * losses[0] + 0.5 * losses[1] + 2 * losses[2])


@pytest.mark.parametrize(("epoch", "epochs"), [(0, 100), (40, 100), (99, 100), (100, 100)])
def test_shallow_deep_schedule(epoch, epochs):
    outputs, target = [torch.randn(6, 4) for _ in range(7)], torch.arange(6) % 4
    largest = [0.15, 0.3, 0.45, 0.6, 0.75, 0.9]
    expected = F.cross_entropy(outputs[-1], target)
    for most, output in zip(largest, outputs[:-1], strict=True):
        expected = expected + min(most, 0.01 + epoch * most / epochs) * F.cross_entropy(output, target)
    torch.testing.assert_close(JointExitLoss("shallow_deep")(outputs, target, epoch / epochs), expected)


@pytest.mark.parametrize("detach", [True, False])
def test_uncertainty_weights(detach):
    outputs, target = [torch.randn(6, 3, requires_grad=True) for _ in range(3)], torch.randn(6, 3)
    uncertainty = [torch.rand(6, requires_grad=True) for _ in range(2)]

    def loss(output, target):
        return (output - target).square().mean(1)

    total = JointExitLoss("deediff", loss=loss, detach=detach)(outputs, target, uncertainty=uncertainty)
    expected = loss(outputs[2], target).mean()
    expected = expected + sum(((1 - u) * loss(o, target)).mean() for u, o in zip(uncertainty, outputs[:2], strict=True))
    torch.testing.assert_close(total, expected)
    total.backward()
    assert (uncertainty[0].grad is None) == detach


@pytest.mark.parametrize(
    ("make", "call", "message"),
    [
        ({"schedule": "linear"}, {}, "schedule to be one of"),
        ({"weights": [1.0, -1.0]}, {}, "weights of 0 or more"),
        ({"schedule": "deediff", "weights": [1.0]}, {}, "no weights"),
        ({"weights": [1.0]}, {}, "expected 2 or 3 weights for 3 outputs, got 1"),
        ({"schedule": "shallow_deep"}, {}, "progress from 0 to 1"),
        ({"schedule": "shallow_deep"}, {"progress": 1.5}, "progress from 0 to 1"),
        ({"schedule": "deediff"}, {}, "uncertainty of each of 2 early outputs, got none"),
    ],
)
def test_bad_losses(make, call, message):
    outputs, target = [torch.zeros(2, 4) for _ in range(3)], torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        JointExitLoss(**make)(outputs, target, **call)


@pytest.mark.parametrize("outputs", ["nonsense", [1.0], torch.zeros(2, 3)])
def test_outputs_that_are_no_list_of_tensors_are_refused(outputs):
    with pytest.raises(TypeError, match="JointExitLoss: expected outputs"):
        JointExitLoss()(outputs, torch.tensor([0, 1]))
