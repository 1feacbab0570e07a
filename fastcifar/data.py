"""CIFAR-10 as tensors, from the dataset's official binary version; a file that is not whole is refused.

``python -m fastcifar.data ROOT`` checks a full set and prints one line a split, or the error and exit status 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLITS = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
FOLDER = "cifar-10-batches-bin"
RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the pixels as (channel, row, column)
REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE = REPOSITORY / "examples" / "data"  # 1,000 images of the test set, 100 a class

# Per channel over the 50,000 official training images, pixels scaled to [0, 1]: mean and standard deviation.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

HOW_TO_GET = (
    "get the binary version from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and name the folder that "
    f"holds {FOLDER}: `make data DATA=folder`, the environment variable FASTCIFAR_DATA, or the argument root"
)


def cifar10(root: str | os.PathLike[str] | None = None, split: str = "train") -> tuple[Tensor, Tensor]:
    """The images and labels of one split of CIFAR-10.

    The binary layout: five files ``data_batch_{1..5}.bin`` (train) and ``test_batch.bin`` (test), each a run of records
    of 3,073 bytes, one label byte in 0..9 followed by 3,072 pixel bytes in the order channel (red, green, blue), row,
    column. The images are a view of the bytes as read, nothing is copied: each image is contiguous, and one image
    starts 3,073 bytes after the one before it.

    Args:
        root: folder that holds ``cifar-10-batches-bin``, or that folder itself. None: the environment variable
            FASTCIFAR_DATA; else ``.data`` in the repository (what ``make data`` links); else the sample bundled with
            the repository, 1,000 images of the test set (:data:`SAMPLE`).
        split: ``"train"`` (50,000 images in the official files) or ``"test"`` (10,000).

    Returns:
        images: uint8 ``[N, 3, 32, 32]``, 0 to 255.
        labels: int64 ``[N]``, indices into :data:`CLASSES`.

    Raises:
        ValueError: ``split`` is unknown, or a file is not what it should be: empty, truncated, a label above 9, records
            of CIFAR-100, the pickled Python version, training batches of unequal length, classes of unequal size. (Each
            published split has as many images of one class as of another; a test file cut where that still holds
            cannot be told from a smaller set.)
        FileNotFoundError: there is no such folder, or a file of the split is not in it. The sample has no "train".

    Source: Krizhevsky, "Learning multiple layers of features from tiny images", technical report, University of
    Toronto, 2009; https://www.cs.toronto.edu/~kriz/cifar.html, section "Binary version".

    Example:
        >>> from fastcifar.data import CLASSES, SAMPLE, cifar10
        >>> images, labels = cifar10(SAMPLE, "test")
        >>> images.shape, images.dtype, labels.shape, labels.dtype
        (torch.Size([1000, 3, 32, 32]), torch.uint8, torch.Size([1000]), torch.int64)
        >>> labels.bincount().tolist()
        [100, 100, 100, 100, 100, 100, 100, 100, 100, 100]
        >>> CLASSES[labels[0]]
        'truck'
    """
    if split not in tuple(SPLITS):  # a tuple, so that what cannot be hashed is refused as well
        raise ValueError(f"cifar10: expected split to be 'train' or 'test', got {split!r}")
    paths = _find(root, split)
    sizes = [_checked_size(path) for path in paths]
    if len(set(sizes)) > 1:
        listed = ", ".join(f"{path.name} {size // RECORD:,}" for path, size in zip(paths, sizes, strict=True))
        raise ValueError(f"cifar10: {paths[0].parent}: expected batches of equal length, got {listed}: a file is cut")

    buffer = np.empty(sum(sizes), np.uint8)
    view, start = buffer.data, 0
    for path, size in zip(paths, sizes, strict=True):
        with path.open("rb", buffering=0) as file:
            end = start + size
            while start < end:  # one system call reads at most 2 GiB and may return less than was asked
                got = file.readinto(view[start:end])
                if not got:
                    raise ValueError(f"cifar10: {path} ended {end - start:,} bytes early: it changed while it was read")
                start += got

    records = torch.from_numpy(buffer).view(-1, RECORD)
    labels = records[:, 0].long()
    _check_labels(labels, paths, sizes)
    return records[:, 1:].unflatten(1, (3, 32, 32)), labels


def normalize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(images / 255 - mean) / std`` per channel, with the training set's :data:`MEAN` and :data:`STD`.

    Args:
        images: uint8 ``[..., 3, H, W]``, from :func:`cifar10`.
        dtype: floating dtype of the result. bfloat16 and float16 are computed in float32 and rounded once.

    Raises:
        TypeError: ``images`` are not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"normalize: expected uint8 images, got {images.dtype}")
    work = torch.float64 if dtype == torch.float64 else torch.float32
    mean, std = (torch.tensor(values, dtype=work, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return images.to(work).div_(255).sub_(mean).div_(std).to(dtype)


def _find(root: str | os.PathLike[str] | None, split: str) -> list[Path]:
    """The files of a split, all of them there."""
    origin = ""
    if root is None:
        root, origin = _default_root()
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"cifar10: no folder {root}{origin}; {HOW_TO_GET}")
    # The folder itself may be given: then it has the files, whatever its name is.
    folder = root / FOLDER if (root / FOLDER).is_dir() else root
    paths = [folder / name for name in SPLITS[split]]
    missing = [path.name for path in paths if not path.is_file()]
    if not missing:
        return paths
    if split == "train" and folder.resolve() == (SAMPLE / FOLDER).resolve():
        raise FileNotFoundError(f"cifar10: the bundled sample holds images of the test split only; {HOW_TO_GET}")
    pickled = [p for p in (folder / "cifar-10-batches-py", folder) if (p / "test_batch").is_file()]
    if pickled:
        raise ValueError(
            f"cifar10: {pickled[0]}{origin} is the pickled Python version of the set, expected the binary one; "
            f"{HOW_TO_GET}"
        )
    raise FileNotFoundError(f"cifar10: no {', '.join(missing)} in {folder}{origin}; {HOW_TO_GET}")


def _default_root() -> tuple[Path, str]:
    """Where the set is when nobody says, and who said it."""
    if named := os.environ.get("FASTCIFAR_DATA"):
        return Path(named), " (from FASTCIFAR_DATA)"
    link = REPOSITORY / ".data"
    if os.path.lexists(link):  # a dangling link is an error to report, not a reason to use the sample in silence
        return link, f" (linked to {os.readlink(link)})" if link.is_symlink() else ""
    if SAMPLE.is_dir():
        return SAMPLE, ""
    raise FileNotFoundError(f"cifar10: no root given, and neither {link} nor {SAMPLE} exists; {HOW_TO_GET}")


def _checked_size(path: Path) -> int:
    """The size of a file in bytes, a whole number of records."""
    size = path.stat().st_size
    if not size:
        raise ValueError(f"cifar10: {path} is empty")
    whole, rest = divmod(size, RECORD)
    if rest and size % (RECORD + 1) == 0:
        raise ValueError(
            f"cifar10: {path} has {size:,} bytes, a multiple of {RECORD + 1:,} and not of {RECORD:,}: "
            "these are records of CIFAR-100 (two label bytes each), expected CIFAR-10"
        )
    if rest:
        raise ValueError(
            f"cifar10: {path} is truncated or foreign: {size:,} bytes are {whole:,} records of {RECORD:,} bytes and "
            f"{rest:,} bytes more, {RECORD - rest:,} short of another record"
        )
    return size


def _check_labels(labels: Tensor, paths: Sequence[Path], sizes: Sequence[int]) -> None:
    """Every label is a class, and every class has as many images."""
    if labels.max() >= len(CLASSES):
        first = int((labels >= len(CLASSES)).nonzero()[0])
        file, record = divmod(first, sizes[0] // RECORD)
        raise ValueError(
            f"cifar10: {paths[file]}: label {labels[first]} in record {record:,} (byte {record * RECORD:,}), expected "
            f"0 to {len(CLASSES) - 1}: this is not CIFAR-10"
        )
    counts = labels.bincount(minlength=len(CLASSES)).tolist()
    if len(set(counts)) > 1:
        listed = ", ".join(f"{name} {count:,}" for name, count in zip(CLASSES, counts, strict=True))
        where = paths[0] if len(paths) == 1 else paths[0].parent
        raise ValueError(
            f"cifar10: {where}: expected as many images of every class, got {listed}: a file is cut or mixed"
        )


def main(arguments: Sequence[str]) -> int:
    """Checks both splits under a root; what ``make data`` runs. Returns the exit status."""
    if len(arguments) != 1:
        print("usage: python -m fastcifar.data ROOT", file=sys.stderr)
        return 2
    try:
        for split in SPLITS:
            _, labels = cifar10(arguments[0], split)
            print(f"{split}: {len(labels):,} images, {len(labels) // len(CLASSES):,} of each of {len(CLASSES)} classes")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
