"""counts: how many paths of each length there are, exactly, and one of them at random."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class Choice:
    """A site, as the choice that a path makes there: its skip, or its branch with all inside it."""

    site: int
    counted: bool = True  # whether the branch counts one; else its two ways are one
    forced: bool = False  # whether every path goes through the branch
    inside: list[Choice] = field(default_factory=list)

    def counts(self) -> list[int]:
        """Count its ways by length."""
        through = path_counts(self.inside)
        if not self.counted:
            return through
        return [0 if self.forced else 1, *through]


def choices(
    levels: Sequence[int], counted: Iterable[int], start: int | None = None
) -> list[Choice]:
    """Arrange the sites of a model as nested choices.

    Args:
        levels: In how many branches each site lies, in the order in which they ran: a site that
            lies in a branch runs before the add of that branch.
        counted: The sites that lie between the start and the loss and are counted.
        start: Site at whose block the paths begin; None for the model's input.

    Returns:
        The outermost choices, in order. Sites side by side in one branch stand one after the other.
    """
    known = set(counted)
    found = [Choice(site, site in known) for site in range(len(levels))]
    outermost: list[Choice] = []
    latest: dict[int, Choice] = {}  # level -> the first site after this one
    around: dict[int, Choice] = {}  # site -> the one in whose branch it lies
    for site in reversed(range(len(levels))):
        parent = latest.get(levels[site] - 1)
        (outermost if parent is None else parent.inside).insert(0, found[site])
        if parent is not None:
            around[site] = parent
        latest[levels[site]] = found[site]
    while start in around:
        around[start].forced = True
        start = around[start].site
    return outermost


def path_counts(series: Iterable[Choice]) -> list[int]:
    """Count the paths through choices one after the other, by length: [longest + 1].

    L choices with nothing inside have the binomial coefficients of L.

    Example:
        >>> path_counts(choices([0, 0, 0], range(3)))
        [1, 3, 3, 1]
    """
    total = [1]
    for choice in series:
        total = _times(total, choice.counts())
    return total


def _times(a: Sequence[int], b: Sequence[int]) -> list[int]:
    product = [0] * (len(a) + len(b) - 1)
    for j, n in enumerate(b):
        if n:
            for i, m in enumerate(a):
                product[i + j] += m * n
    return product


class PathSampler:
    """Draws paths of a given length, each with the same probability."""

    def __init__(self, series: Sequence[Choice], seed: int) -> None:
        self._random, self._series = random.Random(seed), series
        self._after: dict[int, list[list[int]]] = {}  # id of a series -> counts of its ends

    def draw(self, length: int) -> set[int]:
        """Return the counted sites through whose branch a random path of this length goes."""
        taken: set[int] = set()
        self._walk(self._series, length, taken)
        return taken

    def _walk(self, series: Sequence[Choice], length: int, taken: set[int]) -> None:
        ends = self._ends(series)
        for choice, rest in zip(series, ends[1:], strict=True):
            ways = [
                n * rest[length - used] if 0 <= length - used < len(rest) else 0
                for used, n in enumerate(choice.counts())
            ]
            place = self._random.randrange(sum(ways))
            used = 0
            while place >= ways[used]:
                place -= ways[used]
                used += 1
            length -= used
            if not choice.counted:
                self._walk(choice.inside, used, taken)
            elif used:
                taken.add(choice.site)
                self._walk(choice.inside, used - 1, taken)

    def _ends(self, series: Sequence[Choice]) -> list[list[int]]:
        """Return the counts of the choices from each one on."""
        if id(series) not in self._after:
            ends = [[1]]
            for choice in reversed(series):
                ends.insert(0, _times(ends[0], choice.counts()))
            self._after[id(series)] = ends
        return self._after[id(series)]
