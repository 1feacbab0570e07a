#!/usr/bin/env python3
"""Train an ordinary CNN on CIFAR-10, convert it into a spiking one, and see how its accuracy grows with time.

    python examples/ann_to_snn.py --quick     # the bundled sample, a minute on two cores
    python examples/ann_to_snn.py             # the full set: `make data DATA=folder` first, or --data folder

A small VGG (six convolutions with batch norm, average pooling, a linear readout) is trained with
``fastcifar.spiking.QCFS`` in place of ReLU: an activation that rounds to one of L = 8 levels up to a learnt threshold.
``fastcifar.spiking.convert`` folds the batch norms into the convolutions and replaces each activation by
integrate-and-fire neurons with that threshold. The spiking network sees the image at each of T steps; the mean of its
readout gives the logits. Nothing is trained again.

What to expect. The first layer sees a constant, and at T = L its neurons have fired as often as the activation counts,
for every input: checked here. Deeper layers see spikes, which come unevenly, so a neuron may fire one spike more or
less than it should, and the accuracy at T = L is a few points below the ordinary network's. More steps average that
out; then neurons tend to the activation without its rounding, which the network was not trained with but tolerates. At
T = 1 and 2 there are too few spikes to tell much. Measured after one epoch of 50,000 images that had once been JPEGs,
on 1,000 others: 69.7 % ordinary; 18.8, 48.2, 61.9, 66.7, 69.5 and 69.1 % spiking, for T = 1, 2, 4, 8, 16 and 32.

Accuracy over T is printed and saved to examples/output/ann_to_snn.png. Exit status 1 means that the first layer's
counts differ, or that at T = 32 more accuracy is lost than 5 points and twice the standard error that so few test
images leave.
"""

import argparse
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a busy machine many times slower

import torch
from matplotlib.figure import Figure  # not pyplot: this draws to a file, with no display (Agg)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from spiking_cifar10 import conv, load, train_step
from torch import Tensor, nn

from fastcifar.data import normalize
from fastcifar.spiking.conversion import SpikingNetwork, convert
from fastcifar.spiking.quantize import QCFS, qcfs

LEVELS = 8
STEPS = 32
SHOWN = (1, 2, 4, 8, 16, 32)
TOLERANCE = 0.05  # of accuracy, at T = STEPS; beyond twice its standard error
OUTPUT = Path(__file__).parent / "output" / "ann_to_snn.png"


def vgg(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for block in (width, 2 * width, 4 * width):
        for _ in range(2):
            # Currents leave a batch norm with a spread of 1: thresholds that start at 4 clip next to nothing.
            layers += [conv(channels, block), nn.BatchNorm2d(block), QCFS(LEVELS, init_threshold=4.0)]
            channels = block
        layers.append(nn.AvgPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 4 * 4, 10))


def train(ann: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace, progress: Progress) -> None:
    device = next(ann.parameters()).device
    per_epoch = len(images) // args.batch_size
    steps = args.epochs * per_epoch
    sgd = torch.optim.SGD(ann.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, args.lr, total_steps=steps)
    task = progress.add_task("training", total=steps)
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(args.epochs):
        for batch in torch.randperm(len(images), generator=shuffle).split(args.batch_size)[:per_epoch]:
            x = normalize(images[batch].to(device))
            mirrored = torch.rand(len(x), 1, 1, 1, generator=shuffle).to(device) < 0.5
            loss, _ = train_step(ann, sgd, schedule, torch.where(mirrored, x.flip(3), x), labels[batch].to(device))
            progress.update(task, advance=1, description=f"training, loss {loss:.3f}")


