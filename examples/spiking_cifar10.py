#!/usr/bin/env python3
"""Train a spiking CNN on CIFAR-10 twice, with our kernels and with plain PyTorch, and see that they learn the same.

    python examples/spiking_cifar10.py --quick     # the bundled sample, half a minute on two cores
    python examples/spiking_cifar10.py             # the full set: `make data DATA=folder` first, or --data folder

Three blocks of convolution, batch norm, leaky integrate-and-fire neurons (LIF) and pooling, and a linear readout, run
for T = 4 time steps with direct coding: the image is the input of every step, the mean of the readout over time gives
the logits. The neurons are what this costs beyond a CNN: in plain PyTorch a loop over time of a dozen operations that
each read and write a whole activation; ``fastcifar.spiking.LIF`` passes over memory once forward and once backward.

Two copies of the network start from the same weights and see the same batches; one has ``LIF``, the other
``ReferenceLIF``, the same equations in plain PyTorch. Accuracy, times and the difference of the losses are printed, the
curves saved to examples/output/spiking_cifar10.png. Exit status 1 means that the curves disagree:

- Spikes are exact, gradients are equal up to rounding, and so are the weights. That does not show in the loss, whose
  readout sees nothing but spikes, until a membrane comes so close to the threshold that rounding decides. Measured (on
  a CPU, 5 seeds) with a backward pass that rounds otherwise than the reference's: losses equal to the bit until a spike
  flips at step 24 to 34, which moves the loss by 2e-5 to 3e-5 of itself. Gradients wrong by 1 % move it by 3e-4 to 1e-3
  within 10 steps, gradients without the derivative of the reset by 9e-4 to 2e-3. So 10 steps must agree to 1e-4.
- From then on training amplifies what differs, as it does any rounding: single losses came to differ by 0.1, means over
  40 steps by no more than 1 %. So the means over the last tenth of the steps must agree to 5 %.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS does not repeat its own bits
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a busy machine many times slower

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure  # not pyplot: this draws to a file, with no display (Agg)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import fastcifar
from fastcifar.data import SAMPLE, cifar10, normalize
from fastcifar.spiking import LIF, reference

T = 4  # time steps
OUTPUT = Path(__file__).parent / "output" / "spiking_cifar10.png"
FIRST, FIRST_TOLERANCE, END_TOLERANCE = 10, 1e-4, 0.05  # steps; relative, for the reasons above


class ReferenceLIF(nn.Module):
    """What ``LIF()`` computes, by the executable specification."""

    v = None

    def reset(self) -> None:
        self.v = None

    def forward(self, x: Tensor) -> Tensor:
        spikes, self.v, _ = reference.lif(x, self.v)
        return spikes


class SpikingCNN(nn.Module):
    """``neuron`` is LIF or ReferenceLIF; the layers with weights are the same for both, and in the same order."""

    def __init__(self, neuron: type[nn.Module], width: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.lif1 = conv(3, width), nn.BatchNorm2d(width), neuron()
        self.conv2, self.bn2, self.lif2 = conv(width, 2 * width), nn.BatchNorm2d(2 * width), neuron()
        self.conv3, self.bn3, self.lif3 = conv(2 * width, 4 * width), nn.BatchNorm2d(4 * width), neuron()
        self.readout = nn.Linear(4 * width * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        for lif in (self.lif1, self.lif2, self.lif3):
            lif.reset()  # every batch is a new sequence
        # The first layer sees the same image at every step, so once is enough.
        x = self.bn1(self.conv1(images)).expand(T, -1, -1, -1, -1)  # [T, B, C, H, W]
        # Layers without memory take time as part of the batch, in one call: [T * B, C, H, W].
        x = F.avg_pool2d(self.lif1(x).flatten(0, 1), 2)
        x = self.bn2(self.conv2(x)).unflatten(0, (T, -1))
        x = F.avg_pool2d(self.lif2(x).flatten(0, 1), 2)
        x = self.bn3(self.conv3(x)).unflatten(0, (T, -1))
        x = F.avg_pool2d(self.lif3(x).flatten(0, 1), 2)
        return self.readout(x.flatten(1)).unflatten(0, (T, -1)).mean(0)


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


def load(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (uint8) and labels, test images and labels."""
    if not args.quick:
        return *cifar10(args.data, "train"), *cifar10(args.data, "test")
    images, labels = cifar10(SAMPLE, "test")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:800]], labels[order[:800]], images[order[800:]], labels[order[800:]]


