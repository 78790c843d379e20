"""sites: trace() finds the residual adds of any model; Watch puts a policy on them."""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastres.adds import (
    Add,
    Event,
    Listener,
    Mode,
    Plan,
    Policy,
    Site,
    Window,
    add,
    check_sides,
    read_add,
)
from fastres.searching import Search, is_compiled
from fastres.versions import tensors_in

__all__ = ["Add", "Policy", "Site", "Watch", "add", "trace"]


class Watch:
    """Puts a policy on the residual adds of a model for the length of a `with` block.

    The first pass searches. Later passes are matched by order: modules beside an add carry hooks,
    and a function mode is on only in the stretch of code that contains it, because torch leaves
    some fused paths while a function mode is on, which would change the bits. Only the model's own
    forward counts, in the thread that opened the block: not the recomputation of checkpointed
    activations, which runs in the backward pass.
    """

    def __init__(self, op: str, model: nn.Module, policy: Policy) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
        if is_compiled(model):
            kind = type(model).__name__
            raise TypeError(f"{op}: model must not be compiled or scripted, got {kind}")
        self.plan: Plan | None = None
        self._op, self._model, self._policy = op, model, policy
        self._thread = threading.get_ident()
        self._search: Search | None = None
        self._mode, self._listener = Mode(self._handle), Listener(self._handle)
        self._hooks: list[RemovableHandle] = []
        self._depth = 0  # calls of the model under way: more than one where it calls itself
        self._calls: Counter[int] = Counter()
        self._running: list[Event] = []
        self._window: Window | None = None
        self._candidate = 0  # of this window
        self._next = 0  # site
        self._fixed = True  # the inputs have the shapes of the first pass, but for the batch

    def __enter__(self) -> Self:
        self._hooks += [
            self._model.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True),
            self._model.register_forward_hook(self._end, always_call=True),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._off()
        for hook in self._hooks:
            hook.remove()

    def _off(self) -> None:
        self._depth, self._window = 0, None
        self._mode.switch(False)
        self._listener.switch(False)
        if self._search is not None:
            self._search.stop()
            self._search = None

    # The model's own forward.

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        self._depth += 1
        if self._depth > 1:
            return
        if self.plan is None:
            self._search = Search(self._op, model, self._policy, (args, kwargs))
            return
        shapes = [t.shape[1:] for t in tensors_in((args, kwargs))]
        self._fixed = bool(shapes) and shapes == self.plan.shapes
        self._calls.clear()
        self._running.clear()
        self._next = 0
        self._enter(model, args)

    def _end(self, model: nn.Module, args: Any, out: Any) -> None:
        if threading.get_ident() != self._thread or self._depth == 0:
            return
        self._depth -= 1
        if self._depth:
            return
        if out is None and sys.exc_info()[1] is not None:
            self._off()
            self._policy.failed()
        elif self._search is not None:
            search = self._search
            search.leave(model, args, out)
            self._off()
            self._follow(search.finish())
            self._passed()
        else:
            self._depth = 1
            self._leave(model, args, out)
            self._depth = 0
            if self.plan is not None and self._next < len(self.plan.sites):
                self._fail(self._next, "none")
            self._passed()

    def _passed(self) -> None:
        assert self.plan is not None
        self._policy.passed(self.plan.sites)

    # Later passes.

    def _follow(self, plan: Plan) -> None:
        """Put hooks on the modules that begin or end a stretch of code with a site."""
        self.plan = plan
        beside = {event[0] for event in (*plan.windows, *plan.closes)}
        for module in self._model.modules():
            if module is self._model:
                continue
            if id(module) in beside:
                self._hooks += [
                    module.register_forward_pre_hook(self._enter, prepend=True),
                    module.register_forward_hook(self._leave, always_call=True),
                ]
            elif id(module) in plan.idle:
                self._hooks.append(module.register_forward_pre_hook(self._refuse))

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._depth and threading.get_ident() == self._thread:
            self._calls[id(module)] += 1
            event = (id(module), self._calls[id(module)], False)
            self._running.append(event)
            self._pass(event)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if not self._depth or threading.get_ident() != self._thread:
            return
        if self._running and self._running[-1][0] == id(module):
            self._pass((*self._running.pop()[:2], True))

    def _refuse(self, module: nn.Module, args: Any) -> None:
        if self._depth and threading.get_ident() == self._thread:
            name = next(name for name, m in self._model.named_modules() if m is module)
            raise RuntimeError(
                f"{self._op}: the model's graph changed since the first pass: "
                f"module '{name}' did not run then"
            )

    def _pass(self, event: Event) -> None:
        """Close the window that ends at this event, open the one that begins there."""
        assert self.plan is not None
        if self._window is not None and event in self.plan.closes:
            self._window = None
        if self._window is None:
            self._window, self._candidate = self.plan.windows.get(event), 0
        window = self._window
        listens = window is not None and window.declared and bool(window.entries)
        self._listener.switch(listens)
        self._mode.switch(window is not None and not listens)

    def _handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.plan is not None
        assert self._window is not None
        call = read_add(func, args, kwargs)
        if call is None:
            site = self.plan.sites[min(self._next, len(self.plan.sites) - 1)]
            check_sides(self._op, site.name, func, args)
            return func(*args, **kwargs)
        entry = self._window.entries.get(self._candidate)
        self._candidate += 1
        if entry is None:
            if self._candidate > self._window.candidates:
                self._fail(self._next - 1, "one add more")
            return call.call()
        self._check(entry[0], call)
        self._next += 1
        return self._policy.at(entry[0], call, entry[1])

    def _check(self, index: int, call: Add) -> None:
        assert self.plan is not None
        shape, site = call.operands[0].shape, self.plan.sites[index].shape
        if index != self._next:
            self._fail(self._next, "none")
        if len(shape) != len(site) or (self._fixed and shape[1:] != site[1:]):
            self._fail(index, str(list(shape)))

    def _fail(self, index: int, got: str) -> None:
        assert self.plan is not None
        site = self.plan.sites[index]
        want = ", ".join(["*", *map(str, site.shape[1:])])
        raise RuntimeError(
            f"{self._op}: the model's graph changed since the first pass: "
            f"site '{site.name}' expected [{want}], got {got}"
        )


