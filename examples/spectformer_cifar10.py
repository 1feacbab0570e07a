#!/usr/bin/env python3
"""Train a SpectFormer on CIFAR-10 beside its two extremes: spectral layers only, and attention only.

    python examples/spectformer_cifar10.py --quick     # the bundled sample, some minutes on two cores
    python examples/spectformer_cifar10.py             # the full set: `make data DATA=folder` first, or --data folder

``fastcifar.spectral.SpectFormer`` on images of 32 x 32 in patches of 4 x 4, which is a grid of 8 x 8 tokens. Its
first ``alpha`` blocks mix tokens by a learnt filter in the frequency domain, the others by attention: all of them is
GFNet, none of them a plain vision transformer, half of them SpectFormer. A spectral layer has far fewer parameters than
attention, so the MLPs of each model are widened or narrowed until all three have as many parameters (2 %).

The three see the same batches (random crops and mirror images, drawn from a fixed seed) with the same optimizer and
schedule, in turn, and each is timed by itself: a step is forward, backward and update. Test accuracy over the time that
training took is printed and saved to examples/output/spectformer_cifar10.png. With a few epochs this says how fast the
three learn and what a step costs, not which is the best after hundreds of epochs.

Exit status 1 means that parameter counts differ by more than 2 %, or that a loss did not fall: the means over the first
and the last tenth of the steps are compared.
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
from spiking_cifar10 import accuracy, load, train_step
from torch import Tensor, nn

from fastcifar.data import normalize
from fastcifar.spectral import SpectFormer

OUTPUT = Path(__file__).parent / "output" / "spectformer_cifar10.png"
SAME = 0.02  # of the parameters
MLP_RATIO = 4.0  # of the SpectFormer; the others follow


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def build(alpha: int, mlp_ratio: float, args: argparse.Namespace) -> SpectFormer:
    torch.manual_seed(0)
    return SpectFormer(
        img_size=32,
        patch_size=4,
        num_classes=10,
        embed_dim=args.dim,
        depth=args.depth,
        num_heads=args.heads,
        mlp_ratio=mlp_ratio,
        alpha=alpha,
    )


def equal_models(args: argparse.Namespace) -> dict[str, SpectFormer]:
    """The three models, the MLPs of two of them sized so that all have the parameters of the third."""
    half = args.depth // 2
    wanted = parameters(build(half, MLP_RATIO, args))
    a_unit = args.depth * (2 * args.dim + 1)  # parameters that one hidden unit more in every MLP adds
    models = {}
    for name, alpha in (("spectral", args.depth), ("attention", 0), ("spectral, then attention", half)):
        missing = wanted - parameters(build(alpha, MLP_RATIO, args))
        hidden = round(MLP_RATIO * args.dim + missing / a_unit)
        models[name] = build(alpha, (hidden + 0.5) / args.dim, args)  # rounded down to hidden
    return models


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (uint8) shifted by up to 4 pixels each way, over zeros, and mirrored with probability 1/2."""
    batch, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, batch, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    each, channel = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(channels).view(-1, 1, 1)
    return padded[each, channel, rows[:, None, :, None], columns[:, None, None, :]]


