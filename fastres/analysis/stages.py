"""stages: the runs of blocks that a network of fastres.nn has, and how each loses its last one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from fastres.nn import CifarResNet, LayerNetwork, ResidualMLP
from fastres.nn.cifar_resnet import STAGES
from fastres.nn.resizing import remove_last_block, remove_last_layer, remove_last_module


@dataclass(frozen=True)
class Stage:
    """Blocks of one shape in a row."""

    name: str
    blocks: Callable[[], int]  # how many there are now
    remove: Callable[[Optimizer | None], None]  # the last of them
    head: nn.Linear | None  # what reads the stream behind them, if it is linear


def stages_of(op: str, model: nn.Module) -> list[Stage]:
    """List the stages of a network in the order in which their sites run.

    Args:
        op: Whose errors they are.
        model: A ResidualMLP, a residual LayerNetwork or a CifarResNet.

    Raises:
        TypeError: If the model is none of them.
    """
    if isinstance(model, ResidualMLP):
        stack = model.stack
        return [
            Stage("stack", lambda: stack.blocks, lambda o: remove_last_block(stack, o), model.head)
        ]
    if isinstance(model, LayerNetwork) and model.residual:
        return [
            Stage("layers", lambda: model.layers, lambda o: remove_last_layer(model, o), model.head)
        ]
    if isinstance(model, CifarResNet):
        return [_of_resnet(model, f"layer{stage}") for stage in range(1, len(STAGES) + 1)]
    kind = type(model).__name__
    rule = "model must be a ResidualMLP, a residual LayerNetwork or a CifarResNet"
    raise TypeError(f"{op}: {rule}, got {kind}")


def _of_resnet(model: CifarResNet, name: str) -> Stage:
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.Sequential)

    def remove(optimizer: Optimizer | None) -> None:
        remove_last_module(blocks, optimizer)
        model.depth -= 2  # a block is two convolutions

    return Stage(name, lambda: len(blocks), remove, None)
