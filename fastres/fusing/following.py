"""following: the code of one module's forward as a graph of operations, in torch.fx."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final

from torch import fx, nn

from fastres.fusing.surroundings import drawing, switched, switches

_QUERIES: Final = ("size", "dim", "numel")


class NotFused(Exception):  # noqa: N818
    """Why a module keeps its own forward."""


class _Proxy(fx.Proxy):
    """Stands for a tensor; keeps what is done in place, which that of torch.fx takes for a copy."""


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def call(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return call


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior"):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    """Follows one module's own code: what its children do is their own business."""

    proxy_buffer_attributes = True  # a buffer is read at every call

    def __init__(self) -> None:
        super().__init__()
        self._switches = switches()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if switches() != self._switches:
            raise NotFused("its forward switches gradients, autocast or checkpoints")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


@dataclass(frozen=True)
class Arguments:
    """Of a forward, without self."""

    needed: tuple[str, ...]
    optional: tuple[tuple[str, Any], ...]  # and their defaults

    @classmethod
    def of(cls, kind: type[nn.Module]) -> Arguments:
        """Read them off the class of a module."""
        given = list(inspect.signature(kind.forward).parameters.values())[1:]
        for one in given:
            if one.kind is not one.POSITIONAL_OR_KEYWORD:
                raise NotFused(f"its forward has an argument by name or position alone, {one.name}")
            if not isinstance(one.default, Hashable):
                raise NotFused(f"its forward has a default that can be changed, {one.name}")
        needed = tuple(one.name for one in given if one.default is one.empty)
        return cls(needed, tuple((one.name, one.default) for one in given[len(needed) :]))

    def without_options(self, kind: type[nn.Module]) -> Callable[..., Any]:
        """Return the forward of a class with its optional arguments at their defaults."""
        names = ", ".join(("self", *self.needed))
        space: dict[str, Any] = {"original": kind}
        exec(f"def forward({names}): return original.forward({names})", space)
        forward: Callable[..., Any] = space["forward"]
        return forward

    def with_options(self, source: str) -> str:
        """Return the source of a forward which runs the original one where an option is given."""
        if not self.optional:
            return source
        names = ", ".join(("self", *self.needed))
        options = [name for name, _ in self.optional]
        same = " and ".join(f"{name} is _default_{name}" for name in options)
        return (
            f"{source}\n\n_fused = forward\n\n"
            f"def forward({names}, {', '.join(f'{name}=_default_{name}' for name in options)}):\n"
            f"    if {same}:\n        return _fused({names})\n"
            f"    return _original.forward({names}, {', '.join(options)})\n"
        )


def graph_of(module: nn.Module, arguments: Arguments) -> tuple[fx.Graph, frozenset[str]]:
    """Return the graph of a module's forward in its present mode, and the attributes it reads.

    In training mode gradients and autocast are on, else off, so that a forward which switches them
    is found in one of the two. What it takes out of lists and dicts is no attribute.

    Raises:
        NotFused: If the code is not a plain sequence of operations.
    """
    reads: set[str] = set()

    def read(self: nn.Module, name: str) -> Any:
        reads.add(name)
        return kind.__getattribute__(self, name)

    def write(self: nn.Module, name: str, value: Any) -> None:
        raise NotFused(f"its forward sets {name}")

    kind = type(module)
    follows = {"__getattribute__": read, "forward": arguments.without_options(kind)}
    module.__class__ = type(kind.__name__, (kind,), follows)
    type(module).__setattr__ = write  # type: ignore[method-assign]
    try:
        with switched(module.training), drawing() as drawn:
            graph = _Tracer().trace(module)
            if drawn():
                raise NotFused("its forward draws random numbers")
    except NotFused:
        raise
    except Exception as error:  # whatever the code does with what is no tensor
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise NotFused(f"its forward cannot be followed: {reason}") from error
    finally:
        object.__setattr__(module, "__class__", kind)
    for node in reversed(graph.nodes):
        node.type = None
        if node.op == "call_method" and node.target in _QUERIES and not node.users:
            graph.erase_node(node)  # asked by a check, which has passed
    return graph, frozenset(reads - set(dir(nn.Module())))
