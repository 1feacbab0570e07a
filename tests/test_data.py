"""The CIFAR-10 loader: what it reads, what it refuses, and where it looks."""

import doctest
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastcifar.data as data
from fastcifar.data import CLASSES, FOLDER, RECORD, SAMPLE, SPLITS, cifar10, normalize


def records(per_class, seed=0):
    """A balanced split of random images in shuffled order, as the bytes of its files should read: uint8 [N, 3073]."""
    rng = np.random.default_rng(seed)
    out = rng.integers(0, 256, (per_class * 10, RECORD), np.uint8)
    out[:, 0] = rng.permutation(np.arange(len(out)) % 10)
    return out


@pytest.fixture
def full(tmp_path):
    """A small full set, 50 training images and 20 for testing; the folder of its files."""
    return write_full(tmp_path / "set")


def write_full(root):
    folder = root / FOLDER
    folder.mkdir(parents=True)
    for i, part in enumerate(np.split(records(5), 5), start=1):
        (folder / f"data_batch_{i}.bin").write_bytes(part.tobytes())
    (folder / "test_batch.bin").write_bytes(records(2, seed=1).tobytes())
    return folder


def run_main(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "fastcifar.data", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(data.REPOSITORY), *sys.path]))},
    )


# What it reads


def test_sample_is_what_its_bytes_say():
    images, labels = cifar10(SAMPLE, "test")
    raw = (SAMPLE / FOLDER / "test_batch.bin").read_bytes()
    assert images.shape == (1000, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [100] * 10
    assert torch.cat([labels[:, None].byte(), images.flatten(1)], 1).numpy().tobytes() == raw
    # One pixel by the layout of the binary version: record 7, blue, row 3, column 5.
    assert images[7, 2, 3, 5] == raw[7 * 3073 + 1 + 2 * 1024 + 3 * 32 + 5]
    # Pictures, not noise: a pixel resembles its neighbours (16.1 and 14.5 of 255; as row, column, channel 35 and 29).
    x = images.float()
    assert 14 < x.diff(dim=2).abs().mean() < 20
    assert 14 < x.diff(dim=3).abs().mean() < 20
    assert labels[:100].bincount(minlength=10).min() > 0  # interleaved
    assert (SAMPLE / FOLDER / "batches.meta.txt").read_text().split() == list(CLASSES)


def test_round_trip_of_both_splits_and_no_copy(full):
    for split, expected in (("train", records(5)), ("test", records(2, seed=1))):
        images, labels = cifar10(full.parent, split)
        assert np.array_equal(labels.numpy(), expected[:, 0])
        assert np.array_equal(images.numpy().reshape(-1, RECORD - 1), expected[:, 1:])
        assert images.stride() == (RECORD, 1024, 32, 1)
        assert images[0].is_contiguous()


def test_root_may_be_the_folder_itself_or_a_string(full):
    expected = cifar10(full.parent)
    renamed = full.rename(full.parent / "any name")
    for root in (renamed, str(renamed)):
        assert all(map(torch.equal, cifar10(root), expected))


def test_normalize():
    images, _ = cifar10(SAMPLE, "test")
    out = normalize(images)
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    exact = (images.double() / 255 - torch.tensor(data.MEAN, dtype=torch.float64)[:, None, None]) / torch.tensor(
        data.STD, dtype=torch.float64
    )[:, None, None]
    torch.testing.assert_close(normalize(images, torch.float64), exact, rtol=0, atol=1e-14)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6)
    assert torch.equal(normalize(images, torch.bfloat16), out.bfloat16())
    assert out.mean((0, 2, 3)).abs().max() < 0.1
    assert (out.std((0, 2, 3)) - 1).abs().max() < 0.1
    assert torch.equal(normalize(images[3]), out[3])
    with pytest.raises(TypeError, match=r"uint8 images, got torch\.float32"):
        normalize(images.float())


def test_docstring_example():
    assert doctest.testmod(data).failed == 0


# What it refuses


@pytest.mark.parametrize("split", ["valid", "TRAIN", "", None, ["test"]])
def test_unknown_split(split):
    with pytest.raises(ValueError, match="expected split to be 'train' or 'test', got " + re.escape(repr(split))):
        cifar10(SAMPLE, split)


@pytest.mark.parametrize("name", ["data_batch_1.bin", "data_batch_4.bin", "test_batch.bin"])
@pytest.mark.parametrize("cut", [1, 1000, RECORD - 1, RECORD + 1])
def test_truncated(full, name, cut):
    path = full / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    rest = -cut % RECORD
    with pytest.raises(ValueError, match=rf"{name} is truncated.* and {rest:,} bytes more, {RECORD - rest:,} short"):
        cifar10(full, "test" if name == "test_batch.bin" else "train")


@settings(max_examples=50, deadline=None)
@given(size=st.integers(0, 40 * RECORD))
def test_any_other_size_is_refused(tmp_path_factory, size):
    path = tmp_path_factory.mktemp("any") / "test_batch.bin"
    with path.open("wb") as file:
        file.truncate(size)  # zeros, so a whole number of records is refused for its classes
    with pytest.raises(ValueError, match=r"test_batch\.bin"):
        cifar10(path.parent, "test")


@settings(max_examples=50, deadline=None)
@given(record=st.integers(0, 49), label=st.integers(10, 255))
def test_label_that_is_no_class(tmp_path_factory, record, label):
    full = write_full(tmp_path_factory.mktemp("label"))
    file, inside = divmod(record, 10)
    path = full / SPLITS["train"][file]
    raw = bytearray(path.read_bytes())
    raw[inside * RECORD] = label
    path.write_bytes(raw)
    where = re.escape(f"{path}: label {label} in record {inside} (byte {inside * RECORD:,})")
    with pytest.raises(ValueError, match=f"{where}.*not CIFAR-10"):
        cifar10(full)


