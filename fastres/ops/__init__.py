"""ops: the fused operators; a file each, with docstring, reference, fake kernel and autograd."""

from fastres.ops.residual_add import Stats, residual_add

__all__ = ["Stats", "residual_add"]
