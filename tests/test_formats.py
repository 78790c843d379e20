"""Claims about fastres.formats: what is read, and what is said about a file that is wrong."""

import gzip
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastres.formats import DataError, read_cifar_binary, read_cifar_pickle, read_idx


def idx(*shape: int, values: bytes | None = None, magic: int | None = None) -> bytes:
    body = bytes(int(np.prod(shape))) if values is None else values
    code = 0x800 + len(shape) if magic is None else magic
    return struct.pack(f">I{len(shape)}I", code, *shape) + body


@pytest.fixture(params=["images.gz", "images"])
def file(request, tmp_path: Path) -> Path:
    return tmp_path / request.param


def write(file: Path, content: bytes) -> None:
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def test_idx_values_come_in_the_stated_shape(file):
    write(file, idx(2, 3, 4, values=bytes(range(24))))
    assert np.array_equal(read_idx(file, 3), np.arange(24).reshape(2, 3, 4))


BAD_IDX = {
    "magic number must be 0x00000803, got 0x00000801": idx(5, 28, 28, magic=0x801),
    "magic number must be 0x00000803, got 0x": b"",
    "header must have 16 bytes, got 10": idx(5, 28, 28)[:10],
    "must hold 3920 values for shape [5, 28, 28], got 3919": idx(5, 28, 28)[:-1],
    "must hold 3920 values for shape [5, 28, 28], got more": idx(5, 28, 28) + b"0",
    "must hold 1 to 1073741824 values, got shape [0, 28, 28]": idx(0, 28, 28),
    "must hold 1 to 1073741824 values, got shape [4294967295, 28, 28]": idx(
        2**32 - 1, 28, 28, values=b""
    ),
    # says 1 GiB and has two bytes: memory follows what is there
    "must hold 1073741824 values for shape [1048576, 32, 32], got 2": idx(
        2**20, 32, 32, values=b"ab"
    ),
}


@pytest.mark.parametrize("message", BAD_IDX)
def test_a_wrong_idx_file_is_refused_with_name_rule_and_value(file, message):
    write(file, BAD_IDX[message])
    with pytest.raises(DataError, match=re.escape(f"{file}: {message}") + "$"):
        read_idx(file, 3)


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_a_damaged_gzip_file_is_refused_with_its_name(tmp_path, damage):
    file = tmp_path / "images.gz"
    content = bytearray(gzip.compress(idx(5, 28, 28)))
    if damage == "flipped":
        content[-6] ^= 0xFF  # in the checksum
    file.write_bytes({"cut": content[:-10], "not gzip": b"text"}.get(damage, content))
    with pytest.raises(DataError, match=r"images.gz: must be an? \w+ gzip file, got "):
        read_idx(file, 3)


# the official CIFAR-10 files hold 10,000 images each, so these do too


@pytest.fixture(scope="module")
def records() -> np.ndarray:
    records = np.random.default_rng(0).integers(0, 256, (10_000, 3073), np.uint8)
    records[:, 0] = np.arange(10_000) % 10
    return records


def batch(records: np.ndarray, **changes: object) -> dict[bytes, object]:
    content = {"data": records[:, 1:].copy(), "labels": records[:, 0].tolist(), "batch_label": b"x"}
    return {key.encode(): value for key, value in {**content, **changes}.items()}


@pytest.mark.parametrize("protocol", [2, 4])  # 2 is that of the official files
def test_both_cifar_layouts_hold_the_same_images(tmp_path, records, protocol):
    binary, python = tmp_path / "data_batch_1.bin", tmp_path / "data_batch_1"
    binary.write_bytes(records.tobytes())
    python.write_bytes(pickle.dumps(batch(records), protocol=protocol))
    images, labels = read_cifar_binary(binary)
    assert images.shape == (10_000, 3, 32, 32)
    assert labels[:11].tolist() == [*range(10), 0]
    assert images[7, 1, 2, 3] == records[7, 1 + 1024 + 2 * 32 + 3]  # channels, rows, columns
    unpickled = read_cifar_pickle(python)
    assert np.array_equal(unpickled[0], images)
    assert np.array_equal(unpickled[1], labels)


@pytest.mark.parametrize("size", [0, 3073, 30_726_927, 30_730_001])
def test_a_binary_cifar_file_of_another_size_is_refused(tmp_path, size):
    file = tmp_path / "test_batch.bin"
    file.touch()
    os.truncate(file, size)
    with pytest.raises(DataError, match=f"test_batch.bin: must have 30730000 bytes, got {size}"):
        read_cifar_binary(file)


