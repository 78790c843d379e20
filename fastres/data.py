"""data: digits, MNIST and CIFAR-10 as standardised tensors."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastres.formats import Bytes, DataError, read_cifar_binary, read_cifar_pickle, read_idx

__all__ = ["NAMES", "Data", "DataError", "find_folder", "load", "read"]

_DIGITS: Final = 0xB89DAEA8  # CRC-32 of their pixels and labels, a byte each
Split = tuple[Bytes, Bytes]  # images [N, C, H, W], labels [N]


@dataclass(frozen=True)
class Data:
    """One data set, standardised by the mean and deviation of its training images per channel."""

    name: str
    classes: int
    train_x: Tensor  # [N, C, H, W] float32
    train_y: Tensor  # [N] int64
    test_x: Tensor  # [M, C, H, W] float32
    test_y: Tensor  # [M] int64

    @property
    def features(self) -> int:
        """Numbers per sample, C * H * W."""
        return self.train_x[0].numel()

    def checksum(self) -> str:
        """CRC-32 of all four tensors, in hexadecimal: equal data, equal checksum."""
        crc = 0
        for tensor in (self.train_x, self.train_y, self.test_x, self.test_y):
            crc = zlib.crc32(tensor.contiguous().numpy().data, crc)
        return f"{crc:08x}"


def load(name: str, root: str | Path | None = None) -> Data:
    """Load a data set.

    Args:
        name: digits (inside scikit-learn), mnist (IDX files in MNIST/raw under root) or cifar10
            (cifar-10-batches-bin or cifar-10-batches-py under root).
        root: Folder of the files; the environment variable FASTRES_DATA if None.

    Returns:
        The data set; equal tensors in every call.

    Raises:
        TypeError: If name is not a string, or root is neither a path nor None.
        ValueError: If the name is not known, or mnist or cifar10 has no root.
        FileNotFoundError: If a file is missing.
        DataError: If a file breaks its format.
        ModuleNotFoundError: If digits are asked for without scikit-learn.
    """
    train, test = read(name, root)
    mean, scale = _moments(train[0])
    return Data(
        name,
        10,
        _standardised(train[0], mean, scale),
        torch.from_numpy(train[1].astype(np.int64)),
        _standardised(test[0], mean, scale),
        torch.from_numpy(test[1].astype(np.int64)),
    )


def read(name: str, root: str | Path | None = None) -> tuple[Split, Split]:
    """Read a data set as its files have it: arguments and errors as in `load`.

    Returns:
        The training and the test half, each images [N, C, H, W] and labels [N], uint8.
    """
    if not isinstance(name, str):
        raise TypeError(f"data: name must be a str, got {type(name).__name__}")
    if not (root is None or isinstance(root, str | Path)):
        raise TypeError(f"data: root must be a str, a Path or None, got {type(root).__name__}")
    if name not in _READERS:
        raise ValueError(f"data: name must be one of {', '.join(NAMES)}, got {name!r}")
    return _READERS[name](root)


def find_folder(name: str, root: str | Path | None = None) -> Path:
    """Find the folder of the files: root, or else the variable FASTRES_DATA.

    Raises:
        ValueError: If there is neither, with the name of the data set that needs it.
        FileNotFoundError: If it is no folder.
    """
    chosen = root if root is not None else os.environ.get("FASTRES_DATA")
    if not chosen:
        raise ValueError(
            f"data: {name} needs its folder in --data-root or the variable FASTRES_DATA, got none"
        )
    path = Path(chosen)
    if not path.is_dir():
        raise FileNotFoundError(f"data: --data-root must be a folder, got {path}")
    return path


def _moments(images: Bytes) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, [C, 1, 1] each; a constant channel scales by 1."""
    floats = torch.from_numpy(images).float()
    variance, mean = torch.var_mean(floats, dim=(0, 2, 3), correction=0)  # sums in float64
    scale = variance.sqrt()
    scale[scale == 0] = 1
    return mean[:, None, None], scale[:, None, None]


def _standardised(images: Bytes, mean: Tensor, scale: Tensor) -> Tensor:
    return torch.from_numpy(images).float().sub_(mean).div_(scale)


