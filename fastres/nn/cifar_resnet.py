"""cifar_resnet: the ResNets of 20 to 1202 layers for images of 32x32 (He et al. 2016)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fastres.nn.conv_blocks import OPTIONS, BasicBlock, PreActBlock
from fastres.nn.weights import load_weights
from fastres.ops.calls import check_gate
from fastres.ops.stack_inputs import expanded

STAGES = (16, 32, 64)  # channels; height and width are halved from stage to stage


class Stage(nn.Sequential):
    """Blocks one after the other, each with a gate of its own."""

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """Map x [B, C, H, W] by all blocks; gates [blocks, B] scale their branches, None: 1."""
        for place, block in enumerate(self):
            x = block(x, None if gates is None else gates[place])
        return x


class CifarResNet(nn.Module):
    """Three stages of (depth - 2) / 6 blocks of two convolutions (arXiv 1512.03385, section 4.2).

    The names in its state_dict are those of akamaster/pytorch_resnet_cifar10: conv1, bn1,
    layer1.0.conv1 ... layer3.8.bn2, linear; of option B layer2.0.shortcut.0 and .1 besides. With
    pre-activation bn1 stands after the last block instead of the first convolution. The sites are
    layer1.0 and so on. `cifar_resnet` makes one.
    """

    def __init__(
        self, depth: int, classes: int = 10, option: str = "A", preactivation: bool = False
    ) -> None:
        super().__init__()
        _check(depth, classes, option, preactivation)
        self.depth, self.classes, self.preactivation = depth, classes, preactivation
        block = PreActBlock if preactivation else BasicBlock
        self.conv1 = nn.Conv2d(3, STAGES[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STAGES[-1] if preactivation else STAGES[0])
        inputs = STAGES[0]
        for stage, outputs in enumerate(STAGES, 1):
            first = block(inputs, outputs, 1 if stage == 1 else 2, option)
            later = [block(outputs, outputs, 1, option) for _ in range((depth - 2) // 6 - 1)]
            self.add_module(f"layer{stage}", Stage(first, *later))
            inputs = outputs
        self.linear = nn.Linear(inputs, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's global generator (arXiv 1502.01852, equation 10)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, gates: float | Tensor | None = None) -> Tensor:
        """Map images x [B, 3, H, W] to logits [B, classes]; made for H = W = 32.

        Gates scale the L = (depth - 2) / 2 branches: a number, or a tensor [], [L] or [L, B];
        None: 1.
        """
        if x.dim() != 4 or x.size(1) != 3:
            raise ValueError(f"CifarResNet: x must have shape [B, 3, H, W], got {[*x.shape]}")
        each = (self.depth - 2) // 6
        check_gate("CifarResNet", gates, x, len(STAGES) * each, x.size(0))
        rows = expanded(gates, x, len(STAGES) * each)
        x = self.conv1(x)
        if not self.preactivation:
            x = F.relu(self.bn1(x))
        for stage in range(1, len(STAGES) + 1):
            own = None if rows is None else rows[(stage - 1) * each : stage * each]
            x = self.get_submodule(f"layer{stage}")(x, own)
        if self.preactivation:
            x = F.relu(self.bn1(x))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def cifar_resnet(
    depth: int,
    classes: int = 10,
    option: str = "A",
    preactivation: bool = False,
    *,
    weights: str | Path | None = None,
) -> CifarResNet:
    """Make a ResNet for images of 32x32, in train mode.

    Args:
        depth: Layers, 6 n + 2: 20, 32, 44, 56, 110 and 1202 are those of the paper.
        classes: Outputs.
        option: Of the two skips where the shape changes: A, strided and padded with zeros, as in
            the paper, or B, a convolution of 1x1, with batch norm where nothing is pre-activated.
        preactivation: Whether batch norm and ReLU come before each convolution (arXiv 1603.05027).
        weights: A file of weights to load, such as those of akamaster/pytorch_resnet_cifar10; None:
            drawn from torch's global generator.

    Raises:
        TypeError: If depth or classes is no integer, or preactivation no bool.
        ValueError: If an argument is out of its range, or the file holds other weights.
        FileNotFoundError: If there is no such file.

    Example:
        >>> model = cifar_resnet(20)
        >>> sum(p.numel() for p in model.parameters())
        269722
    """
    network = CifarResNet(depth, classes, option, preactivation)
    if weights is not None:
        load_weights(network, weights, f"ResNet-{depth}")
    return network


def _check(depth: int, classes: int, option: str, preactivation: bool) -> None:
    """Raise the error that names the argument, the rule and the value, if there is one."""
    for name, value in (("depth", depth), ("classes", classes)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"cifar_resnet: {name} must be an integer, got {value!r}")
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"cifar_resnet: depth must be 6 n + 2 and 8 or more, got {depth}")
    if classes < 1:
        raise ValueError(f"cifar_resnet: classes must be >= 1, got {classes}")
    if option not in OPTIONS:
        raise ValueError(f"cifar_resnet: option must be A or B, got {option!r}")
    if not isinstance(preactivation, bool):
        raise TypeError(f"cifar_resnet: preactivation must be a bool, got {preactivation!r}")
