"""sequences: residual MLP blocks that follow each other in a Sequential, as one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import has_torch_function_unary

from fastres.declaring import fused_stack, is_heard
from fastres.hooks import has_no_hooks, is_hooked
from fastres.ops import native

_FUNCTIONS: Final = {
    **dict.fromkeys((torch.relu, F.relu, "relu"), "relu"),
    **dict.fromkeys((torch.tanh, "tanh"), "tanh"),
    **dict.fromkeys((torch.sigmoid, "sigmoid"), "sigmoid"),
    F.silu: "silu",
    F.gelu: "gelu",
}
_MODULES: Final = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu"}
Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # w1 [H, D], b1 [H], w2 [D, H], b2 [D]


@dataclass(frozen=True)
class Mlp:
    """That a block computes x + last(act(first(x))), and the names of these modules.

    Attributes:
        modules: first, last, and that of the activation where it is a module.
        activation: As `mlp_stack` names it; "" where the module tells.
    """

    modules: tuple[str, ...]
    activation: str


def mlp_of(module: nn.Module, total: fx.Node, side: int) -> Mlp | None:
    """Return what a block is whose forward is one add with its skip on this side; None: else."""
    skip, branch = (cast("fx.Node", total.args[i]) for i in (side, 1 - side))
    (output,) = (node for node in total.graph.nodes if node.op == "output")
    if skip.op != "placeholder" or output.args != (total,) or branch.op != "call_module":
        return None
    tail = module.get_submodule(str(branch.target))
    if type(tail) is nn.Sequential and len(tail) == 3 and branch.args == (skip,):
        first, act, last = (f"{branch.target}.{name}" for name in tail._modules)
        return Mlp((first, last, act), "")
    act_node = branch.args[0]
    if not isinstance(act_node, fx.Node) or len(act_node.args) != 1:
        return None
    front = act_node.args[0]
    if not isinstance(front, fx.Node) or front.op != "call_module" or front.args != (skip,):
        return None
    ends = str(front.target), str(branch.target)
    if act_node.op == "call_module":
        return Mlp((*ends, str(act_node.target)), "")
    known = _FUNCTIONS.get(act_node.target)
    if known == "gelu" and act_node.kwargs.get("approximate", "none") != "none":
        known = "gelu_tanh"
    return None if known is None else Mlp(ends, known)


def run_sequence(sequence: nn.Sequential, x: Tensor) -> Tensor:
    """Run the modules of a Sequential, blocks of one shape that follow each other as one call.

    Decided at every call: with hooks on any of their modules, a policy's among them, blocks run
    one by one.
    """
    parts = list(sequence)
    separate = _is_special(x)
    at = 0
    while at < len(parts):
        weights: list[Weights] = []
        activation = "" if separate else _activation(parts[at])
        while activation and at + len(weights) < len(parts):
            found = _weights(parts[at + len(weights)], activation, x)
            if found is None or (weights and found[0].shape != weights[0][0].shape):
                break
            weights.append(found)
        if len(weights) < 2:
            x, at = parts[at](x), at + 1
            continue
        w1, b1, w2, b2 = (torch.stack(each) for each in zip(*weights, strict=True))
        x, at = fused_stack(x, w1, b1, w2, b2, None, activation)[0], at + len(weights)
    return x


def _is_special(x: Tensor) -> bool:
    """Tell whether somebody may want to see, or change, what the blocks do one by one."""
    return (
        torch.compiler.is_compiling()
        or is_heard()
        or has_torch_function_unary(x)
        or x.dtype not in (torch.float32, torch.float64)
        or x.dim() < 2
        or not native.runs_on(x)
        or x.is_meta
        or torch.is_autocast_enabled(x.device.type)
        or is_hooked()
    )


def _mlp(block: nn.Module) -> Mlp | None:
    code: Any = getattr(type(block), "_fused_code", None)  # of a fused block
    mlp: Mlp | None = getattr(code, "mlp", None)
    return mlp


def _activation(block: nn.Module) -> str:
    """Return how `mlp_stack` names the activation of a block; "" of what is none."""
    mlp = _mlp(block)
    if mlp is None or mlp.activation:
        return "" if mlp is None else mlp.activation
    act = block.get_submodule(mlp.modules[2])
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return _MODULES.get(cast("Any", type(act)), "")


def _weights(block: nn.Module, activation: str, x: Tensor) -> Weights | None:
    """Return the weights of a block with this activation, if nothing but a block is there."""
    mlp = _mlp(block)
    if mlp is None or _activation(block) != activation:
        return None
    modules = [block.get_submodule(name) for name in mlp.modules]
    first, last = modules[:2]
    if type(first) is not nn.Linear or type(last) is not nn.Linear:
        return None
    if not all(map(has_no_hooks, [block, *modules])):
        return None
    found = first.weight, first.bias, last.weight, last.bias
    if any(t is None or t.dtype != x.dtype or t.device != x.device for t in found):
        return None
    fits = first.weight.shape == last.weight.shape[::-1] and first.in_features == x.size(-1)
    # Below, the copies of the weights would take more memory than the blocks keep.
    fits = fits and x.numel() // x.size(-1) >= 2 * max(first.weight.shape)
    return cast("Weights", found) if fits else None
