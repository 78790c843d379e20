"""shortcut_network: R units x <- x + W_n ... W_1 x of Li et al. 2016, activations where wanted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres.nn.initialisations import GAINS, Branches, initialise
from fastres.nn.sizes import check_size
from fastres.ops.mlp_stack_blocks import ACTIVATIONS
from fastres.sites import add


class ShortcutNetwork(nn.Module):
    """The n-shortcut network of Li, Jiao, Han & Weissman 2016 (arXiv 1611.01186), section 2.

    Each of its R units has n matrices, all d x d, and no biases:

        x <- x + post(W_n mid(W_{n-1} ... mid(W_1 pre(x))))

    It is the linear network of the paper where pre, mid and post are the identity, and the plain
    network of its comparisons without the shortcuts. Its state_dict has one name, weights
    [R, n, d, d]. `torch.func.functional_call` takes weights [..., R, n, d, d] as well, a network
    for each of the leading indices, and returns [..., B, d].

    Args:
        width: Features d of the stream.
        units: Number of units R, from 0 up.
        matrices: Matrices n in each unit.
        shortcut: Whether units add to the stream; if not, they replace it.
        pre: Activation before the first matrix of a unit.
        mid: Activation between its matrices.
        post: Activation after the last one.
        initialisation: A name of INITIALISATIONS without gates.

    Raises:
        ValueError: If a size is too small, or an activation or initialisation is not known.
        TypeError: If a size is not an integer.

    Example:
        >>> ShortcutNetwork(width=10, units=3, matrices=2)(torch.zeros(5, 10)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        width: int,
        units: int,
        matrices: int,
        *,
        shortcut: bool = True,
        pre: str = "identity",
        mid: str = "identity",
        post: str = "identity",
        initialisation: str = "zero",
    ) -> None:
        super().__init__()
        for name, value, least in (("width", width, 1), ("units", units, 0)):
            check_size("ShortcutNetwork", name, value, least)
        check_size("ShortcutNetwork", "matrices", matrices, 1)
        for name, activation in (("pre", pre), ("mid", mid), ("post", post)):
            if activation not in ACTIVATIONS:
                known = ", ".join(ACTIVATIONS)
                raise ValueError(
                    f"ShortcutNetwork: {name} must be one of {known}, got {activation!r}"
                )
        self.width, self.units, self.matrices, self.shortcut = width, units, matrices, shortcut
        self.pre, self.mid, self.post = pre, mid, post
        self.initialisation = initialisation
        self.weights = nn.Parameter(torch.empty(units, matrices, width, width))  # [R, n, d, d]
        self.reset_parameters()

    @property
    def depth(self) -> int:
        """How many matrices there are, R n."""
        return self.units * self.matrices

    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's global generator."""
        initialise(self, self.initialisation)

    def branches(self) -> Branches:
        """List the matrices by their place in a unit."""
        return Branches(self.weights.unbind(1), (), None, GAINS[self.mid])

    def forward(self, x: Tensor) -> Tensor:
        """Run all units: x [..., B, d] -> [..., B, d]."""
        if x.dim() < 2 or x.size(-1) != self.width:
            raise ValueError(
                f"ShortcutNetwork: x must have shape [..., B, {self.width}], got {[*x.shape]}"
            )
        pre, mid, post = (ACTIVATIONS[name] for name in (self.pre, self.mid, self.post))
        for unit in self.weights.unbind(-4):
            first, *others = unit.mT.unbind(-3)
            f = pre(x) @ first
            for matrix in others:
                f = mid(f) @ matrix
            x = self._joined(x, post(f))
        return x

    def _joined(self, x: Tensor, f: Tensor) -> Tensor:
        if not self.shortcut:
            return f
        return add(x, f) if x.shape == f.shape else x + f  # one stream, many networks: no site

    def extra_repr(self) -> str:
        """Describe the network in print(model)."""
        sizes = f"width={self.width}, units={self.units}, matrices={self.matrices}"
        places = f"pre={self.pre!r}, mid={self.mid!r}, post={self.post!r}"
        return f"{sizes}, shortcut={self.shortcut}, {places}"
