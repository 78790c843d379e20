"""searching: the first forward pass of a watched model, in which its residual adds are found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastres.adds import (
    ADDS,
    DECLARED,
    HEARD,
    NORMED,
    Add,
    ChangingPolicy,
    Event,
    Plan,
    Policy,
    Site,
    Stack,
    StackPolicy,
    Window,
    check_sides,
    read_add,
    read_stack,
)
from fastres.hooks import Hook, Mode
from fastres.ops import Stats
from fastres.tracing import Found, Rule
from fastres.versions import Graph, function_name, tensors_in


@dataclass(slots=True)
class _Frame:
    """A module call under way."""

    module: nn.Module
    number: int
    inputs: tuple[int, ...]  # versions of the tensors it was called with
    window: Window


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module runs code that Python does not see."""
    return (
        isinstance(module, torch.jit.ScriptModule)
        or type(module).__name__ == "OptimizedModule"
        or module._compiled_call_impl is not None
    )


def _is_opaque(module: nn.Module) -> bool:
    """Tell whether a function mode must be off inside: it could not see, or would change the bits.

    nn.MultiheadAttention leaves its fused path while a function mode is on.
    """
    attention = type(module).forward is nn.MultiheadAttention.forward
    return attention or is_compiled(module)


def _walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules below one, but none that lie inside an opaque one."""
    for key, child in module._modules.items():
        if child is not None:
            path = f"{name}.{key}" if name else key
            yield path, child
            if not _is_opaque(child):
                yield from _walk(child, path)


def shapes_of(inputs: Any) -> list[torch.Size]:
    """Return the shapes of a model's inputs without the batch; nested tensors have none."""
    return [t.shape[1:] for t in tensors_in(inputs) if not t.is_nested]


