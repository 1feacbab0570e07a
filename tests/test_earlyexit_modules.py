"""EarlyExit beside loops over single samples, its modes beside each other, and its cost models."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcifar.earlyexit import CostModel, EarlyExit, JointExitLoss, MeasuredCost, count_flops, find_thresholds

ALWAYS, NEVER = CostModel(math.inf), CostModel(0.0)


class Tree(nn.Module):
    """A stage whose state is a tree: what it computes, a skip stack, and no tensor at all."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, state):
        if isinstance(state, torch.Tensor):
            state = {"x": state, "skips": [], "depth": 0}
        x = torch.tanh(self.linear(state["x"])) * 2
        return {"x": x, "skips": [*state["skips"], state["x"]], "depth": state["depth"] + 1}


class TreeHead(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, state):
        return self.linear(state["x"] + sum(state["skips"]))


def conv_model(exits=4, classes=5, **options):
    """Stages of convolution and batch norm in float64, where the size of a batch does not show in the results."""
    torch.manual_seed(0)
    widths = [3, 8, 8, 12, 12, 16, 16][: exits + 1]
    stages = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.Dropout(0.5), nn.ReLU())
        for a, b in itertools.pairwise(widths)
    ]
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(b, classes)) for b in widths[1:]]
    model = EarlyExit(stages, heads, **({"thresholds": 0.6} | options)).double()
    model(images(64))  # running statistics
    return spread(model.eval(), images(64))


def images(count=37, dtype=torch.float64):
    """Noise around a colour of each."""
    generator = torch.Generator().manual_seed(1)
    colour = torch.randn(count, 3, 1, 1, dtype=dtype, generator=generator)
    return 2 * colour + torch.randn(count, 3, 8, 8, dtype=dtype, generator=generator)


@torch.no_grad()
def spread(model, x):
    """Logits of each head around 0 and some way apart, so that samples leave everywhere."""
    for stage, head in zip(model.stages, model.heads, strict=True):
        x = stage(x)
        logits, linear = head(x), list(head.modules())[-1]
        scale = 1.5 / (logits - logits.mean(0)).std()
        linear.bias.copy_((linear.bias - logits.mean(0)) * scale)
        linear.weight.mul_(scale)
    return model


def tree_model(**options):
    torch.manual_seed(3)
    heads = [TreeHead(6, 4) for _ in range(4)]
    model = EarlyExit([Tree(6) for _ in range(4)], heads, **({"thresholds": 0.6} | options)).double().eval()
    return spread(model, vectors())


def vectors(count=64):
    return torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def shallow_deep_loop(model, x, threshold):
    """The Shallow-Deep Networks' way, a sample alone: the first output that is sure enough, else the surest of all."""
    outputs, confidences = [], []
    for stage, head in zip(model.stages, model.heads, strict=True):
        x = stage(x)
        outputs.append(head(x))
        confidences.append(F.softmax(outputs[-1][0], dim=0).max().item())
        if len(outputs) < len(model.stages) and confidences[-1] >= threshold:
            return outputs[-1][0], len(outputs) - 1
    surest = max(range(len(outputs)), key=lambda k: confidences[k])
    return outputs[surest][0], surest


def patience_loop(model, x, patience):
    """PABEE's way, a sample alone."""
    named, streak = None, 0
    for k, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
        x = stage(x)
        logits = head(x)
        label = logits[0].argmax().item()
        streak = streak + 1 if label == named else 0
        named = label
        if streak >= patience:
            return logits[0], k
    return logits[0], len(model.stages) - 1


