"""nn: modules whose residual adds are declared, so that finding them needs no search."""

from fastres.nn.residual_mlp import ResidualMLP, ResidualStack

__all__ = ["ResidualMLP", "ResidualStack"]
