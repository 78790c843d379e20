"""theory: the Hessian of n-shortcut networks at zero weights, in closed form (Li et al. 2016)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.analysis.conditioning.eigenvalues import Eigenvalues, eigenvalues
from fastres.analysis.conditioning.operators import SymmetricOperator
from fastres.nn import ShortcutNetwork
from fastres.ops.mlp_stack_blocks import ACTIVATIONS

_KINKED = ("relu",)  # without a derivative at 0


class Spectrum(NamedTuple):
    """Distinct eigenvalues with how often each occurs."""

    values: Tensor  # [k] float64, ascending
    multiplicities: Tensor  # [k] int64

    def all(self) -> Eigenvalues:
        """Every eigenvalue as often as it occurs."""
        return Eigenvalues(self.values.repeat_interleave(self.multiplicities))


def squared_loss(y: Tensor) -> Callable[[Tensor], Tensor]:
    """Make the loss of Li et al. 2016 on targets y [B, d]: out -> ||out - y||^2 / (2 B).

    It takes outputs [..., B, d], of many networks, and returns [...].
    """
    return lambda out: (out - y).square().sum((-1, -2)) / (2 * len(y))


class ZeroHessian(SymmetricOperator):
    """The Hessian of the squared loss by the weights [R, n, d, d], where these are 0.

    Li, Jiao, Han & Weissman 2016 (arXiv 1611.01186), theorem 1, extended to any activations that
    are 0 at 0. With s = pre(x), e = x - y, expectations over the samples, M = E[e s^T],
    p = mid'(0) post'(0):

        n >= 3: H = 0
        n = 2:  H[V]_{r,2} = p M V_{r,1}^T        H[V]_{r,1} = p V_{r,2}^T M
        n = 1:  H[V]_r = (sum_q V_q) E[s s^T] + sum_{q<r} M V_q^T + sum_{q>r} V_q^T M

    the last one for the linear network. With activations the last two sums become contractions with
    E[e_i pre'(x)_j s_k], and post adds its curvature, post''(0) E[e_i s_j s_k].

    For n = 2 the eigenvalues are plus and minus the singular values of p M, each d R times, so the
    condition number is that of M at every depth. relu has no derivative at 0: there 1/2 is used,
    the mean of both sides, with a warning.

    Args:
        network: Its weights are not read.
        x: Inputs, [B, d]; computed in float64.
        y: Targets, [B, d].

    Raises:
        ValueError: If the network has no shortcuts, the shapes do not fit, x or y is not finite,
            E[s s^T] is singular, or mid or post is not 0 at 0.
    """

    def __init__(self, network: ShortcutNetwork, x: Tensor, y: Tensor) -> None:
        _check(network, x, y)
        self.units, self.matrices, self.width = network.units, network.matrices, network.width
        super().__init__(network.depth * network.width**2, torch.float64, x.device)
        x, y = x.detach().double(), y.detach().double()
        pre = ACTIVATIONS[network.pre]
        s, e, count = pre(x), x - y, len(x)
        rank = int(torch.linalg.matrix_rank(s.mT @ s / count, hermitian=True))
        if rank < self.width:
            raise ValueError(
                f"zero_hessian: x must have a covariance of full rank, got rank {rank} of "
                f"{self.width}: every condition number would be infinite"
            )
        self.m = e.mT @ s / count  # [d, d]
        outer = _slopes("post", network.post)
        inner = _slopes("mid", network.mid) if self.matrices > 1 else (1.0, 0.0)
        self.slope = outer[0] * inner[0]
        if self.matrices == 1:
            ones = torch.ones_like(x)
            moved = torch.func.jvp(pre, (x,), (ones,))[1]  # pre'(x)
            self._ss = s.mT @ s / count
            self._passed = torch.einsum("bi,bj,bk->ijk", e, moved, s) / count
            self._bent = outer[1] * torch.einsum("bi,bj,bk->ijk", e, s, s) / count

    @property
    def order(self) -> int:
        """The order to which zero is stationary: n - 1, where M is not 0."""
        return self.matrices - 1

    def products(self, vectors: Tensor) -> Tensor:
        """Multiply vectors [K, P], P = R n d d: [K, P]."""
        shape = (-1, self.units, self.matrices, self.width, self.width)
        v = vectors.view(shape)  # [K, R, n, d, d]
        if self.matrices == 1:
            return self._first(v[:, :, 0]).flatten(1)
        if self.matrices > 2:
            return torch.zeros_like(vectors)
        out = torch.stack((v[:, :, 1].mT @ self.m, self.m @ v[:, :, 0].mT), 2)
        return self.slope * out.flatten(1)

    def _first(self, v: Tensor) -> Tensor:
        """Multiply v [K, R, d, d], for n = 1."""
        before = v.cumsum(1) - v  # sum over q < r
        total = v.sum(1, keepdim=True)
        after = total - before - v
        chained = torch.einsum("ijk,nrjk->nrij", self._passed, before)
        chained += torch.einsum("ijk,nrij->nrjk", self._passed, after)
        bent = torch.einsum("ijk,nrik->nrij", self._bent, v)
        return self.slope**2 * (total @ self._ss + chained) + bent

    def spectrum(self) -> Spectrum:
        """Find the eigenvalues: in closed form for n >= 2, of the dense matrix for n = 1."""
        size = self.shape[0]
        if self.matrices == 1:
            values = eigenvalues(self.dense()).values.cpu()
            return Spectrum(values, torch.ones(size, dtype=torch.int64))
        if self.matrices > 2:
            return Spectrum(torch.zeros(1, dtype=torch.float64), torch.tensor([size]))
        values = abs(self.slope) * torch.linalg.svdvals(self.m).cpu()
        both = torch.cat((-values, values.flip(0)))
        return Spectrum(both, torch.full((2 * self.width,), self.width * self.units))

    def condition(self) -> float:
        """The ratio max / min of |eigenvalue|: for n = 2 that of M, whatever the depth."""
        if self.matrices == 2:
            return float(torch.linalg.cond(self.m))
        return self.spectrum().all().condition


def _slopes(place: str, name: str) -> tuple[float, float]:
    """First and second derivative of an activation at 0."""
    act, zero = ACTIVATIONS[name], torch.zeros((), dtype=torch.float64)
    if float(act(zero)) != 0:
        raise ValueError(f"zero_hessian: {place} must be 0 at 0, got {name}")
    if name in _KINKED:
        warnings.warn(
            f"zero_hessian: {place} is {name}, which has no derivative at 0: the mean of both "
            "sides, 1/2, is used; it scales the eigenvalues and leaves the condition number",
            stacklevel=3,
        )
        return 0.5, 0.0
    first: Callable[[Tensor], Tensor] = torch.func.grad(act)
    return float(first(zero)), float(torch.func.grad(first)(zero))


def _check(network: ShortcutNetwork, x: Tensor, y: Tensor) -> None:
    if not network.shortcut:
        raise ValueError("zero_hessian: network must have shortcuts, got a plain one")
    if network.units < 1:
        raise ValueError(f"zero_hessian: network must have >= 1 unit, got {network.units}")
    if x.dim() != 2 or len(x) == 0 or x.size(1) != network.width:
        raise ValueError(f"zero_hessian: x must have shape [B, {network.width}], got {[*x.shape]}")
    if y.shape != x.shape:
        raise ValueError(
            "zero_hessian: y must have the shape of x, as the shortcuts keep their width, "
            f"{[*x.shape]}, got {[*y.shape]}"
        )
    for name, value in (("x", x), ("y", y)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"zero_hessian: {name} must be finite, got inf or nan")
