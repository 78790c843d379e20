"""runs: finds the runs of basic blocks in a model, and writes the forward that stacks them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Self, cast

from torch import fx, nn

from fastres.fusing.folding import Basic, conv_fits, is_idle
from fastres.fusing.following import NotFused
from fastres.fusing.fused import Code, is_bare
from fastres.fusing.stacked import children_of, is_stacked, run_stack
from fastres.fusing.stretches import RELUS, is_add, read, write

_ALONE: Final = "no other block of its kind comes right before or after it"


@dataclass
class Stacks:
    """The runs of basic blocks in a model.

    Attributes:
        codes: Module -> the code of its forward: of the blocks, and of the modules that call them.
        stacked: Block -> the stack that it is in.
        apart: Block -> why it is in none.
    """

    codes: dict[str, Code] = field(default_factory=dict)
    stacked: dict[str, str] = field(default_factory=dict)
    apart: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, codes: Mapping[str, Code]) -> Self:
        """Find them among the blocks that are fused with these codes."""
        found, basics = cls(), {}
        callers: dict[str, list[str]] = defaultdict(list)
        for name, code in codes.items():
            try:
                module = model.get_submodule(name)
                basics[module] = match_basic(module)
            except NotFused as error:
                found.apart[name or type(model).__name__] = str(error)
            else:
                found.codes[name] = replace(code, basic=basics[module])
                callers[_caller(model, name)].append(name)
        for caller, names in callers.items():
            found._stack(model, caller, names, codes, basics)
        return found

    def _stack(
        self,
        model: nn.Module,
        caller: str,
        names: list[str],
        codes: Mapping[str, Code],
        basics: Mapping[nn.Module, Basic],
    ) -> None:
        """Rewrite one module that calls blocks, and note what became of each of them."""
        reason = _ALONE
        try:
            if caller in codes:
                raise NotFused("what calls it is a block itself")
            self.codes[caller], runs = rewrite_runs(model.get_submodule(caller), basics)
        except NotFused as error:
            runs, reason = [], str(error)
        for run in runs:
            text = f"conv_stack of {len(run)} blocks in eval mode"
            self.stacked |= {f"{caller}.{name}" if caller else name: text for name in run}
        self.apart |= {name: reason for name in names if name not in self.stacked}


def _caller(model: nn.Module, name: str) -> str:
    """Return the name of the module that calls a block: above it, past lists of modules."""
    name = name.rpartition(".")[0]
    while name and type(model.get_submodule(name)) is nn.ModuleList:
        name = name.rpartition(".")[0]
    return name


def match_basic(module: nn.Module) -> Basic:
    """Return what a block is made of, if it is relu(x + norm(conv(relu(norm(conv(x)))))).

    Raises:
        NotFused: If a stack cannot hold it, with the reason.
    """
    arguments, graph, _ = read(module)
    if len(arguments.needed) != 1:
        raise NotFused("its forward takes more than a stream")
    return _Match(module, graph).basic()


class _Match:
    """Goes up the graph of a block from its end."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self._module = module
        self._x = next(node for node in graph.nodes if node.op == "placeholder")
        self._end = next(node for node in graph.nodes if node.op == "output")
        self._others: list[str] = []

    def basic(self) -> Basic:
        total = self._relu(self._above(self._end), "it does not end in a ReLU")
        if not is_add(total) or total.kwargs:
            raise NotFused("it does not end in an add and a ReLU")
        sides = [self._through(cast("fx.Node", side)) for side in total.args]
        if self._x not in sides:
            raise NotFused("its skip is not the identity")
        branch = sides[1 - sides.index(self._x)]
        norms, convs = ["", ""], ["", ""]
        norms[1], node = self._child(branch, nn.BatchNorm2d)
        convs[1], node = self._child(node, nn.Conv2d)
        node = self._relu(node, "there is no ReLU between its convolutions")
        norms[0], node = self._child(node, nn.BatchNorm2d)
        convs[0], node = self._child(node, nn.Conv2d)
        if node is not self._x:
            raise NotFused("its branch is not two convolutions, each with its batch norm")
        if not all(conv_fits(self._module.get_submodule(name)) for name in convs):
            raise NotFused("its convolutions are not of 3x3 with stride 1, padding 1, one group")
        if any("." in name for name in (*norms, *convs, *self._others)):
            raise NotFused("its convolutions are not its own children")
        return Basic((convs[0], convs[1]), (norms[0], norms[1]), tuple(self._others))

    def _above(self, node: fx.Node) -> fx.Node:
        """Return what a node takes first, past all that does nothing."""
        taken = node.args[0] if node.args else None
        if not isinstance(taken, fx.Node):
            raise NotFused("its forward returns no tensor")
        if taken is not self._x and len(taken.users) != 1:
            raise NotFused("what its branch computes is used twice")
        return self._through(taken)

    def _through(self, node: fx.Node) -> fx.Node:
        while node.op == "call_module" and len(node.args) == 1:
            name = str(node.target)
            if not is_idle(self._module.get_submodule(name)):
                break
            self._others.append(name)
            node = cast("fx.Node", node.args[0])
        return node

    def _relu(self, node: fx.Node, reason: str) -> fx.Node:
        """Return what a ReLU takes."""
        if node.op == "call_module":
            if not is_bare(self._module.get_submodule(str(node.target)), nn.ReLU):
                raise NotFused(reason)
            self._others.append(str(node.target))
        elif node.op not in ("call_function", "call_method") or node.target not in RELUS:
            raise NotFused(reason)
        return self._above(node)

    def _child(self, node: fx.Node, kind: type[nn.Module]) -> tuple[str, fx.Node]:
        """Return the name of a child of this class and what it takes."""
        name = str(node.target)
        if node.op == "call_module" and is_bare(self._module.get_submodule(name), kind):
            return name, self._above(node)
        raise NotFused("its branch is not two convolutions, each with its batch norm")


