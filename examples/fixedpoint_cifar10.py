#!/usr/bin/env python3
"""A small ResNet on CIFAR-10 in fixed point: float, quantized after training, and trained in fixed point.

    python examples/fixedpoint_cifar10.py --quick     # the bundled sample, two minutes on two cores
    python examples/fixedpoint_cifar10.py             # the full set: `make data DATA=folder` first, or --data folder

The float network is trained first. ``fastcifar.fixedpoint.convert`` then makes a copy in which every layer is of fixed
point: convolutions, batch norms, ReLUs, shortcut additions, the pooling and the classifier, each with weights and
output of 4, 6 or 8 bits (the input has 8, the class scores 12, scales of batch norms 16, their shifts 32). Its binary
points are set from one batch: that is quantization after training. Then it is trained on, binary points and all.

Accuracy is that of integers: in evaluation mode no layer computes in floats. The table and the plot
(examples/output/fixedpoint_cifar10.png) show it at each width. Each trained network is then written as C++ over
``ap_fixed`` types (``to_hls``, examples/output/fixedpoint_cifar10_hls), compiled with g++, and run on test images; the
table says how many of its class scores are not PyTorch's to the bit. ``--ap-types`` compiles it with the FPGA tool's
own headers in place of ours. Exit status 1 means that a score or, between the integers and the floats of training, a
number differs anywhere, or that training at a width did not bring the loss down.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a busy machine many times slower

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure  # not pyplot: this draws to a file, with no display (Agg)
from rich.console import Console
from rich.table import Table
from spectformer_cifar10 import augment
from spiking_cifar10 import load
from torch import Tensor, nn

from fastcifar.data import normalize
from fastcifar.fixedpoint import FixedConfig, FixedTensor, convert, to_hls

OUTPUT = Path(__file__).parent / "output" / "fixedpoint_cifar10.png"
HLS = OUTPUT.with_name("fixedpoint_cifar10_hls")
HAS_COMPILER = bool(shutil.which("g++") and shutil.which("make"))
WIDTHS = [4, 6, 8]


class Block(nn.Module):
    """Two convolutions and a shortcut, which is a convolution of 1 x 1 where the size changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu, self.shortcut = nn.ReLU(), nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        layers, width = [], channels
        for stage in range(3):
            for block in range(blocks):
                wider = stage > 0 and block == 0
                layers.append(Block(width, width * 2 if wider else width, 2 if wider else 1))
                width *= 2 if wider else 1
        self.blocks, self.pool, self.fc = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


