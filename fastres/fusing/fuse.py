"""fuse: the residual adds of a model by fused operators, in place, and the way back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn

from fastres.fusing.following import NotFused
from fastres.fusing.fused import SEQUENCE, Code, Fused, fused_class, norm_of
from fastres.fusing.runs import Stacks
from fastres.fusing.stacked import forget
from fastres.fusing.stretches import rewrite
from fastres.fusing.verifying import Verified
from fastres.ops.calls import check_flag
from fastres.sites import Add, Site, Stack, visit

__all__ = ["Fusion", "fuse", "restore"]


@dataclass(frozen=True)
class Fusion:
    """What `fuse` did to a model, by the names of the modules that own residual adds.

    Attributes:
        model: Name of its class.
        fused: Module -> what is one call now, such as "batch norm + add + ReLU".
        left: Module -> why it is as it was.
        verified: Whether outputs and gradients on the example were compared, and agreed.
        stacked: Of the fused, block -> the stack that it is in, in eval mode; with `stacks`.
        apart: Of the fused, block -> why it is in none; with `stacks`.
    """

    model: str
    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    verified: bool = False
    stacked: dict[str, str] = field(default_factory=dict)
    apart: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        of = len(self.fused) + len(self.left)
        checked = ", verified" if self.verified else ""
        lines = [f"Fusion of {self.model}: {len(self.fused)} of {of} blocks{checked}"]
        for title in ("fused", "left", "stacked", "apart"):
            entries: dict[str, str] = getattr(self, title)
            groups: dict[str, list[str]] = defaultdict(list)
            for name, text in entries.items():
                groups[text].append(name)
            for text, names in groups.items():
                some = names if len(names) < 4 else [*names[:2], "...", names[-1]]
                lines.append(f"  {title} {len(names):3d}  {text}: {', '.join(some)}")
        return "\n".join(lines)


def fuse(
    model: nn.Module,
    example: Any = None,
    verify: bool | None = None,
    *,
    recompute: bool = False,
    stacks: bool = False,
) -> Fusion:
    """Replace the residual adds of a model, with what stands beside them, by fused operators.

    A block that ends in batch norm + add, with or without a ReLU, or in add + ReLU, gets a forward
    in which that is one call: `batch_norm_residual` or `residual_add`. A plain add is declared, so
    that policies find it without a search. Within a branch, batch norm + ReLU is one call as well,
    and blocks of an MLP that follow each other in a Sequential are one `mlp_stack`.
    All else stays as it is: children, Parameters, buffers, hooks, and with them state_dict and
    optimiser, are the very same objects, and a block is still an instance of its class. `record`,
    `gate` and `path_gradients` see the same sites.

    The forward of each block is written anew from its graph (torch.fx), which holds for plain code:
    a block whose forward branches on its input or its mode is left. Where an optional argument is
    given, a block runs its own forward. Batch norm, ReLU and Sequential are recognised by their
    exact class. At every call they are looked at again: mode, momentum and statistics are those of
    the moment, and one that was exchanged, or got a hook, runs as a module of its own. Setting an
    attribute that a block's forward has read gives the block its own forward back.
    nn.SyncBatchNorm runs as it is where it takes statistics of other processes, the add and the
    ReLU after it as one operator.

    Args:
        model: Any module, changed in place; not compiled, scripted or quantized.
        example: What the model is called with: a tensor, a sequence of arguments, or a mapping by
            name. The blocks to fuse are those that `trace` finds with it. None: all that have a
            batch norm before an add whose two sides come from one tensor.
        verify: Whether to compare outputs, gradients and buffers on the example, in the present
            mode, with those of the model as it was. They may be apart as far as rounding takes
            them, which is measured; else all blocks are left. None: if there is an example.
        recompute: Whether the backward pass computes again, bit for bit, what one pass over memory
            gives: activations of batch norms within a branch, and every other sum of an identity
            block. A ResNet of basic blocks then keeps 0.65 of what it kept; its step takes a tenth
            longer.
        stacks: Whether two or more basic blocks in a row (two convolutions of 3x3 with batch norm,
            identity skip, ReLU at the end) run as one `conv_stack` in eval mode, their batch norms
            folded into weights that are kept until a parameter or buffer is changed. Where a
            gradient is wanted, or a policy, hook, mode or compiler needs the blocks, they run one
            by one. What leaves no trace in a tensor's version, such as a write through `.data`, is
            seen after the next such pass, or step of an optimizer.

    Returns:
        The Fusion: what was fused, what was left, and why.

    Raises:
        TypeError: If model is not a module, or is compiled, scripted or quantized; or stacks no
            bool.
        ValueError: If there is something to verify but no example, or model has lazy parameters.

    Example:
        >>> from fastres.nn import cifar_resnet
        >>> model = cifar_resnet(20)
        >>> fuse(model, torch.randn(2, 3, 32, 32))
        Fusion of CifarResNet: 9 of 9 blocks, verified
          fused   9  batch norm + add + ReLU: layer1.0, layer1.1, ..., layer3.2
    """
    if verify and example is None:
        raise ValueError("fuse: example must be given to verify, got None")
    check_flag("fuse", "stacks", stacks)
    _check(model)
    restore(model)
    args, kwargs = _arguments(example)
    owners = _candidates(model) if example is None else _owners(model, args, kwargs)
    fused: dict[str, str] = {}
    left: dict[str, str] = {}
    codes: dict[str, Code] = {}
    for name, skips in owners.items():
        label = name or type(model).__name__
        try:
            code, fused[label] = rewrite(model.get_submodule(name), skips, recompute)
        except NotFused as error:
            left[label] = str(error)
        else:
            codes[name] = code
    found = Stacks.of(model, codes) if stacks else Stacks()
    verify = bool(codes) and example is not None and verify is not False
    passes = [Verified(model, args, kwargs)] if verify else []
    if verify and found.stacked and not model.training:
        passes.append(Verified(model, args, kwargs, derived=False))
    kind = type(model).__name__
    try:
        for name, code in (_sequences(model, codes) | codes | found.codes).items():
            module = model.get_submodule(name)
            object.__setattr__(module, "__class__", fused_class(cast("Any", type(module)), code))
        for verified in passes:
            if wrong := verified.difference(model):
                restore(model)
                left |= dict.fromkeys(fused, f"fused, {wrong}")
                return Fusion(kind, {}, left)
    except BaseException:
        restore(model)
        raise
    return Fusion(kind, fused, left, verify, found.stacked, found.apart)


def _sequences(model: nn.Module, codes: Mapping[str, Code]) -> dict[str, Code]:
    """Return the code of the Sequentials in which blocks of an MLP follow each other."""
    mlps = {model.get_submodule(name) for name, code in codes.items() if code.mlp is not None}
    return {
        name: SEQUENCE
        for name, module in model.named_modules()
        if type(module) is nn.Sequential
        and "forward" not in vars(module)
        and any(a in mlps and b in mlps for a, b in pairwise(module))
    }


def restore(model: nn.Module) -> None:
    """Give all blocks that `fuse` changed their own forward back.

    Works on copies and unpickled models too.

    Args:
        model: Any module, changed in place.

    Raises:
        TypeError: If model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, Fused):
            object.__setattr__(module, "__class__", module._fused_from)
            forget(module)


