"""adds: how a residual add, or a stack of them, is called, and where a model's forward does it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastres.declaring import add, fused_add, fused_norm, fused_stack
from fastres.ops import Stats, batch_norm_residual, conv_stack, mlp_stack, residual_add
from fastres.ops.batch_norm_residual import reference as norm_reference
from fastres.ops.conv_stack import reference as conv_reference
from fastres.ops.mlp_stack import reference as mlp_reference
from fastres.tracing import Kind

ADDS: Final[frozenset[Callable[..., Any]]] = frozenset(
    {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
)
NORMED: Final[frozenset[Callable[..., Any]]] = frozenset({batch_norm_residual, fused_norm})
# Those that return their sums too:
MEASURED: Final[frozenset[Callable[..., Any]]] = NORMED | {fused_add, residual_add}
DECLARED: Final[frozenset[Callable[..., Any]]] = MEASURED | {add}
# By a Listener:
HEARD: Final[frozenset[Callable[..., Any]]] = frozenset({add, fused_add, fused_norm, fused_stack})
INTO: Final[frozenset[Callable[..., Any]]] = frozenset({Tensor.add_, Tensor.__iadd__})
# A stack -> what runs its blocks one by one:
STACKS: Final[Mapping[Callable[..., Any], Callable[..., Any]]] = {
    fused_stack: mlp_reference,
    mlp_stack: mlp_reference,
    conv_stack: conv_reference,
}
_NORM: Final = inspect.signature(batch_norm_residual)


@dataclass(frozen=True)
class Site:
    """One residual add of a model.

    Attributes:
        name: Qualified name of the module whose forward contains the add, with an index where it
            contains several; the class name for the model's own forward.
        kind: "identity", or "projection" where the skip is a linear map of the block's input.
        shape: Shape of the sum in the traced pass, [B, ...].
        level: How many branches of other sites it lies in.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    level: int


