"""watching: Watch puts a policy on the residual adds of a model, pass by pass."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from fastres.adds import (
    NORMED,
    Add,
    ChangingPolicy,
    Event,
    Plan,
    Policy,
    Stack,
    StackPolicy,
    Window,
    check_sides,
    read_add,
    read_stack,
)
from fastres.declaring import Listener
from fastres.hooks import Hook, Mode
from fastres.ops import Stats
from fastres.searching import Search, is_compiled, shapes_of


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
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if is_lazy(tensor):
                raise ValueError(f"{op}: model must be initialized, got lazy parameter '{name}'")
        self.plan: Plan | None = None
        self.replayed: frozenset[int] = frozenset()  # sites that do not run, see fastres.replaying
        self._op, self._model, self._policy = op, model, policy
        self._stacks = policy if isinstance(policy, StackPolicy) else None
        self._search: Search | None = None
        self._changes = isinstance(policy, ChangingPolicy)
        self._mode = Mode(self._handle, first=self._changes)
        self._listener = Listener(self._handle)
        self._hooks: list[RemovableHandle] = []
        self._depth = 0  # calls of the model under way: more than one where it calls itself
        self._frame: FrameType | None = None  # of the outermost of them
        self._error: BaseException | None = None  # being handled where the model was called
        self._calls: Counter[int] = Counter()
        self._running: list[Event] = []
        self._window: Window | None = None
        self._candidate = 0  # of this window
        self._next = 0  # site
        self._fixed = True  # the inputs have the shapes of the first pass, but for the batch

    def __enter__(self) -> Self:
        self._hooks += [
            self._model.register_forward_pre_hook(
                Hook(self._model, self._begin), prepend=True, with_kwargs=True
            ),
            self._model.register_forward_hook(Hook(self._model, self._end), always_call=True),
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
        self._depth, self._window, self._frame, self._error = 0, None, None, None
        self._mode.switch(False)
        self._listener.switch(False)
        if self._search is not None:
            self._search.stop()
            self._search = None

    # The model's own forward.

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self._depth and self._is_under_way():
            self._depth += 1
            return
        if self._depth:
            self._forget()
        if isinstance(self._policy, ChangingPolicy):
            self._policy.begin()
        self._depth, self._frame, self._error = 1, sys._getframe(2), sys.exc_info()[1]
        if self.plan is None:
            self._search = Search(self._op, model, self._policy, (args, kwargs))
            return
        shapes = shapes_of((args, kwargs))
        self._fixed = bool(shapes) and shapes == self.plan.shapes
        self._calls.clear()
        self._running.clear()
        self._next = 0
        self._enter(model, args)

    def _end(self, model: nn.Module, args: Any, out: Any) -> None:
        if self._depth != 1:
            self._depth = max(0, self._depth - 1)
            return
        if out is None and sys.exc_info()[1] is not self._error:
            self._forget()
            return
        if self._search is not None:
            search = self._search
            search.leave(model, args, out)
            self._off()
            self._follow(search.finish())
        else:
            assert self.plan is not None
            self._leave(model, args, out)
            self._skip()
            if self._next < len(self.plan.sites):
                self._fail(self._next, "none")
            self._off()
        assert self.plan is not None
        with torch._C.DisableTorchFunction():  # or another Watch takes its sums for the model's
            self._policy.passed(self.plan.sites)

    def _is_under_way(self) -> bool:
        """Tell whether the call has not ended: torch runs no hook on a KeyboardInterrupt."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None

    def _forget(self) -> None:
        self._off()
        self._policy.failed()

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
                    module.register_forward_pre_hook(Hook(module, self._enter), prepend=True),
                    module.register_forward_hook(Hook(module, self._leave), always_call=True),
                ]
            elif id(module) in plan.idle:
                self._hooks.append(module.register_forward_pre_hook(Hook(module, self._refuse)))

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self._depth:
            return
        assert self.plan is not None
        self._calls[id(module)] += 1
        event = (id(module), self._calls[id(module)], False)
        if event[1] > self.plan.calls.get(id(module), event[1]):
            last = min(self._next, len(self.plan.sites) - 1)
            self._fail(last, f"one call more of '{self._name(module)}'")
        self._running.append(event)
        self._pass(event)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if not self._depth or all(event[0] != id(module) for event in self._running):
            return
        while (event := self._running.pop())[0] != id(module):
            pass  # it ended with a KeyboardInterrupt, which the model caught
        self._window = None  # left open where the module was replayed
        self._pass((*event[:2], True))

    def _refuse(self, module: nn.Module, args: Any) -> None:
        if self._depth:
            self._refuse_pass(f"module '{self._name(module)}' did not run then")

    def _name(self, module: nn.Module) -> str:
        names: dict[int, str] = {id(m): name for name, m in self._model.named_modules()}
        return names[id(module)]

    def _pass(self, event: Event) -> None:
        """Close the window that ends at this event, open the one that begins there."""
        assert self.plan is not None
        if self._window is not None and event in self.plan.closes:
            self._window = None
        if self._window is None:
            self._window, self._candidate = self.plan.windows.get(event), 0
        window = self._window
        listens = window is not None and window.declared and bool(window.entries)
        listens &= not self._changes  # or a mode above would hear of the add before it is changed
        self._listener.switch(listens)
        self._mode.switch(window is not None and not listens)

    def _handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.plan is not None
        if (stack := read_stack(func, args, kwargs)) is not None:
            return self._handle_stack(stack)
        call = read_add(func, args, kwargs)
        if call is None:
            site = self.plan.sites[min(self._next, len(self.plan.sites) - 1)]
            check_sides(self._op, site.name, func, args)
            return func(*args, **kwargs)
        if func in NORMED and self._stacks is None:
            return self._separate(call)
        entry = self._step(call.operands[0].shape)
        return call.call() if entry is None else self._policy.at(entry[0], call, entry[1])

    def _handle_stack(self, stack: Stack) -> Any:
        if self._stacks is None:
            return self._separate(stack)
        entry = self._step(stack.x.shape, stack.blocks)
        return stack.call() if entry is None else self._stacks.stack(entry[0], stack)

    def _separate(self, call: Add | Stack) -> tuple[Tensor, Stats]:
        """Show the adds within a fused call one by one."""
        assert self._window is not None
        with self._listener if self._window.declared and not self._changes else self._mode:
            return call.separate()

    def _step(self, shape: torch.Size, count: int = 1) -> tuple[int, int] | None:
        """Step over adds of one shape; return the first's site and skip, if they are sites."""
        assert self.plan is not None
        assert self._window is not None
        entry = self._window.entries.get(self._candidate)
        self._candidate += count
        if self._candidate > self._window.candidates:
            self._fail(self._next - 1, "one add more")
        if entry is None:
            return None
        index, site = entry[0], self.plan.sites[entry[0]].shape
        self._skip()
        if index != self._next:
            self._fail(self._next, "none")
        if len(shape) != len(site) or (self._fixed and shape[1:] != site[1:]):
            self._fail(index, str(list(shape)))
        self._next += count
        return entry

    def _skip(self) -> None:
        while self._next in self.replayed:
            self._next += 1

    def _fail(self, index: int, got: str) -> None:
        assert self.plan is not None
        site = self.plan.sites[index]
        want = ", ".join(["*", *map(str, site.shape[1:])])
        self._refuse_pass(f"site '{site.name}' expected [{want}], got {got}")

    def _refuse_pass(self, what: str) -> None:
        """Raise the error; where the pass has ended unseen, it was the caller's code: let it be."""
        if self._is_under_way():
            raise RuntimeError(
                f"{self._op}: the model's graph changed since the first pass: {what}"
            )
        self._forget()
