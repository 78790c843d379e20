"""formats: the official files of MNIST and CIFAR-10, every rule checked before it is relied on."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

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
        DataError: If the file breaks the format.
    """
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


def read_cifar_binary(path: Path) -> tuple[Bytes, Bytes]:
    """Read one CIFAR-10 file of the binary version: 10,000 times a label and 3072 pixels.

    Returns:
        Images [10000, 3, 32, 32] and labels [10000], both uint8.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If the file does not have the official size.
    """
    size = path.stat().st_size
    official = _CIFAR_IMAGES * (1 + _CIFAR_PIXELS)
    if size != official:
        raise DataError(path, f"must have {official} bytes", size)
    records = np.fromfile(path, np.uint8, official).reshape(_CIFAR_IMAGES, 1 + _CIFAR_PIXELS)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def read_cifar_pickle(path: Path) -> tuple[Bytes, Bytes]:
    """Read one CIFAR-10 file of the python version: a pickled dict of data and labels.

    Nothing in the file is run: see `_ArrayUnpickler`.

    Returns:
        Images [10000, 3, 32, 32] and labels [10000], both uint8.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If the file is not what the official ones are.
    """
    size, limit = path.stat().st_size, 1 << 26  # official: 31 MB
    if size > limit:
        raise DataError(path, f"must have at most {limit} bytes", size)
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # whatever a broken or hostile pickle provokes, it is a bad file
        raise DataError(path, "must be a pickle of plain arrays", error) from None
    if not isinstance(batch, dict):
        raise DataError(path, "must hold a dict", type(batch).__name__)
    data = batch.get(b"data", batch.get("data"))
    labels = batch.get(b"labels", batch.get("labels"))
    shape = (_CIFAR_IMAGES, _CIFAR_PIXELS)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != shape:
        found = getattr(data, "shape", type(data).__name__)
        raise DataError(path, f"data must be a uint8 array of shape {list(shape)}", found)
    if not isinstance(labels, list) or len(labels) != _CIFAR_IMAGES:
        found = len(labels) if isinstance(labels, list) else type(labels).__name__
        raise DataError(path, f"labels must be a list of {_CIFAR_IMAGES}", found)
    wrong = [v for v in labels if type(v) is not int or not 0 <= v <= 255]
    if wrong:
        raise DataError(path, "labels must be integers from 0 to 255", repr(wrong[0])[:40])
    return data.reshape(-1, 3, 32, 32), np.array(labels, np.uint8)


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that knows three names, all bound to functions of this file.

    They are what a pickled uint8 array is made of. Every other name is refused before it is
    imported, so a file can build dicts, lists, strings, numbers and uint8 arrays, and no more.
    """

    def find_class(self, module: str, name: str) -> object:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        allowed = {
            ("numpy", "ndarray"): "ndarray",  # only handed to _reconstruct: not to be called
            ("numpy", "dtype"): _byte_dtype,
            ("_codecs", "encode"): _latin1,  # how Python 3 pickles bytes in protocol 2
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"the forbidden name {module}.{name}")
        return allowed[module, name]


def _empty_array(_subtype: object, _shape: object, _dtype: object) -> Bytes:
    return np.empty(0, np.uint8)  # its shape and bytes follow as state, checked by numpy


def _byte_dtype(code: object, *_flags: object) -> np.dtype[np.uint8]:
    if code not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"an array of type {code!r} instead of u1")
    return np.dtype("u1", False, True)  # a copy: the state that follows is written into it


def _latin1(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"a string in {encoding!r} instead of latin1")
    return text.encode("latin1")
