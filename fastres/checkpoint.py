"""checkpoint: tensors and facts in one safetensors file, whole or not there; checked when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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


def training_state(
    model: nn.Module, optimizer: Optimizer
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the tensors of a model and its optimiser by name, and the latter's groups, for JSON.

    Its state must be tensors, as that of the optimisers of torch is by default.
    """
    whole = optimizer.state_dict()
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for index, moments in whole["state"].items():
        tensors |= {f"optimizer.{index}.{name}": t for name, t in moments.items() if t is not None}
    return tensors, whole["param_groups"]


def restore_training(
    model: nn.Module,
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Put back what `training_state` returned; tensors of other names are passed over.

    Raises:
        ValueError: If they are of another model; nothing has changed then.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            weights[rest] = t
        elif kind == "optimizer":
            index, _, moment = rest.partition(".")
            moments.setdefault(int(index), {})[moment] = t
    have = {name: t.shape for name, t in model.state_dict().items()}
    if {name: t.shape for name, t in weights.items()} != have:
        raise ValueError(f"{len(weights)} tensors of other names or shapes than its {len(have)}")
    model.load_state_dict(weights)
    optimizer.load_state_dict({"state": moments, "param_groups": list(groups)})


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
