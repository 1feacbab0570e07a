"""Whole models with early exits: a staged CNN, the earlyon package's wrapper, and a spiking network over time, on real
images. Weights are random; where rows leave is set by thresholds, as only the number of rows counts in the times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from measure import DEVICE
from paired import Paired
from torch import Tensor, nn

from fastcifar.compat import earlyon as ours
from fastcifar.data import cifar10, normalize
from fastcifar.earlyexit import EarlyExit, MeasuredCost, count_flops, find_thresholds
from fastcifar.spiking import QCFS, DynamicConfidence, convert

NOBODY = 2.0  # a confidence that no row has
NOBODY_TARGET = 1.03  # of the full model's time
IDEAL_TARGET = 1.10  # of the full model's time in proportion to the operations of those that stay
ALONE = "the rows that stay, chosen beforehand"
PEER_TARGET = 0.5
WIDTHS = (32, 64, 128, 256)
# The official log's survivors after some steps (Dynamic Confidence, ResNet-18 on CIFAR-10): 11.5 of 27 in the mean.
SURVIVORS = {0: 1.0, 6: 1.0, 8: 0.96, 10: 0.39, 15: 0.11, 20: 0.057, 26: 0.034, 27: 0.0}


def images(count: int) -> Tensor:
    return normalize(cifar10(split="test")[0][:count]).to(DEVICE)


def block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for k in range(2):
        layers += [nn.Conv2d(outputs if k else inputs, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def staged(widths: Sequence[int] = WIDTHS) -> tuple[list[nn.Module], list[nn.Module]]:
    """Four stages, each on half as many rows and columns and with twice the channels, and a linear head each."""
    torch.manual_seed(0)
    stages, inputs = [], 3
    for k, width in enumerate(widths):
        pool = [nn.MaxPool2d(2)] if k else []
        stages.append(nn.Sequential(*pool, block(inputs, width)))
        inputs = width
    return stages, [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 10)) for w in widths]


def half_leave(confidences: Tensor) -> list[float]:
    """Thresholds at which half of the rows leave at every exit, each halfway between two rows: they leave there in any
    order of summation."""
    exits = len(confidences)
    thresholds = find_thresholds(confidences, [0.5**k for k in range(1, exits)] + [0.5 ** (exits - 1)])[:-1]
    below = [row[row < t].max() for row, t in zip(confidences, thresholds, strict=False)]
    return ((thresholds + torch.stack(below)) / 2).tolist()


def per_sample(model: EarlyExit, x: Tensor) -> Tensor:
    """The Shallow-Deep Networks' loop: one row after the other."""
    outputs = []
    for row in x.split(1):
        for k, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
            row = stage(row)
            logits = head(row)
            if k < len(model.stages) - 1 and logits.softmax(1).max().item() >= model.thresholds[k]:
                break
        outputs.append(logits)
    return torch.cat(outputs)


def eager(model: EarlyExit, x: Tensor) -> Tensor:
    """Compaction as one would write it: boolean masks."""
    out, rows = x.new_empty(len(x), 10), torch.arange(len(x), device=x.device)
    for k, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
        x = stage(x)
        logits = head(x)
        if k == len(model.stages) - 1:
            out[rows] = logits
            break
        leaves = logits.softmax(1).max(1).values >= model.thresholds[k]
        out[rows[leaves]] = logits[leaves]
        x, rows = x[~leaves], rows[~leaves]
        if not len(rows):
            break
    return out


def check(name: str, result: Tensor, expected: Tensor) -> None:
    difference = (result - expected).abs().max().item() / expected.abs().max().item()
    if not difference <= 1e-4:  # another number of rows is summed in another order
        pytest.fail(f"{name}: the logits differ by {difference:.1e} of their magnitude")


