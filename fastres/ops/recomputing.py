"""recomputing: what a batch norm put out, computed again in the backward pass instead of kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Kept:
    """A tensor that is kept, and how often it had been written to."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def get(self) -> Tensor:
        """Return it; the error is the one that torch raises where it keeps a tensor itself."""
        t = self._tensor
        if t._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: [{t.type()} {[*t.shape]}] is at version {t._version}; "
                f"expected version {self._version} instead"
            )
        return t


class Way:
    """The way to the first output of a node of the graph, as its attribute `way`.

    Args:
        make: Node, what it keeps -> its first output, bit for bit.
        parts: What it keeps. Hooks that are on already, such as those of checkpointed activations,
            give each tensor back once only: they get these once more.
    """

    def __init__(
        self, make: Callable[[Any, Any], Tensor], parts: tuple[Tensor | None, ...]
    ) -> None:
        self._make = make
        self._uses = self._left = 0
        self._made: Tensor | None = None
        self._hooks = _local.running[-1].outer if _local.running else None
        self._packed: Any = self._hooks and [
            t if t is None else (self._hooks[0](t),) for t in parts
        ]

    def use(self) -> None:
        """Note that there is one more who will `get` it."""
        self._uses += 1

    def get(self, node: Any) -> Tensor:
        """Compute it, once for all who want it."""
        if self._made is None:
            parts = node.saved_tensors if self._hooks is None else self._unpacked()
            with torch.no_grad():
                self._made = self._make(node, parts)
            self._left = self._uses
        made = self._made
        self._left -= 1
        if self._left == 0:
            self._made = None
        return made

    def _unpacked(self) -> list[Tensor | None]:
        assert self._hooks is not None
        return [None if each is None else self._hooks[1](each[0]) for each in self._packed]


class Recomputing:
    """While it is on, autograd keeps the way to a tensor, where one is known, in its place.

    All else is kept as it would be: hooks that are on already get it.

    Args:
        inputs: What the code under it was called with. Of tensors among it `is_free` tells whether
            they are kept themselves.
    """

    def __init__(self, inputs: Iterable[Any] = ()) -> None:
        self.outer: Any = None  # those hooks
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._kept = {id(t): False for t in inputs}
        self._on = False

    def __enter__(self) -> Self:
        graph = torch._C._autograd
        # Transforms of functorch take no hooks.
        if torch.is_grad_enabled() and not graph._saved_tensors_hooks_get_disabled_error_message():
            self.outer = graph._top_saved_tensors_default_hooks(True)
            self._hooks.__enter__()
            _local.running.append(self)
            self._on = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._on:
            _local.running.pop()
            self._hooks.__exit__()
            self._on = False

    def _pack(self, t: Tensor) -> Any:
        way = getattr(t.grad_fn, "way", None)
        if isinstance(way, Way) and t._version == 0:  # it is still what the node put out
            way.use()
            return t.grad_fn
        if id(t) in self._kept:
            self._kept[id(t)] = True
        return Kept(t) if self.outer is None else (self.outer[0](t),)

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Kept):
            return packed.get()
        if isinstance(packed, tuple):
            return self.outer[1](packed[0])
        return packed.way.get(packed)

    def keeps(self, t: Tensor) -> bool:
        """Tell whether a tensor is an input that is kept itself."""
        return self._kept.get(id(t), False)


class _Local(threading.local):
    def __init__(self) -> None:
        self.running: list[Recomputing] = []


_local: Final = _Local()


def is_free(skip: Tensor | None) -> bool:
    """Tell whether a Recomputing is on, and a skip is none or one of its inputs, kept anyway."""
    return bool(_local.running) and (skip is None or _local.running[-1].keeps(skip))
