"""Exit decisions, the moving of rows and the threshold searches, on logits of real CIFAR-10 images."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, synchronize
from paired import Paired
from torch import Tensor

from fastcifar import _library
from fastcifar.data import cifar10, normalize
from fastcifar.earlyexit import compact, exit_decide, exit_shares, find_thresholds

KERNEL = _library.owned("exit_decide", DEVICE.type)
MISSING = "" if KERNEL else "no kernel serves this device, so this is the reference"
# At most this many times the time of eager PyTorch, by (rows, classes).
TARGETS = {(4096, 10): 1 / 8, (4096, 100): 1 / 10, (4096, 1000): 1 / 5}
Decision = Callable[[Tensor, float], tuple[Tensor, ...]]


def logits_of_images(rows: int, classes: int, seed: int = 0) -> Tensor:
    """Logits ``[rows, classes]`` of a random network on real images, as far apart as a trained one's."""
    images = normalize(cifar10(split="test")[0])
    generator = torch.Generator().manual_seed(seed)
    features = F.conv2d(images, torch.randn(32, 3, 5, 5, generator=generator), stride=4).relu().flatten(1)
    features = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    weight = torch.randn(features.shape[1], classes, generator=generator)
    logits = features @ weight * (3 / math.sqrt(features.shape[1]))
    return logits.repeat(-(-rows // len(logits)), 1)[:rows].contiguous()


def lists(score: Tensor, prediction: Tensor, exits: Tensor) -> tuple[Tensor, ...]:
    return score, prediction, exits.nonzero().squeeze(1), (~exits).nonzero().squeeze(1)


def confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    score, prediction = logits.softmax(1).max(1)
    return score, prediction


def entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1), logits.argmax(1)


def middle_of_a_gap(score: Tensor) -> float:
    """A threshold that half of the rows are below, and that no rounding reaches."""
    ordered = score.double().sort().values
    near = ordered[len(ordered) // 2 - 8 : len(ordered) // 2 + 8]
    at = int(near.diff().argmax())
    return float((near[at] + near[at + 1]) / 2)


def check(name: str, got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    difference = float((got[0] - expected[0]).abs().max() / expected[0].abs().max())
    if not difference <= 2e-6:
        pytest.fail(f"{name}: scores differ from the reference's by {difference:.2e} of their magnitude")
    for what, mine, theirs in zip(("predictions", "exits", "rows that stay"), got[1:], expected[1:], strict=True):
        if not torch.equal(mine, theirs):
            pytest.fail(f"{name}: the {what} differ from the reference's")


@pytest.mark.parametrize("criterion", ["confidence", "entropy"])
@pytest.mark.parametrize(("rows", "classes"), [(256, 10), *TARGETS])
def test_exit_decide(paired: Paired, rows: int, classes: int, criterion: str) -> None:
    logits = logits_of_images(rows, classes).to(DEVICE)
    scores = {"confidence": confidence, "entropy": entropy}[criterion]
    threshold = middle_of_a_gap(scores(logits)[0])
    torch.compiler.reset()
    fused = torch.compile(scores)

    def decide(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        score, prediction = function(logits)
        return lists(score, prediction, score >= threshold if criterion == "confidence" else score <= threshold)

    calls: dict[str, Callable[[], tuple]] = {
        "eager": lambda: decide(scores),
        "torch.compile": lambda: decide(fused),
        "fastcifar": lambda: exit_decide(logits, threshold, criterion, fixed_size=False),
    }
    paired.describe("earlyexit", op=f"exit_decide {criterion}", workload=f"[{rows},{classes}] float32", mode="call")
    expected = calls["eager"]()
    for name, call in calls.items():
        check(name, call()[:4], expected)
        ours = name == "fastcifar"
        target = TARGETS.get((rows, classes)) if ours else None
        note = MISSING if ours else "its two lists of rows in eager PyTorch" if name == "torch.compile" else ""
        paired.record(
            name, role="ours" if ours else "reference" if name == "eager" else "compiled", target=target, note=note
        )
    paired.time(calls, repeats=max(1, 40960 // (rows * classes)) * 5)


@pytest.mark.parametrize("shape", [(256, 64, 16, 16), (4096, 256), (256, 10)], ids=str)
def test_compact(paired: Paired, shape: tuple[int, ...]) -> None:
    """Half of the rows of six tensors, as of a spiking network's membranes."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(shape, generator=generator).to(DEVICE) for _ in range(6)]
    mask = torch.rand(shape[0], generator=generator).to(DEVICE) < 0.5
    index = mask.nonzero().squeeze(1)
    calls: dict[str, Callable[[], list[Tensor]]] = {
        "x[mask]": lambda: [t[mask] for t in states],
        "index_select": lambda: [t.index_select(0, index) for t in states],
        "fastcifar": lambda: compact(states, index),
    }
    title = f"6 x {list(shape)} float32, half stay".replace(", ", ",", len(shape) - 1)
    paired.describe("earlyexit", op="compact", workload=title, mode="call")
    expected = calls["x[mask]"]()
    for name, call in calls.items():
        if not all(torch.equal(a, b) for a, b in zip(call(), expected, strict=True)):
            pytest.fail(f"{name}: the rows are not those of x[mask]")
        ours = name == "fastcifar"
        paired.record(name, role="ours" if ours else "reference" if name == "x[mask]" else "peer", target=None)
    paired.time(calls, repeats=3)


def budgeted_search(confidences: Tensor, p: Tensor) -> Tensor:
    """MSDNet's search as the official code walks it, sample by sample."""
    exits, samples = confidences.shape
    order = confidences.sort(dim=1, descending=True).indices
    filtered, thresholds = torch.zeros(samples), torch.full((exits,), 1e8)
    for k in range(exits - 1):
        wanted, count = math.floor(samples * p[k]), 0
        for i in range(samples):
            sample = order[k][i]
            if filtered[sample] == 0:
                count += 1
                if count == wanted:
                    thresholds[k] = confidences[k][sample]
                    break
        filtered.add_(confidences[k].ge(thresholds[k]).type_as(filtered))
    thresholds[exits - 1] = -1e8
    return thresholds


def test_find_thresholds(paired: Paired) -> None:
    """39 budgets of 50,000 samples and five exits. The loop runs once, for the middle budget, and its time counts 39
    times: the others walk as many samples, more or less."""
    exits, samples = 5, 50_000
    confidences = torch.stack([(1 + k) * logits_of_images(samples, 10, seed=k) for k in range(exits)])
    confidences = confidences.softmax(2).amax(2)
    shares = exit_shares(exits)
    begin = perf_counter()
    expected = budgeted_search(confidences, shares[19])
    loop = (perf_counter() - begin) * len(shares)
    if not torch.equal(find_thresholds(confidences)[19], expected):
        pytest.fail("fastcifar: the thresholds differ from the official search's")
    times = []
    for _ in range(7):
        begin = perf_counter()
        find_thresholds(confidences)
        synchronize()
        times.append(perf_counter() - begin)
    workload = f"39 budgets, {exits} exits, {samples} samples"
    paired.describe("earlyexit", op="find_thresholds", workload=workload, mode="call")
    paired.record("official loop", role="reference", target=None, note="one budget, 39 times")
    paired.record("fastcifar", role="ours", target=0.01)
    paired.keep({"official loop": [loop] * len(times), "fastcifar": times})
