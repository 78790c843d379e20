"""noise: what the layers of a network make of a perturbation of their input, and what theory says.

Of the noise in Lagzi (arXiv 2101.03009) we know the abstract alone: it evolves differently in
residual networks and in MLPs. What is compared here is ours. With d the difference of two streams
and D = diag f'(z), to first order

    residual  d(t + 1) = (I + D W) d(t)        MLP  d(t + 1) = D W d(t)

so that a residual layer carries noise on and adds to it, where an MLP of sigmoids contracts it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.nn.layer_network import LayerNetwork
from fastres.ops.mlp_stack_blocks import ACTIVATIONS


class Growth(NamedTuple):
    """A difference of two streams before each layer and after the last; tensors [L + 1] float64."""

    growth: Tensor  # ||d(t)|| / ||d(0)||, mean over samples
    relative: Tensor  # ||d(t)|| / ||x(t)||, mean over samples
    variance: Tensor  # trace of the covariance of d(t), over the samples


@torch.no_grad()
def noise_growth(network: LayerNetwork, x: Tensor, noise: Tensor) -> Growth:
    """Measure what the layers make of noise on their input, sample by sample.

    Args:
        network: The layers; its input layer and head take no part.
        x: Stream before the first layer, [B, N].
        noise: Added to it, [B, N].

    Raises:
        ValueError: If x and noise differ in shape or there is no sample.
    """
    _check_pair("noise_growth", x, noise)
    clean = network.run(x, return_states=True).double()
    return _growth(clean, network.run(x + noise, return_states=True).double() - clean)


@torch.no_grad()
def predicted_noise(network: LayerNetwork, x: Tensor, noise: Tensor) -> Growth:
    """Predict the same to first order, with the derivatives at the clean stream.

    Args:
        network: As in `noise_growth`.
        x: As in `noise_growth`.
        noise: As in `noise_growth`.

    Raises:
        ValueError: If x and noise differ in shape or there is no sample.
    """
    _check_pair("predicted_noise", x, noise)
    clean = network.run(x, return_states=True)
    differences = [noise]
    for layer in range(network.layers):
        weight, slope = _linear(network, layer, clean[layer])
        carried = differences[-1] if network.residual else 0
        differences.append(carried + slope * (differences[-1] @ weight.T))
    return _growth(clean.double(), torch.stack(differences).double())


@torch.no_grad()
def propagated_covariance(network: LayerNetwork, x: Tensor, covariance: Tensor) -> Tensor:
    """Propagate a covariance to first order: S <- J S J^T, J the Jacobian of each layer.

    Args:
        network: The layers.
        x: One stream before the first layer, [N].
        covariance: Of the noise on it, [N, N].

    Returns:
        The covariance before each layer and after the last, [L + 1, N, N].
    """
    found = [covariance]
    for j in _jacobians(network, x):
        found.append(j @ found[-1] @ j.T)
    return torch.stack(found)


@torch.no_grad()
def injections(network: LayerNetwork, x: Tensor, noise: Tensor) -> Tensor:
    """Measure how much noise on one stream alone changes the last: ||d(L)|| / ||d(t)||, [L].

    Args:
        network: The layers.
        x: Stream before the first layer, [B, N].
        noise: Added before layer t, the same for each t, [B, N].

    Raises:
        ValueError: If x and noise differ in shape or there is no sample.
    """
    _check_pair("injections", x, noise)
    states = network.run(x, return_states=True)
    found = []
    for t in range(network.layers):
        late = states[t] + noise
        for layer in range(t, network.layers):
            late = _layer(network, layer, late)
        found.append(((late - states[-1]).norm(dim=1) / noise.norm(dim=1)).double().mean())
    return torch.stack(found)


@torch.no_grad()
def lyapunov_exponents(network: LayerNetwork, x: Tensor) -> Tensor:
    """Measure at which rates the layers pull neighbouring streams apart, per layer.

    By QR after each layer (Benettin et al. 1980), over the layers there are: with shared weights
    and many layers these are the exponents of the map, else finite-time ones.

    Args:
        network: The layers.
        x: One stream before the first layer, [N].

    Returns:
        The exponents, largest first, [N] float64, natural logarithms per layer; -inf where a
        direction is lost altogether.
    """
    frame, total = torch.eye(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    for j in _jacobians(network, x):
        frame, r = torch.linalg.qr(j.double().cpu() @ frame)
        total += r.diagonal().abs().log()
    return (total / network.layers).sort(descending=True).values


def _jacobians(network: LayerNetwork, x: Tensor) -> list[Tensor]:
    """Return the Jacobian of each layer along the way from x [N]; [N, N] each."""
    if x.dim() != 1:
        raise ValueError(f"noise: x must be one stream [N], got {[*x.shape]}")
    states = network.run(x[None], return_states=True)[:, 0]
    one = torch.eye(len(x), dtype=x.dtype, device=x.device) if network.residual else 0
    parts = [_linear(network, layer, states[layer]) for layer in range(network.layers)]
    return [one + slope[:, None] * weight for weight, slope in parts]


def _linear(network: LayerNetwork, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return W [N, N] of a layer, and f'(z) at its input x [..., N]."""
    weight, bias = network.of_layer(layer)
    z = (x @ weight.T + bias).requires_grad_()
    with torch.enable_grad():
        y = ACTIVATIONS[network.activation](z)
    (slope,) = torch.autograd.grad(y, z, torch.ones_like(y))
    return weight, slope


def _layer(network: LayerNetwork, layer: int, x: Tensor) -> Tensor:
    weight, bias = network.of_layer(layer)
    y = ACTIVATIONS[network.activation](x @ weight.T + bias)
    return x + y if network.residual else y


def _growth(clean: Tensor, difference: Tensor) -> Growth:
    """Reduce streams and differences [L + 1, B, N]."""
    length = difference.norm(dim=2)
    variance = difference.var(1, correction=0).sum(1)
    return Growth((length / length[0]).mean(1), (length / clean.norm(dim=2)).mean(1), variance)


def _check_pair(op: str, x: Tensor, noise: Tensor) -> None:
    if x.dim() != 2 or x.shape != noise.shape or math.prod(x.shape) == 0:
        found = f"{[*x.shape]} and {[*noise.shape]}"
        raise ValueError(f"{op}: x and noise must have one shape [B, N], got {found}")
