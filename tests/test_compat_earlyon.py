"""The early-exit wrapper with earlyon's names, beside earlyon 0.3.0 itself where that is installed."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcifar.compat import earlyon as ours
from fastcifar.earlyexit import CostModel


def backbone(width=6):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    return net.double()


def images(count=33):
    generator = torch.Generator().manual_seed(1)
    colour = torch.randn(count, 3, 1, 1, dtype=torch.float64, generator=generator)
    return 2 * colour + torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=generator)


def make(library, net=None, **options):
    """A wrapper of either library; heads are spread so that samples leave everywhere."""
    net = net or backbone()
    points = [library.ExitPoint(f"exit{k}", str(3 * k + 2), 6) for k in range(3)]
    config = library.EarlyExitConfig("small", 5, points, **options)
    torch.manual_seed(2)
    heads = {point.name: library.EarlyExitHead(6, 5) for point in points}
    extra = {"input_shape": (1, 3, 8, 8)}
    model = library.EarlyExitWrapper(net, heads, nn.Identity(), config, **extra).double()
    model(images(), mode="training")  # running statistics
    model.eval()
    with torch.no_grad():
        *outputs, final = model(images(), mode="training")
        last = [head.classifier[3] for head in model.exit_heads.values()] + [model.backbone[-1]]
        for linear, logits in zip(last, [*outputs, final], strict=True):
            scale = 2 / (logits - logits.mean(0)).std()
            linear.bias.copy_((linear.bias - logits.mean(0)) * scale)
            linear.weight.mul_(scale)
    return model


POLICIES = [
    {"confidence_thresholds": [0.8, 0.7, 0.6]},
    {"routing_policy": "entropy", "entropy_thresholds": [0.5, 0.7, 0.8]},
    {"confidence_thresholds": [0.8, 0.7, 0.6], "enabled_exits": [True, False, True]},
    {"temperatures": {"exit0": 0.7, "exit1": 1.5, "exit2": 1.0, "final": 2.0}},
]


@pytest.mark.parametrize("options", POLICIES)
@pytest.mark.parametrize("cost", [CostModel(math.inf), CostModel(0.0)], ids=["move", "carry"])
def test_a_batch_gives_what_its_samples_give_alone(options, cost):
    model = make(ours, **options)
    model.cost = cost
    batch = model(images())
    alone = [model(sample[None]) for sample in images()]
    assert batch.exit_taken.tolist() == [result.exit_taken for result in alone]
    assert len(batch.exit_taken.unique()) > 2
    torch.testing.assert_close(batch.predictions, torch.cat([result.prediction for result in alone]))
    torch.testing.assert_close(batch.per_sample_confidence, torch.tensor([result.confidence for result in alone]))
    share = sum(result.computation_used for result in alone) / len(alone)
    assert batch.estimated_backbone_flops_fraction == pytest.approx(share)


@pytest.mark.parametrize("options", POLICIES)
def test_equals_earlyon(options):
    earlyon = pytest.importorskip("earlyon")
    model, peer = make(ours, **options), make(earlyon, **options)
    peer.load_state_dict(model.state_dict())  # strictly: the keys are the same
    theirs = [peer(sample[None]) for sample in images()]
    for sample, expected in zip(images(), theirs, strict=True):
        result = model(sample[None])
        assert [f.name for f in dataclasses.fields(result)] == [f.name for f in dataclasses.fields(expected)]
        assert result.exit_taken == expected.exit_taken
        assert result.confidence == pytest.approx(expected.confidence, rel=1e-6)
        torch.testing.assert_close(result.prediction, expected.prediction)
    assert len({result.exit_taken for result in theirs}) > 2
    for x in (images(), images()[:1], images()[3:5]):
        result, expected = model.forward_inference_batched(x), peer.forward_inference_batched(x)
        assert [f.name for f in dataclasses.fields(result)] == [f.name for f in dataclasses.fields(expected)]
        assert result.exit_taken == expected.exit_taken
        torch.testing.assert_close(result.predictions, expected.predictions)
        torch.testing.assert_close(result.per_sample_confidence.double(), expected.per_sample_confidence)
    for a, b in zip(model(images(), mode="training"), peer(images(), mode="training"), strict=True):
        torch.testing.assert_close(a, b)


def test_configuration_is_earlyons():
    earlyon = pytest.importorskip("earlyon")
    points = [("a", "0", 3), ("b", "1", 3)]
    configs = [
        library.EarlyExitConfig("x", 7, [library.ExitPoint(*p) for p in points], temperature=1.5)
        for library in (ours, earlyon)
    ]
    assert dataclasses.asdict(configs[0]) == dataclasses.asdict(configs[1])
    assert configs[0].head_names == configs[1].head_names
    assert configs[0].temperature_for("b") == 1.5


def test_together_leaves_where_all_are_sure():
    model = make(ours, confidence_thresholds=[0.21, 0.21, 0.21])
    assert model.forward_inference_batched(images()).exit_taken == 0
    model.config.confidence_thresholds = [1.0, 0.21, 0.21]
    assert model.forward_inference_batched(images()).exit_taken == 1
    model.config.enabled_exits = [False] * 3
    result = model.forward_inference_batched(images())
    assert result.exit_taken == -1
    assert result.estimated_backbone_flops_fraction == 1
    expected = model.backbone(images())
    torch.testing.assert_close(result.predictions, expected)
    torch.testing.assert_close(result.per_sample_confidence, expected.softmax(1).amax(1).float())


def test_rows_are_dropped_and_the_rest_is_not_run():
    model = make(ours, confidence_thresholds=[0.8, 0.7, 0.6])
    model.cost = CostModel(math.inf)
    model(images())  # the first call counts operations as well
    seen = []
    for index in (3, 6, 9):
        model.backbone[index].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    taken = model(images()).exit_taken
    assert seen == [int(((taken > k) | (taken < 0)).sum()) for k in range(3)]
    seen.clear()
    model.config.confidence_thresholds = [0.0, 0.0, 0.0]
    assert model(images()).exit_taken.unique().tolist() == [0]
    assert not seen


def test_share_of_the_operations():
    model = make(ours, confidence_thresholds=[0.0, 1.0, 1.0])
    convolution = 8 * 8 * 6 * 9 * 2
    total = convolution * (3 + 3 * 6) + 2 * 6 * 5
    assert model(images()[:1]).computation_used == pytest.approx(3 * convolution / total)


def test_a_way_around_an_exit_is_refused():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return x.sum(1, keepdim=True) + self.b(self.a(x))

    config = ours.EarlyExitConfig("skip", 4, [ours.ExitPoint("a", "a", 4)], confidence_thresholds=[0.5])
    model = ours.EarlyExitWrapper(Skip(), {"a": nn.Identity()}, nn.Identity(), config).eval()
    model.backbone.a = nn.Identity()
    model = ours.EarlyExitWrapper(model.backbone, {"a": nn.Identity()}, nn.Identity(), config).eval()
    x = torch.zeros(3, 4)
    x[:2, 0] = 9  # two leave: one row meets three, and would be broadcast
    with pytest.raises(RuntimeError, match="expected 1 rows behind an exit that dropped the others, got 3"):
        model(x)
    model.cost = CostModel(0)
    assert model(x).exit_taken.tolist() == [0, 0, -1]


def test_copies_and_pickles_have_hooks_of_their_own():
    model = make(ours, confidence_thresholds=[0.8, 0.7, 0.6])
    expected = model(images())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for head in model.exit_heads.values():
            head.register_forward_hook(lambda *arguments: pytest.fail("the original's head ran"))
        result = twin(images())
        assert result.exit_taken.equal(expected.exit_taken)
        for head in model.exit_heads.values():
            head._forward_hooks.clear()


def test_the_backbone_alone_is_left_alone():
    model = make(ours, confidence_thresholds=[0.0] * 3)
    assert model.backbone(images()).shape == (33, 5)


def test_parameters_keys_and_training():
    model = make(ours)
    assert {*model.exit_parameters(), *model.backbone_parameters()} == set(model.parameters())
    assert "exit_heads.exit0.classifier.3.weight" in model.state_dict()
    assert "backbone.0.weight" in model.state_dict()
    outputs = model.train()(images(), mode="training")
    assert [tuple(output.shape) for output in outputs] == [(33, 5)] * 4
    target = torch.arange(33) % 5
    loss = ours.weighted_multi_exit_loss(outputs, target, model.config.loss_weights)
    torch.testing.assert_close(loss, sum(F.cross_entropy(output, target) for output in outputs) / 4)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("shape", [(3, 6, 4, 4), (3, 7, 6), (3, 6)])
@pytest.mark.parametrize("pool_tokens", ["cls", "mean"])
def test_heads(shape, pool_tokens):
    head, x = ours.EarlyExitHead(6, 5, pool_tokens=pool_tokens).eval(), torch.randn(shape)
    pooled = {4: lambda: x.mean((2, 3)), 3: lambda: x[:, 0] if pool_tokens == "cls" else x.mean(1), 2: lambda: x}
    torch.testing.assert_close(head(x), head.classifier(pooled[x.dim()]()))


POINTS = [ours.ExitPoint("a", "0", 3), ours.ExitPoint("b", "1", 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes of 2 or more, got 1"),
        ({"exit_points": [POINTS[0], POINTS[0]]}, "exit points of different name"),
        ({"exit_points": [POINTS[0], ours.ExitPoint("b", "0", 3)]}, "exit points of different layer_name"),
        ({"exit_points": [ours.ExitPoint("final", "0", 3)]}, "not to be called 'final'"),
        ({"routing_policy": "luck"}, "routing_policy to be one of"),
        ({"loss_weights": [1.0]}, "3 finite loss_weights"),
        ({"loss_weights": [0.0, 0.0, 0.0]}, "not all 0"),
        ({"confidence_thresholds": [0.5, math.nan]}, "2 finite confidence_thresholds from 0 to 1"),
        ({"confidence_thresholds": [0.5, 1.1]}, "2 finite confidence_thresholds from 0 to 1"),
        ({"entropy_thresholds": [0.5, math.inf]}, "2 finite entropy_thresholds"),
        ({"enabled_exits": [True]}, "2 finite enabled_exits"),
        ({"enabled_exits": [1, 0]}, "booleans"),
        ({"temperatures": {"a": 1.0}}, "temperatures of a, b, final"),
        ({"temperature": 0.0}, "the temperature of a to be finite and above 0, got 0"),
        ({"temperature": 2.0, "temperatures": {"a": 1.0}}, "temperature or temperatures, got both"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        ours.EarlyExitConfig(**({"backbone": "x", "num_classes": 5, "exit_points": POINTS} | options))


def test_bad_calls():
    model = make(ours)
    with pytest.raises(ValueError, match="mode to be 'training' or 'inference', got 'x'"):
        model(images(), mode="x")
    for call in (model, model.forward_inference_batched):
        with pytest.raises(ValueError, match="at least one sample"):
            call(images(0))
    with pytest.raises(ValueError, match="running statistics"):
        model.train()(images())
    config = ours.EarlyExitConfig("x", 5, POINTS)
    with pytest.raises(ValueError, match=r"exit_heads \['a', 'b'\], got \['a'\]"):
        ours.EarlyExitWrapper(backbone(), {"a": nn.Identity()}, nn.Identity(), config)
    heads = {"a": nn.Identity(), "b": nn.Identity()}
    with pytest.raises(ValueError, match="feature_adapters"):
        ours.EarlyExitWrapper(backbone(), heads, nn.Identity(), config, feature_adapters={"c": abs})
    with pytest.raises(ValueError, match="pool_tokens"):
        ours.EarlyExitHead(3, 5, pool_tokens="max")
    with pytest.raises(ValueError, match="2, 3 or 4 dimensions"):
        ours.EarlyExitHead(3, 5)(torch.randn(3))
    with pytest.raises(ValueError, match="2 weights, as many as predictions"):
        ours.weighted_multi_exit_loss([torch.zeros(1, 2)] * 2, torch.zeros(1, dtype=torch.int64), [1.0])
