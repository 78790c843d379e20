"""surroundings: what a forward may change besides its tensors, which no graph of it would hold."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch

# Generator -> how to read it, and how to set it.
_GENERATORS: Final[tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...]] = (
    (torch.get_rng_state, torch.set_rng_state),
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
)
_DEVICES: Final = ("cpu", "cuda")


def switches() -> tuple[object, ...]:
    """Return what context managers and decorators of a forward switch on and off."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # as of checkpoint
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES]
    return hooks, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Switch gradients and autocast on or off: what a forward switches off is seen where on."""
    before = [torch.is_autocast_enabled(d) for d in _DEVICES]
    for device in _DEVICES:
        torch.set_autocast_enabled(device, on)
    try:
        with torch.set_grad_enabled(on):
            yield
    finally:
        for device, was in zip(_DEVICES, before, strict=True):
            torch.set_autocast_enabled(device, was)


@contextmanager
def drawing() -> Iterator[Callable[[], bool]]:
    """Yield what tells whether random numbers were drawn; then the generators go back."""
    before = [(read, write, read()) for read, write in _GENERATORS]
    try:
        yield lambda: any(_plain(read()) != _plain(state) for read, _, state in before)
    finally:
        for _, write, state in before:
            write(state)


def _plain(state: Any) -> Any:
    """Return the state of a generator as what can be compared."""
    if isinstance(state, torch.Tensor):
        return state.numpy().tobytes()
    return [part.tobytes() if isinstance(part, np.ndarray) else part for part in state]
