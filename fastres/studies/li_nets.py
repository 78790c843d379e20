"""li_nets: the networks of Li et al. 2016, many at once: gradient descent, and exact Hessians."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fastres.analysis.conditioning import Eigenvalues, FunctionHessian, eigenvalues, squared_loss
from fastres.nn import ShortcutNetwork
from fastres.studies.li_data import Task


class Net(NamedTuple):
    """One way to build and start a network of some depth."""

    matrices: int  # in each unit
    shortcut: bool
    initialisation: str


NETS: Final[Mapping[str, Net]] = MappingProxyType(
    {
        "plain, Xavier": Net(1, False, "xavier"),
        "plain, orthogonal": Net(1, False, "orthogonal"),
        "1-shortcut": Net(1, True, "zero"),
        "2-shortcut": Net(2, True, "zero"),
        "3-shortcut": Net(3, True, "zero"),
    }
)
# With relu in the middle of two matrices, the plain ones too, so that all have as many.
BENT: Final = ("plain, Xavier", "plain, orthogonal", "2-shortcut")


def build(name: str, depth: int, width: int, relu: bool) -> ShortcutNetwork:
    """Build a network of about `depth` matrices: the nearest number of whole units, at least 1.

    Args:
        name: One of NETS.
        depth: Matrices.
        width: d.
        relu: Whether there is a relu between the two matrices of each unit.
    """
    matrices, shortcut, initialisation = NETS[name]
    matrices, mid = (2, "relu") if relu else (matrices, "identity")
    units = max(1, round(depth / matrices))
    return ShortcutNetwork(
        width, units, matrices, shortcut=shortcut, mid=mid, initialisation=initialisation
    )


def start(network: ShortcutNetwork, seed: int) -> Tensor:
    """Draw initial weights, [R, n, d, d] float64; the caller's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.reset_parameters()
    return network.weights.detach().double()


def loss_of(network: ShortcutNetwork, task: Task) -> Callable[[Tensor], Tensor]:
    """Make the loss a function of weights [..., R, n, d, d]: a value for each network, [...].

    A linear network is one matrix, which is multiplied out in log2 R rounds: its hundred small
    products, one after the other, would take ten times as long.
    """
    measure, linear = squared_loss(task.y), network.mid == "identity"

    def loss(weights: Tensor) -> Tensor:
        if linear:
            units = _product(weights)  # [..., R, d, d]
            if network.shortcut:
                units = units + torch.eye(network.width, dtype=units.dtype)
            return measure(task.x @ _product(units).mT)
        return measure(torch.func.functional_call(network, {"weights": weights}, task.x))

    return loss


def _product(factors: Tensor) -> Tensor:
    """Multiply matrices, the last one from the left: [..., k, d, d] -> [..., d, d]."""
    while (count := factors.size(-3)) > 1:
        pairs = factors[..., 1::2, :, :] @ factors[..., 0 : count - count % 2 : 2, :, :]
        factors = torch.cat((pairs, factors[..., -1:, :, :]), -3) if count % 2 else pairs
    return factors.squeeze(-3)


class Course(NamedTuple):
    """What gradient descent did to M networks."""

    weights: Tensor  # [M, R, n, d, d], after the last epoch
    loss: Tensor  # [M], then; nan or inf where it diverged
    kept: dict[int, Tensor]  # after how many epochs -> weights [M, R, n, d, d]


def descend(
    loss: Callable[[Tensor], Tensor],
    weights: Tensor,
    rates: Tensor,
    epochs: int,
    keep: Collection[int] = (),
) -> Course:
    """Train M networks at once by full-batch gradient descent, each with its own rate.

    Args:
        loss: Maps weights [M, ...] to losses [M].
        weights: At the start, [M, ...].
        rates: Learning rates, [M].
        epochs: Steps.
        keep: After how many epochs the weights are kept; 0: as they were at the start.
    """
    steps = rates.reshape(-1, *[1] * (weights.dim() - 1))
    kept = {0: weights} if 0 in keep else {}
    for epoch in range(1, epochs + 1):
        leaf = weights.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)
        weights = weights - steps * gradient
        if epoch in keep:
            kept[epoch] = weights
    with torch.no_grad():
        return Course(weights, loss(weights), kept)


class Shape(NamedTuple):
    """The loss around a point."""

    loss: float
    gradient_norm: float
    eigenvalues: Eigenvalues


def look(loss: Callable[[Tensor], Tensor], weights: Tensor) -> Shape:
    """Measure loss, gradient and all eigenvalues of the Hessian at one network's weights."""
    hessian = FunctionHessian(loss, weights)
    with torch.no_grad():
        value = float(loss(weights))
    return Shape(value, float(hessian.gradient().norm()), eigenvalues(hessian.dense()))


def weight_norm(weights: Tensor) -> Tensor:
    """Average the Frobenius norms of the matrices of each network: [..., R, n, d, d] -> [...]."""
    return torch.linalg.matrix_norm(weights).mean((-1, -2))
