"""folding: the batch norms of basic blocks in the weights of a stack, and what changes them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from operator import is_
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastres.hooks import has_no_hooks
from fastres.ops.conv_stack import as_packed

KEPT: Final = "_folded"  # in the __dict__ of a stack's first block: its Folded
_CONV: Final = {  # of a convolution that a stack can hold
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (1, 1),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}


@dataclass(frozen=True)
class Basic:
    """A block relu(x + norm2(conv2(relu(norm1(conv1(x)))))), by the names of its children."""

    convs: tuple[str, str]
    norms: tuple[str, str]
    others: tuple[str, ...]  # ReLU, and what does nothing


def basic_of(block: nn.Module) -> Basic | None:
    """Return what `fuse` has found a block to be."""
    basic: Basic | None = getattr(getattr(type(block), "_fused_code", None), "basic", None)
    return basic


class _Steps:
    """Counts the steps of all optimizers: fused ones leave no trace in a tensor's version."""

    def __init__(self) -> None:
        self.taken = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: object) -> None:
        self.taken += 1


_steps: Final = cache(_Steps)  # begins with the first stack


class Folded:
    """A stack's weights with the batch norms in them, and all that they depend on.

    `holds` is asked at every call, and a block has 50 things that could have changed: so they lie
    in lists that are gone through without a line of Python for each.
    """

    def __init__(self, blocks: tuple[nn.Module, ...]) -> None:
        self.blocks = blocks
        self.weights: tuple[Tensor, ...] = ()  # w1, b1, w2, b2 as conv_stack takes them
        self.sources: list[Tensor] = []
        self._modules: list[nn.Module] = []
        self._types: list[type[nn.Module]] = []
        self._slots: list[tuple[dict[str, Any], str]] = []  # where something is kept, and what:
        self._values: list[Any] = []
        self._held: list[Tensor] = []
        self._state: list[int] = []

    def note(self, module: nn.Module) -> None:
        """Depend on the class of a module, and on no hook being on it."""
        self._modules.append(module)
        self._types.append(type(module))

    def read(self, place: dict[str, Any], name: str) -> Any:
        """Depend on what is kept at a place; return it."""
        value = place[name]
        self._slots.append((place, name))
        self._values.append(value)
        if isinstance(value, Tensor):
            self.sources.append(value)
        return value

    def close(self) -> None:
        """Note the present state of all tensors."""
        self._held = [t.detach() for t in self.sources]  # nothing else can come to lie there
        self._state = self._states()

    def holds(self) -> bool:
        """Tell whether nothing has changed."""
        return (
            all(map(is_, map(type, self._modules), self._types))
            and all(map(has_no_hooks, self._modules))
            and all(map(is_, [place.get(name) for place, name in self._slots], self._values))
            and self._states() == self._state
        )

    def _states(self) -> list[int]:
        states = [t._version for t in self.sources] + [t.data_ptr() for t in self.sources]
        return [*states, _steps().taken]


def is_idle(module: nn.Module | None) -> bool:
    """Tell whether a module returns what it is given: an Identity, or an empty Sequential."""
    return type(module) is nn.Identity or (type(module) is nn.Sequential and not len(module))


def conv_fits(conv: nn.Module) -> bool:
    """Tell whether a module is a convolution of 3x3 that keeps the shape."""
    if type(conv) is not nn.Conv2d or conv.in_channels != conv.out_channels:
        return False
    return all(getattr(conv, name) == value for name, value in _CONV.items())


def gather(blocks: tuple[nn.Module, ...]) -> Folded | None:
    """Note all that a stack of these blocks depends on; None if they are none."""
    found = Folded(blocks)
    for block in blocks:
        basic = basic_of(block)
        if basic is None or not has_no_hooks(block):
            return None
        found.note(block)
        if not all(_read(found, block, name) for name in basic.others):
            return None
        for name in basic.convs:
            if not _read(found, block, name) or not _read_conv(found, block._modules[name]):
                return None
        for name in basic.norms:
            if not _read(found, block, name) or not _read_norm(found, block._modules[name]):
                return None
    if any(t.is_inference() for t in found.sources):  # they count no versions
        return None
    if len({(t.dtype, t.device) for t in found.sources if t.dim() == 4}) != 1:
        return None
    found.close()
    return found


def _read(found: Folded, block: nn.Module, name: str) -> bool:
    child = found.read(block._modules, name)
    found.note(child)
    known = is_idle(child) or type(child) in (nn.ReLU, nn.Conv2d, nn.BatchNorm2d)
    return known and has_no_hooks(child)


def _read_conv(found: Folded, conv: nn.Module | None) -> bool:
    if conv is None or not conv_fits(conv):
        return False
    for name in _CONV:
        found.read(conv.__dict__, name)
    for name in conv._parameters:
        found.read(conv._parameters, name)
    return {"weight", "bias"} <= conv._parameters.keys()


def _read_norm(found: Folded, norm: nn.Module | None) -> bool:
    if type(norm) is not nn.BatchNorm2d or found.read(norm.__dict__, "training"):
        return False
    found.read(norm.__dict__, "eps")
    for place in (norm._parameters, norm._buffers):
        for name in place:
            if name != "num_batches_tracked":
                found.read(place, name)
    if not {"weight", "bias"} <= norm._parameters.keys():
        return False
    return norm.running_mean is not None and norm.running_var is not None


@torch.no_grad()
def fold(blocks: tuple[nn.Module, ...]) -> tuple[Tensor, ...]:
    """Fold each batch norm into its convolution, in float64."""
    parts: list[list[Tensor]] = [[], [], [], []]  # w1, b1, w2, b2
    dtype = torch.float64
    for block in blocks:
        basic = cast("Basic", basic_of(block))
        for i, (conv, norm) in enumerate(zip(basic.convs, basic.norms, strict=True)):
            module = cast("nn.Conv2d", block._modules[conv])
            dtype = module.weight.dtype
            folded = _fold_one(module, cast("nn.BatchNorm2d", block._modules[norm]))
            parts[2 * i].append(folded[0])
            parts[2 * i + 1].append(folded[1])
    w1, b1, w2, b2 = (torch.stack(part).to(dtype) for part in parts)
    return as_packed(w1), b1, as_packed(w2), b2


def _fold_one(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return weight [C, C, 3, 3] and bias [C] of norm(conv(x)), in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean.double() if conv.bias is None else conv.bias - norm.running_mean
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias
    return conv.weight.double() * scale[:, None, None, None], bias
