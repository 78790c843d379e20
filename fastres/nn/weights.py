"""weights: a checkpoint file into a model, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastres.formats import DataError


def load_weights(model: nn.Module, path: str | Path, what: str = "the model") -> None:
    """Load a state_dict from a file; nothing is loaded unless every tensor fits.

    The file may hold the state_dict itself or a dict with it as "state_dict", and its names may
    carry the "module." of nn.DataParallel. It is read with weights_only: it runs no code.

    Args:
        model: Gets the weights.
        path: The file.
        what: Names the model in errors.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If it is none of tensors, or its names or shapes are not those of the model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: there must be a file {path}")
    rule = f"must hold the weights of {what}"
    try:
        state = _state_of(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever a damaged or hostile file provokes, it is a wrong file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(path, rule, reason) from error
    wrong = _differences(model.state_dict(), state)
    if wrong:
        raise DataError(path, rule, "; ".join(wrong))
    model.load_state_dict(state)


def _state_of(content: Any) -> dict[str, Tensor]:
    """Return the state_dict in a file's content, without prefix."""
    if isinstance(content, Mapping) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise TypeError(f"{type(content).__name__} without a state_dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(f"{type(value).__name__} as {name!r}")
    return {name.removeprefix("module."): value for name, value in content.items()}


def _differences(have: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Say what is missing, unexpected or of another shape; older files count no batches."""
    missing = [k for k in have if k not in given and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in given if k not in have]
    shapes = [
        f"{k} {[*given[k].shape]} for {[*have[k].shape]}"
        for k in have
        if k in given and given[k].shape != have[k].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]


def _listed(names: list[str]) -> str:
    """Join names, the first ten of them."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
