"""schedules: gates that change from step to step: random blocks, stochastic depth.

Each is a function of the step alone: the same seed and step give the same gates, so a training run
that was stopped goes on with `fastres.gate(model, schedule, step=...)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastres.adds import Site


class RandomBlocks:
    """Exactly `keep` of the sites open at each step, chosen at random; the others are deleted.

    Effective-path training (Veit et al. 2016, arXiv 1605.06431, section 4.4): 23 of 54 modules at
    each mini-batch, so that path lengths are Binomial(23, 1/2). The paper does not say what happens
    to downsampling modules: a deleted one keeps its projection here, one that is not among the
    sites is always open. At test time all blocks are open and nothing is scaled.

    Args:
        sites: Which are chosen from, as `fastres.trace` lists them, or their names.
        keep: How many are open, 0 to the number of sites.
        seed: Of the choice.

    Raises:
        ValueError: If there are more to keep than sites, or a site twice.

    Example:
        >>> schedule = RandomBlocks(["a", "b", "c", "d"], keep=1, seed=0)
        >>> sorted(schedule(0).values()), schedule(7) == schedule(7)
        ([0.0, 0.0, 0.0, 1.0], True)
    """

    def __init__(self, sites: Sequence[Site | str], keep: int, seed: int = 0) -> None:
        self.names = _names("RandomBlocks", sites)
        if not 0 <= keep <= len(self.names):
            raise ValueError(
                f"RandomBlocks: keep must be 0 to {len(self.names)}, the sites, got {keep}"
            )
        self.keep, self.seed = keep, _seed("RandomBlocks", seed)

    def __call__(self, step: int) -> dict[str, float]:
        """Return the gate of every site at a step, 0 or 1."""
        chosen = np.random.default_rng((self.seed, step)).permutation(len(self.names))
        return {
            name: float(place < self.keep) for name, place in zip(self.names, chosen, strict=True)
        }


class StochasticDepth:
    """Each site open with its own probability at each step (Huang et al. 2016, arXiv 1603.09382).

    Survival falls linearly: site l of L, counted from 1, is open with 1 - l / L * (1 - last).

    Args:
        sites: As `fastres.trace` lists them, or their names, in order.
        last: Survival of the last site, 0 to 1.
        seed: Of the choice.

    Attributes:
        expected: Site name -> survival: the gates of test time, when every branch is scaled by it.

    Raises:
        ValueError: If last is no probability, or a site is there twice.

    Example:
        >>> schedule = StochasticDepth(["a", "b"], last=0.5)
        >>> schedule.expected
        {'a': 0.75, 'b': 0.5}
    """

    def __init__(self, sites: Sequence[Site | str], last: float = 0.5, seed: int = 0) -> None:
        names = _names("StochasticDepth", sites)
        if not 0 <= last <= 1:
            raise ValueError(f"StochasticDepth: last must be 0 to 1, got {last}")
        lost = (1 - last) / len(names) if names else 0.0
        self.expected = {name: 1 - lost * place for place, name in enumerate(names, 1)}
        self.seed = _seed("StochasticDepth", seed)

    def __call__(self, step: int) -> dict[str, float]:
        """Return the gate of every site at a step, 0 or 1."""
        drawn = np.random.default_rng((self.seed, step)).random(len(self.expected))
        pairs = zip(self.expected.items(), drawn, strict=True)
        return {name: float(value < survival) for (name, survival), value in pairs}


def _names(where: str, sites: Sequence[Site | str]) -> tuple[str, ...]:
    names = tuple(site.name if isinstance(site, Site) else site for site in sites)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{where}: sites must be different, got {twice!r} twice")
    return names


def _seed(where: str, seed: int) -> int:
    if seed < 0:
        raise ValueError(f"{where}: seed must be >= 0, got {seed}")
    return seed
