#!/usr/bin/env python3
"""Cut the bundled sample, examples/data, from a full CIFAR-10: ``python examples/make_sample.py ROOT``.

Takes the first 100 test images of every class in the order of the file and shuffles them with a fixed seed, so the
same full set always gives the same bytes.
"""

import sys

import numpy as np
import torch

from fastcifar.data import CLASSES, FOLDER, SAMPLE, cifar10

PER_CLASS = 100


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    images, labels = cifar10(sys.argv[1], "test")
    chosen = torch.cat([(labels == k).nonzero()[:PER_CLASS, 0] for k in range(len(CLASSES))])
    chosen = chosen[np.random.RandomState(0).permutation(len(chosen))]  # NumPy promises never to change this stream
    records = torch.cat([labels[chosen, None].to(torch.uint8), images[chosen].flatten(1)], 1)
    folder = SAMPLE / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test_batch.bin").write_bytes(records.numpy().tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n")
    print(f"{len(records):,} images in {folder}")


if __name__ == "__main__":
    main()
