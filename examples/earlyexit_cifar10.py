#!/usr/bin/env python3
"""Train a CNN with four exits on CIFAR-10, and let every image leave where the network is sure of it.

    python examples/earlyexit_cifar10.py --quick     # the bundled sample, a minute on two cores
    python examples/earlyexit_cifar10.py             # the full set: `make data DATA=folder` first, or --data folder

Four stages of two convolutions, each with a linear head; all heads are trained together by the schedule of the
Shallow-Deep Networks (``JointExitLoss``). A part of the training images is kept apart, on which
``find_thresholds`` chooses thresholds for several budgets, as MSDNet does. Then the test images run in batches of 250
through ``fastcifar.earlyexit.EarlyExit``, which drops the images that leave from the batch, and is timed.

Printed for each budget, and drawn into examples/output/earlyexit_cifar10.png: accuracy, mean exit, the operations that
an image takes, and the time, both relative to the network without early exits (all stages and the last head). For
comparison the same with mode "simulate", which computes everything, as public implementations do within a batch.

Exit status 1 means that the two modes disagree on an image whose confidence is not within rounding of a threshold, or
that letting half of the images leave at every exit does not save time.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a busy machine many times slower

import torch
from matplotlib.figure import Figure  # not pyplot: this draws to a file, with no display (Agg)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from spiking_cifar10 import load
from torch import Tensor, nn

from fastcifar.data import normalize
from fastcifar.earlyexit import EarlyExit, EarlyExitResult, JointExitLoss, count_flops, exit_shares, find_thresholds

BATCH = 250
BUDGETS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.5)  # q: exit k takes a share proportional to q^k
OUTPUT = Path(__file__).parent / "output" / "earlyexit_cifar10.png"


def network(width: int) -> EarlyExit:
    stages, heads, channels = [], [], 3
    for k in range(4):
        outputs = width * 2 ** min(k, 2)
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if k else []
        for _ in range(2):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            channels = outputs
        stages.append(nn.Sequential(*layers))
        heads.append(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * outputs, 10)))
    return EarlyExit(stages, heads, thresholds=0.9)


def train(model: EarlyExit, images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    loss_of = JointExitLoss("shallow_deep")
    per_epoch = len(images) // args.batch_size
    steps, done = args.epochs * per_epoch, 0
    sgd = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, args.lr, total_steps=steps)
    shuffle = torch.Generator().manual_seed(0)
    with Progress() as progress:
        task = progress.add_task("training", total=steps)
        for _ in range(args.epochs):
            for batch in torch.randperm(len(images), generator=shuffle).split(args.batch_size)[:per_epoch]:
                x = normalize(images[batch].to(args.device))
                mirrored = torch.rand(len(x), 1, 1, 1, generator=shuffle).to(args.device) < 0.5
                outputs = model(torch.where(mirrored, x.flip(3), x))
                loss = loss_of(outputs, labels[batch].to(args.device), progress=done / steps)
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                schedule.step()
                done += 1
                progress.update(task, advance=1, description=f"loss {loss.item():.3f}")


def synchronised() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def run(model: nn.Module, batches: list[Tensor]) -> tuple[EarlyExitResult, float]:
    """Results of all batches, and the least seconds of seven rounds: other programs only ever add to them."""
    seconds = []
    for _ in range(7):
        begin = synchronised()
        results = [model(x) for x in batches]
        seconds.append(synchronised() - begin)
    joined = EarlyExitResult(*(torch.cat(parts) for parts in list(zip(*results, strict=True))[:3]))
    return joined, min(seconds)


class Whole(nn.Module):
    """The network without its early exits, in the form of a result."""

    def __init__(self, model: EarlyExit) -> None:
        super().__init__()
        self.stages, self.head = model.stages, model.heads[-1]

    def forward(self, x: Tensor) -> EarlyExitResult:
        for stage in self.stages:
            x = stage(x)
        logits = self.head(x)
        last = torch.full((len(x),), len(self.stages) - 1, device=x.device)
        return EarlyExitResult(logits, last, logits.softmax(1).amax(1))


@torch.inference_mode()
def confidences_of(model: EarlyExit, images: Tensor, device: str) -> Tensor:
    model.mode = "simulate"
    confidences = [model(normalize(x.to(device))).confidences for x in images.split(BATCH)]
    model.mode = "compact"
    return torch.cat(confidences, 1)


def disagreement(model: EarlyExit, ours: EarlyExitResult, simulated: EarlyExitResult) -> int:
    """Images that leave elsewhere or are named otherwise, but for what rounding explains."""
    thresholds = torch.tensor(model.thresholds, device=ours.confidence.device)
    scores = torch.stack([ours.confidence, simulated.confidence])
    close = ((scores.unsqueeze(-1) - thresholds).abs() < 1e-4).any(-1).any(0)
    differs = (ours.exit_taken != simulated.exit_taken) | (ours.logits.argmax(1) != simulated.logits.argmax(1))
    return int((differs & ~close).sum())


def plot(rows: list[dict], whole: float) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, what in ((left, "time"), (right, "operations")):
        axes.plot([row[what] for row in rows], [row["accuracy"] for row in rows], "o-", label="rows that leave dropped")
        axes.plot(1, whole, "s", color="black", label="no early exits")
        axes.set(xlabel=f"{what} relative to the whole network")
    left.plot([row["simulated"] for row in rows], [row["accuracy"] for row in rows], "x--", label="all computed")
    left.set(ylabel="test accuracy", title="A CNN with four exits on CIFAR-10")
    left.legend()
    right.legend()
    OUTPUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUTPUT, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="800 images of the bundled sample, and 200 to test")
    parser.add_argument("--data", help="folder of the full set (default: FASTCIFAR_DATA, else .data)")
    parser.add_argument("--epochs", type=int, help="default: 20; 12 with --quick")
    parser.add_argument("--batch-size", type=int, help="default: 128; 50 with --quick")
    parser.add_argument("--lr", type=float, default=0.1, help="the peak of a one-cycle schedule (default: 0.1)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.epochs = args.epochs or (12 if args.quick else 20)
    args.batch_size = args.batch_size or (50 if args.quick else 128)
    try:
        images, labels, test_images, test_labels = load(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{error}. Or run --quick, which needs the bundled sample only.")
    held = len(images) // 5  # thresholds are chosen on what the network was not trained on

    torch.manual_seed(0)
    model = network(16 if args.quick else 32).to(args.device)
    train(model, images[held:], labels[held:], args)
    model.eval()
    confidences = confidences_of(model, images[:held], args.device)
    batches = [normalize(x.to(args.device)) for x in test_images.split(BATCH)]
    right = test_labels.to(args.device)
    flops = count_flops(model, batches[0])

    def accuracy(result: EarlyExitResult) -> float:
        return (result.logits.argmax(1) == right).double().mean().item()

    run(Whole(model), batches[:1])  # warms up
    whole, seconds = run(Whole(model), batches)
    table = Table("q", "accuracy", "mean exit", "operations", "time", "time, all computed")
    table.add_row("no exits", f"{accuracy(whole):.1%}", "4.00", "1.00", "1.00", "")
    rows, wrong = [], 0
    for q in BUDGETS:
        model.thresholds = find_thresholds(confidences, exit_shares(4, q))
        result, took = run(model, batches)
        model.mode = "simulate"
        simulated, all_took = run(model, batches)
        model.mode = "compact"
        wrong += disagreement(model, result, simulated)
        operations = sum(flops.up_to(k) for k in result.exit_taken.tolist()) / (len(right) * flops.full)
        exits = result.exit_taken.double().mean().item() + 1
        rows.append({"accuracy": accuracy(result), "operations": operations})
        rows[-1] |= {"time": took / seconds, "simulated": all_took / seconds}
        table.add_row(
            f"{q:g}",
            f"{rows[-1]['accuracy']:.1%}",
            f"{exits:.2f}",
            f"{operations:.2f}",
            f"{took / seconds:.2f}",
            f"{all_took / seconds:.2f}",
        )
    Console().print(table)
    plot(rows, accuracy(whole))
    print(f"accuracy over time: {OUTPUT}")
    if wrong:
        sys.exit(f"{wrong} images come out otherwise than in a batch of which nothing is dropped.")
    half = rows[BUDGETS.index(0.5)]
    if not half["time"] < 1:
        sys.exit(f"With half of the images leaving at every exit a batch took {half['time']:.2f} times as long.")


if __name__ == "__main__":
    main()
