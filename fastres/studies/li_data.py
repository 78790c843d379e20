"""li_data: images reduced to whitened principal components, and what a linear map makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fastres.formats import Bytes


@dataclass(frozen=True)
class Task:
    """A regression from d features to d targets, with squared loss ||y - f(x)||^2 / (2 B)."""

    x: Tensor  # [B, d] float64
    y: Tensor  # [B, d] float64

    @property
    def xx(self) -> Tensor:
        """E[x x^T], [d, d]."""
        return self.x.mT @ self.x / len(self.x)

    @property
    def yx(self) -> Tensor:
        """E[y x^T], [d, d]."""
        return self.y.mT @ self.x / len(self.x)

    @property
    def least(self) -> float:
        """The loss of the best linear map, E[y x^T] E[x x^T]^-1."""
        best = torch.linalg.solve(self.xx, self.yx, left=False)
        return float((self.y - self.x @ best.mT).square().sum() / (2 * len(self.x)))

    def condensed(self) -> Task:
        """Replace the samples by d that have the moments E[x x^T] and E[y x^T] of all.

        A linear network sees no more of its data. These it can learn without error, so its loss on
        them is what it lacks to the best linear map.
        """
        scale = self.x.size(1) ** 0.5
        root = torch.linalg.cholesky(self.xx)  # x = scale root^T has E[x x^T] = xx
        return Task(scale * root.mT, scale * torch.linalg.solve(root, self.yx.mT))


def whitened(x: Tensor, components: int) -> Tensor:
    """Reduce samples to principal components of mean 0 and covariance 1.

    Args:
        x: Samples, [B, N], any real dtype.
        components: How many, those of the largest variance. The sign of a component is arbitrary:
            its largest loading is made positive.

    Returns:
        [B, components] float64.

    Raises:
        ValueError: If the samples do not vary in so many directions.
    """
    x = x.double()
    centred = x - x.mean(0)
    variance, basis = torch.linalg.eigh(centred.mT @ centred / len(x))
    rank = int((variance > variance[-1] * len(variance) * torch.finfo(x.dtype).eps).sum())
    if not 1 <= components <= rank:
        raise ValueError(
            f"whitened: components must be 1 to {rank}, the rank of the covariance, "
            f"got {components}"
        )
    variance, basis = variance.flip(0)[:components], basis.flip(1)[:, :components]
    strongest = basis.gather(0, basis.abs().argmax(0, keepdim=True))  # [1, components]
    return centred @ (basis * strongest.sign()) / variance.sqrt()


def task(images: Bytes, labels: Bytes, components: int = 10) -> Task:
    """Make the task of Li et al. 2016, section 4: whitened components to one-hot labels.

    Args:
        images: [B, C, H, W].
        labels: [B], 0 to components - 1: the networks keep their width.
        components: d.

    Raises:
        ValueError: If there are more classes than components, or less variance than that.
    """
    classes = torch.from_numpy(labels).long()
    if int(classes.max()) >= components:
        raise ValueError(
            f"task: components must be at least the classes, {int(classes.max()) + 1}, as networks "
            f"with shortcuts keep their width, got {components}"
        )
    x = whitened(torch.from_numpy(images).flatten(1), components)
    return Task(x, F.one_hot(classes, components).double())
