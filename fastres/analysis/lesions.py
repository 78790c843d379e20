"""lesions: the results of lesion studies: errors, their changes, intervals, interactions."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastres import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Scores:
    """The score of every sample under every change of a model, and without one.

    Attributes:
        baseline: Score of each sample without a change, [N].
        values: Score of each sample under each change, [S, N].
    """

    def __init__(self, baseline: Tensor, values: Tensor) -> None:
        self.baseline, self.values = baseline, values

    @property
    def error(self) -> Tensor:
        """Mean score under each, [S] float64."""
        return self.values.double().mean(1)

    @property
    def change(self) -> Tensor:
        """By how much each raises the mean score, [S] float64."""
        return self._differences().mean(1)

    @property
    def change_error(self) -> Tensor:
        """Standard error of the change, [S] float64, of paired samples; nan for one sample.

        The same samples are scored with and without the lesion, so what is uncertain is their
        difference alone: a lesion that changes 10 of 1000 answers is known to 10 of 1000.
        """
        return self._differences().std(1) / self.values.size(1) ** 0.5

    def interval(self, level: float = 0.95) -> Tensor:
        """Bound the change of each, [S, 2] float64, by the normal law.

        Raises:
            ValueError: If level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"interval: level must be between 0 and 1, got {level}")
        half = NormalDist().inv_cdf(0.5 + level / 2) * self.change_error
        return torch.stack([self.change - half, self.change + half], 1)

    def _columns(self) -> dict[str, Any]:
        low, high = self.interval().T
        return {
            "error": self.error.numpy(),
            "change": self.change.numpy(),
            "change_error": self.change_error.numpy(),
            "low": low.numpy(),
            "high": high.numpy(),
        }

    def _differences(self) -> Tensor:
        return self.values.double() - self.baseline.double()


class Lesions(Scores):
    """What `delete` measures.

    Attributes:
        sites: Names of all sites of the model.
        sets: Names of the deleted sites of each lesion, [S].
    """

    def __init__(
        self,
        sites: tuple[str, ...],
        sets: tuple[tuple[str, ...], ...],
        baseline: Tensor,
        values: Tensor,
    ) -> None:
        super().__init__(baseline, values)
        self.sites, self.sets = sites, sets

    @property
    def interactions(self) -> Tensor:
        """How much more two deletions change together than each alone, [sites, sites] float64.

        D_ij - D_i - D_j with D the change; nan on the diagonal and for pairs that were not deleted.

        Raises:
            RuntimeError: If there is no pair with both of its sites alone: `pairs` lists them.
        """
        change = {
            frozenset(each): value for each, value in zip(self.sets, self.change, strict=True)
        }
        found = torch.full((len(self.sites),) * 2, torch.nan, dtype=torch.float64)
        for i, one in enumerate(self.sites):
            for j, two in enumerate(self.sites):
                parts = [frozenset(names) for names in ((one, two), (one,), (two,))]
                if i != j and all(part in change for part in parts):
                    found[i, j] = change[parts[0]] - change[parts[1]] - change[parts[2]]
        if bool(found.isnan().all()):
            raise RuntimeError("interactions: sets must have two sites together and alone")
        return found

    def to_frame(self) -> Any:
        """Return a pandas.DataFrame with one row per lesion.

        Columns: sites (names joined by a space), deleted (how many), error, change, change_error,
        low, high (95 %).

        Raises:
            ImportError: If pandas is not installed.
        """
        names = [" ".join(names) for names in self.sets]
        return _frame({"sites": names, "deleted": list(map(len, self.sets)), **self._columns()})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the mean score of each lesion, in order, with its interval, and the baseline.

        Args:
            ax: Where to draw; None makes a new figure.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        ax = plots.figure(7.0, 3.2).subplots() if ax is None else ax
        dark, _, light = plots.colours(3)
        spread = 1.96 * self.change_error
        ax.bar(range(len(self.sets)), self.error, color=light, yerr=spread, ecolor="0.4")
        ax.axhline(float(self.baseline.double().mean()), color=dark, lw=1.2, label="no lesion")
        plots.decorate(ax, "lesion", "error")
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        base, count = float(self.baseline.double().mean()), len(self.sets)
        return (
            f"Lesions: {count} of {len(self.sites)} sites, {len(self.baseline)} samples, "
            f"{base:.4g} without"
        )


class Reorderings(Scores):
    """What `reorder` measures.

    Attributes:
        sites: Names of all sites of the model.
        orders: Of each, which branch stands at each place, [S][sites].
    """

    def __init__(
        self,
        sites: tuple[str, ...],
        orders: tuple[tuple[int, ...], ...],
        baseline: Tensor,
        values: Tensor,
    ) -> None:
        super().__init__(baseline, values)
        self.sites, self.orders = sites, orders

    @property
    def tau(self) -> Tensor:
        """Kendall's rank correlation of each order with that of the model, [S] float64."""
        return torch.tensor([kendall_tau(order) for order in self.orders], dtype=torch.float64)

    def to_frame(self) -> Any:
        """Return a pandas.DataFrame with one row per order.

        Columns: tau, error, change, change_error, low, high (95 %).

        Raises:
            ImportError: If pandas is not installed.
        """
        return _frame({"tau": self.tau.numpy(), **self._columns()})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the mean score against Kendall's tau, from 1 down.

        Args:
            ax: Where to draw; None makes a new figure.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        ax = plots.figure(4.6, 3.2).subplots() if ax is None else ax
        ax.plot(self.tau, self.error, "o", color=plots.colours(3)[1], ms=4)
        plots.decorate(ax, r"Kendall $\tau$ of the order", "error")
        ax.invert_xaxis()
        return ax

    def __repr__(self) -> str:
        base, count = float(self.baseline.double().mean()), len(self.orders)
        return (
            f"Reorderings: {count} of {len(self.sites)} sites, {len(self.baseline)} samples, "
            f"{base:.4g} without"
        )


def kendall_tau(order: Sequence[int]) -> float:
    """Correlate an order with 0, 1, ..., n - 1: 1 - 4 inversions / (n (n - 1)).

    Raises:
        ValueError: If it is no order of 2 or more.

    Example:
        >>> kendall_tau([0, 1, 2]), kendall_tau([2, 1, 0])
        (1.0, -1.0)
    """
    n = len(order)
    if n < 2 or sorted(order) != list(range(n)):
        raise ValueError(f"kendall_tau: order must have 0 to {max(n, 2) - 1} once, got {order}")
    inversions = sum(order[i] > order[j] for i in range(n) for j in range(i + 1, n))
    return 1 - 4 * inversions / (n * (n - 1))


def _frame(columns: dict[str, Any]) -> Any:
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("to_frame needs pandas: pip install fastres[demo]") from error
    return pd.DataFrame(columns)
