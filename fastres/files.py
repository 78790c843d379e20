"""files: a file that is written is there whole, or not at all."""

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
        OSError: If the folder cannot be written to; a file that was there stays as it was.
    """
    data = content.encode() if isinstance(content, str) else content
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
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule = "out must be used by one run at a time"
            raise ValueError(f"report: {rule}, got {folder}") from None
        yield
    finally:
        os.close(handle)
