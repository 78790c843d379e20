"""verifying: whether a changed model still computes what it did, up to rounding."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastres.versions import tensors_in

_TIMES: Final = 8.0  # how often the distance that rounding makes, the larger of two
_ULPS: Final = 32.0
_GROUPS: Final = ("outputs", "gradients", "buffers")
Found = dict[str, list[Tensor]]  # group -> its tensors


class Verified:
    """What a model computes on an example, and how far rounding takes it.

    Outputs, the gradients of their product with fixed random numbers, and the buffers after the
    pass; and all of it twice more with weights that differ in their last digits, after which no
    rounding in the pass is the same. What is further apart than that must be so with all three
    weights: where a value happens to lie at the kink of a ReLU, rounding decides on which side.
    Buffers, gradients and random generators stay as they are. Not `derived`: without gradients.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], derived: bool = True
    ) -> None:
        self._derived = derived
        self._given = args, kwargs
        self._eps = 0.0
        plain = self._run(model, 0)
        floating = [t.dtype for each in plain.values() for t in each if t.is_floating_point()]
        self._eps = max((torch.finfo(dtype).eps for dtype in floating), default=0.0)
        self._runs = [plain, self._run(model, 1), self._run(model, 2)]

    def difference(self, model: nn.Module) -> str:
        """Say what is further apart than rounding explains; "" if nothing is."""
        wrong = ""
        for seed, plain in enumerate(self._runs):
            if not (wrong := self._compare(plain, self._run(model, seed))):
                break
        return wrong

    def _compare(self, plain: Found, found: Found) -> str:
        for name, expected in plain.items():
            kinds = [[(t.shape, t.dtype) for t in each] for each in (expected, found[name])]
            if kinds[0] != kinds[1]:
                return f"{name} had other shapes or dtypes"
            first, *others = self._runs
            noise = max(_distance(other[name], first[name]) for other in others)
            apart, scale = _distance(found[name], expected), _distance(expected)
            if not apart <= _TIMES * noise + _ULPS * self._eps * scale:
                return f"{name} were {apart:.2g} apart, of which rounding explains {noise:.2g}"
        return ""

    def _run(self, model: nn.Module, seed: int) -> Found:
        """Run the model forward and backward, from seed 1 on with noise in its weights."""
        noise, generator = self._eps * min(seed, 1), torch.Generator().manual_seed(seed)
        args, kwargs = pytree.tree_map_only(Tensor, _leaf, self._given)
        cuda = {t.device.index for t in model.parameters() if t.is_cuda}
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(self._derived),
            torch.random.fork_rng(sorted(cuda)),
        ):
            torch.manual_seed(0)
            state = {name: t.clone() for name, t in model.named_buffers()}
            weights = {}
            for name, t in model.named_parameters():
                factor = 1 + noise * torch.randn(t.shape, generator=generator).to(t)
                weights[name] = (t.detach() * factor).requires_grad_(t.requires_grad)
            out = torch.func.functional_call(model, weights | state, args, kwargs)
            outputs = [t for t in tensors_in(out) if t.is_floating_point()]
            leaves = [*weights.values(), *tensors_in((args, kwargs))]
            gradients = _gradients(outputs, leaves)
        values = [t.detach() for t in outputs], gradients, list(state.values())
        return dict(zip(_GROUPS, values, strict=True))


def _distance(a: list[Tensor], b: list[Tensor] | None = None) -> float:
    """Return the norm of all of a - b."""
    others = b or [torch.zeros((), dtype=t.dtype, device=t.device) for t in a]
    apart = [torch.nan_to_num(x.double() - y) for x, y in zip(a, others, strict=True)]
    return math.sqrt(sum(float(t.square().sum()) for t in apart))


def _leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.is_floating_point())


def _gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a random combination of the outputs, where there are any."""
    leaves = [t for t in leaves if t.requires_grad]
    outputs = [t for t in outputs if t.requires_grad]
    if not outputs or not leaves:
        return []
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    found = torch.autograd.grad(outputs, leaves, along, allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]
