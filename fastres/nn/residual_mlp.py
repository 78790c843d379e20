"""residual_mlp: an MLP of L >= 0 residual blocks, x <- x + W2 act(W1 x + b1) + b2."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastres.nn.initialisations import GAINS, Branches, initialise
from fastres.nn.sizes import check_size
from fastres.sites import stack


class ResidualStack(nn.Module):
    """L residual blocks with all their weights in four tensors.

    They run as one operator, `fastres.mlp_stack`, where that has kernels. Block l computes

        x <- x + W2[l] act(W1[l] x + b1[l]) + b2[l]

    or, gated, x <- x + gate[l] * (W2[l] act(W1[l] x + b1[l]) + b2[l]) with a trained gate [L].

    At the start, "scaled", W1 is He-initialised (He et al. 2015, arXiv 1502.01852, eq. 10) and W2
    keeps the variance it is given, divided by L: standard deviation 1 / sqrt(H L), the uniform
    scaling of Hayou et al. 2021, "Stable ResNet" (arXiv 2010.12859). Each relu block then adds 1/L
    of the energy of its stream, so the energy grows by (1 + 1/L)^L < e through any number of
    blocks. Other starts are in `fastres.nn.INITIALISATIONS`.

    Args:
        width: Features D of the stream.
        blocks: Number of blocks L; 0 gives the identity.
        hidden: Features H inside a branch; width if None.
        activation: relu, gelu, gelu_tanh, silu, tanh, sigmoid or identity.
        initialisation: A name of INITIALISATIONS.
        gated: Whether each branch has a trained scale, as skipinit and rezero need.

    Raises:
        ValueError: If a size is too small, or activation or initialisation is not known or does
            not fit.
        TypeError: If a size is not an integer.
    """

    def __init__(
        self,
        width: int,
        blocks: int,
        hidden: int | None = None,
        activation: str = "relu",
        *,
        initialisation: str = "scaled",
        gated: bool = False,
    ) -> None:
        super().__init__()
        hidden = width if hidden is None else hidden
        check_size("ResidualStack", "width", width, 1)
        check_size("ResidualStack", "blocks", blocks, 0)
        check_size("ResidualStack", "hidden", hidden, 1)
        if activation not in GAINS:
            known = ", ".join(GAINS)
            raise ValueError(
                f"ResidualStack: activation must be one of {known}, got {activation!r}"
            )
        self.width, self.blocks, self.hidden = width, blocks, hidden
        self.activation = activation
        self.w1 = nn.Parameter(torch.empty(blocks, hidden, width))  # [L, H, D]
        self.b1 = nn.Parameter(torch.empty(blocks, hidden))  # [L, H]
        self.w2 = nn.Parameter(torch.empty(blocks, width, hidden))  # [L, D, H]
        self.b2 = nn.Parameter(torch.empty(blocks, width))  # [L, D]
        self.gate = nn.Parameter(torch.empty(blocks)) if gated else None  # [L]
        self.initialisation = initialisation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's global generator; biases become 0."""
        initialise(self, self.initialisation)

    def branches(self) -> Branches:
        """List the parameters of the blocks."""
        gain = GAINS[self.activation]
        return Branches((self.w1, self.w2), (self.b1, self.b2), self.gate, gain)

    def forward(self, x: Tensor, gates: float | Tensor | None = None) -> Tensor:
        """Run all blocks: x [B, ..., D] -> [B, ..., D].

        Gates scale the branches, beside trained ones: a number, or a tensor [], [L] or [L, B];
        None: 1.
        """
        w2: Tensor = self.w2
        b2: Tensor = self.b2
        if self.gate is not None:  # gate (W2 h + b2): other gates multiply it once more
            w2, b2 = w2 * self.gate[:, None, None], b2 * self.gate[:, None]
        return stack(x, self.w1, self.b1, w2, b2, self.activation, gates)

    def extra_repr(self) -> str:
        """Describe the stack in print(model)."""
        return (
            f"width={self.width}, blocks={self.blocks}, hidden={self.hidden}, "
            f"activation={self.activation!r}"
        )


class ResidualMLP(nn.Module):
    """A residual MLP: input layer, L residual blocks, linear head.

    The names in its state_dict are stable: input.weight, input.bias, stack.w1 [L, H, D],
    stack.b1 [L, H], stack.w2 [L, D, H], stack.b2 [L, D], head.weight, head.bias. Its residual
    sites are stack[0] ... stack[L-1].

    Args:
        in_features: Features of one sample, all dimensions after the first taken together.
        classes: Outputs of the head.
        width: Features D of the stream.
        blocks: Number of residual blocks L, from 0 up.
        hidden: Features H inside a branch; width if None.
        activation: relu, gelu, gelu_tanh, silu, tanh, sigmoid or identity; inside the branches.
        initialisation: A name of INITIALISATIONS, for the branches.
        gated: Whether each branch has a trained scale, stack.gate [L].

    Raises:
        ValueError: If a size is too small, or activation or initialisation is not known or does
            not fit.
        TypeError: If a size is not an integer.

    Example:
        >>> model = ResidualMLP(in_features=64, classes=10, width=32, blocks=300)
        >>> model(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        width: int,
        blocks: int,
        hidden: int | None = None,
        activation: str = "relu",
        *,
        initialisation: str = "scaled",
        gated: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "classes": classes, "width": width}
        for name, value in sizes.items():
            check_size("ResidualMLP", name, value, 1)
        try:
            stack = ResidualStack(
                width, blocks, hidden, activation, initialisation=initialisation, gated=gated
            )
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("ResidualStack", "ResidualMLP", 1)) from None
        self.in_features, self.classes = in_features, classes
        self.input = nn.Linear(in_features, width)
        self.stack = stack
        self.head = nn.Linear(width, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's global generator; biases become 0."""
        for layer in (self.input, self.head):  # both linear: gain 1
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)
        self.stack.reset_parameters()

    def forward(self, x: Tensor, gates: float | Tensor | None = None) -> Tensor:
        """Classify x [B, ...], flattened to [B, in_features]: logits [B, classes].

        Gates scale the branches: a number, or a tensor [], [L] or [L, B]; None: 1.
        """
        features = math.prod(x.shape[1:])
        if x.dim() < 2 or features != self.in_features:
            raise ValueError(
                f"ResidualMLP: x must have {self.in_features} features per sample, "
                f"got shape {list(x.shape)}"
            )
        stream = self.stack(self.input(x.flatten(1)), gates)  # [B, D]
        logits: Tensor = self.head(stream)
        return logits
