"""saving: tensors and facts in one npz file, without pickle."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastres.files import write as write_file

_FACTS = "facts.json"


def write(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write one file.

    Args:
        path: The file; it is there whole or not at all.
        facts: What JSON can hold; integers of any size.
        tensors: By name. What NumPy has no type for goes as float32, its own type beside it.
    """
    types = {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()}
    text = json.dumps({"facts": dict(facts), "types": types})
    arrays = {
        name: (t.float() if t.dtype == torch.bfloat16 else t).detach().cpu().numpy()
        for name, t in tensors.items()
    }
    content = io.BytesIO()
    whole = {_FACTS: np.frombuffer(text.encode(), np.uint8), **arrays}
    np.savez(content, allow_pickle=False, **whole)
    write_file(path, content.getvalue())


def read(path: Path, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read back what `write` wrote: facts and tensors, those on the CPU.

    Args:
        path: The file.
        names: The facts it must have.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is another kind of file.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            head = json.loads(bytes(arrays[_FACTS]))
            tensors = {
                name: torch.from_numpy(arrays[name]).to(getattr(torch, kind))
                for name, kind in head["types"].items()
            }
        return {name: head["facts"][name] for name in names}, tensors
    except (KeyError, TypeError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"load: path must be a file that save wrote, got {path}") from error
