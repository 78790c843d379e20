"""lanczos: the spectral density of an operator, with trace, index and extremes, from products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


class Operator(Protocol):
    """A symmetric operator: one of `SymmetricOperator`, or of curvlinops."""

    @property
    def shape(self) -> tuple[int, int]:
        """[P, P]."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its vectors."""

    @property
    def device(self) -> torch.device:
        """Of its vectors."""

    def __matmul__(self, x: Any) -> Any:
        """Multiply the columns of a matrix [P, K]."""

    def to_scipy(self) -> Any:
        """Make a LinearOperator of SciPy."""


@dataclass(frozen=True)
class SpectralDensity:
    """A Gauss quadrature of the spectral density 1/P sum_i delta(t - eigenvalue_i).

    Attributes:
        nodes: Ritz values of each random vector, [draws, steps] float64, ascending.
        weights: Of the nodes, [draws, steps], 1 in total per draw.
        size: P.
    """

    nodes: NDArray[np.float64]
    weights: NDArray[np.float64]
    size: int

    @property
    def largest(self) -> float:
        """The largest Ritz value: at most the largest eigenvalue, and near it."""
        return float(self.nodes.max())

    @property
    def smallest(self) -> float:
        """The smallest Ritz value: at least the smallest eigenvalue, and near it."""
        return float(self.nodes.min())

    @property
    def trace(self) -> float:
        """Hutchinson's estimate of the trace, of the same products."""
        return float(self._traces.mean())

    @property
    def trace_error(self) -> float:
        """The standard error of the trace over the draws; nan for one draw."""
        return _standard_error(self._traces)

    @property
    def index(self) -> float:
        """The fraction of eigenvalues below zero, less those that rounding cannot tell from it."""
        return float(self._below.mean())

    @property
    def index_error(self) -> float:
        """The standard error of the index over the draws; nan for one draw."""
        return _standard_error(self._below)

    @property
    def _traces(self) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.size * (self.weights * self.nodes).sum(1)
        return found

    @property
    def _below(self) -> NDArray[np.float64]:
        zero = 1e-6 * np.abs(self.nodes).max()
        found: NDArray[np.float64] = (self.weights * (self.nodes < -zero)).sum(1)
        return found

    def at(self, points: ArrayLike, width: float) -> NDArray[np.float64]:
        """Evaluate the density, each node a Gaussian of a standard deviation `width`.

        Args:
            points: Where, [n].
            width: In units of the eigenvalues.

        Returns:
            The density, [n], with integral 1.
        """
        offset = np.asarray(points, np.float64)[:, None, None] - self.nodes
        bumps = np.exp(-0.5 * (offset / width) ** 2) / (width * math.sqrt(2 * math.pi))
        found: NDArray[np.float64] = (self.weights * bumps).sum(2).mean(1)
        return found


def lanczos(operator: Operator, steps: int = 40, draws: int = 4, seed: int = 0) -> SpectralDensity:
    """Estimate the spectral density by stochastic Lanczos quadrature.

    Ubaru, Chen & Saad 2017, SIAM J. Matrix Anal. Appl. 38(4); Golub & Welsch 1969.
    All draws advance together, one product with `draws` vectors per step. Every new vector is made
    orthogonal to all before it, twice, so no eigenvalue appears a second time; that keeps
    steps * draws * P numbers.

    Args:
        operator: Symmetric; multiplies [P, K].
        steps: Products, and nodes per draw; no more than P are made.
        draws: Random sign vectors.
        seed: Of these, an own generator.

    Returns:
        Nodes and weights, and what follows from them.

    Raises:
        ValueError: If steps or draws is below 1, or a product is not finite.
    """
    for name, value in (("steps", steps), ("draws", draws)):
        if value < 1:
            raise ValueError(f"lanczos: {name} must be >= 1, got {value}")
    size = operator.shape[0]
    steps = min(steps, size)
    source = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size, draws), generator=source).mul_(2).sub_(1)
    q = signs.to(operator.device, operator.dtype) / math.sqrt(size)  # [P, draws]
    basis = q.new_zeros(steps, size, draws)
    alpha, beta = (torch.zeros(draws, steps, dtype=torch.float64) for _ in range(2))
    over = torch.zeros(draws, steps, dtype=torch.bool)
    scale = q.new_zeros(draws)
    for step in range(steps):
        basis[step] = q
        over[:, step] = (q == 0).all(0).cpu()
        w = operator @ q
        alpha[:, step] = _dot(q, w).double().cpu()
        for _ in range(2):
            known = torch.einsum("spk,pk->sk", basis[: step + 1], w)
            w = w - torch.einsum("spk,sk->pk", basis[: step + 1], known)
            scale = torch.maximum(scale, known.abs().amax(0))
        length = _dot(w, w).sqrt()
        if not bool(torch.isfinite(length).all()):
            raise ValueError("lanczos: products must be finite, got inf or nan")
        # what is left of an invariant subspace is rounding: the vector after it is zero
        ended = length <= 100 * torch.finfo(q.dtype).eps * scale
        beta[:, step] = torch.where(ended, 0, length).double().cpu()
        q = torch.where(ended, 0, w / torch.where(ended, 1, length))
    # and its node, which has no weight, must not be an end: put it at the first Rayleigh quotient
    alpha = torch.where(over, alpha[:, :1], alpha)
    inner = beta[:, : steps - 1]
    tridiagonal = torch.diag_embed(alpha)
    tridiagonal += torch.diag_embed(inner, 1) + torch.diag_embed(inner, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return SpectralDensity(nodes.numpy(), vectors[:, 0].square().numpy(), size)


def extreme_eigenvalues(
    operator: Operator, count: int = 1, which: str = "LA", tolerance: float = 1e-6
) -> NDArray[np.float64]:
    """Find the first eigenvalues from one end, by SciPy's eigsh.

    Args:
        operator: Symmetric.
        count: How many, below P.
        which: "LA" the largest, "SA" the smallest, "LM" the largest in magnitude.
        tolerance: Relative accuracy.

    Returns:
        [count], ascending.

    Raises:
        ValueError: If count or which is none of these.
        ModuleNotFoundError: Without SciPy.
    """
    if not 1 <= count < operator.shape[0]:
        raise ValueError(
            f"extreme_eigenvalues: count must be 1 to {operator.shape[0] - 1}, got {count}"
        )
    if which not in ("LA", "SA", "LM"):
        raise ValueError(f"extreme_eigenvalues: which must be LA, SA or LM, got {which!r}")
    scipy = operator.to_scipy()  # says how to install it
    from scipy.sparse.linalg import eigsh

    start = np.random.default_rng(0).standard_normal(operator.shape[0])  # the same in every run
    found = eigsh(scipy, count, which=which, tol=tolerance, v0=start, return_eigenvectors=False)
    return np.sort(np.asarray(found, np.float64))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("pk,pk->k", a, b)


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