@torch.no_grad()
@pytest.mark.parametrize("mode", ["compact", "masked", "simulate"])
@pytest.mark.parametrize("cost", [ALWAYS, NEVER, CostModel()], ids=["move", "carry", "rule"])
@pytest.mark.parametrize("threshold", [0.4, 0.6, 0.9, 0.999999])
def test_equals_the_shallow_deep_loop_sample_by_sample(mode, cost, threshold):
    model = conv_model(mode=mode, cost=cost, thresholds=threshold, fallback="most_confident")
    x = images()
    logits, exit_taken, confidence, _ = model(x)
    expected = [shallow_deep_loop(model, sample[None], threshold) for sample in x]
    assert exit_taken.tolist() == [k for _, k in expected]
    right = torch.stack([output for output, _ in expected])
    torch.testing.assert_close(logits, right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(confidence, right.softmax(1).amax(1).float())
    if threshold == 0.6:
        assert len(exit_taken.unique()) == 4  # or nothing is tested here


@torch.no_grad()
@pytest.mark.parametrize("mode", ["compact", "masked", "simulate"])
@pytest.mark.parametrize("patience", [1, 2, 9])
def test_equals_the_patience_loop_sample_by_sample(mode, patience):
    options = {"criterion": "patience", "thresholds": None, "patience": patience}
    model = conv_model(exits=6, classes=2, mode=mode, cost=ALWAYS, **options)
    x = images()
    logits, exit_taken, _, _ = model(x)
    expected = [patience_loop(model, sample[None], patience) for sample in x]
    assert exit_taken.tolist() == [k for _, k in expected]
    torch.testing.assert_close(logits, torch.stack([output for output, _ in expected]), rtol=1e-12, atol=1e-12)
    if patience < 9:
        assert len(exit_taken.unique()) > 2


@torch.no_grad()
@pytest.mark.parametrize("make", [conv_model, tree_model])
@pytest.mark.parametrize("fallback", ["last", "most_confident"])
@pytest.mark.parametrize("criterion", ["confidence", "entropy", "margin", "energy"])
def test_modes_give_the_same_answer(make, fallback, criterion):
    x = images() if make is conv_model else vectors()
    options = {"criterion": criterion, "fallback": fallback, "thresholds": 0.0}
    scores = make(mode="simulate", **options)(x).confidences.sort(1).values
    middle = scores.shape[1] // 2
    options["thresholds"] = (scores[:, middle] + scores[:, middle + 1]) / 2  # half leave, and none is near
    results = [
        make(mode=mode, cost=cost, **options)(x)
        for mode, cost in [("simulate", None), ("masked", None), ("compact", ALWAYS), ("compact", NEVER)]
    ]
    assert len(results[0].exit_taken.unique()) > 2
    for result in results[1:]:
        assert result.exit_taken.equal(results[0].exit_taken)
        torch.testing.assert_close(result.logits, results[0].logits, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.confidence, results[0].confidence)
        assert result.confidences is None
    taken = results[0].confidences.gather(0, results[0].exit_taken[None])[0]
    assert taken.equal(results[0].confidence)


@torch.no_grad()
def test_compaction_drops_rows():
    model = conv_model(cost=ALWAYS)
    seen = []
    for stage in model.stages:
        stage.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    exit_taken = model(images()).exit_taken
    survivors = [37, *(int((exit_taken > k).sum()) for k in range(3))]
    assert seen == [n for n in survivors if n]
    assert seen[-1] < 37
    seen.clear()
    model.cost = NEVER
    model(images())
    assert seen == [37] * 4


@torch.no_grad()
def test_stops_when_all_have_left():
    model = conv_model(thresholds=0.0)
    later = []
    model.stages[1].register_forward_hook(lambda *arguments: later.append(1))
    result = model(images())
    assert result.exit_taken.tolist() == [0] * 37
    assert not later
    empty = model(images(0))
    assert empty.logits.shape == (0, 5)
    assert empty.exit_taken.shape == empty.confidence.shape == (0,)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["compact", "masked"])
def test_ties_strictness_and_exits_that_are_off(mode):
    rows = torch.tensor([[50.0, -50.0], [0.0, 0.0]], dtype=torch.float64)
    options = {"mode": mode, "thresholds": 0.5}
    heads = [nn.Identity() for _ in range(3)]
    stages = [nn.Identity() for _ in range(3)]
    assert EarlyExit(stages, heads, **options).eval()(rows).exit_taken.tolist() == [0, 0]
    assert EarlyExit(stages, heads, strict=True, **options).eval()(rows).exit_taken.tolist() == [0, 2]
    saturated = EarlyExit(stages, heads, mode=mode, thresholds=1.0).eval()
    assert saturated(rows).exit_taken.tolist() == [0, 2]  # a confidence of exactly 1 reaches 1
    off = EarlyExit(stages, heads, mode=mode, thresholds=[None, 0.5]).eval()
    assert off(rows).exit_taken.tolist() == [1, 1]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["compact", "masked", "simulate"])
