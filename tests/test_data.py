"""Claims about fastres.data: the sets it loads, how it splits and scales them, what it refuses."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fastres.data import Data, DataError, load

ROOT = os.environ.get("FASTRES_DATA")
needs_files = pytest.mark.skipif(not ROOT, reason="FASTRES_DATA is not set")


def idx(*shape: int, values: bytes) -> bytes:
    return gzip.compress(struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape) + values)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """MNIST/raw with five training and three test images."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 5), ("t10k", 3)):
        pixels = bytes(i % 251 for i in range(count * 28 * 28))
        (raw / f"{split}-images-idx3-ubyte.gz").write_bytes(idx(count, 28, 28, values=pixels))
        (raw / f"{split}-labels-idx1-ubyte.gz").write_bytes(idx(count, values=bytes(range(count))))
    return raw


def mnist(raw: Path) -> Data:
    return load("mnist", raw.parent.parent)


def test_digits_are_split_alike_every_time_and_stratified():
    first, second = load("digits"), load("digits")
    assert len(first.train_x) + len(first.test_x) == 1797
    assert torch.equal(first.train_x, second.train_x)
    assert torch.equal(first.test_y, second.test_y)
    assert first.features == 64
    per_class = first.test_y.bincount(minlength=10)
    assert per_class.min() >= 34
    assert per_class.max() <= 37


def test_no_digit_is_in_both_halves_of_the_split():
    digits = load("digits")
    joined = torch.cat([digits.train_x, digits.test_x]).flatten(1)
    assert len(joined.unique(dim=0)) == 1797  # scikit-learn's 1797 images all differ


def test_training_images_have_mean_0_and_deviation_1():
    x = load("digits").train_x
    assert x.dtype == torch.float32
    assert x.mean().abs() < 1e-6
    assert (x.std(correction=0) - 1).abs() < 1e-6


@needs_files
def test_the_official_mnist_files_are_read():
    loaded = load("mnist", ROOT)
    assert loaded.train_x.shape == (60_000, 1, 28, 28)
    assert loaded.train_y.bincount().tolist()[:3] == [5923, 6742, 5958]  # as published
    assert len(loaded.test_x) == 10_000


@needs_files
def test_the_official_cifar_test_batch_has_1000_images_per_class():
    loaded = load("cifar10", ROOT)
    assert loaded.test_x.shape == (10_000, 3, 32, 32)
    assert loaded.test_y.bincount().tolist() == [1000] * 10
    assert loaded.train_x.mean(dim=(0, 2, 3)).abs().max() < 1e-5


def test_an_unknown_name_is_named():
    with pytest.raises(ValueError, match="name must be one of digits, mnist, cifar10, got 'svhn'"):
        load("svhn")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["x"],), "data: name must be a str, got list"),
        (("mnist", 3), "data: root must be a str, a Path or None, got int"),
        (("digits", b"x"), "data: root must be a str, a Path or None, got bytes"),
    ],
)
def test_an_argument_of_a_wrong_type_is_named(arguments, message):
    with pytest.raises(TypeError, match=message):
        load(*arguments)


def test_data_of_one_shape_and_other_content_have_another_checksum(raw):
    first = mnist(raw)
    assert mnist(raw).checksum() == first.checksum()
    pixels = bytes(i % 249 for i in range(5 * 28 * 28))
    (raw / "train-images-idx3-ubyte.gz").write_bytes(idx(5, 28, 28, values=pixels))
    assert mnist(raw).checksum() != first.checksum()


def test_a_set_of_files_needs_a_root(monkeypatch):
    monkeypatch.delenv("FASTRES_DATA", raising=False)
    with pytest.raises(ValueError, match="mnist needs its folder in --data-root"):
        load("mnist")


def test_the_root_comes_from_the_environment(raw, monkeypatch):
    monkeypatch.setenv("FASTRES_DATA", str(raw.parent.parent))
    assert len(load("mnist").train_x) == 5


def test_a_root_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be a folder, got .*nowhere"):
        load("mnist", tmp_path / "nowhere")


def test_idx_files_are_read_packed_and_plain(raw):
    packed = mnist(raw)
    assert packed.train_x.shape == (5, 1, 28, 28)
    assert packed.train_y.tolist() == [0, 1, 2, 3, 4]
    for file in list(raw.iterdir()):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    assert torch.equal(mnist(raw).train_x, packed.train_x)


def test_a_missing_idx_file_is_named(raw):
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte"):
        mnist(raw)


def test_images_of_another_size_are_refused(raw):
    file = raw / "train-images-idx3-ubyte.gz"
    file.write_bytes(idx(5, 28, 27, values=bytes(5 * 28 * 27)))
    with pytest.raises(DataError, match=r"train-images.* must be 28 x 28, got \[28, 27\]"):
        mnist(raw)


def test_labels_must_be_as_many_as_images_and_below_10(raw):
    file = raw / "train-labels-idx1-ubyte.gz"
    file.write_bytes(idx(4, values=bytes(4)))
    with pytest.raises(DataError, match=r"train-labels.* must hold 5 labels, got 4"):
        mnist(raw)
    file.write_bytes(idx(5, values=bytes([0, 1, 2, 3, 10])))
    with pytest.raises(DataError, match=r"train-labels.* labels must be 0 to 9, got 10"):
        mnist(raw)


def cifar(root: Path, last_label: int) -> np.ndarray:
    """Write one training and the test batch of the binary layout; return the training records."""
    records = np.random.default_rng(0).integers(0, 256, (10_000, 3073), np.uint8)
    records[:, 0] = np.arange(10_000) % 10
    records[-1, 0] = last_label
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    for name in ("data_batch_3.bin", "test_batch.bin"):
        (folder / name).write_bytes(records.tobytes())
    return records


def test_cifar_is_standardised_per_channel_whatever_batches_are_there(tmp_path):
    green = cifar(tmp_path, 9)[:, 1 + 1024 : 1 + 2048].astype(np.float64)
    loaded = load("cifar10", tmp_path)
    expected = (green[7, 33] - green.mean()) / green.std()
    assert loaded.train_x[7, 1, 1, 1].item() == pytest.approx(expected, rel=1e-5)


def test_a_cifar_label_above_9_is_refused(tmp_path):
    cifar(tmp_path, last_label=77)
    with pytest.raises(DataError, match=r"data_batch_3.bin: labels must be 0 to 9, got 77"):
        load("cifar10", tmp_path)


def test_missing_cifar_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-bin or cifar-10-batches-py"):
        load("cifar10", tmp_path)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"at least one batch, such as .*data_batch_1.bin"):
        load("cifar10", tmp_path)
    (folder / "data_batch_3.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"must be a file .*test_batch.bin"):
        load("cifar10", tmp_path)
