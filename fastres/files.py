"""files: a file that is written is there whole, or not at all; who else may write it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # not a POSIX system: nobody is kept out
    fcntl = None  # type: ignore[assignment]


def write(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, whenever the program stops.

    Args:
        path: The file; its folder must be there.
        content: Text, stored as UTF-8, or bytes.

    Raises:
        OSError: If it cannot be written, with its name; a file that was there stays as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    with _named(path):
        _write(path, data)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let errors name this file: that of a full disk names none, others one that nobody knows."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: Path, data: bytes) -> None:
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # also where the power fails
        os.chmod(scratch, 0o644)  # mkstemp makes it 0600
        os.replace(scratch, path)
    except BaseException:  # also Ctrl-C
        os.unlink(scratch)
        raise


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder inside the `with` block, or until the process ends.

    Raises:
        ValueError: If another one is in it.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, f"report: out must be used by one run at a time, got {folder}")
        yield
    finally:
        os.close(handle)


@contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Keep other runs from a checkpoint inside the `with` block, or until the process ends.

    Others may be at work on the files beside it. What is left of the lock after a kill -9 keeps
    nobody out.

    Raises:
        OSError: If its folder cannot be written to.
        ValueError: If another one has it.
    """
    if fcntl is None:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    with _named(path):
        handle = _open_locked(
            lock, f"train: checkpoint must be used by one run at a time, got {path}"
        )
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _open_locked(lock: Path, refusal: str) -> int:
    """Make a file, or take one that is there, and lock it."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, refusal)
            if os.fstat(handle).st_nlink:
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the run that had it has removed it since


def _lock(handle: int, refusal: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(refusal) from None
