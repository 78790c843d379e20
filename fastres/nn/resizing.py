"""resizing: more or fewer blocks in a network that is in training, and its optimiser with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastres.nn.layer_network import LayerNetwork
from fastres.nn.residual_mlp import ResidualStack


@torch.no_grad()
def append_blocks(stack: ResidualStack, blocks: int, optimizer: Optimizer | None = None) -> None:
    """Append blocks that add nothing at first: no output of the stack changes.

    Their first matrices are He-initialised from torch's global generator, their last matrix and
    biases are 0, so that all but the first matrix get a gradient at once. Trained gates are 1.

    Args:
        stack: Grows in place: its parameters are new objects, and a schedule of the optimiser
            goes on.
        blocks: How many, 1 or more.
        optimizer: Of those parameters; keeps its state, which is 0 for what is new.

    Raises:
        ValueError: If blocks is less than 1.
    """
    if blocks < 1:
        raise ValueError(f"append_blocks: blocks must be >= 1, got {blocks}")
    new = ResidualStack(
        stack.width,
        blocks,
        stack.hidden,
        stack.activation,
        initialisation="he",
        gated=stack.gate is not None,
    ).to(stack.w1)
    new.w2.zero_()
    for name, parameter in list(stack.named_parameters()):
        added: Tensor = new.get_parameter(name)
        zeros = torch.zeros_like(added)
        _replace((stack, name), parameter, _appending(added), _appending(zeros), optimizer)
    stack.blocks += blocks


@torch.no_grad()
def remove_last_block(stack: ResidualStack, optimizer: Optimizer | None = None) -> None:
    """Remove the last block of a stack, and the optimiser's state of it.

    Args:
        stack: Shrinks in place: its parameters are new objects.
        optimizer: Of those parameters.

    Raises:
        ValueError: If the stack has no block.
    """
    if stack.blocks == 0:
        raise ValueError("remove_last_block: stack must have a block, got 0")
    for name, parameter in list(stack.named_parameters()):
        _replace((stack, name), parameter, _without_last, _without_last, optimizer)
    stack.blocks -= 1


@torch.no_grad()
def remove_last_layer(network: LayerNetwork, optimizer: Optimizer | None = None) -> None:
    """Remove the last layer of a LayerNetwork; of shared weights there is one run less.

    Args:
        network: Shrinks in place.
        optimizer: Of its parameters.

    Raises:
        ValueError: If it has one layer alone.
    """
    if network.layers < 2:
        raise ValueError(f"remove_last_layer: layers must be >= 2, got {network.layers}")
    if not network.shared:
        for name in ("weight", "bias"):
            old = network.get_parameter(name)
            _replace((network, name), old, _without_last, _without_last, optimizer)
    network.layers -= 1


def remove_last_module(modules: nn.Sequential, optimizer: Optimizer | None = None) -> None:
    """Remove the last of some modules in a row; the optimiser forgets its parameters.

    Args:
        modules: Shrinks in place.
        optimizer: Of its parameters, among others.

    Raises:
        ValueError: If there is no module.
    """
    if len(modules) == 0:
        raise ValueError("remove_last_module: modules must have one, got none")
    gone = {id(parameter): parameter for parameter in modules[-1].parameters()}
    del modules[-1]
    if optimizer is None:
        return
    for parameter in gone.values():
        optimizer.state.pop(parameter, None)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]


def _appending(added: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.cat([t, added.to(t.dtype)])


def _without_last(t: Tensor) -> Tensor:
    return t[:-1].clone()


def _replace(
    place: tuple[nn.Module, str],
    old: nn.Parameter,
    change: Callable[[Tensor], Tensor],
    change_state: Callable[[Tensor], Tensor],
    optimizer: Optimizer | None,
) -> None:
    """Put a changed copy in the place of a parameter, in its module and in the optimiser."""
    module, name = place
    new = nn.Parameter(change(old.detach()), old.requires_grad)
    setattr(module, name, new)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = {
            key: change_state(value)
            if isinstance(value, Tensor) and value.shape == old.shape
            else value
            for key, value in state.items()
        }
