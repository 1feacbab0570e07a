#!/usr/bin/env python3
"""Train a tiny U-ViT that predicts the noise in CIFAR-10 images, with an exit after every block, and let samples leave.

    python examples/uvit_denoiser.py --quick     # the bundled sample, a minute or two on two cores
    python examples/uvit_denoiser.py             # the full set: `make data DATA=folder` first, or --data folder

Images are scaled to [-1, 1] and noised as DDPM does (1,000 steps, betas from 1e-4 to 0.02). All output heads and all
uncertainty heads are trained together (``DeeDiffLoss``). Then batches of 200 test images, each with a step of its own,
run at several thresholds: printed are the mean squared error of the noise, the mean number of blocks, and the time
relative to the whole network. The step matters most: images with much noise leave earlier than those with little.
The curves are drawn into examples/output/uvit_denoiser.png.

This shows exits within a batch, not image quality: no images are generated, and no FID is claimed. Exit status 1 means
that a batch gives another noise than the same images one by one, or that half the blocks do not save time.
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
from torch import Tensor

from fastcifar.diffusion import DeeDiffLoss, UViT, UViTResult

STEPS, BATCH = 1000, 200
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of all uncertainties: the thresholds
OUTPUT = Path(__file__).parent / "output" / "uvit_denoiser.png"
SIGNAL = torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS), 0)  # the share of the image's variance that is left


def noised(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images with noise, their steps, and the noise."""
    x = images.float() / 127.5 - 1
    t = torch.randint(0, STEPS, (len(x),), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    share = SIGNAL[t].view(-1, 1, 1, 1)
    return share.sqrt() * x + (1 - share).sqrt() * noise, t, noise


def train(model: UViT, images: Tensor, steps: int, batch_size: int, lr: float) -> None:
    device = next(model.parameters()).device
    loss_of = DeeDiffLoss()
    adam = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.03)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, lr, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    with Progress() as progress:
        task = progress.add_task("training", total=steps)
        for _ in range(steps):
            batch = torch.randint(0, len(images), (batch_size,), generator=generator)
            x, t, noise = (tensor.to(device) for tensor in noised(images[batch], generator))
            loss = loss_of(*model(x, t), noise)
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            progress.update(task, advance=1, description=f"loss {loss.item():.3f}")


@torch.inference_mode()
def run(model: UViT, batches: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[UViTResult, float]:
    """Results of all batches, and the least seconds of five rounds: other programs only ever add to them."""
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        results = [model(x, t) for x, t, _ in batches]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return UViTResult(*(torch.cat(parts) for parts in zip(*results, strict=True))), min(seconds)


def plot(rows: list[tuple[float, float, float]], t: Tensor, exits: Tensor, depth: int) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([took for took, _, _ in rows], [error for _, error, _ in rows], "o-")
    left.set(xlabel="time relative to the whole network", ylabel="mean squared error of the noise")
    right.plot(t.cpu(), exits.cpu() + 1, ".", markersize=3)
    right.set(xlabel="step t (noisier to the right)", ylabel="blocks", ylim=(0, depth + 0.5))
    left.set_title("A tiny U-ViT with exits on CIFAR-10")
    OUTPUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUTPUT, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="800 images of the bundled sample, and 200 to test")
    parser.add_argument("--data", help="folder of the full set (default: FASTCIFAR_DATA, else .data)")
    parser.add_argument("--steps", type=int, help="of training (default: 5000; 200 with --quick)")
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")
    parser.add_argument("--lr", type=float, default=1e-3, help="the peak of a one-cycle schedule (default: 1e-3)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    try:
        images, _, test_images, _ = load(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{error}. Or run --quick, which needs the bundled sample only.")
    torch.manual_seed(0)
    width, depth = (48, 5) if args.quick else (128, 9)
    model = UViT(32, 4, embed_dim=width, depth=depth, num_heads=4).to(args.device)
    train(model, images, args.steps or (200 if args.quick else 5000), args.batch_size, args.lr)

    generator = torch.Generator().manual_seed(1)
    batches = [tuple(y.to(args.device) for y in noised(x, generator)) for x in test_images[:1000].split(BATCH)]
    t, noise = torch.cat([t for _, t, _ in batches]), torch.cat([noise for _, _, noise in batches])
    with torch.inference_mode():  # thresholds from other images than the ones that are reported on
        x, steps, _ = (y.to(args.device) for y in noised(images[:BATCH], generator))
        uncertainty = torch.stack(model.train()(x, steps).uncertainty)
    model.eval()

    def error(result: UViTResult) -> float:
        return (result.output - noise).square().mean().item()

    model.threshold = -1.0
    whole, seconds = run(model, batches)
    table = Table("threshold", "error of the noise", "mean blocks", "time")
    table.add_row("no exits", f"{error(whole):.4f}", f"{depth:.2f}", "1.00")
    rows = [(1.0, error(whole), float(depth))]
    halves = []
    for quantile in QUANTILES:
        model.threshold = uncertainty.quantile(quantile).item()
        result, took = run(model, batches)
        blocks = result.exit_taken.double().mean().item() + 1
        rows.append((took / seconds, error(result), blocks))
        table.add_row(f"{model.threshold:.4f}", f"{error(result):.4f}", f"{blocks:.2f}", f"{took / seconds:.2f}")
        if blocks <= depth / 2:
            halves.append(took / seconds)
    Console().print(table)

    model.threshold = uncertainty.quantile(0.3).item()
    result, _ = run(model, batches)
    plot(rows, t, result.exit_taken, depth)
    print(f"error over time, and blocks over steps: {OUTPUT}")
    with torch.inference_mode():
        x, steps, _ = batches[0]
        singles = [model(x[k : k + 1], steps[k : k + 1]) for k in range(20)]
    alone = UViTResult(*(torch.cat(parts) for parts in zip(*singles, strict=True)))
    close = (result.uncertainty[:20] - model.threshold).abs() < 1e-5  # within rounding of the threshold
    same = result.exit_taken[:20] == alone.exit_taken
    off = (result.output[:20] - alone.output).abs().amax((1, 2, 3))[same].max().item()
    if bool((~same & ~close).any()) or not off < 1e-3:
        sys.exit(f"A batch gives another noise than the same images one by one (by {off:.1e}).")
    if halves and not min(halves) < 1:
        sys.exit(f"Half of the blocks took {min(halves):.2f} times as long as all.")


if __name__ == "__main__":
    main()
