"""graph: what the autograd graph of one pass tells about the blocks that it went through."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

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
    ordered = sorted(_leading([top], bottom), key=_created)
    leading = set(ordered)
    found: set[Node] = set()
    open_ways: set[Node] = {top.node}  # what the nodes so far lead to
    for node in reversed(ordered):
        if node in open_ways:
            if len(open_ways) == 1:
                found.add(node)
            open_ways.remove(node)
            open_ways |= {way for way, _ in node.next_functions if way in leading}
    return found


def _leading(tops: Iterable[GradientEdge], bottom: GradientEdge) -> set[Node]:
    """Return the nodes on the ways from the tops down to the bottom."""
    leading = {bottom.node}
    for node in sorted({node for node, _ in _above(tops)}, key=_created):
        if any(way in leading for way, _ in node.next_functions):
            leading.add(node)
    return leading


def _created(node: Node) -> int:
    """Tell when a node was made: before all that was computed from it."""
    number: int = node._sequence_nr()
    return -1 if number == _LEAF else number


def nodes(edge: GradientEdge) -> Iterator[Node]:
    """Yield every node that an edge was computed from, once."""
    yield from dict.fromkeys(node for node, _ in _above([edge]))


def branch_weights(
    blocks: Sequence[tuple[int, GradientEdge | None, GradientEdge]], bottom: GradientEdge
) -> list[tuple[int, GradientEdge]]:
    """Find the weights that each branch uses: what enters it and does not depend on the bottom.

    That is a parameter or what was made of parameters alone, such as a slice of one.

    Args:
        blocks: Level, skip and branch of each block, in the order in which they ran. The level is
            the number of other branches that it lies in.
        bottom: What is differentiated by.

    Returns:
        Position of the block and place of the weight, for every weight. One used in a nested block
        belongs to the inner one, one used in several blocks to the first.
    """
    stream = _leading([branch for _, _, branch in blocks], bottom)
    owner: dict[Key, int] = {}
    levels: dict[int, dict[Key, None]] = {}  # what earlier blocks of a level have come by
    for position, (level, skip, branch) in enumerate(blocks):
        known = levels.setdefault(level, {})
        if skip is not None:
            _above([skip], known)
        for node, _ in _above([branch], known):
            if node in stream and node is not bottom.node:
                for way, nr in node.next_functions:
                    if way is not None and way not in stream:
                        owner.setdefault((way, nr), position)
    return [(position, GradientEdge(*key)) for key, position in owner.items()]


def size_of(edge: GradientEdge) -> int:
    """Return the bytes of the tensor at an edge."""
    facts = edge.node._input_metadata[edge.output_nr]
    return math.prod(facts.shape) * facts.dtype.itemsize


def mixes_samples(edge: GradientEdge) -> bool:
    """Tell whether a batch norm normalised by the statistics of its batch on the way to an edge."""
    for node in nodes(edge):
        alone = "SyncBatchNorm" in node.name()  # it runs in train mode only
        if "BatchNorm" in node.name() and getattr(node, "_saved_training", alone):
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
