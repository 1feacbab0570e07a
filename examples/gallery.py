#!/usr/bin/env python3
"""Run the examples with --quick and put their pictures, made small, into docs/images for the gallery (make gallery).

python examples/gallery.py                    # all of them, ten minutes and more on two cores
python examples/gallery.py ann_to_snn         # some
python examples/gallery.py --keep             # the pictures that are there, without running anything
"""

import argparse
import subprocess
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
# Picture, and the example that draws it.
PICTURES = {
    "spiking_cifar10": "spiking_cifar10",
    "plif_cifar10": "plif_cifar10",
    "ann_to_snn": "ann_to_snn",
    "earlyexit_cifar10": "earlyexit_cifar10",
    "spectformer_cifar10": "spectformer_cifar10",
    "fixedpoint_cifar10": "fixedpoint_cifar10",
    "diffusion_cifar10": "diffusion_cifar10",
    "tree_sampling": "tree_sampling",
}
WIDTH = 720  # pixels


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []], help="of pictures")
    parser.add_argument("--keep", action="store_true", help="run nothing")
    options = parser.parse_args()
    for picture, example in PICTURES.items():
        if options.names and picture not in options.names:
            continue
        if not options.keep:
            print(f"{example}.py --quick", flush=True)
            subprocess.run([sys.executable, HERE / f"{example}.py", "--quick"], check=True)
        source = HERE / "output" / f"{picture}.png"
        if not source.exists():
            print(f"{source.name}: not there")
            continue
        image = Image.open(source).convert("RGB")
        small = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
        target = HERE.parent / "docs" / "images" / f"example_{picture}.png"
        small.quantize(64).save(target, optimize=True)
        print(f"{target.name}: {target.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
