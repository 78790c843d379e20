"""conv_blocks: residual blocks of convolutions: basic, bottleneck and pre-activated."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fastres.ops.calls import check_gate
from fastres.ops.layout import scaled
from fastres.sites import add

OPTIONS = ("A", "B")


class PaddedShortcut(nn.Module):
    """A skip without weights: strided, and padded with channels of zeros (option A).

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out, as many zeros before as after them.
        stride: Of height and width.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.before = stride, (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        """Describe it in print(model)."""
        return f"stride={self.stride}, zeros={self.before + self.after}"


def _shortcut(inputs: int, outputs: int, stride: int, option: str, norm: bool) -> nn.Module:
    """Return the skip of a block: the identity wherever its shape allows that."""
    if option not in OPTIONS:
        raise ValueError(f"shortcut: option must be A or B, got {option!r}")
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if option == "A":
        return PaddedShortcut(inputs, outputs, stride)
    convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return nn.Sequential(convolution, *([nn.BatchNorm2d(outputs)] if norm else []))


def _join(skip: Tensor, branch: Tensor, gate: float | Tensor | None) -> Tensor:
    """Compute skip + gate * branch, as a site."""
    check_gate("block", gate, branch, branch.size(0))
    return add(skip, branch if gate is None else scaled(branch, gate))


class BasicBlock(nn.Module):
    """y = relu(skip + bn2(conv2(relu(bn1(conv1(x)))))), two convolutions of 3x3.

    He et al. 2016 (arXiv 1512.03385), figure 2 and section 4.2.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Of the first convolution and of the skip.
        option: Of the skip where the shape changes: A, strided and padded with zeros, or B, a
            convolution of 1x1 with batch norm.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, option: str = "A") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, option, norm=True)

    def forward(self, x: Tensor, gate: float | Tensor | None = None) -> Tensor:
        """Map x [B, inputs, H, W] to [B, outputs, H / stride, W / stride].

        The gate scales the branch, bn2(...): a number, or a tensor [] or [B]; None: 1.
        """
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(_join(self.shortcut(x), branch, gate))


class Bottleneck(nn.Module):
    """y = relu(skip + branch): 1x1 to `width` channels, 3x3, and 1x1 to four times as many.

    He et al. 2016 (arXiv 1512.03385), figure 5; the stride is that of the 3x3, as in torchvision.

    Args:
        inputs: Channels that come in.
        width: Channels inside; 4 * width go out.
        stride: Of the 3x3 convolution and of the skip.
        option: As in BasicBlock.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int = 1, option: str = "B") -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, option, norm=True)

    def forward(self, x: Tensor, gate: float | Tensor | None = None) -> Tensor:
        """Map x [B, inputs, H, W] to [B, 4 * width, H / stride, W / stride].

        The gate scales the branch, as in BasicBlock.
        """
        inner = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(_join(self.shortcut(x), self.bn3(self.conv3(inner)), gate))


class PreActBlock(nn.Module):
    """y = skip + conv2(relu(bn2(conv1(relu(bn1(x)))))): nothing stands on the identity skip.

    He et al. 2016 (arXiv 1603.05027), figure 4(e). Where the shape changes, the skip starts from
    relu(bn1(x)), as there.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Of the first convolution and of the skip.
        option: Of the skip where the shape changes: A, strided and padded with zeros, or B, a
            convolution of 1x1.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, option: str = "A") -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = _shortcut(inputs, outputs, stride, option, norm=False)

    def forward(self, x: Tensor, gate: float | Tensor | None = None) -> Tensor:
        """Map x [B, inputs, H, W] to [B, outputs, H / stride, W / stride].

        The gate scales the branch, as in BasicBlock.
        """
        active = F.relu(self.bn1(x))
        skip = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(active)
        return _join(skip, self.conv2(F.relu(self.bn2(self.conv1(active)))), gate)
