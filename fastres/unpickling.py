"""unpickling: dicts, lists and uint8 arrays of a pickle, and nothing else, whatever is in it."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

_TUPLES: Final = 100  # an array has 5 or so; hashing nested ones recurses in C, unchecked
_MEMO: Final = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_DIMS: Final = 32  # the most that every NumPy takes
_LIMIT: Final = 1 << 30  # of an extent


def load(content: bytes) -> object:
    """Unpickle without running anything and without handing NumPy a state it would believe.

    Args:
        content: The pickle; byte strings of Python 2 stay bytes.

    Returns:
        Dicts, lists, tuples, texts, numbers, and an `Array` for every uint8 array.

    Raises:
        Exception: Of any kind, if the pickle is damaged, or holds or does anything else.
    """
    _check_opcodes(content)
    return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()


def _check_opcodes(content: bytes) -> None:
    """Refuse, before anything is built, what would take memory or stack that the file does not.

    That a text is as long as it claims, pickletools checks itself.
    """
    tuples, made_tuple = 0, False
    for opcode, value, _ in pickletools.genops(content):
        if opcode.name in _MEMO:
            if isinstance(value, int) and value > len(content):
                raise pickle.UnpicklingError(f"the memo index {brief(value)}")  # allocated up to it
            continue
        if opcode.name in ("EMPTY_SET", "FROZENSET", "ADDITEMS"):
            raise pickle.UnpicklingError("a set")
        tuples += made_tuple and opcode.name != "REDUCE"  # as arguments it is checked, so shallow
        if tuples > _TUPLES:
            raise pickle.UnpicklingError(f"more than {_TUPLES} tuples")
        made_tuple = opcode.name.startswith("TUPLE")


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that knows four names, all bound to stand-ins of this file.

    They are what a pickled uint8 array is made of. Every other name is refused before it is
    imported, so a file can build dicts, lists, strings, numbers and stand-ins, and no more. No
    state of the file reaches an object of NumPy: NumPy believes it, and a false one crashes.
    """

    def find_class(self, module: str, name: str) -> object:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Name(_empty_array)
        allowed = {
            ("numpy", "ndarray"): "ndarray",  # only handed to _reconstruct: not to be called
            ("numpy", "dtype"): _Name(_byte_dtype),
            ("_codecs", "encode"): _Name(_latin1),  # how Python 3 pickles bytes in protocol 2
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"the forbidden name {module}.{name}")
        return allowed[module, name]


class _Name:
    """A function that a file may call; unlike a bare one, it takes no attributes from the file."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, _state: object) -> None:
        raise pickle.UnpicklingError("a state for a function")


class _Dtype:
    """Stands in for the dtype of unsigned bytes."""

    def __setstate__(self, state: object) -> None:
        plain = ("|", None, None, None, -1, -1, 0)  # byte order, no fields, sizes, no flags
        match state:
            case (int(), "|" | b"|", *rest) if tuple(rest) == plain[1:]:
                return
        raise pickle.UnpicklingError(f"a dtype state other than (3, {str(plain)[1:]}")


class Array:
    """Stands in for an array of unsigned bytes, and holds the real one."""

    data: NDArray[np.uint8] = np.empty(0, np.uint8)

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple(shape), _Dtype(), bool(fortran), bytes(raw)):
                self.data = _array(shape, raw, "F" if fortran else "C")
            case _:
                kinds = (
                    [type(v).__name__ for v in state] if isinstance(state, tuple) else "no tuple"
                )
                raise pickle.UnpicklingError(f"an array state of {kinds}"[:200])


def _array(shape: tuple[object, ...], raw: bytes, order: Literal["C", "F"]) -> NDArray[np.uint8]:
    extents = [n for n in shape[:_DIMS] if type(n) is int and 0 <= n <= _LIMIT]
    if len(extents) != len(shape):
        found = ", ".join(map(brief, shape[:_DIMS]))
        raise pickle.UnpicklingError(f"an array of shape ({found})")
    if math.prod(extents) != len(raw):
        raise pickle.UnpicklingError(f"an array of {len(raw)} bytes for shape {extents}")
    return np.frombuffer(raw, np.uint8).reshape(extents, order=order).copy()


def _empty_array(*arguments: object) -> Array:
    if arguments not in (("ndarray", (0,), "b"), ("ndarray", (0,), b"b")):
        raise pickle.UnpicklingError("an array that does not start empty")
    return Array()


def _byte_dtype(code: object, align: object, copy: object) -> _Dtype:
    if code not in ("u1", b"u1") or not isinstance(align, int) or not isinstance(copy, int):
        raise pickle.UnpicklingError(f"an array of type {brief(code)} instead of u1")
    return _Dtype()


def _latin1(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"a string in {brief(encoding)} instead of latin1")
    return text.encode("latin1")


def brief(value: object) -> str:
    """Show a text or a number; all else by its type, as a file can nest lists without end."""
    if isinstance(value, str | bytes):
        return repr(value[:20])
    if isinstance(value, int) and abs(value) < 1 << 64:
        return str(value)
    return type(value).__name__
