"""nn: modules whose residual adds are declared, so that finding them needs no search."""

from fastres.nn.initialisations import INITIALISATIONS, Initialisation, initialise
from fastres.nn.residual_mlp import ResidualMLP, ResidualStack
from fastres.nn.shortcut_network import ShortcutNetwork

__all__ = [
    "INITIALISATIONS",
    "Initialisation",
    "ResidualMLP",
    "ResidualStack",
    "ShortcutNetwork",
    "initialise",
]
