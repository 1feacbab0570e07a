#!/usr/bin/env python3
"""Steer the diffusion model of diffusion_unet.py to a class by Diffusion Tree Sampling, beside the best of n.

    python examples/tree_sampling.py --quick     # a minute on two cores
    python examples/tree_sampling.py             # more trials and calls

The model is asked for images of any class; the reward is the log-probability that a small classifier
(diffusion_classifier.py) gives to --target, "ship" unless said otherwise. No gradient of either is used. Three ways
spend as many model calls in each of several independent trials:

    best of n     whole samples that have nothing to do with each other
    DTS           a tree with Boltzmann selection, which draws from p(x) exp(lambda reward)
    DTS*          a tree with the bound of UCT, which looks for the largest reward

Printed, and drawn into examples/output/tree_sampling.png: the best reward so far over model calls, the mean over trials
and its standard error, and each trial's best image. Exit status 1 means that DTS* found less than the best of n by more
than two standard errors of the difference.

The classifier is small and so is the model: a high reward is not a good picture, only what this classifier takes for
one.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a busy machine many times slower

import diffusion_classifier
import diffusion_unet
import torch
from diffusion_unet import ANY, SCHEDULE, tiles
from matplotlib.figure import Figure  # not pyplot: this draws to a file, with no display (Agg)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from fastcifar.data import CLASSES
from fastcifar.diffusion import TreeSampler, ddim

OUTPUT = Path(__file__).parent / "output" / "tree_sampling.png"
NARROW = (1.0, 0.35)  # children: fewer than the square root of the visits, so that paths branch further down
WAYS = {
    "best of n": {"widening": (1e9, 1.0)},  # endless children at the root: every descent is a sample of its own
    "DTS": {"widening": NARROW},
    "DTS*": {"widening": NARROW, "selection": "uct", "c_uct": 0.3},
}


def grow(tree: TreeSampler, calls: int, trials: int, progress: Progress, name: str) -> tuple[Tensor, Tensor]:
    """Model calls of a trial after each round, and the best reward of each trial until there, ``[rounds, trials]``."""
    spent, best = [], []
    task = progress.add_task(name, total=calls)
    while not spent or spent[-1] < calls:
        before = tree.evaluations
        tree.run(tree.descents)
        if tree.evaluations == before:  # every path ends at an image that there is already
            break
        spent.append(tree.evaluations / trials)
        best.append(tree.best().reward)
        progress.update(task, completed=spent[-1], description=f"{name}: {best[-1].mean():.2f}")
    return torch.tensor(spent), torch.stack(best)


def plot(curves: dict[str, tuple[Tensor, Tensor]], images: dict[str, Tensor], target: str) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(images), width_ratios=[3, *[1] * len(images)])
    for name, (spent, best) in curves.items():
        mean, error = best.mean(1), best.std(1) / best.shape[1] ** 0.5
        (line,) = left.plot(spent, mean, label=name)
        left.fill_between(spent, mean - error, mean + error, color=line.get_color(), alpha=0.2)
    left.set(xlabel="model calls of a trial, one image each", ylabel=f"best ln p({target}) so far")
    left.set_title("A reward and how it is sought")
    left.legend()
    for axes, (name, x) in zip(others, images.items(), strict=True):
        axes.imshow(tiles(x[:12], 2))
        axes.set_axis_off()
        axes.set_title(f"{name}")
    OUTPUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUTPUT, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 trials of 160 calls")
    parser.add_argument("--target", choices=CLASSES, default="ship", help="the class that is rewarded")
    parser.add_argument("--trials", type=int, help="default: 16; 4 with --quick")
    parser.add_argument("--steps", type=int, default=8, help="from noise to an image (default: 8)")
    parser.add_argument("--calls", type=int, help="of the model, a trial and way (default: 400; 160 with --quick)")
    parser.add_argument("--lam", type=float, default=2.0, help="what the reward is multiplied by (default: 2)")
    args = parser.parse_args()
    trials, steps = args.trials or (4 if args.quick else 16), args.steps
    calls = args.calls or (160 if args.quick else 400)

    points = SCHEDULE.points(steps, "lambda", final="min", rounded=False)
    model, classifier = diffusion_unet.load(), diffusion_classifier.load()
    target = CLASSES.index(args.target)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return model(x.contiguous(memory_format=torch.channels_last), t, torch.full((len(x),), ANY))

    def reward(x: Tensor) -> Tensor:
        x = x.clamp(-1, 1).contiguous(memory_format=torch.channels_last)
        return classifier(x).log_softmax(1)[:, target]

    curves, images = {}, {}
    with Progress() as progress:
        for name, options in WAYS.items():
            tree = TreeSampler(
                denoiser,
                reward,
                (3, 32, 32),
                table=ddim(points, eta=1.0, prediction="v"),
                lam=args.lam,
                trees=trials,
                generator=torch.Generator().manual_seed(0),
                **options,
            )
            curves[name] = grow(tree, calls, trials, progress, name)
            images[name] = tree.best().x

    table = Table("", "model calls a trial", f"best ln p({args.target})", "standard error", "images seen a trial")
    for name, (spent, best) in curves.items():
        error = best[-1].std() / trials**0.5
        table.add_row(name, f"{spent[-1]:.0f}", f"{best[-1].mean():.3f}", f"{error:.3f}", f"{len(best)}")
    Console().print(table)
    plot(curves, images, args.target)
    print(f"reward over calls, and images: {OUTPUT}")
    gap = curves["best of n"][1][-1] - curves["DTS*"][1][-1]
    if gap.mean() > 2 * gap.std() / trials**0.5:
        sys.exit("The tree found less than the best of as many samples.")


if __name__ == "__main__":
    main()
