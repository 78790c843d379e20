"""hooks: what is put on a model and on torch while a model is watched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode

_push: Final[Callable[[Any], None]] = torch.overrides._push_mode
_pop: Final[Callable[[], Any]] = torch.overrides._pop_mode
_top: Final[Callable[[], Any]] = torch.overrides._get_current_function_mode


class Hook:
    """A hook of one module in one thread. In a copy of the module, or a pickle, it does nothing."""

    def __init__(self, module: nn.Module, call: Callable[..., None]) -> None:
        self._module, self._call, self._thread = module, call, threading.get_ident()

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Pass the call on, if it is of this module and in this thread."""
        if module is self._module and threading.get_ident() == self._thread:
            self._call(module, *args)

    def __reduce__(self) -> tuple[type[Idle], tuple[()]]:
        return Idle, ()


class Idle:
    """What a Hook is in a copy."""

    def __call__(self, *args: Any) -> None:
        """Do nothing."""


def is_hooked() -> bool:
    """Tell whether torch calls hooks of every module."""
    return bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


def has_no_hooks(module: nn.Module, but: tuple[type, ...] = (Idle,)) -> bool:
    """Tell whether calling a module is calling the forward of its class, but for these hooks."""
    space = module.__dict__
    if "forward" in space or space["_backward_hooks"] or space["_backward_pre_hooks"]:
        return False
    before, after = space["_forward_pre_hooks"], space["_forward_hooks"]
    return not (before or after) or all(
        isinstance(hook, but) for some in (before, after) for hook in some.values()
    )


class Mode(TorchFunctionMode):
    """Sends every torch function to a handler while it is on.

    One that is `first` stays above all that are not, whichever is switched on later.
    """

    def __init__(self, handle: Callable[..., Any], first: bool = False) -> None:
        super().__init__()
        self._handle, self._first = handle, first
        self._on = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self._handle(func, args, kwargs or {})

    def switch(self, on: bool) -> None:
        """Switch it on, or off: also from below modes that came later and go later."""
        if on == self._on:
            return
        self._on = on
        above = []
        if on:
            while not self._first and isinstance(top := _top(), Mode) and top._first:
                above.append(_pop())
            _push(self)
        else:
            while (mode := _pop()) is not self:
                above.append(mode)
        for mode in reversed(above):
            _push(mode)
