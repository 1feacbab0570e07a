#!/usr/bin/env python3
"""Train the small classifier whose verdict is the reward in tree_sampling.py.

    python examples/diffusion_classifier.py --quick     # the bundled sample, seconds
    python examples/diffusion_classifier.py             # the full set: `make data DATA=folder` first, or --data folder

Four convolutions on images in [-1, 1], trained on mirrored and shifted images with a little noise, as samples of a
small denoiser have some. Written is examples/weights/diffusion_classifier.pt (examples/output/ with --quick) in
float16. Exit status 1 means that it does no better than guessing.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a busy machine many times slower

import torch
import torch.nn.functional as F
from diffusion_train import OUTPUT, Muon
from diffusion_unet import CLASSES, save_half
from rich.progress import Progress
from spiking_cifar10 import load as load_images
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights" / "diffusion_classifier.pt"


def network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 2)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.SiLU()]
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 96, CLASSES)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def load(path: Path = WEIGHTS) -> nn.Sequential:
    """The trained network, in evaluation."""
    model = network()
    state = torch.load(path, weights_only=True)
    model.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    )
    return model.eval().requires_grad_(False)


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, size: int) -> None:
    matrices = [p for p in model.parameters() if p.dim() == 4]
    rest = [p for p in model.parameters() if p.dim() != 4]
    optimizers = [Muon(matrices, 0.03), torch.optim.AdamW(rest, 3e-3)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda done: 1 - done / steps) for o in optimizers]
    random = torch.Generator().manual_seed(0)
    with Progress() as progress:
        task = progress.add_task("training", total=steps)
        for _ in range(steps):
            batch = torch.randint(0, len(images), (size,), generator=random)
            x = images[batch].float() / 127.5 - 1
            x = torch.where(torch.rand(size, 1, 1, 1, generator=random) < 0.5, x.flip(3), x)
            down, right = torch.randint(0, 9, (2,), generator=random).tolist()
            x = F.pad(x, (4, 4, 4, 4), mode="reflect")[:, :, down : down + 32, right : right + 32]
            x = x + 0.1 * torch.rand(size, 1, 1, 1, generator=random) * torch.randn(x.shape, generator=random)
            loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), labels[batch])
            model.zero_grad()
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            progress.update(task, advance=1, description=f"loss {loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="800 images of the bundled sample, and 200 to test")
    parser.add_argument("--data", help="folder of the full set (default: FASTCIFAR_DATA, else .data)")
    parser.add_argument("--steps", type=int, help="of training (default: 1200; 60 with --quick)")
    parser.add_argument("--output", type=Path, help="of the weights (default: see above)")
    args = parser.parse_args()
    try:
        images, labels, test_images, test_labels = load_images(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{error}. Or run --quick, which needs the bundled sample only.")
    torch.manual_seed(0)
    model = network()
    train(model, images, labels, args.steps or (60 if args.quick else 1200), 64 if args.quick else 128)
    output = args.output or (OUTPUT / "diffusion_classifier.pt" if args.quick else WEIGHTS)
    save_half(model.state_dict(), output)
    model = load(output)
    with torch.inference_mode():
        logits = torch.cat([model(x.float() / 127.5 - 1) for x in test_images.split(250)])
    accuracy = (logits.argmax(1) == test_labels).double().mean().item()
    print(f"test accuracy {accuracy:.1%}; weights: {output} ({output.stat().st_size:,} bytes)")
    if not accuracy > 0.15:
        sys.exit("The classifier does no better than guessing.")


if __name__ == "__main__":
    main()
