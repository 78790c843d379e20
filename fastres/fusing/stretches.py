"""stretches: finds, in the code of one module, the adds that have a fused form, and writes it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, cast

import torch
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _NormBase

from fastres.declaring import add
from fastres.fusing.following import Arguments, NotFused, graph_of
from fastres.fusing.fused import (
    NORMS,
    Code,
    activated,
    is_bare,
    is_fusible,
    join,
    norm_of,
    run_branch,
)
from fastres.fusing.sequences import mlp_of

_INTO: Final = (operator.iadd, "add_", "__iadd__")
ADDS: Final = (operator.add, torch.add, add, "add", "__add__", *_INTO)
RELUS: Final = (torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_")


def _check(module: nn.Module) -> None:
    """Raise NotFused if a module's forward is not simply that of its class."""
    if "forward" in vars(module):
        raise NotFused("it has a forward of its own")
    if not is_fusible(type(module)):
        raise NotFused("its class has a way of its own to be copied")


def rewrite(module: nn.Module, skips: Sequence[int] | None, recompute: bool) -> tuple[Code, str]:
    """Write the fused forward of a module; return it, and what is fused in it.

    Args:
        module: Owns one or more residual adds.
        skips: Of its sites, in the order in which they ran, which operand is the skip; None: told
            from the graph.
        recompute: Whether what can be computed again is not kept for the backward pass.

    Raises:
        NotFused: If there is none, with the reason.
    """
    arguments, graph, reads = read(module)
    adds = [node for node in graph.nodes if is_add(node)]
    if skips is None:
        adds = [node for node in adds if _weight(module, node, 0) != _weight(module, node, 1)]
        skips = [int(_weight(module, node, 0) > _weight(module, node, 1)) for node in adds]
    if not adds or len(skips) % len(adds):
        raise NotFused(f"its forward has {len(adds)} adds, and {len(skips)} are residual")
    skips, again = skips[: len(adds)], skips[len(adds) :]
    if any(skip != skips[i % len(adds)] for i, skip in enumerate(again)):
        raise NotFused("its skip and its branch change places from call to call")
    mlp = mlp_of(module, adds[0], skips[0]) if len(adds) == 1 else None
    what = [_fuse(module, graph, *each) for each in zip(adds, skips, strict=True)]
    _activate(module, graph)
    return replace(write(arguments, graph, reads, recompute), mlp=mlp), ", ".join(what)


def read(module: nn.Module) -> tuple[Arguments, fx.Graph, frozenset[str]]:
    """Return arguments, graph and attributes read of a module's forward, alike in both modes."""
    _check(module)
    arguments = Arguments.of(type(module))
    graph, reads = graph_of(module, arguments)
    _toggle(module)
    try:
        other, _ = graph_of(module, arguments)
    finally:
        _toggle(module)
    if str(other) != str(graph):
        raise NotFused("its forward depends on its mode, training or eval")
    return arguments, graph, reads


def _toggle(module: nn.Module) -> None:
    """Give a module, and every one in it, the other mode."""
    for each in module.modules():
        vars(each)["training"] = not each.training


def write(
    arguments: Arguments, graph: fx.Graph, reads: frozenset[str], recompute: bool = False
) -> Code:
    """Write the code of a forward from its graph."""
    python = graph.python_code("self")
    known = fx.Graph().python_code("self").globals
    names = {k: v for k, v in python.globals.items() if k not in known}
    names |= {f"_default_{name}": default for name, default in arguments.optional}
    return Code(arguments.with_options(python.src), tuple(names.items()), reads, recompute)


def is_add(node: fx.Node) -> bool:
    """Tell whether a node adds two others."""
    return (
        node.op in ("call_function", "call_method")
        and node.target in ADDS
        and len(node.args) == 2
        and all(isinstance(each, fx.Node) for each in node.args)
    )


def _above(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a node and all that it is computed from."""
    seen, left = {node}, [node]
    while left:
        yield (one := left.pop())
        left += [each for each in one.all_input_nodes if each not in seen]
        seen.update(one.all_input_nodes)


def _weight(module: nn.Module, total: fx.Node, side: int) -> int:
    """Count the modules on the way to one side of a sum: the branch has more."""
    nodes = _above(cast("fx.Node", total.args[side]))
    return sum(
        len(list(module.get_submodule(str(node.target)).modules()))
        for node in nodes
        if node.op == "call_module"
    )


def _fuse(module: nn.Module, graph: fx.Graph, total: fx.Node, side: int) -> str:
    """Rewrite one add, with the batch norm before it and the ReLU after it; return what it was."""
    skip, branch = (cast("fx.Node", total.args[i]) for i in (side, 1 - side))
    into = total.target in _INTO
    if total.kwargs:
        raise NotFused("its add scales one side")
    if into and total.args[0] is skip:
        raise NotFused("it adds into its skip in place")
    norm, relu = _norm(module, branch), _relu(module, total)
    if into and not norm and relu is None:
        raise NotFused("it adds in place, and there is nothing beside that")
    if norm:
        with graph.inserting_before(branch):
            tail = graph.get_attr(str(branch.target))
            begun = graph.call_function(run_branch, (tail, branch.args[0]))
        branch.replace_all_uses_with(begun)
        graph.erase_node(branch)
        branch = begun
    end = total if relu is None else relu
    with graph.inserting_before(end):
        act: Any = relu is not None
        if relu is not None and relu.op == "call_module":
            act = graph.get_attr(str(relu.target))
        joined = graph.call_function(join, (skip, branch, act, into))
    end.replace_all_uses_with(joined)
    graph.erase_node(end)
    if relu is not None:
        graph.erase_node(total)
    parts = ["batch norm"] * norm + ["add"] + ["ReLU"] * (relu is not None)
    return " + ".join(parts)


def _activate(module: nn.Module, graph: fx.Graph) -> None:
    """Rewrite each batch norm within a branch, and the ReLU after it, as one call."""
    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        relu = _relu(module, node)
        if relu is None or not is_bare(module.get_submodule(str(node.target)), *NORMS):
            continue
        with graph.inserting_before(relu):
            given: list[Any] = [graph.get_attr(str(node.target)), node.args[0]]
            if relu.op == "call_module":
                given.append(graph.get_attr(str(relu.target)))
            relu.replace_all_uses_with(graph.call_function(activated, tuple(given)))
        graph.erase_node(relu)
        graph.erase_node(node)


def _norm(module: nn.Module, branch: fx.Node) -> bool:
    """Tell whether a branch ends in a batch norm that can wait for the add."""
    if branch.op != "call_module" or len(branch.users) != 1:
        return False
    tail = module.get_submodule(str(branch.target))
    if norm_of(tail) is None:
        if isinstance(tail, _NormBase):
            has = "has hooks" if type(tail) in NORMS else f"is a {type(tail).__name__}"
            raise NotFused(f"its batch norm {branch.target} {has}")
        return False
    if len(branch.args) != 1 or branch.kwargs:
        return False
    given = branch.args[0]
    begins = isinstance(tail, nn.Sequential) and len(tail) > 1  # what the norm takes is its own
    return begins or (isinstance(given, fx.Node) and len(given.users) == 1)


def _relu(module: nn.Module, total: fx.Node) -> fx.Node | None:
    """Return the ReLU that takes a sum which nobody else takes."""
    if len(total.users) != 1:
        return None
    (user,) = total.users
    if user.args[:1] != (total,):
        return None
    if user.op == "call_module":
        return user if is_bare(module.get_submodule(str(user.target)), nn.ReLU) else None
    known = user.op in ("call_function", "call_method") and user.target in RELUS
    return user if known else None