def test_cifar100(full):
    (full / "test_batch.bin").write_bytes(bytes(20 * (RECORD + 1)))
    with pytest.raises(ValueError, match="CIFAR-100"):
        cifar10(full, "test")
    # As many records as make both sizes whole are CIFAR-10 by size, and judged by their labels.
    (full / "test_batch.bin").write_bytes(bytes(RECORD * (RECORD + 1)))
    with pytest.raises(ValueError, match="airplane 3,074, automobile 0"):
        cifar10(full, "test")


@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin"])
def test_empty(full, name):
    (full / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name} is empty"):
        cifar10(full, "test" if name == "test_batch.bin" else "train")


@pytest.mark.parametrize("lost", range(1, 10))
def test_test_file_cut_at_a_record(full, lost):
    path = full / "test_batch.bin"
    path.write_bytes(path.read_bytes()[: -lost * RECORD])
    with pytest.raises(ValueError, match=r"test_batch\.bin: expected as many images of every class, got airplane \d"):
        cifar10(full, "test")


@pytest.mark.parametrize("lost", [1, 3])
def test_training_batch_cut_at_a_record(full, lost):
    path = full / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[: -lost * RECORD])
    with pytest.raises(ValueError, match=rf"equal length, got .*data_batch_3\.bin {10 - lost}, data_batch_4\.bin 10"):
        cifar10(full)


def test_training_batches_all_cut_alike(full):
    for name in SPLITS["train"]:
        (full / name).write_bytes((full / name).read_bytes()[:-RECORD])
    with pytest.raises(ValueError, match="as many images of every class"):
        cifar10(full)


@pytest.mark.parametrize("inside", [False, True])
def test_pickled_version(tmp_path, inside):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"\x80\x02}")
    for split in SPLITS:
        with pytest.raises(ValueError, match=r"pickled Python version.*expected the binary one.*kriz/cifar"):
            cifar10(folder if inside else tmp_path, split)


def test_binary_version_beside_the_pickled_one(full):
    beside = full.parent / "cifar-10-batches-py"
    beside.mkdir()
    (beside / "test_batch").write_bytes(b"\x80\x02}")
    assert len(cifar10(full.parent)[1]) == 50


def test_missing_files(full):
    (full / "data_batch_2.bin").unlink()
    (full / "data_batch_5.bin").unlink()
    (full / "data_batch_5.bin").mkdir()  # a folder is no file
    with pytest.raises(FileNotFoundError, match=r"no data_batch_2\.bin, data_batch_5\.bin in .*kriz/cifar"):
        cifar10(full.parent)
    assert len(cifar10(full.parent, "test")[1]) == 20


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere; get the binary version"):
        cifar10(tmp_path / "nowhere")


# Where it looks


@pytest.fixture
def places(monkeypatch, tmp_path):
    """A repository of its own with a sample in it, and no environment variable; its root."""
    repository = tmp_path / "repository"
    sample = repository / "examples" / "data"
    (sample / FOLDER).mkdir(parents=True)
    (sample / FOLDER / "test_batch.bin").write_bytes(records(1).tobytes())
    monkeypatch.setattr(data, "REPOSITORY", repository)
    monkeypatch.setattr(data, "SAMPLE", sample)
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    return repository


def write_test(root, per_class):
    root.mkdir()
    (root / "test_batch.bin").write_bytes(records(per_class).tobytes())
    return root


def test_order_of_places(places, monkeypatch, tmp_path):
    assert len(cifar10(split="test")[1]) == 10  # the sample
    monkeypatch.setenv("FASTCIFAR_DATA", "")
    assert len(cifar10(split="test")[1]) == 10  # set to nothing is not set
    (places / ".data").symlink_to(write_test(tmp_path / "linked", 2))
    assert len(cifar10(split="test")[1]) == 20
    monkeypatch.setenv("FASTCIFAR_DATA", str(write_test(tmp_path / "named", 3)))
    assert len(cifar10(split="test")[1]) == 30
    assert len(cifar10(write_test(tmp_path / "given", 4), "test")[1]) == 40


def test_data_may_be_a_folder(places):
    write_test(places / ".data", 2)
    assert len(cifar10(split="test")[1]) == 20


def test_sample_has_no_training_images(places):
    for root in (None, data.SAMPLE, data.SAMPLE / FOLDER):
        with pytest.raises(
            FileNotFoundError, match=r"sample holds images of the test split only; get .*make data DATA="
        ):
            cifar10(root)


def test_wrong_place_is_not_replaced_by_the_sample(places, monkeypatch, tmp_path):
    (places / ".data").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"no folder .*\.data \(linked to .*gone\)"):
        cifar10(split="test")
    monkeypatch.setenv("FASTCIFAR_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"nowhere \(from FASTCIFAR_DATA\)"):
        cifar10(split="test")


def test_no_place_at_all(places, monkeypatch):
    monkeypatch.setattr(data, "SAMPLE", places / "not here")
    with pytest.raises(FileNotFoundError, match=r"no root given, and neither .*\.data nor .*not here exists; get"):
        cifar10(split="test")


# The command


def test_command(full):
    done = run_main(full.parent)
    assert done.returncode == 0
    assert done.stdout == ("train: 50 images, 5 of each of 10 classes\ntest: 20 images, 2 of each of 10 classes\n")
    path = full / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    done = run_main(full.parent)
    assert done.returncode == 1
    assert done.stderr.startswith(f"cifar10: {path} is truncated")
    assert "Traceback" not in done.stderr
    assert run_main().returncode == 2
