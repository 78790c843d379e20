"""checkpoint: tensors and facts in one safetensors file, whole or not there; checked when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres import files
from fastres.formats import DataError

_RULE = "must be a whole checkpoint of fastres"


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and what JSON can hold; a file that was there stays until this one is whole.

    Args:
        path: The file.
        tensors: By name, of any shape, dtype and device.
        facts: What else there is to know.

    Raises:
        ModuleNotFoundError: Without safetensors.
        OSError: If the file cannot be written.
    """
    library = _safetensors().torch
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    said = json.dumps(dict(facts), sort_keys=True, allow_nan=False)
    metadata = {"facts": said, "sha256": _digest(kept, said)}
    files.write(path, library.save(kept, metadata))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back what `save` wrote; no code runs, whatever is in the file.

    Returns:
        The tensors, on the CPU, and the facts.

    Raises:
        ModuleNotFoundError: Without safetensors.
        FileNotFoundError: If there is no such file.
        DataError: If it is damaged, or something else.
    """
    library = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"data: there must be a file {path}")
    try:
        with library.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said, digest = metadata["facts"], metadata["sha256"]
    except (library.SafetensorError, KeyError, ValueError, OverflowError) as error:
        raise DataError(path, _RULE, f"{type(error).__name__}: {error}") from error
    if _digest(tensors, said) != digest:
        raise DataError(path, _RULE, "other content than it was written with")
    facts: dict[str, Any] = json.loads(said)
    return tensors, facts


def _digest(tensors: Mapping[str, Tensor], said: str) -> str:
    """Hash names, dtypes, shapes, values and facts."""
    found = hashlib.sha256(said.encode())
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {t.dtype} {[*t.shape]}".encode())
        found.update(t.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "checkpoint: checkpoints need safetensors: pip install 'fastres[demo]'"
        ) from None
    return safetensors
