"""nn: modules whose residual adds are declared, so that finding them needs no search."""

from fastres.nn.cifar_resnet import CifarResNet, cifar_resnet
from fastres.nn.conv_blocks import BasicBlock, Bottleneck, PaddedShortcut, PreActBlock
from fastres.nn.initialisations import INITIALISATIONS, Initialisation, initialise
from fastres.nn.layer_network import LayerNetwork
from fastres.nn.residual_mlp import ResidualMLP, ResidualStack
from fastres.nn.shortcut_network import ShortcutNetwork
from fastres.nn.weights import load_weights

__all__ = [
    "INITIALISATIONS",
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "Initialisation",
    "LayerNetwork",
    "PaddedShortcut",
    "PreActBlock",
    "ResidualMLP",
    "ResidualStack",
    "ShortcutNetwork",
    "cifar_resnet",
    "initialise",
    "load_weights",
]