def complaint(counts: dict[str, int], losses: dict[str, list[float]]) -> str | None:
    """The sentence that says what went wrong, or None. NaN is wrong everywhere."""
    if not max(counts.values()) <= (1 + SAME) * min(counts.values()):
        return f"the models have {', '.join(f'{count:,}' for count in counts.values())} parameters"
    for name, values in losses.items():
        curve = torch.tensor(values, dtype=torch.float64)
        tenth = max(1, len(curve) // 10)
        if not curve[-tenth:].mean() < curve[:tenth].mean():
            return f"the loss of {name} did not fall from {curve[:tenth].mean():.4f}"
    return None


def plot(accuracies: dict[str, list[float]], seconds: dict[str, list[float]], losses: dict[str, list[float]]) -> None:
    figure = Figure(figsize=(8, 7), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for name, style in zip(accuracies, ("-", "--", "-."), strict=True):
        line = top.plot(seconds[name], [100 * a for a in accuracies[name]], style, marker="o", label=name)
        curve = torch.tensor(losses[name])
        each = max(1, len(curve) // 100)  # means over a hundredth of the steps
        means = curve[: len(curve) // each * each].view(-1, each).mean(1)
        at = torch.linspace(0, seconds[name][-1], len(means) + 1)[1:]
        bottom.plot(at, means, style, color=line[0].get_color(), label=name)
    top.set(ylabel="test accuracy in %", title="Token mixers of equal size on CIFAR-10")
    bottom.set(xlabel="seconds of training", ylabel="training loss")
    top.legend()
    OUTPUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUTPUT, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="800 images of the bundled sample, and 200 to test")
    parser.add_argument("--data", help="folder of the full set (default: FASTCIFAR_DATA, else .data)")
    parser.add_argument("--epochs", type=int, help="default: 6; 15 with --quick")
    parser.add_argument("--batch-size", type=int, help="default: 128; 50 with --quick")
    parser.add_argument("--dim", type=int, help="channels of a token (default: 128; 96 with --quick)")
    parser.add_argument("--depth", type=int, help="blocks (default: 6; 4 with --quick)")
    parser.add_argument("--heads", type=int, default=4, help="of attention (default: 4)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="the peak of a one-cycle schedule (default: 0.0015)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.epochs = args.epochs or (15 if args.quick else 6)
    args.batch_size = args.batch_size or (50 if args.quick else 128)
    args.dim = args.dim or (96 if args.quick else 128)
    args.depth = args.depth or (4 if args.quick else 6)
    try:
        train_images, train_labels, test_images, test_labels = load(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{error}. Or run --quick, which needs the bundled sample only.")
    per_epoch = len(train_images) // args.batch_size
    steps = args.epochs * per_epoch
    if steps < 1:
        parser.error(f"{args.epochs} epochs of {per_epoch} batches are no training")

    device = torch.device(args.device)
    models = equal_models(args)
    counts = {name: parameters(model) for name, model in models.items()}
    tools = {}
    for name, model in models.items():
        model.to(device)
        adam = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
        tools[name] = adam, torch.optim.lr_scheduler.OneCycleLR(adam, args.lr, total_steps=steps, pct_start=0.2)

    losses: dict[str, list[float]] = {name: [] for name in models}
    accuracies: dict[str, list[float]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}  # of training, at the end of every epoch
    spent = dict.fromkeys(models, 0.0)
    shuffle = torch.Generator().manual_seed(0)
    with Progress() as progress:
        task = progress.add_task("training", total=steps)
        for _ in range(args.epochs):
            for batch in torch.randperm(len(train_images), generator=shuffle).split(args.batch_size)[:per_epoch]:
                images = normalize(augment(train_images[batch], shuffle).to(device))
                labels = train_labels[batch].to(device)
                for name, model in models.items():
                    loss, took = train_step(model, *tools[name], images, labels)
                    losses[name].append(loss)
                    spent[name] += took
                progress.update(task, advance=1, description=f"loss {loss:.3f}")
            for name, model in models.items():
                accuracies[name].append(accuracy(model, test_images, test_labels, device))
                seconds[name].append(spent[name])
                model.train()

    table = Table("", "parameters", "test accuracy", "training", "a step", "last loss")
    for name in models:
        table.add_row(
            name,
            f"{counts[name]:,}",
            f"{accuracies[name][-1]:.1%}",
            f"{spent[name]:.1f} s",
            f"{1e3 * spent[name] / steps:.1f} ms",
            f"{losses[name][-1]:.4f}",
        )
    Console().print(table)
    print(f"{args.epochs} epochs of {per_epoch * args.batch_size:,} images, {len(test_images):,} to test")
    plot(accuracies, seconds, losses)
    print(f"accuracy over time: {OUTPUT}")
    if sentence := complaint(counts, losses):
        sys.exit(f"Something is wrong: {sentence}.")


if __name__ == "__main__":
    main()