class Add(NamedTuple):
    """One call of an addition: as the model made it, and its two operands.

    Of a call of `batch_norm_residual` the second is the branch before its batch norm.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: tuple[Tensor, Tensor]  # [B, ...] both

    def call(self) -> Any:
        """Run it as the model asked for it."""
        return self.func(*self.args, **self.kwargs)

    def writes(self, side: int) -> bool:
        """Tell whether the sum is written into this operand."""
        return side == 0 and self.func in INTO

    def replaced(self, side: int, t: Tensor) -> Add:
        """Return the call with another tensor as this operand."""
        operands, args, kwargs = list(self.operands), list(self.args), dict(self.kwargs)
        operands[side] = t
        if side < len(args):
            args[side] = t
        else:
            names = [name for name in ("input", "x", "other", "f") if name in kwargs]
            kwargs[names[side - len(args)]] = t
        return Add(self.func, tuple(args), kwargs, (operands[0], operands[1]))

    def gated(self, gate: float | Tensor) -> Add:
        """Return the call of `batch_norm_residual` with its gate times another, a number or [B]."""
        bound = _NORM.bind(*self.args, **self.kwargs)
        own = bound.arguments.get("gate")
        bound.arguments["gate"] = gate if own is None else own * gate
        return Add(self.func, bound.args, bound.kwargs, self.operands)

    def separate(self) -> tuple[Tensor, Stats]:
        """Run the call of `batch_norm_residual` as operations of their own, one of them `add`."""
        return norm_reference(*self.args, **self.kwargs, add=add)


def read_add(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Add | None:
    """Return the call if it could be a residual add: two floating tensors of one shape [B, ...]."""
    if func not in ADDS and func not in DECLARED:
        return None
    a, b = (*args, *(kwargs[k] for k in ("input", "x", "other", "f") if k in kwargs))[:2]
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.is_nested or b.is_nested:
        return None
    if a.dim() < 2 or a.shape != b.shape:
        return None
    return Add(func, args, kwargs, (a, b)) if a.is_floating_point() else None


class Stack(NamedTuple):
    """One call of a stack of residual blocks: as the model made it, and its stream."""

    func: Callable[..., Any]
    bound: inspect.BoundArguments
    x: Tensor  # [B, ..., D] or [N, C, H, W]
    blocks: int  # L, 1 or more

    def call(self, **changes: Any) -> tuple[Tensor, Stats]:
        """Run it as one, as the model asked for it but for the arguments in `changes`.

        A gate is a number, or a tensor [], [L] or [L, B]. The Stats are [L, B].
        """
        arguments = {**self.bound.arguments, **changes}
        bound = inspect.BoundArguments(self.bound.signature, arguments)
        return self.func(*bound.args, **bound.kwargs)

    def separate(self) -> tuple[Tensor, Stats]:
        """Run its blocks one by one, each with `add`."""
        run = STACKS[self.func]
        result: tuple[Tensor, Stats] = run(*self.bound.args, **self.bound.kwargs, add=add)
        return result


_signature: Final = lru_cache(None)(inspect.signature)


def read_stack(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Stack | None:
    """Return the call if it is a stack of at least one residual block."""
    if func not in STACKS:
        return None
    bound = _signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    x, w1, blocks = (bound.arguments.get(name) for name in ("x", "w1", "blocks"))
    if not isinstance(x, Tensor) or not isinstance(w1, Tensor) or x.dim() < 2 or w1.dim() < 1:
        return None
    count = w1.size(0) if blocks is None else blocks
    return Stack(func, bound, x, count) if isinstance(count, int) and count > 0 else None


def check_sides(op: str, owner: str, func: Any, args: tuple[Any, ...]) -> None:
    """Raise the error that names the module, if the two sides of an add cannot be added."""
    if (func not in ADDS and func not in DECLARED) or len(args) < 2:
        return
    a, b = args[:2]
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.is_nested or b.is_nested:
        return
    pairs = list(zip(reversed(a.shape), reversed(b.shape), strict=False))
    if any(m != n and (func in DECLARED or 1 not in (m, n)) for m, n in pairs):
        raise ValueError(
            f"{op}: the add in '{owner}' must have two sides that broadcast to one shape, "
            f"got {[*a.shape]} and {[*b.shape]}"
        )


class Policy(Protocol):
    """What is done at the sites of a model."""

    def at(self, site: int, call: Add, skip: int) -> Any:
        """Run the add of a site, whose operand number `skip` is the skip; return its result."""

    def passed(self, sites: list[Site]) -> None:
        """Note that a forward pass is complete."""

    def failed(self) -> None:
        """Forget the pass under way: it ended with an exception."""


@runtime_checkable
class StackPolicy(Policy, Protocol):
    """A policy that takes fused calls: whole stacks, and adds with the batch norm of their branch.

    To one that is none they are shown as operations of their own, with an `add` for each block.
    """

    def stack(self, first: int, call: Stack) -> tuple[Tensor, Stats]:
        """Run a stack whose sites are `first`, first + 1, ...; return its result."""


@runtime_checkable
class ChangingPolicy(Policy, Protocol):
    """A policy that changes what is added: it acts before the others, which see what it made."""

    def begin(self) -> None:
        """Note that a forward pass begins."""

    def meet(self, site: int, owner: str) -> None:
        """Learn, before a site runs in the first pass, in the forward of which module it is."""


Event = tuple[int, int, bool]  # id of a module, number of its call in the pass, whether at its end


@dataclass(slots=True)
class Window:
    """A stretch of one module's own code, between two calls of its children."""

    opens: Event
    candidates: int = 0  # calls in it that `read_add` accepts
    entries: dict[int, tuple[int, int]] = field(default_factory=dict)  # candidate -> site, skip
    declared: bool = True  # all candidates are in HEARD: listening is enough


@dataclass(slots=True)
class Plan:
    """Where the sites are, as the first pass found them."""

    shapes: list[torch.Size]  # of the model's inputs, without the batch
    sites: list[Site] = field(default_factory=list)
    windows: dict[Event, Window] = field(default_factory=dict)  # those that contain sites
    closes: set[Event] = field(default_factory=set)
    calls: dict[int, int] = field(default_factory=dict)  # of the modules that begin a window
    idle: set[int] = field(default_factory=set)  # ids of modules with weights that did not run
