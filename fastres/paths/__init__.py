"""paths: the gradient of any residual network, separated exactly by the length of its paths."""

from fastres.paths.gradients import path_gradients
from fastres.paths.result import PathGradients

__all__ = ["PathGradients", "path_gradients"]