@torch.no_grad()
def accuracies(ann: nn.Module, snn: nn.Module, images: Tensor, labels: Tensor, progress: Progress):
    """The ordinary network's accuracy, and the spiking one's after 1 .. STEPS steps ``[STEPS]``."""
    device = next(ann.parameters()).device
    ann.eval()
    hits, spiking_hits = 0, torch.zeros(STEPS)
    task = progress.add_task("converted network", total=len(images))
    for x, y in zip(images.split(50), labels.split(50), strict=True):
        x, y = normalize(x.to(device)), y.to(device)
        hits += (ann(x).argmax(1) == y).sum().item()
        spiking_hits += (snn(x, STEPS, every_step=True).argmax(2) == y).sum(1).cpu()
        progress.update(task, advance=len(x))
    return hits / len(labels), spiking_hits / len(labels)


@torch.no_grad()
def miscounts(ann: nn.Sequential, snn: SpikingNetwork, images: Tensor) -> int:
    """How many neurons of the first layer did not fire as often in LEVELS steps as the activation counts."""
    seen = []
    handle = snn.net[2].register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    snn(images, LEVELS)
    handle.remove()
    (currents, spikes), threshold = seen[0], ann[2].threshold
    fired = spikes.unflatten(0, (LEVELS, -1)).count_nonzero(0)
    counted = qcfs(currents, threshold, LEVELS) / threshold * LEVELS
    return (fired != counted.round()).sum().item()


def plot(ann: float, snn: Tensor) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, STEPS + 1), 100 * snn, marker=".", label="spiking")
    axes.axhline(100 * ann, color="black", linestyle="--", label="ordinary")
    axes.axvline(LEVELS, color="gray", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SHOWN, [f"{t} = L" if t == LEVELS else str(t) for t in SHOWN])
    axes.set(xlabel="time steps T", ylabel="test accuracy in %", title="A CNN on CIFAR-10, converted to spikes")
    axes.legend()
    OUTPUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUTPUT, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="800 images of the bundled sample, and 200 to test")
    parser.add_argument("--data", help="folder of the full set (default: FASTCIFAR_DATA, else .data)")
    parser.add_argument("--epochs", type=int, help="default: 8; 20 with --quick")
    parser.add_argument("--batch-size", type=int, help="default: 128; 50 with --quick")
    parser.add_argument("--lr", type=float, default=0.1, help="the peak of a one-cycle schedule (default: 0.1)")
    parser.add_argument("--test-images", type=int, default=2000, help="how many to compare on (default: 2000)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.epochs = args.epochs or (20 if args.quick else 8)
    args.batch_size = args.batch_size or (50 if args.quick else 128)
    try:
        train_images, train_labels, test_images, test_labels = load(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{error}. Or run --quick, which needs the bundled sample only.")
    test_images, test_labels = test_images[: args.test_images], test_labels[: args.test_images]

    torch.manual_seed(0)
    ann = vgg(16 if args.quick else 32).to(args.device)
    with Progress() as progress:
        train(ann, train_images, train_labels, args, progress)
        snn = convert(ann.eval(), chunk=LEVELS)  # steps in one pass, which bounds the memory
        accuracy, over_time = accuracies(ann, snn, test_images, test_labels, progress)
    wrong = miscounts(ann, snn, normalize(test_images[:50].to(args.device)))

    table = Table("", *[f"T = {t}" for t in SHOWN])
    table.add_row("spiking", *[f"{over_time[t - 1]:.1%}" for t in SHOWN])
    table.add_row("ordinary", *[f"{accuracy:.1%}"] * len(SHOWN))
    Console().print(table)
    print(f"neurons of the first layer whose count at T = L = {LEVELS} is not the activation's: {wrong}")
    plot(accuracy, over_time)
    print(f"accuracy over time: {OUTPUT}")
    if wrong:
        sys.exit(f"The conversion is not exact: {wrong} neurons of the first layer miscount.")
    lost = TOLERANCE + 2 * math.sqrt(accuracy * (1 - accuracy) / len(test_labels))
    if not over_time[-1] >= accuracy - lost:
        sys.exit(
            f"The conversion lost too much: {over_time[-1]:.1%} at T = {STEPS}, more than {lost:.1%} below "
            f"{accuracy:.1%}."
        )


if __name__ == "__main__":
    main()
