"""tracing: the rule that finds the residual adds in a graph of tensor versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fastres.versions import MAPS, PRODUCTS, SUMS, Graph

Kind = Literal["identity", "projection"]


@dataclass(slots=True, frozen=True)
class Found:
    """A residual add: which operand is the skip, and the versions on the way of the branch."""

    kind: Kind
    skip: int  # 0 or 1, the position of the skip among the two operands
    path: frozenset[int]


class Rule:
    """Decides, at each add of a pass, from what the two sides were computed."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._nodes = graph, graph.nodes
        self._skips: dict[int, int] = {}  # version of the sum at a site -> version of its skip

    def note(self, total: int, skip: int) -> None:
        """Remember which version the sum at a site is, and which its skip."""
        self._skips[total] = skip

    def find(self, a: Tensor, b: Tensor) -> Found | None:
        """Decide whether the sum of a and b is a residual add.

        Identity: one side is an ancestor of the other. Projection: one side is a linear function of
        an ancestor of the other, which is not. Either way the branch reads a Parameter on its way.
        """
        if self._graph.is_parameter(a) or self._graph.is_parameter(b):
            return None
        sides = (self._graph.version(a), self._graph.version(b))
        if sides[0] == sides[1]:
            return None
        for test in (self._identity, self._projection):
            for skip in (0, 1):
                path = test(sides[skip], sides[1 - skip])
                if path:
                    kind: Kind = "identity" if test == self._identity else "projection"
                    return Found(kind, skip, frozenset(path))
                if path is not None:
                    return None
        return None

    def declared(self, x: Tensor, f: Tensor) -> Found:
        """Describe an add that the model itself declares to be residual, with x as the skip."""
        found = self.find(x, f)
        if found is not None and found.skip == 0:
            return found
        skip, branch = self._graph.version(x), self._graph.version(f)
        path = self._between(skip, branch)
        return Found("identity" if path else "projection", 0, frozenset(path | {branch}))

    def _identity(self, skip: int, branch: int) -> set[int] | None:
        """Return the way from skip to branch; empty if it reads no Parameter, None if none.

        A sum of three terms is two adds: while nothing else has read a site's sum, the skip of that
        site stands for it.
        """
        while True:
            if path := self._between(skip, branch):
                return path if self._reads_weight(path, skip) else set()
            if skip not in self._skips or self._nodes[skip].read:
                return None
            skip = self._skips[skip]

    def _projection(self, skip: int, branch: int) -> set[int] | None:
        chain = self._chain(skip)
        if not chain:
            return None
        above = self._ancestors(branch, chain[-1] - 1)
        source = next((i for i in chain if i in above), -1)
        if source < 0:
            return None
        path = self._between(source, branch)
        if not self._reads_weight(path, source) or self._is_linear(path, source):
            return None
        # Two different pieces of one tensor are two tensors (Res2Net, recurrent cells, FiLM).
        apart = self._exits(source, self._between(source, skip)), self._exits(source, path)
        return None if None not in apart[0] | apart[1] and not apart[0] & apart[1] else path

    def _chain(self, k: int) -> list[int]:
        chain = []
        while (k := self._nodes[k].parent) >= 0:
            chain.append(k)
        return chain

    def _ancestors(self, k: int, after: int) -> set[int]:
        """Return k and its ancestors that are later than `after`."""
        seen, stack = {k}, [k]
        while stack:
            for i in self._nodes[stack.pop()].inputs:
                if i > after and i not in seen:
                    seen.add(i)
                    stack.append(i)
        return seen

    def _between(self, top: int, bottom: int) -> set[int]:
        """Return what descends from top and is bottom or an ancestor of it, without top."""
        path: set[int] = set()
        if bottom > top:
            for k in sorted(self._ancestors(bottom, top)):
                if any(i == top or i in path for i in self._nodes[k].inputs):
                    path.add(k)
        return path

    def _reads_weight(self, path: set[int], top: int) -> bool:
        if any(self._nodes[k].weight for k in path):
            return True
        beside = {i for k in path for i in self._nodes[k].inputs} - path - {top}
        return any(self._nodes[i].weightlike for i in beside)

    def _is_linear(self, path: set[int], top: int) -> bool:
        """Tell whether the way from top is linear in top, all else held fixed."""
        for k in path:
            node = self._nodes[k]
            along = sum(i == top or i in path for i in node.inputs)
            if node.name not in SUMS and not (node.name in MAPS | PRODUCTS and along == 1):
                return False
        return True

    def _exits(self, top: int, path: set[int]) -> set[tuple[Any, ...] | None]:
        return {self._nodes[k].part for k in path if top in self._nodes[k].inputs}
