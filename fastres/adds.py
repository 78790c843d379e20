"""adds: how a residual add is called or declared, and where a model's forward makes them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastres.ops import residual_add
from fastres.tracing import Kind


def add(x: Tensor, f: Tensor) -> Tensor:
    """Add a branch to its stream, and declare that this is a residual add.

    A plain x + f where nobody watches. Under `trace` and `record` it is a site without a search.

    Args:
        x: Skip, [B, ...].
        f: Branch, the shape of x.

    Returns:
        x + f, dtypes promoted as `torch.add`.
    """
    if has_torch_function((x, f)):
        total: Tensor = handle_torch_function(add, (x, f), x, f)
        return total
    if not _local.listeners:
        return x + f
    listener = _local.listeners.pop()  # its own call of `add` is for those below it
    try:
        total = listener.handle(add, (x, f), {})
    finally:
        _local.listeners.append(listener)
    return total


class Listener:
    """Hears the calls of `add`, and nothing else, while it is on: cheaper than a function mode."""

    def __init__(self, handle: Callable[..., Any]) -> None:
        self.handle = handle

    def switch(self, on: bool) -> None:
        """Switch it on or off."""
        if on and self not in _local.listeners:
            _local.listeners.append(self)
        elif not on and self in _local.listeners:
            _local.listeners.remove(self)


class _Local(threading.local):
    def __init__(self) -> None:
        self.listeners: list[Listener] = []


_local: Final = _Local()


ADDS: Final[frozenset[Callable[..., Any]]] = frozenset(
    {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
)
DECLARED: Final[frozenset[Callable[..., Any]]] = frozenset({add, residual_add})


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
    """One call of an addition: as the model made it, and its two operands."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: tuple[Tensor, Tensor]  # [B, ...] both

    def call(self) -> Any:
        """Run it as the model asked for it."""
        return self.func(*self.args, **self.kwargs)


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


Event = tuple[int, int, bool]  # id of a module, number of its call in the pass, whether at its end


@dataclass(slots=True)
class Window:
    """A stretch of one module's own code, between two calls of its children."""

    opens: Event
    candidates: int = 0  # calls in it that `read_add` accepts
    entries: dict[int, tuple[int, int]] = field(default_factory=dict)  # candidate -> site, skip
    declared: bool = True  # all candidates are calls of `add`: listening to it is enough


@dataclass(slots=True)
class Plan:
    """Where the sites are, as the first pass found them."""

    shapes: list[torch.Size]  # of the model's inputs, without the batch
    sites: list[Site] = field(default_factory=list)
    windows: dict[Event, Window] = field(default_factory=dict)  # those that contain sites
    closes: set[Event] = field(default_factory=set)
    calls: dict[int, int] = field(default_factory=dict)  # of the modules that begin a window
    idle: set[int] = field(default_factory=set)  # ids of modules with weights that did not run
