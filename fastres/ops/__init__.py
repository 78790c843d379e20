"""ops: the fused operators. Each file is one operator: docstring, reference, fake kernel, autograd."""

from fastres.ops.residual_add import Stats, residual_add

__all__ = ["Stats", "residual_add"]
