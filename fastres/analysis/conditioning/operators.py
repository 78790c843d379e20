"""operators: symmetric matrices known by their products with many vectors at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

LIMIT = 2 << 30  # bytes of a dense matrix: what any machine of today holds


class SymmetricOperator(ABC):
    """A symmetric matrix [P, P] whose products with vectors can be had, and nothing else.

    `operator @ v` takes a tensor [P] or [P, K], as SciPy and curvlinops do; `to_scipy` and
    `to_curvlinops` make it one of theirs.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (size, size)
        self.dtype, self.device = dtype, device

    @abstractmethod
    def products(self, vectors: Tensor) -> Tensor:
        """Multiply vectors [K, P], a row each: [K, P]."""

    def __matmul__(self, x: Tensor) -> Tensor:
        """Multiply a vector [P] or the columns of a matrix [P, K]."""
        if x.dim() not in (1, 2) or x.size(0) != self.shape[1]:
            size = self.shape[1]
            raise ValueError(
                f"hessian: vectors must have shape [{size}] or [{size}, K], got {[*x.shape]}"
            )
        rows = x[None] if x.dim() == 1 else x.mT
        out = self.products(rows.to(self.device, self.dtype).contiguous())
        return out[0] if x.dim() == 1 else out.mT

    def dense(self, limit: int = LIMIT, chunk: int = 64) -> Tensor:
        """Compute the matrix itself, [P, P], symmetric to the last bit.

        Args:
            limit: Bytes that it may take.
            chunk: Vectors multiplied at once.

        Raises:
            ValueError: If it would take more; the message says how much.
        """
        size = self.shape[0]
        wanted = size * size * self.dtype.itemsize
        if wanted > limit:
            raise ValueError(
                f"hessian: a dense matrix must take at most {limit / 2**30:.3g} GiB, got "
                f"{wanted / 2**30:.3g} GiB for {size} x {size}; its products, operator @ v, need "
                "no matrix: lanczos(operator) and extreme_eigenvalues(operator, k) use them"
            )
        full = torch.empty(size, size, dtype=self.dtype, device=self.device)
        for first in range(0, size, chunk):
            last = min(first + chunk, size)
            rows = torch.zeros(last - first, size, dtype=self.dtype, device=self.device)
            rows[:, first:last].fill_diagonal_(1)
            full[first:last] = self.products(rows)
        return (full + full.mT) / 2

    def to_scipy(self) -> LinearOperator:
        """Make a LinearOperator of SciPy, such as eigsh takes.

        Raises:
            ModuleNotFoundError: Without SciPy.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "hessian: to_scipy needs SciPy: pip install 'fastres[hessian]'"
            ) from None

        kind = torch.empty(0, dtype=self.dtype).numpy().dtype

        def multiply(x: Any) -> Any:
            own = np.array(x, kind)  # a copy: torch wants no negative strides, no read-only memory
            return (self @ torch.from_numpy(own)).cpu().numpy()

        both = {"matvec": multiply, "matmat": multiply}
        return LinearOperator(self.shape, dtype=kind, rmatvec=multiply, rmatmat=multiply, **both)

    def to_curvlinops(self) -> Any:
        """Make a PyTorchLinearOperator of curvlinops, which its estimators take.

        Raises:
            ModuleNotFoundError: Without curvlinops.
        """
        base = import_curvlinops("to_curvlinops")._torch_base.PyTorchLinearOperator
        size, products = self.shape[0], self.products

        class Wrapped(base):  # type: ignore[misc, valid-type]
            """A symmetric operator of fastres."""

            SELF_ADJOINT = True
            device, dtype = self.device, self.dtype

            def _matmat(self, matrix: list[Tensor]) -> list[Tensor]:
                return [products(matrix[0].mT.contiguous()).mT]

        return Wrapped([(size,)], [(size,)])


class FunctionHessian(SymmetricOperator):
    """The Hessian of a function of tensors, forward over reverse, by torch.func.

    Args:
        loss: Maps the tensors to a scalar.
        point: Where; all of one floating dtype. The operator acts on them flattened, one after
            the other.

    Raises:
        TypeError: If the tensors have no single floating dtype.
        ValueError: If there are none, or the loss is no scalar.
    """

    def __init__(self, loss: Callable[..., Tensor], *point: Tensor) -> None:
        dtypes = {t.dtype for t in point}
        if not point:
            raise ValueError("hessian: point must have at least one tensor, got none")
        if len(dtypes) > 1 or not point[0].is_floating_point():
            raise TypeError(f"hessian: point must have one floating dtype, got {dtypes}")
        self.point = tuple(t.detach() for t in point)
        with torch.no_grad():
            value = loss(*self.point)
        if value.dim():
            raise ValueError(f"hessian: loss must be a scalar, got shape {[*value.shape]}")
        size = sum(t.numel() for t in point)
        super().__init__(size, point[0].dtype, point[0].device)
        self._gradient = torch.func.grad(loss, tuple(range(len(point))))

    def gradient(self) -> Tensor:
        """Compute the gradient, [P]."""
        return torch.cat([g.flatten() for g in self._gradient(*self.point)])

    def products(self, vectors: Tensor) -> Tensor:
        """Multiply vectors [K, P], all at once: [K, P]."""

        def product(*tangents: Tensor) -> Sequence[Tensor]:
            found: Sequence[Tensor] = torch.func.jvp(self._gradient, self.point, tangents)[1]
            return found

        sizes = [t.numel() for t in self.point]
        parts = vectors.split(sizes, 1)  # type: ignore[no-untyped-call]
        tangents = (p.reshape(-1, *t.shape) for p, t in zip(parts, self.point, strict=True))
        rows = torch.func.vmap(product)(*tangents)
        return torch.cat([row.reshape(len(vectors), -1) for row in rows], 1)


def import_curvlinops(what: str) -> Any:
    """Import curvlinops, or say how to get it."""
    try:
        import curvlinops
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"hessian: {what} needs curvlinops: pip install 'fastres[hessian]'"
        ) from None
    return curvlinops
