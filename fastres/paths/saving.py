"""saving: tensors and facts in one npz file, without pickle."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastres.files import write as write_file

Made = TypeVar("Made")
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


def read(path: Path, make: Callable[[dict[str, Any], dict[str, Tensor]], Made]) -> Made:
    """Read back what `write` wrote; no code runs, whatever is in the file.

    Args:
        path: The file.
        make: Makes the result of facts and tensors, those on the CPU.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged, or something else.
    """
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            head = json.loads(bytes(arrays[_FACTS]))
            tensors = {
                name: torch.from_numpy(arrays[name]).to(getattr(torch, kind))
                for name, kind in head["types"].items()
            }
        return make(head["facts"], tensors)
    except Exception as error:  # whatever a damaged or hostile zip provokes, it is a wrong file
        raise ValueError(f"load: path must be a file that save wrote, got {path}") from error