@pytest.mark.parametrize("leaving", ["nobody", "half"])
@torch.no_grad()
def test_staged_model(paired: Paired, leaving: str) -> None:
    batch, x = 64, images(64)
    model = EarlyExit(*staged(), thresholds=NOBODY).train().to(DEVICE)
    for _ in range(5):  # running statistics
        model(x)
    model.eval()
    if leaving == "half":
        model.mode = "simulate"
        model.thresholds = half_leave(model(x).confidences)
        model.mode = "compact"
    measured = EarlyExit(model.stages, model.heads, thresholds=model.thresholds, mode="compact").eval()
    measured.cost = MeasuredCost.measure(model, x, repeats=3)
    masked = EarlyExit(model.stages, model.heads, thresholds=model.thresholds, mode="masked").eval()

    exit_taken = model(x).exit_taken
    flops = count_flops(model, x)
    ideal = sum(flops.up_to(k) for k in exit_taken.tolist()) / (batch * flops.full)
    paired.describe(
        "earlyexit",
        op="staged CNN",
        workload=f"[{batch},3,32,32], 4 stages, {leaving} leave{'s' if leaving == 'nobody' else ''} at each",
        mode="call",
    )

    def full() -> Tensor:
        y = x
        for stage in model.stages:
            y = stage(y)
        return model.heads[-1](y)

    # What the stages cost on the rows that reach them, nothing else: a stage on large images takes longer than its
    # operations say, so this bound is above the one by operations.
    states = [x]
    for k, stage in enumerate(model.stages[:-1]):
        y = stage(states[-1])
        states.append(y[exit_taken[exit_taken >= k] > k])

    def alone() -> None:
        for stage, head, state in zip(model.stages, model.heads, states, strict=True):
            head(stage(state))

    calls: dict[str, Callable[[], Tensor | None]] = {
        "full model": full,
        ALONE: alone,
        "all exits, then select": lambda: masked(x).logits,
        "row by row": lambda: per_sample(model, x),
        "boolean masks": lambda: eager(model, x),
        "fastcifar": lambda: model(x).logits,
        "fastcifar, measured cost": lambda: measured(x).logits,
    }
    if leaving == "nobody":
        del calls["row by row"]
    expected = masked(x).logits
    for name, call in calls.items():
        is_ours = name.startswith("fastcifar")
        role = "ours" if is_ours else "reference" if name == "full model" else "peer"
        target = (NOBODY_TARGET if leaving == "nobody" else IDEAL_TARGET * ideal) if is_ours else None
        note = "without exits" if name == "full model" else f"by operations: {ideal:.3f}" if is_ours else ""
        paired.record(name, role=role, target=target, note=note)
        if name not in ("full model", ALONE):
            check(name, call(), expected)
    with torch.inference_mode():
        paired.time(calls)


@pytest.mark.parametrize("widths", [(8, 16, 32, 64), WIDTHS], ids=["narrow", "wide"])
@torch.no_grad()
def test_earlyon(paired: Paired, widths: Sequence[int]) -> None:
    peer = pytest.importorskip("earlyon")
    batch, x = 64, images(64)
    stages, _ = staged(widths)
    points = [("a", "0", widths[0]), ("b", "1", widths[1]), ("c", "2", widths[2])]
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[3], 10))
    backbone = nn.Sequential(*stages, tail)

    def wrap(library) -> nn.Module:
        torch.manual_seed(1)
        config = library.EarlyExitConfig("staged", 10, [library.ExitPoint(*point) for point in points])
        heads = {name: library.EarlyExitHead(width, 10) for name, _, width in points}
        return library.EarlyExitWrapper(backbone, heads, nn.Identity(), config, input_shape=(1, 3, 32, 32))

    model = wrap(ours).to(DEVICE)
    for _ in range(5):
        model(x, mode="training")
    model.eval()
    outputs = model(x, mode="training")
    confidences = torch.stack([logits.softmax(1).amax(1) for logits in outputs])
    model.config.confidence_thresholds = half_leave(confidences)
    calls: dict[str, Callable[[], Tensor]] = {"fastcifar.compat": lambda: model(x).predictions}
    paired.describe(
        "earlyexit",
        op="earlyon wrapper",
        workload=f"[{batch},3,32,32], {widths[0]} to {widths[-1]} channels, half leave at each",
        mode="call",
    )
    theirs = wrap(peer).to(DEVICE).eval()
    theirs.load_state_dict(model.state_dict())
    theirs.config.confidence_thresholds = model.config.confidence_thresholds
    calls["earlyon, row by row"] = lambda: torch.cat([theirs(row).prediction for row in x.split(1)])
    calls["earlyon, all or none"] = lambda: theirs.forward_inference_batched(x).predictions
    expected = calls["earlyon, row by row"]()
    check("fastcifar.compat", calls["fastcifar.compat"](), expected)
    paired.record("earlyon, row by row", role="reference")
    paired.record("earlyon, all or none", role="peer", note="nobody leaves before all can: other answers")
    paired.record("fastcifar.compat", role="ours", target=PEER_TARGET)
    paired.time(calls)


