"""fastres: residual networks, observed inside the kernels that add the branch to the stream."""

from fastres import nn
from fastres.fusing import Fusion, fuse, restore
from fastres.gates import Gates, gate
from fastres.ops import (
    Stats,
    batch_norm_residual,
    conv_stack,
    mlp_stack,
    path_accumulate,
    residual_add,
)
from fastres.paths import PathGradients, mlp_stack_paths, path_gradients
from fastres.record import Tape, record
from fastres.sites import Site, trace

__all__ = [
    "Fusion",
    "Gates",
    "PathGradients",
    "Site",
    "Stats",
    "Tape",
    "batch_norm_residual",
    "conv_stack",
    "fuse",
    "gate",
    "mlp_stack",
    "mlp_stack_paths",
    "nn",
    "path_accumulate",
    "path_gradients",
    "record",
    "residual_add",
    "restore",
    "trace",
]
__version__ = "0.1.0"
