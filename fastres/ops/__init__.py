"""ops: the fused operators; a file each, with docstring, reference, fake kernel and autograd."""

from fastres.ops.batch_norm_residual import batch_norm_residual
from fastres.ops.conv_stack import conv_stack
from fastres.ops.mlp_stack import mlp_stack
from fastres.ops.path_accumulate import path_accumulate
from fastres.ops.residual_add import residual_add
from fastres.ops.stats import Stats

__all__ = ["Stats", "batch_norm_residual", "conv_stack", "mlp_stack", "path_accumulate", "residual_add"]
