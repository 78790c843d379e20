"""record: measure the perturbation at every residual add of a model, while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastres.sites import Watch
from fastres.tape import Tape

__all__ = ["Tape", "record"]


@contextmanager
def record(model: nn.Module, per_sample: bool = False) -> Iterator[Tape]:
    """Record the residual adds of a model, in every forward pass inside the `with` block.

    The first pass finds the sites; outputs and gradients are those of the model, bit for bit but
    for the payload of a nan. The sums come from the kernel that does the add, so they cost no pass
    over memory of their own. Works in train and eval mode, with and without gradients, under
    autocast and under activation checkpointing, whose recomputation is not counted. On a GPU
    nothing waits for the device until the tape is read.

    Only calls of the model itself count, in the thread that opened the block. Several records may
    be open at once, also of one model and a part of it.

    Two limits: nn.TransformerEncoder and its layers leave their fused inference path while recorded
    (for any hook), which changes the last bits, and what stands at padded positions. And what a
    compiled or scripted part of the model adds is not seen.

    Args:
        model: Any module; not compiled, not scripted.
        per_sample: Whether to keep the sums of every sample, [sites, samples], and not only means.

    Yields:
        The tape: readable at any time after the first pass, also after the block.

    Raises:
        TypeError: If model is not a module, or is compiled or scripted.
        ValueError: If model has lazy parameters; from the first pass, if the model contains no
            residual add; from any pass, if the two sides of an add do not broadcast.
        RuntimeError: From a pass under vmap; from a later pass in which a site of the first does
            not run, has another shape, or runs once more. An add in a stretch of code that had no
            site in the first pass, or in a module that was put in since, is not seen.

    Example:
        >>> import torch
        >>> class Block(nn.Linear):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> model = nn.Sequential(Block(4, 4), Block(4, 4))
        >>> with record(model) as tape:
        ...     for batch in torch.ones(3, 2, 4):
        ...         y = model(batch)
        >>> tape.names, tape.samples, tape.scaled.shape
        (['0', '1'], 6, torch.Size([2]))
    """
    tape = Tape(type(model).__name__, per_sample)
    with Watch("record", model, tape):
        yield tape
