"""files: a file that is written is there whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


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
        os.chmod(scratch, 0o644)  # mkstemp makes it 0600
        os.replace(scratch, path)
    except BaseException:  # also Ctrl-C
        os.unlink(scratch)
        raise
