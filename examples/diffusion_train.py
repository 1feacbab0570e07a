#!/usr/bin/env python3
"""Train the denoiser of the diffusion examples on CIFAR-10, in ten minutes on two idle cores.

    python examples/diffusion_train.py --quick     # a tiny network and the bundled sample, seconds
    python examples/diffusion_train.py             # the full set: `make data DATA=folder` first, or --data folder

Trains the U-Net of diffusion_unet.py to predict v, on noise levels whose logarithm is normally distributed, where the
loss can still fall most. What makes ten minutes enough for pictures: convolutions that run channels_last, and Muon
(Jordan et al., 2024), which took two thirds of AdamW's steps to the same loss here. A tenth of the labels is withheld,
for guidance. Kept are the weights' running mean, in float16.

Stopped (or by --stop-after), it goes on where it was at the next call, to the same weights to the bit. Written are
examples/weights/diffusion_unet.pt (examples/output/diffusion_unet.pt with --quick) and the curve of the loss on test
images, examples/output/diffusion_train.png. Exit status 1 means that the loss did not fall.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a busy machine many times slower

import torch
from diffusion_unet import ANY, SIGNAL, WEIGHTS, UNet, save_half
from matplotlib.figure import Figure  # not pyplot: this draws to a file, with no display (Agg)
from rich.progress import Progress
from spiking_cifar10 import load
from torch import Tensor, nn

OUTPUT = Path(__file__).parent / "output"
LOG_NOISE = 0.5 * torch.log((1 - SIGNAL) / SIGNAL)  # ln(sigma / alpha) of each step


def step_shares(mean: float = -0.5, std: float = 1.4) -> Tensor:
    """The share of each step below it in training, so that ``LOG_NOISE`` is normally distributed."""
    density = torch.exp(-0.5 * ((LOG_NOISE - mean) / std) ** 2) * torch.gradient(LOG_NOISE)[0]
    return (density / density.sum()).cumsum(0)


def noised(images: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy images, and v."""
    alpha, sigma = (share.sqrt().float().view(-1, 1, 1, 1) for share in (SIGNAL[t], 1 - SIGNAL[t]))
    x = alpha * images + sigma * noise
    return x.contiguous(memory_format=torch.channels_last), alpha * noise - sigma * images


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is replaced by the nearest orthogonal one, by five iterations of Newton and Schulz.

    For weights of two and more dimensions (a convolution's is outputs x the rest). Jordan et al., "Muon: an optimizer
    for hidden layers in neural networks", 2024: coefficients and defaults are its.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                average = state.setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(average, group["momentum"]).flatten(1)
                rows, columns = update.shape
                x = update.T if rows > columns else update
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = (x.T if rows > columns else x).reshape(weight.shape)
                weight.add_(x, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


class Training:
    """Model, running mean, optimisers and random stream: all that a checkpoint holds."""

    def __init__(self, model: UNet, steps: int) -> None:
        self.model, self.steps, self.done = model, steps, 0
        self.mean = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        ends = (model.stem, model.head, model.label)
        others = {id(p) for module in ends for p in module.parameters()}
        matrices = [p for p in model.parameters() if p.dim() > 1 and id(p) not in others]
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        self.optimizers = [Muon(matrices, 0.04), torch.optim.AdamW(rest, 2e-3, betas=(0.9, 0.99), weight_decay=0.0)]
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, self.rate) for o in self.optimizers]
        self.generator = torch.Generator().manual_seed(0)
        self.shares = step_shares()
        self.curve: list[tuple[int, float]] = []

    def rate(self, done: int) -> float:
        """Warms up, stays, and falls to nothing over the second half."""
        return min(1, (done + 1) / max(1, min(100, self.steps // 10)), 2 * (1 - done / self.steps))

    def step(self, images: Tensor, labels: Tensor, size: int) -> None:
        random = self.generator
        batch = torch.randint(0, len(images), (size,), generator=random)
        x = images[batch].float() / 127.5 - 1
        x = torch.where(torch.rand(size, 1, 1, 1, generator=random) < 0.5, x.flip(3), x)
        label = torch.where(torch.rand(size, generator=random) < 0.1, ANY, labels[batch])
        levels = (torch.arange(size) + torch.rand((), generator=random)) / size  # evenly, so that losses vary less
        t = torch.searchsorted(self.shares, levels.double()).clamp_(max=len(self.shares) - 1)
        noisy, v = noised(x, t, torch.randn(x.shape, generator=random))
        loss = (self.model(noisy, t, label) - v).square().mean()
        self.model.zero_grad()
        loss.backward()
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        self.done += 1
        keep = min(0.995, self.done / (self.done + 10))
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                self.mean[name].lerp_(tensor, 1 - keep)

    @torch.no_grad()
    def test(self, images: Tensor, labels: Tensor) -> float:
        """The running mean's error of v on test images, always under the same noise, evenly over its logarithm."""
        current = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.mean)
        levels = torch.linspace(-3.5, 3.0, 16, dtype=torch.float64)
        t = torch.searchsorted(LOG_NOISE, levels).repeat(len(images) // 16 + 1)[: len(images)]
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
        noisy, v = noised(images.float() / 127.5 - 1, t, noise)
        parts = zip(noisy.split(128), t.split(128), labels.split(128), strict=True)
        error = (torch.cat([self.model(*part) for part in parts]) - v).square().mean().item()
        self.model.load_state_dict(current)
        self.curve.append((self.done, error))
        return error

    def save(self, path: Path) -> None:
        record = {"done": self.done, "steps": self.steps, "curve": self.curve, "mean": self.mean}
        record |= {"model": self.model.state_dict(), "generator": self.generator.get_state()}
        record |= {"optimizers": [o.state_dict() for o in self.optimizers]}
        record |= {"schedules": [s.state_dict() for s in self.schedules]}
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(record, partial)
        partial.replace(path)  # so that stopping here leaves the checkpoint before

    def resume(self, path: Path) -> None:
        record = torch.load(path, weights_only=True)
        if record["steps"] != self.steps:
            sys.exit(
                f"{path} is of a training of {record['steps']} steps, not {self.steps}: remove it, or say --steps."
            )
        self.done, self.curve, self.mean = record["done"], record["curve"], record["mean"]
        self.model.load_state_dict(record["model"])
        self.generator.set_state(record["generator"])
        for mine, saved in zip(
            self.optimizers + self.schedules, record["optimizers"] + record["schedules"], strict=True
        ):
            mine.load_state_dict(saved)


def plot(curve: list[tuple[int, float]], path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curve, strict=True), "o-", markersize=3)
    axes.set(xlabel="steps", ylabel="error of v on test images", title="A small U-Net on CIFAR-10", yscale="log")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny network, 800 images of the bundled sample")
    parser.add_argument("--data", help="folder of the full set (default: FASTCIFAR_DATA, else .data)")
    parser.add_argument("--steps", type=int, help="of training (default: 2000; 40 with --quick)")
    parser.add_argument("--batch-size", type=int, help="default: 64; 32 with --quick")
    parser.add_argument("--stop-after", type=int, help="leave after so many steps; the next call goes on")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints and tests (default: 100)")
    parser.add_argument("--output", type=Path, help="of the weights (default: see above)")
    args = parser.parse_args()
    try:
        images, labels, test_images, test_labels = load(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{error}. Or run --quick, which needs the bundled sample only.")
    steps, size = args.steps or (40 if args.quick else 2000), args.batch_size or (32 if args.quick else 64)
    output = args.output or (OUTPUT / "diffusion_unet.pt" if args.quick else WEIGHTS)
    checkpoint = OUTPUT / ("diffusion_train_quick.pt" if args.quick else "diffusion_train.pt")

    torch.manual_seed(0)
    width, deep = (16, 32) if args.quick else (48, 96)
    training = Training(UNet(width, deep).to(memory_format=torch.channels_last), steps)
    test_images, test_labels = test_images[:1024], test_labels[:1024]
    if checkpoint.exists():
        training.resume(checkpoint)
        print(f"going on at step {training.done}")
    else:
        training.test(test_images, test_labels)
    last = min(steps, args.stop_after or steps)
    with Progress() as progress:
        task = progress.add_task(f"error {training.curve[-1][1]:.4f}", total=steps, completed=training.done)
        while training.done < last:
            training.step(images, labels, size)
            if training.done % args.every == 0 or training.done == last:
                error = training.test(test_images, test_labels)
                training.save(checkpoint)
                progress.update(task, description=f"error {error:.4f}")
            progress.update(task, completed=training.done)
    plot(training.curve, OUTPUT / "diffusion_train.png")
    first, error = training.curve[0][1], training.curve[-1][1]
    print(f"error of v on test images: {first:.4f} untrained, {error:.4f} after {training.done} steps")
    if training.done < steps:
        return
    checkpoint.unlink()
    save_half(training.mean, output)
    print(f"weights: {output} ({output.stat().st_size:,} bytes)")
    if not error < first:
        sys.exit("Training did not lower the error.")


if __name__ == "__main__":
    main()
