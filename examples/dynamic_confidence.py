#!/usr/bin/env python3
"""Train a CNN on CIFAR-10, convert it to spikes, and let every image stop at the time step where it is sure enough.

    python examples/dynamic_confidence.py --quick     # the bundled sample, two minutes on two cores
    python examples/dynamic_confidence.py             # the full set: `make data DATA=folder` first, or --data folder

The network is that of ann_to_snn.py: six convolutions with QCFS activations, which ``fastcifar.spiking.convert`` makes
spiking. It runs for up to T = 27 steps. ``DynamicConfidence`` sums its outputs, and an image leaves where the largest
probability of the sum over A exceeds a threshold, which is chosen on a fifth of the training images, kept apart: of all
thresholds, the fastest that loses no accuracy there. Within a batch, whose images leave at different steps, the rows of
those that leave are dropped from every membrane.

Printed: accuracy, mean steps and the time of the test images, without early exit and with it; spikes of a neuron; and
the bound that an oracle would reach. The curves are drawn into examples/output/dynamic_confidence.png. Exit status 1
means that more than one in ten of the first 20 images leave at another step when they are alone, or that early exit
takes longer than none although the mean step is below 0.8 T.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a busy machine many times slower

import torch
from ann_to_snn import train, vgg
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from spiking_cifar10 import load
from torch import Tensor

from fastcifar.data import normalize
from fastcifar.spiking import DynamicConfidence, DynamicConfidenceResult, convert

STEPS, BATCH, CHECKED = 27, 200, 20
OUTPUT = Path(__file__).parent / "output" / "dynamic_confidence.png"


def run(model: DynamicConfidence, batches: list[Tensor]) -> tuple[DynamicConfidenceResult, float]:
    begin = time.perf_counter()
    results = [model(x) for x in batches]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return DynamicConfidenceResult(*(torch.cat(parts) for parts in zip(*results, strict=True))), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="800 images of the bundled sample, and 200 to test")
    parser.add_argument("--data", help="folder of the full set (default: FASTCIFAR_DATA, else .data)")
    parser.add_argument("--epochs", type=int, help="default: 8; 20 with --quick")
    parser.add_argument("--batch-size", type=int, help="default: 128; 50 with --quick")
    parser.add_argument("--lr", type=float, default=0.1, help="the peak of a one-cycle schedule (default: 0.1)")
    parser.add_argument("--scale", type=float, default=30.0, help="A, the smoothing of the confidence (default: 30)")
    parser.add_argument("--test-images", type=int, default=2000, help="how many to compare on (default: 2000)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.epochs = args.epochs or (20 if args.quick else 8)
    args.batch_size = args.batch_size or (50 if args.quick else 128)
    try:
        images, labels, test_images, test_labels = load(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{error}. Or run --quick, which needs the bundled sample only.")
    test_images, test_labels = test_images[: args.test_images], test_labels[: args.test_images]
    held = min(len(images) // 5, 2000)  # the threshold is chosen on what the network was not trained on

    torch.manual_seed(0)
    ann = vgg(16 if args.quick else 32).to(args.device)
    with Progress() as progress:
        train(ann, images[held:], labels[held:], args, progress)
    calibration_set = [
        (normalize(x.to(args.device)), y)
        for x, y in zip(images[:held].split(BATCH), labels[:held].split(BATCH), strict=True)
    ]
    model = DynamicConfidence(convert(ann.eval()), STEPS, scale=args.scale)
    calibration = model.calibrate(calibration_set)
    print(f"threshold {model.threshold:.4f}, of {len(calibration.front.threshold)} on the front")

    batches = [normalize(x.to(args.device)) for x in test_images.split(BATCH)]
    right = test_labels.to(args.device)
    threshold = model.threshold
    run(model, batches[:1])  # warms up
    model.threshold = 2.0  # nobody leaves
    fixed, fixed_seconds = run(model, batches)
    model.threshold = threshold
    dynamic, dynamic_seconds = run(model, batches)

    table = Table("on the test images", "accuracy", "mean steps", "time")
    for name, result, seconds in (
        (f"{STEPS} steps", fixed, fixed_seconds),
        ("Dynamic Confidence", dynamic, dynamic_seconds),
    ):
        accuracy = (result.logits.argmax(1) == right).double().mean().item()
        table.add_row(name, f"{accuracy:.1%}", f"{result.exit_step.double().mean():.2f}", f"{seconds:.2f} s")
    Console().print(table)
    curve, everything = calibration.curve(), calibration.curve(2.0)
    steps, bound = calibration.oracle()
    print(f"on the images kept apart: spikes of a neuron {everything.spikes[-1]:.2f}, then {curve.spikes[-1]:.2f}")
    print(f"an oracle would reach {bound:.1%} in {steps:.2f} steps there")
    OUTPUT.parent.mkdir(exist_ok=True)
    calibration.plot(OUTPUT)
    print(f"curves: {OUTPUT}")

    alone = torch.cat([model(x).exit_step for x in batches[0][:CHECKED].split(1)])
    moved = int((alone != dynamic.exit_step[:CHECKED]).sum())
    if moved > CHECKED // 10:
        sys.exit(f"{moved} of {CHECKED} images leave at another step when they are alone.")
    mean = dynamic.exit_step.double().mean().item()
    if mean < 0.8 * STEPS and not dynamic_seconds < fixed_seconds:
        sys.exit(f"{mean:.1f} steps in the mean took {dynamic_seconds:.2f} s, {STEPS} took {fixed_seconds:.2f} s.")


if __name__ == "__main__":
    main()
