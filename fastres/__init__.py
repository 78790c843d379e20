"""fastres: residual networks, observed inside the kernels that add the branch to the stream."""

from fastres.ops import Stats, residual_add

__all__ = ["Stats", "residual_add"]
__version__ = "0.1.0"
