"""sites: trace() finds the residual adds of any model; Watch puts a policy on them."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

from fastres.adds import Add, Policy, Site, Stack, StackPolicy
from fastres.declaring import add, stack
from fastres.versions import tensors_in
from fastres.watching import Watch

__all__ = [
    "Add",
    "Policy",
    "Site",
    "Stack",
    "StackPolicy",
    "Watch",
    "add",
    "stack",
    "trace",
    "visit",
]


class _Plain:
    """The policy of trace: nothing."""

    def at(self, site: int, call: Add, skip: int) -> Any:
        return call.call()

    def stack(self, first: int, call: Stack) -> Any:
        return call.call()

    def passed(self, sites: list[Site]) -> None: ...

    def failed(self) -> None: ...


def trace(model: nn.Module, *inputs: Any, **kwargs: Any) -> list[Site]:
    """Find the residual adds of a model in one forward pass.

    The pass runs without gradients, in the model's present mode, on copies of its buffers, and the
    states of the random generators of torch and of Python are restored: it leaves no trace itself.

    Args:
        model: Any module; not compiled, not scripted.
        inputs: What the model is called with; dim 0 of its activations is the batch.
        kwargs: The same, by name.

    Returns:
        The sites in the order in which they ran; empty where there is none.

    Raises:
        TypeError: If model is not a module, is compiled or scripted, or overrides `__call__`.
        ValueError: If model has lazy parameters, or the two sides of an add do not broadcast.

    Example:
        >>> class Block(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> trace(torch.nn.Sequential(Block(4, 4)), torch.ones(2, 4))
        [Site(name='0', kind='identity', shape=(2, 4), level=0)]
    """
    return visit("trace", model, _Plain(), inputs, kwargs)


def visit(
    op: str, model: nn.Module, policy: Policy, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Site]:
    """Run a policy in one pass that leaves no trace, as that of `trace`; return the sites."""
    watch = Watch(op, model, policy)
    devices = {t.device for t in (*tensors_in((inputs, kwargs)), *model.parameters())}
    cuda = [d.index for d in devices if d.type == "cuda"]
    state = random.getstate()
    with watch, torch.no_grad(), torch.random.fork_rng(cuda):
        try:
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            torch.func.functional_call(model, buffers, inputs, kwargs)
        finally:
            random.setstate(state)
    if watch.plan is None:
        raise TypeError(
            f"{op}: model must run through torch.nn.Module.__call__, "
            f"got {type(model).__name__}, which overrides it"
        )
    return watch.plan.sites
