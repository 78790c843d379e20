"""path_graph: what the autograd graph of one pass tells about the blocks that it went through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

Key = tuple[Node, int]  # an edge, comparable: which output of which node
_LEAF = (1 << 64) - 1  # the sequence number of the nodes that belong to leaves


def fork(one: GradientEdge, other: GradientEdge) -> GradientEdge | None:
    """Return the latest tensor that both edges were computed from; None where there is none.

    Of the skip and the branch of a block this is the stream that enters the block, also where the
    skip is a projection or a copy.
    """
    common = _above([one]).keys() & _above([other]).keys()
    inner = [key for key in common if key[0]._sequence_nr() != _LEAF]
    if not inner:
        return None
    return GradientEdge(*max(inner, key=lambda key: key[0]._sequence_nr()))


def _above(edges: Iterable[GradientEdge], known: dict[Key, None] | None = None) -> dict[Key, None]:
    """Return the edges, and all that they were computed from, that are not known yet; note them."""
    known = {} if known is None else known
    found: dict[Key, None] = {}
    stack: list[Key] = [(edge.node, edge.output_nr) for edge in edges]
    while stack:
        key = stack.pop()
        if key not in known and key not in found:
            found[key] = None
            stack += [(node, nr) for node, nr in key[0].next_functions if node is not None]
    known.update(found)
    return found


def cuts(top: GradientEdge, bottom: GradientEdge) -> set[Node]:
    """Return the nodes through which every way from top down to bottom goes."""
    graph = {node for node, _ in _above([top])}
    ordered = sorted(graph, key=_created)
    leading = {bottom.node}  # to the bottom
    for node in ordered:
        if any(next_node in leading for next_node, _ in node.next_functions):
            leading.add(node)
    found: set[Node] = set()
    open_ways: set[Node] = {top.node}  # what the nodes so far lead to
    for node in reversed(ordered):
        if node in open_ways and node in leading:
            if len(open_ways) == 1:
                found.add(node)
            open_ways.remove(node)
            open_ways |= {way for way, _ in node.next_functions if way in leading}
    return found


def _created(node: Node) -> int:
    """Tell when a node was made: before all that was computed from it."""
    number: int = node._sequence_nr()
    return -1 if number == _LEAF else number


def nodes(edge: GradientEdge) -> Iterator[Node]:
    """Yield every node that an edge was computed from, once."""
    yield from dict.fromkeys(node for node, _ in _above([edge]))


def branch_parameters(
    blocks: Iterable[tuple[int, GradientEdge | None, GradientEdge]], wanted: Iterable[Tensor]
) -> dict[int, int]:
    """Tell in whose branch each parameter is used.

    Args:
        blocks: Level, skip and branch of each block, in the order in which they ran. The level is
            the number of other branches that it lies in.
        wanted: The parameters.

    Returns:
        id of a parameter -> position of its block. A parameter of a nested block belongs to the
        inner one, a parameter of several blocks to the first. Those of no branch are absent.
    """
    owner: dict[int, int] = {}
    ids = {id(parameter) for parameter in wanted}
    levels: dict[int, dict[Key, None]] = {}  # what earlier blocks of a level have come by
    for position, (level, skip, branch) in enumerate(blocks):
        known = levels.setdefault(level, {})
        if skip is not None:
            _above([skip], known)
        for node, _ in _above([branch], known):
            parameter = getattr(node, "variable", None)
            if id(parameter) in ids:
                owner.setdefault(id(parameter), position)
    return owner


def mixes_samples(edge: GradientEdge) -> bool:
    """Tell whether a batch norm normalised by the statistics of its batch on the way to an edge."""
    for node in nodes(edge):
        if "BatchNorm" in node.name() and getattr(node, "_saved_training", False):
            saved = getattr(node, "_saved_input", None)
            if saved is None or saved.size(0) > 1:  # instance norm calls it with one sample
                return True
    return False


def custom_functions(edge: GradientEdge) -> list[str]:
    """Name the functions with a backward in Python, not those of fastres, above an edge."""
    known = {getattr(node, "_forward_cls", None) for node in nodes(edge)}
    classes = [each for each in known if each is not None]
    others = [each for each in classes if each.__module__.partition(".")[0] != "fastres"]
    return sorted(each.__qualname__ for each in others)