class Search:
    """Follows one pass with the graph of tensor versions, and puts the policy on what it finds."""

    def __init__(self, op: str, model: nn.Module, policy: Policy, inputs: Any) -> None:
        self.plan = Plan(shapes_of(inputs))
        self._op, self._policy = op, policy
        self._graph = Graph(model.parameters(), model.buffers())
        self._rule = Rule(self._graph)
        self._found: list[tuple[Found, int, str, torch.Size]] = []  # and version, name, shape
        self._frames: list[_Frame] = []
        self._calls: Counter[int] = Counter()
        self._names = {id(model): type(model).__name__}
        self._weighted: set[int] = set()  # ids of the modules with parameters
        self._changing = policy if isinstance(policy, ChangingPolicy) else None
        self._mode = Mode(self._handle, first=self._changing is not None)
        self._hooks: list[RemovableHandle] = []
        for name, module in _walk(model):
            if any(True for _ in module.parameters()):
                self._weighted.add(id(module))
            if self._names.setdefault(id(module), name) == name:
                self._hooks += [
                    module.register_forward_pre_hook(
                        Hook(module, self.enter), prepend=True, with_kwargs=True
                    ),
                    module.register_forward_hook(Hook(module, self.leave), always_call=True),
                ]
        self._mode.switch(True)
        try:
            self.enter(model, (inputs,), {})
        except BaseException:
            self.stop()
            raise

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Follow the model into a module."""
        self._calls[id(module)] += 1
        event = (id(module), self._calls[id(module)], False)
        self._close(event)
        with torch._C.DisableTorchFunction():
            inputs = tuple(self._graph.version(t) for t in tensors_in((args, kwargs)))
        self._frames.append(_Frame(module, event[1], inputs, Window(event)))
        if _is_opaque(module):
            self._mode.switch(False)

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """Follow the model out of a module."""
        frame = next((each for each in reversed(self._frames) if each.module is module), None)
        if frame is None:
            return  # a hook that ran before `enter` raised
        event = (id(module), frame.number, True)
        ended = False
        while not ended:  # calls above it ended with a KeyboardInterrupt, which the model caught
            self._close(event)
            ended = self._frames.pop() is frame
        with torch._C.DisableTorchFunction():
            unseen = [t for t in tensors_in(out) if _is_opaque(module) or not self._graph.knows(t)]
            if unseen:
                weight = next(module.parameters(), None) is not None
                self._graph.opaque(frame.inputs, weight, unseen)
        if self._frames:
            self._frames[-1].window = Window(event)
            self._mode.switch(not _is_opaque(self._frames[-1].module))

    def _close(self, event: Event) -> None:
        if not self._frames:
            return
        frame = self._frames[-1]
        # nn.TransformerEncoder makes nested tensors, which hide all adds, where no mode is on.
        if (window := frame.window).entries or isinstance(frame.module, nn.TransformerEncoder):
            self.plan.windows[window.opens] = window
            self.plan.closes.add(event)

    def _handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (stack := read_stack(func, args, kwargs)) is not None:
            return self._handle_stack(stack)
        call = read_add(func, args, kwargs)
        if call is not None and func in NORMED and not isinstance(self._policy, StackPolicy):
            return self._separate(call)
        read = list(tensors_in((args, kwargs)))
        found, skip = None, -1
        if call is not None:
            test = self._rule.declared if func in DECLARED else self._rule.find
            found = test(*call.operands)
        starts = func in ADDS and any(type(each) is int and each == 0 for each in args)
        function = "clone" if starts else function_name(func)  # sum([x, f]) begins with 0 + x
        noted = self._graph.call(function, read)
        window = self._frames[-1].window
        name = self._names[id(self._frames[-1].module)]
        if call is None or found is None:
            check_sides(self._op, name, func, args)
            out = func(*args, **kwargs)
        else:
            index, skip = len(self._found), self._graph.version(call.operands[found.skip])
            window.entries[window.candidates] = (index, found.skip)
            self._meet(name)
            out = self._policy.at(index, call, found.skip)
        window.candidates += call is not None
        window.declared &= call is None or call.func in HEARD
        version = self._graph.result(noted, read, out)
        if call is not None and found is not None:
            self._rule.note(version, skip)
            self._found.append((found, version, name, call.operands[0].shape))
        return out

    def _handle_stack(self, stack: Stack) -> Any:
        if not isinstance(self._policy, StackPolicy):
            return self._separate(stack)
        window = self._frames[-1].window
        window.declared &= stack.func in HEARD
        name = self._names[id(self._frames[-1].module)]
        read = list(tensors_in(list(stack.bound.arguments.values())))
        noted = self._graph.call(function_name(stack.func), read[1:])
        self._meet(name, stack.blocks)
        out = self._policy.stack(len(self._found), stack)
        versions = self._graph.chain(noted, read, out, stack.blocks)
        for skip, version in pairwise(versions):
            window.entries[window.candidates] = (len(self._found), 0)
            window.candidates += 1
            self._rule.note(version, skip)
            self._found.append((Found("identity", 0, frozenset()), version, name, stack.x.shape))
        return out

    def _separate(self, call: Add | Stack) -> tuple[Tensor, Stats]:
        """Show the adds within a fused call one by one."""
        self._frames[-1].window.declared &= call.func in HEARD
        with self._mode:
            return call.separate()

    def _meet(self, owner: str, count: int = 1) -> None:
        if self._changing is not None:
            for site in range(len(self._found), len(self._found) + count):
                self._changing.meet(site, owner)

    def stop(self) -> None:
        """Take everything off the model again."""
        self._mode.switch(False)
        for hook in self._hooks:
            hook.remove()

    def finish(self) -> Plan:
        """Return what the pass has shown."""
        count = Counter(name for _, _, name, _ in self._found)
        number: Counter[str] = Counter()
        sums = {version: index for index, (_, version, _, _) in enumerate(self._found)}
        levels = Counter(sums[k] for found, *_ in self._found for k in found.path if k in sums)
        for index, (found, _, name, shape) in enumerate(self._found):
            label = name if count[name] == 1 else f"{name}[{number[name]}]"
            number[name] += 1
            self.plan.sites.append(Site(label, found.kind, tuple(shape), levels[index]))
        self.plan.calls = {event[0]: self._calls[event[0]] for event in self.plan.windows}
        self.plan.idle.update(self._weighted - self._calls.keys())
        return self.plan
