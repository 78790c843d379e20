"""stacked: what consecutive basic blocks run in eval mode, one conv_stack, and when they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from fastres.declaring import is_heard
from fastres.fusing.folding import KEPT, Folded, fold, gather
from fastres.hooks import is_hooked
from fastres.ops import native
from fastres.ops.calls import is_underived
from fastres.ops.conv_stack import FORWARD, allows_tf32
from fastres.ops.layout import DTYPES

Names = tuple[tuple[str, tuple[str, ...]], ...]  # of modules with children, and of these
_modes: Final[Callable[[], list[Any]]] = torch.overrides._get_current_function_mode_stack


def run_stack(x: Tensor, *blocks: nn.Module) -> Tensor:
    """Run fused basic blocks in turn: as one `conv_stack` if nothing can tell the difference.

    That is in eval mode, where no derivative is wanted, no policy, mode or hook needs the blocks
    one by one, and everything is of one dtype and device. The batch norms are folded into weights
    that are kept until a parameter or buffer is changed, as its version counter tells, an optimizer
    has made a step, or the blocks run one by one because they train or a derivative is wanted.
    """
    if _is_plain(x) and (weights := _folded(x, blocks)) is not None:
        y: Tensor = FORWARD(x, *weights, None, False, x.is_cuda and allows_tf32())[0]
        return y
    for block in blocks:
        x = block(x)
    return x


def forget(module: nn.Module) -> None:
    """Drop the folded weights of the stack that begins with this block."""
    module.__dict__.pop(KEPT, None)


def children_of(module: nn.Module, paths: set[str]) -> Names:
    """Return the names of the children of some modules below one."""
    return tuple((path, tuple(module.get_submodule(path)._modules)) for path in sorted(paths))


def is_stacked(module: nn.Module, names: Names) -> bool:
    """Tell whether a forward that was written with stacks may run: the children are the same.

    Not where a compiler or a tracer reads it: the blocks are what it can follow.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    try:
        return children_of(module, {path for path, _ in names}) == names
    except AttributeError:  # one is gone
        return False


def _is_plain(x: Tensor) -> bool:
    """Tell whether a call is one of inference, which nobody watches."""
    return (
        FORWARD is not None
        and type(x) is Tensor
        and x.dim() == 4
        and x.dtype in DTYPES
        and native.runs_on(x)
        and not x.is_meta
        and not is_heard()
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled(x.device.type)
        and all(isinstance(mode, DeviceContext) for mode in _modes())
        and not is_hooked()
    )


def _folded(x: Tensor, blocks: tuple[nn.Module, ...]) -> tuple[Tensor, ...] | None:
    """Return the weights of the stack, from the last time if nothing has changed."""
    kept: Folded | None = blocks[0].__dict__.get(KEPT)
    if kept is None or kept.blocks != blocks or not kept.holds():
        kept = gather(blocks)
        if kept is None:
            if any(module.training for module in blocks[0].children()):
                forget(blocks[0])  # what changes weights without a trace, as by `.data`, trains
            return None
    if not is_underived(x, *kept.sources):
        forget(blocks[0])
        return None
    if not kept.weights:
        kept.weights = fold(blocks)
        blocks[0].__dict__[KEPT] = kept
    w1 = kept.weights[0]
    fits = w1.dtype is x.dtype and w1.device == x.device and w1.size(1) == x.size(1)
    return kept.weights if fits else None