class _Plain:
    """The policy of trace: nothing."""

    def at(self, site: int, call: Add, skip: int) -> Any:
        return call.call()

    def passed(self, sites: list[Site]) -> None: ...

    def failed(self) -> None: ...


def trace(model: nn.Module, *inputs: Any, **kwargs: Any) -> list[Site]:
    """Find the residual adds of a model in one forward pass.

    The pass runs without gradients, in the model's present mode, on copies of its buffers, and the
    states of the random generators of torch and of Python are restored: it leaves no trace itself.

    Args:
        model: Any module; not compiled, not scripted.
        inputs: What the model is called with; dim 0 of its activations is the batch.
        kwargs: The same, by name.

    Returns:
        The sites in the order in which they ran; empty where there is none.

    Raises:
        TypeError: If model is not a module, or is compiled or scripted.

    Example:
        >>> class Block(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> trace(torch.nn.Sequential(Block(4, 4)), torch.ones(2, 4))
        [Site(name='0', kind='identity', shape=(2, 4), level=0)]
    """
    watch = Watch("trace", model, _Plain())
    devices = {t.device for t in (*tensors_in((inputs, kwargs)), *model.parameters())}
    cuda = [d.index for d in devices if d.type == "cuda"]
    state = random.getstate()
    with watch, torch.no_grad(), torch.random.fork_rng(cuda):
        try:
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            torch.func.functional_call(model, buffers, inputs, kwargs)
        finally:
            random.setstate(state)
    assert watch.plan is not None
    return watch.plan.sites
