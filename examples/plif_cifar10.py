#!/usr/bin/env python3
"""Train a spiking CNN on CIFAR-10 with learnt time constants (PLIF) and with fixed ones (LIF).

    python examples/plif_cifar10.py --quick     # the bundled sample, a minute on two cores
    python examples/plif_cifar10.py             # the full set: `make data DATA=folder` first, or --data folder

The network of spiking_cifar10.py twice, from the same weights and on the same batches: with ``fastcifar.spiking.LIF``,
whose time constant is tau = 2 steps, and with ``fastcifar.spiking.PLIF``, where each layer learns its own through
1 / tau = sigmoid(w), starting at the same 2. Until w has moved the two compute the same. A neuron with a larger tau
remembers longer and weighs the current input less; over T = 4 steps of the same image there is little to remember, and
the time constants fall. Measured once, after two epochs of 15,000 images that had been JPEGs, on 2,000 others: 52.2 %
with LIF, 56.1 % with PLIF, whose layers ended at 1.55, 1.43 and 1.35 steps. Losses, test accuracies and time constants
over training are printed and saved to examples/output/plif_cifar10.png.

Exit status 1 means that some layer's w never moved, that the two networks did not start with the same loss, or that a
loss did not fall: the means over the first and the last tenth of the steps are compared.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a busy machine many times slower

import torch
from matplotlib.figure import Figure  # not pyplot: this draws to a file, with no display (Agg)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from spiking_cifar10 import SpikingCNN, accuracy, load, train_step
from torch import Tensor

from fastcifar.data import normalize
from fastcifar.spiking import LIF, PLIF

OUTPUT = Path(__file__).parent / "output" / "plif_cifar10.png"
SAME = 1e-4  # of the first loss: rounding, as 1 / tau is a parameter of one network and a constant of the other


def taus(model: SpikingCNN) -> list[float]:
    """The time constant of each layer, in steps."""
    return [1 / lif.w.sigmoid().item() for lif in (model.lif1, model.lif2, model.lif3)]


def complaint(losses: dict[str, Tensor], start: list[float], end: list[float]) -> str | None:
    """The sentence that says what went wrong, or None. NaN is wrong everywhere."""
    first, second = (curve[0] for curve in losses.values())
    if not (first - second).abs() <= SAME * first:
        return f"the two networks are the same before training, but their first losses are {first:.6f} and {second:.6f}"
    for layer, (before, after) in enumerate(zip(start, end, strict=True), start=1):
        if not abs(after - before) > 0:
            return (
                f"the time constant of layer {layer} did not move: {before:.6f} before and {after:.6f} after training"
            )
    for name, curve in losses.items():
        tenth = max(1, len(curve) // 10)
        if not curve[-tenth:].mean() < curve[:tenth].mean():
            return f"the loss of {name} did not fall from {curve[:tenth].mean():.4f}"
    return None


def plot(losses: dict[str, Tensor], accuracies: dict[str, list[float]], learnt: Tensor) -> None:
    steps, epochs = len(learnt) - 1, len(accuracies["LIF"])
    figure = Figure(figsize=(8, 9), layout="constrained")
    top, middle, bottom = figure.subplots(3, sharex=True)
    for (name, curve), style in zip(losses.items(), ("-", "--"), strict=True):
        top.plot(range(1, steps + 1), curve, style, label=name)
        at = [steps // epochs * (epoch + 1) for epoch in range(epochs)]
        middle.plot(at, [100 * a for a in accuracies[name]], style, marker="o", label=name)
    for layer, curve in enumerate(learnt.T, start=1):
        bottom.plot(curve, label=f"layer {layer}")
    bottom.axhline(2.0, color="black", linewidth=0.8, label="LIF")
    top.set(ylabel="training loss", title="A spiking CNN on CIFAR-10, time constants learnt and fixed")
    middle.set(ylabel="test accuracy in %")
    bottom.set(ylabel="time constant in steps", xlabel="step of training")
    for axes in (top, middle, bottom):
        axes.legend()
    OUTPUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUTPUT, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="800 images of the bundled sample, and 200 to test")
    parser.add_argument("--data", help="folder of the full set (default: FASTCIFAR_DATA, else .data)")
    parser.add_argument("--epochs", type=int, default=8, help="default: 8")
    parser.add_argument("--batch-size", type=int, help="default: 128; 50 with --quick")
    parser.add_argument("--lr", type=float, default=0.1, help="the peak of a one-cycle schedule (default: 0.1)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    batch_size = args.batch_size or (50 if args.quick else 128)
    try:
        train_images, train_labels, test_images, test_labels = load(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{error}. Or run --quick, which needs the bundled sample only.")
    per_epoch = len(train_images) // batch_size
    steps = args.epochs * per_epoch
    if steps < 1:
        parser.error(f"{args.epochs} epochs of {per_epoch} batches are no training")

    device = torch.device(args.device)
    torch.manual_seed(0)
    width = 16 if args.quick else 32
    models = {"LIF": SpikingCNN(LIF, width), "PLIF": SpikingCNN(PLIF, width)}
    # All but w, which the other network does not have.
    models["PLIF"].load_state_dict({**models["PLIF"].state_dict(), **models["LIF"].state_dict()})
    tools = {}
    for name, model in models.items():
        model.to(device)
        # Weight decay would pull w to 0, which is tau = 2, and so hide where learning takes it.
        times = [p for key, p in model.named_parameters() if key.endswith(".w")]
        others = [p for key, p in model.named_parameters() if not key.endswith(".w")]
        groups = [
            {"params": others, "weight_decay": 5e-4},
            *([{"params": times, "weight_decay": 0.0}] if times else []),
        ]
        sgd = torch.optim.SGD(groups, lr=args.lr, momentum=0.9)
        tools[name] = sgd, torch.optim.lr_scheduler.OneCycleLR(sgd, args.lr, total_steps=steps)

    losses = {name: [] for name in models}
    accuracies = {name: [] for name in models}
    learnt = [taus(models["PLIF"])]
    shuffle = torch.Generator().manual_seed(0)
    with Progress() as progress:
        task = progress.add_task("training", total=steps)
        for _ in range(args.epochs):
            for batch in torch.randperm(len(train_images), generator=shuffle).split(batch_size)[:per_epoch]:
                images, labels = normalize(train_images[batch].to(device)), train_labels[batch].to(device)
                for name, model in models.items():
                    losses[name].append(train_step(model, *tools[name], images, labels)[0])
                learnt.append(taus(models["PLIF"]))
                progress.update(task, advance=1, description=f"loss {losses['PLIF'][-1]:.3f}")
            for name, model in models.items():
                accuracies[name].append(accuracy(model, test_images, test_labels, device))
                model.train()

    table = Table("", "test accuracy", "last loss", "time constants")
    for name in models:
        table.add_row(
            name,
            f"{accuracies[name][-1]:.1%}",
            f"{losses[name][-1]:.4f}",
            ", ".join(f"{tau:.3f}" for tau in (learnt[-1] if name == "PLIF" else learnt[0])),
        )
    Console().print(table)
    curves = {name: torch.tensor(values, dtype=torch.float64) for name, values in losses.items()}
    plot(curves, accuracies, torch.tensor(learnt))
    print(f"curves: {OUTPUT}")
    if sentence := complaint(curves, learnt[0], learnt[-1]):
        sys.exit(f"Something is wrong: {sentence}.")


if __name__ == "__main__":
    main()