def _digits(_root: str | Path | None) -> tuple[Split, Split]:
    """The 1797 digits of scikit-learn, 8 by 8; a fixed fifth of each class is held out."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "data: digits need scikit-learn: pip install 'fastres[demo]'"
        ) from None
    images, labels = _checked_digits(load_digits)
    held_out = np.zeros(len(labels), bool)
    # RandomState: its stream is frozen, so the split is the same under every numpy
    random = np.random.RandomState(0)
    for digit in range(10):
        members = random.permutation(np.flatnonzero(labels == digit))
        held_out[members[: round(len(members) / 5)]] = True
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def _checked_digits(load_digits: Callable[..., tuple[NDArray[np.float64], ...]]) -> Split:
    """Read scikit-learn's file, and see that the values are those that it has always had."""
    file = Path(str(resources.files("sklearn.datasets.data") / "digits.csv.gz"))
    rule = "must be scikit-learn's 1797 digits"
    try:
        given = load_digits(return_X_y=True)
        with np.errstate(invalid="ignore"):
            images, labels = (values.astype(np.uint8) for values in given)
        exact = all((a == b).all() for a, b in zip(given, (images, labels), strict=True))
    except Exception as error:  # of gzip, of a number that is none
        raise DataError(file, rule, str(error)[:200] or type(error).__name__) from error
    found = zlib.crc32(labels.tobytes(), zlib.crc32(images.tobytes()))
    if not exact or found != _DIGITS:
        raise DataError(file, rule, f"other values, of checksum {found:08x}")
    return images.reshape(-1, 1, 8, 8), labels


def _mnist(root: str | Path | None) -> tuple[Split, Split]:
    folder = find_folder("mnist", root) / "MNIST" / "raw"
    return _mnist_split(folder, "train"), _mnist_split(folder, "t10k")


def _mnist_split(folder: Path, split: str) -> Split:
    image_file = _plain_or_gzip(folder / f"{split}-images-idx3-ubyte")
    label_file = _plain_or_gzip(folder / f"{split}-labels-idx1-ubyte")
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if images.shape[1:] != (28, 28):
        raise DataError(image_file, "images must be 28 x 28", list(images.shape[1:]))
    if len(labels) != len(images):
        raise DataError(label_file, f"must hold {len(images)} labels", len(labels))
    return images[:, None], _checked_labels(labels, label_file)


def _plain_or_gzip(path: Path) -> Path:
    """The file as it is, or compressed; FileNotFoundError names both."""
    packed = path.with_name(path.name + ".gz")
    for candidate in (packed, path):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"data: there must be a file {packed} or {path.name} beside it")


def _cifar10(root: str | Path | None) -> tuple[Split, Split]:
    """Whatever training batches are there, one at least, and the test batch."""
    base = find_folder("cifar10", root)
    folders = (base / "cifar-10-batches-bin", base / "cifar-10-batches-py")
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"data: there must be a folder {folders[0]} or {folders[1].name}")
    binary = folder is folders[0]
    read, suffix = (read_cifar_binary, ".bin") if binary else (read_cifar_pickle, "")
    paths = [folder / f"data_batch_{i}{suffix}" for i in range(1, 6)]
    present = [path for path in paths if path.is_file()]
    if not present:
        raise FileNotFoundError(f"data: there must be at least one batch, such as {paths[0]}")
    test = folder / f"test_batch{suffix}"
    if not test.is_file():
        raise FileNotFoundError(f"data: there must be a file {test}")
    batches = [_cifar_batch(read, path) for path in present]
    images = np.concatenate([b[0] for b in batches])
    labels = np.concatenate([b[1] for b in batches])
    return (images, labels), _cifar_batch(read, test)


def _cifar_batch(read: Callable[[Path], Split], path: Path) -> Split:
    images, labels = read(path)
    return images, _checked_labels(labels, path)


def _checked_labels(labels: Bytes, path: Path) -> Bytes:
    if labels.max() > 9:
        raise DataError(path, "labels must be 0 to 9", labels.max())
    return labels


_READERS: Final = {"digits": _digits, "mnist": _mnist, "cifar10": _cifar10}
NAMES: Final = tuple(_READERS)