class Hostile:
    """Pickles to a call of any function with any arguments."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.system, eval, np.load, np.ndarray, getattr])
def test_a_pickle_cannot_call_anything(tmp_path, function, protocol):
    witness, file = tmp_path / "ran", tmp_path / "data_batch_3"
    bomb = Hostile(function, f"touch {witness}")
    file.write_bytes(pickle.dumps({b"data": bomb, b"labels": []}, protocol=protocol))
    with pytest.raises(DataError, match="data_batch_3: must be a pickle of plain arrays, got "):
        read_cifar_pickle(file)
    assert not witness.exists()


def test_the_same_pickle_does_run_a_command_in_the_ordinary_unpickler(tmp_path):
    witness = tmp_path / "ran"
    pickle.loads(pickle.dumps(Hostile(os.system, f"touch {witness}")))
    assert witness.exists()  # else the test above would prove nothing


def test_an_array_of_a_claimed_size_is_not_allocated(tmp_path):
    file = tmp_path / "data_batch_1"
    array = Hostile(np.empty(0, np.uint8).__reduce__()[0], np.ndarray, (2**40,), b"b")
    file.write_bytes(pickle.dumps({b"data": array, b"labels": []}, protocol=2))
    with pytest.raises(DataError, match="got an array that does not start empty"):
        read_cifar_pickle(file)


def test_a_huge_pickle_is_not_read(tmp_path):
    file = tmp_path / "data_batch_1"
    file.touch()
    os.truncate(file, 2**40)  # sparse: takes no space
    with pytest.raises(DataError, match=f"must have at most 67108864 bytes, got {2**40}"):
        read_cifar_pickle(file)


BAD_PICKLES = {
    "must be a pickle of plain arrays, got": lambda r: pickle.dumps(batch(r))[:-400],
    "got the forbidden name": lambda r: pickle.dumps(batch(r, data=np.float64(3))),
    "instead of u1": lambda r: pickle.dumps(batch(r, data=np.zeros(3)), protocol=2),
    "must hold a dict, got list": lambda _: pickle.dumps([1]),
    r"data must be .* got \(9999, 3072\)": lambda r: pickle.dumps(batch(r[1:]), protocol=2),
    "data must be .* got NoneType": lambda _: pickle.dumps({}),
    "labels must be a list of 10000, got 1$": lambda r: pickle.dumps(
        batch(r, labels=[1]), protocol=2
    ),
    "labels must be integers from 0 to 255, got -1": lambda r: pickle.dumps(
        batch(r, labels=[-1] * 10_000), protocol=2
    ),
}


@pytest.mark.parametrize("message", BAD_PICKLES)
def test_a_wrong_pickle_is_refused_with_name_rule_and_value(tmp_path, records, message):
    file = tmp_path / "data_batch_1"
    file.write_bytes(BAD_PICKLES[message](records))
    with pytest.raises(DataError, match=f"data_batch_1: .*{message}"):
        read_cifar_pickle(file)


class Built:
    """Pickles to a call of any function with any arguments, and any state for what it returns."""

    def __init__(self, function: object, arguments: tuple[object, ...], state: object) -> None:
        self.call = (function, arguments, state)

    def __reduce__(self) -> tuple[object, tuple[object, ...], object]:
        return self.call


def unpickled_state(target: str, state: object) -> bytes:
    """A batch whose dtype or array is given a state of the file's choice."""
    kind = Built(np.dtype, ("u1", False, True), state if target == "dtype" else DTYPE)
    good = (1, (10_000, 3072), kind, False, bytes(10_000 * 3072))
    made = (np.ndarray, (0,), b"b")
    array = Built(np.empty(0, np.uint8).__reduce__()[0], made, state if target != "dtype" else good)
    return pickle.dumps({b"data": array, b"labels": [0] * 10_000}, protocol=2)


DTYPE = (3, "|", None, None, None, -1, -1, 0)
KIND = Built(np.dtype, ("u1", False, True), DTYPE)
BAD_STATES = {
    "a dtype state other than": ("dtype", (*DTYPE[:-1], 2)),
    "a dtype state other": ("dtype", 5),
    "an array state of \\['int', 'tuple', '_Dtype', 'bool', 'list'\\]": (
        "array",
        (1, (10_000, 3072), KIND, False, [1] * 10),
    ),
    "an array state of no tuple": ("array", [1]),
    "an array state of \\['int', 'int', '_Dtype', 'bool', 'bytes'\\]": (
        "array",
        (1, 3, KIND, False, b"abc"),
    ),
    "an array of 3 bytes for shape \\[10000, 3072\\]": (
        "array",
        (1, (10_000, 3072), KIND, False, b"abc"),
    ),
    "an array of shape \\(-1, -3\\)": ("array", (1, (-1, -3), KIND, False, b"abc")),
    "an array of shape \\('x', list\\)": ("array", (1, ("x", []), KIND, False, b"abc")),
    "an array of shape \\(1, 1, ": ("array", (1, (1,) * 33, KIND, False, b"a")),
}


