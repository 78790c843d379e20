"""layer_network: L layers of one matrix, x <- x + act(W x + b), and the MLP of equal shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastres.nn.initialisations import GAINS
from fastres.nn.sizes import check_size
from fastres.ops import mlp_stack
from fastres.ops.mlp_stack_blocks import ACTIVATIONS


class LayerNetwork(nn.Module):
    """The networks of Lagzi (arXiv 2101.03009): input layer, L layers, linear head.

    With inputs u, the stream x and the residuals y:

        x(0) = act(A u + a)    y(t + 1) = act(W(t) x(t) + b(t))    x(t + 1) = x(t) + y(t + 1)

    and the head reads x(L). The plain MLP of equal shape, to compare with, has x(t + 1) =
    y(t + 1). Shared weights are one set for all layers, so the depth can change without training.
    How inputs enter the layers is not in the paper; here it is the input layer A, a. The names in
    the state_dict are input.weight, input.bias, weight [L or 1, N, N], bias [L or 1, N],
    head.weight, head.bias.

    Args:
        in_features: Features of one sample, all dimensions after the first taken together.
        classes: Outputs of the head.
        width: Neurons N of each layer.
        layers: Number of layers L, 1 or more.
        activation: relu, gelu, gelu_tanh, silu, tanh, sigmoid or identity.
        shared: Whether all layers have the same weights.
        residual: Whether layers add to the stream; if not, they replace it.

    Attributes:
        layers: How many run; with shared weights any number may be put there.

    Raises:
        ValueError: If a size is too small or the activation is not known.
        TypeError: If a size is not an integer.

    Example:
        >>> LayerNetwork(in_features=2, classes=2, width=3, layers=15)(torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        width: int,
        layers: int,
        activation: str = "sigmoid",
        *,
        shared: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "classes": classes, "width": width, "layers": layers}
        for name, value in sizes.items():
            check_size("LayerNetwork", name, value, 1)
        if activation not in GAINS:
            known = ", ".join(GAINS)
            raise ValueError(f"LayerNetwork: activation must be one of {known}, got {activation!r}")
        sets = 1 if shared else layers
        self.in_features, self.layers = in_features, layers
        self.activation, self.shared, self.residual = activation, shared, residual
        self.input = nn.Linear(in_features, width)
        self.weight = nn.Parameter(torch.empty(sets, width, width))
        self.bias = nn.Parameter(torch.empty(sets, width))
        self.head = nn.Linear(width, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's global generator, as nn.Linear does.

        Uniform within 1 / sqrt(fan in): with larger shared weights 3 neurons get stuck more often.
        """
        self.input.reset_parameters()
        self.head.reset_parameters()
        bound = 1 / math.sqrt(self.weight.size(-1))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def start(self, u: Tensor) -> Tensor:
        """Map inputs u [B, ...] to the stream before the first layer, x(0) [B, N]."""
        features = math.prod(u.shape[1:])
        if u.dim() < 2 or features != self.in_features:
            raise ValueError(
                f"LayerNetwork: u must have {self.in_features} features per sample, "
                f"got shape {[*u.shape]}"
            )
        return ACTIVATIONS[self.activation](self.input(u.flatten(1)))

    def run(self, x: Tensor, return_states: bool = False) -> Tensor:
        """Run the layers from x(0) [B, N].

        Residual layers are one call of `fastres.mlp_stack`, its second matrices the identity.

        Args:
            x: The stream before the first layer.
            return_states: Whether to return x(0) to x(L), [L + 1, B, N], instead of x(L), [B, N].
        """
        if not self.residual:
            return self._run_plain(x, return_states)
        sets, width, _ = self.weight.shape
        one = torch.eye(width, dtype=x.dtype, device=x.device).expand(sets, -1, -1)
        zero = torch.zeros((), dtype=x.dtype, device=x.device).expand(sets, width)
        blocks, arguments = self.layers, (self.weight, self.bias, one, zero)
        return mlp_stack(
            x, *arguments, None, self.activation, blocks=blocks, return_states=return_states
        )[0]

    def _run_plain(self, x: Tensor, return_states: bool) -> Tensor:
        act, states = ACTIVATIONS[self.activation], [x]
        for layer in range(self.layers):
            weight, bias = self.of_layer(layer)
            x = act(nn.functional.linear(x, weight, bias))
            states.append(x) if return_states else None
        return torch.stack(states) if return_states else x

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return W [N, N] and b [N] of a layer."""
        index = 0 if self.shared else layer
        return self.weight[index], self.bias[index]

    def forward(self, u: Tensor) -> Tensor:
        """Classify u [B, ...]: logits [B, classes]."""
        logits: Tensor = self.head(self.run(self.start(u)))
        return logits

    def extra_repr(self) -> str:
        """Describe the layers in print(model)."""
        kind = "shared" if self.shared else "own"
        return (
            f"width={self.weight.size(-1)}, layers={self.layers}, weights={kind}, "
            f"activation={self.activation!r}, residual={self.residual}"
        )