@pytest.mark.parametrize("fallback", ["last", "most_confident"])
@pytest.mark.parametrize("criterion", ["confidence", "patience"])
def test_nan_never_leaves_and_is_never_the_surest(mode, fallback, criterion):
    class Broken(nn.Module):
        """Spoils one value at one stage."""

        def forward(self, x):
            x = x.clone()
            x[1] = math.nan
            return x

    class Mended(nn.Module):
        def forward(self, x):
            return x.nan_to_num(0.1)

    options = {"thresholds": 0.99} if criterion == "confidence" else {"patience": 1}
    model = EarlyExit(
        [Broken(), nn.Identity(), Mended()],
        [nn.Identity()] * 3,
        criterion=criterion,
        mode=mode,
        fallback=fallback,
        **options,
    ).eval()
    x = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.3, 0.0]])
    result = model(x)
    assert result.exit_taken[1] == 2
    assert result.logits[1].isfinite().all()
    if criterion == "confidence":
        assert result.exit_taken.tolist() == [0, 2, 0 if fallback == "most_confident" else 2]


def test_training_returns_the_logits_of_all_heads():
    model = conv_model().train()
    x = images()
    outputs = model(x)
    state = x
    torch.manual_seed(0)
    outputs = model(x)
    torch.manual_seed(0)
    for stage, head, output in zip(model.stages, model.heads, outputs, strict=True):
        state = stage(state)
        assert output.equal(head(state))
    JointExitLoss()(outputs, torch.zeros(37, dtype=torch.int64)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_gradients_of_compacted_and_masked_evaluation_agree():
    gradients = []
    for mode in ("compact", "masked"):
        model = conv_model(mode=mode, cost=ALWAYS)
        x = images().requires_grad_()
        model(x).logits.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_memory_format_survives_compaction():
    model = conv_model(cost=ALWAYS).to(memory_format=torch.channels_last)
    formats = []
    for stage in model.stages:
        stage.register_forward_pre_hook(
            lambda module, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
    model(images().to(memory_format=torch.channels_last))
    assert len(formats) > 2
    assert all(formats)


@torch.no_grad()
@pytest.mark.parametrize("criterion", ["confidence", "patience"])
def test_masked_compiles_whole(criterion):
    options = {"thresholds": 0.6} if criterion == "confidence" else {"thresholds": None, "patience": 1}
    model = conv_model(mode="masked", criterion=criterion, fallback="most_confident", **options)
    expected = model(images())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images())
    assert compiled.exit_taken.equal(expected.exit_taken)
    torch.testing.assert_close(compiled.logits, expected.logits)


@torch.no_grad()
def test_dropout_is_inert_and_batch_statistics_are_refused():
    model = conv_model()
    assert model(images()).logits.equal(model(images()).logits)
    model.stages[1][1].train()
    with pytest.raises(ValueError, match=r"running statistics.*BatchNorm2d stages\.1\.1 with batch statistics"):
        model(images())
    model.mode = "masked"
    model(images())
    bare = EarlyExit([nn.BatchNorm1d(4, track_running_stats=False)], [nn.Identity()]).eval()
    with pytest.raises(ValueError, match="batch statistics"):
        bare(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"thresholds": math.inf}, ValueError, "finite thresholds"),
        ({"thresholds": [0.5, math.nan]}, ValueError, "finite thresholds"),
        ({"thresholds": [0.5]}, ValueError, "each of 2 exits before the last head, got 1"),
        ({"thresholds": [0.5] * 4}, ValueError, "each of 2 exits before the last head, got 4"),
        ({"thresholds": ["x", 0.5]}, TypeError, "numbers, got str"),
        ({"thresholds": [True, 0.5]}, TypeError, "numbers, got bool"),
        ({}, ValueError, "thresholds for 2 exits, got None"),
        ({"thresholds": 0.5, "criterion": "luck"}, ValueError, "criterion to be one of confidence, .*'luck'"),
        ({"thresholds": 0.5, "mode": "fast"}, ValueError, "mode to be one of"),
        ({"thresholds": 0.5, "fallback": "first"}, ValueError, "fallback to be one of"),
        ({"thresholds": 0.5, "patience": 2}, ValueError, "patience with criterion 'patience' and only there"),
        ({"criterion": "patience"}, ValueError, "patience with criterion 'patience'"),
        ({"criterion": "patience", "patience": 0}, ValueError, "patience to be an integer above 0"),
        ({"criterion": "patience", "patience": 1, "thresholds": 0.5}, ValueError, "no thresholds"),
        ({"thresholds": 0.5, "temperature": 0.0}, ValueError, "positive temperature"),
        ({"thresholds": 0.5, "temperature": [1.0, 2.0]}, ValueError, "one for each of 3 heads"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        EarlyExit([nn.Identity()] * 3, [nn.Identity()] * 3, **options)


def test_bad_structure():
    with pytest.raises(ValueError, match="2 stages and 1 heads"):
        EarlyExit([nn.Identity()] * 2, [nn.Identity()], thresholds=0.5)
    with pytest.raises(ValueError, match="at least one stage"):
        EarlyExit([], [])


@torch.no_grad()
def test_thresholds_of_the_budgeted_search():
    model = conv_model(mode="simulate")
    confidence = model(images(200)).confidences
    model.thresholds = find_thresholds(confidence, [0.4, 0.3, 0.2, 0.1])
    model.mode = "compact"
    shares = model(images(200)).exit_taken.bincount(minlength=4)
    assert shares.tolist() == [80, 60, 40, 20]


def test_state_dict_and_copy():
    model = conv_model()
    assert {key.split(".")[0] for key in model.state_dict()} == {"stages", "heads"}
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert twin.thresholds == model.thresholds
    assert twin(images()).logits.equal(model(images()).logits)


def test_rule_of_thumb():
    rule = CostModel(16)
    assert [rule.pays(0, 34, keep) for keep in (34, 33, 32, 31, 1)] == [False, False, False, True, True]
    with pytest.raises(ValueError, match="passes of 0 or more"):
        CostModel(-1.0)


def test_measured_cost_interpolates():
    cost = MeasuredCost([1, 2, 4], [[9, 9, 9], [1.0, 2.0, 4.0]], [[0.5, 0.5, 1.5]])
    assert cost.pays(0, 4, 3) is False  # saves 1, costs 1
    assert cost.pays(0, 4, 2) is True
    assert cost.pays(0, 8, 4) is True
    assert cost.pays(0, 1, 1) is False
    with pytest.raises(ValueError, match="ascending sizes"):
        MeasuredCost([2, 1], [[1, 1]], [])
    with pytest.raises(ValueError, match="expected 1 times of each of 2 stages"):
        MeasuredCost([1], [[1], [1]], [])


def test_measure_times_this_model():
    model = conv_model()
    cost = MeasuredCost.measure(model, images(), repeats=1)
    assert cost.sizes == [1, 2, 4, 9, 18, 37]
    assert (len(cost.stages), len(cost.moves)) == (4, 3)
    assert all(seconds > 0 for times in cost.stages + cost.moves for seconds in times)
    model.cost = cost
    model(images())
    with pytest.raises(ValueError, match="in evaluation"):
        MeasuredCost.measure(model.train(), images())


def test_flops_of_rows():
    model = EarlyExit([nn.Linear(8, 6), nn.Linear(6, 6)], [nn.Linear(6, 3), nn.Linear(6, 3)], thresholds=0.5)
    flops = count_flops(model, torch.randn(5, 8))
    assert flops.stages == [96.0, 72.0]
    assert flops.up_to(0) == 96 + 36
    assert flops.full == 96 + 72 + 36
    with pytest.raises(ValueError, match="count_flops: expected an example"):
        count_flops(model, torch.randn(0, 8))
