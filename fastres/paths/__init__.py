"""paths: the gradient of any residual network, separated exactly by the length of its paths."""

from fastres.paths.gradients import path_gradients
from fastres.paths.result import PathGradients
from fastres.paths.stack import mlp_stack_paths

__all__ = ["PathGradients", "mlp_stack_paths", "path_gradients"]
