"""nn: modules whose residual adds are declared, so that finding them needs no search."""

from fastres.nn.cifar_resnet import CifarResNet, cifar_resnet
from fastres.nn.conv_blocks import BasicBlock, Bottleneck, PaddedShortcut, PreActBlock
from fastres.nn.residual_mlp import ResidualMLP, ResidualStack
from fastres.nn.weights import load_weights

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "PaddedShortcut",
    "PreActBlock",
    "ResidualMLP",
    "ResidualStack",
    "cifar_resnet",
    "load_weights",
]