def rewrite_runs(
    module: nn.Module, basics: Mapping[nn.Module, Basic]
) -> tuple[Code, list[list[str]]]:
    """Write the forward of a module whose children are blocks, each run of them as one call.

    Args:
        module: Calls blocks in turn.
        basics: The blocks that stacks can hold.

    Returns:
        The code, and the names of the blocks in each run.

    Raises:
        NotFused: If there is none, with the reason.
    """
    arguments, graph, reads = read(module)
    found: list[list[str]] = []
    for run in _runs(module, graph, basics):
        first, last = run[0], run[-1]
        with graph.inserting_before(last):
            blocks = [graph.get_attr(str(node.target)) for node in run]
            call = graph.call_function(run_stack, (first.args[0], *blocks))
        last.replace_all_uses_with(call)
        for node in reversed(run):
            graph.erase_node(node)
        found.append([str(node.target) for node in run])
    if not found:
        raise NotFused(_ALONE)
    targets = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    paths = {"", *(path.rpartition(".")[0] for path in targets)}
    return _guarded(write(arguments, graph, reads), children_of(module, paths)), found


def _runs(
    module: nn.Module, graph: fx.Graph, basics: Mapping[nn.Module, Basic]
) -> list[list[fx.Node]]:
    """Return the longest runs of two or more blocks, each fed by the one before it."""
    runs: list[list[fx.Node]] = []
    for node in graph.nodes:
        if not _is_block(module, node, basics):
            continue
        before = runs[-1][-1] if runs else None
        if before is not None and node.args[0] is before and len(before.users) == 1:
            runs[-1].append(node)
        else:
            runs.append([node])
    return [run for run in runs if len(run) > 1]


def _is_block(module: nn.Module, node: fx.Node, basics: Mapping[nn.Module, Basic]) -> bool:
    if node.op != "call_module" or module.get_submodule(str(node.target)) not in basics:
        return False
    options = (*node.args[1:], *node.kwargs.values())
    return len(node.args) > 0 and all(option is None for option in options)


def _guarded(code: Code, names: Iterable[tuple[str, tuple[str, ...]]]) -> Code:
    """Let the original forward run where `is_stacked` says so."""
    source = (
        f"{code.source}\n\n_stacked = forward\n\n"
        "def forward(self, *args, **kwargs):\n"
        "    run = _stacked if is_stacked(self, children) else _original.forward\n"
        "    return run(self, *args, **kwargs)\n"
    )
    names_used = (*code.names, ("is_stacked", is_stacked), ("children", tuple(names)))
    return replace(code, source=source, names=names_used)