def train_step(model: nn.Module, optimizer, scheduler, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """One step of SGD; the loss and the seconds that it took."""
    start = time.perf_counter()
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if images.is_cuda:
        torch.cuda.synchronize()
    return loss.item(), time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> float:
    model.eval()
    hits = 0
    for x, y in zip(images.split(250), labels.split(250), strict=True):
        hits += (model(normalize(x.to(device))).argmax(1) == y.to(device)).sum().item()
    return hits / len(labels)


def disagreement(ours: Tensor, theirs: Tensor) -> str | None:
    """The sentence that says how two loss curves disagree, or None. NaN disagrees with everything."""
    first = ((ours - theirs).abs() / theirs)[:FIRST].max()
    if not first <= FIRST_TOLERANCE:
        return f"the losses of the first {FIRST} steps differ by {first:.1e} of themselves, more than {FIRST_TOLERANCE}"
    end = len(ours) - len(ours) // 10
    a, b = ours[end:].mean(), theirs[end:].mean()
    if not (a - b).abs() <= END_TOLERANCE * b:
        return f"the curves end at {a:.4f} and {b:.4f} (means of the last {len(ours) - end} steps), not within 5 %"
    return None


def plot(curves: dict[str, Tensor]) -> None:
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        top.plot(curve, style, label=name)
    bottom.plot(curves["fastcifar"] - curves["reference"], color="black", linewidth=0.8)
    top.set(ylabel="training loss", title="A spiking CNN on CIFAR-10, trained twice")
    bottom.set(ylabel="difference", xlabel="step")
    top.legend()
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
    if steps < FIRST:
        parser.error(f"{args.epochs} epochs of {per_epoch} batches are too few to compare, take {FIRST} steps or more")

    device = torch.device(args.device)
    print(*[line for line in fastcifar.doctor().splitlines() if line.split()[:2] == ["lif_forward", device.type]])
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help in debugging that would count in the times
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # TF32 rounds so much that spikes would flip early
    torch.manual_seed(0)
    width = 16 if args.quick else 32
    models = {"fastcifar": SpikingCNN(LIF, width), "reference": SpikingCNN(ReferenceLIF, width)}
    models["reference"].load_state_dict(models["fastcifar"].state_dict())
    tools = {}
    for name, model in models.items():
        model.to(device)
        sgd = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
        tools[name] = sgd, torch.optim.lr_scheduler.OneCycleLR(sgd, args.lr, total_steps=steps)

    losses, seconds = {name: [] for name in models}, {name: [] for name in models}
    shuffle = torch.Generator().manual_seed(0)
    with Progress() as progress:
        task = progress.add_task("training", total=steps)
        for _ in range(args.epochs):
            for batch in torch.randperm(len(train_images), generator=shuffle).split(batch_size)[:per_epoch]:
                images, labels = normalize(train_images[batch].to(device)), train_labels[batch].to(device)
                for name, model in models.items():
                    loss, took = train_step(model, *tools[name], images, labels)
                    losses[name].append(loss)
                    seconds[name].append(took)
                progress.update(task, advance=1, description=f"loss {losses['fastcifar'][-1]:.3f}")

    table = Table("", "test accuracy", "median step", "time per epoch", "last loss")
    for name, model in models.items():
        table.add_row(
            name,
            f"{accuracy(model, test_images, test_labels, device):.1%}",
            f"{1e3 * torch.tensor(seconds[name]).median():.1f} ms",
            f"{sum(seconds[name]) / args.epochs:.2f} s",
            f"{losses[name][-1]:.4f}",
        )
    Console().print(table)
    curves = {name: torch.tensor(values, dtype=torch.float64) for name, values in losses.items()}
    difference = (curves["fastcifar"] - curves["reference"]).abs()
    print(
        f"max difference of the losses: first {FIRST} steps {difference[:FIRST].max():.1e}, all {difference.max():.1e}"
    )
    plot(curves)
    print(f"loss curves: {OUTPUT}")
    if sentence := disagreement(curves["fastcifar"], curves["reference"]):
        sys.exit(f"The two networks disagree: {sentence}.")


if __name__ == "__main__":
    main()
