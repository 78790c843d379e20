"""fusing: the residual blocks of any model by fused operators, in place, and back."""

from fastres.fusing.fuse import Fusion, fuse, restore

__all__ = ["Fusion", "fuse", "restore"]