class Scheduled(nn.Module):
    """A spiking network, and outputs that become sure at the step which a sample's fourth channel says."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        for neuron in self.network._neurons():
            neuron.start(1, len(x))
        output = self.network.net(x[:, :3])
        rate = 2.62 * 30 / (x[:, 3, 0, 0] - 0.5)  # softmax of (2.62, 0, ... 0) over 10 classes is just above 0.6
        return output * 0 + torch.nn.functional.pad(rate[:, None], (0, 9))


def exit_steps(count: int) -> Tensor:
    """Quantiles of the official histogram, in an order drawn anew."""
    share = (torch.arange(count) + 0.5) / count
    steps = torch.tensor(list(SURVIVORS), dtype=torch.float32)
    left = 1 - torch.tensor(list(SURVIVORS.values()))
    upper = torch.searchsorted(left, share).clamp(1, len(steps) - 1)
    part = (share - left[upper - 1]) / (left[upper] - left[upper - 1])
    values = (steps[upper - 1] + part * (steps[upper] - steps[upper - 1])).ceil().clamp(1, 27)
    return values[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def test_dynamic_confidence(paired: Paired) -> None:
    batch, steps = 256, 27
    torch.manual_seed(0)
    layers, channels = [], 3
    for width in (16, 32, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), QCFS(4, 2.0)]
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), QCFS(4, 2.0)]
        layers += [nn.AvgPool2d(2)]
        channels = width
    ann = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10)).to(DEVICE)
    x = images(batch)
    ann(x)
    network = convert(ann.eval())
    at = exit_steps(batch).to(DEVICE)
    x = torch.cat([x, at.view(-1, 1, 1, 1).expand(-1, 1, 32, 32)], 1)
    dynamic = DynamicConfidence(Scheduled(network), steps, threshold=0.6)
    fixed = DynamicConfidence(Scheduled(network), steps, threshold=NOBODY)
    result = dynamic(x)
    if not result.exit_step.equal(at.long()):
        pytest.fail("the samples do not leave at the steps of the schedule")
    paired.describe(
        "earlyexit",
        op="Dynamic Confidence",
        workload=f"[{batch},3,32,32], {steps} steps, {at.mean():.1f} in the mean",
        mode="call",
    )
    paired.record(f"{steps} steps", role="reference", note="of a converted network of six convolutions")
    paired.record(f"{steps} steps, 9 at once", role="peer", note="SpikingNetwork: its first layer runs once a chunk")
    paired.record("fastcifar", role="ours", target=PEER_TARGET, note="steps of exit as in the official log")
    paired.time(
        {
            f"{steps} steps": lambda: fixed(x),
            f"{steps} steps, 9 at once": lambda: network(x[:, :3], steps, chunk=9),
            "fastcifar": lambda: dynamic(x),
        }
    )