def scores(model: nn.Module, images: Tensor) -> Tensor:
    out = model(normalize(images))
    return out.float() if isinstance(out, FixedTensor) else out


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = sum(
        (scores(model, x).argmax(1) == y).sum().item()
        for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    return hits / len(labels)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int, lr: float) -> list[float]:
    """The loss of every step. Binary points have no weight decay."""
    points = [p for name, p in model.named_parameters() if name.endswith("frac_bits")]
    others = [p for name, p in model.named_parameters() if not name.endswith("frac_bits")]
    groups = [{"params": others, "weight_decay": 1e-2}, {"params": points, "weight_decay": 0.0}]
    adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, lr, total_steps=steps, pct_start=0.2)
    shuffle, losses = torch.Generator().manual_seed(0), []
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=shuffle).split(batch)[: len(images) // batch]:
            loss = F.cross_entropy(scores(model, augment(images[chosen], shuffle)), labels[chosen])
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            losses.append(loss.item())
    return losses


@torch.no_grad()
def same_numbers(model: nn.Module, images: Tensor) -> bool:
    """Whether the integers of evaluation are the floats of training, with the same statistics in batch norms."""
    model.eval()
    integers = scores(model, images)
    start = model.get_submodule("input_fixed")
    start.train()
    floats = scores(model, images)
    start.eval()
    return torch.equal(integers, floats)


def exported(model: nn.Module, images: Tensor, folder: Path, ap_types: str | None) -> str:
    """How many scores of the C++ are not PyTorch's, "0 of ...", or where it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    to_hls(model.eval(), folder, normalize(images))
    if not HAS_COMPILER:
        return "not compiled: no g++ or no make"
    command = ["make", "-s", "-C", str(folder), "test"]
    command += [f"AP_TYPES={Path(ap_types).resolve()}", "CXXFLAGS=-O2 -w"] if ap_types else []
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[-1].removesuffix(" outputs differ")


def plot(widths: list[int], float_accuracy: float, after: list[float], trained: list[float]) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100 * float_accuracy, color="gray", linestyle="--", label="float32")
    axes.plot(widths, [100 * a for a in after], marker="o", label="quantized after training")
    axes.plot(widths, [100 * a for a in trained], marker="s", label="trained in fixed point")
    axes.set(xlabel="bits of weights and outputs", ylabel="test accuracy in %", xticks=widths, ylim=(0, None))
    axes.set_title("A ResNet on CIFAR-10, every layer in fixed point")
    axes.legend()
    OUTPUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUTPUT, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="train on 800 images of the bundled sample, test on 200")
    parser.add_argument("--data", help="folder of the CIFAR-10 binary version (default: see fastcifar.data)")
    parser.add_argument("--images", type=int, help="of those to train on (default: all)")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="bits (default: 4 6 8)")
    parser.add_argument("--epochs", type=int, help="of the float network (default: 20; 30 with --quick)")
    parser.add_argument("--tuning", type=int, help="epochs in fixed point, a width (default: 5; 8 with --quick)")
    parser.add_argument("--batch-size", type=int, help="images a step (default: 128; 50 with --quick)")
    parser.add_argument("--channels", type=int, help="of the first stage (default: 16; 8 with --quick)")
    parser.add_argument("--blocks", type=int, help="a stage (default: 3; 1 with --quick)")
    parser.add_argument("--exported", type=int, default=10, help="test images to run through the C++ (default: 10)")
    parser.add_argument("--ap-types", help="folder of the FPGA tool's ap_fixed.h (default: ours)")
    args = parser.parse_args()
    args.epochs = args.epochs or (30 if args.quick else 20)
    args.tuning = args.tuning or (8 if args.quick else 5)
    args.batch_size = args.batch_size or (50 if args.quick else 128)
    try:
        images, labels, test_images, test_labels = load(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{error}. Or run --quick, which needs the bundled sample only.")
    images, labels = images[: args.images], labels[: args.images]
    if len(images) < args.batch_size:
        parser.error(f"{len(images)} images are no batch of {args.batch_size}")

    torch.manual_seed(0)
    model = ResNet(args.channels or (8 if args.quick else 16), args.blocks or (1 if args.quick else 3))
    begin = time.perf_counter()
    train(model, images, labels, args.epochs, args.batch_size, 5e-3)
    float_accuracy = accuracy(model, test_images, test_labels)
    table = Table("bits", "after training", "trained", "seconds", "first loss", "last loss", "C++ scores off")
    table.add_row("float32", "", f"{float_accuracy:.1%}", f"{time.perf_counter() - begin:.1f}", "", "", "")

    after, trained, wrong = [], [], []
    for width in args.widths:
        begin = time.perf_counter()
        fixed = convert(model, FixedConfig(width=width), normalize(images[:250]))
        after.append(accuracy(fixed, test_images, test_labels))
        losses = train(fixed, images, labels, args.tuning, args.batch_size, 2e-3)
        trained.append(accuracy(fixed, test_images, test_labels))
        tenth = max(1, len(losses) // 10)
        first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
        seconds = time.perf_counter() - begin
        verdict = exported(fixed, test_images[: args.exported], HLS / f"{width}_bits", args.ap_types)
        figures = f"{after[-1]:.1%}", f"{trained[-1]:.1%}", f"{seconds:.1f}", f"{first:.4f}", f"{last:.4f}"
        table.add_row(str(width), *figures, verdict)
        if not last < first:
            wrong.append(f"at {width} bits the loss did not fall from {first:.4f}")
        if not same_numbers(fixed, test_images[:200]):
            wrong.append(f"at {width} bits the integers are not the floats of training")
        if HAS_COMPILER and not verdict.startswith("0 of "):
            wrong.append(f"at {width} bits the C++ says: {verdict}")
    Console().print(table)
    plot(args.widths, float_accuracy, after, trained)
    print(f"{len(images):,} images, {len(test_images):,} to test; accuracy by width: {OUTPUT}")
    if wrong:
        sys.exit(f"Something is wrong: {'; '.join(wrong)}.")


if __name__ == "__main__":
    main()
