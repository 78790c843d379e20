"""initialisations: how the branches of fastres.nn start, by name, each with its paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

# name -> gain: Var(W) = gain^2 / fan_in keeps E[act(W x)^2] near Var(x)
GAINS: Final[Mapping[str, float]] = MappingProxyType(
    {
        "relu": math.sqrt(2),
        "gelu": math.sqrt(2),
        "gelu_tanh": math.sqrt(2),
        "silu": math.sqrt(2),
        "tanh": 5 / 3,
        "sigmoid": 1.0,
        "identity": 1.0,
    }
)


class Branches(NamedTuple):
    """The parameters of L branches that all have n weight matrices, as views or as they are."""

    weights: tuple[Tensor, ...]  # n times [L, out, in], from the first matrix to the last
    biases: tuple[Tensor, ...]  # of any shape
    gate: Tensor | None  # [L], the trained scale of each branch; None: it has none
    gain: float  # of the activation between two matrices


@runtime_checkable
class Branched(Protocol):
    """A module that tells which of its parameters are its branches."""

    def branches(self) -> Branches:
        """List them."""


class Initialisation(NamedTuple):
    """One way to start: what it does, and who proposed it."""

    name: str
    what: str
    paper: str
    gate: float  # the value at which a trained gate starts
    draw: Callable[[Branches, int], None]  # the weights, of L branches in all; biases become 0


def initialise(module: nn.Module, name: str) -> None:
    """Draw the branches of a module of fastres.nn anew, from torch's global generator.

    Biases become 0, and trained gates start at 1 unless the initialisation says otherwise. What
    is not in a branch, such as the head of a ResidualMLP, stays as it is.

    Args:
        module: A ResidualMLP, ResidualStack or ShortcutNetwork, or anything that contains some: L
            is the number of branches in all of it.
        name: One of INITIALISATIONS.

    Raises:
        ValueError: If the name is not known, the module has no branches, or skipinit or rezero
            meets branches without a trained gate.

    Example:
        >>> stack = nn.Sequential()  # of any modules
        >>> initialise(stack, "fixup")
        Traceback (most recent call last):
        ValueError: initialise: module must have branches of fastres.nn, got Sequential
    """
    if name not in INITIALISATIONS:
        known = ", ".join(INITIALISATIONS)
        raise ValueError(f"initialise: name must be one of {known}, got {name!r}")
    chosen = INITIALISATIONS[name]
    found = [part.branches() for part in module.modules() if isinstance(part, Branched)]
    if not found:
        kind = type(module).__name__
        raise ValueError(f"initialise: module must have branches of fastres.nn, got {kind}")
    if chosen.gate != 1 and any(branches.gate is None for branches in found):
        raise ValueError(f"initialise: module must have trained gates for {name}, got none")
    with torch.no_grad():
        depth = max(sum(len(branches.weights[0]) for branches in found), 1)
        for branches in found:
            chosen.draw(branches, depth)
            for bias in branches.biases:
                bias.zero_()
            if branches.gate is not None:
                branches.gate.fill_(chosen.gate)


def _xavier(branches: Branches, _: int) -> None:
    for weight in branches.weights:
        weight.normal_(std=math.sqrt(2 / (weight.size(-1) + weight.size(-2))))


def _zero(branches: Branches, depth: int) -> None:
    _xavier(branches, depth)
    for weight in branches.weights:
        weight.mul_(0.01)


def _orthogonal(branches: Branches, _: int) -> None:
    for weight in branches.weights:
        for matrix in weight.unbind(0):
            nn.init.orthogonal_(matrix)


def _he(branches: Branches, _: int) -> None:
    for weight in branches.weights:
        weight.normal_(std=branches.gain / math.sqrt(weight.size(-1)))


def _fixup(branches: Branches, depth: int) -> None:
    _he(branches, depth)
    *inner, last = branches.weights
    for weight in inner:
        weight.mul_(depth ** (-0.5 / len(inner)))  # L^(-1 / (2n - 2))
    last.zero_()


def _scaled(branches: Branches, depth: int) -> None:
    *inner, last = branches.weights
    for weight in inner:
        weight.normal_(std=branches.gain / math.sqrt(weight.size(-1)))
    last.normal_(std=1 / math.sqrt(last.size(-1) * depth))


def _listed(*entries: Initialisation) -> Mapping[str, Initialisation]:
    return MappingProxyType({entry.name: entry for entry in entries})


INITIALISATIONS: Final = _listed(
    Initialisation(
        "xavier",
        "normal, variance 2 / (in + out)",
        "Glorot & Bengio 2010, AISTATS, eq. 12",
        1,
        _xavier,
    ),
    Initialisation(
        "zero",
        "0.01 times xavier: what zero is in practice",
        "Li, Jiao, Han & Weissman 2016, arXiv 1611.01186, experiments",
        1,
        _zero,
    ),
    Initialisation(
        "orthogonal",
        "every matrix orthogonal, gain 1",
        "Saxe, McClelland & Ganguli 2014, arXiv 1312.6120",
        1,
        _orthogonal,
    ),
    Initialisation(
        "he",
        "normal, variance gain^2 / in: 2 / in for relu",
        "He, Zhang, Ren & Sun 2015, arXiv 1502.01852, eq. 10",
        1,
        _he,
    ),
    Initialisation(
        "fixup",
        "he times L^(-1 / (2n - 2)), the last matrix of each branch 0",
        "Zhang, Dauphin & Ma 2019, arXiv 1901.09321",
        1,
        _fixup,
    ),
    Initialisation(
        "skipinit",
        "he, the trained gate of each branch 0",
        "De & Smith 2020, arXiv 2002.10444",
        0,
        _he,
    ),
    Initialisation(
        "rezero",
        "xavier, the trained gate of each branch 0",
        "Bachlechner et al. 2020, arXiv 2003.04887",
        0,
        _xavier,
    ),
    Initialisation(
        "scaled",
        "he, the last matrix of each branch normal with variance 1 / (L in)",
        "Hayou et al. 2021, Stable ResNet, arXiv 2010.12859, uniform scaling",
        1,
        _scaled,
    ),
)