def _check(model: nn.Module) -> None:
    """Raise the error that names what cannot be fused, if the model is that."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"{type(module).__name__} in '{name}'" if name else type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"fuse: model must not be scripted, got {where}")
        if type(module).__module__.startswith(("torch.ao.nn", "torch.nn.quantized")):
            raise TypeError(f"fuse: model must not be quantized, got {where}")


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, Sequence) and not isinstance(example, str):
        return tuple(example), {}
    return (example,), {}


def _owners(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, list[int] | None]:
    """Return the modules that own sites, and which operand the skip of each is."""
    policy = _Skips()
    visit("fuse", model, policy, args, kwargs)
    names = {name for name, _ in model.named_modules()}
    return {name if name in names else "": skips for name, skips in policy.owners.items()}


def _candidates(model: nn.Module) -> dict[str, list[int] | None]:
    """Return the modules whose own code may end in a batch norm and an add."""
    return {
        name: None
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn.")
        and any(norm_of(child) for child in module.children())
    }


class _Skips:
    """Policy: notes which modules own the sites, and which operand of each add is the skip."""

    def __init__(self) -> None:
        self.owners: dict[str, list[int]] = defaultdict(list)  # name -> skips
        self._names: list[str] = []

    def begin(self) -> None: ...

    def meet(self, site: int, owner: str) -> None:
        self._names.append(owner)

    def at(self, site: int, call: Add, skip: int) -> Any:
        self.owners[self._names[site]].append(skip)
        return call.call()

    def stack(self, first: int, call: Stack) -> Any:
        return call.call()

    def passed(self, sites: list[Site]) -> None: ...

    def failed(self) -> None: ...