@pytest.mark.parametrize("message", BAD_STATES)
def test_a_false_state_is_refused_with_what_it_is(tmp_path, message):
    file = tmp_path / "data_batch_1"
    file.write_bytes(unpickled_state(*BAD_STATES[message]))
    with pytest.raises(DataError, match=f"data_batch_1: must be a pickle of .*, got {message}"):
        read_cifar_pickle(file)


def test_a_state_that_crashes_numpy_is_an_error_like_any_other(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    kind = Built(np.dtype, ("u1", False, True), (*DTYPE[:-1], 2))  # says that it holds pointers
    made = np.empty(0, np.uint8).__reduce__()[0], (np.ndarray, (0,), b"b")
    data = Built(*made, (1, (10_000, 3072), kind, False, [1] * 10))
    for name in ("data_batch_1", "test_batch"):
        content = pickle.dumps({b"data": data, b"labels": [0] * 10_000}, protocol=2)
        (folder / name).write_bytes(content)
    program = f"from fastres import data; data.load('cifar10', {str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1  # a signal would be negative
    assert "DataError" in done.stderr


BOMBS = {
    "the memo index 4294967295": b"\x80\x02}r\xff\xff\xff\xff.",
    "more than 100 tuples": b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.",  # hashed: deep
    "a set": b"\x80\x04\x8f.",
    "expected .* bytes in a bytearray8, but only 1 remain": b"\x80\x05\x96"
    + b"\0" * 5
    + b"\1\0\0.",
    "a state for a function": b"\x80\x02c_codecs\nencode\n}b.",
    "an array of type list instead of u1": b"\x80\x02cnumpy\ndtype\n]\x89\x88\x87R.",
}


@pytest.mark.parametrize("message", BOMBS)
def test_a_small_file_cannot_take_memory_or_stack(tmp_path, message):
    file = tmp_path / "data_batch_1"
    file.write_bytes(BOMBS[message])
    with pytest.raises(DataError, match=f"must be a pickle of plain arrays, got {message}"):
        read_cifar_pickle(file)


def test_a_label_of_any_kind_is_refused_in_few_words(tmp_path, records):
    file = tmp_path / "data_batch_1"
    for label, found in ((10**5000, "int"), ([[[]]], "list"), (True, "True"), (b"x" * 99, "b'xxx")):
        content = batch(records, labels=[label] * 10_000)
        file.write_bytes(pickle.dumps(content, protocol=4 if label is True else 2))
        with pytest.raises(DataError, match=f"labels must be integers .*, got {found}"):
            read_cifar_pickle(file)


def test_names_beside_the_data_do_no_harm(tmp_path, records):
    file = tmp_path / "data_batch_1"
    names = [b"%d.png" % i for i in range(10_000)]  # one tuple each in protocol 2
    file.write_bytes(pickle.dumps(batch(records, filenames=names), protocol=2))
    assert read_cifar_pickle(file)[1][:3].tolist() == [0, 1, 2]


def test_an_array_stored_by_columns_is_the_same_array(tmp_path, records):
    file = tmp_path / "data_batch_1"
    file.write_bytes(pickle.dumps(batch(records, data=np.asfortranarray(records[:, 1:])), 2))
    assert np.array_equal(read_cifar_pickle(file)[0].reshape(10_000, -1), records[:, 1:])


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_mutated_pickle_is_read_or_refused_and_never_worse(tmp_path, protocol):
    random, file = np.random.default_rng(protocol), tmp_path / "data_batch_1"
    small = {"data": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": [1, 2, 3]}
    whole = pickle.dumps(small, protocol=protocol)
    for _ in range(300):
        content = bytearray(whole)
        for place in random.integers(0, len(content), random.integers(1, 4)):
            content[place] = random.integers(0, 256)
        file.write_bytes(content)
        with pytest.raises(DataError, match="data_batch_1: "):  # at best, of a wrong shape
            read_cifar_pickle(file)


@pytest.mark.parametrize("read", [read_cifar_binary, read_cifar_pickle, lambda p: read_idx(p, 3)])
def test_what_is_no_file_is_refused(tmp_path, read):
    with pytest.raises(DataError, match=f"{tmp_path}: must be a file, got a folder"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opened, it would be waited for
    with pytest.raises(DataError, match="pipe: must be a file, got a special file"):
        read(tmp_path / "pipe")
