"""formats: the official files of MNIST and CIFAR-10, every rule checked before it is relied on."""

from __future__ import annotations

import gzip
import stat
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from fastres import unpickling

Bytes = NDArray[np.uint8]

_LIMIT: Final = 1 << 30  # bytes one file may unpack to; the largest official one has 47 MB
_CHUNK: Final = 1 << 20
_CIFAR_IMAGES: Final = 10_000  # in every official CIFAR-10 file
_CIFAR_PIXELS: Final = 3 * 32 * 32


class DataError(ValueError):
    """A data file breaks a rule of its format; the message names file, rule and value."""

    def __init__(self, path: Path, rule: str, value: object) -> None:
        super().__init__(f"{path}: {rule}, got {value}")


def read_idx(path: Path, dims: int) -> Bytes:
    """Read an IDX file of unsigned bytes, plain or gzip (by its name).

    Layout: bytes 0, 0, 8 (unsigned byte), dims; then one big-endian uint32 per dimension; then
    the values, last dimension fastest.

    Args:
        path: The file; gzip if its name ends in .gz.
        dims: Dimensions it must have.

    Returns:
        The values, uint8, in the shape the file states.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If it is no file, or breaks the format.
    """
    _file_size(path)
    try:
        with path.open("rb") as file:
            if path.suffix != ".gz":
                return _parse_idx(file, path, dims)
            with gzip.GzipFile(fileobj=file) as unpacked:
                return _parse_idx(unpacked, path, dims)
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(path, "must be an intact gzip file", error) from None
    except EOFError:
        raise DataError(path, "must be a complete gzip file", "an early end") from None


def _parse_idx(file: BinaryIO | gzip.GzipFile, path: Path, dims: int) -> Bytes:
    magic = file.read(4)
    if magic != bytes([0, 0, 8, dims]):
        raise DataError(path, f"magic number must be 0x{0x800 + dims:08x}", f"0x{magic.hex()}")
    header = file.read(4 * dims)
    if len(header) < 4 * dims:
        raise DataError(path, f"header must have {4 + 4 * dims} bytes", 4 + len(header))
    shape = struct.unpack(f">{dims}I", header)
    size = 1
    for extent in shape:  # Python integers: no overflow
        size *= extent
    if not 0 < size <= _LIMIT:
        raise DataError(path, f"must hold 1 to {_LIMIT} values", f"shape {list(shape)}")
    values = bytearray()
    # in pieces, one byte beyond the end: memory follows what is there, not what the header claims
    while piece := file.read(min(_CHUNK, size + 1 - len(values))):
        values += piece
    if len(values) != size:
        found = f"{len(values)}" if len(values) < size else "more"
        raise DataError(path, f"must hold {size} values for shape {list(shape)}", found)
    return np.frombuffer(values, np.uint8).reshape(shape)


def _file_size(path: Path) -> int:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a folder, or a pipe, which would be waited for
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "a special file"
        raise DataError(path, "must be a file", found)
    return status.st_size


def read_cifar_binary(path: Path) -> tuple[Bytes, Bytes]:
    """Read one CIFAR-10 file of the binary version: 10,000 times a label and 3072 pixels.

    Returns:
        Images [10000, 3, 32, 32] and labels [10000], both uint8.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If it is no file, or not of the official size.
    """
    size = _file_size(path)
    official = _CIFAR_IMAGES * (1 + _CIFAR_PIXELS)
    if size != official:
        raise DataError(path, f"must have {official} bytes", size)
    records = np.fromfile(path, np.uint8, official).reshape(_CIFAR_IMAGES, 1 + _CIFAR_PIXELS)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def read_cifar_pickle(path: Path) -> tuple[Bytes, Bytes]:
    """Read one CIFAR-10 file of the python version: a pickled dict of data and labels.

    Nothing in the file is run, and no state of it reaches NumPy: see `unpickling`.

    Returns:
        Images [10000, 3, 32, 32] and labels [10000], both uint8.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If the file is not what the official ones are.
    """
    size, limit = _file_size(path), 1 << 26  # official: 31 MB
    if size > limit:
        raise DataError(path, f"must have at most {limit} bytes", size)
    content = path.read_bytes()
    try:
        batch = unpickling.load(content)
    except Exception as error:  # whatever a broken or hostile pickle provokes, it is a bad file
        found = str(error)[:200] or type(error).__name__
        raise DataError(path, "must be a pickle of plain arrays", found) from None
    if not isinstance(batch, dict):
        raise DataError(path, "must hold a dict", type(batch).__name__)
    data = batch.get(b"data", batch.get("data"))
    labels = batch.get(b"labels", batch.get("labels"))
    return _checked_images(data, path), _checked_labels(labels, path)


def _checked_images(data: object, path: Path) -> Bytes:
    shape = (_CIFAR_IMAGES, _CIFAR_PIXELS)
    if not isinstance(data, unpickling.Array) or data.data.shape != shape:
        found = data.data.shape if isinstance(data, unpickling.Array) else type(data).__name__
        raise DataError(path, f"data must be a uint8 array of shape {list(shape)}", found)
    return data.data.reshape(-1, 3, 32, 32)


def _checked_labels(labels: object, path: Path) -> Bytes:
    if not isinstance(labels, list) or len(labels) != _CIFAR_IMAGES:
        found = len(labels) if isinstance(labels, list) else type(labels).__name__
        raise DataError(path, f"labels must be a list of {_CIFAR_IMAGES}", found)
    wrong = [v for v in labels if type(v) is not int or not 0 <= v <= 255]
    if wrong:
        raise DataError(path, "labels must be integers from 0 to 255", unpickling.brief(wrong[0]))
    return np.array(labels, np.uint8)
