"""absorbing: batch norm in eval mode as part of the layer before it.

With running mean m and variance v, batch norm of W x + b is the layer W' x + b' with W' = W g,
b' = (b - m) g + bias, and g = weight / sqrt(v + eps) per channel: all that its scale does to the
function is in W'. Littwin & Wolf 2016 (arXiv 1611.02525, appendix C) follow the norm of W'.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

Pair = tuple[str, str]  # names of a layer and of the batch norm that takes its output


@torch.no_grad()
def pairs_of(model: nn.Module, x: Any) -> list[Pair]:
    """Find the convolutions and linear layers whose output a batch norm takes, in eval mode.

    Args:
        model: Any module; it runs once.
        x: What it is called with.

    Returns:
        Names of layer and batch norm, in the order in which they run.
    """
    made: dict[int, tuple[str, Tensor]] = {}  # by id: the tensor is kept, so ids stay apart
    found: list[Pair] = []
    hooks = []

    def layer(name: str) -> Any:
        return lambda _module, _args, out: made.update({id(out): (name, out)})

    def norm(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if id(args[0]) in made:
                found.append((made[id(args[0])][0], name))

        return hook

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for name, module in model.named_modules():
            if isinstance(module, _ConvNd | nn.Linear):
                hooks.append(module.register_forward_hook(layer(name)))
            elif isinstance(module, _BatchNorm):
                hooks.append(module.register_forward_pre_hook(norm(name)))
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return list(dict.fromkeys(found))


def absorbed_weight(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Compute W' [out, ...] and b' [out] of a layer that a batch norm follows, in eval mode.

    Raises:
        ValueError: If the batch norm keeps no running statistics, or the layer is a transposed
            convolution.
    """
    if getattr(layer, "transposed", False):
        raise ValueError("absorbed_weight: layer must not be transposed, got one that is")
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        raise ValueError("absorbed_weight: norm must keep running statistics, got none")
    assert isinstance(norm, _BatchNorm)
    assert isinstance(layer, _ConvNd | nn.Linear)
    gain = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight
    bias = -mean if layer.bias is None else layer.bias - mean
    shift = bias * gain if norm.bias is None else bias * gain + norm.bias
    return layer.weight * gain.reshape(-1, *[1] * (layer.weight.dim() - 1)), shift


@torch.no_grad()
def absorb(model: nn.Module, x: Any) -> nn.Module:
    """Copy a model with every batch norm that follows a layer made part of that layer.

    Its outputs are those of the model in eval mode, but for rounding, where the batch norm alone
    takes what the layer returns.

    Args:
        model: Any module.
        x: What it is called with, once, to find which batch norm follows which layer.

    Returns:
        The copy, in eval mode.

    Raises:
        ValueError: If there is nothing to absorb, or a layer is followed by two batch norms.
    """
    pairs = pairs_of(model, x)
    if not pairs or len({layer for layer, _ in pairs}) < len(pairs):
        raise ValueError(
            "absorb: model must have a batch norm after a layer, and each layer one at most, "
            f"got {len(pairs)} pairs"
        )
    model = copy.deepcopy(model).eval()
    for name, norm in pairs:
        layer = model.get_submodule(name)
        weight, bias = absorbed_weight(layer, model.get_submodule(norm))
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        parent, _, key = norm.rpartition(".")
        setattr(model.get_submodule(parent), key, nn.Identity())
    return model
