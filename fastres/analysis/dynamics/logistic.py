"""logistic: residuals of shared sigmoid layers as a dynamical system; its fixed points.

With x(t + 1) = x(t) + y(t + 1), y = sigmoid(z) and z = W x + b, the residuals of all layers follow
from the first alone (Lagzi, arXiv 2101.03009, section 2):

    z(t + 1) = z(t) + W y(t + 1), that is, logit y <- logit y + W y            the network, exactly
    dy_i / dt = y_i (1 - y_i) (W y)_i                                          its limit of small W

The second is a predator-prey system. Each coordinate of a fixed point is 0, or 1, or has
(W y)_i = 0: there are up to 3^N of them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_LARGEST: Final = 10  # 3^10 fixed points take seconds


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """A point at which the residuals rest.

    Its Jacobian is block-triangular: coordinates at 0 or 1 have the eigenvalue (1 - 2 y_i) (W y)_i
    each, the others those of diag(y (1 - y)) W among themselves.
    """

    y: Array  # [N]
    corner: tuple[complex, ...]  # eigenvalues of coordinates at 0 or 1, in their order
    interior: tuple[complex, ...]  # of the others

    @property
    def eigenvalues(self) -> tuple[complex, ...]:
        """All N of them, in the units of W."""
        return self.corner + self.interior

    @property
    def multipliers(self) -> tuple[complex, ...]:
        """Those of the exact map: exp(l) at a corner, where z runs away, and 1 + l inside."""
        grown = tuple(complex(np.exp(value)) for value in self.corner)
        return grown + tuple(1 + value for value in self.interior)

    @property
    def stable(self) -> bool:
        """Whether the differential equation returns to it: every real part is below 0."""
        return all(value.real < 0 for value in self.eigenvalues)

    @property
    def stable_in_network(self) -> bool:
        """Whether the layers return to it: every multiplier of the exact map is below 1."""
        return all(abs(value) < 1 for value in self.multipliers)


def logistic_map(weight: ArrayLike, start: ArrayLike, steps: int, step: float = 1.0) -> Array:
    """Iterate the exact map of the residuals, logit y <- logit y + step * W y.

    Args:
        weight: W, [N, N].
        start: y(1), [..., N], from 0 to 1; what is 0 or 1 stays.
        steps: How many layers to go on for, 0 or more.
        step: Scale of W; 1 is the network.

    Returns:
        y(1), y(2), ..., [steps + 1, ..., N].

    Raises:
        ValueError: If a shape does not fit, a start is outside of [0, 1], or steps is negative.
    """
    w, y = _system("logistic_map", weight, start)
    if steps < 0:
        raise ValueError(f"logistic_map: steps must be >= 0, got {steps}")
    with np.errstate(divide="ignore"):
        z = np.log(y) - np.log1p(-y)
    found = [y]
    for _ in range(steps):
        z = z + step * found[-1] @ w.T
        found.append(np.exp(-np.logaddexp(0.0, -z)))
    return np.stack(found)


def logistic_ode(weight: ArrayLike, start: ArrayLike, times: ArrayLike) -> Array:
    """Integrate dy_i / dt = y_i (1 - y_i) (W y)_i.

    Args:
        weight: W, [N, N].
        start: y at time 0, [N], from 0 to 1.
        times: When to return it, [T], increasing from 0 or later; one layer is one unit.

    Returns:
        [T, N], to a relative error of about 1e-9.

    Raises:
        ValueError: If a shape does not fit, or start is outside of [0, 1].
        ModuleNotFoundError: If SciPy is not installed.
    """
    w, y = _system("logistic_ode", weight, start)
    t = np.asarray(times, np.float64)
    if y.ndim != 1 or t.ndim != 1 or len(t) == 0 or t[0] < 0 or (np.diff(t) <= 0).any():
        found = f"shape {[*y.shape]}, times {t.tolist()}"
        raise ValueError(f"logistic_ode: start must be [N] and times increase from 0, got {found}")
    try:
        from scipy.integrate import solve_ivp
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "logistic_ode: integration needs SciPy: pip install 'fastres[hessian]'"
        ) from None
    solved = solve_ivp(
        lambda _, v: v * (1 - v) * (w @ v), (0.0, max(t[-1], 1e-300)), y, "DOP853", t,
        rtol=1e-10, atol=1e-12,
    )  # fmt: skip
    return np.asarray(solved.y.T)


def jacobian(weight: ArrayLike, y: ArrayLike) -> Array:
    """Differentiate the right-hand side at any point y [N]: [N, N], rows are components."""
    w, at = _system("jacobian", weight, y)
    return np.diag((1 - 2 * at) * (w @ at)) + (at * (1 - at))[:, None] * w


def fixed_points(weight: ArrayLike) -> list[FixedPoint]:
    """Find every isolated fixed point: 2^N corners, and those with coordinates inside.

    Where a block of W is singular, its fixed points are none or a continuum; neither is listed.

    Args:
        weight: W, [N, N], N at most 10.

    Raises:
        ValueError: If W is not square or too large.

    Example:
        >>> [(p.y.tolist(), p.stable) for p in fixed_points([[-1.0]])]
        [([0.0], False), ([1.0], False)]
    """
    w = np.asarray(weight, np.float64)
    if w.ndim != 2 or w.shape[0] != w.shape[1] or not 1 <= len(w) <= _LARGEST:
        raise ValueError(f"fixed_points: weight must be [N, N], N 1 to 10, got {[*w.shape]}")
    found = []
    for kind in itertools.product((0.0, 1.0, np.nan), repeat=len(w)):
        y = np.array(kind)
        inside = np.isnan(y)
        if inside.any():
            block = w[np.ix_(inside, inside)]
            if np.linalg.matrix_rank(block) < len(block):
                continue
            y[inside] = np.linalg.solve(block, -w[np.ix_(inside, ~inside)] @ y[~inside])
            if not ((y[inside] > 0) & (y[inside] < 1)).all():
                continue
        found.append(_point(w, y, inside))
    return found


def _point(w: Array, y: Array, inside: NDArray[np.bool_]) -> FixedPoint:
    corner = ((1 - 2 * y) * (w @ y))[~inside]
    scale = (y * (1 - y))[inside, None]
    interior = np.linalg.eigvals(scale * w[np.ix_(inside, inside)])  # of [0, 0] none
    return FixedPoint(y, tuple(map(complex, corner)), tuple(map(complex, interior)))


def _system(op: str, weight: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    w, at = np.asarray(weight, np.float64), np.asarray(y, np.float64)
    if w.ndim != 2 or w.shape[0] != w.shape[1] or at.ndim == 0 or at.shape[-1] != len(w):
        found = f"{[*w.shape]} and {[*at.shape]}"
        raise ValueError(f"{op}: weight and y must be [N, N] and [..., N], got {found}")
    if not ((at >= 0) & (at <= 1)).all():
        raise ValueError(f"{op}: y must be from 0 to 1, got {at.min()} to {at.max()}")
    return w, at
